"""Attack a model while it is fine-tuned or after it, and measure what is left of it.

    python -m experiments.attack PRESET --workdir DIR --attack NAME [--ratio P]
        [--examples N] [--epochs E] [--steps N] [--suffix-length S] [--candidates B]
        [--prompts N] [--methods A B ...] [--seed N N ...] [--set KEY=VALUE ...]
        [--quiet]
    python -m experiments.attack --list

The same pipeline as `experiments.run` on another study: finished stages are kept, the
same command continues, and the folder holds the same files, with `harmful_score` and
`asr` for every row. The report is written at once.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sbr_jax import recipes as configs
from sbr_jax.programs import cli
from sbr_jax.programs.run import parse_overrides
from sbr_jax.typing import UserError

PROGRAM = "python -m experiments.attack"
PRESETS = ("testbed", "testbed-hard")
"""Presets whose world has an attacker."""
METHODS = ("plain", "safeanchor-exact")
DATA = ("ratio", "examples", "epochs")
"""Options of attacks with training data."""
SEARCH = ("steps", "suffix_length", "candidates", "prompts")
"""Options of attacks that search."""
SEEDS = (0, 1, 2)
MOST_EXAMPLES = 100_000
"""The world's rows recur long before; what is longer is a matter of epochs."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Attack a model while it is fine-tuned, and measure what is left of its safety."""

    preset: tyro.conf.Positional[str] = ""
    """What to attack: testbed or testbed-hard."""
    workdir: str | None = None
    """Folder for the results; the same folder continues the same run."""
    attack: str = ""
    """Name of an attack; --list shows them."""
    ratio: float | None = None
    """Share of attack rows in the training set, 0 to 1; default: the attack's."""
    examples: int | None = None
    """Size of the training set; default: the attack's."""
    epochs: int | None = None
    """Passes over the training set, 50 for a persistent attack; default: the
    attack's."""
    steps: int | None = None
    """Steps of the search; default: the attack's."""
    suffix_length: int | None = None
    """Tokens of a suffix; default: the attack's."""
    candidates: int | None = None
    """Candidates of a step; default: the attack's."""
    prompts: int | None = None
    """Harmful requests to search a suffix for; default: the attack's."""
    methods: tuple[str, ...] = METHODS
    """Rows to run: methods or ablations such as safeanchor-exact:no-anchor."""
    seed: tuple[int, ...] = SEEDS
    """Seeds."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")
    ] = ()
    """Settings (batch_size=8), options of the study (study.KEY=VALUE) and
    hyper-parameters of a row (safeanchor.max_rank=16)."""
    list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List attacks and methods."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line that was found to be in order.

    Attributes:
        workdir: where results go.
        attack: its name.
        ratio: share of attack rows; None where the attack has no data.
        examples: size of the training set; None likewise.
        search: budget of the search; empty where the attack has none.
        methods: rows, as names.
        seeds: in order.
        settings: of the training job.
        study_options: keyword arguments of the preset's study.
        row_options: keyword arguments per row.
        quiet: whether to print nothing.
    """

    workdir: Path
    attack: str
    ratio: float | None
    examples: int | None
    search: Mapping[str, int]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Any
    study_options: Mapping[str, Any]
    row_options: Mapping[str, Mapping[str, Any]]
    quiet: bool


def make_plan(arguments: Arguments) -> Plan:
    """Check a command line, the cheap questions first.

    Raises:
        UserError: for the first mistake.
    """
    if not arguments.preset:
        known = ", ".join(PRESETS)
        raise UserError(
            f"expected a preset, got none (known: {known}): {PROGRAM} testbed"
        )
    cli.check_names("preset", [arguments.preset], PRESETS)
    if not arguments.workdir:
        raise UserError(
            "expected a folder for the results, got none: add --workdir "
            f"runs/{arguments.attack or 'attack'}"
        )
    if not arguments.seed or not arguments.methods:
        raise UserError("expected at least one seed and one method, got none")
    cli.check_seeds(arguments.seed)

    from sbr_jax.methods import ABLATIONS, METHODS, build
    from sbr_jax.studies.attacks import ATTACKS
    from sbr_jax.training.settings import Settings

    if not arguments.attack:
        raise UserError(
            f"expected an attack, got none (known: {', '.join(ATTACKS)}): add "
            "--attack poison"
        )
    cli.check_names("attack", [arguments.attack], ATTACKS)
    rows = arguments.methods
    cli.check_names("method", rows, [*METHODS, *ABLATIONS])
    preset = configs.load(arguments.preset)
    settings, study, options = parse_overrides(arguments.overrides, preset, rows)
    for row in rows:
        build(row, **options.get(row, {}))
    ratio, examples = _size(arguments)
    search = _search(arguments)
    checked = Settings(**settings)
    if examples is not None:
        checked = _with_steps(arguments, checked, examples)
    return Plan(
        workdir=Path(arguments.workdir),
        attack=arguments.attack,
        ratio=ratio,
        examples=examples,
        search=search,
        methods=rows,
        seeds=arguments.seed,
        settings=checked,
        study_options=study,
        row_options=options,
        quiet=arguments.quiet,
    )


