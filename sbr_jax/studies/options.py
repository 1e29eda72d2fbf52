"""Options of the studies that presets run, with their ranges and checks.

Nothing here imports a model or reads a file before `build`, so that listing a preset
and refusing a bad command line are instant.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from sbr_jax import checks, errors
from sbr_jax.checks import Range
from sbr_jax.settings import Count, Hardware
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where this machine has a study's model and data; not part of the experiment.

    Attributes:
        model: a checkpoint folder or a hub id; None for the preset's own.
        data: a folder with one folder for each data set; None for the preset's own.
    """

    model: str | None = None
    data: str | None = None


class StudyOptions(Protocol):
    """Options of one kind of study, which can build it."""

    def known_domains(self) -> Sequence[str]:
        """All domains that the command line may name."""
        ...

    def check(
        self, variants: Sequence[str], hyperparameters: Any, sources: Sources
    ) -> None:
        """Refuses early what the study would otherwise refuse later."""
        ...

    def build(
        self,
        domains: Sequence[str],
        sources: Sources,
        hardware: Hardware,
        *,
        weights: bool = True,
    ) -> Any:
        """Builds the `Study`; without weights it can be checked but not run."""
        ...


def recorded(options: Any) -> dict[str, Any]:
    """The options that a run's folder records and that must not change.

    Folders are left out, because the fingerprint covers their content. So is the date,
    which is recorded only if a template asks for it.

    >>> sorted(recorded(TestbedOptions()))
    ['calibration_examples', 'hard', 'judge', 'probe_set', 'split']
    """
    return {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if "folder" not in name and not name.endswith("_file") and name != "date"
    }


class WorldSetting(NamedTuple):
    """Settings in which the options of miniature worlds differ.

    Attributes:
        seed: of the world.
        held_out: number of kinds of harm that no defence sees.
        alone: whether only these kinds are measured.
        rater: judge of training pairs, "exact" or "guard".
        auroc: how well that judge detects harm.
    """

    seed: int = 0
    held_out: int = 0
    alone: bool = False
    rater: str = "exact"
    auroc: float = 1.0


@dataclasses.dataclass(frozen=True)
class WorldOptions:
    """Options of every study of a miniature world.

    Attributes:
        split: split to measure on; "validation" to choose hyper-parameters.
        calibration_examples: N_s, number of calibration examples; limited by the
            different prompts of the world (60,000 draws hold 3,989 of them).
        probe_set: prompts of the monitor: "one-phrasing" asks every harmful request in
            the probe's own phrasing; "stratified" asks equally many for each kind of
            harm and each of the defender's phrasings (seven in `testbed`).
    """

    edition: ClassVar[str]
    """Name of the edition, a key of `EDITIONS`."""
    split: Literal["test", "validation"] = "test"
    calibration_examples: Annotated[int, Range(least=1, most=4000)] = 480
    probe_set: Literal["one-phrasing", "stratified"] = "one-phrasing"

    def __post_init__(self):
        """Refuses values that cannot be meant."""
        checks.fields(self, "study")

    def known_domains(self) -> Sequence[str]:
        """Every domain of the world's edition."""
        from sbr_jax.testbed.editions import EDITIONS

        return tuple(EDITIONS[self.edition].domains)

    def setting(self) -> WorldSetting:
        """What these options choose."""
        return WorldSetting()

    def check(
        self, variants: Sequence[str], hyperparameters: Any, sources: Sources
    ) -> None:
        """Refuses a data folder, which the testbed does not use."""
        if sources.data is not None:
            raise UserError("--data: the testbed makes its own data; drop it")

    def build(
        self,
        domains: Sequence[str],
        sources: Sources,
        hardware: Hardware,
        *,
        weights: bool = True,
    ) -> Any:
        """Builds the study; its small model is loaded in any case."""
        from sbr_jax.studies.testbed import build_study

        return build_study(tuple(domains), self, model_folder=sources.model)


