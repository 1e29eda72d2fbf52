"""The monitor's rules: their bounds against twins, coverage, power and refusals."""

import collections
import itertools
import math
import re

import numpy as np
import pytest
import synthetic_run
import tiny

from sbr_jax.provenance.code_version import ROOT
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import cell, monitor_table
from sbr_jax.settings import Training
from sbr_jax.testbed import evalsets
from sbr_jax.testbed import lexicon as lx
from sbr_jax.testbed.phrasings import FIRST
from sbr_jax.testbed.world import make_world
from sbr_jax.training import pipeline
from sbr_jax.training.csm import check_rule, excess_bounds, monitor, needs_repair
from sbr_jax.typing import UserError

TAU = 0.05
RULES = ("lower", "point", "upper")


def slow_wilson(successes, n, z):
    """The rates whose score test does not reject the count, by bisection."""

    def rejects(p):
        return abs(successes / n - p) > z * math.sqrt(p * (1 - p) / n)

    found = []
    for out in (0.0, 1.0):
        inside = successes / n
        if not rejects(out):
            found.append(out)
            continue
        for _ in range(60):
            middle = (out + inside) / 2
            out, inside = (middle, inside) if rejects(middle) else (out, middle)
        found.append(inside)
    return found


@pytest.mark.parametrize(("confidence", "z"), [(0.8, 0.841621), (0.95, 1.644854)])
def test_the_bounds_are_their_slow_twin(confidence, z):
    for n, before, now in ((5, 5, 5), (64, 64, 60), (64, 50, 61), (256, 0, 0)):
        (l0, u0), (lt, ut) = (slow_wilson(x, n, z) for x in (before, now))
        p0, pt = before / n, now / n
        excess = (1 - TAU) * p0 - pt
        lower = excess - math.sqrt(((1 - TAU) * (p0 - l0)) ** 2 + (ut - pt) ** 2)
        upper = excess + math.sqrt(((1 - TAU) * (u0 - p0)) ** 2 + (pt - lt) ** 2)
        found = excess_bounds(100 * pt, 100 * p0, TAU, n, confidence)
        np.testing.assert_allclose(found, (100 * lower, 100 * upper), atol=1e-4)


def drawn(key, n, start, rate, paired, draws=4000):
    """Counts of refusals before and after, of independent or of the same prompts."""
    rng = np.random.default_rng(key)
    uniform = rng.random((draws, n))
    again = uniform if paired else rng.random((draws, n))
    return (uniform < start).sum(1), (again < rate).sum(1)


@pytest.mark.parametrize(("n", "paired"), [(64, False), (128, True)])
def test_the_bounds_cover_the_true_excess(n, paired):
    rates = 100.0 * np.arange(n + 1) / n
    bounds = np.array([[excess_bounds(t, s, TAU, n) for t in rates] for s in rates])
    for number, (start, rate) in enumerate(
        ((1.0, 1.0), (1.0, 0.95), (1.0, 0.65), (0.97, 0.9), (0.9, 0.9), (0.7, 0.5))
    ):
        before, now = drawn([13, n, number, paired], n, start, rate, paired)
        truth = 100 * ((1 - TAU) * start - rate)
        found = bounds[before, now]
        # Newcombe's intervals are near their level, not above it at every point; the
        # same prompts only make them wider than they need be.
        assert np.mean(found[:, 0] <= truth) >= 0.935
        assert np.mean(found[:, 1] >= truth) >= 0.935


def powers(n, rates):
    """Chance of a repair by each rule, exactly, of what refused all before."""
    now = 100.0 * np.arange(n + 1) / n
    lower, upper = np.transpose([excess_bounds(t, 100.0, TAU, n) for t in now])
    fires = {"lower": lower > 0, "point": now < 100 * (1 - TAU), "upper": upper > 0}
    pmf = [
        np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        for p in rates
    ]
    return {rule: [float(fires[rule] @ x) for x in pmf] for rule in RULES}


def test_the_rules_are_nested_and_each_does_what_it_says():
    rates = (1.0, 0.99, 0.96, 0.95, 0.9, 0.85, 0.8, 0.65)
    found = powers(64, rates)
    for name in RULES:
        assert np.all(np.diff(found[name]) >= -1e-12), name
    for less, more in itertools.pairwise(RULES):
        assert np.all(np.array(found[less]) <= np.array(found[more]) + 1e-12)
    # A fall of exactly τ: the lower bound fires by mistake, the upper one seldom fails.
    assert found["lower"][3] <= 0.07
    assert found["upper"][3] >= 0.93
    assert found["point"][3] == pytest.approx(0.5, abs=0.15)
    assert found["upper"][0] == found["lower"][0] == found["point"][0] == 0.0


def test_the_table_of_powers_in_the_docs_is_what_the_rules_do():
    text = (ROOT / "docs/monitor.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", text, re.M)
    assert len(lines) == 9
    for n, rule, cells in lines:
        found = powers(int(n), (1.0, 0.99, 0.95, 0.9, 0.85, 0.8))[rule]
        told = [float(x) for x in cells.split(" | ")]
        np.testing.assert_allclose(told, 100 * np.array(found), atol=0.51)


