"""The cross-dataset matrix: train on every combination of sources, score on every source's test split.

A source is a data set, or the items of one pack that share a `domain` (camera, laboratory, stain, site). Rows are what was
trained on, columns what was tested on. Every cell is one JSON file, written whole or not at all, so an interrupted matrix
goes on where it stopped:

    OUT/settings.json                  what the cells belong to; another recipe or other data are refused
    OUT/models/ROW.SEED, ROW.SEED.json the trained model and its facts
    OUT/cells/ROW.SEED.COLUMN.json     the scores

A row is trained on the classes that all of its sources annotate, from the training items that annotate all of these: no
unlabelled structure is ever taught as background. A class that a row or a column lacks is a sentence in its cell, never a
zero. A cell that fails (a loss that diverged, a damaged image) says why and is tried again the next time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from ..adapters.files import write_text
from ..errors import BadCall, BadData, Diverged, unknown
from .data import load_dataset
from .items import Dataset, Item
from .metrics import PixelScores, dice, summarise
from .model import NAME, open_model
from .packs import read_pack, shorten

Predict = Callable[[np.ndarray], np.ndarray]
"""An image (H, W, 3) uint8 -> probabilities (K, H, W): K = 1 for one class, else background and the classes."""

Train = Callable[[Dataset, Path, int], Mapping[str, Any]]
"""`train(dataset, out, seed)` leaves a model in `out` and returns facts of it."""

T = TypeVar("T")


# Sources


def sources_of(
    folders: Sequence[Path], *, by: str | None = None, labels: str = "mask", classes: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """Sources by name: the folders, or with `by` = "domain" the domains inside the one folder.

    With `classes`, each source keeps those of them that it has. Raises BadCall for fewer than two sources or another `by`,
    BadData where items lack the key or a picture of one training split is in another source's test split.
    """
    if by is not None and by != "domain":
        raise unknown("item key to divide by", by, ["domain"])
    if not folders or (by is not None and len(folders) != 1):
        raise BadCall(f"--by divides one data folder, and without it two or more are needed; got {len(folders)}")
    if by is not None:
        found = _domains(Path(folders[0]), load_dataset(folders[0], labels=labels))
    else:
        found = {}
        for folder in folders:
            dataset = load_dataset(folder, labels=labels)
            name = dataset.name if dataset.name not in found else str(folder)
            if name in found:
                raise BadCall(f"{folder} was given twice; give every data folder once")
            found[name] = dataset
    if len(found) < 2:
        raise BadCall(
            f"a matrix compares two sources or more, found one: {', '.join(found)}. Give another data folder, or divide "
            f"one by domain (--by domain)"
        )
    if any("+" in name for name in found):
        raise BadCall(f"rows are written a+b, so no source may have a plus in its name: {', '.join(found)}; rename it")
    known = {c for dataset in found.values() for c in dataset.classes.values()}
    if not known:
        raise BadData("no source has masks; a matrix is about segmentation")
    for name in classes or ():
        if name not in known:
            raise unknown("class", name, known)
    if classes is not None:
        found = {n: _narrowed(d, [c for c in classes if c in d.classes.values()]) for n, d in found.items()}
    _need_separate(found)
    return found


def _domains(root: Path, dataset: Dataset) -> dict[str, Dataset]:
    everywhere = read_pack(root).items if (root / "dataset.json").is_file() else dataset.items
    without = [item.id for item in everywhere if item.domain is None]
    if without:
        raise BadData(
            f"--by domain needs the key 'domain' on every item of {dataset.name!r}; {len(without)} of {len(everywhere)} "
            f"have none: {shorten(without)}. Add it to dataset.json, or give several data folders instead"
        )
    names = dict.fromkeys(item.domain for item in everywhere if item.domain is not None)
    return {n: replace(dataset, items=tuple(i for i in dataset.items if i.domain == n), _cache={}) for n in names}


def _narrowed(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    return replace(dataset, classes=dict(enumerate(classes, start=1)), _cache={})


def _need_separate(sources: Mapping[str, Dataset]) -> None:
    """Groups are kept together inside a pack; the same picture in two sources must not cross either."""
    learnt = {d.digest(item): f"{n}/{item.id}" for n, d in sources.items() for item in d.split("train")}
    asked = {f"{n}/{item.id}": d.digest(item) for n, d in sources.items() for item in d.split("test")}
    crossing = [f"{learnt[digest]} = {name}" for name, digest in asked.items() if digest in learnt]
    if crossing:
        raise BadData(
            f"the same picture is in a training and in a test split: {shorten(crossing)}; results would be too good. "
            f"Take it out of one of them"
        )


def combinations_of(names: Sequence[str], asked: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """The rows: as asked for ("a+b"), else every source alone, every pair, and all together."""
    rows = []
    for text in asked:
        parts = [part.strip() for part in text.split("+")]
        for part in parts:
            if part not in names:
                raise unknown("source", part, names)
        rows.append(tuple(name for name in names if name in parts))
    rows = rows or [*((n,) for n in names), *combinations(names, 2), tuple(names)]
    return list(dict.fromkeys(rows))


@dataclass(frozen=True)
class Joined(Dataset):
    """Training and validation items of several sources under `source/id`, with one list of classes."""

    owners: Mapping[str, tuple[Dataset, Item]] = field(default_factory=dict)

    @staticmethod
    def of(sources: Mapping[str, Dataset], classes: Sequence[str]) -> Joined:
        """The items that annotate all of `classes`."""
        owners: dict[str, tuple[Dataset, Item]] = {}
        for name, dataset in sources.items():
            own = _narrowed(dataset, classes)
            owners |= {f"{name}/{i.id}": (own, i) for i in own.items if i.split != "test" and all(own.annotated(i))}
        items = []
        for new, (own, item) in owners.items():
            group = None if item.group is None else f"{own.root}/{item.group}"  # a pack's own name for a patient
            items.append(replace(item, id=new, group=group))
        first = next(iter(sources.values()))
        return Joined(
            "+".join(sources),
            first.root,
            tuple(items),
            first.dims,
            first.labels,
            dict(enumerate(classes, start=1)),
            owners=owners,
        )

    def image(self, item: Item) -> np.ndarray:
        """As the source's own."""
        dataset, own = self.owners[item.id]
        return dataset.image(own)

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """As the source's own, in the values of the joined classes."""
        dataset, own = self.owners[item.id]
        return dataset.mask(own, labels)


