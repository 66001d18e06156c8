"""A frozen linear layer with a low-rank term.

    y = x W^T + b + s (x A^T) B^T
    dx = dy W + s (dy B) A,    dA = s (dy B)^T x,    dB = s dy^T (x A^T)        no gradient of W is formed

Three arrangements of the same function, with u = x A^T; M rows, K columns in, N out, rank R:
  merged    x (W + s B A)^T + b    forward, float32 and float64, where there are so many rows that a pass over W is cheaper than one over y
  begun     y = s u B^T + b, then y += x W^T: the library adds the large product to it as it would to b
  joined    [x | s u] [W | B]^T + b: one library product on K + R columns, behind the Triton kernel of `shrink`

In half precision W + s B A is never formed: rounding it would lose the adapter.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .door import Path, door
from .operators import operator
from .shrink import LARGEST, beside, half_only, shrink
from .skinny import grad_b, grad_shrunk, shrunk, thin


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`lora_linear` by its equation: the definition. It has a gradient for every input, the frozen ones included."""
    low_rank = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight, bias) + scale * low_rank


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(..., K) -> (..., N) with weight (N, K), bias (N,), a (R, K), b (N, R); computed in x's dtype, or in autocast's.

    Gradients flow to x, a and b. Where weight or bias want one too, and in an exported graph, the definition is used.
    """
    x, weight, bias = operands(x, weight, bias)
    if thawed(weight, bias) or torch.compiler.is_exporting():
        return lora_linear_reference(x, weight, bias, a, b, scale)
    y = lora_forward(flat(x), weight, bias, a.to(x.dtype), b.to(x.dtype), scale)
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_path(x: Tensor, weight: Tensor, rank: int) -> Path:
    """Whether the joined arrangement is taken for x (..., K) at this weight (N, K), and why."""
    n, k = weight.shape
    rows = x.numel() // k
    if rank > LARGEST:
        return door(x, f"{rank} low-rank columns; the kernel holds {LARGEST} at most")
    # Joined: W is copied beside B (2 N K numbers) and x beside u (2 M K). Added: y is read and written (2 M N), x read (M K).
    if rows * (2 * n - k) <= 2 * n * k:
        return door(x, f"{rows} rows of {k} -> {n}: copying the weight beside the factor costs more than it saves")
    return door(x, half_only(x))


# What every form of low-rank adapter does on rows (M, K). x, W, A and B are left as they are.


def operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of the frozen product in the dtype in which `functional.linear` would take them."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def thawed(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the frozen layer is in training after all."""
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def flat(x: Tensor) -> Tensor:
    """(..., K) as (M, K)."""
    return x.reshape(-1, x.shape[-1])


def merging_pays(rows: int, weight: Tensor) -> bool:
    """Whether a pass over W is cheaper than the passes over x and y that it saves. Half precision is never merged.

    Measured on two cores with AVX-512: much the same at 800 rows of 768 -> 2304; merged is ahead at 1,200, and at 1,024 of 768 -> 768.
    """
    n, k = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and rows * (k + 2 * n) > 3 * n * k


def changed(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (M, N), merged or begun."""
    if merging_pays(len(x), weight):
        return functional.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
    return begun(shrunk(x, a), b, scale, bias).addmm_(x, weight.t())


def begun(u: Tensor, b: Tensor, scale: float, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """s u B^T + b, (M, N), which the large product is added to; written into `out` where given."""
    if bias is None:
        return torch.mm(u, (b * scale).t(), out=out)
    return torch.addmm(bias, u, b.t(), alpha=scale, out=out)


def given(like: Tensor, dx: Tensor | None, da: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors: what was not wanted is an empty one."""

    def one(t: Tensor | None) -> Tensor:
        return like.new_empty(0) if t is None else t

    return one(dx), one(da), one(db)


# The operator


@operator("lora_linear")
def lora_forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(M, K) -> (M, N)"""
    if lora_path(x, weight, len(a)).fused:
        return functional.linear(shrink(x, a, scale), beside(weight, b), bias)
    return changed(x, weight, bias, a, b, scale)


@lora_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("lora_linear_backward")
def lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), dA (R, K), dB (N, R); those not wanted are empty."""
    dy = dy.contiguous()
    dx = da = db = None
    fused = wanted[0] and lora_path(x, weight, len(a)).fused
    if fused:
        dx, du, _ = (dy @ beside(weight, b * scale)).tensor_split((x.shape[1], x.shape[1] + len(a)), 1)
        dx = torch.addmm(dx, du, a)
        du = du.t()
    else:
        du = grad_shrunk(dy, b * scale)
    if wanted[1]:
        da = thin(du, x)
    if wanted[2]:
        db = grad_b(dy, x, a * scale).t()
    if wanted[0] and not fused:  # behind the others, which read dy too and leave it in the cache
        dx = torch.mm(du.t(), a).addmm_(dy, weight)
    return given(x, dx, da, db)


@lora_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db = x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape[::-1]).t()
    return given(x, dx if wanted[0] else None, da if wanted[1] else None, db if wanted[2] else None)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, a, b, ctx.scale = inputs
    ctx.save_for_backward(x, weight, a, b)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    found = lora_backward(dy, *ctx.saved_tensors, ctx.scale, wanted)
    dx, da, db = (t if w else None for t, w in zip(found, wanted, strict=True))
    return dx, None, None, da, db, None


lora_forward.register_autograd(_gradients, setup_context=_keep)
