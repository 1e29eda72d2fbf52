"""The forecast: parameters, products and memory against what the code really does."""

import dataclasses
import json
import math
import re
import types

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from tiny_preset import make_job

from sbr_jax import models, recipes
from sbr_jax.costs import defending, devices, estimates, forecast, forecast_judge
from sbr_jax.costs.devices import DeviceOptions
from sbr_jax.costs.forecast import Device, Load
from sbr_jax.methods import METHODS, build
from sbr_jax.models import answers, hf_config
from sbr_jax.planning.shapes import read_shape
from sbr_jax.programs import run
from sbr_jax.studies.options import ChatOptions
from sbr_jax.subspace import sketch

LLAMA2_7B = read_shape("llama2-7b")
FAMILIES = {
    "untied": {"tied": False},
    "qwen2": {"qkv_bias": True, "model_type": "qwen2"},
    "qwen3": {"qk_norm": True, "model_type": "qwen3", "head_dim": 6},
    "gemma2": {"post_norms": True, "model_type": "gemma2", "unit_offset": True},
    "grouped": {"kv_heads": 1},
}
LARGE = models.ModelConfig(
    vocab_size=512, width=256, mlp_width=688, layers=4, heads=4, context=128
)
"""Large enough that products outweigh what is done element by element."""


def sizes(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_parameters_are_those_of_the_trees(changes):
    config = dataclasses.replace(checkpoints.CONFIG, **changes)
    base = jax.eval_shape(lambda: models.init_params(jax.random.key(0), config))
    assert forecast.parameter_count(config) == sizes(base)
    for targets in ("(q|k|v|o)_proj", ".*"):
        adapter = jax.eval_shape(
            lambda t=targets: models.init_adapter(
                jax.random.key(0), config, rank=3, alpha=1.0, targets=t
            )
        )
        assert forecast.adapter_parameters(config, 3, targets) == sizes(adapter)


BATCH, TOKENS = 4, 64


@pytest.fixture(scope="module", params=[False, True], ids=["stored", "remat"])
def compiled(request):
    """A gradient whose layers are a loop, compiled, and a forward pass, lowered."""
    hardware = models.Hardware(unroll=1, remat=request.param)
    apply_fn = models.make_apply_fn(LARGE, hardware)

    def loss(adapter, base, tokens, mask):
        batch = {"tokens": tokens, "mask": mask}
        hidden = answers.states(apply_fn, base, adapter, batch)
        return jnp.mean(
            answers.cross_entropy(apply_fn, base, hidden, answers.find(batch))
        )

    base, adapter = jax.eval_shape(
        lambda: (
            models.init_params(jax.random.key(0), LARGE),
            models.init_adapter(jax.random.key(1), LARGE, rank=16, alpha=32.0),
        )
    )
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    mask = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.float32)
    forward = jax.jit(lambda a, b, t: apply_fn(b, a, t)).lower(adapter, base, tokens)
    gradient = jax.jit(jax.grad(loss)).lower(adapter, base, tokens, mask)
    job = Load(LARGE, "float32", batch=BATCH, length=TOKENS, remat=request.param)
    return job, forward, gradient.compile()


@pytest.mark.thorough
def test_products_are_those_that_the_compiler_counts(compiled):
    job, forward, gradient = compiled
    # The compiler counts the body of a loop once, however often it runs.
    one = dataclasses.replace(job, config=dataclasses.replace(LARGE, layers=1))
    found = forward.compile().cost_analysis()["flops"]
    # What is done element by element comes on top: under 3 % at this size.
    ours = BATCH * forecast.forward_flops(one, TOKENS)
    assert 1.0 <= found / ours < 1.03
    ours = BATCH * forecast.train_flops(one, TOKENS)
    assert 1.0 <= gradient.cost_analysis()["flops"] / ours < 1.03


def test_memory_is_a_lower_bound_and_not_a_wild_one(compiled):
    job, _, gradient = compiled
    parts = forecast.training_memory(job)
    inside = ("residual stream", "activations inside layers", "logits")
    ours = sum(parts[name] for name in inside)
    # Without fusion (as tests compile) every elementwise result is an array.
    assert ours < gradient.memory_analysis().temp_size_in_bytes < 2.2 * ours


def test_remat_trades_products_for_memory():
    stored, again = (Load(LARGE, remat=remat) for remat in (False, True))
    assert forecast.train_flops(again, 64) > forecast.train_flops(stored, 64)
    memory = [sum(forecast.training_memory(j).values()) for j in (stored, again)]
    assert memory[0] > memory[1]