@dataclasses.dataclass(frozen=True)
class TestbedOptions(WorldOptions):
    """Options of a study of the embedded testbed.

    Attributes:
        hard: keep three kinds of harm out of calibration and probe, and measure refusal
            on them alone.
        judge: judge of training pairs: "exact" reads their harm off the grammar;
            "guard" asks the shipped guard model, which never saw the three kinds.
    """

    edition = "testbed"
    hard: bool = False
    judge: Literal["exact", "guard"] = "exact"

    def setting(self) -> WorldSetting:
        """Three kinds held out if ``hard``, and the judge."""
        held_out = 3 if self.hard else 0
        return WorldSetting(held_out=held_out, alone=self.hard, rater=self.judge)


@dataclasses.dataclass(frozen=True)
class Testbed2Options(WorldOptions):
    """Options of a study of the second testbed.

    Attributes:
        calibration_examples: N_s, number of calibration examples.
        world: 0 is shipped; one command builds 1 to 5, see docs/testbed2.md.
        unseen_kinds: how many of the eight kinds of harm (the last ones) are kept out
            of calibration, probe and all else that a defence sees. They are measured
            with the others, and alone as `refusal_unseen`.
        judge_auroc: how well the judge of training pairs detects harm; 1 is exact.
    """

    edition = "testbed-2"
    calibration_examples: Annotated[int, Range(least=10, most=500)] = 480
    world: Annotated[int, Range(least=0, most=5)] = 0
    unseen_kinds: Annotated[int, Range(least=0, most=7)] = 3
    judge_auroc: Annotated[float, Range(least=0.7, most=1.0)] = 1.0

    def setting(self) -> WorldSetting:
        """The world, the number of kinds held out, and the judge's quality."""
        return WorldSetting(self.world, self.unseen_kinds, auroc=self.judge_auroc)

    def check(
        self, variants: Sequence[str], hyperparameters: Any, sources: Sources
    ) -> None:
        """Refuses a data folder, or a world whose model is not built yet."""
        super().check(variants, hyperparameters, sources)
        if sources.model is None:
            from sbr_jax import testbed
            from sbr_jax.testbed.editions import EDITIONS

            testbed.check_built(EDITIONS[self.edition], self.world)


@dataclasses.dataclass(frozen=True)
class StoriesOptions:
    """Options of a study of a small story model on public data.

    Attributes:
        calibration: examples in the calibration set and in each control.
        train: most training examples of a domain.
        held_out: examples that each loss is measured on.
        max_length: most tokens of a sequence.
        calibration_source: data set of calibration and of held-out safe answers.
        control_source: data set of the benign control.
    """

    calibration: Count = 100
    train: Count = 2000
    held_out: Count = 96
    max_length: Count = 128
    calibration_source: str = "safety_tuned_llamas"
    control_source: str = "alpaca"

    def __post_init__(self):
        """Refuses values that cannot be meant."""
        checks.fields(self, "study")

    def known_domains(self) -> Sequence[str]:
        """Every public data set with a reader."""
        from sbr_jax.data.registry import DOMAINS

        return tuple(DOMAINS)

    def check(
        self, variants: Sequence[str], hyperparameters: Any, sources: Sources
    ) -> None:
        """Refuses nothing: model and data have defaults."""

    def build(
        self,
        domains: Sequence[str],
        sources: Sources,
        hardware: Hardware,
        *,
        weights: bool = True,
    ) -> Any:
        """Builds the study; its small model is loaded in any case."""
        from sbr_jax.studies.stories import build_study

        return build_study(domains, self, sources)


ROLES: dict[str, tuple[str, ...]] = {
    "medical": ("medqa", "medmcqa"),
    "legal": ("legalbench",),
    "code": ("codealpaca_20k", "codealpaca"),
    "calibration": ("beavertails", "safety_tuned_llamas"),
}
"""Published data sets by role, the papers' choice first. The first whose training file
is in the data folder is used; `config.json` names it."""

DOMAINS = ("medical", "legal", "code")
"""The papers' sequence of domains."""

COMPARED = ("safe-lora", "asft", "lox")
"""Methods that need the difference of two checkpoints."""

