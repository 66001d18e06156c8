"""Attention with relative positions against its formula: value and every gradient, on each device; the operator as torch wants it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from medgraft.errors import BadCall
from medgraft.kernels import relpos_attention as op
from medgraft.kernels import relpos_plain
from medgraft.kernels.relpos_attention import Frame, position_terms, relpos_attention, relpos_path, resized_table
from tests.helpers import says
from tests.kernels.conftest import INTERPRETED, Device, surrounded

LIMIT = {  # allowed |got - want| / |want|
    torch.float64: 1e-12,  # sums taken in another order
    torch.float32: 2e-6,  # the same
    torch.float16: 2e-3,  # rh, rw and the result are rounded, one step is 2**-10
    torch.bfloat16: 1e-2,  # the same, one step is 2**-7
}
Size = tuple[int, int, tuple[int, int], tuple[int, int], int]
BY_NAME: dict[str, Size] = {  # B, H, grid, window, D
    "B2-H3-3x5-D16": (2, 3, (3, 5), (3, 5), 16),
    "B1-H1-1x1-D16": (1, 1, (1, 1), (1, 1), 16),
    "B1-H2-4x16-D80": (1, 2, (4, 16), (4, 16), 80),
    "B2-H1-2x20-D64": (2, 1, (2, 20), (2, 20), 64),
    "B1-H2-6x3-D32": (1, 2, (6, 3), (6, 3), 32),
    "B1-H2-4x6-windows-2x3-D16": (1, 2, (4, 6), (2, 3), 16),
    "B2-H1-3x4-windows-2x3-D80": (2, 1, (3, 4), (2, 3), 80),
    "B1-H2-3x4-windows-4x5-D64": (1, 2, (3, 4), (4, 5), 64),
}


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    outside: Tensor | None = None,
) -> Tensor:
    """The formula, one window after the other, with every score of it at once."""
    (gy, gx), (h, w) = grid, window
    i = torch.arange(h * w, device=q.device)
    y, x = i // w, i % w
    positions = table_h[y[:, None] - y + h - 1] + table_w[x[:, None] - x + w - 1]
    k, v = (t if outside is None else torch.cat([t, outside[:, :, which, None]], 2) for which, t in enumerate((k, v)))
    out = [torch.zeros_like(q[:, :, :0])]
    places = []
    for top in range(0, gy, h):
        for left in range(0, gx, w):
            within = (top + y < gy) & (left + x < gx)
            token = torch.where(within, (top + y) * gx + left + x, gy * gx)
            asking = token[within]
            scores = q[:, :, asking] @ k[:, :, token].mT / q.shape[-1] ** 0.5
            scores = scores + torch.einsum("bnid,ijd->bnij", q[:, :, asking], positions[within])
            out.append(torch.softmax(scores, -1) @ v[:, :, token])
            places.append(asking)
    return torch.cat(out, 2)[:, :, torch.cat(places).argsort()]


def draw(size: Size, dtype: torch.dtype, device: Device | None = None) -> tuple[list[Tensor], Tensor]:
    """q, k and v as they come out of a fused projection, tables, and k and v outside where windows are ragged; a gradient of the output."""
    b, heads, grid, window, d = size
    n = grid[0] * grid[1]
    qkv = torch.randn(b, n, 3, heads, d, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    drawn = [*qkv.unbind(0), *(torch.randn(2 * side - 1, d, dtype=torch.float64) / 4 for side in window)]
    if Frame(grid, window).ragged:
        drawn.append(torch.randn(b, heads, 2, d, dtype=torch.float64))
    where = None if device is None else device.torch
    leaves = [surrounded(t.to(where, dtype)).requires_grad_() for t in drawn]
    return leaves, surrounded(torch.randn(b, heads, n, d, dtype=torch.float64).to(where, dtype))


def run(leaves: list[Tensor], size: Size, of: Any = relpos_attention) -> Tensor:
    """`relpos_attention` on what `draw` gave."""
    return of(*leaves[:5], size[2], size[3], *leaves[5:])


def off_by(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().clone().requires_grad_() for t in leaves]


def dtypes(device: Device) -> list[torch.dtype]:
    """What is compared where: the kernels' chips are for half precision, the interpreter for everything but bfloat16."""
    if device == "cuda":
        return [torch.float16, torch.bfloat16]
    return [d for d in LIMIT if not (INTERPRETED and d == torch.bfloat16)]


