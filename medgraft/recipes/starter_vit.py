"""Pretrain the starter ViT on procedural phantoms, on a laptop, in under an hour.

    python -m medgraft.recipes.starter_vit medgraft/weights/starter_vit.safetensors

A small ViT looks at an endless stream of `phantom`s. One linear layer on its last tokens has to draw, for every
second pixel of the picture: what it is, which texture it has, where the edges run and how near they are, which
pixels belong to the same thing, and the picture itself, also where patches were blanked. Because the reader is
linear, whatever it reads is linearly there in the frozen last-layer tokens, sub-patch detail included, and that is
what few-shot segmentation needs. The reader is thrown away; the backbone is saved in half precision.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadCall, Diverged
from ..training.phantoms import REGIONS, TEXTURES, phantom
from .script import keep, main, ship

ARCHITECTURE: dict[str, Any] = {
    "img_size": 128,
    "patch_size": 8,
    "embed_dim": 256,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4,
    "qkv_bias": True,
    "class_token": True,
    "num_classes": 0,
    "dynamic_img_size": True,
}
"""Keyword arguments of timm's VisionTransformer."""

STRIDE = 2  # the reader draws every second pixel
READS = {"region": len(REGIONS), "texture": len(TEXTURES), "thing": 1, "edge": 3, "picture": 3, "kinship": 16}


