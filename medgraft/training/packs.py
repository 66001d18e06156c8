"""A pack: a folder with `dataset.json`. Read with suspicion, for it may have come from anywhere.

Top level: `items`; and optionally `name`, `dims` (2 or 3), `classes` and `classes_NAME` for the masks `mask` and
`mask_NAME` ({"0": "background", "1": ...}), `label_names`, `split` ({"train": [ids], ...}, unless items say theirs),
`labelled` (the classes that were annotated on every item that does not say its own).
Per item: `id`, `image` or `array` + `index`, `mask`, `mask_NAME`, `label` (index or name), `domain`, `group`,
`labelled` (classes that were annotated), `split`. Other keys are ignored. Where `labelled` speaks of one label set alone (not one
item names a class of another), it says nothing of the others, and their masks are whole.

File names are relative, with forward slashes, and stay inside the folder: an absolute name or `..` is refused (a
symbolic link is the owner's own doing, and is followed).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import BadData, unknown
from .items import SPLITS, Item

UNSPLIT = ""


class Found(NamedTuple):
    """What a folder holds, before a task is chosen; items without a split carry `UNSPLIT`."""

    name: str
    items: list[Item]
    label_sets: dict[str, dict[int, str]]
    label_names: tuple[str, ...] = ()
    dims: int = 2


def read_pack(root: Path) -> Found:
    """Read and check `root/dataset.json`. Raises `BadData` naming the item and the key that is wrong."""
    file = root / "dataset.json"
    try:
        pack = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as broken:
        raise BadData(f"{file} is not readable JSON: {broken}") from broken
    if not isinstance(pack, dict) or not isinstance(pack.get("items"), list):
        raise BadData(f"{file} must be an object with a list 'items'")
    if not pack["items"]:
        raise BadData(f"{file} lists no items")
    dims = pack.get("dims", 2)
    if dims not in (2, 3):
        raise BadData(f"{file}: dims must be 2 or 3, found {dims!r}")

    raw = [_identified(entry, n, file) for n, entry in enumerate(pack["items"])]
    twice = [name for name, count in Counter(entry["id"] for entry in raw).items() if count > 1]
    if twice:
        raise BadData(f"{file} has items with the same id: {shorten(twice)}; every id must be its own")
    splits = _splits(pack.get("split"), raw, file)
    label_names = _label_names(pack, raw, file)
    items = [
        _item({"labelled": pack.get("labelled"), **entry}, root, splits[entry["id"]], label_names) for entry in raw
    ]
    label_sets = {
        "mask" + key.removeprefix("classes"): _classes(value, key, file)
        for key, value in pack.items()
        if key == "classes" or key.startswith("classes_")
    }
    _need_known_labelled(items, label_sets, file)
    items = _whole_where_unsaid(items, label_sets)
    need_files(root, items)
    need_separate_groups(items, file)
    return Found(str(pack.get("name", root.name)), items, {k: v for k, v in label_sets.items() if v}, label_names, dims)


def need_files(root: Path, items: Iterable[Item]) -> None:
    """Raise `BadData` naming files that items ask for and that are not there."""
    wanted = {path for item in items for path in (item.image, item.array, *item.masks.values()) if path is not None}
    gone = sorted(str(path.relative_to(root)) for path in wanted if not path.is_file())
    if gone:
        raise BadData(f"{root} lacks {len(gone)} of {len(wanted)} files: {shorten(gone)}; copy them or drop the items")


def need_separate_groups(items: Iterable[Item], where: Path) -> None:
    """Raise `BadData` where one group (a patient) has items in the training split and in another."""
    seen: dict[str, set[str]] = {}
    for item in items:
        if item.group is not None:
            seen.setdefault(item.group, set()).add(item.split)
    leaking = [group for group, splits in seen.items() if "train" in splits and len(splits) > 1]
    if leaking:
        raise BadData(
            f"{where} has groups in the training split and in another: {shorten(leaking)}; results would be too good. "
            f"Keep a group in one split, or remove its 'group' keys if they do not name patients"
        )


def _need_known_labelled(items: Iterable[Item], label_sets: Mapping[str, Mapping[int, str]], where: Path) -> None:
    """A misspelt class in `labelled` would read as "not annotated"; refuse it."""
    known = {name for names in label_sets.values() for name in names.values()}
    for item in items:
        for name in item.labelled or ():
            if name not in known:
                raise BadData(f"{where}, item {item.id!r}, 'labelled': {unknown('class', name, known)}")


def _whole_where_unsaid(items: list[Item], label_sets: Mapping[str, Mapping[int, str]]) -> list[Item]:
    """Every class counts as annotated in label sets of which no `labelled` names one, while some name those of another."""
    said = {name for item in items for name in item.labelled or ()}
    unsaid = [set(names.values()) for names in label_sets.values() if not said.intersection(names.values())]
    if not said or not unsaid:
        return items
    more = tuple(sorted(set.union(*unsaid)))
    return [item if item.labelled is None else replace(item, labelled=item.labelled + more) for item in items]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first few names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _identified(entry: Any, n: int, file: Path) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not entry["id"]:
        raise BadData(f"{file}: item number {n} needs an 'id' that is a string, found {str(entry)[:80]}")
    return entry


def _item(entry: Mapping[str, Any], root: Path, split: str, label_names: tuple[str, ...]) -> Item:
    def wrong(key: str, wanted: str) -> BadData:
        return BadData(f"{root / 'dataset.json'}, item {entry['id']!r}: {key!r} must be {wanted}, found {entry[key]!r}")

    def path(key: str) -> Path | None:
        name = entry.get(key)
        if name is None:
            return None
        if not isinstance(name, str) or not name:
            raise wrong(key, "a file name")
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
            raise wrong(key, "a name inside the folder (relative, without '..')")
        return root / name

    def text(key: str) -> str | None:
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise wrong(key, "a string")
        return entry.get(key)

    index, labelled = entry.get("index"), entry.get("labelled")
    if index is not None and (type(index) is not int or index < 0):
        raise wrong("index", "a row number")
    if labelled is not None and not (isinstance(labelled, list) and all(isinstance(name, str) for name in labelled)):
        raise wrong("labelled", "a list of class names")
    image, array = path("image"), path("array")
    if (image is None) == (array is None) or (array is None) != (index is None):
        raise BadData(f"{root / 'dataset.json'}, item {entry['id']!r}: needs either 'image', or 'array' and 'index'")
    masks = {key: file for key in entry if key == "mask" or key.startswith("mask_") if (file := path(key)) is not None}
    return Item(
        id=entry["id"],
        split=split,
        image=image,
        masks=masks,
        label=_label(entry, label_names, wrong("label", f"an index or name of {list(label_names) or 'label_names'}"))
        if entry.get("label") is not None
        else None,
        domain=text("domain"),
        group=text("group"),
        labelled=None if labelled is None else tuple(labelled),
        array=array,
        index=index,
    )


def _label(entry: Mapping[str, Any], names: tuple[str, ...], refusal: BadData) -> int:
    label = entry["label"]
    if isinstance(label, str) and label in names:
        return names.index(label)
    if type(label) is not int or not 0 <= label < len(names):
        raise refusal
    return label


def _label_names(pack: Mapping[str, Any], raw: list[dict[str, Any]], file: Path) -> tuple[str, ...]:
    """As declared, else the names that items use, else class_0, class_1, ... up to the largest index."""
    declared = pack.get("label_names")
    if declared is not None:
        if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
            raise BadData(f"{file}: label_names must be a list of strings, found {str(declared)[:80]}")
        if len(set(declared)) < len(declared):
            raise BadData(f"{file}: label_names has a name twice: {declared}")
        return tuple(declared)
    used = {entry["label"] for entry in raw if type(entry.get("label")) in (str, int)}
    if not used:
        return ()
    if all(isinstance(label, str) for label in used):
        return tuple(sorted(used))
    numbers = [label for label in used if isinstance(label, int)]
    if len(numbers) < len(used) or min(numbers) < 0 or max(numbers) >= 1000:
        raise BadData(f"{file}: labels are {shorten([str(u) for u in used])}; use names, or indices with label_names")
    return tuple(f"class_{n}" for n in range(max(numbers) + 1))


def _classes(declared: Any, key: str, file: Path) -> dict[int, str]:
    if not isinstance(declared, dict):
        raise BadData(f"{file}: {key} must be an object like {{'0': 'background', '1': 'polyp'}}, found {declared!r}")
    classes: dict[int, str] = {}
    for value, name in declared.items():
        if not (value.isascii() and value.isdigit() and int(value) <= 255) or not isinstance(name, str) or not name:
            raise BadData(f"{file}: {key} maps mask values 0..255 to names, found {value!r}: {name!r}")
        classes[int(value)] = name
    if len(set(classes.values())) < len(declared):
        raise BadData(f"{file}: {key} has a name or a value twice: {declared}")
    return classes


def _splits(declared: Any, raw: list[dict[str, Any]], file: Path) -> dict[str, str]:
    """Each id's split: from the items, else from the top-level object, else `UNSPLIT` for all."""
    said = {entry["id"]: entry["split"] for entry in raw if entry.get("split") is not None}
    if not said and isinstance(declared, dict):
        said = {name: split for split, names in declared.items() if isinstance(names, list) for name in map(str, names)}
    if not said:
        return {entry["id"]: UNSPLIT for entry in raw}
    for split in said.values():
        if split not in SPLITS:
            raise BadData(f"{file}: {unknown('split', str(split), SPLITS)}")
    without = [entry["id"] for entry in raw if entry["id"] not in said]
    if without:
        raise BadData(f"{file}: some items have a split and these have none: {shorten(without)}; give all or none")
    return said
