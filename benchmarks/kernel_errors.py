"""How far the fused operations are from their definitions in float64, by operation and dtype: value, and the worst of the gradients.

Inputs are drawn in the dtype and are exact in float64, so an error is the operation's own. |got - want| / |want|, Frobenius.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medgraft.kernels import bottleneck, dora_linear, joined_linear, lora_linear, mixed_lora_linear, norm_shrink
from medgraft.kernels.bottleneck import bottleneck_reference
from medgraft.kernels.dora_linear import dora_linear_reference
from medgraft.kernels.lora_linear import lora_linear_reference
from medgraft.kernels.mixed_lora import mixed_lora_linear_reference
from medgraft.kernels.norm_shrink import norm_lora_reference
from medgraft.kernels.support_epilogue import SLOPE, support_epilogue

Case = tuple[str, Callable[..., list[Tensor]], Callable[..., list[Tensor]], list[Tensor], list[Tensor]]
"""Name, the operation, its definition, the tensors that get gradients, those that do not."""


def cases(device: torch.device) -> Iterator[Case]:
    """Shapes of a ViT-S, large enough for the arrangements that large inputs take."""
    n, k, rank, images = 1152, 384, 8, 8
    rows = 197 * images

    def one(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device) * size

    x, w, c = one(rows, k), one(n, k, size=k**-0.5), one(n)
    a, b, gain = one(rank, k, size=k**-0.5), one(n, rank), 1 + one(n, size=0.1)
    ids = torch.arange(images, device=device)

    def low(f: Any) -> Callable[..., list[Tensor]]:
        return lambda x, a, b, w, c: [f(x, w, c, a, b, 2.0)]

    def rescaled(f: Any) -> Callable[..., list[Tensor]]:
        return lambda x, a, b, g, w, c: [f(x, w, c, a, b, 2.0, g)]

    def several(f: Any, n: int = 4) -> Callable[..., list[Tensor]]:
        return lambda x, a, b, w, c: [f(x, w, c, [(a[i::n], b[:, i::n], 2.0) for i in range(n)], ids % n)]

    def together(x: Tensor, a: Tensor, b: Tensor, w: Tensor, c: Tensor, *norm: Tensor) -> list[Tensor]:
        return [joined_linear(*norm_shrink(x, *norm, 1e-6, [(a, b, 2.0)]), w, c)]

    def apart(x: Tensor, a: Tensor, b: Tensor, w: Tensor, c: Tensor, *norm: Tensor) -> list[Tensor]:
        return [norm_lora_reference(x, *norm, 1e-6, w, c, a, b, 2.0)]

    def neck(f: Any, *, norm: bool = False) -> Callable[..., list[Tensor]]:
        if norm:
            return lambda x, *t: [f(x, x, *t[:4], norm=(*t[4:], 1e-6))]
        return lambda x, *layers: [f(x, x, *layers)]

    def epilogue(t: Tensor, q: Tensor) -> list[Tensor]:
        mixed = support_epilogue(t, q, pool=False, fresh=False)
        return [mixed.maps, mixed.total]

    def activated(t: Tensor, q: Tensor) -> list[Tensor]:
        maps = functional.leaky_relu(t + q.unsqueeze(1), SLOPE)
        return [maps, maps.sum(1)]

    x3 = x.view(images, 197, k)
    yield "lora_linear", low(lora_linear), low(lora_linear_reference), [x, a, b], [w, c]
    yield "norm_shrink, joined_linear", together, apart, [x, a, b], [w, c, 1 + one(k, size=0.1), one(k)]
    yield "dora_linear", rescaled(dora_linear), rescaled(dora_linear_reference), [x, a, b, gain], [w, c]
    yield "mixed_lora_linear", several(mixed_lora_linear), several(mixed_lora_linear_reference), [x3, a, b], [w, c]
    many = [x3, one(160, k, size=k**-0.5), one(n, 160)]
    ways = [several(f, 10) for f in (mixed_lora_linear, mixed_lora_linear_reference)]
    yield "mixed_lora_linear, 160 columns", ways[0], ways[1], many, [w, c]
    layers = [one(96, k, size=k**-0.5), one(96), one(k, 96, size=0.1), one(k)]
    yield "bottleneck", neck(bottleneck), neck(bottleneck_reference), [x, *layers], []
    behind = [x, *layers, 1 + one(k, size=0.1), one(k)]
    yield (
        "bottleneck behind a LayerNorm",
        neck(bottleneck, norm=True),
        neck(bottleneck_reference, norm=True),
        behind,
        [],
    )
    yield "support_epilogue", epilogue, activated, [one(1, 16, 8, 32, 32), one(1, 8, 32, 32)], []


def errors(device: torch.device) -> list[dict[str, Any]]:
    """A row for each operation and dtype."""
    rows = []
    for name, operation, definition, leaves, frozen in cases(device):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            mine = [t.to(dtype).requires_grad_() for t in leaves]
            exact = [t.detach().double().requires_grad_() for t in mine]
            still = [t.to(dtype) for t in frozen]
            got, want = operation(*mine, *still), definition(*exact, *(t.double() for t in still))
            seeds = [torch.randn_like(y) for y in got]
            grads = torch.autograd.grad(got, mine, seeds)
            wanted = torch.autograd.grad(want, exact, [s.double() for s in seeds])
            rows.append(
                {
                    "operation": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "value": max(map(_off, got, want)),
                    "gradient": max(map(_off, grads, wanted)),
                }
            )
    return rows


def _off(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()
