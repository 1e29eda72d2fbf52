"""Attack: a job with an attacker's training data or search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from sbr_jax import distributed, errors, storage
from sbr_jax.programs import cli
from sbr_jax.programs.job import Job, JobArguments, Options, make_job
from sbr_jax.programs.parsing import REQUIRED, values_of
from sbr_jax.recipes.preset import Preset
from sbr_jax.typing import UserError

DATA = ("ratio", "examples", "epochs")
"""Options of attacks with training data."""
NO_DATA = (
    "has no training data of its own; drop it (--training.steps-per-domain N for "
    "longer domains)"
)
SEARCH = ("steps", "suffix_length", "candidates", "prompts")
"""Options of attacks that search."""
NO_SEARCH = "searches nothing; drop it"
STEPS = "--training.steps-per-domain"
CHAT = ("smollm2", "llama2-7b")
"""Presets of chat models, on which a suffix can be searched."""
MOST_EXAMPLES = 100_000
"""The world's rows repeat long before that; use epochs for longer training."""


@dataclasses.dataclass(frozen=True)
class AttackArguments(JobArguments[Options]):
    """Attack a model during or after fine-tuning, and measure its remaining safety."""

    attack: Annotated[str, REQUIRED] = ""
    """Name of an attack; --list shows them."""
    ratio: float | None = None
    """Share of attack rows in the training set, 0 to 1; default: the attack's."""
    examples: int | None = None
    """Size of the training set; default: the attack's."""
    epochs: int | None = None
    """Passes over the training set (50: a persistent attack); default: the attack's."""
    steps: int | None = None
    """Steps of the search; default: the attack's."""
    suffix_length: int | None = None
    """Tokens of a suffix; default: the attack's."""
    candidates: int | None = None
    """Candidates in each step; default: the attack's."""
    prompts: int | None = None
    """Harmful requests to search a suffix for; default: the attack's."""


@dataclasses.dataclass(frozen=True)
class AttackJob(Job):
    """A checked training job under an attack.

    Attributes:
        attack: its name.
        ratio: share of attack rows; None if the attack has no data.
        examples: size of the training set; None if the attack has no data.
        search: budget of the search; empty if the attack has none.
    """

    attack: str = ""
    ratio: float | None = None
    examples: int | None = None
    search: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def make_study(
        self, domains: Sequence[str] | None = None, *, weights: bool = True
    ) -> Any:
        """The study under the attack, which has its own domains."""
        from sbr_jax.studies import attacks
        from sbr_jax.studies.options import ChatOptions, WorldOptions

        if isinstance(self.study, ChatOptions):
            from sbr_jax.studies.attacks import chat

            return chat.gcg_study(
                domains or self.domains,
                self.study,
                self.sources,
                self.config.hardware,
                weights=weights,
                quiet=self.quiet,
                **self.search,
            )
        assert isinstance(self.study, WorldOptions)
        return attacks.build(
            self.attack,
            self.study,
            ratio=self.ratio,
            examples=self.examples,
            search=self.search,
            model_folder=self.sources.model,
            quiet=self.quiet,
        )

    def notes(self) -> dict[str, Any]:
        """Notes on the study and the attack for the folder's record."""
        sizes = {"ratio": self.ratio, "examples": self.examples}
        return {
            **super().notes(),
            "attack": {"name": self.attack, **sizes, **self.search},
        }


def make_attack(
    preset: Preset, arguments: AttackArguments[Any], words: Sequence[str] = ()
) -> AttackJob:
    """Checks a command line, cheap checks first.

    Epochs decide the number of steps, not the preset, unless ``words`` name it.
    """
    from sbr_jax.attacks import attack_count, steps_for_epochs
    from sbr_jax.studies.attacks import ATTACKS

    if not arguments.attack:
        raise UserError(
            f"expected an attack, got none (known: {', '.join(ATTACKS)}): add "
            "--attack poison"
        )
    errors.check_names("attack", [arguments.attack], ATTACKS)
    attack = ATTACKS[arguments.attack]
    chat = preset.name in CHAT
    if chat and arguments.attack != "gcg":
        raise UserError(
            f"--attack {arguments.attack}: expected gcg, the only attack on "
            f"{preset.name}, as the others need the testbed's world: choose testbed"
        )
    if not chat and arguments.domains not in (preset.domains, attack.domains):
        raise UserError(
            f"--domains: the attack '{arguments.attack}' is made on "
            f"{', '.join(attack.domains)}; drop it"
        )
    own = {name: getattr(attack, name) for name in DATA} if attack.trains else {}
    data = _budget(arguments, DATA, own, NO_DATA)
    search = _budget(arguments, SEARCH, attack.search, NO_SEARCH)
    training = arguments.training
    if data:
        if data["examples"] > MOST_EXAMPLES:
            raise UserError(
                f"--examples: expected at most {MOST_EXAMPLES}, got "
                f"{data['examples']}; rows recur long before: raise --epochs instead"
            )
        attack_count(data["ratio"], data["examples"])
        steps = steps_for_epochs(data["epochs"], data["examples"], training.batch_size)
        if not values_of(STEPS, words):
            training = dataclasses.replace(training, steps_per_domain=steps)
        elif arguments.epochs is not None:
            raise UserError(f"expected --epochs or {STEPS}, got both: drop one")
    domains = arguments.domains if chat else attack.domains
    changed = dataclasses.replace(arguments, domains=domains, training=training)
    return AttackJob(
        **vars(make_job(preset, changed)),
        attack=arguments.attack,
        ratio=data.get("ratio"),
        examples=data.get("examples"),
        search=search,
    )


def _budget(
    arguments: AttackArguments[Any],
    names: Sequence[str],
    own: Mapping[str, Any],
    lacking: str,
) -> dict[str, Any]:
    """The attack's default numbers with those of the command line; empty for none."""
    found = dict(own)
    for name in names:
        value, flag = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if name not in own:
            raise UserError(f"{flag}: the attack '{arguments.attack}' {lacking}")
        if name != "ratio" and value < 1:
            raise UserError(f"{flag}: expected at least 1, got {value}")
        found[name] = value
    return found


def execute(job: AttackJob) -> None:
    """Builds the study, runs it and writes its report."""
    cli.enable_compilation_cache()
    from sbr_jax.provenance.code_version import recorder
    from sbr_jax.training import pipeline

    study = job.make_study()
    pipeline.run(
        study,
        job.methods,
        job.seeds,
        job.workdir,
        job.config,
        notes={**job.notes(), **study.notes},
        code=None if job.preset in CHAT else recorder(f"attack:{job.attack}"),
        quiet=job.quiet,
    )
    if not storage.is_bucket(job.workdir):
        distributed.decide(lambda: _report(job))


def _report(job: AttackJob) -> None:
    from sbr_jax.reporting import report

    runs, output = report.build([job.workdir])
    if not job.quiet:
        report.print_tables(runs, output)
