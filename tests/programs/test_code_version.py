"""The hash of a row's code: what changes it, and what must not."""

import ast
import dataclasses
import shutil

import pytest

from sbr_jax import recipes
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.provenance import code_version
from sbr_jax.provenance.code_version import BOOKKEEPING, ROOT, code_hash, decided_by
from sbr_jax.provenance.source_tree import Tree, digest
from sbr_jax.typing import UserError

TOY = {
    "toy/__init__.py": "from toy.parts import half as part\nRATE = 0.5\n",
    "toy/main.py": '''"""What is run."""
from toy import part
from toy import shapes as s

class Base:
    """A base."""
    scale = 2

class Job(Base):
    def go(self, x):
        from toy.late import shift
        check_sign(x)
        if x < 1:
            raise UserError("x: expected 1 or more")
        return shift(part(x)) * s.area(x)

def unused(x):
    return x + 1
''',
    "toy/parts.py": "def half(x):\n    return x / TWO\n\nTWO = 2\n",
    "toy/late.py": "def shift(x):\n    return x + 1\n",
    "toy/shapes.py": "def area(x):\n    return x * x\n\ndef edge(x):\n    return x\n",
    "toy/other.py": "def never():\n    return 3\n",
}
MAIN, CHECK = "toy/main.py", "        check_sign(x)"
RAISE = 'raise UserError("x: expected 1 or more")'
SAME = {
    "a comment": (MAIN, "scale = 2", "scale = 2  # twice"),
    "a docstring": (MAIN, '"""A base."""', '"""The base class."""'),
    "no docstring": (MAIN, '    """A base."""\n', ""),
    "the text of a refusal": (MAIN, "expected 1 or more", "too small"),
    "another refusal": (
        MAIN,
        f"{CHECK}\n",
        "        if x > 9:\n            raise UserError('x')\n        refuse(x)\n",
    ),
    "what is not reached": (MAIN, "x + 1", "x + 2"),
    "a name beside it": ("toy/shapes.py", "    return x\n", "    return -x\n"),
    "a constant beside a re-export": ("toy/__init__.py", "0.5", "0.25"),
    "another module": ("toy/other.py", "3", "4"),
}
OTHER = {
    "a base class": (MAIN, "scale = 2", "scale = 3"),
    "through a re-export": ("toy/parts.py", "x / TWO", "x // TWO"),
    "a constant": ("toy/parts.py", "TWO = 2", "TWO = 3"),
    "an import in a function": ("toy/late.py", "x + 1", "x + 2"),
    "an attribute of a module": ("toy/shapes.py", "x * x", "x + x"),
    "a branch that goes on": (MAIN, RAISE, "x = 1"),
    "a check whose result is used": (MAIN, CHECK, "        x = check_sign(x)"),
    "a call that is no check": (MAIN, CHECK, "        checkpoint(x)"),
    "work at import": ("toy/parts.py", "TWO = 2\n", "TWO = 2\nprint(TWO)\n"),
}


def toy(folder, path=None, old="", new="", closed=()):
    for name, text in TOY.items():
        if name == path:
            assert old in text
            text = text.replace(old, new)
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Tree(folder, "toy").reached([("toy.main", "Job")], closed)


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_may_decide_a_number_changes_the_hash_and_nothing_else(name, tmp_path):
    change = (SAME | OTHER)[name]
    assert (toy(tmp_path / "a") == toy(tmp_path / "b", *change)) == (name in SAME)


def test_what_is_reached_is_named_and_a_closed_place_is_not_entered(tmp_path):
    names = {f"{module}:{name}" for module, name in toy(tmp_path)}
    inner = {"toy.main:Job", "toy.main:Base", "toy.parts:half", "toy.parts:TWO"}
    assert names == inner | {"toy.late:shift", "toy.shapes:area"}
    found = toy(tmp_path, closed=("toy.late", "toy.shapes:area"))
    assert {f"{module}:{name}" for module, name in found} == inner


