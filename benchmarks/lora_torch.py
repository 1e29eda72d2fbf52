"""The peer's side of ``lora_step``: PyTorch, transformers and peft, as usually used."""

import importlib
import json
import sys
import warnings
from typing import Any

import numpy as np

from benchmarks import shapes, worker
from benchmarks.measure import PEERS, versions


class Peer:
    """A LoRA step as a Trainer does it, without the Trainer.

    Eager mode, scaled-dot-product attention, each batch padded to its longest example,
    AdamW with clipping; under autocast if weights are not float32.

    Args:
      job: from :func:`benchmarks.lora_step.job_of`.
    """

    def __init__(self, job: dict[str, Any]):
        """Draws the weights on the device, or reads them from a folder."""
        # Torch is not installed where our types are checked.
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        peft: Any = importlib.import_module("peft")
        torch, self._job = self._torch, job
        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self._gpu = job["device"] == "gpu"
        self._device = "cuda" if self._gpu else "cpu"
        self._dtype = getattr(torch, job["dtype"])
        self._batches, _ = shapes.read(job["data"])
        if folder := job.get("folder"):
            load = transformers.AutoModelForCausalLM.from_pretrained
            plain = load(f"{folder}/base", dtype=self._dtype).to(self._device)
            model = peft.PeftModel.from_pretrained(
                plain, f"{folder}/adapter", is_trainable=True
            )
        else:
            config = transformers.LlamaConfig(**shapes.Shape(**job["shape"]).theirs())
            make = transformers.AutoModelForCausalLM.from_config
            with torch.device(self._device):
                plain = make(config, dtype=self._dtype)
                settings = peft.LoraConfig(
                    r=job["rank"],
                    lora_alpha=2 * job["rank"],
                    lora_dropout=0.0,
                    target_modules=list(shapes.TARGETS),
                    task_type="CAUSAL_LM",
                )
                model = peft.get_peft_model(plain, settings)
        self._model = model.train()
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=2e-4, weight_decay=0.01, eps=1e-8
        )

    def _collate(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Pads to the longest of the batch, with −100 where there is no answer."""
        longest = int(batch["length"].max())
        tokens = self._torch.from_numpy(batch["tokens"][:, :longest]).long()
        mask = self._torch.from_numpy(batch["mask"][:, :longest]) > 0
        inside = np.arange(longest) < batch["length"][:, None]
        made = {
            "input_ids": tokens,
            "attention_mask": self._torch.from_numpy(inside).long(),
            "labels": tokens.masked_fill(~mask, -100),
        }
        return {k: v.to(self._device, non_blocking=True) for k, v in made.items()}

    def _autocast(self) -> Any:
        mixed = self._dtype != self._torch.float32
        return self._torch.autocast(self._device, self._dtype, enabled=mixed)

    def _step(self, batch: dict[str, np.ndarray]) -> Any:
        with self._autocast():
            loss = self._model(**self._collate(batch)).loss
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _wait(self) -> None:
        if self._gpu:
            self._torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        """Versions and the device."""
        name = self._torch.cuda.get_device_name() if self._gpu else "cpu"
        return {"versions": versions(PEERS), "device": name}

    def prepare(self) -> dict[str, Any]:
        """Takes a step on every batch; nothing compiles, but memory is allocated."""
        first, _ = worker.clock(self.run)
        again, _ = worker.clock(self.run)
        return {"compile": first["wall"] - again["wall"], "programs": 0}

    def run(self) -> dict[str, Any]:
        """Takes a step on every batch."""

        def steps():
            losses = [self._step(batch) for batch in self._batches]
            self._wait()
            return losses

        spent, losses = worker.clock(steps)
        return {**spent, "losses": [float(x) for x in losses]}

    def rate(self, size: int) -> dict[str, Any]:
        """Operations a second of a square product."""
        torch = self._torch
        x = torch.randn(size, size, device=self._device, dtype=self._dtype)
        repeats = 50 if self._gpu else 5

        def run():
            for _ in range(repeats):
                _ = x @ x
            self._wait()

        run()
        best = min(worker.clock(run)[0]["wall"] for _ in range(3))
        return {"rate": 2 * size**3 * repeats / best}

    def memory(self) -> dict[str, Any]:
        """Peak bytes: of the device, or of this process if that is the host."""
        if self._gpu:
            return {"peak": self._torch.cuda.max_memory_allocated()}
        return {"peak": worker.peak_bytes()}

    def check(self) -> dict[str, Any]:
        """Loss and gradient norm on each batch, without taking a step.

        Our loss averages the examples' means; the peer's averages tokens.
        """
        torch = self._torch
        losses, norms = [], []
        for batch in self._batches:
            made = self._collate(batch)
            labels = made.pop("labels")[:, 1:]
            logits = self._model(**made).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
            )
            loss = (each.sum(1) / (labels != -100).sum(1)).mean()
            grads = torch.autograd.grad(loss, self._weights)
            losses.append(float(loss))
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return {"losses": losses, "norms": norms}


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    worker.pin(job["threads"])
    peer = Peer(job)
    names = ("about", "prepare", "run", "rate", "memory", "check")
    worker.serve({name: getattr(peer, name) for name in names})


if __name__ == "__main__":
    main()
