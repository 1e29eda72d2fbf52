"""Attack a model during or after fine-tuning, and measure the safety that remains.

    python -m experiments.attack PRESET --workdir DIR --attack NAME [--ratio P]
        [--examples N] [--epochs E] [--steps N] [--suffix-length S] [--candidates B]
        [--prompts N] [--methods A B ...] [--seed N N ...] [--quiet]
        [--training.learning-rate 1e-3 ...]
    python -m experiments.attack PRESET --help    # every setting
    python -m experiments.attack --list

It runs the pipeline of `experiments.run` on another study. Finished stages are kept,
the same command continues after an interruption, and the folder holds the same files,
with `harmful_score` and `asr` for every variant. It also writes the report.
"""

from collections.abc import Sequence

from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli, hosts
from sbr_jax.programs.attack_job import CHAT, AttackArguments, execute, make_attack
from sbr_jax.programs.job import parse

PROGRAM = cli.command("attack")
PRESETS = ("testbed", "testbed-hard", "testbed-2", *CHAT)
"""Presets that can be attacked; those of chat models by `gcg` alone."""
SHOWN = ("plain", "safeanchor-exact")
"""Variants to attack by default."""
SEEDS = (0, 1, 2)


def listing() -> str:
    """The attacks, methods and variants, as `--list` prints them."""
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
    lines += ["", "variants", *(f"  {name}" for name in VARIANTS)]
    return "\n".join(lines)


def attack(args: Sequence[str]) -> None:
    """Carries out a command line."""
    if "--list" in args:
        print(listing())
        return
    preset, arguments = parse(
        AttackArguments, args, PROGRAM, PRESETS, methods=SHOWN, seed=SEEDS
    )
    with hosts.joined(arguments, args):
        execute(make_attack(preset, arguments, args))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(attack, args, __doc__)
