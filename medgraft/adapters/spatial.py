"""Spatial adapters: a few 3x3x3 convolutions on a backbone's last map, so that a small head sees each voxel's neighbourhood.

    paper      y = a(x + n(c3(a(n(c2(a(n(c1(x)))))))))    n batch norm, affine, with running statistics
    code2023   y = a(x + n(c2(a(n(c1(x))))))              n instance norm without tensors
    residual   y = x + c2(relu(c1(x)))                    c2 zero at the start: silent at birth

a is LeakyReLU with slope 0.01, the convolutions keep the C channels and have no bias. At C = 48 they hold 3 (48 48 27) + 3 (2 48) = 186,912,
124,416 and 124,416 parameters; the 209,664 that the paper states are those of SwinUNETR's decoder1.

Acts at `embedding` sites, behind the whole frozen network. Tensors of a site: `convs.<i>.weight`, and in the paper's form
`norms.<i>.{weight,bias,running_mean,running_var}`: an adapter's own statistics travel in its file and are used in evaluation, so that rows
do not meet there.

Source: Silva-Rodriguez et al. 2023, "Transductive few-shot adapters for medical image segmentation", section 3.2 (paper), the authors'
code of the workshop (code2023) and of 2025 (residual).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..errors import BadData, unknown
from .heads import LinearHead, check_dims
from .part import Part, on_output, part, resolve, shapes
from .task import Task

SLOPE, EPS, MOMENTUM = 0.01, 1e-5, 0.1


class Stack(nn.Module):
    """The convolutions of one site, and their norms in the paper's form."""

    def __init__(self, width: int, dims: int, count: int, normed: bool) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.convs = nn.ModuleList(conv(width, width, 3, padding=1, bias=False) for _ in range(count))
        self.norms = nn.ModuleList(norm(width) for _ in range(count if normed else 0))
        for made in self.norms:
            del made.num_batches_tracked  # the momentum is fixed: nothing counts


@part("spatial_adapter")
class SpatialAdapter(Part):
    """See the top of the file."""

    acts_on = ("embedding",)
    COUNTS: ClassVar[dict[str, int]] = {"paper": 3, "code2023": 2, "residual": 2}

    def __init__(self, sites: Mapping[str, Sequence[int]], form: str = "residual", dims: int = 3) -> None:
        if form not in self.COUNTS:
            raise unknown("form of a spatial adapter", form, self.COUNTS)
        super().__init__(sites, form=form, dims=dims)
        self.form, self.dims = form, dims
        for name, (_, width) in self.sites.items():
            stack = Stack(width, dims, self.COUNTS[form], form == "paper")
            if form == "residual":
                nn.init.zeros_(stack.convs[-1].weight)  # type: ignore[arg-type]
            self.put(name, stack)

    @classmethod
    def on(
        cls, backbone: Backbone, task: Task, *, form: str = "residual", targets: str | Sequence[str] = "embedding"
    ) -> SpatialAdapter:
        """An adapter on the backbone's last map."""
        return cls(shapes(resolve(cls, backbone, targets)), form, backbone.spec.dims)

    @property
    def silent(self) -> bool:
        """In the residual form."""
        return self.form == "residual"

    @property
    def why_not_silent(self) -> str:
        """The reason, for the other forms."""
        return "" if self.silent else "its convolutions are drawn, and an activation follows its skip"

    def check(self, backbone: Backbone) -> None:
        """Maps must have as many axes as the convolutions."""
        check_dims(self, backbone, self.dims)

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The frozen map, adapted."""
        stack = self.cell(sites[0])
        return on_output(inner(*args, **kwargs), lambda x: self._adapted(stack, x))

    def _adapted(self, stack: Any, x: Tensor) -> Tensor:
        convolve = functional.conv2d if self.dims == 2 else functional.conv3d
        y, last = x, len(stack.convs) - 1
        for i, conv in enumerate(stack.convs):
            y = convolve(y, conv.weight.to(y.dtype), padding=1)
            if self.form == "paper":
                y = self._batch_norm(stack.norms[i], y)
            elif self.form == "code2023":
                y = functional.instance_norm(y, eps=EPS)
            if i < last:
                y = functional.relu(y) if self.form == "residual" else functional.leaky_relu(y, SLOPE)
        return x + y if self.form == "residual" else functional.leaky_relu(x + y, SLOPE)

    def _batch_norm(self, norm: Any, y: Tensor) -> Tensor:
        """In float32 on any backbone: statistics of few examples are too coarse in half precision."""
        own = (norm.running_mean.float(), norm.running_var.float(), norm.weight.float(), norm.bias.float())
        return functional.batch_norm(y.float(), *own, self.training, MOMENTUM, EPS).to(y.dtype)


AUTHORS = {"classifier.0.adapter.conv1.conv.weight": 0, "classifier.0.adapter.conv2.conv.weight": 1}
HEAD = ("classifier.1.linear.weight", "classifier.1.linear.bias")


def parts_of_authors(tensors: Mapping[str, Tensor], backbone: Backbone, task: Task) -> dict[str, Part]:
    """The trained parts of a checkpoint in the authors' names of 2023, `{"spatial": ..., "head": ...}`, for `Adapter.of`.

    Tensors of the backbone in the same file are passed over. Raises BadData for one that is missing or has another shape.
    """
    spatial, head = SpatialAdapter.on(backbone, task, form="code2023"), LinearHead.on(backbone, task)
    given = {name.removeprefix("module."): t for name, t in tensors.items()}
    stack = spatial.cell("embedding")
    slots: dict[str, Any] = {name: stack.convs[i].weight for name, i in AUTHORS.items()}
    slots |= dict(zip(HEAD, (head.linear.weight, head.linear.bias), strict=True))
    for name, own in slots.items():
        if name not in given or given[name].shape != own.shape:
            found = "it is missing" if name not in given else f"it is {tuple(given[name].shape)}"
            raise BadData(
                f"asked for a spatial adapter in its authors' names of 2023: {name} of {tuple(own.shape)} is wanted for "
                f"{backbone.spec.id}, {found}"
            )
    with torch.no_grad():
        for name, own in slots.items():
            own.copy_(given[name])
    return {"spatial": spatial, "head": head}
