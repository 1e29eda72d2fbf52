"""The decoder: parity with the trained checkpoint, then properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, STORIES, adapter, golden, needs_stories, params, tokens
from jax.sharding import PartitionSpec

from sbr_jax import losses, models
from sbr_jax.training.sharding import make_mesh
from sbr_jax.typing import UserError

UNTIED = dataclasses.replace(CONFIG, tied=False)


def dense_logits(config, base, adapter, row):
    """The same mathematics, one token at a time, in NumPy and float64."""
    base = jax.tree.map(lambda x: np.asarray(x, np.float64), base)
    adapter = jax.tree.map(lambda x: np.asarray(x, np.float64), adapter)
    heads, kv, size = config.heads, config.kv_heads, config.head_dim
    angle = np.outer(
        np.arange(len(row)), config.rope_theta ** -(np.arange(0, size, 2) / size)
    )

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def linear(name, i, x):
        y = x @ base["layers"][name][i]
        if name in adapter:
            pair = adapter[name]
            y = y + pair.scale * (x @ pair.lora_a[i]) @ pair.lora_b[i]
        return y

    def turn(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = base["embed"][np.asarray(row)]
    for i in range(config.layers):
        y = norm(x, base["layers"]["input_norm"][i])
        q = turn(linear("q_proj", i, y).reshape(-1, heads, size))
        k = turn(linear("k_proj", i, y).reshape(-1, kv, size))
        v = linear("v_proj", i, y).reshape(-1, kv, size)
        out = np.zeros_like(q)
        for t in range(len(row)):
            for h in range(heads):
                g = h // (heads // kv)
                score = k[: t + 1, g] @ q[t, h] / np.sqrt(size)
                weight = np.exp(score - score.max())
                out[t, h] = weight / weight.sum() @ v[: t + 1, g]
        x = x + linear("o_proj", i, out.reshape(len(row), -1))
        y = norm(x, base["layers"]["mlp_norm"][i])
        gate = linear("gate_proj", i, y)
        gate = gate / (1 + np.exp(-gate))
        x = x + linear("down_proj", i, gate * linear("up_proj", i, y))
    head = base["embed"].T if config.tied else base["head"]
    return norm(x, base["final_norm"]) @ head


@needs_stories
def test_the_trained_checkpoint_gives_the_golden_numbers():
    model, wanted = models.load(STORIES / "hf"), golden()
    ids = jnp.asarray([wanted["prompt_ids"]])
    with jax.default_matmul_precision("highest"):
        logits, hidden = jax.jit(
            lambda p, t: model.apply_fn(p, None, t, return_hidden=True)
        )(model.params, ids)
    found = losses.token_log_likelihood(logits, ids)[0]
    # Float32 sums in another order: 5 layers on logits of size 15 leave about 1e-5.
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-5)
    near(found, wanted["prompt_token_logprobs"])
    near(logits[0, -1, :16], wanted["last_logits_first16"])
    near(hidden[0, -1, :16], wanted["last_hidden_after_final_norm_first16"])
    assert model.tokenizer(wanted["prompt"])["input_ids"] == wanted["prompt_ids"]


@pytest.mark.parametrize(
    ("config", "pairs"), [(CONFIG, {}), (UNTIED, adapter())], ids=["tied", "adapted"]
)
def test_logits_equal_the_dense_definition(config, pairs):
    base, ids = params(config), tokens()
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(models.make_apply_fn(config))(base, pairs, ids)
    assert logits.dtype == jnp.float32
    for row, found in zip(ids, logits, strict=True):
        expected = dense_logits(config, base, pairs, row)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def gradient_loss(apply_fn, pairs, base, ids):
    mask = jnp.ones(ids.shape)
    return losses.token_cross_entropy(apply_fn(base, pairs, ids), ids, mask)


def test_hardware_settings_change_no_result():
    base, pairs, ids = params(), adapter(), tokens()

    def run(**hardware):
        apply_fn = models.make_apply_fn(CONFIG, models.Hardware(**hardware))
        loss = lambda a: gradient_loss(apply_fn, a, base, ids).mean()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(pairs))

    wanted = run()
    for found in (run(remat=True), run(unroll=1)):
        for one, two in zip(wanted, found, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6, rtol=1e-5)


def test_an_axis_that_does_not_divide_is_left_whole():
    shardings = models.named_shardings(
        models.partition_specs(CONFIG), params(), make_mesh("fsdp=8")
    )
    # mlp_width is 20 and not a multiple of 8, the width 16 is; one part is no split.
    assert shardings["layers"]["up_proj"].spec == PartitionSpec(None, "fsdp", None)
    assert shardings["embed"].spec == PartitionSpec(None, "fsdp")
    small = dataclasses.replace(CONFIG, width=20)
    shardings = models.named_shardings(
        models.partition_specs(small), params(small), make_mesh("fsdp=8")
    )
    assert shardings["layers"]["up_proj"].spec == PartitionSpec(None, None, None)


def test_a_new_base_or_adapter_does_not_retrace():
    apply_fn = models.make_apply_fn(CONFIG)
    assert apply_fn is models.make_apply_fn(dataclasses.replace(CONFIG))
    count = 0

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply_fn, base, pairs, ids):
        nonlocal count
        count += 1
        return apply_fn(base, pairs, ids)

    for seed in range(3):
        base = jax.tree.map(lambda x: x + 1, params())
        run(models.make_apply_fn(CONFIG), base, adapter(seed=seed), tokens(seed=seed))
    assert count == 1


def test_bfloat16_weights_compute_in_bfloat16_and_give_float32_logits():
    base = params(dtype=jnp.bfloat16)
    apply_fn = models.make_apply_fn(CONFIG)
    run = jax.jit(lambda *x: apply_fn(*x, return_hidden=True))
    logits, hidden = run(base, adapter(), tokens())
    assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)


def test_stop_tokens_of_the_generation_file_are_used_too(tmp_path):
    model = models.make_model(CONFIG, params())
    models.save(tmp_path, model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert models.load(tmp_path).config.eos == (2, 7)


def test_a_folder_that_is_not_there_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="checkpoint folder"):
        models.load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json"):
        models.load(tmp_path)
