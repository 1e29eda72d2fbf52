"""A quantised base beside the dense one: ``python -m benchmarks.quantize``.

Prints what all base weights take against bfloat16, and ratios (codes / dense) of the
time and of the planned temporary memory of a forward pass and of a LoRA gradient, in
the same run. Decoding costs the same for every batch, so its share falls with tokens.

Where qwix is installed, a second table has the time of coding and of decoding one
matrix against its (ours / qwix), for codes that are the same (tests/test_qwix.py).
"""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import beside
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
    """What codes a matrix as ours and what decodes it, of qwix."""
    how = {"qtype": jnp.int8}
    if kind == "nf4":
        how = {"qtype": "nf4", "tiled_axes": {0: BLOCK}}
    code = functools.partial(qwix.quantize, channelwise_axes=(1,), **how)
    return jax.jit(code), jax.jit(qwix.dequantize)


def beside_qwix(dtype: Any) -> None:
    """Coding and decoding, a line for each kind and size that both have."""
    if importlib.util.find_spec("qwix") is None:
        print("qwix is not installed (pip install qwix): no second table")
        return
    qwix = importlib.import_module("qwix")
    decode = jax.jit(lambda weight: weight.dense())
    print(f"{'matrix':12}{'codes':12}{'code ×':>9}{'decode ×':>10}")
    for shape in MATRICES:
        matrix = jax.random.normal(jax.random.key(0), shape, dtype)
        for kind in ("nf4", "int8"):
            their_code, their_decode = qwix_programs(qwix, kind)
            pairs = (
                (
                    functools.partial(encode, matrix, kind),
                    functools.partial(their_code, matrix),
                ),
                (
                    functools.partial(decode, encode(matrix, kind)),
                    functools.partial(their_decode, their_code(matrix)),
                ),
            )
            times = [beside(*pair) for pair in pairs]
            ratios = [ours / theirs for ours, theirs in times]
            name = "x".join(map(str, shape))
            print(f"{name:12}{kind:12}{ratios[0]:9.2f}{ratios[1]:10.2f}", flush=True)


def main() -> None:
    """Measure every size and kind and print a line for each."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    device, name = jax.devices()[0].device_kind, jnp.dtype(dtype).name
    print(f"device: {device}; computed in {name}")
    print(f"{'size':12}{'codes':12}{'tokens':>7}{'bytes / bf16':>14}", end="")
    print(f"{'forward ×':>11}{'gradient ×':>12}{'temporary ×':>13}")
    for size, (*shape, rows, length) in SIZES.items():
        config = config_of(*shape)
        dense = models.init_params(jax.random.key(0), config, dtype)
        adapter = models.init_adapter(jax.random.key(1), config, rank=8, alpha=16.0)
        ids = jax.random.randint(jax.random.key(2), (rows, length), 0, VOCABULARY)
        loss = functools.partial(loss_fn, apply_fn=models.make_apply_fn(config))
        programs = jax.jit(loss), jax.jit(jax.grad(loss))
        for kind in KINDS:
            codes = quantize(dense, kind)
            share = weight_bytes(config, jnp.bfloat16, kind) / weight_bytes(config)
            print(f"{size:12}{kind:12}{rows * length:7}{share:14.3f}", end="")
            for program, width in zip(programs, (11, 12), strict=True):
                ours, theirs = beside(
                    functools.partial(program, adapter, codes, ids),
                    functools.partial(program, adapter, dense, ids),
                )
                print(f"{ours / theirs:{width}.2f}", end="")
            plans = [temporary(programs[1], adapter, x, ids) for x in (codes, dense)]
            print(f"{plans[0] / plans[1]:13.2f}", flush=True)
    beside_qwix(dtype)


if __name__ == "__main__":
    main()
