"""Batches by number: batch t is a pure function of (items, seed, t), so resuming needs no state but t.

The stream is the items shuffled, then shuffled anew, without end; batch t takes places t B .. (t + 1) B - 1 of it, and
an item's n-th visit shows view n of its augmentation. B is the batch size, at most the number of items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCall, unknown
from .items import Dataset, Item
from .transforms import Augment, normalise, prepare_mask, to_tensor


class Batch(NamedTuple):
    """`images` float32 (B, 3, S, S); `targets` int64 (B, S, S) masks or (B,) labels; the item and view of each row."""

    images: Tensor
    targets: Tensor
    items: tuple[Item, ...]
    views: tuple[int, ...]


class Batches:
    """The training batches of some items, at side `size`, normalised by `mean` and `std`.

    `task` is "segment" or "classify". Decoded, resized examples are kept in memory up to `keep_bytes`.
    Raises `BadCall` for no items or a batch size below 1, `BadData` where an item cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        task: str = "segment",
        keep_bytes: int = 1 << 28,
    ) -> None:
        if not items:
            raise BadCall("there are no items to make batches of; choose some with sample_shots")
        if batch_size < 1:
            raise BadCall(f"batch_size must be 1 or more, got {batch_size}")
        if task not in ("segment", "classify"):
            raise unknown("task", task, ("segment", "classify"))
        self.dataset, self.items, self.size, self.mean, self.std = dataset, tuple(items), size, mean, std
        self.batch_size, self.seed, self.augment, self.task = min(batch_size, len(items)), seed, augment, task
        self._room = keep_bytes
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._digests: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches until every item was seen at least once."""
        return -(-len(self.items) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0 up."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        visits = [divmod(place, len(self.items)) for place in places]
        order = {n: np.random.default_rng([self.seed, n]).permutation(len(self.items)) for n, _ in visits}
        return self.collate([(self.items[order[n][place]], n) for n, place in visits])

    def digest(self, item: Item) -> str:
        """What a cache keys an item of these batches by: its pixels and the augmentation that makes the views."""
        if item.id not in self._digests:
            drawn_for = None if self.augment is None else item.id  # equal pixels under two names have other views
            said = f"{self.dataset.digest(item)}|{self.augment!r}|{drawn_for}|{self.mean}|{self.std}"
            self._digests[item.id] = hashlib.sha256(said.encode()).hexdigest()
        return self._digests[item.id]

    def once(self) -> Iterator[Batch]:
        """Every item once, in order and without augmentation: for validation."""
        for start in range(0, len(self.items), self.batch_size):
            rows = [self.example(item) for item in self.items[start : start + self.batch_size]]
            images, targets = zip(*rows, strict=True)
            found = self.items[start : start + self.batch_size]
            yield Batch(torch.stack(images), torch.stack(targets), found, (0,) * len(found))

    def collate(self, wanted: Sequence[tuple[Item, int]]) -> Batch:
        """The batch of these (item, visit) pairs."""
        views = tuple(0 if self.augment is None else self.augment.view(n) for _, n in wanted)
        rows = [self.example(item, view) for (item, _), view in zip(wanted, views, strict=True)]
        images, targets = zip(*rows, strict=True)
        return Batch(torch.stack(images), torch.stack(targets), tuple(item for item, _ in wanted), views)

    def example(self, item: Item, view: int | None = None) -> tuple[Tensor, Tensor]:
        """One image (3, S, S), and its mask (S, S) or label (); `view` None is without augmentation."""
        x, y = self._plain(item)
        if self.augment is not None and view is not None:
            if self.task == "segment":
                x, mask = self.augment(x, y, item=item.id, view=view)
                assert mask is not None
                y = mask
            else:
                x, _ = self.augment(x, None, item=item.id, view=view)
        return normalise(x, self.mean, self.std), y

    def _plain(self, item: Item) -> tuple[Tensor, Tensor]:
        """Resized and in [0, 1], not yet augmented or normalised."""
        if item.id in self._kept:
            return self._kept[item.id]
        x = to_tensor(self.dataset.image(item), self.size)
        if self.task == "segment":
            y = prepare_mask(self.dataset.mask(item), self.size)
        elif item.label is None:
            raise BadCall(f"item {item.id!r} has no label; choose items with sample_shots(..., task='classify')")
        else:
            y = torch.tensor(item.label)
        cost = x.nbytes + y.nbytes
        if cost <= self._room:
            self._room -= cost
            self._kept[item.id] = (x, y)
        return x, y
