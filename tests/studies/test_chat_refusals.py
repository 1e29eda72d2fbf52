"""Refusals of a chat study, before hours are spent."""

import dataclasses
import json

import huggingface_hub
import numpy as np
import pytest
import tiny_chat
import tiny_rows
from chat_case import SMALL, build
from safetensors.numpy import load_file, save_file
from tasks_case import needs_kernel
from tiny_data import as_json, fake_hub, put
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sbr_jax import models
from sbr_jax.methods import Hyperparameters
from sbr_jax.programs import run
from sbr_jax.settings import Hardware
from sbr_jax.studies.chat import checkpoints
from sbr_jax.studies.chat import study as chat
from sbr_jax.studies.chat.judges import GUARDS, make_judge
from sbr_jax.studies.options import (
    RATERS,
    ChatOptions,
    RealtextOptions,
    SmollmOptions,
    Sources,
)
from sbr_jax.typing import UserError

GUARD = {"judge": "llama-guard", "judge_folder": "guard"}
DEEPER = {"layers": tiny_chat.CONFIG.layers + 1}


# --- values of an option --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": 5}, "study.system to be text, got 5"),
        ({"allow_code": 1}, "study.allow_code to be True or False, got 1"),
        ({"benchmarks": "harmbench"}, "study.benchmarks to be a tuple of texts, got"),
        ({"dtype": "int8"}, "study.dtype to be 'bfloat16' or 'float32', got 'int8'"),
        ({"judge": "llama-guard"}, "study.judge='llama-guard': expected a folder with"),
        (
            {"judge": "lama-guard"},
            "unknown study.judge 'lama-guard'; nearest: llama-g",
        ),
        ({"judge": "key-word"}, r"nearest: keyword, keyword:LIST \(known: keyword, "),
        ({"judge_folder": "g"}, "study.judge='keyword': expected a folder with"),
    ],
)
def test_a_value_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        ChatOptions(**options)


def test_a_calibration_without_refusals_is_told_where_they_are_asked_for(world):
    with pytest.raises(UserError, match="expected safe exchanges that refuse, got"):
        build(world, calibration_refusals=True)


def test_without_a_data_folder_a_set_that_the_hub_lacks_is_one_line(world, monkeypatch):
    fake_hub(monkeypatch, tiny_rows.JBB)
    options = SmollmOptions(**{**tiny_chat.SIZES, "benchmarks": ()})
    sources = Sources(str(world / "model"), None)
    with pytest.raises(UserError, match=r"'legalbench' .* hub has no copy.* folder="):
        options.build(("legal",), sources, Hardware(), weights=False)


# --- a command line -------------------------------------------------------------------


def check(variant, options=None, kind=ChatOptions, sources=("m", "d"), **methods):
    given = kind(**options or {})
    given.check((variant,), Hyperparameters(**methods), Sources(*sources))


def unified(risk):
    changed = dataclasses.replace(Hyperparameters().unified, risk=risk)
    return {"unified": changed}


WILD = {"judge": "wildguard", "judge_folder": "g"}
RATES = "{}: expected a guard model that rates"
BEFORE = "{}: expected the weights before"


@pytest.mark.parametrize(
    ("variant", "options", "methods", "message"),
    [
        ("unified", {}, unified("judge"), RATES),
        ("unified:judge", {}, {}, RATES),
        ("adaptive-judge", {}, {}, RATES),
        # WildGuard writes lines: no token of them is a label.
        ("adaptive-judge", WILD, {}, RATES),
        ("safe-lora", {}, {}, BEFORE),
        (
            "safe-lora",
            {"quantize": "nf4", "unaligned_folder": "u"},
            {},
            "{}: expected dense weights",
        ),
    ],
)
def test_a_variant_without_what_it_needs(variant, options, methods, message):
    with pytest.raises(UserError, match=message.format(variant)):
        check(variant, options, **methods)
    if message == RATES:
        check(variant, GUARD, **methods)


@pytest.mark.parametrize(
    ("kind", "sources", "message"),
    [
        (ChatOptions, (None, "d"), "expected --model FOLDER_OR_HUB_ID, got none"),
        (ChatOptions, ("m", None), "expected --data FOLDER, got none"),
        (RealtextOptions, (None, "d"), r"make one with .*realtext --data"),
        (RealtextOptions, ("m", None), "expected --data FOLDER, got none"),
    ],
)
def test_a_study_without_its_sources(kind, sources, message):
    with pytest.raises(UserError, match=message):
        check("plain", kind=kind, sources=sources)


def test_a_variants_needs_follow_its_hyper_parameters():
    check("unified", **unified("probe"))
    # What a variant changes is changed whatever its method says.
    with pytest.raises(UserError, match=RATES.format("unified:judge")):
        check("unified:judge", **unified("probe"))


