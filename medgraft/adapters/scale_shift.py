"""Scale and shift of features (SSF).

    y = g * f(x) + d      g, d (out,), one pair for each output channel of the frozen layer f; g = 1, d = 0 at the start

Linear, norm and branch outputs have their channels last, convolutions have them second. Folds exactly into linear layers, norms and convolutions.

Source: Lian et al. 2022 (arXiv:2210.08823) section 3.2; the authors draw g and d around 1 and 0, here they start exactly there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..backbones.weights import Weights
from .part import Part, on_output, part, resolve, shapes
from .task import Task

TARGETS = ("*.norm1", "*.norm2", "*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2", "norm")


class Affine(nn.Module):
    """Scale and shift of one site."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))


@part("scale_shift")
class ScaleShift(Part):
    """See the top of the file."""

    acts_on = ("linear", "norm", "branch", "conv", "weights")

    def __init__(self, sites: Mapping[str, Sequence[int]]) -> None:
        super().__init__(sites)
        for name, (_, width) in self.sites.items():
            self.put(name, Affine(width))

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, targets: str | Sequence[str] = TARGETS) -> ScaleShift:
        """A pair at every site that matches. Of the default targets, those that the backbone lacks are passed over."""
        if targets is TARGETS:
            from fnmatch import fnmatchcase

            fused = any(name.endswith(".attn.qkv") for name in backbone.sites)
            wanted = (
                TARGETS
                if fused
                else (*(t for t in TARGETS if not t.endswith("qkv")), "*.attn.q", "*.attn.k", "*.attn.v")
            )
            targets = [t for t in wanted if any(fnmatchcase(name, t) for name in backbone.sites)]
        return cls(shapes(resolve(cls, backbone, targets)))

    @property
    def foldable(self) -> bool:
        """Into linear layers, norms and convolutions; a branch keeps a small module behind it."""
        return True

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The frozen output, scaled and shifted."""
        out = inner(*args, **kwargs)
        if sites[0].kind == "weights":
            return self._effective(sites, *out)
        for site in sites:
            out = on_output(out, partial(self._affine, site))
        return out

    def _effective(self, sites: tuple[Site, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(g W, g b + d): scaling and shifting a convolution's output by its tensors."""
        for site in sites:
            scale, shift = self.cell(site).scale.to(weight.dtype), self.cell(site).shift.to(weight.dtype)
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
        return weight, bias

    def _affine(self, site: Site, y: Tensor) -> Tensor:
        scale, shift = self.cell(site).scale.to(y.dtype), self.cell(site).shift.to(y.dtype)
        if site.kind == "conv":
            scale, shift = (t.view(-1, *([1] * (y.ndim - 2))) for t in (scale, shift))
        if site.span is None:
            return y * scale + shift
        start, stop = site.span
        return torch.cat([y[..., :start], y[..., start:stop] * scale + shift, y[..., stop:]], -1)

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Module:
        """g W and g b + d in a new layer of the same class."""
        if not isinstance(base, nn.Linear | nn.LayerNorm | Weights | _ConvNd):
            raise TypeError(f"{type(base).__name__} has no weights to fold into")
        plain: Any = copy.deepcopy(base)
        turned = isinstance(plain, _ConvTransposeNd)  # its weight is (in, out / groups, *kernel)
        with torch.no_grad():
            if plain.bias is None:
                plain.bias = nn.Parameter(
                    plain.weight.new_zeros(plain.out_channels if turned else plain.weight.shape[0])
                )
            for site in sites:
                cell, rows = self.cell(site), slice(*(site.span or (0, plain.bias.shape[0])))
                scale, shift = cell.scale.to(plain.weight.dtype), cell.shift.to(plain.weight.dtype)
                ones = [1] * (plain.weight.ndim - 2 if turned else plain.weight.ndim - 1)
                if turned:
                    by_group = plain.weight.unflatten(0, (plain.groups, -1))
                    plain.weight.copy_((by_group * scale.view(plain.groups, 1, -1, *ones)).flatten(0, 1))
                else:
                    plain.weight[rows] *= scale.view(-1, *ones)
                plain.bias[rows] = plain.bias[rows] * scale + shift
        return plain.requires_grad_(False)
