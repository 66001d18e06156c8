"""Training patches of volumes, with the interface of `batches`: batch t is a pure function of (items, seed, t).

The n-th visit of a volume gives `patches` views of it. View v is a crop whose place is drawn from (seed, item, v): even views have a voxel
of an annotated structure in their middle (structures equally often, voxels of one alike), odd ones lie anywhere. A volume smaller than
the patch is one view, whole: the patch shrinks to it. What the backbone needs beyond that (`Spec.fitting`), or a larger volume in the
same batch, is filled by going on with the border, image and label alike, half on each side, as in prediction.

Source: FSEFT (Silva-Rodriguez et al. 2023), section 4: 6 patches of 96^3 a volume in a batch of one volume; in pretraining with
intensity shifts and rotations by 90 degrees, whose probabilities it does not name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.volume_task import VolumePreprocessing
from ..backbones import Spec
from ..errors import BadCall, BadData
from ..volumes import Volume
from .assemble import Assembled
from .batches import Batch, Batches
from .items import Dataset, Item
from .volume_data import Volumes


@dataclass(frozen=True)
class Crops:
    """Where the views of a volume lie, and what else is done to them.

    views : of each volume, in a fixed bank, or None for new ones at every visit.
    turn, shift : probability p of a turn by 90, 180 or 270 degrees in a plane of equal sides, and of adding a constant of at most `shift`.
    """

    seed: int = 0
    views: int | None = 6
    turn: bool = False
    shift: float = 0.0
    p: float = 0.5

    def __post_init__(self) -> None:
        if self.views is not None and self.views < 1:
            raise BadCall(f"a bank needs one view or more, got views={self.views}; None draws new patches every time")
        if not 0 <= self.p <= 1 or not self.shift >= 0:
            raise BadCall(f"p is a probability and shift 0 or more, got {self.p} and {self.shift}")

    def view(self, n: int) -> int:
        """The n-th view: n itself, or n modulo the size of the bank."""
        return n if self.views is None else n % self.views

    @property
    def alters(self) -> bool:
        """True where views differ in more than their place."""
        return self.turn or self.shift > 0

    def __call__(self, x: Tensor, y: Tensor, window: Sequence[int], *, item: str, view: int) -> tuple[Tensor, Tensor]:
        """View `view` of x (C, D, H, W) and y (D, H, W), no longer than `window` along any axis."""
        key = hashlib.sha256(f"{self.seed}/{view}/{item}".encode()).digest()
        rng = np.random.default_rng(list(key[:16]))
        middle = _voxel_of_a_structure(y, rng) if view % 2 == 0 else None
        for axis, side in enumerate(window):
            room = max(y.shape[axis] - side, 0)
            start = int(rng.integers(room + 1)) if middle is None else min(max(middle[axis] - side // 2, 0), room)
            x, y = (t.narrow(t.ndim - 3 + axis, start, min(side, t.shape[t.ndim - 3 + axis])) for t in (x, y))
        return self._altered(x, y, rng)

    def _altered(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        turned, shifted = rng.random(2) < self.p
        planes = [(a, b) for a, b in ((0, 1), (0, 2), (1, 2)) if y.shape[a] == y.shape[b]]
        if self.turn and turned and planes:
            a, b = planes[rng.integers(len(planes))]
            k = int(rng.integers(1, 4))
            x, y = x.rot90(k, (a + 1, b + 1)), y.rot90(k, (a, b))
        offset = float(rng.uniform(-self.shift, self.shift)) if self.shift and shifted else 0.0
        return (x + offset if offset else x), y


def _voxel_of_a_structure(y: Tensor, rng: np.random.Generator) -> tuple[int, ...] | None:
    """A voxel of one of the structures in y (D, H, W), None where there is none."""
    labels = y.numpy()
    there = np.unique(labels[labels > 0])
    if not there.size:
        return None
    found = np.flatnonzero(labels == rng.choice(there))
    return tuple(int(i) for i in np.unravel_index(rng.choice(found), labels.shape))


class Patches(Batches):
    """The training batches of some volumes: `images` (B, C, D, H, W) float32, `targets` (B, D, H, W) int64.

    `volumes` volumes a batch and `patches` patches of each, prepared by `prepare` for a backbone of `spec`. `partial`, `dropout` and
    `balance` as in `Batches`. Raises BadCall and BadData as `Batches`, and BadData for a data set that holds no volumes.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        prepare: VolumePreprocessing,
        spec: Spec,
        *,
        volumes: int = 1,
        patches: int = 6,
        crops: Crops | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if dataset.dims != 3:
            raise BadData(f"{dataset.name!r} holds pictures, {spec.id} wants volumes; choose a backbone of 2D")
        if patches < 1:
            raise BadCall(f"patches= is 1 or more of each volume, got {patches}")
        self.crops = Crops(seed) if crops is None else crops
        super().__init__(
            dataset,
            items,
            size=prepare.size,
            mean=prepare.mean,
            std=prepare.std,
            batch_size=volumes,
            seed=seed,
            augment=self.crops,  # type: ignore[arg-type]  # it has the views that fit and the cache ask for
            **options,
        )
        self.prepare, self.spec, self.patches = prepare, spec, patches

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0 up."""
        wanted: list[tuple[Item, int]] = []
        for k in range(self.batch_size):
            item, n = self._visit(step * self.batch_size + k)
            count = 1 if self._is_one_view(item) else self.patches
            wanted += [(item, n * count + i) for i in range(count)]
        return self.collate(wanted)

    def once(self) -> Iterator[Batch]:
        """The first patch of every item, with a structure in its middle, in order and without dropout: for validation."""
        for start in range(0, len(self.items), self.batch_size):
            found = self.items[start : start + self.batch_size]
            groups = torch.tensor([self.dataset.groups(item) for item in found]) if self.partial else None
            yield _joined([self.example(item) for item in found], found, (0,) * len(found), groups)

    def collate(self, wanted: Sequence[tuple[Item, int]]) -> Batch:
        """The batch of these (item, number of its view) pairs."""
        views = tuple(0 if self._is_one_view(item) else self.crops.view(n) for item, n in wanted)
        rows = [self.example(item, view) for (item, _), view in zip(wanted, views, strict=True)]
        groups = None
        if self.partial:
            told = [self._told(y, item, n) for (_, y), (item, n) in zip(rows, wanted, strict=True)]
            rows = [(x, y) for (x, _), (y, _) in zip(rows, told, strict=True)]
            groups = torch.stack([g for _, g in told])
        return _joined(rows, tuple(item for item, _ in wanted), views, groups)

    def example(self, item: Item, view: int | None = None) -> tuple[Tensor, Tensor]:
        """View `view` of a volume, (C, *space) and (*space), padded to what the backbone takes; None is the first."""
        x, y = self._plain(item)
        x, y = self.crops(x, y, self.prepare.patch, item=item.id, view=view or 0)
        return padded(x, y, self.spec.fitting(y.shape))

    def digest(self, item: Item) -> str:
        """What a cache keys an item by: voxels, grid and labels, how they are prepared, and where the views lie."""
        if item.id not in self._digests:
            volume = volume_of(self.dataset, item)
            found = hashlib.sha256(self.dataset.mask(item).tobytes() + volume.affine.tobytes()).hexdigest()
            said = f"{self.dataset.digest(item)}|{found}|{self.prepare!r}|{self.crops!r}|{item.id}"
            self._digests[item.id] = hashlib.sha256(said.encode()).hexdigest()
        return self._digests[item.id]

    def labels_of(self, item: Item) -> Tensor:
        """The whole label volume of `item`, int64 (D, H, W), as the network sees it: what size priors are measured on."""
        return self._plain(item)[1]

    def _is_one_view(self, item: Item) -> bool:
        """True for a volume that fits into the patch, where nothing else tells views apart."""
        space = self._plain(item)[1].shape
        return not self.crops.alters and all(n <= side for n, side in zip(space, self.prepare.patch, strict=True))

    def _plain(self, item: Item) -> tuple[Tensor, Tensor]:
        """The whole volume and its labels, prepared."""
        if item.id not in self._kept:
            volume = volume_of(self.dataset, item)
            x = self.prepare(volume)
            y = self.prepare.labels(volume.on_this_grid(self.dataset.mask(item)))
            if x.nbytes + y.nbytes > self._room:
                return x, y
            self._room -= x.nbytes + y.nbytes
            self._kept[item.id] = (x, y)
        return self._kept[item.id]


def _joined(
    rows: Sequence[tuple[Tensor, Tensor]], items: tuple[Item, ...], views: tuple[int, ...], groups: Tensor | None
) -> Batch:
    """One batch of patches of different sizes: all as long as the longest along each axis."""
    space = [max(y.shape[axis] for _, y in rows) for axis in range(3)]
    images, targets = zip(*(padded(x, y, space) for x, y in rows), strict=True)
    return Batch(torch.stack(images), torch.stack(targets), items, views, groups)


def padded(x: Tensor, y: Tensor, space: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x (C, D, H, W) and y (D, H, W) with their borders going on until they are `space` long, half on each side."""
    pads: list[int] = []
    for n, side in reversed(list(zip(y.shape, space, strict=True))):
        more = max(side - n, 0)
        pads += [more // 2, more - more // 2]
    if not any(pads):
        return x.contiguous(), y.contiguous()
    longer = functional.pad(y[None, None].float(), pads, mode="replicate")[0, 0].long()
    return functional.pad(x[None], pads, mode="replicate")[0], longer


def volume_of(dataset: Dataset, item: Item) -> Volume:
    """The image of an item of `Volumes`, or of several put together. Raises BadData for pictures."""
    if isinstance(dataset, Assembled):
        dataset, item, _ = dataset.owners[item.id]
    if not isinstance(dataset, Volumes):
        raise BadData(f"{dataset.name!r} holds no volumes that can be cut into patches; read it with `volumes_of`")
    return dataset.volume(item)
