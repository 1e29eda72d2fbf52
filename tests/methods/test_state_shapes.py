"""The first state of a method told from shapes, against the one that is computed."""

import jax
import pytest
from methods_case import SETTINGS, STUDY, program, without_diagnostics
from tiers import few

from sbr_jax.methods import METHODS
from sbr_jax.training.program import init_adapter

MORE = ["safeanchor-exact:keep-base", "safeanchor-exact:random"]


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("row", few([*METHODS, *MORE], ["plain", "unified"]))
def test_shapes_are_those_of_the_state_that_is_computed(row):
    found = program(row)
    method, problem, base = found.method, found.problem, STUDY.model.params
    adapter = init_adapter(STUDY, SETTINGS, 0)
    told = method.state_shapes(problem, *jax.eval_shape(lambda *x: x, base, adapter))
    leaves = jax.tree.leaves(told)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    state = method.init(problem, base, adapter, jax.random.key(0))
    assert kinds(told) == kinds(without_diagnostics(state))
