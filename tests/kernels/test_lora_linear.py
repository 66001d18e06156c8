"""The fused low-rank product and DoRA's gain against the equations, taken literally and in float64: values and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medgraft.kernels import dora_gain, lora_linear
from tests.helpers import TOLERANCE, close

SIZES = {
    "easy": ((2, 4), 8, 12, 3),
    "smallest": ((1, 1), 1, 1, 1),
    "awkward": ((3, 7, 5), 61, 37, 11),
    "a-vector": ((), 6, 5, 2),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (W + s B A)^T + b."""
    y = x @ (weight + scale * b @ a).T
    return y if bias is None else y + bias


def inputs(size: str, dtype: torch.dtype) -> list[Tensor]:
    rows, k, n, r = SIZES[size]
    shapes = (*rows, k), (n, k), (n,), (r, k), (n, r)
    return [(torch.randn(s) / max(1, s[-1] if len(s) > 1 else 1) ** 0.5).to(dtype).requires_grad_() for s in shapes]


@pytest.fixture(autouse=True)
def nan_where_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **kwargs) -> Tensor:
            made = plain(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_lora_linear(size: str, dtype: torch.dtype, biased: bool) -> None:
    args = inputs(size, dtype)
    exact = [t.detach().double().requires_grad_() for t in args]
    for group in (args, exact):
        if not biased:
            group[2] = None
    got, want = lora_linear(*args, 1.5), low_rank(*exact, 1.5)
    assert got.dtype == dtype
    close("y", got, want.to(dtype).detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape)
    got.backward(dy.to(dtype))
    want.backward(dy.to(dtype).double())
    for name, t, exactly in zip(("x", "weight", "bias", "a", "b"), args, exact, strict=True):
        if t is not None:
            assert t.grad.dtype == dtype
            close(f"d{name}", t.grad.double(), exactly.grad, TOLERANCE[dtype])


def test_the_frozen_weight_gets_no_gradient() -> None:
    x, weight, bias, a, b = inputs("easy", torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    lora_linear(x, weight, bias, a, b, 2.0).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert all(t.grad is not None for t in (x, a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_factors_are_the_frozen_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("awkward", dtype))
    assert torch.equal(lora_linear(x, weight, bias, a, torch.zeros_like(b), 4.0), functional.linear(x, weight, bias))


def test_factors_of_another_precision_are_cast() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("easy", torch.bfloat16))
    wide = lora_linear(x, weight, bias, a.float(), b.float(), 2.0)
    assert torch.equal(wide, lora_linear(x, weight, bias, a, b, 2.0))


def test_an_empty_batch() -> None:
    _, weight, bias, a, b = inputs("easy", torch.float32)
    assert lora_linear(torch.zeros(0, 4, 8), weight, bias, a, b, 1.0).shape == (0, 4, 12)


def test_inputs_that_are_not_contiguous() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs("awkward", torch.float32))
    turned = x.transpose(0, 1)
    close("y", lora_linear(turned, weight, bias, a, b, 2.0), low_rank(turned, weight, bias, a, b, 2.0))


# DoRA


def dora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, *, held: bool) -> Tensor:
    """x W'^T with W' = m (W + s B A) / |W + s B A| and m = magnitude |W|, row by row; the norm may be held constant."""
    changed = weight + scale * b @ a
    norm = changed.norm(dim=1, keepdim=True)
    w = (magnitude * weight.norm(dim=1))[:, None] * changed / (norm.detach() if held else norm)
    return x @ w.T


@pytest.mark.parametrize("size", SIZES)
def test_dora_is_its_equation_and_its_gradient_holds_the_norm(size: str) -> None:
    x, weight, _, a, b = inputs(size, torch.float64)
    weight.requires_grad_(False)
    magnitude = (1 + 0.1 * torch.randn(weight.shape[0], dtype=torch.float64)).requires_grad_()
    found, loose = [], []
    for held in (True, False):
        grads = torch.autograd.grad(
            dora(x, weight, a, b, 1.5, magnitude, held=held).square().sum(), (x, a, b, magnitude)
        )
        (found if held else loose).extend(grads)
    plain = functional.linear(x, weight)
    c = dora_gain(weight, a, b, 1.5, magnitude)
    y = plain + (c - 1) * plain + c * 1.5 * functional.linear(functional.linear(x, a), b)
    close("y", y, dora(x, weight, a, b, 1.5, magnitude, held=True).detach(), 1e-5)
    got = torch.autograd.grad(y.square().sum(), (x, a, b, magnitude))
    for name, mine, want in zip(("x", "a", "b", "magnitude"), got, found, strict=True):
        close(f"d{name}", mine, want, 1e-5)
    if size != "smallest":
        assert not torch.allclose(found[2], loose[2], rtol=1e-3), (
            "holding the norm makes no difference: nothing is tested"
        )


def test_dora_of_a_fresh_part_is_exactly_one() -> None:
    _, weight, _, a, b = inputs("awkward", torch.float32)
    assert torch.equal(dora_gain(weight, a, torch.zeros_like(b), 2.0, torch.ones(37)), torch.ones(37))


def test_dora_of_a_row_of_zeros_is_finite() -> None:
    _, weight, _, a, b = (t.detach() for t in inputs("easy", torch.float32))
    weight[3] = 0
    assert torch.isfinite(dora_gain(weight, a, b, 2.0, torch.ones(12))).all()


@pytest.mark.parametrize("shrink", [1e-2, 1e-3])
def test_dora_where_the_update_nearly_cancels_the_weight(shrink: float) -> None:
    """|W + s B A|^2 is a difference of large numbers there; the gain stays right to a per cent and never becomes NaN."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(12, 3)
    weight = -(b @ a) * (1 - shrink)
    want = weight.double().norm(dim=1) / (weight.double() + b.double() @ a.double()).norm(dim=1)
    got = dora_gain(weight, a, b, 1.0, torch.ones(12))
    assert torch.isfinite(got).all()
    close("gain", got.double(), want, 1e-2 if shrink > 5e-3 else 1.0)
