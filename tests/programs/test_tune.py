"""`tune` on a user's files: what is refused, what is written, and that it goes on."""

import dataclasses
import functools
import json
import pathlib
import re
import stat

import gguf_case
import jax
import numpy as np
import pytest
import tiny_chat
from own_case import as_lines, messages, run, save, words, world_prompts, world_rows
from test_command_line import refused

import sbr_jax
from sbr_jax import errors, models, testbed, tuning
from sbr_jax.programs import align, tune
from sbr_jax.recipes.own import HYPERPARAMETERS, TRAINING
from sbr_jax.reporting import tuned as tuned_report
from sbr_jax.studies.chat import checkpoints
from sbr_jax.studies.options import OwnOptions
from sbr_jax.training import loop
from sbr_jax.typing import UserError

GOOD = [messages(*row) for row in world_rows(4)]
PAIRS = [{"instruction": f"w{i}", "output": "w1"} for i in range(4)]


def with_row(row, good=GOOD):
    return as_lines([*good[:2], row])


def lacking(row, column):
    return {name: value for name, value in row.items() if name != column}


NULL = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant"}]}
SYSTEM = {"messages": [{"role": "system", "content": "w9"}, *GOOD[0]["messages"]]}
BAD_FILES = {
    "a missing field": (
        "a.jsonl",
        with_row(lacking(PAIRS[0], "output"), PAIRS),
        r"a\.jsonl, row 3: expected 'output', as row 1 has it, got instruction",
    ),
    "no layout": (
        "a.jsonl",
        as_lines([{"title": "w1", "body": "w2"}]),
        r"a\.jsonl, row 1: expected the columns messages, .*; got title, body",
    ),
    "a null answer": (
        "a.jsonl",
        with_row(NULL),
        r"a\.jsonl, row 3, 'messages', message 2: expected a text, got nothing",
    ),
    "an empty cell": (
        "a.csv",
        "question,answer\nw1,w2\nw3,\n",
        r"a\.csv, row 2, column 'answer': expected a text, got a blank text",
    ),
    "UTF-16": (
        "a.jsonl",
        as_lines(GOOD).encode("utf-16"),
        r"a\.jsonl, got UTF-16 at line 1: save it as UTF-8",
    ),
    "another ending": ("a.doc", "text", r"csv, tsv, json, jsonl or parquet .*a\.doc"),
    "ends with the user": (
        "a.jsonl",
        with_row(messages("w1", "w2", "w3")),
        r"a\.jsonl, row 3: expected a conversation that ends with an answer",
    ),
}


