"""Chat templates: how messages become text, and where the answer is in it.

A tokenizer's settings outside the messages are fixed once (:func:`fix_template`): the
date, and whether the model thinks before it answers. So training, generation, scoring
and export put the same text around the same messages.
"""

import copy
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sbr_jax.data import _jinja, control
from sbr_jax.data.records import Record
from sbr_jax.typing import UserError

_ANSWER = "\ufdd4"
"""Placeholder for an answer, to see what a template writes around it."""

_FIXED = "_sbr_rendering"
_NEAR = 200
_LONGEST = 200
"""Most characters to quote of a template's own error."""


class Rendering(NamedTuple):
    """Settings that a template reads besides the messages."""

    date: str | None = None
    """A day such as ``2024-07-26``; None: the day on which this process first asked."""
    thinking: bool | None = None
    """``enable_thinking``, if any; with True the model thinks by itself."""


class Place(NamedTuple):
    """The text of a conversation around its answer.

    Attributes:
      before: all that the template writes before the answer, up to where it begins.
      space: blanks written there too, which belong to the answer's first token.
      after: what the template writes after the answer.
      asked: the text that a model is given to write an answer.
    """

    before: str
    space: str
    after: str
    asked: str


def fix_template(
    tokenizer: Any, *, date: str | None = None, thinking: bool | None = None
) -> Any:
    """A copy of a tokenizer whose chat template reads nothing from its surroundings.

    Args:
      tokenizer: a transformers tokenizer.
      date: the day that the template gets when it asks, such as ``2024-07-26``.
      thinking: passed to the template as ``enable_thinking``. With True the model
        thinks before it answers. With False or None it answers where the training rows
        have their answers, after an empty block of thoughts if the template writes one.

    Returns:
      A copy with the same files and vocabulary.

    Raises:
      UserError: for a date in another form, or ``thinking`` with a template that has no
        such switch.
    """
    if date is not None:
        _day(date)
    if thinking is not None and "think" not in (default_template(tokenizer) or ""):
        raise UserError(
            f"thinking={thinking}: expected a chat template that can think, got one "
            f"without such a switch in {_name(tokenizer)}: leave the option out"
        )
    fixed = copy.copy(tokenizer)
    setattr(fixed, _FIXED, Rendering(date, thinking))
    return fixed


def rendering_of(tokenizer: Any) -> Rendering:
    """The settings made by :func:`fix_template`."""
    return getattr(tokenizer, _FIXED, Rendering())


def default_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, or None."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or None


def reads_clock(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks for the date."""
    return "strftime_now" in (default_template(tokenizer) or "")


@functools.cache
def process_date() -> str:
    """Today's date when this process first asked, so that midnight changes nothing."""
    return datetime.date.today().isoformat()


def _day(date: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"date: expected a day such as 2024-07-26, got {date!r}"
        ) from error


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None = None,
    *,
    prompt: bool = False,
) -> str:
    """Renders messages with the tokenizer's template.

    The text equals that of transformers' ``apply_chat_template``, except for the
    noncharacters around control tokens in the messages (see :func:`control.encode`).

    Args:
      tokenizer: a transformers tokenizer; see :func:`fix_template`.
      messages: with roles and contents.
      template: to use instead of the tokenizer's own.
      prompt: whether to end with the text that asks for an answer.

    Raises:
      UserError: if there is no template, or it fails, refuses the messages, or takes
        too long.
    """
    text = _render(tokenizer, messages, template or _own(tokenizer), prompt=prompt)
    return _without_blocks(text)


def _own(tokenizer: Any) -> str:
    template = default_template(tokenizer)
    if template is None:
        raise UserError(
            "the tokenizer has no chat template; pass template=, or use encode_text "
            "for a model that is no chat model"
        )
    return template


def _without_blocks(text: str) -> str:
    return text.translate({ord(mark): None for mark in _jinja.BLOCK})


def _render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    prompt: bool = False,
    answer: str | None = None,
) -> str:
    """The text with generation blocks marked; ``answer`` is added last, unchanged."""
    date, thinking = rendering_of(tokenizer)
    marked = control.marked_messages(tokenizer, list(messages), template)
    if answer is not None:
        marked.append({"role": "assistant", "content": answer})
    variables = {
        "tools": None,
        "documents": None,
        **tokenizer.special_tokens_map,
        **({} if thinking is None else {"enable_thinking": thinking}),
        "messages": marked,
        "add_generation_prompt": prompt,
    }
    try:
        return _jinja.render(template, variables, _day(date or process_date()))
    except _jinja.ERRORS as error:
        roles = [message.get("role") for message in marked]
        # A template's error may quote a message, which may be harmful.
        told = str(error)
        for text in (m["content"] for m in marked if isinstance(m.get("content"), str)):
            told = told.replace(text, "…") if text else told
        told = " ".join(_without_blocks(told).split())[:_LONGEST]
        kind = type(error).__name__
        raise UserError(
            f"the chat template of {_name(tokenizer)} refuses messages of the roles "
            f"{roles}: {kind}: {told or 'no reason'}"
        ) from error


