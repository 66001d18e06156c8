"""The mixed product against a loop over images in float64: values, every gradient, any order of rows; on each device."""

from __future__ import annotations

from importlib import import_module as module

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.errors import BadCall
from medgraft.kernels import mixed_lora_linear
from medgraft.kernels.mixed_lora import LONG, by_runs, mixed_lora_path
from tests.helpers import TOLERANCE, close, says
from tests.kernels.conftest import INTERPRETED, Device, surrounded

Factors = list[tuple[Tensor, Tensor, float]]
K, N = 13, 17
DTYPES = [torch.float64, torch.float32, *([torch.float16] if INTERPRETED else [torch.bfloat16])]


def by_row(x: Tensor, weight: Tensor, bias: Tensor, factors: Factors, ids: Tensor) -> Tensor:
    """One image after the other; its rows are consecutive."""
    rows, out = x.shape[0] // len(ids), []
    for i, k in enumerate(ids.tolist()):
        xs = x[i * rows : (i + 1) * rows]
        y = xs @ weight.T + bias
        out.append(y if k < 0 else y + factors[k][2] * xs @ factors[k][0].T @ factors[k][1].T)
    return torch.cat(out)


def draw(
    shape: tuple[int, ...],
    ranks: tuple[int, ...] = (1, 4, 3),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Factors]:
    """x, W, b and factors, amid NaN."""

    def one(*size: int) -> Tensor:
        return surrounded(torch.randn(size).to(device, dtype))

    factors = [((one(r, K) / 4).requires_grad_(), one(N, r).requires_grad_(), 0.5 + k) for k, r in enumerate(ranks)]
    return one(*shape, K).requires_grad_(), one(N, K) / 4, one(N), factors


def leaves_of(x: Tensor, factors: Factors) -> list[Tensor]:
    return [x, *(t for a, b, _ in factors for t in (a, b))]