NARROW = dataclasses.replace(TRAINING, lora_rank=8)
"""A rank that every projection of the next model holds."""
RANK = ("--training.lora-rank", "8")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A random chat model whose words are few."""
    return tiny_chat.save_model(tmp_path_factory.mktemp("chat") / "model")


def tried(folder, chat, capsys, *more):
    """The line of a refusal; nothing is written beside the files of the test."""
    before = sorted(folder.rglob("*"))
    output = ("--output", folder / "out", "--method", "plain", *RANK)
    line = refused(tune.main, ["--model", chat, *output, *more], capsys)
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_and_nothing_is_written(kind, chat, tmp_path, capsys):
    name, text, expected = BAD_FILES[kind]
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    line = tried(tmp_path, chat, capsys, "--train", tmp_path / name)
    assert_matches(expected, line)


def assert_matches(expected, line):
    with pytest.raises(UserError, match=expected):
        raise UserError(line)


TAKES_NONE = "{% for m in messages %}{% if m['role'] == 'system' %}{% else %}"
TAKES_NONE = tiny_chat.TEMPLATE.replace("{% for m in messages %}", TAKES_NONE).replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)


def test_a_template_that_takes_no_system_turn_is_told(tmp_path, capsys):
    model = tiny_chat.save_model(tmp_path / "model", TAKES_NONE)
    capsys.readouterr()  # What transformers says where this test is the first.
    path = tmp_path / "my.jsonl"
    path.write_text(as_lines([SYSTEM, *GOOD]))
    expected = r"my\.jsonl, row 1: expected a chat template with a place for a"
    assert_matches(expected, tried(tmp_path, model, capsys, "--train", path))


BAD_WORDS = {
    "--method safegrat": r"^unknown method 'safegrat'; nearest: safegrad[^()]* "
    r"\(\d+ are known: sbr-jax run --list shows them\)$",
    "--study.judge lama-guard": r"unknown study.judge 'lama-guard'; nearest: "
    r"llama-guard.*known: keyword, ",
    "--epochs 1e9": r"epochs.*in \(0, 1000\], got 1000000000\.0; "
    r".*steps: --training.steps-per",
    f"--training.steps-per-domain {10**12}": r"training.steps_per_domain.*in "
    r"\[1, 2147483647\], got 1000000000000",
    "--harmful prompts.text": r"--harmful: expected a file \(\.txt, \.csv.*found no "
    r"'prompts\.text'",
    "--output my.jsonl/out": r"--output my\.jsonl/out: expected a folder, found the "
    r"file my\.jsonl",
    "--output /proc/sbr_jax/out": r"--output /proc/sbr_jax/out: expected a place that "
    r"can be written to",
    "--epochs 1 --training.steps-per-domain 4": r"expected --epochs or "
    r"--training.steps-per-domain, got both",
    "--method safegrad": r"--method safegrad: expected safe exchanges \(--safety FILE\)"
    r", or .*\(--harmful FILE\), got none; .*--method plain needs none",
    "--method sbr": r"sbr: expected harmful prompts",
    "--method antidote --merged": r"antidote: .*--study.pairs-file",
    "--method adaptive-judge": r"adaptive-judge: .*--study.judge ll",
    "--method lox": r"lox: .*add --merged",
    "--eval a b": r"--eval: expected one file, or as many as --train has \(1\), got 2",
    "--method sbr --harmful few.txt": r"--harmful: expected at least 8 different "
    r"prompts, .*got 2",
    "--method plain --training.lora-rank 999": r"lora_rank to be at most 8, the smal",
    "--method plain --training.lora-targets no": r"targets='no' matches no projection",
    "--method plain --hardware.mesh fsdp=64": r"mesh 'fsdp=64' needs 64 devices",
    "--method plain --hardware.mesh fspd=1": r"mesh 'fspd=1': expected axis=size",
    "--output used": r"--output used: expected a new or empty",
}


@pytest.mark.parametrize("more", BAD_WORDS)
def test_a_bad_command_line_is_one_line(more, chat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text(as_lines(GOOD))
    (tmp_path / "few.txt").write_text("w1\nw2\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    output = () if "--output" in more else ("--output", tmp_path / "out")
    rank = () if "lora-rank" in more else RANK
    line = ["--model", chat, *output, "--train", "my.jsonl", *rank, *more.split()]
    assert_matches(BAD_WORDS[more], refused(tune.main, line, capsys))
    assert sorted(tmp_path.rglob("*")) == before


COUNTS = {
    "one file": ([60], 8),
    "one small file": ([3], 3),
    "all as small": ([3, 3], 3),
    "one that is small": (
        [60, 1],
        "examples file1: expected at least 8 .*batch_size=1",
    ),
    "the first is small": (
        [7, 60],
        "examples file0: expected at least 8 .*batch_size=7",
    ),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_a_small_file_does_not_make_the_steps_of_others_small(kind):
    sizes, expected = COUNTS[kind]
    counts = {f"file{i}": size for i, size in enumerate(sizes)}
    if isinstance(expected, int):
        assert tuning.batch_of(counts, 8) == expected
    else:
        with pytest.raises(UserError, match=expected):
            tuning.batch_of(counts, 8)


def test_small_files_of_several_sizes_are_told():
    told = "examples b: 2 examples are fewer .* are of 2"
    with pytest.warns(UserWarning, match=told):
        assert tuning.batch_of({"a": 6, "b": 2, "c": 4}, 8) == 2


def test_a_file_of_fewer_rows_than_a_step_is_one_line(chat, tmp_path, capsys):
    rows = [messages(*row) for row in world_rows(12)]
    for name, part in (("long", rows), ("tiny", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text(as_lines(part))
    files = [tmp_path / f"{name}.jsonl" for name in ("long", "tiny")]
    line = tried(tmp_path, chat, capsys, "--train", *files)
    expected = "--train tiny: expected at least 8 examples .*got 1.*batch-size 1"
    assert_matches(expected, line)


PYTHON = {
    "a model that is none": ({"model": 5}, "expected model to be a folder, .*got 5"),
    "a number": ({"examples": 5}, "^examples: expected a file, .*list of rows, got"),
    "numbers": ({"examples": [5]}, "^examples, row 1: expected a dict, a pair .*got"),
    "triples": ({"examples": [("a", "b", "c")]}, "^examples, row 1: expected a dict"),
    "a blank answer": (
        {"examples": [("a", "b"), ("a", " ")]},
        "^examples, row 2, column 'answer': expected a text, got a blank text",
    ),
    "columns of numbers": ({"examples": [{1: "a"}]}, "^examples, row 1: expected"),
    "a list of methods": ({"method": ["plain"]}, "unknown method"),
    "words for epochs": ({"epochs": "3"}, "expected epochs to be a finite number"),
    "steps beside the default epochs": (
        {"training": dataclasses.replace(TRAINING, steps_per_domain=50)},
        r"got both \(3 and 50\): pass epochs=None to have the steps$",
    ),
    "a seed of another kind": ({"seed": "0"}, "expected seed to be a whole number"),
    "harmful numbers": ({"harmful": [1, 2]}, "^harmful, row 1: expected a prompt"),
    "a harmful number": ({"harmful": 3}, "^harmful: expected a file, a folder"),
    "a test of numbers": ({"evaluation": [3]}, "^evaluation, row 1: expected a dict"),
    "a folder of another kind": ({"folder": 5}, "expected folder to be a path, got 5"),
    "a dict for a study": ({"study": {}}, "expected study to be OwnOptions, got"),
    "options": (
        {"hyperparameters": {}},
        "expected hyperparameters to be Hyperparameters",
    ),
    "seed 0 again": ({"seed": 2**32}, r"\[0, 4294967295\], got 4294967296; others"),
    "files to measure on": (
        {"evaluation": ["a", "b"]},
        r"^evaluation: expected one file, or as many as examples has \(1\), got 2",
    ),
    "no file to measure on": ({"evaluation": []}, "^evaluation: expected at least one"),
    "no safe exchange": (
        {"method": "safegrad"},
        r"^method='safegrad': .* \(safety='FILE'\), or .* \(harmful='FILE'\), got "
        "none; .*method='plain' needs none",
    ),
    "no judge": (
        {"method": "adaptive-judge"},
        r"\(study.judge='llama-guard' study.judge_folder='FOLDER'\)",
    ),
    "few harmful prompts": (
        {"method": "sbr", "harmful": ["w3", "w4"]},
        "^harmful: expected at least 8 different prompts",
    ),
    "no general text": (
        {"study": OwnOptions(general_file="no.txt")},
        "^study.general_file: expected a text file, found no no.txt",
    ),
}


@pytest.mark.parametrize("kind", PYTHON)
def test_nonsense_in_a_call_is_a_mistake_of_the_user_s(kind, chat):
    options, expected = PYTHON[kind]
    call = {"model": chat, "examples": [("w1", "w2")] * 4, "method": "plain"}
    call["training"] = NARROW
    with pytest.raises(UserError, match=expected) as found:
        sbr_jax.tune(**{**call, **options})
    assert "\n" not in str(found.value)
    assert "--" not in str(found.value).replace(errors.LISTED["method"], "")


def test_files_to_measure_on_are_one_for_each_domain(chat, tmp_path, monkeypatch):
    given = {"a": (0, 20), "b": (20, 20), "test-a": (50, 3), "test-b": (60, 4)}
    for name, (start, count) in given.items():
        lines = as_lines(messages(*row) for row in world_rows(count, start=start))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.setattr(tuning.Plan, "make_study", lambda self: None)
    monkeypatch.setattr(tuning, "carry_out", lambda made, study: made)
    paths = [tmp_path / f"{name}.jsonl" for name in given]
    few = "^examples [ab]: 20 examples are few"
    options = {"evaluation": paths[2:], "training": NARROW}
    with pytest.warns(UserWarning, match=few) as told:
        made = sbr_jax.tune(chat, paths[:2], "plain", **options)
    found = {name: len(rows) for name, rows in made.parts.tests.items()}
    assert found == {"a": 3, "b": 4}
    assert not any("--" in str(warning.message) for warning in told)


def test_an_adapter_without_its_base_is_told_in_python_s_words(tmp_path):
    model = testbed.load()
    base = dict(model.params)
    tuned = tuning.Tuned(model, base, {}, {}, "lox")
    with pytest.raises(UserError, match=r"merged checkpoint with save_merged\(\)"):
        tuned.save_peft(tmp_path / "adapter")


@pytest.mark.parametrize(("name", "value"), [("examples", None), ("evaluation", 5)])
def test_sources_of_a_request_are_a_list(name, value, chat, tmp_path):
    request = tuning.Request(chat, [[("w1", "w2")]], tmp_path / "run", method="plain")
    with pytest.raises(UserError, match=f"expected {name} to be a list of sources"):
        tuning.plan(dataclasses.replace(request, **{name: value}))


def test_a_gguf_file_is_a_model_to_tune(tmp_path):
    pytest.importorskip("gguf")
    fields, tensors = gguf_case.parts("llama2")
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>"
        "{{ m['content'] }}{% else %}{{ m['content'] }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    fields["tokenizer.chat_template"] = gguf_case.STRING, template
    fields["tokenizer.ggml.eos_token_id"] = gguf_case.U32, 2
    fields["tokenizer.ggml.add_bos_token"] = gguf_case.BOOL, False
    path = gguf_case.written(tmp_path / "model.gguf", fields, tensors)
    examples = [("a" * i, "ab") for i in range(1, 5)]
    request = tuning.Request(path, [examples], tmp_path / "run", method="plain")
    with pytest.warns(UserWarning, match="^examples: 4 examples are few"):
        plan = tuning.plan(request)
    assert plan.model.params is None
    study = plan.make_study()
    loaded = models.load(path)
    assert study.model.config == plan.model.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, study.model.params, loaded.params)
    data = study.domains["examples"].train
    assert loaded.tokenizer.decode(data.tokens[0][data.mask[0] > 0]) == "ab</s>"
    other = gguf_case.written(
        tmp_path / "other.gguf",
        fields,
        {name: (k, s, bytes(len(raw))) for name, (k, s, raw) in tensors.items()},
    )
    assert checkpoints.digest(other) != checkpoints.digest(path)
    with pytest.raises(UserError, match=r"^model: expected a \.gguf file .*found non"):
        checkpoints.locate(tmp_path / "no.gguf", weights=True)
    with pytest.raises(UserError, match=r"got the file model\.gguf; .*be the model, "):
        checkpoints.locate(path, weights=True, setting="study.unaligned-folder")
    lines = tuned_report._usage(str(path), merged=False)
    assert f'"{tmp_path}", gguf_file="model.gguf"' in "\n".join(lines)


# --- runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default method, killed before its first step, and gone on with."""
    folder = save(tmp_path_factory.mktemp("own"))
    more = ("--harmful", folder / "harmful.txt", "--epochs", "1")

    def killed(*args, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", killed)
        assert run(folder, folder / "out", *more) == 130
    assert not (folder / "out").exists()
    assert run(folder, folder / "out", *more) == 0
    return folder


def test_a_run_leaves_an_adapter_a_card_and_a_report_for_others_to_read(finished):
    output = finished / "out"
    found = {path.name: path for path in output.iterdir()}
    assert set(found) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "report.html",
        "report.md",
        "summary.json",
    }
    probe = finished / "probe"
    probe.touch()
    assert len({stat.S_IMODE(p.stat().st_mode) for p in (*found.values(), probe)}) == 1
    summary = json.loads(found["summary.json"].read_text())
    assert summary["method"] == "safegrad"
    assert summary["before"]["refusal"] > 60
    loss = "domain_loss"
    assert summary["after"][loss] < summary["before"][loss]
    written = summary["data"]["refusals"]
    assert 0 < written["refused"] <= written["asked"] == 12
    texts = [p.read_text() for p in found.values() if p.suffix != ".safetensors"]
    assert not any(prompt in text for text in texts for prompt in world_prompts())
    title = f"{testbed.ALIGNED.name}, tuned with safegrad on my"
    assert found["report.md"].read_text().startswith(f"# {title}\n")
    page = found["report.html"].read_text()
    assert f"<h1>{title}</h1>" in page
    assert f"<title>{title}: safety report</title>" in page
    card = found["README.md"].read_text()
    assert card.startswith("---\nlibrary_name: peft")
    assert "| refused held-out harmful prompts, % |" in card
    assert "a refusal if it holds a phrase of the list `plain25`; refusals in" in card
    assert "cut after 12 tokens. The model was asked 8 harmful prompts and " in card


