"""The grouped product against a loop over rows: values, every gradient, and any order of rows."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.errors import BadCall
from medgraft.kernels import mixed_lora_linear
from tests.helpers import TOLERANCE, close, says

Factors = list[tuple[Tensor, Tensor, float]]
K, N = 13, 7


def by_row(x: Tensor, base: Tensor, factors: Factors, ids: Tensor) -> Tensor:
    """One image after the other; its rows are consecutive."""
    rows = x.shape[0] // len(ids)
    out = []
    for i, k in enumerate(ids.tolist()):
        xs, ys = x[i * rows : (i + 1) * rows], base[i * rows : (i + 1) * rows]
        out.append(ys if k < 0 else ys + factors[k][2] * xs @ factors[k][0].T @ factors[k][1].T)
    return torch.cat(out)


def draw(
    shape: tuple[int, ...], ranks: tuple[int, ...] = (1, 4, 3), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Factors]:
    x, w = torch.randn(*shape, K).to(dtype), torch.randn(N, K).to(dtype) / 4
    factors = [
        (torch.randn(r, K).to(dtype).div(4).requires_grad_(), torch.randn(N, r).to(dtype).requires_grad_(), 0.5 + k)
        for k, r in enumerate(ranks)
    ]
    return x.requires_grad_(), functional.linear(x, w).detach().requires_grad_(), factors


IDS = {
    "all-different": [0, 1, 2, -1],
    "all-the-same": [1, 1, 1, 1],
    "none": [-1, -1, -1, -1],
    "one-and-none": [-1, 2, -1, -1],
    "shuffled": [2, 0, 2, 1],
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("shape", [(4, 5), (4,), (12, 3), (8, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_loop(ids: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, base, factors = draw(shape, dtype=dtype)
    slots = torch.tensor(IDS[ids])
    leaves = [x, base, *(t for a, b, _ in factors for t in (a, b))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = by_row(
        exact[0], exact[1], [(exact[2 + 2 * k], exact[3 + 2 * k], s) for k, (_, _, s) in enumerate(factors)], slots
    )
    got = mixed_lora_linear(x, base, factors, slots)
    assert got.dtype == dtype
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape).to(dtype)
    got.backward(dy)
    want.backward(dy.double())
    for i, (t, exactly) in enumerate(zip(leaves, exact, strict=True)):
        wanted = torch.zeros_like(exactly) if exactly.grad is None else exactly.grad
        found = torch.zeros_like(t) if t.grad is None else t.grad
        close(f"gradient {i}", found.double(), wanted, TOLERANCE[dtype] if wanted.any() else 0.0)


def test_rows_without_a_slot_are_untouched_bit_for_bit() -> None:
    x, base, factors = draw((4, 5))
    got = mixed_lora_linear(x, base, factors, torch.tensor([-1, 0, -1, 2]))
    assert torch.equal(got[0], base[0])
    assert torch.equal(got[2], base[2])
    assert torch.equal(mixed_lora_linear(x, base, factors, torch.full((4,), -1)), base)


def test_a_batch_of_one_row() -> None:
    x, base, factors = draw((1, 5))
    for k in (-1, 0, 1, 2):
        close("y", mixed_lora_linear(x, base, factors, torch.tensor([k])), by_row(x, base, factors, torch.tensor([k])))


def test_shuffling_rows_shuffles_results() -> None:
    x, base, factors = draw((8, 5))
    ids, order = torch.tensor([0, 1, 2, -1, 0, 0, 1, 2]), torch.randperm(8)
    straight = mixed_lora_linear(x, base, factors, ids)
    close("y", mixed_lora_linear(x[order], base[order], factors, ids[order]), straight[order], 1e-6)


def test_a_neighbour_with_huge_factors_does_not_leak() -> None:
    x, base, factors = draw((4, 5))
    quiet = mixed_lora_linear(x, base, factors, torch.tensor([0, 1, 0, 1]))
    loud = [factors[0], (factors[1][0] * 1e15, factors[1][1] * 1e15, 1.0), factors[2]]
    got = mixed_lora_linear(x, base, loud, torch.tensor([0, 1, 0, 1]))
    close("row 0", got[0], quiet[0], 1e-6)
    close("row 2", got[2], quiet[2], 1e-6)


def test_a_neighbour_that_overflows_does_not_leak() -> None:
    """An adapter whose factors overflow in its own rows leaves the others finite."""
    x, base, factors = draw((2, 5))
    loud = [factors[0], (torch.full_like(factors[1][0], 3e38), factors[1][1], 1.0)]
    got = mixed_lora_linear(x, base, loud, torch.tensor([0, 1]))
    assert torch.isfinite(got[0]).all()
    assert not torch.isfinite(got[1]).all()


def test_windows_of_an_image_are_consecutive() -> None:
    """Rows 0, 1, 2 belong to image 0; with a sequence-first layout they would alternate."""
    x, base, factors = draw((6, 2))
    got = mixed_lora_linear(x, base, factors, torch.tensor([-1, 0]))
    assert torch.equal(got[:3], base[:3])
    assert (got[3:] != base[3:]).any(-1).all()


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    x, base, factors = draw((5, 2))
    with pytest.raises(BadCall) as refused:
        mixed_lora_linear(x, base, factors, torch.tensor([0, 1]))
    says(refused.value, "5", "2", "multiple")


def test_factors_may_be_of_another_precision() -> None:
    x, base, factors = draw((4, 5))
    wide = [(a.detach().double(), b.detach().double(), s) for a, b, s in factors]
    got = mixed_lora_linear(x, base, wide, torch.tensor([0, 1, 2, -1]))
    assert got.dtype == torch.float32
    close("y", got, by_row(x, base, factors, torch.tensor([0, 1, 2, -1])))
