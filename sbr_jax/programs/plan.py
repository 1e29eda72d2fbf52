"""Plan of a job on a slice of TPUs before one is rented: memory, hours, layout.

    sbr-jax plan --model llama2-7b --topology v5e:4x4 [--mesh data=,fsdp=,tp=]
        [--method NAME] [--length 512] [--batch 16]
        [--compare plain,safeanchor-exact,unified]

The step, the Fisher pass and the writing of answers are compiled for the slice and
counted; the slice itself is not needed (extra `tpu`). Without --mesh a few layouts are
tried and the best is taken. Results are kept in the user's cache folder, so asking
again costs nothing. All settings: sbr-jax plan --help.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from sbr_jax import checks, errors
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.recipes.llama2_7b import EPOCHS, EXAMPLES, PRESET
from sbr_jax.settings import Count, Positive
from sbr_jax.typing import UserError

PROGRAM = cli.command("plan")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plan a job on a slice of TPUs before one is rented: memory, hours, layout."""

    model: Annotated[str | None, REQUIRED] = None
    """A known shape such as llama2-7b, or a config.json or its folder."""
    topology: Annotated[str | None, REQUIRED] = None
    """The slice, as v5e:4x4."""
    mesh: str | None = None
    """Chips by axis, as data=1,fsdp=4,tp=4; default: the best of a few."""
    method: str = "safeanchor-exact"
    """Method or variant."""
    compare: str | None = None
    """Several methods to compare, separated by commas, instead of --method."""
    length: Count = 512
    """Tokens of an example."""
    batch: Count = PRESET.training.batch_size
    """Examples in a step."""
    accumulation: Count = 1
    """Microbatches in a step."""
    rank: Count = PRESET.training.lora_rank
    """Rank of the adapter."""
    layouts: Count = 3
    """Number of layouts to compile without --mesh."""
    calibration: Count = 500
    """Safety calibration examples."""
    answers: Count = 128
    """Most tokens of a calibration answer."""
    fisher: Count = 16
    """Examples that a Fisher differentiates at once."""
    rows: Count = 64
    """Answers written at once."""
    prompt: Count = 384
    """Tokens of a prompt."""
    new_tokens: Count = 256
    """Tokens of an answer."""
    domains: Count = 3
    """Domains, learnt one after another."""
    examples: Count = EXAMPLES
    """Examples in each domain."""
    epochs: Positive = float(EPOCHS)
    """Passes over the examples."""
    prompts: Count = 1050
    """Prompts answered at the start and after each domain."""
    seeds: Count = 1
    """Number of seeds."""
    quick: bool = False
    """Compile a few times faster; only memory size and traffic become upper bounds."""
    quiet: bool = False
    """Print no lines while compiling."""


def check(arguments: Arguments) -> tuple[str, ...]:
    """Checks a command line and returns its methods."""
    for name, example in (("model", "llama2-7b"), ("topology", "v5e:4x4")):
        if not getattr(arguments, name):
            raise UserError(f"expected --{name}, got none: add --{name} {example}")
    checks.fields(arguments, "plan")
    names = (arguments.compare or arguments.method).split(",")
    methods = tuple(name.strip() for name in names)
    errors.check_names("method", methods, [*METHODS, *VARIANTS])
    return methods


def plan(args: Sequence[str]) -> None:
    """Carries out a command line."""
    arguments = cli.parse(Arguments, args, PROGRAM)
    methods = check(arguments)
    from sbr_jax.planning import planner
    from sbr_jax.planning.case import Case
    from sbr_jax.planning.chips import parse_topology
    from sbr_jax.planning.job import Job
    from sbr_jax.planning.layouts import parse_layout
    from sbr_jax.planning.shapes import read_shape

    topology = parse_topology(str(arguments.topology))
    read_shape(str(arguments.model))
    layout = None if arguments.mesh is None else parse_layout(arguments.mesh)
    training = dataclasses.replace(
        PRESET.training, batch_size=arguments.batch, lora_rank=arguments.rank
    )
    case = Case(
        model=str(arguments.model),
        training=training,
        accumulation=arguments.accumulation,
        length=arguments.length,
        calibration=arguments.calibration,
        answers=arguments.answers,
        fisher=arguments.fisher,
        rows=arguments.rows,
        prompt=arguments.prompt,
        new=arguments.new_tokens,
    )
    job = Job(
        arguments.domains,
        arguments.examples,
        arguments.epochs,
        arguments.prompts,
        arguments.seeds,
    )
    say = (lambda line: None) if arguments.quiet else cli.terminal.complain
    print(
        planner.plan(
            case,
            methods,
            topology,
            layout,
            job,
            tries=arguments.layouts,
            quick=arguments.quick,
            say=say,
        )
    )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    done = "interrupted: what was compiled is kept; the same command continues"
    return cli.start(plan, args, None, interrupted=done)