def test_a_definition_that_moves_keeps_its_code(tmp_path):
    before = toy(tmp_path / "a")
    after = toy(tmp_path / "b", MAIN, "toy.late", "toy.later")
    assert ("toy.late", "shift") not in after
    (tmp_path / "b/toy/late.py").rename(tmp_path / "b/toy/later.py")
    after = Tree(tmp_path / "b", "toy").reached([("toy.main", "Job")])
    moved = {name: code for (_, name), code in after.items()}
    assert moved == {name: code for (_, name), code in before.items()}


def test_a_digest_knows_an_empty_list_from_no_list():
    assert digest(ast.parse("f([])").body) != digest(ast.parse("f()").body)
    assert digest(ast.parse("x = None").body) != digest(ast.parse("x = 0").body)


# --- this project's own rows ----------------------------------------------------------


def test_the_values_of_a_study_and_of_a_row_count(monkeypatch):
    before = code_hash("plain"), code_hash("sbr:one")
    maker, options = VARIANTS["sbr:one"]
    monkeypatch.setitem(VARIANTS, "sbr:one", (maker, {**options, "anchors": 2}))
    assert code_hash("sbr:one") != before[1]
    preset = recipes.load("testbed")
    training = dataclasses.replace(preset.training, learning_rate=9e-4)
    faster = dataclasses.replace(preset, training=training)
    monkeypatch.setattr(recipes, "load", lambda name: faster)
    assert code_hash("plain") != before[0]


@pytest.mark.parametrize("row", [*METHODS, *VARIANTS])
def test_every_row_has_a_hash_of_its_own(row):
    maker = VARIANTS[row][0] if row in VARIANTS else row
    assert METHODS[maker].__name__ in {name for _, name in decided_by(row)}
    assert len(code_hash(row)) == 10
    other = "plain" if row != "plain" else "sbr"
    assert code_hash(row) != code_hash(other)


@pytest.mark.parametrize("study", ["demo", "testbed-2", "llama2-7b", "attack:gcg"])
def test_every_study_has_one(study):
    assert code_hash("plain", study) != code_hash("safegrad", study)


def test_what_a_run_goes_through_is_reached_and_nothing_of_the_programs():
    modules = {module for module, _ in decided_by("safeanchor-exact")}
    for room in (
        "_rows",
        "data.layout",
        "models.answers",
        "transforms",
        "training.step",
        "testbed.world",
        "studies",
    ):
        assert any(name.startswith(f"sbr_jax.{room}") for name in modules), room
    rooms = {name.split(".")[1] for name in modules}
    assert not rooms & {"programs", "reporting", "provenance", "costs"}


def test_what_is_left_out_is_there():
    """A module that moves must be named anew, or it counts."""
    tree = Tree(ROOT, "sbr_jax")
    for place in BOOKKEEPING:
        module, _, name = place.partition(":")
        assert tree.path(module), place
        assert not name or name in tree.module(module).definitions, place


def test_the_testbeds_files_count(monkeypatch, tmp_path):
    before, assets = code_hash("plain"), code_version._assets(ROOT)
    copy = tmp_path / code_version.ASSETS
    shutil.copytree(ROOT / code_version.ASSETS, copy)
    assert code_version._assets(tmp_path) == assets
    file = copy / "alignment.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    code_version._assets.cache_clear()
    found = code_version._assets(tmp_path)
    assert found != assets
    monkeypatch.setattr(code_version, "_assets", lambda root: found)
    assert code_hash("plain") != before


@pytest.mark.parametrize(
    ("row", "study"), [("none", "testbed"), ("plain", "none"), ("plain", "attack:none")]
)
def test_what_there_is_not_is_refused(row, study):
    with pytest.raises(UserError, match=r"unknown \w+ 'none'"):
        code_hash(row, study)
    if study != "testbed":
        assert code_version.recorder(study) is None
