"""The study on a chat model: disjoint parts, the template, the scores."""

import dataclasses
import inspect
import itertools
import json
import shutil
import types

import numpy as np
import pytest
import tiny_chat
import tiny_data
from safetensors.numpy import load_file, save_file
from tiny_data import as_json, put

from experiments import chat, chat_data, chat_model, chat_parts, domain_scores
from experiments.chat_data import Example, Ledger
from sbr_jax.data import TokenDataset, leaks
from sbr_jax.evaluation import KeywordJudge, tasks
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.sandbox import kernel_isolation
from sbr_jax.methods.risk import JudgeError
from sbr_jax.typing import UserError

DOMAINS = ("medical", "legal", "code")
needs_kernel = pytest.mark.skipif(
    not kernel_isolation(), reason="no kernel filter on this machine"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and a data folder."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_chat.save_data(folder / "data")
    tiny_chat.save_model(folder / "model")
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """The same, to be damaged."""
    for name in ("data", "model"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def build(folder, domains=DOMAINS, **options):
    return chat.build_study(
        domains,
        model_folder=folder / "model",
        data_folder=folder / "data",
        **{"weights": False, **tiny_chat.SIZES, **options},
    )


@pytest.fixture(scope="module")
def study(world):
    return build(world)


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


def prompts(data):
    """The tokens before each answer."""
    rows = zip(data.tokens, data.mask, strict=True)
    return {tuple(tokens[: int(np.argmax(mask > 0))]) for tokens, mask in rows}


# --- data -----------------------------------------------------------------------------


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
    with pytest.raises(UserError, match=r"calibration/harmbench: [123].*drop_overlaps"):
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
    study = build(copy, measures=("harmbench", "beavertails"))
    assert study.notes["data"]["left out"]["harmful/beavertails"] == 1
    assert len(study.harmful) == 2


def test_a_ledger_agrees_with_the_slow_way_and_notices_what_is_left():
    rng = np.random.default_rng(1)
    pools = {
        name: [Example(f"{p}!", "a", "g") for p in rng.integers(0, 40, 30)]
        for name in ("a", "b", "c")
    }
    measured = {"m": [str(p) for p in rng.integers(0, 40, 8)]}
    ledger = Ledger(measured, drop_overlaps=True)
    taken = {name: ledger.take(name, name, pool, 9) for name, pool in pools.items()}
    assert all(len(part) <= 9 for part in taken.values())
    shared = leaks.shared({**taken, **measured})
    assert set(shared.values()) == {0}
    assert ledger.check([]).keys() == {f"{a}/{b}" for a, b in map(_split, shared)}
    lost = {key: n for key, n in leaks.shared({**pools, **measured}).items() if n}
    assert ledger.dropped["a/m"] == lost["a/m"]
    # The same draw again; a part without anything left is refused.
    again = Ledger(measured, drop_overlaps=True).take("a", "a", pools["a"], 9)
    assert again == taken["a"]
    with pytest.raises(UserError, match="all of them in other sets"):
        ledger.take("d", "d", [Example(p, "a", "g") for p in measured["m"]], 5)
    ledger.sets["e"] = {leaks.normalised(measured["m"][0])}
    with pytest.raises(UserError, match="e/m: 1"):
        ledger.check([])


def _split(pair):
    return pair.split("/")


def test_options_are_read_off_a_task_and_free_text_has_none():
    letters = [Example(f"q{i}", f"{'ABCD'[i % 4]}. x{i}", "med") for i in range(8)]
    labels = [Example(f"l{i}", ("Yes", "No")[i % 2], "law") for i in range(6)]
    free = [Example(f"f{i}", f"answer {i}", "code") for i in range(6)]
    pool = [*letters, *labels, *free]
    items = chat_data.questions(pool, pool)
    assert [i.choices for i in items] == [tuple("ABCD")] * 8 + [("No", "Yes")] * 6
    assert [i.choices[i.answer] for i in items[:4]] == list("ABCD")
    assert items[8].choices[items[8].answer] == "Yes"
    # An answer that its task does not have is not counted as another one.
    odd = Example("l?", "Maybe", "law")
    assert chat_data.questions([odd], pool) == []


def test_the_fingerprint_is_of_data_and_weights_and_not_of_hardware(world, copy, study):
    assert build(world, generation_batch=2, remat=False).fingerprint == (
        study.fingerprint
    )
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
    with pytest.raises(UserError, match=f"study.{option}: expected a checkpoint"):
        fingerprint("no where")


def test_tensors_that_the_configuration_does_not_name_are_refused(copy):
    path = copy / "model/model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file({**load_file(path), name: np.zeros(16, np.float32)}, path)
    with pytest.raises(UserError, match=f"extra {name}"):
        build(copy, ("code",))


def test_a_measurement_of_several_sets_is_related_to_each_of_them():
    measured = {"refusal-auc": ["one", "two"], "bbq": ["three"]}
    rows = [Example(p, "a", "g") for p in ("one", "three", "four")]
    ledger = Ledger(measured)
    control = ledger.take("benign control", "alpaca", rows, 5)
    assert {row.prompt for row in control} == {"three", "four"}
    assert ledger.dropped == {"benign control/refusal-auc": 1}
    # What only happens to share a prompt does not give way: the run is refused.
    with pytest.raises(UserError, match="benign control/bbq: 1"):
        ledger.check([])
    assert len(Ledger(measured).take("train code", "codealpaca", rows, 5)) == 3


@needs_kernel
def test_code_that_is_run_is_compared_recorded_and_in_the_fingerprint(copy):
    shutil.rmtree(copy / "model")
    config = dataclasses.replace(tiny_chat.CONFIG, context=640)
    tiny_chat.save_model(copy / "model", config=config)
    study = build(copy, ("code",), allow_code=True)
    assert study.leak_check["train code/humaneval"] == 0
    assert (
        study.notes["measurements"]["humaneval"]["items"] == study.asked["humaneval"][0]
    )
    without = build(copy, ("code",))
    assert "humaneval" not in without.notes["measurements"]
    assert without.fingerprint != study.fingerprint
    path = copy / "data/codealpaca/code_alpaca_2k.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["instruction"] = tiny_data.HUMANEVAL[0]["prompt"]
    put(path, as_json(rows))
    with pytest.raises(UserError, match="train code/humaneval: 1"):
        build(copy, ("code",), allow_code=True, train=22, held_out=1)


@needs_kernel
def test_room_for_an_answer_is_that_of_the_measurement_and_after_the_system(world):
    asked = {"humaneval": tasks.humaneval, "gsm8k": tasks.gsm8k}
    asked["mtbench"] = tasks.write_mtbench
    for name, task in asked.items():
        default = inspect.signature(task).parameters["max_new_tokens"].default
        assert chat_parts.OWN_LENGTH[name] == default, name
    with pytest.raises(UserError, match=r"humaneval: .* 0 tokens .*96 less 512"):
        build(world, ("code",), allow_code=True)
    # The prompts alone are short enough to need no counting.
    with pytest.raises(UserError, match="harmbench: expected prompts of at most 88"):
        build(world, ("code",), system="w1 " * 84, max_length=96)


# --- scores ---------------------------------------------------------------------------


def test_choices_are_scored_by_the_likeliest_option():
    items = chat_data.questions(
        [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)],
        [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)],
    )

    def runner(right):
        asked = types.SimpleNamespace(describe=dict)
        asked.log_likelihoods = lambda prompts, options: [
            np.array([float((i % 2 == j) == right) for j in range(2)])
            for i in range(len(prompts))
        ]
        return lambda base, adapter: asked

    assert domain_scores.choice_accuracy(items, runner(True))(None, None) == 100.0
    assert domain_scores.choice_accuracy(items, runner(False))(None, None) == 0.0


