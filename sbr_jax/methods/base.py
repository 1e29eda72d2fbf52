"""A defence: a frozen record of pure hooks and its cost, and what it may know.

A method never sees the trainer. Every hook has a neutral default, so
``Method(name="plain")`` is plain sequential fine-tuning.

Symbols: B examples of a batch, T tokens, N calibration examples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax.data import TokenDataset
from sbr_jax.data.layout import answer_places, lengths_of
from sbr_jax.methods.risk import Judge
from sbr_jax.models import answers
from sbr_jax.settings import Hardware, Training
from sbr_jax.typing import ApplyFn, Batch, PyTree, UserError

LAYER_AXES = 1
"""Adapters are stacked over layers: one leading axis is vmapped."""


class InertProjectionWarning(UserWarning):
    """Warning of a projection that removes almost nothing, everywhere or in a kind."""


Answer = Callable[
    [PyTree, Sequence[Sequence[int]], int, Sequence[int]], list[list[int]]
]
"""``(base, prompts, most, stops) -> answers``, token ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Static knowledge of a defence.

    The datasets are host-side; arrays that :attr:`Method.gradient` needs belong in
    the method's state, never in a closure.

    Attributes:
      apply_fn: the model, ``apply_fn(base, adapter, tokens, ...) -> logits [B, T, V]``;
        losses ask it for its states and its head apart (:mod:`sbr_jax.models.answers`).
      calibration: the safety calibration set D_safe.
      training: the job's mathematics.
      hardware: how it is computed; ``accumulation`` is what a hook may need of it.
      calibration_controls: other sets of the same size, ``"benign"`` and
        ``"random"``.
      safety_mix: safety examples for methods that interleave them.
      harmful: harmful requests with compliant answers that the defender owns (never
        the attacker's): anchors of SBR, the positive class of a probe, the data that
        Booster and Antidote unlearn. From the entities of the calibration set.
      unaligned: base weights before alignment, for methods that need the alignment's
        own direction (Safe LoRA, AsFT, LoX).
      judge: ``judge(dataset) -> risk [N]`` in [0, 1], of learning each example.
      domain: what was just learned; only ``end_domain`` is given it.
      answer: ``(base, prompts, most, stops) -> answers``: token ids of the greedy
        answers of a model without adapter, at most so many each, cut before a stop.
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
    """Benign exchanges as many as the calibration set has, for what ``name`` says.

    Raises:
      UserError: for a study without them.
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

    Where the batch has ``"weight" [B]``, of the weighted losses (see
    :func:`sbr_jax.methods._compose.with_risk`).
    """
    hidden = answers.states(
        problem.apply_fn, base, adapter, batch, **dropout(problem, key)
    )
    found = answers.find(batch)
    example = answers.cross_entropy(problem.apply_fn, base, hidden, found)
    return jnp.mean(example if "weight" not in batch else batch["weight"] * example)


def dropout(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """Options of a forward pass that is trained through."""
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
    """What ``init`` returns, as shapes and without diagnostics; nothing is computed.

    Weights and adapter may be shapes.

    Raises:
      jax.errors.JAXTypeError: where the hook asks for a number of an array.
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
    """Trains on what ``mix`` gave."""
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
    """One gradient of ``(adapter, key) -> (loss, metrics)`` and β L_safe together."""
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
    """Work of a defence beside that of plain training; the forecast reads it.

    Attributes:
      forward: forward passes of every step, in task batches.
      backward: forward and backward passes of every step, in task batches.
      stage: the same of every step of a stage before training, in task batches; 0 for
        no stage.
      stage_steps: of that stage; None for as many as a domain has.
      fishers: how often every calibration example is differentiated on its own before
        the first domain.
      domain_fishers: the same after each domain.
      refresh_fishers: the same at each refresh.
      own_fishers: how often every example of a domain is, after it.
      fisher_examples: at most so many of them; None for the study's number.
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
    ``replay_gradient`` run inside jit, once for each microbatch; the others run on
    the host, and may compile what they need.

    Attributes:
      name: of the variant, in tables.
      monitored: whether cumulative safety monitoring runs after each domain.
      cost: work beside that of plain training.
      prepare: ``(problem, base, adapter, key) -> base``, once, before everything: an
        alignment-stage defence gives other weights to start from. The study's own are
        never written to.
      init: ``(problem, base, adapter, key) -> state``, once, on the aligned model.
        ``state`` is a dict pytree. ``"subspace"`` and ``"coefficients"`` are put into
        the optimizer before every domain; ``"diagnostics"`` is a dict of small arrays
        that goes into the results; everything else is the method's own.
      optimizer: ``(problem, adapter, learning_rate) -> transformation``. Its state
        must have the same shape in every domain, so that one program serves all.
      mix: ``(problem, domain, seed) -> TokenDataset``, before each domain; cheap, and
        asked already by a dry run.
      begin_domain: ``(problem, base, state, examples, key) -> (examples, metrics)``,
        after ``mix``, once for each domain: may look at the aligned weights and the
        state, and ask the model (``problem.answer``). Metrics are numbers that go into
        the results of the domain's training.
      gradient: ``(problem, base, adapter, state, batch, key) -> (grads, extra_args,
        metrics)``. ``batch`` comes in a layout of :mod:`sbr_jax.models.answers`, and
        ``batch["row"]`` holds each example's number in the whole step; the key is the
        same for all microbatches of a step. All results are averaged over
        microbatches.
      replay_gradient: the same with ``safe`` and ``weight`` after ``batch``: the
        gradient of the repair, L_task + β L_safe.
      refresh: ``(problem, base, adapter, state, key) -> state``, every
        ``refresh_every`` steps inside a domain; None for never.
      refresh_every: in optimizer steps.
      end_domain: ``(problem, base, adapter, state, key) -> (adapter, state)``.
      deploy: ``(problem, base, adapter, state) -> (base, adapter)``: the weights that
        are measured and monitored, where those are not the trained ones. Training goes
        on from the weights as they were.
      outline: ``(problem, base, adapter) -> state`` as shapes, without diagnostics, for
        what is compiled before there are numbers; None where tracing ``init`` tells
        them. See :meth:`state_shapes`.
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
        """The first state, as shapes and without diagnostics; nothing is computed."""
        if self.outline is not None:
            return self.outline(problem, base, adapter)
        return traced_state(self.init, problem, base, adapter)


# --- helpers for hooks --------------------------------------------------------------


def summed_over_tokens(
    problem: Problem, data: TokenDataset, sums: Callable[..., PyTree]
) -> tuple[PyTree, float]:
    """Sums of ``(tokens, real) -> tree`` over parts of a set, and its real tokens.

    Real are those up to an example's last answer token; padding is not.
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
    """A host dataset and its answer places as arrays that a method keeps."""
    tokens, mask = dataset.tokens, dataset.mask
    # Only what comes before the end of the longest answer is ever read.
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
    accumulation over microbatches sees the same examples as one big batch. ``total`` is
    a multiple of their number.
    """
    rows = jax.random.randint(key, (total,), 0, data["tokens"].shape[0])
    if problem.hardware.accumulation > 1:
        share = total // problem.hardware.accumulation
        index = batch["row"][0] // batch["row"].shape[0]
        rows = jax.lax.dynamic_slice(rows, (index * share,), (share,))
    return {name: value[rows] for name, value in data.items()}
