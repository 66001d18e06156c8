"""LoRA on linear layers: low-rank updates of frozen weights; DoRA by its algebraic norm.

    y = x W^T + b + s (x A^T) B^T,   s = alpha / r, or alpha / sqrt(r) for rsLoRA

A (r, in) is drawn, B (out, r) is zero, so a fresh part is silent. Sites may be whole projections (`*.attn.qkv`) or the q, k or v
rows of a fused one (`*.attn.q`); a site's tensors are `A`, `B` and, for DoRA, `magnitude` (out,), relative to the row norms of W.

Source: Hu et al. 2021 (arXiv:2106.09685) section 4.1; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732); DoRA: Liu et al. 2024
(arXiv:2402.09353) section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.sites import Site, add_to_span
from ..errors import BadCall
from ..kernels import dora_gain, lora_linear, mixed_lora_linear
from .part import Part, part, resolve, shapes
from .task import Task

TARGETS = ("*.attn.q", "*.attn.v")


class Factors(nn.Module):
    """A (r, in) and B (out, r) of one site, and DoRA's magnitude."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, dora: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, fan_in))
        self.B = nn.Parameter(torch.zeros(fan_out, rank))
        self.magnitude = nn.Parameter(torch.ones(fan_out)) if dora else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


@part("lora")
class LoRA(Part):
    """See the top of the file."""

    acts_on = ("linear",)

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        rank: int = 8,
        alpha: float = 16.0,
        rslora: bool = False,
        dora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if rank < 1 or not 0 <= dropout < 1:
            raise BadCall(f"LoRA wants a rank >= 1 and a dropout in [0, 1), got rank={rank}, dropout={dropout}")
        super().__init__(sites, rank=rank, alpha=alpha, rslora=rslora, dora=dora, dropout=dropout)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dora, self.dropout = dora, dropout
        for name, (fan_in, fan_out) in self.sites.items():
            self.put(name, Factors(fan_in, fan_out, rank, dora))

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, targets: str | Sequence[str] = TARGETS, **options: Any) -> LoRA:
        """Low-rank factors at every linear site that matches `targets`; `options` are the constructor's."""
        return cls(shapes(resolve(cls, backbone, targets)), **options)

    @property
    def mixable(self) -> bool:
        """Rows with different LoRA adapters share one call; DoRA rescales the frozen product and does not, dropout is each part's own."""
        return not self.dora and not (self.training and self.dropout)

    @property
    def foldable(self) -> bool:
        """Always."""
        return True

    @property
    def innermost(self) -> bool:  # type: ignore[override]
        """DoRA needs the frozen weight at hand."""
        return self.dora

    def check(self, backbone: Backbone) -> None:
        """DoRA's sites may not overlap: each norm is taken of the frozen rows."""
        whole = [name for name in self.sites if backbone.sites[name].span is None] if self.dora else []
        for name in self.sites:
            port = backbone.sites[name].port
            if name != port and port in whole:
                raise BadCall(
                    f"DoRA at {name} and at {port} of {backbone.spec.id} would change the same rows twice; choose one of them"
                )

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.dora:
            return self._dora(sites, inner, x)
        dropped = self.training and self.dropout > 0
        if isinstance(inner, nn.Linear) and not dropped:
            a, b = self.stacked(sites, inner.out_features)
            return lora_linear(x, inner.weight, inner.bias, a, b, self.scale)
        y = inner(x)
        a, b = self.stacked(sites, y.shape[-1])
        u = functional.linear(functional.dropout(x, self.dropout, self.training), a.to(x.dtype))
        return y + self.scale * functional.linear(u, b.to(x.dtype))

    def _dora(self, sites: tuple[Site, ...], inner: Any, x: Tensor) -> Tensor:
        y = inner(x)
        plain = y if inner.bias is None else y - inner.bias
        dropped = functional.dropout(x, self.dropout, self.training)
        for site in sites:
            cell = self.cell(site)
            start, stop = site.span or (0, y.shape[-1])
            c = dora_gain(inner.weight[start:stop], cell.A, cell.B, self.scale, cell.magnitude).to(y.dtype)
            low_rank = functional.linear(functional.linear(dropped, cell.A.to(x.dtype)), cell.B.to(x.dtype))
            y = add_to_span(y, (c - 1) * plain[..., start:stop] + c * self.scale * low_rank, site.span)
        return y

    def stacked(self, sites: tuple[Site, ...], width: int) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (width, R) of all sites at one port; rows of B outside a site's span are zero."""
        cells = [self.cell(site) for site in sites]
        if len(sites) == 1 and sites[0].span is None:
            return cells[0].A, cells[0].B
        blocks = []
        for site, cell in zip(sites, cells, strict=True):
            start, stop = site.span or (0, width)
            blocks.append(functional.pad(cell.B, (0, 0, start, width - stop)))
        return torch.cat([cell.A for cell in cells]), torch.cat(blocks, 1)

    @staticmethod
    def mix(
        slots: Sequence[tuple[LoRA, tuple[Site, ...]]], ids: Tensor, inner: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        """One call for rows with different adapters: ids (B,) names each row's slot, -1 for none."""
        y = inner(x)
        factors = [(*lora.stacked(sites, y.shape[-1]), lora.scale) for lora, sites in slots]
        return mixed_lora_linear(x, y, factors, ids)

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Linear:
        """W + s B A (rescaled for DoRA) in a new layer, summed in float32 or wider, stored in W's dtype."""
        assert isinstance(base, nn.Linear)
        plain = nn.utils.skip_init(
            nn.Linear,
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            dtype=base.weight.dtype,
            device=base.weight.device,
        )
        weight = base.weight.detach().double().clone()
        with torch.no_grad():
            for site in sites:
                cell = self.cell(site)
                rows = slice(*(site.span or (0, base.out_features)))
                weight[rows] += self.scale * (cell.B.double() @ cell.A.double())
                if self.dora:
                    weight[rows] *= dora_gain(base.weight[rows], cell.A, cell.B, self.scale, cell.magnitude).double()[
                        :, None
                    ]
            plain.weight.copy_(weight)
            if base.bias is not None:
                plain.bias.copy_(base.bias)
        return plain.requires_grad_(False)
