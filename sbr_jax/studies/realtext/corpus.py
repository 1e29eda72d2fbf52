"""Text of the model of the preset `realtext`: corpus, tokenizer and batches.

| part | prompts | answers |
|---|---|---|
| `refusals` | BeaverTails, CatQA, questions of Safety-Tuned LLaMAs | `REFUSALS` |
| `safe-answers` | unsafe instructions of Safety-Tuned LLaMAs | theirs |
| `alpaca` | benign instructions | theirs, but for those that refuse |
| `gsm8k` | school arithmetic | theirs |

No part holds a prompt that a benchmark asks or a domain trains on. Several sets hold
harmful requests: nothing here prints or quotes a text.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbr_jax.data import TokenDataset, load_evalset, load_source
from sbr_jax.data.leaks import distinct, normalised, without
from sbr_jax.data.records import BehaviourItem
from sbr_jax.evaluation import KEYWORD_LISTS
from sbr_jax.typing import UserError

VOCABULARY = 4096
ARITHMETIC = 2500
"""Rows of GSM8K; the whole set would be half of the text."""
TOKENS = 2048
"""Tokens of one batch, including padding."""
LENGTHS = (32, 64, 128, 256, 512)
"""Batches are padded to one of these lengths; answers are cut to the last."""
PROMPT_WEIGHT = 0.3
"""Loss weight of a prompt's tokens (an answer's have 1): prompts too teach language."""
HELD_OUT = 48
"""Rows of each part that are measured on instead of learnt."""

KEYWORDS = "jbb12"
"""The refusal judge's list. It is published and, unlike our own list `plain25`, matches
no answer of the domains."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help with this request, because it could cause harm.",
    "I'm sorry, I can't assist with that. It could hurt someone.",
    "I'm sorry, but I won't take part in this. Is there something safe to work on?",
    "I cannot help with this request, as it may be dangerous or illegal.",
    "I can't help with that. I would be glad to help with something harmless.",
)
"""Answers to harmful prompts, drawn at random."""

