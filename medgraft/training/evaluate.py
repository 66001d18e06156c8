"""Scores of an adapter on a data set: image by image, in the images' own sizes, with intervals over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..adapters import Host, Task, store
from ..adapters.ensemble import Ensemble
from ..errors import BadCall, BadData
from .items import Dataset, Item
from .metrics import accuracy, auc, balanced_accuracy, bootstrap_interval, dice, iou, summarise
from .prompting import Kind, prompts_of
from .slices import Slices, volume_scores
from .volume_data import Volumes


def evaluate(
    host: Host,
    name: str | Sequence[str],
    dataset: Dataset,
    split: str = "test",
    *,
    each: Callable[[Item, np.ndarray], None] | None = None,
    prompts: Kind = "box",
) -> dict[str, Any]:
    """Predict every item of `split` and compare. Several names are scored as one, their `Ensemble`.

    A promptable adapter is asked as `prompts_of` makes it from the truth; the result says so under `prompts`.

    Segmentation: `dice`, `iou` (means over images of the mean over classes), `interval` (95 %, of Dice), `per_image`, `classes`, `n`.
    Volumes: the same, whole volumes on their own grids, with an `interval` of every class among `classes`.
    Slices of volumes: `dice` and the rest by volume, `slice_dice` beside them, see `volume_scores`.
    Classification: `accuracy`, `balanced_accuracy`, `auc`, `interval` (of the accuracy), `per_image`, `n`.
    `each` is called with every item of pictures or volumes and the class indices found for it.
    Raises BadData for an empty split, BadCall where the data set's classes are not the adapter's.
    """
    together = Ensemble(host, [name] if isinstance(name, str) else name)
    task, predict = together.task, cast(Callable[..., Any], together.predict)
    if isinstance(name, str):
        predict = partial(host.predict, adapter=name)
    items = dataset.split(split)
    if not items:
        raise BadData(f"{dataset.name!r} has no items in split {split!r}; splits are train, val and test")
    if task.kind == "classify":
        return _classify(task, predict, dataset, split)

    def asked(item: Item, truth: np.ndarray) -> dict[str, Any]:
        made = prompts_of(host.adapters[name], truth, item, prompts) if isinstance(name, str) else None
        return {} if made is None else {"prompts": made}

    own = [dataset.classes[v] for v in sorted(dataset.classes) if v]
    if list(task.classes) != own:
        raise BadCall(
            f"the adapter segments {', '.join(task.classes)}; {dataset.name!r} was loaded with {', '.join(own)}. Choose --classes {','.join(task.classes)}"
        )
    if isinstance(dataset, Slices):
        said = volume_scores(
            dataset,
            dataset.volumes(split),
            lambda item: _indices(predict(dataset.image(item), **asked(item, dataset.mask(item))), task.values),
        )
        return {"task": "segment", "dataset": dataset.name, "split": split, **_told(host, name, prompts), **said}
    overlap, union, per_image = [], [], []
    for item in items:
        truth = dataset.mask(item)
        shown = dataset.volume(item) if isinstance(dataset, Volumes) else dataset.image(item)
        answer = predict(shown, **asked(item, truth))
        indices = _indices(answer, task.values)
        if each is not None:
            each(item, indices)
        drawn = np.array(dataset.annotated(item))  # a class that nobody drew on this image is not scored
        overlap.append(np.where(drawn, dice(indices, truth, len(task.classes)), np.nan))
        union.append(np.where(drawn, iou(indices, truth, len(task.classes)), np.nan))
        scores = {c: None if np.isnan(d) else float(d) for c, d in zip(task.classes, overlap[-1], strict=True)}
        per_image.append({"id": item.id, "dice": scores, "domain": item.domain})
    scored = summarise(overlap, task.classes)
    if isinstance(dataset, Volumes):
        for c, by_case in zip(task.classes, np.array(overlap).T, strict=True):
            scored["classes"][c]["interval"] = [None if np.isnan(v) else v for v in bootstrap_interval(by_case)]
    return {
        "task": "segment",
        "dataset": dataset.name,
        "split": split,
        **_told(host, name, prompts),
        "n": len(items),
        "dice": scored["mean"],
        "interval": [scored["low"], scored["high"]],
        "level": 0.95,
        "iou": summarise(union, task.classes)["mean"],
        "classes": scored["classes"],
        "per_image": per_image,
    }


def _told(host: Host, name: str | Sequence[str], kind: Kind) -> dict[str, str]:
    """What a promptable adapter was told; empty for others."""
    prompted = isinstance(name, str) and any(r.takes_prompts for r in host.adapters[name].readouts)
    return {"prompts": f"a {kind} for each object, made from the truth"} if prompted else {}


def _indices(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    table = np.zeros(256, dtype=np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table[labels]


def _classify(task: Task, predict: Callable[..., Any], dataset: Dataset, split: str) -> dict[str, Any]:
    if tuple(dataset.label_names) != task.classes:
        raise BadCall(
            f"the adapter tells {', '.join(task.classes)} apart; {dataset.name!r} has {', '.join(dataset.label_names) or 'no labels'}"
        )
    items = [i for i in dataset.split(split) if i.label is not None]
    scores = np.array([[*predict(dataset.image(item)).values()] for item in items])
    truth = np.array([item.label for item in items])
    decided = scores.argmax(1)
    return {
        "task": "classify",
        "dataset": dataset.name,
        "split": split,
        "n": len(items),
        "accuracy": accuracy(truth, decided),
        "balanced_accuracy": balanced_accuracy(truth, decided),
        "auc": auc(truth, scores),
        "level": 0.95,
        "interval": list(bootstrap_interval((truth == decided).astype(float))),
        "per_image": [
            {"id": i.id, "label": task.classes[t], "predicted": task.classes[p]}
            for i, t, p in zip(items, truth, decided, strict=True)
        ],
    }


def record_score(directory: Path, result: dict[str, Any]) -> None:
    """Keep a result's summary (no item ids) in the adapter's own description, in the place of one of the same set and split."""
    entry = {k: v for k, v in result.items() if k != "per_image"}
    store.record_evaluation(directory, entry)