IDS = {
    "all-different": [0, 1, 2, -1],
    "all-the-same": [1, 1, 1, 1],
    "none": [-1, -1, -1, -1],
    "one-and-none": [-1, 2, -1, -1],
    "shuffled": [2, 0, 2, 1],
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("shape", [(4, 9), (4,), (12, 3), (8, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_loop(ids: str, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
    x, weight, bias, factors = draw(shape, dtype=dtype, device=device.torch)
    slots = torch.tensor(IDS[ids], device=device.torch)
    leaves = leaves_of(x, factors)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    doubled = [(exact[1 + 2 * k], exact[2 + 2 * k], s) for k, (_, _, s) in enumerate(factors)]
    want = by_row(exact[0], weight.double(), bias.double(), doubled, slots)
    got = mixed_lora_linear(x, weight, bias, factors, slots)
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=device.torch).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for i, (t, exactly) in enumerate(zip(leaves, exact, strict=True)):
        wanted = torch.zeros_like(exactly) if exactly.grad is None else exactly.grad
        close(f"gradient {i}", t.grad.double(), wanted, TOLERANCE[dtype] if wanted.any() else 0.0)


def test_the_kernel_is_what_runs(device: Device) -> None:
    x, weight, _, _ = draw((4, 9), dtype=torch.float16, device=device.torch)  # on a GPU float32 is the library's
    path = mixed_lora_path(x, weight, (1, 4, 3))
    assert path.fused == device.fused
    assert path.why.startswith("slots" if device.fused else "by runs")


def test_its_gradients_by_finite_differences(device: Device) -> None:
    x, weight, bias, factors = draw((3, 9), (2, 3), torch.float64, device.torch)
    ids = torch.tensor([1, -1, 0], device=device.torch)

    def call(x: Tensor, *flat: Tensor) -> Tensor:
        return mixed_lora_linear(x, weight, bias, [(*flat[:2], 0.5), (*flat[2:], 2.0)], ids)

    assert torch.autograd.gradcheck(call, leaves_of(x, factors), fast_mode=True)


def test_rows_without_a_slot_are_untouched_bit_for_bit(device: Device) -> None:
    x, weight, bias, factors = draw((4, 9), device=device.torch)
    base = functional.linear(x, weight, bias)
    got = mixed_lora_linear(x, weight, bias, factors, torch.tensor([-1, 0, -1, 2], device=device.torch))
    none = mixed_lora_linear(x, weight, bias, factors, torch.full((4,), -1, device=device.torch))
    if device.fused:  # another product: K + R columns
        close("rows 0 and 2", got[::2], base[::2], 1e-6)
        close("all", none, base, 1e-6)
    else:
        assert torch.equal(got[::2], base[::2])
        assert torch.equal(none, base)


def test_a_batch_of_one_image(device: Device) -> None:
    x, weight, bias, factors = draw((1, 20), device=device.torch)
    for k in (-1, 0, 1, 2):
        ids = torch.tensor([k], device=device.torch)
        close("y", mixed_lora_linear(x, weight, bias, factors, ids), by_row(x, weight, bias, factors, ids))


def test_shuffling_images_shuffles_results(device: Device) -> None:
    x, weight, bias, factors = draw((8, 5), device=device.torch)
    ids, order = torch.tensor([0, 1, 2, -1, 0, 0, 1, 2], device=device.torch), torch.randperm(8)
    straight = mixed_lora_linear(x, weight, bias, factors, ids)
    close("y", mixed_lora_linear(x[order], weight, bias, factors, ids[order]), straight[order], 1e-6)


def test_the_order_of_the_slots_does_not_matter(device: Device) -> None:
    x, weight, bias, factors = draw((4, 9), device=device.torch)
    one = mixed_lora_linear(x, weight, bias, factors, torch.tensor([0, 1, 2, -1], device=device.torch))
    turned = [factors[2], factors[0], factors[1]]
    close("y", mixed_lora_linear(x, weight, bias, turned, torch.tensor([1, 2, 0, -1], device=device.torch)), one, 1e-6)


def test_two_runs_are_equal_bit_for_bit(device: Device) -> None:
    x, weight, bias, factors = draw((4, 9), device=device.torch)
    runs = []
    for _ in range(2):
        y = mixed_lora_linear(x, weight, bias, factors, torch.tensor(IDS["shuffled"], device=device.torch))
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves_of(x, factors))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("size", [1e15, 3e38], ids=["huge", "overflowing"])
def test_a_neighbour_does_not_leak(size: float, device: Device) -> None:
    """An adapter that overflows in its own rows leaves the others as they are."""
    x, weight, bias, factors = draw((4, 9), device=device.torch)
    ids = torch.tensor([0, 1, 0, 1], device=device.torch)
    quiet = mixed_lora_linear(x, weight, bias, factors, ids)
    loud = [factors[0], (torch.full_like(factors[1][0], size), factors[1][1].detach().clone(), 1.0), factors[2]]
    got = mixed_lora_linear(x, weight, bias, loud, ids)
    close("rows 0 and 2", got[::2], quiet[::2], 1e-6)
    assert size < 1e30 or not torch.isfinite(got[1::2]).all()


def test_windows_of_an_image_are_consecutive(device: Device) -> None:
    """Rows 0 to 5 belong to image 0; with a sequence-first layout they would alternate."""
    x, weight, bias, factors = draw((12, 3), device=device.torch)
    base = functional.linear(x, weight, bias)
    got = mixed_lora_linear(x, weight, bias, factors, torch.tensor([-1, 0], device=device.torch))
    close("image 0", got[:6], base[:6], 1e-6)
    assert ((got[6:] - base[6:]).abs() > 1e-5).any(-1).all()


def test_an_empty_batch_of_rows(device: Device) -> None:
    x, weight, bias, factors = draw((4, 0), device=device.torch)
    y = mixed_lora_linear(x, weight, bias, factors, torch.tensor([0, 1, 2, -1], device=device.torch))
    assert y.shape == (4, 0, N)
    assert not torch.autograd.grad(y.sum(), factors[0][0])[0].any()


@pytest.mark.parametrize("ids", [[0, 1], []])
def test_rows_that_cannot_be_shared_out_are_refused(ids: list[int]) -> None:
    x, weight, bias, factors = draw((5, 2))
    with pytest.raises(BadCall) as refused:
        mixed_lora_linear(x, weight, bias, factors, torch.tensor(ids, dtype=torch.int64))
    says(refused.value, "5", str(len(ids)), "multiple")


def test_factors_may_be_of_another_precision() -> None:
    x, weight, bias, factors = draw((4, 5))
    wide = [(a.detach().double(), b.detach().double(), s) for a, b, s in factors]
    ids = torch.tensor([0, 1, 2, -1])
    got = mixed_lora_linear(x, weight, bias, wide, ids)
    assert got.dtype == torch.float32
    close("y", got, by_row(x, weight, bias, factors, ids))


def test_a_thawed_weight_gets_its_gradient() -> None:
    x, weight, bias, factors = draw((4, 5), dtype=torch.float64)
    leaves, ids = [weight.requires_grad_(), bias.requires_grad_(), *leaves_of(x, factors)], torch.tensor([0, 1, 2, -1])
    grads = [
        list(torch.autograd.grad(f(x, weight, bias, factors, ids).square().sum(), leaves))
        for f in (mixed_lora_linear, by_row)
    ]
    close("gradients", *grads)


def test_autocast() -> None:
    x, weight, bias, factors = draw((4, 9))
    ids = torch.tensor([0, 1, 2, -1])
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_lora_linear(x, weight, bias, factors, ids)
        got = torch.autograd.grad(y.float().sum(), leaves_of(x, factors))
    assert y.dtype == torch.bfloat16
    want = torch.autograd.grad(by_row(x, weight, bias, factors, ids).sum(), leaves_of(x, factors))
    close("gradients", list(got), list(want), 3e-2)


@pytest.mark.parametrize("ids", IDS)
def test_long_runs_and_gathered_images_are_one_function(ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does without the kernel, and what a CPU does with long runs."""
    x, weight, bias, factors = draw((4, 9), dtype=torch.float64)
    slots, found, asked = torch.tensor(IDS[ids]), [], []
    for runs in (True, False):

        def answer(*of: Tensor, runs: bool = runs) -> bool:
            asked.append(runs)
            return runs

        monkeypatch.setattr(module("medgraft.kernels.mixed_lora"), "by_runs", answer)
        y = mixed_lora_linear(x, weight, bias, factors, slots)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves_of(x, factors))])
        assert mixed_lora_linear(x[:, :0], weight, bias, factors, slots).shape == (4, 0, N)
    assert asked == [True] * 3 + [False] * 3
    close("gathered", found[1], found[0], 1e-12)


def test_runs_are_gone_through_where_they_are_long() -> None:
    """Those without an adapter cost nothing and do not count."""
    for ids, rows, want in (
        ([0, 1], LONG, True),
        ([0, 1], LONG - 1, False),
        ([0, -1], LONG // 2, True),
        ([-1], 1, True),
    ):
        assert by_runs(torch.zeros(len(ids) * rows, 3), torch.tensor(ids)) == want


# The operator


def operands() -> tuple:
    x, weight, bias, factors = draw((4, 5), dtype=torch.float64)
    a, b = torch.cat([a for a, _, _ in factors]), torch.cat([b for _, b, _ in factors], 1)
    return x.detach().flatten(0, 1), weight, bias, a.detach(), b.detach(), torch.tensor([0, 1, 2, -1]), [1, 4, 3]


def test_opcheck() -> None:
    x, weight, bias, a, b, ids, ranks = operands()
    leaves = (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), ids, ranks)
    torch.library.opcheck(torch.ops.medgraft.mixed_lora_linear.default, leaves)
    dy = torch.randn(len(x), N, dtype=torch.float64)
    for wanted in ([True] * 3, [True, False, False], [False, True, True]):
        args = (dy, *(t.detach() for t in (x, weight, a, b)), ids, ranks, wanted)
        torch.library.opcheck(torch.ops.medgraft.mixed_lora_linear_backward.default, args)


def test_one_graph() -> None:
    x, weight, bias, factors = draw((4, 5), dtype=torch.float64)
    compiled = torch.compile(mixed_lora_linear, fullgraph=True, backend="aot_eager")
    for ids in (torch.tensor([0, 1, 2, -1]), torch.tensor([2, -1, 0, 0])):  # a swap is another `ids`, not another graph
        got, want = (f(x, weight, bias, factors, ids) for f in (compiled, by_row))
        close("y", got, want)
        grads = [torch.autograd.grad(y.square().sum(), leaves_of(x, factors)[:3]) for y in (got, want)]
        close("gradients", list(grads[0]), list(grads[1]))
