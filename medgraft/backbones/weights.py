"""Layers whose tensors are handed out instead of applied, for arithmetic that uses a weight in pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Weights(nn.Module):
    """A convolution's `weight` (out, in, k, k) and `bias` (out,).

    Calling it gives the two tensors. Behind a port that is where a part acts: it gives other tensors, the effective weights, and
    whatever the caller computes with them (a split product, a composition) is exact for the adapted layer.
    """

    def __init__(self, fan_in: int, fan_out: int, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in, size, size))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(weight, bias)."""
        return self.weight, self.bias
