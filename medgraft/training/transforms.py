"""From pixels to tensors, and seeded augmentation of an image together with its mask.

    prepare:  uint8 (H, W, 3) -> [0, 1] -> bilinear, antialiased, to (3, S, S) -> (x - mean) / std

The augmentations are AViT's, each drawn with probability p = 0.5 at the usual ranges (Albumentations' defaults):
flips; shift-scale-rotate with reflected borders; brightness-contrast, x * (1 + c) + b; Gaussian noise. Two more stand
for what differs between cameras and are off unless asked for: Gaussian blur, and a gain for each colour, x_k (1 + g_k).
They act on [0, 1] values, between resizing and normalising. An augmentation is a pure function of (seed, item, view),
so a run that resumes sees what the uninterrupted run would have seen. S the side of the square that the backbone takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, cos, pi, sin

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import BadCall
from ..pixels import Fit, fitted, normalise, prepare, square, to_tensor

__all__ = ["Augment", "normalise", "prepare", "prepare_mask", "to_tensor"]


def prepare_mask(mask: np.ndarray, size: int, fit: Fit = "stretch") -> Tensor:
    """uint8 (H, W) to int64 (size, size), nearest neighbour on the pixel centres `prepare` uses; padding is 0. Raises `BadCall`."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise BadCall(f"a mask is uint8 (H, W), got {mask.dtype} {mask.shape}; read it with read_mask")
    square(size)
    h, w = fitted((mask.shape[0], mask.shape[1]), size, fit)
    x = torch.from_numpy(np.ascontiguousarray(mask))[None]
    inside = tv.resize(x, [h, w], interpolation=InterpolationMode.NEAREST_EXACT)[0].long()
    return torch.nn.functional.pad(inside, (0, size - w, 0, size - h))


@dataclass(frozen=True)
class Augment:
    """Seeded augmentation; with `views` = V a fixed bank of V views, of which view 0 is the image as it is.

    `shift` and `zoom` are fractions, `angle` degrees, `brightness` and `contrast` fractions of the range, each drawn
    uniformly from [-value, value]; `noise` bounds the variance in 8-bit units; `blur` is the largest deviation in
    pixels, `colour` the largest gain g of a channel.
    """

    seed: int = 0
    views: int | None = None
    p: float = 0.5
    shift: float = 0.0625
    zoom: float = 0.1
    angle: float = 45.0
    brightness: float = 0.2
    contrast: float = 0.2
    noise: tuple[float, float] = (10.0, 50.0)
    blur: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        if self.views is not None and self.views < 1:
            raise BadCall(f"a bank needs one view or more, got views={self.views}; None draws a new view every time")
        if not 0 <= self.p <= 1:
            raise BadCall(f"p is a probability, got {self.p}")
        if not self.blur >= 0 or not 0 <= self.colour < 1:
            raise BadCall(f"blur is 0 or more pixels, colour lies in [0, 1); got {self.blur} and {self.colour}")

    def view(self, n: int) -> int:
        """The view an item shows at its n-th visit: n itself, or n modulo the size of the bank."""
        return n if self.views is None else n % self.views

    def __call__(self, image: Tensor, mask: Tensor | None, *, item: str, view: int) -> tuple[Tensor, Tensor | None]:
        """Augment float (3, H, W) in [0, 1] and int64 (H, W) or None, by the key (seed, item, view)."""
        view = self.view(view)
        if self.views is not None and view == 0:
            return image, mask
        key = hashlib.sha256(f"{self.seed}/{view}/{item}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return self.draw(image, mask, generator)

    def draw(self, image: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The same with an explicit generator (on the CPU); it is always advanced by the same amount."""
        do = (torch.rand(5, generator=generator) < self.p).tolist()
        shift_x, shift_y, zoom, turn, brighter, contrast = (torch.rand(6, generator=generator) * 2 - 1).tolist()
        share = torch.rand((), generator=generator).item()
        grain = torch.randn(image.shape, generator=generator)
        tint, soften = (
            torch.rand(2, generator=generator) < self.p
        ).tolist()  # drawn last: older seeds keep their views
        gains = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        width = torch.rand((), generator=generator).item() * self.blur

        if do[0]:
            image, mask = tv.horizontal_flip(image), None if mask is None else tv.horizontal_flip(mask)
        if do[1]:
            image, mask = tv.vertical_flip(image), None if mask is None else tv.vertical_flip(mask)
        if do[2]:
            scale, radians = 1 + zoom * self.zoom, turn * self.angle * pi / 180
            grid = _grid(image.shape, radians, scale, shift_x * self.shift, shift_y * self.shift)
            image = _sample(image, grid, "bilinear")
            mask = None if mask is None else _sample(mask[None].float(), grid, "nearest")[0].long()
        if do[3]:
            image = image * (1 + contrast * self.contrast) + brighter * self.brightness
        if tint and self.colour:
            image = image * (1 + gains.to(image.device) * self.colour)
        if soften and width > 0.1:  # below a tenth of a pixel nothing would change
            reach = min(ceil(3 * width), min(image.shape[1:]) - 1)
            image = tv.gaussian_blur(image, [2 * reach + 1] * 2, [width] * 2)
        if do[4]:
            low, high = self.noise
            image = image + grain.to(image.device) * (low + share * (high - low)) ** 0.5 / 255
        return image.clamp(0, 1), mask


def _grid(shape: Sequence[int], radians: float, scale: float, shift_x: float, shift_y: float) -> Tensor:
    """Where each output pixel is read: x_in = R(-a) (x_out - t) / s, about the centre, in pixels of equal sides."""
    _, height, width = shape
    c, s = cos(radians) / scale, sin(radians) / scale
    rows = torch.tensor([[c, s * height / width], [-s * width / height, c]])
    move = rows @ torch.tensor([[2 * shift_x], [2 * shift_y]])
    return affine_grid(torch.cat([rows, -move], 1)[None], [1, 1, height, width], align_corners=False)


def _sample(x: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Read (C, H, W) at `grid`; reflected borders, which torchvision's own affine does not offer."""
    return grid_sample(x[None], grid.to(x.device), mode=mode, padding_mode="reflection", align_corners=False)[0]
