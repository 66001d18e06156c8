"""Volumes as pictures: a 3D pack read slice by slice, and the scores of volumes that were predicted so.

A volume (NIfTI) is turned to RAS+, the closest of the 48 orientations, and cut across an axis. A slice is shown as in a viewer:
the superior side up (axial: the anterior), the patient's right on the left (sagittal: the anterior).

    8 bits   round(255 (x - p0.1) / (p99.9 - p0.1)), clipped, with the percentiles of the whole volume

Scores   dice        2 |P & T| / (|P| + |T|) over all voxels of a case and class, then means over classes and cases
         slice_dice  the same over the pixels of each slice that shows the class, then means over classes and slices
Both as in Kim et al. 2023, section 3.4. Intervals resample cases: slices of one case are not independent. H, W of a slice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..errors import BadCall, BadData, unknown
from ..images import SMALLEST_SIDE
from ..volumes import read_grid, read_labels, read_volume
from ..voxels import turned
from .items import Dataset, Item
from .metrics import bootstrap_interval, dice, image_means, iou, summarise

Axis = Literal["sagittal", "coronal", "axial"]
AXES: tuple[Axis, ...] = get_args(Axis)
KEPT_BYTES = 1 << 29  # of volumes in memory, 8 bits a voxel
SHOWN = "RAS"  # the orientation that slices are cut in


@dataclass(frozen=True)
class Slice(Item):
    """Slice number `z` (from 0, in the direction of RAS+) of the item `volume`."""

    volume: str = ""
    z: int = 0


@dataclass(frozen=True)
class Slices(Dataset):
    """The slices of a 3D data set as a 2D one: its items are `Slice`s, their images and masks pictures."""

    axis: Axis = "axial"

    def image(self, item: Item) -> np.ndarray:
        """Slice `item` as uint8 (H, W, 3). Raises BadData for a volume that cannot be read."""
        assert isinstance(item, Slice)
        assert item.image is not None
        path = item.image
        plane = self._plane(self._kept(path, lambda: _eight_bits(turned(read_volume(path), SHOWN).values)), item.z)
        return np.repeat(plane[..., None], 3, 2)

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """The mask of slice `item` as uint8 (H, W) in task values. Raises BadData for one that does not fit its image or its classes."""
        assert isinstance(item, Slice)
        labels = self.labels if labels is None else labels
        classes = self.classes_of(labels)
        if labels not in item.masks:
            raise BadData(f"item {item.volume!r} of {self.name!r} has no {labels!r}; leave it out")
        path, image, values = item.masks[labels], item.image, self.label_sets[labels]
        assert image is not None
        found = self._plane(self._kept((path, labels), lambda: _labels(path, image, values)), item.z)
        table = np.zeros(256, np.uint8)
        for new, name in classes.items():
            table[[value for value, said in values.items() if value and said == name]] = new
        return table[found]

    def volumes(self, split: str) -> dict[str, list[Slice]]:
        """The slices of each volume of a split, in order."""
        found: dict[str, list[Slice]] = {}
        for item in self.split(split):
            assert isinstance(item, Slice)
            found.setdefault(item.volume, []).append(item)
        return found

    def _plane(self, voxels: np.ndarray, z: int) -> np.ndarray:
        plane = np.take(voxels, z, AXES.index(self.axis))
        return np.ascontiguousarray(plane.T[::-1, ::-1])

    def _kept(self, key: Any, read: Callable[[], np.ndarray]) -> np.ndarray:
        """A volume, read again where others have taken its room."""
        volumes: OrderedDict[Any, np.ndarray] = self._cache.setdefault("volumes", OrderedDict())
        if key not in volumes:
            volumes[key] = read()
            while len(volumes) > 2 and sum(v.nbytes for v in volumes.values()) > KEPT_BYTES:
                volumes.popitem(last=False)
        volumes.move_to_end(key)
        return volumes[key]


def slices_of(dataset: Dataset, axis: Axis = "axial") -> Slices:
    """The slices of a data set of volumes across `axis`; those of one volume are one group. Reads headers only.

    Raises UnknownName for another axis, BadCall for pictures, BadData for files that are no volumes or are too thin, MissingExtra
    without nibabel.
    """
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    if dataset.dims != 3:
        raise BadCall(f"{dataset.name!r} holds pictures, not volumes; there is nothing to slice")
    items: list[Item] = []
    for item in dataset.items:
        if item.image is None:
            raise BadData(
                f"item {item.id!r} of {dataset.name!r} is a row of an array; volumes are read from NIfTI files"
            )
        height_width = list(turned(read_grid(item.image), SHOWN).shape)
        depth = height_width.pop(AXES.index(axis))
        if min(height_width) < SMALLEST_SIDE:
            raise BadData(
                f"{axis} slices of {item.image} are {height_width[0]} x {height_width[1]} voxels; each side needs at least "
                f"{SMALLEST_SIDE}: choose another axis"
            )
        shared: dict[str, Any] = {**vars(item), "volume": item.id, "group": item.group or item.id}
        items += [Slice(**{**shared, "id": f"{item.id}/{z:03d}"}, z=z) for z in range(depth)]
    facts: dict[str, Any] = {**vars(dataset), "items": tuple(items), "dims": 2, "_cache": {}}
    return Slices(**facts, axis=axis)


def pictured(items: Sequence[Item], most: int) -> list[Item]:
    """Items to look at: the middle slices of the first volumes, or the first pictures."""
    volumes: dict[str, list[Item]] = {}
    for item in items:
        volumes.setdefault(item.volume if isinstance(item, Slice) else item.id, []).append(item)
    return [own[len(own) // 2] for own in list(volumes.values())[:most]]


# Prediction and scores


def predict_volume(slices: Iterable[Slice], predict: Callable[[Slice], np.ndarray]) -> np.ndarray:
    """(slices, H, W): what `predict` says of each slice (H, W), put together."""
    return np.stack([predict(item) for item in slices])


def volume_scores(
    dataset: Slices, volumes: Mapping[str, Sequence[Slice]], predict: Callable[[Slice], np.ndarray]
) -> dict[str, Any]:
    """Dice of whole volumes and of their slices; `predict` gives class indices (H, W) of a slice.

    `n` volumes, `dice` with `interval`, `iou` and `classes` by volume; `slices` scored, `slice_dice` with `slice_interval` and
    `slice_classes`, over the slices that show a class; `per_image`, an entry a volume. A class that nobody drew is not scored.
    """
    names = [dataset.classes[v] for v in sorted(dataset.classes)]
    whole, shared, by_slice, by_case, per_image = [], [], [], [], []
    for name, slices in volumes.items():
        found = predict_volume(slices, predict)
        truth = np.stack([dataset.mask(item) for item in slices])
        drawn = np.array(dataset.annotated(slices[0]))
        whole.append(np.where(drawn, dice(found, truth, len(names)), np.nan))
        shared.append(np.where(drawn, iou(found, truth, len(names)), np.nan))
        seen = np.array([[(plane == k + 1).any() for k in range(len(names))] for plane in truth]) & drawn
        pairs = zip(found, truth, strict=True)
        table = np.where(seen, [dice(f, t, len(names)) for f, t in pairs], np.nan)[seen.any(1)]
        by_slice.append(table)
        by_case.append((np.nansum(image_means(table)), len(table)))
        scores = {c: None if np.isnan(d) else float(d) for c, d in zip(names, whole[-1], strict=True)}
        per_image.append(
            {"id": name, "dice": scores, "slice_dice": float(np.nanmean(image_means(table))) if len(table) else None}
        )
    scored, flat = summarise(whole, names), summarise(np.concatenate(by_slice), names)
    low, high = bootstrap_interval(
        np.array(by_case), statistic=lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1)
    )
    return {
        "n": len(volumes),
        "slices": flat["images"],
        "dice": scored["mean"],
        "interval": [scored["low"], scored["high"]],
        "slice_dice": flat["mean"],
        "slice_interval": [None if np.isnan(v) else v for v in (low, high)],
        "level": 0.95,
        "iou": summarise(shared, names)["mean"],
        "classes": scored["classes"],
        "slice_classes": flat["classes"],
        "per_image": per_image,
    }


# Files


def _eight_bits(x: np.ndarray) -> np.ndarray:
    low, high = np.percentile(x, (0.1, 99.9))
    if high <= low:  # flat but for a few voxels
        low, high = x.min(), x.max()
    if high <= low:
        return np.zeros(x.shape, np.uint8)
    return np.round(np.clip((x - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _labels(path: Path, image: Path, values: Mapping[int, str]) -> np.ndarray:
    """The file's own label values, uint8, checked against its classes and its image."""
    return turned(read_labels(path, values, like=read_grid(image)), SHOWN).values
