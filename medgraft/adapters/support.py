"""A support set as an adapter: labelled images that a network for segmentation in context answers from, and nothing trained.

    logits_k(x) = network(x; {(image_i, [label_i = k])}_i)      one class: k = 1 alone; several: k = 0 (background) .. K, then softmax

The part enters at the site `support`; `ContextHead` reads the network's own logits out. Images are kept as the network takes them:
one grey channel, rescaled to [0, 1] by their own range, at the adapter's size. Publishing such an adapter publishes the images.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..backbones.universeg import Context
from ..errors import BadAdapter, BadCall
from .part import Part, Readout, part, resolve, shapes
from .task import Task

STORAGE = ("png", "float")
MAX_SHOTS = 1024


@part("support")
class Support(Part):
    """See the top of the file.

    shots, height, width : of the images. classes : without the background.
    soft    : labels are shares of each class in [0, 1], in steps of 1 / 255, instead of class indices.
    storage : "png" (8 bits, compressed without loss) or "float" (the file's own precision).
    image_bytes, label_bytes : of the compressed pictures, all together.
    """

    acts_on = ("support",)
    holds_images = True

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        shots: int,
        height: int,
        width: int,
        classes: int,
        soft: bool = False,
        storage: str = "png",
        image_bytes: int = 0,
        label_bytes: int = 0,
    ) -> None:
        if not 1 <= shots <= MAX_SHOTS or min(height, width, classes) < 1 or max(height, width) > 4096:
            raise BadCall(
                f"a support set is 1 to {MAX_SHOTS} labelled images of 1 to 4096 pixels a side, got {shots} of {height} x {width} "
                f"with {classes} classes"
            )
        if storage not in STORAGE:
            raise BadCall(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
        facts: dict[str, Any] = {"shots": shots, "height": height, "width": width, "classes": classes, "soft": soft}
        super().__init__(sites, **facts, storage=storage, image_bytes=image_bytes, label_bytes=label_bytes)
        self.shots, self.size, self.classes, self.soft = shots, (height, width), classes, soft
        self.storage = storage
        cell = nn.Module()
        pictures = shots * (classes if soft else 1)
        if storage == "png":
            cell.register_buffer("images", torch.zeros(image_bytes, dtype=torch.uint8))
            cell.register_buffer("image_ends", torch.zeros(shots, dtype=torch.int64))
        else:
            cell.register_buffer("images", torch.zeros(shots, height, width))
        cell.register_buffer("labels", torch.zeros(label_bytes, dtype=torch.uint8))
        cell.register_buffer("label_ends", torch.zeros(pictures, dtype=torch.int64))
        for name in self.sites:
            self.put(name, cell)
        self._contexts = _Contexts()

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        soft: bool = False,
        storage: str = "png",
    ) -> Support:
        """images (S, H, W), any range (each is rescaled by its own); labels (S, H, W) class indices, 0 for background.

        With `soft`, labels (S, K, H, W) in [0, 1]. Raises BadCall for an empty set, other shapes or values, NaN. Warns of constant
        images and of a set in which a class is nowhere labelled.
        """
        sites = resolve(cls, backbone, ("support",))
        x, y = torch.as_tensor(images).detach().cpu(), torch.as_tensor(labels).detach().cpu()
        want = f"(S, {'K, ' if soft else ''}H, W)"
        if (
            x.ndim != 3
            or x.shape[0] == 0
            or y.ndim != 3 + soft
            or y.shape[0] != x.shape[0]
            or y.shape[-2:] != x.shape[-2:]
        ):
            raise BadCall(
                f"a support set wants images (S, H, W) and labels {want} of the same sizes, with S at least 1; got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        _check_values(x, y, soft, len(task.classes))
        x = x.float()
        low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        x = (x - low) / (high - low).clamp_min(1e-12)
        pixels = (x * 255).round().to(torch.uint8).numpy()
        layers = ((y.float() * 255).round() if soft else y).to(torch.uint8).flatten(0, -3).numpy()
        image_data, label_data = [_png(p) for p in pixels], [_png(p) for p in layers]
        made = cls(
            shapes(sites),
            shots=x.shape[0],
            height=x.shape[1],
            width=x.shape[2],
            classes=len(task.classes),
            soft=soft,
            storage=storage,
            image_bytes=sum(map(len, image_data)) if storage == "png" else 0,
            label_bytes=sum(map(len, label_data)),
        )
        cell = made.cell("support")
        if storage == "png":
            _fill(cell.images, cell.image_ends, image_data)
        else:
            cell.images.copy_(x)
        _fill(cell.labels, cell.label_ends, label_data)
        return made

    @property
    def silent(self) -> bool:
        """Never."""
        return False

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "the network answers from its support set"

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors in. Raises BadAdapter where the pictures among them cannot be decoded."""
        super().load_tensors(tensors)
        self._contexts = _Contexts()
        self.labels()
        self.images()

    def images(self) -> Tensor:
        """(S, H, W) float32 in [0, 1]."""
        cell = self.cell("support")
        if self.storage == "float":
            return cell.images.float()
        return _decoded(cell.images, cell.image_ends, self.size).float() / 255

    def labels(self) -> Tensor:
        """(S, H, W) int64 class indices or, soft, (S, K, H, W) float32."""
        cell = self.cell("support")
        pictures = _decoded(cell.labels, cell.label_ends, self.size)
        if self.soft:
            return pictures.unflatten(0, (self.shots, self.classes)).float() / 255
        if int(pictures.max()) > self.classes:
            raise BadAdapter(
                f"a label of the support set has the value {int(pictures.max())}, there are {self.classes} classes"
            )
        return pictures.long()

    def masks(self) -> Tensor:
        """One binary task each: (1, S, H, W) for one class, (1 + K, S, H, W) with the background first for several."""
        y = self.labels()
        if not self.soft:
            y = torch.stack([(y == k).float() for k in range(1, self.classes + 1)], 1)
        y = y.transpose(0, 1)
        return y if self.classes == 1 else torch.cat([1 - y.sum(0, keepdim=True).clamp(max=1), y])

    def act(self, sites: Any, inner: Callable[..., Any], query: Tensor) -> Context:
        """The support set in the query's dtype, on its device."""
        return self._contexts.get(self, query)

    def subset(self, indices: Sequence[int], backbone: Backbone, task: Task) -> Support:
        """A support set of some of the pairs."""
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        return Support.on(
            backbone,
            task,
            images=self.images()[chosen],
            labels=self.labels()[chosen],
            soft=self.soft,
            storage=self.storage,
        )


class _Contexts:
    """Contexts by dtype and device; a copy of the part makes its own."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, torch.device], Context] = {}

    def get(self, support: Support, query: Tensor) -> Context:
        key = (query.dtype, query.device)
        if key not in self.kept:
            images = support.images()[:, None].to(query)
            self.kept[key] = Context(images, support.masks()[:, :, None].to(query))
        return self.kept[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Contexts:
        return _Contexts()


@part("context_head")
class ContextHead(Readout):
    """The logits of a network that answers in context, as they are: (B, K, H, W). It has no tensors."""

    def __init__(self, sites: Mapping[str, Sequence[int]], outputs: int) -> None:
        super().__init__(sites, outputs=outputs)

    @classmethod
    def on(cls, backbone: Backbone, task: Task) -> ContextHead:
        """For a task's outputs. Raises BadCall for a backbone that has no logits of its own, and for classification."""
        made = cls({}, outputs=task.outputs)
        made.check(backbone)
        if task.kind != "segment":
            raise BadCall("segmentation in context draws masks; a classifier needs neighbours or classifier_head")
        return made

    def check(self, backbone: Backbone) -> None:
        """The backbone must take a support set."""
        if "support" not in backbone.sites:
            raise BadCall(
                f"{backbone.spec.id} does not segment in context; load a UniverSeg (medgraft:starter-universeg), or choose another head"
            )

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, H, W). Raises BadCall without a support set."""
        if "logits" not in features.extra:
            raise BadCall(
                "there is no support set to answer from; put a Support part before this head: Support.on(backbone, task, ...)"
            )
        return features.extra["logits"]


def _check_values(x: Tensor, y: Tensor, soft: bool, classes: int) -> None:
    if not torch.isfinite(x.float()).all() or (soft and not torch.isfinite(y.float()).all()):
        raise BadCall("the support set holds NaN or infinite values; look for damaged images")
    if soft:
        if y.shape[1] != classes or y.min() < 0 or y.max() > 1:
            raise BadCall(
                f"soft labels are (S, {classes}, H, W) in [0, 1], got {tuple(y.shape)} in [{float(y.min()):g}, {float(y.max()):g}]"
            )
        drawn = y.flatten(2).amax((0, 2)) > 0
    else:
        values = torch.unique(y)
        if y.is_floating_point() and not torch.equal(y, y.round()):
            raise BadCall("labels are class indices, found values in between; pass soft=True for shares in [0, 1]")
        if values[0] < 0 or values[-1] > classes:
            raise BadCall(
                f"labels are class indices 0 to {classes}, found {values[:8].tolist()}; map them to the task's classes first"
            )
        drawn = torch.tensor([bool((y == k).any()) for k in range(1, classes + 1)])
    if not drawn.all():
        missing = ", ".join(str(k + 1) for k in range(classes) if not drawn[k])
        warnings.warn(
            f"class {missing} is nowhere labelled in the support set; the network has nothing to go by", stacklevel=4
        )
    flat = x.flatten(1).float()
    constant = int((flat.amax(1) == flat.amin(1)).sum())
    if constant:
        warnings.warn(f"{constant} of the {len(x)} support images are constant", stacklevel=4)


# Pictures in a tensor


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture, mode="L").save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _fill(data: Tensor, ends: Tensor, pictures: Sequence[bytes]) -> None:
    data.copy_(torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8))
    ends.copy_(torch.tensor([len(p) for p in pictures]).cumsum(0))


def _decoded(data: Tensor, ends: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) uint8. Raises BadAdapter for anything but PNG pictures of one 8-bit channel and this size."""
    raw, stops = data.cpu().numpy().tobytes(), ends.cpu().tolist()
    starts = [0, *stops[:-1]]
    if stops[-1] != len(raw) or any(a >= b for a, b in zip(starts, stops, strict=True)):
        raise BadAdapter("the pictures of the support set do not add up to their bytes; fetch the adapter again")
    found = []
    for a, b in zip(starts, stops, strict=True):
        try:
            picture = Image.open(io.BytesIO(raw[a:b]), formats=("PNG",))
            if picture.mode != "L" or picture.size != (size[1], size[0]):
                raise BadAdapter(
                    f"a picture of the support set is {picture.mode} {picture.size[1]} x {picture.size[0]}, 8-bit grey {size[0]} x {size[1]} is described"
                )
            found.append(np.asarray(picture))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as broken:
            raise BadAdapter(
                f"a picture of the support set cannot be decoded ({broken}); fetch the adapter again"
            ) from None
    return torch.from_numpy(np.stack(found))
