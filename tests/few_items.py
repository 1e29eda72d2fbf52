"""A testbed with few items of every set: a run, in a fraction of its time."""

import dataclasses

import pytest

from sbr_jax.testbed import evalsets


@pytest.fixture
def few_items(monkeypatch):
    """Keeps the first twelve items of every set that is measured."""
    keep_few(monkeypatch)


def keep_few(patch, count=12):
    """Does so from now on, with another number."""
    whole = evalsets.make_evalset

    def few(*args, **options):
        found = whole(*args, **options)
        names = [field.name for field in dataclasses.fields(found)]
        return dataclasses.replace(
            found, **{n: getattr(found, n)[:count] for n in names}
        )

    patch.setattr(evalsets, "make_evalset", few)
