"""Columns of the main table, their cells, and what a table is."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sbr_jax.reporting.runs import Run


class Column(NamedTuple):
    """One column of the main table.

    Attributes:
        key: the metric's name in `results.jsonl`, or a derived one.
        title: the heading.
        hint: what it means, and which direction is better.
    """

    key: str
    title: str
    hint: str


COLUMNS = (
    Column("composite", "composite", "mean of refusal, truth and 100 − bias; higher"),
    Column("retention", "retention %", "final composite over the start's; higher"),
    Column("lowest", "lowest", "least composite (or refusal) after a domain; higher"),
    Column("refusal", "refusal", "refused harmful requests, %; higher"),
    Column("jailbreak_refusal", "jailbreak", "refused inside a jailbreak; higher"),
    Column("refusal_unseen", "unseen harm", "refused, of kinds no defence saw; higher"),
    Column("refusal_auc", "first token", "harmful told from harmless, AUC %; higher"),
    Column(
        "harmful_score", "harmful score", "harmful requests complied with, %; lower"
    ),
    Column("asr", "ASR", "the same as the attack asks them, %; lower"),
    Column("refusal_gcg", "refusal, GCG", "refused with a searched suffix, %; higher"),
    Column("truthful", "truthful", "truthful answers, %; higher"),
    Column("bias", "bias", "|bias score| in ambiguous contexts; lower"),
    Column("over_refusal", "over-refusal", "refused benign look-alikes, %; lower"),
    Column("domain_accuracy", "domain acc.", "mean over domains at the end; higher"),
    Column("exact_match", "exact match", "right answers word for word, %; higher"),
    Column("accuracy_learned", "when learnt", "of each domain right after it; higher"),
    Column("general", "general", "untouched general knowledge, %; higher"),
    Column("safety_loss", "safety loss", "on held-out safe answers, nats; lower"),
    Column("domain_loss", "domain loss", "mean held-out loss of domains; lower"),
    Column("general_loss", "general loss", "on held-out general text, nats; lower"),
    Column("seconds_per_step", "s / step", "training time of a step; lower"),
    Column("triggers", "CSM triggers", "repairs by the monitor per seed"),
    Column("probe", "probe", "refused on the monitor's probe set, %; near refusal"),
    Column("probe_gap", "probe − test", "mean over domain ends, points; near 0"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A mean and its standard deviation over seeds; None is "not measured"."""

    mean: float | None = None
    std: float | None = None
    digits: int = 1

    def text(self) -> str:
        """The number as shown.

        >>> Cell(93.24, 0.51).text(), Cell().text(), Cell(0.0123, digits=3).text()
        ('93.2 ± 0.5', '–', '0.012')
        """
        if self.mean is None or not np.isfinite(self.mean):
            return "–"
        spread = "" if self.std is None else f" ± {self.std:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{spread}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading, rows of text, and notes on the columns."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def with_column(self, title: str, texts: Iterable[str]) -> "Table":
        """The table with another column at its right."""
        rows = zip(self.rows, texts, strict=True)
        return Table(
            (*self.head, title), tuple((*row, text) for row, text in rows), self.notes
        )


# --- a cell ---------------------------------------------------------------------------


def cell_of(values: np.ndarray, digits: int = 1) -> Cell:
    """Mean and standard deviation of a number for each seed."""
    if not len(values) or not np.all(np.isfinite(values)):
        return Cell()
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), std, digits)


def digits_of(key: str) -> int:
    """Decimals that a metric is shown with."""
    return 3 if key.endswith("loss") else 1


def cell(run: Run, method: str, key: str) -> Cell:
    """One cell of the main table."""
    if key == "seconds_per_step":
        return Cell(run.seconds_per_step(method), digits=3)
    if key == "triggers":
        return Cell(run.triggers(method))
    return cell_of(per_seed(run, method, key), digits_of(key))


def per_seed(run: Run, method: str, key: str) -> np.ndarray:
    """A column's number for each finished seed, `[seeds]`; empty if there is none."""
    if key == "retention":
        composite = run.metric(method, "composite")
        return 100 * composite[:, -1] / composite[:, 0]
    if key == "lowest":
        safety = run.metric(method, "composite")
        safety = safety if len(safety) else run.metric(method, "refusal")
        # After one domain it is the last value itself.
        return safety[:, 1:].min(1) if len(run.domains) > 1 else np.zeros(0)
    if key in ("domain_accuracy", "accuracy_learned"):
        accuracy = run.accuracy(method, at_end=key == "domain_accuracy")
        return accuracy.mean(1) if accuracy.size else np.zeros(0)
    if key == "probe":
        return run.probed(method)[:, -1]
    if key == "probe_gap":
        return probe_gaps(run, method).mean(1)
    return run.metric(method, key)[:, -1]


def probe_gaps(run: Run, method: str) -> np.ndarray:
    """The probe's refusal minus the measured one at each domain's end, or empty."""
    probe, test = run.probed(method), run.metric(method, "refusal")[:, 1:]
    return probe - test if len(probe) == len(test) else probe[:0]
