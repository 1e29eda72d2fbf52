"""Compares a quantised base with the dense one: ``python -m benchmarks.quantize``.

Measures a forward pass and a LoRA gradient with codes over the same with dense weights,
in time and in planned memory of intermediate results; and the size of all base weights
against bfloat16. Decoding costs the same for every batch, so its share falls as tokens
increase.

If qwix is installed, further rows compare the time of encoding and decoding one matrix
with qwix's, for codes that are the same (tests/models/test_qwix.py).
"""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from sbr_jax import losses, models
from sbr_jax.models.codes import BLOCK, KINDS, encode
from sbr_jax.models.quantize import quantize, weight_bytes

SIZES = {  # layers, width, MLP width, examples, tokens of each
    "miniature": (4, 128, 320, 8, 32),
    "small": (4, 512, 1408, 4, 64),
    "medium": (2, 1024, 2816, 4, 128),
}
VOCABULARY = 512
MATRICES = ((512, 512), (1024, 2816))


def config_of(depth: int, width: int, mlp_width: int) -> models.ModelConfig:
    """A Llama of this size with a small vocabulary."""
    return models.ModelConfig(
        vocab_size=VOCABULARY,
        width=width,
        mlp_width=mlp_width,
        layers=depth,
        heads=width // 64,
    )


def loss_fn(adapter, base, ids, *, apply_fn):
    """Mean cross-entropy of a batch."""
    logits = apply_fn(base, adapter, ids)
    return jnp.mean(losses.token_cross_entropy(logits, ids, jnp.ones(ids.shape)))


def temporary(function, *args) -> int:
    """Bytes of intermediate results in the compiled program."""
    return function.lower(*args).compile().memory_analysis().temp_size_in_bytes


def qwix_programs(qwix: Any, kind: str) -> tuple[Any, Any]:
    """The functions of qwix that encode a matrix like ours, and decode it."""
    how = {"qtype": jnp.int8}
    if kind == "nf4":
        how = {"qtype": "nf4", "tiled_axes": {0: BLOCK}}
    code = functools.partial(qwix.quantize, channelwise_axes=(1,), **how)
    return jax.jit(code), jax.jit(qwix.dequantize)


def beside_qwix(report: measure.Pairs, dtype: Any) -> None:
    """Compares encoding and decoding with qwix, for each common kind and size."""
    if importlib.util.find_spec("qwix") is None:
        print("not installed: qwix (pip install qwix), so no rows for one matrix")
        return
    qwix = importlib.import_module("qwix")
    decode = jax.jit(lambda weight: weight.dense())
    for shape in MATRICES:
        matrix = jax.random.normal(jax.random.key(0), shape, dtype)
        for kind in ("nf4", "int8"):
            their_code, their_decode = qwix_programs(qwix, kind)
            case = f"{'x'.join(map(str, shape))} {kind}"
            ours, theirs = encode(matrix, kind), their_code(matrix)
            runs = {
                "code": measure.timed(encode, matrix, kind),
                "qwix code": measure.timed(their_code, matrix),
                "decode": measure.timed(decode, ours),
                "qwix decode": measure.timed(their_decode, theirs),
            }
            pairs = [("code", "qwix code"), ("decode", "qwix decode")]
            report.measure(case, runs, pairs)


def main(given: list[str] | None = None) -> None:
    """Measures every size and kind against the dense base."""
    args = measure.options(__doc__, given)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    report = measure.Pairs("quantize", args, {"dtype": jnp.dtype(dtype).name})
    for size in ["miniature"] if args.smoke else SIZES:
        *shape, rows, length = SIZES[size]
        config = config_of(*shape)
        dense = models.init_params(jax.random.key(0), config, dtype)
        adapter = models.init_adapter(jax.random.key(1), config, rank=8, alpha=16.0)
        ids = jax.random.randint(jax.random.key(2), (rows, length), 0, VOCABULARY)
        loss = functools.partial(loss_fn, apply_fn=models.make_apply_fn(config))
        kinds = KINDS[:1] if args.smoke else KINDS
        bases = {"dense": dense, **{kind: quantize(dense, kind) for kind in kinds}}
        programs = {"forward": jax.jit(loss), "gradient": jax.jit(jax.grad(loss))}
        if args.smoke:
            del programs["gradient"]
        for title, program in programs.items():
            report.measure(
                f"{size} {title}",
                {
                    name: measure.timed(program, adapter, base, ids)
                    for name, base in bases.items()
                },
                [(kind, "dense") for kind in kinds],
                memory={
                    name: temporary(program, adapter, base, ids)
                    for name, base in bases.items()
                },
                more={"tokens": rows * length},
            )
        whole = weight_bytes(config)
        shares = [
            f"{kind} {weight_bytes(config, jnp.bfloat16, kind) / whole:.3f}"
            for kind in KINDS
        ]
        print(f"  weights / bfloat16: {', '.join(shares)}")
    beside_qwix(report, dtype)
    report.close("memory ×: of intermediate results")


if __name__ == "__main__":
    main()
