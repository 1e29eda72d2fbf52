"""How a judge model is asked: templates, chat templates, and nothing that breaks out.

A judged text is data. It must not be able to fill a template's other places, nor to end
its own turn with a control token, nor to add a second BOS.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data import control
from sbr_jax.data.template import render
from sbr_jax.typing import UserError

Encode = Callable[[str, str], list[int]]
"""``encode(prompt, answer) -> token ids`` of the question put to the guard."""


def fill(template: str, **fields: str) -> str:
    """Puts texts into the places ``{name}`` of a template, once and all at once.

    Other braces, and braces in the texts, stay as they are: an answer that contains
    ``{prompt}`` is only an answer.

    Raises:
      UserError: the template lacks a place for a field.

    >>> fill('{"user": "{prompt}"} {answer}', prompt="{answer}", answer="no")
    '{"user": "{answer}"} no'
    """
    missing = [name for name in fields if f"{{{name}}}" not in template]
    if missing:
        raise UserError(
            f"guard: expected {{{missing[0]}}} in the template, found it nowhere; put "
            "it where that text belongs"
        )
    places = "|".join(map(re.escape, fields))
    return re.sub(rf"\{{({places})\}}", lambda match: fields[match[1]], template)


def template_hash(template: str) -> str:
    """The first 12 digits of a template's SHA-256, for a report."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


def read_template(template: str | Path) -> str:
    """A template's text: itself, or the content of a file given as a path.

    Raises:
      UserError: there is no such file.
    """
    if isinstance(template, str):
        return template
    if not template.is_file():
        raise UserError(f"guard: expected a template file, found none at {template}")
    return template.read_text(encoding="utf-8")


def template_encoder(tokenizer: Any, template: str | Path) -> Encode:
    """Encodes exchanges in a template with ``{prompt}`` and ``{answer}``.

    Special tokens that the template writes out count as such; those in the prompt or
    the answer are taken out, so that a judged text cannot end its own turn. BOS comes
    first exactly once.

    Args:
      tokenizer: of transformers.
      template: the text, or the path of a file that holds it.

    Returns:
      The encoder.
    """
    text = read_template(template)
    fill(text, prompt="", answer="")
    specials = special_texts(tokenizer)

    def encode(prompt: str, answer: str) -> list[int]:
        parts = {"prompt": prompt, "answer": answer}
        parts = {name: without(part, specials) for name, part in parts.items()}
        ids = tokenizer(fill(text, **parts), add_special_tokens=False)["input_ids"]
        return _one_bos(tokenizer, list(ids))

    return encode


def chat_encoder(tokenizer: Any, template: str | None = None) -> Encode:
    """Encodes exchanges as two turns of the guard's own chat template.

    Llama Guard's templates write the question to the guard around the turns, up to
    where its answer begins.

    Args:
      tokenizer: of transformers.
      template: a chat template to use instead of the tokenizer's own.

    Returns:
      The encoder.

    Raises:
      UserError: there is no chat template.
    """
    if not (template or tokenizer.chat_template):
        raise UserError(
            "guard: expected a tokenizer with a chat template, which holds the guard's "
            "policy; this one has none, so pass its text"
        )
    specials = special_texts(tokenizer)

    def encode(prompt: str, answer: str) -> list[int]:
        turns = [
            {"role": "user", "content": without(prompt, specials)},
            {"role": "assistant", "content": without(answer, specials)},
        ]
        text = render(tokenizer, turns, template)
        return _one_bos(tokenizer, control.encode(tokenizer, text))

    return encode


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def without(text: str, specials: Sequence[str]) -> str:
    """The text without any of the given pieces, also those that removal would form.

    >>> without("<</s>/s>no</s>", ["</s>"])
    'no'
    """
    before = None
    while before != text:
        before = text
        for special in specials:
            text = text.replace(special, "")
    return text


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[start:]]
