"""From pixels to what a backbone takes, in one place for training and prediction.

prepare:  uint8 (H, W, 3) -> [0, 1] -> bilinear, antialiased, to (3, S, S) -> (x - mean) / std

`fit` says how a picture becomes a square. "stretch": both sides to S. "pad": the longer side to S, the aspect kept, and the square
filled up to the right and below with the mean colour, which is 0 after normalisation (SAM's way). A picture of more than `LARGE`
pixels is first averaged down to 4,096 a side, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from .errors import BadCall

Fit = Literal["stretch", "pad"]
LARGE, LARGE_SIDE = 1 << 24, 4096


@dataclass(frozen=True)
class Frame:
    """Where a picture of `size` (H, W) lies in a square: its part `box`, resized to `inside` (h, w) pixels, at the top left."""

    size: tuple[int, int]
    box: tuple[slice, slice]
    inside: tuple[int, int]
    square: int

    @staticmethod
    def of(image: np.ndarray, square: int, fit: Fit = "stretch", *, crop: bool = False) -> Frame:
        """The frame of an image (H, W, ...); `crop` leaves out its dark border."""
        h, w = image.shape[:2]
        box = bright_box(image) if crop else (slice(0, h), slice(0, w))
        return Frame((h, w), box, fitted((box[0].stop - box[0].start, box[1].stop - box[1].start), square, fit), square)

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the square for each pixel of the picture, by x and by y."""
        rows, columns = self.box
        return self.inside[1] / (columns.stop - columns.start), self.inside[0] / (rows.stop - rows.start)


def fitted(size: tuple[int, int], square: int, fit: Fit) -> tuple[int, int]:
    """The sides (h, w) that a picture of `size` (H, W) takes in a square: at least one pixel each. Raises `BadCall`."""
    if fit not in ("stretch", "pad"):
        raise BadCall(f"a picture is fitted into a square by 'stretch' or 'pad', got {fit!r}")
    if fit == "stretch":
        return square, square
    longer = max(size)
    return max(1, round(size[0] * square / longer)), max(1, round(size[1] * square / longer))


def to_tensor(image: np.ndarray, size: int, fit: Fit = "stretch", fill: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, size, size) in [0, 1], padded with the colour `fill` where `fit` is "pad". Raises `BadCall`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise BadCall(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with read_image")
    square(size)
    h, w = fitted((image.shape[0], image.shape[1]), size, fit)
    x = torch.from_numpy(np.ascontiguousarray(_bounded(image))).permute(2, 0, 1).float() / 255
    x = tv.resize(x, [h, w], interpolation=InterpolationMode.BILINEAR, antialias=True)
    if (h, w) == (size, size):
        return x
    whole = x.new_tensor(fill)[:, None, None].repeat(1, size, size)
    whole[:, :h, :w] = x
    return whole


def _bounded(image: np.ndarray) -> np.ndarray:
    """The image, averaged down in whole steps where it is larger than `LARGE`."""
    h, w = image.shape[:2]
    if h * w <= LARGE:
        return image
    from PIL import Image

    return np.array(Image.fromarray(image).reduce(-(-max(h, w) // LARGE_SIDE)))


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) in [0, 1] to (x - mean) / std by channel. Raises `BadCall` unless there are 3 of each, std > 0."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BadCall(f"mean and std need 3 numbers each, std above 0; got {tuple(mean)} and {tuple(std)}")
    return tv.normalize(x, list(mean), list(std))


def prepare(image: np.ndarray, size: int, mean: Sequence[float], std: Sequence[float], fit: Fit = "stretch") -> Tensor:
    """uint8 (H, W, 3) to the normalised float32 (3, size, size) that a backbone takes. Raises `BadCall`."""
    return normalise(to_tensor(image, size, fit, mean), mean, std)


def bright_box(image: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of an image (H, W, 3) uint8 inside its dark border, such as that around a fundus.

    From the first to the last line of which 2 % are brighter than 20 of 255; the whole image where that is under 8 pixels.
    Raises `BadCall`.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise BadCall(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with read_image")
    lit = image.max(-1) > 20
    found = []
    for axis in (1, 0):
        lines = np.flatnonzero(lit.mean(axis) > 0.02)
        found.append(slice(int(lines[0]), int(lines[-1]) + 1) if len(lines) else slice(0, 0))
    if min(s.stop - s.start for s in found) < 8:
        return slice(0, image.shape[0]), slice(0, image.shape[1])
    return found[0], found[1]


def put_back(inside: np.ndarray, box: tuple[slice, slice], size: Sequence[int], fill: float = 0) -> np.ndarray:
    """(..., h, w) from `box` of an image of `size` (H, W) to (..., H, W), `fill` around it."""
    around = [(part.start, side - part.stop) for part, side in zip(box, size, strict=True)]
    return np.pad(inside, [(0, 0)] * (inside.ndim - 2) + around, constant_values=fill)


def square(size: int) -> list[int]:
    """The two sides of a square. Raises `BadCall`."""
    if not isinstance(size, int) or size < 1:
        raise BadCall(f"size is the side of a square in pixels, got {size!r}")
    return [size, size]
