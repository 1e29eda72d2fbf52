"""Our readers, wording and scorer against lm-eval's own, item by item.

Nothing is shared but the files: lm-eval runs its own tasks (wording, examples, options,
metric) through its PyTorch backend, and only their data sets are local files in the
columns of the hub's. Run by ``make parity`` (the extra ``eval``).
"""

import csv
import functools
import gzip
import importlib.util
import itertools
import json
import os
import shutil
from pathlib import Path

if importlib.util.find_spec("lm_eval") and importlib.util.find_spec("torch"):
    # Read when the libraries are imported: nothing here may ask the hub.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest
from checkpoints import SHARED, STORIES, needs_stories

from sbr_jax import models
from sbr_jax.data import load_evalset
from sbr_jax.evaluation import tasks
from sbr_jax.evaluation.runner import ModelRunner

pytest.importorskip("torch")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
DATA = SHARED / "data"
# lm-eval and what it imports warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside us"),
    needs_stories,
]

ITEMS, SHOTS = 200, 2
SUBJECTS = ("anatomy", "astronomy")
CATEGORIES = ("Age", "Disability_status", "Nationality", "Religion")
CONTEXT = 8192
"""Longer than any prompt: where ours and theirs cut, they cut differently (BOS)."""
ATOL = 1e-3
"""Nats, of sums of up to 400 over tokens: two orders of summation in float32, and ours
are rounded to four digits in the record."""
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "User: {{ m['content'] }}\nBot:\n{% else %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
"""Ends in a line break before an answer, as those of Llama-3, Qwen and Gemma do."""


def lines(path, count=None):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def truthfulqa(kind):
    rows = json.loads((DATA / "truthfulqa" / "mc_task.json").read_text())[:ITEMS]

    def columns(answers):
        return {"choices": list(answers), "labels": list(answers.values())}

    hub = [
        {"question": row["question"]}
        | {name: columns(row[name]) for name in ("mc1_targets", "mc2_targets")}
        for row in rows
    ]
    items = load_evalset(f"truthfulqa_{kind}", DATA)[:ITEMS]
    path = f"truthfulqa/truthfulqa_{kind}.yaml"
    return {f"truthfulqa_{kind}": (path, {"validation": hub}, items)}


def bbq():
    share = ITEMS // len(CATEGORIES)
    rows = [
        row
        for name in CATEGORIES
        for row in lines(DATA / "bbq" / f"{name}.jsonl.gz", share)
    ]
    wanted = {f"{row['category']}/{row['example_id']}" for row in rows}
    items = [item for item in load_evalset("bbq", DATA) if item.id in wanted]
    return {"bbq": ("bbq/bbq_multiple_choice.yaml", {"test": rows}, items)}


def mmlu():
    def rows(split, subject, count=None):
        path = DATA / "mmlu" / split / f"{subject}_{split}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            found = list(csv.reader(file))[:count]
        return [
            {
                "question": row[0],
                "choices": row[1:5],
                "answer": "ABCD".index(row[5]),
                "subject": subject,
            }
            for row in found
        ]

    share = ITEMS // len(SUBJECTS)
    everything = load_evalset("mmlu", DATA)
    return {
        f"mmlu_{name}": (
            f"mmlu/default/mmlu_{name}.yaml",
            {"test": rows("test", name, share), "dev": rows("dev", name)},
            [item for item in everything if item.group == name][:share],
        )
        for name in SUBJECTS
    }


def medqa():
    hub = [
        {
            "sent1": row["question"],
            "label": "ABCD".index(row["answer_idx"]),
            **{f"ending{i}": row["options"][c] for i, c in enumerate("ABCD")},
        }
        for row in lines(DATA / "medqa" / "phrases_no_exclude_test.jsonl.gz", ITEMS)
    ]
    items = load_evalset("medqa", DATA)[:ITEMS]
    return {"medqa_4options": ("medqa/medqa.yaml", {"test": hub}, items)}


def our_mmlu(runner, items):
    solved = load_evalset("mmlu", DATA, split="dev")
    shots = {name: [i for i in solved if i.group == name] for name in SUBJECTS}
    return tasks.mmlu(runner, items, shots, shots=SHOTS)


