"""Checkpoints inside a stage: small, written beside the steps, and never half."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from run_folder_case import STUDY, go, results

import sbr_jax
from sbr_jax.training import pipeline, snapshot, stages, track
from sbr_jax.training.program import init_adapter
from sbr_jax.typing import UserError

PROJECTED = "safeanchor-exact:projection-only"
RENEWED = {"safeanchor-exact": {"max_rank": 6, "refresh_every": 2}}
JOB = {"domains": ("medical",), "steps_per_domain": 5, "checkpoint_every": 1}


def run(folder):
    go(folder, ("plain",), **JOB)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_steps_go_on_and_older_ones_stay_while_one_is_written(
    whole, tmp_path, monkeypatch
):
    drawn, there, draw, write = [], [], track.batch, snapshot.write
    begun = threading.Condition()

    def drawing(dataset, size, seed, step):
        with begun:
            drawn.append(step)
            begun.notify_all()
        return draw(dataset, size, seed, step)

    def slow(folder, found):
        step = int(folder.parent.name.partition("-")[2])
        # The batch of the step after it: a save that steps wait for sees none.
        with begun:
            assert step == 5 or begun.wait_for(lambda: step in drawn, 20)
        whole = folder.parents[1].glob("partial-*/history.json")
        there.append(sorted(int(path.parent.name[-8:]) for path in whole))
        write(folder, found)

    monkeypatch.setattr(track, "batch", drawing)
    monkeypatch.setattr(snapshot, "write", slow)
    run(tmp_path)
    assert there == [[], [1], [1, 2], [2, 3]]
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("ends", ["with an error", "at the last step"])
def test_a_stage_ends_when_its_checkpoint_is_whole(ends, tmp_path, monkeypatch):
    step, done = pipeline.distributed.should_stop, []

    def stopping():
        if ends == "with an error" and list(tmp_path.rglob("partial-00000003")):
            raise OSError("gone")
        return step()

    def slow(folder, found, write=snapshot.write):
        threading.Event().wait(0.3)
        write(folder, found)
        done.append(folder.parent.name)

    monkeypatch.setattr(pipeline.distributed, "should_stop", stopping)
    monkeypatch.setattr(snapshot, "write", slow)
    removed = []

    def dropped(paths, drop=stages._drop):
        paths = list(paths)
        removed.extend((path.name, len(done)) for path in paths)
        drop(paths)

    monkeypatch.setattr(stages, "_drop", dropped)
    if ends == "with an error":
        with pytest.raises(OSError, match="gone"):
            run(tmp_path)
        kept = sorted(path.parent.name for path in tmp_path.rglob("history.json"))
        assert kept == ["partial-00000002", "partial-00000003"]
    else:
        run(tmp_path)
        assert not list(tmp_path.rglob("partial-*"))
        # The last two go with the stage, when all four were written.
        assert removed[-2:] == [("partial-00000003", 4), ("partial-00000004", 4)]


def test_one_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    said = r"cannot write .*partial-00000001/tree \(No space left on device\); what is"
    with pytest.raises(UserError, match=said):
        run(tmp_path)


def test_no_copy_of_a_subspace_is_kept_and_it_stays_where_it_is():
    params = {"w": jnp.ones(8), "v": jnp.ones((2, 3))}
    basis = sbr_jax.empty_subspace(params, max_rank=4)
    train = sbr_jax.update_projection(basis, 0.1).init(params)
    state = {"subspace": basis, "age": jnp.int32(1)}
    kept = snapshot.changed(train, state, {**state, "age": jnp.int32(0)})
    assert max(x.size for x in kept.values()) == 8
    assert [name for name in kept if name.startswith("state")] == ["state 0"]
    moved = {name: np.asarray(x) + np.ones_like(x) for name, x in kept.items()}
    again, found = snapshot.put_back(moved, train, state)
    assert found["age"] == 2
    assert found["subspace"].basis["w"] is basis.basis["w"]
    old, new = map(sbr_jax.read_subspace, (train, again))
    assert new.basis["v"] is old.basis["v"]
    assert snapshot.changed(again, found).keys() > moved.keys()
    for name, x in snapshot.changed(again, found, state).items():
        np.testing.assert_array_equal(x, moved[name])


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [None, "fsdp=8"])
def test_it_holds_adapter_moments_and_what_was_renewed_and_gives_the_same_bytes(
    mesh, tmp_path, monkeypatch
):
    job = {**JOB, "options": RENEWED, "mesh": mesh}
    go(tmp_path / "whole", (PROJECTED,), **job)
    found = []

    def dying(folder, arrays, write=snapshot.write):
        write(folder, arrays)
        found.append(arrays)
        if len(found) == 3:
            raise UserError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write", dying)
        with pytest.raises(UserError, match="killed"):
            go(tmp_path / "run", (PROJECTED,), **job)
    # The subspace is the one of the start until the third step, and no copy is kept.
    kinds = [{name.partition(" ")[0] for name in arrays} for arrays in found]
    assert kinds == [{"train"}, {"train"}, {"train", "state"}]
    adapter = init_adapter(STUDY, tiny.config(), 0)
    largest = max(x.size for x in jax.tree.leaves(adapter))
    assert {x.size for x in found[0].values() if x.ndim > 1} == {largest}
    assert max(x.size for x in found[2].values()) >= (0 if mesh else 6 * largest)
    split = {path.parent.name for path in tmp_path.glob("run/**/split")}
    assert split == ({"partial-00000003"} if mesh else set())
    go(tmp_path / "run", (PROJECTED,), **job)
    assert results(tmp_path / "run") == results(tmp_path / "whole")
