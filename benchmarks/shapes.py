"""Realistic shapes of models and lengths of data, and the products of a step.

Uses only NumPy, so that the peer's process can read it too.

Legend: B examples, T tokens of a row, D width, V vocabulary, L layers, r LoRA rank.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Adapted projections: those of ``Training.lora_targets``."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool = True

    def projections(self) -> dict[str, tuple[int, int]]:
        """Fan-in and fan-out of every projection of a layer."""
        d, m = self.width, self.mlp_width
        keys = d // self.heads * self.kv_heads
        return {
            "q_proj": (d, d),
            "k_proj": (d, keys),
            "v_proj": (d, keys),
            "o_proj": (d, d),
            "gate_proj": (d, m),
            "up_proj": (d, m),
            "down_proj": (m, d),
        }

    def ours(self) -> Any:
        """The sizes as our model's settings."""
        from sbr_jax import models

        return models.ModelConfig(**dataclasses.asdict(self), context=4096)

    def theirs(self) -> dict[str, Any]:
        """The sizes as keywords of transformers' ``LlamaConfig``."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "use_cache": False,
        }


SHAPES = {
    "smoke": Shape(64, 128, 2, 4, 4, 512),
    "testbed": Shape(128, 344, 4, 4, 4, 986),
    "small": Shape(256, 704, 6, 4, 2, 4096),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49_152),
    "7b": Shape(4096, 11_008, 32, 32, 32, 32_000, tied=False),
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of a domain's examples, in tokens, prompt and answer together.

    Lengths are log-normal: most are short, and the longest of the set is several times
    the mean, so padding is expensive.
    """

    mean: float
    longest: int
    spread: float
    """Standard deviation of the logarithm."""
    answer: tuple[int, int, float]
    """Least, most and mean tokens of an answer."""


DOMAINS = {
    "label": Lengths(93, 264, 0.295, (3, 3, 3.0)),
    "choice": Lengths(136, 500, 0.476, (1, 2, 1.5)),
    "prose": Lengths(142, 512, 0.387, (2, 78, 21.0)),
}
"""Like three real domains: the longest of 16 is 150, 282 and 261 on average."""


SEED = 39
"""With this seed the first 64 examples match their domain: mean, longest of each 16."""


def draw(
    lengths: Lengths, count: int, seed: int, vocab_size: int, scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Examples padded to the longest of the whole set, which need not be among them.

    Args:
      lengths: the domain's.
      count: how many.
      seed: of the draw.
      vocab_size: tokens are uniform in it, never 0.
      scale: factor of all prompt lengths, for a smoke test.

    Returns:
      ``tokens`` and ``mask [count, T]``, and ``length [count]``.
    """
    source = np.random.default_rng(seed)
    centre = np.log(lengths.mean) - lengths.spread**2 / 2
    total = np.exp(source.normal(centre, lengths.spread, count))
    least, most, mean = lengths.answer
    answer = np.clip(source.lognormal(np.log(mean) - 0.25, 0.7, count), least, most)
    answer = np.rint(answer).astype(int)
    longest = max(int(lengths.longest * scale), most + 2)
    total = np.clip(np.rint(total * scale).astype(int), answer + 2, longest)
    place = np.arange(longest)
    tokens = source.integers(1, vocab_size, (count, longest))
    inside = place < total[:, None]
    mask = inside & (place >= (total - answer)[:, None])
    return {
        "tokens": np.where(inside, tokens, 0).astype(np.int32),
        "mask": mask.astype(np.float32),
        "length": total.astype(np.int32),
    }


def dense(rows: int, length: int, seed: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows in which every token but the first is an answer token."""
    source = np.random.default_rng(seed)
    tokens = source.integers(1, vocab_size, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.float32)
    mask[:, 0] = 0
    return {
        "tokens": tokens,
        "mask": mask,
        "length": np.full(rows, length, np.int32),
    }


def batches_of(data: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Consecutive batches."""
    count = len(data["tokens"]) // size
    return [
        {k: v[i * size : (i + 1) * size] for k, v in data.items()} for i in range(count)
    ]


def write(
    path: pathlib.Path, batches: Sequence[dict[str, np.ndarray]], longest: int
) -> None:
    """Writes batches for other processes, and the longest length of the whole set."""
    arrays: Any = {f"{k}.{i}": v for i, b in enumerate(batches) for k, v in b.items()}
    np.savez(path, longest=longest, **arrays)


def read(path: str) -> tuple[list[dict[str, np.ndarray]], int]:
    """Reads what :func:`write` wrote."""
    with np.load(path) as file:
        found: dict[int, dict[str, np.ndarray]] = {}
        for name in file.files:
            if "." in name:
                key, number = name.split(".")
                found.setdefault(int(number), {})[key] = file[name]
        return [found[i] for i in sorted(found)], int(file["longest"])


def step_flops(shape: Shape, rank: int, batch: dict[str, np.ndarray]) -> float:
    """FLOPs of the products of a LoRA step: for tokens and answers, not for padding.

    ``n (4 Σ in·out + 6 Σ r (in + out)) L + 12 · D · L · Σ t²/2 + 4 D V · answers``, n
    tokens of examples of t. A frozen weight is used forward and for the gradient of its
    input, an adapter's factor also for its own gradient, and causal scores are half a
    square. Logits are needed where an answer is predicted. Nothing is recomputed.
    """
    t = batch["length"].astype(float)
    sizes = shape.projections()
    frozen = sum(a * b for a, b in sizes.values())
    adapted = sum(rank * sum(sizes[name]) for name in TARGETS)
    linear = t.sum() * shape.layers * (4 * frozen + 6 * adapted)
    attention = 12 * shape.width * shape.layers * (t**2).sum() / 2
    answers = (batch["mask"][:, 1:] > 0).sum()
    return float(linear + attention + 4 * shape.width * shape.vocab_size * answers)
