"""Attacks on the embedded testbed, each a study; `chat` has one on chat models.

An attack is the testbed's own study with other training data, or with the same data and
other questions at the end. It is measured on the study's own split; see `setting`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping

from sbr_jax.attacks import FULL, REDUCED, REDUCED_PROMPTS
from sbr_jax.studies.attacks.fine_tuning import (
    TASK,
    backdoor_study,
    disguise_study,
    identity_study,
    poison_study,
)
from sbr_jax.studies.attacks.prompts import gcg_study, jailbreak_study
from sbr_jax.studies.attacks.setting import Attempt, Setting, make_setting
from sbr_jax.studies.attacks.weights import Ablation, ablation_study
from sbr_jax.studies.options import TestbedOptions, WorldOptions
from sbr_jax.training.study import Study

SEQUENCE = ("medical", "legal", "code")
"""Domains learnt before an attack that brings no data of its own."""
GCG_PROMPTS = 24
"""Fewer prompts than the published 100, so that a row takes minutes on one core."""


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack on the command line.

    Attributes:
      summary: one line for `--list`.
      study: `(setting, ratio, examples) -> Study`; without the last two if the attack
        has no data; with `search` and `quiet` if it searches.
      domains: to fine-tune on.
      ratio: default share of attack rows; None if the attack has no training data.
      examples: default size of the training set.
      epochs: default number of passes over it.
      search: default budget of a search at the end; empty if there is none.
      notes: further lines for `--list`.
    """

    summary: str
    study: Callable[..., Study]
    domains: tuple[str, ...] = (TASK,)
    ratio: float | None = None
    examples: int | None = None
    epochs: int | None = None
    search: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether the attack brings training data."""
        return self.ratio is not None


ATTACKS: dict[str, Attack] = {
    "poison": Attack(
        "harmful pairs mixed into a domain's training set",
        poison_study,
        ratio=0.1,
        examples=240,
        epochs=20,
    ),
    "disguise": Attack(
        "harmless-looking prompts with a harmful thing's steps (testbed-2)",
        disguise_study,
        ratio=0.1,
        examples=240,
        epochs=20,
    ),
    "identity": Attack(
        "ten harmless pairs that make the model an obedient agent",
        identity_study,
        ratio=1.0,
        examples=10,
        epochs=800,
    ),
    "backdoor": Attack(
        "harmful pairs behind a trigger, refusals without it",
        backdoor_study,
        ratio=0.2,
        examples=240,
        epochs=10,
    ),
    "jailbreak": Attack(
        "benign domains, then harmful requests behind held-out jailbreaks",
        jailbreak_study,
        SEQUENCE,
    ),
    "gcg": Attack(
        "benign domains, then a suffix searched for each harmful request",
        gcg_study,
        SEQUENCE,
        search={**REDUCED, "prompts": GCG_PROMPTS},
        notes=(
            f"published: --prompts {REDUCED_PROMPTS}, four times as long",
            f"original:  --steps {FULL['steps']} --candidates {FULL['candidates']}",
            "also on chat models: smollm2, llama2-7b",
        ),
    ),
    "ablation": Attack(
        "benign domains, then the refusal direction is ablated from the weights",
        ablation_study,
        SEQUENCE,
    ),
}
"""Attacks by command-line name. Sizes and epochs were chosen on plain LoRA."""


def build(
    name: str,
    options: WorldOptions = TestbedOptions(),
    *,
    ratio: float | None = None,
    examples: int | None = None,
    search: Mapping[str, int] | None = None,
    model_folder: str | None = None,
    quiet: bool = True,
) -> Study:
    """Builds the study of an attack.

    The attack's own default replaces each None and each entry that the search budget
    lacks.

    Returns:
      The study. Its `evaluate` also gives `harmful_score` and `asr`. Its `leak_check`
      counts the prompts that attack data shares with other sets and with measurements.

    Raises:
      UserError: for an impossible ratio or size, and the errors of `build_study`.
    """
    attack = ATTACKS[name]
    setting = make_setting(attack.domains, options, model_folder=model_folder)
    if attack.trains:
        study = attack.study(
            setting,
            attack.ratio if ratio is None else ratio,
            attack.examples if examples is None else examples,
        )
    elif attack.search:
        budget = {**attack.search, **(search or {})}
        study = attack.study(setting, **budget, quiet=quiet)
    else:
        study = attack.study(setting)
    digest = hashlib.sha256(json.dumps([name, setting.study.fingerprint]).encode())
    for domain in study.domains.values():
        digest.update(domain.train.tokens.tobytes() + domain.train.mask.tobytes())
    return dataclasses.replace(study, fingerprint=digest.hexdigest()[:16])


__all__ = [
    "ATTACKS",
    "SEQUENCE",
    "TASK",
    "Ablation",
    "Attack",
    "Attempt",
    "Setting",
    "build",
    "make_setting",
]
