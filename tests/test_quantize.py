"""A quantised base: codes against a slow twin, and the same model through them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import CONFIG, adapter, params, tokens
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sbr_jax import fisher_subspace, losses, models
from sbr_jax.attacks.ablation import ablate_direction
from sbr_jax.methods.base import Problem
from sbr_jax.methods.lox import lox
from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.models import layers, weights
from sbr_jax.models.codes import KINDS, encode, nf4_levels
from sbr_jax.models.quantize import dequantize, quantize, require_dense, weight_bytes
from sbr_jax.typing import UserError

BLOCK = 8
"""Two blocks of a width of 16; the MLP's 20 inputs leave the third unfilled."""
LEVELS = np.asarray(nf4_levels())
# Appendix E of arXiv:2305.14314, which was computed from a rounded δ.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
BIASED = dataclasses.replace(
    CONFIG, tied=False, qkv_bias=True, qk_norm=True, head_dim=6, model_type="qwen2"
)
PAIRS, IDS = adapter(), tokens()


def weight(inputs=20, outputs=3, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), (inputs, outputs), dtype)


def mesh(fsdp=4, tp=2):
    devices = np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp)
    return Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.cache
def coded(kind):
    return quantize(params(), kind, block=BLOCK)


# --- codes ------------------------------------------------------------------------


