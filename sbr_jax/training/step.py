"""One optimizer step as a pure function, compiled once for all domains and seeds.

    step(base, train, state, batch, key) -> (train, metrics)

``base`` (the frozen weights) is an argument, ``train`` (adapter, optimizer state and
step number) is donated, and ``state`` (the method's) is only read. No array is captured
in the program, so a new domain, another seed or a new subspace runs the same one.

Symbols: A microbatches, B examples, T tokens, S seeds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax import _mesh
from sbr_jax.subspace import project_onto
from sbr_jax.subspace.geometry import squares_inside
from sbr_jax.transforms.shares import read_task_share
from sbr_jax.typing import PyTree

TINY = np.float32(1e-30)
"""Added to a norm before dividing by it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step changes.

    Attributes:
      adapter: the trained tree.
      opt_state: the optimizer's state.
      step: int32 scalar, steps done in this domain.
    """

    adapter: PyTree
    opt_state: PyTree
    step: jax.Array


def make_step(
    problem: Any,
    gradient: Callable[..., tuple[PyTree, dict, dict]],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    accumulation: int = 1,
    mesh: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the pure step of one method.

    **Guarantee.** With ``accumulation = A`` the gradient is the mean over A
    microbatches of B/A examples. It equals the gradient of one batch of B examples up
    to floating-point rounding, if the loss is a mean over examples without dropout. The
    frozen weights are read only.

    Args:
      problem: passed to ``gradient``, the method's hook.
      gradient: ``(problem, base, adapter, state, batch, key) -> (grads, extra_args,
        metrics)``.
      optimizer: takes ``extra_args`` in its update.
      accumulation: A; must divide the batch.
      mesh: to trace the step for; None for one device.

    Returns:
      ``step(base, train, state, batch, key, *more) -> (train, metrics)``, not yet
      compiled. ``key`` is the domain's key: the step folds its number in. ``more``
      goes to the hook before its key (a repair passes a safety batch and β). Metrics
      are float32 scalars: ``loss``, ``grad_norm``, ``update_norm``, ``finite`` (1 or
      0) and the hook's own. If the state holds a subspace, ``safety_gradient``,
      ``removed`` and ``safety_update`` are added. So is ``safety_task``, where it can
      be told apart: the share of the step, without the bypass's part, inside the
      subspace.
    """

    def step(base, train, state, batch, key, *more):
        step_key = jax.random.fold_in(key, train.step)
        grads, extra, metrics = _accumulated(
            lambda micro, rest: gradient(
                problem, base, train.adapter, state, micro, *rest, step_key
            ),
            batch,
            more,
            accumulation,
        )
        # Sum over the rows of all devices once; then every device holds the result.
        grads, extra = jax.tree.map(_mesh.constrain, (grads, extra))
        # Optax promotes its integer counts: allow it in strict mode too.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                grads, train.opt_state, train.adapter, **extra
            )
        adapter = optax.apply_updates(train.adapter, updates)
        norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        metrics = {
            **metrics,
            "grad_norm": norm,
            "update_norm": update_norm,
            **_safety_components(state, (grads, norm), (updates, update_norm)),
        }
        if "safety_update" in metrics:
            share = read_task_share(opt_state)
            if share is None and "bypass" not in extra:  # The whole step is the task's.
                share = metrics["safety_update"]
            metrics |= {} if share is None else {"safety_task": share}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        metrics["finite"] = finite & jnp.isfinite(update_norm)
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
        return TrainState(adapter, opt_state, train.step + 1), metrics

    def on_mesh(*args):
        with _mesh.using(mesh):
            return step(*args)

    return step if mesh is None else on_mesh


