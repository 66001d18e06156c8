"""The door to data: a folder becomes a `Dataset`, and its training items become shots and batches.

dataset = load_dataset("data/wbc", classes=("nucleus",))
support = sample_shots(dataset, 5, seed=0)
batches = Batches(dataset, support, size=224, mean=MEAN, std=STD, batch_size=4, augment=Augment(seed=0))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import BadCall, BadData, unknown
from .batches import Batch, Batches
from .folders import read_folder
from .items import SPLITS, Dataset, Item
from .packs import UNSPLIT, Found, read_pack
from .shots import sample_shots
from .transforms import Augment, normalise, prepare, prepare_mask, to_tensor

__all__ = [
    "SPLITS",
    "Augment",
    "Batch",
    "Batches",
    "Dataset",
    "Item",
    "load_dataset",
    "normalise",
    "prepare",
    "prepare_mask",
    "sample_shots",
    "to_tensor",
]


def load_dataset(
    folder: str | Path, *, labels: str = "mask", classes: Sequence[str] | None = None, seed: int = 0
) -> Dataset:
    """Read a folder: a pack with `dataset.json` (see `packs`), or one of the plain layouts (see `folders`).

    `labels` chooses the label set: "mask", "mask_NAME", or "label" for image labels; items that carry none of it are
    left out and listed in `Dataset.left_out`. A pack without masks loads as image labels under the default.
    `classes` keeps these classes only, in this order, as 1..k (others become background; items with other image
    labels are left out). Without a split, a seeded one of 60/20/20 is made, groups kept together, image labels in
    proportion; the training split gets what rounding leaves.

    Only the files' existence is checked here; `Dataset.check` reads them all. Raises `BadData` for a folder that
    cannot be used, `UnknownName` for a label set or class that it lacks, `BadCall` for an empty choice of classes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadData(
            f"no data folder at {root}: found {'a file' if root.exists() else 'nothing'} there; check the path"
        )
    if not any(root.iterdir()):
        raise BadData(f"the data folder {root} is empty")
    if isinstance(classes, str):
        raise BadCall(f"classes is a sequence of names: write classes=({classes!r},)")
    if classes is not None and (len(classes) == 0 or len(set(classes)) < len(classes)):
        raise BadCall(f"classes needs one or more different names, got {tuple(classes)}")

    found = read_pack(root) if (root / "dataset.json").is_file() else read_folder(root)
    if all(item.split == UNSPLIT for item in found.items):
        found = found._replace(items=_made_split(found.items, seed))
    has_masks = any(item.masks for item in found.items)
    if labels == "label" or (labels == "mask" and not has_masks and found.label_names):
        return _classification(root, found, classes)
    return _segmentation(root, found, labels, classes)


def _segmentation(root: Path, found: Found, labels: str, classes: Sequence[str] | None) -> Dataset:
    carried = {key for item in found.items for key in item.masks}
    if labels not in carried:
        raise unknown("label set", labels, carried | ({"label"} if found.label_names else set()), hint=f"(in {root})")
    if labels not in found.label_sets or set(found.label_sets[labels]) <= {0}:
        key = "classes" + labels.removeprefix("mask")
        raise BadData(f"{root} has masks {labels!r} but declares no classes for them; add {key!r} to dataset.json")
    names = [name for value, name in sorted(found.label_sets[labels].items()) if value != 0]
    chosen = _chosen(names, classes)
    return Dataset(
        name=found.name,
        root=root,
        items=tuple(item for item in found.items if labels in item.masks),
        dims=found.dims,
        labels=labels,
        classes=dict(enumerate(chosen, start=1)),
        label_names=found.label_names,
        label_sets=found.label_sets,
        left_out=tuple(item.id for item in found.items if labels not in item.masks),
    )


def _classification(root: Path, found: Found, classes: Sequence[str] | None) -> Dataset:
    if not found.label_names:
        raise BadData(f"{root} has no image labels; give items a 'label' and the pack 'label_names'")
    chosen = _chosen(found.label_names, classes)
    new = {found.label_names.index(name): n for n, name in enumerate(chosen)}
    return Dataset(
        name=found.name,
        root=root,
        items=tuple(replace(item, label=new[item.label]) for item in found.items if item.label in new),
        dims=found.dims,
        labels="label",
        label_names=tuple(chosen),
        label_sets=found.label_sets,
        left_out=tuple(item.id for item in found.items if item.label not in new),
    )


def _chosen(names: Sequence[str], classes: Sequence[str] | None) -> list[str]:
    for name in classes or ():
        if name not in names:
            raise unknown("class", name, names)
    return list(names if classes is None else classes)


def _made_split(items: list[Item], seed: int) -> list[Item]:
    """60/20/20 by group, one stratum per image label; the order of the items does not matter."""
    strata: dict[int, dict[str, None]] = {}
    group = {item.id: f"group {item.group}" if item.group is not None else f"item {item.id}" for item in items}
    stratum: dict[str, int] = {}
    for item in sorted(items, key=lambda item: item.id):
        label = stratum.setdefault(group[item.id], -1 if item.label is None else item.label)
        strata.setdefault(label, {})[group[item.id]] = None
    split: dict[str, str] = {}
    for label, members in strata.items():
        names = sorted(members)
        order = np.random.default_rng([seed, label + 1]).permutation(len(names))
        test = max(1, round(0.2 * len(names))) if len(names) > 1 else 0
        val = max(1, round(0.2 * len(names))) if len(names) > 2 else 0
        for place, n in enumerate(order):
            split[names[n]] = "test" if place < test else "val" if place < test + val else "train"
    return [replace(item, split=split[group[item.id]]) for item in items]