def test_llama_2_7b_is_what_everybody_knows_it_is():
    assert forecast.parameter_count(LLAMA2_7B) == 6_738_415_616
    assert forecast.weight_bytes(LLAMA2_7B, "bfloat16") == pytest.approx(13.48e9, 1e-3)
    # 6.48 B of them in projections, at 4.5 bits, the rest in bfloat16.
    nf4 = forecast.weight_bytes(LLAMA2_7B, "bfloat16", "nf4")
    assert nf4 == pytest.approx(6.476e9 * 4.5 / 8 + 0.262e9 * 2, 1e-2)
    job = Load(LLAMA2_7B)
    assert forecast.adapter_parameters(LLAMA2_7B, 16, job.targets) == 16_777_216
    # 2 P T forwards, 2 backwards (no gradients of weights) and 2 for recomputing;
    # attention adds a few percent, and the head is not recomputed.
    rule = 6 * forecast.parameter_count(LLAMA2_7B) * 512
    assert forecast.train_flops(job, 512) == pytest.approx(rule, rel=0.1)
    # 500 gradients of 16.8 M float32 numbers: 33.6 GB, and those of a microbatch.
    sizes = sketch.plan(16_777_216, 32, 8, 512)
    fisher = forecast.fisher_memory(job, 500, 32, sizes)
    gradients = fisher["per-example gradients"]
    assert gradients == pytest.approx(33.6e9 + 8 * 67.1e6, rel=1e-2)
    assert fisher["new basis"] == pytest.approx(32 * 67.1e6, rel=1e-2)
    # A budget of 20 GiB is what the three parts come to, with a third on top.
    sizes = sketch.plan(16_777_216, 32, 8, 512, 20 * 2**30)
    budget = forecast.fisher_memory(job, 500, 32, sizes)
    held = budget["per-example gradients"] + budget["new basis"]
    assert 0.99 * 20 * 2**30 <= sketch.OVERHEAD * held <= 20 * 2**30
    # Half a megabyte a token: the reason why answers are written a few at a time.
    assert forecast.cache_bytes(job, 1) == 524_288


def test_writing_is_bound_by_reading_weights_unless_many_write_together():
    job, slow = Load(LLAMA2_7B), Device("x", None, 125e12, 1.2e12)
    alone = forecast.generation_seconds(job, slow, 1, 100, 256, 1)
    floor = 256 * forecast.weight_bytes(LLAMA2_7B, "bfloat16") / 1.2e12
    assert floor < alone < 1.2 * floor
    together = forecast.generation_seconds(job, slow, 16, 100, 256, 16)
    assert together < 3 * alone
    more = dataclasses.replace(slow, bandwidth=2.4e12)
    assert forecast.generation_seconds(job, more, 1, 100, 256, 1) < 0.6 * alone


def test_defences_cost_more_than_plain_by_what_they_do():
    load = Load(LLAMA2_7B)
    cost = {name: forecast.step_flops(load, build(name).cost) for name in METHODS}
    assert min(cost.values()) == cost["plain"] < cost["adaptive-probe"]
    assert cost["safeanchor"] < cost["unified"] == max(cost.values())
    # Forward with backward: task, KL to the reference, half a batch for each of the two
    # anchors. Forward alone: the reference on the batch; that of the anchor is kept.
    whole, one = forecast.train_flops(load, 512), forecast.forward_flops(load, 512)
    half = load.batch // 2
    wanted = (2 * load.batch + half + half) * whole + load.batch * one
    # One sum in two orders: only rounding is left.
    assert cost["unified"] == pytest.approx(wanted, rel=1e-12)
    # Three passes of a stage as long as a domain.
    stage = forecast.stage_flops(load, build("booster").cost, 100)
    assert stage == pytest.approx(300 * cost["plain"], rel=1e-12)
    ten = forecast.stage_flops(load, build("booster", steps=10).cost, 100)
    assert ten == pytest.approx(stage / 10, rel=1e-12)


# --- the device, and the dry run of a preset without a survey -------------------------


def test_a_device_is_this_machines_or_the_one_that_is_described(monkeypatch):
    found = devices.make_device(DeviceOptions())
    assert found.memory is None
    assert "assumed" in found.name
    found = devices.make_device(DeviceOptions(24.0, 60.0, 600.0, 2))
    assert (found.memory, found.flops, found.bandwidth) == (24e9, 60e12, 600e9)
    assert found.count == 2
    monkeypatch.setattr(devices, "measured_flops", lambda: 3e12)
    assert devices.make_device(DeviceOptions(tflops="measured")).flops == 3e12


def test_measured_speed_is_a_speed():
    assert 1e6 < devices.measured_flops(size=64, seconds=0.05) < 1e15


def job_of(*words, variants=("plain", "safeanchor")):
    return make_job("--methods", *variants, *words, preset=recipes.load("demo"))


@pytest.fixture(scope="module")
def demo():
    return job_of().make_study()


def test_a_dry_run_of_the_demo_prints_memory_and_hours(capsys):
    assert run.main(["demo", "--dry-run", "--methods", "plain", "safeanchor"]) == 0
    out = capsys.readouterr().out
    assert "fits into 24 GB, 40 GB, 80 GB" in out
    assert "train medical" in out
    assert "all, 3 seeds" in out


