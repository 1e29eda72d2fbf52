"""Interface of a defence: `Method`, its hooks and cost, and the `Problem` it sees.

A method is a frozen record of pure hooks and never sees the trainer. Every hook has a
neutral default, so ``Method(name="plain")`` is plain sequential fine-tuning.

Symbols: B examples of a batch, T tokens, N calibration examples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax import _mesh
from sbr_jax.data import TokenDataset
from sbr_jax.data.layout import answer_places, lengths_of
from sbr_jax.methods.risk import Judge
from sbr_jax.models import answers
from sbr_jax.settings import Hardware, Training
from sbr_jax.typing import ApplyFn, Batch, PyTree, UserError

LAYER_AXES = 1
"""Adapters are stacked over layers, on one leading axis, which is vmapped."""


class InertProjectionWarning(UserWarning):
    """Warning that a projection removes almost nothing, everywhere or in one kind."""


Answer = Callable[
    [PyTree, Sequence[Sequence[int]], int, Sequence[int]], list[list[int]]
]
"""``(base, prompts, most, stops) -> answers``, token ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What a defence may know about its task; it does not change during a run.

    The datasets live on the host. Arrays that :attr:`Method.gradient` needs belong in
    the method's state, never in a closure.

    Attributes:
      apply_fn: the model, ``apply_fn(base, adapter, tokens, ...) -> logits [B, T, V]``.
        Losses use its hidden states and its head separately
        (:mod:`sbr_jax.models.answers`).
      calibration: the safety calibration set D_safe.
      training: the job's mathematics.
      hardware: how it is computed; a hook may need ``accumulation``.
      calibration_controls: other sets of the same size, ``"benign"`` and
        ``"random"``.
      safety_mix: safety examples for methods that interleave them.
      harmful: harmful requests with compliant answers that the defender owns (never
        the attacker's). SBR draws its anchors from them, a probe uses them as its
        positive class, and Booster and Antidote unlearn them. They share the
        calibration set's entities.
      unaligned: base weights before alignment, for methods that need the direction of
        alignment (Safe LoRA, AsFT, LoX).
      judge: ``judge(dataset) -> risk [N]``, in [0, 1], the risk of each example.
      domain: the domain just learned; only given to ``end_domain``.
      answer: ``(base, prompts, most, stops) -> answers``: token ids of a model's greedy
        answers without an adapter, each of at most ``most`` tokens and cut before a
        stop.
    """

    apply_fn: ApplyFn
    calibration: TokenDataset
    training: Training = Training()
    hardware: Hardware = Hardware()
    calibration_controls: Mapping[str, TokenDataset] = dataclasses.field(
        default_factory=dict
    )
    safety_mix: TokenDataset | None = None
    harmful: TokenDataset | None = None
    unaligned: PyTree | None = None
    judge: Judge | None = None
    domain: TokenDataset | None = None
    answer: Answer | None = None


def benign_control(problem: Problem, name: str) -> TokenDataset:
    """The benign control: as many benign exchanges as the calibration set has.

    ``name`` says who asks for them, for the message.

    Raises:
      UserError: if the study has none.
    """
    found = problem.calibration_controls.get("benign")
    if found is None:
        raise UserError(
            f"{name}: expected calibration_controls['benign'] in the study, got none"
        )
    return found


def task_loss(
    problem: Problem, base: PyTree, adapter: PyTree, batch: Batch, key: jax.Array
) -> jax.Array:
    """Mean over the batch of each example's answer cross-entropy, float32.

    If the batch has ``"weight" [B]``, each example's loss is multiplied by its weight
    (see :func:`sbr_jax.methods._compose.with_risk`).
    """
    hidden = answers.states(
        problem.apply_fn, base, adapter, batch, **dropout(problem, key)
    )
    found = answers.find(batch)
    example = answers.cross_entropy(problem.apply_fn, base, hidden, found)
    return jnp.mean(example if "weight" not in batch else batch["weight"] * example)


def dropout(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """Dropout options of a forward pass in training."""
    if problem.training.lora_dropout > 0:
        return {"dropout_key": key, "dropout_rate": problem.training.lora_dropout}
    return {}


Found = tuple[PyTree, dict, dict]
"""Result of a gradient hook: gradients, arguments of the optimizer, metrics."""

Init = Callable[[Problem, PyTree, PyTree, jax.Array], dict]
Outline = Callable[[Problem, PyTree, PyTree], dict[str, Any]]
Mix = Callable[[Problem, TokenDataset, int], TokenDataset]
Begin = Callable[
    [Problem, PyTree, PyTree, TokenDataset, jax.Array], tuple[TokenDataset, dict]
]
Gradient = Callable[[Problem, PyTree, PyTree, PyTree, Batch, jax.Array], Found]


# --- the neutral defaults ---------------------------------------------------------


def no_state(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
    """Keeps nothing."""
    return {}


def traced_state(
    init: Init, problem: Problem, base: PyTree, adapter: PyTree
) -> dict[str, Any]:
    """Shapes of what ``init`` returns, without diagnostics; nothing is computed.

    Weights and adapter may be shapes too.

    Raises:
      jax.errors.JAXTypeError: if the hook reads values of an array.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = jax.eval_shape(lambda *args: init(problem, *args), base, adapter, key)
    return {name: part for name, part in found.items() if name != "diagnostics"}


def adamw(
    problem: Problem, adapter: PyTree, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, then AdamW (β 0.9/0.999, ε 1e-8)."""
    return optax.with_extra_args_support(
        optax.chain(
            optax.clip_by_global_norm(problem.training.max_grad_norm),
            optax.adamw(learning_rate, weight_decay=problem.training.weight_decay),
        )
    )


def unmixed(problem: Problem, domain: TokenDataset, seed: int) -> TokenDataset:
    """Trains on the domain's own examples."""
    return domain


def as_mixed(
    problem: Problem,
    base: PyTree,
    state: PyTree,
    examples: TokenDataset,
    key: jax.Array,
) -> tuple[TokenDataset, dict]:
    """Trains on the examples that ``mix`` returned."""
    return examples, {}


def task_gradient(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    state: PyTree,
    batch: Batch,
    key: jax.Array,
) -> Found:
    """The gradient of L_task."""
    loss, grads = jax.value_and_grad(lambda a: task_loss(problem, base, a, batch, key))(
        adapter
    )
    return grads, {}, {"loss": loss}


def replay_gradient(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    state: PyTree,
    batch: Batch,
    safe: Batch,
    weight: jax.Array | float,
    key: jax.Array,
) -> Found:
    """The gradient of L_task(D_t) + β L_safe(D_safe), β = ``weight``."""

    def loss_fn(a: PyTree, task_key: jax.Array):
        task = task_loss(problem, base, a, batch, task_key)
        return task, {"loss": task}

    return joint_replay(loss_fn, problem, base, adapter, safe, weight, key)


def joint_replay(
    loss_fn: Callable[[PyTree, jax.Array], tuple[jax.Array, dict]],
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    safe: Batch,
    weight: jax.Array | float,
    key: jax.Array,
) -> Found:
    """One gradient of the sum of ``loss_fn(adapter, key)`` and β L_safe."""
    task_key, safe_key = jax.random.split(key)

    def joint(a: PyTree):
        task, metrics = loss_fn(a, task_key)
        safety = task_loss(problem, base, a, safe, safe_key)
        return task + weight * safety, {**metrics, "safety_loss": safety}

    (_, metrics), grads = jax.value_and_grad(joint, has_aux=True)(adapter)
    return grads, {}, metrics


def unchanged(
    problem: Problem, base: PyTree, adapter: PyTree, state: PyTree, key: jax.Array
) -> tuple[PyTree, PyTree]:
    """Leaves adapter and state as they are."""
    return adapter, state


def as_aligned(
    problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
) -> PyTree:
    """Starts from the aligned weights."""
    return base


def as_trained(
    problem: Problem, base: PyTree, adapter: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    """Deploys the weights as training left them."""
    return base, adapter


@dataclasses.dataclass(frozen=True)
class Cost:
    """Extra work of a defence compared with plain training; the forecast reads it.

    Attributes:
      forward: forward passes of every step, in task batches.
      backward: forward and backward passes of every step, in task batches.
      stage: forward and backward passes of every step of a stage before training, in
        task batches; 0 for no stage.
      stage_steps: steps of that stage; None for as many as a domain has.
      fishers: Fisher estimates on the calibration set before the first domain. Each
        differentiates every example on its own.
      domain_fishers: Fisher estimates on the calibration set after each domain.
      refresh_fishers: Fisher estimates on the calibration set at each refresh.
      own_fishers: Fisher estimates on a domain's own examples, after the domain.
      fisher_examples: most examples of one Fisher; None for the study's number.
      columns: K of the subspace that the state holds.
      ratings: how often the study's judge rates every example of a domain.
    """

    forward: float = 0.0
    backward: float = 0.0
    stage: float = 0.0
    stage_steps: int | None = None
    fishers: int = 0
    domain_fishers: int = 0
    refresh_fishers: int = 0
    own_fishers: int = 0
    fisher_examples: int | None = None
    columns: int = 0
    ratings: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
    """One defence.

    Every hook is a pure function of its arguments. ``gradient`` and
    ``replay_gradient`` run inside jit, once for each microbatch. The others run on the
    host, and may compile what they need.

    Attributes:
      name: name of the variant, for tables.
      monitored: whether cumulative safety monitoring runs after each domain.
      cost: extra work compared with plain training.
      prepare: ``(problem, base, adapter, key) -> base``, once, before everything else.
        An alignment-stage defence returns other weights to start from; it never writes
        to the study's own.
      init: ``(problem, base, adapter, key) -> state``, once, on the aligned model.
        ``state`` is a dict pytree. ``"subspace"`` and ``"coefficients"`` are put into
        the optimizer before every domain. ``"diagnostics"`` is a dict of small arrays
        that goes into the results. Everything else is the method's own.
      optimizer: ``(problem, adapter, learning_rate) -> transformation``. Its state
        must have the same shape in every domain, so that one program serves all.
      mix: ``(problem, domain, seed) -> TokenDataset``, before each domain. It must be
        cheap, because a dry run calls it too.
      begin_domain: ``(problem, base, state, examples, key) -> (examples, metrics)``,
        once for each domain, after ``mix``. It may read the aligned weights and the
        state, and ask the model (``problem.answer``). Metrics are numbers that go into
        the results of the domain's training.
      gradient: ``(problem, base, adapter, state, batch, key) -> (grads, extra_args,
        metrics)``. ``batch`` comes in a layout of :mod:`sbr_jax.models.answers`, and
        ``batch["row"]`` holds each example's number in the whole step. All microbatches
        of a step get the same key, and all results are averaged over them.
      replay_gradient: the gradient of a repair, L_task + β L_safe. Its arguments are
        those of ``gradient``, with ``safe`` and ``weight`` after ``batch``.
      refresh: ``(problem, base, adapter, state, key) -> state``, every
        ``refresh_every`` steps inside a domain; None for never.
      refresh_every: optimizer steps between refreshes.
      end_domain: ``(problem, base, adapter, state, key) -> (adapter, state)``.
      deploy: ``(problem, base, adapter, state) -> (base, adapter)``, the weights to
        measure and monitor if these are not the trained ones. Training continues from
        the trained ones.
      outline: ``(problem, base, adapter) -> state`` as shapes, without diagnostics. It
        lets programs compile before the state exists. None if tracing ``init`` gives
        these shapes; see :meth:`state_shapes`.
    """

    name: str
    monitored: bool = False
    cost: Cost = Cost()
    prepare: Callable[[Problem, PyTree, PyTree, jax.Array], PyTree] = as_aligned
    init: Init = no_state
    optimizer: Callable[..., optax.GradientTransformationExtraArgs] = adamw
    mix: Mix = unmixed
    begin_domain: Begin = as_mixed
    gradient: Gradient = task_gradient
    replay_gradient: Callable[..., Found] = replay_gradient
    end_domain: Callable[..., tuple[PyTree, PyTree]] = unchanged
    deploy: Callable[..., tuple[PyTree, PyTree]] = as_trained
    refresh: Callable[..., PyTree] | None = None
    refresh_every: int | None = None
    outline: Outline | None = None

    def state_shapes(
        self, problem: Problem, base: PyTree, adapter: PyTree
    ) -> dict[str, Any]:
        """Shapes of the first state, without diagnostics; nothing is computed."""
        if self.outline is not None:
            return self.outline(problem, base, adapter)
        return traced_state(self.init, problem, base, adapter)


# --- helpers for hooks --------------------------------------------------------------


def summed_over_tokens(
    problem: Problem, data: TokenDataset, sums: Callable[..., PyTree]
) -> tuple[PyTree, float]:
    """Sum ``sums(tokens, real)`` over parts of a set, and count the real tokens.

    Tokens up to an example's last answer token are real; padding is not.
    """
    total, count = None, 0.0
    parts = -(-len(data) // problem.hardware.fisher_microbatch)
    for rows in np.array_split(np.arange(len(data)), parts):
        real = np.flip(np.cumsum(np.flip(data.mask[rows], 1), 1), 1) > 0
        found = sums(data.tokens[rows], real.astype(np.float32))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += float(real.sum())
    return total, count


def device_dataset(dataset: TokenDataset) -> dict[str, jax.Array]:
    """A host dataset and its answer places as device arrays for a method's state."""
    tokens, mask = dataset.tokens, dataset.mask
    # Nothing after the end of the longest answer is ever read.
    length = int(lengths_of(tokens, mask).max(initial=1))
    tokens, mask = tokens[:, :length], mask[:, :length]
    rows = {"tokens": tokens, "mask": mask, **answer_places(tokens, mask)}
    kinds = {"mask": np.float32, "shares": np.float32}
    return {
        name: jnp.asarray(value, kinds.get(name, np.int32))
        for name, value in rows.items()
    }


def draw_rows(
    problem: Problem,
    data: Mapping[str, jax.Array],
    batch: Batch,
    key: jax.Array,
    total: int,
) -> dict[str, jax.Array]:
    """Draws this microbatch's share of ``total`` examples, with replacement.

    The draw is made for the whole step and then sliced by ``batch["row"]``, so that
    accumulation over microbatches sees the same examples as one big batch. ``total``
    must be a multiple of the number of microbatches.
    """
    rows = jax.random.randint(key, (total,), 0, data["tokens"].shape[0])
    if problem.hardware.accumulation > 1:
        share = total // problem.hardware.accumulation
        index = batch["row"][0] // batch["row"].shape[0]
        rows = jax.lax.dynamic_slice(rows, (index * share,), (share,))
    # A set's states are split by width; drawn, they are few, and go by way of a copy on
    # every device to the devices of their rows.
    return {name: _mesh.constrain(value[rows]) for name, value in data.items()}