JUDGES = ("keyword", "llama-guard", "llama-guard-3", "wildguard", "harmbench")
"""Judges of answers; "keyword:LIST" also names one."""

RATERS = ("llama-guard", "llama-guard-3", "harmbench")
"""Judges whose next token is a label, so that they can rate a training pair."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options of every study of a chat model: how it is read, asked and judged.

    Attributes:
        judge: judge of refusals: keyword, keyword:LIST, llama-guard, llama-guard-3,
            wildguard or harmbench.
        judge_folder: the judge's checkpoint; wildguard and harmbench also need its
            `template.txt`.
        max_length: most tokens of a training example; longer answers are cut.
        max_new_tokens: most tokens of an answer to a harmful prompt.
        system: system message before every conversation.
        date: date given to chat templates, as 2024-07-26; None: the date of the run's
            folder, or today.
        thinking: for templates with such a switch: True lets the model think before it
            answers, False gives it an empty block of thoughts, None leaves it to the
            template. Options are scored, and answers learnt, after the block.
        dtype: type of the frozen weights.
        quantize: format of the frozen projections; None for no quantization.
        unaligned_folder: the checkpoint before alignment.
        calibration_refusals: leave out safe exchanges whose answer does not refuse,
            judged by a list of words; they teach a manner of answering instead.
    """

    judge: str = "keyword"
    judge_folder: str | None = None
    max_length: Count = 512
    max_new_tokens: Count = 256
    system: str | None = None
    date: str | None = None
    thinking: bool | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Literal["nf4", "nf4-double", "int8"] | None = None
    unaligned_folder: str | None = None
    calibration_refusals: bool = False

    def __post_init__(self):
        """Refuses values that cannot be meant."""
        checks.fields(self, "study")
        kind = self.judge.partition(":")[0]
        if self.judge not in JUDGES and kind != "keyword":
            raise errors.unknown("study.judge", self.judge, [*JUDGES, "keyword:LIST"])
        guarded = kind != "keyword"
        if guarded != (self.judge_folder is not None):
            raise UserError(
                f"{errors.option('study.judge', self.judge)}: expected a folder with "
                "the judge's checkpoint for every judge but 'keyword', got "
                f"{errors.option('study.judge-folder')} {self.judge_folder!r}"
            )


