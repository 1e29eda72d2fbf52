"""Whatever is done to a run's folder: the same result, or advice that leads to it."""

import contextlib
import random
import shutil

import pytest
from run_folder_case import files, go, results, settle
from tiers import few

from sbr_jax.training import stages

DAMAGES, DRAWS = 17, 4
KILLED = {"in a stage": 6, "after a stage": 7}
"""After how many records a run is killed: its last domain is begun, or trained on."""
JOB = {"variants": ("lisa",)}


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders by name: finished, killed at several places, and of other runs."""
    root = tmp_path_factory.mktemp("runs")
    go(root / "finished", **JOB)
    go(root / "other seed", seeds=(1,), **JOB)
    go(root / "other rate", learning_rate=3e-3, **JOB)
    # In place of the one here: to add a seed of the same run is no damage.
    (root / "other seed/stages/lisa/1").rename(root / "other seed/stages/lisa/0")
    for name, writes in KILLED.items():
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, writes)
            with contextlib.suppress(KilledError):
                go(root / name, **JOB)
    return root


def kill_after(patch, writes):
    """Kills a run right after so many records, before it tidies up."""
    left = [writes]

    def dying(original):
        def write(*args, **options):
            found = original(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                raise KilledError
            return found

        return write

    patch.setattr(stages, "write_result", dying(stages.write_result))
    patch.setattr(stages, "write_history", dying(stages.write_history))


# --- the damages ----------------------------------------------------------------------


def truncate(rng, folder, others):
    path = rng.choice(files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def flip(rng, folder, others):
    path = rng.choice([path for path in files(folder) if path.stat().st_size])
    whole = bytearray(path.read_bytes())
    whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(whole)


def delete(rng, folder, others):
    paths = files(folder)
    if rng.random() < 0.4:
        paths = [p for p in folder.rglob("*") if p.is_dir() and p.parent != folder]
    path = rng.choice(sorted(paths))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def swap(rng, folder, others):
    one, two = rng.sample(files(folder), 2)
    if rng.random() < 0.5:
        one, two = rng.sample(sorted(folder.glob("stages/*/*/*")), 2)
    aside = folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def copy(rng, folder, others):
    """A file or folder of another run, in the place of the one here."""
    other = rng.choice(others)
    pattern = rng.choice(["*", "stages/*", "stages/*/*", "stages/*/*/*", "stages/**/*"])
    source = rng.choice(sorted(other.glob(pattern)))
    target = folder / source.relative_to(other)
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


KINDS = (truncate, flip, delete, swap, copy)


@pytest.mark.parametrize("draw", few(range(DRAWS), 1))
@pytest.mark.parametrize("name", ["finished", *KILLED])
def test_damage_is_refused_with_a_way_out_or_changes_nothing(
    name, draw, runs, tmp_path
):
    expected = results(runs / "finished")
    rng = random.Random(f"{name} {draw}")
    others = [runs / "other seed", runs / "other rate"]
    known, refusals, work = set(), 0, tmp_path / "run"
    for number in range(DAMAGES):
        shutil.copytree(runs / name, work)
        KINDS[number % len(KINDS)](rng, work, others)
        refusals += bool(settle(work, expected, known, **JOB))
        shutil.rmtree(work)
    assert refusals > 3
