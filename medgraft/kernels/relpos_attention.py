"""Attention with decomposed relative positions, over a grid of tokens or over windows of it, as in SAM's blocks.

    S_ij = q_i . k_j / sqrt(D) + rh[y_j, i] + rw[x_j, i],    P = softmax_j S,    O = P V,    L_i = log sum_j exp S_ij
    rh[y, i] = q_i . Rh[y_i - y + h - 1],    rw[x, i] = q_i . Rw[x_i - x + w - 1]            (q without the scale)

Backward, with d_i = dO_i . O_i:

    dP = dO V^T,    dS = P * (dP - d),    dV = P^T dO,    dK = dS^T Q / sqrt(D),    dQ = dS K / sqrt(D)
    drh[y, i] = sum over the keys j of row y of dS_ij,    drw[x, i] = sum over the keys j of column x of dS_ij

so gradients of the positions are sums within a tile: no atomics, and nothing of N x N is kept, either way. What rh and rw owe to q
and to the tables is left to autograd. Both are stored with the query last: (B, H, h, N) and (B, H, w, N).

B images, H heads, N tokens of a grid in row-major order, D channels a head; token i stands at (y_i, x_i) of its window of h x w tokens,
which is the whole grid for a global block. Windows start at the first token. Where the last ones reach beyond the grid, the tokens
outside are attended to, with one k and v for all of them, as in the published code (which pads after the norm, so that theirs are what
the projection makes of zero); they ask nothing themselves.

Source: Li et al. 2022, MViTv2 (arXiv:2112.01526), section 4.1; Kirillov et al. 2023, Segment Anything (arXiv:2304.02643), appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadCall
from .door import INTERPRETED, Path, architecture, door, launch, tl, triton
from .operators import operator
from .relpos_plain import Frame, direct, empty_like_heads, empty_outputs, plain_backward, plain_forward
from .relpos_tiles import backward_keys_kernel, backward_queries_kernel, forward_kernel

HEAD_DIMS = (16, 32, 64, 80)
WIDEST_ROW = 64
FEW = 2**20
"""Up to so many scores on a CPU, all heads and windows together, torch's own attention is quicker than the operator (1.3x)."""

# Queries a tile, warps and stages by (architecture, whether D > 64): what compiles without a spill, not what a clock chose.
Tiles = dict[tuple[int, bool], dict[str, int]]
FORWARD: Tiles = {
    (80, False): {"BM": 128, "num_warps": 8, "num_stages": 3},
    (80, True): {"BM": 64, "num_warps": 8, "num_stages": 2},
    (90, False): {"BM": 128, "num_warps": 8, "num_stages": 3},
    (90, True): {"BM": 128, "num_warps": 8, "num_stages": 3},
}
QUERIES: Tiles = {
    (80, False): {"BM": 32, "num_warps": 4, "num_stages": 2},
    (80, True): {"BM": 32, "num_warps": 8, "num_stages": 2},
    (90, False): {"BM": 64, "num_warps": 4, "num_stages": 2},
    (90, True): {"BM": 64, "num_warps": 8, "num_stages": 2},
}
KEYS: Tiles = {
    (80, False): {"BM": 32, "num_warps": 4, "num_stages": 2},
    (80, True): {"BM": 32, "num_warps": 4, "num_stages": 2},
    (90, False): {"BM": 64, "num_warps": 4, "num_stages": 2},
    (90, True): {"BM": 64, "num_warps": 8, "num_stages": 2},
}
KEYS_IN_SHORT_ROWS: Tiles = {  # of at most 16 tokens, as in windows of 14
    (80, False): {"BM": 32, "num_warps": 4, "num_stages": 2},
    (80, True): {"BM": 16, "num_warps": 4, "num_stages": 2},
    (90, False): {"BM": 64, "num_warps": 4, "num_stages": 2},
    (90, True): {"BM": 16, "num_warps": 4, "num_stages": 2},
}


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None = None,
    outside: Tensor | None = None,
) -> Tensor:
    """The O of the equations, (B, H, N, D), in memory (B, N, H, D), so that its heads join without a copy.

    q, k, v : (B, H, N, D), of one floating dtype, under autocast of any: they are cast. Any strides.
    table_h : (2 h - 1, D), table_w : (2 w - 1, D). Tables of another length are resized linearly, as in transformers.
    grid    : the tokens down and across, their product N.
    window  : (h, w); None for the whole grid.
    outside : (B, H, 2, D), k and v of the tokens outside the grid. Wanted where a window reaches beyond it, else not looked at.

    Sums are float32 or wider; the positions' terms are rounded to q's dtype. Gradients flow to all, once. Raises BadCall for sizes
    that do not agree.
    """
    frame = Frame(grid, window or grid)
    _check(q, k, v, table_h, table_w, outside, frame)
    q, k, v = (_in_autocast(t) for t in (q, k, v))
    given = outside.to(q.dtype) if outside is not None and frame.ragged else None
    rh, rw = position_terms(q, table_h, table_w, frame)
    if torch.compiler.is_exporting() or _few(q, frame):
        return direct(q, k, v, rh, rw, given, frame)
    return _attention(q, k, v, rh, rw, given, *frame)[0]


