"""The plan: slices, layouts, limits, the report, and the process that compiles."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
from tiers import few

from sbr_jax.costs import forecast
from sbr_jax.costs.forecast import Load
from sbr_jax.methods import METHODS, build
from sbr_jax.planning import aot, compiler, planner, report, worker
from sbr_jax.planning.case import Case
from sbr_jax.planning.chips import CHIPS, GIB, parse_topology, slices
from sbr_jax.planning.compiler import CompilerError, Found, compile_part
from sbr_jax.planning.job import Job
from sbr_jax.planning.layouts import Layout, layouts, link_bytes, smallest, weight_share
from sbr_jax.planning.report import Planned
from sbr_jax.planning.rooflines import seconds
from sbr_jax.planning.shapes import SHAPES, read_shape
from sbr_jax.programs import plan as program
from sbr_jax.settings import Training
from sbr_jax.typing import UserError

SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
V5E = parse_topology("v5e:4x4")
SEVEN = Case("llama2-7b", training=Training(batch_size=16))

# --- slices, models, layouts ----------------------------------------------------------


BILLIONS = {
    "llama2-7b": 6.738,
    "llama2-13b": 13.016,
    "llama2-70b": 68.977,
    "llama3-8b": 8.030,
    "llama3-70b": 70.554,
    "mistral-7b": 7.248,
    "qwen2.5-7b": 7.616,
    "qwen2.5-32b": 32.764,
    "gemma2-9b": 9.242,
}


def test_shapes_have_the_parameters_that_everybody_knows_and_a_file_will_do(tmp_path):
    found = {name: forecast.parameter_count(read_shape(name)) / 1e9 for name in SHAPES}
    assert found == pytest.approx(BILLIONS, abs=5e-4)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for place in (tmp_path, tmp_path / "config.json"):
        assert read_shape(str(place)).layers == 3


def test_slices_of_a_kind_grow_and_others_are_refused():
    for kind in CHIPS:
        chips = [topology.chips for topology in slices(kind)]
        assert chips == sorted(set(chips))
        assert [parse_topology(str(x)) for x in slices(kind)] == list(slices(kind))
    for text, said in {
        "v5x:4x4": "unknown topology 'v5x:4x4'; nearest: v5e:4x4",
        "v5e": "got none",
        "v5p:4x4": "expected a slice of v5p, one of v5p:2x2x1",
    }.items():
        with pytest.raises(UserError, match=said):
            parse_topology(text)


def test_a_slice_that_closes_on_itself_has_its_links_both_ways():
    line, ring = parse_topology("v5e:8x16"), parse_topology("v5e:16x16")
    assert ring.link_bandwidth == 2 * line.link_bandwidth


@pytest.mark.parametrize(
    ("topology", "model"), [("v5e:8x8", "llama2-7b"), ("v5p:2x2x4", "qwen2.5-7b")]
)
def test_layouts_take_all_chips_and_divide_batch_and_heads(topology, model):
    topology = parse_topology(topology)
    load = dataclasses.replace(SEVEN, model=model).load
    found = layouts(topology, load)
    assert len(found) == len(set(found))
    for layout in found:
        assert layout.chips == topology.chips
        assert load.batch % layout.rows == 0
        assert load.config.kv_heads % layout.tp == 0


def test_layouts_that_cannot_hold_the_weights_come_last():
    load = dataclasses.replace(SEVEN, model="llama2-70b").load
    room = [weight_share(load, x) <= V5E.chip.memory for x in layouts(V5E, load)]
    assert room == sorted(room, reverse=True)
    assert room[0]
    assert not room[-1]


@pytest.mark.parametrize(
    ("layout", "counted"), [(Layout(1, 16, 1), 30.6e9), (Layout(1, 4, 4), 12.4e9)]
)
def test_links_are_estimated_well_enough_to_choose(layout, counted):
    """Beside what was counted by hand over the text that libtpu compiled."""
    assert link_bytes(SEVEN.load, layout) == pytest.approx(counted, rel=0.3)


def test_the_smallest_slice_has_room_by_arithmetic():
    layout, load = Layout(1, 4, 4), SEVEN.load
    weights = forecast.weight_bytes(load.config, load.dtype) / 16
    # Of four chips each holds four times as much, of sixteen what it held.
    little, much = weights + 0.2 * GIB, weights + 3.5 * GIB
    assert str(smallest("v5e", little, load, layout)) == "v5e:2x2"
    assert str(smallest("v5e", much, load, layout)) == "v5e:2x4"
    assert smallest("v5e", 300 * GIB, load, layout) is None


def test_limits_are_what_a_chip_can_do():
    own = seconds(2 * 197e12, 819e9, 3 * 4.5e10, V5E)
    assert (own.products, own.memory, own.links) == (2.0, 1.0, 3.0)
    assert (own.peak, own.expected) == (3.0, 5.0)
    assert seconds(197e12, 0.0, 4.5e10, V5E).bound == "products"


# --- the programs themselves ----------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SMALL))
    training = Training(batch_size=4, lora_rank=2)
    return Case(
        str(path), "plain", training, length=32, calibration=8, answers=8, fisher=4,
        rows=4, prompt=16, new=8, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def steps(small):
    """What is counted of plain steps on one device and on eight."""
    found = {}
    for layout in (Layout(), Layout(1, 2, 4)):
        given = aot.shapes_of(small, layout, jax.devices()[: layout.chips])
        part = aot.step(given)
        found[layout.chips] = worker.described(part, part.lowered.compile())
    return found


def test_a_plain_step_has_the_flops_of_the_forecast_by_sizes(small, steps):
    load = dataclasses.replace(small.load, answers=small.length - 1)
    wanted = forecast.step_flops(load, build("plain").cost)
    assert steps[1]["flops"] == pytest.approx(wanted, rel=1e-3)
    # Each of eight does its share; what of an adapter is not split comes on top.
    assert 1.0 <= 8 * steps[8]["flops"] / wanted < 1.4


def test_the_forecast_says_of_llama_2_7b_what_was_counted_for_a_tpu():
    # By hand over the text that libtpu 0.0.52 compiled for v5e:4x4, fsdp 16, before
    # this room was: 19.30 TFLOP.
    load = SEVEN.load
    assert forecast.step_flops(load, build("plain").cost) / 16 == pytest.approx(
        19.30e12, rel=2e-3
    )


def test_memory_is_told_by_what_it_holds(small, steps):
    count = forecast.parameter_count(read_shape(small.model))
    assert steps[1]["held"]["weights"] == 4 * count
    # Norms are whole on every device, all else is shared by eight.
    shared = steps[8]["held"]["weights"]
    assert 4 * count / 8 < shared < 4 * count / 8 + 4 * 8 * 32
    adapter = forecast.adapter_bytes(small.load)
    assert steps[1]["held"]["adapter, moments"] == pytest.approx(3 * adapter, abs=16)
    assert steps[1]["links"] == []
    assert sum(size for *_, size in steps[8]["links"]) > 0


@pytest.fixture(scope="module")
def parts(small):
    """What is counted of the parts beside the step, on eight devices."""
    case, layout = (
        dataclasses.replace(small, method="safeanchor-exact"),
        Layout(1, 2, 4),
    )
    given = aot.shapes_of(case, layout, jax.devices()[:8])
    made = {name: part(given) for name, part in aot.PARTS.items() if name != "step"}
    return {name: worker.described(x, x.lowered.compile()) for name, x in made.items()}


def test_a_fisher_is_counted_by_its_examples_and_splits_its_rows(small, parts):
    gradients, basis = parts["Fisher gradients"], parts["Fisher basis"]
    load = dataclasses.replace(small.load, answers=small.answers)
    one = forecast.train_flops(load, small.length, heads=small.answers)
    # An example at a time, an adapter's own products are not split over tp.
    assert 1.0 <= 8 * gradients["flops"] / (small.fisher * one) < 1.6
    count = forecast.adapter_parameters(load.config, load.rank, load.targets)
    rows = 4 * small.calibration * count
    assert gradients["held"]["rows"] == basis["held"]["rows"] == rows / 8
    # What puts rows in their place knows how many there are when it runs.
    assert gradients["unknown"]
    assert ["all-to-all", 2] in [link[:2] for link in gradients["links"]]
    assert not [link for link in basis["links"] if link[0] == "all-gather"]


@pytest.mark.parametrize("layout", [Layout(8, 1, 1), Layout(2, 2, 2)], ids=str)
def test_rows_of_a_fisher_fall_with_the_chips_on_every_mesh(layout, small):
    case = dataclasses.replace(
        small, training=dataclasses.replace(small.training, batch_size=8)
    )
    _, held = aot.rows(aot.shapes_of(case, layout, jax.devices()[:8]))
    count = forecast.adapter_parameters(read_shape(small.model), 2, case.load.targets)
    assert aot.held_bytes(held) == 4 * small.calibration * count / 8


def test_answers_are_counted_token_by_token(small, parts):
    load, keys = small.load, small.prompt + small.new
    token = forecast.forward_flops(load, 1, keys=keys, heads=1)
    found = parts["write"]
    assert 1.0 <= 8 * found["flops"] / (small.rows * small.new * token) < 2.5
    assert found["unknown"]
    assert found["held"]["cache"] > 0
    prompt = forecast.forward_flops(load, small.prompt, heads=1)
    assert 1.0 <= 8 * parts["read"]["flops"] / (small.read_rows * prompt) < 2.5


def test_a_method_whose_state_is_computed_is_refused(small):
    case = dataclasses.replace(small, method="safe-lora")
    with pytest.raises(UserError, match="--method safe-lora: expected a state that"):
        aot.shapes_of(case, Layout(), jax.devices()[:1])


UNTOLD = {"safe-lora", "asft", "salora"}
"""Two have a state that is computed from the weights, one wants a wider model."""
TOLD = sorted(set(METHODS) - UNTOLD)


@pytest.mark.parametrize("name", few(TOLD, ["unified"]))
def test_the_step_of_every_other_method_is_told_by_shapes(name, small):
    given = aot.shapes_of(
        dataclasses.replace(small, method=name), Layout(1, 2, 1), jax.devices()[:2]
    )
    assert aot.step(given).lowered is not None


# --- the report -----------------------------------------------------------------------


def found(flops=20e12, traffic=1e11, links=1e9, held=1.0, peak=2.0, **more):
    return Found(
        flops=flops,
        bytes=traffic,
        links=(("all-gather", 4, links),),
        held={"weights": held * GIB, "method": 0.0, "basis": 0.0},
        peak=peak * GIB,
        **more,
    )


def planned(compiled, *, methods=("plain",), layout=None, case=SEVEN, **options):
    return planner.plan(case, methods, V5E, layout, Job(), compiled=compiled, **options)


def test_a_plan_says_what_it_takes():
    said = []

    def compiled(case, layout, topology, part):
        if part == "step":
            return found(20e12 if case.method == "plain" else 30e12)
        return found(1e12, unknown={"loop": 1.0} if part == "write" else {})

    text = planned(
        compiled,
        methods=("plain", "safeanchor-exact"),
        layout=Layout(1, 4, 4),
        say=said.append,
    )
    assert text.startswith("llama2-7b on v5e:4x4: fits")
    # 938 steps of each of three domains, at 40 % of 197 TFLOP/s.
    hours = 3 * 938 * 20e12 / (0.4 * 197e12) / 3600
    assert f"{hours:.3g}" in text
    assert "1.50" in text  # A step beside plain's.
    assert "smallest slice that fits is v5e:2x2" in text
    assert "loops that end when data say so (write)" in text
    assert "plain: step, link GB: all-gather of 4 1.0" in text
    assert len(said) == 1 + 3 + 5


def test_the_fastest_layout_that_fits_is_taken_and_a_crash_is_one_line():
    order = []

    def compiled(case, layout, topology, part):
        if layout not in order:
            order.append(layout)
        number = order.index(layout)
        if number == 0:
            raise CompilerError("the compiler failed (SIGABRT): Check failed: a == b")
        if number == 1:
            return found(1e12, peak=20.0)
        return found(20e12 + number * 1e12)

    text = planned(compiled, tries=4)
    lines = [x for x in text.splitlines() if x.startswith("layouts  ")]
    assert len(lines) == 4
    assert "SIGABRT" in lines[0]
    assert f"mesh {order[2]}\n" in text
    assert "20.0 of 15.75 GiB" in lines[1]


def test_no_layout_at_all_is_a_mistake():
    def compiled(*_):
        raise CompilerError("the compiler failed (SIGSEGV): it said nothing")

    with pytest.raises(UserError, match=r"no layout could be compiled: .*SIGSEGV"):
        planned(compiled, tries=2)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (found(held=14.0, peak=15.9), "more chips over fsdp or tp"),
        (found(held=1.0, peak=19.0), "more microbatches (--accumulation)"),
    ],
)
def test_what_does_not_fit_says_what_to_change(part, said):
    text = planned(lambda *_: part, layout=Layout(1, 4, 4))
    assert "DOES NOT FIT" in text
    assert said in text


def test_a_batch_that_is_too_small_is_told_and_one_that_is_not_is_not():
    def lines(links):
        own = Planned(SEVEN, {"step": found(1e12, 1e9, links)})
        return " ".join(report.advice(own, V5E, Layout(1, 4, 4)))

    # 12.7 ms of products at 40 %; four times as long on links at 60 %.
    four = 4 * 1e12 / (0.4 * 197e12) * 0.6 * 4.5e10
    assert "bound by links: 16 examples on 16 chips" in lines(four)
    assert "--batch 64, a slice of 4 chips" in lines(four)
    assert "bound by links" not in lines(four / 8)


# --- the process that compiles --------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    requests = []

    def answer(request):
        requests.append(request)
        return {
            "flops": 1.0, "bytes": 2.0, "links": [["all-reduce", 4, 3.0]],
            "unknown": {}, "held": {"weights": 4.0}, "peak": 5.0,
        }  # fmt: skip

    monkeypatch.setattr(compiler, "_asked", answer)
    return requests


def test_what_was_found_is_remembered_by_sizes_versions_and_code(
    asked, tmp_path, monkeypatch
):
    def ask(case=SEVEN):
        return compile_part(case, Layout(1, 4, 4), V5E, "step", cache=tmp_path)

    first = ask()
    assert (first.link_bytes, first.working) == (3.0, 1.0)
    assert ask() == first
    assert len(asked) == 1
    assert compiler.case_of(json.loads(json.dumps(asked[0]["case"]))) == SEVEN
    compile_part(SEVEN, Layout(1, 4, 4), V5E, "step", cache=tmp_path, quick=True)
    assert [request["quick"] for request in asked] == [False, True]
    for change in ({"length": 256}, {"method": "unified"}, {"model": "llama3-8b"}):
        ask(dataclasses.replace(SEVEN, **change))
    monkeypatch.setattr(compiler, "_version", lambda name: "0.0.43")
    ask()
    monkeypatch.setattr(compiler, "_code", lambda: "another")
    ask()
    assert len(asked) == 7
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]


WORKERS = {
    "a crash": ("kill -ABRT $$", CompilerError, "SIGABRT"),
    "a defect": ("echo 'ValueError: no' >&2; exit 1", CompilerError, "ValueError: no"),
    "a refusal": (
        f"echo '{compiler.REFUSED}--method x: expected y' >&2; exit 1",
        UserError,
        "^--method x: expected y$",
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_process_that_fails_is_one_line(name, tmp_path, monkeypatch):
    script, kind, said = WORKERS[name]
    path = tmp_path / "python"
    path.write_text(f"#!/bin/bash\ncat >/dev/null\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    with pytest.raises(kind, match=said) as caught:
        compile_part(SEVEN, Layout(1, 4, 4), V5E, "step", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_program_that_has_no_room_is_told_by_the_compilers_own_words():
    words = "Ran out of memory in memory space hbm. Used 20.30G of 15.75G hbm."
    assert worker.FULL.search(words).groups() == ("20.30", "G", "15.75", "G")


COMMAND = ["--model", "llama2-7b", "--topology", "v5e:4x4"]


def pretend(monkeypatch, there):
    """Has the compiler of TPUs installed, or not."""
    real, found = importlib.util.find_spec, True if there else None
    spec = lambda name: found if name == "libtpu" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", spec)


def test_the_command_prints_a_plan_and_remembers_it(
    asked, tmp_path, monkeypatch, capsys
):
    pretend(monkeypatch, there=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [*COMMAND, "--layouts", "2"]
    assert program.main([*words, "--compare", "plain,safeanchor-exact"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("llama2-7b on v5e:4x4: fits\n")
    assert "compiling plain, step, for v5e:4x4" in err
    # Two layouts, then the step of the other method, its Fisher, and the answers once.
    assert len(asked) == 2 + 1 + 2 + 2
    assert program.main([*words, "--method", "safeanchor-exact", "--quiet"]) == 0
    # One layout more of this method; everything else was known.
    assert len(asked) == 8
    assert capsys.readouterr().err == ""
    assert program.main([*words, "--method", "plain", "--quick"]) == 0
    assert planner.QUICKLY in capsys.readouterr().out


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    pretend(monkeypatch, there=False)
    assert program.main(COMMAND) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'sbr_jax[tpu]'" in err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
def test_the_compiler_knows_every_slice(tmp_path):
    """In a process of its own: it keeps whatever process it is loaded into."""
    names = [str(topology) for kind in CHIPS for topology in slices(kind)]
    code = (
        "from sbr_jax.planning.chips import parse_topology\n"
        "from sbr_jax.planning.worker import devices_of\n"
        f"print([len(devices_of(parse_topology(x))) for x in {names}])"
    )
    environment = compiler.environment(str(tmp_path))
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    wanted = [parse_topology(name).chips for name in names]
    assert json.loads(told.stdout.splitlines()[-1]) == wanted


def test_loads_are_those_of_the_forecast():
    assert SEVEN.load == Load(read_shape("llama2-7b"))
