"""A person's prompts, in pixels of an image, to what the network is asked, in pixels of its input.

    {"points": [(x, y), ...], "labels": [1, 0, ...]}     clicks: 1 on the object, 0 beside it (default: all 1)
    {"box": (x0, y0, x1, y1)} or {"boxes": [...]}         one box, or one for each object
    {"mask": array (H, W)}                                an earlier answer of the image's size: truth values, 0 / 1 or logits
    {"group": "name"}                                     the sub-group that the image belongs to

Pixels are counted from 0 at the top left, x to the right, y down. Clicks, a box and a mask together are one question; several boxes
are one question each, and clicks then belong to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..backbones.prompts import Prompts
from ..errors import BadCall, unknown
from ..pixels import Frame
from .adapter import Adapter

KEYS = ("points", "labels", "box", "boxes", "mask", "group")
MASK_LOGIT = 10.0
"""How sure a mask prompt of truth values is, as a logit: about what SAM's own answers reach."""


def refuse_unasked(adapter: Adapter, prompts: Prompts) -> None:
    """Raise BadCall for prompts that nothing in `adapter` reads."""
    clicked = prompts.questions > 0
    if clicked and not any(r.takes_prompts for r in adapter.readouts):
        raise BadCall(
            f"this adapter ({', '.join(adapter.task.classes)}) takes no prompts (points, boxes, masks): it segments its classes by itself; "
            "leave prompts= away"
        )
    if prompts.group is not None and not any(r.takes_groups for r in adapter.readouts):
        raise BadCall("this adapter knows no sub-groups; leave the group away")


def missing_prompts(adapter: Adapter, prompts: Mapping[str, Any] | None) -> None:
    """Raise BadCall where a person must say something and did not."""
    given = {k for k, v in (prompts or {}).items() if v is not None}
    if any(r.takes_prompts for r in adapter.readouts) and not given & {"points", "box", "boxes", "mask"}:
        raise BadCall(
            'this adapter answers to a box or to clicks; give prompts={"box": (x0, y0, x1, y1)} or {"points": [(x, y)], "labels": [1]} '
            "(on the command line --box x0,y0,x1,y1 or --point x,y)"
        )
    for readout in adapter.readouts:
        if readout.takes_groups and "group" not in given:
            raise BadCall(
                f'this adapter wants to know the image\'s sub-group: prompts={{"group": NAME}}, one of {", ".join(readout.groups)}'
            )


def ask(adapter: Adapter, prompts: Mapping[str, Any], frame: Frame, like: Tensor, *, mask_side: int) -> Prompts:
    """`prompts` on an image in `frame`, as tensors beside `like` (1, C, S, S); the decoder takes masks of `mask_side` pixels.

    Raises BadCall for what lies outside the image, an empty or inverted box, labels other than 0 and 1, a mask of another size;
    UnknownName for a key or a group that does not exist.
    """
    for key in prompts:
        if key not in KEYS:
            raise unknown("prompt", key, KEYS)
    given = {k: v for k, v in prompts.items() if v is not None}
    boxes = _boxes(given, frame)
    points, labels = _points(given, frame)
    masks = _mask(given, frame, like, mask_side)
    p = max(1, len(boxes))
    found: dict[str, Tensor] = {}
    if len(points):
        moved = _moved(points, frame)
        found["points"] = like.new_tensor(moved)[None, None].expand(1, p, -1, -1)
        found["labels"] = torch.tensor(labels, device=like.device)[None, None].expand(1, p, -1)
    if len(boxes):
        found["boxes"] = like.new_tensor(_moved(boxes.reshape(-1, 2), frame).reshape(-1, 4))[None]
    if masks is not None:
        found["masks"] = masks.expand(1, p, -1, -1)
    if "group" in given:
        found["group"] = torch.tensor([_group(adapter, given["group"])], device=like.device)
    asked = Prompts(**found)
    refuse_unasked(adapter, asked)
    return asked


def _moved(xy: np.ndarray, frame: Frame) -> np.ndarray:
    """Points (N, 2) of the image to pixels of the input: pixel centres go to pixel centres."""
    corner = np.array([frame.box[1].start, frame.box[0].start], dtype=np.float64)
    return (xy - corner + 0.5) * np.array(frame.scale) - 0.5


