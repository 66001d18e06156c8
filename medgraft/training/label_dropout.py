"""Label dropout: forget an annotated class now and then, so that a site is no clue to which classes are annotated.

Of each training sample, at every visit and with probability p, one class is dropped: its pixels become background and the class
counts as not annotated. It is drawn uniformly from the classes that are annotated and visible on the sample and *partially
labelled*: annotated on some items of the mixture and not on others. At most one a sample; a class that every item annotates is
never dropped; p = 0 changes nothing; with p = 1 a sample with one such class never shows it.

What is dropped is a function of (seed, item, visit) alone, so a resumed run repeats the uninterrupted one, and images stay as
they are, so a cache of frozen features stays right.

Source: label-dropout (arXiv 2403.07818), section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCall, BadData, unknown
from .items import Dataset, Item


@dataclass(frozen=True)
class LabelDropout:
    """`p` in [0, 1]; `partial` the partially labelled classes, by index (background is 0). Raises `BadCall` for another p."""

    p: float
    partial: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        need_probability(self.p)
        if any(k < 1 for k in self.partial):
            raise BadCall(f"only classes from 1 up can be dropped, never the background; got {list(self.partial)}")

    def __call__(self, mask: Tensor, groups: Tensor, *, item: str, visit: int) -> tuple[Tensor, Tensor]:
        """int64 (...) and (K,) -> the same, with one class less or as they are (see `Dataset.groups`)."""
        candidates = [k for k in self.partial if int((groups == k).sum()) == 1 and bool((mask == k).any())]
        key = hashlib.sha256(f"{self.seed}/{visit}/{item}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(key[:7], "big"))
        if not candidates or rng.random() >= self.p:
            return mask, groups
        k = candidates[rng.integers(len(candidates))]
        return torch.where(mask == k, 0, mask), torch.where(groups == k, 0, groups)


def need_probability(p: float) -> None:
    """Raise `BadCall` for a p that is none."""
    if not 0 <= p <= 1:
        raise BadCall(f"p is the probability that a sample loses one label, from 0 to 1; got {p}")


def partial_classes(dataset: Dataset, items: Sequence[Item]) -> tuple[int, ...]:
    """The classes (1..k) that some of `items` annotate and others do not."""
    drawn = np.array([dataset.annotated(item) for item in items])
    return tuple(int(k) + 1 for k in np.flatnonzero(drawn.any(0) & ~drawn.all(0)))


def hide_labels(dataset: Dataset, rules: str) -> Dataset:
    """Treat classes of a source as not annotated while training: "CLASS@SOURCE", several separated by commas.

    A source is a `domain` of the items, or the pack that they come from. Test items keep what was drawn; validation is part
    of training. Raises `UnknownName` for a class or source that is not there, `BadCall` for a rule of another form,
    `BadData` where a class is left that no training item annotates.
    """
    hidden: dict[str, set[str]] = {}
    sources = {name for item in dataset.items for name in (item.domain, item.source) if name is not None}
    for rule in filter(None, (part.strip() for part in rules.split(","))):
        name, at, source = rule.partition("@")
        if not at or not name or not source:
            raise BadCall(f"a rule to hide labels is CLASS@SOURCE, as in cytoplasm@laboratory_2; got {rule!r}")
        if name not in dataset.classes.values():
            raise unknown("class", name, dataset.classes.values())
        if source not in sources:
            raise unknown("source", source, sources, hint=f"(domains and packs of {dataset.name!r})")
        hidden.setdefault(source, set()).add(name)
    if not hidden:
        return dataset

    def learnt(item: Item) -> Item:
        without = hidden.get(item.domain or "", set()) | hidden.get(item.source or "", set())
        if item.split == "test" or not without:
            return item
        drawn = zip(dataset.classes.values(), dataset.annotated(item), strict=True)
        return replace(
            item,
            labelled=tuple(name for name, found in drawn if found and name not in without),
            coarse=tuple(c for c in item.coarse if not without.intersection(c)),
        )

    found = replace(dataset, items=tuple(learnt(item) for item in dataset.items))
    left = np.any([found.annotated(item) for item in found.split("train")], axis=0)
    gone = [name for name, any_left in zip(found.classes.values(), left, strict=True) if not any_left]
    if gone:
        raise BadData(f"hiding {rules!r} leaves no training item that annotates {', '.join(gone)}; hide less")
    return found
