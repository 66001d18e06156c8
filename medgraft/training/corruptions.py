"""Pictures made worse, to measure how an adapter bears it: 14 corruptions at 5 severities.

The study of SAM in surgery has 18: noise (4), blur (5), weather and digital (9). Here are those that are a few lines of numpy and
scipy; missing are snow, frost, fog and spatter, which draw weather into photographs. `imagecorruptions`, the package that has all,
is not kept any more: three of its 18 fail with today's numpy and scikit-image.

Strengths are those of the benchmark, which chose them for pictures of 224 pixels a side; blurs count pixels, so larger pictures
suffer less. A picture's random numbers are drawn from its name, the corruption and the severity. Where we differ: grey
pixels stay grey under `saturate`, as they have no hue; motion blur is a one-sided Gaussian trail, drawn here.

Sources: Hendrycks, Dietterich 2019 (arXiv:1903.12261); Wang et al. 2023 (medagi-sam-robotic-surgery) section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..errors import BadCall, unknown
from .items import Dataset, Item

SEVERITIES = (1, 2, 3, 4, 5)

Change = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
"""A picture (H, W, 3) float64 in [0, 1], a strength, random numbers -> a picture, to be clipped."""


def _gaussian_noise(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, c, x.shape)


def _shot_noise(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * c) / c


def _impulse_noise(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(x.shape) < c, rng.integers(0, 2, x.shape), x)


def _speckle_noise(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(0, c, x.shape)


def _gaussian_blur(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _defocus_blur(x: np.ndarray, c: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    radius, soft = c
    side = np.arange(-max(8, radius), max(8, radius) + 1)
    disc = ndimage.gaussian_filter((side**2 + side[:, None] ** 2 <= radius**2).astype(float), soft)
    return ndimage.convolve(x, (disc / disc.sum())[..., None], mode="nearest")


def _glass_blur(x: np.ndarray, c: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """Pixels change places with near ones, between two Gaussian blurs."""
    sigma, reach, times = c
    x = _gaussian_blur(x, sigma, rng)
    ys, xs = np.indices(x.shape[:2])
    for _ in range(times):
        dy, dx = rng.integers(-reach, reach + 1, (2, *ys.shape))
        x = x[np.clip(ys + dy, 0, ys.max()), np.clip(xs + dx, 0, xs.max())]
    return _gaussian_blur(x, sigma, rng)


def _motion_blur(x: np.ndarray, c: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    radius, sigma = c
    angle = np.radians(rng.uniform(-45, 45))
    weights = np.exp(-(np.arange(radius + 1) ** 2) / (2 * sigma**2))
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    for k, w in enumerate(weights):
        kernel[radius + round(k * np.sin(angle)), radius + round(k * np.cos(angle))] += w
    return ndimage.convolve(x, (kernel / kernel.sum())[..., None], mode="nearest")


def _zoom_blur(x: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The mean of the picture and of views of its middle, larger and larger."""
    zooms = np.arange(1, *c)
    middle = (np.array(x.shape[:2]) - 1) / 2
    views = []
    for zoom in zooms:
        start = middle - middle / zoom
        scale = [1 / zoom, 1 / zoom]
        views.append(np.stack([ndimage.affine_transform(p, scale, start, order=1) for p in x.transpose(2, 0, 1)], -1))
    return np.mean([x, *views], 0)


def _brightness(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    """HSV's value moves up, hue and saturation stay."""
    value = x.max(-1, keepdims=True)
    raised = np.minimum(value + c, 1)
    return np.where(value > 0, x / np.maximum(value, 1e-9), 1) * raised


def _contrast(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1))
    return (x - mean) * c + mean


def _saturate(x: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """HSV's saturation, scaled and moved; grey stays grey."""
    value, least = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    saturation = (value - least) / np.maximum(value, 1e-9)
    wanted = np.clip(saturation * c[0] + c[1], 0, 1)
    return value - (value - x) * np.where(saturation > 0, wanted / np.maximum(saturation, 1e-9), 0)


def _pixelate(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    h, w = x.shape[:2]
    small = _picture(x).resize((max(1, int(w * c)), max(1, int(h * c))), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.NEAREST)) / 255


def _jpeg(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    file = BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray((x * 255).round().astype(np.uint8))


CORRUPTIONS: dict[str, tuple[Change, tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
"""Each with its strength at severity 1 to 5."""

MISSING = ("snow", "frost", "fog", "spatter")


def corrupt(image: np.ndarray, name: str, severity: int, *, seed: str = "") -> np.ndarray:
    """`image` (H, W, 3) uint8 made worse, the same size and type. `seed` names the picture: an equal one gives equal noise.

    Raises UnknownName for a corruption that is not here, BadCall for a severity outside 1 to 5.
    """
    check_names([name])
    if severity not in SEVERITIES:
        raise BadCall(f"the severity of a corruption is 1 to 5, got {severity!r}")
    change, strengths = CORRUPTIONS[name]
    key = hashlib.sha256(f"{seed}|{name}|{severity}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:8], "big"))
    changed = change(image / 255.0, strengths[severity - 1], rng)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


def check_names(names: Sequence[str]) -> None:
    """Raise BadCall for a corruption of the study that is missing here, UnknownName for one that nobody knows."""
    for name in names:
        if name in MISSING:
            raise BadCall(f"the corruption {name!r} is not drawn here; there are {', '.join(CORRUPTIONS)}")
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)


@dataclass(frozen=True)
class Corrupted(Dataset):
    """A data set whose pictures are made worse; its masks stay."""

    how: str = ""
    severity: int = 1

    @staticmethod
    def of(dataset: Dataset, how: str, severity: int) -> Corrupted:
        """Raises BadCall for volumes and slices of them."""
        if type(dataset) is not Dataset or dataset.dims != 2:
            raise BadCall(f"corruptions are for pictures, {dataset.name!r} holds volumes")
        return Corrupted(**{f.name: getattr(dataset, f.name) for f in fields(Dataset)}, how=how, severity=severity)

    def image(self, item: Item) -> np.ndarray:
        """The picture, made worse."""
        return corrupt(super().image(item), self.how, self.severity, seed=item.id)


def corruption_scores(
    score: Callable[[Dataset], float], dataset: Dataset, names: Sequence[str] = tuple(CORRUPTIONS)
) -> dict[str, list[float]]:
    """`score` of the data set under each corruption at severity 1 to 5: {name: [five numbers]}. Raises as `check_names`."""
    check_names(names)
    return {name: [score(Corrupted.of(dataset, name, s)) for s in SEVERITIES] for name in names}
