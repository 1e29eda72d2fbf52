"""Broken model folders: one line that names the file, or the very same model."""

import dataclasses
import json
import math
import shutil
import signal
import time

import broken_models as broken
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
from broken_models import OTHER, REFUSED, SAME, Case
from checkpoints import CONFIG, adapter
from safetensors.numpy import load_file, save_file
from trees import same

from sbr_jax import models
from sbr_jax.models import config, hf_config
from sbr_jax.models.codes import KINDS
from sbr_jax.models.peft import save_peft
from sbr_jax.programs import run
from sbr_jax.typing import UserError

LONGEST = 20.0
FIELDS = [*broken.wrong_fields(), *broken.valid_fields()]
RNG = np.random.default_rng(0)
FOLDERS = [
    *(FIELDS[i] for i in RNG.choice(len(FIELDS), 8, replace=False)),
    *broken.valid_fields(),
    *broken.files(),
    *broken.tokenizers(),
    *broken.weights(RNG),
    *broken.shards(),
]
ADAPTERS = list(broken.adapters())


class Hang(BaseException):
    """Nothing that reads a file may catch this."""


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*args):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def good(folder):
    return models.load(folder)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_peft(folder, CONFIG, adapter(targets="(q|o)_proj"))
    return folder


def equal(one, two):
    try:
        same(one, two)
    except AssertionError:
        return False
    return True


def damaged(case, source, place):
    shutil.copytree(source, place, symlinks=True)
    case.damage(place)
    return place


def judge(case, load, equals):
    """Loads, and holds the outcome against the verdict of the case."""
    start = time.monotonic()
    try:
        found = load()
    except UserError as error:
        outcome, said = REFUSED, str(error)
        assert "\n" not in said
        assert case.file in said
        assert len(said) < 1000
    else:
        outcome = SAME if equals(found) else OTHER
    assert time.monotonic() - start < LONGEST
    expected = (REFUSED, SAME) if case.verdict is None else (case.verdict,)
    assert outcome in expected


def same_model(found, good):
    """Equal settings have one function, so with equal weights all logits are equal."""
    words = found.tokenizer
    return (
        found.apply_fn is good.apply_fn
        and equal(found.params, good.params)
        and words.get_vocab() == good.tokenizer.get_vocab()
        and words.chat_template == good.tokenizer.chat_template
    )


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.name)
def test_a_broken_folder_is_refused_in_one_line_or_the_same_model(
    case, folder, good, tmp_path
):
    place = damaged(case, folder, tmp_path / "model")
    judge(case, lambda: models.load(place), lambda found: same_model(found, good))


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.name)
def test_a_broken_adapter_is_refused_in_one_line_or_the_same(
    case, pair_folder, tmp_path
):
    place = damaged(case, pair_folder, tmp_path / "pair")
    wanted = models.load_peft(pair_folder, CONFIG)
    judge(
        case,
        lambda: models.load_peft(place, CONFIG),
        lambda found: equal(found, wanted),
    )


def test_no_field_may_have_a_wrong_value(folder, tmp_path):
    good = hf_config.read(folder)
    for case in FIELDS:
        for name in ("config.json", "generation_config.json"):
            shutil.copy(folder / name, tmp_path)
        case.damage(tmp_path)
        judge(case, lambda: hf_config.read(tmp_path), lambda found: found == good)


# --- finite, by every way in ----------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_weights_that_are_not_finite_are_refused_dense_and_in_codes(
    kind, folder, tmp_path
):
    places = {broken.NAME: np.nan, "model.norm.weight": np.inf}
    for number, (place, wrong) in enumerate(places.items()):
        case = Case("", broken.tensors(broken.value(wrong, place)), REFUSED)
        damaged(case, folder, tmp_path / f"{number}")
        with pytest.raises(UserError, match=rf"{place} in .*model\.safetensors holds"):
            models.load(tmp_path / f"{number}", quantize=kind)


