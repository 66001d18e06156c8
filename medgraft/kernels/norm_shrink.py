"""LayerNorm and the low-rank columns behind it in one pass, and the adapted linear layer on them in one library product.

    h = (x - mean) rstd gamma + beta,    H = [h | s h A^T | 0],    y = H [W | B | 0]^T + b
    [dh | du | .] = dy [W | B | 0],    dB = dy^T u,    dA = s du^T h,    dx = LN'(dh + s du A)    with u = s h A^T

x (M, K) is read from memory once (the second time out of the cache) and H (M, K + R rounded up) is written once; h is kept for the
gradient as part of H, so with mean and rstd (M,) nothing else is. mean and variance come in one pass, as in `moments`. No gradient of W, b, gamma or beta is formed. With an adapter for
each image, column j of row i is kept where it belongs to the adapter of row i, as in `mixed_lora`.

Source: Ba et al. 2016 (arXiv:1607.06450); Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .door import Path, architecture, door, jit, launch, tl, triton
from .lora_linear import flat, given, lora_linear_reference, thawed
from .mixed_lora import Factors, _owner, _rows_an_image
from .moments import moments, native, wide
from .operators import operator
from .shrink import LARGEST, beside, half_only, slot, store_columns

CONFIGS = {  # by architecture; chosen by compiling, not by measuring
    80: {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
    90: {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
}


def norm_lora_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """`joined_linear` of `norm_shrink` by their equations: the definition. It has a gradient for every input."""
    return lora_linear_reference(functional.layer_norm(x, gamma.shape, gamma, beta, eps), weight, bias, a, b, scale)


def norm_shrink(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, factors: Factors, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (..., K), gamma and beta (K,), all of one dtype -> H (..., K + R rounded up) and the B (N, R) that `joined_linear` takes with it.

    Without `ids`, `factors` is one (A (R, K), B (N, R), s). With ids (images,) int64 it is one for each slot, and ids names each image's,
    -1 none; x is (B', ..., K) with B' a multiple of the images, whose rows are consecutive. Sums in float32, or float64. Gradients flow
    to x and the factors, never to gamma and beta. Raises BadCall for rows that cannot be shared out among the images.
    """
    if ids is None:
        ((a, b, scale),) = factors
        ranks: list[int] = []
    else:
        _rows_an_image(x, ids)
        a, b, scale = torch.cat([a for a, _, _ in factors]), torch.cat([b * s for _, b, s in factors], 1), 1.0
        ranks = [len(a) for a, _, _ in factors]
    out, _, _ = _forward(flat(x), gamma, beta, eps, a.to(x.dtype), scale, ids, ranks)
    return out.view(*x.shape[:-1], out.shape[-1]), b


