"""More adapters in one batch than `shrink` holds: the product that adds each image's own term, against float64; on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medgraft.kernels import door as door_module
from medgraft.kernels import mixed_lora_linear
from medgraft.kernels.linear_expand import LARGEST, linear_expand
from medgraft.kernels.mixed_lora import mixed_lora_linear_reference, mixed_lora_path
from tests.helpers import TOLERANCE, close, says
from tests.kernels.conftest import DEVICES, INTERPRETED, Device, surrounded

Factors = list[tuple[Tensor, Tensor, float]]
RANKS = (60, 1, 24, 64)
DTYPES = [torch.float64, torch.float32, *([torch.float16] if INTERPRETED else [torch.bfloat16])]
HALF = torch.float16 if torch.cuda.is_available() else torch.float32
"""What the kernel takes on every device."""


def draw(
    shape: tuple[int, ...],
    ranks: tuple[int, ...] = RANKS,
    n: int = 17,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Factors]:
    """x of `shape`, W, b and factors, amid NaN."""
    k = shape[-1]

    def one(*size: int, scale: float = 1.0) -> Tensor:
        return surrounded((torch.randn(size) * scale).to(device, dtype))

    factors = [
        (one(r, k, scale=k**-0.5).requires_grad_(), one(n, r, scale=r**-0.5).requires_grad_(), 0.5 + i)
        for i, r in enumerate(ranks)
    ]
    return one(*shape).requires_grad_(), one(n, k, scale=k**-0.5), one(n), factors


def leaves_of(x: Tensor, factors: Factors) -> list[Tensor]:
    return [x, *(t for a, b, _ in factors for t in (a, b))]


def by_row(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, ids: Tensor) -> Tensor:
    """One image after the other; its rows are consecutive."""
    rows, out = x.shape[0] // len(ids), []
    for i, k in enumerate(ids.tolist()):
        xs = x[i * rows : (i + 1) * rows]
        y = xs @ weight.T if bias is None else xs @ weight.T + bias
        out.append(y if k < 0 else y + factors[k][2] * xs @ factors[k][0].T @ factors[k][1].T)
    return torch.cat(out)


def everything(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, ids: Tensor) -> None:
    """The value and every gradient are those of the loop in float64."""
    leaves, dtype = leaves_of(x, factors), x.dtype
    exact = [t.detach().double().requires_grad_() for t in leaves]
    doubled = [(exact[1 + 2 * k], exact[2 + 2 * k], s) for k, (_, _, s) in enumerate(factors)]
    want = by_row(exact[0], weight.double(), None if bias is None else bias.double(), doubled, ids)
    got = mixed_lora_linear(x, weight, bias, factors, ids)
    assert got.dtype == dtype
    assert got.shape == want.shape
    close("y", got.double(), want.detach(), TOLERANCE[dtype])
    dy = torch.randn(want.shape, device=x.device).to(dtype)
    grads = torch.autograd.grad(got, leaves, dy)
    wanted = torch.autograd.grad(want, exact, dy.double(), allow_unused=True, materialize_grads=True)
    for i, (g, w) in enumerate(zip(grads, wanted, strict=True)):
        close(f"gradient {i}", g.double(), w, TOLERANCE[dtype] if w.any() else 0.0)


CASES = {  # shape of x, columns out, ids
    "tokens-of-a-vit": ((3, 197, 40), 71, [2, -1, 0]),
    "a-tile-inside-an-image": ((2, 300, 16), 23, [3, 1]),
    "many-images-in-a-tile": ((20, 9, 13), 17, [i % 5 - 1 for i in range(20)]),
    "one-row-an-image": ((40, 13), 17, [i * 7 % 5 - 1 for i in range(40)]),
    "one-row": ((1, 13), 17, [3]),
    "windows": ((12, 5, 13), 17, [1, 2, 0]),
    "maps": ((4, 3, 7, 13), 17, [0, 0, 3, -1]),
    "none": ((4, 9, 13), 17, [-1, -1, -1, -1]),
    "the-same": ((4, 9, 13), 17, [1, 1, 1, 1]),
    "wide": ((2, 3, 150), 291, [2, 1]),
    "more-tiles-than-a-group": ((5, 250, 8), 150, [0, 3, -1, 2, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case: str, dtype: torch.dtype, device: Device) -> None:
    shape, n, ids = CASES[case]
    everything(*draw(shape, n=n, dtype=dtype, device=device.torch), torch.tensor(ids, device=device.torch))


def test_without_a_bias(device: Device) -> None:
    x, weight, _, factors = draw((3, 9, 13), device=device.torch)
    everything(x, weight, None, factors, torch.tensor([2, -1, 0], device=device.torch))


def test_small_slots_of_many_adapters(device: Device) -> None:
    """33 slots of ranks 1 to 7, most of them unused."""
    ranks = tuple(1 + i % 7 for i in range(33))
    everything(*draw((4, 9, 13), ranks, device=device.torch), torch.tensor([32, 0, 17, -1], device=device.torch))


@pytest.mark.parametrize("layout", ["rows-apart", "columns-apart", "sequence-first", "weight-turned"])
def test_strides_and_offsets(layout: str, device: Device) -> None:
    x, weight, bias, factors = draw((3, 9, 13), device=device.torch)
    ids = torch.tensor([3, -1, 0], device=device.torch)
    if layout == "weight-turned":
        return everything(x, surrounded(weight.t().contiguous()).t(), bias, factors, ids)
    views = {
        "rows-apart": lambda: surrounded(torch.randn(3, 9, 20, device=device.torch))[..., 3:16],
        "columns-apart": lambda: surrounded(torch.randn(3, 9, 26, device=device.torch))[..., 1::2],
        "sequence-first": lambda: surrounded(torch.randn(9, 3, 13, device=device.torch)).transpose(0, 1),
    }
    everything(views[layout]().requires_grad_(), weight, bias, factors, ids)


def test_its_gradients_by_finite_differences(device: Device) -> None:
    x, weight, bias, factors = draw((3, 4, 5), (60, 40, 30), n=6, dtype=torch.float64, device=device.torch)
    ids = torch.tensor([1, -1, 0], device=device.torch)

    def call(x: Tensor, *flat: Tensor) -> Tensor:
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return mixed_lora_linear(x, weight, bias, [(a, b, 0.5 + i) for i, (a, b) in enumerate(pairs)], ids)

    assert torch.autograd.gradcheck(call, leaves_of(x, factors), fast_mode=True)


def test_shuffling_images_shuffles_results(device: Device) -> None:
    x, weight, bias, factors = draw((8, 50, 13), device=device.torch, dtype=HALF)
    ids, order = torch.tensor([0, 1, 2, -1, 3, 0, 1, 2], device=device.torch), torch.randperm(8)
    straight = mixed_lora_linear(x, weight, bias, factors, ids)
    close("y", mixed_lora_linear(x[order], weight, bias, factors, ids[order]), straight[order], 1e-6)


def test_the_order_of_the_slots_does_not_matter(device: Device) -> None:
    x, weight, bias, factors = draw((4, 9, 13), device=device.torch, dtype=HALF)
    one = mixed_lora_linear(x, weight, bias, factors, torch.tensor([0, 1, -1, 3], device=device.torch))
    turned = [factors[i] for i in (3, 2, 0, 1)]
    close("y", mixed_lora_linear(x, weight, bias, turned, torch.tensor([2, 3, -1, 0], device=device.torch)), one, 1e-6)


def test_two_runs_are_equal_bit_for_bit(device: Device) -> None:
    x, weight, bias, factors = draw((4, 50, 13), device=device.torch, dtype=HALF)
    runs = []
    for _ in range(2):
        y = mixed_lora_linear(x, weight, bias, factors, torch.tensor([0, 3, 0, 1], device=device.torch))
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves_of(x, factors))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("where", ["A", "B"])
@pytest.mark.parametrize("entry", [float("nan"), float("inf")], ids=str)
def test_a_neighbour_does_not_leak(entry: float, where: str, device: Device) -> None:
    """Four images share a tile; what is not finite stays in the rows of the images that asked for it."""
    x, weight, bias, factors = draw((4, 9, 13), device=device.torch, dtype=HALF)
    ids = torch.tensor([0, 3, -1, 3], device=device.torch)
    quiet = mixed_lora_linear(x, weight, bias, factors, ids).detach()
    with torch.no_grad():
        factors[3]["AB".index(where)][2, 5] = entry
    loud = mixed_lora_linear(x, weight, bias, factors, ids)
    assert torch.equal(loud[::2], quiet[::2])
    assert not torch.isfinite(loud[1]).all(-1).any()
    assert not torch.isfinite(loud[3]).all(-1).any()


def test_ids_stay_on_the_device(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them would wait for the device: forward and backward do without."""
    if not device.fused:
        pytest.skip("the CPU goes through ids")
    x, weight, bias, factors = draw((4, 9, 13), device=device.torch, dtype=HALF)
    ids = torch.tensor([0, 3, -1, 1], device=device.torch)
    want = by_row(x, weight, bias, factors, ids).detach()
    read: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)
        return lambda self, *args: read.append(name) or real(self, *args)

    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    y = mixed_lora_linear(x, weight, bias, factors, ids)
    torch.autograd.grad(y.sum(), leaves_of(x, factors))
    monkeypatch.undo()
    assert not read
    close("y", y, want, 1e-5)


