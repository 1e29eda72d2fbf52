"""A study whose template reads the clock, sets thoughts, or ends nothing."""

import datetime
import json
import types
from typing import Any

import jax
import numpy as np
import pytest
import tiny_chat
from chat_case import SMALL, build, copy_world, flags, save_world
from tiny_data import as_json, put

from sbr_jax.data import template
from sbr_jax.programs import analyse, export, run
from sbr_jax.settings import Training
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import ChatOptions, StoriesOptions, recorded
from sbr_jax.typing import UserError

DATED = tiny_chat.TEMPLATE.replace(
    "{{ bos_token }}", "{{ bos_token }} w{{ strftime_now('%d') | int }}"
)
THINKING = tiny_chat.TEMPLATE.replace(
    "{% else %} {{ m['content'] }}",
    "{% else %}{% if enable_thinking is not defined or not enable_thinking %}"
    " think{% endif %} ok : {{ m['content'] }}",
)
QUICK = [
    *flags("training", {"steps_per_domain": 1, "batch_size": 2, "lora_rank": 1}),
    *("--hardware.accumulation", "1", "--study.dtype", "float32"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("dated"), DATED)


@pytest.fixture
def copy(world, tmp_path):
    return copy_world(world, tmp_path)


@pytest.fixture
def today(monkeypatch):
    """Sets the day, as a new process on that day would see it."""

    def move(text):
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(text)

        fake = types.SimpleNamespace(date=Date, datetime=datetime.datetime)
        monkeypatch.setattr(template, "datetime", fake)
        template.process_date.cache_clear()

    yield move
    template.process_date.cache_clear()


def command(world, workdir, *more):
    return [
        "llama2-7b",
        *("--model", str(world / "model"), "--data", str(world / "data")),
        *("--workdir", str(workdir), "--methods", "plain"),
        *("--domains", "code", "--seed", "0", *more, *SMALL, *QUICK),
    ]


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.thorough
def test_the_next_day_continues_the_run_and_exports_it(world, tmp_path, today, capsys):
    today("2024-07-26")
    workdir = tmp_path / "run"
    assert run.main(command(world, workdir, "--quiet")) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["rendering"] == {"date": "2024-07-26"}
    assert "date" not in config["study"]
    before = files(workdir)
    today("2024-07-27")
    assert run.main(command(world, workdir, "--quiet")) == 0
    assert files(workdir) == before
    assert run.main(command(world, workdir, "--dry-run")) == 0
    out = tmp_path / "out"
    folders = ["--model", str(world / "model"), "--data", str(world / "data")]
    row = ["--workdir", str(workdir), "--variant", "plain", "--seed", "0"]
    assert (
        export.main(["llama2-7b", *row, *folders, "--output", str(out), "--quiet"]) == 0
    )
    assert (out / "adapter_config.json").is_file()
    # Another day is another run, and is told.
    capsys.readouterr()
    other = command(world, workdir, "--quiet", "--study.date", "2024-08-01")
    assert run.main(other) == 2
    assert "rendering.date" in capsys.readouterr().err


def test_a_study_has_one_date(world, today):
    today("2024-07-26")
    first = build(world, ("code",))
    day = first.model.tokenizer.convert_tokens_to_ids("w26")
    for data in (first.calibration, first.harmful, first.domains["code"].train):
        assert (data.tokens[:, 1] == day).all()
    today("2024-07-27")
    assert build(world, ("code",)).fingerprint != first.fingerprint
    again = build(world, ("code",), date="2024-07-26")
    assert again.fingerprint == first.fingerprint
    assert again.notes["rendering"] == {"date": "2024-07-26"}


def test_a_template_without_a_date_records_none(copy):
    tiny_chat.save_model(copy / "model")
    study = build(copy, ("code",))
    assert "rendering" not in study.notes
    assert build(copy, ("code",), date="2024-07-26").fingerprint == study.fingerprint
    assert dated(ChatOptions(), copy).date == template.process_date()
    assert "date" not in recorded(ChatOptions(date="2024-07-26"))
    assert dated(StoriesOptions(), copy) == StoriesOptions()


@pytest.mark.parametrize("name", ["config.json", "analysis.json"])
def test_the_date_of_a_folder_is_kept(tmp_path, name):
    record = {"rendering": {"date": "2001-02-03"}}
    whole = record if name == "config.json" else {"of": record}
    put(tmp_path / name, as_json(whole))
    told = ChatOptions(date="2024-07-26")
    assert dated(ChatOptions(), tmp_path).date == "2001-02-03"
    assert dated(told, tmp_path) == told
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="expected JSON in"):
        dated(ChatOptions(), tmp_path)


def test_analyses_of_a_folder_have_one_date():
    record = {"rendering": {"date": "2001-02-03"}}
    study = types.SimpleNamespace(fingerprint="f", notes={**record, "data": {}})
    job = types.SimpleNamespace(
        preset="p", config=types.SimpleNamespace(training=Training())
    )
    context: Any = types.SimpleNamespace(job=job, study=study)
    assert analyse.identity(context)["rendering"] == record["rendering"]


def test_stops_beyond_the_configuration_are_in_the_fingerprint(copy):
    before = build(copy, ("code",), date="2024-07-26").fingerprint
    path = copy / "model/generation_config.json"
    found = json.loads(path.read_text())
    for stops in ([7], [2, 8], [2, 7]):
        path.write_text(json.dumps({**found, "eos_token_id": stops}))
        after = build(copy, ("code",), date="2024-07-26").fingerprint
        assert after != before
        before = after


def test_rows_with_control_tokens_are_counted(copy):
    path = copy / "data/alpaca/alpaca_5000.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["output"] += " </s> w1"
    put(path, as_json(rows))
    study = build(copy, ("code",), date="2024-07-26")
    size = study.notes["data"]["sizes"]["benign control"]
    assert study.notes["data"]["control tokens"] == {"benign control": size}
    control = study.calibration_controls["benign"]
    assert (control.tokens == 2).sum() == size  # the ends alone
    assert np.isin(control.tokens[control.mask > 0], [2]).sum() == size


def test_thinking_is_an_option_of_the_study(copy):
    tiny_chat.save_model(copy / "model", THINKING)
    default = build(copy, ("code",))
    studies = [build(copy, ("code",), thinking=on) for on in (False, True)]
    assert studies[0].fingerprint == default.fingerprint
    assert studies[1].fingerprint != default.fingerprint
    assert jax.tree.leaves(default.model.params) == []