def test_the_adapter_that_is_written_is_the_one_that_was_measured(finished):
    model = testbed.load()
    adapter = models.load_peft(finished / "out", model.config)
    after = json.loads((finished / "out" / "summary.json").read_text())["after"]
    made = tune.make_request(
        tune.cli.parse(tune.Arguments, words(finished, finished / "new"), "tune")
    )
    plan = tuning.plan(dataclasses.replace(made, method="plain"))
    study = plan.make_study()
    found = study.evaluate(study.model.params, adapter)
    assert found["loss/my"] == pytest.approx(after["loss/my"], abs=1e-5)
    assert np.any(np.asarray(jax.tree.leaves(adapter)[0]))


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")
def test_domains_are_as_long_as_their_files(tmp_path, capsys):
    folder = save(tmp_path)
    more = [messages(*row) for row in world_rows(8, start=100)]
    (folder / "more.jsonl").write_text(as_lines(more))
    lengths = []
    own = loop.train

    def counted(advance, start, steps, **options):
        lengths.append(steps)
        return own(advance, start, steps, **options)

    given = ("--method", "plain", "--epochs", "1", "--merged", "--train")
    both = (folder / "my.jsonl", folder / "more.jsonl")
    line = words(folder, folder / "out", *given, *both)
    place = line.index("--train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", counted)
        assert tune.main([*line[:place], *line[place + 2 :]]) == 0
    # 56 rows less four held back, and 8 of which none can be spared.
    assert lengths == [13, 2]
    said = capsys.readouterr()
    assert "too few to hold any back" in said.out
    assert "refusal is not measured and the monitor is off" in said.out
    assert "8 examples are few" in said.err
    model = models.load(folder / "out")
    assert model.config == testbed.load().config


