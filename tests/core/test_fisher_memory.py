"""What a streamed Fisher holds, and how far it may be from the dense one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from subspace_case import normal

from sbr_jax import UserError, effective_rank, fisher_subspace
from sbr_jax.fisher import gradients as of_examples
from sbr_jax.subspace import sketch, spectrum, units
from sbr_jax.subspace.factors import unit_eigenpairs

N, P, K, BATCH, BUFFER = 256, 40, 8, 8, 32
KEEP = BUFFER // 2
M = KEEP - KEEP // 2 + 1


def linear(params, x):
    return jnp.vdot(params["w"], x)


def spectrum_rows(seed, values):
    """Rows whose second moments have the given eigenvalues, in random directions."""
    turn, _ = np.linalg.qr(normal(seed, P, P))
    return (normal(seed + 1, N, P) * np.sqrt(values)) @ turn.T


def weak_everywhere():
    """Sixteen strong rows, then one direction that no cut sees as strong."""
    rows = np.zeros((N, P), np.float32)
    rows[:KEEP, :KEEP] = np.eye(KEEP)
    rows[KEEP:, KEEP] = np.sqrt(0.9 / KEEP)
    return rows


def in_turns():
    """Every direction fills the buffer once and never comes again."""
    return np.repeat(np.eye(P), N // P + 1, axis=0)[:N]


RANK = np.arange(1, P + 1)
STREAMS = {
    "flat": spectrum_rows(0, np.ones(P)),
    "slow decay": spectrum_rows(2, 1.0 / RANK),
    "fast decay": spectrum_rows(4, 0.5**RANK),
    "three large": spectrum_rows(6, np.where(RANK <= 3, 100.0, 1.0)),
    "growing": spectrum_rows(8, 1.0 / RANK) * np.geomspace(0.01, 1, N)[:, None],
    "shrinking": spectrum_rows(8, 1.0 / RANK) * np.geomspace(1, 0.01, N)[:, None],
    "weak everywhere": weak_everywhere(),
    "in turns": in_turns(),
    "nothing": np.zeros((N, P)),
}


def streamed(rows, buffer):
    batches = jnp.asarray(rows, jnp.float32).reshape(-1, BATCH, P)
    found = fisher_subspace(
        linear,
        {"w": jnp.zeros(P)},
        list(batches),
        max_rank=K,
        energy=1.0,
        buffer_rank=buffer,
    )
    return [reference.f64(x["w"]) for x in (found.basis, found.eigenvalues)]


def least_bound(values):
    """``min_k Σ_{j>k} λ_j / (m − k)``."""
    return min(values[k:].sum() / (M - k) for k in range(M))


@pytest.mark.parametrize("rows", STREAMS.values(), ids=STREAMS)
def test_a_cut_buffer_keeps_within_the_stated_bound(rows):
    dense = reference.f64(rows).T @ reference.f64(rows) / N
    true, _ = reference.eigen(dense)
    basis, values = streamed(rows, BUFFER)
    rounding = 1e-5 * true[0]
    lost = true[:K] - values
    assert np.all(lost >= -rounding)
    bound = (np.trace(dense) - values.sum()) / M
    assert np.all(lost <= bound + rounding)
    assert np.all(lost <= least_bound(true) + rounding)
    # From below in every direction, not in eigenvalues alone.
    left, _ = np.linalg.eigh(dense - (basis * values) @ basis.T)
    assert left[0] >= -rounding


@pytest.mark.parametrize("rows", STREAMS.values(), ids=STREAMS)
def test_an_uncut_buffer_is_the_dense_fisher(rows):
    dense = reference.f64(rows).T @ reference.f64(rows) / N
    true, _ = reference.eigen(dense)
    basis, values = streamed(rows, N)
    np.testing.assert_allclose(values, true[:K], rtol=1e-5, atol=1e-5 * true[0])
    residual = dense @ basis - basis * values
    assert np.abs(residual).max() <= 2e-5 * true[0]


# --- what is held ---------------------------------------------------------------------

LAYERS, SIZE = 2, 8192
MARK = units.fingerprint(
    {"w": jax.ShapeDtypeStruct((LAYERS, SIZE), "f4")}, layer_axes=1
)
ROW = 4 * LAYERS * SIZE


def scaled_linear(params, x):
    return jnp.sum(params["w"] * x[:, None])


@functools.cache
def own_bytes(program):
    """Outputs and temporaries of a program, without what it writes in place."""
    plan = program.memory_analysis()
    made = plan.output_size_in_bytes + plan.temp_size_in_bytes
    return made - plan.alias_size_in_bytes


def peak_bytes(examples):
    """The most that the programs of an estimate hold, one after another."""
    shape = jax.ShapeDtypeStruct
    sizes = sketch.plan(LAYERS * SIZE, K, BATCH, 2 * BATCH)
    held = min(examples, sizes.rows)
    rows, number = shape((LAYERS, held, SIZE), "f4"), shape((), "i4")
    params = {"w": shape((LAYERS, SIZE), "f4")}
    parts = [shape((BATCH, LAYERS, SIZE), "f4")]
    batch = shape((BATCH, LAYERS), "f4")
    gradients = of_examples.microbatch_gradients.lower(
        params,
        batch,
        *[number] * 3,
        (),
        None,
        loss_fn=scaled_linear,
        mark=MARK,
        size=BATCH,
    )
    write = sketch.write.lower([rows], parts, number, number, mark=MARK)
    total = spectrum.Scaled(*[shape((LAYERS,), "f4")] * 2)
    pairs = unit_eigenpairs.lower(rows, total, shape((), "f4"), columns=K, energy=0.9)
    own = [own_bytes(x.compile()) for x in (gradients, pairs)]
    own.append(BATCH * ROW + own_bytes(write.compile()))
    if examples > held:
        own.append(own_bytes(sketch.cut.lower(rows, keep=sizes.keep).compile()))
    return held * ROW + max(own)


def test_the_planned_peak_does_not_grow_with_the_examples():
    few, many = peak_bytes(16), peak_bytes(256)
    assert few == many
    # Basis, one microbatch of gradients, and the rows that are kept.
    assert few <= sketch.OVERHEAD * (K + BATCH + 2 * BATCH) * ROW


def test_what_is_alive_between_batches_does_not_grow():
    def most_alive(examples):
        data = jnp.asarray(normal(0, examples, LAYERS))
        before = sum(x.nbytes for x in jax.live_arrays())
        alive = []
        fisher_subspace(
            scaled_linear,
            {"w": jnp.zeros((LAYERS, SIZE))},
            list(data.reshape(-1, BATCH, LAYERS)),
            max_rank=K,
            layer_axes=1,
            buffer_rank=2 * BATCH,
            progress=lambda seen: alive.append(
                sum(x.nbytes for x in jax.live_arrays()) - before
            ),
        )
        return max(alive)

    few, many = most_alive(16), most_alive(64)
    assert many <= few + ROW / 4
    assert few <= sketch.OVERHEAD * 2 * BATCH * ROW + 2 * ROW


# --- a budget -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [18, 19, 30, 64, 200, 5000])
@pytest.mark.parametrize("wanted", [1, 8, 32])
def test_a_budget_is_kept_and_used(columns, wanted):
    budget = sketch.OVERHEAD * 4 * 1000 * columns
    sizes = sketch.plan(1000, K, wanted, 512, budget)
    assert 1 <= sizes.microbatch <= wanted
    assert K + sizes.microbatch + sizes.rows == columns
    assert K <= sizes.keep <= sizes.rows - sizes.microbatch
    if columns >= 300:
        assert sizes.microbatch == wanted


def test_a_budget_gives_the_same_numbers_and_below_the_least_is_refused():
    rows = STREAMS["slow decay"][:24]
    run = functools.partial(
        fisher_subspace,
        linear,
        {"w": jnp.zeros(P)},
        list(jnp.asarray(rows, jnp.float32).reshape(3, 8, P)),
        max_rank=K,
        energy=1.0,
    )
    least = sketch.OVERHEAD * 4 * P * (2 * K + 2)
    want, got = run(), run(memory_budget=3 * least)
    np.testing.assert_allclose(got.eigenvalues["w"], want.eigenvalues["w"], rtol=1e-5)
    assert int(effective_rank(run(memory_budget=1.001 * least))["w"]) == K
    with pytest.raises(
        UserError, match=r"a memory budget of at least .* GiB\) for a basis"
    ):
        run(memory_budget=0.99 * least)
