"""What the presets on real chat models share: options, domains, and what they refuse.

Nothing here imports JAX, so that a preset is listed and a bad command line refused at
once; the study itself is `sbr_jax.studies.chat`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.typing import UserError

ROLES: dict[str, tuple[str, ...]] = {
    "medical": ("medqa", "medmcqa"),
    "legal": ("legalbench",),
    "code": ("codealpaca_20k", "codealpaca"),
    "calibration": ("beavertails", "safety_tuned_llamas"),
}
"""Published data sets by what they are for, the papers' first. The first whose training
file is in the data folder is used, and named in `config.json`."""

DOMAINS = ("medical", "legal", "code")
"""The papers' sequence."""

COMPARED = ("safe-lora", "asft", "lox")
"""Methods that take the difference of two checkpoints."""

RATERS = ("llama-guard", "llama-guard-3", "harmbench")
"""Judges whose next token is a label, so that they can rate a training pair."""


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Options of the study, `--set study.KEY=VALUE`; sizes are upper bounds.

    Attributes:
        train: training examples of a domain.
        held_out: examples that a domain's accuracy is measured on.
        calibration: N_s, safe exchanges; also of each control.
        safety_mix: further safe exchanges, for rows that interleave.
        harmful: the defender's harmful requests with compliant answers.
        probe: D_probe, harmful prompts of the monitor.
        calibration_source: a data set, or "auto" for that of `ROLES`.
        harmful_source: of `harmful`.
        control_source: of the benign control.
        probe_source: an evaluation set of behaviours.
        measures: names of `evaluation.measures.MEASURES`; none for what the domains
            and the monitor measure alone.
        limit: items of one measurement; None for all.
        judge: who says what a refusal is: keyword, keyword:LIST, llama-guard,
            llama-guard-3, wildguard or harmbench.
        judge_folder: the judge's checkpoint; with `template.txt` for the latter two.
        allow_code: run model-written code, in a sandbox, for the code domain's
            accuracy; otherwise it is the share of next tokens guessed.
        max_length: tokens of a training example; longer answers are cut.
        max_new_tokens: of an answer to the probe.
        system: a system message before everything.
        date: the day that chat templates are told, as 2024-07-26; None: that of the
            run's folder, or today.
        thinking: True has the model think before it answers, False gives it an empty
            block of thoughts, where its template has such a switch; None leaves it to
            the template. Options are scored, and answers learnt, behind the block.
        dtype: of the frozen weights.
        quantize: nf4, nf4-double or int8 for the frozen projections; None for neither.
        unaligned_folder: the checkpoint before alignment.
        drop_overlaps: leave out what a set shares with a measurement, where otherwise
            the run is refused.
        output_folder: where answers are written for a judge elsewhere (mtbench).
        remat: hardware: recompute layers in the backward pass.
        generation_batch: hardware: answers written at once.
        score_tokens: hardware: tokens whose keys and values a scorer holds at once.
        mesh: hardware: devices to spread the weights over while they are read; that
            of the run, as `--mesh` sets it.
    """

    train: int = 5000
    held_out: int = 500
    calibration: int = 500
    safety_mix: int = 500
    harmful: int = 500
    probe: int = 200
    calibration_source: str = "auto"
    harmful_source: str = "beavertails_unsafe_qa"
    control_source: str = "alpaca"
    probe_source: str = "catqa"
    measures: tuple[str, ...] = ("harmbench", "truthfulqa", "bbq", "xstest", "mmlu")
    limit: int | None = None
    judge: str = "keyword"
    judge_folder: str | None = None
    allow_code: bool = False
    max_length: int = 512
    max_new_tokens: int = 256
    system: str | None = None
    date: str | None = None
    thinking: bool | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    unaligned_folder: str | None = None
    drop_overlaps: bool = False
    output_folder: str | None = None
    remat: bool = True
    generation_batch: int = 16
    score_tokens: int = 16_384
    mesh: str | None = None

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
            UserError: naming the option.
        """
        sizes = ("train", "held_out", "calibration", "safety_mix", "harmful", "probe")
        more = ("max_length", "max_new_tokens", "generation_batch", "score_tokens")
        for name in (*sizes, *more, "limit"):
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"study.{name}: expected at least 1, got {value!r}")
        for field in dataclasses.fields(self):
            _check_kind(field.name, getattr(self, field.name), field.type)
        for name, known in (
            ("dtype", ("bfloat16", "float32")),
            ("quantize", (None, "nf4", "nf4-double", "int8")),
        ):
            value = getattr(self, name)
            if value not in known:
                shown = ", ".join(map(str, known))
                raise UserError(f"study.{name}: expected one of {shown}; got {value!r}")
        guarded = not self.judge.startswith("keyword")
        if guarded != (self.judge_folder is not None):
            raise UserError(
                f"study.judge={self.judge}: expected a folder with the judge's "
                "checkpoint for every judge but 'keyword', got "
                f"study.judge_folder={self.judge_folder!r}"
            )


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another kind than its field's."""
    if name == "measures":
        texts = isinstance(value, tuple | list) and all(type(x) is str for x in value)
        fits, wanted = texts, "a list of names"
    else:
        fits = isinstance(value, kind)
        switch = kind in (bool, bool | None)
        wanted = "True or False" if switch else "text"
    if name.endswith("_folder"):
        fits |= isinstance(value, Path)
    if not fits:
        raise UserError(f"study.{name}: expected {wanted}, got {value!r}")


