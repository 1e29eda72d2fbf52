"""Tables of a run, written as Markdown, as HTML or for a terminal."""

import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.table import Table as RichTable

from sbr_jax.reporting.columns import (
    COLUMNS,
    Cell,
    Table,
    cell,
    cell_of,
    digits_of,
    probe_gaps,
)
from sbr_jax.reporting.paired import paired_table
from sbr_jax.reporting.runs import Run

# --- the main table -------------------------------------------------------------------


def start_accuracy(run: Run) -> list[float | None]:
    """The aligned model's accuracy on each domain."""
    return [run.base.get(f"accuracy/{domain}") for domain in run.domains]


Labelled = tuple[Sequence[str], Mapping[str, Cell]]
"""The labels of a line, and its cells by the keys of `COLUMNS`."""


def row_cells(run: Run, method: str) -> dict[str, Cell]:
    """A row's cells of the main table, by key."""
    return {column.key: cell(run, method, column.key) for column in COLUMNS}


def comparison(
    head: Sequence[str], lines: Sequence[Labelled], first: Labelled | None = None
) -> Table:
    """A table of lines, with the columns that some line has a number for.

    ``first`` stands above the lines and adds no column.
    """
    used = [c for c in COLUMNS if any(x[c.key].mean is not None for _, x in lines)]
    rows = tuple(
        (*labels, *(cells[column.key].text() for column in used))
        for labels, cells in ([] if first is None else [first]) + list(lines)
    )
    notes = tuple(f"{column.title}: {column.hint}" for column in used)
    return Table((*head, *(column.title for column in used)), rows, notes)


def main_table(run: Run) -> Table:
    """Mean ± standard deviation over seeds, a row per method."""
    lines = [
        ((method, str(len(seeds))), row_cells(run, method))
        for method in run.methods
        if (seeds := run.seeds(method))
    ]
    known = [value for value in start_accuracy(run) if value is not None]
    accuracy = float(np.mean(known)) if known else None
    base = {"retention": 100.0} if "composite" in run.base else {}
    base |= {**run.base, "domain_accuracy": accuracy, "accuracy_learned": accuracy}
    start = {c.key: Cell(base.get(c.key), digits=digits_of(c.key)) for c in COLUMNS}
    return comparison(("method", "seeds"), lines, (("start", "–"), start))


# --- further tables -------------------------------------------------------------------


def trajectory_table(run: Run, key: str = "composite") -> Table:
    """A metric after each stage, a row per method."""
    rows = tuple(
        (method, *(cell_of(v, digits_of(key)).text() for v in values.T))
        for method in run.methods
        if len(values := run.metric(method, key))
    )
    return Table(("method", *run.stages), rows)


def accuracy_table(run: Run) -> Table:
    """Each domain's accuracy when learnt and at the end, a row per method."""
    start = [Cell(v).text() for v in start_accuracy(run)]
    rows = [("start", *(text for text in start for _ in range(2)))]
    for method in run.methods:
        pair = (run.accuracy(method), run.accuracy(method, at_end=True))
        if all(map(len, pair)):
            columns = [values[:, i] for i in range(len(run.domains)) for values in pair]
            rows.append((method, *(cell_of(v).text() for v in columns)))
    head = (part for domain in run.domains for part in (domain, f"{domain}, at end"))
    return Table(("method", *head), tuple(rows))


PROJECTION = (
    ("train", "metrics", "safety_gradient", "‖Πg‖ / ‖g‖"),
    ("train", "metrics", "removed", "removed / ‖g‖"),
    ("train", "metrics", "safety_update", "‖ΠΔ‖ / ‖Δ‖"),
    ("train", "metrics", "safety_task", "‖ΠΔ_g‖ / ‖Δ_g‖"),
    ("subspace", "diagnostics", "alpha", "mean α"),
    ("subspace", "diagnostics", "effective_rank", "mean rank"),
    ("subspace", "diagnostics", "held_out_share", "held-out share"),
    ("subspace", "diagnostics", "task_share", "task share"),
    ("subspace", "diagnostics", "selectivity", "selectivity"),
    ("subspace", "diagnostics", "discarded", "old energy lost"),
)
"""Stage, group, key and heading of the numbers that show whether a projection works."""


