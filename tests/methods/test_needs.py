"""What a variant says it reads of a study is what its hooks read."""

import dataclasses

import jax
import pytest
from methods_case import SETTINGS, STUDY, program

from sbr_jax.methods import METHODS, Hyperparameters, build
from sbr_jax.methods.base import as_trained
from sbr_jax.methods.needs import fits_adapter
from sbr_jax.methods.needs import needs as needs_of
from sbr_jax.training.program import init_adapter
from sbr_jax.typing import UserError

DECLARED = {"calibration", "safety_mix", "harmful", "unaligned", "judge"}


class Asked(Exception):
    """A part was read; nothing after it is of interest."""


class Watched:
    """A problem that notes which of its parts are read, and gives none."""

    def __init__(self, problem):
        self.problem, self.read = problem, set()

    def __getattr__(self, name):
        if name in DECLARED:
            self.read.add(name)
            raise Asked(name)
        return getattr(self.problem, name)


@pytest.mark.parametrize("row", METHODS)
def test_parts_that_are_read_are_declared_and_others_are_not(row):
    made = program(row)
    watched = Watched(made.problem)
    adapter, key = init_adapter(STUDY, SETTINGS, 0), jax.random.key(0)
    method, base = made.method, STUDY.model.params
    train = STUDY.domains["medical"].train
    hooks = (
        lambda: method.prepare(watched, base, adapter, key),
        lambda: method.mix(watched, train, 0),
        lambda: method.init(watched, base, adapter, key),
        lambda: method.deploy(watched, base, adapter, {}),
        lambda: method.end_domain(watched, base, adapter, {}, key),
    )
    for hook in hooks:
        try:
            hook()
        except (Asked, UserError, KeyError):  # It has no state that `init` made.
            continue
    declared = {"harmful" if p == "harmful_answers" else p for p in needs_of(row)}
    declared -= {"benign"}
    assert watched.read <= declared
    assert bool(watched.read) == bool(declared)


def test_what_deploys_other_base_weights_is_no_adapter():
    others = {row for row in METHODS if not fits_adapter(row)}
    assert others == {"lox", "vaccine", "booster", "antidote", "safe-delta"}
    # These deploy another adapter on the same base; whoever joins them says which.
    deploying = {row for row in METHODS if build(row).deploy is not as_trained}
    assert deploying - others == {"salora", "o-lora"}
    settings = Hyperparameters()
    factors = dataclasses.replace(settings.antidote, weights="adapter")
    assert fits_adapter("antidote", dataclasses.replace(settings, antidote=factors))


def test_options_change_what_is_read():
    settings = Hyperparameters()
    found = {
        row: needs_of(row, settings)
        for row in ("unified", "unified:no-risk", "unified:judge")
    }
    assert found["unified"] - found["unified:no-risk"] == {"benign"}
    assert found["unified:judge"] - found["unified"] == {"judge"}
    assert "benign" in needs_of("safeanchor-exact:benign")
    assert needs_of("lean:benign") == {"benign"}
    assert needs_of("safeanchor-exact:csm-only") == frozenset()
