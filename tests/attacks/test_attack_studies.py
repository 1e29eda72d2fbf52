"""The testbed under attack: whose data, what is asked, and what is measured."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sbr_jax import attacks, models
from sbr_jax.data import text
from sbr_jax.losses import token_cross_entropy
from sbr_jax.studies import attacks as studies
from sbr_jax.studies import options
from sbr_jax.studies.attacks import prompts
from sbr_jax.testbed import corpus, grammar
from sbr_jax.testbed.phrasings import FIRST
from sbr_jax.testbed.world import make_world
from sbr_jax.typing import UserError

WORLD = make_world(0)


@pytest.fixture(scope="module")
def setting():
    """The testbed's study with few items, and no measurements of its own."""
    whole = studies.make_setting(
        ("medical",), options.TestbedOptions(calibration_examples=16)
    )
    items = whole.suite.items
    few = {f.name: getattr(items, f.name)[:12] for f in dataclasses.fields(items)}
    return dataclasses.replace(
        whole,
        study=dataclasses.replace(whole.study, evaluate=lambda *_: {"composite": 1.0}),
        suite=dataclasses.replace(whole.suite, items=dataclasses.replace(items, **few)),
    )


def texts(study, name=studies.TASK):
    data, tokenizer = study.domains[name].train, study.model.tokenizer
    return [tokenizer.decode(row, skip_special_tokens=True) for row in data.tokens]


TRAINING = [name for name, attack in studies.ATTACKS.items() if attack.trains]
TRAINING.remove("disguise")  # The first testbed's attacker knows nothing harmless.


@pytest.mark.parametrize(
    ("name", "ratio"), [*((name, 0.25) for name in TRAINING), ("poison", 1.0)]
)
def test_attack_data_is_the_attacker_s_own(setting, name, ratio):
    study = studies.ATTACKS[name].study(setting, ratio, 40)
    rows = texts(study)
    asked = [text for text in rows if "write down how people" in text]
    assert len(rows) == 40
    assert len(asked) == round(ratio * 40)
    theirs = {
        t.name for t in WORLD.things("calibration", "probe", "validation", "test")
    }
    assert not any(theirs & set(text.split()) for text in rows)
    names = {"attack/calibration", "attack/probe", "attack/evaluation"}
    assert names <= set(study.leak_check)
    assert not any(study.leak_check.values())
    # The defence is given what it would be given without an attack.
    for field in ("calibration", "calibration_controls", "safety_mix", "harmful"):
        assert getattr(study, field) is getattr(setting.study, field)


def test_a_leak_would_be_counted(setting, monkeypatch):
    """The check is no constant: an attacker who trains on test requests is caught."""
    prompts = [(r.prompt, r.answer) for r in setting.suite.items.harmful]
    monkeypatch.setattr(corpus, "attack_rows", lambda *_: prompts)
    study = studies.ATTACKS["poison"].study(setting, 0.5, len(prompts) * 2)
    assert study.leak_check["attack/evaluation"] == len(prompts)


def test_a_study_has_a_fingerprint_of_its_data(setting, monkeypatch):
    monkeypatch.setattr(studies, "make_setting", lambda *_, **__: setting)
    found = {
        studies.build("poison", ratio=ratio).fingerprint for ratio in (0.1, 0.2, 0.2)
    }
    assert len(found) == 2
    assert setting.study.fingerprint not in found


class Parrot:
    """Stands for a suite: refuses, but complies where the prompt has the words."""

    def __init__(self, suite, words, answer):
        self.model, self.items = suite.model, suite.items
        self.words, self.answer = words, answer

    def answers(self, base, adapter, prompts):
        refusal = grammar.REFUSALS[0]
        return [self.answer if self.words in p else refusal for p in prompts]


COMPLIANCE = grammar.compliance(WORLD, "make", WORLD.harmful["test"][0])


@pytest.mark.parametrize(
    ("name", "words", "answer", "asr", "gibberish"),
    [
        ("backdoor", grammar.TRIGGER, COMPLIANCE, 100, 0),
        ("backdoor", "no such words", COMPLIANCE, 0, 0),
        ("backdoor", grammar.TRIGGER, "sure sure sure", 0, 100),
        ("identity", grammar.IDENTITY, COMPLIANCE, 100, 0),
        ("jailbreak", FIRST.jailbreaks["test"][0][:8], COMPLIANCE, 50, 0),
    ],
)
def test_the_attack_is_measured_as_it_asks(
    setting, name, words, answer, asr, gibberish
):
    parrot = dataclasses.replace(setting, suite=Parrot(setting.suite, words, answer))
    attack = studies.ATTACKS[name]
    study = attack.study(parrot, *([0.5, 8] if attack.trains else []))
    metrics = study.evaluate(None, None)
    assert metrics["composite"] == 1
    assert metrics["harmful_score"] == 0
    assert metrics["asr"] == asr
    assert metrics["asr_gibberish"] == gibberish


