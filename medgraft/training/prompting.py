"""Prompts made from the truth: boxes around objects and points in them, for training and for measuring.

An object is a connected component (8 neighbours) of one class of a label map. Positions are x, y in pixels of the map, counted
from 0 at the centre of the left top pixel; a box ends one pixel behind its object, so that it is never empty. Random numbers are
drawn from the generator that is given: `drawn(seed, step)` makes one for a step, so resuming repeats every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..adapters import Adapter
from ..backbones.prompts import FOREGROUND, Prompts
from ..errors import BadCall, unknown
from .items import Item

Each = Literal["object", "image"]
Kind = Literal["box", "point"]
KINDS: tuple[Kind, ...] = ("box", "point")


def drawn(seed: int, step: int) -> np.random.Generator:
    """The random numbers of step `step` of a run."""
    return np.random.default_rng([seed, step])


def objects_of(mask: np.ndarray, each: Each = "object") -> np.ndarray:
    """The objects of a label map (H, W) of integers, 0 being background, as (P, H, W) bool.

    In order of class, then from the top. `each="image"` takes all foreground as one object. P is 0 for an empty map.
    """
    if each not in ("object", "image"):
        raise BadCall(f"prompts are made for each 'object' or each 'image', got {each!r}")
    if not mask.any():
        return np.zeros((0, *mask.shape), dtype=bool)
    if each == "image":
        return np.asarray(mask > 0)[None]
    found = []
    for value in np.unique(mask[mask > 0]):
        numbered, count = ndimage.label(mask == value, structure=np.ones((3, 3)))
        found.append(numbered == np.arange(1, count + 1)[:, None, None])
    return np.concatenate(found)


def boxes_of(
    mask: np.ndarray,
    *,
    each: Each = "object",
    jitter: float = 0.0,
    rng: np.random.Generator | None = None,
    outward: bool = False,
) -> np.ndarray:
    """Boxes (P, 4) float64, x0, y0, x1, y1, around the objects of a label map (H, W).

    Every side moves by its own draw from U(-jitter, jitter) pixels, or from U(0, jitter) away from the object with `outward`;
    boxes stay inside the map and keep a width and a height of at least 1. Raises BadCall for a jitter without a generator.
    """
    objects = objects_of(mask, each)
    h, w = mask.shape
    boxes = np.zeros((len(objects), 4))
    for i, found in enumerate(objects):
        ys, xs = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        boxes[i] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    if jitter:
        if rng is None or jitter < 0:
            raise BadCall(f"a jitter is a number of pixels above 0 and wants rng=; got {jitter:g}, rng={rng}")
        moved = rng.uniform(0.0 if outward else -jitter, jitter, boxes.shape)
        jittered = boxes + moved * [-1, -1, 1, 1]
        first = np.clip(jittered[:, :2], 0, [w - 1, h - 1])
        last = np.clip(jittered[:, 2:], first + 1, [w, h])
        boxes = np.concatenate([first, last], 1)
    return boxes


def points_of(
    mask: np.ndarray, *, each: Each = "object", count: int = 1, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Points (P, `count`, 2) float64, x, y, on the objects of a label map (H, W).

    Drawn from the object's pixels, equal ones only where it has fewer than `count`; without a generator its innermost pixel,
    the one farthest from any edge (`count` must be 1). Raises BadCall.
    """
    if count < 1 or (rng is None and count != 1):
        raise BadCall(f"count is 1 or more, and more than 1 wants rng=; got {count}, rng={rng}")
    objects = objects_of(mask, each)
    points = np.zeros((len(objects), count, 2))
    for i, found in enumerate(objects):
        if rng is None:
            points[i] = innermost(found)
        else:
            ys, xs = np.nonzero(found)
            chosen = rng.choice(len(xs), count, replace=count > len(xs))
            points[i] = np.stack([xs[chosen], ys[chosen]], 1)
    return points


def innermost(region: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of a region (H, W) bool that lies farthest from its edge; the image's border is an edge."""
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(depth)), region.shape)
    return int(x), int(y)


def box_prompts(
    targets: Tensor,
    *,
    each: Each = "object",
    jitter: float = 0.0,
    rng: np.random.Generator | None = None,
    outward: bool = False,
) -> Prompts:
    """Boxes for a batch of label maps (B, H, W), one question an object; rows with fewer objects are filled up (`real` False).

    A map without an object is asked by a box around all of it.
    """
    rows = [boxes_of(m, each=each, jitter=jitter, rng=rng, outward=outward) for m in targets.cpu().numpy()]
    h, w = targets.shape[-2:]
    boxes, real = _filled(rows, np.array([[0.0, 0.0, w, h]]), targets.device)
    return Prompts(boxes=boxes, real=real)


def point_prompts(
    targets: Tensor, *, each: Each = "object", count: int = 1, rng: np.random.Generator | None = None
) -> Prompts:
    """Points for a batch of label maps (B, H, W), one question of `count` points an object; filled up as `box_prompts`.

    A map without an object is asked at its middle, as background: label 0.
    """
    maps = targets.cpu().numpy()
    rows = [points_of(m, each=each, count=count, rng=rng) for m in maps]
    h, w = targets.shape[-2:]
    middle = np.broadcast_to([[[(w - 1) / 2, (h - 1) / 2]]], (1, count, 2))
    points, real = _filled(rows, middle, targets.device)
    labels = torch.full(points.shape[:3], FOREGROUND, dtype=torch.long, device=targets.device)
    empty = torch.tensor([not len(r) for r in rows], device=targets.device)
    return Prompts(points=points, labels=labels.masked_fill(empty[:, None, None], 0), real=real)


def _filled(rows: Sequence[np.ndarray], nothing: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of unequal numbers of questions as one tensor (B, P, ...) float32, and which questions are real (B, P)."""
    asked = [row if len(row) else nothing for row in rows]
    most = max(map(len, asked))
    full = np.stack([np.concatenate([row, np.repeat(row[:1], most - len(row), 0)]) for row in asked])
    real = np.arange(most) < np.array([len(row) for row in asked])[:, None]
    return torch.from_numpy(full).float().to(device), torch.from_numpy(real).to(device)


def prompts_of(adapter: Adapter, mask: np.ndarray, item: Item, kind: Kind = "box") -> Mapping[str, Any] | None:
    """What a person who knows the truth `mask` (H, W) of `item` would ask `adapter`, in pixels of the image; None for one that asks nothing.

    A head that takes prompts gets a box around each object or, with `kind="point"`, a click at the innermost pixel of each (together
    one question); on an image without an object the box is the whole image, the click its middle. A part that knows sub-groups
    gets the item's domain. Raises BadCall for an item without one.
    """
    if kind not in KINDS:
        raise unknown("kind of prompt", kind, KINDS)
    asked: dict[str, Any] = {}
    if any(r.takes_prompts for r in adapter.readouts):
        h, w = mask.shape
        if kind == "box":
            asked["boxes"] = boxes_of(mask) if mask.any() else [(0, 0, w, h)]
        else:
            asked["points"] = points_of(mask)[:, 0] if mask.any() else [((w - 1) / 2, (h - 1) / 2)]
    for readout in adapter.readouts:
        if readout.takes_groups:
            if item.domain is None:
                raise BadCall(
                    f"item {item.id!r} has no domain, and this adapter asks for the sub-group; add `domain` to dataset.json "
                    f"(one of {', '.join(readout.groups)})"
                )
            asked["group"] = item.domain
    return asked or None
