"""The cross block of in-context segmentation, rearranged: the same function at a third of the work.

As published, for a query map u and support maps v_1 .. v_S, linear 3x3 convolutions and f = LeakyReLU(0.01):

    z_i = cross([u, v_i]),    u' = f(target(mean_i z_i)),    v'_i = f(support(z_i))

Convolution is linear. With cross = (W_u | W_v) and bias b, c = W_u * u + b, and m the mean of the v_i:

    u' = f(target(c + W_v * m)),    v'_i = f(t_i + q),    t_i = W_s * (W_v * v_i),    q = W_s * c + b_s

So nothing of shape (S, 2C, H, W) is built, c and q are computed once a query, and t_i, where v_i is fixed, once and for all. Where
v_i has few channels (image and label) the two convolutions of t_i are one of 5x5, except on the outermost ring of pixels, where the
zero padding between them shows.

`support_epilogue` does what is left of v'_i.

Shapes: u, m, c, q (..., C, H, W); v, t (..., S, C, H, W); leading axes broadcast, so one support serves many queries
uncopied. Any float dtype.

Source: Butoi et al. 2023, UniverSeg (ICCV), section 3.2, in the form of the released code.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from .support_epilogue import SLOPE


class CrossWeights(NamedTuple):
    """The convolutions of a block: kernels (out, in, 3, 3), biases (out,). `cross` takes the query's channels first."""

    cross: Tensor
    cross_bias: Tensor
    target: Tensor
    target_bias: Tensor
    support: Tensor
    support_bias: Tensor


def query_term(u: Tensor, w: CrossWeights) -> Tensor:
    """c = W_u * u + b."""
    return _conv(u, w.cross[:, : u.shape[-3]], w.cross_bias)


def target_path(c: Tensor, m: Tensor, w: CrossWeights) -> Tensor:
    """u' = f(target(c + W_v * m))."""
    crossed = c + _conv(m, w.cross[:, -m.shape[-3] :])
    return functional.leaky_relu(_conv(crossed, w.target, w.target_bias), SLOPE)


def support_shift(c: Tensor, w: CrossWeights) -> Tensor:
    """q = W_s * c + b_s, the query's share of every v'_i."""
    return _conv(c, w.support, w.support_bias)


def support_term(v: Tensor, w: CrossWeights) -> Tensor:
    """t_i = W_s * (W_v * v_i), the support's own share. It does not depend on the query."""
    first = w.cross[:, -v.shape[-3] :]
    middle, few = first.shape[:2]
    if 25 * few >= 9 * (few + middle) or min(v.shape[-2:]) < 3:
        return _conv(_conv(v, first), w.support)
    return _two_in_one(v, first, w.support)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A padded 3x3 convolution over any leading axes."""
    y = functional.conv2d(x.flatten(0, -4), weight, bias, padding=1)
    return y.unflatten(0, x.shape[:-3])


def _two_in_one(v: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """second * (first * v) by one 5x5 kernel; the outermost ring by the two convolutions themselves."""
    # K[o, i] = sum_m second[o, m] (full) first[m, i]: the composition of two correlations is a full convolution of their kernels.
    kernel = functional.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2).transpose(0, 1)
    flat = v.flatten(0, -4)
    y = functional.conv2d(flat, kernel, padding=2)

    def both(strip: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(strip, first, padding=1), second, padding=1)

    # A pixel on the border sees two rows (or columns) inwards; the strips are wide enough to keep their own far border out of it.
    y[..., :1, :] = both(flat[..., :4, :])[..., :1, :]
    y[..., -1:, :] = both(flat[..., -4:, :])[..., -1:, :]
    y[..., :1] = both(flat[..., :4])[..., :1]
    y[..., -1:] = both(flat[..., -4:])[..., -1:]
    return y.unflatten(0, v.shape[:-3])
