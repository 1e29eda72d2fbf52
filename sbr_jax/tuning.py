"""Fine-tuning your own chat model on your own examples, from Python.

    tuned = sbr_jax.tune("SmolLM2", "my.jsonl", harmful="prompts.txt")
    print(tuned.metrics["before"]["refusal"], tuned.metrics["after"]["refusal"])
    tuned.save_peft("adapters/mine")

The command line `sbr-jax tune` does the same and also writes a report.
"""

import contextlib
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError

from sbr_jax import checks, distributed, errors, files
from sbr_jax.distributed import arrays
from sbr_jax.errors import counted, option
from sbr_jax.methods import METHODS, VARIANTS, Hyperparameters, build
from sbr_jax.methods.needs import needs
from sbr_jax.models import Model, merge_adapter, save
from sbr_jax.models.peft import save_peft
from sbr_jax.models.quantize import dequantize
from sbr_jax.models.sharding import check_heads
from sbr_jax.recipes.own import EPOCHS, HARDWARE, HYPERPARAMETERS, METHOD, TRAINING
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies import own
from sbr_jax.studies.chat.judges import make_judge
from sbr_jax.studies.chat.study import ChatStudy
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import OwnOptions, recorded
from sbr_jax.studies.own.given import Given, Source, require_needed
from sbr_jax.studies.own.parts import Parts, file_of, steps_of, warn_sizes
from sbr_jax.training import deployed, pipeline, sharding
from sbr_jax.training.config import Config
from sbr_jax.training.csm import check_rule
from sbr_jax.training.records import plain_numbers
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import BASE
from sbr_jax.training.stages import EVALUATE, NAMES
from sbr_jax.training.study import check_rank
from sbr_jax.typing import PyTree, UserError

