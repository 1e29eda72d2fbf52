"""The hash of a row's code: what changes it, and what must not."""

import ast
import shutil

import pytest

from sbr_jax import recipes as configs
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.provenance import code_version
from sbr_jax.provenance.code_version import PACKAGES, ROOT, code_hash, decided_by
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
SAME = {
    "a comment": ("toy/main.py", "scale = 2", "scale = 2  # twice"),
    "a docstring": ("toy/main.py", '"""A base."""', '"""The base class."""'),
    "no docstring": ("toy/main.py", '    """A base."""\n', ""),
    "layout": ("toy/parts.py", "x / TWO", "(\n        x / TWO\n    )"),
    "the text of a refusal": ("toy/main.py", "expected 1 or more", "too small"),
    "another refusal": (
        "toy/main.py",
        "        check_sign(x)\n",
        "        if x > 9:\n            raise UserError('x')\n        refuse(x)\n",
    ),
    "what is not reached": ("toy/main.py", "x + 1", "x + 2"),
    "a name beside it": ("toy/shapes.py", "    return x\n", "    return -x\n"),
    "a constant beside a re-export": ("toy/__init__.py", "0.5", "0.25"),
    "another module": ("toy/other.py", "3", "4"),
}
OTHER = {
    "a base class": ("toy/main.py", "scale = 2", "scale = 3"),
    "through a re-export": ("toy/parts.py", "x / TWO", "x // TWO"),
    "a constant": ("toy/parts.py", "TWO = 2", "TWO = 3"),
    "an import in a function": ("toy/late.py", "x + 1", "x + 2"),
    "an attribute of a module": ("toy/shapes.py", "x * x", "x + x"),
    "a branch that goes on": (
        "toy/main.py",
        'raise UserError("x: expected 1 or more")',
        "x = 1",
    ),
    "a check whose result is used": (
        "toy/main.py",
        "        check_sign(x)",
        "        x = check_sign(x)",
    ),
    "a call that is no check": (
        "toy/main.py",
        "        check_sign(x)",
        "        checkpoint(x)",
    ),
    "work at import": ("toy/parts.py", "TWO = 2\n", "TWO = 2\nprint(TWO)\n"),
}


def toy(folder, path=None, old="", new=""):
    for name, text in TOY.items():
        if name == path:
            assert old in text
            text = text.replace(old, new)
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Tree(folder, ("toy",)).reached([("toy.main", "Job")])


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_decides_no_number_leaves_the_hash(tmp_path, change):
    assert toy(tmp_path / "a") == toy(tmp_path / "b", *change)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_may_decide_a_number_changes_the_hash(tmp_path, change):
    assert toy(tmp_path / "a") != toy(tmp_path / "b", *change)


def test_the_definitions_that_are_reached_are_named(tmp_path):
    names = {f"{module}:{name}" for module, name in toy(tmp_path)}
    assert names == {
        "toy.main:Job",
        "toy.main:Base",
        "toy.parts:half",
        "toy.parts:TWO",
        "toy.late:shift",
        "toy.shapes:area",
    }


def test_a_closed_module_is_not_entered(tmp_path):
    toy(tmp_path)
    found = Tree(tmp_path, ("toy",)).reached(
        [("toy.main", "Job")], ("toy.late", "toy.shapes:area")
    )
    assert {name for _, name in found} == {"Job", "Base", "half", "TWO"}


def test_a_digest_knows_an_empty_list_from_no_list():
    assert digest(ast.parse("f([])").body) != digest(ast.parse("f()").body)
    assert digest(ast.parse("x = None").body) != digest(ast.parse("x = 0").body)


# --- this project's own rows ----------------------------------------------------------

ROWS = ("plain", "safeanchor-exact", "unified", "sbr", "lisa")
EDITS = {
    "the update projection": (
        [("sbr_jax/transforms/recipes.py", "1e-8", "1e-7")],
        {"safeanchor-exact", "unified"},
    ),
    "a default of one defence": (
        [("sbr_jax/methods/lisa.py", "proximal: float = 1.0", "proximal: float = 2.0")],
        {"lisa"},
    ),
    "the loss": (
        [("sbr_jax/losses.py", "def _masked_mean(values: jax.Array", "{}, *more")],
        set(ROWS),
    ),
    "the study's settings": (
        [("sbr_jax/recipes/testbed.py", '"learning_rate": 8e-4', '"x": 9e-4')],
        set(ROWS),
    ),
    "imports, the report and what is printed": (
        [
            ("sbr_jax/methods/lisa.py", "import math\n", "import cmath\n"),
            ("sbr_jax/programs/report.py", "import sys\n", "import sys\n\nMORE = 1\n"),
            ("sbr_jax/programs/cli.py", "import sys\n", "import sys\n\nMORE = 1\n"),
        ],
        set(),
    ),
}


class Edited(Tree):
    """The project's own tree with some files changed."""

    edits = ()

    def source(self, path):
        text = super().source(path)
        for name, old, new in self.edits:
            if path == ROOT / name:
                assert old in text, old
                text = text.replace(old, new.replace("{}", old), 1)
        return text


@pytest.mark.parametrize("case", EDITS.values(), ids=EDITS)
def test_an_edit_marks_the_rows_that_it_decides(case, monkeypatch):
    edits, wanted = case
    before = {row: code_hash(row) for row in ROWS}
    edited = Edited(ROOT, PACKAGES)
    edited.edits = edits
    monkeypatch.setattr(code_version, "_tree", lambda root: edited)
    assert {row for row in ROWS if code_hash(row) != before[row]} == wanted


@pytest.mark.parametrize("row", [*METHODS, *ABLATIONS])
def test_every_row_has_a_hash_of_its_own(row):
    maker = ABLATIONS[row][0] if row in ABLATIONS else row
    named = {name for module, name in decided_by(row, "testbed")}
    assert METHODS[maker].__name__ in named
    assert len(code_hash(row)) == 10
    other = "plain" if row != "plain" else "sbr"
    assert code_hash(row) != code_hash(other)


@pytest.mark.parametrize("study", [*configs.MODULES, "attack:poison", "attack:gcg"])
def test_every_study_has_one(study):
    assert code_hash("plain", study) != code_hash("safegrad", study)


def test_shipped_files_count(monkeypatch, tmp_path):
    before, shipped = code_hash("plain"), code_version._assets(ROOT)
    copy = tmp_path / code_version.ASSETS
    shutil.copytree(ROOT / code_version.ASSETS, copy)
    assert code_version._assets(tmp_path) == shipped
    file = copy / "alignment.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    code_version._assets.cache_clear()
    found = code_version._assets(tmp_path)
    assert found != shipped
    monkeypatch.setattr(code_version, "_assets", lambda root: found)
    assert code_hash("plain") != before


@pytest.mark.parametrize(
    ("row", "study"), [("none", "testbed"), ("plain", "none"), ("plain", "attack:none")]
)
def test_what_the_tree_lacks_is_refused(row, study):
    with pytest.raises(UserError, match="none: expected one of"):
        code_hash(row, study)
