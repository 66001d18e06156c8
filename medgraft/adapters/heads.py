"""Small heads: one linear layer for each location or image.

    LinearHead:      logits(p) = W f(p) + b at each location of a feature map, then bilinear to the image's size
    ClassifierHead:  linear  logits = W z + b;   cosine  logits_k = t <z / |z|, w_k / |w_k|>,   z (B, C) the pooled features

Shapes: LinearHead (B, C, h, w) -> (B, K, H, W); ClassifierHead (B, C) -> (B, K).
Source of the cosine form: Chen et al. 2019 (arXiv:1904.04232) section 3.2, scale learned as in Gidaris and Komodakis 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..errors import BadCall
from .part import Part, Readout, part
from .task import Task


@part("linear_head")
class LinearHead(Readout):
    """A 1x1 convolution on one map (`level`, default the last). See the top of the file."""

    def __init__(self, sites: Mapping[str, Sequence[int]], width: int, outputs: int, level: int = -1) -> None:
        super().__init__(sites, width=width, outputs=outputs, level=level)
        self.level = level
        self.linear = nn.Conv2d(width, outputs, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, level: int = -1) -> LinearHead:
        """A head for the task's outputs on the backbone's map `level`."""
        return cls({}, width=map_width(backbone, level), outputs=task.outputs, level=level)

    def check(self, backbone: Backbone) -> None:
        """The map must be there and have the head's width."""
        check_width(self, backbone, self.linear.in_channels, map_width(backbone, self.level))

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, H, W)."""
        f = features.maps[self.level]
        logits = functional.conv2d(f, self.linear.weight.to(f.dtype), self.linear.bias.to(f.dtype))  # type: ignore[union-attr]
        return functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


@part("classifier_head")
class ClassifierHead(Readout):
    """One vector an image to class logits, linear or cosine. See the top of the file."""

    def __init__(
        self, sites: Mapping[str, Sequence[int]], width: int, outputs: int, form: str = "linear", dropout: float = 0.0
    ) -> None:
        if form not in ("linear", "cosine"):
            raise BadCall(f"classifier form must be 'linear' or 'cosine', got {form!r}")
        super().__init__(sites, width=width, outputs=outputs, form=form, dropout=dropout)
        self.form, self.dropout = form, dropout
        self.weight = nn.Parameter(torch.empty(outputs, width).normal_(std=0.01))
        if form == "linear":
            self.bias = nn.Parameter(torch.zeros(outputs))
        else:
            self.temperature = nn.Parameter(torch.tensor(10.0))

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, form: str = "linear", dropout: float = 0.0) -> ClassifierHead:
        """A head for the task's classes on the pooled features."""
        return cls({}, width=backbone.spec.width, outputs=task.outputs, form=form, dropout=dropout)

    def check(self, backbone: Backbone) -> None:
        """The pooled features must have the head's width."""
        check_width(self, backbone, self.weight.shape[1], backbone.spec.width)

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K)."""
        z = functional.dropout(features.pooled, self.dropout, self.training)
        weight = self.weight.to(z.dtype)
        if self.form == "linear":
            return functional.linear(z, weight, self.bias.to(z.dtype))
        return self.temperature.to(z.dtype) * functional.linear(
            functional.normalize(z, dim=1), functional.normalize(weight, dim=1)
        )


def check_width(part: Part, backbone: Backbone, made_for: int, found: int) -> None:
    """Raise BadCall unless a readout meets features of the width that it was made for."""
    if made_for != found:
        raise BadCall(
            f"this {part.kind} was made for features of {made_for} channels; {backbone.spec.id} gives {found}"
        )


def map_width(backbone: Backbone, level: int) -> int:
    """Channels of the feature map `level`. Raises BadCall for a map that is not there."""
    widths = backbone.spec.widths
    if not -len(widths) <= level < len(widths):
        raise BadCall(f"{backbone.spec.id} has {len(widths)} feature maps, level {level} is not one of them")
    return widths[level]
