"""Masks of everything in a picture: a promptable decoder asked at every point of a grid, its good answers kept.

    three masks for each of n x n points;   kept: estimated IoU > quality  and
    stability(z) = |z > offset| / |z > -offset| >= stability                              z the mask's logits
    then, best estimate first, none whose box overlaps a better one's by an IoU of more than `overlap`

Masks are decided in pixels of the prepared input. Points go `at_once` at a time and candidates wait as bits, so that memory stays
bounded. Source: Kirillov et al. 2023 (arXiv:2304.02643), appendix B, on the whole image (no crops).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import masks_to_boxes, nms

from ..backbones.base import Backbone
from ..backbones.prompts import Prompts
from ..errors import BadCall
from .mask_head import check_decoder
from .task import Preprocessing


@dataclass(frozen=True)
class Grid:
    """What is asked and what is kept; the defaults are SAM's own. Raises BadCall."""

    points: int = 32
    quality: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7
    offset: float = 1.0
    at_once: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        if self.points < 1 or self.at_once < 1 or self.offset <= 0:
            raise BadCall(
                f"a grid has 1 or more points a side, asks 1 or more at once and has an offset above 0; got points={self.points}, "
                f"at_once={self.at_once}, offset={self.offset}"
            )
        for name in ("quality", "stability", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadCall(f"{name} is a share, from 0 to 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class Found:
    """N masks, best estimate first.

    masks : bool (N, h, w), in pixels of the input, without its padding.   boxes : (N, 4) x0, y0, x1, y1 there.
    quality, stability : (N,) float32, the estimated IoU and the stability.   points : (N, 2) x, y of the point asked.
    """

    masks: Tensor
    boxes: Tensor
    quality: Tensor
    stability: Tensor
    points: Tensor


def auto_masks(backbone: Backbone, image: np.ndarray, grid: Grid | None = None) -> Found:
    """Every mask that `backbone`, a SAM, finds in an image (H, W, 3) uint8, longest side scaled to its input size. Raises BadCall."""
    check_decoder(backbone)
    spec = backbone.spec
    prepare = Preprocessing(spec.image_size, spec.mean, spec.std, fit=spec.fit)
    x = prepare(image)[None].to(next(backbone.parameters()))
    with torch.no_grad():
        features = backbone(x)
    return find_masks(features.decoder, features.maps[-1], prepare.frame(image).inside, spec.image_size, grid or Grid())


@torch.no_grad()
def find_masks(decoder: Any, embedding: Tensor, inside: tuple[int, int], side: int, grid: Grid) -> Found:
    """Masks of one image from its embedding (1, C, h', w'); `inside` (h, w) is the part of the square of `side` that is not padding."""
    points = grid_points(inside, grid.points).to(embedding.device)
    h, w = inside
    bits: list[np.ndarray] = []
    rows: list[Tensor] = []
    for some in points.split(grid.at_once):
        asked = Prompts(some[None, :, None], torch.ones(1, len(some), 1, dtype=torch.long, device=some.device))
        low, quality = (t.flatten(0, 2).float() for t in decoder(embedding, asked, multimask=True))
        good = quality > grid.quality
        if not good.any():
            continue
        z = functional.interpolate(low[good][:, None], (side, side), mode="bilinear", align_corners=False)[:, 0, :h, :w]
        mask = z > 0
        firm, loose = ((z > edge).sum((1, 2)) for edge in (grid.offset, -grid.offset))
        stability = firm / loose.clamp_min(1)
        kept = (stability >= grid.stability) & mask.any(2).any(1)
        if kept.any():
            where = some.repeat_interleave(3, 0)[good][kept]
            bits.append(np.packbits(mask[kept].flatten(1).cpu().numpy(), 1))
            scores = torch.stack([quality[good][kept], stability[kept]], 1)
            rows.append(torch.cat([masks_to_boxes(mask[kept]), scores, where], 1))
    if not rows:
        none = embedding.new_zeros(0, 8).float()
        return _found(embedding.new_zeros(0, h, w).bool(), none)
    table = torch.cat(rows)
    best = nms(table[:, :4], table[:, 4], grid.overlap)
    chosen = np.unpackbits(np.concatenate(bits)[best.cpu().numpy()], 1, count=h * w)
    return _found(torch.from_numpy(chosen).bool().unflatten(1, (h, w)).to(embedding.device), table[best])


def grid_points(inside: tuple[int, int], n: int) -> Tensor:
    """n x n points (n^2, 2), x and y in pixels, each in the middle of its cell of a picture of `inside` (h, w)."""
    h, w = inside
    unit = (torch.arange(n) + 0.5) / n
    return torch.cartesian_prod(unit * h, unit * w).flip(1) - 0.5


def _found(masks: Tensor, table: Tensor) -> Found:
    """From masks and rows of (box, quality, stability, point)."""
    return Found(masks, table[:, :4], table[:, 4], table[:, 5], table[:, 6:])