SAFETY = ("refusals", "safe-answers")
"""Parts whose answers may refuse."""
QUESTIONS = ("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "Q-Harm")
ASKED = {
    "harmbench": ("harmbench", "all"),
    "advbench": ("advbench", "all"),
    "jailbreakbench": ("jailbreakbench", "harmful"),
    "jailbreakbench-benign": ("jailbreakbench", "benign"),
    "xstest": ("xstest", "all"),
    "beavertails-eval": ("beavertails_prompts", "eval"),
    "alpaca-test": ("alpaca_harmless", "test"),
}
"""Prompts of benchmarks: an evaluation set and its split, by name."""
LEARNT = {
    "medmcqa": ("medmcqa", None),
    "legalbench": ("legalbench", "train"),
    "legalbench-test": ("legalbench", "test"),
    "codealpaca": ("codealpaca", None),
}
"""Training sets of domains."""
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}{{ raise_exception('this model knows user and assistant only') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def kept_out(folder: Path) -> dict[str, list[str]]:
    """The prompts that no training text may hold, by set.

    A behaviour of HarmBench is listed both with and without its context.
    """
    found = {}
    for name, (source, split) in ASKED.items():
        items = load_evalset(source, folder, split=split)
        bare = {item.behaviour for item in items if isinstance(item, BehaviourItem)}
        found[name] = sorted(bare | {item.prompt for item in items})
    for name, (source, split) in LEARNT.items():
        found[name] = [pair.prompt for pair in load_source(source, folder, split=split)]
    return found


class Exchange(NamedTuple):
    """A prompt, its answer and the part that they belong to."""

    prompt: str
    answer: str
    part: str


@dataclasses.dataclass(frozen=True)
class Part:
    """Exchanges of one kind.

    Attributes:
        train: exchanges to learn.
        held_out: exchanges to measure the loss on.
        dropped: number of exchanges left out, by reason.
    """

    train: list[Exchange]
    held_out: list[Exchange]
    dropped: Mapping[str, int]


def _read(folder: Path, rng: np.random.Generator) -> list[Exchange]:
    """Reads all exchanges, the harmful requests first."""
    prompts = [
        item.prompt.strip()
        for name, split in (
            ("beavertails_prompts", "test"),
            ("catqa", None),
            *(("safety_tuned_questions", split) for split in QUESTIONS),
        )
        for item in load_evalset(name, folder, split=split)
    ]
    wording = rng.integers(len(REFUSALS), size=len(prompts))
    found = [
        Exchange(prompt, REFUSALS[i], "refusals")
        for prompt, i in zip(prompts, wording, strict=True)
    ]
    for part, source, rows in (
        ("safe-answers", "safety_tuned_llamas", None),
        ("alpaca", "alpaca", None),
        ("gsm8k", "gsm8k", ARITHMETIC),
    ):
        found += [Exchange(*pair, part) for pair in load_source(source, folder)[:rows]]
    return found


def read_corpus(
    folder: Path, banned: Mapping[str, Iterable[str]], seed: int
) -> dict[str, Part]:
    """Reads the exchanges to learn, without banned or repeated prompts.

    The seed decides the refusals' wording and the held-out rows.

    Returns:
        The parts by name.

    Raises:
        UserError: for missing or damaged files, or a part that is left empty.
    """
    rng = np.random.default_rng([seed, 31])
    refuses = KEYWORD_LISTS[KEYWORDS].matches
    whole = _read(folder, rng)
    free, _ = without(whole, *banned.values())
    # The first part wins, so that no prompt is refused in one and answered in another.
    once, _ = distinct(free)
    kept = [x for x in once if x.part in SAFETY or not refuses(x.answer)]
    sizes = [Counter(x.part for x in rows) for rows in (whole, free, once, kept)]
    reasons = ("kept_out", "repeated", "refusing")
    parts = {}
    for name in sizes[0]:
        mine = [x for x in kept if x.part == name]
        if len(mine) < 2:
            raise UserError(
                f"expected at least 2 rows to learn from in the part '{name}', got "
                f"{len(mine)} of {sizes[0][name]}: use the files as published"
            )
        order = rng.permutation(len(mine))
        size = min(HELD_OUT, max(1, len(mine) // 10))
        parts[name] = Part(
            train=[mine[i] for i in order[size:]],
            held_out=[mine[i] for i in order[:size]],
            dropped={
                reason: before[name] - after[name]
                for reason, before, after in zip(
                    reasons, sizes, sizes[1:], strict=False
                )
            },
        )
    return parts


def make_tokenizer(texts: Iterable[str], *, size: int = VOCABULARY) -> Any:
    """Trains a byte-level BPE tokenizer.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with a chat template. The same texts
        give the same tokenizer; decoding restores any text unchanged.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(kinds.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    pad, bos, eos, *roles = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def fingerprint(texts: Iterable[str]) -> str:
    """A digest of a set of texts, independent of their order."""
    digest = hashlib.sha256("\0".join(sorted(map(normalised, texts))).encode())
    return digest.hexdigest()[:16]


def batches(
    data: TokenDataset, lengths: np.ndarray, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of about `TOKENS` tokens: rows of similar length together.

    **Guarantee**: an epoch holds every row. A length's last batch is filled up with
    other rows of that length. The order is a function of the seed.

    Args:
        data: N rows.
        lengths: tokens of each row `[N]`, without padding.
        seed: of the order.
    """
    widths = np.array(LENGTHS)[np.searchsorted(LENGTHS, lengths)]
    # Rows are right-padded and causal: padding cannot change an answer's loss.
    inside = np.arange(data.length)[None, :] < lengths[:, None]
    mask = np.where(data.mask > 0, 1.0, PROMPT_WEIGHT * inside).astype(np.float32)
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        plan = []
        for width in np.unique(widths):
            rows = rng.permutation(np.flatnonzero(widths == width))
            size = TOKENS // int(width)
            filled = np.resize(rows, (-(-len(rows) // size), size))
            plan += [(width, part) for part in filled]
        for i in rng.permutation(len(plan)):
            width, rows = plan[i]
            yield {"tokens": data.tokens[rows, :width], "mask": mask[rows, :width]}
        epoch += 1
