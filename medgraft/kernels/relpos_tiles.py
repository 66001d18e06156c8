"""The Triton kernels of `relpos_attention`; its equations and letters.

A tile of keys is one row of the window, so a query's rw is the same tile in every step and its rh one number a step, which is taken
into the running maximum: p = 2^(s + rw - (m - rh)). A head of 80 channels is 64 + 16, two products, not 128. Scores are in base 2.

BM queries, BN keys a tile (a row of W tokens, padded), D0 + D1 channels. `height` rows a window, gy x gx tokens an image. WHOLE: the
window is the image. OUTSIDE: some windows reach beyond it, where k and v are given once for all. One program owns what it writes: no
atomics. Programs: (tile of queries or row of keys, image and head, window).
"""

from __future__ import annotations

from .door import jit, tl


@jit
def _load(base, rows, row_stride, start, inside, D: tl.constexpr):
    """A tile of D channels from `start` on, zero where the row is not inside."""
    at = base + rows[:, None] * row_stride + start + tl.arange(0, D)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@jit
def _key(base, rows, row_stride, start, inside, outside, D: tl.constexpr, OUTSIDE: tl.constexpr):
    """As `_load`, the given row where a token lies outside the image."""
    tile = _load(base, rows, row_stride, start, inside, D)
    if OUTSIDE:
        given = tl.load(outside + start + tl.arange(0, D))
        tile = tl.where(inside[:, None], tile, given[None, :])
    return tile


@jit
def _store(base, rows, row_stride, start, inside, value, D: tl.constexpr):
    at = base + rows[:, None] * row_stride + start + tl.arange(0, D)[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None])


@jit
def _store_sum(base, start, inside, value, D: tl.constexpr):
    """The sum of the rows inside."""
    total = tl.sum(tl.where(inside[:, None], value, 0.0), 0)
    tl.store(base + start + tl.arange(0, D), total.to(base.dtype.element_ty))


