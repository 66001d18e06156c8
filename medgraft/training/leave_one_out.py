"""Choosing a method's settings on its known samples alone: each is asked of all the others.

    p_i = model(known without i, labels without i, known_i)
    loss = mean over classes of the mean over their samples of -log p_i[y_i]

The mean over classes keeps a rare class (a classifier's errors, say) from being given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..adapters.neighbours import SequenceModel, checked, one_hot
from ..errors import BadCall

LEAST = 1e-6
"""Being surely wrong costs -log of this, not infinity."""

M = TypeVar("M", bound=SequenceModel)


def leave_one_out(model: SequenceModel, known: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Probabilities (M, K) of each known sample (M, D) by the others; labels int64 (M,). M calls of `model`.

    Raises BadCall for fewer than two samples and for what the model refuses.
    """
    if len(known) < 2:
        raise BadCall(f"leaving one out of {len(known)} known samples leaves none; give two or more")
    y = one_hot(labels, classes)
    checked(known, y, known)
    rows = torch.arange(len(known), device=known.device)
    return torch.cat([model(known[rows != i], y[rows != i], known[i : i + 1]) for i in range(len(known))])


def class_mean_loss(probabilities: Tensor, labels: Tensor) -> float:
    """-log of the probability of the true class, averaged within each class, then over classes; at most 13.8."""
    lost = -probabilities.gather(1, labels[:, None])[:, 0].clamp_min(LEAST).log()
    return float(torch.stack([lost[labels == c].mean() for c in labels.unique()]).mean())


def choose(candidates: Sequence[M], known: Tensor, labels: Tensor, classes: int) -> tuple[M, float]:
    """The candidate of least `class_mean_loss` under `leave_one_out`, the first of equals, and its loss.

    Candidates that refuse these samples (more neighbours than there are) are passed over. Raises BadCall if all do, or
    if there are none.
    """
    if not candidates:
        raise BadCall("there is no candidate to choose from; give one or more")
    best: tuple[M, float] | None = None
    refused: BadCall | None = None
    for candidate in candidates:
        try:
            loss = class_mean_loss(leave_one_out(candidate, known, labels, classes), labels)
        except BadCall as reason:
            refused = reason
            continue
        if best is None or loss < best[1]:
            best = (candidate, loss)
    if best is None:
        raise BadCall(f"none of {len(candidates)} candidates takes these {len(known)} known samples: {refused}")
    return best