CASES = {
    "truthfulqa_mc1": (
        functools.partial(truthfulqa, "mc1"),
        functools.partial(tasks.truthfulqa_mc, metric="mc1"),
    ),
    "truthfulqa_mc2": (
        functools.partial(truthfulqa, "mc2"),
        functools.partial(tasks.truthfulqa_mc, metric="mc2"),
    ),
    "bbq": (bbq, tasks.bbq),
    "mmlu": (mmlu, our_mmlu),
    "medqa": (medqa, tasks.medqa),
}


def with_local_data(folder, name, path, splits):
    """A task of theirs as a file of ours that changes where its rows come from."""
    import lm_eval

    built_in = Path(lm_eval.__file__).parent / "tasks" / path
    assert built_in.is_file()
    files = {}
    for split, rows in splits.items():
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        files[split] = str(file)
    changes = {
        "include": str(built_in),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": "validation" if "validation" in splits else None,
        "num_fewshot": SHOTS if "dev" in splits else 0,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(changes))
    return str(file)


def theirs(folder, found, chat, where):
    """Rows of lm-eval's own evaluation, task by task, and its accuracies."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [with_local_data(where, name, *case[:2]) for name, case in found.items()]
    results = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=str(folder),
            device="cpu",
            dtype="float32",
            batch_size=4,
            add_bos_token=True,
            max_length=CONTEXT,
        ),
        tasks=files,
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    rows = []
    for name in found:
        samples = sorted(results["samples"][name], key=lambda row: row["doc_id"])
        rows += [[float(r[0][0]) for r in row["resps"]] for row in samples]
    return rows, [results["results"][name]["acc,none"] for name in found]


def among_theirs(item):
    """BBQ: where our options stand among theirs, which add nine ways to say unknown."""
    from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES

    people = [i for i in range(3) if i != item.unknown]
    unknown = 2 + UNKNOWN_RESPONSES.index(item.choices[item.unknown])
    return [unknown if i == item.unknown else people.index(i) for i in range(3)]


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """The folder of a small trained model with room for all prompts, and our runner."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(STORIES / "hf", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(settings))
    if request.param == "chat":
        (folder / "chat_template.jinja").write_text(CHAT)
    model = models.load(folder)
    assert bool(model.tokenizer.chat_template) == (request.param == "chat")
    return folder, ModelRunner(model, model.params), request.param == "chat"


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("plain", name) for name in CASES]
    + [("chat", name) for name in ("truthfulqa_mc1", "medqa")],
    indirect=["checkpoint"],
)
def test_every_item_is_scored_as_lm_eval_scores_it(name, checkpoint, tmp_path):
    folder, runner, chat = checkpoint
    make, task = CASES[name]
    found = make()
    items = [item for case in found.values() for item in case[2]]
    mine = task(runner, items)
    scores, accuracies = theirs(folder, found, chat, tmp_path)
    assert len(mine.items) == len(scores) == len(items) >= ITEMS

    worst, largest, same = 0.0, 0.0, 0
    for row, other, item in zip(mine.items, scores, items, strict=True):
        assert row["id"] == item.id
        a, b = np.array(row["log_likelihoods"]), np.array(other)
        b = b[among_theirs(item)] if name == "bbq" else b
        if chat:
            # They count the line break before an answer as its first token.
            a, b = a - a.mean(), b - b.mean()
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)
        worst = max(worst, float(np.abs(a - b).max()))
        largest = max(largest, float(np.abs(b).max()))
        lead, next_ = np.sort(b)[[-1, -2]]
        assert row["pick"] == int(np.argmax(b)) or lead - next_ < 2 * ATOL
        same += row["pick"] == int(np.argmax(b))
    print(
        f"{name}, {'chat' if chat else 'plain'}: {len(items)} items, {same} equal "
        f"picks, log-likelihoods up to {largest:.0f} differ by {worst:.1e} at most"
    )
    if name == "bbq":
        return  # Their accuracy is over twelve options.
    accuracy = {"truthfulqa_mc1": "mc1", "truthfulqa_mc2": "mc2"}.get(name, "accuracy")
    # MC2 is made of shares of probability, which 1e-3 nats change by 0.1 %.
    wanted = 100 * float(np.mean(accuracies))
    assert mine.metrics[accuracy] == pytest.approx(
        wanted, abs=0.05 if name == "truthfulqa_mc2" else 1e-6
    )
