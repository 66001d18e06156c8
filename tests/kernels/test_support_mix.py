"""The rearranged cross block against the published arrangement, taken literally: concatenate every pair, then convolve."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.kernels.support_epilogue import SLOPE, Mixed, support_epilogue, support_sum
from medgraft.kernels.support_mix import CrossWeights, query_term, support_shift, support_term, target_path
from tests.helpers import close

Block = tuple[Tensor, Tensor, Tensor]


def literal(u: Tensor, v: Tensor, w: CrossWeights) -> Block:
    """u' and every v'_i as published, and the mean of these. u (B, C, H, W), v (B, S, C, H, W)."""
    b, s = v.shape[:2]
    pairs = torch.cat([u[:, None].expand(-1, s, -1, -1, -1), v], 2).flatten(0, 1)
    z = functional.conv2d(pairs, w.cross, w.cross_bias, padding=1)
    mean = z.unflatten(0, (b, s)).mean(1)
    first = functional.leaky_relu(functional.conv2d(mean, w.target, w.target_bias, padding=1), SLOPE)
    maps = functional.leaky_relu(functional.conv2d(z, w.support, w.support_bias, padding=1), SLOPE)
    maps = maps.unflatten(0, (b, s))
    return first, maps, maps.mean(1)


def rearranged(u: Tensor, v: Tensor, w: CrossWeights, *, chunk: int = 2, fresh: bool = True) -> Block:
    c = query_term(u, w)
    out = target_path(c, (support_sum(v) / v.shape[1]).to(u.dtype), w)
    q = support_shift(c, w)
    chunks: list[Mixed] = []
    for part in v.split(chunk, 1):
        chunks.append(support_epilogue(support_term(part, w), q, pool=False, fresh=fresh))
    return out, torch.cat([m.maps for m in chunks], 1), sum(m.total for m in chunks) / v.shape[1]  # type: ignore[arg-type,return-value]


def weights(fan_u: int, fan_v: int, width: int, dtype: torch.dtype) -> CrossWeights:
    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5).to(dtype).requires_grad_()

    fan_in = fan_u + fan_v
    return CrossWeights(
        draw(width, fan_in, 3, 3),
        draw(width),
        draw(width, width, 3, 3),
        draw(width),
        draw(width, width, 3, 3),
        draw(width),
    )


SIZES = {  # B, S, query channels, support channels, width, H, W
    "block-0": (1, 3, 1, 2, 16, 12, 9),
    "block-0-small": (2, 1, 1, 2, 8, 3, 3),
    "deeper": (2, 5, 6, 6, 6, 8, 8),
    "decoder": (1, 4, 12, 12, 6, 5, 7),
    "one-row": (1, 2, 1, 2, 8, 1, 6),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_same_function_and_every_gradient(size: str) -> None:
    b, s, fan_u, fan_v, width, h, wide = SIZES[size]
    u = torch.randn(b, fan_u, h, wide, dtype=torch.float64, requires_grad=True)
    v = torch.randn(b, s, fan_v, h, wide, dtype=torch.float64, requires_grad=True)
    w = weights(fan_u, fan_v, width, torch.float64)
    outs, grads = [], []
    for way in (literal, rearranged):
        out = way(u, v, w)
        seeds = [
            torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(out)
        ]
        outs.append(list(out))
        grads.append(list(torch.autograd.grad(out, [u, v, *w], seeds)))
    close("values", outs[1], outs[0])
    close("gradients", grads[1], grads[0], 1e-11)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype: torch.dtype, allowed: float) -> None:
    u, v, w = torch.randn(1, 1, 16, 16), torch.rand(1, 7, 2, 16, 16), weights(1, 2, 16, torch.float32)
    with torch.no_grad():
        want = literal(u.double(), v.double(), CrossWeights(*(t.double() for t in w)))
        low = CrossWeights(*(t.to(dtype) for t in w))
        got = rearranged(u.to(dtype), v.to(dtype), low)
    assert got[0].dtype == dtype
    assert got[2].dtype == torch.float32, "means are summed in float32"
    close("low", [t.float() for t in got], [t.float() for t in want], allowed)


def test_one_support_serves_many_queries_without_a_copy() -> None:
    u, v, w = torch.randn(5, 1, 8, 8), torch.rand(1, 3, 2, 8, 8), weights(1, 2, 8, torch.float32)
    with torch.no_grad():
        t = support_term(v, w)
        assert t.shape == (1, 3, 8, 8, 8)
        kept = t.clone()
        got = support_epilogue(t, support_shift(query_term(u, w), w), pool=False, fresh=True)
        close("broadcast", got.maps, literal(u, v.expand(5, -1, -1, -1, -1), w)[1])
        assert torch.equal(t, kept), "a term that serves several queries was written over"


def test_only_a_fresh_term_is_written_over() -> None:
    t, q = torch.randn(1, 3, 8, 6, 6), torch.randn(1, 8, 6, 6)
    kept = t.clone()
    want = support_epilogue(t, q, pool=True, fresh=False)
    assert torch.equal(t, kept)
    got = support_epilogue(t, q, pool=True, fresh=True)
    assert got.maps.data_ptr() == t.data_ptr()
    assert torch.equal(got.maps, want.maps)
    assert got.pooled is not None
    assert torch.equal(got.pooled[0], functional.max_pool2d(want.maps[0], 2))
    close("sum", got.total, want.maps.sum(1))


def test_the_ring_where_padding_shows_is_exact() -> None:
    """A 5x5 kernel alone is wrong there: this is what the strips are for."""
    v, w = torch.rand(1, 1, 2, 8, 8, dtype=torch.float64), weights(1, 2, 16, torch.float64)
    with torch.no_grad():
        got = support_term(v, w)[0, 0]
        two = functional.conv2d(functional.conv2d(v[0], w.cross[:, 1:], padding=1), w.support, padding=1)[0]
        close("term", got, two)
        kernel = functional.conv2d(w.cross[:, 1:].transpose(0, 1), w.support.flip(2, 3), padding=2).transpose(0, 1)
        alone = functional.conv2d(v[0], kernel, padding=2)[0]
        close("inside", alone[:, 1:-1, 1:-1], two[:, 1:-1, 1:-1])
        assert (alone - two).abs()[:, 0].max() > 1e-3
