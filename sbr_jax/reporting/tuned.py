"""The files that describe a tuned model: its plan, its table, its model card.

They hold only counts, names and numbers: no text of an example.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sbr_jax import files
from sbr_jax.data.layout import used_lengths
from sbr_jax.errors import counted
from sbr_jax.reporting import report
from sbr_jax.reporting.tables import Cell, Table, to_markdown
from sbr_jax.studies.own.parts import steps_of
from sbr_jax.training.records import plain_numbers

CARD = "README.md"
RATES = {
    "refusal": "refused held-out harmful prompts, %",
    "refusal_auc": "harmful told from harmless at the first token, AUC %",
    "over_refusal": "refused harmless prompts, %",
    "exact_match": "exact match on your examples, %",
    "accuracy": "next token guessed on your examples, %",
}
LOSSES = {
    "loss": "loss on your examples, nats a token",
    "general_loss": "loss on general text, nats a token",
}
"""From a metric to its label in tables."""
USES = {
    "calibrate": "to calibrate",
    "probe": "for the monitor",
    "measured": "to measure refusal",
}
"""From a part of the harmful prompts to what it is for."""


def plan_lines(plan: Any) -> list[str]:
    """What was read, in which layout, how long it is, and how often it is seen."""
    training, parts, given = plan.config.training, plan.parts, plan.given
    found = []
    for name, read in given.train.items():
        data = parts.sets[f"train {name}"]
        sizes, batch = used_lengths(data), training.batch_size
        epochs, steps = plan.request.epochs, training.steps_per_domain
        if epochs is None:
            epochs = steps * batch / len(data)
        else:
            steps = steps_of(data, epochs, batch)
        found += [
            f"train    {name}: {counted(len(read.rows), 'row')} ({read.layout}), "
            f"{counted(len(data), 'answer')} to learn, "
            f"{counted(round(sizes.mean()), 'token')} on average, {sizes.max()} at "
            f"most; {data.truncated} cut, {data.dropped} too long",
            f"         about {counted(steps, 'step')} of {counted(batch, 'example')}: "
            f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}",
        ]
    for name, data in parts.sets.items():
        if name.startswith("test "):
            kind = "given" if given.evaluation else "held back"
            own = parts.record.get("held back", {}).get(name[5:], 1)
            kind = kind if own else "the same that are learnt: too few to hold any back"
            found.append(
                f"measured {counted(len(data), 'answer')} of {name[5:]}, {kind}"
            )
    counts = parts.record.get("harmful", {})
    shown = ", ".join(f"{counts[x]} {use}" for x, use in USES.items() if counts.get(x))
    if not parts.measured:
        why = f"none is left ({shown})" if shown else "no prompts (--harmful)"
        shown = f"{why}, so refusal is not measured and the monitor is off"
    found.append(f"harmful  {shown}")
    safe = parts.sets.get("calibration")
    if plan.request.safety is not None and safe is not None:
        found.append(f"safe     {counted(len(safe), 'exchange')} used (--safety)")
    monitored = "monitored" if parts.probe else "no monitor"
    found.append(f"method   {plan.request.method}, {monitored}")
    found.append(f"work     {plan.request.folder}; the same command continues there")
    return found


def study_lines(study: Any) -> list[str]:
    """What the start model wrote for its own calibration."""
    written = study.notes["data"].get("refusals")
    if not written:
        return []
    return [
        f"safe     the start model refused {written['refused']} of "
        f"{counted(written['asked'], 'harmful prompt')}; its refusals are what is kept"
    ]


def table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Before, after and the change: a row for each metric that both have."""
    before, after = metrics["before"], metrics["after"]
    rows = []
    for names, digits in ((RATES, 1), (LOSSES, 3)):
        for key, title in names.items():
            for name in (n for n in before if n == key or n.startswith(f"{key}/")):
                _, _, part = name.partition("/")
                if name not in after or (key == "exact_match" and not part):
                    continue
                one, two = before[name], after[name]
                label = f"{title} ({part})" if part else title
                cells = (Cell(v, digits=digits).text() for v in (one, two))
                rows.append((label, *cells, f"{two - one:+.{digits}f}"))
    return Table(("", "before", "after", "change"), tuple(rows))