@pytest.fixture(autouse=True)
def even_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small; the operator is what they are about."""
    monkeypatch.setattr(op, "FEW", 0)


@pytest.mark.parametrize("size", BY_NAME.values(), ids=BY_NAME)
def test_value_and_every_gradient(device: Device, size: Size) -> None:
    for dtype in dtypes(device):
        leaves, g = draw(size, dtype, device)
        assert relpos_path(leaves[0], *size[2:4]).fused == device.fused
        wanted = exact(leaves)
        want, got = run(wanted, size, reference), run(leaves, size)
        assert got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        want.backward(g.double())
        got.backward(g)
        # exp2 of scores scaled in float32 numbers: the kernels' constants are no float64.
        limit = 1e-6 if device.fused and dtype == torch.float64 else LIMIT[dtype]
        assert off_by(got, want) <= limit, dtype
        names = ("q", "k", "v", "table_h", "table_w", "outside")[: len(leaves)]
        for name, t, e in zip(names, leaves, wanted, strict=True):
            assert t.grad is not None
            assert e.grad is not None
            if e.grad.norm() > 1e-9:
                assert off_by(t.grad, e.grad) <= 2 * limit, (name, dtype)
            else:  # one token: its probability is 1 whatever the scores are
                assert t.grad.norm() <= limit


@pytest.mark.parametrize("size", [(1, 1, (2, 3), (2, 3), 16), (1, 1, (2, 3), (3, 2), 16)], ids=["whole", "windows"])
def test_gradients_are_those_of_the_value(device: Device, size: Size) -> None:
    if device == "cuda":
        pytest.skip("float64 has no kernel there")
    leaves, _ = draw(size, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *t: run(list(t), size), leaves, fast_mode=True, atol=1e-6)


def half(device: Device) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def test_zero_tables_are_plain_attention(device: Device) -> None:
    dtype, grid = half(device), (3, 7)
    (q, k, v, *tables), _ = draw((2, 2, grid, grid, 32), dtype, device)
    got = relpos_attention(q, k, v, *(torch.zeros_like(t) for t in tables), grid)
    want = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert off_by(got, want) <= LIMIT[dtype]


def test_one_window_is_the_whole(device: Device) -> None:
    """A window of more columns than the grid has: the keys beyond are masked by the size of their scores, not by their place."""
    dtype, grid = half(device), (3, 4)
    (q, k, v, *_), _ = draw((1, 2, grid, grid, 16), dtype, device)
    table_h, table_w = torch.zeros(5, 16), torch.zeros(9, 16)
    tables = [t.to(q) for t in (table_h, table_w)]
    outside = torch.stack([-1e3 * q.mean(2), torch.zeros_like(q.mean(2))], 2)
    q = q.mean(2, keepdim=True).expand_as(q)
    got = relpos_attention(q, k, v, *tables, grid, (3, 5), outside)
    assert off_by(got, relpos_attention(q, k, v, tables[0], tables[1][:7], grid).double()) <= LIMIT[dtype]


def test_a_term_that_is_the_same_for_every_row_changes_nothing(device: Device) -> None:
    dtype, frame = half(device), Frame((4, 5), (4, 5))
    (q, k, v, *tables), _ = draw((1, 2, *frame, 16), dtype, device)
    rh, rw = position_terms(q, *tables, frame)
    out, lse = op._attention(q, k, v, rh, rw, None, *frame)
    moved, higher = op._attention(q, k, v, rh + 3, rw, None, *frame)
    assert off_by(moved, out.double()) <= LIMIT[dtype]
    torch.testing.assert_close(higher, lse + 3, rtol=1e-3, atol=1e-3)


def test_scores_that_would_overflow(device: Device) -> None:
    dtype, grid = half(device), (3, 5)
    (q, k, v, *tables), _ = draw((1, 1, grid, grid, 16), dtype, device)
    q, tables = q.detach() * 50, [t.detach() * 10 for t in tables]
    want = reference(*(t.double() for t in (q, k, v, *tables)), grid, grid)
    assert off_by(relpos_attention(q, k, v, *tables, grid), want) <= 10 * LIMIT[dtype]


@pytest.mark.parametrize("window", [(3, 5), (2, 2)], ids=["whole", "windows"])
def test_two_runs_are_the_same_bits(device: Device, window: tuple[int, int]) -> None:
    size: Size = (2, 1, (3, 5), window, 16)
    leaves, g = draw(size, torch.float16, device)
    once, twice = ((out := run(leaves, size), *torch.autograd.grad(out, leaves, g)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_an_empty_batch(device: Device) -> None:
    for window in ((3, 5), (2, 2)):
        size: Size = (0, 2, (3, 5), window, 16)
        leaves, g = draw(size, torch.float16, device)
        out = run(leaves, size)
        assert out.shape == (0, 2, 15, 16)
        out.backward(g)
        assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves[:3])
        assert not any(t.grad.any() for t in leaves[3:] if t.grad is not None)


def test_the_log_of_the_sum(device: Device) -> None:
    """L of the definition and of the kernel are one: the backward pass of either may follow the other."""
    dtype, frame = half(device), Frame((3, 5), (3, 5))
    (q, k, v, *tables), _ = draw((1, 2, *frame, 16), dtype, device)
    rh, rw = position_terms(q, *tables, frame)
    scores = q @ k.mT / 4 + (rh.mT[..., None] + rw.mT[:, :, :, None]).flatten(-2)
    lse = op._attention(q, k, v, rh, rw, None, *frame)[1]
    torch.testing.assert_close(lse, scores.float().logsumexp(-1), rtol=1e-3, atol=1e-3)


def test_rows_are_independent(device: Device) -> None:
    """Law 4, through windows and what lies outside."""
    size: Size = (2, 2, (3, 4), (2, 3), 16)
    leaves, _ = draw(size, half(device), device)
    alone = [t[:1] if i not in (3, 4) else t for i, t in enumerate(leaves)]
    torch.testing.assert_close(run(leaves, size)[:1], run(alone, size), rtol=1e-5, atol=1e-5)


# What does not depend on the device


@pytest.mark.parametrize("size", BY_NAME.values(), ids=BY_NAME)
def test_few_tokens_go_straight_to_torch(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same value and gradients, the same layout, and no operator in the graph."""
    monkeypatch.setattr(op, "FEW", 2**20)
    monkeypatch.setattr(op, "_attention", None)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaves, g = draw(size, dtype)
        wanted = exact(leaves)
        want, got = run(wanted, size, reference), run(leaves, size)
        want.backward(g.double())
        got.backward(g)
        assert got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        assert off_by(got, want) <= LIMIT[dtype]
        for t, e in zip(leaves, wanted, strict=True):
            assert t.grad is not None
            assert e.grad is not None
            assert (t.grad.double() - e.grad).norm() <= 2 * LIMIT[dtype] * max(e.grad.norm().item(), 1e-3)