def defaults(**changes: Any) -> dict[str, Any]:
    """Return the options of a preset, with both folders left to the command line."""
    options = dataclasses.asdict(ChatOptions(**changes))
    return {"model_folder": None, "data_folder": None, **options}


def known_domains() -> Sequence[str]:
    """Return the papers' domains, and every public data set with a reader."""
    from sbr_jax.data.sources import DOMAINS as SETS

    return (*DOMAINS, *SETS)


def check(
    rows: Sequence[str],
    options: Mapping[str, Any],
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a command line without a model, data, or what one of its rows needs.

    Args:
        rows: of the run.
        options: of the study.
        overrides: hyper-parameters by row.
        settings: of the training job; None leaves the mesh unchecked.

    Raises:
        UserError: saying what to add.
    """
    from sbr_jax.methods import VARIANTS, build

    for flag, example in (("model", "FOLDER_OR_HUB_ID"), ("data", "FOLDER")):
        if options[f"{flag}_folder"] is None:
            raise UserError(
                f"expected --{flag} {example}, got none: docs/real-models.md says what "
                "such a folder holds"
            )
    sizes = {f.name for f in dataclasses.fields(ChatOptions)}
    ChatOptions(**{key: value for key, value in options.items() if key in sizes})
    if settings is not None and options["mesh"] != settings.get("mesh"):
        raise UserError(
            f"study.mesh={options['mesh']}: expected that of the training job, mesh="
            f"{settings.get('mesh')}: name one with --mesh, which sets both"
        )
    for row in rows:
        method = VARIANTS.get(row, (row, {}))[0]
        made = build(row, **(overrides or {}).get(row, {}))
        if options["quantize"] and method in COMPARED:
            raise UserError(
                f"{row}: expected dense weights, got study.quantize="
                f"{options['quantize']}: codes round by more than alignment changed; "
                "leave the row out of --methods, or do not quantise"
            )
        if method in COMPARED and options["unaligned_folder"] is None:
            raise UserError(
                f"{row}: expected the weights before alignment, got none: add --set "
                "study.unaligned_folder=FOLDER, or leave the row out of --methods"
            )
        if made.cost.ratings and options["judge"] not in RATERS:
            raise UserError(
                f"{row}: expected a guard model that rates training pairs "
                f"({', '.join(RATERS)}), got study.judge={options['judge']}: add --set "
                "study.judge=llama-guard study.judge_folder=FOLDER, or leave the row "
                "out of --methods"
            )


def study(domains: Sequence[str], **options: Any) -> Any:
    """Build the study."""
    from sbr_jax.studies.chat import build_study

    return build_study(domains, **options)


def survey(domains: Sequence[str], **options: Any) -> Any:
    """Build the study without its weights."""
    from sbr_jax.studies.chat import build_study

    return build_study(domains, weights=False, **options)
