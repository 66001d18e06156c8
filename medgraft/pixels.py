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


def square(size: int) -> list[int]:
    """The two sides of a square. Raises `BadCall`."""
    if not isinstance(size, int) or size < 1:
        raise BadCall(f"size is the side of a square in pixels, got {size!r}")
    return [size, size]
