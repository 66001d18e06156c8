"""What is seen of segmented volumes: three orthogonal slices with contours, Dice by case, a table by organ.

Slices are shown as in a viewer (the patient's right on the left, superior or anterior up), at one scale of millimetres whatever the
spacing. Contours need Pillow alone; the plot needs matplotlib (the extra "plots").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..adapters.files import write_text
from ..errors import BadCall, need
from ..images import save_picture
from ..volumes import Volume
from ..voxels import scaled, turned
from .items import Dataset, Item
from .report import colour_of, edge, with_legend
from .volume_data import Volumes

SHOWN = ("percentiles", 0.5, 99.5)
LONGEST, GAP = 384, 4  # pixels: the volume's longest side, and between slices


def slices_png(
    volume: Volume, labels: np.ndarray, truth: np.ndarray | None, path: str | Path, classes: Mapping[int, str]
) -> None:
    """Save the sagittal, coronal and axial slice of `volume` with the contours of `labels` (X, Y, Z), and of `truth` in lighter lines.

    Each slice is the one with most of what is labelled (in `truth`, where there is one). `classes` names the values. Raises
    `BadCall` for shapes that do not fit, `SaveFailed` where the file cannot be written.
    """
    drawn = [labels] if truth is None else [labels, truth]
    for values in drawn:
        if values.shape != volume.shape:
            raise BadCall(f"labels of the shape {values.shape} cannot be drawn over a volume of {volume.shape}")
    there = turned(volume, "RAS")
    lines = [turned(volume.on_this_grid(values), "RAS").values for values in drawn]
    grey = (scaled(there.values, SHOWN) * 255).astype(np.uint8)
    present = [v for v in sorted(classes) if v != 0 and any((values == v).any() for values in drawn)]
    planes = [_plane(grey, lines, axis, there.spacing, present) for axis in range(3)]
    width = sum(p.shape[1] for p in planes) + GAP * (len(planes) - 1)
    canvas = np.zeros((max(p.shape[0] for p in planes), width, 3), np.uint8)
    x = 0
    for plane in planes:
        canvas[: plane.shape[0], x : x + plane.shape[1]] = plane
        x += plane.shape[1] + GAP
    note = "" if truth is None else "(light lines: truth)"
    save_picture(with_legend(Image.fromarray(canvas), present, classes, note), path)


def case_pictures(dataset: Dataset, folder: Path) -> Callable[[Item, np.ndarray], None]:
    """For `evaluate(each=...)`: saves ID_slices.png of every item of a data set of volumes. Raises BadCall for pictures."""
    if not isinstance(dataset, Volumes):
        raise BadCall(f"--pictures draws volumes, {dataset.name!r} is read as pictures; medgraft predict draws those")
    folder.mkdir(parents=True, exist_ok=True)

    def draw(item: Item, found: np.ndarray) -> None:
        file = folder / f"{item.id.replace('/', '_')}_slices.png"
        slices_png(dataset.volume(item), found, dataset.mask(item), file, dataset.classes)

    return draw


def write_summary(result: Mapping[str, Any], folder: Path) -> None:
    """Write dice.png (see `cases_png`) and organs.md (see `organ_table`) of a result of `evaluate` on volumes."""
    cases_png(result, folder / "dice.png")
    write_text(folder / "organs.md", "\n".join(organ_table(result)) + "\n")


def _plane(
    grey: np.ndarray, lines: Sequence[np.ndarray], axis: int, spacing: Sequence[float], present: Sequence[int]
) -> np.ndarray:
    """One slice across `axis` of RAS+, uint8 (H, W, 3), with square pixels."""
    labelled = np.count_nonzero(lines[-1], tuple(a for a in range(3) if a != axis))
    z = int(labelled.argmax()) if labelled.any() else grey.shape[axis] // 2
    across, up = (s for a, s in enumerate(spacing) if a != axis)
    rows, columns = (n for a, n in reversed(list(enumerate(grey.shape))) if a != axis)
    longest = max(n * s for n, s in zip(grey.shape, spacing, strict=True))
    scale = LONGEST / longest  # pixels a millimetre, in every slice
    size = (max(1, round(columns * across * scale)), max(1, round(rows * up * scale)))

    def shown(values: np.ndarray, how: Image.Resampling) -> np.ndarray:
        seen = np.ascontiguousarray(np.take(values, z, axis).T[::-1, ::-1])
        return np.asarray(Image.fromarray(seen).resize(size, how))

    picture = np.repeat(shown(grey, Image.Resampling.BICUBIC)[..., None], 3, 2)
    large = [shown(values.astype(np.uint8), Image.Resampling.NEAREST) for values in lines]
    for value in present:
        if len(large) > 1:
            picture[edge(large[1] == value, 3)] = np.array(colour_of(value)) * 0.5 + 127.5
        picture[edge(large[0] == value, 2)] = colour_of(value)
    return picture


def cases_png(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw the Dice of every case, a colour a class, worst case on the left; `result` is that of `evaluate`.

    Raises `MissingExtra` without matplotlib, `BadCall` for a result without cases.
    """
    need("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [(case["id"], {c: d for c, d in case["dice"].items() if d is not None}) for case in result["per_image"]]
    cases = sorted(((name, found) for name, found in cases if found), key=lambda c: sum(c[1].values()) / len(c[1]))
    if not cases:
        raise BadCall("there is no case with a score to draw; evaluate a split whose items have labels")
    figure = Figure(figsize=(max(4.0, 1.5 + 0.3 * len(cases)), 3.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for k, name in enumerate(result["classes"]):
        rgb = [channel / 255 for channel in colour_of(k + 1)]
        points = [(x, found[name]) for x, (_, found) in enumerate(cases) if name in found]
        axes.plot(*zip(*points, strict=True), "o", color=rgb, label=name, markersize=4) if points else None
    axes.plot([sum(f.values()) / len(f) for _, f in cases], color="0.4", linewidth=1, label="mean")
    axes.set_xticks(range(len(cases)), [name for name, _ in cases], rotation=60, ha="right", fontsize=7)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("Dice")
    axes.grid(True, axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=math.ceil((len(result["classes"]) + 1) / 6))
    canvas.draw()
    save_picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def organ_table(result: Mapping[str, Any]) -> list[str]:
    """Markdown lines: each class with its mean Dice, the 95 % interval over cases, and how many cases show it."""
    lines = ["| organ | Dice | 95 % interval | cases |", "|---|---|---|---|"]
    for name, said in result["classes"].items():
        lines.append(f"| {name} | {_number(said['mean'])} | {_interval(said['interval'])} | {said['images']} |")
    return [*lines, f"| **mean** | {_number(result['dice'])} | {_interval(result['interval'])} | {result['n']} |"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: Sequence[float | None]) -> str:
    return "-" if None in bounds else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
