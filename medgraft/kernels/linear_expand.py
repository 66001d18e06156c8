"""A frozen layer's product with each image's own low-rank term added on the way out, in one Triton product.

    y_i = x_i W^T + b + u_i E_i        E_i: rows own[i] of E, or nothing where own[i] names none

The epilogue goes through the images that a tile of y touches, so a tile may span any number of them and no row is computed twice. Work does
not depend on which image has which rows of E. x (M, K), W (N, K), b (N,), u (M, r), E (R, N), own (images, r); M / images rows an image.
With W^T for W and A for E the same kernel is the gradient dx = dy W + du A.

`mixed_lora` calls this behind its door. Sums in float32 (float64 for float64), no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .door import Path, architecture, door, jit, launch, tl, triton
from .shrink import half_only

LARGEST = 64
"""The largest rank of an image that fits a program's registers."""
CONFIGS = {  # by architecture; chosen by compiling, not by measuring
    80: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    90: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
GROUP = 8
"""Tiles of rows that go through the columns together: what they read of W is still in the cache."""


@jit
def linear_expand_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    u_ptr,
    e_ptr,
    own_ptr,
    out_ptr,
    M,
    N,
    K,
    T,
    RANK,
    R,
    X_ROW,
    W_N,
    W_K,
    E_R,
    E_N,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """A BM x BN tile of y (M, N), images of T rows. W (N, K) and E (R, N) are by their strides; rows of u and own are RANK apart."""
    across = tl.cdiv(N, BN)
    band, place = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    high = tl.minimum(tl.cdiv(M, BM) - band * GROUP, GROUP)
    top = (band * GROUP + place % high).to(tl.int64) * BM
    m = top + tl.arange(0, BM)
    n = place // high * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    r = tl.arange(0, BR)
    y = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        x = tl.load(
            x_ptr + m[:, None] * X_ROW + start + k[None], mask=(m[:, None] < M) & (start + k[None] < K), other=0.0
        )
        w = tl.load(
            w_ptr + n[None] * W_N + (start + k[:, None]) * W_K,
            mask=(n[None] < N) & (start + k[:, None] < K),
            other=0.0,
        )
        y = tl.dot(x, w, y, input_precision="ieee", out_dtype=ACC)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None].to(ACC)
    image = m // T
    for i in tl.range(top // T, (tl.minimum(top + BM, M) - 1) // T + 1, num_stages=1):
        column = tl.load(own_ptr + i * RANK + r, mask=r < RANK, other=R)
        mine = image[:, None] == i
        u = tl.load(u_ptr + m[:, None] * RANK + r[None], mask=mine & (r[None] < RANK), other=0.0)
        e = tl.load(
            e_ptr + column[:, None] * E_R + n[None] * E_N, mask=(column[:, None] < R) & (n[None] < N), other=0.0
        )
        # 0 x inf is NaN, in the rows of other images too: what is not finite in E goes into u instead.
        zero = e.to(ACC) * 0.0
        e = tl.where(zero == 0.0, e, 0.0)
        u = tl.where(mine, u + tl.sum(tl.sum(zero, 0), 0), 0.0).to(e.dtype)
        y = tl.dot(u, e, y, input_precision="ieee", out_dtype=ACC)
    tl.store(out_ptr + m[:, None] * N + n[None], y, mask=(m[:, None] < M) & (n[None] < N))


def linear_expand(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, e: Tensor, own: Tensor) -> Tensor:
    """(M, K) -> (M, N), see the top of the file; all of one dtype but own, int64, whose entries R name no row.

    An entry of E_i that is not finite leaves no row of image i finite; the other images stay as they are.
    """
    (m, k), n, rank = x.shape, len(weight), own.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(m, n)
    if m == 0:
        return out
    config = CONFIGS[architecture(x)]
    launch(
        linear_expand_kernel,
        (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),),
        x,
        weight,
        x if bias is None else bias.contiguous(),
        u.contiguous(),
        e,
        own.contiguous(),
        out,
        m,
        n,
        k,
        m // len(own),
        rank,
        len(e),
        x.stride(0),
        *weight.stride(),
        *e.stride(),
        BIAS=bias is not None,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        GROUP=GROUP,
        BR=max(16, triton.next_power_of_2(rank)),
        **config,
    )
    return out


def linear_expand_path(x: Tensor, rank: int) -> Path:
    """Whether the kernel is taken for x (..., K) where the largest rank of an image is `rank`, and why."""
    if rank > LARGEST:
        return door(x, f"an adapter of rank {rank}; the kernel holds {LARGEST} at most")
    return door(x, half_only(x), trial="linear_expand")
