"""Public names and modules are documented, and the page on loops of one's own runs."""

import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import pytest

import sbr_jax

CORE = ["subspace", "fisher", "transforms"]


def modules():
    for name in CORE:
        module = importlib.import_module(f"sbr_jax.{name}")
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield importlib.import_module(f"{module.__name__}.{info.name}")


def test_exports_are_sorted_and_exist():
    assert sorted(sbr_jax.__all__) == list(sbr_jax.__all__)
    assert all(hasattr(sbr_jax, name) for name in sbr_jax.__all__)


@pytest.mark.parametrize("name", sbr_jax.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(sbr_jax, name)
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    if inspect.ismodule(thing) or name == "UserError":
        return
    assert ">>>" in text, f"{name} has no example"
    sections = ["Returns:"] if inspect.isfunction(thing) else []
    if inspect.isfunction(thing) and inspect.signature(thing).parameters:
        sections.append("Args:")
    for section in sections:
        assert section in text, f"{name}: no section {section}"


def test_every_module_says_what_it_is():
    for module in modules():
        assert module.__doc__, module.__name__
        if not hasattr(module, "__path__"):
            assert "Symbols:" in module.__doc__, f"{module.__name__}: no legend"


# --- training loops of one's own ------------------------------------------------------

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