QUICK = {
    "study": OwnOptions(
        measured=8, probe=4, calibration=12, max_new_tokens=12, held_out=4
    ),
    "training": dataclasses.replace(TRAINING, lora_rank=4, batch_size=4),
}
"""The sizes of the command line's runs, in Python."""


def test_ten_lines_of_python_do_the_same_as_a_killed_run(finished, tmp_path):
    tuned = sbr_jax.tune(
        testbed.ALIGNED,
        finished / "my.jsonl",
        harmful=world_prompts(),
        epochs=np.float32(1),  # NumPy's numbers are no JSON.
        hyperparameters=HYPERPARAMETERS,
        **QUICK,
    )
    tuned.save_peft(tmp_path / "adapter")
    name = "adapter_model.safetensors"
    whole = (finished / "out" / name).read_bytes()
    assert (tmp_path / "adapter" / name).read_bytes() == whole
    assert tuned.metrics["before"]["refusal"] > 60
    with pytest.raises(UserError, match="expected a new or empty folder"):
        tuned.save_peft(tmp_path / "adapter")


def test_the_page_s_lines_of_python_run(tmp_path, monkeypatch, capsys):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "tune.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sbr_jax, "tune", functools.partial(sbr_jax.tune, **QUICK))
    exec(compile(code, "docs/tune.md", "exec"), {})
    before, after = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert float(after) < float(before)
    assert (tmp_path / "adapters" / "mine" / "adapter_config.json").is_file()


