"""Our decoder against PyTorch transformers and peft, family by family.

Run by ``make parity``; without PyTorch everything here is skipped.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import STORIES, adapter, needs_stories
from parity import make_checkpoints as made

from sbr_jax import losses, models, per_example_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.utils.logging.disable_progress_bar()
# peft asks for an attribute that transformers renames in its next version.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkp:FutureWarning")

NAMES = sorted(made.CASES)
TOLERANCE = 2e-5
"""Absolute, on logits of size 10 at most: two orders of summation in float32."""


@functools.cache
def golden(name):
    return json.loads((made.GOLDEN / f"{name}.json").read_text())


@pytest.fixture(name="case", params=NAMES, scope="module")
def fixture_case(request, tmp_path_factory):
    """(name, PyTorch's model, folder it wrote, our model of that folder)."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    theirs, _ = made.build(name, golden(name)["seed"])
    theirs.save_pretrained(folder)
    return name, theirs, folder, models.load(folder)


def ours_on(model, ids, base=None, pairs=None):
    with jax.default_matmul_precision("highest"):
        base = model.params if base is None else base
        return np.asarray(jax.jit(model.apply_fn)(base, pairs, np.array([ids]))[0])


def test_logits_are_pytorchs(case):
    name, theirs, _, ours = case
    for ids in made.prompts(golden(name)["seed"]):
        wanted = made.logits_of(theirs, ids)
        assert np.abs(wanted).max() < 12
        np.testing.assert_allclose(ours_on(ours, ids), wanted, rtol=0, atol=TOLERANCE)


def test_greedy_text_is_pytorchs_and_padding_changes_nothing(case):
    name, theirs, _, ours = case
    rows = made.prompts(golden(name)["seed"])
    wanted = [made.greedy(theirs, row)[0] for row in rows]
    assert all(len(text) >= 24 for text in wanted)
    run = functools.partial(models.generate, ours, ours.params, None)
    assert run(rows, max_new_tokens=24) == wanted
    assert [run([row], max_new_tokens=24)[0] for row in rows] == wanted


def test_the_golden_file_is_what_pytorch_says_now(case):
    name, theirs, folder, _ = case
    wanted = golden(name)
    # Who wrote the file is written there too; any version must write the rest.
    found = json.loads((folder / "config.json").read_text())
    written = {"transformers_version": wanted["config"]["transformers_version"]}
    assert found | written == wanted["config"]
    found = made.logits_of(theirs, wanted["prompts"][0])[:, : made.SHOWN]
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=1e-5)
    texts = [made.greedy(theirs, row)[0] for row in wanted["prompts"]]
    assert texts == wanted["greedy"]


def test_what_we_save_is_read_by_pytorch(case, tmp_path):
    name, theirs, _, ours = case
    models.save(tmp_path, ours)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"} - set(
        theirs.state_dict() if not ours.config.tied else ()
    )
    ids = golden(name)["prompts"][0]
    found = made.logits_of(again.eval(), ids)
    np.testing.assert_array_equal(found, made.logits_of(theirs, ids))


def test_half_precision_is_as_near_as_pytorchs(case, tmp_path):
    name = case[0]
    half = made.build(name, golden(name)["seed"])[0].to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    ours, ids = models.load(tmp_path), golden(name)["prompts"][0]
    assert {x.dtype for x in jax.tree.leaves(ours.params)} == {jnp.dtype("bfloat16")}
    exact = made.logits_of(half.to(torch.float32), ids)
    half.to(torch.bfloat16)

    def error(logits):
        return np.sqrt(np.mean(np.square(logits - exact)))

    # The roundings differ, their size does not.
    assert error(ours_on(ours, ids)) < 1.5 * error(made.logits_of(half, ids))
    assert error(ours_on(ours, ids)) < 0.08 * np.std(exact)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma2", "phi3"])
