"""Public names and modules of the core are documented; their examples are doctests."""

import importlib
import inspect
import pkgutil

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
