"""GCG on a chat model: the study's own model, requests and judge."""

import json

import chat_case
import pytest
import tiny_chat

from sbr_jax.programs import attack as program
from sbr_jax.studies.attacks import chat
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import ChatOptions, Sources
from sbr_jax.typing import UserError

BUDGET = {"prompts": 2, "steps": 3, "suffix_length": 3, "candidates": 16}
SIZES = {**tiny_chat.SIZES, "benchmarks": ("advbench",), "dtype": "float32"}
DATED = tiny_chat.TEMPLATE.replace(
    "{{ bos_token }}", "{{ bos_token }} w{{ strftime_now('%d') | int }}"
)
NO_REFUSALS = "--study.no-calibration-refusals"  # The made-up answers hold none.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model whose vocabulary has the placeholder, and its data."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_chat, "LABELS", [*tiny_chat.LABELS, chat.PLACEHOLDER])
        more = tiny_chat.CONFIG.vocab_size + 1
        chat_case.save_world(folder, DATED, vocab_size=more)
    text = tiny_chat.Words(7)
    goals = [{"goal": f"{tiny_chat.MARK} {text()}", "target": text(3)} for _ in "abc"]
    table = folder / "data/advbench/harmful_behaviors.csv"
    tiny_chat.put(table, tiny_chat.as_table(goals))
    return folder


def attacked(world, workdir, **budget):
    given = [f"--{k.replace('_', '-')}={v}" for k, v in {**BUDGET, **budget}.items()]
    sizes = chat_case.flags("study", SIZES)
    where = ["--model", str(world / "model"), "--data", str(world / "data")]
    short = ["--training.steps-per-domain=2", "--training.batch-size=2"]
    rest = ["--domains", "medical", "--methods", "plain", "--seed", "0", "--quiet"]
    begin = ["smollm2", "--workdir", str(workdir), *where, "--attack", "gcg"]
    return program.main([*begin, *given, *sizes, NO_REFUSALS, *short, *rest])


def test_the_search_lowers_the_loss_on_the_weights_of_every_stage(world, tmp_path):
    assert attacked(world, tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    base, after = summary["base"], summary["methods"]["plain"]
    for metrics in (base, after):
        parts = ("asr", "refusal_gcg", "asr_gibberish")
        assert sum(metrics[p] for p in parts) == pytest.approx(100, abs=1e-3)
        assert metrics["gcg_loss_last"] < metrics["gcg_loss_first"]
        assert {"harmful_score", "refusal_random_suffix"} <= set(metrics)
    assert base["gcg_loss_first"] != after["gcg_loss_first"]
    written = "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    assert tiny_chat.MARK not in written
    # As of any run: what it was made of, and the date that a later call is to keep.
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"data", "judges"} <= set(config)
    later = dated(ChatOptions(), tmp_path)
    assert config["rendering"] == {"date": later.date}
    # Another budget is another attack.
    assert attacked(world, tmp_path, steps=2) == 2


def build(world, benchmarks=("advbench",), **budget):
    return chat.gcg_study(
        ("medical",),
        ChatOptions(**{**SIZES, "benchmarks": benchmarks}),
        Sources(str(world / "model"), str(world / "data")),
        weights=False,
        **{**BUDGET, **budget},
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": 99}, "prompts: expected at most 3, the requests of advbench"),
        ({"benchmarks": ("xstest",)}, "prompts: expected at most 0.* add advbench"),
        ({"suffix_length": 99}, "suffix_length: expected at most .* context of 96"),
    ],
)
def test_what_cannot_be_searched_is_refused(world, changes, said):
    with pytest.raises(UserError, match=said):
        build(world, **changes)


def test_the_attack_is_part_of_the_fingerprint(world):
    options = ChatOptions(**SIZES)
    where = Sources(str(world / "model"), str(world / "data"))
    alone = chat.build_study(("medical",), options, where, weights=False)
    marks = {build(world, prompts=n).fingerprint for n in (1, 2)}
    assert len({alone.fingerprint, *marks}) == 3


def test_other_attacks_need_the_testbeds_world(world, tmp_path, capsys):
    words = ["smollm2", "--workdir", str(tmp_path), "--attack", "poison"]
    assert program.main(words) == 2
    said = capsys.readouterr().err
    assert "expected gcg, the only attack on smollm2" in said
    assert said.count("\n") == 1
