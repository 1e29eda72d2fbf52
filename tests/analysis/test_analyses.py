"""Analyses against dense twins, planted answers and answers that must not be found."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_run

from sbr_jax import from_factors
from sbr_jax.analysis import exhaustion, harm_types, sensitivity
from sbr_jax.reporting import analyses as drawn
from sbr_jax.reporting.runs import read_run
from sbr_jax.studies import analyses, examples
from sbr_jax.studies.options import TestbedOptions
from sbr_jax.subspace import empty_subspace
from sbr_jax.typing import UserError

P, HALF = 40, 20


def subspace(factors, max_rank=8, energy=1.0):
    return from_factors({"w": jnp.asarray(factors)}, max_rank=max_rank, energy=energy)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def planted(rng, basis, noise=0.05, count=12):
    """Examples whose gradients lie near the span of some directions."""
    mix = normal(rng, count, len(basis))
    rows = mix @ basis + noise * normal(rng, count, P)
    return subspace(rows, max_rank=len(basis))


# --- comparing ----------------------------------------------------------------------


def test_compare_equals_its_dense_twin():
    rng = np.random.default_rng(1)
    a = subspace(normal(rng, 3, P))
    b = subspace(normal(rng, 5, P) * np.arange(1, 6)[:, None])
    found = harm_types.compare(a, b)
    va, vb = (np.asarray(s.basis["w"], np.float64) for s in (a, b))
    values = np.asarray(b.eigenvalues["w"], np.float64)
    proj_a, proj_b = va[:, :3] @ va[:, :3].T, vb[:, :3] @ vb[:, :3].T
    fisher = vb @ np.diag(values) @ vb.T
    # Bases are orthonormal to 1e-6.
    assert found["overlap"] == pytest.approx(np.trace(proj_a @ proj_b) / 3, abs=1e-5)
    captured = np.trace(proj_a @ fisher) / np.trace(fisher)
    assert found["captured"] == pytest.approx(captured, abs=1e-5)
    assert found["rank"] == 3
    assert found["chance"] == pytest.approx(3 / P)


def test_chance_counts_only_what_the_gradient_reaches():
    rng = np.random.default_rng(2)

    def draw():
        rows = normal(rng, 4, P)
        rows[:, HALF:] = 0  # as ∂L/∂A in a fresh adapter
        return subspace(rows)

    found = [harm_types.compare(draw(), draw()) for _ in range(30)]
    overlap = np.mean([row["overlap"] for row in found])
    # The deviation of one overlap is below 0.08, of the mean of 30 below 0.015.
    assert found[0]["chance"] == pytest.approx(4 / HALF)
    assert overlap == pytest.approx(4 / HALF, abs=0.05)
    assert abs(overlap - 4 / P) > 0.05


def test_compare_refuses_what_cannot_be_compared():
    a = subspace(np.eye(P, dtype=np.float32)[:2])
    with pytest.raises(UserError, match="ranks are at least 1"):
        harm_types.compare(a, empty_subspace({"w": jnp.zeros(P)}, max_rank=4))
    other = from_factors({"v": jnp.eye(P)[:2]}, max_rank=2)
    with pytest.raises(UserError, match="same parameters"):
        harm_types.compare(a, other)


def test_kinds_of_one_subspace_are_told_from_kinds_of_two():
    rng = np.random.default_rng(3)
    first, second = np.linalg.qr(normal(rng, P, 6))[0].T.reshape(2, 3, P)
    halves = {
        kind: (planted(rng, basis), planted(rng, basis))
        for kind, basis in (("a", first), ("b", first), ("c", second))
    }
    found = harm_types.harm_types(halves)
    assert found["specific"]["a"]["b"] > 0.9
    assert found["specific"]["a"]["c"] < 0.1
    there, back = found["overlap"]["a"]["b"], found["overlap"]["b"]["a"]
    assert there == pytest.approx(back, rel=1e-12)
    # The ceiling comes from two samples, so it is no comparison with itself.
    assert 0.8 < found["overlap"]["a"]["a"] < 0.9999
    assert found["captured"]["a"]["c"] < 0.2
    assert drawn.harm_types_figure(found).axes


def test_noise_has_no_ceiling_to_compare_with():
    rng = np.random.default_rng(4)
    # Of 400 parameters: an overlap by chance is far from 0.05 above its mean.
    draws = [subspace(normal(rng, 3, 400)) for _ in range(4)]
    found = harm_types.harm_types({"a": tuple(draws[:2]), "b": tuple(draws[2:])})
    assert found["specific"] == {k: {"a": None, "b": None} for k in ("a", "b")}
    assert len(drawn.harm_types_figure(found).axes) == 1
    with pytest.raises(UserError, match="at least two kinds"):
        harm_types.harm_types({"a": tuple(draws[:2])})


# --- sensitivity --------------------------------------------------------------------


def test_more_examples_find_more_of_the_subspace():
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(normal(rng, P, 4))[0].T
    rows = normal(rng, 96, 4) @ basis + 0.2 * normal(rng, 96, P)
    sizes = sensitivity.usable_sizes(96, (2, 6, 24, 480))
    assert sizes == [2, 6, 24, 96]
    whole = {n: subspace(rows[:n], energy=0.9) for n in sizes}
    twins = {n: subspace(rows[n : 2 * n], energy=0.9) for n in sizes[:-1]}
    found = sensitivity.sensitivity(whole, twins)
    assert found["overlap"][-1] == pytest.approx(1, abs=1e-5)
    assert found["captured"] == sorted(found["captured"])
    assert all(rank <= n for rank, n in zip(found["rank"], sizes, strict=True))
    assert found["twin"][-1] is None
    # Being part of the largest set flatters; the disjoint twin is below it.
    assert all(
        t < o for t, o in zip(found["twin"][:-1], found["overlap"][:-1], strict=True)
    )
    assert len(drawn.sensitivity_figure(found).axes) == 2


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match="more than 30"):
        sensitivity.usable_sizes(24)
    one = subspace(np.eye(P, dtype=np.float32)[:2])
    with pytest.raises(UserError, match="at least two sizes"):
        sensitivity.sensitivity({30: one}, {})


# --- exhaustion ---------------------------------------------------------------------


def test_exhaustion_by_hand():
    found = exhaustion.exhaustion(
        ("a", "b", "c"),
        [[90.0, 80.0, 60.0], [90.0, 80.0, 80.0]],
        ranks=[[2, 4], [4, 8], [8, 8], [8, 8]],
        cap=8,
        removed=[[0.2, 0.4, 0.6]],
        reference=[[90.0, 90.0, 90.0]],
    )
    # Domain t is learnt under the subspace that was found before it.
    assert found["rank"] == [3.0, 6.0, 8.0]
    assert found["used"] == [0.375, 0.75, 1.0]
    assert found["full"] == [0.0, 0.5, 1.0]
    assert found["gap"] == [0.0, 10.0, 20.0]
    assert found["slope"]["gap"] == pytest.approx(10.0)
    assert found["slope"]["removed"] == pytest.approx(0.2)
    one = exhaustion.exhaustion(("a",), [[90.0]])
    assert one["slope"]["accuracy"] is None
    assert "rank" not in one
    assert len(drawn.exhaustion_figure({"plain": one}).axes) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ranks": [[1, 1]], "cap": 8}, "ranks"),
        ({"ranks": [[1], [1], [1]]}, "cap None"),
        ({"removed": [[0.1]]}, "removed"),
        ({"reference": np.zeros((0, 2))}, "reference"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        exhaustion.exhaustion(("a", "b"), [[1.0, 2.0]], **changes)


def test_exhaustion_reads_a_run(tmp_path):
    found = analyses.exhaustion_of(read_run(synthetic_run.write(tmp_path / "run")))
    assert set(found) == {"plain", "safeanchor", "safeanchor-exact"}
    assert "rank" not in found["plain"]
    assert "gap" not in found["plain"]
    row = found["safeanchor-exact"]
    assert row["cap"] == 64
    assert row["removed"] == pytest.approx([0.4] * 3)
    text = (tmp_path / "run" / "results.jsonl").read_text()
    (ranks,) = (
        x["diagnostics"]["effective_rank"]
        for x in map(json.loads, text.splitlines())
        if (x["method"], x["seed"], x["index"]) == ("safeanchor-exact", 0, -1)
    )
    assert row["rank"][0] == pytest.approx(np.mean(list(ranks.values())))


# --- the testbed's examples ---------------------------------------------------------


def test_examples_are_of_their_kind_and_held_apart():
    from sbr_jax import testbed
    from sbr_jax.testbed import grammar

    tokenizer = testbed.load().tokenizer
    found = examples.build_examples(tokenizer, TestbedOptions(), examples=6)
    assert {len(data) for data in found.kinds.values()} == {12}

    def prompts(data):
        stops = data.mask.argmax(1)
        return [tuple(t[:s]) for t, s in zip(data.tokens, stops, strict=True)]

    for kind, data in found.kinds.items():
        rows = prompts(data)
        assert len(set(rows)) == len(rows), kind  # the halves share no prompt
    refusals = found.kinds["refusal"]
    answers = {
        tokenizer.decode(t[m > 0], skip_special_tokens=True).strip()
        for t, m in zip(refusals.tokens, refusals.mask, strict=True)
    }
    assert answers <= set(grammar.REFUSALS)
    assert len(found.refusing) == len(found.complying) > 0
    assert not set(prompts(found.refusing)) & set(prompts(refusals))
    np.testing.assert_array_equal(
        found.refusing.mask.argmax(1), found.complying.mask.argmax(1)
    )


def test_distinct_gives_up_where_there_is_no_more():
    rows = examples.distinct(lambda: ("same", "answer"), 5)
    assert rows == [("same", "answer")]
