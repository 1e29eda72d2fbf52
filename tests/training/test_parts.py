"""A run in parts: several folders become the one that a single process would write."""

import contextlib

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    go(folder, **SETTINGS)
    return results(folder)


def work(folder, part, pairs, **settings):
    """Does a part, as one process of several."""
    own = parts.hand_out(folder, part, pairs)
    for variant, seed in pairs:
        go(own, (variant,), seeds=(seed,), **settings)
    return own


def test_parts_become_the_run_of_one_process(whole, tmp_path):
    for part in range(2):
        work(tmp_path, str(part), PAIRS[part::2])
    parts.gather(tmp_path)
    assert not (tmp_path / "jobs").exists()
    assert parts.unfinished(tmp_path, PAIRS, DOMAINS) == []
    go(tmp_path, **SETTINGS)
    assert results(tmp_path) == whole


@pytest.mark.parametrize("writes", [3, 9, 15])
def test_a_part_that_was_killed_is_continued_in_another(whole, tmp_path, writes):
    work(tmp_path, "0", PAIRS[:1])
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, writes)
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


def test_what_was_begun_is_handed_out_and_what_is_finished_stays(tmp_path):
    go(tmp_path, ("plain",))
    begun = tmp_path / "stages/plain/0"
    (begun / "08-evaluate/result.json").unlink()
    go_on = parts.unfinished(tmp_path, [("plain", 0)], DOMAINS)
    own = parts.hand_out(tmp_path, "0", go_on)
    assert go_on == [("plain", 0)]
    assert not begun.exists()
    assert (own / "stages/plain/0/01-train/result.json").exists()
    assert (own / "stages/base/all/00-base/result.json").exists()
    assert (own / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_the_copy_with_more_stages_stays(tmp_path):
    own = work(tmp_path, "0", PAIRS[:1])
    before = (own / "stages/plain/0/08-evaluate/result.json").read_bytes()
    go(tmp_path, ("plain",), domains=DOMAINS)
    (tmp_path / "stages/plain/0/08-evaluate/result.json").unlink()
    parts.gather(tmp_path)
    after = (tmp_path / "stages/plain/0/08-evaluate/result.json").read_bytes()
    assert after == before


def test_a_part_of_other_settings_is_refused_and_stays(tmp_path):
    go(tmp_path, ("plain",))
    own = tmp_path / "jobs/0"
    go(own, ("lisa",), learning_rate=1e-5)
    with pytest.raises(UserError, match=r"other settings than .*: expected a part"):
        parts.gather(tmp_path)
    assert (own / "results.jsonl").exists()
    assert not (tmp_path / "stages/lisa").exists()


def test_of_several_parts_none_is_touched_where_one_is_of_another_run(tmp_path):
    ours, other = tmp_path / "jobs/0", tmp_path / "jobs/1"
    go(ours, ("plain",))
    settings = read_json(ours / "config.json")
    other.mkdir()
    write_record(other / "config.json", {**settings, "domains": ["legal"]})
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"jobs/1 belongs .* other settings than .*/0"):
        parts.gather(tmp_path)
    assert content(tmp_path) == before


def test_a_copy_of_another_run_replaces_none_of_ours(tmp_path):
    own = work(tmp_path, "0", PAIRS[:1])
    for path in own.glob("stages/plain/0/*/result.json"):
        write_record(path, {**read_json(path), "run": "another"})
    go(tmp_path, ("plain",))
    (tmp_path / "stages/plain/0/08-evaluate/result.json").unlink()
    before = content(tmp_path / "stages")
    parts.gather(tmp_path)
    assert content(tmp_path / "stages") == before


def test_a_part_that_somebody_works_in_is_refused(tmp_path):
    own = work(tmp_path, "0", PAIRS[:1])
    with locks.taken(own), pytest.raises(UserError, match="in use by another run"):
        parts.gather(tmp_path)
    assert (own / "results.jsonl").exists()


@pytest.mark.parametrize(
    "mine", ["mine/notes.txt", "0/notes.txt", "0/config.json", "notes.txt"]
)
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


def test_a_part_goes_and_what_somebody_has_laid_there_stays(tmp_path):
    own = work(tmp_path, "0", PAIRS[:1])
    (own / "notes.txt").touch()
    parts.gather(tmp_path)
    assert [path.name for path in files(own)] == [".lock", "notes.txt"]
    assert (tmp_path / "stages/plain/0/08-evaluate/result.json").exists()


@pytest.mark.parametrize("mine", [(), ("mine",)])
def test_what_a_kill_leaves_of_a_part_goes(tmp_path, mine):
    for name in ("0", "1", *mine):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    for name in (".lock", ".results.jsonl.tmp"):
        (tmp_path / "jobs/0" / name).touch()
    parts.gather(tmp_path)
    left = {path.name for path in tmp_path.glob("jobs/*")}
    assert left == set(mine)
    assert (tmp_path / "jobs").exists() == bool(mine)


@pytest.mark.parametrize("link", ["jobs", "jobs/0"])
def test_what_a_link_points_to_is_left_alone(tmp_path, link):
    run, place = tmp_path / "run", tmp_path / "run" / link
    work(tmp_path / "elsewhere", "0", PAIRS[:1])
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere" / link)
    before = content(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{link} is a link: expected a folder"):
        parts.gather(run)
    assert content(tmp_path / "elsewhere") == before


def test_a_finished_seed_is_published_though_more_is_left(tmp_path, whole):
    own = work(tmp_path, "0", PAIRS[:1])
    last = own / "stages/plain/0/08-evaluate"
    last.rename(tmp_path / "last")
    parts.gather(tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
    parts.hand_out(tmp_path, "0", PAIRS)
    (tmp_path / "last").rename(last)
    parts.gather(tmp_path)
    lines = results(tmp_path).splitlines()
    assert lines
    assert lines == whole.splitlines()[: len(lines)]
