"""Tuning SAM's mask decoder alone: the baseline of what is adapted around it, and what its recipes share.

With boxes (MedSAM's way) the decoder answers for the object in a box; without, class prompts ask it (SAM-Path without its second
encoder). The image encoder and the prompt encoder stay frozen, so the embedding of each view is computed once.
Source of the form with boxes: Ma et al. 2024 (MedSAM); training boxes are the truth's, their sides moved outwards by 0 to 10 pixels at
256 (Shin et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..adapters import ClassPrompts, MaskHead, Part, Task, Tuned
from ..adapters.mask_head import check_decoder
from ..backbones import Backbone
from ..errors import BadCall
from ..training.fit import Asked, FitOptions
from ..training.prompting import box_prompts, drawn, objects_of
from .registry import recipe
from .run import Run

STARTER = "medgraft:starter-sam"
EPOCHS = 100
JITTER = 10 / 256
"""How far the sides of a training box move, as a share of the image's side."""

SHARED = ("decoder.layers.*", "decoder.last.*", "decoder.up*", "decoder.iou_token")
"""What every answer of the decoder passes."""
FIRST_MASK = ("decoder.mask_tokens", "decoder.masks.0.*")
"""What the answer to a box passes besides; class prompts have tokens and MLPs of their own."""


def tuned_decoder(backbone: Backbone, task: Task, *more: str) -> Tuned:
    """Copies of what every answer passes, and of the sites that match `more`. Raises BadCall for a backbone without a decoder."""
    check_decoder(backbone)
    return Tuned.on(backbone, task, targets=[*SHARED, *more])


@dataclass(frozen=True)
class ByBox:
    """A training step's forward pass: each image is asked by boxes around at most `most` of its objects, drawn by (seed, step).

    Pixels of objects that are not asked for are taken as found: they have no gradient. `groups` are the names of sub-groups, where
    the adapter takes them.
    """

    seed: int
    most: int = 8
    jitter: float = JITTER
    groups: tuple[str, ...] = ()

    def __call__(self, asked: Asked) -> Tensor:
        """-> logits (B, 1, H, W)."""
        rng, targets = drawn(self.seed, asked.step), asked.batch.targets
        kept = torch.from_numpy(np.stack([some_objects(m, self.most, rng) for m in targets.numpy()]))
        prompts = box_prompts(kept, jitter=self.jitter * targets.shape[-1], rng=rng, outward=True)
        if self.groups:
            prompts = replace(
                prompts, group=torch.tensor([self.groups.index(str(i.domain)) for i in asked.batch.items])
            )
        logits = asked.resume(asked.state, asked.images, asked.name, prompts=prompts)
        return logits.masked_fill(((targets > 0) & (kept == 0))[:, None].to(logits.device), SURE)


SURE = 20.0
"""A logit that no loss asks more of."""


def some_objects(mask: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """A label map (H, W) with at most `most` of its objects, drawn without replacement."""
    objects = objects_of(mask)
    if len(objects) <= most:
        return mask
    chosen = rng.choice(len(objects), most, replace=False)
    return np.asarray(np.where(objects[chosen].any(0), mask, 0))


def need_one_class(run: Run, name: str) -> None:
    """Raise BadCall unless the task is the segmentation of one class."""
    need_masks(run, name)
    if len(run.goal.classes) != 1:
        raise BadCall(
            f"{name} answers to a box with one mask; the data has {len(run.goal.classes)} classes ({', '.join(run.goal.classes)}): "
            f"choose one with --classes {run.goal.classes[0]}"
        )


def need_masks(run: Run, name: str) -> None:
    """Raise BadCall unless the task is a segmentation, on a backbone with a promptable decoder."""
    if run.task != "segment":
        raise BadCall(f"{name} segments; for classification use lora, bottleneck, vpt, ssf or linear_probe")
    check_decoder(run.frozen)


def decoder_parts(run: Run, prompts: str) -> dict[str, Part]:
    """The tuned decoder under a head that is asked by boxes ("box") or asks for every class by itself ("none")."""
    if prompts == "box":
        tuned = tuned_decoder(run.frozen, run.goal, *FIRST_MASK)
        return {"decoder": tuned, "head": MaskHead.on(run.frozen, run.goal)}
    return {
        "decoder": tuned_decoder(run.frozen, run.goal),
        "head": ClassPrompts.on(run.frozen, run.goal, quality=False),
    }


@recipe("sam_decoder", backbone=STARTER)
def sam_decoder(
    run: Run,
    *,
    prompts: Literal["box", "none"] = "box",
    most: int = 8,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """SAM's mask decoder alone, tuned: the baseline for what is adapted around it.

    prompts : answer to boxes (one class), or find every class without any. most : objects of an image asked for in a step.
    """
    if prompts not in ("box", "none"):
        raise BadCall(f"prompts must be 'box' or 'none', got {prompts!r}")
    (need_one_class if prompts == "box" else need_masks)(run, "sam_decoder")
    run.seeded()
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps, lr=lr, weight_decay=weight_decay, warmup=min(20, steps // 10), seed=run.seed, precision=run.precision
    )
    return run.train(
        "sam_decoder",
        decoder_parts(run, prompts),
        options,
        settings={"prompts": prompts, "most": most},
        forward=ByBox(run.seed, most) if prompts == "box" else None,
    )