def test_an_empty_batch_of_rows(device: Device) -> None:
    x, weight, bias, factors = draw((4, 0, 13), device=device.torch)
    y = mixed_lora_linear(x, weight, bias, factors, torch.tensor([0, 1, 2, -1], device=device.torch))
    assert y.shape == (4, 0, 17)
    assert not torch.autograd.grad(y.sum(), factors[0][0])[0].any()


def test_the_kernel_alone(device: Device) -> None:
    """Both layouts of its operands, and an image without a slot, in the dtype of the machine."""
    if not device.fused:
        pytest.skip("there is no kernel without Triton's interpreter or a GPU")
    x, weight, bias, e = (
        surrounded(torch.randn(size, device=device.torch).to(HALF)) for size in ((6, 5), (7, 5), (7,), (4, 7))
    )
    own = torch.tensor([[1, 2], [4, 4], [3, 4]], device=device.torch)
    u = surrounded(torch.randn(6, 2, device=device.torch).to(HALF))
    want = x.double() @ weight.double().T + bias.double()
    for row in range(6):
        for j, column in enumerate(own[row // 2].tolist()):
            if column < 4:
                want[row] += u[row, j].double() * e[column].double()
    close("y", linear_expand(x, weight, bias, u, e, own), want, TOLERANCE[HALF])
    turned = linear_expand(x, weight.t().contiguous().t(), bias, u, e.t().contiguous().t(), own)
    close("y", turned, want, TOLERANCE[HALF])


# The door


def test_the_kernel_is_what_runs(device: Device) -> None:
    x, weight, _, _ = draw((4, 9, 13), device=device.torch, dtype=HALF)
    path = mixed_lora_path(x, weight, RANKS)
    assert path.fused == device.fused
    assert ("expanded" in path.why) == device.fused
    above = mixed_lora_path(x, weight, (LARGEST + 1, LARGEST))
    assert not above.fused
    if device.fused:
        says(Exception(str(above)), f"rank {LARGEST + 1}", f"{LARGEST} at most")


@pytest.mark.parametrize(
    ("mode", "dtype", "fused", "words"),
    [
        ("auto", torch.float16, False, ["gathered", "not measured on sm_90", "MEDGRAFT_KERNELS=on"]),
        ("auto", torch.float32, False, ["gathered", "float32", "library"]),
        ("on", torch.bfloat16, True, ["expanded", "Triton on sm_90"]),
        ("off", torch.float16, False, ["gathered", "off"]),
    ],
)
def test_what_a_gpu_is_told(
    mode: str, dtype: torch.dtype, fused: bool, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chip on which no table shows the kernel to be faster takes it only when it is asked to."""

    class OnChip:
        """What the door reads of x (4, 197, 768), on a chip that is not there."""

        device, is_cuda, dtype, shape = torch.device("cuda"), True, torch.float16, (4, 197, 768)

        def numel(self) -> int:
            return 4 * 197 * 768

    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(door_module, "_chip", lambda device: 90)
    monkeypatch.setenv("MEDGRAFT_KERNELS", mode)
    x = OnChip()
    x.dtype = dtype
    path = mixed_lora_path(x, torch.empty(2304, 768, device="meta"), [16] * 16)
    assert path.fused == fused
    says(Exception(str(path)), *words)


# The operator


@pytest.mark.parametrize("where", DEVICES)
def test_opcheck(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bands of NaN around what is allocated: it compares offsets into memory."""
    device = Device(where)
    monkeypatch.setenv("MEDGRAFT_KERNELS", "on" if device.fused else "off")
    x, weight, bias, factors = draw((6, 13), device=device.torch, dtype=HALF)
    a, b = torch.cat([a for a, _, _ in factors]).detach(), torch.cat([b for _, b, _ in factors], 1).detach()
    ids, ranks = torch.tensor([3, -1, 0], device=device.torch), list(RANKS)
    leaves = (x, weight, bias, a.requires_grad_(), b.requires_grad_(), ids, ranks)
    torch.library.opcheck(torch.ops.medgraft.mixed_lora_linear.default, leaves)
    dy = torch.randn(6, 17, device=device.torch).to(HALF)
    for wanted in ([True] * 3, [True, False, False], [False, True, True]):
        args = (dy, *(t.detach() for t in (x, weight, a, b)), ids, ranks, wanted)
        torch.library.opcheck(torch.ops.medgraft.mixed_lora_linear_backward.default, args)


def test_one_graph(device: Device) -> None:
    """A swap is another `ids`, not another graph."""
    x, weight, bias, factors = draw((4, 5, 13), device=device.torch)
    torch._dynamo.reset()  # graphs of other tests would count as compiled before
    compiled = torch.compile(mixed_lora_linear, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for slots in ([0, 1, 2, -1], [3, -1, 0, 0]):
            ids = torch.tensor(slots, device=device.torch)
            got, want = (f(x, weight, bias, factors, ids) for f in (compiled, mixed_lora_linear_reference))
            close("y", got, want)
            grads = [torch.autograd.grad(y.square().sum(), leaves_of(x, factors)[:3]) for y in (got, want)]
            close("gradients", list(grads[0]), list(grads[1]))
