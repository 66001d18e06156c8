"""The fused low-rank product against its equation in float64: value and every gradient, on each device; the operator as torch wants it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from medgraft.kernels import lora_linear
from medgraft.kernels.lora_linear import lora_backward, lora_path, merging_pays
from medgraft.kernels.shrink import LARGEST, beside, shrink
from tests.helpers import TOLERANCE, close, says
from tests.kernels.conftest import INTERPRETED, Device, surrounded

SIZES = {  # rows, K, N, R; the first three are worth the joined arrangement
    "easy": ((2, 24), 8, 12, 3),
    "awkward": ((3, 7, 5), 37, 61, 11),
    "rank-24": ((150,), 80, 96, 24),
    "smallest": ((1, 1), 1, 1, 1),
    "a-vector": ((), 6, 5, 2),
    "wide-in": ((4,), 61, 7, 4),
}
DTYPES = [torch.float64, torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (W + s B A)^T + b."""
    y = x @ (weight + scale * b @ a).T
    return y if bias is None else y + bias


def inputs(size: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor]:
    """x, W, b, A, B, amid NaN; all but W and b want a gradient."""
    rows, k, n, r = SIZES[size]
    shapes = (*rows, k), (n, k), (n,), (r, k), (n, r)
    drawn = [torch.randn(s) / max(1, s[-1] if len(s) > 1 else 1) ** 0.5 for s in shapes]
    return [surrounded(t.to(device, dtype)).requires_grad_(i not in (1, 2)) for i, t in enumerate(drawn)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_value_and_every_gradient(size: str, dtype: torch.dtype, device: Device) -> None:
    args = inputs(size, dtype, device.torch)
    x, weight, bias = args[:3]
    exact = [t.detach().double().requires_grad_() for t in args]
    got, want = lora_linear(*args, 1.5), low_rank(*exact, 1.5)
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    term = functional.linear(x.detach().double(), weight.double(), bias.double())
    close("the adapter's own term", got.double() - term, want.detach() - term, 10 * TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=device.torch).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for name, t, exactly in zip(("x", "weight", "bias", "a", "b"), args, exact, strict=True):
        if name in ("weight", "bias"):
            assert t.grad is None
        else:
            assert t.grad.dtype == dtype
            close(f"d{name}", t.grad.double(), exactly.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("size", ["easy", "awkward", "rank-24"])
def test_the_kernel_is_what_runs(size: str, device: Device) -> None:
    x, weight, _, a, _ = inputs(size, torch.float32, device.torch)
    assert lora_path(x, weight, len(a)).fused == device.fused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_factors_are_the_frozen_layer(dtype: torch.dtype, device: Device) -> None:
    """Bit for bit on the plain path."""
    x, weight, bias, a, b = (t.detach() for t in inputs("awkward", dtype, device.torch))
    got, want = lora_linear(x, weight, bias, a, torch.zeros_like(b), 4.0), functional.linear(x, weight, bias)
    if device.fused:
        close("y", got, want, TOLERANCE[dtype] / 10)
    else:
        assert torch.equal(got, want)


def test_two_runs_are_equal_bit_for_bit(device: Device) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        x, weight, bias, a, b = inputs("awkward", torch.float32, device.torch)
        y = lora_linear(x, weight, bias, a, b, 2.0)
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_its_gradients_by_finite_differences(device: Device) -> None:
    x, weight, bias, a, b = inputs("easy", torch.float64, device.torch)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.5), (x, a, b), fast_mode=True)


def test_linear_in_the_scale(device: Device) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("awkward", torch.float64, device.torch))
    one, two = (lora_linear(x, weight, bias, a, b, s) - functional.linear(x, weight, bias) for s in (0.5, 1.0))
    close("twice", two, 2 * one, 1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...], device: Device) -> None:
    x, weight, bias, a, b = inputs("easy", torch.float64, device.torch)
    leaves = [x, a, b]
    full = torch.autograd.grad(lora_linear(x, weight, bias, a, b, 1.5).sum(), leaves)
    for i, t in enumerate(leaves):
        t.requires_grad_(i in wanted)
    some = torch.autograd.grad(lora_linear(x, weight, bias, a, b, 1.5).sum(), [leaves[i] for i in wanted])
    close("some", list(some), [full[i] for i in wanted])


def test_an_empty_batch(device: Device) -> None:
    _, weight, bias, a, b = inputs("easy", torch.float32, device.torch)
    x = torch.zeros(0, 4, 8, device=device.torch, requires_grad=True)
    y = lora_linear(x, weight, bias, a, b, 1.0)
    assert y.shape == (0, 4, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not a.grad.any()


def test_inputs_that_are_not_contiguous(device: Device) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("awkward", torch.float64, device.torch))
    turned, wide = x.transpose(0, 1), torch.cat([x, x], -1)
    for view in (turned, x[1:], x[..., ::1][:, 1:], wide[..., 37:]):
        y = lora_linear(view, weight.t().contiguous().t(), bias, a.t().contiguous().t(), b.t().contiguous().t(), 2.0)
        close("y", y, low_rank(view, weight, bias, a, b, 2.0))


def test_a_gradient_without_strides(device: Device) -> None:
    """`sum` hands back one number, expanded."""
    x, weight, bias, a, b = inputs("awkward", torch.float64, device.torch)
    y = lora_linear(x, weight, bias, a, b, 2.0)
    got = torch.autograd.grad(y.sum(), (x, a, b), retain_graph=True)
    close("gradients", list(got), list(torch.autograd.grad(y, (x, a, b), torch.ones_like(y))))


