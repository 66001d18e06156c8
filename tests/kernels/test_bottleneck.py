"""The bottleneck against its equation in float64: value and every gradient, on each device; the operator as torch wants it."""

from __future__ import annotations

import math
from importlib import import_module as module

import pytest
import torch
from torch import Tensor

from medgraft.kernels import bottleneck
from medgraft.kernels.bottleneck import CONFIGS, LARGEST, bottleneck_path, bottleneck_reference
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
    op = module("medgraft.kernels.bottleneck")
    for table in CONFIGS.values():
        assert max(table) == LARGEST
    assert op._config(torch.zeros(1), 65) == CONFIGS[90][256]


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


# The operator


@pytest.mark.parametrize("way", ["sequential", "parallel", "paper"])
def test_opcheck(way: str) -> None:
    _, (x, r, *layers) = draw("easy", way, torch.float64)
    rows = x.detach().flatten(0, -2).requires_grad_()
    other = r.detach().flatten(0, -2).requires_grad_() if way == "parallel" else None
    args = (rows, other, *layers, 0.5, way == "parallel", way == "sequential")
    torch.library.opcheck(torch.ops.medgraft.bottleneck.default, args)
    z = torch.randn(len(rows), len(layers[0]), dtype=torch.float64)
    back = (rows.detach(), z, layers[0].detach(), layers[2].detach(), 0.5, False, way == "sequential")
    torch.library.opcheck(torch.ops.medgraft.bottleneck_backward.default, back)


@pytest.mark.parametrize("way", WAYS)
def test_one_graph(way: str) -> None:
    leaves, args = draw("awkward", way, torch.float64)
    got = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")(*args, *WAYS[way][1:])
    want = bottleneck_reference(*args, *WAYS[way][1:])
    close("y", got, want)
    grads = [list(torch.autograd.grad(y.square().sum(), leaves)) for y in (got, want)]
    close("gradients", *grads)
