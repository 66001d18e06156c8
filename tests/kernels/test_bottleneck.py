"""The bottleneck against its equation in float64: value and every gradient, on each device; the operator as torch wants it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medgraft.kernels import bottleneck
from medgraft.kernels.bottleneck import bottleneck_path, bottleneck_reference
from medgraft.kernels.thin_pair import BEHIND_A_NORM, CONFIGS, LARGEST, config_of
from tests.helpers import TOLERANCE, close, says
from tests.kernels.conftest import INTERPRETED, Device, surrounded

SIZES = {
    "easy": ((2, 5), 16, 4),
    "awkward": ((3, 7, 5), 37, 11),
    "several-tiles": ((70,), 130, 33),
    "smallest": ((1,), 1, 1),
}
WAYS = {  # what it is added to, scale, ReLU
    "sequential": ("x", 1.0, False),
    "parallel": ("other", 0.1, True),
    "paper": ("nothing", 1.0, False),
    "scaled": ("x", 0.5, True),
}
DTYPES = [torch.float64, torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def equation(
    x: Tensor, r: Tensor | None, down: Tensor, bd: Tensor, up: Tensor, bu: Tensor, s: float, relu: bool
) -> Tensor:
    z = x @ down.T + bd
    f = z.clamp_min(0) if relu else z * (1 + torch.erf(z / math.sqrt(2))) / 2
    y = s * (f @ up.T + bu)
    return y if r is None else r + y


def draw(
    size: str, way: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The leaves and the arguments: x, what it is added to, and the two layers; amid NaN."""
    rows, c, m = SIZES[size]
    shapes = (*rows, c), (*rows, c), (m, c), (m,), (c, m), (c,)
    drawn = [torch.randn(s) / (s[-1] ** 0.5 if i in (2, 4) else 1) for i, s in enumerate(shapes)]
    leaves = [surrounded(t.to(device, dtype)).requires_grad_() for t in drawn]
    onto = {"x": leaves[0], "other": leaves[1], "nothing": None}[WAYS[way][0]]
    if onto is not leaves[1]:
        return [leaves[0], *leaves[2:]], [leaves[0], onto, *leaves[2:]]
    return leaves, list(leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_value_and_every_gradient(size: str, way: str, dtype: torch.dtype, device: Device) -> None:
    leaves, args = draw(size, way, dtype, device.torch)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    twin = {id(t): e for t, e in zip(leaves, exact, strict=True)}
    got = bottleneck(*args, *WAYS[way][1:])
    want = equation(*(None if t is None else twin[id(t)] for t in args), *WAYS[way][1:])
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=device.torch).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for i, (t, e) in enumerate(zip(leaves, exact, strict=True)):
        close(f"gradient {i}", t.grad.double(), e.grad, 2 * TOLERANCE[dtype])


def test_the_kernel_is_what_runs(device: Device) -> None:
    x = torch.zeros(4, 16, device=device.torch)
    assert bottleneck_path(x, LARGEST).fused == device.fused
    assert not bottleneck_path(x, LARGEST + 1).fused


@pytest.mark.parametrize("way", WAYS)
def test_its_gradients_by_finite_differences(way: str, device: Device) -> None:
    leaves, args = draw("easy", way, torch.float64, device.torch)

    def call(*moved: Tensor) -> Tensor:
        twin = {id(t): m for t, m in zip(leaves, moved, strict=True)}
        return bottleneck(*(None if t is None else twin[id(t)] for t in args), *WAYS[way][1:])

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_a_fresh_one_is_silent(device: Device) -> None:
    _, (x, r, down, bd, up, bu) = draw("awkward", "sequential", torch.float32, device.torch)
    assert torch.equal(bottleneck(x, r, down, bd, torch.zeros_like(up), torch.zeros_like(bu)), x)


def test_two_runs_are_equal_bit_for_bit(device: Device) -> None:
    leaves, args = draw("awkward", "parallel", torch.float32, device.torch)
    runs = []
    for _ in range(2):
        y = bottleneck(*args, 0.1, True)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_inputs_that_are_not_contiguous(device: Device) -> None:
    _, (x, r, down, bd, up, bu) = draw("awkward", "parallel", torch.float64, device.torch)
    args = [t.transpose(0, 1) for t in (x, r)] + [down.t().contiguous().t(), bd, up.t().contiguous().t(), bu]
    close("y", bottleneck(*args, 0.1, True), equation(*args, 0.1, True))
    expanded = bu[:1].expand(len(bu))
    close("y", bottleneck(*args[:5], expanded), equation(*args[:5], expanded, 1.0, False))


def test_an_empty_batch(device: Device) -> None:
    _, (x, _, *layers) = draw("easy", "sequential", torch.float32, device.torch)
    x = x.detach()[:0].requires_grad_()
    y = bottleneck(x, x, *layers)
    assert y.shape == x.shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), layers))


def test_every_middle_has_a_configuration() -> None:
    for table in (*CONFIGS.values(), *BEHIND_A_NORM.values()):
        assert max(table) == LARGEST
    assert config_of(torch.zeros(1), 65) == CONFIGS[90][256]
    assert config_of(torch.zeros(1), 65, normed_backward=True) == CONFIGS[80][256]


def test_layers_of_another_precision_are_cast() -> None:
    _, (x, r, *layers) = draw("easy", "parallel", torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in layers]
    y = bottleneck(x, r, *wide)
    assert torch.equal(y, bottleneck(x, r, *layers))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), wide))


