"""A frozen linear layer with a low-rank term, and DoRA's gain.

y = x W^T + b + s (x A^T) B^T                          LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1
y = x W^T + b + (c - 1) (x W^T) + c s (x A^T) B^T      DoRA: Liu et al. 2024, arXiv:2402.09353, section 4
c = g |W| / |W + s B A|   row by row, the norm held constant in the gradient (section 4.3)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(..., K) -> (..., N) with weight (N, K), bias (N,), a (R, K), b (N, R). The low-rank term is accumulated into the product.

    Computed in x's dtype. Gradients flow to x, a and b, and to weight only where it asks for them.
    """
    y = functional.linear(x, weight, bias)
    u = functional.linear(x, a.to(x.dtype))
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), b.to(x.dtype).t(), alpha=scale)
    return flat.view(y.shape)


def dora_gain(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """c of the equations on top, shape (N,), without an (N, K) temporary.

        |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 rowsum((B A A^T) * B)

    `magnitude` g is relative: 1 for a fresh adapter, for which the gain is exactly 1.
    """
    with torch.no_grad():
        w, a, b = weight.float(), a.float(), b.float()
        own = w.square().sum(1)
        cross = (b * (w @ a.t())).sum(1)
        low_rank = ((b @ (a @ a.t())) * b).sum(1)
        ratio = own.sqrt() / (own + 2 * scale * cross + scale**2 * low_rank).clamp_min(1e-24).sqrt()
    return magnitude * ratio.to(magnitude.dtype)
