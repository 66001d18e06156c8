"""Choosing the few labelled examples (the support): seeded, nested, and with every class if that can be.

Nested: for one seed the first n of N shots are the n shots, so curves over the number of shots compare like with like.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from ..errors import BadCall, BadData, unknown
from .items import Dataset, Item

Task = Literal["segment", "classify"]

_CANDIDATES = 256  # masks read before the choice starts; more only while a class is missing


def sample_shots(dataset: Dataset, shots: int | None, seed: int, *, task: Task = "segment") -> list[Item]:
    """Seeded training items: `shots` in all for "segment", `shots` per class for "classify", all with None.

    Segmentation takes first, among 256 shuffled candidates, the items that add most missing classes, then the rest
    in shuffled order. Raises `BadCall` for shots below 1, `BadData` where the training split is empty, lacks a class
    or holds fewer items than asked for (the message says how many).
    """
    if task not in get_args(Task):
        raise unknown("task", task, get_args(Task))
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise BadCall(f"shots must be a whole number from 1 up, or None for all; got {shots!r}")
    items = dataset.split("train")
    if not items:
        raise BadData(f"{dataset.name!r} has no training items; give items 'split': 'train' or remove the split")
    return _segment(dataset, items, shots, seed) if task == "segment" else _classify(dataset, items, shots, seed)


def _segment(dataset: Dataset, items: list[Item], shots: int | None, seed: int) -> list[Item]:
    if not dataset.classes:
        raise BadData(f"{dataset.name!r} has no masks to learn from; use task='classify', or add masks")
    if shots is not None and shots > len(items):
        raise BadData(f"{shots} shots asked for, {dataset.name!r} has {len(items)} training items; ask for fewer")
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    candidates, missing = _until_covered(dataset, order)
    if missing:
        have = [name for name in dataset.classes.values() if name not in missing]
        need_annotated(dataset, items)
        raise BadData(
            f"{dataset.name!r} has no training item with {', '.join(missing)}; "
            f"draw some, or choose classes={tuple(have)}"
        )
    if shots is None:
        return items
    chosen: list[Item] = []
    uncovered = set(dataset.classes)
    while uncovered:
        gain = [len(dataset.present(item) & uncovered) for item in candidates]
        best = candidates[int(np.argmax(gain))]  # the first of equals
        chosen.append(best)
        uncovered -= dataset.present(best)
    taken = {item.id for item in chosen}
    return (chosen + [item for item in order if item.id not in taken])[:shots]


def need_annotated(dataset: Dataset, items: Iterable[Item]) -> None:
    """Raise `BadData` naming the classes of the task that no item of `items` annotates."""
    drawn = np.any([dataset.annotated(item) for item in items], axis=0)
    nowhere = [name for name, found in zip(dataset.classes.values(), drawn, strict=True) if not found]
    if nowhere:
        raise BadData(
            f"{', '.join(nowhere)} of {dataset.name!r} is annotated on no training item, so it cannot be learnt; "
            f"leave it out of the classes, or add a source that annotates it"
        )


def _until_covered(dataset: Dataset, order: Iterable[Item]) -> tuple[list[Item], list[str]]:
    """The candidates whose masks are read, and the names of classes that occur nowhere."""
    candidates: list[Item] = []
    missing = set(dataset.classes)
    for item in order:
        if len(candidates) >= _CANDIDATES and not missing:
            break
        candidates.append(item)
        missing -= dataset.present(item)
    return candidates, [dataset.classes[value] for value in sorted(missing)]


def _classify(dataset: Dataset, items: list[Item], shots: int | None, seed: int) -> list[Item]:
    if not dataset.label_names:
        raise BadData(f"{dataset.name!r} has no image labels; use task='segment', or give items a 'label'")
    by_class = [[item for item in items if item.label == k] for k in range(len(dataset.label_names))]
    counts = {name: len(found) for name, found in zip(dataset.label_names, by_class, strict=True)}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise BadData(f"{dataset.name!r} has no training item of class {', '.join(empty)}; add some or leave it out")
    if shots is None:
        return [item for item in items if item.label is not None]
    if shots > min(counts.values()):
        held = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BadData(f"{shots} shots per class asked for, {dataset.name!r} has: {held}; ask for fewer")
    orders = [np.random.default_rng([seed, k]).permutation(len(found)) for k, found in enumerate(by_class)]
    return [found[order[n]] for n in range(shots) for found, order in zip(by_class, orders, strict=True)]
