"""A run's folder: its configuration, its lock, and its published result files.

``config.json`` holds the settings that decide the results. A stage's folder is finished
once its ``result.json`` is renamed into place. ``results.jsonl``, ``timings.jsonl`` and
``summary.json`` are functions of the finished stages and are rewritten each time.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sbr_jax import distributed, storage
from sbr_jax.distributed.logs import FOLDER as LOGS
from sbr_jax.training import locks
from sbr_jax.training.records import (
    DamagedError,
    again,
    digest_of,
    plain_numbers,
    read_json,
    write_atomically,
    write_record,
    writing,
)
from sbr_jax.training.stage_records import (
    BASE,
    HISTORY,
    PARTIAL,
    RESULT,
    place_of,
    read_result,
)
from sbr_jax.training.summary import summarise
from sbr_jax.typing import UserError

ENVIRONMENT = ("versions", "hardware")
"""Keys of ``config.json`` that are recorded but not compared."""
PUBLISHED = ("results.jsonl", "timings.jsonl", "summary.json")
"""Files written from the finished stages."""
RESTORE = "restore it, or choose another folder"


class RunFolder:
    """A run's folder, locked while it is open.

    Of several processes only the first touches it; the others rely on the first.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Names the folder; nothing is touched.

        Raises:
          UserError: for a bucket that cannot be reached.
        """
        self.folder = storage.folder(folder)
        self._run: str | None = None
        self._lock: Any = None
        self._seen: set[str] = set()  # Places of the stages published while it is open.

    @property
    def run(self) -> str:
        """The digest of the settings that decide the results; every record carries it.

        Raises:
          UserError: for a folder of an older version, which wrote no digests.
        """
        if self._run is None:
            remedy = f"choose another folder, or {again(self.folder)}"
            path = self.folder / "config.json"
            self._run = run_of(read_json(path, remedy, sealed=True))
        return self._run

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a folder that belongs to other settings; touches nothing.

        Args:
          config: the settings that decide the results, as JSON values.

        Raises:
          UserError: naming the settings that differ.
        """
        distributed.decide(lambda: self._check(config))

    def _check(self, config: Mapping[str, Any]) -> None:
        folder, path = self.folder, self.folder / "config.json"
        with writing(folder):  # A name may be too long even for a look-up.
            if folder.exists() and not folder.is_dir():
                raise UserError(f"workdir {folder}: expected a folder, found a file")
            if not path.exists():
                if not self._all_of(run_of(config)):
                    refuse_foreign(folder, "config.json", own=(storage.JOBS,))
                return
        whole = read_config(folder, f"{again(path)}, or {RESTORE}")
        differences = _differences(whole, config)
        if not differences:
            return
        if self._all_of(run_of(config)):
            reason = f"expected the settings of the stages here in {path}, found others"
            raise DamagedError(reason, path)
        if "settings" in whole:
            raise UserError(
                f"{folder} holds a run of an older version, which can be reported and "
                "not continued: choose another folder"
            )
        if "training" not in whole:
            raise UserError(
                f"expected the settings of a run in {path}, found another program's "
                "file; choose another folder"
            )
        if differences.startswith("fingerprint: ") and "; " not in differences:
            raise UserError(
                f"{folder} belongs to a run over other data or another model "
                f"({differences}): a file changed since; put it back, choose another "
                f"folder, or {again(folder)}"
            )
        raise UserError(
            f"{folder} belongs to a run with other settings: {differences}; choose "
            "another folder or the same settings"
        )

    def _all_of(self, run: str) -> bool:
        """Whether there are finished stages, with all readable ones of this run."""
        found = set()
        for path in self.folder.glob(f"stages/*/*/*/{RESULT}"):
            with contextlib.suppress(UserError):
                found.add(read_json(path).get("run"))
        return found - {None} == {run}

    @contextlib.contextmanager
    def opened(
        self, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> Iterator[None]:
        """Creates the folder and ``config.json``, and holds the lock.

        Raises:
          UserError: if another process holds the lock, a finished stage's record is
            damaged or belongs to another run, or :meth:`check` refuses.
        """
        with contextlib.ExitStack() as stack:
            locked = self._locked(config, environment)
            self._run = distributed.decide(lambda: stack.enter_context(locked))
            distributed.open_log(self.folder)
            yield

    @contextlib.contextmanager
    def _locked(
        self, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> Iterator[str]:
        """Does the work of :meth:`opened` in the first process; yields the run."""
        self._check(config)
        path = self.folder / "config.json"
        with locks.taken(self.folder) as lock:
            self._run = None if path.exists() else run_of(config)
            records = self.lines(())  # Refuses now what could not be published later.
            if not path.exists():
                write_record(path, {**config, **environment}, indent=2)
            self._tidy(records)
            self._lock, self._seen = lock, {place_of(self.stage(BASE, None, 0, BASE))}
            try:
                yield self.run
            finally:
                self._lock, self._seen = None, set()

    def require_held(self) -> None:
        """Refuses to continue in a folder that was deleted or replaced during the run.

        Raises:
          UserError: naming the folder.
        """
        distributed.decide(self._require_held)

    def _require_held(self) -> None:
        if self._lock is None:
            return
        if not self._lock.is_held() or not (self.folder / "config.json").exists():
            raise UserError(
                f"workdir {self.folder} was deleted or replaced while this run worked "
                "in it, and so are its results: run the same command again"
            )

    def _require_seen(self, places: set[str]) -> None:
        """Refuses to publish fewer stages than before, or none of the aligned model."""
        if self._lock is None:
            return
        for place in sorted(self._seen - places):
            raise UserError(
                f"expected the finished stage {self.folder / 'stages' / place}, found "
                "none: it was deleted while this run worked; what is finished is kept: "
                "run the same command again"
            )
        self._seen |= places

    def stage(
        self, variant: str, seed: int | None, number: int, stage: str
    ) -> pathlib.Path:
        """The folder of one stage."""
        seed_part = "all" if seed is None else str(seed)
        name = variant.replace(":", "+")
        return self.folder / "stages" / name / seed_part / f"{number:02d}-{stage}"

    def _tidy(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Deletes what a kill left behind: replaced and unfinished checkpoints."""
        for path in self.folder.glob(f"stages/*/*/*/{PARTIAL}*"):
            if (path.parent / RESULT).exists() or not (path / HISTORY).exists():
                storage.remove(path)
        newest: dict[tuple[pathlib.Path, str], pathlib.Path] = {}
        for record in records:  # In order of the stages.
            place = self.folder / "stages" / record["place"]
            for name in record["files"]:
                older = newest.get((place.parent, name))
                if older is not None:
                    storage.remove(older)
                newest[place.parent, name] = place / name

    def lines(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Every finished stage's record, in canonical order.

        Args:
          order: names of variants; others follow, sorted by name.

        Raises:
          DamagedError: for records that are damaged, or of another run or place.
        """
        rank = {name: i for i, name in enumerate([BASE, *order])}
        found, wrong = [], []
        for path in sorted((self.folder / "stages").glob(f"*/*/*/{RESULT}")):
            try:
                record = read_result(path.parent, self.run)
            except DamagedError as error:
                wrong.append(error)
                continue
            if record is None:  # Deleted at this very moment.
                continue
            number = int(path.parent.name.split("-")[0])
            variant, seed = record["line"]["method"], record["line"]["seed"]
            seed = -1 if seed is None else seed
            place = (rank.get(variant, len(rank)), variant, seed, number)
            found.append((place, record))
        if wrong:
            raise DamagedError(wrong[0].reason, wrong[0].redo, wrong[1:])
        return [record for _, record in sorted(found, key=lambda item: item[0])]

    def publish(self, order: Sequence[str]) -> dict[str, Any]:
        """Writes ``results.jsonl``, ``timings.jsonl`` and ``summary.json``.

        Returns:
          The summary.

        Raises:
          UserError: if they cannot be written, or the folder is gone, or a stage that
            was there.
        """
        return distributed.decide(lambda: self._publish(order))

    def _publish(self, order: Sequence[str]) -> dict[str, Any]:
        self._require_held()
        records = self.lines(order)
        self._require_seen({record["place"] for record in records})
        summary = plain_numbers(summarise(records, BASE))
        texts = (
            _lines(record["line"] for record in records),
            _lines(map(_times, records)),
            json.dumps(summary, indent=2) + "\n",
        )
        for name, text in zip(PUBLISHED, texts, strict=True):
            write_atomically(self.folder / name, text)
        return summary


def read_config(folder: pathlib.Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Reads a run's ``config.json``; see :func:`read_json`."""
    return read_json(folder / "config.json", remedy)


def run_of(config: Mapping[str, Any]) -> str:
    """The digest of the settings that decide a run's results.

    >>> run_of({"domains": ["legal"], "versions": {}}) == run_of({"domains": ["legal"]})
    True
    """
    return digest_of({k: v for k, v in config.items() if k not in ENVIRONMENT})


def refuse_foreign(folder: pathlib.Path, lacking: str, own: Sequence[str] = ()) -> None:
    """Refuses a folder with foreign files; hidden files and logs do not count.

    Raises:
      UserError: naming some of the files, and the file that an own folder would have.
    """
    found = sorted(
        name
        for name in storage.names(folder) - {*own, LOGS}
        if not (name.startswith(".") or name.endswith((".log", ".out")))
    )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{folder} holds {', '.join(found[:3])}{more} but no {lacking}: expected "
            "an empty folder or one of a previous run; choose another"
        )


def _lines(values: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _times(record: Mapping[str, Any]) -> dict[str, Any]:
    named = ("method", "seed", "stage", "domain", "index")
    return {**{key: record["line"][key] for key in named}, **record["timing"]}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The settings that differ, with both values."""
    old = _flat({k: v for k, v in there.items() if k not in ENVIRONMENT})
    new = _flat(json.loads(json.dumps(here)))
    return "; ".join(
        f"{k}: there {_short(old.get(k))}, now {_short(new.get(k))}"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
