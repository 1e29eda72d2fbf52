"""Damaged data files, made by a seed: one line that names the file, or no difference.

Every published layout is damaged in every way that can be told from a good file. What
no reader can tell (a word replaced, whole rows cut off) is not among them.
"""

import contextlib
import copy
import gzip
import json
import random
import shutil
import time

import pytest
import tiny_data as files

from sbr_jax.data import EVALSETS, SOURCES, load_evalset, load_source
from sbr_jax.typing import UserError

COUNT = 155
DEEP = "[" * 100_000
PAGE = b"<!DOCTYPE html>\n<html><body>404: no such file</body></html>\n"
BOMB = gzip.compress(b" " * 2**26, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every set in its layout; compressed ones only where the test packs them."""
    folder = tmp_path_factory.mktemp("data")
    files.sources(folder)
    files.evalsets(folder)
    for path in list(folder.rglob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


LOADERS = {"source": (load_source, SOURCES), "evalset": (load_evalset, EVALSETS)}
KEYS = [
    (kind, name, split)
    for kind, (_, table) in LOADERS.items()
    for name, layout in table.items()
    for split in layout.splits
]


def read(folder, keys=KEYS):
    """What sets and their splits hold, or the line that says why one cannot be read."""
    found = {}
    for kind, name, split in keys:
        try:
            found[kind, name, split] = LOADERS[kind][0](name, folder, split=split)
        except UserError as error:
            found[kind, name, split] = str(error)
    return found


def readers(folder, right):
    """The sets that read something below each folder of the data."""
    found = {}
    for part in sorted(folder.iterdir()):
        away = part.rename(folder.with_name("away"))
        now = read(folder)
        found[part.name] = [key for key in KEYS if now[key] != right[key]]
        away.rename(part)
    assert set().union(*found.values()) == set(KEYS)
    return found


# --- ways to damage a file: bytes to bytes, or None where they do not apply ----------


def at(rng, content, piece, start=0):
    place = rng.randrange(start, len(content))
    return content[:place] + piece + content[place:]


def stray_quote(rng, path, content):
    """A quotation mark at the beginning of a cell."""
    mark = delimiter(path)
    if mark is None:
        return None
    places = [i + 1 for i, byte in enumerate(content) if byte in mark + b"\n"]
    place = rng.choice([p for p in places if p < len(content)] or [0])
    return content[:place] + b'"' + content[place:]


def lost_quote(rng, path, content):
    places = [i for i, byte in enumerate(content) if byte == ord('"')]
    if delimiter(path) is None or not places or "mmlu" in path.parts:
        return None
    place = rng.choice(places)
    return content[:place] + content[place + 1 :]


def lost_cell(rng, path, content):
    mark = delimiter(path)
    lines = content.split(b"\n")
    rows = [i for i, line in enumerate(lines) if mark and mark in line]
    if not rows or b'"' in content:
        return None
    row = rng.choice(rows)
    lines[row] = lines[row].rpartition(mark)[0] if row else lines[row] + mark + b"x"
    return b"\n".join(lines)


def cut_row(rng, path, content):
    """Cut before the last delimiter of the last row."""
    mark = delimiter(path)
    last = content.rstrip(b"\n").rpartition(b"\n")[2]
    if not mark or mark not in last or (b"\n" not in content[:-1] and len(last) < 2):
        return None
    start = len(content.rstrip(b"\n")) - len(last)
    return content[: rng.randint(start + 1, start + last.rindex(mark))]


def same_name(rng, path, content):
    header, end, rest = content.partition(b"\n")
    mark = delimiter(path)
    names = header.split(mark) if mark else []
    if len(names) < 2 or "mmlu" in path.parts:
        return None
    a, b = rng.sample(range(len(names)), 2)
    names[a] = names[b]
    return mark.join(names) + end + rest


def cut_json(rng, path, content):
    if delimiter(path) or path.suffix == ".txt":
        return None
    lines = content.rstrip().split(b"\n")
    cut = lines[-1][: rng.randrange(1, len(lines[-1]))]
    return b"\n".join([*lines[:-1], cut])


def lost_brace(rng, path, content):
    if path.suffix != ".txt":
        return None
    place = rng.choice([i for i, byte in enumerate(content) if byte in b"{}"])
    return content[:place] + content[place + 1 :]


def other_layout(rng, path, content):
    """An array as lines, lines as an array."""
    values = parsed(path, content)
    if values is None:
        return None
    if is_lines(content):
        return json.dumps(values, indent=rng.choice([None, 1])).encode()
    several = values if isinstance(values, list) else [values]
    return (files.as_lines(several) * 2).encode()


def edited(change):
    """A damage to one random place of the values of a JSON file."""

    def damage(rng, path, content):
        values = parsed(path, content)
        if values is None:
            return None
        values = copy.deepcopy(values)
        places = [p for p in walk(values) if change(rng, *p, dry=True)]
        if not places:
            return None
        change(rng, *rng.choice(places))
        text = files.as_lines(values) if is_lines(content) else json.dumps(values)
        for number in (1, 2):
            text = text.replace(f'"MARK{number}"', MARKS[number])
        return text.replace("TWICE", "").encode()

    return damage


MARKS = {1: DEEP + "]" * 100_000, 2: "[" * 60 + "]" * 60}
OTHERS = (7.5, True, [], {}, ["x"], {"x": "y"}, -1, 10**30)
# A row may lack this one; and an option or category less is a smaller set, not a fault.
OPTIONAL = {"input", "No", "Rock", "Yes", "Long:", "Short:"}


def other_type(rng, inside, key, *, dry=False):
    if not dry:
        value = inside[key]
        others = [o for o in OTHERS if type(o) is not type(value)]
        others += [] if isinstance(value, str) else ["a text"]
        inside[key] = rng.choice(others)
    return True


def no_text(text):
    def change(rng, inside, key, *, dry=False):
        if not dry:
            inside[key] += text
        return isinstance(inside[key], str)

    return change


def replaced(value):
    def change(rng, inside, key, *, dry=False):
        if not dry:
            inside[key] = value
        return True

    return change


def missing(rng, inside, key, *, dry=False):
    found = isinstance(inside, dict) and key not in OPTIONAL
    if not dry:
        del inside[key]
    return found


def twice(rng, inside, key, *, dry=False):
    if not dry:
        inside[f"TWICE{key}"] = inside[key]
    return isinstance(inside, dict)


def row_of_another_kind(rng, path, content):
    values = parsed(path, content)
    if not isinstance(values, list):
        return None
    values = [*values]
    values[rng.randrange(len(values))] = rng.choice([[], ["x"], "x", 1, None, True])
    as_text = files.as_lines if is_lines(content) else json.dumps
    return as_text(values).encode()


def delimiter(path):
    return {".csv": b",", ".tsv": b"\t"}.get(path.suffix)


def is_lines(content):
    return content.startswith(b"{") and content.count(b"\n") == len(
        content.splitlines()
    )


def parsed(path, content):
    if path.suffix not in (".json", ".jsonl"):
        return None
    if is_lines(content):
        return [json.loads(line) for line in content.splitlines()]
    return json.loads(content)


def walk(value):
    """Every place of a value below its rows: what it is in, and its key there."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        if isinstance(value, dict):
            yield value, key
        if isinstance(value[key], dict | list):
            yield from walk(value[key])


def utf16(kind):
    return lambda rng, path, content: content.decode("utf-8-sig").encode(kind)


def changed(rng, packed):
    place = rng.randrange(10, len(packed))
    return packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :]