def _numbers(found: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        numbers = np.asarray(found, dtype=np.float64).reshape(shape)
    except (TypeError, ValueError):
        raise BadCall(f"{what}; got {found!r}") from None
    if not np.isfinite(numbers).all():
        raise BadCall(f"{what}, finite ones; got {found!r}")
    return numbers


def _points(given: Mapping[str, Any], frame: Frame) -> tuple[np.ndarray, list[int]]:
    if "points" not in given:
        if "labels" in given:
            raise BadCall("labels were given without points; give points=[(x, y), ...] too")
        return np.zeros((0, 2)), []
    points = _numbers(given["points"], (-1, 2), "points are (x, y) pairs in pixels")
    _inside(points, frame, "point")
    labels = list(given.get("labels", [1] * len(points)))
    if len(labels) != len(points):
        raise BadCall(f"{len(points)} points and {len(labels)} labels; give one label a point: 1 object, 0 background")
    strange = [v for v in labels if v not in (0, 1)]
    if strange:
        raise BadCall(f"a point's label is 1 (on the object) or 0 (beside it), got {strange[0]!r}")
    return points, [int(v) for v in labels]


def _boxes(given: Mapping[str, Any], frame: Frame) -> np.ndarray:
    if "box" in given and "boxes" in given:
        raise BadCall("give box= (one) or boxes= (several), not both")
    found = [given["box"]] if "box" in given else given.get("boxes", [])
    boxes = _numbers(list(found), (-1, 4), "a box is x0, y0, x1, y1 in pixels")
    for x0, y0, x1, y1 in boxes:
        if x1 <= x0 or y1 <= y0:
            raise BadCall(
                f"the box {x0:g},{y0:g},{x1:g},{y1:g} is empty or inverted; give the left top corner first: x0 < x1 and y0 < y1"
            )
    _inside(boxes.reshape(-1, 2), frame, "corner of a box")
    return boxes


def _inside(xy: np.ndarray, frame: Frame, what: str) -> None:
    h, w = frame.size
    for x, y in xy:
        if not (0 <= x <= w and 0 <= y <= h):
            raise BadCall(
                f"the {what} {x:g},{y:g} lies outside the image, which is {w} x {h} pixels (width x height); x goes to the right, y down"
            )


def _mask(given: Mapping[str, Any], frame: Frame, like: Tensor, side: int) -> Tensor | None:
    """The mask prompt as logits (1, 1, `side`, `side`)."""
    if "mask" not in given:
        return None
    mask = np.asarray(given["mask"])
    if mask.shape != frame.size:
        raise BadCall(
            f"a mask prompt has the image's size, {frame.size[0]} x {frame.size[1]} (height x width); got {' x '.join(map(str, mask.shape))}"
        )
    values = mask.astype(np.float32)
    if mask.dtype == bool or set(np.unique(values).tolist()) <= {0.0, 1.0, 255.0}:
        values = np.where(values > 0, MASK_LOGIT, -MASK_LOGIT).astype(np.float32)
    if not np.isfinite(values).all():
        raise BadCall("a mask prompt holds NaN or infinite values; give truth values or logits")
    part = torch.from_numpy(values[frame.box])[None, None].to(like)
    h, w = frame.inside
    inside = functional.interpolate(part, (h, w), mode="bilinear", antialias=True)
    whole = functional.pad(inside, (0, frame.square - w, 0, frame.square - h), value=-MASK_LOGIT)
    return functional.interpolate(whole, (side, side), mode="bilinear", antialias=True)


def _group(adapter: Adapter, name: Any) -> int:
    for readout in adapter.readouts:
        if readout.takes_groups:
            return readout.group_index(name)
    raise BadCall("this adapter knows no sub-groups; leave the group away")


def rows_of(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of single images as one batch. All of them must ask alike: as many questions and points each."""
    names = {tuple(p.tensors()) for p in prompts}
    if len(names) != 1:
        raise BadCall(f"prompts of different kinds in one batch: {sorted(names)}; ask each image alike")
    return Prompts(**{n: torch.cat([getattr(p, n) for p in prompts]) for n in names.pop()})
