"""What an adapter is for: its classes and label map, and how an image becomes the tensor that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import BadCall
from ..pixels import Fit, Frame, bright_box, prepare


@dataclass(frozen=True)
class Task:
    """A segmentation or classification task.

    classes : names, without the background.
    values  : the pixel value written for each class (default 1, 2, ...).
    """

    kind: Literal["segment", "classify"]
    classes: tuple[str, ...]
    values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("segment", "classify"):
            raise BadCall(f"task kind must be 'segment' or 'classify', got {self.kind!r}")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise BadCall(f"a task needs distinct class names, got {list(self.classes)}")
        if not self.values:
            object.__setattr__(self, "values", tuple(range(1, len(self.classes) + 1)))
        distinct = len(set(self.values)) == len(self.values) == len(self.classes)
        top = 255 if self.kind == "segment" else 1000  # pixels hold a byte; a classifier's values are names only
        if not distinct or not all(0 < v <= top for v in self.values):
            raise BadCall(
                f"label values must be distinct, 1 to {top}, one a class; got {list(self.values)} for {list(self.classes)}"
            )

    @property
    def outputs(self) -> int:
        """Channels of the logits: one for a single class against background, else one a class (and one for background)."""
        if self.kind == "classify":
            return len(self.classes)
        return 1 if len(self.classes) == 1 else len(self.classes) + 1

    def decide(self, logits: Tensor) -> Tensor:
        """Class indices, int64: (B, K, H, W) -> (B, H, W) with 0 for background, or (B, K) -> (B,)."""
        if self.kind == "segment" and self.outputs == 1:
            return (logits[:, 0] > 0).long()
        return logits.argmax(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid for one output, softmax over axis 1 else; float32."""
        return logits.float().sigmoid() if self.outputs == 1 else logits.float().softmax(1)

    def write(self, indices: np.ndarray) -> np.ndarray:
        """Class indices -> pixel values of the label map, uint8."""
        return np.asarray((0, *self.values), dtype=np.uint8)[indices]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"classes": list(self.classes), "values": list(self.values)}


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `size` x `size` pixels, scale to [0, 1], subtract `mean`, divide by `std`, per channel.

    With `crop` the dark border (of a fundus, say) is cut off first; what is predicted there is background. `fit` "pad" keeps the
    aspect and fills the square up (SAM), "stretch" does not.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool = False
    fit: Fit = "stretch"

    def __call__(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (3, size, size) float32; bilinear with antialiasing."""
        return prepare(image[bright_box(image)] if self.crop else image, self.size, self.mean, self.std, self.fit)

    @property
    def said(self) -> str:
        """In words, for people."""
        cut = "without its dark border, " if self.crop else ""
        return f"{cut}{self.size} x {self.size} pixels{', padded' if self.fit == 'pad' else ''}, in [0, 1]"

    def frame(self, image: np.ndarray) -> Frame:
        """Where the image lies in what `__call__` makes of it."""
        return Frame.of(image, self.size, self.fit, crop=self.crop)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        found: dict[str, Any] = {"size": self.size, "mean": list(self.mean), "std": list(self.std)}
        found |= {"crop": True} if self.crop else {}
        return found | {"fit": self.fit} if self.fit != "stretch" else found

    @staticmethod
    def from_json(found: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`."""
        return Preprocessing(
            int(found["size"]),
            tuple(found["mean"]),
            tuple(found["std"]),
            found.get("crop", False),
            found.get("fit", "stretch"),
        )


def task_from_json(found: dict[str, Any]) -> Task:
    """The inverse of `Task.to_json`."""
    return Task(found["kind"], tuple(found["classes"]), tuple(found["values"]))


def segment(classes: Sequence[str]) -> Task:
    """A segmentation task with pixel values 1, 2, ..."""
    return Task("segment", tuple(classes))