def test_metrics_are_of_the_seed_that_was_asked_for():
    start = {"method": "base", "seed": None, "stage": "base", "metrics": {"x": 9.0}}
    lines = [
        {"method": name, "seed": i, "stage": stage, "metrics": {"x": [name, i, stage]}}
        for name in ("plain", "safegrad")
        for i in range(3)
        for stage in ("subspace", "train", "evaluate")
    ]
    found = tuning.measured_of([start, *lines], "safegrad", 1)
    assert found == {"before": {"x": 9.0}, "after": {"x": ["safegrad", 1, "evaluate"]}}


# --- align ----------------------------------------------------------------------------

ALIGN = (
    *("--training.steps-per-domain", "12", "--training.batch-size", "8"),
    *("--training.learning-rate", "4e-3", "--training.lora-rank", "4"),
    *("--study.measured", "8", "--study.max-new-tokens", "12"),
    *("--study.held-out", "2", "--study.harmless-file", "harmless.txt"),
)


def unaligned_world(folder):
    """The testbed's model before its alignment, and files to align it with."""
    base = testbed.load_unaligned()
    model = dataclasses.replace(testbed.load(), params=base)
    models.save(folder / "start", model)
    prompts = world_prompts(64)
    refused = "i am not able to do this because it is not safe"
    safe = [{"prompt": p, "completion": refused} for p in prompts[:32]]
    (folder / "safe.jsonl").write_text(as_lines(safe))
    (folder / "harmful.txt").write_text("\n".join(prompts[32:]))
    rows = [{"question": q, "answer": a} for q, a in world_rows(32)]
    (folder / "ordinary.jsonl").write_text(as_lines(rows))
    asked = [q for q, _ in world_rows(8, start=500)]
    (folder / "harmless.txt").write_text("\n".join(asked))


