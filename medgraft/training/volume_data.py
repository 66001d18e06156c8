"""A 3D data set for networks of three dimensions: items are volumes on their own grids; see `volumes`.

`slices` reads the same files as pictures, for backbones of two dimensions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import BadCall, BadData
from ..volumes import Volume, read_labels, read_volume
from .items import Dataset, Item

KEPT_BYTES = 1 << 30  # of volumes in memory


@dataclass(frozen=True)
class Volumes(Dataset):
    """A data set of volumes. What a `Dataset` says of pictures (H, W) is said of values (X, Y, Z) in the file's own order of axes."""

    def volume(self, item: Item) -> Volume:
        """The image of `item`, float32. Raises BadData as `read_volume`."""
        path = item.image
        assert path is not None  # `volumes_of` refused it
        return self._kept((item.id, "image"), lambda: read_volume(path))

    def labels_of(self, item: Item, labels: str | None = None) -> Volume:
        """The label of `item` on the grid of its image, uint8 in task values 0..k. Raises BadData as `read_labels`."""
        labels = self.labels if labels is None else labels
        classes, values = self.classes_of(labels), self.label_sets.get(labels, {})
        if labels not in item.masks:
            has = ", ".join(sorted(item.masks)) or "no mask at all"
            raise BadData(f"item {item.id!r} of {self.name!r} has no {labels!r}, it has: {has}; leave it out")
        path = item.masks[labels]
        found = self._kept((item.id, labels), lambda: read_labels(path, values, like=self.volume(item)))
        task = {name: new for new, name in classes.items()}
        table = np.zeros(256, np.uint8)
        for value, name in values.items():
            if value != 0:
                table[value] = task.get(name, 0)
        return found.on_this_grid(table[found.values])

    def image(self, item: Item) -> np.ndarray:
        """The values (X, Y, Z) of `volume(item)`."""
        return self.volume(item).values

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """The values (X, Y, Z) of `labels_of(item)`."""
        return self.labels_of(item, labels).values

    def _kept(self, key: tuple[str, str], read: Callable[[], Volume]) -> Volume:
        """A volume, read again where others have taken its room."""
        kept: OrderedDict[tuple[str, str], Volume] = self._cache.setdefault("volumes", OrderedDict())
        if key not in kept:
            kept[key] = read()
            while len(kept) > 2 and sum(v.values.nbytes for v in kept.values()) > KEPT_BYTES:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def volumes_of(dataset: Dataset) -> Volumes:
    """A data set of dims 3, as `load_dataset` gives it, ready for networks of three dimensions. Raises BadCall for pictures, BadData for arrays."""
    if dataset.dims != 3:
        raise BadCall(f"{dataset.name!r} holds pictures, not volumes; choose a backbone of two dimensions for it")
    for item in dataset.items:
        if item.image is None:
            raise BadData(f"item {item.id!r} of {dataset.name!r} is a row of an array; volumes are read from files")
    return Volumes(**{**vars(dataset), "_cache": {}})