def test_token_accuracy_equals_a_loop_over_the_answers():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, (7, 6)).astype(np.int32)
    mask = (rng.random((7, 6)) < 0.5).astype(np.float32)
    logits = rng.normal(size=(8, 6, 5)).astype(np.float32)

    def apply_fn(base, adapter, given):
        # The same logits for the same row, however rows are batched.
        return base[given[:, 0]]

    tokens[:, 0], mask[:, 0] = np.arange(7) + 1, 0.0
    tokens[3, 1:] = logits[4, :-1].argmax(-1)
    right = [
        logits[row[0], t - 1].argmax() == row[t]
        for row, kept in zip(tokens, mask, strict=True)
        for t in range(1, 6)
        if kept[t]
    ]
    score = domain_scores.TokenAccuracy(apply_fn, TokenDataset(tokens, mask), 3)
    assert score(logits, None) == pytest.approx(100 * np.mean(right), abs=1e-4)


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
    place = str(world / "model")
    guard = chat_model.make_judge("llama-guard", place, dtype="float32")
    assert guard.describe()["refusal_means"] == "not harmful"
    rate = chat_model.risk_judge(guard, study.model.tokenizer)
    # A random model gives its labels no mass: nothing is made up in their place.
    with pytest.raises(JudgeError, match="one of the two labels"):
        rate(study.harmful)
    with pytest.raises(UserError, match="keyword, keyword:LIST, llama-guard"):
        chat_model.make_judge("lama", None, dtype="float32")
    found = chat_model.make_judge("keyword:jbb12", None, dtype="float32")
    assert found == KeywordJudge("jbb12")
