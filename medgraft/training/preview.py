"""The picture on an adapter's card: what it does to drawn images. Nobody's images leave with an adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..adapters import Host
from ..adapters.card import phantom_preview as marked
from .phantoms import preview
from .prompting import boxes_of
from .report import overlay_png

SIDE, COLOURS = 144, 32


def phantom_preview(host: Host, name: str, *, count: int = 3) -> bytes:
    """A PNG of `count` phantoms side by side with the adapter's masks over them, marked as drawn on phantoms.

    An adapter that takes prompts is asked by a box for the largest object; of sub-groups it is told none.
    """
    adapter = host.adapters[name]
    task, prompted = adapter.task, any(r.takes_prompts for r in adapter.readouts)
    classes = dict(zip(task.values, task.classes, strict=True))
    tiles = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tile.png"
        for seed in range(count):
            drawn = preview(seed)
            asked = {"boxes": boxes_of(_largest(drawn.instance))} if prompted else None
            found = host.on(drawn.image).predict(name, prompts=asked, by_default=True)
            overlay_png(drawn.image, found, None, file, classes)
            with Image.open(file) as tile:
                small = tile.convert("RGB")
                small.thumbnail((SIDE, 2 * SIDE))
                tiles.append(np.asarray(small))
        height = min(t.shape[0] for t in tiles)
        whole = Image.fromarray(np.concatenate([t[:height] for t in tiles], 1))
        whole.quantize(COLOURS).save(file, optimize=True)  # a picture must not outweigh the adapter
        return marked(file.read_bytes())


def _largest(instance: np.ndarray) -> np.ndarray:
    """The mask of the largest object (H, W); the whole picture where there is none."""
    sizes = np.bincount(instance.ravel())[1:]
    return instance == (1 + sizes.argmax()) if sizes.any() else np.ones_like(instance, bool)
