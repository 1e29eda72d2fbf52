"""The peer's side of ``fisher``, ``generation`` and ``gcg``: plain PyTorch."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import worker
from benchmarks.measure import PEERS, versions

# Torch is not installed where our types are checked.
torch: Any = importlib.import_module("torch")


def gradients(job: dict[str, Any]) -> Callable[[], Any]:
    """Per-example gradients of the network of ``benchmarks.fisher``."""
    layers, width, rank, examples, tokens = job["sizes"]
    torch.manual_seed(0)
    frozen = torch.randn(layers, width, width) / width**0.5
    params = {
        "a": torch.randn(layers, width, rank) / width**0.5,
        "b": torch.randn(layers, rank, width) / rank**0.5,
    }
    batches = torch.randn(examples, tokens, width).split(job["batch"])

    def loss(p: dict[str, Any], h: Any) -> Any:
        for w, a, b in zip(frozen, p["a"], p["b"], strict=True):
            h = h + torch.tanh(h @ w + (h @ a) @ b)
        return (h**2).mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return lambda: [each(params, batch) for batch in batches]


def load(folder: str) -> Any:
    """The model of a folder, on the device, without gradients."""
    transformers: Any = importlib.import_module("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.to(device).eval().requires_grad_(False)


def generation(job: dict[str, Any]) -> Callable[[], Any]:
    """Greedy answers of one left-padded batch with a key-value cache."""
    model = load(job["folder"])
    longest = max(map(len, job["prompts"]))
    tokens = torch.zeros(len(job["prompts"]), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(job["prompts"]):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)

    def run() -> list[list[int]]:
        found = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=job["new"],
            min_new_tokens=job["new"],
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return found[:, longest:].tolist()

    return run


def gcg(job: dict[str, Any]) -> Callable[[], Any]:
    """Steps of GCG on one prompt, as its paper states them (arXiv:2307.15043).

    Each takes one gradient with respect to the one-hot suffix and the k best tokens of
    each place, runs a whole forward pass of B candidates with one place changed, and
    keeps the best one.
    """
    model = load(job["folder"])
    device, embed = model.device, model.get_input_embeddings().weight
    before, target = (torch.tensor(job[x], device=device) for x in ("before", "target"))
    size, count = job["suffix"], job["candidates"]
    source = torch.Generator(device=device).manual_seed(0)

    def loss(embedded: Any, rows: int) -> Any:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits = logits[:, -len(target) - 1 : -1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), target.expand(rows, -1), reduction="none"
        )
        return each.mean(1)

    def around(middle: Any, rows: int) -> Any:
        ends = (embed[part].expand(rows, -1, -1) for part in (before, target))
        first, last = ends
        return torch.cat([first, middle, last], dim=1)

    def run() -> list[float]:
        suffix, losses = torch.full((size,), job["first"], device=device), []
        for _ in range(job["steps"]):
            with torch.enable_grad():
                hot = torch.nn.functional.one_hot(suffix, embed.shape[0])
                hot = hot.to(embed.dtype).requires_grad_()
                value = loss(around((hot @ embed)[None], 1), 1).sum()
                (slope,) = torch.autograd.grad(value, hot)
            best = (-slope).topk(job["top_k"], dim=1).indices
            place = torch.arange(count, device=device) * size // count
            rank = torch.randint(
                job["top_k"], (count,), generator=source, device=device
            )
            found = suffix.repeat(count, 1)
            found[torch.arange(count, device=device), place] = best[place, rank]
            with torch.no_grad():
                scores = torch.cat(
                    [
                        loss(around(embed[part], len(part)), len(part))
                        for part in found.split(job["chunk"])
                    ]
                )
            suffix = found[scores.argmin()]
            losses.append(float(scores.min()))
        return losses

    return run


WHAT = {"gradients": gradients, "generation": generation, "gcg": gcg}


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    worker.pin(job["threads"])
    torch.set_num_threads(job["threads"])
    call = WHAT[job["what"]](job)
    last: dict[str, Any] = {}

    def run() -> dict[str, Any]:
        spent, last["value"] = worker.clock(call)
        return spent

    def value() -> dict[str, Any]:
        return {"value": np.asarray(last["value"]).tolist()}

    def memory() -> dict[str, Any]:
        if torch.cuda.is_available():
            return {"peak": torch.cuda.max_memory_allocated()}
        return {"peak": worker.peak_bytes()}

    def about() -> dict[str, Any]:
        return {"versions": versions(PEERS)}

    worker.serve({"run": run, "value": value, "memory": memory, "about": about})


if __name__ == "__main__":
    main()
