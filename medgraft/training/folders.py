"""Plain folders, without a `dataset.json`.

images/a.png  masks/a.png or a_mask.png          segmentation; also train/images + train/masks, val/..., test/...
images/a.nii.gz  masks/a.nii.gz or labels/...    segmentation of volumes, likewise
CLASS/a.png                                      classification
train/CLASS/a.png  [val/CLASS/...] [test/...]    classification with a split
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import BadData
from ..images import IMAGE_SUFFIXES, read_mask_values
from ..volumes import READ, label_values, volume_stem
from .items import SPLITS, Item
from .packs import UNSPLIT, Found, shorten

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MOST_VALUES = 32

_LAYOUTS = "wanted: dataset.json; or images/ and masks/; or CLASS/*.png; or train/CLASS/*.png"


def read_folder(root: Path) -> Found:
    """Find out which of the three layouts `root` has and read it. Raises `BadData` where it has none or breaks it."""
    folders = _subfolders(root)
    if not folders:
        found = f"{len(_pictures(root))} pictures and no folders" if _pictures(root) else "no pictures"
        raise BadData(f"{root} is not a data set: {found}; {_LAYOUTS}")
    named = {folder.name.lower(): folder for folder in folders}
    splits = {_SPLIT_FOLDERS[name]: folder for name, folder in named.items() if name in _SPLIT_FOLDERS}
    if "images" in named or "masks" in named:
        return _with_classes(root, _pairs(root, root, UNSPLIT))
    if "train" not in splits:
        return _classification(root, {UNSPLIT: root})
    splits = {split: splits[split] for split in SPLITS if split in splits}
    if any((folder / "images").is_dir() or (folder / "masks").is_dir() for folder in splits.values()):
        return _with_classes(root, [item for split, folder in splits.items() for item in _pairs(root, folder, split)])
    return _classification(root, splits)


def _pairs(root: Path, folder: Path, split: str) -> list[Item]:
    """Images of `folder/images` with their masks of `folder/masks` (or `labels`), matched by stem."""
    drawn = "labels" if (folder / "labels").is_dir() and not (folder / "masks").is_dir() else "masks"
    images, masks = _by_stem(folder / "images"), _by_stem(folder / drawn, drop="_mask")
    alone = [path.name for stem, path in images.items() if stem not in masks]
    if alone:
        raise BadData(
            f"{folder} has {len(alone)} of {len(images)} images without a mask of the same name in masks/ "
            f"('_mask' may follow): {shorten(alone)}"
        )
    orphans = [path.name for stem, path in masks.items() if stem not in images]
    if orphans:
        raise BadData(f"{folder} has {len(orphans)} masks without an image of the same name: {shorten(orphans)}")
    before = f"{folder.name}/" if folder != root else ""
    return [
        Item(id=before + stem, split=split, image=path, masks={"mask": masks[stem]}) for stem, path in images.items()
    ]


def _with_classes(root: Path, items: list[Item]) -> Found:
    """Name the classes after the values that the masks hold: "foreground" where binary, else class_1, class_2, ..."""
    of_volumes = {is_volume(path) for item in items for path in (item.image, item.masks["mask"]) if path is not None}
    if len(of_volumes) > 1:
        raise BadData(f"{root} holds pictures and volumes; keep them in two folders")
    dims = 3 if of_volumes == {True} else 2
    values: set[int] = set()
    for item in items:
        mask = item.masks["mask"]
        values |= set(label_values(mask)) if dims == 3 else {int(v) for v in np.unique(read_mask_values(mask))}
        if len(values) > _MOST_VALUES or min(values) < 0 or max(values) > 65535:
            raise BadData(
                f"the masks of {root} hold {len(values)} different values by {item.masks['mask'].name} "
                f"({shorten([str(v) for v in sorted(values)])}); that is no map of classes: was it resampled smoothly, "
                f"or does it number instances?"
            )
    foreground = sorted(values - {0})
    if not foreground:
        raise BadData(f"all {len(items)} masks of {root} are empty; there is nothing to learn")
    if dims == 2 and foreground in ([1], [255], [65535]):
        return Found(root.name, items, {"mask": {1: "foreground"}})
    if foreground[-1] > 255:
        raise BadData(f"the masks of {root} use the value {foreground[-1]}; save them with 8 bits, values 0..255")
    binary = foreground in ([1], [255])
    named = {value: "foreground" if binary else f"class_{n}" for n, value in enumerate(foreground, start=1)}
    return Found(root.name, items, {"mask": named}, dims=dims)


def _classification(root: Path, splits: dict[str, Path]) -> Found:
    names = sorted({folder.name for place in splits.values() for folder in _subfolders(place)})
    if len(names) < 2:
        raise BadData(f"{root} is not a data set: {len(names)} class folder ({shorten(names)}); {_LAYOUTS}")
    items = []
    for split, place in splits.items():
        for label, name in enumerate(names):
            pictures = _pictures(place / name) if (place / name).is_dir() else []
            if not pictures and split in ("train", UNSPLIT):
                raise BadData(f"class folder {place / name} has no images, so there is no training item of {name!r}")
            ids = [path.relative_to(root).with_suffix("").as_posix() for path in pictures]
            items += [Item(id=i, split=split, image=path, label=label) for i, path in zip(ids, pictures, strict=True)]
    need_unique(root, (item.id for item in items))
    return Found(root.name, items, {}, tuple(names))


def need_unique(root: Path, names: Iterable[str]) -> None:
    """Raise `BadData` naming what occurs twice, such as a.png beside a.jpg."""
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise BadData(f"{root} has several files under the same name: {shorten(twice)}; keep one of each")


def _by_stem(folder: Path, drop: str = "") -> dict[str, Path]:
    if not folder.is_dir():
        raise BadData(f"{folder.parent} has no folder {folder.name}/; {_LAYOUTS}")
    files = _pictures(folder) + sorted(path for path in folder.iterdir() if is_volume(path))
    if not files:
        raise BadData(
            f"{folder} holds no pictures and no volumes; a picture ends in {', '.join(IMAGE_SUFFIXES)}, a volume in "
            f"{', '.join(READ)}"
        )
    stems = [(volume_stem(path) if is_volume(path) else path.stem).removesuffix(drop) for path in files]
    need_unique(folder, stems)
    return dict(zip(stems, files, strict=True))


def is_volume(path: Path) -> bool:
    """Whether a file's name is that of a volume."""
    return path.name.lower().endswith(READ) and not path.name.startswith(".")


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
