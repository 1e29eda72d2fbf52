"""Folders that the tests of studies share: nobody writes into them."""

import pytest
from chat_case import build, copy_world, save_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A chat model and its data."""
    return save_world(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def roomy(tmp_path_factory):
    """The same with room for HumanEval's answers."""
    return save_world(tmp_path_factory.mktemp("roomy"), context=640)


@pytest.fixture
def copy(world, tmp_path):
    """A copy that may be damaged."""
    return copy_world(world, tmp_path)


@pytest.fixture(scope="session")
def study(world):
    """The study of the shared folders, without weights."""
    return build(world)
