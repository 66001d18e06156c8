"""Predictions for volume files: label volumes that overlay exactly on their images, and slices to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import Adapter, Host
from ..adapters.sliding import predict_volume
from ..adapters.volume_task import VolumePreprocessing
from ..errors import BadCall
from ..volumes import read_volume, volume_stem, write_volume
from .model import NAME
from .transduce import priors_of, transduce
from .volume_report import slices_png


def takes_volumes(adapter: Adapter, prompts: Mapping[str, Any] | None) -> bool:
    """Whether `adapter` was trained on volumes. Raises BadCall where it was and is given prompts."""
    found = isinstance(adapter.preprocessing, VolumePreprocessing)
    if found and prompts:
        raise BadCall(f"this adapter of volumes takes no prompts ({', '.join(prompts)}); leave them away")
    return found


def predict_volume_files(
    host: Host, volumes: Sequence[Path], out: Path, *, frame: int | None = None, batch: int = 1, fitting: int = 0
) -> Iterator[str]:
    """Write STEM.nii.gz, on the grid of its image, and STEM_slices.png for each volume into `out`; yields a line for each.

    With `fitting` the adapter is first fitted to each volume by itself, for so many steps of `transduce`.
    Every volume is read before anything is written. Raises BadData for one that cannot be read, BadCall for two of one stem and
    for a folder in which a label would take its image's place.
    """
    stems = [volume_stem(path) for path in volumes]
    if twice := sorted({s for s in stems if stems.count(s) > 1}):
        raise BadCall(
            f"several volumes are called {', '.join(twice)}: their labels would overwrite one another; predict them one folder at a time"
        )
    targets = [out / f"{s}.nii.gz" for s in stems]
    for path, target in zip(volumes, targets, strict=True):
        if target.exists() and path.resolve() == target.resolve():
            raise BadCall(f"the label of {path} would take its place; choose another folder with --out")
        read_volume(path, frame=frame)
    if fitting:
        priors_of(host.adapters[NAME])
    out.mkdir(parents=True, exist_ok=True)
    task = host.adapters[NAME].task
    classes = dict(zip(task.values, task.classes, strict=True))
    for path, target in zip(volumes, targets, strict=True):
        volume = read_volume(path, frame=frame)
        if fitting:
            labels = transduce(host, volume, NAME, steps=fitting)
        else:
            labels = predict_volume(host, volume, [NAME], batch=batch)[0]
        write_volume(target, volume.on_this_grid(labels))
        slices_png(volume, labels, None, out / f"{volume_stem(path)}_slices.png", classes)
        millilitres = volume.voxel_volume / 1000
        sizes = ", ".join(f"{name} {(labels == value).sum() * millilitres:.3g} ml" for value, name in classes.items())
        yield f"{target}: {sizes}"
