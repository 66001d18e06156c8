"""The mean and the spread of rows that are read tile by tile, each tile's about its own mean, so that a large mean does not cancel.

Source: Chan, Golub and LeVeque 1983, The American Statistician 37, for joining means and variances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .door import jit, tl


def wide(x: Tensor) -> torch.dtype:
    """The dtype of a row's mean and spread: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def native(x: Tensor) -> torch.dtype:
    """The dtype for torch's own LayerNorm, which on a CPU wants its statistics in that of x."""
    return x.dtype if x.is_cuda else wide(x)


@jit
def moments(x, inside, start, count, mean, spread):
    """The mean (BM,) and the sum of squares about it after `count` more columns x (BM, BK), zero where not `inside`, behind `start` others."""
    own = tl.sum(x, 1) / count
    gap = tl.where(inside, x - own[:, None], 0.0)
    shift = own - mean
    share = count / (start + count)
    return mean + shift * share, spread + tl.sum(gap * gap, 1) + shift * shift * share * start
