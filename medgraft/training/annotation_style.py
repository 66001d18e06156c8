"""How a source draws its masks: rough or smooth outlines, large or small pieces, many or few. Which sources draw alike.

Three numbers for each image and class, over the images that show the class:

    roughness  r = 1 - L(smooth(M)) / L(M)      L: pixel edges between inside and outside; smooth: Gaussian blur of
                                                deviation 0.4 % of sqrt(H W) (2 pixels at 512), cut at 1/2
    size       median over the pieces (8-connected) of their area, in ten-thousandths of the picture
    pieces     how many there are

r is the share of the outline that a slight smoothing removes: about 0 for a disc or a coarse polygon at any size and
angle (the staircase of a slanted line is in both lengths), towards 1 for fine detail. Two sources a, b are as far
apart as their means of r, log size and log pieces, each in pooled deviations over images, averaged over the three and
over the classes that both drew:

    d(a, b) = mean |mean_a - mean_b| / max(s, floor)      s^2 = (var_a + var_b) / 2

(Cohen's d, averaged.) The floor (0.02 of r, 0.1 of a logarithm) keeps noiseless sets at finite distance. Sources
nearer than 1, directly or through others, form a group. The numbers follow what was drawn, so the field of view and the
resolution of a source are in them too: they say which sets look alike to a loss, not why.

After: Cross-dataset generalization for retinal lesions segmentation (arXiv 2405.08329), which tells coarse from fine
annotation by eye; the measures are ours. M a mask (H, W), L a length in pixel edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

from ..errors import BadCall
from .items import Dataset

SMOOTH = 0.004  # of the side of the picture
NEAR = 1.0
FLOOR = np.array([0.02, 0.1, 0.1])


def roughness(mask: np.ndarray) -> float:
    """r of a mask of booleans (H, W); NaN where it has no outline (empty, or the whole picture). Raises `BadCall`."""
    _need_mask(mask)
    length = _outline(mask)
    if not length:
        return float("nan")
    width = SMOOTH * sqrt(mask.size)
    reach = min(int(np.ceil(3 * width)), min(mask.shape) - 1)
    plane = torch.from_numpy(mask)[None].double()
    soft = tv.gaussian_blur(plane, [2 * reach + 1] * 2, [width] * 2)[0].numpy()
    return 1 - _outline(soft >= 0.5) / length


def piece_sizes(mask: np.ndarray) -> np.ndarray:
    """Pixels of each 8-connected piece of a mask of booleans (H, W), int64, ascending. Raises `BadCall`."""
    _need_mask(mask)
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(mask.sum())
    padded = np.pad(number, 1, constant_values=-1)
    inner = padded[1:-1, 1:-1]
    touching = (padded[1:-1, 2:], padded[2:, :-2], padded[2:, 1:-1], padded[2:, 2:])
    pairs = np.concatenate([np.stack([inner, other])[:, (inner >= 0) & (other >= 0)] for other in touching], 1)
    root = np.arange(mask.sum())
    while True:  # hang the larger root below the smaller, then shorten every path: a few rounds
        a, b = root[pairs]
        apart = a != b
        if not apart.any():
            return np.sort(np.unique(root, return_counts=True)[1])
        pairs, low, high = pairs[:, apart], np.minimum(a, b)[apart], np.maximum(a, b)[apart]
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]


def annotation_style(sources: Mapping[str, Dataset], *, split: str | None = "train") -> dict[str, Any]:
    """Describe the masks of each source, by class, and how far the sources lie apart.

    {"sources": {source: {class: {"images", "roughness", "size": {"median", "low", "high"}, "pieces"}}},
     "distances": {"a | b": d or None}, "groups": [[sources]]}

    `roughness` and `pieces` are means over the images that show the class, `size` median and quartiles over all pieces.
    A class that nobody drew on an image is left out there; distance is None without a class (twice two images) in common.
    """
    measured = {name: _measure(dataset, split) for name, dataset in sources.items()}
    names = list(measured)
    distances = {(a, b): _distance(measured[a], measured[b]) for i, a in enumerate(names) for b in names[i + 1 :]}
    group = {name: {name} for name in names}
    for (a, b), d in distances.items():
        if d is not None and d < NEAR and group[a] is not group[b]:
            joined = group[a] | group[b]
            group |= dict.fromkeys(joined, joined)
    return {
        "sources": {name: {c: _describe(*found) for c, found in classes.items()} for name, classes in measured.items()},
        "distances": {f"{a} | {b}": d for (a, b), d in distances.items()},
        "groups": [[n for n in names if n in g] for g in dict.fromkeys(frozenset(group[n]) for n in names)],
    }


Measured = tuple[list[tuple[float, float, float]], np.ndarray]  # (r, log size, log pieces) by image; all piece sizes


def _measure(dataset: Dataset, split: str | None) -> dict[str, Measured]:
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in dataset.classes.values()}
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for item in dataset.items if split is None else dataset.split(split):
        mask = dataset.mask(item)
        for (value, name), drawn in zip(sorted(dataset.classes.items()), dataset.annotated(item), strict=True):
            found = mask == value
            rough = roughness(found) if drawn else float("nan")
            if np.isnan(rough):
                continue
            sizes = piece_sizes(found) * (1e4 / mask.size)
            rows[name].append((rough, float(np.log(np.median(sizes))), float(np.log(len(sizes)))))
            pieces[name].append(sizes)
    return {name: (found, np.concatenate(pieces[name])) for name, found in rows.items() if found}


def _describe(rows: list[tuple[float, float, float]], sizes: np.ndarray) -> dict[str, Any]:
    low, middle, high = np.quantile(sizes, [0.25, 0.5, 0.75]).tolist()
    return {
        "images": len(rows),
        "roughness": float(np.mean([r for r, _, _ in rows])),
        "size": {"median": middle, "low": low, "high": high},
        "pieces": len(sizes) / len(rows),
    }


def _distance(a: Mapping[str, Measured], b: Mapping[str, Measured]) -> float | None:
    found = []
    for name in a.keys() & b.keys():
        x, y = np.array(a[name][0]), np.array(b[name][0])
        if min(len(x), len(y)) >= 2:
            spread = np.sqrt((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2)
            found.append(np.abs(x.mean(0) - y.mean(0)) / np.maximum(spread, FLOOR))
    return float(np.mean(found)) if found else None


def _outline(mask: np.ndarray) -> int:
    """Pixel edges between inside and outside; the border of the picture is none."""
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def _need_mask(mask: np.ndarray) -> None:
    if mask.dtype != bool or mask.ndim != 2 or 0 in mask.shape:
        raise BadCall(f"wanted a mask of booleans (H, W), got {mask.dtype} {mask.shape}; compare it with a class first")
