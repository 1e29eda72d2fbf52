"""The search of GCG: it follows its definition and its slope, and lowers the loss."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gcg_case import (
    ALLOWED,
    BREADTH,
    EXTEND,
    FIRST,
    LENGTH,
    MODEL,
    PROMPTS,
    STEPS,
    TARGETS,
    adapter,
    attack,
    dense_loss,
    found,
    gradient,
    same,
)

from sbr_jax.attacks.candidates import draw_candidates
from sbr_jax.attacks.gcg import FULL, REDUCED, gcg
from sbr_jax.attacks.suffix import lay_out
from sbr_jax.typing import UserError


def test_reported_losses_are_those_of_the_sequences_alone():
    result = found()
    shape = (len(PROMPTS), STEPS + 1)
    assert result.losses.shape == result.best_losses.shape == shape
    assert result.losses.dtype == result.best_losses.dtype == np.float32
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        for suffix, loss in (
            ([FIRST] * LENGTH, result.losses[i, 0]),
            (result.suffixes[i], result.losses[i, -1]),
            (result.best_suffixes[i], result.best_losses[i, -1]),
        ):
            # 1e-5 of a loss near 3: float32 rounding of other shapes.
            assert abs(dense_loss(prompt, suffix, target) - loss) < 1e-5 * 3


def test_a_step_is_the_best_candidate_of_the_definition():
    key = jax.random.key(5)
    first = attack(key=key, steps=1)
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    start = np.full(LENGTH, FIRST, np.int32)
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        row = {name: value[i] for name, value in layout._asdict().items()}
        _, slope = gradient(MODEL.params, None, row, start)
        own = jax.random.fold_in(jax.random.fold_in(key, i), 0)
        candidates = draw_candidates(
            own, slope, start, ALLOWED, candidates=BREADTH, top_k=8
        )
        scores = {
            tuple(c): dense_loss(prompt, c, target)
            for c in np.unique(np.asarray(candidates), axis=0).tolist()
        }
        assert tuple(first.suffixes[i].tolist()) == min(scores, key=scores.get)


def test_the_best_never_rises_and_the_original_moves_all_the_same():
    result = found()
    np.testing.assert_array_equal(
        result.best_losses, np.minimum.accumulate(result.losses, axis=1)
    )
    assert (np.diff(result.losses) > 0).any()
    # It lowers the loss of every prompt.
    assert (result.best_losses[:, 0] - result.best_losses[:, -1] > 0.3).all()


def test_the_gradient_is_what_finds_the_suffix():
    """Climbing instead, with the same budget, does worse: it is no luck of the draw."""

    def uphill(base, adapter, tokens, *, embeddings=None):
        if embeddings is not None:
            # Of the same value, exactly; but its gradient is turned round.
            embeddings = 2.0 * jax.lax.stop_gradient(embeddings) - embeddings
        return MODEL.apply_fn(base, adapter, tokens, embeddings=embeddings)

    wrong = attack(model=dataclasses.replace(MODEL, apply_fn=uphill))
    np.testing.assert_allclose(wrong.losses[:, 0], found().losses[:, 0], atol=1e-5)
    better = wrong.best_losses[:, -1] - found().best_losses[:, -1]
    assert better.mean() > 0.1


def test_together_is_as_one_at_a_time():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    order = np.array([2, 0, 1])
    moved = attack(
        [PROMPTS[i] for i in order], [TARGETS[i] for i in order], key=keys[order]
    )
    same(moved, jax.tree.map(lambda x: x[order], found()))
    # The last prompt is short: alone it is padded less.
    alone = attack(PROMPTS[2:], TARGETS[2:], key=keys[2:])
    same(alone, jax.tree.map(lambda x: x[2:], found()))


def test_the_chunk_is_not_mathematics():
    # 7 divides neither the 32 candidates nor fits one prompt.
    same(attack(chunk=7), found())
    same(attack(chunk=2 * BREADTH), found())


def test_the_key_decides_and_progress_is_told_after_every_step():
    """What a progress bar is given is what the result says."""
    told = []
    first = attack(on_step=lambda step, best: told.append((step, best.copy())))
    again, other = found(), attack(key=jax.random.key(1))
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (first.suffixes != other.suffixes).any()
    assert [step for step, _ in told] == list(range(1, STEPS + 1))
    np.testing.assert_array_equal(
        np.stack([best for _, best in told], axis=1), first.best_losses[:, 1:]
    )


def test_the_weights_are_attacked_as_given():
    pairs = adapter()
    adapted = attack(adapter=pairs)
    assert (np.abs(adapted.losses[:, 0] - found().losses[:, 0]) > 0.01).all()
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        loss = dense_loss(prompt, adapted.suffixes[i], target, pairs)
        assert abs(loss - adapted.losses[i, -1]) < 3e-5


@pytest.mark.thorough
def test_half_precision_is_attacked_too():
    model = tiny.model(jnp.bfloat16)
    # jax lowers its own backward pass of attention with mixed dtypes.
    with jax.numpy_dtype_promotion("standard"):
        result = attack(model=model, extend_fn=EXTEND, steps=2)
    assert np.isfinite(result.losses).all()
    assert (result.best_losses[:, -1] < result.losses[:, 0]).all()


# --- what is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2.5}, "steps.*whole number"),
        ({"chunk": 0}, "chunk"),
        ({"allowed": ALLOWED[1:]}, r"allowed.*\[32\]"),
        ({"allowed": ~ALLOWED & False}, "allowed.*with 0"),
        ({"initial_token": 2}, "initial_token"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "key.*3"),
        ({"targets": TARGETS[1:]}, "2 targets"),
        ({"targets": [[], *TARGETS[1:]]}, r"targets\[0\]"),
        ({"prompts": [*PROMPTS[1:], ([], [2])]}, r"prompts\[2\].*BOS"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        attack(**changes)


@pytest.mark.parametrize("budget", [REDUCED, FULL])
def test_the_budgets_are_options_of_the_attack(budget):
    defaults = inspect.signature(gcg).parameters
    assert set(budget) <= set(defaults)
    assert {name: defaults[name].default for name in REDUCED} == REDUCED
