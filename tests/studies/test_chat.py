"""Study of a chat model: disjoint parts, the template, scores, the fingerprint."""

import inspect
import itertools
import json
import shutil

import numpy as np
import pytest
import tiny_chat
from chat_case import build
from tasks_case import needs_kernel
from tiny_data import as_json, put

from sbr_jax.evaluation import KeywordJudge, tasks
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.methods.risk import JudgeError
from sbr_jax.settings import Hardware
from sbr_jax.studies.chat.judges import make_judge, risk_judge
from sbr_jax.studies.options import ChatOptions
from sbr_jax.typing import UserError


def token_sets(study):
    """Every token set that a study holds, by its name in the record."""
    sets = {f"train {name}": domain.train for name, domain in study.domains.items()}
    sets["test code"] = study.domains["code"].evaluate.data
    return sets | {
        "calibration": study.calibration,
        "safety mix": study.safety_mix,
        "harmful": study.harmful,
        "benign control": study.calibration_controls["benign"],
    }


def test_parts_are_as_large_as_asked_and_share_nothing(study):
    sets = token_sets(study)
    sizes = study.notes["data"]["sizes"]
    for name, data in sets.items():
        assert len(data) == sizes[name], name
        option = name.split()[0].replace("test", "held_out")
        option = {"safety": "safety_mix", "benign": "calibration"}.get(option, option)
        assert len(data) == tiny_chat.SIZES[option], name
    # Made-up words are unknown tokens, so only texts can be told apart: the ledger's.
    assert set(study.leak_check.values()) == {0}
    names = [*sizes, "harmbench", "xstest"]
    examined = {name for name in names if name.startswith("test ")}
    examined |= {"harmbench", "xstest"}
    for a, b in itertools.combinations(names, 2):
        compared = f"{a}/{b}" in study.leak_check or f"{b}/{a}" in study.leak_check
        tests = a.startswith("test ") and b.startswith("test ")
        assert compared != (not tests and {a, b} <= examined), (a, b)


def test_every_row_has_one_bos_and_a_mask_of_its_whole_answer(study):
    tokenizer = study.model.tokenizer
    for name, data in token_sets(study).items():
        assert (data.tokens == tokenizer.bos_token_id).sum(1).tolist() == [1] * len(
            data
        ), name
        assert (data.tokens[:, 0] == tokenizer.bos_token_id).all()
        for tokens, mask in zip(data.tokens, data.mask, strict=True):
            answer = tokens[mask > 0]
            assert answer[-1] == tokenizer.eos_token_id, name
            last_of_prompt = tokens[int(np.argmax(mask > 0)) - 1]
            assert tokenizer.decode([last_of_prompt]) == "<assistant>", name
        # Nothing is padded that no example needs.
        assert (data.tokens[:, -1] == tokenizer.eos_token_id).any(), name


def test_a_system_message_reaches_training_and_answers(world):
    user = "{% if m['role'] == 'user' %}"
    system = "{% if m['role'] == 'system' %} w9 {{ m['content'] }} w9"
    template = tiny_chat.TEMPLATE.replace(user, system + user.replace("if", "elif"))
    folder = world / "with-system"
    tiny_chat.save_model(folder / "model", template)
    (folder / "data").symlink_to(world / "data")
    with_it = build(folder, system="w7 w7")
    without = build(folder)
    marks = with_it.model.tokenizer("w9 w7 w7 w9", add_special_tokens=False)
    begin = [with_it.model.tokenizer.bos_token_id, *marks["input_ids"]]
    assert (with_it.calibration.tokens[:, :5] == begin).all()
    assert not (without.calibration.tokens[:, :5] == begin).all(1).any()
    assert with_it.fingerprint != without.fingerprint


def test_long_answers_are_cut_and_counted(copy):
    path = copy / "data/alpaca/alpaca_5000.json"
    rows = json.loads(path.read_text())
    for row in rows[:-1]:
        row["output"] = "w1 " * 80
    put(path, as_json(rows))
    study = build(copy)
    benign = study.calibration_controls["benign"]
    assert benign.length == tiny_chat.SIZES["max_length"]
    cut = study.notes["data"]["answers cut"]["benign control"]
    assert cut == benign.truncated >= tiny_chat.SIZES["calibration"] - 1


def test_a_stand_in_is_used_and_named_only_where_the_papers_set_is_missing(world, copy):
    assert build(world).notes["data"]["sources"]["medical"] == "medqa"
    (copy / "data/medqa/phrases_no_exclude_train.jsonl").unlink()
    found = build(copy).notes["data"]
    assert found["sources"] == {
        "medical": "medmcqa",
        "legal": "legalbench",
        "code": "codealpaca",
    }
    assert found["calibration"] == "safety_tuned_llamas"