def test_a_mistake_is_one_line_whether_the_run_is_dry_or_not(
    world, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    folders = ["--model", str(world / "model"), "--data", str(world / "data")]
    rated = ["--methods", "unified", "--methods.unified.risk", "judge"]
    for more in (["--dry-run"], ["--workdir", "nowhere"]):
        assert run.main(["llama2-7b", *folders, *more, *rated, *SMALL]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "unified: expected a guard model" in captured.err
        assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- files ----------------------------------------------------------------------------


def extra_tensor(folder):
    path = folder / "model/model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file({**load_file(path), name: np.zeros(16, np.float32)}, path)


def other_model(folder):
    tiny_chat.save_model(folder / "other", config=tiny_chat.changed(**DEEPER))


def endless(folder):
    template = tiny_chat.TEMPLATE.replace(" {{ eos_token }}", "")
    tiny_chat.save_model(folder / "model", template)


def leaked_code(folder):
    tiny_chat.save_model(folder / "model", config=tiny_chat.changed(context=640))
    path = folder / "data/codealpaca/code_alpaca_2k.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["instruction"] = tiny_rows.HUMANEVAL[0]["prompt"]
    put(path, as_json(rows))


def nothing(folder):
    pass


LEAK = {"allow_code": True, "train": 22, "held_out": 1}


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (extra_tensor, {}, "extra model.layers.0.self_attn.q_proj.bias"),
        (
            other_model,
            {"unaligned_folder": "other"},
            "before its alignment, with layers=",
        ),
        (
            nothing,
            {"unaligned_folder": "no where"},
            "study.unaligned_folder: expected a checkpoint",
        ),
        (
            nothing,
            {"judge": "llama-guard", "judge_folder": "no where"},
            "study.judge_folder: expected a checkpoint",
        ),
        (nothing, {"judge": "lama", "judge_folder": "model"}, "nearest: llama-guard"),
        (nothing, {"judge": "keyword:jbb"}, "among .*jbb12.*got 'jbb'"),
        (nothing, {"thinking": False}, "expected a chat template that can think"),
        (nothing, {"benchmarks": ("harmbanch",)}, "harmbench"),
        (nothing, {"max_length": 97}, "study.max_length: expected at most the model's"),
        (endless, {}, r"got \d+ of \d+ that do not: have the"),
        pytest.param(
            leaked_code, LEAK, "train code and humaneval share 1", marks=needs_kernel
        ),
        pytest.param(
            nothing,
            {"allow_code": True},
            r"humaneval: .* 0 tokens .*96 less 512",
            marks=needs_kernel,
        ),
        # The prompts alone are short enough to need no counting.
        (
            nothing,
            {"system": "w1 " * 84, "max_length": 96},
            "harmbench: expected prompts of at most 88",
        ),
    ],
)
def test_files_that_do_not_fit(copy, monkeypatch, damage, options, message):
    damage(copy)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=message):
        build(copy, ("code",), **options)


@pytest.mark.parametrize("weights", [False, True])
def test_a_missing_checkpoint_on_the_hub_is_refused_first(world, weights, monkeypatch):
    def absent(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    def too_late(*args, **options):
        raise AssertionError("work was done before")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(chat, "make_parts", too_late)
    monkeypatch.setattr(checkpoints, "load_model", too_late)
    with pytest.raises(UserError, match="unaligned_folder: 'nobody/x' is no folder"):
        build(world, ("code",), unaligned_folder="nobody/x", weights=weights)


# --- guards ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUARDS)
def test_the_judges_that_rate_are_those_with_labels(copy, name):
    (copy / "model/template.txt").write_text("{prompt} {answer}")
    options = ChatOptions(judge=name, judge_folder=str(copy / "model"))
    judge = make_judge(options, weights=False)
    assert (judge.labels is not None) == (name in RATERS)


HEADER = "<|start_header_id|> assistant <|end_header_id|>"
ENDINGS = {"old": " [/INST]", "three": HEADER, "broken": HEADER + "\n\n"}


def guard(ending):
    """A guard without weights, whose template ends like this."""
    special = ["<unk>", "<s>", "[/INST]", "<|start_header_id|>", "<|end_header_id|>"]
    names = [*special, "assistant", "safe", "unsafe", "?", "!"]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(name, special=True) for name in special])
    raw.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
        f"{{{{ {ending!r} }}}}"
    )
    return models.make_model(tiny_chat.CONFIG, None, tokenizer)


@pytest.mark.parametrize(
    ("name", "ending", "lead"),
    [
        ("llama-guard", "old", False),
        ("llama-guard", "three", True),
        ("llama-guard", "broken", False),
        ("llama-guard-3", "old", True),
        ("llama-guard-3", "three", True),
        ("llama-guard-3", "broken", False),
    ],
)
def test_the_label_comes_after_the_line_breaks_that_are_left_out(
    name, ending, lead, tmp_path
):
    model = guard(ENDINGS[ending])
    (breaks,) = model.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    judge = GUARDS[name](model, tmp_path)
    ids = judge.encode("?", "!")
    # Once at most: written by the template, or for it.
    assert ids.count(breaks) == (lead or ending == "broken")
    assert (ids[-1] == breaks) == (lead or ending == "broken")
    assert ("lead" in judge.describe()) is lead
    assert judge.labels == ("safe", "unsafe")