def joined_linear(h: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """H (..., K + R rounded up) as `norm_shrink` makes it, B (N, R), weight (N, K), bias (N,) -> y (..., N), in H's dtype.

    Gradients flow to H and B, never to weight and bias.
    """
    y = _linear(flat(h), weight, bias, b.to(h.dtype))
    return y.view(*h.shape[:-1], y.shape[-1])


def norm_lora_path(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> Path:
    """Whether the norm of x (..., K) is worth computing together with `rank` columns for the layer behind it, and why."""
    path = door(x)
    if not path.fused:  # on a CPU, nothing more is asked
        return path
    n, k = weight.shape
    rows = x.numel() // k
    if torch.is_autocast_enabled(x.device.type):
        return Path(False, "autocast gives the norm and the product precisions of their own")
    if thawed(weight, bias) or thawed(gamma, beta):
        return Path(False, "the frozen layers are being trained")
    if torch.compiler.is_exporting():
        return Path(False, "the graph is exported")
    # Together: W is copied beside B (2 N K numbers). Apart: y is read and written (2 M N), h read (M K).
    if rows * (2 * n + k) <= 2 * n * k:
        return Path(False, f"{rows} rows of {k} -> {n}: copying the weight beside the factor costs more than it saves")
    unfit = _unfit(x, gamma, rank)
    return Path(False, unfit) if unfit else Path(True, f"{path.why}, with the LayerNorm in front")


def _unfit(x: Tensor, gamma: Tensor, rank: int) -> str | None:
    if rank > LARGEST:
        return f"{rank} low-rank columns; the kernel holds {LARGEST} at most"
    if gamma.dtype != x.dtype:
        return f"a LayerNorm of {str(gamma.dtype).removeprefix('torch.')} on {str(x.dtype).removeprefix('torch.')}"
    return half_only(x)


# The kernel


@jit
def norm_shrink_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    a_ptr,
    ids_ptr,
    owner_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    scale,
    M,
    T,
    K,
    R,
    X_ROW,
    OUT_ROW,
    MIXED: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """BM rows of x (M, K): their mean and rstd, then h, and h times A (R, K) on the way out. T rows an image."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    mean = tl.zeros((BM,), ACC)
    spread = tl.zeros((BM,), ACC)  # sum of (x - mean)^2
    for start in range(0, K, BK):
        inside = (m[:, None] < M) & (start + k[None] < K)
        x = tl.load(x_ptr + m[:, None] * X_ROW + start + k[None], mask=inside, other=0.0).to(ACC)
        count = tl.sum((start + k < K).to(ACC), 0)
        mean, spread = moments(x, inside, start, count, mean, spread)
    rstd = 1 / tl.sqrt(spread / K + eps)
    tl.store(mean_ptr + m, mean, mask=m < M)
    tl.store(rstd_ptr + m, rstd, mask=m < M)
    u = tl.zeros((BM, BR), ACC)
    for start in range(0, K, BK):
        c = start + k
        inside = (m[:, None] < M) & (c[None] < K)
        x = tl.load(x_ptr + m[:, None] * X_ROW + c[None], mask=inside, other=0.0).to(ACC)
        gamma = tl.load(gamma_ptr + c, mask=c < K, other=0.0).to(ACC)
        beta = tl.load(beta_ptr + c, mask=c < K, other=0.0).to(ACC)
        h = ((x - mean[:, None]) * rstd[:, None] * gamma[None] + beta[None]).to(out_ptr.dtype.element_ty)
        a = tl.load(a_ptr + r[None] * K + c[:, None], mask=(r[None] < R) & (c[:, None] < K), other=0.0)
        u = tl.dot(h, a, u, input_precision="ieee", out_dtype=ACC)
        tl.store(out_ptr + m[:, None] * OUT_ROW + c[None], h, mask=inside)
    store_columns(u, ids_ptr, owner_ptr, out_ptr, scale, m, r, M, T, K, R, OUT_ROW, MIXED)


def fused(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    a: Tensor,
    scale: float,
    ids: Tensor | None,
    owner: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """H, mean and rstd by the kernel; see `norm_shrink` for H."""
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(m, k + slot(len(a)))
    mean, rstd = (x.new_empty(m, dtype=wide(x)) for _ in range(2))
    if m == 0:
        return out, mean, rstd
    config = CONFIGS[architecture(x)]
    launch(
        norm_shrink_kernel,
        (triton.cdiv(m, config["BM"]),),
        x,
        gamma.contiguous(),
        beta.contiguous(),
        a.contiguous(),
        x if ids is None else ids,
        x if owner is None else owner,
        out,
        mean,
        rstd,
        eps,
        scale,
        m,
        1 if ids is None else m // len(ids),
        k,
        len(a),
        x.stride(0),
        out.stride(0),
        MIXED=ids is not None,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BR=max(16, triton.next_power_of_2(len(a))),
        **config,
    )
    return out, mean, rstd


# The operator in front


def _kept(u: Tensor, ids: Tensor, ranks: list[int]) -> Tensor:
    """u (M, R) where column j belongs to the adapter of row i, else 0."""
    rows = ids.repeat_interleave(len(u) // len(ids))
    return torch.where(rows[:, None] == _owner(tuple(ranks), u.device), u, 0)


@operator("norm_shrink")
def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, a: Tensor, scale: float, ids: Tensor | None, ranks: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K), a (R, K) -> H (M, K + R rounded up), mean and rstd (M,) in float32 or wider. `ranks` of the slots, with `ids`."""
    if door(x, _unfit(x, gamma, len(a))).fused:
        return fused(x, gamma, beta, eps, a, scale, ids, None if ids is None else _owner(tuple(ranks), x.device))
    dtype = native(x)
    found = torch.native_layer_norm(x.to(dtype), gamma.shape, gamma.to(dtype), beta.to(dtype), eps)
    h, mean, rstd = found[0].to(x.dtype), found[1].flatten(), found[2].flatten()
    u = h @ (a * scale).t()
    return beside(h, u if ids is None else _kept(u, ids, ranks)), mean, rstd


@_forward.register_fake
def _(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, a: Tensor, scale: float, ids: Tensor | None, ranks: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    mean, rstd = (x.new_empty(m, dtype=wide(x)) for _ in range(2))
    return x.new_empty(m, k + slot(a.shape[0])), mean, rstd


@operator("norm_shrink_backward")
def _backward(
    d_out: Tensor,
    x: Tensor,
    gamma: Tensor,
    a: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    ids: Tensor | None,
    ranks: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dx (M, K), dA (R, K); those not wanted are empty."""
    k = x.shape[1]
    dh, du, _ = d_out.tensor_split((k, k + len(a)), 1)
    du = du * scale if ids is None else _kept(du, ids, ranks)
    dx = da = None
    if wanted[0]:
        dtype = native(x)
        dh = torch.addmm(dh, du, a).to(dtype)
        at = mean[:, None], rstd[:, None]
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dh, x.to(dtype), gamma.shape, *at, gamma.to(dtype), None, [True, False, False]
        )
        dx = dx.to(x.dtype)
    if wanted[1]:
        da = du.t() @ out[:, :k]
    return given(x, dx, da, None)[:2]


@_backward.register_fake
def _(
    d_out: Tensor,
    x: Tensor,
    gamma: Tensor,
    a: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    ids: Tensor | None,
    ranks: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    dx, da = x.new_empty(x.shape), a.new_empty(a.shape)
    return given(x, dx if wanted[0] else None, da if wanted[1] else None, None)[:2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, _, _, a, ctx.scale, ids, ctx.ranks = inputs
    ctx.save_for_backward(x, gamma, a, *output, ids)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd


def _gradients(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    *kept, ids = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 4)]
    found = _backward(d_out, *kept, ctx.scale, ids, ctx.ranks, wanted)
    dx, da = (t if w else None for t, w in zip(found, wanted, strict=True))
    return dx, None, None, None, da, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


# The operator behind


@operator("joined_linear")
def _linear(h: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    """(M, K + R rounded up) -> (M, N)"""
    return functional.linear(h, beside(weight, b), bias)


@_linear.register_fake
def _(h: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[0])


@operator("joined_linear_backward")
def _linear_backward(dy: Tensor, h: Tensor, weight: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """dH (M, K + R rounded up), dB (N, R); those not wanted are empty. autograd's own would be as wide as [W | B]."""
    dy, k = dy.contiguous(), weight.shape[1]
    dh = dy @ beside(weight, b) if wanted[0] else None
    db = (h[:, k : k + b.shape[1]].t() @ dy).t() if wanted[1] else None
    return given(h, dh, db, None)[:2]


@_linear_backward.register_fake
def _(dy: Tensor, h: Tensor, weight: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    dh, db = h.new_empty(h.shape), b.new_empty(b.shape[::-1]).t()
    return given(h, dh if wanted[0] else None, db if wanted[1] else None, None)[:2]


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, _, b = inputs
    ctx.save_for_backward(h, weight, b)


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 3)]
    found = _linear_backward(dy, *ctx.saved_tensors, wanted)
    dh, db = (t if w else None for t, w in zip(found, wanted, strict=True))
    return dh, None, None, db


_linear.register_autograd(_linear_gradients, setup_context=_keep_linear)
