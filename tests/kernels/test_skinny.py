"""Products of a few rows, whole and in pieces, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medgraft.kernels import skinny
from medgraft.kernels.skinny import grad_b, grad_shrunk, shrunk, thin
from tests.helpers import TOLERANCE, close


class Called(TorchDispatchMode):
    """The names of what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _two_cores_and_no_product_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize(
    ("dtype", "columns", "pieces"),
    [
        (torch.float32, 40, True),
        (torch.float32, 12, True),
        (torch.float32, 37, False),
        (torch.float32, 0, True),
        (torch.float64, 40, False),
        (torch.bfloat16, 40, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_pieces_are_the_product(dtype: torch.dtype, columns: int, pieces: bool, layout: str) -> None:
    few = torch.randn(3, 21).to(dtype)
    many = torch.randn(21, columns).to(dtype)
    if layout == "columns":
        few, many = few.t().contiguous().t(), many.t().contiguous().t()
    if layout == "apart":  # a part of a larger tensor
        few, many = (
            torch.randn(6, 50).to(dtype)[::2, 4:25],
            torch.randn(30, columns + 9).to(dtype)[5:26, 2 : columns + 2],
        )
    with Called() as called:
        got = thin(few, many)
    assert ("bmm" in called.names) == pieces
    assert got.shape == (3, columns)
    if columns:
        close("product", got.double(), few.double() @ many.double(), TOLERANCE[dtype])


def test_small_products_and_one_thread_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.randn(3, 21), torch.randn(21, 40)
    for name, value in (("get_num_threads", lambda: 1), ("SMALL", 21 * 40 + 1)):
        with monkeypatch.context() as patched:
            patched.setattr(torch if name.islower() else skinny, name, value)
            with Called() as called:
                thin(few, many)
        assert "bmm" not in called.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradients_products(dtype: torch.dtype) -> None:
    x, dy, a, b = (torch.randn(s).to(dtype) for s in ((16, 24), (16, 40), (3, 24), (40, 3)))
    xs, dys, aa, bb = (t.double() for t in (x, dy, a, b))
    for name, got, want in (
        ("u", shrunk(x, a), xs @ aa.T),
        ("du", grad_shrunk(dy, b), (dys @ bb).T),
        ("db", grad_b(dy, x, a), (xs @ aa.T).T @ dys),
    ):
        assert got.dtype == dtype
        close(name, got.double(), want, TOLERANCE[dtype])