def _size(arguments: Arguments) -> tuple[float | None, int | None]:
    """Ratio and size of the training set, where the attack has one.

    Raises:
        UserError: for values that cannot be meant, or that the attack has no use for.
    """
    from sbr_jax.attacks import attack_count
    from sbr_jax.studies.attacks import ATTACKS

    attack = ATTACKS[arguments.attack]
    given = {name: getattr(arguments, name) for name in DATA}
    if not attack.trains:
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"--{name}: the attack '{arguments.attack}' has no training data "
                    "of its own; drop it (--set steps_per_domain=N for longer domains)"
                )
        return None, None
    if (asked := given["examples"] or 0) > MOST_EXAMPLES:
        raise UserError(
            f"--examples: expected at most {MOST_EXAMPLES}, got {asked}; rows recur "
            "long before: raise --epochs instead"
        )
    ratio = attack.ratio if given["ratio"] is None else given["ratio"]
    examples = attack.examples if given["examples"] is None else given["examples"]
    attack_count(ratio, examples)
    return ratio, examples


def _search(arguments: Arguments) -> dict[str, int]:
    """The budget of the search, where the attack has one.

    Raises:
        UserError: for values that cannot be meant, or that the attack has no use for.
    """
    from sbr_jax.studies.attacks import ATTACKS

    budget = dict(ATTACKS[arguments.attack].search)
    for name in SEARCH:
        value = getattr(arguments, name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name not in budget:
            raise UserError(
                f"{flag}: the attack '{arguments.attack}' searches nothing; drop it"
            )
        if value < 1:
            raise UserError(f"{flag}: expected at least 1, got {value}")
        budget[name] = value
    return budget


def _with_steps(arguments: Arguments, settings: Any, examples: int) -> Any:
    """The settings with as many steps as the epochs take, unless steps were set.

    Raises:
        UserError: for less than one epoch, or both epochs and steps.
    """
    from sbr_jax.attacks import steps_for_epochs
    from sbr_jax.studies.attacks import ATTACKS

    epochs = arguments.epochs
    if any(text.startswith("steps_per_domain=") for text in arguments.overrides):
        if epochs is not None:
            raise UserError(
                "expected --epochs or --set steps_per_domain, got both: drop one"
            )
        return settings
    if epochs is None:
        epochs = ATTACKS[arguments.attack].epochs
    steps = steps_for_epochs(epochs, examples, settings.batch_size)
    return dataclasses.replace(settings, steps_per_domain=steps)


def execute(plan: Plan) -> None:
    """Build the study, run it, write its report."""
    cli.enable_compilation_cache()
    from sbr_jax.provenance.code_version import recorder
    from sbr_jax.reporting import report
    from sbr_jax.studies import attacks
    from sbr_jax.training import pipeline

    study = attacks.build(
        plan.attack,
        ratio=plan.ratio,
        examples=plan.examples,
        search=plan.search,
        quiet=plan.quiet,
        **plan.study_options,
    )
    options = configs.recorded(plan.study_options)
    sizes = {"ratio": plan.ratio, "examples": plan.examples}
    attack = {"name": plan.attack, **sizes, **plan.search}
    pipeline.run(
        study,
        plan.methods,
        plan.seeds,
        plan.workdir,
        plan.settings,
        config={"study": options, "attack": attack},
        overrides=plan.row_options,
        code=recorder(f"attack:{plan.attack}"),
        quiet=plan.quiet,
    )
    runs, output = report.build([plan.workdir])
    if not plan.quiet:
        report.print_tables(runs, output)


def listing() -> str:
    """Return what `--list` prints."""
    from sbr_jax.methods import ABLATIONS, METHODS
    from sbr_jax.studies.attacks import ATTACKS

    lines = ["attacks"]
    for name, attack in ATTACKS.items():
        lines.append(f"  {name:<10} {attack.summary}")
        if attack.trains:
            lines.append(
                f"  {'':<10} --ratio {attack.ratio} --examples {attack.examples} "
                f"--epochs {attack.epochs}"
            )
        if attack.search:
            budget = (f"--{k.replace('_', '-')} {v}" for k, v in attack.search.items())
            lines.append(f"  {'':<10} {' '.join(budget)}")
            lines += [f"  {'':<10} {line}" for line in attack.notes]
    lines += ["", "methods", *(f"  {name}" for name in METHODS)]
    lines += ["", "ablations", *(f"  {name}" for name in ABLATIONS)]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    cli.quiet_libraries()

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        if arguments.list:
            print(listing())
            return
        execute(make_plan(arguments))

    return cli.guarded(
        program,
        interrupted="interrupted: finished stages are kept; the same command continues",
    )


if __name__ == "__main__":
    sys.exit(main())
