"""Low-rank updates of frozen convolutions, plain and transposed, in one, two or three dimensions.

    y = W * x + b + s B (A * x),   s = alpha / r

`*` is the frozen layer's own convolution: its stride, padding and padding mode, dilation and groups. A has W's shape with r outputs a
group, B is a 1x1 convolution of the same groups, so the update is a convolution of the same kind with the kernel

    dW[o, i, k] = s sum_q B[o, q] A[j r + q, i, k]          o an output of group j
    dW[i, o, k] = s sum_q B[j O + o, q] A[i, q, k]          transposed; i an input of group j, O outputs a group

and folds into W exactly. A is drawn, B is zero, so a fresh part is silent. Tensors of a site: `A`, (g r, in / g, *kernel) or, transposed,
(in, r, *kernel); `B` (out, r).

Source: Hu et al. 2021 (arXiv:2106.09685) section 4.1, carried over to convolutions; for groups and transposed ones this file defines it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..errors import BadCall
from .convolution import convolve
from .part import Part, part, resolve, shapes
from .task import Task

Layer = Mapping[str, Any]
"""What a site's factors depend on beside its widths: `kernel` (a list), `groups`, `transposed`."""

POINTWISE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Kernels(nn.Module):
    """A and B of one site."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, layer: Layer) -> None:
        super().__init__()
        groups, kernel = layer["groups"], layer["kernel"]
        shape = (fan_in, rank) if layer["transposed"] else (groups * rank, fan_in // groups)
        self.A = nn.Parameter(torch.empty(*shape, *kernel))
        self.B = nn.Parameter(torch.zeros(fan_out, rank))
        bound = 1 / math.sqrt(fan_in // groups * math.prod(kernel))  # as torch draws a convolution
        nn.init.uniform_(self.A, -bound, bound)


@part("conv_lora")
class ConvLoRA(Part):
    """See the top of the file. `layers` says for each site what its factors' shapes depend on."""

    acts_on = ("conv",)
    innermost = True

    def __init__(
        self, sites: Mapping[str, Sequence[int]], layers: Mapping[str, Layer], rank: int = 4, alpha: float = 8.0
    ) -> None:
        if rank < 1:
            raise BadCall(f"ConvLoRA wants a rank >= 1, got {rank}")
        super().__init__(sites, layers={name: dict(layer) for name, layer in layers.items()}, rank=rank, alpha=alpha)
        if set(layers) != set(self.sites):
            raise BadCall("ConvLoRA wants the kernel, groups and transposition of each of its sites, and of no others")
        self.layers, self.scale = self.config["layers"], alpha / rank
        for name, (fan_in, fan_out) in self.sites.items():
            self.put(name, Kernels(fan_in, fan_out, rank, layers[name]))

    @classmethod
    def on(
        cls, backbone: Backbone, task: Task, *, targets: str | Sequence[str], rank: int = 4, alpha: float = 8.0
    ) -> ConvLoRA:
        """Factors at every convolution that matches `targets`."""
        sites = resolve(cls, backbone, targets)
        layers = {s.name: _layer(backbone.network.get_submodule(s.path)) for s in sites}
        return cls(shapes(sites), layers, rank, alpha)

    @property
    def foldable(self) -> bool:
        """Always."""
        return True

    def check(self, backbone: Backbone) -> None:
        """Kernel, groups and direction of each convolution must be those that the factors were made for."""
        for name in self.sites:
            here = _layer(backbone.network.get_submodule(backbone.sites[name].path))
            if here != self.layers[name]:
                raise BadCall(
                    f"this adapter was made for a convolution {_said(self.layers[name])} at {name}; in {backbone.spec.id} it is {_said(here)}"
                )

    def act(self, sites: tuple[Site, ...], inner: Any, x: Tensor, *args: Any) -> Tensor:
        """(B, in, *space) -> (B, out, *space')."""
        (site,) = sites
        cell, groups = self.cell(site), self.layers[site.name]["groups"]
        low = convolve(inner, cell.A.to(x.dtype), None, x, *args)
        b = cell.B.to(x.dtype)
        axes = x.ndim - 2
        return inner(x, *args) + self.scale * POINTWISE[axes](low, b.view(*b.shape, *[1] * axes), groups=groups)

    def kernel(self, site: str) -> Tensor:
        """dW of a site in the layout of the frozen weight, float64."""
        cell, layer = self.cell(site), self.layers[site]
        g = layer["groups"]
        b = cell.B.double().unflatten(0, (g, -1))  # (g, out / g, r)
        if layer["transposed"]:
            a = cell.A.double().unflatten(0, (g, -1))  # (g, in / g, r, *kernel)
            return self.scale * torch.einsum("goq,giq...->gio...", b, a).flatten(0, 1)
        a = cell.A.double().unflatten(0, (g, -1))  # (g, r, in / g, *kernel)
        return self.scale * torch.einsum("goq,gqi...->goi...", b, a).flatten(0, 1)

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Module:
        """W + dW in a new layer, summed in float64, stored in W's dtype."""
        assert isinstance(base, _ConvNd)
        plain = copy.deepcopy(base)
        with torch.no_grad():
            plain.weight.copy_(base.weight.double() + self.kernel(sites[0].name))
        return plain.requires_grad_(False)

    @property
    def alike(self) -> dict[str, Any]:
        """The sites and their layers. Ranks and scales may differ."""
        return {"sites": self.sites, "layers": self.layers}

    @classmethod
    def soup(cls, parts: Sequence[ConvLoRA], weights: Sequence[float]) -> ConvLoRA:
        """The mean of the kernels, exactly: the factors stacked, rank = sum of ranks. See `LoRA.soup`."""
        scales = [w * p.scale for w, p in zip(weights, parts, strict=True)]
        rank, scale, first = sum(p.config["rank"] for p in parts), max(scales, key=abs) or 1.0, parts[0]
        made = cls(first.sites, first.layers, rank, scale * rank)
        for name, layer in first.layers.items():
            axis = 1 if layer["transposed"] else 0
            groups = 1 if layer["transposed"] else layer["groups"]
            a = [p.cell(name).A.detach().unflatten(axis, (groups, -1)) for p in parts]
            b = [f / scale * p.cell(name).B.detach().double() for f, p in zip(scales, parts, strict=True)]
            cell, like = made.cell(name), first.cell(name).A
            cell.A = nn.Parameter(torch.cat(a, axis + 1).flatten(axis, axis + 1).to(like))
            cell.B = nn.Parameter(torch.cat(b, 1).to(like))
        return made


def _layer(conv: Any) -> dict[str, Any]:
    return {"kernel": list(conv.kernel_size), "groups": conv.groups, "transposed": conv.transposed}


def _said(layer: Layer) -> str:
    way = "transposed, " if layer["transposed"] else ""
    return f"({way}{'x'.join(map(str, layer['kernel']))}, {layer['groups']} groups)"