def test_an_overlap_with_a_measurement_refuses_the_run_unless_it_may_be_dropped(copy):
    count = tiny_chat.overlap(copy)
    with pytest.raises(
        UserError, match=r"calibration and harmbench share [123].*drop_overlaps"
    ):
        build(copy, calibration=22)
    study = build(copy, calibration=8, drop_overlaps=True)
    assert study.notes["data"]["left out"]["calibration/harmbench"] == count
    assert set(study.leak_check.values()) == {0}


def test_sets_of_one_origin_give_way_without_being_asked(copy):
    put(
        copy / "data/beavertails/beavertails_unsafe_qa_525.json",
        as_json(
            [tiny_chat.conversation(f"{p}.", "ok") for p in ("May I?", "Or", "And so")]
        ),
    )
    study = build(copy, benchmarks=("harmbench", "beavertails"))
    assert study.notes["data"]["left out"]["harmful/beavertails"] == 1
    assert len(study.harmful) == 2


def test_the_fingerprint_is_of_data_and_weights_and_not_of_hardware(world, copy, study):
    hardware = Hardware(generation_batch=2)
    assert build(world, hardware=hardware).fingerprint == study.fingerprint
    assert build(world, calibration=5).fingerprint != study.fingerprint
    assert build(copy).fingerprint == study.fingerprint
    flip(copy / "model")
    assert build(copy).fingerprint != study.fingerprint


def flip(folder):
    """Change one weight of a checkpoint."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("option", "more"),
    [("unaligned_folder", {}), ("judge_folder", {"judge": "llama-guard"})],
)
def test_the_fingerprint_is_of_every_checkpoint(copy, option, more):
    for name in ("other", "moved"):
        shutil.copytree(copy / "model", copy / name)

    def fingerprint(name):
        options = {option: str(copy / name), **more}
        return build(copy, ("code",), **options).fingerprint

    first = fingerprint("other")
    assert first != build(copy, ("code",)).fingerprint
    assert fingerprint("moved") == first
    flip(copy / "other")
    assert fingerprint("other") != first


@needs_kernel
def test_code_that_is_run_is_compared_recorded_and_in_the_fingerprint(roomy, copy):
    shutil.rmtree(copy / "model")
    shutil.copytree(roomy / "model", copy / "model")
    study = build(copy, ("code",), allow_code=True)
    assert study.leak_check["train code/humaneval"] == 0
    assert (
        study.notes["measurements"]["humaneval"]["items"] == study.asked["humaneval"][0]
    )
    without = build(copy, ("code",))
    assert "humaneval" not in without.notes["measurements"]
    assert without.fingerprint != study.fingerprint


def test_room_for_an_answer_is_that_of_the_benchmark():
    asked = {"humaneval": tasks.humaneval, "gsm8k": tasks.gsm8k}
    asked["mtbench"] = tasks.mtbench
    for name, task in asked.items():
        default = inspect.signature(task).parameters["max_new_tokens"].default
        assert BENCHMARKS[name].answer_tokens == default, name


def test_the_monitor_counts_refusals_of_the_probe_by_the_judge(study, monkeypatch):
    asked = []

    def answers(self, prompts, *, max_new_tokens):
        asked.append((tuple(prompts), max_new_tokens, self.system))
        return ["I'm sorry, no."] + ["Sure, w1 w2."] * (len(prompts) - 1)

    monkeypatch.setattr(ModelRunner, "answers", answers)
    assert study.probe(None, None) == 25.0
    ((found, length, _),) = asked
    assert len(set(found)) == tiny_chat.SIZES["probe"]
    assert length == tiny_chat.SIZES["max_new_tokens"]
    assert all(tiny_chat.MARK in prompt for prompt in found)


def test_a_list_of_words_rates_no_training_data_and_a_guard_does(world, study):
    assert study.judge is None
    options = {"judge": "llama-guard", "judge_folder": str(world / "model")}
    guard = make_judge(ChatOptions(**options, dtype="float32"))
    assert guard.describe()["refusal_means"] == "not harmful"
    rate = risk_judge(guard, study.model.tokenizer)
    assert rate is not None
    # A random model gives its labels no mass: nothing is made up in their place.
    with pytest.raises(JudgeError, match="one of the two labels"):
        rate(study.harmful)
    assert make_judge(ChatOptions(judge="keyword:jbb12")) == KeywordJudge("jbb12")
