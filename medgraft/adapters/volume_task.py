"""How a volume becomes the tensor that an adapter was trained on, and how what is predicted goes back; it travels in the adapter.

there   axes turned to `axcodes` -> trilinear to `spacing` -> intensities -> (x - mean) / std
back    trilinear to the turned grid's own size -> axes turned back: the input's shape, voxel on voxel
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.base import Spec
from ..errors import BadCall
from ..volumes import Volume
from ..voxels import Intensity, axis_order, check_intensity, resized, scaled, size_at, turned, turned_back
from .task import Preprocessing

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class VolumePreprocessing:
    """See the top of the file.

    patch     : voxels of a window, by axis; shrinks to a smaller volume.
    mean, std : per channel of the input, after `intensity`.
    intensity : a rule of `voxels`.
    axcodes   : where the axes lead, such as "RAS".
    spacing   : millimetres by axis (after turning), or None for each volume's own.
    overlap   : of neighbouring windows, as a part of the patch, 0 to 0.95.
    largest   : keep the largest connected component of each class and no other.
    """

    patch: Triple
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    intensity: Intensity = ("percentiles", 0.5, 99.5)
    axcodes: str = "RAS"
    spacing: tuple[float, float, float] | None = None
    overlap: float = 0.5
    largest: bool = False

    def __post_init__(self) -> None:
        check_intensity(self.intensity)
        axis_order(self.axcodes)
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise BadCall(f"a patch has three sides of 1 voxel or more, got {self.patch}")
        if self.spacing is not None and (len(self.spacing) != 3 or not min(self.spacing) > 0):
            raise BadCall(f"a spacing is three numbers of millimetres above 0, got {self.spacing}")
        if len(self.mean) != len(self.std) or not self.std or not min(self.std) > 0:
            raise BadCall(f"mean and std want a number a channel, std above 0; got {self.mean} and {self.std}")
        if not 0 <= self.overlap <= 0.95:
            raise BadCall(f"windows overlap by 0 to 0.95 of their size, got {self.overlap}")

    @staticmethod
    def of(spec: Spec, *, patch: int | Sequence[int] | None = None, **changes: Any) -> VolumePreprocessing:
        """What a backbone of three dimensions was trained on, as its spec says, with `changes` to the fields above.

        `patch` is one side or three, rounded up to what the backbone takes (default: its own size). Raises BadCall.
        """
        if spec.dims != 3:
            raise BadCall(f"{spec.id} takes images of {spec.dims} dimensions, no volumes; choose a backbone of 3D")
        sides = patch or spec.image_size
        facts: dict[str, Any] = {"mean": spec.mean, "std": spec.std}
        known = {"axcodes": spec.axcodes, "spacing": spec.spacing, "intensity": spec.intensity}
        facts |= {key: value for key, value in known.items() if value is not None}
        facts |= {key: value for key, value in changes.items() if value is not None}
        return VolumePreprocessing(_triple(spec.fitting((sides,) * 3 if isinstance(sides, int) else sides)), **facts)

    @property
    def size(self) -> int:
        """The longest side of a patch: the size that a backbone is loaded for."""
        return max(self.patch)

    def __call__(self, volume: Volume) -> Tensor:
        """A volume (X, Y, Z) to float32 (C, D, H, W), axes in the order of `axcodes`; nothing is padded or cut."""
        x = self._placed(volume, smooth=True)
        mean, std = (x.new_tensor(values)[:, None, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(scaled(x.numpy(), self.intensity)) - mean) / std

    def labels(self, volume: Volume) -> Tensor:
        """A label volume (X, Y, Z) to int64 (D, H, W) on the grid of `__call__`; nearest voxels."""
        return self._placed(volume, smooth=False)[0].long()

    def back(self, maps: Tensor, volume: Volume) -> Tensor:
        """(K, D, H, W) on the grid of `__call__` to (K, X, Y, Z) on the one of `volume`. The tensor itself where nothing was changed."""
        own = turned(volume, self.axcodes).shape
        last = resized(maps, own).movedim(0, -1).numpy()
        return torch.from_numpy(np.ascontiguousarray(turned_back(last, self.axcodes, volume))).movedim(-1, 0)

    def window(self, space: Sequence[int], spec: Spec) -> Triple:
        """The patch for a volume of `space` (D, H, W): no longer than the volume, then padded to what the backbone takes."""
        return _triple(spec.fitting([min(side, n) for side, n in zip(self.patch, space, strict=True)]))

    def _placed(self, volume: Volume, *, smooth: bool) -> Tensor:
        there = turned(volume, self.axcodes)
        x = torch.from_numpy(np.ascontiguousarray(there.values, dtype=np.float32))[None]
        return x if self.spacing is None else resized(x, size_at(there, self.spacing), smooth=smooth)

    @property
    def said(self) -> str:
        """In words, for people."""
        patch, (rule, low, high) = " x ".join(map(str, self.patch)), self.intensity
        spacing = "their own spacing" if self.spacing is None else " x ".join(f"{s:g}" for s in self.spacing) + " mm"
        return f"patches of {patch} voxels, axes {self.axcodes}, {spacing}, intensities by {rule} {low:g} to {high:g}"

    def to_json(self) -> dict[str, Any]:
        """JSON form; "dims" tells it from that of pictures."""
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"dims": 3, **found}

    @staticmethod
    def from_json(found: dict[str, Any]) -> VolumePreprocessing:
        """The inverse of `to_json`. Raises BadCall for values that cannot be used."""
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k != "dims"}
        return VolumePreprocessing(**facts)


def preprocessing_from_json(found: dict[str, Any]) -> Preprocessing | VolumePreprocessing:
    """The preprocessing of an adapter's file, of pictures or of volumes. Raises BadCall for values that cannot be used."""
    return VolumePreprocessing.from_json(found) if "dims" in found else Preprocessing.from_json(found)


def _triple(sides: Sequence[int]) -> Triple:
    if len(sides) != 3:
        raise BadCall(f"three sides are wanted, got {tuple(sides)}")
    return sides[0], sides[1], sides[2]