def test_it_exports_without_our_operator() -> None:
    size: Size = (2, 2, (3, 4), (2, 3), 16)
    leaves, _ = draw(size, torch.float32)

    class Net(torch.nn.Module):
        def forward(self, *t: Tensor) -> Tensor:
            return run(list(t), size)

    program = torch.export.export(Net(), tuple(t.detach() for t in leaves))
    assert "medgraft" not in str(program.graph)
    torch.testing.assert_close(program.module()(*leaves), run(leaves, size))


def test_augmented_heads_agree() -> None:
    """q' = [q / sqrt(D), rh, rw], k' = [k, onehot(y), onehot(x)]: the same attention with no term beside the scores."""
    grid = (4, 6)
    (q, k, v, *tables), _ = draw((2, 2, grid, grid, 16), torch.float64)
    rh, rw = position_terms(q, *tables, Frame(grid, grid))
    i = torch.arange(24)
    rows, cols = torch.eye(4, dtype=q.dtype)[i // 6], torch.eye(6, dtype=q.dtype)[i % 6]
    wide_q = torch.cat([q / 4, rh.mT, rw.mT], -1)
    wide_k = torch.cat([k, torch.cat([rows, cols], 1).expand(2, 2, -1, -1)], -1)
    want = functional.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)
    assert off_by(relpos_attention(q, k, v, *tables, grid), want) <= 1e-12


