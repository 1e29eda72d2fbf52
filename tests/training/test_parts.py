"""A run in parts: several folders become the one that a single process would write."""

import contextlib
import shutil

import pytest
from run_folder_case import VARIANTS, content, files, go, results
from test_damaged_runs import KilledError, kill_after

from sbr_jax.training import locks, parts
from sbr_jax.training.records import read_json, write_record
from sbr_jax.typing import UserError

SEEDS = (0, 1)
PAIRS = [(variant, seed) for variant in VARIANTS for seed in SEEDS]
DOMAINS = ("medical", "legal")
SETTINGS = {"seeds": SEEDS}
LAST = "stages/plain/0/08-evaluate"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    go(folder, **SETTINGS)
    return results(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A finished run of one variant and seed, which others begin with."""
    folder = tmp_path_factory.mktemp("one")
    go(folder, ("plain",))
    return folder


@pytest.fixture
def own(one, tmp_path):
    """The folder of a finished part."""
    return shutil.copytree(one, tmp_path / "jobs/0")


def work(folder, part, pairs):
    """Does a part, as one process of several."""
    own = parts.hand_out(folder, part, pairs)
    for variant, seed in pairs:
        go(own, (variant,), seeds=(seed,))


def test_parts_become_the_run_of_one_process(whole, tmp_path):
    for part in range(2):
        work(tmp_path, str(part), PAIRS[part::2])
    parts.gather(tmp_path)
    assert not (tmp_path / "jobs").exists()
    assert parts.unfinished(tmp_path, PAIRS, DOMAINS) == []
    go(tmp_path, **SETTINGS)
    assert results(tmp_path) == whole


def test_a_part_that_was_killed_is_continued_in_another(whole, own, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 9)
        with contextlib.suppress(KilledError):
            work(tmp_path, "1", PAIRS[1:])
    parts.gather(tmp_path)
    left = parts.unfinished(tmp_path, PAIRS, DOMAINS)
    assert PAIRS[0] not in left
    assert PAIRS[-1] in left
    work(tmp_path, "0", left[::2])
    work(tmp_path, "1", left[1::2])
    parts.gather(tmp_path)
    go(tmp_path, **SETTINGS)
    assert results(tmp_path) == whole


def test_what_was_begun_is_handed_out_and_what_is_finished_stays(one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    (run / LAST / "result.json").unlink()
    go_on = parts.unfinished(run, [("plain", 0)], DOMAINS)
    own = parts.hand_out(run, "0", go_on)
    assert go_on == [("plain", 0)]
    assert not (run / "stages/plain/0").exists()
    assert (own / "stages/plain/0/01-train/result.json").exists()
    assert (own / "stages/base/all/00-base/result.json").exists()
    assert (own / "config.json").read_bytes() == (run / "config.json").read_bytes()


@pytest.mark.parametrize("whose", ["ours", "another run's"])
def test_the_copy_with_more_stages_of_this_run_stays(whose, one, own, tmp_path):
    shutil.copytree(one, tmp_path, dirs_exist_ok=True)
    (tmp_path / LAST / "result.json").unlink()
    wanted = content(own / "stages")
    if whose == "another run's":
        wanted = content(tmp_path / "stages")
        for path in own.glob("stages/plain/0/*/result.json"):
            write_record(path, {**read_json(path), "run": "another"})
    parts.gather(tmp_path)
    assert content(tmp_path / "stages") == wanted


@pytest.mark.parametrize("ours", [".", "jobs/0"])
def test_a_part_of_another_run_is_refused_and_none_is_touched(ours, one, tmp_path):
    shutil.copytree(one, tmp_path / ours, dirs_exist_ok=True)
    settings, other = read_json(one / "config.json"), tmp_path / "jobs/1"
    other.mkdir(parents=True)
    write_record(other / "config.json", {**settings, "domains": ["legal"]})
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"jobs/1 belongs .* other settings than "):
        parts.gather(tmp_path)
    assert content(tmp_path) == before


def test_a_part_that_somebody_works_in_is_refused(own, tmp_path):
    with locks.taken(own), pytest.raises(UserError, match="in use by another run"):
        parts.gather(tmp_path)
    assert (own / "results.jsonl").exists()


@pytest.mark.parametrize("mine", ["mine/notes.txt", "0/config.json", "notes.txt"])
def test_files_that_are_no_parts_are_left_alone(tmp_path, mine):
    file = tmp_path / "jobs" / mine
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before, said = files(tmp_path), ""
    try:
        parts.gather(tmp_path)
        parts.hand_out(tmp_path, "0", ())
    except UserError as error:
        said = str(error)
    assert files(tmp_path) == before
    assert ("jobs/0" in said) == (file.parent.name == "0")


def test_a_part_goes_and_what_somebody_has_laid_there_stays(own, tmp_path):
    (own / "notes.txt").touch()
    parts.gather(tmp_path)
    assert [path.name for path in files(own)] == [".lock", "notes.txt"]
    assert (tmp_path / LAST / "result.json").exists()


def test_what_a_kill_leaves_of_a_part_goes(tmp_path):
    for name in ("0/.lock", "0/.results.jsonl.tmp", "1/.lock"):
        path = tmp_path / "jobs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    parts.gather(tmp_path)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("link", ["jobs", "jobs/0"])
def test_what_a_link_points_to_is_left_alone(own, tmp_path, link):
    place = tmp_path / "run" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / link)
    before = content(own)
    with pytest.raises(UserError, match=f"{link} is a link: expected a folder"):
        parts.gather(tmp_path / "run")
    assert content(own) == before


def test_what_is_finished_is_published_though_more_is_left(own, tmp_path, whole):
    (own / LAST).rename(tmp_path / "last")
    parts.gather(tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
    parts.hand_out(tmp_path, "0", PAIRS)
    (tmp_path / "last").rename(own / LAST)
    parts.gather(tmp_path)
    lines = results(tmp_path).splitlines()
    assert lines
    assert lines == whole.splitlines()[: len(lines)]
