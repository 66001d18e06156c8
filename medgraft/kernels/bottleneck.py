"""A two-layer bottleneck on a branch, with what it is added to, and with or without a LayerNorm in front.

    z = x Wd^T + bd,    y = r + s (f(z) Wu^T + bu)        f: GELU (by erf) or ReLU; r: x itself, another tensor, or nothing
    z = LN(x) Wd^T + bd,    LN(x) = xhat gamma + beta     where there is one

    dz = s (dy Wu) f'(z),  dx = dz Wd (+ dy where r is x),  dr = dy,  dWu = s dy^T f(z),  dbu = s sum dy,  dWd = dz^T x,  dbd = sum dz
    with a LayerNorm, E = dz^T xhat:  dWd = E gamma + dbd beta^T,  dgamma_c = sum_r (Wd E)_rc,  dbeta = Wd^T dbd

On a GPU each of the two passes is one kernel, `thin_pair`.

Source: AdaptFormer, Chen et al. 2022 (arXiv:2205.13535) section 3.2, and the authors' code for the LayerNorm, an option there that is off
by default; AViT, Du et al. 2023, section 2. Folding the norm: Ba et al. 2016 (arXiv:1607.06450), Eq. 3 and 4 rearranged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .door import Path, door
from .lora_linear import flat
from .moments import native, wide
from .operators import operator
from .shrink import half_only
from .thin_pair import LARGEST, Folded, thin_pair

Norm = tuple[Tensor, Tensor, float]
"""gamma (C,), beta (C,) and eps of a LayerNorm."""


def bottleneck_reference(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float = 1.0,
    relu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`bottleneck` by its equation: the definition."""
    h = x
    if norm is not None:
        gamma, beta, eps = norm
        h = functional.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)
    z = functional.linear(h, down.to(x.dtype), down_bias.to(x.dtype))
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
    norm: Norm | None = None,
) -> Tensor:
    """x (..., C), residual (..., C) or None -> (..., C), in x's dtype; down (m, C), up (C, m), biases (m,) and (C,).

    Gradients flow to every tensor. Under autocast, and in an exported graph, the definition is used.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_exporting():
        return bottleneck_reference(x, residual, down, down_bias, up, up_bias, scale, relu, norm)
    other = None if residual is None or residual is x else flat(residual)
    gamma, beta, eps = (None, None, 0.0) if norm is None else (norm[0].to(x.dtype), norm[1].to(x.dtype), norm[2])
    tensors = (t.to(x.dtype) for t in (down, down_bias, up, up_bias))
    y, *_ = _forward(flat(x), other, *tensors, gamma, beta, eps, scale, relu, residual is x)
    return y.view(x.shape)


def bottleneck_path(x: Tensor, middle: int) -> Path:
    """Whether the kernel is taken for x (..., C) with m = `middle`, and why."""
    if middle > LARGEST:
        return door(x, f"{middle} in the middle; the kernel holds {LARGEST} at most")
    return door(x, half_only(x))


def _f(z: Tensor, relu: bool) -> Tensor:
    return functional.relu(z) if relu else functional.gelu(z)


def folded(down: Tensor, down_bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G (m, C) in the dtype of `down`, c1 and c0 (m,) in float32 or wider; see `thin_pair`. c1 is that of G as it was rounded."""
    dtype = wide(down)
    g = down * gamma
    return g, g.sum(1, dtype=dtype), torch.addmv(down_bias.to(dtype), down.to(dtype), beta.to(dtype))


# The operator


@operator("bottleneck")
def _forward(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, C), z (M, m), and the norm's mean and rstd (M,), empty without one; with `onto_x` the residual is x."""
    r = x if onto_x else residual
    mean, rstd = (x.new_empty(len(x) if gamma is not None else 0, dtype=wide(x)) for _ in range(2))
    if bottleneck_path(x, len(down)).fused:
        norm = None
        if gamma is not None and beta is not None:
            down, c1, down_bias = folded(down, down_bias, gamma, beta)
            norm = Folded(c1, mean, rstd, eps)
        biases = {"first_bias": down_bias, "second_bias": up_bias}
        return *thin_pair(x, down, up.t(), r, scale, relu, **biases, norm=norm), mean, rstd
    h = x
    if gamma is not None and beta is not None:
        dtype = native(x)
        found, mean, rstd = torch.native_layer_norm(x.to(dtype), gamma.shape, gamma.to(dtype), beta.to(dtype), eps)
        h, mean, rstd = found.to(x.dtype), mean.flatten(), rstd.flatten()
    z = functional.linear(h, down, down_bias)
    y = functional.linear(_f(z, relu), up, up_bias)
    return (y.mul_(scale) if r is None else torch.add(r, y, alpha=scale)), z, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0] if gamma is not None else 0, dtype=wide(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape[0], down.shape[0]), mean, rstd


@operator("bottleneck_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor]:
    """dx (M, C) and dz (M, m)."""
    if bottleneck_path(dy, len(down)).fused:
        c0, norm = None, None
        if gamma is not None and beta is not None:
            down, c1, c0 = folded(down, down_bias, gamma, beta)
            norm = Folded(c1, mean, rstd, x=x)
        return thin_pair(dy, up.t(), down, dy if onto_x else None, scale, relu, first_bias=c0, z=z, norm=norm)
    df = (dy @ up).mul_(scale)
    dz = torch.ops.aten.threshold_backward(df, z, 0) if relu else torch.ops.aten.gelu_backward(df, z)
    if gamma is None:
        return (torch.addmm(dy, dz, down) if onto_x else dz @ down), dz
    dtype, at = native(x), (mean[:, None], rstd[:, None])
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        (dz @ down).to(dtype), x.to(dtype), gamma.shape, *at, gamma.to(dtype), None, [True, False, False]
    )
    return (dx.add_(dy) if onto_x else dx).to(x.dtype), dz


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    relu: bool,
    onto_x: bool,
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), z.new_empty(z.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, down, down_bias, up, _, gamma, beta, _, ctx.scale, ctx.relu, ctx.onto_x = inputs
    ctx.save_for_backward(x, down, down_bias, up, gamma, beta, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, down, down_bias, up, gamma, beta, z, mean, rstd = ctx.saved_tensors
    dx, dz = _backward(dy, x, z, down, down_bias, up, gamma, beta, mean, rstd, ctx.scale, ctx.relu, ctx.onto_x)
    d_up = ctx.scale * (dy.t() @ _f(z, ctx.relu))
    d_down_bias, d_gamma, d_beta = dz.sum(0), None, None
    if gamma is None:
        d_down = dz.t() @ x
    else:
        by_xhat, shift = _onto_normalised(dz, x, mean, rstd), dz.sum(0, dtype=mean.dtype)
        d_down = torch.addr(by_xhat * gamma, shift, beta.to(shift.dtype)).to(down.dtype)
        d_gamma = (down * by_xhat).sum(0).to(gamma.dtype)
        d_beta = (shift @ down.to(shift.dtype)).to(beta.dtype)
    other = dy if ctx.needs_input_grad[1] else None
    return dx, other, d_down, d_down_bias, d_up, ctx.scale * dy.sum(0), d_gamma, d_beta, None, None, None, None


def _onto_normalised(dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """dz^T xhat, (m, C) in float32 or wider, without xhat: (dz rstd)^T x - (dz rstd)^T mean 1^T, both of the same rounded factor."""
    scaled = (dz * rstd[:, None]).to(x.dtype)
    return (scaled.t() @ x).to(mean.dtype) - (scaled.t().to(mean.dtype) @ mean)[:, None]


_forward.register_autograd(_gradients, setup_context=_keep)
