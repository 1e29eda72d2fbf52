"""What MT-Bench asks its judge (arXiv:2306.05685), read from FastChat's file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from sbr_jax.data.readers import find, jsonl_rows
from sbr_jax.data.rows import Row
from sbr_jax.data.sources import data_folder
from sbr_jax.typing import UserError

_CELL = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """One way to ask a judge.

    >>> ask = JudgePrompt("mine", "single", "Judge.", "Q: {question}", "[[rating]]")
    >>> ask.messages({"question": "Why {so}?"})[1]["content"]
    'Q: Why {so}?'
    """

    name: str
    kind: str
    """``"single"`` (a rating of one answer) or ``"pairwise"``."""
    system: str
    template: str
    output: str
    """The form of the verdict: ``"[[rating]]"`` or ``"[[A]]"``."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of what the template has to be filled with."""
        return tuple(dict.fromkeys(_CELL.findall(self.template)))

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The system message and the filled template.

        Args:
          values: by the names in :attr:`cells`; more are ignored.

        Raises:
          UserError: naming what is missing.
        """
        missing = [name for name in self.cells if name not in values]
        if missing:
            raise UserError(
                f"judge prompt '{self.name}': expected {', '.join(self.cells)}, got no "
                f"{', '.join(missing)}"
            )
        # One pass: braces in an answer are its own.
        filled = _CELL.sub(lambda match: values[match[1]], self.template)
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": filled},
        ]


def load_judge_prompts(folder: str | Path) -> dict[str, JudgePrompt]:
    """Reads ``mtbench/judge_prompts.jsonl``.

    Args:
      folder: the data folder.

    Returns:
      The prompts by name; those of the maths categories want reference answers.

    Raises:
      UserError: for a missing or damaged file, and a row that is not as published.
    """
    path = find(data_folder(folder) / "mtbench", "judge_prompts.jsonl")
    return {prompt.name: prompt for prompt in map(_prompt, jsonl_rows(path))}


def _prompt(row: Row) -> JudgePrompt:
    return JudgePrompt(
        name=row.text("name"),
        kind=row.option("type", ("single", "pairwise")),
        system=row.text("system_prompt"),
        template=row.text("prompt_template"),
        output=row.text("output_format"),
    )
