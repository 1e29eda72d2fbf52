"""The documents follow the code: pages, options, links, commands, measured rows."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import synthetic_run

from sbr_jax.methods import METHODS, VARIANTS, Hyperparameters
from sbr_jax.methods.safeanchor import OURS, safeanchor
from sbr_jax.programs import cli
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import cell
from sbr_jax.training.records import read_json
from sbr_jax.typing import UserError
from tools import fill_docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in sorted((DOCS / "methods").glob("*.md"))}
SECTIONS = [
    "Formula",
    "Options",
    "What the defender must own",
    "Guarantee",
    "Cost of a step",
    "Where the source is silent",
    "Where paper and code disagree",
    "Run it",
    "Measured on the testbed",
    "Reference",
]


def read(path):
    return path.read_text(encoding="utf-8")


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def papers(text):
    return set(re.findall(r"arXiv:\d{4}\.\d{5}", text))


# --- pages ----------------------------------------------------------------------------


def test_every_method_has_a_page_and_every_page_a_method():
    assert set(PAGES) == set(METHODS)


def test_the_site_lists_every_page_once():
    listed = re.findall(r"(\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("name", METHODS)
def test_page_has_the_sections_and_a_place_for_its_row(name):
    text = read(PAGES[name])
    assert text.startswith(f"# `{name}`\n")
    assert re.findall(r"^## (.+)$", prose(text), re.MULTILINE) == SECTIONS
    rows = list(fill_docs.fill(text, [])[1])
    assert rows[0] == name
    assert set(rows) <= {*METHODS, *VARIANTS}
    maker = METHODS[name]
    code = f"{inspect.getdoc(inspect.getmodule(maker))} {inspect.getdoc(maker)}"
    source = text.split("## Reference")[1]
    assert name == "plain" or papers(source) & papers(code)


# --- options --------------------------------------------------------------------------


def defaults(maker):
    """Option to default, as `build` takes them; the row's name is none."""
    found = {}
    for name, parameter in inspect.signature(maker).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= {**defaults(safeanchor), **OURS}
        elif name != "name":
            found[name] = parameter.default
    return found


def stated(text):
    """The rows of a page's `| option | default | meaning |`, values as literals."""
    (table,) = re.findall(
        r"^\| option \| default \| meaning \|\n\|[ :|-]+\|\n((?:\|.*\n)+)", text, re.M
    )
    rows = [re.match(r"\| `(\w+)` \| `(.+?)` \| .+ \|$", x) for x in table.splitlines()]
    assert all(rows), "a row is not | `option` | `default` | meaning |"
    names = [row[1] for row in rows]
    assert len(set(names)) == len(names)
    return {row[1]: ast.literal_eval(row[2]) for row in rows}


@pytest.mark.parametrize("name", METHODS)
def test_options_of_the_page_are_those_of_the_code(name):
    here, there = stated(read(PAGES[name])), defaults(METHODS[name])
    for option, value in here.items():
        assert option in there, option
        assert (type(value), value) == (type(there[option]), there[option]), option
    # A recipe on top of another method states what differs; all others state all.
    recipe = METHODS[name].__name__ == "safeanchor_exact"
    assert set(here) == set(OURS if recipe else there)


def test_the_parser_of_options_notices_a_wrong_page():
    text = read(PAGES["sbr"])
    assert stated(text.replace("`50.0`", "`5.0`")) != stated(text)
    with pytest.raises(AssertionError, match="a row is not"):
        stated(text.replace("| `anchors` |", "| anchors |"))


# --- links ----------------------------------------------------------------------------


