"""SaLoRA: an update that cannot move outputs along the safety directions.

Li, Si, Backes, Zhang, Wang, arXiv:2501.01765. For each layer and projection, with
Y = X W the outputs at the answer tokens of safety examples before fine-tuning:

    V_s = leading r_s right singular vectors of Y        C = I − V_s V_sᵀ
    ΔW = scale · A B C

(The paper writes W X and C B A; here W is ``[in, out]`` and C acts on the right.)
Training differentiates through C; the deployed adapter has C folded into B.

**Guarantee.** x ΔW V_s = 0 for every input x: whatever is learnt, a projection adds
nothing along its safety directions. Only V_s ``[L, out, r_s]`` is kept, never C.

One part of the original is left out: it starts A and B from an SVD of W filtered by
task outputs, and shifts W by −A B C so that step 0 equals the aligned model. Here no
hook sees a domain's data before its first step, and one adapter continues through all
domains. A and B start like those of every other method, with B = 0, so step 0 equals
the aligned model too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.checks import checked
from sbr_jax.data.batches import TokenDataset, subset
from sbr_jax.methods._compose import with_gradients
from sbr_jax.methods.base import Method, Problem
from sbr_jax.models import LoraPair
from sbr_jax.models.codes import as_dense
from sbr_jax.settings import Count
from sbr_jax.typing import ApplyFn, PyTree, UserError


@checked
def salora(
    *, safety_rank: Count = 32, examples: Count = 128, monitored: bool = False
) -> Method:
    """SaLoRA's safety module, on the usual initial adapter.

    Args:
      safety_rank: r_s, at least 1 and below the outputs of every adapted projection.
      examples: number of calibration examples that give the safety outputs.
      monitored: run CSM; a repair goes through C too.

    Returns:
      The method. Its first diagnostics are ``safety_energy``, the share of ‖Y‖_F² that
      V_s holds, ``[L]`` for each projection.
    """

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        data = subset(problem.calibration, examples)
        _check_rank(safety_rank, adapter, data)
        directions, energy = {}, {}
        for target in adapter:
            gram = _output_gram(problem, base, data, target)
            directions[target], energy[target] = _leading(gram, safety_rank)
        return {"directions": directions, "diagnostics": {"safety_energy": energy}}

    def through(hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook applied to A B C, with its gradient pulled back to A and B."""

        def gradient(problem, base, adapter, state, *rest):
            constrained, pull = jax.vjp(
                lambda a: constrain(a, state["directions"]), adapter
            )
            grads, extra, metrics = hook(problem, base, constrained, state, *rest)
            return pull(grads)[0], extra, metrics

        return gradient

    def deploy(problem, base, adapter, state):
        return base, constrain(adapter, state["directions"])

    method = Method("salora", monitored, init=init, deploy=deploy)
    return with_gradients(method, through)


def constrain(
    adapter: Mapping[str, LoraPair], directions: Mapping[str, jax.Array]
) -> dict[str, LoraPair]:
    """The adapter with C folded into B: ``B − (B V_s) V_sᵀ``; A stays.

    **Guarantee**: applying this twice equals applying it once, up to rounding. V_s is
    ``[L, out, r_s]`` for every pair, with orthonormal columns.
    """

    def fold(pair: LoraPair, basis: jax.Array) -> LoraPair:
        lora_b = pair.lora_b.astype(jnp.float32)
        # At default precision, accelerators leave up to a thousandth of B along V_s.
        along = jnp.einsum("lro,los->lrs", lora_b, basis, precision="highest")
        inside = jnp.einsum("lrs,los->lro", along, basis, precision="highest")
        lora_b = lora_b - inside
        return dataclasses.replace(pair, lora_b=lora_b.astype(pair.lora_b.dtype))

    return {name: fold(pair, directions[name]) for name, pair in adapter.items()}


def _check_rank(rank: int, adapter: PyTree, data: TokenDataset) -> None:
    """Refuse a rank that leaves no update, or that exceeds the answer tokens."""
    for name, pair in adapter.items():
        width = pair.lora_b.shape[-1]
        if rank >= width:
            raise UserError(
                f"safety_rank: expected less than the {width} outputs of {name}, got "
                f"{rank}; C would leave no update"
            )
    answers = int(np.count_nonzero(data.mask))
    if rank > answers:
        raise UserError(
            f"safety_rank: expected at most the {answers} answer tokens of the safety "
            f"examples, got {rank}; give more examples or a smaller rank"
        )


def _output_gram(
    problem: Problem, base: PyTree, data: TokenDataset, target: str
) -> jax.Array:
    """YᵀY ``[L, out, out]`` of one projection; memory does not grow with the data."""
    depth, _, width = base["layers"][target].shape
    gram = jnp.zeros((depth, width, width), jnp.float32)
    parts = -(-len(data) // problem.hardware.fisher_microbatch)
    for rows in np.array_split(np.arange(len(data)), parts):
        answers = (data.mask[rows] > 0).astype(np.float32)
        gram += _gram_part(problem.apply_fn, base, data.tokens[rows], answers, target)
    return gram


@functools.partial(jax.jit, static_argnames=("apply_fn", "target"))
def _gram_part(
    apply_fn: ApplyFn, base: PyTree, tokens: jax.Array, answers: jax.Array, target: str
) -> jax.Array:
    _, seen = apply_fn(base, None, tokens, capture=True)
    x = seen["inputs"][target].astype(jnp.float32) * answers[None, :, :, None]
    weight = as_dense(base["layers"][target], jnp.float32)
    y = jnp.einsum("lbti,lio->lbto", x, weight, precision="highest")
    return jnp.einsum("lbto,lbtp->lop", y, y, precision="highest")


@functools.partial(jax.jit, static_argnames="rank")
def _leading(gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Leading eigenvectors ``[L, out, rank]`` and their share of the trace ``[L]``."""

    def one(matrix):
        values, vectors = jnp.linalg.eigh(matrix)  # Ascending.
        return vectors[:, ::-1][:, :rank], jnp.sum(values[-rank:]) / jnp.sum(values)

    return jax.lax.map(one, gram)  # One layer at a time bounds the workspace.