@jit
def _product(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@jit
def _corner(height, gx, W: tl.constexpr):
    """The first row and column of this program's window."""
    many = (gx + W - 1) // W
    return tl.program_id(2) // many * height, tl.program_id(2) % many * W


@jit
def _tokens(local, top, left, height, gy, gx, W: tl.constexpr, WHOLE: tl.constexpr):
    """Tokens by their number within the window: their number in the image, and whether they are in both."""
    if WHOLE:
        token = local
        inside = local < gy * gx
    else:
        y = top + local // W
        x = left + local % W
        token = y * gx + x
        inside = (local < height * W) & (y < gy) & (x < gx)
    return token, inside


@jit
def forward_kernel(
    q, k, v, rh, rw, outside, out, lse, scale, heads, height, gy, gx,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
    WHOLE: tl.constexpr, OUTSIDE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """O and L of BM queries of one window of one head."""
    LOG2E: tl.constexpr = 1.4426950408889634
    n = gy * gx
    head = tl.program_id(1).to(tl.int64)
    image, own = head // heads, head % heads
    top, left = _corner(height, gx, W)
    rows, inside = _tokens(tl.program_id(0) * BM + tl.arange(0, BM), top, left, height, gy, gx, W, WHOLE)
    cols = tl.arange(0, BN)
    real = cols < W
    reach = tl.minimum(gx - left, W)
    q += image * qb + own * qh
    k += image * kb + own * kh + (top * gx + left) * kn
    v += image * vb + own * vh + (top * gx + left) * vn
    outside += head * 2 * (D0 + D1)
    q0 = _load(q, rows, qn, 0, inside, D0)
    out0 = tl.zeros([BM, D0], ACC)
    if D1 > 0:
        q1 = _load(q, rows, qn, D0, inside, D1)
        out1 = tl.zeros([BM, D1], ACC)
    across = rw + head * W * n + cols[None, :] * n + rows[:, None]
    across = tl.load(across, mask=inside[:, None] & real[None, :], other=0.0).to(ACC) * LOG2E
    across = tl.where(real[None, :], across, float("-inf"))
    down = rh + head * height * n + rows
    high = tl.full([BM], float("-inf"), ACC)
    total = tl.zeros([BM], ACC)
    scale2 = scale * LOG2E
    for y in range(height):
        there = cols < tl.where(top + y < gy, reach, 0)
        k0 = _key(k, cols, kn, 0, there, outside, D0, OUTSIDE)
        s = _product(q0, tl.trans(k0), ACC)
        if D1 > 0:
            k1 = _key(k, cols, kn, D0, there, outside, D1, OUTSIDE)
            s += _product(q1, tl.trans(k1), ACC)
        s = s * scale2 + across
        shift = tl.load(down, mask=inside, other=0.0).to(ACC) * LOG2E
        new = tl.maximum(high, tl.max(s, 1) + shift)
        p = tl.exp2(s - (new - shift)[:, None])
        fade = tl.exp2(high - new)
        total = total * fade + tl.sum(p, 1)
        high = new
        v0 = _key(v, cols, vn, 0, there, outside + D0 + D1, D0, OUTSIDE)
        p = p.to(v0.dtype)
        out0 = out0 * fade[:, None] + _product(p, v0, ACC)
        if D1 > 0:
            v1 = _key(v, cols, vn, D0, there, outside + D0 + D1, D1, OUTSIDE)
            out1 = out1 * fade[:, None] + _product(p, v1, ACC)
        k += gx * kn
        v += gx * vn
        down += n
    out += image * ob + own * oh
    _store(out, rows, on, 0, inside, out0 / total[:, None], D0)
    if D1 > 0:
        _store(out, rows, on, D0, inside, out1 / total[:, None], D1)
    tl.store(lse + head * n + rows, (high + tl.log2(total)) / LOG2E, mask=inside)


@jit
def backward_queries_kernel(
    q, k, v, rh, rw, outside, out, g, lse, delta, dq, drh, drw, scale, heads, height, gy, gx,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
    WHOLE: tl.constexpr, OUTSIDE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dQ, drh, drw and d of BM queries of one window of one head. dQ is laid out as O is."""
    LOG2E: tl.constexpr = 1.4426950408889634
    n = gy * gx
    head = tl.program_id(1).to(tl.int64)
    image, own = head // heads, head % heads
    top, left = _corner(height, gx, W)
    rows, inside = _tokens(tl.program_id(0) * BM + tl.arange(0, BM), top, left, height, gy, gx, W, WHOLE)
    cols = tl.arange(0, BN)
    real = cols < W
    reach = tl.minimum(gx - left, W)
    q += image * qb + own * qh
    k += image * kb + own * kh + (top * gx + left) * kn
    v += image * vb + own * vh + (top * gx + left) * vn
    g += image * gb + own * gh
    out += image * ob + own * oh
    dq += image * ob + own * oh
    outside += head * 2 * (D0 + D1)
    q0, g0 = _load(q, rows, qn, 0, inside, D0), _load(g, rows, gn, 0, inside, D0)
    d = tl.sum(g0.to(ACC) * _load(out, rows, on, 0, inside, D0).to(ACC), 1)
    dq0 = tl.zeros([BM, D0], ACC)
    if D1 > 0:
        q1, g1 = _load(q, rows, qn, D0, inside, D1), _load(g, rows, gn, D0, inside, D1)
        d += tl.sum(g1.to(ACC) * _load(out, rows, on, D0, inside, D1).to(ACC), 1)
        dq1 = tl.zeros([BM, D1], ACC)
    tl.store(delta + head * n + rows, d, mask=inside)
    places = head * W * n + cols[None, :] * n + rows[:, None]
    both = inside[:, None] & real[None, :]
    across = tl.load(rw + places, mask=both, other=float("-inf")).to(ACC) * LOG2E
    log = tl.load(lse + head * n + rows, mask=inside, other=0.0).to(ACC) * LOG2E
    across -= log[:, None]
    down = head * height * n + rows
    dacross = tl.zeros([BM, BN], ACC)
    scale2 = scale * LOG2E
    for y in range(height):
        there = cols < tl.where(top + y < gy, reach, 0)
        k0 = _key(k, cols, kn, 0, there, outside, D0, OUTSIDE)
        s = _product(q0, tl.trans(k0), ACC)
        if D1 > 0:
            k1 = _key(k, cols, kn, D0, there, outside, D1, OUTSIDE)
            s += _product(q1, tl.trans(k1), ACC)
        shift = tl.load(rh + down, mask=inside, other=0.0).to(ACC) * LOG2E
        p = tl.exp2(s * scale2 + across + shift[:, None])
        v0 = _key(v, cols, vn, 0, there, outside + D0 + D1, D0, OUTSIDE)
        dp = _product(g0, tl.trans(v0), ACC)
        if D1 > 0:
            v1 = _key(v, cols, vn, D0, there, outside + D0 + D1, D1, OUTSIDE)
            dp += _product(g1, tl.trans(v1), ACC)
        ds = p * (dp - d[:, None])
        tl.store(drh + down, tl.sum(ds, 1).to(drh.dtype.element_ty), mask=inside)
        dacross += ds
        ds = ds.to(k0.dtype)
        dq0 += _product(ds, k0, ACC)
        if D1 > 0:
            dq1 += _product(ds, k1, ACC)
        k += gx * kn
        v += gx * vn
        down += n
    tl.store(drw + places, dacross.to(drw.dtype.element_ty), mask=both)
    _store(dq, rows, on, 0, inside, dq0 * scale, D0)
    if D1 > 0:
        _store(dq, rows, on, D0, inside, dq1 * scale, D1)


@jit
def backward_keys_kernel(
    q, k, v, rh, rw, outside, g, lse, delta, dk, dv, doutside, scale, heads, height, gy, gx,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
    WHOLE: tl.constexpr, OUTSIDE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dK and dV of one row of keys of one window of one head, laid out as O is; what the row's tokens outside the image sum to.

    Tiles stand the other way round: keys down, queries across.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    D: tl.constexpr = D0 + D1
    n = gy * gx
    y = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    image, own = head // heads, head % heads
    top, left = _corner(height, gx, W)
    cols = tl.arange(0, BN)
    real = cols < W
    there = cols < tl.where(top + y < gy, tl.minimum(gx - left, W), 0)
    line = (top + y) * gx + left
    k += image * kb + own * kh + line * kn
    v += image * vb + own * vh + line * vn
    q += image * qb + own * qh
    g += image * gb + own * gh
    outside += head * 2 * D
    k0 = _key(k, cols, kn, 0, there, outside, D0, OUTSIDE)
    v0 = _key(v, cols, vn, 0, there, outside + D, D0, OUTSIDE)
    dk0, dv0 = tl.zeros([BN, D0], ACC), tl.zeros([BN, D0], ACC)
    if D1 > 0:
        k1 = _key(k, cols, kn, D0, there, outside, D1, OUTSIDE)
        v1 = _key(v, cols, vn, D0, there, outside + D, D1, OUTSIDE)
        dk1, dv1 = tl.zeros([BN, D1], ACC), tl.zeros([BN, D1], ACC)
    scale2 = scale * LOG2E
    for start in range(0, height * W, BM):
        rows, inside = _tokens(start + tl.arange(0, BM), top, left, height, gy, gx, W, WHOLE)
        q0, g0 = _load(q, rows, qn, 0, inside, D0), _load(g, rows, gn, 0, inside, D0)
        s = _product(k0, tl.trans(q0), ACC)
        dp = _product(v0, tl.trans(g0), ACC)
        if D1 > 0:
            q1, g1 = _load(q, rows, qn, D0, inside, D1), _load(g, rows, gn, D0, inside, D1)
            s += _product(k1, tl.trans(q1), ACC)
            dp += _product(v1, tl.trans(g1), ACC)
        shift = tl.load(rh + (head * height + y) * n + rows, mask=inside, other=0.0).to(ACC)
        shift = (shift - tl.load(lse + head * n + rows, mask=inside, other=float("inf"))) * LOG2E
        across = rw + head * W * n + cols[:, None] * n + rows[None, :]
        across = tl.load(across, mask=real[:, None] & inside[None, :], other=float("-inf")).to(ACC) * LOG2E
        p = tl.exp2(s * scale2 + across + shift[None, :])
        d = tl.load(delta + head * n + rows, mask=inside, other=0.0)
        ds = (p * (dp - d[None, :])).to(q0.dtype)
        p = p.to(g0.dtype)
        dv0 += _product(p, g0, ACC)
        dk0 += _product(ds, q0, ACC)
        if D1 > 0:
            dv1 += _product(p, g1, ACC)
            dk1 += _product(ds, q1, ACC)
    dk += image * ob + own * oh + line * on
    dv += image * ob + own * oh + line * on
    _store(dk, cols, on, 0, there, dk0 * scale, D0)
    _store(dv, cols, on, 0, there, dv0, D0)
    if D1 > 0:
        _store(dk, cols, on, D0, there, dk1 * scale, D1)
        _store(dv, cols, on, D0, there, dv1, D1)
    if OUTSIDE:
        beyond = real & (there == 0)
        doutside += ((head * tl.num_programs(2) + tl.program_id(2)) * height + y) * 2 * D
        _store_sum(doutside, 0, beyond, dk0 * scale, D0)
        _store_sum(doutside, D, beyond, dv0, D0)
        if D1 > 0:
            _store_sum(doutside, D0, beyond, dk1 * scale, D1)
            _store_sum(doutside, D + D0, beyond, dv1, D1)
