"""The kernel of `bottleneck`: rows times a thin matrix, something at each number, times another thin matrix.

It serves the forward and the backward pass, reads x (or dy) twice, the second time out of the cache, and writes y (or dx) once; of what
lies between, only z or dz (M, m) reaches memory. M rows of C numbers, m in the middle.

A LayerNorm in front is folded into the first matrix, so that x alone is read, and once, for z, mean and rstd:

    z = rstd (x G^T - mean c1) + c0,    G = gamma Wd,  c1 = G 1,  c0 = Wd beta + bd
    dx = rstd (g - p - xhat q),         g = dz G,  p = dz c1 / C,  q = dz (z - c0) / C,  xhat = rstd (x - mean)

p and q are the means of g and of g xhat over a row, in terms of what is at hand: no second pass over g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .door import architecture, jit, launch, tl, triton
from .moments import moments

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
BEHIND_A_NORM = {**CONFIGS, 90: {**CONFIGS[90], 256: CONFIGS[80][256]}}
"""For the backward pass behind a LayerNorm, whose registers overflow where the others' just do not."""


@dataclass(frozen=True)
class Folded:
    """A LayerNorm in front of the first matrix, which is G: c1 (m,) of the equations, mean and rstd (M,), and eps.

    c0 is the first bias. Forward, mean and rstd are written; backward, `x` (M, C) is what was normalised.
    """

    c1: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float = 0.0
    x: Tensor | None = None


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
    normed_ptr,
    c1_ptr,
    mean_ptr,
    rstd_ptr,
    scale,
    eps,
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
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Forward: middle = z = x Wd^T + bd, out = [r +] s (f(z) Wu^T + bu). Backward, x being dy: middle = dz, out = [dy +] dz Wd.

    The two matrices are (R, C) by their strides. Rows of x, r, out and normed are C apart, those of z and middle R.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    rows = m[:, None] < M
    held = m[:, None] * R + r[None]
    inside = rows & (r[None] < R)
    acc = tl.zeros((BM, BR), ACC)
    mean = tl.zeros((BM,), ACC)
    spread = tl.zeros((BM,), ACC)
    for start in range(0, C, BK):
        c = start + k
        within = rows & (c[None] < C)
        x = tl.load(x_ptr + m[:, None] * C + c[None], mask=within, other=0.0)
        w = tl.load(
            first_ptr + r[None] * FIRST_R + c[:, None] * FIRST_C, mask=(r[None] < R) & (c[:, None] < C), other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
        if NORM and not BACKWARD:
            mean, spread = moments(x.to(ACC), within, start, tl.sum((c < C).to(ACC), 0), mean, spread)
    if NORM:
        c1 = tl.load(c1_ptr + r, mask=r < R, other=0.0)[None].to(ACC)
    if BACKWARD:
        z = tl.load(z_ptr + held, mask=inside, other=0.0).to(ACC)
        if RELU:
            slope = tl.where(z > 0, 1.0, 0.0)
        else:
            slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        passed = acc * slope * scale
        tl.store(middle_ptr + held, passed, mask=inside)
        if NORM:
            c0 = tl.load(first_bias_ptr + r, mask=r < R, other=0.0)[None].to(ACC)
            mean = tl.load(mean_ptr + m, mask=m < M, other=0.0)
            rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)
            p = tl.sum(passed * c1, 1) / C
            q = tl.sum(passed * (z - c0), 1) / C
    else:
        if NORM:
            rstd = 1 / tl.sqrt(spread / C + eps)
            tl.store(mean_ptr + m, mean, mask=m < M)
            tl.store(rstd_ptr + m, rstd, mask=m < M)
            acc = (acc - mean[:, None] * c1) * rstd[:, None]
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
        elif NORM:
            xhat = (tl.load(normed_ptr + at, mask=within, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
            y = (y - p[:, None] - xhat * q[:, None]) * rstd[:, None]
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask=within, other=0.0).to(ACC)
        tl.store(out_ptr + at, y, mask=within)


def config_of(x: Tensor, middle: int, *, normed_backward: bool = False) -> dict[str, int]:
    """The kernel's configuration on x's device."""
    table = (BEHIND_A_NORM if normed_backward else CONFIGS)[architecture(x)]
    return table[min(size for size in table if size >= middle)]


def thin_pair(
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
    norm: Folded | None = None,
) -> tuple[Tensor, Tensor]:
    """out (M, C) and middle (M, m) of `thin_pair_kernel`; backward where z is given. `first` and `second` are (m, C) views."""
    (m, c), r = x.shape, len(first)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    normed = None if norm is None or norm.x is None else norm.x.contiguous()
    out, middle = torch.empty_like(x), x.new_empty(m, r)
    config = config_of(x, r, normed_backward=norm is not None and z is not None)
    if m:
        launch(
            thin_pair_kernel,
            (triton.cdiv(m, config["BM"]),),
            x,
            first,
            x if first_bias is None else first_bias.contiguous(),
            x if z is None else z,
            middle,
            second,
            x if second_bias is None else second_bias.contiguous(),
            x if residual is None else residual,
            out,
            x if normed is None else normed,
            x if norm is None else norm.c1,
            x if norm is None else norm.mean,
            x if norm is None else norm.rstd,
            scale,
            0.0 if norm is None else norm.eps,
            m,
            c,
            r,
            *first.stride(),
            *second.stride(),
            BACKWARD=z is not None,
            RELU=relu,
            RESIDUAL=residual is not None,
            NORM=norm is not None,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BR=max(16, triton.next_power_of_2(r)),
            **config,
        )
    return out, middle