def projection_table(run: Run) -> Table:
    """The effect of each projection: means over seeds, domains, layers and units."""
    rows = []
    for method in run.methods:
        found = [run.values(method, *place) for *place, _ in PROJECTION]
        if any(found):
            means = (float(np.mean(v)) if v else None for v in found)
            rows.append((method, *(Cell(mean, digits=3).text() for mean in means)))
    notes = (
        "Π projects onto the safety subspace; g is the task gradient before, Δ the "
        "step that was applied after everything, Δ_g the task's part of it: without "
        "what an anchor brought past the projection.",
        "removed: norm of what the projection takes from g, 0 where α = 1.",
        "old energy lost: share of the old basis that a merge dropped.",
        "held-out share, task share: of the gradient energy of safe examples, and of "
        "the task's, in a subspace of safe examples that had no part in them; "
        "selectivity is their quotient, layer by layer: 1 protects nothing that "
        "learning does not need.",
    )
    return Table(("method", *(p[3] for p in PROJECTION)), tuple(rows), notes)


def monitor_table(run: Run) -> Table:
    """The monitor's probe beside the measured refusal at each domain's end."""
    rows = []
    for method in run.methods:
        before, after = run.probed(method, "probe"), run.probed(method)
        gaps, blocks = probe_gaps(run, method), run.probed(method, "blocks")
        if not (len(before) and len(gaps)):
            continue
        test = run.metric(method, "refusal")[:, 1:]
        for i, domain in enumerate(run.domains):
            columns = (before[:, i], after[:, i], test[:, i], gaps[:, i])
            cells = (cell_of(values).text() for values in columns)
            rows.append((method, domain, *cells, Cell(blocks[:, i].mean()).text()))
    notes = (
        "probe: refusal on the monitor's probe set after training; repaired: after "
        "the repairs that it asked for; test: what is measured then. Where the probe "
        "stands above the test, the monitor is blind to what was lost.",
    )
    head = ("method", "domain", "probe", "repaired", "test", "probe − test", "blocks")
    return Table(head, tuple(rows), notes)


def probe_table(run: Run) -> Table:
    """How well each row's risk probe separates prompts that it was not fitted on."""
    rows = []
    for method in run.methods:
        found = run.values(method, "subspace", "diagnostics", "auroc")
        if found:
            errors = run.values(method, "subspace", "diagnostics", "calibration_error")
            numbers = (np.mean(found), np.min(found), np.mean(errors))
            rows.append((method, *(Cell(float(v), digits=3).text() for v in numbers)))
    notes = (
        "AUROC and expected calibration error on a quarter of the defender's prompts, "
        "kept back; 0.5 is chance. --analysis probe measures other prompts.",
    )
    return Table(("method", "AUROC", "lowest", "calibration error"), tuple(rows), notes)


def judge_table(run: Run) -> Table:
    """Each judge's measured agreement with people, a row per judge."""
    judges = run.config.get("judges") or {}
    found = {name: j.get("agreement") or {} for name, j in judges.items()}
    models = sorted({m for a in found.values() for m in a.get("by_model", {})})
    rows = []
    for name, agreement in found.items():
        by_model = agreement.get("by_model", {})
        values = [
            *(agreement.get(k) for k in ("accuracy", "partial_refused", "undecided")),
            *(by_model.get(model) for model in models),
        ]
        whole, *others = (Cell(value).text() for value in values)
        kappa = Cell(agreement.get("kappa"), digits=2).text()
        rows.append((name, whole, kappa, *others))
    counts = {a["count"] for a in found.values() if a}
    notes = (
        "Agreement with the people who labelled the answers of these models to XSTest"
        + "".join(f", {count} of them decided" for count in sorted(counts))
        + ", %. Partial refusals are left out and given apart: the share that the "
        "judge calls a refusal.",
        "undecided: answers that the judge calls gibberish or cannot read; they count "
        "as disagreement.",
        *(f"{name}: {j['note']}." for name, j in judges.items() if j.get("note")),
    )
    head = ("judge", "all", "κ", "partial refused", "undecided", *models)
    return Table(head, tuple(rows), notes)