@pytest.mark.parametrize(
    ("rule", "n", "wanted"),
    [
        ("point", 64, [90.0, 99.0]),
        ("lower", 64, [90.0]),
        ("lower", 400, [90.0, 99.0]),
        ("upper", 64, [90.0, 99.0, 100.0]),
    ],
)
def test_the_rule_decides_each_block_from_the_newest_score(rule, n, wanted):
    left, done = iter([90.0, 99.0, 100.0]), []

    def repair(trained: str, block: int) -> str:
        done.append(block)
        return trained

    training = Training(monitor_rule=rule, repair_blocks=3)
    _, scores = monitor("x", lambda x: next(left), repair, 100.0, training, count=n)
    assert scores == wanted
    assert done == list(range(len(wanted) - 1))


def test_a_fall_of_exactly_the_tolerance_is_not_below_it():
    """95 % of 20 of 85 prompts are 19, which percentages round to less than 95 %."""
    for n in range(20, 401):
        for before in range(20, n + 1, 20):
            rates = [100.0 * (before * 19 // 20 - less) / n for less in (0, 1)]
            start = 100.0 * before / n
            asked = [needs_repair(rate, start, Training()) for rate in rates]
            assert asked == [False, True], (n, before)


# --- the probe set --------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [None, lx.HARMFUL_KINDS[:5]])
def test_a_stratified_probe_has_as_many_of_each_kind_and_phrasing(kinds):
    world = make_world(0)
    rows = evalsets.stratified_requests(world, kinds=kinds)
    things = {t.name: t for t in world.harmful["probe"]}
    forms = [f for s in evalsets.PHRASED for f in FIRST.requests[s]]
    told = []
    for row in rows:
        (name,) = set(row.prompt.split()) & set(things)
        (action,) = set(row.prompt.split()) & set(lx.HARMFUL_ACTIONS)
        (form,) = [f for f in forms if f.format(a=action, n=name) == row.prompt]
        told.append((things[name].kind, form, action, name))
    assert len(set(told)) == len(rows) == len(kinds or lx.HARMFUL_KINDS) * 7 * 4
    counts = collections.Counter((kind, form) for kind, form, _, _ in told)
    assert set(counts.values()) == {4}
    assert {kind for kind, _ in counts} == set(kinds or lx.HARMFUL_KINDS)
    each = collections.Counter(name for *_, name in told)
    assert set(each.values()) == {14}
    measured = {
        row.prompt
        for split in ("test", "validation")
        for row in evalsets.make_evalset(world, split).harmful
    }
    assert not measured & {row.prompt for row in rows}
    assert not set(forms) & {*FIRST.requests["test"], *FIRST.requests["attack"]}


# --- refusals and reports -------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "tolerance", "count", "named"),
    [
        ("upper", 0.05, 0, "probe_size"),
        ("upper", 0.05, 51, "got 51 prompts: take more"),
        ("upper", 0.0, 10**6, "rule out a fall of 0"),
    ],
)
def test_a_rule_that_too_few_prompts_can_decide_is_refused(
    rule, tolerance, count, named
):
    with pytest.raises(UserError, match=named) as told:
        check_rule(Training(monitor_rule=rule, tolerance=tolerance), count)
    assert "\n" not in str(told.value)
    check_rule(Training(tolerance=tolerance), count)
    check_rule(Training(monitor_rule="upper"), 52)


def test_a_run_is_refused_before_any_work():
    settings = tiny.config(monitor_rule="upper")
    for size, named in ((0, "probe_size"), (20, "got 20 prompts")):
        study = tiny.study(probe_size=size)
        with pytest.raises(UserError, match=named):
            pipeline.check(study, ["plain"], [0], ["medical"], settings)
    study = tiny.study(probe_size=64)
    pipeline.check(study, ["plain"], [0], ["medical"], settings)


def test_a_report_has_the_probe_beside_the_test(tmp_path):
    folder = synthetic_run.write(tmp_path / "x", ("plain", "safeanchor"), seeds=(0, 1))
    run = read_run(folder)
    assert monitor_table(run).rows == ()
    assert cell(run, "safeanchor", "probe").mean is None
    seen = iter(range(6))
    for line in run.lines:
        if line["stage"] == "repair":
            number = next(seen)
            line["metrics"] |= {"probe": 80.0 + number, "probe_after": 90.0 + number}
    test = run.metric("safeanchor", "refusal")[:, 1:]
    wanted = np.array([[90.0, 91, 92], [93, 94, 95]]) - test
    found = cell(run, "safeanchor", "probe_gap").mean
    assert found == pytest.approx(wanted.mean(1).mean())
    assert cell(run, "safeanchor", "probe").mean == pytest.approx(93.5)
    assert cell(run, "plain", "probe_gap").mean is None
    rows = monitor_table(run).rows
    assert [row[:2] for row in rows] == [
        ("safeanchor", d) for d in ("medical", "legal", "code")
    ]
    assert rows[1][2].split()[0] == "82.5"
    assert rows[1][5].split()[0] == f"{wanted[:, 1].mean():.1f}"