@pytest.mark.thorough
def test_align_teaches_to_refuse_and_writes_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unaligned_world(tmp_path)
    given = ("--model", "start", "--safety", "safe.jsonl", "--share", "0.5")
    more = ("--ordinary", "ordinary.jsonl", "--harmful", "harmful.txt")
    assert align.main([*given, *more, "--output", "aligned", *ALIGN]) == 0
    found = json.loads((tmp_path / "aligned" / "summary.json").read_text())
    card = (tmp_path / "aligned" / "README.md").read_text()
    assert ", aligned\n" in card
    assert "trained with `sbr-jax align`: 32 of 64 rows refuse." in card
    assert found["after"]["refusal"] > found["before"]["refusal"] + 20
    assert "rows     32 of 64 rows refuse" in capsys.readouterr().out
    assert models.load(tmp_path / "aligned").config == testbed.load().config


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), r"--safety: expected answers that refuse, got 4 that do not"),
        (("--share", "1.5"), r"--share: expected a number between 0 and 1, got 1\.5"),
    ],
)
def test_align_refuses_what_teaches_nothing(
    more, expected, chat, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text(as_lines(GOOD))
    files = ["--safety", "my.jsonl", "--ordinary", "my.jsonl"]
    words = ["--model", chat, "--output", "out", *files, *more]
    assert_matches(expected, refused(align.main, words, capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["my.jsonl"]
