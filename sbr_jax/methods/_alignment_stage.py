"""An alignment stage before fine-tuning: train an adapter by a rule, then merge it.

    for each of S steps:  g ← rule(W, A, B, batches);  A, B ← AdamW(g)
    W' = W + scale · A B

Vaccine and Booster differ in ``rule`` only. The stage trains a fresh adapter of the
study's shape on the aligned weights and returns new weights to start from. It only
reads the aligned weights.

Choices that no public source fixes:

- The stage starts at *aligned* weights; the papers align a pretrained model.
- It lasts as long as one domain; the papers run 20 to 50 epochs over thousands of
  examples.
- Its A is a different draw from the A that is fine-tuned later. So fine-tuning does not
  start in the subspace in which the alignment was learned.
- It clips gradients as the study does.

A batch is not split into microbatches: if memory is short, lower ``batch_size``.

Symbols: W frozen weights, A and B the factors of LoRA, S steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax.data.batches import batch
from sbr_jax.data.layout import arrange, choose
from sbr_jax.methods.base import Cost, Problem, adamw
from sbr_jax.models import LoraPair, is_lora_pair, merge_adapter
from sbr_jax.transforms.schedules import learning_rate_schedule
from sbr_jax.typing import Batch, PyTree, UserError

Rule = Callable[
    [Problem, PyTree, PyTree, Mapping[str, Batch], jax.Array], tuple[PyTree, jax.Array]
]
"""``(problem, base, adapter, batches, key) -> (gradient, loss on safe data)``."""

WARMUP = 0.1  # Share of a cosine schedule's steps; published for Vaccine.


@dataclasses.dataclass(frozen=True)
class Stage:
    """Settings of an alignment stage.

    Attributes:
      name: name of the method, for messages.
      learning_rate: peak learning rate.
      schedule: ``"cosine"``, after a warm-up of a tenth of the steps, or
        ``"constant"``.
      weight_decay: weight decay of AdamW.
      steps: S; None for as many as one domain has.
      batch_size: examples of each data set in a step; None for the study's.
    """

    name: str
    learning_rate: float
    schedule: str
    weight_decay: float
    steps: int | None
    batch_size: int | None

    def cost(self, passes: float) -> Cost:
        """The stage's cost, with ``passes`` forward and backward passes a step."""
        return Cost(stage=passes, stage_steps=self.steps)

    def optimizer(
        self, problem: Problem, adapter: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        """Clipping and AdamW with this stage's schedule and weight decay."""
        steps = self.steps or problem.training.steps_per_domain
        rate = self.learning_rate
        if self.schedule == "cosine":
            rate = learning_rate_schedule(
                rate, steps, warmup_fraction=WARMUP, final_fraction=0.0
            )
        own = dataclasses.replace(problem.training, weight_decay=self.weight_decay)
        decayed = dataclasses.replace(problem, training=own)
        return adamw(decayed, adapter, rate)


def make_realign(rule: Rule, stage: Stage) -> Callable[..., PyTree]:
    """Build the stage; its step compiles once for a problem, whatever the seed.

    **Guarantee.** The given weights are not changed; equal arguments give equal bits on
    one machine.

    Returns:
      ``realign(problem, base, adapter, data, key) -> base``, where ``data`` maps the
      names of the rule's batches to data sets, and ``adapter`` gives the shape. It
      raises a UserError if the loss does not stay finite.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
    def step(problem, base, adapter, opt_state, batches, key, number):
        grads, loss = rule(
            problem, base, adapter, batches, jax.random.fold_in(key, number)
        )
        # Optax counts in integers and promotes them; allow this in strict mode too.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = stage.optimizer(problem, adapter).update(
                grads, opt_state, adapter
            )
        return optax.apply_updates(adapter, updates), opt_state, loss

    def realign(
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        data: Mapping[str, Any],
        key: jax.Array,
    ) -> PyTree:
        fresh_key, order_key, step_key = jax.random.split(key, 3)
        adapter = fresh_like(adapter, fresh_key)
        opt_state = stage.optimizer(problem, adapter).init(adapter)
        orders = np.asarray(
            jax.random.randint(order_key, (len(data),), 0, np.iinfo(np.int32).max)
        )
        size, loss = stage.batch_size or problem.training.batch_size, jnp.float32(0)
        layouts = {
            name: choose(examples, size, packing=problem.hardware.packing)
            for name, examples in data.items()
        }
        for number in range(stage.steps or problem.training.steps_per_domain):
            batches = {}
            for order, (name, examples) in zip(orders, data.items(), strict=True):
                drawn = batch(examples, size, int(order), number)
                batches[name] = arrange([drawn], layouts[name])[0]
            adapter, opt_state, loss = step(
                problem, base, adapter, opt_state, batches, step_key, np.int32(number)
            )
        # One loss that is not finite spoils every later one, so the last one tells.
        if not np.isfinite(loss):
            raise UserError(
                f"{stage.name}: expected a finite loss in the alignment stage, got "
                f"{float(loss)}; lower its learning_rate ({stage.learning_rate:g})"
            )
        return merge_adapter(base, adapter)

    return realign


def fresh_like(adapter: PyTree, key: jax.Array) -> PyTree:
    """A fresh adapter of the same shape: B = 0, and A in another random order.

    Shuffling the inputs of each column of A gives an exact new draw if entries are
    independent and identically distributed, as in ``init_adapter``. All arrays are new.

    >>> pair = LoraPair(jnp.ones((1, 1, 2)), jnp.arange(3.0).reshape(1, 3, 1), 1.0)
    >>> fresh = fresh_like({"q_proj": pair}, jax.random.key(0))["q_proj"]
    >>> float(fresh.lora_b.sum()), sorted(fresh.lora_a.ravel().tolist())
    (0.0, [0.0, 1.0, 2.0])
    """
    pairs, structure = jax.tree.flatten(adapter, is_leaf=is_lora_pair)
    fresh = [
        LoraPair(
            jnp.zeros_like(pair.lora_b),
            jax.random.permutation(one, pair.lora_a, axis=1, independent=True),
            pair.scale,
        )
        for pair, one in zip(pairs, jax.random.split(key, len(pairs)), strict=True)
    ]
    return jax.tree.unflatten(structure, fresh)
