"""The page on training loops of one's own: its code runs and keeps its promise."""

import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "own-loop.md"
BLOCKS = re.findall(
    r"^## (.+?)\n.*?```python\n(.*?)```",
    PAGE.read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_example_runs_and_its_step_stays_out(title, code, capsys):
    if "flax" in code:
        pytest.importorskip("flax")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), {})
    share = float(capsys.readouterr().out.rsplit(":", 1)[1])
    assert share <= 1e-5  # the documented guarantee of update_projection


def test_there_is_an_example_for_flax_and_one_for_a_part():
    assert [title for title, _ in BLOCKS] == ["Flax NNX", "A part of the parameters"]