@dataclasses.dataclass(frozen=True)
class ChatOptions(ModelOptions):
    """Options of a study of a chat model on public data; sizes are upper bounds.

    Attributes:
        train: training examples of a domain.
        held_out: examples that a domain's accuracy is measured on.
        calibration: N_s, number of safe exchanges; also the size of each control.
        safety_mix: further safe exchanges, for variants that interleave them.
        harmful: the defender's harmful requests with compliant answers.
        probe: D_probe, harmful prompts of the monitor.
        calibration_source: data set of calibration, or "auto" for that of `ROLES`.
        harmful_source: data set of `harmful`.
        control_source: data set of the benign control.
        probe_source: evaluation set of behaviours for the monitor.
        benchmarks: names of benchmarks; none to measure the domains and the monitor
            only.
        limit: most items of one benchmark; None for all.
        allow_code: run model-written code, in a sandbox, for the code domain's
            accuracy; otherwise the accuracy is the share of next tokens guessed.
        drop_overlaps: leave out prompts that a set shares with a benchmark, instead of
            refusing the run.
        output_folder: folder for answers that are judged elsewhere (mtbench).
    """

    maker: ClassVar[str] = ""
    """Program that makes the model, if there is one."""
    demanded: ClassVar[tuple[str, ...]] = ("model", "data")
    """Sources that a command line must name."""
    train: Count = 5000
    held_out: Count = 500
    calibration: Count = 500
    safety_mix: Count = 500
    harmful: Count = 500
    probe: Count = 200
    calibration_source: str = "auto"
    harmful_source: str = "beavertails_unsafe_qa"
    control_source: str = "alpaca"
    probe_source: str = "catqa"
    benchmarks: tuple[str, ...] = ("harmbench", "truthfulqa", "bbq", "xstest", "mmlu")
    limit: Count | None = None
    allow_code: bool = False
    drop_overlaps: bool = False
    output_folder: str | None = None

    def known_domains(self) -> Sequence[str]:
        """The papers' domains, and every public data set with a reader."""
        from sbr_jax.data.registry import DOMAINS as SETS

        return (*DOMAINS, *SETS)

    def check(
        self, variants: Sequence[str], hyperparameters: Any, sources: Sources
    ) -> None:
        """Refuses a command line without model, data or a variant's needs."""
        from sbr_jax.methods import build, resolve

        if self.maker and sources.model is None:
            raise UserError(
                "expected --model FOLDER, got none: make one with python -m "
                f"experiments.{self.maker}"
            )
        examples = {"model": "FOLDER_OR_HUB_ID", "data": "FOLDER"}
        for flag, example in examples.items():
            if getattr(sources, flag) is None and flag in self.demanded:
                raise UserError(
                    f"expected --{flag} {example}, got none: docs/real-models.md says "
                    "what such a folder holds"
                )
        for variant in variants:
            method, _ = resolve(variant, hyperparameters)
            if self.quantize and method in COMPARED:
                raise UserError(
                    f"{variant}: expected dense weights, got study.quantize "
                    f"{self.quantize}: codes round by more than alignment changed; "
                    "leave it out of --methods, or do not quantise"
                )
            if method in COMPARED and self.unaligned_folder is None:
                raise UserError(
                    f"{variant}: expected the weights before alignment, got none: add "
                    "--study.unaligned-folder FOLDER, or leave it out of --methods"
                )
            rated = build(variant, hyperparameters).cost.ratings
            if rated and self.judge not in RATERS:
                raise UserError(
                    f"{variant}: expected a guard model that rates training pairs "
                    f"({', '.join(RATERS)}), got study.judge {self.judge}: add "
                    "--study.judge llama-guard --study.judge-folder FOLDER, or leave "
                    "it out of --methods"
                )

    def build(
        self,
        domains: Sequence[str],
        sources: Sources,
        hardware: Hardware,
        *,
        weights: bool = True,
    ) -> Any:
        """Builds the study; without weights it can be checked and not run."""
        from sbr_jax.studies.chat import build_study

        return build_study(domains, self, sources, hardware, weights=weights)


@dataclasses.dataclass(frozen=True)
class RealtextOptions(ChatOptions):
    """Options of a study of the chat model made by `experiments.realtext`."""

    maker = "realtext --data FOLDER --output FOLDER"


@dataclasses.dataclass(frozen=True)
class SmollmOptions(ChatOptions):
    """Options of a study of the chat model made by `experiments.smollm2`."""

    maker = "smollm2 --output runs/smollm2-model"
    demanded = ("model",)  # Without a data folder, data comes from the hub.


@dataclasses.dataclass(frozen=True)
class OwnOptions(ModelOptions):
    """Options of a study of a user's own chat model and files; sizes are upper bounds.

    Attributes:
        calibration: N_s, safe exchanges that a defence calibrates on.
        probe: harmful prompts of the monitor.
        measured: harmful prompts that refusal is measured on, used for nothing else.
        held_out: without an evaluation file: rows of a training file to measure on
            instead of learning them, at most a tenth of it.
        max_new_tokens: most tokens of an answer to a harmful or harmless prompt; at
            most half of the model's context.
        dtype: type of the frozen weights; "auto" is float32 on a CPU, else bfloat16.
        pairs_file: harmful requests with compliant answers, which `antidote` and
            `booster` unlearn.
        harmless_file: prompts for over-refusal and the benign control, instead of the
            64 that come with the package.
        general_file: text or exchanges whose held-out loss is measured.
    """

    calibration: Count = 128
    probe: Count = 50
    measured: Count = 100
    held_out: Count = 100
    max_new_tokens: Count = 64
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    pairs_file: str | None = None
    harmless_file: str | None = None
    general_file: str | None = None