def twin(matrix, kind, block):
    """Codes, scales and decoded weights, one block at a time in float64."""
    matrix = np.asarray(matrix.astype(jnp.float32), np.float64)
    inputs, outputs = matrix.shape
    size = inputs if kind == "int8" else block
    codes = np.zeros((-(-inputs // size) * size, outputs), int)
    scales = np.zeros((-(-inputs // size), outputs))
    for n, start in enumerate(range(0, inputs, size)):
        for out in range(outputs):
            values = matrix[start : start + size, out]
            largest = np.abs(values).max()
            scales[n, out] = largest / 127 if kind == "int8" else largest
            for i, value in enumerate(values):
                unit = value / largest if largest else 0.0
                near = np.abs(LEVELS - unit).argmin()
                codes[start + i, out] = np.round(127 * unit) if kind == "int8" else near
            if kind != "int8":
                codes[start + len(values) : start + size, out] = 7
    if kind == "nf4-double":
        centred = scales - scales.mean()
        for row in centred:
            for start in range(0, outputs, 256):
                group = row[start : start + 256]
                step = np.abs(group).max() / 127
                group[:] = np.round(group / step) * step
        scales = scales.mean() + centred
    units = codes if kind == "int8" else LEVELS[codes]
    return codes, scales, (units * np.repeat(scales, size, axis=0))[:inputs]


def unpack(codes):
    halves = np.stack([codes >> 4, codes & 15], axis=1)
    return halves.reshape(-1, codes.shape[-1])


def test_the_levels_are_the_published_ones():
    assert len(LEVELS) == 16
    assert LEVELS[7] == 0
    assert (np.diff(LEVELS) > 0).all()
    np.testing.assert_allclose(LEVELS, PUBLISHED, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "dtype"), [(3, "float32"), (300, "bfloat16")])
def test_codes_equal_the_slow_definition(kind, outputs, dtype):
    matrix = weight(outputs=outputs, dtype=jnp.dtype(dtype))
    found = encode(matrix, kind, BLOCK)
    codes, scales, dense = twin(matrix, kind, BLOCK)
    got = np.asarray(found.codes)
    np.testing.assert_array_equal(unpack(got) if kind != "int8" else got, codes)
    if kind != "nf4-double":
        np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    # A scale that lies between two of its codes may round either way.
    atol = 0.015 if kind == "nf4-double" else 2e-6
    np.testing.assert_allclose(found.dense(jnp.float32), dense, atol=atol, rtol=0)
    assert (found.shape, found.ndim, found.dtype) == (matrix.shape, 2, matrix.dtype)
    assert found.dense().dtype == matrix.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_bounded_and_the_bound_is_met(kind):
    matrix = np.asarray(weight(160, 300))
    found = encode(jnp.asarray(matrix), kind, BLOCK)
    error = np.abs(np.asarray(found.dense()) - matrix)
    if kind == "int8":
        largest = np.abs(matrix).max(0, keepdims=True)
        bound = largest / 254
    else:
        largest = np.abs(matrix.reshape(-1, BLOCK, 300)).max(1)
        largest = np.repeat(largest, BLOCK, axis=0)
        bound = np.diff(LEVELS).max() / 2 * largest
        assert np.isclose(np.diff(LEVELS).max() / 2, 0.152, atol=1e-3)
    if kind == "nf4-double":
        # A scale is off by at most half a step of its group.
        bound = bound + np.abs(largest - largest.mean()).max() / 254
    assert (error <= bound + 1e-6).all()
    assert (error / bound).max() > 0.9


def test_levels_survive_and_rounding_again_changes_nothing():
    matrix = jnp.asarray(np.tile(LEVELS, 2)[:, None] * [[4.0, 0.5]], jnp.float32)
    found = encode(matrix, "nf4", 16)
    np.testing.assert_array_equal(unpack(np.asarray(found.codes))[:16, 0], range(16))
    np.testing.assert_array_equal(found.dense(), matrix)
    same(encode(found.dense(), "nf4", 16), found)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    matrix = weight().at[8:16].set(0.0).at[:, 1].set(0.0)
    dense = np.asarray(encode(matrix, kind, BLOCK).dense())
    assert (dense[np.asarray(matrix) == 0] == 0).all()
    assert np.isfinite(dense).all()
    assert np.any(dense)


@pytest.mark.parametrize(
    ("kind", "per_weight"),
    [("nf4", 0.5 + 4 / 64), ("nf4-double", 0.516), ("int8", 1 + 4 / 256)],
)
def test_bytes_for_a_weight(kind, per_weight):
    found = encode(weight(256, 512, jnp.bfloat16), kind)
    # Four bytes of the mean, and four a group: 0.5 + (1 + 4 / 256) / 64 = 0.51587.
    assert found.nbytes == nbytes(found)
    np.testing.assert_allclose(found.nbytes / (256 * 512), per_weight, atol=2e-4)


def test_finer_codes_err_less():
    matrix = weight(256, 64)
    error = {
        kind: float(jnp.linalg.norm(encode(matrix, kind).dense() - matrix))
        for kind in KINDS
    }
    assert error["int8"] < 0.2 * error["nf4"]
    assert 0.99 < error["nf4-double"] / error["nf4"] < 1.01


def test_codes_equal_those_of_qwix():
    numerics = pytest.importorskip("qwix._src.core.numerics")
    matrix = weight(128, 32)
    blocks = matrix.reshape(2, 64, 32)
    unit = blocks / jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = np.asarray(numerics.convert_to(unit, "nf4")).astype(np.uint8)
    ours = unpack(np.asarray(encode(matrix, "nf4").codes))
    np.testing.assert_array_equal(ours, theirs.reshape(128, 32))


# --- the tree ---------------------------------------------------------------------


def test_only_the_projections_asked_for_are_in_codes():
    base = params()
    found = quantize(base, "int8", targets="(q|up)_proj")
    assert {k for k, v in found["layers"].items() if not isinstance(v, jax.Array)} == {
        "q_proj",
        "up_proj",
    }
    assert all(found[name] is base[name] for name in ("embed", "final_norm"))
    model = quantize(models.make_model(CONFIG, base), "int8", targets="(q|up)_proj")
    same(model.params, found)
    same(dequantize(model).params, dequantize(found))
    back = dequantize(found)
    assert jax.tree.structure(back) == jax.tree.structure(base)
    assert back["layers"]["k_proj"] is base["layers"]["k_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_coded_one_by_one(kind):
    stack, base = coded(kind)["layers"]["down_proj"], params()["layers"]["down_proj"]
    assert stack.shape == base.shape
    same(stack[1], encode(base[1], kind, BLOCK))
    _, scanned = jax.lax.scan(lambda c, w: (c, w.dense()), 0, stack)
    np.testing.assert_array_equal(scanned, stack.dense())
    shapes = jax.eval_shape(lambda x: quantize(x, kind, block=BLOCK), params())
    same(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), coded(kind)),
    )


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["llama", "qwen"])
@pytest.mark.parametrize("kind", [None, "nf4-double"])
def test_bytes_are_known_beforehand(config, kind):
    base = params(config, jnp.bfloat16)
    base = base if kind is None else quantize(base, kind)
    assert weight_bytes(config, jnp.bfloat16, kind) == nbytes(base)


def test_seven_billion_weights_fit():
    llama = models.ModelConfig(
        vocab_size=32000, width=4096, mlp_width=11008, layers=32, heads=32, tied=False
    )
    assert weight_bytes(llama) == 2 * 6_738_415_616
    assert 4.1e9 < weight_bytes(llama, quantize="nf4") < 4.2e9


# --- the model --------------------------------------------------------------------


def example_loss(pairs, example, base):
    logits = models.make_apply_fn(CONFIG)(base, pairs, example["tokens"][None])
    mask = example["mask"][None]
    return losses.token_cross_entropy(logits, example["tokens"][None], mask)[0]


BATCH = {"tokens": IDS, "mask": jnp.ones(IDS.shape)}


@jax.jit
def everything(base, pairs):
    apply_fn = models.make_apply_fn(CONFIG)
    logits, hidden, seen = apply_fn(base, pairs, IDS, return_hidden=True, capture=True)
    each = jax.vmap(jax.grad(example_loss), (None, 0, None))(pairs, BATCH, base)
    return {"logits": logits, "hidden": hidden, "seen": seen, "gradients": each}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_its_dequantised_twin(kind):
    base = coded(kind)
    found, wanted = everything(base, PAIRS), everything(dequantize(base), PAIRS)
    plain = everything(params(), PAIRS)["logits"]
    # Float32 products of at most 20 terms, fused differently by the compiler.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        found,
        wanted,
    )
    assert float(jnp.abs(found["logits"] - plain).max()) > 1e-3
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(found["gradients"]))


def test_another_base_of_the_same_kind_compiles_nothing():
    everything(coded("nf4"), PAIRS)
    before = everything._cache_size()
    other = quantize(params(), "nf4", block=BLOCK)
    everything(jax.tree.map(lambda x: x, other), PAIRS)
    assert everything._cache_size() == before


def test_the_safety_fisher_sees_the_dequantised_model():
    base = coded("nf4")

    def subspace(weights):
        return fisher_subspace(
            example_loss,
            PAIRS,
            [BATCH],
            max_rank=4,
            energy=1.0,
            unit=models.is_lora_pair,
            layer_axes=1,
            args=(weights,),
        )

    found, wanted = subspace(base), subspace(dequantize(base))
    assert set(found.eigenvalues) == set(PAIRS)
    for name in PAIRS:
        np.testing.assert_allclose(
            found.eigenvalues[name], wanted.eigenvalues[name], rtol=1e-3, atol=1e-6
        )
        # Signs of columns are free; the projector they span is not.
        one, two = found.basis[name], wanted.basis[name]
        dot = jnp.einsum("lpk,lpj->lkj", one, two)
        np.testing.assert_allclose(
            jnp.sum(dot**2, axis=(1, 2)), jnp.sum(one**2, axis=(1, 2)), rtol=1e-3
        )


def test_an_adapter_learns_beside_frozen_codes():
    base = coded("nf4")
    before = jax.tree.map(np.array, base)
    pairs = models.init_adapter(jax.random.key(3), CONFIG, rank=2, alpha=4.0)
    optimizer = optax.adam(5e-2)

    @jax.jit
    def step(base, pairs, state):
        def loss_fn(pairs):
            each = jax.vmap(example_loss, (None, 0, None))(pairs, BATCH, base)
            return jnp.mean(each)

        loss, grads = jax.value_and_grad(loss_fn)(pairs)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        return optax.apply_updates(pairs, updates), state, loss

    state, found = optimizer.init(pairs), []
    for _ in range(12):
        pairs, state, loss = step(base, pairs, state)
        found.append(float(loss))
    assert found[-1] < 0.8 * found[0]
    same(base, before)


def test_answers_and_scores_come_through_codes():
    base = coded("nf4")
    dense = dequantize(base)
    model = models.make_model(CONFIG, base)
    prompts = [[1, 5, 9, 4], [1, 7]]  # The shorter is padded on the left.
    answer = functools.partial(models.generate, model, max_new_tokens=6)
    answers = answer(base, PAIRS, prompts)
    assert answers == answer(dense, PAIRS, prompts)
    assert any(answers)
    assert answer(base, PAIRS, prompts[1:]) == answers[1:]
    scores = [
        models.token_log_probs(model, x, PAIRS, IDS, BATCH["mask"])
        for x in (base, dense)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    extend = jax.jit(models.make_extend_fn(CONFIG))
    _, past = extend(base, PAIRS, IDS[:, :4])
    ending, _ = extend(base, PAIRS, IDS[:, 4:], past)
    whole = everything(base, PAIRS)["logits"]
    np.testing.assert_allclose(ending, whole[:, 4:], atol=1e-4)


def test_half_precision_meets_strict_promotion():
    base = quantize(params(dtype=jnp.bfloat16), "nf4", block=BLOCK)
    x = weight(5, 16, jnp.bfloat16)
    y = layers.project(x, base["layers"]["q_proj"][0])
    assert y.dtype == jnp.bfloat16
    wanted = x @ dequantize(base)["layers"]["q_proj"][0]
    np.testing.assert_array_equal(y.astype(jnp.float32), wanted.astype(jnp.float32))


# --- memory -----------------------------------------------------------------------

DEEP = models.ModelConfig(
    vocab_size=16, width=64, mlp_width=128, layers=8, heads=2, init_scale=0.1
)


def temporary_bytes(base, remat):
    # A function of its own, as a jitted one would not notice a patched layer.
    hardware = models.Hardware(remat=remat, unroll=1)
    apply_fn = functools.partial(models.make_apply_fn.__wrapped__(DEEP, hardware))

    def loss_fn(pairs, base, ids):
        logits = apply_fn(base, pairs, ids)
        return jnp.mean(losses.token_cross_entropy(logits, ids, jnp.ones(ids.shape)))

    pairs = models.init_adapter(jax.random.key(0), DEEP, rank=2, alpha=4.0)
    ids = jnp.zeros((1, 4), jnp.int32)
    compiled = jax.jit(jax.grad(loss_fn)).lower(pairs, base, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_keeps_no_dense_weights(remat, monkeypatch):
    base = params(DEEP)
    codes = quantize(base, "nf4")
    dense = sum(base["layers"][name].nbytes for name in models.TARGETS)
    plain = temporary_bytes(base, remat)
    # One layer of eight is dense at a time, and its largest weights twice.
    assert temporary_bytes(codes, remat) - plain < 0.3 * dense
    if not remat:
        naive = lambda x, w: x @ w.dense(x.dtype)  # noqa: E731
        monkeypatch.setattr(layers, "_decode_and_multiply", naive)
        assert temporary_bytes(codes, remat) - plain > 0.9 * dense


# --- files and meshes -------------------------------------------------------------


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.save(folder, models.make_model(CONFIG, params()))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_loading_into_codes_equals_quantising_what_was_loaded(folder, kind):
    found = models.load(folder, quantize=kind, dtype=jnp.bfloat16)
    wanted = quantize(models.load(folder, dtype=jnp.bfloat16), kind)
    same(found.params, wanted.params)
    assert found.apply_fn is wanted.apply_fn


def test_one_matrix_is_dense_at_a_time_while_loading(folder, monkeypatch):
    before = [x.shape for x in jax.live_arrays()]
    alive, real = [], weights.encode

    def counting(matrix, kind):
        now = [x.shape for x in jax.live_arrays()]
        alive.append(now.count(matrix.shape) - before.count(matrix.shape))
        return real(matrix, kind)

    monkeypatch.setattr(weights, "encode", counting)
    models.load(folder, quantize="nf4")
    assert alive == [1] * (7 * CONFIG.layers)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_mesh_gives_the_same_codes_in_slices(folder, kind):
    spread = models.load(folder, quantize=kind, mesh=mesh()).params
    plain = models.load(folder, quantize=kind).params
    same(spread, plain)
    up = spread["layers"]["up_proj"]
    assert up.codes.addressable_shards[0].data.shape[-1] == 10
    if kind == "int8":
        assert up.codes.sharding.spec == P(None, "fsdp", "tp")
        assert up.scales.sharding.spec == P(None, None, "tp")
    else:  # One block of 64 holds all 16 inputs.
        assert up.codes.sharding.spec == P(None, None, "tp")


def test_blocks_do_not_straddle_shards():
    spec = models.partition_specs(DEEP)["layers"]["q_proj"]

    def codes(block):
        weight = quantize(params(DEEP), block=block)["layers"]["q_proj"]
        return weight, models.named_shardings(spec, weight, mesh())

    weight, kept = codes(16)
    assert kept.codes.spec == kept.scales.spec == P(None, "fsdp", "tp")
    # Two blocks do not divide by four, although their 32 bytes would.
    _, dropped = codes(32)
    assert dropped.codes.spec == dropped.scales.spec == P(None, None, "tp")
    placed = jax.device_put(weight, kept)
    same(placed, weight)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(
        jax.jit(layers.project)(x, placed[0]), x @ weight[0].dense(), atol=1e-5
    )


# --- who computes with base weights -----------------------------------------------


def test_merging_gives_dense_weights():
    base = coded("nf4")
    pairs = {"q_proj": PAIRS["q_proj"]}
    found = models.merge_adapter(base, pairs)
    wanted = models.merge_adapter(dequantize(base), pairs)
    same(found["layers"]["q_proj"], wanted["layers"]["q_proj"])
    assert found["layers"]["k_proj"] is base["layers"]["k_proj"]


def test_ablation_decodes_what_it_edits():
    base = coded("nf4")
    direction = jax.random.normal(jax.random.key(4), (CONFIG.width,))
    found = ablate_direction(base, direction)
    same(dequantize(found), ablate_direction(dequantize(base), direction))


@pytest.mark.parametrize("method", [lox(), safe_lora()])
def test_methods_that_compare_weights_refuse_codes(method):
    base, key = coded("nf4"), jax.random.key(0)
    problem = Problem(None, 1, 1, None, unaligned=params())
    hook = method.prepare if method.name == "lox" else method.init
    with pytest.raises(UserError, match=f"{method.name}: .*nf4 codes.*quantize="):
        hook(problem, base, PAIRS, key)


def test_saving_refuses_codes(tmp_path):
    with pytest.raises(UserError, match=r"save: expected dense.*q_proj.*dequantize"):
        models.save(tmp_path, models.make_model(CONFIG, coded("nf4")))
    assert not list(tmp_path.iterdir())


def test_dense_weights_pass():
    require_dense(params(), "nobody")
    with pytest.raises(UserError, match=r"somebody: .*nf4 codes in down_proj"):
        require_dense(coded("nf4"), "somebody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int4"}, "expected one of nf4, nf4-double, int8, got 'int4'"),
        ({"block": 7}, "expected an even number of inputs, got 7"),
        ({"targets": "head"}, "matches no projection"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        quantize(params(), **change)


def test_a_kind_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="expected one of nf4"):
        models.load("/nowhere/at/all", quantize="fp4")


def test_codes_are_not_coded_again():
    with pytest.raises(UserError, match="quantize: expected dense weights, got nf4"):
        quantize(coded("nf4"), "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_named(kind):
    base = params()
    stack = base["layers"]["k_proj"].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(UserError, match="k_proj holds a weight that is not finite"):
        quantize({**base, "layers": {**base["layers"], "k_proj": stack}}, kind)
