"""Many low-rank adapters in one batch, one for each image.

    y_i = x_i W^T + b + s_k (x_i A_k^T) B_k^T      with k = ids[i], and no second term where ids[i] = -1

Four arrangements of the same function; M rows, K columns in, N out, sum of ranks R:
  by runs  y is begun by consecutive images with one adapter at a time: what one adapter for all would cost (CPU, long runs)
  gathered y is begun by two batched products of every image's own A_k and B_k (anywhere, any number of adapters)
  slots    [x | u] [W | B_1 | .. | B_n]^T + b: one library product on K + R columns, behind the Triton kernel of `shrink`
  expanded u as in gathered; u_i B_k^T is added by the Triton product of `linear_expand` on the way out (more columns than slots hold)

In the first two the library adds x W^T to y as to a bias, as in `lora_linear`. A change of adapters is a change of `ids`; which images have which costs nothing on the last three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadCall
from .door import Path
from .linear_expand import linear_expand, linear_expand_path
from .lora_linear import begun, flat, given, lora_path, operands, thawed
from .operators import operator
from .shrink import LARGEST, beside, shrink
from .skinny import grad_b, grad_shrunk, shrunk, thin

Factors = Sequence[tuple[Tensor, Tensor, float]]
"""One (A (R_k, K), B (N, R_k), s_k) a slot."""

LONG = 256
"""Rows of a run from which products of its own are cheaper than its share of a batched one, on two cores."""


def mixed_lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, ids: Tensor
) -> Tensor:
    """`mixed_lora_linear` image by image: the definition. It has a gradient for every input."""
    rows = _rows_an_image(x, ids)
    images = functional.linear(x, weight, bias).split(rows)
    out = []
    for y, own, k in zip(images, x.split(rows), ids.tolist(), strict=True):
        if k >= 0:
            a, b, scale = factors[k]
            y = y + scale * functional.linear(functional.linear(own, a.to(x.dtype)), b.to(x.dtype))
        out.append(y)
    return torch.cat(out)


def mixed_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, ids: Tensor) -> Tensor:
    """(B', ..., K) -> (B', ..., N), computed in x's dtype, or in autocast's.

    B' is a multiple of the number of images len(ids): an image's rows, such as its windows, are consecutive. Ranks may differ.
    ids (images,) int64 names each one's slot in `factors`, -1 none. Gradients flow to x and the factors; where weight or bias want one too, the definition
    is used. Raises BadCall for rows that cannot be shared out among the images.
    """
    _rows_an_image(x, ids)
    x, weight, bias = operands(x, weight, bias)
    if thawed(weight, bias):
        return mixed_lora_linear_reference(x, weight, bias, factors, ids)
    a = torch.cat([a * scale for a, _, scale in factors]).to(x.dtype)
    b = torch.cat([b.t() for _, b, _ in factors]).to(x.dtype).t()  # rows of length N, which are quicker to gather
    y = _forward(flat(x), weight, bias, a, b, ids, [len(a) for a, _, _ in factors])
    return y.view(*x.shape[:-1], y.shape[-1])


def mixed_lora_path(x: Tensor, weight: Tensor, ranks: Sequence[int]) -> Path:
    """Which arrangement is taken for x (..., K) at this weight (N, K), whether it is a kernel's, and why."""
    way, path = _arrangement(x, weight, ranks)
    return Path(path.fused, f"{way}; {path.why}")


def _arrangement(x: Tensor, weight: Tensor, ranks: Sequence[int], ids: Tensor | None = None) -> tuple[str, Path]:
    """One of the four at the top of the file, and what the door said. Without `ids`, for people: what they decide is left open."""
    many = sum(ranks) > LARGEST
    path = linear_expand_path(x, max(ranks)) if many else lora_path(x, weight, sum(ranks))
    if path.fused:
        return ("expanded" if many else "slots"), path
    if ids is None:
        return ("by runs, short ones gathered" if x.device.type == "cpu" else "gathered"), path
    return ("by runs" if by_runs(x, ids) else "gathered"), path


def by_runs(x: Tensor, ids: Tensor) -> bool:
    """Whether runs of images are gone through one by one. Reading `ids` costs nothing on a CPU; elsewhere it would wait for the device."""
    if x.device.type != "cpu":
        return False
    runs = [k for k, _ in groupby(ids.tolist()) if k >= 0]
    return x.numel() // x.shape[-1] >= LONG * len(runs)


def _rows_an_image(x: Tensor, ids: Tensor) -> int:
    rows, images = x.shape[0], ids.shape[0]
    if images == 0 or rows % images:
        raise BadCall(
            f"{rows} rows at this layer are no multiple of the {images} images; adapters cannot be told apart there"
        )
    return rows // images


