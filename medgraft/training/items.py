"""What a data set is once read: items (an image, its masks or label, where it belongs) and the classes of the task.

Pixel values of a mask file are the data set's; those that `Dataset.mask` returns are the task's: 0 is background and
1..k are `Dataset.classes` in order. H height, W width, k foreground classes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import BadData, unknown
from ..images import SMALLEST_SIDE, image_size, read_image, read_mask

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One example. Either `image` (a file) or `array` and `index` (a row of an npz array) says where its pixels are.

    `masks` maps a label set ("mask", "mask_av", ...) to a file; `label` is an index into `Dataset.label_names`;
    `labelled` names the classes that were annotated on this item, None where all were; `coarse` names classes that were
    drawn as one here (an artery or a vein, nobody says which); `source` is the pack of an item of several packs.
    """

    id: str
    split: str
    image: Path | None = None
    masks: Mapping[str, Path] = field(default_factory=dict, hash=False)
    label: int | None = None
    domain: str | None = None
    group: str | None = None
    labelled: tuple[str, ...] | None = None
    array: Path | None = None
    index: int | None = None
    coarse: tuple[tuple[str, ...], ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Items with their classes; see `load_dataset`.

    `labels` is the label set of the task, `classes` its foreground names by task value ({1: "nucleus", ...}),
    `label_names` the names of image labels. `label_sets` holds, for every label set, the names by value in the files;
    `left_out` the ids of items that carry nothing of this task.
    """

    name: str
    root: Path
    items: tuple[Item, ...]
    dims: int = 2
    labels: str = "mask"
    classes: Mapping[int, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    label_sets: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> list[Item]:
        """The items of "train", "val" or "test", in the order of the source; empty where there are none."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return [item for item in self.items if item.split == name]

    def image(self, item: Item) -> np.ndarray:
        """The pixels of `item` as uint8 (H, W, 3). Raises `BadData` for volumes and for what cannot be read."""
        self._need_pictures()
        if item.image is not None:
            return read_image(item.image)
        return self._row(item)

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """The mask of `item` as uint8 (H, W) in task values; `labels` is another label set than the task's own.

        Raises `BadData` where the item has no such mask, or the mask does not fit its image or its classes.
        """
        self._need_pictures()
        labels = self.labels if labels is None else labels
        classes = self.classes_of(labels)
        if labels not in item.masks:
            has = ", ".join(sorted(item.masks)) or "no mask at all"
            raise BadData(f"item {item.id!r} of {self.name!r} has no {labels!r}, it has: {has}; leave it out")
        size = image_size(item.image) if item.image is not None else self._row(item).shape[:2]
        values = self.label_sets[labels]
        found = read_mask(item.masks[labels], values, size)
        task = {name: new for new, name in classes.items()}
        table = np.zeros(256, np.uint8)
        for value, name in values.items():
            if value != 0:
                table[value] = task.get(name, 0)
        return table[found]

    def classes_of(self, labels: str | None = None) -> dict[int, str]:
        """Foreground names by task value of a label set: the task's own selection, or all classes of another."""
        labels = self.labels if labels is None else labels
        if labels == self.labels:
            return dict(self.classes)
        if labels not in self.label_sets:
            raise unknown("label set", labels, self.label_sets)
        return dict(enumerate((name for v, name in sorted(self.label_sets[labels].items()) if v != 0), start=1))

    def annotated(self, item: Item, labels: str | None = None) -> tuple[bool, ...]:
        """For each class of the task (or of `labels`), in order: was it drawn on this item?"""
        has_mask = (self.labels if labels is None else labels) in item.masks
        names = self.classes_of(labels).values()
        return tuple(has_mask and (item.labelled is None or name in item.labelled) for name in names)

    def groups(self, item: Item) -> tuple[int, ...]:
        """For the background and each class of the task, in order: the smallest index that `item` does not tell it from.

        A class that was annotated has a group of its own; classes drawn as one share a group; one that was not annotated
        is in the background's. With artery, vein, crossing: (0, 1, 2, 3) all drawn, (0, 1, 1, 1) drawn as vessel,
        (0, 1, 0, 3) vein not annotated. These are the `groups` of `partial_losses`.
        """
        names = [self.classes[value] for value in sorted(self.classes)]
        found = [k * drawn for k, drawn in enumerate(self.annotated(item), start=1)]
        for together in item.coarse:
            members = sorted(names.index(name) for name in together if name in names)
            for k in members:
                found[k] = members[0] + 1
        return (0, *found)

    def present(self, item: Item) -> frozenset[int]:
        """The foreground task values that were annotated on `item` and occur in its mask; the mask is read once."""
        key = ("present", item.id)
        if key not in self._cache:
            self._cache[key] = frozenset(int(v) for v in np.unique(self.mask(item)) if v != 0)
        drawn = self.annotated(item)
        return frozenset(v for v in self._cache[key] if drawn[v - 1])

    def digest(self, item: Item) -> str:
        """sha256 of the item's pixels as read: what a cache of features is keyed by."""
        image = self.image(item)
        return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()

    def check(self, split: str | None = None) -> None:
        """Read every image and mask of the task (of one split) now, so that a bad file stops a run before it starts."""
        for item in self.items if split is None else self.split(split):
            self.image(item)
            if self.labels in item.masks:
                self.mask(item)

    def _need_pictures(self) -> None:
        if self.dims != 2:
            raise BadData(
                f"{self.name!r} holds volumes (dims {self.dims}); they are read by the 3D recipes with "
                f"pip install 'medgraft[volumes]', not as 2D pictures"
            )

    def _row(self, item: Item) -> np.ndarray:
        """Row `index` of the npz array of `item`: `<split>_images` (the MedMNIST layout), else `images`."""
        assert item.array is not None
        assert item.index is not None
        rows = self._array(item.array, item.split)
        if not 0 <= item.index < len(rows):
            raise BadData(f"item {item.id!r} asks for row {item.index} of {item.array.name}, which has {len(rows)}")
        row = rows[item.index]
        if row.ndim == 2 or row.shape[-1] == 1:
            row = np.repeat(row.reshape(*row.shape[:2], 1), 3, axis=2)
        return row

    def _array(self, path: Path, split: str) -> np.ndarray:
        key = ("array", path, split)
        if key not in self._cache:
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                    names = [name for name in (f"{split}_images", "images") if name in archive]
                    if not names:
                        held = ", ".join(archive.files) or "nothing"
                        raise BadData(f"{path} has neither {split}_images nor images; it holds: {held}")
                    rows = archive[names[0]]
            except BadData:
                raise
            except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as broken:
                raise BadData(
                    f"{path} is no readable npz of plain arrays ({broken}); write it with numpy.savez"
                ) from None
            grey = rows.ndim == 3
            if rows.dtype != np.uint8 or not (grey or (rows.ndim == 4 and rows.shape[-1] in (1, 3))):
                raise BadData(
                    f"{names[0]} in {path} is {rows.dtype} {rows.shape}; wanted uint8 (N, H, W) or (N, H, W, 3)"
                )
            if min(rows.shape[1:3]) < SMALLEST_SIDE:
                raise BadData(f"{names[0]} in {path} has pictures of {rows.shape[1:3]}, at least 8 x 8 is needed")
            self._cache[key] = rows
        return self._cache[key]