def place(tokenizer: Any, record: Record, template: str | None = None) -> Place:
    """Finds the place of a conversation's answer, whatever the answer is.

    Fixed text between the prompt and the answer (a header, an empty block of thoughts)
    counts as before it; blanks belong to the answer.

    Raises:
      UserError: see :func:`render`; also if the place cannot be found.
    """
    template = template or _own(tokenizer)
    context = record.context
    prompt = _without_blocks(_render(tokenizer, context, template, prompt=True))
    marked = _render(tokenizer, context, template, answer=_ANSWER)
    whole = _without_blocks(marked)
    if _ANSWER not in whole:
        # The template ignores answers.
        return Place(prompt, "", "", prompt)
    if whole.count(_ANSWER) > 1:
        raise _lost(tokenizer, "it writes the answer more than once")
    lead, _, after = whole.partition(_ANSWER)
    if not (lead.startswith(prompt) or prompt.startswith(lead)):
        raise _lost(tokenizer, "with the answer the prompt is written in another way")
    thinks = bool(rendering_of(tokenizer).thinking)
    start = _start(tokenizer, marked, lead, prompt)
    before, space = lead[:start], lead[start:]
    return Place(before, space, after, prompt if thinks else before)


def _start(tokenizer: Any, marked: str, lead: str, prompt: str) -> int:
    """Where the answer begins: after fixed text, before blanks."""
    opened = marked.partition(_ANSWER)[0].rfind(_jinja.BLOCK[0])
    if opened >= 0:
        begin = len(_without_blocks(marked[:opened]))
        begin = begin if not lead[begin:].strip() else len(lead)
    elif lead[len(prompt) :].strip():
        begin = len(lead)
    else:
        begin = 0
    begin = max(begin, min(len(prompt), len(lead)))
    if begin != len(prompt):
        # A space belongs to the answer's first token if words carry their own space.
        begin = len(lead[:begin].rstrip(" "))
    if begin == len(prompt):
        return begin
    # Other blanks may too, so compare tokens. Text far before changes nothing there.
    near = max(min(begin, len(prompt)) - _NEAR, 0)
    found = control.encode(tokenizer, f"{lead[near:]}I")
    for start in (begin, len(lead[:begin].rstrip())):
        tokens = control.encode(tokenizer, lead[near:start])
        if found[: len(tokens)] == tokens:
            return start
    raise _lost(tokenizer, "its first token is also the prompt's last")


def _lost(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the chat template of {_name(tokenizer)}: cannot locate the answer: {why}; "
        "use a template that writes the prompt alike with and without an answer"
    )


def located(
    tokenizer: Any, record: Record, template: str | None = None
) -> tuple[str, Place, tuple[int, int]]:
    """Renders a whole exchange, and locates its answer.

    Returns:
      The text, the place, and the answer's range of characters: from where it begins to
      the end of the text, or of the block that the template marks as the answer.

    Raises:
      UserError: see :func:`place`; also for an answer with thoughts of its own if none
        are to be learnt.
    """
    template = template or _own(tokenizer)
    where = place(tokenizer, record, template)
    marked = _render(
        tokenizer,
        record.context,
        template,
        answer=control.mark(tokenizer, record.response),
    )
    whole = _without_blocks(marked)
    opening, closing = _jinja.BLOCK
    ended = marked.rfind(closing)
    if ended >= 0:
        start = len(_without_blocks(marked[: marked[:ended].rfind(opening)]))
        end = len(_without_blocks(marked[:ended]))
        if end <= start:
            raise UserError(
                "the chat template's generation block marked no token of an answer; "
                "check the template and that no response is empty"
            )
    else:
        start, end = 0, len(whole)
    if whole.startswith(where.before):
        return whole, where, (max(start, len(where.before)), end)
    if not whole.startswith(where.asked):
        thoughts = bool(re.match(r"\s*<\w*think", record.response))
        raise _lost(
            tokenizer,
            "it takes the answer's thoughts out of their place, and the model is asked "
            "not to think (thinking=True has it think)"
            if thoughts
            else "it is written in another way than other answers",
        )
    return whole, where._replace(before=where.asked), (len(where.asked), end)
