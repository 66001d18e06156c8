"""A two-layer bottleneck on a branch, with what it is added to.

    z = x Wd^T + bd,    y = r + s (f(z) Wu^T + bu)        f: GELU (by erf) or ReLU; r: x itself, another tensor, or nothing

    dz = s (dy Wu) f'(z),  dx = dz Wd (+ dy where r is x),  dr = dy,  dWu = s dy^T f(z),  dbu = s sum dy,  dWd = dz^T x,  dbd = sum dz

One kernel serves both ways: rows times a thin matrix, something at each number, times another thin matrix. It reads x (or dy) twice,
the second time out of the cache, and writes y (or dx) once; of what lies between, only z or dz (M, m) reaches memory. M rows of C
numbers, m in the middle.

Source: AdaptFormer, Chen et al. 2022 (arXiv:2205.13535) section 3.2; AViT, Du et al. 2023, section 2. Neither normalises in front of
the bottleneck, so no norm is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .door import Path, architecture, door, jit, launch, tl, triton
from .lora_linear import flat
from .operators import operator
from .shrink import half_only

LARGEST = 256
"""Numbers in the middle that fit a program's registers."""
CONFIGS = {  # by architecture, then by the largest middle that an entry serves; chosen by compiling, not by measuring
    80: {
        64: {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        128: {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 2},
        256: {"BM": 32, "BK": 32, "num_warps": 8, "num_stages": 2},
    },
    90: {
        64: {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        256: {"BM": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
    },
}


def bottleneck_reference(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float = 1.0,
    relu: bool = False,
) -> Tensor:
    """`bottleneck` by its equation: the definition."""
    z = functional.linear(x, down.to(x.dtype), down_bias.to(x.dtype))
    y = scale * functional.linear(_f(z, relu), up.to(x.dtype), up_bias.to(x.dtype))
    return y if residual is None else residual + y


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float = 1.0,
    relu: bool = False,
) -> Tensor:
    """x (..., C), residual (..., C) or None -> (..., C), in x's dtype; down (m, C), up (C, m), biases (m,) and (C,).

    Gradients flow to every tensor. Under autocast, and in an exported graph, the definition is used.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_exporting():
        return bottleneck_reference(x, residual, down, down_bias, up, up_bias, scale, relu)
    other = None if residual is None or residual is x else flat(residual)
    tensors = (t.to(x.dtype) for t in (down, down_bias, up, up_bias))
    y, _ = _forward(flat(x), other, *tensors, scale, relu, residual is x)
    return y.view(x.shape)


def bottleneck_path(x: Tensor, middle: int) -> Path:
    """Whether the kernel is taken for x (..., C) with m = `middle`, and why."""
    if middle > LARGEST:
        return door(x, f"{middle} in the middle; the kernel holds {LARGEST} at most")
    return door(x, half_only(x))


def _f(z: Tensor, relu: bool) -> Tensor:
    return functional.relu(z) if relu else functional.gelu(z)


# The kernel


@jit
def thin_pair_kernel(
    x_ptr,
    first_ptr,
    first_bias_ptr,
    z_ptr,
    middle_ptr,
    second_ptr,
    second_bias_ptr,
    residual_ptr,
    out_ptr,
    scale,
    M,
    C,
    R,
    FIRST_R,
    FIRST_C,
    SECOND_R,
    SECOND_C,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Forward: middle = z = x Wd^T + bd, out = [r +] s (f(z) Wu^T + bu). Backward, x being dy: middle = dz, out = [dy +] dz Wd.

    The two matrices are (R, C) by their strides. Rows of x, r and out are C apart, those of z and middle R.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    rows = m[:, None] < M
    held = m[:, None] * R + r[None]
    inside = rows & (r[None] < R)
    acc = tl.zeros((BM, BR), ACC)
    for start in range(0, C, BK):
        c = start + k
        x = tl.load(x_ptr + m[:, None] * C + c[None], mask=rows & (c[None] < C), other=0.0)
        w = tl.load(
            first_ptr + r[None] * FIRST_R + c[:, None] * FIRST_C, mask=(r[None] < R) & (c[:, None] < C), other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
    if BACKWARD:
        z = tl.load(z_ptr + held, mask=inside, other=0.0).to(ACC)
        if RELU:
            slope = tl.where(z > 0, 1.0, 0.0)
        else:
            slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        passed = acc * slope * scale
        tl.store(middle_ptr + held, passed, mask=inside)
    else:
        z = acc + tl.load(first_bias_ptr + r, mask=r < R, other=0.0)[None].to(ACC)
        tl.store(middle_ptr + held, z, mask=inside)
        if RELU:
            passed = tl.maximum(z, 0.0)
        else:
            passed = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    passed = passed.to(x_ptr.dtype.element_ty)
    for start in range(0, C, BK):
        c = start + k
        at = m[:, None] * C + c[None]
        within = rows & (c[None] < C)
        w = tl.load(
            second_ptr + r[:, None] * SECOND_R + c[None] * SECOND_C, mask=(r[:, None] < R) & (c[None] < C), other=0.0
        )
        y = tl.dot(passed, w, input_precision="ieee", out_dtype=ACC)
        if not BACKWARD:
            y = scale * (y + tl.load(second_bias_ptr + c, mask=c < C, other=0.0)[None].to(ACC))
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask=within, other=0.0).to(ACC)
        tl.store(out_ptr + at, y, mask=within)


def _config(x: Tensor, middle: int) -> dict[str, int]:
    table = CONFIGS[architecture(x)]
    return table[min(size for size in table if size >= middle)]


def _run(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    residual: Tensor | None,
    scale: float,
    relu: bool,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (M, C) and middle (M, m) of `thin_pair_kernel`; backward where z is given. `first` and `second` are (m, C) views."""
    (m, c), r = x.shape, len(first)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, middle = torch.empty_like(x), x.new_empty(m, r)
    config = _config(x, r)
    if m:
        launch(
            thin_pair_kernel,
            (triton.cdiv(m, config["BM"]),),
            x,
            first,
            x if first_bias is None else first_bias,
            x if z is None else z,
            middle,
            second,
            x if second_bias is None else second_bias,
            x if residual is None else residual,
            out,
            scale,
            m,
            c,
            r,
            *first.stride(),
            *second.stride(),
            BACKWARD=z is not None,
            RELU=relu,
            RESIDUAL=residual is not None,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BR=max(16, triton.next_power_of_2(r)),
            **config,
        )
    return out, middle


# The operator


@operator("bottleneck")
def _forward(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor]:
    """y (M, C) and z (M, m); with `onto_x` the residual is x."""
    r = x if onto_x else residual
    if bottleneck_path(x, len(down)).fused:
        return _run(
            x, down, up.t(), r, scale, relu, first_bias=down_bias.contiguous(), second_bias=up_bias.contiguous()
        )
    z = functional.linear(x, down, down_bias)
    y = functional.linear(_f(z, relu), up, up_bias)
    return (y.mul_(scale) if r is None else torch.add(r, y, alpha=scale)), z


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], down.shape[0])