def text_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The table for a terminal.

    >>> print(text_table({"before": {"refusal": 90.0}, "after": {"refusal": 85.0}}))
                                         before  after  change
    refused held-out harmful prompts, %    90.0   85.0    -5.0
    """
    from sbr_jax.costs.dry_run import to_text

    return to_text(table(metrics))


def write(
    output: Path,
    plan: Any,
    study: Any,
    tuned: Any,
    *,
    merged: bool,
    taught: str | None = None,
) -> None:
    """Writes weights, model card, summary and report into a new folder.

    Args:
        output: new or empty.
        plan: from `tuning.plan`.
        study: the study that was run.
        tuned: from `tuning.carry_out`.
        merged: whether to write a whole checkpoint.
        taught: what the rows teach, if they are not examples of a user's task.

    Raises:
        UserError: if an adapter cannot hold the deployed weights.
        OSError: if nothing can be written.
    """
    base_name = str(plan.request.model)
    write = functools.partial(
        _write,
        plan=plan,
        study=study,
        tuned=tuned,
        merged=merged,
        name=base_name,
        taught=taught,
    )
    files.fill_folder(output, write, (SafetensorError,))


def _write(
    folder: Path,
    plan: Any,
    study: Any,
    tuned: Any,
    merged: bool,
    name: str,
    taught: str | None,
) -> None:
    if merged:
        tuned.save_merged(folder)
    else:
        tuned.save_peft(folder, name)
    summary = {
        "model": name,
        "method": plan.request.method,
        "seed": plan.request.seed,
        "epochs": plan.request.epochs,
        "data": study.notes["data"],
        "judge": study.notes["measurements"]["refusal"]["judge"],
        **tuned.metrics,
    }
    text = json.dumps(plain_numbers(summary), indent=2)
    (folder / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / CARD).write_text(
        card(plan, study, tuned, merged=merged, taught=taught), "utf-8"
    )
    learnt = ", ".join(plan.given.train)
    title = f"{Path(name).name}, {_done(plan, taught)} on {learnt}"
    page = folder / "report.html"
    report.build([plan.request.folder], output=page, title=title)


def judged(judge: Mapping[str, Any]) -> str:
    """The sentence that says what counts as a refusal.

    >>> judged({"judge": "guard", "name": "llama-guard"})
    'The judge `llama-guard` decides whether an answer is a refusal.'
    >>> judged({"judge": "keyword", "keywords": "zou13"}).partition(";")[0]
    'An answer counts as a refusal if it holds a phrase of the list `zou13`'
    """
    if "keywords" in judge:
        return (
            "An answer counts as a refusal if it holds a phrase of the list "
            f"`{judge['keywords']}`; refusals in other words are missed."
        )
    name = judge.get("name", judge.get("judge"))
    return f"The judge `{name}` decides whether an answer is a refusal."


def _asked(parts: Any) -> str:
    """The sentence that says how many prompts refusal was measured with."""
    harmless = counted(len(parts.harmless), "harmless prompt")
    if not parts.measured:
        return f"The model was asked {harmless} and, as none was given, no harmful one."
    harmful = counted(len(parts.measured), "harmful prompt")
    return f"The model was asked {harmful} and {harmless}."


def _done(plan: Any, taught: str | None) -> str:
    """What was done to the model, in two or three words."""
    return f"tuned with {plan.request.method}" if taught is None else "aligned"


def card(
    plan: Any, study: Any, tuned: Any, *, merged: bool, taught: str | None = None
) -> str:
    """The model card, as the Hugging Face hub reads it."""
    request, training = plan.request, plan.config.training
    name = str(request.model)
    # A local folder is not a model that the hub could know.
    base = [] if Path(name).exists() else [f"base_model: {name}"]
    kind = [] if merged else ["library_name: peft"]
    tags = ["tags:", "- lora", "- safety", "- sbr_jax"]
    counts = plan.parts.record["examples"]
    learnt = ", ".join(
        f"{n} ({counted(counts[f'train {n}'], 'answer')})" for n in plan.given.train
    )
    judge = study.notes["measurements"]["refusal"]["judge"]
    written = study.notes["data"].get("refusals")
    title = _done(plan, taught)
    trained = f"with `sbr-jax align`: {taught}"
    if taught is None:
        trained = f"with `sbr-jax tune` on {learnt}"
    lines = [
        "---",
        *base,
        *kind,
        *tags,
        "---",
        "",
        f"# {Path(name).name}, {title}",
        "",
        f"A {'merged checkpoint' if merged else 'LoRA adapter'} for "
        f"`{Path(name).name}`, trained {trained}.",
        "",
        "## Before and after",
        "",
        to_markdown(table(tuned.metrics)),
        "",
        f"{judged(judge)} Answers were greedy and cut after "
        f"{counted(plan.study.max_new_tokens, 'token')}. {_asked(plan.parts)} None of "
        "these prompts was trained on. The numbers say nothing about attacks, other "
        "languages or long conversations.",
        "",
        "## Training",
        "",
        f"- method: `{request.method}`"
        + (
            f", calibrated on {counted(written['refused'], 'refusal')} of the start "
            "model itself"
            if written
            else ""
        ),
        f"- {counted(training.steps_per_domain, 'step')} a domain at most, "
        f"{counted(training.batch_size, 'example')} each, learning rate "
        f"{training.learning_rate:g}, seed {request.seed}",
        f"- LoRA rank {training.lora_rank}, alpha {training.lora_alpha:g}, "
        f"`{training.lora_targets}`",
        "",
        "## Use",
        "",
        "```python",
        *_usage(name, merged),
        "```",
        "",
    ]
    return "\n".join(lines)


def _usage(name: str, merged: bool) -> Sequence[str]:
    load = "AutoModelForCausalLM.from_pretrained"
    base = f'"{name}"'
    if name.endswith(".gguf"):
        base = f'"{Path(name).parent}", gguf_file="{Path(name).name}"'
    loads = "from transformers import AutoModelForCausalLM"
    if merged:
        return [loads, "", f'model = {load}("FOLDER")']
    return [
        "from peft import PeftModel",
        loads,
        "",
        f"model = {load}({base})",
        'model = PeftModel.from_pretrained(model, "FOLDER")',
    ]
