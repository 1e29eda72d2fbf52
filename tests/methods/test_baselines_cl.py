"""What EWC, O-LoRA and SafeGrad have in common: mistakes, and their examples."""

import pytest

from sbr_jax.methods.ewc import ewc
from sbr_jax.methods.o_lora import o_lora
from sbr_jax.methods.safegrad import safegrad
from sbr_jax.typing import UserError


@pytest.mark.parametrize(
    ("maker", "options", "named"),
    [
        (ewc, {"penalty": -1.0}, "penalty"),
        (ewc, {"data": "benign"}, "data"),
        (ewc, {"keep": "first"}, "keep: expected one of last, all;"),
        (ewc, {"reduction": "max"}, "reduction"),
        (ewc, {"fisher_examples": 0}, "fisher_examples"),
        (o_lora, {"orthogonality": float("nan")}, "orthogonality"),
        (o_lora, {"l2": -0.1}, "l2"),
        (o_lora, {"max_domains": 0}, "max_domains"),
        (safegrad, {"weight": -1.0}, "weight"),
        (safegrad, {"temperature": 0.0}, "temperature"),
        (safegrad, {"anchor_batch_size": 0}, "anchor_batch_size"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(maker, options, named):
    with pytest.raises(UserError, match=named):
        maker(**options)


def test_examples_in_the_modules_are_few_and_run():
    import doctest
    import importlib

    for name in ("ewc", "o_lora", "safegrad"):
        module = importlib.import_module(f"sbr_jax.methods.{name}")
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0
