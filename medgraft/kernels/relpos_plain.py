"""The definition of `relpos_attention` in plain torch, and the path wherever its kernels do not run; its equations and letters.

`direct` for few tokens; else tiles of queries small enough for a core's cache; scores are computed again in the backward pass. Windows are cut out of the image, and
put back together, around the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ROWS, TILE = 2**18, 2**20
"""Entries of S at a time, within a head and over several heads: 4 MB at float32."""


class Frame(NamedTuple):
    """The tokens of an image and those of a window of it; windows start at the first token and may reach beyond the last."""

    grid: tuple[int, int]
    window: tuple[int, int]

    @property
    def whole(self) -> bool:
        """Whether the one window is the image."""
        return self.grid == self.window

    @property
    def ragged(self) -> bool:
        """Whether some windows reach beyond the image."""
        return any(side % part for side, part in zip(self.grid, self.window, strict=True))

    @property
    def many(self) -> tuple[int, int]:
        """Windows down and across."""
        (gy, gx), (h, w) = self
        return -(-gy // h), -(-gx // w)


def empty_like_heads(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) whose memory is (B, N, H, D)."""
    b, heads, n, d = q.shape
    return q.new_empty(b, n, heads, d).transpose(1, 2)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for O and L."""
    return empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def direct(q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, outside: Tensor | None, frame: Frame) -> Tensor:
    """O by torch's own attention, with every score's bias at once: quicker for few tokens, and made of operators that can be exported."""
    qs, ks, vs, rhs, rws = _cut_all(q, k, v, rh, rw, outside, frame)
    bias = (rhs[..., None] + rws[:, :, None]).flatten(2)
    with torch.autocast(q.device.type, enabled=False):
        out = functional.scaled_dot_product_attention(qs, ks, vs, attn_mask=bias)
    return _joined(out, frame, q.shape[:2]).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, outside: Tensor | None, frame: Frame
) -> tuple[Tensor, Tensor]:
    """O and L of the equations."""
    out, lse = empty_outputs(q)
    qs, ks, vs, rhs, rws = _cut_all(q, k, v, rh, rw, outside, frame)
    o, log = torch.empty_like(qs), qs.new_empty(qs.shape[:2])
    for b, i in _tiles(*qs.shape[:2]):
        s = _scores(qs[b, i], ks[b], rhs[b, i], rws[b, i])
        top = s.amax(-1, keepdim=True)
        total = s.sub_(top).exp_().sum(-1, keepdim=True)
        o[b, i] = torch.bmm(s, vs[b]).div_(total)
        log[b, i] = (top + total.log())[..., 0]
    out.copy_(_joined(o, frame, q.shape[:2]))
    lse.copy_(_joined(log[..., None], frame, q.shape[:2])[..., 0])
    return out, lse


def plain_backward(
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
    """Gradients of q, k, v, rh, rw and, where it is given, outside."""
    qs, ks, vs, rhs, rws = _cut_all(q, k, v, rh, rw, outside, frame)
    gs, delta = _cut(g, frame), _cut((g.to(lse.dtype) * out).sum(-1, keepdim=True), frame)
    log = _cut(lse[..., None], frame)
    h, w, c = rh.shape[2], rw.shape[2], q.shape[-1] ** -0.5
    dq, drh, drw = (torch.empty_like(t) for t in (qs, rhs, rws))
    dk, dv = torch.zeros_like(ks), torch.zeros_like(vs)
    for b, i in _tiles(*qs.shape[:2]):
        p = _scores(qs[b, i], ks[b], rhs[b, i], rws[b, i]).sub_(log[b, i]).exp_()
        dv[b].baddbmm_(p.transpose(1, 2), gs[b, i])
        ds = torch.bmm(gs[b, i], vs[b].transpose(1, 2)).sub_(delta[b, i]).mul_(p)
        dq[b, i] = torch.bmm(ds, ks[b]).mul_(c)
        dk[b].baddbmm_(ds.transpose(1, 2), qs[b, i], alpha=c)
        by_place = ds.unflatten(2, (h, w))
        drh[b, i] = by_place.sum(3)
        drw[b, i] = by_place.sum(2)
    heads = q.shape[:2]
    dqkv = [empty_like_heads(q).copy_(_joined(t, frame, heads)) for t in (dq, dk, dv)]
    drs = [torch.empty_like(r).copy_(_joined(t, frame, heads).mT) for r, t in ((rh, drh), (rw, drw))]
    doutside = None
    if outside is not None:
        # What a token within the image gets is zero here: it was joined above.
        beyond = _cut(q.new_ones(*heads, q.shape[2], 1), frame) == 0
        sums = [torch.where(beyond, t, 0.0).unflatten(0, (*heads, *frame.many)).sum((2, 3, 4)) for t in (dk, dv)]
        doutside = torch.stack(sums, 2).to(outside.dtype)
    return dqkv[0], dqkv[1], dqkv[2], drs[0], drs[1], doutside


def _tiles(heads: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Which heads, which queries."""
    rows = min(n, max(1, ROWS // n))
    many = max(1, TILE // (rows * n))
    for b in range(0, heads, many):
        for i in range(0, n, rows):
            yield slice(b, min(b + many, heads)), slice(i, min(i + rows, n))


def _scores(q: Tensor, k: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
    """A tile of S: (b, m, D), (b, N, D), (b, m, h), (b, m, w) -> (b, m, N)."""
    s = (rh[..., None] + rw[:, :, None]).flatten(2)
    return s.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)


def _cut_all(
    q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, outside: Tensor | None, frame: Frame
) -> tuple[Tensor, ...]:
    beyond = (None, None) if outside is None else outside.unbind(2)
    return _cut(q, frame), _cut(k, frame, beyond[0]), _cut(v, frame, beyond[1]), _cut(rh.mT, frame), _cut(rw.mT, frame)


def _cut(t: Tensor, frame: Frame, beyond: Tensor | None = None) -> Tensor:
    """(B, H, N, D) of the image -> (B H windows, h w, D), contiguous, float32 or wider; zero or `beyond` (B, H, D) outside it."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if frame.whole:
        return t.flatten(0, 1).to(wide).contiguous()
    (h, w), (down, across) = frame.window, frame.many
    t = t.unflatten(2, frame.grid)
    if frame.ragged:
        room = t.new_zeros(*t.shape[:2], down * h, across * w, t.shape[-1])
        if beyond is not None:
            room += beyond[:, :, None, None]
        room[:, :, : frame.grid[0], : frame.grid[1]] = t
        t = room
    t = t.unflatten(3, (across, w)).unflatten(2, (down, h)).transpose(3, 4)
    return t.to(wide).flatten(4, 5).flatten(0, 3)


def _joined(t: Tensor, frame: Frame, heads: torch.Size) -> Tensor:
    """(B H windows, h w, D) -> (B, H, N, D) of the image."""
    if frame.whole:
        return t.unflatten(0, heads)
    t = t.unflatten(1, frame.window).unflatten(0, (*heads, *frame.many)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return t[:, :, : frame.grid[0], : frame.grid[1]].flatten(2, 3)