def cut(rng, packed, size):
    return packed[: rng.randrange(11, 11 + size // 4)]


BOM = b"\xef\xbb\xbf"
# The same texts, saved in another way; each takes a generator, a path and the bytes.
HARMLESS = {
    "CRLF": lambda r, p, c: c.replace(b"\n", b"\r\n"),
    "CR": lambda r, p, c: c.replace(b"\n", b"\r"),
    "byte-order mark": lambda r, p, c: BOM + c.lstrip(BOM),
    "blank lines": lambda r, p, c: c.rstrip(b"\n") + b"\n\n\n",
    "packed": lambda r, p, c: gzip.compress(c),
}
HARMFUL = {
    "UTF-16": utf16("utf-16"),
    "UTF-16 without a mark": utf16("utf-16-le"),
    "Latin-1": lambda r, p, c: at(r, c, b"\xe9", 3),
    "NUL": lambda r, p, c: at(r, c, b"\0"),
    "empty": lambda r, p, c: r.choice([b"", b"\n", b" \n\n"]),
    "page": lambda r, p, c: PAGE,
    "folder": lambda r, p, c: "folder",
    "cut gzip": lambda r, p, c: cut(r, gzip.compress(c), len(c)),
    "changed gzip": lambda r, p, c: changed(r, gzip.compress(c)),
    "no gzip": lambda r, p, c: b"\x1f\x8b" + c[:-1],
    "bomb": lambda r, p, c: BOMB,
    "deep": lambda r, p, c: DEEP.encode() if parsed(p, c) else None,
    "deep value": edited(replaced("MARK1")),
    "too many levels": edited(replaced("MARK2")),
    "surrogate": edited(no_text("\ud800")),
    "escaped NUL": edited(no_text("\0")),
    "other type": edited(other_type),
    "missing name": edited(missing),
    "name twice": edited(twice),
    "row": row_of_another_kind,
    "other layout": other_layout,
    "cut JSON": cut_json,
    "stray quote": stray_quote,
    "lost quote": lost_quote,
    "lost cell": lost_cell,
    "cut row": cut_row,
    "same name": same_name,
    "lost brace": lost_brace,
}
PACKED = {"packed", "cut gzip", "changed gzip", "no gzip", "bomb"}


@contextlib.contextmanager
def damaged(folder, number):
    """One file of the folder, damaged by a seed; put right afterwards."""
    rng = random.Random(number)
    ways = [*HARMLESS, *HARMFUL]
    way = ways[number % len(ways)]
    damage = (HARMLESS | HARMFUL)[way]
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and is_read(p))
    rng.shuffle(paths)
    for path in paths:
        content = path.read_bytes()
        new = damage(rng, path, content)
        if new is not None and new != content:
            break
    else:
        raise AssertionError(f"no file for {way}")
    target = path.with_name(path.name + ".gz") if way in PACKED else path
    path.unlink()
    try:
        target.mkdir() if new == "folder" else target.write_bytes(new)
        yield way, target
    finally:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        path.write_bytes(content)


def is_read(path):
    # In this one, targets and categories may be missing.
    return path.name != "jbb_behaviors_harmful.csv"


def test_a_damaged_file_is_named_in_one_line_or_read_as_if_it_were_whole(folder):
    right = read(folder)
    assert sum(isinstance(value, str) for value in right.values()) == 3  # Empty kinds.
    touched = readers(folder, right)
    refused, same = set(), set()
    for number in range(COUNT):
        with damaged(folder, number) as (way, path):
            case, begin = f"{number}: {way} in {path}", time.monotonic()
            found = read(folder, touched[path.relative_to(folder).parts[0]])
            assert time.monotonic() - begin < 20, case
        wrong = {key: now for key, now in found.items() if now != right[key]}
        for key, now in wrong.items():
            assert isinstance(now, str), f"{case}: {key} changed in silence"
            assert "\n" not in now, case
            assert str(path) in now, f"{case}: {now}"
            assert len(now) < 500, case
        assert not wrong or way in HARMFUL, case
        (refused if wrong else same).add(way)
    assert refused == set(HARMFUL)
    assert same >= set(HARMLESS)
    assert read(folder) == right
