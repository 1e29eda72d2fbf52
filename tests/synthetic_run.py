"""A made-up working directory, shaped as the pipeline writes it."""

import json
from pathlib import Path

import numpy as np

UNITS = ("q_proj", "k_proj", "v_proj", "o_proj")
FALL = {"plain": 17.0, "safeanchor": 6.0, "safeanchor-exact": 0.8, "ewc": 14.0}


def _spectrum(rng, decay, layers=4, columns=64):
    spectra, traces = {}, {}
    for unit in UNITS:
        slopes = decay * rng.uniform(0.8, 1.2, (layers, 1))
        values = np.exp(-slopes * np.arange(200))
        shares = np.cumsum(values, 1) / values.sum(1, keepdims=True)
        kept = np.where(shares - values / values.sum(1, keepdims=True) < 0.9, values, 0)
        spectra[unit] = kept[:, :columns].tolist()
        traces[unit] = values.sum(1).tolist()
    return spectra, traces


def _diagnostics(rng, method, index, decay):
    inert = method == "safeanchor"
    ranks = {u: rng.integers(4, 14, 4).tolist() for u in UNITS}
    alpha = {
        u: (1 - 0.01 * rng.random(4) if inert else rng.random(4)).round(3).tolist()
        for u in UNITS
    }
    found = {"alpha": alpha, "effective_rank": ranks}
    if index < 0:
        found["spectrum"], found["trace"] = _spectrum(rng, decay)
        found["random_spectrum"], found["random_trace"] = _spectrum(rng, 0.1)
    else:
        found["discarded"] = {u: (0.1 * rng.random(4)).tolist() for u in UNITS}
        found["principal_angles"] = {
            u: np.sort(rng.beta(1 + index, 3, (4, 8)) * np.pi / 2).tolist()
            for u in UNITS
        }
    return found


def line(method, seed, stage, domain, index, metrics, diagnostics=None):
    """One line of `results.jsonl`."""
    names = ("method", "seed", "stage", "domain", "index", "metrics", "diagnostics")
    values = (method, seed, stage, domain, index, metrics, diagnostics or {})
    return dict(zip(names, values, strict=True))


def _row(method, seed, domains, start, diagnostics, decay):
    """The lines of one row and seed."""
    rng = np.random.default_rng([seed, len(method)])
    defended = method.startswith("safeanchor")

    def subspace(domain, index):
        if defended and diagnostics:
            found = _diagnostics(rng, method, index, decay)
            yield line(method, seed, "subspace", domain, index, {}, found)

    yield from subspace(None, -1)
    for index, domain in enumerate(domains):
        place = (domain, index)
        projected = {"safety_gradient": 0.6, "removed": 0.4} if defended else {}
        yield line(method, seed, "train", *place, {"loss": 0.1, **projected})
        if defended:
            blocks = int(method == "safeanchor" and index == 2)
            yield line(method, seed, "repair", *place, {"blocks": blocks})
        yield from subspace(domain, index)
        drop = FALL.get(method, 10.0) * (index + 1)
        metrics = {k: float(v - drop * rng.uniform(0.8, 1.2)) for k, v in start.items()}
        for number, name in enumerate(domains[: index + 1]):
            value = 95 + 3 * rng.random() - 12 * (index - number)
            metrics[f"accuracy/{name}"] = float(value)
        yield line(method, seed, "evaluate", *place, metrics)


def write(
    folder: Path,
    methods=("plain", "safeanchor", "safeanchor-exact"),
    seeds=(0, 1, 2),
    domains=("medical", "legal", "code"),
    composite=True,
    diagnostics=True,
    decay=0.3,
) -> Path:
    """Write `results.jsonl`, `timings.jsonl` and `config.json`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {f"accuracy/{d}": 20.0 + 15 * i for i, d in enumerate(domains)}
    if composite:
        start |= {"composite": 98.9, "refusal": 99.0, "truthful": 98.0, "bias": 99.7}
        start |= {"over_refusal": 1.0, "general": 88.0}
    else:
        start |= {"safety_loss": 2.1, "domain_loss": 3.0}
    lines = [line("base", None, "base", None, 0, start)]
    timings = []
    for method in methods:
        for seed in seeds:
            lines += _row(method, seed, domains, start, diagnostics, decay)
            timing = {"method": method, "seed": seed, "stage": "train"}
            timings.append({**timing, "seconds_per_step": 0.021})
    for name, found in {"results": lines, "timings": timings}.items():
        text = "".join(json.dumps(x, sort_keys=True) + "\n" for x in found)
        (folder / f"{name}.jsonl").write_text(text)
    config = {"training": {"learning_rate": 0.001}, "versions": {"jax": "0.10.2"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
