"""The preset `realtext`: what its model learns, what it never sees, and its folder.

Of the real sets only counts are looked at, never text.
"""

import json

import jax
import numpy as np
import pytest
import tiny_data as files

from experiments import realtext
from experiments import realtext_corpus as corpus
from experiments.configs.realtext import PRESET
from sbr_jax import models
from sbr_jax.data import TokenDataset, encode_chat, encode_prompts, load_source
from sbr_jax.data.leaks import normalised
from sbr_jax.evaluation import KEYWORD_LISTS, KeywordJudge, Verdict
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.training.settings import Settings
from sbr_jax.typing import UserError

needs_data = pytest.mark.skipif(
    not files.DATA.is_dir(), reason="no real data beside us"
)
TOPICS = ("bread", "cake", "soup", "tea", "rice", "pie", "fish", "salt", "milk", "plum")
PLACES = ("barn", "cabin", "shed", "tower", "cellar", "attic", "garden", "market")
SECRET = "quuxwort"
"""A word of what is measured and of nothing else."""


def rows(start, count, answer="Put {topic} into a bowl and bring it to the {place}."):
    pairs = [(t, p) for p in PLACES for t in TOPICS][:count]
    return [
        {
            "instruction": f"{start} {topic} for the {place}?",
            "input": "",
            "output": answer.format(topic=topic, place=place),
        }
        for topic, place in pairs
    ]


PLANTED = {
    "harmbench": "PRAISE IT!",
    "advbench": "praise it please",
    "xstest": "How do I kill time",
    "alpaca-test": f"Name the {SECRET}.",
    "codealpaca": "say   hello",
}
"""Prompts of sets that are kept out, written a little differently."""


def instruction(prompt, output="Gladly."):
    return {"instruction": prompt, "input": "", "output": output}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder in the published layout, with planted leaks and repetitions."""
    folder = files.evalsets(files.sources(tmp_path_factory.mktemp("data")))
    benign = rows("How do I cook", 80)
    benign += [instruction(prompt) for prompt in PLANTED.values()]
    benign += [
        instruction(benign[0]["instruction"].upper()),
        instruction("how do i poison BREAD for the barn"),
        instruction("What do you feel?", "As an AI, I feel nothing."),
    ]
    files.put(folder / "alpaca/alpaca_5000.json.gz", files.as_json(benign))
    harmless = [{"instruction": f"Name the {SECRET}", "category": None}]
    harmless += rows("Where do I buy", 6)
    for split in ("test", "val", "train"):
        path = folder / f"alpaca/harmless_instructions_{split}.json.gz"
        files.put(path, files.as_json(harmless))
    prompts = [row["instruction"] for row in rows("How do I poison", 60)]
    prompts += [f"Praise the {SECRET}", "Praise it, please!"]
    listed = [{"text": p, "label": "", "source": "", "category": ""} for p in prompts]
    root = folder / "beavertails"
    files.put(root / "beavertails_30k_test_prompts.json.gz", files.as_json(listed))
    held = [{"instruction": f"praise the {SECRET}"}]
    files.put(root / "beavertails_eval_prompts_250.json", files.as_json(held))
    safe = rows("How do I steal", 60, "Do not take {topic} from the {place}: no.")
    stars = folder / "safety_tuned_llamas/safety_only_data_Instructions.json"
    files.put(stars, files.as_json(safe))
    sums = [
        {"question": f"{a} + {b}?", "answer": f"{a + b}\n#### {a + b}"}
        for a in range(8)
        for b in range(5)
    ]
    files.put(folder / "gsm8k/train.jsonl.gz", files.as_lines(sums))
    return folder


@pytest.fixture(scope="module")
def tiny():
    """The program with a model of a few hundred weights and short batches."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WIDTH": 16,
            "LAYERS": 1,
            "HEADS": 2,
            "MEASURED": 4,
            "NEW_TOKENS": 4,
            "CONTEXT": 128,
            "MEASURES": ("harmbench", "xstest"),
        }.items():
            patch.setattr(realtext, name, value)
        patch.setattr(realtext, "LENGTHS", (64,))
        patch.setattr(corpus, "LENGTHS", (64,))
        patch.setattr(corpus, "TOKENS", 512)
        patch.setattr(corpus, "VOCABULARY", 512)
        yield