# Scores


def score(predict: Predict, dataset: Dataset, split: str = "test") -> dict[str, Any]:
    """Dice (mean over images, with interval) and area under the precision-recall curve (over all pixels) by class.

    Images that do not annotate a class are left out of it.
    """
    classes = [dataset.classes[value] for value in sorted(dataset.classes)]
    known = np.array([name in dataset.label_sets[dataset.labels].values() for name in classes])
    pixels, table, per_image = PixelScores(len(classes)), [], []
    for item in dataset.split(split):
        truth, drawn = dataset.mask(item), known & dataset.annotated(item)
        p = predict(dataset.image(item))
        foreground, decided = (p, (p[0] > 0.5).astype(np.int64)) if len(p) == 1 else (p[1:], p.argmax(0))
        table.append(np.where(drawn, dice(decided, truth, len(classes)), np.nan))
        per_image.append({"id": item.id, "dice": [None if np.isnan(d) else float(d) for d in table[-1]]})
        for k in np.flatnonzero(drawn):
            pixels.add(int(k), truth == k + 1, foreground[k])
    found = summarise(table, classes)
    by_class = {
        name: {
            "dice": fact["mean"],
            "images": fact["images"],
            "pr_area": None if np.isnan(area) else area,
            "lacks": None if fact["images"] else f"no test image shows {name}",
        }
        for (name, fact), area in zip(found["classes"].items(), pixels.areas, strict=True)
    }
    interval = [found["low"], found["high"]]
    return {"dice": found["mean"], "interval": interval, "classes": by_class, "per_image": per_image}


# The grid