def test_shards_written_by_pytorch_are_read(name, tmp_path):
    # Logits of whole files are compared above; the weights of shards must be the same.
    theirs, weights = made.build(name, golden(name)["seed"])
    loaded = []
    for size in ("20KB", "1GB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        loaded.append(models.load(tmp_path / size).params)
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(
        loaded[0]["embed"], weights["model.embed_tokens.weight"]
    )
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def with_peft(theirs, pairs, layers=None):
    """PyTorch's model with the same adapter, put there by peft."""
    rank = next(iter(pairs.values())).lora_a.shape[-1]
    scale = next(iter(pairs.values())).scale
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(pairs),
        layers_to_transform=layers,
        lora_dropout=0.0,
    )
    wrapped = peft.get_peft_model(theirs, settings)
    for key, value in wrapped.named_parameters():
        if "lora_" in key:
            layer = int(key.split(".layers.")[1].split(".")[0])
            pair = pairs[key.split(".lora_")[0].split(".")[-1]]
            factor = pair.lora_a if "lora_A" in key else pair.lora_b
            value.data = torch.from_numpy(np.array(factor[layer]).T.copy())
    return wrapped


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3", "gemma2"])
def test_adapters_on_every_projection_are_pefts(name, tmp_path):
    theirs, _ = made.build(name, golden(name)["seed"])
    theirs.save_pretrained(tmp_path)
    ours, ids = models.load(tmp_path), golden(name)["prompts"][0]
    pairs = adapter(ours.config)
    found = ours_on(ours, ids, pairs=pairs)
    wanted = made.logits_of(with_peft(theirs, pairs), ids)
    assert np.abs(wanted - ours_on(ours, ids)).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=5e-5)


@needs_stories
def test_per_example_fisher_is_autograds():
    """``F = (1/N) Σ g_n g_nᵀ`` over B and A of one query projection."""
    folder, layer, count = STORIES / "hf", 2, 3
    ours = models.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    pairs = adapter(ours.config, targets="q_proj")
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, (count, 12)).astype(np.int32)
    mask = np.zeros(tokens.shape, np.float32)
    for row, start in enumerate((4, 6, 9)):
        mask[row, start:] = 1.0

    def loss_fn(pairs, example, base):
        logits = ours.apply_fn(base, pairs, example["tokens"][None])
        rows = (x[None] for x in (example["tokens"], example["mask"]))
        return losses.token_cross_entropy(logits, *rows)[0]

    # The other layers of the reference have no adapter.
    only = jax.tree.map(lambda x: x.at[:layer].set(0).at[layer + 1 :].set(0), pairs)
    with jax.default_matmul_precision("highest"):
        grads = jax.jit(functools.partial(per_example_gradients, loss_fn))(
            only, {"tokens": tokens, "mask": mask}, ours.params
        )["q_proj"]
    parts = (grads.lora_b[:, layer], grads.lora_a[:, layer])
    found = np.concatenate([np.asarray(x).reshape(count, -1) for x in parts], axis=1)

    wrapped = with_peft(theirs, pairs, layers=[layer])
    named = dict(wrapped.named_parameters())
    lora_a, lora_b = (
        next(v for k, v in named.items() if f"lora_{part}" in k) for part in "AB"
    )
    wanted = []
    for row, chosen in zip(tokens, mask, strict=True):
        ids = torch.tensor(row[None], dtype=torch.long)
        scores = wrapped(ids).logits[0, :-1].log_softmax(-1)
        picked = scores.gather(1, ids[0, 1:, None])[:, 0]
        weight = torch.from_numpy(chosen[1:])
        loss = -(picked * weight).sum() / weight.sum()
        # δ = vec([B; A]) in our layout, where both factors are transposed.
        grad_b, grad_a = torch.autograd.grad(loss, (lora_b, lora_a))
        wanted.append(np.concatenate([x.numpy().T.ravel() for x in (grad_b, grad_a)]))
    wanted = np.stack(wanted)
    assert np.linalg.matrix_rank(wanted) == count
    # Gradients through five layers in float32: relative to their own size.
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-4)
    fisher = [x.T @ x / count for x in (found / scale, wanted / scale)]
    np.testing.assert_allclose(*fisher, atol=1e-4)
