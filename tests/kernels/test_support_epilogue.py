"""Activation, pooling and sum in one pass, against torch's own in float64: values and every gradient, on each device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.kernels.support_epilogue import SLOPE, epilogue_path, support_epilogue
from tests.helpers import TOLERANCE, close, says
from tests.kernels.conftest import INTERPRETED, Device, surrounded

SIZES = {  # leading axes, S, C, H, W, pooled
    "plain": ((1, 1), 3, 4, 6, 8, False),
    "pooled": ((1, 1), 3, 4, 6, 8, True),
    "odd": ((2,), 2, 3, 5, 7, False),
    "wide": ((1, 2), 1, 5, 2, 66, True),
    "several-programs": ((1,), 2, 8, 12, 12, True),
    "smallest": ((1,), 1, 1, 2, 2, True),
}
DTYPES = [torch.float64, torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def literal(t: Tensor, q: Tensor, pool: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The equations. Pixels that `dtype` rounds to the same number are equal to the pooling, as in an output of that dtype."""
    maps = functional.leaky_relu(t + q.unsqueeze(-4), SLOPE)
    seen = maps + (maps.to(dtype).double() - maps).detach()
    one, two, three, four = (seen[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    pooled = [torch.maximum(torch.maximum(one, three), torch.maximum(two, four))] if pool else []
    return [maps, *pooled, maps.sum(-4)]


def got_of(t: Tensor, q: Tensor, pool: bool, fresh: bool = False) -> list[Tensor]:
    mixed = support_epilogue(t, q, pool=pool, fresh=fresh)
    return [m for m in mixed if m is not None]


def draw(size: str, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor, bool]:
    lead, s, c, h, w, pool = SIZES[size]
    t, q = (surrounded(torch.randn(n).to(device, dtype)) for n in ((*lead, s, c, h, w), (*lead, c, h, w)))
    return t.requires_grad_(), q.requires_grad_(), pool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_value_and_every_gradient(size: str, dtype: torch.dtype, device: Device) -> None:
    t, q, pool = draw(size, dtype, device.torch)
    exact = [x.detach().double().requires_grad_() for x in (t, q)]
    got, want = got_of(t, q, pool), literal(*exact, pool, dtype)
    assert [x.dtype for x in got[:-1]] == [dtype] * (len(got) - 1)
    assert got[-1].dtype == torch.promote_types(dtype, torch.float32), "sums are taken in float32 or wider"
    close("values", [x.double() for x in got], [x.detach() for x in want], TOLERANCE[dtype])
    seeds = [torch.randn(x.shape, device=device.torch).to(x.dtype) for x in got]
    mine = torch.autograd.grad(got, (t, q), seeds)
    theirs = torch.autograd.grad(want, exact, [s.double() for s in seeds])
    assert [g.dtype for g in mine] == [dtype, dtype]
    close("gradients", [g.double() for g in mine], list(theirs), 2 * TOLERANCE[dtype])


def test_the_kernel_is_what_runs(device: Device) -> None:
    t, q, _ = draw("odd", torch.float32, device.torch)
    assert epilogue_path(t, q, False).fused == device.fused
    assert not epilogue_path(t, q, True).fused
    assert not epilogue_path(t[:1], q, False).fused
    assert not epilogue_path(t.double(), q, False).fused
    says(Exception(str(epilogue_path(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 2, 2), True))), "fused")


@pytest.mark.parametrize("size", ["odd", "wide"])
def test_its_gradients_by_finite_differences(size: str, device: Device) -> None:
    t, q, pool = draw(size, torch.float64, device.torch)
    assert torch.autograd.gradcheck(lambda t, q: tuple(got_of(t, q, pool)), (t, q), fast_mode=True)


@pytest.mark.parametrize("operator", [False, True], ids=["as called", "the operator"])
def test_equal_pixels_share_the_gradient_as_in_plain_torch(operator: bool, device: Device) -> None:
    t = torch.tensor([[1.0, 1, 2, 2], [0, 1, 2, 2], [3, 0, 1, 0], [0, 0, 0, 1]], device=device.torch).view(
        1, 1, 1, 4, 4
    )
    t, q = t.clone().requires_grad_(), torch.zeros(1, 1, 4, 4, device=device.torch)
    if operator:
        pooled = torch.ops.medgraft.support_epilogue(t, q, True)[1]
    else:
        pooled = support_epilogue(t, q, pool=True, fresh=False).pooled
    (got,) = torch.autograd.grad(pooled.sum(), t)
    want = torch.tensor([[0.5, 0.25, 0.25, 0.25], [0, 0.25, 0.25, 0.25], [1, 0, 0.5, 0], [0, 0, 0, 0.5]])
    assert torch.equal(got[0, 0, 0].cpu(), want)


def test_only_some_outputs_are_used(device: Device) -> None:
    t, q, _ = draw("pooled", torch.float64, device.torch)
    for i in range(3):
        got = torch.autograd.grad(got_of(t, q, True)[i].square().sum(), (t, q))
        close(f"output {i}", list(got), list(torch.autograd.grad(literal(t, q, True)[i].square().sum(), (t, q))))


def test_the_order_of_the_support_does_not_matter(device: Device) -> None:
    t, q, _ = draw("pooled", torch.float64, device.torch)
    order = torch.tensor([2, 0, 1])
    straight, turned = got_of(t, q, True), got_of(t[:, :, order], q, True)
    close("permuted", turned, [x[:, :, order] for x in straight[:2]] + straight[2:])


def test_two_runs_are_equal_bit_for_bit(device: Device) -> None:
    t, q, pool = draw("several-programs", torch.float32, device.torch)
    runs = []
    for _ in range(2):
        out = got_of(t, q, pool)
        runs.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), (t, q))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_terms_that_are_not_contiguous(device: Device) -> None:
    t, q, _ = draw("pooled", torch.float64, device.torch)
    t, q = t.transpose(-1, -2), q.transpose(-1, -2)
    close("turned", got_of(t, q, True), literal(t, q, True))


@pytest.mark.parametrize("pool", [False, True])
def test_opcheck(pool: bool) -> None:
    t, q, _ = draw("wide", torch.float32, "cpu")
    t, q = t.detach()[0].requires_grad_(), q.detach()[0].requires_grad_()
    torch.library.opcheck(torch.ops.medgraft.support_epilogue.default, (t, q, pool))
    given = [x.detach() for x in torch.ops.medgraft.support_epilogue(t, q, pool)]
    back = (given[0], *(torch.randn_like(x) for x in given), pool)
    torch.library.opcheck(torch.ops.medgraft.support_epilogue_backward.default, back)


def test_the_operator_on_the_cpu_is_the_definition() -> None:
    t, q, _ = draw("wide", torch.float64, "cpu")
    flat = t.detach()[0].requires_grad_(), q.detach()[0].requires_grad_()
    got, want = list(torch.ops.medgraft.support_epilogue(*flat, True)), literal(*flat, True)
    close("values", got, want)
    seeds = [torch.randn_like(x) for x in want]
    grads = [list(torch.autograd.grad(out, flat, seeds)) for out in (got, want)]
    close("gradients", *grads)