COSTS = {
    "tiny": ("safeanchor", 1e13, "less than a minute, besides compiling the programs"),
    "slow": (
        "safeanchor",
        1e9,
        r"a step of safeanchor costs 1\.\d times as much as .*",
    ),
    "as dear": ("salora", 1e9, "a step of salora costs as much as a plain one"),
    "plain": ("plain", 1e9, r"about \S+ min in all \(1 GFLOP/s here; compiling not .*"),
}


@pytest.mark.parametrize("kind", COSTS)
def test_what_a_defence_costs_is_told_where_it_can_be(kind, demo, monkeypatch):
    row, flops, expected = COSTS[kind]
    device = dataclasses.replace(forecast.A100, flops=flops)
    monkeypatch.setattr(defending, "this_machine", lambda dtype: device)
    first, *more = defending.lines(job_of(variants=(row,)), demo)
    assert re.fullmatch(expected, first)
    assert bool(more) == (kind != "tiny")
    assert not re.search(r"\b0 |ms", " ".join(more))


@pytest.mark.thorough
def test_hours_follow_steps_and_speed(demo):
    device = forecast.A100

    def hours(steps, device=device):
        job = job_of(f"--training.steps-per-domain={steps}")
        load = estimates.load_of(job, demo)
        return estimates.variant_seconds(job, demo, load, device, "safeanchor")

    one, two = hours(80), hours(160)
    assert two["training"] == pytest.approx(2 * one["training"])
    assert two["Fisher"] == one["Fisher"] > 0
    fast = dataclasses.replace(device, flops=2 * device.flops)
    assert hours(80, device=fast)["training"] == pytest.approx(one["training"] / 2)
    job = job_of()
    load = estimates.load_of(job, demo)
    plain = estimates.variant_seconds(job, demo, load, device, "plain")
    assert "Fisher" not in plain
    assert "repairs, at most" not in plain


def test_memory_follows_the_subspace_and_the_mesh(demo):
    def parts(*words, variants=("safeanchor",)):
        job = job_of(*words, variants=variants)
        return estimates.memory(job, demo, estimates.load_of(job, demo))[
            "training step"
        ]

    wide = parts()["subspace, twice"]
    assert parts("--methods.safeanchor.max-rank=16")["subspace, twice"] == wide / 4
    assert "subspace, twice" not in parts(variants=("plain",))
    assert parts("--mesh=fsdp=4")["weights"] == parts()["weights"] / 4


def test_a_guard_is_held_whole_and_pays_a_pass_for_every_exchange(demo, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    guard = hf_config.read(tmp_path)
    job = job_of("--mesh=fsdp=4", variants=("adaptive-judge", "plain"))
    free = ChatOptions(max_new_tokens=8)
    options = dataclasses.replace(free, judge="llama-guard", judge_folder=str(tmp_path))
    hardware = dataclasses.replace(job.config.hardware, generation_batch=2)
    config = dataclasses.replace(job.config, hardware=hardware)
    job = dataclasses.replace(job, config=config, study=free)
    guarded = dataclasses.replace(job, study=options)
    load, device = estimates.load_of(job, demo), forecast.A100
    size = forecast.weight_bytes(guard, load.dtype)
    for phase in estimates.memory(guarded, demo, load).values():
        assert phase["guard's weights"] == size
    for phase in estimates.memory(job, demo, load).values():
        assert "guard's weights" not in phase
    # Without an adapter, and the logits of one position.
    alone = Load(guard, load.dtype, rank=0)
    domains = [demo.domains[name].train for name in job.domains]
    flops = sum(
        len(x) * forecast.forward_flops(alone, x.length, heads=1) for x in domains
    )
    found = estimates.variant_seconds(guarded, demo, load, device, "adaptive-judge")
    # One sum in two orders: only rounding is left.
    assert found["ratings"] == pytest.approx(flops / device.flops, rel=1e-12)
    for other, name in ((guarded, "plain"), (job, "adaptive-judge")):
        found = estimates.variant_seconds(other, demo, load, device, name)
        assert "ratings" not in found
    assert build("unified:judge").cost.ratings == 1
    assert forecast_judge.judging_seconds(free, load, device, 3, 5) == 0.0
    asked = {"harmbench": (3, 40), "gsm8k": (5, 40), "probe": (7, 40)}
    notes = {"measurements": {"harmbench": {"judge": {}}, "gsm8k": {}}}
    study = types.SimpleNamespace(asked=asked, notes=notes)
    with_it = estimates.start_seconds(guarded, study, load, device)
    without = estimates.start_seconds(job, study, load, device)
    one = forecast.forward_flops(alone, 40 + 8, heads=1) / device.flops
    # A small part of a sum: the difference keeps six digits at the least.
    assert with_it["measuring"] - without["measuring"] == pytest.approx(3 * one, 1e-6)
    assert with_it["monitor"] - without["monitor"] == pytest.approx(7 * one, 1e-6)