@pytest.mark.parametrize("window", [(5, 7), (2, 3)], ids=["whole", "windows"])
@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (7 * 35, 1), (35 * 35, 3 * 35 * 35)], ids=str)
def test_the_size_of_a_tile_changes_nothing(
    rows: int, tile: int, window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size: Size = (2, 2, (5, 7), window, 16)
    leaves, g = draw(size, torch.float64)
    out = run(leaves, size)
    want = out, *torch.autograd.grad(out, leaves, g)
    monkeypatch.setattr(relpos_plain, "ROWS", rows)
    monkeypatch.setattr(relpos_plain, "TILE", tile)
    out = run(leaves, size)
    for a, b in zip((out, *torch.autograd.grad(out, leaves, g)), want, strict=True):
        assert off_by(a, b) <= 1e-12


def test_nothing_of_n_by_n_is_made() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    frame, n = Frame((40, 40), (40, 40)), 1600
    (q, k, v, *tables), g = draw((1, 1, *frame, 16), torch.float32)
    rh, rw = position_terms(q, *tables, frame)
    with torch.no_grad(), Watch():
        out, lse = relpos_plain.plain_forward(q, k, v, rh, rw, None, frame)
        relpos_plain.plain_backward(g, q, k, v, rh, rw, None, out, lse, frame)
    assert relpos_plain.ROWS // 2 < largest <= relpos_plain.ROWS < n * n / 8


@pytest.mark.parametrize("window", [(3, 4), (2, 3)], ids=["whole", "windows"])
def test_as_an_operator(window: tuple[int, int]) -> None:
    frame = Frame((3, 4), window)
    (q, k, v, *tables), g = draw((2, 2, *frame, 16), torch.float32)
    tables, outside = tables[:2], tables[2] if frame.ragged else None
    rh, rw = (t.detach().requires_grad_() for t in position_terms(q, *tables, frame))
    torch.library.opcheck(torch.ops.medgraft.relpos_attention.default, (q, k, v, rh, rw, outside, *frame))
    kept = [None if t is None else t.detach() for t in (q, k, v, rh, rw, outside)]
    kept += op._attention(*kept, *frame)
    torch.library.opcheck(torch.ops.medgraft.relpos_attention_backward.default, (g, *kept, *frame))


def test_compile_keeps_it_whole() -> None:
    size: Size = (2, 2, (3, 4), (2, 3), 16)
    leaves, g = draw(size, torch.float32)
    out = run(leaves, size)
    want = out, *torch.autograd.grad(out, leaves, g)
    compiled = torch.compile(lambda *t: run(list(t), size), fullgraph=True, backend="aot_eager")
    out = compiled(*leaves)
    for a, b in zip((out, *torch.autograd.grad(out, leaves, g)), want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    size: Size = (1, 2, (3, 5), (2, 3), 16)
    leaves, g = draw(size, torch.float32)
    want = run(exact(leaves), size, reference)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(leaves, size)
    assert out.dtype == torch.bfloat16
    assert off_by(out, want) <= 2 * LIMIT[torch.bfloat16]
    out.backward(g.bfloat16())
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_only_what_asks_gets_a_gradient() -> None:
    """A frozen backbone: tables without a gradient, and no graph for a call that needs none."""
    size: Size = (1, 1, (2, 3), (2, 3), 16)
    leaves, g = draw(size, torch.float32)
    frozen = [t.detach() for t in leaves]
    run([leaves[0], *frozen[1:]], size).backward(g)
    assert leaves[0].grad is not None
    assert not run(frozen, size).requires_grad


@pytest.mark.parametrize("side", [5, 9, 14])
def test_tables_of_another_grid_are_resized_as_in_transformers(side: int) -> None:
    attention = SamVisionAttention(SamVisionConfig(hidden_size=16, num_attention_heads=1), 9)
    table = torch.randn(17, 16)
    want = attention.get_rel_pos(side, side, table)
    torch.testing.assert_close(resized_table(table, side)[op.relative_index(side, side, table.device)], want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (4, 4)}, ("4 * 4", "(1, 2, 15, 16)")),
        ({"k": torch.zeros(1, 2, 14, 16)}, ("alike", "(1, 2, 14, 16)")),
        ({"q": torch.zeros(2, 15, 16)}, ("(2, 15, 16)",)),
        ({"table_h": torch.zeros(5, 8)}, ("table_h", "(5, 8)", "16")),
        ({"table_w": torch.zeros(9)}, ("table_w", "(9,)")),
        ({"window": (0, 2)}, ("(0, 2)", "no tokens")),
        ({"window": (2, 5)}, ("reach beyond", "outside=(1, 2, 2, 16)", "got nothing")),
        ({"window": (2, 5), "outside": torch.zeros(1, 2, 16)}, ("got (1, 2, 16)",)),
    ],
    ids=["grid", "key", "rank", "narrow", "flat", "empty", "ragged", "outside"],
)
def test_sizes_that_do_not_agree_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    leaves, _ = draw((1, 2, (3, 5), (3, 5), 16), torch.float32)
    given = dict(zip(("q", "k", "v", "table_h", "table_w"), leaves, strict=True), grid=(3, 5)) | change
    with pytest.raises(BadCall) as refused:
        relpos_attention(**given)
    says(refused.value, *words)


def test_what_does_not_fit_is_said() -> None:
    assert "24 channels" in str(op._unfit(torch.zeros(1, 1, 4, 24), 2))
    assert "rows of 80" in str(op._unfit(torch.zeros(1, 1, 80, 16), 80))
    assert "empty" in str(op._unfit(torch.zeros(0, 1, 4, 16), 2))
    assert op._unfit(torch.zeros(1, 1, 4, 80), 2) is None