def starter_vit(
    out: Path,
    *,
    steps: int = 800,
    batch: int = 32,
    seed: int = 0,
    lr: float = 7.5e-4,
    warmup: int = 100,
    cooldown: float = 0.25,
    weight_decay: float = 0.05,
    small_size: int = 96,
    small_share: float = 0.88,
    save_every: int = 100,
    resume: bool = True,
    threads: int = 0,
) -> Path:
    """Pretrain, write the backbone's weights to `out` (fp16 safetensors, timm's names), and return `out`.

    The first `small_share` of the steps see pictures of `small_size` pixels, the rest of 128. Muon moves the matrices
    inside the blocks, AdamW the rest; the rate rises for `warmup` steps, stays, and falls to zero over the last
    `cooldown` share of the steps. A checkpoint beside `out` (`.resume.pt`) is written every `save_every` steps; with
    `resume` an interrupted run goes on from it as if it had not stopped. Because the rate stays level in between, a
    resumed run may also be given fewer or more `steps`: that is how to end in time on a busy machine.
    The loss is logged to `.log.jsonl`. `threads=0` leaves torch's thread count alone.
    """
    if steps < 1 or batch < 1:
        raise BadCall(f"steps and batch must be at least 1, got steps={steps}, batch={batch}")
    if threads:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out.with_suffix(".resume.pt"), out.with_suffix(".log.jsonl")

    torch.manual_seed(seed)
    backbone = VisionTransformer(**ARCHITECTURE)
    patch = ARCHITECTURE["patch_size"]
    reader = nn.Linear(backbone.embed_dim, sum(READS.values()) * (patch // STRIDE) ** 2)
    hidden = [p for p in backbone.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for module in (backbone, reader) for p in module.parameters() if id(p) not in chosen]
    matrices, vectors = [p for p in others if p.ndim > 1], [p for p in others if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimisers = {
        "muon": torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)),
    }

    begun = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        backbone.load_state_dict(state["backbone"])
        reader.load_state_dict(state["reader"])
        for name, optimiser in optimisers.items():
            optimiser.load_state_dict(state[name])
        begun = state["step"]
    elif log.exists():
        log.unlink()

    clock = time.perf_counter()
    for step in range(begun, steps):
        rate = lr * min((step + 1) / warmup, 1, (steps - step) / (cooldown * steps))
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate

        size = small_size if step < small_share * steps else ARCHITECTURE["img_size"]
        picture, targets = _draw(range(step * batch, (step + 1) * batch), seed, size)
        dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = backbone.forward_features(_blank(picture, patch, dice))[:, 1:]
            drawn = reader(tokens)
        losses = _losses(_unfold(drawn.float(), size // patch, patch // STRIDE), picture, targets, dice)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise Diverged(f"the loss at step {step} is {loss.item()}; lower lr (now {lr}) and run again")

        for optimiser in optimisers.values():
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(hidden + others, 1.0)
        for optimiser in optimisers.values():
            optimiser.step()

        if step % 10 == 0 or step == steps - 1:
            line = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - clock, 1)}
            line |= {name: round(value.item(), 4) for name, value in losses.items()}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = {"backbone": backbone.state_dict(), "reader": reader.state_dict(), "step": step + 1}
            state |= {name: optimiser.state_dict() for name, optimiser in optimisers.items()}
            keep(state, checkpoint)

    facts = {"name": "medgraft:starter-vit", "trained_on": "procedural phantoms only", "normalise": "mean .5, std .5"}
    facts |= {"steps": str(steps), "batch": str(batch), "seed": str(seed), "lr": str(lr), "license": "Apache-2.0"}
    facts |= {"architecture": json.dumps(ARCHITECTURE)}
    ship(backbone.state_dict(), out, facts)
    checkpoint.unlink(missing_ok=True)
    return out


def _draw(numbers: range, seed: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Phantoms with these numbers: (B, 3, size, size) in -1..1, and label maps (B, size / 2, size / 2)."""
    drawn = [phantom(seed * 10_000_000 + number, size=size) for number in numbers]
    picture = torch.from_numpy(np.stack([p.image for p in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    maps = {
        name: torch.from_numpy(np.stack([getattr(p, name) for p in drawn])).long() for name in ("region", "texture")
    }
    thing = torch.from_numpy(np.stack([p.instance for p in drawn])).long()
    kind = thing * len(REGIONS) + maps["region"]  # an edge is where the thing or its kind changes
    across = F.pad((kind[:, :, 1:] != kind[:, :, :-1]).float(), (0, 1))
    down = F.pad((kind[:, 1:] != kind[:, :-1]).float(), (0, 0, 0, 1))
    edge = F.max_pool2d(torch.maximum(across, down)[:, None], STRIDE)
    near = [F.avg_pool2d(edge, k, 1, k // 2) for k in (5, 13)]
    maps = {name: value[:, ::STRIDE, ::STRIDE] for name, value in maps.items()}
    maps["kind"] = kind[:, ::STRIDE, ::STRIDE]
    maps["thing"] = (thing[:, ::STRIDE, ::STRIDE] > 0).float()
    maps["edge"] = torch.cat([edge, *near], 1)
    return picture, maps


def _blank(picture: Tensor, patch: int, dice: torch.Generator, *, share: float = 0.25) -> Tensor:
    """Grey out `share` of the patches in every second picture."""
    b, _, h, w = picture.shape
    keep = (torch.rand(b, 1, h // patch, w // patch, generator=dice) >= share).float()
    keep[::2] = 1
    return picture * F.interpolate(keep, scale_factor=patch)


def _unfold(drawn: Tensor, side: int, cells: int) -> dict[str, Tensor]:
    """(B, side * side, C * cells * cells) -> one map (B, c, side * cells, side * cells) for each of `READS`."""
    b = drawn.shape[0]
    maps = drawn.transpose(1, 2).reshape(b, -1, side, side)
    return dict(zip(READS, F.pixel_shuffle(maps, cells).split(list(READS.values()), 1), strict=True))


def _losses(
    drawn: dict[str, Tensor], picture: Tensor, targets: dict[str, Tensor], dice: torch.Generator
) -> dict[str, Tensor]:
    """The six losses, already weighted."""
    count = torch.bincount(targets["region"].flatten(), minlength=len(REGIONS)).float()
    rarity = (count.sum() / count.clamp_min(1)).sqrt().clamp_max(20)
    seen = F.avg_pool2d(picture, STRIDE)
    edge, near = targets["edge"][:, :1], targets["edge"][:, 1:]
    return {
        "region": F.cross_entropy(drawn["region"], targets["region"], rarity),
        "texture": 0.3 * F.cross_entropy(drawn["texture"], targets["texture"]),
        "thing": 0.5 * F.binary_cross_entropy_with_logits(drawn["thing"][:, 0], targets["thing"]),
        "edge": F.binary_cross_entropy_with_logits(drawn["edge"][:, :1], edge, pos_weight=torch.tensor(3.0))
        + 4 * F.mse_loss(drawn["edge"][:, 1:], near),
        "picture": 0.5 * F.l1_loss(drawn["picture"], seen),
        "kinship": _kinship(drawn["kinship"], targets["kind"], dice),
    }


def _kinship(embedding: Tensor, kind: Tensor, dice: torch.Generator, *, n: int = 192) -> Tensor:
    """Pull pixels of one thing together and push those of others apart, for `n` random pixels of each picture."""
    at = torch.randint(embedding.shape[-1] * embedding.shape[-2], (n,), generator=dice)
    e, k = embedding.flatten(2)[:, :, at].transpose(1, 2), kind.flatten(1)[:, at]
    far = (e.square().sum(-1)[:, :, None] + e.square().sum(-1)[:, None] - 2 * e @ e.transpose(1, 2)).clamp_min(0)
    same = (k[:, :, None] == k[:, None]).float()
    apart = -F.logsigmoid(3 - far) * same / same.sum().clamp_min(1)
    together = -F.logsigmoid(far - 3) * (1 - same) / (1 - same).sum().clamp_min(1)
    return 0.5 * (apart.sum() + together.sum())


if __name__ == "__main__":
    main(starter_vit)
