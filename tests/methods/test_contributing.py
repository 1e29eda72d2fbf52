"""The example of CONTRIBUTING.md: what the page says of it, beside `test_methods`."""

import numpy as np
import pytest
from methods_case import (
    CONTRIBUTED,
    contributed,
    learn,
    learned,
    registered,
)
from trees import vector

from sbr_jax.methods import Method, build
from sbr_jax.typing import UserError

pytestmark = pytest.mark.usefixtures(registered.__name__)


def test_the_block_makes_a_method_of_the_name_that_it_is_registered_under():
    method = build(CONTRIBUTED)
    assert isinstance(method, Method)
    assert contributed().noise().name == method.name == CONTRIBUTED
    assert "scale" in contributed().noise.__doc__


def test_its_hyper_parameter_decides_how_much():
    # A fresh A has no gradient of its own, and Adam makes a whole step of any noise
    # above its ε of 1e-8: this scale is well below.
    plain = vector(learned("plain")[0])
    faint = vector(learn(CONTRIBUTED, scale=1e-11)[0]) - plain
    loud = vector(learned(CONTRIBUTED)[0]) - plain
    assert np.linalg.norm(faint) < 0.1 * np.linalg.norm(loud)


def test_a_wrong_hyper_parameter_is_refused_by_name():
    for options, named in (
        ({"scale": -1.0}, "noise.scale to be a finite number above 0"),
        ({"scal": 0.1}, "unknown option of noise 'scal'; nearest: scale"),
    ):
        with pytest.raises(UserError, match=named):
            build(CONTRIBUTED, **options)
