"""Generation equals recomputation; padding, batches and keys do what they say."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, STORIES, adapter, golden, needs_stories, params, tokens

from sbr_jax import _mesh, losses, models
from sbr_jax.models.buckets import bucket
from sbr_jax.models.generate import _together, read_prompts, write_answers
from sbr_jax.training import sharding
from sbr_jax.typing import UserError

generating = sys.modules["sbr_jax.models.generate"]
ENDLESS = dataclasses.replace(CONFIG, eos=())
MODEL = models.make_model(ENDLESS, params())
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 8, 20, 4], [1, 3, 11, 12]]


def recompute(model, base, pairs, prompt, steps):
    """Greedy decoding that runs the whole sequence for every token."""
    ids, apply_fn = list(prompt), jax.jit(model.apply_fn)
    for _ in range(steps):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(apply_fn(base, pairs, row)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def run(model=MODEL, pairs=None, prompts=PROMPTS, new=8, **options):
    return models.generate(
        model, model.params, pairs, prompts, max_new_tokens=new, **options
    )


@needs_stories
def test_the_trained_checkpoint_tells_the_golden_story():
    model, wanted = models.load(STORIES / "hf"), golden()
    prompt, rest = wanted["greedy_ids"][:1], wanted["greedy_ids"][1:]
    found = run(model, prompts=[prompt, wanted["prompt_ids"]], new=len(rest))
    assert found[0] == rest
    assert model.tokenizer.decode(found[0]) == wanted["greedy_text"]
    same = rest[len(wanted["prompt_ids"]) - 1 :]
    assert found[1][: len(same)] == same


@pytest.mark.parametrize("pairs", [None, adapter()], ids=["base", "adapted"])
def test_the_cache_equals_recomputation_and_padding_changes_nothing(pairs):
    together = run(pairs=pairs)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert found == recompute(MODEL, MODEL.params, pairs, prompt, 8)
        assert [found] == run(pairs=pairs, prompts=[prompt])


def test_answers_stop_before_a_stop_token():
    endless = run()
    stop = endless[0][3]
    model = models.make_model(dataclasses.replace(CONFIG, eos=(stop,)), MODEL.params)
    for short, long in zip(run(model), endless, strict=True):
        end = long.index(stop) if stop in long else len(long)
        assert short == long[:end]


def test_samples_depend_on_the_key_and_not_on_the_batch():
    key = jax.random.key(0)
    one = run(temperature=1.0, key=key)
    assert one == run(temperature=1.0, key=key, batch_size=2)
    assert one != run(temperature=1.0, key=jax.random.key(1))
    twice = run(prompts=[[1], [1]], temperature=1.0, key=key)
    assert twice[0] != twice[1]


def test_samples_follow_the_distribution():
    count = 2000
    found = run(prompts=[[1, 5]] * count, new=1, temperature=2.0, key=jax.random.key(0))
    logits = jax.jit(MODEL.apply_fn)(MODEL.params, None, np.array([[1, 5]]))[0, -1]
    wanted = np.asarray(jax.nn.softmax(logits / 2.0))
    seen = np.bincount(np.ravel(found), minlength=CONFIG.vocab_size) / count
    # Four standard errors per token.
    assert np.all(np.abs(seen - wanted) < 4 * np.sqrt(wanted / count) + 1e-3)


def test_one_program_serves_bases_adapters_lengths_and_limits():
    run(pairs=adapter())
    programs = (read_prompts, _together, write_answers)
    sizes = [f._cache_size() for f in programs]
    run(pairs=adapter(seed=7), prompts=[p[::-1] for p in PROMPTS], new=7)
    other = jax.tree.map(lambda x: x * 2, MODEL.params)
    models.generate(MODEL, other, adapter(), PROMPTS, max_new_tokens=8)
    assert [f._cache_size() for f in programs] == sizes


LENGTHS = (3, 30, 1, 17, 31, 9, 2, 25, 11)
LONG = [
    np.random.default_rng(n).integers(3, CONFIG.vocab_size, n).tolist() for n in LENGTHS
]


def counted(monkeypatch, name, show):
    """What a program of generation is given, call by call."""
    seen, real = [], getattr(generating, name)

    def program(*arguments):
        seen.append(show(arguments))
        return real(*arguments)

    monkeypatch.setattr(generating, name, program)
    return seen


def test_prompts_read_in_parts_are_answered_as_alone(monkeypatch):
    alone = [run(prompts=[prompt], pairs=adapter())[0] for prompt in LONG]
    monkeypatch.setattr(generating, "SAVING", 8)
    monkeypatch.setattr(generating, "READ_AT_ONCE", 64)
    read = counted(monkeypatch, "read_prompts", lambda a: a[4].shape)
    written = counted(monkeypatch, "write_answers", lambda a: a[6][0].shape[1:3])
    assert run(prompts=LONG, pairs=adapter()) == alone
    # The short ones together, the long ones two at a time, and all written at once.
    assert [rows * width <= 64 for rows, width in read] == [True] * len(read)
    assert {width for _, width in read} == {8, 12, 24, 32}
    assert written == [(12, 32)]


def test_a_mesh_shares_the_cache_and_answers_as_one_device(monkeypatch):
    mesh = sharding.make_mesh("data=2,fsdp=2,tp=2")
    base = sharding.place_base(mesh, MODEL.params, ENDLESS)
    pairs = adapter()
    caches = []
    real = generating.write_answers

    def noted(*arguments):
        caches.extend(arguments[6])
        return real(*arguments)

    monkeypatch.setattr(generating, "write_answers", noted)
    alone = run(pairs=pairs)
    found = models.generate(
        MODEL, base, sharding.place_state(mesh, pairs), PROMPTS, max_new_tokens=8
    )
    assert found == alone
    assert len(caches) == 4
    for cache in caches[2:]:
        _, rows, _, heads, _ = cache.sharding.shard_shape(cache.shape)
        assert (rows, heads) == (cache.shape[1] // 4, ENDLESS.kv_heads // 2)


WIDE = models.ModelConfig(
    vocab_size=40, width=128, mlp_width=256, layers=3, heads=4, kv_heads=2, eos=()
)
LAYOUTS = [("data=2,fsdp=2,tp=2", None), ("fsdp=4,tp=2", "nf4")]


@pytest.mark.parametrize(("mesh", "kind"), LAYOUTS)
def test_no_weight_moves_while_answers_are_written(mesh, kind):
    rows, width, slots = 8, 16, 4
    grid = sharding.make_mesh(mesh)

    def made():
        base = models.init_params(jax.random.key(0), WIDE)
        return base if kind is None else models.quantize(base, kind)

    base = jax.eval_shape(made)
    base = sharding.shapes(base, sharding.base_shardings(grid, base, WIDE))
    entries = (WIDE.layers, rows, width, WIDE.kv_heads, WIDE.head_dim)
    cache = (jax.ShapeDtypeStruct(entries, jnp.float32),) * 2
    logits = jax.ShapeDtypeStruct((rows, WIDE.vocab_size), jnp.float32)
    given = (logits, cache, np.ones(rows, np.int32), np.int32(slots), None, 0.0)
    hardware = models.Hardware(unroll=1)
    with _mesh.using(grid):
        lowered = write_answers.lower(WIDE, hardware, slots, base, None, *given)
    text = lowered.compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute"
    moved = re.findall(rf"= (.*?) (?:{kinds})[(-]", text)
    shapes = [s for line in moved for s in re.findall(r"\[([\d,]+)\]", line)]
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    # What moves is a token of each row: less than a weight's codes over tp (2,048).
    assert sizes
    assert max(sizes) <= rows * WIDE.width


@pytest.mark.thorough
def test_a_batch_keeps_to_its_tokens(monkeypatch):
    whole = run(prompts=LONG)
    written = counted(monkeypatch, "write_answers", lambda a: a[6][0].shape[1:3])
    # Each row has room for 8 new tokens.
    for most, batches in ((1, 9), (80, 4), (1000, 1)):
        assert run(prompts=LONG, batch_tokens=most) == whole
        assert all(r * (w + 8) <= most or r == 1 for r, w in written)
        assert len(written) == batches
        written.clear()


def test_no_step_is_run_whose_logits_nobody_reads(monkeypatch):
    steps = []
    real = generating.next_logits

    def noted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return real(*arguments)

    monkeypatch.setattr(generating, "next_logits", noted)
    # A stop that one answer reaches early, and a limit, end the batch at once.
    config = dataclasses.replace(CONFIG, eos=(run()[0][3],))
    for settings, prompts, new in (
        (ENDLESS, PROMPTS, 1),
        (ENDLESS, PROMPTS, 5),
        (config, PROMPTS[:1], 8),
    ):
        model = models.make_model(settings, MODEL.params)
        write_answers.clear_cache()
        steps.clear()
        found = run(model, prompts=prompts, new=new)
        jax.effects_barrier()
        longest = max(map(len, found)) + (settings is config)
        assert len(steps) == longest - 1
        assert longest < 8


def test_nothing_to_do_gives_nothing_and_mistakes_are_named():
    assert run(prompts=[]) == []
    assert run(new=0) == [[]] * len(PROMPTS)
    score = functools.partial(models.token_log_probs, MODEL, MODEL.params, None)
    assert score(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)
    for act, said in (
        (lambda: run(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (lambda: run(new=64), "context of 64"),
        (lambda: run(temperature=1.0), "key"),
        (lambda: score(np.ones((1, 2)), np.ones((1, 3))), "one shape"),
    ):
        with pytest.raises(UserError, match=said):
            act()


def test_buckets_are_few_and_waste_at_most_half():
    sizes = {bucket(n) for n in range(1, 513)}
    assert len(sizes) == 13
    assert all(n <= bucket(n) <= max(8, 1.5 * n) for n in range(1, 513))


def test_log_probs_are_summed_over_the_answer():
    ids = np.asarray(tokens(batch=5))
    mask = np.zeros(ids.shape, np.float32)
    mask[:, 4:7] = 1
    found = models.token_log_probs(
        MODEL, MODEL.params, adapter(), ids, mask, batch_size=2
    )
    logits = jax.jit(MODEL.apply_fn)(MODEL.params, adapter(), ids)
    expected = -3 * losses.token_cross_entropy(logits, ids, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