def relpos_path(q: Tensor, grid: tuple[int, int], window: tuple[int, int] | None = None) -> Path:
    """Whether `relpos_attention` is fused for queries like `q`, and why."""
    return door(q, _unfit(q, (window or grid)[1]))


def position_terms(q: Tensor, table_h: Tensor, table_w: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """rh (B, H, h, N) and rw (B, H, w, N) of the equations, in q's dtype."""
    by_row, by_column = (
        resized_table(table, side).to(q.dtype)[relative_index(tokens, side, q.device)]
        for table, tokens, side in zip((table_h, table_w), *frame, strict=True)
    )
    q = q.unflatten(2, frame.grid)
    rh = torch.einsum("bnyxd,ykd->bnkyx", q, by_row)
    rw = torch.einsum("bnyxd,xkd->bnkyx", q, by_column)
    return rh.flatten(-2).contiguous(), rw.flatten(-2).contiguous()


def relative_index(tokens: int, side: int, device: torch.device) -> Tensor:
    """(tokens, side): the table's row for a query at the first index, in windows of `side`, and a key of its window at the second."""
    at = torch.arange(tokens, device=device) % side
    return at[:, None] - torch.arange(side, device=device) + side - 1


def resized_table(table: Tensor, side: int) -> Tensor:
    """A table (L, D) for a window of `side`: (2 side - 1, D), linearly interpolated where it is of another."""
    if table.shape[0] == 2 * side - 1:
        return table
    wide = table.t()[None].to(torch.promote_types(table.dtype, torch.float32))
    return functional.interpolate(wide, 2 * side - 1, mode="linear")[0].t().to(table.dtype)


def _in_autocast(t: Tensor) -> Tensor:
    """`t` in the dtype that autocast asks for, where it is on."""
    kind = t.device.type
    on = torch.is_autocast_enabled(kind) and t.dtype != torch.float64
    return t.to(torch.get_autocast_dtype(kind)) if on else t


def _check(
    q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor, outside: Tensor | None, frame: Frame
) -> None:
    gy, gx = frame.grid
    if q.ndim != 4 or q.shape[2] != gy * gx or not q.shape == k.shape == v.shape:
        raise BadCall(
            f"relpos_attention wants q, k and v (B, heads, {gy} * {gx}, D) alike, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if min(frame.window) < 1:
        raise BadCall(f"a window of {frame.window} has no tokens; give (rows, columns), or None for the whole grid")
    b, heads, _, d = q.shape
    for name, table in (("table_h", table_h), ("table_w", table_w)):
        if table.ndim != 2 or table.shape[1] != d:
            raise BadCall(f"{name} is {tuple(table.shape)}; it must be (2 * side - 1, {d}), as wide as a head")
    if frame.ragged and (outside is None or outside.shape != (b, heads, 2, d)):
        found = "nothing" if outside is None else f"{tuple(outside.shape)}"
        raise BadCall(
            f"windows of {frame.window} reach beyond a grid of {frame.grid}: pass outside={(b, heads, 2, d)}, the k and v of the tokens "
            f"there, which are what the projection makes of zero; got {found}"
        )


def _few(q: Tensor, frame: Frame) -> bool:
    (h, w), (down, across) = frame.window, frame.many
    return q.is_cpu and not INTERPRETED and q.shape[0] * q.shape[1] * down * across * (h * w) ** 2 <= FEW


def _unfit(q: Tensor, w: int) -> str | None:
    d = q.shape[-1]
    if d not in HEAD_DIMS:
        return f"{d} channels a head, the kernels take {', '.join(map(str, HEAD_DIMS))}"
    if w > WIDEST_ROW:
        return f"rows of {w} tokens, the kernels take at most {WIDEST_ROW}"
    if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(q.dtype).removeprefix('torch.')}, the kernels are for half precision"
    if q.numel() == 0:
        return "an empty batch"
    return None


# Fused


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, outside: Tensor | None, frame: Frame
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(q)
    q, k, v = (_unit_stride(t) for t in (q, k, v))
    tile = FORWARD[architecture(q), q.shape[-1] > 64]
    given = q if outside is None else outside.contiguous()
    launch(
        forward_kernel,
        _programs(q, frame, tile["BM"]),
        *(q, k, v, rh, rw, given, out, lse),
        *_sizes(q, frame),
        *_strides(q, k, v, out),
        **_constants(q, lse, frame),
        **tile,
    )
    return out, lse


def _fused_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rh: Tensor,
    rw: Tensor,
    outside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    frame: Frame,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    g, q, k, v = (_unit_stride(t) for t in (g, q, k, v))
    dq, dk, dv = (empty_like_heads(q) for _ in range(3))
    drh, drw, delta = torch.empty_like(rh), torch.empty_like(rw), torch.empty_like(lse)
    b, heads, _, d = q.shape
    (h, w), (down, across) = frame.window, frame.many
    given, partial = q, q
    if outside is not None:
        given, partial = outside.contiguous(), lse.new_empty(b, heads, down * across, h, 2, d)
    shared = (*_sizes(q, frame), *_strides(q, k, v, g, out))
    constants, key = _constants(q, lse, frame), (architecture(q), d > 64)
    queries, keys = QUERIES[key], (KEYS if w > 16 else KEYS_IN_SHORT_ROWS)[key]
    of_queries = (q, k, v, rh, rw, given, out, g, lse, delta, dq, drh, drw, *shared)
    launch(backward_queries_kernel, _programs(q, frame, queries["BM"]), *of_queries, **constants, **queries)
    of_keys = (q, k, v, rh, rw, given, g, lse, delta, dk, dv, partial, *shared)
    launch(backward_keys_kernel, (h, b * heads, down * across), *of_keys, **constants, **keys)
    return dq, dk, dv, drh, drw, None if outside is None else partial.sum((2, 3)).to(outside.dtype)


def _programs(q: Tensor, frame: Frame, queries: int) -> tuple[int, int, int]:
    (h, w), (down, across) = frame.window, frame.many
    return triton.cdiv(h * w, queries), q.shape[0] * q.shape[1], down * across


def _sizes(q: Tensor, frame: Frame) -> tuple[float | int, ...]:
    return q.shape[-1] ** -0.5, q.shape[1], frame.window[0], *frame.grid


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _constants(q: Tensor, lse: Tensor, frame: Frame) -> dict[str, Any]:
    """A head as one or two powers of two, a row of keys as one tile, the accumulator's type."""
    d, w = q.shape[-1], frame.window[1]
    first = 1 << (d.bit_length() - 1)
    return {
        "D0": first,
        "D1": d - first,
        "W": w,
        "BN": max(16, triton.next_power_of_2(w)),
        "ACC": tl.float64 if lse.dtype == torch.float64 else tl.float32,
        "WHOLE": frame.whole,
        "OUTSIDE": frame.ragged,
        "enable_fp_fusion": True,
    }


def _unit_stride(t: Tensor) -> Tensor:
    """`t` itself where its channels are neighbours in memory, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


# Operators and gradient


def _frame(grid: Sequence[int], window: Sequence[int]) -> Frame:
    return Frame((grid[0], grid[1]), (window[0], window[1]))


@operator("relpos_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rh: Tensor,
    rw: Tensor,
    outside: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
) -> tuple[Tensor, Tensor]:
    forward = _fused_forward if door(q, _unfit(q, window[1])).fused else plain_forward
    return forward(q, k, v, rh, rw, outside, _frame(grid, window))


@operator("relpos_attention_backward")
def _attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rh: Tensor,
    rw: Tensor,
    outside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
) -> list[Tensor]:
    backward = _fused_backward if door(q, _unfit(q, window[1])).fused else plain_backward
    found = backward(g, q, k, v, rh, rw, outside, out, lse, _frame(grid, window))
    return [t for t in found if t is not None]


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q)


@_attention_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, outside: Tensor | None, *_: Any
) -> list[Tensor]:
    others = (rh, rw) if outside is None else (rh, rw, outside)
    return [*(empty_like_heads(q) for _ in range(3)), *(t.new_empty(t.shape) for t in others)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.grid, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _attention_backward(g, *ctx.saved_tensors, ctx.grid, ctx.window)
    return *found, *[None] * (8 - len(found))


_attention.register_autograd(_gradient, setup_context=_keep)
