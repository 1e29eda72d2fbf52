"""Mistakes in hyper-parameters: one table for all methods."""

import ast
import dataclasses

import pytest

from sbr_jax.methods import METHODS, Hyperparameters, build
from sbr_jax.methods._hyperparameters import attribute
from sbr_jax.typing import UserError

BEYOND = """
safeanchor       strictness -1.0; energy 0.0 1.5; max_rank 0; projection 'grad'
safeanchor-exact weighting 'x'; fisher 'x'; basis 'x'; refresh_every 0; kl_weight -1.0
safeanchor-exact calibration_tokens 0; contrast 0.0; selectivity 1; relax 1
unified          anchors -1; risk 'guess'
der              logit_weight -1.0; reduction 'max'; buffer_batch_size 0
lean             safe_rows 0; kl_weight -1.0; top_tokens 0; epsilon 0.0; kl_budget 0.0
lean             refresh_every 0; refresh_subspace 1; self_answers -0.1 1.5
lazy             kl_weight -1.0; kl_batch_size 0; refresh_every 0; top_tokens 0
lazy             self_answers 2.0
sbr              anchors 0; anchor_weight -1.0; reduction 'max'
adaptive-judge   granularity 'token'
adaptive-probe   mapping 'cubic'; probe_l2 -1.0; probe_layers ('last',)
interleaving     fraction -0.1 1.0
ewc              penalty -1.0; data 'benign'; keep 'first'; reduction 'max'
ewc              fisher_examples 0
o-lora           l2 -0.1; max_domains 0
safegrad         kl_weight -1.0; temperature 0.0; kl_batch_size 0
safe-delta       strength -0.1; examples 0
safe-lora        threshold 1.5 None; layers 0
asft             penalty 0.0 1e999
lox              strength -1.0; rank -1
antidote         fraction 0.0 1.0; examples 0; weights 'both'
salora           safety_rank 0; examples 0
vaccine          radius -1.0; steps 0; batch_size 0; learning_rate 0.0
vaccine          weight_decay -0.1
booster          regulariser -1.0; inner_rate -0.1; steps -3
lisa             proximal -1.0; alignment_share 0.0 1.0; warmup_share 1.5; period 1
"""
"""Values just outside of what an option may be."""


def beyond():
    for line in BEYOND.strip().splitlines():
        method, told = line.split(None, 1)
        for option in told.split("; "):
            name, *values = option.split()
            yield from ((method, name, ast.literal_eval(value)) for value in values)


def refused(method, options):
    said = set()
    for make in (METHODS[method], lambda **o: build(method, **o)):
        with pytest.raises(UserError) as caught:
            make(**options)
        assert "\n" not in str(caught.value)
        said.add(str(caught.value))
    return said


@pytest.mark.parametrize("method", METHODS)
def test_what_is_nothing_is_refused_for_every_option_by_its_name(method):
    options = dataclasses.fields(getattr(Hyperparameters(), attribute(method)))
    assert options
    for name in (option.name for option in options):
        for nothing in (float("nan"), {}):
            assert all(name in said for said in refused(method, {name: nothing}))


def test_a_value_beyond_its_range_is_refused_by_its_name():
    for method, name, value in beyond():
        said = refused(method, {name: value})
        assert all(name in text for text in said), (method, name, value)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("safeanchor", {"projection": "x"}, "'gradient', 'update', 'metric' or 'none'"),
        ("lean", {"epsilon": 0.0}, "lean.epsilon to be a finite number above 0"),
        ("lean", {"kl_budget": 0.1, "epsilon": 1e-3}, "expected epsilon or kl_budget"),
        ("lean", {"basis": "random"}, "basis='random', got neither"),
        ("lean", {"refresh_subspace": True}, "kl_budget beside refresh_subspace"),
        ("safeanchor", {"projection": "none", "basis": "random"}, "basis='random'"),
        ("safeanchor", {"projection": "none", "replay_bypass": True}, "replay_bypass"),
        ("adaptive-judge", {"beta_min": 0.6, "beta_max": 0.5}, "beta_min, beta_max"),
        ("ewc", {"keep": "first"}, "ewc.keep to be 'last' or 'all'"),
        ("lisa", {"alignment_share": 0.01}, "alignment_share: expected 1 to 9 of the"),
        ("lisa", {"alignment_share": 0.99}, "which is 10; lengthen period"),
    ],
)
def test_a_refusal_says_what_is_possible(method, options, said):
    assert all(said in text for text in refused(method, options))


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("safeancor", {}, "nearest: safeanchor"),
        ("plain", {"max_rank": 3}, "unknown option of plain 'max_rank'"),
        ("safeanchor-exact", {"strictnes": 1.0}, "nearest: strictness"),
    ],
)
def test_unknown_names_list_the_nearest(variant, options, said):
    with pytest.raises(UserError, match=said):
        build(variant, **options)
