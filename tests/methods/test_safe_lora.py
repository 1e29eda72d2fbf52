"""Safe LoRA against dense definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import vector
from weight_space_case import (
    BASE,
    FRESH,
    KEY,
    MODEL,
    PROBLEM,
    STUDY,
    TUNED,
    dense_c,
    layers_of,
    paper_update,
)

from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.typing import UserError


def dense_cosine(name, layer, adapter=TUNED):
    update = paper_update(name, layer, adapter)
    turned = dense_c(name, layer) @ update
    return np.sum(turned * update) / np.linalg.norm(turned) / np.linalg.norm(update)


def edited(method, adapter=TUNED, problem=PROBLEM):
    new, state = method.end_domain(problem, BASE, adapter, {"kept": 1}, KEY)
    assert state["kept"] == 1
    return new, state["diagnostics"]


def test_safe_lora_projects_exactly_the_pairs_below_the_threshold():
    cosines = {place: dense_cosine(*place) for place in layers_of(TUNED)}
    middle = float(np.median(list(cosines.values())))
    new, diagnostics = edited(safe_lora(threshold=middle))
    assert diagnostics["projected"] == sum(c <= middle for c in cosines.values()) == 4
    for (name, layer), cosine in cosines.items():
        ours = diagnostics["cosine"][name][layer]
        np.testing.assert_allclose(ours, cosine, rtol=1e-4)
        lora_b = new[name].lora_b[layer]
        if cosine <= middle:
            wanted = dense_c(name, layer) @ paper_update(name, layer)
            product = paper_update(name, layer, new)
            np.testing.assert_allclose(product, wanted, rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_array_equal(lora_b, TUNED[name].lora_b[layer])
        np.testing.assert_array_equal(new[name].lora_a, TUNED[name].lora_a)


def test_safe_lora_by_number_takes_the_smallest_cosines():
    count = 3
    new, diagnostics = edited(safe_lora(layers=count, threshold=None))
    order = sorted(layers_of(TUNED), key=lambda place: dense_cosine(*place))
    changed = {
        (name, layer)
        for name, layer in layers_of(TUNED)
        if np.any(new[name].lora_b[layer] != TUNED[name].lora_b[layer])
    }
    assert changed == set(order[:count])
    assert diagnostics["projected"] == count


def test_safe_lora_leaves_an_aligned_update_alone():
    # C = 5/‖V‖ · I over the outputs: every update has cosine 1 whatever its length.
    width = MODEL.config.width
    shift = jnp.broadcast_to(2.0 * jnp.eye(width), (MODEL.config.layers, width, width))
    moved = {k: v - shift for k, v in BASE["layers"].items() if k in TUNED}
    problem = dataclasses.replace(PROBLEM, unaligned={"layers": moved})
    same, diagnostics = edited(safe_lora(threshold=0.999), problem=problem)
    assert same is TUNED
    assert diagnostics["projected"] == 0
    np.testing.assert_allclose(vector(diagnostics["cosine"]), 1.0, rtol=1e-5)
    # Negative control: with τ = 1 the same pairs are multiplied by C.
    assert edited(safe_lora(threshold=1.0), problem=problem)[1]["projected"] > 0


def test_safe_lora_with_no_update_or_an_orthogonal_one():
    same, diagnostics = edited(safe_lora(), FRESH)
    assert same is FRESH
    np.testing.assert_array_equal(vector(diagnostics["cosine"]), 1.0)
    # V reaches two outputs only; B lies in the others: C B = 0, so B goes to zero.
    layers = dict(STUDY.unaligned["layers"])
    for name in TUNED:
        layers[name] = BASE["layers"][name].at[:, :, :2].add(1.0)
    problem = dataclasses.replace(PROBLEM, unaligned={"layers": layers})
    adapter = {
        name: dataclasses.replace(pair, lora_b=pair.lora_b.at[:, :, :2].set(0))
        for name, pair in TUNED.items()
    }
    new, diagnostics = edited(safe_lora(), adapter, problem)
    np.testing.assert_array_equal(vector(diagnostics["cosine"]), 0.0)
    assert not any(np.any(pair.lora_b) for pair in new.values())


def test_safe_lora_cosine_survives_tiny_updates():
    # Squares of 1e-14 leave float32's range when two of them are multiplied.
    small = jax.tree.map(lambda x: x * 1e-7, TUNED)
    np.testing.assert_allclose(
        vector(edited(safe_lora(), small)[1]["cosine"]),
        vector(edited(safe_lora())[1]["cosine"]),
        rtol=1e-4,
    )


def test_safe_lora_refuses_more_pairs_than_there_are():
    with pytest.raises(UserError, match="layers: expected at most the 8 "):
        safe_lora(layers=9).init(PROBLEM, BASE, FRESH, KEY)