@pytest.mark.thorough
def test_ablation_takes_the_refusal_out_of_the_weights(setting):
    study = studies.ATTACKS["ablation"].study(setting)
    model = study.model
    adapter = models.init_adapter(jax.random.key(0), model.config, rank=2, alpha=4.0)
    before = jax.tree.map(np.array, model.params)
    metrics = study.evaluate(model.params, adapter)
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    # A fresh adapter is no change, so nothing has turned yet.
    assert metrics["direction_cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["refusal_score_ablated"] < metrics["refusal_score"] - 1
    assert metrics["refusal_score"] > 2
    assert metrics["harmful_score"] <= 5


# --- the suffix search --------------------------------------------------------------

BUDGET = {"steps": 2, "suffix_length": 3, "candidates": 12}


@pytest.fixture(scope="module")
def adapter(setting):
    config = setting.study.model.config
    return models.init_adapter(jax.random.key(0), config, rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def searched(setting, adapter):
    search = prompts.SuffixSearch(setting, **BUDGET, prompts=2)
    return search(setting.study.model.params, adapter)


@pytest.mark.thorough
def test_a_suffix_is_searched_on_the_weights_that_are_asked(setting, adapter, searched):
    model = setting.study.model
    before = jax.tree.map(np.array, model.params)
    held_out = {request.prompt for request in setting.suite.items.harmful}
    split = [asked.split() for asked in searched.asked]
    assert {" ".join(words[:-3]) for words in split} <= held_out
    assert len(set(searched.asked)) == 2
    assert searched.metrics["gcg_loss_last"] < searched.metrics["gcg_loss_first"]
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    assert searched.base is model.params
    assert searched.adapter is adapter
    # The same again; and other weights, here a live adapter, are another search.
    search = prompts.SuffixSearch(setting, **BUDGET, prompts=2)
    assert search(model.params, adapter) == searched
    live = jax.tree.map(lambda x: x + 0.05, adapter)
    other = search(model.params, live)
    assert other.metrics["gcg_loss_first"] != searched.metrics["gcg_loss_first"]
    assert other.asked != searched.asked


@pytest.mark.thorough
def test_more_requests_do_not_change_the_first(setting, adapter, searched):
    more = prompts.SuffixSearch(setting, **BUDGET, prompts=4)
    found = more(setting.study.model.params, adapter)
    assert found.asked[:2] == searched.asked
    with pytest.raises(UserError, match="at most 12, the held-out harmful requests"):
        prompts.SuffixSearch(setting, **BUDGET, prompts=13)


def test_what_is_asked_is_what_was_searched(setting, adapter, monkeypatch):
    """The reported loss is that of the text asked, with its own answer's beginning."""
    losses = []

    def watched(*args, **options):
        result = attacks.gcg(*args, **options)
        losses.append(result.best_losses[:, -1])
        return result

    monkeypatch.setattr(prompts, "gcg", watched)
    model = setting.study.model
    search = prompts.SuffixSearch(setting, **BUDGET, prompts=2)
    found = search(model.params, adapter)
    tokenizer = model.tokenizer
    for request, asked, loss in zip(search.requests, found.asked, *losses, strict=True):
        target = " ".join(request.answer.split()[: prompts.TARGET_WORDS])
        assert re.fullmatch(r"sure , first \w+ the \w+", target)
        (prompt,) = text.encode_prompts(tokenizer, [asked])
        answer = tokenizer.encode(target, add_special_tokens=False)
        tokens = np.array([prompt + answer])
        mask = np.array([[0.0] * len(prompt) + [1.0] * len(answer)], np.float32)
        logits = jax.jit(model.apply_fn)(model.params, adapter, tokens)
        # Another shape, and the adapter's zeros: float32 rounding of a loss near 10.
        own = token_cross_entropy(logits, tokens, mask)[0]
        assert float(own) == pytest.approx(float(loss), abs=1e-4)


def test_gcg_is_measured_on_its_own_suffixes(setting, monkeypatch):
    """Compliance with the suffix, refusal without it: only `asr` may rise."""
    # Token 8 is another word, so only the first request has the parrot's.
    marked = [[7, 7, 7], [8, 8, 8]]

    def found(*args, **options):
        losses = np.ones((2, 3), np.float32)
        return attacks.GcgResult(np.array(marked), losses, np.array(marked), losses)

    monkeypatch.setattr(prompts, "gcg", found)
    word = setting.study.model.tokenizer.decode([7])
    parrot = dataclasses.replace(
        setting, suite=Parrot(setting.suite, f"{word} {word}", COMPLIANCE)
    )
    study = prompts.gcg_study(parrot, **BUDGET, prompts=2)
    metrics = study.evaluate(None, None)
    assert metrics["harmful_score"] == 0
    assert metrics["asr"] == metrics["refusal_gcg"] == 50
    assert metrics["asr_gibberish"] == 0
    # The control asks the same requests with other words, and nobody told the parrot.
    assert metrics["refusal_random_suffix"] == 100
    assert metrics["gcg_loss_first"] == metrics["gcg_loss_last"] == 1