def _accumulated(hook, batch, more, accumulation):
    """Mean of the hook's results over microbatches, by a scan."""
    # A packed batch numbers its own examples and already comes in microbatches.
    packed = "segments" in batch
    if not packed:
        size = batch["tokens"].shape[0]
        batch = {**batch, "row": jnp.arange(size, dtype=jnp.int32)}
    if accumulation == 1:
        return hook(batch, more)

    def split(x):
        x = jnp.asarray(x)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (accumulation,))
        # Row i of the batch goes to microbatch i // (B / A): contiguous, as "row" says.
        return x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:])

    micro = (batch if packed else jax.tree.map(split, batch), jax.tree.map(split, more))
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(hook, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, item):
        return jax.tree.map(jnp.add, total, hook(*item)), None

    total, _ = jax.lax.scan(body, zeros, micro)
    return jax.tree.map(lambda x: x / jnp.asarray(accumulation, x.dtype), total)


def _safety_components(state, gradient, update) -> dict[str, jax.Array]:
    """Shares of the norms inside the subspace: ‖Πg‖/‖g‖, ‖(1−α)Πg‖/‖g‖, ‖ΠΔ‖/‖Δ‖.

    ``gradient`` and ``update`` are ``(g, ‖g‖)`` and ``(Δ, ‖Δ‖)``.
    """
    subspace = state.get("subspace") if isinstance(state, dict) else None
    if subspace is None:
        return {}
    if _mesh.current() is not None:
        return _components_on_mesh(state, subspace, gradient, update)
    (grads, norm), (updates, update_norm) = gradient, update
    norm, update_norm = norm + TINY, update_norm + TINY
    inside = project_onto(grads, subspace)
    update_inside = optax.tree.norm(project_onto(updates, subspace))
    found = {
        "safety_gradient": optax.tree.norm(inside) / norm,
        "safety_update": update_inside / update_norm,
    }
    if state.get("coefficients") is not None:
        squares = jax.tree.map(_removed_square, state["coefficients"], inside)
        total = sum(jax.tree.leaves(squares), start=jnp.float32(0))
        found["removed"] = jnp.sqrt(total) / norm
    return found


def _components_on_mesh(state, subspace, gradient, update) -> dict[str, jax.Array]:
    """The same shares from ‖Vᵀ·‖ = ‖Π·‖: reads V once and gathers no vector."""
    (grads, norm), (updates, update_norm) = gradient, update
    norm, update_norm = norm + TINY, update_norm + TINY
    inside, moved = squares_inside([grads, updates], subspace)

    def root(squares: PyTree) -> jax.Array:
        leaves = map(jnp.sum, jax.tree.leaves(squares))
        return jnp.sqrt(sum(leaves, start=jnp.float32(0)))

    found = {
        "safety_gradient": root(inside) / norm,
        "safety_update": root(moved) / update_norm,
    }
    if state.get("coefficients") is not None:
        mark = subspace.fingerprint
        pairs = zip(
            mark.entries(state["coefficients"]), mark.entries(inside), strict=True
        )
        kept = [(1.0 - a) ** 2 * s for a, s in pairs if a is not None and s is not None]
        found["removed"] = root(kept) / norm
    return found


def _removed_square(alpha: jax.Array, unit: PyTree) -> jax.Array:
    """Σ_layers (1 − α)² ‖Πg‖² of one unit; α is ``[*L]``."""
    alpha = jnp.asarray(alpha, jnp.float32)
    total = jnp.float32(0)
    for leaf in jax.tree.leaves(unit):
        axes = tuple(range(alpha.ndim, leaf.ndim))
        total += jnp.sum(
            (1.0 - alpha) ** 2 * jnp.sum(leaf.astype(jnp.float32) ** 2, axes)
        )
    return total


def compiled_step(
    step: Callable[..., Any], *, vmap_seeds: bool = False, out_shardings: Any = None
) -> Callable[..., Any]:
    """Compiles a step that consumes its ``train``.

    Args:
      step: from :func:`make_step`.
      vmap_seeds: maps over a leading seed axis of all arguments except ``base``.
      out_shardings: shardings of ``(train, metrics)`` on a mesh, so that the state
        keeps its placement between steps; None leaves it to the compiler.

    Returns:
      The jitted function. The ``train`` passed to it is consumed.
    """

    def mapped(base, *rest):
        return jax.vmap(lambda *args: step(base, *args))(*rest)

    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(mapped if vmap_seeds else step, donate_argnums=1, **options)