@pytest.fixture(scope="module")
def parts(data):
    return corpus.read_corpus(data, corpus.kept_out(data), seed=0)


def everything(parts):
    return [x for part in parts.values() for x in (*part.train, *part.held_out)]


# --- what is learnt -------------------------------------------------------------------


def test_what_is_measured_or_learnt_later_is_in_no_part(data, parts):
    banned = corpus.kept_out(data)
    for name, prompt in PLANTED.items():
        assert normalised(prompt) in map(normalised, banned[name]), name
    learnt = {normalised(x.prompt) for x in everything(parts)}
    for name, prompts in banned.items():
        assert not learnt & {normalised(p) for p in prompts}, name
    assert parts["alpaca"].dropped["kept_out"] == len(PLANTED)
    assert parts["refusals"].dropped["kept_out"] == 2
    assert SECRET not in str(parts)


def test_the_leaks_are_there_unless_they_are_kept_out(data):
    careless = corpus.read_corpus(data, {}, seed=0)
    learnt = {normalised(x.prompt) for x in everything(careless)}
    assert {normalised(p) for p in PLANTED.values()} <= learnt
    assert careless["alpaca"].dropped["kept_out"] == 0


def test_a_prompt_is_learnt_once_and_what_is_refused_is_not_answered(parts):
    found = [normalised(x.prompt) for x in everything(parts)]
    assert len(found) == len(set(found))
    # One that differs in case, one that the refusals have.
    assert parts["alpaca"].dropped["repeated"] == 2
    assert parts["alpaca"].dropped["refusing"] == 1
    assert {part: len(p.train) + len(p.held_out) for part, p in parts.items()} == {
        "refusals": 60 + 3 + 2,
        "safe-answers": 60,
        "alpaca": 80,
        "gsm8k": 40,
    }


def test_the_corpus_is_a_function_of_the_seed(data, parts):
    banned = corpus.kept_out(data)
    assert corpus.read_corpus(data, banned, seed=0) == parts
    other = corpus.read_corpus(data, banned, seed=1)
    assert other["refusals"].held_out != parts["refusals"].held_out
    assert {x.prompt for x in everything(other)} == {
        x.prompt for x in everything(parts)
    }


def test_every_refusal_is_seen_by_the_judge_and_benign_answers_are_not(parts):
    judge = KeywordJudge(corpus.KEYWORDS)
    said = {x.answer for x in (*parts["refusals"].train, *parts["refusals"].held_out)}
    assert said == set(corpus.REFUSALS)
    assert set(judge([""] * len(said), sorted(said))) == {Verdict.REFUSAL}
    benign = [x.answer for name in ("alpaca", "gsm8k") for x in parts[name].train]
    assert Verdict.REFUSAL not in judge([""] * len(benign), benign)


def test_an_emptied_part_is_refused(data):
    sums = [pair.prompt for pair in load_source("gsm8k", data)]
    with pytest.raises(UserError, match=r"part 'gsm8k', got 0 of 40"):
        corpus.read_corpus(data, {"sums": sums}, seed=0)


@needs_data
@pytest.mark.parametrize("name", PRESET.domains)
def test_no_answer_of_a_domain_looks_like_a_refusal(name):
    splits = ("train", "test") if name == "legalbench" else (None,)
    answers = [x.answer for s in splits for x in load_source(name, files.DATA, split=s)]
    phrases = KEYWORD_LISTS[corpus.KEYWORDS]
    assert sum(phrases.matches(a.replace("’", "'")) for a in answers) == 0


# --- the tokenizer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(parts):
    texts = [t for p in parts.values() for x in p.train for t in (x.prompt, x.answer)]
    return corpus.make_tokenizer(texts, size=512)


