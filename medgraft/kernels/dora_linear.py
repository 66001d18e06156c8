"""A frozen linear layer with a low-rank term, its rows rescaled: DoRA.

    y = c (x W^T + s (x A^T) B^T) + b,    c = g |W| / |W + s B A|  row by row, the norm held constant in the gradient

With z = x W^T + b + s (x A^T) B^T, which is `lora_linear`, and c' = c - 1, which keeps its digits in half precision:

    y = c z + (1 - c) b = z + c' (z - b),    dc = sum_m dy (z - b),    all other gradients: those of `lora_linear` with c W and c B for W and B

z is kept for dc. Where c wants no gradient, and W has fewer rows to go through than y and digits to spare, y is `lora_linear` with c W and c B too.

Source: Liu et al. 2024 (arXiv:2402.09353), section 4; the constant norm is section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lora_linear import flat, lora_backward, lora_forward, lora_linear_reference, operands, thawed
from .operators import operator
from .skinny import thin

WIDE = (torch.float32, torch.float64)
BLOCK = 64
"""Rows of the sum for the gain's gradient that are gone through at a time: what is in between stays in the cache of a CPU."""


def dora_gain(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """c of the equation on top, shape (N,), without an (N, K) temporary where the weight is float32.

        |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 rowsum((B A A^T) * B)

    `magnitude` g is relative: 1 for a fresh adapter, for which the gain is exactly 1.
    """
    with torch.no_grad():
        w, a, b = weight.float(), a.float(), b.float()
        own = torch.linalg.vector_norm(w, dim=1).square()
        cross = (b * thin(a, w.t()).t()).sum(1)
        low_rank = ((b @ (a @ a.t())) * b).sum(1)
        ratio = own.sqrt() / (own + 2 * scale * cross + scale**2 * low_rank).clamp_min(1e-24).sqrt()
    return magnitude * ratio.to(magnitude.dtype)


def dora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> Tensor:
    """`dora_linear` by its equation: the definition. It has a gradient for every input."""
    z = lora_linear_reference(x, weight, bias, a, b, scale)
    return z + (gain - 1).to(z.dtype) * (z if bias is None else z - bias)


def dora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> Tensor:
    """(..., K) -> (..., N) as `lora_linear`, with gain c (N,) in its own precision.

    Gradients flow to x, a, b and gain. Where weight or bias want one too, and in an exported graph, the definition is used.
    """
    x, weight, bias = operands(x, weight, bias)
    if thawed(weight, bias) or torch.compiler.is_exporting():
        return dora_linear_reference(x, weight, bias, a, b, scale, gain)
    keep = torch.is_grad_enabled() and gain.requires_grad
    y, _ = _forward(flat(x), weight, bias, a.to(x.dtype), b.to(x.dtype), scale, gain, keep)
    return y.view(*x.shape[:-1], y.shape[-1])


# The operator


@operator("dora_linear")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """y (M, N), and z (M, N) if it is to be kept, else an empty one."""
    wide = x.dtype in WIDE
    c = (gain if wide else gain - 1).to(x.dtype)
    if wide and not keep and len(x) > x.shape[1]:
        y = lora_forward.plain(x, weight * c[:, None], bias, a, b * c[:, None], scale)
        return y, y.new_empty(0)
    z = lora_forward.plain(x, weight, bias, a, b, scale)
    out = None if keep else z
    shift = torch.zeros_like(c) if bias is None else ((1 - gain) * bias).to(x.dtype)
    y = torch.addcmul(shift, z, c, out=out) if wide else torch.addcmul(z, z, c, out=out).add_(shift)
    return y, z if keep else z.new_empty(0)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@operator("dora_linear_gain")
def _gain_grad(dy: Tensor, z: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """dc (N,) in the dtype of `like`, of dy and z (M, N); sums in float32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if dy.is_cuda:
        found = (dy * z).sum(0, dtype=wide)
        return (found if bias is None else found - bias.to(wide) * dy.sum(0, dtype=wide)).to(like.dtype)
    sums = like.new_zeros(BLOCK, dy.shape[1], dtype=wide)
    shift = sums.new_zeros(()) if bias is None else bias.to(wide)
    for rows, zs in zip(dy.split(BLOCK), z.split(BLOCK), strict=True):
        sums[: len(rows)].addcmul_(rows.to(wide), zs - shift)
    return sums.sum(0).to(like.dtype)


@_gain_grad.register_fake
def _(dy: Tensor, z: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(dy.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, ctx.scale, gain, _ = inputs
    ctx.save_for_backward(x, weight, bias, a, b, gain, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for z, which has no gradient


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, weight, bias, a, b, gain, z = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    c = gain[:, None].to(weight.dtype)
    found = lora_backward(dy, x, weight * c, a, b * c, ctx.scale, wanted)
    dx, da, db = (t if w else None for t, w in zip(found, wanted, strict=True))
    dgain = _gain_grad(dy, z, bias, gain) if ctx.needs_input_grad[6] else None
    return dx, None, None, da, None if db is None else db * c, None, dgain, None


_forward.register_autograd(_gradients, setup_context=_keep)
