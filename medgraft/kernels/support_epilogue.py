"""What follows the support's convolutions in a cross block, in one pass: activation, pooling and the sum over the support.

    v_i = f(t_i + q),    p_i = the largest of every 2 x 2 pixels of v_i,    m = sum_i v_i        f = LeakyReLU(0.01)

    da_i = dv_i + dm + (dp_i where v_i is the largest, shared where several are),    dt_i = da_i f'(v_i),    dq = sum_i dt_i

Shapes: t, v (..., S, C, H, W), q, m (..., C, H, W), p (..., S, C, H/2, W/2); m is float32 or wider. No atomics: a program owns its
pixels and goes through the support.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .door import Path, door, jit, launch, tl, triton
from .operators import operator

SLOPE = 0.01
CONFIG = {"BLOCK": 256, "num_warps": 4, "num_stages": 2}
"""For every architecture; chosen by compiling, not by measuring. With pooling a program holds four pixels for each of BLOCK."""


class Mixed(NamedTuple):
    """One chunk of the support behind a block: its maps, the maps max-pooled by 2 (or None), and the sum of the maps over it."""

    maps: Tensor
    pooled: Tensor | None
    total: Tensor


def support_epilogue(t: Tensor, q: Tensor, *, pool: bool, fresh: bool) -> Mixed:
    """v'_i = f(t_i + q), pooled where asked, and their sum over the chunk.

    In plain torch (the definition) a `fresh` t, which nobody reads again, is written over.
    """
    if epilogue_path(t, q, pool).fused:
        lead = t.shape[:-4]
        maps, pooled, total = _forward(_five(t), q.reshape(-1, *q.shape[-3:]), pool)
        return Mixed(maps.view_as(t), pooled.view(*lead, *pooled.shape[1:]) if pool else None, total.view_as(q))
    q = q.unsqueeze(-4)
    in_place = fresh and t.shape == torch.broadcast_shapes(t.shape, q.shape) and t.dtype == q.dtype
    maps = functional.leaky_relu_(t.add_(q) if in_place else t + q, SLOPE)
    return Mixed(maps, pool2(maps) if pool else None, support_sum(maps))


def epilogue_path(t: Tensor, q: Tensor, pool: bool) -> Path:
    """Whether the kernel is taken, and why."""
    if t.shape[:-4] != q.shape[:-3]:
        return door(t, "one support for several queries is not copied for them")
    if t.dtype != q.dtype:
        return door(t, "the two terms are of two dtypes")
    return door(t, "an odd side cannot be pooled" if pool and (t.shape[-1] % 2 or t.shape[-2] % 2) else None)


def pool2(maps: Tensor) -> Tensor:
    """The largest of every 2 x 2 pixels; sides are even. Rows first: on a CPU several times as fast as max_pool2d."""
    rows = torch.maximum(maps[..., ::2, :], maps[..., 1::2, :])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def support_sum(maps: Tensor) -> Tensor:
    """The sum over S, in float32 or wider."""
    return maps.sum(-4, dtype=_wide(maps))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _five(t: Tensor) -> Tensor:
    """(..., S, C, H, W) as (L, S, C, H, W)."""
    return t.reshape(-1, *t.shape[-4:])


# The kernels


@jit
def _activated(t_ptr, at, q, inside, ACC: tl.constexpr, SLOPE: tl.constexpr):
    """f(t + q)."""
    a = tl.load(t_ptr + at, mask=inside, other=0.0).to(ACC) + q
    return tl.where(a > 0, a, SLOPE * a)


@jit
def forward_kernel(
    t_ptr,
    q_ptr,
    maps_ptr,
    pooled_ptr,
    total_ptr,
    S,
    PLANES,
    H,
    W,
    POOL: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one (C, H, W), or as many pooled ones with their four each, through all S maps. PLANES is C."""
    chosen = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lead = tl.program_id(1).to(tl.int64)
    numbers = PLANES * H * W
    if POOL:
        inside = chosen < PLANES * (H // 2) * (W // 2)
        row = chosen // (W // 2)  # counted through all planes: H is even
        one = 2 * row * W + 2 * (chosen % (W // 2))
        two, three, four = one + 1, one + W, one + W + 1
        q1 = tl.load(q_ptr + lead * numbers + one, mask=inside, other=0.0).to(ACC)
        q2 = tl.load(q_ptr + lead * numbers + two, mask=inside, other=0.0).to(ACC)
        q3 = tl.load(q_ptr + lead * numbers + three, mask=inside, other=0.0).to(ACC)
        q4 = tl.load(q_ptr + lead * numbers + four, mask=inside, other=0.0).to(ACC)
        m1 = tl.zeros((BLOCK,), ACC)
        m2 = tl.zeros((BLOCK,), ACC)
        m3 = tl.zeros((BLOCK,), ACC)
        m4 = tl.zeros((BLOCK,), ACC)
        for s in range(S):
            base = (lead * S + s) * numbers
            a1 = _activated(t_ptr, base + one, q1, inside, ACC, SLOPE)
            a2 = _activated(t_ptr, base + two, q2, inside, ACC, SLOPE)
            a3 = _activated(t_ptr, base + three, q3, inside, ACC, SLOPE)
            a4 = _activated(t_ptr, base + four, q4, inside, ACC, SLOPE)
            tl.store(maps_ptr + base + one, a1, mask=inside)
            tl.store(maps_ptr + base + two, a2, mask=inside)
            tl.store(maps_ptr + base + three, a3, mask=inside)
            tl.store(maps_ptr + base + four, a4, mask=inside)
            largest = tl.maximum(tl.maximum(a1, a3), tl.maximum(a2, a4))
            tl.store(pooled_ptr + base // 4 + chosen, largest, mask=inside)
            m1 += a1
            m2 += a2
            m3 += a3
            m4 += a4
        tl.store(total_ptr + lead * numbers + one, m1, mask=inside)
        tl.store(total_ptr + lead * numbers + two, m2, mask=inside)
        tl.store(total_ptr + lead * numbers + three, m3, mask=inside)
        tl.store(total_ptr + lead * numbers + four, m4, mask=inside)
    else:
        inside = chosen < numbers
        q = tl.load(q_ptr + lead * numbers + chosen, mask=inside, other=0.0).to(ACC)
        m = tl.zeros((BLOCK,), ACC)
        for s in range(S):
            at = (lead * S + s) * numbers + chosen
            a = _activated(t_ptr, at, q, inside, ACC, SLOPE)
            tl.store(maps_ptr + at, a, mask=inside)
            m += a
        tl.store(total_ptr + lead * numbers + chosen, m, mask=inside)


@jit
def backward_kernel(
    maps_ptr,
    dmaps_ptr,
    dpooled_ptr,
    dtotal_ptr,
    dt_ptr,
    dq_ptr,
    S,
    PLANES,
    H,
    W,
    POOL: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one (C, H, W) through all S maps. A pixel looks at the three beside it to know its share of the pooled one's."""
    chosen = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lead = tl.program_id(1).to(tl.int64)
    numbers = PLANES * H * W
    inside = chosen < numbers
    dtotal = tl.load(dtotal_ptr + lead * numbers + chosen, mask=inside, other=0.0).to(ACC)
    dq = tl.zeros((BLOCK,), ACC)
    if POOL:
        row, column = chosen // W, chosen % W
        below, right = W * (1 - 2 * (row % 2)), 1 - 2 * (column % 2)  # the way to the other row and to the other column
        small = (row // 2) * (W // 2) + column // 2
    for s in range(S):
        base = (lead * S + s) * numbers
        at = base + chosen
        a = tl.load(maps_ptr + at, mask=inside, other=0.0).to(ACC)
        da = dtotal + tl.load(dmaps_ptr + at, mask=inside, other=0.0).to(ACC)
        if POOL:
            under = tl.load(maps_ptr + at + below, mask=inside, other=0.0).to(ACC)
            beside = tl.load(maps_ptr + at + right, mask=inside, other=0.0).to(ACC)
            across = tl.load(maps_ptr + at + below + right, mask=inside, other=0.0).to(ACC)
            own, others = tl.maximum(a, under), tl.maximum(beside, across)
            share = tl.where(a > under, 1.0, tl.where(a == under, 0.5, 0.0))
            share *= tl.where(own > others, 1.0, tl.where(own == others, 0.5, 0.0))
            da += share * tl.load(dpooled_ptr + base // 4 + small, mask=inside, other=0.0).to(ACC)
        dt = tl.where(a > 0, da, SLOPE * da)
        tl.store(dt_ptr + at, dt, mask=inside)
        dq += dt
    tl.store(dq_ptr + lead * numbers + chosen, dq, mask=inside)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], shape: torch.Size, pool: bool, pixels: int) -> None:
    lead, s, c, h, w = shape
    if lead * pixels:
        acc = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
        grid = (triton.cdiv(pixels, CONFIG["BLOCK"]), lead)
        launch(kernel, grid, *tensors, s, c, h, w, POOL=pool, SLOPE=SLOPE, ACC=acc, **CONFIG)


def fused_forward(t: Tensor, q: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, pooled maps (empty where not asked) and their sum, by the kernel."""
    (lead, s, c, h, w), t = t.shape, t.contiguous()
    maps, total = torch.empty_like(t), t.new_empty(q.shape, dtype=_wide(t))
    pooled = t.new_empty((lead, s, c, h // 2, w // 2) if pool else (0,))
    pixels = c * h * w // (4 if pool else 1)
    _launch(forward_kernel, (t, q.contiguous(), maps, pooled, total), t.shape, pool, pixels)
    return maps, pooled, total


def fused_backward(maps: Tensor, dmaps: Tensor, dpooled: Tensor, dtotal: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """dt and dq, by the kernel."""
    given = tuple(g.contiguous() for g in (maps, dmaps, dpooled, dtotal))
    dt, dq = torch.empty_like(maps), maps.new_empty(dtotal.shape)
    _launch(backward_kernel, (*given, dt, dq), maps.shape, pool, dq[0].numel() if len(dq) else 0)
    return dt, dq


# The operator


@operator("support_epilogue")
def _forward(t: Tensor, q: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """t (L, S, C, H, W), q (L, C, H, W) -> maps, pooled maps (empty where not asked), their sum."""
    if epilogue_path(t, q, pool).fused:
        return fused_forward(t, q, pool)
    maps = functional.leaky_relu(t + q.unsqueeze(1), SLOPE)
    return maps, pool2(maps) if pool else maps.new_empty(0), support_sum(maps)


@_forward.register_fake
def _(t: Tensor, q: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    lead, s, c, h, w = t.shape
    pooled = t.new_empty((lead, s, c, h // 2, w // 2) if pool else (0,))
    return t.new_empty(t.shape), pooled, t.new_empty(q.shape, dtype=_wide(t))


@operator("support_epilogue_backward")
def _backward(maps: Tensor, dmaps: Tensor, dpooled: Tensor, dtotal: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """dt and dq."""
    if epilogue_path(maps, maps[:, 0], pool).fused:
        return fused_backward(maps, dmaps, dpooled, dtotal, pool)
    da = dmaps + dtotal.unsqueeze(1)
    if pool:
        upper, lower = maps[..., ::2, :], maps[..., 1::2, :]
        rows = torch.maximum(upper, lower)
        left = _share(rows[..., ::2], rows[..., 1::2]) * dpooled
        drows = torch.stack([left, dpooled - left], -1).flatten(-2)
        up = _share(upper, lower) * drows
        da = da + torch.stack([up, drows - up], -2).flatten(-3, -2)
    dt = torch.where(maps > 0, da, SLOPE * da).to(maps.dtype)
    return dt, dt.sum(1, dtype=dtotal.dtype).to(maps.dtype)


@_backward.register_fake
def _(maps: Tensor, dmaps: Tensor, dpooled: Tensor, dtotal: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    return maps.new_empty(maps.shape), maps.new_empty(dtotal.shape)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """What the gradient of max(a, b) gives to a: all, half where they are equal, or nothing."""
    return (a > b).to(a.dtype) + 0.5 * (a == b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.pool = inputs[2]
    ctx.save_for_backward(output[0])


def _gradients(ctx: Any, dmaps: Tensor, dpooled: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    dt, dq = _backward(*ctx.saved_tensors, dmaps, dpooled, dtotal, ctx.pool)
    return dt, dq, None


_forward.register_autograd(_gradients, setup_context=_keep)