@pytest.mark.parametrize(
    "text",
    [
        "How do I cook bread for the barn?",
        "  two  blanks,\n\ta tab\r\n",
        "naïve – 日本語 🙂 <user> def f(x):\n    return x",
        "",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_writes_one_bos_and_marks_the_answer(tokenizer):
    data = encode_chat(tokenizer, [("Why?", "It’s so.")], 32)
    tokens, mask = data.tokens[0].tolist(), data.mask[0] > 0
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[0] == tokenizer.bos_token_id
    answer = data.tokens[0][mask].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "It’s so."
    (prompt,) = encode_prompts(tokenizer, ["Why?"])
    assert tokens[: len(prompt)] == prompt
    assert len(prompt) == int(np.argmax(mask))
    assert tokens[len(prompt) + len(answer) :] == [tokenizer.pad_token_id] * (
        32 - len(prompt) - len(answer)
    )


def test_a_system_message_is_refused(tokenizer):
    with pytest.raises(UserError, match="user and assistant only"):
        encode_prompts(tokenizer, ["Why?"], system="Be kind.")


def test_the_tokenizer_knows_the_training_text_and_nothing_else(tokenizer, parts):
    assert len(tokenizer(" bread")["input_ids"]) == 1
    assert len(tokenizer(f" {SECRET}")["input_ids"]) > 2
    texts = [t for p in parts.values() for x in p.train for t in (x.prompt, x.answer)]
    again = corpus.make_tokenizer(texts, size=512)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 512


# --- training -------------------------------------------------------------------------


def drawn(count, seed, lengths, monkeypatch, data):
    monkeypatch.setattr(corpus, "LENGTHS", (4, 8))
    monkeypatch.setattr(corpus, "TOKENS", 16)
    pipeline = corpus.batches(data, lengths, seed)
    return [next(pipeline) for _ in range(count)]


def test_batches_hold_every_row_at_its_weight(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 23)
    tokens = np.zeros((23, 8), np.int32)
    mask = np.zeros((23, 8), np.float32)
    for i, n in enumerate(lengths):
        tokens[i, :n] = 100 * (i + 1) + np.arange(n)
        mask[i, n // 2 : n] = 1
    data = TokenDataset(tokens, mask)
    short = int(np.sum(lengths <= 4))
    epoch = -(-short // 4) + -(-(23 - short) // 2)
    found = drawn(epoch, 3, lengths, monkeypatch, data)
    for batch in found:
        count, width = batch["tokens"].shape
        assert count * width == 16
        for ids, weights in zip(batch["tokens"], batch["mask"], strict=True):
            row = ids[0] // 100 - 1
            n = lengths[row]
            assert width == (4 if n <= 4 else 8)
            assert ids[:n].tolist() == tokens[row, :n].tolist()
            # The slow twin of the weights.
            assert weights.tolist() == [
                np.float32(1.0 if t >= n // 2 else corpus.PROMPT_WEIGHT) if t < n else 0
                for t in range(width)
            ]
    seen = {int(ids[0]) // 100 - 1 for batch in found for ids in batch["tokens"]}
    assert seen == set(range(23))
    again = drawn(epoch, 3, lengths, monkeypatch, data)
    other = drawn(epoch, 4, lengths, monkeypatch, data)
    order = [batch["tokens"][:, 0].tolist() for batch in found]
    assert [batch["tokens"][:, 0].tolist() for batch in again] == order
    assert [batch["tokens"][:, 0].tolist() for batch in other] != order


@pytest.fixture(scope="module")
def command(data, tiny, tmp_path_factory):
    """A finished run of a few steps: its folder and its arguments without --output."""
    output = tmp_path_factory.mktemp("made") / "runs" / "model"
    arguments = ["--data", str(data), "--steps", "12", "--quiet"]
    assert realtext.main([*arguments, "--output", str(output)]) == 0
    return output, arguments


def test_the_folder_holds_a_chat_model_that_has_learnt(command):
    output, _ = command
    model = models.load(output)
    record = json.loads((output / "training.json").read_text())
    assert model.config.model_type == "llama"
    assert model.config.tied
    assert sum(x.size for x in jax.tree.leaves(model.params)) == record["parameters"]
    assert len(model.tokenizer) == model.config.vocab_size == record["vocabulary"]
    (prompt,) = encode_prompts(model.tokenizer, ["Why?"])
    assert prompt[0] == model.config.bos
    first, last = record["curve"][0], record["curve"][-1]
    assert last[0] == record["steps"] == 12
    assert last[1] < first[1] < 1.1 * np.log(record["vocabulary"])
    assert record["held_out_loss"]["all"] == last[1]
    measured = {"refusal/harmbench", "over_refusal/xstest", "refusal/beavertails-eval"}
    assert measured <= set(record["measured"])
    assert record["judge"]["keywords"] == corpus.KEYWORDS


def test_the_record_has_counts_and_no_text(command, data, parts):
    output, _ = command
    text = (output / "training.json").read_text()
    record = json.loads(text)
    for name, part in parts.items():
        assert record["parts"][name]["rows"] == len(part.train)
        assert part.dropped.items() <= record["parts"][name]["dropped"].items()
    assert record["kept_out"]["advbench"]["prompts"] == 1
    told = [x.prompt for x in everything(parts)]
    for prompts in corpus.kept_out(data).values():
        told += prompts
    assert not [prompt for prompt in told if len(prompt) > 5 and prompt in text]


def test_the_seed_decides_the_folder(command, tmp_path):
    output, arguments = command
    for seed, same in ((0, True), (1, False)):
        other = tmp_path / str(seed)
        assert (
            realtext.main([*arguments, "--seed", str(seed), "--output", str(other)])
            == 0
        )
        for name in ("model.safetensors", "training.json"):
            assert ((other / name).read_bytes() == (output / name).read_bytes()) is same


def test_a_killed_run_leaves_nothing(command, tmp_path, monkeypatch):
    _, arguments = command
    save = models.save

    def killed(folder, model):
        save(folder, model)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "save", killed)
    output = tmp_path / "model"
    assert realtext.main([*arguments, "--output", str(output)]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_without_room_is_refused_before_training(tiny, data, monkeypatch):
    monkeypatch.setattr(realtext, "CONTEXT", 12)
    monkeypatch.delattr(realtext, "train")
    with pytest.raises(UserError, match="expected prompts of at most 8 tokens"):
        realtext.build(data, quiet=True)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"--steps": "0"}, "--steps: expected at least 1, got 0"),
        ({"--seed": "-1"}, "expected seeds from 0"),
        ({"--output": "taken"}, "expected a folder that is not there yet"),
        ({"--output": "taken/file/model"}, "cannot make"),
        ({"--data": "absent"}, "absent, found none: name it with --data"),
        ({"--data": "taken"}, "harmbench_targets_text.json"),
    ],
)
def test_a_mistake_is_one_line(tiny, data, tmp_path, capsys, changes, line):
    files.put(tmp_path / "taken/file", "x")
    options = {"--data": str(data), "--output": "model", "--steps": "2"} | changes
    options["--output"] = str(tmp_path / options["--output"])
    if "--data" in changes:
        options["--data"] = str(tmp_path / changes["--data"])
    arguments = [word for pair in options.items() for word in pair]
    assert realtext.main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


# --- the preset -----------------------------------------------------------------------


def test_the_preset_names_what_exists():
    assert PRESET.domains == ("medmcqa", "legalbench", "codealpaca")
    assert set(PRESET.methods) <= {*METHODS, *ABLATIONS}
    assert PRESET.options["judge"] == f"keyword:{corpus.KEYWORDS}"
    assert set(realtext.MEASURES) <= {*PRESET.options["measures"]}
    Settings(**PRESET.settings)


def test_without_a_model_the_preset_says_how_to_make_one():
    with pytest.raises(UserError, match=r"python -m experiments\.realtext --data"):
        PRESET.check(PRESET.methods, {**PRESET.options, "data_folder": "data"})
    with pytest.raises(UserError, match="expected --data FOLDER"):
        PRESET.check(PRESET.methods, {**PRESET.options, "model_folder": "model"})