def _runs(ids: Tensor, ranks: Sequence[int], rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows of consecutive images with one adapter, and that adapter's columns, or none. `rows` an image."""
    first = 0
    for k, run in groupby(ids.tolist()):
        after, start = first + rows * len(list(run)), sum(ranks[: max(k, 0)])
        yield slice(first, after), slice(start, start + ranks[k] if k >= 0 else start)
        first = after


@cache
def _owner(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """The slot of every column, (R,) int64."""
    return torch.tensor([k for k, rank in enumerate(ranks) for _ in range(rank)], device=device)


@cache
def _columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """The columns of every slot, (n + 1, largest rank) int64, filled up with R; the last row, for no slot, is all R."""
    starts, none, most = [sum(ranks[:k]) for k in range(len(ranks))], sum(ranks), max(ranks, default=0)
    rows = [[start + j if j < r else none for j in range(most)] for start, r in zip(starts, ranks, strict=True)]
    return torch.tensor([*rows, [none] * most], dtype=torch.int64, device=device)


def _images(t: Tensor, ids: Tensor) -> Tensor:
    """(M, C) as (images, rows of an image, C)."""
    return t.view(len(ids), len(t) // len(ids), t.shape[1])


def _gathered(t: Tensor, own: Tensor) -> Tensor:
    """Rows `own` (images, r) of t (R, C), row R being zero: (images, r, C)."""
    return torch.embedding(functional.pad(t, (0, 0, 0, 1)), own)


def _summed(t: Tensor, own: Tensor, rank: int) -> Tensor:
    """The opposite: t (images, r, C) added up into (R, C), in one product, so that the order is always the same."""
    slots = functional.one_hot(own.flatten(), rank + 1).to(t.dtype)
    return (slots.t() @ t.flatten(0, 1))[:rank]


# The operator


@operator("mixed_lora_linear")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ids: Tensor, ranks: list[int]
) -> Tensor:
    """(M, K) -> (M, N) with a (R, K) and b (N, R) of all slots, the scales in a."""
    way, _ = _arrangement(x, weight, ranks, ids)
    if way == "slots":
        owner = _owner(tuple(ranks), x.device)
        return functional.linear(shrink(x, a, ids=ids, owner=owner), beside(weight, b), bias)
    if way == "by runs":
        y = x.new_empty(len(x), len(weight))
        for rows, cols in _runs(ids, ranks, len(x) // len(ids)):
            begun(shrunk(x[rows], a[cols]), b[:, cols], 1.0, bias, out=y[rows])
        return y.addmm_(x, weight.t())
    own = _columns(tuple(ranks), x.device)[ids]
    u = (_gathered(a, own) @ _images(x, ids).mT).mT
    if way == "expanded":
        return linear_expand(x, weight, bias, u.flatten(0, 1), b.t(), own)
    own_b = _gathered(b.t(), own)
    y = torch.bmm(u, own_b) if bias is None else torch.baddbmm(bias, u, own_b)
    return y.flatten(0, 1).addmm_(x, weight.t())


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ids: Tensor, ranks: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("mixed_lora_linear_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, ids: Tensor, ranks: list[int], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), dA (R, K), dB (N, R); those not wanted are empty."""
    dy = dy.contiguous()
    way, _ = _arrangement(x, weight, ranks, ids)
    if way != "by runs":
        own = _columns(tuple(ranks), x.device)[ids]
        xs, dys = _images(x, ids), _images(dy, ids)
        own_a, own_b = _gathered(a, own), _gathered(b.t(), own)
        du = (own_b @ dys.mT).mT
        dx = None
        if wanted[0] and way == "expanded":
            dx = linear_expand(dy, weight.t(), None, du.flatten(0, 1), a, own)
        elif wanted[0]:
            dx = torch.bmm(du, own_a).flatten(0, 1).addmm_(dy, weight)
        da = _summed(du.mT @ xs, own, len(a)) if wanted[1] else None
        db = _summed((own_a @ xs.mT) @ dys, own, len(a)).t() if wanted[2] else None
        return given(x, dx, da, db)
    dx = torch.empty_like(x) if wanted[0] else None
    da, db = torch.zeros_like(a), b.new_zeros(b.shape[::-1]).t()
    for rows, cols in _runs(ids, ranks, len(x) // len(ids)):
        du = grad_shrunk(dy[rows], b[:, cols])
        if dx is not None:
            torch.mm(du.t(), a[cols], out=dx[rows])
        if wanted[1]:
            da[cols] += thin(du, x[rows])
        if wanted[2]:
            db.t()[cols] += grad_b(dy[rows], x[rows], a[cols])
    if dx is not None:
        dx.addmm_(dy, weight)
    return given(x, dx, da if wanted[1] else None, db if wanted[2] else None)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, ids: Tensor, ranks: list[int], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db = x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape[::-1]).t()
    return given(x, dx if wanted[0] else None, da if wanted[1] else None, db if wanted[2] else None)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, a, b, ids, ctx.ranks = inputs
    ctx.save_for_backward(x, weight, a, b, ids)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    found = _backward(dy, *ctx.saved_tensors, ctx.ranks, wanted)
    dx, da, db = (t if w else None for t, w in zip(found, wanted, strict=True))
    return dx, None, None, da, db, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
