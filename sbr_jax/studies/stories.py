"""Study of a small story model: real text, losses instead of judges."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbr_jax import models
from sbr_jax.data import TokenDataset, encode_text, take
from sbr_jax.data.leaks import refuse_leaks, shared_prompts
from sbr_jax.data.registry import Pair, load_source
from sbr_jax.errors import option
from sbr_jax.studies._held_out import held_out, random_tokens
from sbr_jax.studies.options import Sources, StoriesOptions
from sbr_jax.training.study import Domain, Study
from sbr_jax.typing import PyTree, UserError

SHARED = Path(__file__).resolve().parents[3] / "shared"
DATA = SHARED / "data"
MODEL = SHARED / "checkpoints" / "stories260K" / "hf"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes pairs of text into disjoint parts of a token data set."""

    tokenizer: Any
    max_length: int

    def __call__(self, pairs: Sequence[Pair]) -> TokenDataset:
        """Encodes pairs, cuts long answers, drops prompts that leave them no room."""
        lines = [(f"{pair.prompt}\n", pair.answer) for pair in pairs]
        return encode_text(self.tokenizer, lines, self.max_length, too_long="truncate")

    def parts(self, name: str, pairs: Sequence[Pair], sizes: Mapping[str, int]):
        """Cuts a data set into parts of at most these sizes, the same every time.

        A part takes at most half of what the earlier ones left; the last may take the
        rest. Repeated prompts are kept once, so that parts are disjoint.
        """
        unique = list({pair.prompt: pair for pair in pairs}.values())
        order = np.random.default_rng(0).permutation(len(unique))
        # More than needed, because some prompts leave no room for an answer.
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
                    f"{self.max_length}): raise the size or "
                    f"{option('study.max-length')}"
                )
            found[part] = take(encoded, range(start, stop))
            start = stop
        return found


def fingerprint(model: models.Model, sets: Mapping[str, TokenDataset]) -> str:
    """A digest of all weights and all tokens."""
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

    Without sources it uses stories260K, and the data sets in the folder `shared` beside
    this repository.

    Returns:
        A study without probe and composite; its metrics are losses in nats and
        next-token accuracies in 0..100.

    Raises:
        UserError: for missing files, empty parts, or sets that share prompts.
    """
    folder = Path(sources.data or DATA)
    read = {name: load_source(name, folder) for name in domains}
    safe_pairs = load_source(options.calibration_source, folder)
    control_pairs = load_source(options.control_source, folder)
    language_model = models.load(sources.model or MODEL)
    encode = Encoder(language_model.tokenizer, options.max_length)
    sizes = {"held-out": options.held_out, "training": options.train}
    parts = {name: encode.parts(name, pairs, sizes) for name, pairs in read.items()}
    size = options.calibration
    sizes = {"calibration": size, "held-out": options.held_out, "mixing": 500}
    safe = encode.parts(options.calibration_source, safe_pairs, sizes)
    # Takes the control from the end of its file, beyond the parts of any domain.
    backwards = control_pairs[::-1]
    control = encode.parts(options.control_source, backwards, {"control": size})
    sets = {
        "calibration": safe["calibration"],
        "held-out safe answers": safe["held-out"],
        **{f"held-out {name}": part["held-out"] for name, part in parts.items()},
    }
    leaks = {}
    for name, data in sets.items():
        if name != "calibration":
            both = {"calibration": safe["calibration"], name: data}
            leaks |= refuse_leaks(shared_prompts(both))

    safety = held_out(language_model, safe["held-out"])
    tests = {n: held_out(language_model, p["held-out"]) for n, p in parts.items()}

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        found = {f"loss/{name}": test(base, adapter)[0] for name, test in tests.items()}
        found["domain_loss"] = float(np.mean(list(found.values())))
        loss, accuracy = safety(base, adapter)
        return {**found, "safety_loss": loss, "safety_token_accuracy": accuracy}

    def accuracy_of(name: str) -> Callable[[PyTree, PyTree], float]:
        return lambda base, adapter: tests[name](base, adapter)[1]

    noise = random_tokens(safe["calibration"], language_model.config.vocab_size, seed=0)
    used = {**sets, **{f"train {n}": p["training"] for n, p in parts.items()}}
    return Study(
        model=language_model,
        domains={
            name: Domain(train=parts[name]["training"], evaluate=accuracy_of(name))
            for name in domains
        },
        calibration=safe["calibration"],
        calibration_controls={"benign": control["control"], "random": noise},
        safety_mix=safe["mixing"],
        evaluate=evaluate,
        probe=None,
        fingerprint=fingerprint(language_model, used),
        leak_check=leaks,
    )
