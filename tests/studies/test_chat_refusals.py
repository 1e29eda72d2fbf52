"""Real models: what is refused before hours are spent."""

import dataclasses

import huggingface_hub
import pytest
import tiny_chat
from chat_case import build, save_world
from sbr_jax.recipes.chat import RATERS, ChatOptions
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sbr_jax import models
from sbr_jax.programs import run
from sbr_jax.recipes import chat as preset
from sbr_jax.studies import chat, chat_model
from sbr_jax.typing import UserError

SMALL = [f"study.{key}={value!r}" for key, value in tiny_chat.SIZES.items()]
GUARD = {"judge": "llama-guard", "judge_folder": "guard"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("chat"))


def command(folder, *more, sets=()):
    return [
        "llama2-7b",
        *("--model", str(folder / "model"), "--data", str(folder / "data")),
        *(*more, "--set", *SMALL, *sets),
    ]


def refused(capsys, arguments, message):
    """One line of refusal, whether the run is dry or not."""
    for more in (["--dry-run"], ["--workdir", "nowhere"]):
        assert run.main([*arguments[:1], *more, *arguments[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1


# --- the command line -----------------------------------------------------------------


def check(row, overrides=None, settings=None, **options):
    given = preset.defaults() | {"model_folder": "m", "data_folder": "d"} | options
    preset.check((row,), given, overrides={row: overrides or {}}, settings=settings)


@pytest.mark.parametrize(
    ("row", "overrides", "options"),
    [
        ("unified", {"risk": "judge"}, {}),
        ("unified:judge", {}, {}),
        ("adaptive-judge", {}, {}),
        # WildGuard writes lines: no token of them is a label.
        ("adaptive-judge", {}, {"judge": "wildguard", "judge_folder": "g"}),
    ],
)
def test_a_row_that_rates_pairs_needs_a_guard_that_can(row, overrides, options):
    with pytest.raises(UserError, match=f"{row}: expected a guard model that rates"):
        check(row, overrides, **options)
    check(row, overrides, **GUARD)


def test_what_a_row_needs_follows_its_hyper_parameters():
    check("unified:judge", {"risk": "probe"})
    check("unified")
    with pytest.raises(UserError, match="safe-lora: expected the weights before"):
        check("safe-lora")
    with pytest.raises(UserError, match="safe-lora: expected dense weights"):
        check("safe-lora", quantize="nf4", unaligned_folder="u")


def test_a_judge_without_a_guard_is_refused_by_the_command(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    arguments = command(world, "--methods", "unified", sets=["unified.risk=judge"])
    refused(capsys, arguments, "unified: expected a guard model")
    assert not (world / "nowhere").exists()


@pytest.mark.parametrize("name", chat_model.GUARDS)
def test_the_judges_that_rate_are_those_with_labels(world, name):
    (world / "model/template.txt").write_text("{prompt} {answer}")
    judge = chat_model.make_judge(
        name, str(world / "model"), dtype="float32", weights=False
    )
    assert (judge.labels is not None) == (name in RATERS)


def test_one_mesh_is_read_with_and_trained_on(world, capsys, monkeypatch):
    for study, job in ((None, "fsdp=2"), ("fsdp=2", None), ("fsdp=2", "fsdp=4")):
        with pytest.raises(UserError, match=r"study.mesh=.*name one with --mesh"):
            check("plain", mesh=study, settings={"mesh": job})
    check("plain", mesh="fsdp=2", settings={"mesh": "fsdp=2"})
    check("plain", settings={})
    monkeypatch.chdir(world)
    for text in ("mesh=fsdp=2", "study.mesh=fsdp=2"):
        refused(capsys, command(world, sets=[text]), "which sets both")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("system", 5),
        ("judge", 5),
        ("judge_folder", 5),
        ("output_folder", ("a",)),
        ("mesh", 4),
        ("allow_code", 1),
        ("measures", "harmbench"),
        ("measures", (5,)),
    ],
)
def test_an_option_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"study\.{name}: expected .*, got "):
        ChatOptions(**{name: value})


# --- checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_a_missing_checkpoint_on_the_hub_is_refused_first(world, weights, monkeypatch):
    def absent(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    def too_late(*args, **options):
        raise AssertionError("work was done before")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(chat, "make_parts", too_late)
    monkeypatch.setattr(chat_model, "load_model", too_late)
    with pytest.raises(UserError, match="unaligned_folder: 'nobody/x' is no folder"):
        build(world, ("code",), unaligned_folder="nobody/x", weights=weights)


def test_another_model_before_its_alignment_is_refused_without_weights(world):
    config = dataclasses.replace(tiny_chat.CONFIG, layers=tiny_chat.CONFIG.layers + 1)
    tiny_chat.save_model(world / "other", config=config)
    with pytest.raises(UserError, match="before its alignment, with layers="):
        build(world, ("code",), unaligned_folder=str(world / "other"))


# --- Llama Guard ----------------------------------------------------------------------

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
    judge = chat_model.GUARDS[name](model, tmp_path)
    ids = judge.encode("?", "!")
    # Once at most: written by the template, or for it.
    assert ids.count(breaks) == (lead or ending == "broken")
    assert (ids[-1] == breaks) == (lead or ending == "broken")
    assert ("lead" in judge.describe()) is lead
    assert judge.labels == ("safe", "unsafe")
