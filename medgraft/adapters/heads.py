"""Small heads: one linear layer for each location or image.

    LinearHead:      logits(p) = W f(p) + b at each location of a feature map, then (tri)linear to the image's size
    ClassifierHead:  linear  logits = W z + b;   cosine  logits_k = t <z / |z|, w_k / |w_k|>,   z (B, C) the pooled features

Shapes: LinearHead (B, C, h, w) -> (B, K, H, W), in volumes (B, C, d, h, w) -> (B, K, D, H, W); ClassifierHead (B, C) -> (B, K).
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
    """A 1x1 convolution on one map (`level`, default the last) of `dims` axes. See the top of the file."""

    def __init__(
        self, sites: Mapping[str, Sequence[int]], width: int, outputs: int, level: int = -1, dims: int = 2
    ) -> None:
        super().__init__(sites, width=width, outputs=outputs, level=level, dims=dims)
        self.level, self.dims = level, dims
        self.linear = (nn.Conv2d if dims == 2 else nn.Conv3d)(width, outputs, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    @classmethod
    def on(
        cls, backbone: Backbone, task: Task, *, level: int = -1, class_rows: Sequence[int] | None = None
    ) -> LinearHead:
        """A head for the task's outputs on the backbone's map `level`.

        `class_rows` starts each output at that row of the backbone's pretrained head (its site `head`), one row an output, so that the
        fresh adapter predicts what the backbone was trained for. Raises BadCall for rows or a head that are not there.
        """
        made = cls({}, map_width(backbone, level), task.outputs, level, backbone.spec.dims)
        if class_rows is not None:
            weight, bias = _rows(backbone, class_rows, task.outputs)
            with torch.no_grad():
                made.linear.weight.copy_(weight.view_as(made.linear.weight))
                made.linear.bias.copy_(bias)  # type: ignore[union-attr]
        return made

    def check(self, backbone: Backbone) -> None:
        """The map must be there, have the head's width and as many axes as it was made for."""
        check_width(self, backbone, self.linear.in_channels, map_width(backbone, self.level))
        check_dims(self, backbone, self.dims)

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, *space), `space` the image's."""
        f, space = features.maps[self.level], image.shape[2:]
        convolve = functional.conv2d if self.dims == 2 else functional.conv3d
        logits = convolve(f, self.linear.weight.to(f.dtype), self.linear.bias.to(f.dtype))  # type: ignore[union-attr]
        if self.dims == 3 and logits.shape[2:] == space:
            return logits
        mode = "bilinear" if self.dims == 2 else "trilinear"
        return functional.interpolate(logits, space, mode=mode, align_corners=False)


def _rows(backbone: Backbone, rows: Sequence[int], outputs: int) -> tuple[Tensor, Tensor]:
    """Rows of the pretrained head as (weight (outputs, C, 1 ..), bias (outputs,))."""
    site = backbone.sites.get("head")
    layer = None if site is None else backbone.network.get_submodule(site.path)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    one_voxel = isinstance(weight, Tensor) and site is not None and weight.numel() == site.fan_in * site.fan_out
    if not one_voxel or site is None or site.fan_in != backbone.spec.width:
        raise BadCall(f"class_rows= needs a pretrained head, one linear layer a voxel; {backbone.spec.id} has none")
    classes = site.fan_out
    if len(rows) != outputs or not all(0 <= row < classes for row in rows):
        raise BadCall(
            f"class_rows= wants {outputs} rows of the head of {backbone.spec.id}, 0 to {classes - 1}; got {list(rows)}"
        )
    assert isinstance(weight, Tensor)
    index = torch.tensor(rows, device=weight.device)
    return weight[index], weight.new_zeros(outputs) if bias is None else bias[index]


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


def check_dims(part: Part, backbone: Backbone, made_for: int) -> None:
    """Raise BadCall unless a part meets maps of as many axes as it was made for."""
    if made_for != backbone.spec.dims:
        raise BadCall(
            f"this {part.kind} was made for {made_for}D maps; {backbone.spec.id} gives {backbone.spec.dims}D ones"
        )


def map_width(backbone: Backbone, level: int) -> int:
    """Channels of the feature map `level`. Raises BadCall for a map that is not there."""
    widths = backbone.spec.widths
    if not -len(widths) <= level < len(widths):
        raise BadCall(f"{backbone.spec.id} has {len(widths)} feature maps, level {level} is not one of them")
    return widths[level]
