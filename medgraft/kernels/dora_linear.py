"""A frozen linear layer with a low-rank term, its rows rescaled: DoRA.

    y = c (x W^T + s (x A^T) B^T) + b,    c = g |W| / |W + s B A|  row by row, the norm held constant in the gradient

With z = x W^T + b + s (x A^T) B^T, which is `lora_linear`, and c' = c - 1, which keeps its digits in half precision:

    y = c z + (1 - c) b = z + c' (z - b),    dc = sum_m dy (z - b),    all other gradients: those of `lora_linear` with c W and c B for W and B

Source: Liu et al. 2024 (arXiv:2402.09353), section 4; the constant norm is section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lora_linear import WIDE, flat, lora_backward, lora_forward, lora_linear_reference, operands, thawed
from .operators import operator


def dora_gain(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """c of the equation on top, shape (N,), without an (N, K) temporary where the weight is float32.

        |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 rowsum((B A A^T) * B)

    `magnitude` g is relative: 1 for a fresh adapter, for which the gain is exactly 1.
    """
    with torch.no_grad():
        w, a, b = weight.float(), a.float(), b.float()
        own = torch.linalg.vector_norm(w, dim=1).square()
        cross = (b * (w @ a.t())).sum(1)
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
    y, _ = _forward(flat(x), weight, bias, a.to(x.dtype), b.to(x.dtype), scale, gain)
    return y.view(*x.shape[:-1], y.shape[-1])


# The operator


@operator("dora_linear")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """y and z, (M, N) each."""
    with torch.autocast(x.device.type, enabled=False):
        z = lora_forward.plain(x, weight, bias, a, b, scale)
        shift = torch.zeros_like(gain) if bias is None else (1 - gain) * bias
        if z.dtype in WIDE:
            return torch.addcmul(shift.to(z.dtype), z, gain.to(z.dtype)), z
        return torch.addcmul(z, z, (gain - 1).to(z.dtype)).add_(shift.to(z.dtype)), z


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, ctx.scale, gain = inputs
    ctx.save_for_backward(x, weight, bias, a, b, gain, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for z, which has no gradient


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, bias, a, b, gain, z = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    c = gain[:, None].to(weight.dtype)
    found = lora_backward(dy, x, weight * c, a, b * c, ctx.scale, wanted)
    dx, da, db = (t if w else None for t, w in zip(found, wanted, strict=True))
    dgain = None
    if ctx.needs_input_grad[6]:
        dgain = (dy * z).sum(0, dtype=gain.dtype)
        if bias is not None:
            dgain = dgain - bias.to(gain.dtype) * dy.sum(0, dtype=gain.dtype)
    return dx, None, None, da, None if db is None else db * c, None, dgain


_forward.register_autograd(_gradients, setup_context=_keep)
