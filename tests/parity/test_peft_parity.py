"""Adapters and merged checkpoints against peft and PyTorch transformers.

Run by ``make parity``; without PyTorch everything here is skipped.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checkpoints import adapter
from parity import make_checkpoints as made

from sbr_jax import models
from sbr_jax.models.peft import load_peft, save_peft
from sbr_jax.typing import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.utils.logging.disable_progress_bar()
# peft asks for an attribute that transformers renames in its next version.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkp:FutureWarning")

NAMES = (
    *("llama3", "llama3-tied", "mistral", "qwen2", "qwen3", "gemma2"),
    *("gemma3", "phi3", "olmo3", "smollm3", "granite"),
)
TOLERANCE = 2e-5
"""Absolute, on logits of size 12 at most: two orders of summation in float32."""


@pytest.fixture(name="case", params=NAMES)
def fixture_case(request, tmp_path):
    """(folder that PyTorch wrote, our model of it, token ids)."""
    seed = json.loads((made.GOLDEN / f"{request.param}.json").read_text())["seed"]
    theirs, _ = made.build(request.param, seed)
    theirs.save_pretrained(tmp_path / "base")
    return tmp_path / "base", models.load(tmp_path / "base"), made.prompts(seed)[0]


def theirs_of(folder):
    """PyTorch's model of a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


def small(config):
    """An adapter on every projection that moves logits by about one.

    The updates of all layers multiply, so that a larger one gives logits of hundreds.
    """
    return {
        name: dataclasses.replace(pair, lora_b=0.3 * pair.lora_b)
        for name, pair in adapter(config, rank=3).items()
    }


def ours_on(model, ids, pairs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(
            jax.jit(model.apply_fn)(model.params, pairs, np.array([ids]))[0]
        )


def agree(found, wanted, without):
    """Equal, on logits that the adapter moved."""
    assert np.abs(wanted).max() < 20
    assert np.abs(wanted - without).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_peft_reads_what_we_write(case, tmp_path):
    base, ours, ids = case
    pairs = small(ours.config)
    save_peft(tmp_path / "adapter", ours, pairs, base_name=str(base))
    plain = theirs_of(base)
    without = made.logits_of(plain, ids)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    wanted = made.logits_of(wrapped, ids)
    agree(ours_on(ours, ids, pairs), wanted, without)
    # By itself, from the name of its base.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", attn_implementation="eager"
    )
    np.testing.assert_array_equal(made.logits_of(alone.eval(), ids), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {"target_modules": ["v_proj", "down_proj"], "use_rslora": True},
        {"target_modules": r".*self_attn\.(q|k|qkv)_proj", "task_type": "CAUSAL_LM"},
    ],
    ids=["all", "rslora", "regex"],
)
def test_we_read_what_peft_writes(case, tmp_path, options):
    base, ours, ids = case
    plain = theirs_of(base)
    without = made.logits_of(plain, ids)
    torch.manual_seed(0)
    # Without a start of its own B is random too.
    settings = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(plain, settings).eval()
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            value.data *= 0.3
    wrapped.save_pretrained(tmp_path / "adapter")
    pairs = load_peft(tmp_path / "adapter", ours.config)
    agree(ours_on(ours, ids, pairs), made.logits_of(wrapped, ids), without)


def test_a_merged_checkpoint_is_base_and_adapter(case, tmp_path):
    base, ours, ids = case
    pairs = small(ours.config)
    params = models.merge_adapter(ours.params, pairs)
    merged = dataclasses.replace(ours, params=params)
    models.save(tmp_path / "merged", merged, max_shard_bytes=30_000)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"] or ours.config.tied
    without = made.logits_of(theirs_of(base), ids)
    agree(made.logits_of(found.eval(), ids), ours_on(ours, ids, pairs), without)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 5}},
        {"alpha_pattern": {"q_proj": 5}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_we_do_not_have_are_refused(options, tmp_path):
    theirs, _ = made.build("qwen2-window", 0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **options)
    peft.get_peft_model(theirs, settings).save_pretrained(tmp_path / "adapter")
    theirs, _ = made.build("qwen2-window", 0)
    theirs.save_pretrained(tmp_path / "base")
    config = models.load(tmp_path / "base").config
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        load_peft(tmp_path / "adapter", config)
