"""Builds the tokenizer that a GGUF file carries: byte-level or SentencePiece BPE.

The file has the tokens with their kinds, merges or scores, the name of the rule that
splits a text into words, special tokens and the chat template. An unknown rule is
refused: another rule would give other tokens.

References:
  llama.cpp, src/llama-vocab.cpp: what each name of a rule means.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from sbr_jax.models.config import ModelConfig
from sbr_jax.models.gguf_file import GgufFile
from sbr_jax.models.tokenizer import Reading, check_ids
from sbr_jax.typing import UserError

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
RULES: dict[str, str | None] = {
    "gpt-2": None,
    "gpt2": None,
    "olmo": None,
    "smollm": r"\p{N}",
    "starcoder": r"\p{N}",
    "refact": r"\p{N}",
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": _LLAMA3,
}
"""How each rule splits before bytes: like GPT-2, digits first, or by a regex."""
_WITH_BOS = ("llama-bpe", "llama3")
"""Rules whose tokenizers begin every text with a BOS token if the file is silent."""
_PREFIX = "tokenizer.ggml."


class _Kind(enum.IntEnum):
    """A token's ``token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER = 4
    UNUSED = 5
    BYTE = 6


def read_tokenizer(file: GgufFile, config: ModelConfig) -> Any:
    """A fast transformers tokenizer, or None if the file carries none.

    Returns:
      The tokenizer, with special tokens and chat template.

    Raises:
      UserError: for an unknown kind of vocabulary or rule, lists of different lengths,
        and ids that the model does not have.
    """
    kind = file.fields.get(f"{_PREFIX}model", "none")
    if kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"unsupported {_PREFIX}model {kind!r:.40} in {file.path}: expected 'gpt2' "
            "(byte-level BPE) or 'llama' (SentencePiece); convert the file first"
        )
    tokens = _list(file, "tokens", str)
    kinds = _list(file, "token_type", int, len(tokens))
    if len(set(tokens)) < len(tokens):
        word = collections.Counter(tokens).most_common(1)[0][0]
        raise UserError(
            f"expected tokens of {file.path} to differ, got {word!r:.40} twice; fetch "
            "the file again"
        )
    with Reading(f"the tokenizer in {file.path}"):
        build = _byte_level if kind == "gpt2" else _sentence_piece
        raw = build(file, tokens, kinds)
        return _wrapped(file, config, raw, tokens, kinds, kind)


def _list(
    file: GgufFile, name: str, kind: type, length: int | None = None
) -> list[Any]:
    """A list in the file with one entry for each token."""
    found = file.fields.get(_PREFIX + name)
    if not isinstance(found, list) or not all(isinstance(x, kind) for x in found):
        raise UserError(
            f"expected {_PREFIX}{name}, a list of {kind.__name__}, in {file.path}, got "
            f"{found!r:.40}"
        )
    if length is not None and len(found) != length:
        raise UserError(
            f"expected {length} entries in {_PREFIX}{name} of {file.path}, as many as "
            f"tokens, got {len(found)}"
        )
    return found


def _pairs(file: GgufFile) -> list[tuple[str, str]]:
    """The merges of a file."""
    merges = [tuple(text.split(" ", 1)) for text in _list(file, "merges", str)]
    if wrong := [pair for pair in merges if len(pair) != 2]:
        raise UserError(
            f"expected two parts in each of {_PREFIX}merges of {file.path}, got "
            f"{wrong[0][0]!r:.40}"
        )
    return [(first, second) for first, second in merges]


def _byte_level(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cuts

    rule = file.fields.get(f"{_PREFIX}pre")
    if not isinstance(rule, str) or rule not in RULES:
        raise UserError(
            f"unsupported {_PREFIX}pre {rule!r:.40} in {file.path}: known are "
            f"{', '.join(sorted(RULES))}; convert the file to a folder first"
        )
    cut = RULES[rule]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    whole = cut == _LLAMA3 and rule != "dbrx"
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_pairs(file), ignore_merges=whole)
    )
    split = cut not in (None, r"\p{N}")
    steps: list[Any] = [cuts.ByteLevel(add_prefix_space=False, use_regex=not split)]
    if split:
        steps.insert(0, cuts.Split(Regex(cut), behavior="isolated"))
    elif cut is not None:
        steps.insert(0, cuts.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = cuts.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list(file, "scores", float, len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    usual = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == _Kind.NORMAL
    }
    given = f"{_PREFIX}merges" in file.fields
    merges = _pairs(file) if given else merges_of(vocabulary, usual)
    unknown = next(
        (t for t, k in zip(tokens, kinds, strict=True) if k == _Kind.UNKNOWN), None
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = file.fields.get(f"{_PREFIX}add_space_prefix", True)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    ends: list[Any] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if spaced:
        steps.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def merges_of(
    vocabulary: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply, in order of application.

    Every split of a token into two tokens is a merge; the higher its token's score, the
    earlier.

    >>> words = {"a": 0, "b": 1, "ab": 2, "aba": 3}
    >>> merges_of(words, {"a": -3.0, "b": -4.0, "ab": -1.0, "aba": -2.0})
    [('a', 'b'), ('ab', 'a')]
    """
    found = []
    for token, score in scores.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        parts = [(a, b) for a, b in cuts if a in scores and b in scores]
        parts.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, *pair) for pair in parts]
    found.sort(key=lambda x: (x[0], len(x[1]), len(x[2])), reverse=True)
    return [(first, second) for _, first, second in found]


def _wrapped(
    file: GgufFile,
    config: ModelConfig,
    raw: Any,
    tokens: Sequence[str],
    kinds: Sequence[int],
    kind: str,
) -> Any:
    """Wraps it as a transformers tokenizer with special tokens and the template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    fields = file.fields
    for token, what in zip(tokens, kinds, strict=True):
        if what in (_Kind.CONTROL, _Kind.UNKNOWN):
            raw.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif what == _Kind.USER:
            raw.add_tokens([AddedToken(token, special=False, normalized=False)])
    special = {}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("pad_token", "padding_token_id"),
        ("unk_token", "unknown_token_id"),
    ):
        i = fields.get(_PREFIX + key)
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise UserError(
                f"expected {_PREFIX}{key} below {len(tokens)} in {file.path}, got "
                f"{i!r:.40}"
            )
        special[name] = tokens[i]
    usual = kind == "llama" or fields.get(f"{_PREFIX}pre") in _WITH_BOS
    ends = {}
    for name, key, silent in (
        ("bos_token", "add_bos_token", usual),
        ("eos_token", "add_eos_token", False),
    ):
        wanted = name in special and fields.get(_PREFIX + key, silent) is True
        ends[name] = [special[name]] if wanted else []
    if any(ends.values()):
        frame = [*ends["bos_token"], "$A", *ends["eos_token"]]
        raw.post_processor = processors.TemplateProcessing(
            single=frame,
            pair=[*frame, *ends["bos_token"], "$B", *ends["eos_token"]],
            special_tokens=[(t, raw.token_to_id(t)) for x in ends.values() for t in x],
        )
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"expected a text as tokenizer.chat_template in {file.path}, got "
            f"{template!r:.40}"
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=config.context,
        **special,
    )
    check_ids(tokenizer, config.vocab_size, file.path, [template or ""])
    return tokenizer