def test_weights_that_a_dtype_cannot_hold_are_refused(folder, tmp_path):
    case = Case("", broken.tensors(broken.value(1e30)), OTHER)
    damaged(case, folder, tmp_path / "model")
    models.load(tmp_path / "model", dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"not finite \(as float16"):
        models.load(tmp_path / "model", dtype=jnp.float16)
    for dtype in ("int8", "float33", jnp.float8_e4m3fn):
        with pytest.raises(UserError, match="dtype: expected float32"):
            models.load(folder, dtype=dtype)


ADAPTER_DAMAGES = {
    "nan": lambda t: t["q_proj.lora_a"].put(3, np.nan),
    "infinite": lambda t: t["q_proj.lora_b"].put(3, np.inf),
    "integers": lambda t: t.update({k: v.astype(np.int8) for k, v in t.items()}),
    "rank": lambda t: t.update({"q_proj.lora_a": t["q_proj.lora_a"][..., :1].copy()}),
    "flat": lambda t: t.update({"q_proj.lora_a": t["q_proj.lora_a"].reshape(-1)}),
}


@pytest.mark.parametrize("change", ADAPTER_DAMAGES.values(), ids=ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_refused(change, tmp_path):
    path = tmp_path / "adapter.safetensors"
    models.save_adapter(path, adapter(targets="q_proj"))
    found = load_file(path)
    change(found)
    scales = json.dumps({"q_proj": 2.0})
    save_file(found, path, {"format": "sbr_jax.adapter", "scales": scales})
    with pytest.raises(UserError, match=r"adapter\.safetensors"):
        models.load_adapter(path)


@pytest.mark.parametrize(
    "scales", [None, "", "[]", "7", '{"q_proj": "2"}', '{"q_proj": NaN}', "[" * 10**5]
)
def test_scales_of_another_kind_are_refused(scales, tmp_path):
    path = tmp_path / "adapter.safetensors"
    models.save_adapter(path, adapter(targets="q_proj"))
    metadata = {"format": "sbr_jax.adapter"} | ({"scales": scales} if scales else {})
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match=r"adapter\.safetensors"):
        models.load_adapter(path)


def test_settings_made_in_memory_are_checked_too():
    for name in sorted(config.FIELDS):
        for value in ("text", -2, math.nan, [[1]], {}):
            with pytest.raises(UserError, match=f"wrong model settings: {name}="):
                dataclasses.replace(CONFIG, **{name: value})


def test_an_adapter_of_no_rank_is_not_made():
    right = {"rank": 2, "alpha": 4.0}
    wrong = {
        "rank": (0, True, 2.5, "2", 10**9),
        "alpha": (math.nan, math.inf, "4", None),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(UserError, match=f"wrong adapter settings: {name}="):
                models.init_adapter(jax.random.key(0), CONFIG, **{**right, name: value})


# --- the command line -----------------------------------------------------------------


def complaint(capsys, *arguments):
    assert run.main([*arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


LINES = {
    "deep": (broken.written("config.json", broken.DEEP), "config.json"),
    "NaN weight": (broken.tensors(broken.value(math.nan)), "model.safetensors"),
    "no tokenizer": (broken.gone("tokenizer.json"), "tokenizer.json"),
}


@pytest.mark.parametrize(("damage", "said"), LINES.values(), ids=LINES)
def test_a_program_says_it_in_one_line(damage, said, folder, tmp_path, capsys, request):
    place = damaged(Case("", damage, REFUSED), folder, tmp_path / "model")
    workdir = tmp_path / "run"
    arguments = ("--model", str(place), "--workdir", str(workdir))
    assert said in complaint(capsys, "testbed", *arguments)
    if "weight" not in request.node.name:  # Which a dry run does not read.
        arguments = (*arguments, "--data", str(tmp_path), "--dry-run")
        assert said in complaint(capsys, "llama2-7b", *arguments)
    assert not workdir.exists()
