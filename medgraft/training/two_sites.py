"""A phantom of two sites, to see the shortcut of partial labels and its cure: what a picture shows is the same, its look is not.

Each picture holds one `body` (an ellipse) and one `satellite` (a smaller one, as bright) on a smooth background. `cue` is how
differently site_b looks: diagonal stripes and another tint, each in proportion; 0 is one site under two names. Of the two the
stripes matter: a network with instance norm hardly sees a tint. Shapes, places and both masks are drawn alike for both sites, and
both masks are complete: hide a class of a site in training (`hide_labels`), and the test truth is still there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BadCall

SITES = ("site_a", "site_b")
CLASSES = {"0": "background", "1": "body", "2": "satellite"}
_STREAM = 404  # first word of every seed: never the numbers of another phantom


def write_two_sites(folder: Path, *, train: int, test: int, size: int = 64, cue: float = 1.0, seed: int = 0) -> Path:
    """Draw `train` and `test` pictures of each site into `folder`; return the path of its `dataset.json`.

    Raises `BadCall` for a cue outside [0, 1], no training picture, or pictures below 32 pixels a side.
    """
    if not 0 <= cue <= 1 or train < 1 or test < 0 or size < 32:
        raise BadCall(
            f"need cue in [0, 1], train >= 1, test >= 0 and size >= 32, got {cue=}, {train=}, {test=}, {size=}"
        )
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    items = []
    for site, domain in enumerate(SITES):
        for split, first, count in (("train", 0, train), ("test", 1_000_000, test)):
            for number in range(first, first + count):
                image, mask = _picture(np.random.default_rng([_STREAM, seed, site, number]), size, cue * site)
                name = f"{domain}_{split}_{number % 1_000_000:04d}"
                Image.fromarray(image).save(folder / "images" / f"{name}.png")
                Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
                files = {"image": f"images/{name}.png", "mask": f"masks/{name}.png"}
                items.append({"id": name, **files, "domain": domain, "split": split})
    facts = {"name": "two_sites", "dims": 2, "classes": CLASSES, "cue": cue, "seed": seed, "items": items}
    path = folder / "dataset.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def _picture(rng: np.random.Generator, size: int, cue: float) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (S, S, 3) and its mask (S, S)."""
    body_at = rng.uniform(0.3, 0.7, 2)
    turn = rng.uniform(0, 2 * np.pi)
    satellite_at = body_at + 0.34 * np.array([np.sin(turn), np.cos(turn)])
    mask = np.zeros((size, size), np.uint8)
    mask[_ellipse(rng, size, satellite_at, 0.08, 0.12)] = 2
    mask[_ellipse(rng, size, body_at, 0.14, 0.2)] = 1
    rows, columns = np.mgrid[:size, :size] / size
    slope = rng.uniform(-0.12, 0.12, 2)
    light = 0.35 + slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5)
    stripes = np.sin(2 * np.pi * (rows + columns) * size / 6 + rng.uniform(0, 2 * np.pi))
    grey = light + 0.25 * (mask > 0) + rng.normal(0, 0.02, mask.shape) + 0.2 * cue * stripes
    colour = (1 - cue) * np.array([1.0, 0.85, 0.9]) + cue * np.array([0.7, 0.95, 1.05])
    return (255 * np.clip(grey[..., None] * colour, 0, 1)).round().astype(np.uint8), mask


def _ellipse(rng: np.random.Generator, size: int, at: np.ndarray, low: float, high: float) -> np.ndarray:
    """bool (S, S): half axes between `low` and `high` of the side, turned at random."""
    half, turn = rng.uniform(low, high, 2), rng.uniform(0, np.pi)
    rows, columns = np.mgrid[:size, :size] / size
    dy, dx = rows - at[0], columns - at[1]
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    return (u / half[0]) ** 2 + (v / half[1]) ** 2 < 1