@dataclass
class Matrix:
    """Cells on disk under `out`, for `sources`. `settings` is whatever the cells depend on besides the data."""

    out: Path
    sources: Mapping[str, Dataset]
    settings: Mapping[str, Any] = field(default_factory=dict)
    said: Callable[[str], None] = lambda line: None
    cells: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        data = {
            name: hashlib.sha256(repr([i.id for i in d.items]).encode()).hexdigest() for name, d in self.sources.items()
        }
        now = json.loads(json.dumps({**self.settings, "classes": self.classes, "items": data}, default=str))
        file = self.out / "settings.json"
        then = _read(file)
        differing = [] if then is None else sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
        if then is not None and differing:
            shown = ", ".join(f"{k}: {then.get(k)!s:.60} there, {now.get(k)!s:.60} now" for k in differing[:3])
            raise BadCall(
                f"{self.out} holds a matrix of other settings ({shown}); choose another --out, or the same settings"
            )
        write_text(file, json.dumps(now, indent=1) + "\n")

    @property
    def classes(self) -> list[str]:
        """The classes of all sources, in order."""
        return list(dict.fromkeys(c for d in self.sources.values() for c in d.classes.values()))

    def taught(self, members: Iterable[str]) -> list[str]:
        """The classes that every member annotates in its training split."""
        return [c for c in self.classes if all(self._annotates(m, c, "train") for m in members)]

    def model(self, row: str, seed: int) -> Path:
        """Where the model of a row stands."""
        return self.out / "models" / _file_name(row, seed)

    def train(self, members: Sequence[str], seed: int, train: Train) -> None:
        """The row of one combination: trained unless its model is there, then scored."""
        row, classes = "+".join(members), self.taught(members)
        model = self.model(row, seed)
        facts = model.with_name(model.name + ".json")

        def make() -> tuple[Predict, Mapping[str, Any]]:
            found = _read(facts)
            if found is None:
                dataset = Joined.of({m: self.sources[m] for m in members}, classes)
                self.said(f"{row}, seed {seed}: training on {len(dataset.split('train'))} images")
                began = time.perf_counter()
                found = {**train(dataset, model, seed), "seconds": time.perf_counter() - began}
                found["images"] = len(dataset.split("train"))
                write_text(facts, json.dumps(found, indent=1, default=str) + "\n")
            host, _ = open_model(str(model))
            return partial(host.predict, adapter=NAME, probabilities=True), found

        self.row(row, members, seed, make)

    def row(
        self, name: str, members: Sequence[str], seed: int, make: Callable[[], tuple[Predict, Mapping[str, Any]]]
    ) -> None:
        """Score one predictor of the classes that `members` teach on every source; `make` is called if a cell is missing."""
        classes = self.taught(members)
        made: tuple[Predict, Mapping[str, Any]] | str = ""
        for column, source in self.sources.items():
            file = self.out / "cells" / _file_name(name, seed, column)
            cell = _read(file)
            if cell is None or "failed" in cell:
                lacking = self._lacking(members, column)
                cell = {"train": name, "test": column, "seed": seed, "classes": lacking}
                if len(lacking) < len(self.classes):
                    made = made or _attempt(make)
                    found = made if isinstance(made, str) else _attempt(partial(_scored, *made, source, classes))
                    cell |= {"failed": found} if isinstance(found, str) else found
                    cell["classes"] = {**cell["classes"], **lacking}
                write_text(file, json.dumps(cell, indent=1) + "\n")
                self.said(f"{name} on {column}, seed {seed}: {_short(cell)}")
            self.cells[name, column, seed] = cell

    def _annotates(self, source: str, name: str, split: str) -> bool:
        dataset = self.sources[source]
        names = [dataset.classes[value] for value in sorted(dataset.classes)]
        if name not in names:
            return False
        return any(dataset.annotated(item)[names.index(name)] for item in dataset.split(split))

    def _lacking(self, members: Sequence[str], column: str) -> dict[str, Any]:
        """A sentence for every class that this cell cannot have."""
        found: dict[str, Any] = {}
        for c in self.classes:
            untaught = [m for m in members if not self._annotates(m, c, "train")]
            if untaught:
                found[c] = {"lacks": f"{' and '.join(untaught)} has no {c} to train on"}
            elif not self._annotates(column, c, "test"):
                found[c] = {"lacks": f"{column} has no {c} to test on"}
        return found


def _attempt(do: Callable[[], T]) -> T | str:
    """What `do` gives, or why it could not."""
    try:
        return do()
    except (Diverged, BadData) as why:
        return f"{type(why).__name__}: {why}"


def _scored(predict: Predict, facts: Mapping[str, Any], source: Dataset, classes: Sequence[str]) -> dict[str, Any]:
    began = time.perf_counter()
    found = score(predict, _narrowed(source, classes))
    return {**found, "model": dict(facts), "seconds": time.perf_counter() - began}


def _short(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return f"failed ({cell['failed']})"
    return f"Dice {cell['dice']:.3f}" if cell.get("dice") is not None else "nothing to score"


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none or it cannot be read (then it is made again)."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _file_name(row: str, seed: int, column: str | None = None) -> str:
    """Names may hold anything; a file's name may not."""
    parts = [row, str(seed)] + ([] if column is None else [column])
    name = ".".join(quote(part, safe="+").replace(".", "%2E") for part in parts)
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name if column is None else f"{name}.json"
