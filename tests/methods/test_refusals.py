"""Mistakes in hyper-parameters: one table for all methods."""

import pytest

from sbr_jax.methods import METHODS, build
from sbr_jax.typing import UserError

NAN = float("nan")
MISTAKES = [
    ("safeanchor", {"strictness": -1.0}, "strictness"),
    ("safeanchor", {"energy": 0.0}, "energy"),
    ("safeanchor", {"energy": 1.5}, "energy"),
    ("safeanchor", {"max_rank": 0}, "max_rank"),
    ("safeanchor", {"projection": "grad"}, "'gradient', 'update', 'metric' or 'none'"),
    ("safeanchor-exact", {"weighting": "x"}, "weighting"),
    ("safeanchor-exact", {"fisher": "x"}, "fisher"),
    ("safeanchor-exact", {"basis": "x"}, "basis"),
    ("safeanchor-exact", {"refresh_every": 0}, "refresh_every"),
    ("safeanchor-exact", {"kl_weight": NAN}, "kl_weight"),
    ("safeanchor-exact", {"relax": 1}, "relax to be True or False"),
    ("safeanchor-exact", {"calibration_tokens": 0}, "calibration_tokens"),
    ("safeanchor-exact", {"contrast": 0.0}, "contrast"),
    ("safeanchor-exact", {"contrast": NAN}, "contrast"),
    ("safeanchor-exact", {"selectivity": 1}, "selectivity to be True or False"),
    ("unified", {"anchors": -1}, "anchors"),
    ("unified", {"risk": "guess"}, "risk"),
    ("der", {"logit_weight": -1.0}, "logit_weight"),
    ("der", {"label_weight": NAN}, "label_weight"),
    ("der", {"reduction": "max"}, "reduction"),
    ("der", {"buffer_batch_size": 0}, "buffer_batch_size"),
    ("lean", {"safe_rows": 0}, "safe_rows"),
    ("lean", {"kl_weight": -1.0}, "kl_weight"),
    ("lean", {"top_tokens": 0}, "top_tokens"),
    ("lean", {"epsilon": 0.0}, "lean.epsilon to be a finite number above 0"),
    ("lean", {"epsilon": -1e-3}, "epsilon"),
    ("lean", {"epsilon": NAN}, "epsilon"),
    ("lean", {"kl_budget": 0.0}, "lean.kl_budget to be a finite number above 0"),
    ("lean", {"kl_budget": -0.1}, "kl_budget"),
    ("lean", {"kl_budget": NAN}, "kl_budget"),
    ("lean", {"kl_budget": 0.1, "epsilon": 1e-3}, "expected epsilon or kl_budget"),
    ("lean", {"refresh_every": 0}, "refresh_every"),
    ("lean", {"refresh_subspace": 1}, "refresh_subspace to be True or False"),
    ("lean", {"self_answers": -0.1}, "self_answers"),
    ("lean", {"self_answers": 1.5}, "lean.self_answers to be a finite number in"),
    ("lean", {"self_answers": NAN}, "self_answers"),
    ("lazy", {"kl_weight": -1.0}, "kl_weight"),
    ("lazy", {"kl_batch_size": 0}, "kl_batch_size"),
    ("lazy", {"refresh_every": 0}, "refresh_every"),
    ("lazy", {"top_tokens": 0}, "top_tokens"),
    ("lazy", {"self_answers": 2.0}, "self_answers"),
    ("lean", {"basis": "random"}, "basis='random', got neither"),
    ("lean", {"refresh_subspace": True}, "kl_budget beside refresh_subspace"),
    ("safeanchor", {"projection": "none", "basis": "random"}, "basis='random'"),
    ("safeanchor", {"projection": "none", "replay_bypass": True}, "replay_bypass"),
    ("sbr", {"anchors": 0}, "anchors"),
    ("sbr", {"anchor_weight": -1.0}, "anchor_weight"),
    ("sbr", {"anchor_weight": NAN}, "anchor_weight"),
    ("sbr", {"reduction": "max"}, "reduction"),
    ("adaptive-judge", {"granularity": "token"}, "granularity"),
    ("adaptive-judge", {"beta_min": 0.6, "beta_max": 0.5}, "beta_min, beta_max"),
    ("adaptive-probe", {"mapping": "cubic"}, "mapping"),
    ("adaptive-probe", {"probe_l2": -1.0}, "probe_l2"),
    ("adaptive-probe", {"probe_layers": ("last",)}, "a tuple of whole numbers"),
    ("interleaving", {"fraction": -0.1}, "fraction"),
    ("interleaving", {"fraction": 1.0}, "fraction"),
    ("interleaving", {"fraction": NAN}, "fraction"),
    ("ewc", {"penalty": -1.0}, "penalty"),
    ("ewc", {"data": "benign"}, "data"),
    ("ewc", {"keep": "first"}, "ewc.keep to be 'last' or 'all'"),
    ("ewc", {"reduction": "max"}, "reduction"),
    ("ewc", {"fisher_examples": 0}, "fisher_examples"),
    ("o-lora", {"orthogonality": NAN}, "orthogonality"),
    ("o-lora", {"l2": -0.1}, "l2"),
    ("o-lora", {"max_domains": 0}, "max_domains"),
    ("safegrad", {"kl_weight": -1.0}, "kl_weight"),
    ("safegrad", {"temperature": 0.0}, "temperature"),
    ("safegrad", {"kl_batch_size": 0}, "kl_batch_size"),
    ("safe-delta", {"strength": -0.1}, "strength"),
    ("safe-delta", {"examples": 0}, "examples"),
    ("safe-lora", {"threshold": 1.5}, "threshold"),
    ("safe-lora", {"threshold": NAN}, "threshold"),
    ("safe-lora", {"threshold": None}, "threshold"),
    ("safe-lora", {"layers": 0}, "layers"),
    ("asft", {"penalty": 0.0}, "penalty"),
    ("asft", {"penalty": float("inf")}, "penalty"),
    ("lox", {"strength": -1.0}, "strength"),
    ("lox", {"rank": -1}, "rank"),
    ("antidote", {"fraction": 0.0}, "fraction"),
    ("antidote", {"fraction": 1.0}, "fraction"),
    ("antidote", {"examples": 0}, "examples"),
    ("antidote", {"weights": "both"}, "weights"),
    ("salora", {"safety_rank": 0}, "safety_rank"),
    ("salora", {"examples": 0}, "examples"),
    ("vaccine", {"radius": -1.0}, "radius"),
    ("vaccine", {"radius": NAN}, "radius"),
    ("vaccine", {"steps": 0}, "steps"),
    ("vaccine", {"batch_size": 0}, "batch_size"),
    ("vaccine", {"learning_rate": 0.0}, "learning_rate"),
    ("vaccine", {"weight_decay": -0.1}, "weight_decay"),
    ("booster", {"regulariser": -1.0}, "regulariser"),
    ("booster", {"inner_rate": -0.1}, "inner_rate"),
    ("booster", {"steps": -3}, "steps"),
    ("lisa", {"proximal": -1.0}, "proximal"),
    ("lisa", {"alignment_share": 0.0}, "alignment_share"),
    ("lisa", {"alignment_share": 1.0}, "alignment_share"),
    ("lisa", {"alignment_share": 0.01}, "alignment_share: expected 1 to 9 of the 10"),
    ("lisa", {"alignment_share": 0.99}, "which is 10; lengthen period"),
    ("lisa", {"warmup_share": 1.5}, "warmup_share"),
    ("lisa", {"period": 1}, "period"),
]


@pytest.mark.parametrize(("method", "options", "named"), MISTAKES)
def test_a_wrong_hyper_parameter_is_refused_by_name(method, options, named):
    for make in (METHODS[method], lambda **o: build(method, **o)):
        with pytest.raises(UserError) as caught:
            make(**options)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


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