def slugs(text):
    """Anchors of a page's headings, where GitHub and MkDocs agree on them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        if "  " not in kept and kept.isascii():
            found.add(kept.replace(" ", "-"))
    return found


ROOT_PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")
]
LINKS = [
    (path.relative_to(ROOT), target)
    for path in (*sorted(DOCS.rglob("*.md")), *ROOT_PAGES)
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", prose(read(path)))
]


def leads_astray(page, target):
    name, _, anchor = target.partition("#")
    # Not resolved: a page of the site may be a link to one that lies beside its code.
    where = Path(os.path.normpath((ROOT / page).parent / name)) if name else ROOT / page
    if not where.is_file() or (anchor and anchor not in slugs(read(where))):
        return True
    return page.parts[0] == "docs" and not where.is_relative_to(DOCS)  # All of the site


def test_every_relative_link_leads_somewhere():
    assert [link for link in LINKS if leads_astray(*link)] == []


# --- commands -------------------------------------------------------------------------


def commands():
    """Every `python -m experiments.X ...` in a code block of a document."""
    for path in (*sorted(DOCS.rglob("*.md")), *ROOT_PAGES):
        for block in re.findall(r"^```\n(.*?)^```", read(path), re.M | re.S):
            joined = re.sub(r"\\\n\s*", "", block)
            yield from re.findall(r"^python -m (experiments\..+)$", joined, re.M)


WORK = {
    "run": ("execute", "harness"),
    "attack": ("execute",),
    "analyse": ("execute",),
    "sweep": ("execute", "execute_cells", "write_table", "print"),
}
"""What a program does once it has found its command line to be in order."""


def check(line):
    """Lets a program look at its command line, and do nothing."""
    module, *args = shlex.split(line, comments=True)
    name = module.removeprefix("experiments.")
    program = importlib.import_module(f"sbr_jax.programs.{name}")
    if name not in WORK:
        kind = program.Arguments
        cli.parse(kind, args[1:] if name == "export" else args, name)
        return
    with pytest.MonkeyPatch.context() as patch:
        for part in WORK[name]:
            patch.setattr(program, part, mock.MagicMock(), raising=False)
        patch.setattr("sbr_jax.costs.dry_run.execute", lambda *_: "")
        getattr(program, name)(args)


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_every_command_of_the_documents_is_in_order(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Folders of a developer's own runs would be compared.
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "experiments.run testbed --workdir runs/x --method plain",
        "experiments.run testbed --workdir runs/x --methods.ewc.penalti 1",
    ],
)
def test_a_wrong_command_would_be_noticed(line):
    with pytest.raises(UserError):
        check(line)


# --- measured rows --------------------------------------------------------------------

BLOCK = "<!-- row: {} -->\nNot measured yet.\n<!-- end row -->\n"


@pytest.fixture
def site(tmp_path):
    """A folder like docs/ with pages of two methods, and a finished run."""
    pages = tmp_path / "docs" / "methods"
    pages.mkdir(parents=True)
    for name in ("ewc", "sbr"):
        (pages / f"{name}.md").write_text(f"# {name}\n\n{BLOCK.format(name)}\nEnd.\n")
    run = synthetic_run.write(tmp_path / "table", ("plain", "ewc"), seeds=(0, 1))
    return pages, run


def fill(pages, *folders):
    return fill_docs.main([*map(str, folders), "--docs", str(pages.parent)])


def test_rows_are_filled_with_the_reports_cells_and_filling_again_changes_nothing(
    site, capsys
):
    pages, folder = site
    assert fill(pages, folder) == 0
    assert capsys.readouterr().out == "filled: ewc\nleft: sbr\n"
    text, run = read(pages / "ewc.md"), read_run(folder)
    assert "Not measured" not in text
    assert text.startswith("# ewc\n\n<!-- row: ewc -->\n")
    assert text.endswith("<!-- end row -->\n\nEnd.\n")
    lines = (x for x in text.splitlines() if x.startswith("| "))
    rows = [x.split(" | ") for x in lines if not x.startswith("| --")]
    assert [row[0] for row in rows] == ["| row", "| `plain`", "| `ewc`"]
    assert rows[2][1:3] == ["table", "2"]
    for key, title in (("composite", "composite"), ("accuracy_learned", "when learnt")):
        place = rows[0].index(title)
        assert rows[2][place] == cell(run, "ewc", key).text()
        assert rows[1][place] == cell(run, "plain", key).text()
    assert read(pages / "sbr.md") == f"# sbr\n\n{BLOCK.format('sbr')}\nEnd.\n"
    assert fill(pages, folder) == 0
    assert read(pages / "ewc.md") == text


def test_rows_of_several_runs_stand_together_with_their_options(site):
    pages, folder = site
    tuned = synthetic_run.write(folder.parent / "tuned", ("ewc",), seeds=(0,))
    methods = dataclasses.asdict(Hyperparameters())
    config = read_json(folder / "config.json") | {"methods": methods}
    (folder / "config.json").write_text(json.dumps(config))
    config["methods"]["ewc"]["penalty"] = 9
    (tuned / "config.json").write_text(json.dumps(config))
    hard = synthetic_run.write(folder.parent / "hard", ("plain", "ewc"), seeds=(0,))
    (hard / "config.json").write_text('{"settings": {"learning_rate": 0.5}}')
    assert fill(pages, folder, tuned, hard) == 0
    lines = [x for x in read(pages / "ewc.md").splitlines() if x.startswith("| `")]
    # One plain row for the two runs of equal settings, another for the third.
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| `plain`", "table"],
        ["| `ewc`", "table"],
        ["| `ewc`", "tuned (penalty=9)"],
        ["| `plain`", "hard"],
        ["| `ewc`", "hard"],
    ]


def test_a_block_without_its_end_is_refused_and_nothing_is_written(site, capsys):
    pages, folder = site
    before = read(pages / "ewc.md")
    cut = BLOCK.format("sbr").replace("<!-- end row -->\n", "") + BLOCK.format("plain")
    (pages / "sbr.md").write_text(cut)
    assert fill(pages, folder) == cli.EXIT_USER
    assert "row sbr: expected <!-- end row -->" in capsys.readouterr().err
    assert read(pages / "ewc.md") == before
