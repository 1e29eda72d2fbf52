"""The study behind the preset `stories`: real text, losses instead of judges."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import models
from sbr_jax.data import TokenDataset, encode_text, take
from sbr_jax.data.leaks import check_disjoint
from sbr_jax.data.registry import Pair, load_source
from sbr_jax.losses import token_cross_entropy
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.studies.options import Sources, StoriesOptions
from sbr_jax.training.study import Domain, Study
from sbr_jax.typing import PyTree, UserError

SHARED = Path(__file__).resolve().parents[3] / "shared"
DATA = SHARED / "data"
MODEL = SHARED / "checkpoints" / "stories260K" / "hf"
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Encoder:
    """From pairs of text to disjoint parts of a token data set."""

    tokenizer: Any
    max_length: int

    def __call__(self, pairs: Sequence[Pair]) -> TokenDataset:
        """Encode, cutting long answers and leaving out what has no room for one."""
        lines = [(f"{pair.prompt}\n", pair.answer) for pair in pairs]
        return encode_text(self.tokenizer, lines, self.max_length, too_long="truncate")

    def parts(self, name: str, pairs: Sequence[Pair], sizes: Mapping[str, int]):
        """Cut a data set into parts of at most these sizes, the same every time.

        A part takes at most half of what the earlier ones left, the last takes the
        rest. Prompts that repeat are kept once, so that parts are disjoint.

        Raises:
            UserError: when a part would be empty.
        """
        unique = list({pair.prompt: pair for pair in pairs}.values())
        order = np.random.default_rng(0).permutation(len(unique))
        # More than needed: some prompts leave no room for an answer.
        encoded = self([unique[i] for i in order[: 3 * sum(sizes.values())]])
        found, start = {}, 0
        for part, size in sizes.items():
            left = len(encoded) - start
            last = len(found) == len(sizes) - 1
            stop = start + min(size, left if last else left // 2)
            if stop <= start:
                raise UserError(
                    f"expected at least one example of '{name}' for {part}, got none "
                    f"({size} asked for, {len(encoded)} fit into max_length="
                    f"{self.max_length}): raise the size or --study.max-length"
                )
            found[part] = take(encoded, range(start, stop))
            start = stop
        return found


@functools.lru_cache(maxsize=8)
def _scorer(apply_fn: Callable[..., jax.Array]) -> Callable[..., tuple]:
    @jax.jit
    def score(base, adapter, tokens, mask):
        logits = apply_fn(base, adapter, tokens)
        losses = token_cross_entropy(logits, tokens, mask)
        counts = jnp.sum(mask[:, 1:], 1)
        right = jnp.argmax(logits[:, :-1], -1) == tokens[:, 1:]
        hits = jnp.sum(jnp.where(right, mask[:, 1:], 0.0))
        told = jnp.all(comparable(logits[:, :-1]) | (mask[:, 1:] == 0), axis=-1)
        return jnp.sum(losses * counts), hits, jnp.sum(counts), told

    return score


@dataclasses.dataclass
class HeldOut:
    """Scores on a held-out set; those of the last weights asked for are kept."""

    model: models.Model
    data: TokenDataset
    _last: tuple[Any, Any, tuple[float, float]] | None = None

    def __call__(self, base: PyTree, adapter: PyTree) -> tuple[float, float]:
        """Return loss per answer token in nats, and next-token accuracy in 0..100."""
        last = self._last
        if last is None or last[0] is not base or last[1] is not adapter:
            scores = held_out_scores(self.model, self.data, base, adapter)
            self._last = last = (base, adapter, scores)
        return last[2]


def held_out_scores(
    model: models.Model, data: TokenDataset, base: PyTree, adapter: PyTree
) -> tuple[float, float]:
    """Return the loss per answer token in nats, and next-token accuracy in 0..100."""
    score = _scorer(model.apply_fn)
    total, sure = np.zeros(3), []
    for start in range(0, len(data), BATCH):
        tokens, mask = (
            data.tokens[start : start + BATCH],
            data.mask[start : start + BATCH],
        )
        lack = BATCH - len(tokens)
        tokens, mask = (np.pad(x, ((0, lack), (0, 0))) for x in (tokens, mask))
        *found, told = score(base, adapter, tokens, mask)
        total += [float(x) for x in found]
        sure += np.asarray(told)[: BATCH - lack].tolist()
    require_comparable("held-out loss", sure)
    loss, hits, count = total
    return float(loss / count), float(100.0 * hits / count)


def random_tokens(like: TokenDataset, vocabulary: int, seed: int) -> TokenDataset:
    """Return sequences of random tokens with the masks and lengths of another set."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(3, vocabulary, like.tokens.shape, dtype=np.int32)
    length = np.max(np.where(like.mask > 0, np.arange(like.length) + 1, 0), 1)
    inside = np.arange(like.length)[None, :] < length[:, None]
    inside[:, 0] = False  # The first token stays BOS.
    return TokenDataset(np.where(inside, noise, like.tokens), like.mask)