SHARD_BYTES = 5 * 10**9
MOST_EPOCHS = 1000
"""More epochs are a typing mistake; the number of steps is not limited."""
REPAIR_SHARE = 5
"""A repair has at most a fifth of a domain's steps: 200 of 938, as published."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to tune, and how.

    Attributes:
        model: a checkpoint's folder, a hub id, or the model itself.
        examples: a source for each domain, in order of training.
        folder: of the run; the same folder continues it.
        evaluation: no source, one for all domains, or one for each.
        safety: safe exchanges.
        harmful: harmful prompts.
        method: a defence, or a variant of one.
        epochs: over each domain; None for `training.steps_per_domain`.
        seed: of adapter, order and dropout.
        study: further options.
        training: mathematics of the training.
        hardware: how the training is computed.
        hyperparameters: of the methods.
        quiet: print nothing.
    """

    model: str | Path | Model
    examples: Sequence[Source]
    folder: Path
    evaluation: Sequence[Source] = ()
    safety: Source | None = None
    harmful: Source | None = None
    method: str = METHOD
    epochs: float | None = EPOCHS
    seed: int = 0
    study: OwnOptions = OwnOptions()
    training: Training = TRAINING
    hardware: Hardware = HARDWARE
    hyperparameters: Hyperparameters = HYPERPARAMETERS  # pyright: ignore[reportInvalidTypeForm]
    quiet: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A checked request; no weight has been read yet.

    Attributes:
        request: the request itself.
        given: rows of its files.
        parts: these rows by use.
        model: without its weights, unless it was given with them.
        study: complete options of the study.
        config: of the job.
        needed: parts that the method reads.
    """

    request: Request
    given: Given
    parts: Parts
    model: Model
    study: OwnOptions
    config: Config
    needed: frozenset[str]

    @property
    def methods(self) -> tuple[str]:
        """The one variant, in the form that forecasts need."""
        return (self.request.method,)

    @property
    def seeds(self) -> tuple[int]:
        """The one seed."""
        return (self.request.seed,)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in order of training."""
        return tuple(self.given.train)

    def make_study(self) -> ChatStudy:
        """Loads the weights and lets the model write its calibration set."""
        request = self.request
        return own.build_study(
            request.model,
            self.model,
            self.parts,
            self.study,
            self.needed,
            self.config.hardware,
            epochs=request.epochs,
            batch=self.config.training.batch_size,
            folder=request.folder,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned model: the deployed weights and their metrics.

    Attributes:
        model: the model before tuning.
        base: deployed base weights; the model's own, unless the method changed them.
        adapter: deployed adapter.
        metrics: `{"before": {...}, "after": {...}}`, rates in 0..100, losses in nats.
        method: the defence that was used.
    """

    model: Model
    base: PyTree
    adapter: PyTree
    metrics: Mapping[str, Mapping[str, float]]
    method: str

    def save_peft(self, folder: str | Path, base_name: str | None = None) -> None:
        """Writes the adapter in PEFT's layout.

        Args:
            folder: new or empty.
            base_name: name of the base in the adapter's file, a hub id or folder.

        Raises:
            UserError: if the method changed base weights too, or the folder is in use.
        """
        if self.adapter is None or self.base is not self.model.params:
            raise UserError(
                f"'{self.method}' deploys other base weights than it was given, which "
                "an adapter does not hold: write a merged checkpoint with save_merged()"
            )
        write = functools.partial(
            save_peft, model=self.model, adapter=self.adapter, base_name=base_name
        )
        _fill(folder, write)

    def merged(self) -> "Tuned":
        """The tuned model with base and adapter joined in dense weights.

        If there are several processes, all must call it; only process 0 has the
        weights.
        """
        merged = dequantize(merge_adapter(self.base, self.adapter))
        whole = arrays.fetch_to_first(merged)
        return dataclasses.replace(self, base=whole, adapter=None)

    def save_merged(self, folder: str | Path) -> None:
        """Writes base and adapter joined, as a Hugging Face checkpoint.

        Args:
            folder: new or empty.
        """
        whole = self if self.adapter is None else self.merged()
        model = dataclasses.replace(self.model, params=dequantize(whole.base))
        _fill(folder, functools.partial(save, model=model, max_shard_bytes=SHARD_BYTES))


def _fill(folder: str | Path, write: Any) -> None:
    folder = Path(folder)
    if not files.is_free(folder):
        raise UserError(f"expected a new or empty folder, found something in {folder}")
    files.fill_folder(folder, write, (SafetensorError,))


def plan(request: Request) -> Plan:
    """Checks a request and reads its files; reads no weights and writes nothing.

    Raises:
        UserError: for the first mistake, naming file and row.
    """
    _check_kinds(request)
    errors.check_names("method", [request.method], [*METHODS, *VARIANTS])
    if request.epochs is not None:
        note = f"longer runs are said in steps: {option('training.steps-per-domain')}"
        checks.number("epochs", request.epochs, above=0, most=MOST_EPOCHS, note=note)
        steps = request.training.steps_per_domain
        if steps != TRAINING.steps_per_domain:
            raise UserError(
                f"expected epochs or training.steps_per_domain, got both "
                f"({request.epochs:g} and {steps}): pass epochs=None to have the steps"
            )
    checks.seed("seed", request.seed)
    needed = needs(request.method, request.hyperparameters)
    method = build(request.method, request.hyperparameters)
    options = dated(_with_dtype(request.study), request.folder)
    given = own.read_given(
        request.examples, request.evaluation, request.safety, request.harmful, options
    )
    require_needed(request.method, needed, given, options)
    model = own.read_model(request.model, options)
    # Before any row is looked at, since no row can mend these.
    check_rank(model.config, request.training)
    if (mesh := sharding.mesh_of(request.hardware)) is not None:
        check_heads(model.config, mesh)
    most = min(options.max_new_tokens, max(model.config.context // 2, 1))
    options = dataclasses.replace(options, max_new_tokens=most)
    judge = make_judge(options, weights=False)
    monitored = method.monitored and bool(given.harmful)
    parts = own.make_parts(given, options, needed, monitored, model, judge)
    training = _sized(request, parts)
    config = Config(training, request.hardware, request.hyperparameters)
    sharding.check_mesh(config.hardware, training, model.config)
    if parts.probe:
        check_rule(training, len(parts.probe))
    return Plan(request, given, parts, model, options, config, needed)


def _check_kinds(request: Request) -> None:
    """Refuses values of a wrong type, which Python itself would accept."""
    wanted = {
        "model": (str | Path | Model, "a folder, a hub id or a models.Model"),
        "examples": (Sequence, "a list of sources"),
        "evaluation": (Sequence, "a list of sources"),
        "folder": (Path, "a path"),
        "study": (OwnOptions, "OwnOptions"),
        "training": (Training, "Training"),
        "hardware": (Hardware, "Hardware"),
        "hyperparameters": (Hyperparameters, "Hyperparameters"),
    }
    for name, (kind, shown) in wanted.items():
        value = getattr(request, name)
        if not isinstance(value, kind):  # pyright: ignore[reportArgumentType]
            raise UserError(f"expected {name} to be {shown}, got {checks.shown(value)}")


def _with_dtype(options: OwnOptions) -> OwnOptions:
    if options.dtype != "auto":
        return options
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(options, dtype=dtype)


def _sized(request: Request, parts: Parts) -> Training:
    """The training settings with sizes that follow from the data."""
    training = request.training
    learnt = {n: d for n, d in parts.sets.items() if n.startswith("train ")}
    batch = batch_of({n[6:]: len(d) for n, d in learnt.items()}, training.batch_size)
    steps = training.steps_per_domain
    if request.epochs is not None:
        steps = max(steps_of(data, request.epochs, batch) for data in learnt.values())
    for name, data in learnt.items():
        epochs = request.epochs or steps * batch / len(data)
        domain = name.partition(" ")[2]
        warn_sizes(domain, data, epochs, parts.record["different"][domain])
    repair = min(training.repair_steps, max(steps // REPAIR_SHARE, 1))
    return dataclasses.replace(
        training, batch_size=batch, steps_per_domain=steps, repair_steps=repair
    )


def batch_of(counts: Mapping[str, int], most: int) -> int:
    """The number of examples in a step, the same in every domain.

    Args:
        counts: number of examples to learn, by domain.
        most: `training.batch_size`.

    Raises:
        UserError: for a small domain that would shrink the steps of a larger one.

    >>> batch_of({"my": 60, "more": 9}, 8), batch_of({"my": 3}, 8)
    (8, 3)
    """
    name, least = min(counts.items(), key=lambda item: item[1])
    largest = max(counts.values())
    if least < most <= largest:
        raise UserError(
            f"{file_of(name)}: expected at least {most} examples to learn, as many as "
            f"a step of the other files takes, got {least}: add some, or make the "
            f"steps of all files as small with {option('training.batch-size', least)}"
        )
    if least < min(most, largest):
        warnings.warn(
            f"{file_of(name)}: {counted(least, 'example is', 'examples are')} fewer "
            f"than the {most} of a step, so the steps of all files are of {least}",
            stacklevel=2,
        )
    return min(most, least)


def carry_out(made: Plan, study: ChatStudy) -> Tuned:
    """Trains, or continues to, and measures before and after.

    Args:
        made: result of :func:`plan`.
        study: result of its `make_study`.

    Returns:
        The deployed weights.

    Raises:
        UserError: for a folder of another run, or anything else that a run refuses.
    """
    request = made.request
    epochs = plain_numbers(request.epochs)  # NumPy's numbers are no JSON.
    pipeline.run(
        study,
        made.methods,
        made.seeds,
        request.folder,
        made.config,
        made.domains,
        notes={
            "study": recorded(made.study),
            "tune": {"epochs": epochs, "method": request.method},
            **study.notes,
        },
        quiet=request.quiet,
    )
    metrics = distributed.decide(lambda: _measured(request))
    opened = deployed.reopen(request.folder, study, made.config, made.domains)
    base, adapter = deployed.weights(opened, request.method, request.seed)
    if base is opened.base:  # This may be a copy on a mesh.
        base = study.model.params
    if distributed.current() is not None:
        adapter = arrays.fetch(adapter)
    return Tuned(study.model, base, adapter, metrics, request.method)


def _measured(request: Request) -> dict[str, Mapping[str, float]]:
    """The request's metrics in its folder."""
    lines = [record["line"] for record in RunFolder(request.folder).lines(())]
    return measured_of(lines, request.method, request.seed)


def measured_of(
    lines: Sequence[Mapping[str, Any]], method: str, seed: int
) -> dict[str, Mapping[str, float]]:
    """Metrics before and after one seed of a method; a folder may hold others too.

    Args:
        lines: of the folder's finished stages, in their order.
        method: of the run.
        seed: of the run.

    >>> start = {"method": "base", "seed": None, "stage": "base", "metrics": {"x": 1.0}}
    >>> end = {"method": "plain", "stage": "evaluate"}
    >>> ends = [{**end, "seed": i, "metrics": {"x": 2.0 + i}} for i in range(2)]
    >>> measured_of([start, *ends], "plain", 0)
    {'before': {'x': 1.0}, 'after': {'x': 2.0}}
    """
    (before,) = (line["metrics"] for line in lines if line["method"] == BASE)
    mine = [x for x in lines if (x["method"], x["seed"]) == (method, seed)]
    (*_, after) = (x["metrics"] for x in mine if x["stage"] == NAMES[EVALUATE])
    return {"before": before, "after": after}


@contextlib.contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    """The folder of a run; without a name, one that is deleted after the block."""
    if folder is not None:
        if not isinstance(folder, str | Path):
            raise UserError(f"expected folder to be a path, got {checks.shown(folder)}")
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "run"


def tune(
    model: str | Path | Model,
    examples: Source | Sequence[Source],
    method: str = METHOD,
    *,
    harmful: Source | None = None,
    safety: Source | None = None,
    evaluation: Source | Sequence[Source] | None = None,
    epochs: float | None = EPOCHS,
    seed: int = 0,
    folder: str | Path | None = None,
    study: OwnOptions = OwnOptions(),
    training: Training = TRAINING,
    hardware: Hardware = HARDWARE,
    hyperparameters: Any = HYPERPARAMETERS,
    quiet: bool = True,
) -> Tuned:
    """Fine-tunes a chat model on examples, and keeps its safety.

    Args:
      model: a checkpoint's folder, a hub id, or a `models.Model` with its tokenizer.
      examples: a file, a folder or a hub id; rows (dicts as in a file, or pairs
        ``(prompt, answer)``); or a list of files, one for each domain in sequence.
      method: a name from ``METHODS`` or ``VARIANTS``; "plain" for no defence.
      harmful: prompts that should be refused: a text file with one per line, a table,
        the folder or hub id of a data set, or the texts. One part measures, one part
        monitors. Without ``safety``, the model's own refusals of the rest calibrate it.
      safety: exchanges with safe answers, in the same layouts as ``examples``.
      evaluation: exchanges to measure on: one source, or a list of files, one for each
        domain; None holds a tenth of the examples back.
      epochs: over the examples; None for ``training.steps_per_domain``.
      seed: of adapter, order and dropout.
      folder: of the run to begin or continue; None for a temporary one.
      study: sizes, lengths, the judge.
      training: mathematics of the training.
      hardware: how the training is computed.
      hyperparameters: of the methods.
      quiet: print nothing.

    Returns:
      The deployed weights, and the metrics before and after.

    Raises:
      UserError: for the first mistake, naming file and row.

    >>> from sbr_jax import tune
    >>> tune("no-such-folder", [("Two and two?", "Four.")], method="plain")
    Traceback (most recent call last):
    sbr_jax.typing.UserError: model: expected a checkpoint folder or a hub id ...
    """
    with _folder(folder) as place:
        request = Request(
            model=model,
            examples=_sources(examples),
            folder=place,
            evaluation=[] if evaluation is None else _sources(evaluation),
            safety=safety,
            harmful=harmful,
            method=method,
            epochs=epochs,
            seed=seed,
            study=study,
            training=training,
            hardware=hardware,
            hyperparameters=hyperparameters,
            quiet=quiet,
        )
        made = plan(request)
        return carry_out(made, made.make_study())


def _sources(given: Any) -> list[Source]:
    """The files of a list; anything else is a single source."""
    listed = isinstance(given, list | tuple) and len(given) > 0
    if listed and all(isinstance(source, str | Path) for source in given):
        return list(given)
    return [given]


__all__ = ["Plan", "Request", "Tuned", "carry_out", "plan", "tune"]
