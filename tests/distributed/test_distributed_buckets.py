"""Runs in a bucket: the bytes of a disk, without renames, locks or folders."""

import json

import bucket_case
import pytest
import tiny
from run_folder_case import go, results

from sbr_jax import files, storage
from sbr_jax.programs import analyse, cli
from sbr_jax.programs import run as run_program
from sbr_jax.typing import UserError

RUN = "gs://bucket/runs/a"


@pytest.fixture(scope="module")
def bucket():
    with bucket_case.served() as objects, pytest.MonkeyPatch.context() as patch:
        patch.setitem(storage.NEEDED, "gs", "fsspec")
        yield objects


@pytest.fixture(scope="module")
def run(bucket):
    """A finished run in the bucket: the objects that it left."""
    go(RUN)
    return dict(bucket)


def result_of(objects):
    return objects["bucket/runs/a/results.jsonl"]


def test_a_run_in_a_bucket_writes_what_it_writes_on_a_disk(run, tmp_path):
    go(tmp_path)
    assert result_of(run) == results(tmp_path)
    ours = {path.relative_to(tmp_path).as_posix() for path in storage.below(tmp_path)}
    names = {name.removeprefix("bucket/runs/a/") for name in run}

    def plain(names):
        return {n for n in names if "/adapter/" not in n and "/state/" not in n}

    assert plain(names) == plain(ours)


def test_what_was_lost_is_computed_again_and_no_more(run, bucket):
    go(RUN)
    lock = "bucket/runs/a/.lock"
    assert {**bucket, lock: b""} == {**run, lock: b""}
    for name in [name for name in bucket if "/plain/0/08-evaluate/" in name]:
        del bucket[name]
    go(RUN)
    assert result_of(bucket) == result_of(run)


def test_a_damaged_object_is_named(run, bucket):
    for name in [name for name in bucket if "/plain/0/08-evaluate/" in name]:
        del bucket[name]
    name = next(n for n in sorted(bucket) if "/plain/0/05-train/adapter/" in n)
    bucket[name] += b"?"
    with pytest.raises(UserError, match=rf"expected gs://{name} as its stage left it"):
        go(RUN)
    bucket.update(run)


def test_another_run_is_refused(run):
    with pytest.raises(UserError, match=rf"{RUN} belongs to a run with other settings"):
        go(RUN, learning_rate=1.0)


def test_who_came_later_holds_a_bucket(run, bucket):
    folder = "bucket/runs/a/stages/base/all/00-base"
    del bucket[f"{folder}/result.json"]

    def probe(base, adapter):
        bucket["bucket/runs/a/.lock"] = b"another"
        return 1.0

    with pytest.raises(UserError, match=f"{RUN} is in use by another run, which came"):
        go(RUN, study=tiny.study(probe=probe))
    bucket.update(run)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://b/run", "expected the package gcsfs to reach gs://b/run, found none"),
        ("s3://b/run", "expected the package s3fs to reach s3://b/run, found none"),
        ("hdfs://b/run", "in a bucket of gs or s3, got hdfs://b/run"),
    ],
)
def test_a_bucket_out_of_reach_is_refused(address, said, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(storage.NEEDED, "gs", "gcsfs")
    for place in (address, files.pathlib.Path(address)):
        with pytest.raises(UserError, match=said):
            storage.folder(place)


def test_a_report_is_asked_for_of_a_folder_that_it_can_read(bucket):
    assert run_program.report_command(storage.folder("runs/a")).endswith(" runs/a")
    asked = run_program.report_command(storage.folder(RUN))
    assert RUN not in asked
    assert "a copy of it on a disk" in asked


def test_other_folders_are_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["demo", "--workdir", "x", "--model", "gs://b/model"],
        ["demo", "--workdir", "gs://b/run"],
    ):
        with pytest.raises(UserError, match=r"expected a folder on a disk, got gs://b"):
            analyse.analyse(words)
    with pytest.raises(UserError, match="got gs://b/runs"):
        cli.check_folder(files.pathlib.Path("gs://b/runs"))
    assert not list(tmp_path.iterdir())
    assert json.dumps(str(storage.folder("runs"))) == '"runs"'
