"""DoRA's gain and its rescaled product against the equation in float64: value and every gradient, on each device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.kernels import dora_gain, dora_linear
from tests.helpers import TOLERANCE, close
from tests.kernels.conftest import INTERPRETED, Device, surrounded

SIZES = {  # rows, K, N, R
    "easy": ((2, 24), 8, 12, 3),
    "awkward": ((3, 7, 5), 37, 61, 11),
    "smallest": ((1, 1), 1, 1, 1),
    "a-vector": ((), 6, 5, 2),
}
DTYPES = [torch.float64, torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def dora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, *, held: bool) -> Tensor:
    """x W'^T with W' = m (W + s B A) / |W + s B A| and m = magnitude |W|, row by row; the norm may be held constant."""
    changed = weight + scale * b @ a
    norm = changed.norm(dim=1, keepdim=True)
    w = (magnitude * weight.norm(dim=1))[:, None] * changed / (norm.detach() if held else norm)
    return x @ w.T


def rescaled(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor) -> Tensor:
    """c (x (W + s B A)^T) + b."""
    return gain * (x @ (weight + scale * b @ a).T) + bias


def inputs(size: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor]:
    """x, W, b, A, B and a magnitude near 1; all but W and b want a gradient."""
    rows, k, n, r = SIZES[size]
    shapes = (*rows, k), (n, k), (n,), (r, k), (n, r)
    drawn = [torch.randn(s) / max(1, s[-1] if len(s) > 1 else 1) ** 0.5 for s in shapes]
    drawn.append(1 + 0.1 * torch.randn(n))
    return [surrounded(t.to(device, dtype)).requires_grad_(i not in (1, 2)) for i, t in enumerate(drawn)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_value_and_every_gradient(size: str, dtype: torch.dtype, biased: bool, device: Device) -> None:
    x, weight, bias, a, b, gain = inputs(size, dtype, device.torch)
    leaves = [x, a, b, gain]
    exact = [t.detach().double().requires_grad_() for t in (x, a, b, gain)]
    shift = bias.double() if biased else torch.zeros(len(bias), dtype=torch.float64, device=device.torch)
    got = dora_linear(x, weight, bias if biased else None, a, b, 1.5, gain)
    want = rescaled(exact[0], weight.double(), shift, exact[1], exact[2], 1.5, exact[3])
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=device.torch).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for name, t, exactly in zip(("x", "a", "b", "gain"), leaves, exact, strict=True):
        assert t.grad.dtype == dtype
        close(f"d{name}", t.grad.double(), exactly.grad, TOLERANCE[dtype])


def test_a_gain_of_one_and_zero_factors_are_the_frozen_layer(device: Device) -> None:
    """Bit for bit on the plain path."""
    x, weight, bias, a, b, _ = (t.detach() for t in inputs("awkward", torch.float32, device.torch))
    got = dora_linear(x, weight, bias, a, torch.zeros_like(b), 4.0, torch.ones_like(bias))
    want = functional.linear(x, weight, bias)
    if device.fused:
        close("y", got, want, 1e-6)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_a_gain_that_is_not_learnt(size: str, dtype: torch.dtype, biased: bool, device: Device) -> None:
    """Nothing is kept for it then, and the weight may be scaled in place of y: the same values and the other gradients."""
    x, weight, bias, a, b, gain = inputs(size, dtype, device.torch)
    shift = bias if biased else None
    runs = []
    for learnt in (True, False):
        y = dora_linear(x, weight, shift, a, b, 1.5, gain.detach().requires_grad_(learnt))
        dy = torch.linspace(-1, 1, y.numel(), device=device.torch).view_as(y).to(dtype)
        runs.append([y, *torch.autograd.grad(y, (x, a, b), dy)])
    with torch.no_grad():
        runs[0].append(runs[0][0])
        runs[1].append(dora_linear(x, weight, shift, a, b, 1.5, gain))
    for i, (with_it, without) in enumerate(zip(*runs, strict=True)):
        close(f"{i}", without.double(), with_it.double(), TOLERANCE[dtype])


def test_more_rows_than_are_summed_at_once() -> None:
    x, weight, bias, a, b, gain = (
        torch.randn(s, dtype=torch.float64) for s in ((150, 9), (7, 9), 7, (2, 9), (7, 2), 7)
    )
    gain.requires_grad_()
    grads = [
        torch.autograd.grad(f(x, weight, bias, a, b, 0.5, gain).square().sum(), gain) for f in (dora_linear, rescaled)
    ]
    close("dgain", *grads)


def test_its_gradients_by_finite_differences(device: Device) -> None:
    x, weight, bias, a, b, gain = inputs("easy", torch.float64, device.torch)
    assert torch.autograd.gradcheck(
        lambda x, a, b, gain: dora_linear(x, weight, bias, a, b, 1.5, gain), (x, a, b, gain), fast_mode=True
    )


def test_a_small_change_of_the_gain_survives_half_precision() -> None:
    """c = 1.003 is 1 in bfloat16; c - 1 is not 0, and half of the numbers move by their last digit."""
    x, weight, bias, a, b, _ = (t.detach() for t in inputs("awkward", torch.bfloat16))
    gain = torch.full((61,), 1.003)
    assert (gain.bfloat16() == 1).all()
    y, z = (dora_linear(x, weight, bias, a, b, 1.0, c) for c in (gain, torch.ones(61)))
    assert (y != z).float().mean() > 0.2


def test_a_thawed_weight_gets_its_gradient() -> None:
    args = [t.detach().requires_grad_() for t in inputs("easy", torch.float64)]
    found = torch.autograd.grad(dora_linear(*args[:5], 1.5, args[5]).square().sum(), args)
    close("gradients", list(found), list(torch.autograd.grad(rescaled(*args[:5], 1.5, args[5]).square().sum(), args)))


def test_autocast() -> None:
    x, weight, bias, a, b, gain = inputs("awkward", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(x, weight, bias, a, b, 2.0, gain)
        got = torch.autograd.grad(y.float().sum(), (x, a, b, gain))
    assert y.dtype == torch.bfloat16
    want = rescaled(x, weight, bias, a, b, 2.0, gain)
    close("gradients", list(got), list(torch.autograd.grad(want.sum(), (x, a, b, gain))), 3e-2)


def test_opcheck() -> None:
    x, weight, bias, a, b, gain = inputs("easy", torch.float64)
    flat = x.detach().flatten(0, -2).requires_grad_()
    torch.library.opcheck(torch.ops.medgraft.dora_linear.default, (flat, weight, bias, a, b, 1.5, gain, True))


def test_one_graph() -> None:
    x, weight, bias, a, b, gain = inputs("awkward", torch.float64)
    compiled = torch.compile(dora_linear, fullgraph=True, backend="aot_eager")
    got, want = (f(x, weight, bias, a, b, 1.5, gain) for f in (compiled, rescaled))
    close("y", got, want)
    grads = [torch.autograd.grad(y.square().sum(), (x, a, b, gain)) for y in (got, want)]
    close("gradients", list(grads[0]), list(grads[1]))


# The gain


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_equation_and_its_gradient_holds_the_norm(size: str) -> None:
    x, weight, _, a, b, magnitude = inputs(size, torch.float64)
    found, loose = [], []
    for held in (True, False):
        grads = torch.autograd.grad(
            dora(x, weight, a, b, 1.5, magnitude, held=held).square().sum(), (x, a, b, magnitude)
        )
        (found if held else loose).extend(grads)
    y = dora_linear(x, weight, None, a, b, 1.5, dora_gain(weight, a, b, 1.5, magnitude))
    close("y", y, dora(x, weight, a, b, 1.5, magnitude, held=True).detach(), 1e-5)
    got = torch.autograd.grad(y.square().sum(), (x, a, b, magnitude))
    for name, mine, want in zip(("x", "a", "b", "magnitude"), got, found, strict=True):
        close(f"d{name}", mine, want, 1e-5)
    if size != "smallest":
        assert not torch.allclose(found[2], loose[2], rtol=1e-3), (
            "holding the norm makes no difference: nothing is tested"
        )


def test_the_gain_of_a_fresh_part_is_exactly_one() -> None:
    _, weight, _, a, b, _ = inputs("awkward", torch.float32)
    assert torch.equal(dora_gain(weight, a, torch.zeros_like(b), 2.0, torch.ones(61)), torch.ones(61))


def test_the_gain_of_a_row_of_zeros_is_finite() -> None:
    _, weight, _, a, b, _ = (t.detach() for t in inputs("easy", torch.float32))
    weight[3] = 0
    assert torch.isfinite(dora_gain(weight, a, b, 2.0, torch.ones(12))).all()


@pytest.mark.parametrize("shrink", [1e-2, 1e-3])
def test_the_gain_where_the_update_nearly_cancels_the_weight(shrink: float) -> None:
    """|W + s B A|^2 is a difference of large numbers there; the gain stays right to a per cent and never becomes NaN."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(12, 3)
    weight = -(b @ a) * (1 - shrink)
    want = weight.double().norm(dim=1) / (weight.double() + b.double() @ a.double()).norm(dim=1)
    got = dora_gain(weight, a, b, 1.0, torch.ones(12))
    assert torch.isfinite(got).all()
    close("gain", got.double(), want, 1e-2 if shrink > 5e-3 else 1.0)
