"""From voxels to what a backbone takes, in one place for training and prediction: axes, grid, intensities.

    flipped, permuted   `turned` lays the axes out as a network wants them, `turned_back` undoes it exactly; an oblique volume keeps its
                        own axes, and is turned to the closest of the 48 orientations
    anisotropic         `resized` maps edges onto edges, so that a grid and its resampled form cover the same box

How intensities become numbers for a network, as an `Intensity`:

    ("window", low, high)       (v - low) / (high - low), clipped to 0..1; `low` and `high` in the file's units (CT: Hounsfield)
    ("percentiles", low, high)  the same between these percentiles of the volume
    ("zscore", low, high)       clipped to these percentiles, then (v - mean) / std of the volume
A volume that is constant between its percentiles is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from .errors import BadCall, need
from .volumes import Volume

Intensity = tuple[str, float, float]
INTENSITIES = ("window", "percentiles", "zscore")


# Intensities


def check_intensity(rule: Intensity) -> None:
    """Raise BadCall for a rule that is none of those at the top of the file."""
    if len(rule) != 3 or rule[0] not in INTENSITIES:
        raise BadCall(f"intensity is (rule, low, high) with a rule of {', '.join(INTENSITIES)}; got {rule!r}")
    _, low, high = rule
    if not low < high or not (math.isfinite(low) and math.isfinite(high)):
        raise BadCall(f"intensity {rule!r} wants low below high, both finite")
    if rule[0] != "window" and not 0 <= low < high <= 100:
        raise BadCall(f"intensity {rule!r} wants percentiles from 0 to 100")


def scaled(values: np.ndarray, rule: Intensity) -> np.ndarray:
    """Float32 values by an intensity rule, see the top of the file. Raises BadCall for one that is none."""
    check_intensity(rule)
    kind, low, high = rule
    if kind != "window":
        low, high = (float(v) for v in np.percentile(values, (low, high)))
    clipped = np.clip(values, low, high, dtype=np.float32)
    if kind == "zscore":
        low, high = (
            float(clipped.mean(dtype=np.float64)),
            float(clipped.mean(dtype=np.float64) + clipped.std(dtype=np.float64)),
        )
    return (clipped - low) / (high - low) if high > low else np.zeros_like(clipped)


# Grids


def turned(volume: Volume, axcodes: str) -> Volume:
    """`volume` with its axes permuted and flipped until they lead as `axcodes` says; no value is changed.

    An oblique volume is turned by the axes that are closest. Raises BadCall for codes that are no orientation.
    """
    orient = _orientations()
    turn = orient.ornt_transform(orient.io_orientation(volume.affine), _orientation(axcodes))
    affine = volume.affine @ orient.inv_ornt_aff(turn, volume.shape)
    return Volume(orient.apply_orientation(volume.values, turn), affine, volume.name)


def turned_back(values: np.ndarray, axcodes: str, like: Volume) -> np.ndarray:
    """Values (X', Y', Z', ...) of `turned(like, axcodes)` on the axes of `like`: (X, Y, Z, ...)."""
    orient = _orientations()
    turn = orient.ornt_transform(_orientation(axcodes), orient.io_orientation(like.affine))
    return orient.apply_orientation(values, turn)


def axis_order(axcodes: str) -> tuple[str, ...]:
    """The codes of an orientation, one an axis, such as ("R", "A", "S"). Raises BadCall for what is none."""
    pairs = ("LR", "PA", "IS")
    if sorted(next((i for i, pair in enumerate(pairs) if code in pair), -1) for code in axcodes) != [0, 1, 2]:
        raise BadCall(
            f"axcodes name one of L and R, one of P and A, one of I and S, in the order of the axes, such as 'RAS'; "
            f"got {axcodes!r}"
        )
    return tuple(axcodes)


def _orientation(axcodes: str) -> Any:
    return _orientations().axcodes2ornt(axis_order(axcodes))


def size_at(volume: Volume, spacing: Sequence[float]) -> tuple[int, int, int]:
    """Voxels along each axis of `volume` at another spacing (mm), to the nearest whole number and at least 1."""
    x, y, z = (max(1, round(n * own / new)) for n, own, new in zip(volume.shape, volume.spacing, spacing, strict=True))
    return x, y, z


def resized(x: Tensor, size: Sequence[int], *, smooth: bool = True) -> Tensor:
    """(C, D, H, W) to (C, *size), edges onto edges: trilinear, or the nearest voxel where not `smooth`. The same tensor at its own size."""
    if tuple(x.shape[1:]) == tuple(size):
        return x
    if smooth:
        return functional.interpolate(x[None], tuple(size), mode="trilinear", align_corners=False)[0]
    return functional.interpolate(x[None], tuple(size), mode="nearest-exact")[0]


def _orientations() -> Any:
    return need("nibabel", "volumes").orientations
