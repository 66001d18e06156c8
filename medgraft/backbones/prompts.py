"""What a promptable decoder is asked: points, boxes and masks, several questions an image, in pixels of the batch that goes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import BadCall

FOREGROUND, BACKGROUND, NO_POINT, IGNORED = 1, 0, -1, -10
"""Labels of points. `NO_POINT` fills a question up with the network's own "not a point"; `IGNORED` adds a token of zeros."""

PREFIX = "prompt."


@dataclass(frozen=True)
class Prompts:
    """B images with P questions each; every tensor has the batch as its first axis.

    points : (B, P, N, 2) x, y in pixels of the input, float.   labels : (B, P, N) int64, see `FOREGROUND` and the others.
    boxes  : (B, P, 4) x0, y0, x1, y1 in the same pixels.       masks : (B, P, 4 h, 4 w) logits, h x w the embedding map.
    real   : (B, P) bool, False for a question that only fills a row up (default: all are real).
    group  : (B,) int64, the sub-group that each image belongs to (see `ConditionEmbedding`).
    Raises BadCall for shapes or labels that do not fit together.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    real: Tensor | None = None
    group: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = {"points": 4, "labels": 3, "boxes": 3, "masks": 4, "real": 2, "group": 1}
        found = self.tensors()
        for name, t in found.items():
            if t.ndim != wanted[name]:
                raise BadCall(
                    f"prompts: {name} has {wanted[name]} axes, see medgraft.backbones.prompts; got {tuple(t.shape)}"
                )
        if (self.points is None) != (self.labels is None):
            raise BadCall(
                "prompts: points and labels go together; give a label (1 object, 0 background) for each point"
            )
        if self.points is not None and self.labels is not None:
            if self.points.shape[:3] != self.labels.shape or self.points.shape[3] != 2:
                raise BadCall(
                    f"prompts: points (B, P, N, 2) and labels (B, P, N) differ: {tuple(self.points.shape)} and {tuple(self.labels.shape)}"
                )
            if not torch.isin(self.labels, torch.tensor([1, 0, -1, -10], device=self.labels.device)).all():
                strange = sorted(set(self.labels.flatten().tolist()) - {1, 0, -1, -10})
                raise BadCall(f"prompts: a point's label is 1 (object) or 0 (background), got {strange[:5]}")
        if self.boxes is not None and self.boxes.shape[2] != 4:
            raise BadCall(f"prompts: boxes are (B, P, 4): x0, y0, x1, y1; got {tuple(self.boxes.shape)}")
        if len({t.shape[0] for t in found.values()}) > 1:
            raise BadCall(
                f"prompts: of different numbers of images: { {n: t.shape[0] for n, t in found.items()} }; give as many rows each"
            )
        asked = {n: t.shape[1] for n, t in found.items() if n != "group"}
        if len(set(asked.values())) > 1:
            raise BadCall(f"prompts: of different numbers of questions an image: {asked}; fill up with real=False")

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    @property
    def rows(self) -> int:
        """B, the number of images; 0 where nothing is asked."""
        return next((t.shape[0] for t in self.tensors().values()), 0)

    @property
    def questions(self) -> int:
        """P, the questions an image; 0 where there is no point, box or mask."""
        return next((t.shape[1] for n, t in self.tensors().items() if n != "group"), 0)

    def kept(self) -> dict[str, Tensor]:
        """As entries of `State.kept`, so that prompts are moved, indexed and expanded with the rows that they belong to."""
        return {PREFIX + name: t for name, t in self.tensors().items()}

    @staticmethod
    def of(kept: Mapping[str, Tensor]) -> Prompts | None:
        """The inverse of `kept`; None where a state carries no prompts."""
        found = {name.removeprefix(PREFIX): t for name, t in kept.items() if name.startswith(PREFIX)}
        return Prompts(**found) if found else None

    def take(self, index: Tensor) -> Prompts:
        """The rows named by `index` (int64)."""
        return Prompts(**{name: t.index_select(0, index.to(t.device)) for name, t in self.tensors().items()})
