"""Batches by number: batch t is a pure function of (items, seed, t), so resuming needs no state but t.

The stream is the items shuffled, then shuffled anew, without end; batch t takes places t B .. (t + 1) B - 1 of it, and
an item's n-th visit shows view n of its augmentation. B is the batch size, at most the number of items. Balanced, there is
such a stream for each source and places go round the sources, so that all are seen equally often, however large they are.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCall, BadData, unknown
from ..pixels import Fit, bright_box
from .items import Dataset, Item
from .label_dropout import LabelDropout
from .packs import shorten
from .transforms import Augment, normalise, prepare_mask, to_tensor

Balance = Literal["none", "source", "domain"]


class Batch(NamedTuple):
    """`images` float32 (B, 3, S, S); `targets` int64 (B, S, S) masks or (B,) labels; the item and view of each row.

    `groups` int64 (B, K), where the labels are partial: which classes each row tells apart, see `Dataset.groups`.
    """

    images: Tensor
    targets: Tensor
    items: tuple[Item, ...]
    views: tuple[int, ...]
    groups: Tensor | None = None


class Batches:
    """The training batches of some items, at side `size`, normalised by `mean` and `std`.

    `task` is "segment" or "classify"; `crop` cuts off the dark border, `fit` says how a picture becomes a square. Decoded, resized examples are kept in memory up to `keep_bytes`.
    With `partial`, batches say which classes were annotated, and `dropout` drops some of these; `balance` names the key of the
    items by which they are sampled equally often. Raises `BadCall` for no items, a batch size below 1 or items without that key,
    `BadData` where an item cannot be read or, with `partial`, nothing is annotated; items that annotate nothing give a warning.
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
        crop: bool = False,
        fit: Fit = "stretch",
        partial: bool = False,
        dropout: LabelDropout | None = None,
        balance: Balance = "none",
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
        self.crop, self.fit = crop, fit
        self.partial, self.dropout, self.balance = partial or dropout is not None, dropout, balance
        self.streams = _streams(self.items, balance)
        if self.partial:
            _need_annotations(dataset, self.items)
        self._room = keep_bytes
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._digests: dict[str, str] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Batches until every item was seen at least once."""
        return -(-len(self.streams) * max(map(len, self.streams)) // self.batch_size)

    @property
    def labels(self) -> str:
        """What the targets depend on besides the images: who annotated what, what is dropped, and in which order."""
        groups = [self.dataset.groups(item) for item in self.items] if self.partial else None
        return f"{groups}|{self.dropout!r}|{self.balance}"

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0 up."""
        return self.collate([self._visit(step * self.batch_size + k) for k in range(self.batch_size)])

    def _visit(self, place: int) -> tuple[Item, int]:
        """The item at a place of the stream, and how often it was seen before."""
        rank, stream = divmod(place, len(self.streams))
        items = self.streams[stream]
        n, at = divmod(rank, len(items))
        return items[self._order(stream, n)[at]], n

    def _order(self, stream: int, n: int) -> np.ndarray:
        if (stream, n) not in self._orders:
            if len(self._orders) > 2 * len(self.streams):
                self._orders.clear()
            key = [self.seed, n] + ([] if self.balance == "none" else [stream])
            self._orders[stream, n] = np.random.default_rng(key).permutation(len(self.streams[stream]))
        return self._orders[stream, n]

    def digest(self, item: Item) -> str:
        """What a cache keys an item of these batches by: its pixels and the augmentation that makes the views."""
        if item.id not in self._digests:
            drawn_for = None if self.augment is None else item.id  # equal pixels under two names have other views
            said = (
                f"{self.dataset.digest(item)}|{self.augment!r}|{drawn_for}|{self.mean}|{self.std}"
                + "|crop" * self.crop
                + f"|{self.fit}" * (self.fit != "stretch")
            )
            self._digests[item.id] = hashlib.sha256(said.encode()).hexdigest()
        return self._digests[item.id]

    def once(self) -> Iterator[Batch]:
        """Every item once, in order and without augmentation: for validation."""
        for start in range(0, len(self.items), self.batch_size):
            rows = [self.example(item) for item in self.items[start : start + self.batch_size]]
            images, targets = zip(*rows, strict=True)
            found = self.items[start : start + self.batch_size]
            groups = torch.tensor([self.dataset.groups(item) for item in found]) if self.partial else None
            yield Batch(torch.stack(images), torch.stack(targets), found, (0,) * len(found), groups)

    def collate(self, wanted: Sequence[tuple[Item, int]]) -> Batch:
        """The batch of these (item, visit) pairs."""
        views = tuple(0 if self.augment is None else self.augment.view(n) for _, n in wanted)
        rows = [self.example(item, view) for (item, _), view in zip(wanted, views, strict=True)]
        images, targets = zip(*rows, strict=True)
        groups = None
        if self.partial:
            told = [self._told(y, item, n) for y, (item, n) in zip(targets, wanted, strict=True)]
            targets, groups = tuple(y for y, _ in told), torch.stack([g for _, g in told])
        return Batch(torch.stack(images), torch.stack(targets), tuple(item for item, _ in wanted), views, groups)

    def _told(self, mask: Tensor, item: Item, visit: int) -> tuple[Tensor, Tensor]:
        """The mask and groups of one visit, after label dropout."""
        groups = torch.tensor(self.dataset.groups(item))
        return (mask, groups) if self.dropout is None else self.dropout(mask, groups, item=item.id, visit=visit)

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
        image = self.dataset.image(item)
        box = bright_box(image) if self.crop else ...
        x = to_tensor(image[box], self.size, self.fit, self.mean)
        if self.task == "segment":
            y = prepare_mask(self.dataset.mask(item)[box], self.size, self.fit)
        elif item.label is None:
            raise BadCall(f"item {item.id!r} has no label; choose items with sample_shots(..., task='classify')")
        else:
            y = torch.tensor(item.label)
        cost = x.nbytes + y.nbytes
        if cost <= self._room:
            self._room -= cost
            self._kept[item.id] = (x, y)
        return x, y


def _streams(items: tuple[Item, ...], balance: Balance) -> list[tuple[Item, ...]]:
    if balance not in get_args(Balance):
        raise unknown("key to balance by", balance, get_args(Balance))
    if balance == "none":
        return [items]
    found: dict[str | None, list[Item]] = {}
    for item in items:
        found.setdefault(getattr(item, balance), []).append(item)
    if None in found:
        raise BadCall(
            f"balancing by {balance!r} needs that key on every item; missing on {shorten([i.id for i in found[None]])}"
        )
    return [tuple(own) for own in found.values()]


def _need_annotations(dataset: Dataset, items: Sequence[Item]) -> None:
    """Items of which nothing is annotated add nothing to a loss; if that is all of them, there is nothing to learn."""
    bare = [item.id for item in items if not any(dataset.groups(item))]
    if len(bare) == len(items):
        raise BadData(
            f"none of the {len(items)} items annotates any of {', '.join(dataset.classes.values())}: {shorten(bare)}; "
            f"there is nothing to learn from"
        )
    if bare:
        warnings.warn(
            f"{len(bare)} of {len(items)} items annotate none of {', '.join(dataset.classes.values())} and add nothing to "
            f"the loss: {shorten(bare)}",
            stacklevel=3,
        )