def harness_table(run: Run) -> Table:
    """The results of lm-eval: mean ± deviation over seeds, a row per method."""
    names = list(dict.fromkeys(k for entry in run.harness for k in entry["metrics"]))
    rows = []
    for method in dict.fromkeys(entry["method"] for entry in run.harness):
        own = [e["metrics"] for e in run.harness if e["method"] == method]
        columns = [[m[n] for m in own if m.get(n) is not None] for n in names]
        cells = (cell_of(np.asarray(values, np.float64)).text() for values in columns)
        rows.append((method, str(len(own)), *cells))
    notes = (
        "Start model and final deployed weights under EleutherAI's harness, in its "
        "words and metrics: accuracies in %, bbq_bias absolute, in ambiguous contexts.",
    )
    return Table(("method", "runs", *names), tuple(rows), notes)


EXTRA: dict[str, Callable[[Run], Table]] = {
    "What the projections did": projection_table,
    "What the monitor saw": monitor_table,
    "How well the risk probes tell": probe_table,
    "How far the judges agree with people": judge_table,
    "Under lm-eval": harness_table,
}
"""Tables that only some runs have, by title."""


def tables_of(run: Run) -> dict[str, Table]:
    """All tables of a run by title, without empty ones."""
    found = {
        "Results": main_table(run),
        "Differences from the best row": paired_table(run),
        "Composite safety after each stage": trajectory_table(run),
        "Accuracy of each domain": accuracy_table(run),
        **{title: make(run) for title, make in EXTRA.items()},
    }
    return {title: table for title, table in found.items() if table.rows}


# --- writing --------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """A table in GitHub's Markdown.

    >>> print(to_markdown(Table(("a", "b"), (("1", "2"),))))
    | a | b |
    | -- | -: |
    | 1 | 2 |
    """
    rule = "| -- |" + " -: |" * (len(table.head) - 1)
    rows = [f"| {' | '.join(row)} |" for row in (table.head, *table.rows)]
    return "\n".join([rows[0], rule, *rows[1:]])


def to_html(table: Table) -> str:
    """A table element."""
    head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in table.head)
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{html.escape(x)}</td>" for x in rest)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def split(table: Table, width: int) -> list[Table]:
    """Splits a table that is too wide into several, each with the first column.

    >>> wide = Table(("a", "bbbb", "cccc"), (("1", "2", "3"),))
    >>> [part.head for part in split(wide, 8)]
    [('a', 'bbbb'), ('a', 'cccc')]
    """
    rows = (table.head, *table.rows)
    widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    for index in range(1, len(widths)):
        used = widths[0] + sum(widths[i] for i in groups[-1])
        if groups[-1] and used + widths[index] > width:
            groups.append([])
        groups[-1].append(index)
    parts = [[tuple(row[i] for i in (0, *group)) for row in rows] for group in groups]
    return [Table(part[0], tuple(part[1:])) for part in parts]


def to_rich(table: Table, title: str, width: int) -> list[RichTable]:
    """A table for a terminal of this width, split into parts if needed."""
    found = []
    for number, part in enumerate(split(table, width)):
        out = RichTable(header_style="bold", box=None, title_justify="left")
        out.title = title if number == 0 else None
        for index, name in enumerate(part.head):
            out.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in part.rows:
            out.add_row(*row)
        found.append(out)
    return found