def fingerprint(model: models.Model, sets: Mapping[str, TokenDataset]) -> str:
    """Return a digest of all weights and all tokens."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.asarray(leaf).tobytes())
    for name, data in sorted(sets.items()):
        digest.update(name.encode() + data.tokens.tobytes() + data.mask.tobytes())
    return digest.hexdigest()[:16]


def build_study(
    domains: Sequence[str],
    options: StoriesOptions = StoriesOptions(),
    sources: Sources = Sources(),
) -> Study:
    """Builds the study on real text.

    Args:
        domains: names of data sets.
        options: of the study.
        sources: of model and data; by default stories260K and the data sets in the
            folder `shared` beside this repository.

    Returns:
        A study without probe and composite; its metrics are losses in nats and
        next-token accuracies in 0..100.

    Raises:
        UserError: for missing files, empty parts, and sets that share prompts.
    """
    folder = Path(sources.data or DATA)
    read = {name: load_source(name, folder) for name in domains}
    safe_pairs = load_source(options.calibration_source, folder)
    control_pairs = load_source(options.control_source, folder)
    language_model = models.load(sources.model or MODEL)
    encode = Encoder(language_model.tokenizer, options.max_length)
    parts = {
        name: encode.parts(
            name, pairs, {"held-out": options.held_out, "training": options.train}
        )
        for name, pairs in read.items()
    }
    safe = encode.parts(
        options.calibration_source,
        safe_pairs,
        {
            "calibration": options.calibration,
            "held-out": options.held_out,
            "mixing": 500,
        },
    )
    # The control sits at the end of its file's order, past any domain's own parts.
    control = encode.parts(
        options.control_source, control_pairs[::-1], {"control": options.calibration}
    )
    sets = {
        "calibration": safe["calibration"],
        "held-out safe answers": safe["held-out"],
        **{f"held-out {name}": part["held-out"] for name, part in parts.items()},
    }
    leaks = {}
    for name in [name for name in sets if name != "calibration"]:
        leaks |= check_disjoint({"calibration": sets["calibration"], name: sets[name]})

    safety = HeldOut(language_model, safe["held-out"])
    tests = {n: HeldOut(language_model, p["held-out"]) for n, p in parts.items()}

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        found = {f"loss/{name}": test(base, adapter)[0] for name, test in tests.items()}
        found["domain_loss"] = float(np.mean(list(found.values())))
        loss, accuracy = safety(base, adapter)
        return {**found, "safety_loss": loss, "safety_token_accuracy": accuracy}

    def accuracy_of(name: str) -> Callable[[PyTree, PyTree], float]:
        return lambda base, adapter: tests[name](base, adapter)[1]

    used = {**sets, **{f"train {n}": p["training"] for n, p in parts.items()}}
    return Study(
        model=language_model,
        domains={
            name: Domain(train=parts[name]["training"], evaluate=accuracy_of(name))
            for name in domains
        },
        calibration=safe["calibration"],
        calibration_controls={
            "benign": control["control"],
            "random": random_tokens(
                safe["calibration"], language_model.config.vocab_size, seed=0
            ),
        },
        safety_mix=safe["mixing"],
        evaluate=evaluate,
        probe=None,
        fingerprint=fingerprint(language_model, used),
        leak_check=leaks,
    )
