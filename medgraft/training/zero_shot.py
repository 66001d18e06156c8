"""A promptable backbone as it is, on a labelled data set: prompts from the truth, masks from the frozen decoder.

    box    a box around each object (a component of one class); the answers are united by class
    point  one click at each object's innermost pixel, a question each; united by class
    grid   nobody says anything: every mask found from a grid of points, and for each object the one with the best IoU. The choice is
           the truth's, so this is what a perfect chooser would reach.

Class names come with the prompts, so only the classes shown by an image count there, as in Wang et al. 2023
(medagi-sam-robotic-surgery) sections 2 and 3; `IoU` and `Dice` are by image and class at the image's own size. The mask is the decoder's
first, as in `mask_head`; the grid takes the three others.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from ..adapters import Adapter, Host, MaskHead, Task
from ..adapters.auto_masks import Grid, auto_masks
from ..adapters.on_image import OnImage, in_own_size
from ..backbones import Backbone
from ..errors import BadCall, BadData, unknown
from .items import Dataset
from .metrics import summarise
from .prompting import boxes_of, objects_of, points_of

Asking = Literal["box", "point", "grid"]
NAME = "zero_shot"
TOLD = {
    "box": "a box around each object of the truth",
    "point": "a click on each object of the truth",
    "grid": "none; of each object the best mask of a grid, chosen by the truth",
}


def zero_shot_host(backbone: Backbone) -> Host:
    """A host with a mask head without tensors as `NAME`. Raises BadCall for a backbone without a promptable decoder."""
    task = Task("segment", ("object",))
    host = Host(backbone)
    host.add(Adapter.of(backbone, task, {"head": MaskHead.on(backbone, task)}), NAME)
    return host


def zero_shot(
    backbone: Backbone, dataset: Dataset, split: str = "test", *, prompts: Asking = "box", grid: Grid | None = None
) -> dict[str, Any]:
    """Scores of the frozen `backbone` on `split`; see the top of the file.

    `dice` and `iou`: means over images of the mean over the classes that an image shows, `interval` (95 %, of Dice), `classes`,
    `per_image`, `n` images with an object, `empty` images without (left out), `prompts` in words; with a grid `found`, the share of objects
    with a mask of IoU above 0.5. Raises UnknownName, BadCall for a backbone that takes no prompts or data that are no pictures, BadData for
    nothing to score.
    """
    if prompts not in get_args(Asking):
        raise unknown("kind of prompt", prompts, get_args(Asking))
    if dataset.dims != 2:
        raise BadCall(f"zero_shot is for pictures, {dataset.name!r} holds volumes")
    host, names = zero_shot_host(backbone), [dataset.classes[v] for v in sorted(dataset.classes)]
    overlaps, unions, per_image, best = [], [], [], []
    items = dataset.split(split)
    for item in items:
        truth, drawn = dataset.mask(item), dataset.annotated(item)
        if not any((truth == v).any() for v in sorted(dataset.classes)):
            continue
        on = host.on(dataset.image(item))
        masks = _everything(on, grid) if prompts == "grid" else None
        row = np.full((2, len(names)), np.nan)
        for k, value in enumerate(sorted(dataset.classes)):
            own = truth == value
            if not own.any() or not drawn[k]:
                continue
            if masks is None:
                found = _by_box(on, own) if prompts == "box" else _by_point(on, own)
            else:
                found, reached = _chosen(masks, objects_of(own.astype(np.uint8)))
                best += reached
            both, either = (found & own).sum(), (found | own).sum()
            row[:, k] = 2 * both / (both + either), both / either
        overlaps.append(row[0])
        unions.append(row[1])
        scores = {c: None if np.isnan(d) else float(d) for c, d in zip(names, row[0], strict=True)}
        per_image.append({"id": item.id, "dice": scores, "domain": item.domain})
    if not overlaps:
        raise BadData(f"{dataset.name!r} has no item with an object in split {split!r}; splits are train, val and test")
    scored = summarise(overlaps, names)
    said = {
        "task": "zero-shot",
        "backbone": backbone.spec.title,
        "dataset": dataset.name,
        "split": split,
        "prompts": TOLD[prompts],
        "n": len(overlaps),
        "empty": len(items) - len(overlaps),
        "dice": scored["mean"],
        "interval": [scored["low"], scored["high"]],
        "level": 0.95,
        "iou": summarise(unions, names)["mean"],
        "classes": scored["classes"],
        "per_image": per_image,
    }
    return said | ({"found": float(np.mean(np.array(best) > 0.5))} if best else {})


def _by_box(on: OnImage, own: np.ndarray) -> np.ndarray:
    """The answers to a box around each component of `own` (H, W) bool, united."""
    found: np.ndarray = on.predict(NAME, prompts={"boxes": boxes_of(own.astype(np.uint8))})
    return found > 0


@torch.no_grad()
def _by_point(on: OnImage, own: np.ndarray) -> np.ndarray:
    """The answers to a click on each component, united."""
    clicks = points_of(own.astype(np.uint8))
    logits = [on.logits(NAME, prompts={"points": p}) for p in clicks]
    whole = torch.stack(logits).amax(0)
    return in_own_size(on.host.adapters[NAME], whole, on.pixels, probabilities=False) > 0


def _everything(on: OnImage, grid: Grid | None) -> np.ndarray:
    """Every mask of the grid (N, H, W) bool in the image's own size."""
    masks = auto_masks(on.host.backbone, on.pixels, grid).masks
    if not len(masks):
        return np.zeros((0, *on.pixels.shape[:2]), dtype=bool)
    sized = [functional.interpolate(m[None, None].float(), on.pixels.shape[:2], mode="bilinear")[0, 0] for m in masks]
    return np.stack([(m > 0.5).cpu().numpy() for m in sized])


def _chosen(masks: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """For each object the mask of the best IoU: their union (H, W), and these IoU (0 where there is no mask)."""
    found, best = np.zeros(objects.shape[1:], dtype=bool), []
    for own in objects:
        ious = [(m & own).sum() / (m | own).sum() for m in masks]
        best.append(float(max(ious, default=0.0)))
        if best[-1] > 0:
            found |= masks[int(np.argmax(ious))]
    return found, best
