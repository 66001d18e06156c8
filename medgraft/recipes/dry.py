"""A recipe's parts without data and without training, for `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import Adapter, Part, Task
from ..backbones import Backbone
from ..training.data import Dataset, Item
from ..training.fit import FitOptions
from ..training.phantoms import REGIONS, phantom
from ..training.volume_data import Volumes
from ..volumes import Volume
from .registry import find_recipe
from .run import Run


class Drawn(Dataset):
    """Two drawn pictures of a lesion, for recipes that make their parts of data."""

    def image(self, item: Item) -> np.ndarray:
        """(128, 128, 3) uint8."""
        return phantom(int(item.id), scene="lesion").image

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """(128, 128) uint8."""
        return (phantom(int(item.id), scene="lesion").region == REGIONS.index("lesion")).astype(np.uint8)


class DrawnVolumes(Volumes):
    """Two drawn volumes of a cube, for backbones of three dimensions."""

    def volume(self, item: Item) -> Volume:
        """(16, 16, 16) float32, bright in the cube."""
        values = np.zeros((16, 16, 16), np.float32)
        values[4:10, 4:10, 4:10] = 1
        return Volume(values, np.eye(4), item.id)

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """(16, 16, 16) uint8."""
        return self.volume(item).values.astype(np.uint8)


class DryRun(Run):
    """A run that stops where training would begin and keeps the parts."""

    caught: Mapping[str, Part]
    network: Backbone | None

    @cached_property
    def dataset(self) -> Dataset:
        """Two drawn pictures, or volumes."""
        items = tuple(Item(str(n), "train", masks={"mask": Path()}, domain="drawn") for n in range(2))
        if self.frozen.spec.dims == 3:
            return DrawnVolumes("drawn", Path(), items, 3, classes={1: "target"})
        return Drawn("drawn", Path(), items, classes={1: "target"})

    @cached_property
    def goal(self) -> Task:
        """One foreground class."""
        return Task("segment", ("target",))

    @cached_property
    def support(self) -> list[Item]:
        """Both."""
        return list(self.dataset.items)

    def train(
        self,
        recipe: str,
        parts: Mapping[str, Part],
        options: FitOptions,
        *,
        settings: Mapping[str, Any] | None = None,
        network: Backbone | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Catch the parts."""
        self.__dict__["caught"], self.__dict__["network"] = parts, network
        return {}

    def keep(
        self, recipe: str, parts: Mapping[str, Part], *, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Catch the parts."""
        self.__dict__["caught"], self.__dict__["network"] = parts, None
        return {}


def dry_adapter(name: str, *, backbone: str | None = None, image_size: int | None = None) -> tuple[Adapter, Backbone]:
    """The fresh adapter of a recipe at its defaults, and the backbone (for a baseline that trains a network: its trainable copy)."""
    recipe = find_recipe(name)
    defaults = {**recipe.defaults, "steps": 1}
    if backbone is not None:
        defaults["backbone"] = backbone
    if image_size is not None:
        defaults["image_size"] = image_size
    run = DryRun(data=Path(), out=Path(), **defaults)
    recipe.program(run)
    frozen = run.network or run.frozen
    return Adapter.of(frozen, run.goal, run.caught), frozen
