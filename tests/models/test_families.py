"""Every family against numbers that PyTorch wrote down.

``tests/golden`` holds, for a tiny model of each family, its ``config.json`` as
transformers wrote it, and what PyTorch made of seeded weights; ``make parity`` compares
with PyTorch itself.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import adapter
from families_case import FILE, NAMES, ROLLED, SMALL, golden, loaded, write
from parity.make_checkpoints import GOLDEN, SHOWN
from safetensors.numpy import load_file

from sbr_jax import models
from sbr_jax.models import hf_config, layers
from sbr_jax.models.config import RopeScaling
from sbr_jax.models.parameters import base_shapes, is_shape
from sbr_jax.models.parts import embed_tokens
from sbr_jax.training.sharding import make_mesh
from sbr_jax.typing import UserError


def logits_of(config, base, ids, pairs=None):
    with jax.default_matmul_precision("highest"):
        apply_fn = jax.jit(models.make_apply_fn(config, ROLLED))
        return np.asarray(apply_fn(base, pairs, np.asarray([ids], np.int32))[0])


@functools.cache
def own_logits(name):
    model = loaded(name)
    return logits_of(model.config, model.params, golden(name)["prompts"][0])


def test_every_case_has_its_golden_file():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)
    families = {golden(name)["config"]["model_type"] for name in NAMES}
    assert families == set(hf_config.FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_pytorch(name):
    wanted = np.asarray(golden(name)["logits"])
    # Of size 10 at most: two orders of summation in float32 stay below 2e-5.
    assert 1.0 < np.abs(wanted).max() < 12.0
    np.testing.assert_allclose(own_logits(name)[:, :SHOWN], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3", "llama2", "smollm3"])
def test_greedy_text_is_that_of_pytorch_in_one_padded_batch(name):
    model, wanted = loaded(name), golden(name)
    assert len({len(row) for row in wanted["prompts"]}) == 3
    found = models.generate(
        model, model.params, None, wanted["prompts"], max_new_tokens=24
    )
    assert found == wanted["greedy"]


# Each of these reads the same tensors and must be seen in the logits.
WRONG = [
    ("llama3", {"rope_scaling": None}),
    ("llama-linear", {"rope_scaling": None}),
    ("phi3", {"rope_scaling": None}),
    ("qwen2-yarn", {"rope_scaling": None}),
    ("mistral", {"window": None, "sliding": ()}),
    ("mistral", {"window": 5}),
    ("gemma", {"activation": "silu"}),
    ("gemma", {"unit_offset": False}),
    ("gemma", {"scaled_embedding": False}),
    ("gemma2", {"attention_cap": None}),
    ("gemma2", {"logit_cap": None}),
    ("gemma2", {"query_scalar": None}),
    ("gemma2", {"sliding": (False, True) * 2}),
    ("gemma2", {"post_norms": False}),
    ("qwen2", {"qkv_bias": False}),
    ("qwen3", {"qk_norm": False}),
    ("olmo2", {"qk_norm": False, "qk_norm_whole": False}),
    ("gemma3", {"local_rope_theta": None}),
    ("smollm3", {"rope_layers": ()}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": None}),
    ("granite", {"logit_divisor": 1.0}),
]


@pytest.mark.thorough  # Of the written numbers, which seldom change.
@pytest.mark.parametrize(("name", "change"), WRONG, ids=str)
def test_every_trait_shows_in_the_logits(name, change):
    model = loaded(name)
    config = dataclasses.replace(model.config, **change)
    keep = base_shapes(config)["layers"]
    base = {**model.params, "layers": {k: model.params["layers"][k] for k in keep}}
    wrong = logits_of(config, base, golden(name)["prompts"][0])
    assert np.abs(wrong - own_logits(name)).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_settings_and_bits(name, tmp_path):
    model = loaded(name)
    models.save(tmp_path, model)
    again = models.load(tmp_path, hardware=ROLLED)
    assert again.config == model.config
    assert again.apply_fn is model.apply_fn
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    found = golden(name)
    assert {k: list(v.shape) for k, v in load_file(tmp_path / FILE).items()} == found[
        "tensors"
    ]
    # What we write means to transformers what it wrote itself.
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("model_type", "head_dim", "sliding_window", "layer_types"):
        assert raw.get(key) == found["config"].get(key, raw.get(key)), key


@pytest.mark.parametrize("name", ["gemma2", "smollm3"])
def test_a_cached_beginning_gives_the_same_logits(name):
    model, ids = loaded(name), golden(name)["prompts"][0]
    extend = jax.jit(models.make_extend_fn(model.config, ROLLED))
    rows = np.asarray([ids, [*ids[:9], *ids[:11]]], np.int32)
    with jax.default_matmul_precision("highest"):
        apply_fn = jax.jit(model.apply_fn)
        whole = apply_fn(model.params, None, rows)
        # The second beginning fills only 9 of its 12 slots.
        _, past = extend(model.params, None, rows[:, :12])
        ends = np.stack([rows[0, 12:], rows[1, 9:17]])
        found, _ = extend(model.params, None, ends, past, np.array([12, 9], np.int32))
    np.testing.assert_allclose(found[0], whole[0, 12:], atol=2e-5)
    np.testing.assert_allclose(found[1], whole[1, 9:17], atol=2e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_window_of_three_sees_three_tokens(cap):
    config = dataclasses.replace(SMALL, window=3, attention_cap=cap)
    base = models.init_params(jax.random.key(0), config)
    ids = np.arange(3, 11)
    before = logits_of(config, base, ids)
    for place, felt in ((4, False), (5, True), (6, True)):
        other = ids.copy()
        other[place] = 20
        change = np.abs(logits_of(config, base, other)[7] - before[7]).max()
        assert (change > 1e-3) == felt, place


def test_attention_equals_a_loop():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 7, n, 4)).astype(np.float32) for n in (4, 2, 2))
    scale, cap, window = 0.9, 1.5, 3
    wanted = np.zeros((2, 7, 4, 4))
    for b, t, h in np.ndindex(2, 7, 4):
        near = slice(max(0, t - window + 1), t + 1)
        score = cap * np.tanh(scale * (k[b, near, h // 2] @ q[b, t, h]) / cap)
        share = np.exp(score) / np.exp(score).sum()
        wanted[b, t, h] = share @ v[b, near, h // 2]

    @jax.jit
    def run(q, k, v):
        place = jnp.arange(7)[None]
        mask = layers.sees(place, place, window)
        near = functools.partial(layers.attend, q, k, v, window=window, scale=scale)
        masked = layers.attend(q, k, v, mask, scale=scale, cap=cap)
        return near(cap=cap), masked, near(), near(cap=1e4)

    with jax.default_matmul_precision("highest"):
        found, masked, plain, loose = run(q, k, v)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(masked, found, atol=1e-6)
    # A cap far above every score is none: the kernel and the products agree.
    np.testing.assert_allclose(plain, loose, atol=2e-6)
    assert np.abs(plain - found).max() > 1e-2


def test_llama3_frequencies_follow_their_definition():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    found = layers.rope_frequencies(16, 500.0, scaling)
    kinds = set()
    for i, value in enumerate(found):
        f = 500.0 ** (-2 * i / 16)
        turns = 32 * f / (2 * math.pi)
        if turns > 4:
            kinds.add("kept")
            wanted = f
        elif turns < 1:
            kinds.add("divided")
            wanted = f / 8
        else:
            kinds.add("blended")
            share = (turns - 1) / 3
            wanted = share * f + (1 - share) * f / 8
        assert float(value) == pytest.approx(wanted, rel=2e-6)
    assert len(kinds) == 3


def test_yarn_blends_between_two_indices():
    """H = 16, base 500, 32 tokens before: indices 0 and 3 turn 3 and 0.5 times."""
    scaling = RopeScaling("yarn", 4.0, 0.5, 3.0, 32, attention=1.25)
    found = layers.rope_frequencies(16, 500.0, scaling)

    def turns(i):
        return 32 * 500.0 ** (-2 * i / 16) / (2 * math.pi)

    # The ends are rounded outwards.
    first = max(i for i in range(8) if turns(i) >= 3.0)
    last = min(i for i in range(8) if turns(i) <= 0.5)
    assert (first, last) == (0, 3)
    for i, value in enumerate(found):
        f = 500.0 ** (-2 * i / 16)
        share = min(max((last - i) / (last - first), 0.0), 1.0)
        assert float(value) == pytest.approx(share * f + (1 - share) * f / 4, rel=2e-6)
    cos, sin = layers.rope_table(jnp.array([[0, 7]]), 16, 500.0, scaling)
    # Cosines and sines of a stretched table lie on a circle of that radius.
    np.testing.assert_allclose(np.hypot(cos, sin), 1.25, rtol=1e-6)


def test_longrope_divides_each_frequency_and_ends_with_the_short_context():
    model = loaded("phi3")
    scaling, limit = model.config.rope_scaling, model.config.context
    found = layers.rope_frequencies(8, 500.0, scaling)
    wanted = [500.0 ** (-2 * i / 8) / x for i, x in enumerate((1, 1.25, 1.5, 2.5))]
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert limit == scaling.original == 64
    long = np.zeros((1, limit + 1), np.int32)
    with pytest.raises(UserError, match="at most 64 tokens"):
        jax.eval_shape(model.apply_fn, model.params, None, long)
    with pytest.raises(UserError, match="context of 64"):
        models.generate(model, model.params, None, [[1] * 60], max_new_tokens=5)


def test_adapters_merge_and_train_in_every_projection():
    model, ids = loaded("gemma2"), golden("gemma2")["prompts"][0]
    pairs = adapter(model.config)
    found = logits_of(model.config, model.params, ids, pairs)
    merged = models.merge_adapter(model.params, pairs)
    np.testing.assert_allclose(
        logits_of(model.config, merged, ids), found, rtol=0, atol=1e-4
    )

    remat = models.make_apply_fn(model.config, models.Hardware(remat=True, unroll=1))
    rows = np.asarray([ids, ids[::-1]], np.int32)

    def loss_fn(pairs, row, base):
        return jnp.mean(jnp.square(remat(base, pairs, row[None])))

    with jax.default_matmul_precision("highest"):
        each = jax.vmap(jax.grad(loss_fn), (None, 0, None))
        grads = jax.jit(each)(pairs, rows, model.params)
    # Central differences of step h along a direction d: g · d up to h² and 1e-7 / h.
    step, rng = 3e-3, np.random.default_rng(0)
    aside = [
        rng.normal(size=x.shape).astype(np.float32) for x in jax.tree.leaves(pairs)
    ]
    for row, ids in enumerate(rows.tolist()):
        ends = []
        for h in (step, -step):
            leaves = [
                x + h * d for x, d in zip(jax.tree.leaves(pairs), aside, strict=True)
            ]
            moved = jax.tree.unflatten(jax.tree.structure(pairs), leaves)
            logits = logits_of(model.config, model.params, ids, moved)
            ends.append(np.mean(np.square(logits.astype(np.float64))))
        slope = sum(
            float(np.vdot(g[row], d))
            for g, d in zip(jax.tree.leaves(grads), aside, strict=True)
        )
        assert abs(slope) > 0.1
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_embeddings_given_as_rows_are_scaled_like_the_tokens_own():
    model, ids = loaded("gemma2"), np.asarray([golden("gemma2")["prompts"][0]])
    rows = model.params["embed"][ids]
    apply_fn = jax.jit(model.apply_fn)
    np.testing.assert_array_equal(
        apply_fn(model.params, None, ids, embeddings=rows),
        apply_fn(model.params, None, ids),
    )


def test_the_scale_of_gemma_is_rounded_before_it_multiplies():
    config = dataclasses.replace(SMALL, width=24, scaled_embedding=True, head_dim=8)
    embed = np.linspace(0.1, 3, 96).reshape(4, 24).astype(jnp.bfloat16)
    found = embed_tokens(config, {"embed": jnp.asarray(embed)}, jnp.array([[3]]))
    root = jnp.bfloat16(math.sqrt(24))
    assert float(root) != pytest.approx(math.sqrt(24), rel=1e-4)
    np.testing.assert_array_equal(found[0, 0], embed[3] * root)


def test_half_precision_stays_near(tmp_path):
    name = "gemma2"
    half = models.load(write(tmp_path, name), dtype=jnp.bfloat16)
    found = logits_of(half.config, half.params, golden(name)["prompts"][0])
    error = np.sqrt(np.mean(np.square(found - own_logits(name))))
    # Eight bits of a mantissa through four layers: a few per cent of the spread.
    assert error < 0.08 * np.std(own_logits(name))


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_a_mesh_reads_every_tensor(name, tmp_path):
    mesh = make_mesh("fsdp=4,tp=2")
    spread = models.load(write(tmp_path, name), mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, spread, loaded(name).params)
    if name == "qwen2":
        bias = spread["layers"]["k_proj_bias"]
        assert bias.addressable_shards[0].data.shape == (4, 8)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_new_weights_have_the_shapes_and_neutral_norms(name):
    config = loaded(name).config
    base = models.init_params(jax.random.key(0), config)
    wanted = jax.tree.leaves(base_shapes(config), is_leaf=is_shape)
    assert [x.shape for x in jax.tree.leaves(base)] == wanted
    neutral = 0.0 if config.unit_offset else 1.0
    for key, value in base["layers"].items():
        if key.endswith(("norm", "bias")):
            expected = neutral if key.endswith("norm") else 0.0
            assert np.all(np.asarray(value) == expected), key
