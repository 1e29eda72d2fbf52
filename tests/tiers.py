"""Cases of a table that only `make test-all` asks."""

import pytest


def few(cases, kept):
    """The same cases; all but the `kept` (names, or the first so many) are thorough.

    A case is thorough if others of its table, asked by `make test`, would show the same
    kind of fault.
    """
    cases = list(cases)
    names = cases[:kept] if isinstance(kept, int) else list(kept)
    assert set(names) < set(cases), f"expected some of {cases}, got {names}"
    return [
        case
        if case in names
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough
        )
        for case in cases
    ]
