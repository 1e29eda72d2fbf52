"""Reads the tokenizer of a checkpoint folder through transformers."""

from __future__ import annotations

import contextlib
import os
import pathlib
from types import TracebackType
from typing import Any

from sbr_jax.files import is_there, read_object, read_text
from sbr_jax.models.fields import Field, read_fields
from sbr_jax.typing import UserError

SETTINGS, WHOLE = "tokenizer_config.json", "tokenizer.json"
TEMPLATE = "chat_template.jinja"
_VOCABULARIES = (WHOLE, "tokenizer.model", "vocab.json")
_OTHERS = ("vocab.json", "special_tokens_map.json", "added_tokens.json")
_UNKNOWN = "\ue000"
"""A character of private use, which no vocabulary has."""
_FLAG = Field(bool, none=True, default=None)
_FIELDS = {
    "tokenizer_class": Field(str, none=True, default=None),
    # transformers writes 1e30 for "no limit".
    "model_max_length": Field(float, 1, 1e31, none=True, default=None),
    "added_tokens_decoder": Field(dict, none=True, default=None),
    "add_bos_token": _FLAG,
    "add_eos_token": _FLAG,
    "clean_up_tokenization_spaces": _FLAG,
}
"""Fields of tokenizer_config.json that transformers takes without checking."""


def load_tokenizer(folder: str | pathlib.Path, *, vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder, or None if the folder holds none.

    Args:
      folder: with ``tokenizer.json`` and its companions.
      vocab_size: of the model, to refuse ids that have no embedding; None to skip that
        check.

    Returns:
      A fast tokenizer. Code in the folder is never run.

    Raises:
      UserError: naming a file that is missing, damaged, or written by a newer library,
        and for tokens that share an id or have one beyond the model's, or a vocabulary
        without its token for unknown words.
    """
    folder = pathlib.Path(folder)
    settings = folder / SETTINGS
    described = is_there(settings)
    if described:
        read_fields(read_object(settings), _FIELDS, str(settings))
    if not any([is_there(folder / name) for name in _VOCABULARIES]):
        if described:
            raise UserError(
                f"expected {' or '.join(_VOCABULARIES)} beside {settings}, found none: "
                "fetch the tokenizer's files again"
            )
        return None
    for path in (folder / name for name in (WHOLE, *_OTHERS)):
        if is_there(path):
            read_object(path)
    if is_there(folder / TEMPLATE):
        read_text(folder / TEMPLATE)
    # Without this, transformers prints that PyTorch is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        with Reading(f"the tokenizer of {folder} (its {SETTINGS} or another file)"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder),
                use_fast=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except UserError:
        if (folder / WHOLE).is_file():
            from tokenizers import Tokenizer

            with Reading(str(folder / WHOLE)):
                Tokenizer.from_file(str(folder / WHOLE))
        raise
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"expected a text as chat_template in {settings}, got another")
    where = next(folder / name for name in _VOCABULARIES if is_there(folder / name))
    check_ids(tokenizer, vocab_size, where, [text or "" for text in texts])
    _check_unknown(tokenizer, where)
    return tokenizer


def _check_unknown(tokenizer: Any, where: pathlib.Path) -> None:
    """Refuses a vocabulary that would fail at the first unknown word of a text."""
    with Reading(str(where)):
        tokenizer.backend_tokenizer.encode(_UNKNOWN)


def check_ids(
    tokenizer: Any, vocab_size: int | None, where: pathlib.Path, templates: list[str]
) -> None:
    """Refuses ids that would make a model read other tokens than the text's.

    Counting tokens is not enough: ids may have gaps, and JAX clamps those beyond.
    """
    words = tokenizer.get_vocab()
    owner: dict[int, str] = {}
    for word, i in words.items():
        if i in owner:
            raise UserError(
                f"expected an id of its own for each token of {where}, got {i} for "
                f"{owner[i]!r:.60} and {word!r:.60}: fetch the file again"
            )
        owner[i] = word
    last = max(owner, default=0)
    if vocab_size is None or last < vocab_size:
        return
    # Text never becomes a special token, so only code or a template can write these:
    # padding beyond the embedding, which many chat models have, is masked.
    written = {
        *(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    }
    harmless = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and i not in written
        and not any(token.content in text for text in templates)
    }
    wrong = [i for i in owner if i >= vocab_size and i not in harmless]
    if wrong:
        raise UserError(
            f"expected token ids below vocab_size={vocab_size} in {where}, got "
            f"{max(wrong)} for {owner[max(wrong)]!r:.60}: it belongs to another model, "
            "fetch the folder's files again"
        )


class Reading(contextlib.AbstractContextManager):
    """Turns errors of transformers and tokenizers about files into one line.

    Neither library checks types first, so a list in place of a text can raise any of
    Python's errors; tokenizers raises a bare ``Exception``, or panics.
    """

    _KINDS = (
        *(OSError, ValueError, TypeError, AttributeError, LookupError, ImportError),
        *(ArithmeticError, AssertionError, RuntimeError),
    )
    _LIBRARIES = ("huggingface_hub", "tokenizers", "transformers", "pyo3_runtime")

    def __init__(self, what: str):
        self.what = what

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises a ``UserError`` in place of such an error."""
        if kind is None:
            return
        library = kind.__module__.partition(".")[0]
        if not (
            kind is Exception
            or library in self._LIBRARIES
            or issubclass(kind, self._KINDS)
        ):
            return
        import tokenizers
        import transformers

        raise UserError(
            f"cannot read {self.what}: {' '.join(str(error).split()):.200}; fetch the "
            "files again, or update the libraries if newer ones than transformers "
            f"{transformers.__version__} and tokenizers {tokenizers.__version__} wrote "
            "them"
        ) from error
