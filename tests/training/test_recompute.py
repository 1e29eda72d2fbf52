"""Whether layers are recomputed: asked for, loaded so, or short of memory."""

import dataclasses

import numpy as np
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data import TokenDataset
from sbr_jax.data.layout import choose
from sbr_jax.settings import Hardware
from sbr_jax.training import recompute
from sbr_jax.training.program import make_program

PLENTY, NOTHING = 1e18, 1.0
CASES = {
    # asked for, mesh, loaded so, memory: recomputed
    "asked for": ("yes", None, False, PLENTY, True),
    "refused": ("no", None, True, NOTHING, False),
    "room for all": ("auto", None, True, PLENTY, False),
    "no room": ("auto", None, True, NOTHING, True),
    "loaded to store": ("auto", None, False, NOTHING, False),
    "a mesh with room": ("auto", "fsdp=2", True, PLENTY, True),
    "a mesh, loaded to store": ("auto", "fsdp=2", False, NOTHING, False),
}
CONFIG = tiny.config()


def study(remat):
    model = tiny.model()
    how = models.Hardware(remat=remat)
    return tiny.study(model=models.make_model(model.config, model.params, hardware=how))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_are_recomputed_where_asked_or_short_of_memory(case):
    asked, mesh, loaded, memory, wanted = case
    hardware = Hardware(remat=asked, mesh=mesh)
    given = study(loaded), CONFIG.training, hardware
    assert recompute.is_recomputed(*given, memory) is wanted


@pytest.mark.parametrize("change", ["batch", "Fisher's microbatch", "accumulation"])
def test_the_larger_of_step_and_fisher_decides(change):
    """One byte above what the larger of the two needs keeps it, one below does not."""
    batch, fisher, parts = {
        "batch": (8, 2, 1),
        "Fisher's microbatch": (4, 6, 1),
        "accumulation": (8, 2, 2),
    }[change]
    given = study(True)
    training = dataclasses.replace(CONFIG.training, batch_size=batch)
    hardware = Hardware(accumulation=parts, fisher_microbatch=fisher)
    steps = [(batch // parts, d.train.length) for d in given.domains.values()]
    rows = [*steps, (fisher, given.calibration.length)]
    config = given.model.config
    layer = max(recompute.activation_bytes(config, n * t, t) for n, t in rows)
    need = config.layers * layer / recompute.SHARE
    assert not recompute.is_recomputed(given, training, hardware, need + 1)
    assert recompute.is_recomputed(given, training, hardware, need - 1)


def test_packed_rows_are_kept_where_padded_ones_are_not():
    given = study(True)
    tokens = np.ones((40, 120), np.int32)
    ends = np.where(np.arange(40) == 0, 119, 9)[:, None]
    ragged = TokenDataset(tokens, np.arange(120) == ends)
    domains = {
        name: dataclasses.replace(domain, train=ragged)
        for name, domain in given.domains.items()
    }
    given = dataclasses.replace(given, domains=domains, calibration=None)
    training = dataclasses.replace(CONFIG.training, batch_size=8)
    config = given.model.config
    width = choose(ragged, 8).width
    assert 80 <= width < 400  # Of 960 places in padded rows.
    need = config.layers * recompute.activation_bytes(config, width, 0)
    for packing, more, wanted in (
        ("auto", 1, False),
        ("auto", -1, True),
        ("no", 1, True),
    ):
        memory = need / recompute.SHARE + more
        how = Hardware(packing=packing)
        assert recompute.is_recomputed(given, training, how, memory) is wanted


@pytest.mark.parametrize("loaded", [True, False])
def test_the_program_differentiates_what_was_decided(loaded):
    """That both give one gradient is a test of `models`."""
    given = study(loaded)
    for asked, wanted in {"yes": True, "no": False, "auto": False}.items():
        config = tiny.config(remat=asked)
        apply_fn = make_program("plain", given, config).problem.apply_fn
        assert apply_fn.hardware.remat is wanted
        assert (apply_fn is given.model.apply_fn) == (wanted is loaded)


def test_a_cpu_has_what_its_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(recompute, "_LIMITS", (tmp_path / "no such file",))
    whole = recompute.device_memory()
    for text, wanted in (("max\n", whole), ("4096\n", 4096), (f"{2**80}", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(recompute, "_LIMITS", (str(tmp_path / "memory.max"),))
        assert recompute.device_memory() == wanted