def test_autocast() -> None:
    leaves, args = draw("awkward", "sequential", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = bottleneck(*args)
        got = torch.autograd.grad(y.sum(), leaves)
    want = torch.autograd.grad(equation(*args, 1.0, False).sum(), leaves)
    close("gradients", list(got), list(want), 3e-2)


def test_the_reason_is_a_sentence() -> None:
    says(Exception(str(bottleneck_path(torch.zeros(1, 1), 1))), "not fused", "cpu")


# A LayerNorm in front


def normed(size: str, way: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[list[Tensor], list]:
    """As `draw`, with gamma and beta at the end of the leaves; the rows have means of their own."""
    leaves, args = draw(size, way, dtype, device)
    c = leaves[0].shape[-1]
    norm = [surrounded(t.to(device, dtype)).requires_grad_() for t in (1 + 0.2 * torch.randn(c), torch.randn(c))]
    with torch.no_grad():
        leaves[0] += 2
        if dtype.itemsize < 4 and WAYS[way][2]:  # no z so near to zero that its rounding decides about the ReLU
            args[3].copy_(8 * args[3].sign())
    return [*leaves, *norm], [*args, *norm]


def apply(f: Any, args: list[Tensor | None], way: str, eps: float = 1e-3) -> Tensor:
    *layers, gamma, beta = args
    return f(*layers, *WAYS[way][1:], norm=(gamma, beta, eps))


def normed_equation(*args: Any, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    x, r, *layers = args
    gamma, beta, eps = norm
    gap = x - x.mean(-1, keepdim=True)
    h = gap / (gap.square().mean(-1, keepdim=True) + eps).sqrt() * gamma + beta
    y = equation(h, None, *layers)
    return y if r is None else r + y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", ["easy", "awkward", "several-tiles"])
def test_behind_a_norm_value_and_every_gradient(size: str, way: str, dtype: torch.dtype, device: Device) -> None:
    leaves, args = normed(size, way, dtype, device.torch)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    twin = {id(t): e for t, e in zip(leaves, exact, strict=True)}
    got = apply(bottleneck, args, way)
    want = apply(normed_equation, [None if t is None else twin[id(t)] for t in args], way)
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), 2 * TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=device.torch).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for i, (t, e) in enumerate(zip(leaves, exact, strict=True)):
        assert t.grad.dtype == dtype
        close(f"gradient {i}", t.grad.double(), e.grad, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS)
def test_behind_a_norm_gradients_by_finite_differences(way: str, device: Device) -> None:
    leaves, args = normed("easy", way, torch.float64, device.torch)

    def call(*moved: Tensor) -> Tensor:
        twin = {id(t): m for t, m in zip(leaves, moved, strict=True)}
        return apply(bottleneck, [None if t is None else twin[id(t)] for t in args], way)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_a_large_mean_does_not_cancel(device: Device) -> None:
    """Rows at 1,000 with a spread of 1: of float32's seven digits three are left, and they are right."""
    leaves, args = normed("several-tiles", "paper", torch.float32, device.torch)
    with torch.no_grad():
        leaves[0] += 1000
    wide = [None if t is None else t.detach().double() for t in args]
    close("y", apply(bottleneck, args, "paper").double(), apply(normed_equation, wide, "paper"), 1e-3)


def test_a_row_without_spread_is_finite(device: Device) -> None:
    leaves, args = normed("easy", "parallel", torch.float32, device.torch)
    with torch.no_grad():
        leaves[0].fill_(3.0)
    y = apply(bottleneck, args, "parallel")
    close("y", y, apply(normed_equation, args, "parallel").detach(), 1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), leaves))


def test_behind_a_norm_an_empty_batch_and_two_equal_runs(device: Device) -> None:
    leaves, args = normed("awkward", "sequential", torch.float32, device.torch)
    runs = []
    for _ in range(2):
        y = apply(bottleneck, args, "sequential")
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    x = leaves[0].detach()[:0].requires_grad_()
    y = apply(bottleneck, [x, x, *args[2:]], "sequential")
    assert y.shape == x.shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves[1:]))


def test_behind_a_norm_autocast() -> None:
    leaves, args = normed("awkward", "sequential", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = apply(bottleneck, args, "sequential")
        got = torch.autograd.grad(y.float().sum(), leaves)
    want = torch.autograd.grad(apply(normed_equation, args, "sequential").sum(), leaves)
    close("gradients", list(got), list(want), 3e-2)


# The operator


@pytest.mark.parametrize("way", ["sequential", "parallel", "paper"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_opcheck(way: str, norm: bool) -> None:
    _, (x, r, *layers) = draw("easy", way, torch.float64)
    rows = x.detach().flatten(0, -2).requires_grad_()
    other = r.detach().flatten(0, -2).requires_grad_() if way == "parallel" else None
    scales = [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2)] if norm else [None, None]
    args = (rows, other, *layers, *scales, 1e-5, 0.5, way == "parallel", way == "sequential")
    torch.library.opcheck(torch.ops.medgraft.bottleneck.default, args)
    z = torch.randn(len(rows), len(layers[0]), dtype=torch.float64)
    held = [t.detach() if t is not None else None for t in (rows, rows, z, *layers[:3], *scales)]
    moments = [torch.rand(len(rows) if norm else 0, dtype=torch.float64) + 1 for _ in range(2)]
    torch.library.opcheck(
        torch.ops.medgraft.bottleneck_backward.default, (*held, *moments, 0.5, False, way == "sequential")
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_one_graph(way: str, norm: bool) -> None:
    leaves, args = (normed if norm else draw)("awkward", way, torch.float64)

    def call(f: Any, *args: Any) -> Tensor:
        return apply(f, list(args), way) if norm else f(*args, *WAYS[way][1:])

    compiled = torch.compile(lambda *args: call(bottleneck, *args), fullgraph=True, backend="aot_eager")
    got, want = compiled(*args), call(bottleneck_reference, *args)
    close("y", got, want)
    grads = [list(torch.autograd.grad(y.square().sum(), leaves)) for y in (got, want)]
    close("gradients", *grads)
