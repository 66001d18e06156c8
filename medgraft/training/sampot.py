"""The scorer of SAMPOT: a regressor of Dice, trained on masks that are too small, too large, and SAM's own.

    level sets   {d > c}, d the signed distance to the truth's edge (inside positive), c drawn so that both kinds occur
    answers      SAM's masks for six clicks an image: the centroids of three horizontal bands of the object, and three pixels outside,
                 at least 5 from it
    loss         (O(x, m) - Dice(m, truth))^2, Adam 1e-3, batches of 32; SAM's masks enter as in use, sigmoid(k m)

Source: Sathish et al. 2023 (medagi-prompt-evolution) section 3.2. Where we differ: fixed steps instead of 200 epochs with a choice by
validation; the image enters as the backbone takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ..adapters.evolved_prompt import Scorer
from ..adapters.mask_head import check_decoder
from ..backbones import Backbone
from ..backbones.prompts import Prompts
from ..errors import BadCall, BadData
from .batches import Batches
from .prompting import drawn, innermost

LEVELS = 8
BANDS = OUTSIDE = 3
OFFSET = 5


@dataclass(frozen=True)
class Candidates:
    """Images (N, C, s, s), masks (M, 1, s, s) in [0, 1], which image each belongs to (M,), and its Dice (M,)."""

    images: Tensor
    masks: Tensor
    rows: Tensor
    dice: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def level_sets(truth: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Under- and over-segmentations (`count`, H, W) bool of `truth` (H, W) bool, half of each (one more of the larger).

    Levels go from 0 to 90 % of the greatest depth inside, and as far outside.
    """
    inside, outside = ndimage.distance_transform_edt(truth), ndimage.distance_transform_edt(~truth)
    distance = np.where(truth, inside, -outside)
    depth = 0.9 * inside.max()
    smaller = rng.uniform(0, depth, count // 2)
    larger = -rng.uniform(0, depth, count - count // 2)
    return np.stack([distance > c for c in np.concatenate([smaller, larger])])


def six_clicks(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (6, 2), x, y: the centroids of three horizontal bands of `truth` (H, W) bool, and three pixels outside it.

    Bands have equal heights. Outside means at least 5 pixels away, or as far as there is; a band without a pixel takes the innermost.
    """
    ys, xs = np.nonzero(truth)
    edges = np.linspace(ys.min(), ys.max() + 1, BANDS + 1)
    bands = [(ys >= a) & (ys < b) for a, b in pairwise(edges)]
    inside = [(xs[own].mean(), ys[own].mean()) if own.any() else innermost(truth) for own in bands]
    distance = ndimage.distance_transform_edt(~truth)
    far = np.argwhere(distance >= min(OFFSET, distance.max()))
    outside = far[rng.choice(len(far), OUTSIDE)][:, ::-1]
    return np.concatenate([np.array(inside), outside]).astype(np.float64)


def soft_dice(masks: Tensor, truth: Tensor) -> Tensor:
    """Dice (R,) of masks (R, H, W) and truths (R, H, W), both decided at 0.5; 1 where both are empty."""
    a, b = masks > 0.5, truth > 0.5
    total = a.sum((1, 2)) + b.sum((1, 2))
    return torch.where(total > 0, 2 * (a & b).sum((1, 2)) / total.clamp_min(1), 1.0).float()


@torch.no_grad()
def candidates(backbone: Backbone, batches: Batches, *, side: int, steep: float, seed: int = 0) -> Candidates:
    """Masks for every item of `batches`, brought to `side`. Items without an object are left out.

    Raises BadCall for a backbone without a promptable decoder, BadData where no item has an object.
    """
    check_decoder(backbone)
    images, masks, rows, scores = [], [], [], []
    device = next(backbone.parameters()).device
    for number, (x, truth) in enumerate(_examples(batches)):
        rng = drawn(seed, number)
        clicks = torch.from_numpy(six_clicks(truth.numpy(), rng)).float().to(device)
        asked = Prompts(
            points=clicks[None, :, None], labels=torch.ones(1, len(clicks), 1, dtype=torch.long, device=device)
        )
        features = backbone(x[None].to(device))
        answers = features.decoder(features.maps[-1], asked)[0][0, :, :1]
        sized = functional.interpolate(answers.float(), truth.shape, mode="bilinear", align_corners=False)
        own = (steep * sized).sigmoid()[:, 0].cpu()
        drawn_masks = torch.from_numpy(level_sets(truth.numpy(), LEVELS, rng)).float()
        whole = torch.cat([drawn_masks, own])
        scores.append(soft_dice(whole, truth[None].expand_as(whole)))
        masks.append(_sized(whole[:, None], side))
        images.append(_sized(x[None], side))
        rows.append(torch.full((len(whole),), len(images) - 1))
    if not images:
        raise BadData("none of these items has an object, so there is no mask to score")
    return Candidates(torch.cat(images), torch.cat(masks), torch.cat(rows), torch.cat(scores))


def _examples(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of the batches (C, H, W), and their truth (H, W) bool where there is one."""
    for batch in batches.once():
        for x, target in zip(batch.images, batch.targets, strict=True):
            if (target > 0).any():
                yield x, target > 0


def _sized(x: Tensor, side: int) -> Tensor:
    return functional.interpolate(x, (side, side), mode="bilinear", antialias=True)


def train_scorer(
    data: Candidates, *, side: int, steps: int = 400, lr: float = 1e-3, batch: int = 32, seed: int = 0
) -> tuple[Scorer, list[float]]:
    """A scorer in eval mode, and its loss step by step. Batch t is drawn from (seed, t). Raises BadCall for no steps."""
    if steps < 1:
        raise BadCall(f"the scorer is trained for one step or more, got {steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = Scorer(data.images.shape[1], side)
    optimiser = torch.optim.Adam(scorer.parameters(), lr=lr)
    losses = []
    for t in range(steps):
        chosen = torch.from_numpy(drawn(seed, t).choice(len(data), min(batch, len(data)), replace=False))
        found = scorer(data.images[data.rows[chosen]], data.masks[chosen])
        loss = functional.mse_loss(found, data.dice[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return scorer.eval(), losses


@torch.no_grad()
def correlation(scorer: Scorer, data: Candidates) -> float:
    """Pearson's correlation of the scores with the true Dice."""
    scores: Sequence[Tensor] = [
        scorer(data.images[data.rows[i]], data.masks[i]) for i in torch.arange(len(data)).split(64)
    ]
    return float(np.corrcoef(torch.cat(list(scores)).numpy(), data.dice.numpy())[0, 1])
