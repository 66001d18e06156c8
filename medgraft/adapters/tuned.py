"""Trainable copies of named layers: norms, biases, a last block, a decoder.

    y = f(x; theta')      f the frozen layer, theta' a copy of some or all of its tensors, trained

Tensors of a site carry the layer's own names (`weight`, `bias`). A fresh copy is equal, so it is silent. The copies stand in the
adapter once and are not counted twice with the frozen originals.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..backbones.weights import Weights
from ..errors import BadCall
from .convolution import convolve
from .part import Part, part, resolve, shapes
from .task import Task


class Copies(nn.Module):
    """Copies of one layer's tensors."""

    def __init__(self, tensors: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name, shape in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))


@part("tuned")
class Tuned(Part):
    """See the top of the file. `tensors` maps each site to the names and shapes of what is copied."""

    acts_on = ("norm", "linear", "conv", "prompt", "weights")
    innermost = True

    def __init__(self, sites: Mapping[str, Sequence[int]], tensors: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        super().__init__(sites, tensors={site: {k: list(v) for k, v in own.items()} for site, own in tensors.items()})
        if set(tensors) != set(self.sites) or not all(tensors.values()):
            raise BadCall("Tuned wants the names and shapes of at least one tensor for each of its sites")
        for name in self.sites:
            self.put(name, Copies(tensors[name]))

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        targets: str | Sequence[str],
        tensors: Sequence[str] = ("weight", "bias"),
    ) -> Tuned:
        """Copies of the named `tensors` of every whole layer that matches `targets`."""
        matched = resolve(cls, backbone, targets)
        sites = [s for s in matched if s.span is None]
        for s in matched:
            if s.span is not None and backbone.sites[s.port] not in sites:
                raise BadCall(
                    f"{s.name} is some rows of {s.port} in {backbone.spec.id}, whole layers are copied; target {s.port}"
                )
        found = {}
        known: dict[str, None] = {}
        for site in sites:
            layer = dict(backbone.network.get_submodule(site.path).named_parameters(recurse=False))
            known |= dict.fromkeys(layer)
            own = {name: p for name, p in layer.items() if name in tensors}
            if own:
                found[site.name] = own
        lost = [name for name in tensors if name not in known and name not in ("weight", "bias")]
        if lost or not found:
            raise BadCall(
                f"none of the layers that match {targets!r} has a tensor called {' or '.join(map(repr, lost or tensors))}; "
                f"they have: {', '.join(known) or 'none'}"
            )
        tuned = cls(
            shapes([s for s in sites if s.name in found]),
            {n: {k: list(p.shape) for k, p in own.items()} for n, own in found.items()},
        )
        with torch.no_grad():
            for name, own in found.items():
                for k, p in own.items():
                    getattr(tuned.cell(name), k).copy_(p)
        return tuned

    @property
    def foldable(self) -> bool:
        """Always."""
        return True

    def check(self, backbone: Backbone) -> None:
        """Every copy must be of a tensor of its layer."""
        for name in self.sites:
            site = backbone.sites[name]
            layer = dict(backbone.network.get_submodule(site.path).named_parameters(recurse=False))
            for key, t in self.cell(name).state_dict().items():
                if site.span is not None or key not in layer:
                    own = ", ".join(layer) if site.span is None else "none: it is a part of a larger layer"
                    raise BadCall(
                        f"this adapter tunes {key!r} of {name}; tensors of that layer in {backbone.spec.id}: {own}"
                    )
                if t.shape != layer[key].shape:
                    raise BadCall(
                        f"this adapter tunes {key!r} of {name} as {tuple(t.shape)}; in {backbone.spec.id} it is {tuple(layer[key].shape)}"
                    )

    def act(self, sites: tuple[Site, ...], inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The frozen layer's function with the copies in the place of its tensors."""
        own: dict[str, Tensor] = dict(self.cell(sites[0]).named_parameters())
        own |= dict(self.cell(sites[0]).named_buffers())
        if isinstance(inner, Weights):
            weight, bias = own.get("weight", inner.weight), own.get("bias", inner.bias)
            return weight.to(inner.weight.dtype), bias.to(inner.bias.dtype)
        first = args[0]
        if isinstance(inner, nn.Embedding):
            return functional.embedding(first, own["weight"].to(inner.weight.dtype))
        own = {name: t.to(first.dtype) for name, t in own.items()}
        if type(inner) is nn.Linear:
            return functional.linear(first, own.get("weight", inner.weight), own.get("bias", inner.bias))
        if isinstance(inner, nn.LayerNorm):
            ahead = getattr(inner, "data_format", None) == "channels_first"  # transformers' norm of a map (B, C, h, w)
            normed = functional.layer_norm(
                first.movedim(1, -1) if ahead else first,
                inner.normalized_shape,
                own.get("weight", inner.weight),
                own.get("bias", inner.bias),
                inner.eps,
            )
            return normed.movedim(-1, 1) if ahead else normed
        if isinstance(inner, _ConvNd):
            return convolve(inner, own.get("weight", inner.weight), own.get("bias", inner.bias), *args)
        return functional_call(inner, own, args, kwargs)

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Module:
        """A copy of the layer holding the copies."""
        plain = copy.deepcopy(base)
        with torch.no_grad():
            for name, t in self.cell(sites[0]).state_dict().items():
                getattr(plain, name).copy_(t)
        return plain.requires_grad_(False)
