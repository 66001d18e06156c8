"""From pixels to what a backbone takes, in one place for training and prediction.

prepare:  uint8 (H, W, 3) -> [0, 1] -> bilinear, antialiased, to (3, S, S) -> (x - mean) / std
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from .errors import BadCall


def to_tensor(image: np.ndarray, size: int) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, size, size) in [0, 1]; the aspect ratio is not kept. Raises `BadCall`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise BadCall(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with read_image")
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    return tv.resize(x, square(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) in [0, 1] to (x - mean) / std by channel. Raises `BadCall` unless there are 3 of each, std > 0."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BadCall(f"mean and std need 3 numbers each, std above 0; got {tuple(mean)} and {tuple(std)}")
    return tv.normalize(x, list(mean), list(std))


def prepare(image: np.ndarray, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (H, W, 3) to the normalised float32 (3, size, size) that a backbone takes. Raises `BadCall`."""
    return normalise(to_tensor(image, size), mean, std)


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