# What `shrink` writes


@pytest.mark.parametrize("rank", [1, 8, 16, 17, LARGEST])
def test_shrink(rank: int, device: Device) -> None:
    if not device.fused:
        return  # the kernel alone is meant
    x, a = (surrounded(torch.randn(n, 50, device=device.torch)) for n in (70, rank))
    out = shrink(x, a, 0.5)
    assert torch.equal(out[:, :50], x)
    close("u", out[:, 50 : 50 + rank], 0.5 * x @ a.T, 1e-5)
    assert not out[:, 50 + rank :].any()
    assert out.shape[1] == beside(x, torch.randn(70, rank, device=device.torch)).shape[1]


# The arrangement in plain torch


@pytest.mark.parametrize("rows", [60, 700])
def test_merged_and_begun_are_one_function(rows: int) -> None:
    x, weight, bias, a, b = (
        torch.randn(s, dtype=torch.float64) for s in ((rows, 64), (96, 64), (96,), (4, 64), (96, 4))
    )
    assert merging_pays(rows, weight) == (rows == 700)
    for added in (bias, None):
        close("y", lora_linear(x, weight, added, a, b, 0.5), low_rank(x, weight, added, a, b, 0.5))
    fresh = lora_linear(x, weight, bias, a, torch.zeros_like(b), 0.5)
    assert torch.equal(fresh, functional.linear(x, weight, bias))


def test_half_precision_keeps_what_a_merged_weight_would_lose() -> None:
    """s B A is below the last digit of W: rounded together they are W, and the whole adapter would be gone."""
    x, weight = torch.randn(4000, 16).bfloat16(), torch.ones(16, 16).bfloat16()
    assert not merging_pays(len(x), weight)
    a, b = torch.randn(2, 16).bfloat16(), (torch.randn(16, 2) * 1e-4).bfloat16()
    assert torch.equal((weight.double() + b.double() @ a.double()).bfloat16(), weight)
    want = low_rank(*(t.double() for t in (x, torch.zeros_like(weight))), None, a.double(), b.double(), 1.0)
    close("the adapter's own term", lora_linear(x, torch.zeros_like(weight), None, a, b, 1.0).double(), want, 1e-2)
    moved = lora_linear(x, weight, None, a, b, 1.0).double() - functional.linear(x, weight).double()
    assert (moved * want).sum() > 0.5 * want.square().sum()


class Largest(TorchDispatchMode):
    """Counts tensors of one shape among the results of every operation."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.seen = torch.Size(shape), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.seen += isinstance(out, Tensor) and out.shape == self.shape
        return out


def test_no_gradient_of_the_weight_is_formed() -> None:
    x, weight, _, a, b = (t.detach() for t in inputs("wide-in", torch.float32))
    dy = torch.randn(4, 7)
    with Largest(*weight.shape) as mode:
        dy.t() @ x
        assert mode.seen == 1
        lora_backward.plain(dy, x, weight, a, b, 2.0, [True] * 3)  # the operator's own steps
        assert mode.seen == 1


def test_a_thawed_weight_gets_its_gradient() -> None:
    args = [t.detach().requires_grad_() for t in inputs("easy", torch.float64)]
    found = torch.autograd.grad(lora_linear(*args, 1.5).square().sum(), args)
    close("gradients", list(found), list(torch.autograd.grad(low_rank(*args, 1.5).square().sum(), args)))


def test_without_a_bias() -> None:
    x, weight, _, a, b = inputs("awkward", torch.float64)
    close("y", lora_linear(x, weight, None, a, b, 1.5), low_rank(x, weight, None, a, b, 1.5))


def test_factors_of_another_precision_are_cast() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("easy", torch.bfloat16))
    wide = [t.float().requires_grad_() for t in (a, b)]
    y = lora_linear(x, weight, bias, *wide, 2.0)
    assert torch.equal(y, lora_linear(x, weight, bias, a, b, 2.0))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), wide))


def test_autocast() -> None:
    x, weight, bias, a, b = inputs("awkward", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, 2.0)
        got = torch.autograd.grad(y.float().sum(), (x, a, b))
    assert y.dtype == torch.bfloat16
    want = low_rank(x, weight, bias, a, b, 2.0)
    close("y", y.float(), want.detach(), 3e-2)
    assert all(g.dtype == torch.float32 for g in got)
    close("gradients", list(got), list(torch.autograd.grad(want.sum(), (x, a, b))), 3e-2)


def test_the_reason_is_a_sentence() -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(12, 8)
    says(Exception(str(lora_path(x, weight, 4))), "not fused", "cpu")


# The operator


def test_opcheck() -> None:
    x, weight, bias, a, b = inputs("easy", torch.float64)
    flat = x.detach().flatten(0, -2).requires_grad_()
    torch.library.opcheck(torch.ops.medgraft.lora_linear.default, (flat, weight, bias, a, b, 1.5))
    dy = torch.randn(len(flat), 12, dtype=torch.float64)
    for wanted in ([True] * 3, [True, False, False], [False, True, True]):
        args = (dy, flat.detach(), weight, a.detach(), b.detach(), 1.5, wanted)
        torch.library.opcheck(torch.ops.medgraft.lora_linear_backward.default, args)


def test_one_graph() -> None:
    x, weight, bias, a, b = inputs("awkward", torch.float64)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = compiled(x, weight, bias, a, b, 1.5)
    want = low_rank(x, weight, bias, a, b, 1.5)
    close("y", got, want)
    grads = [torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (got, want)]
    close("gradients", list(grads[0]), list(grads[1]))
