"""LoRA on a linear layer together with the LayerNorm that feeds it alone, in two operations that meet at two ports.

The norm's makes H = [h | s h A^T | 0] and gives h, a view of H's first columns, in place of the norm's own output. H travels as an attribute of
that very tensor, so the linear layer finds it if and only if it is given h itself: what is made of h on the way (a copy, windows) has
none, and LoRA goes its ordinary way. Nothing is kept between calls, so threads never meet, and others who read h need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.sites import Operation, Port, Site
from ..kernels import joined_linear, norm_shrink
from ..kernels.door import Path
from ..kernels.norm_shrink import norm_lora_path
from .lora import LoRA

JOINED = "medgraft_joined"
"""The attribute's name."""


@dataclass(frozen=True, eq=False)
class Joined:
    """What a norm's output carries: H (..., K + R rounded up), the B (N, R) that belongs to it, who made it, and by which path."""

    columns: Tensor
    b: Tensor
    maker: NormLoRA
    path: Path


def joined(x: Any) -> Joined | None:
    """What travels on `x`, if anything."""
    return getattr(x, JOINED, None)


@dataclass(frozen=True, eq=False)
class NormLoRA:
    """`slots` of LoRA at the port of `linear`, an adapter an image with `ids`, `rank` all together; `apart` is what they do there without the norm."""

    linear: nn.Linear
    slots: Sequence[tuple[LoRA, tuple[Site, ...]]]
    ids: Tensor | None
    rank: int
    apart: Operation

    def at_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """(..., K) -> (..., K), by the norm itself where its kernel does not run."""
        frozen = self.linear
        path = norm_lora_path(x, norm.weight, norm.bias, frozen.weight, frozen.bias, self.rank)
        if not path.fused or not all(lora.mixable for lora, _ in self.slots):  # not so for DoRA, nor with dropout on
            return norm(x)
        factors = [(*lora.stacked(sites, frozen.out_features), lora.scale) for lora, sites in self.slots]
        columns, b = norm_shrink(x, norm.weight, norm.bias, norm.eps, factors, self.ids)
        h = columns[..., : x.shape[-1]]
        setattr(h, JOINED, Joined(columns, b, self, path))
        return h

    def at_linear(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """(..., K) -> (..., N)"""
        found = joined(x)
        if found is None or found.maker is not self:
            return self.apart(linear, x)
        return joined_linear(found.columns, found.b, self.linear.weight, self.linear.bias)


def with_norm(
    backbone: Backbone,
    port: str,
    slots: Sequence[tuple[LoRA, tuple[Site, ...]]],
    apart: Operation,
    taken: Mapping[str, Any],
    ids: Tensor | None = None,
) -> dict[str, Operation]:
    """The operations of LoRA at `port`: two where a LayerNorm whose port is not `taken` feeds the linear layer alone, else `apart` as it is."""
    name = backbone.sites[port].norm
    if name and name not in taken:
        norm, linear = (_frozen(backbone, site) for site in (name, port))
        if isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            rank = sum(len(lora.cell(site).A) for lora, sites in slots for site in sites)
            both = NormLoRA(linear, slots, ids, rank, apart)
            return {name: both.at_norm, port: both.at_linear}
    return {port: apart}


def _frozen(backbone: Backbone, site: str) -> nn.Module:
    port = backbone.network.get_submodule(backbone.sites[site].path)
    assert isinstance(port, Port)
    return port.__dict__["base"]