@operator("bottleneck_backward")
def _backward(
    dy: Tensor, z: Tensor, down: Tensor, up: Tensor, scale: float, relu: bool, onto_x: bool
) -> tuple[Tensor, Tensor]:
    """dx (M, C) and dz (M, m)."""
    if bottleneck_path(dy, len(down)).fused:
        return _run(dy, up.t(), down, dy if onto_x else None, scale, relu, z=z)
    df = (dy @ up).mul_(scale)
    dz = torch.ops.aten.threshold_backward(df, z, 0) if relu else torch.ops.aten.gelu_backward(df, z)
    return (torch.addmm(dy, dz, down) if onto_x else dz @ down), dz


@_backward.register_fake
def _(dy: Tensor, z: Tensor, down: Tensor, up: Tensor, scale: float, relu: bool, onto_x: bool) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), z.new_empty(z.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, down, _, up, _, ctx.scale, ctx.relu, ctx.onto_x = inputs
    ctx.save_for_backward(x, output[1], down, up)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, z, down, up = ctx.saved_tensors
    dx, dz = _backward(dy, z, down, up, ctx.scale, ctx.relu, ctx.onto_x)
    d_up = ctx.scale * (dy.t() @ _f(z, ctx.relu))
    other = dy if ctx.needs_input_grad[1] else None
    return dx, other, dz.t() @ x, dz.sum(0), d_up, ctx.scale * dy.sum(0), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
