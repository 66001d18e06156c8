"""Pretrain the starter UniverSeg on synthetic tasks, on a laptop.

    python -m medgraft.recipes.starter_universeg medgraft/weights/starter_universeg.safetensors

The network of `backbones.universeg` looks at an endless stream of `training.synthetic_tasks`: a query, a support of varying size, one
structure. The loss is soft Dice and cross-entropy. What it learns is to compare, so new structures need no training.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import load_backbone
from ..errors import BadCall, Diverged
from ..training.synthetic_tasks import episode
from .script import keep, main, ship

SHOTS = (1, 2, 3, 4, 6, 8, 12, 16)
SHOTS_WEIGHTS = (1, 2, 2, 3, 2, 2, 1, 1)
LARGE = 128


def starter_universeg(
    out: Path,
    *,
    steps: int = 12000,
    batch: int = 2,
    seed: int = 0,
    lr: float = 5e-4,
    warmup: int = 200,
    cooldown: float = 0.3,
    size: int = 64,
    small_share: float = 0.88,
    save_every: int = 200,
    resume: bool = True,
    threads: int = 0,
) -> Path:
    """Pretrain, write the weights to `out` (fp16 safetensors, the released checkpoint's names), and return `out`.

    A step is `batch` tasks; the first `small_share` of the steps see pictures of `size` pixels a side, the rest of 128. AdamW; the
    rate rises for `warmup` steps, stays, and falls to zero over the last `cooldown` share of the steps. A checkpoint beside `out`
    (`.resume.pt`) is written every `save_every` steps; with `resume` an interrupted run goes on from it as if it had not stopped, and
    may be given fewer or more `steps` while the rate is level. The loss is logged to `.log.jsonl`.
    """
    if steps < 1 or batch < 1:
        raise BadCall(f"steps and batch must be at least 1, got steps={steps}, batch={batch}")
    if threads:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out.with_suffix(".resume.pt"), out.with_suffix(".log.jsonl")

    model = load_backbone(f"random:universeg?seed={seed}").trainable_copy()
    network = model.network
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        begun = state["step"]
    elif log.exists():
        log.unlink()

    clock, shown = time.perf_counter(), []
    for step in range(begun, steps):
        rate = lr * min((step + 1) / warmup, 1, (steps - step) / (cooldown * steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        for k in range(batch):
            number = step * batch + k
            dice = torch.Generator().manual_seed(seed * 1_000_003 + number)
            shots = SHOTS[int(torch.multinomial(torch.tensor(SHOTS_WEIGHTS, dtype=torch.float), 1, generator=dice))]
            side = size if step < small_share * steps else LARGE
            task = episode(seed * 100_000_000 + number, size=side, shots=shots)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.segment(task.query, task.images[None], task.labels[None])  # type: ignore[operator]
            loss, overlap = _loss(logits.float(), task.truth)
            if not torch.isfinite(loss):
                raise Diverged(f"the loss at step {step} is {loss.item()}; lower lr (now {lr}) and run again")
            (loss / batch).backward()
            shown.append((loss.item(), overlap))
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()

        if (step + 1) % 50 == 0 or step == steps - 1:
            means = torch.tensor(shown).mean(0).tolist()
            line = {"step": step + 1, "loss": round(means[0], 4), "dice": round(means[1], 4)}
            line |= {"seconds": round(time.perf_counter() - clock, 1), "threads": torch.get_num_threads()}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = []
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            keep(state, checkpoint)

    facts = {"name": "medgraft:starter-universeg", "trained_on": "synthetic tasks only", "license": "Apache-2.0"}
    facts |= {"steps": str(steps), "batch": str(batch), "seed": str(seed), "lr": str(lr)}
    ship(network.state_dict(), out, facts)
    checkpoint.unlink(missing_ok=True)
    return out


def _loss(logits: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy plus soft Dice of one query, and the Dice of the decided mask."""
    p = logits.sigmoid()
    soft = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    with torch.no_grad():
        decided = (logits > 0).float()
        overlap = float((2 * (decided * truth).sum() + 1) / (decided.sum() + truth.sum() + 1))
    return F.binary_cross_entropy_with_logits(logits, truth) + soft, overlap


if __name__ == "__main__":
    main(starter_universeg)
