"""Small data sets on disk, for the tests of reading, choosing and batching."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def blocks(*values: int) -> np.ndarray:
    """A 20 x 24 mask with a row of blocks of these values."""
    mask = np.zeros((20, 24), np.uint8)
    for n, value in enumerate(values):
        mask[4:12, 4 * n : 4 * n + 4] = value
    return mask


def entry(n: int, **more: Any) -> dict[str, Any]:
    return {"id": f"i{n}", "image": f"images/i{n}.png", "mask": f"masks/i{n}.png", "split": "train", **more}


def pack(root: Path, items: list[dict[str, Any]], masks: list[np.ndarray], **top: Any) -> Path:
    """A pack on disk; every entry gets its image, and a mask from `masks` (cycled)."""
    for n, item in enumerate(items):
        if isinstance(item.get("image"), str) and ".." not in item["image"]:
            save(root / item["image"].lstrip("/"), picture(n))
        if "mask" in item:
            save(root / item["mask"], masks[n % len(masks)])
    top = {"classes": {"0": "background", "1": "cytoplasm", "2": "nucleus"}, **top}
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({"name": "toy", **top, "items": items}))
    return root


def shots_pack(root: Path) -> Path:
    """Twelve training items: most show class 1, one shows class 2, two show nothing; three test items."""
    masks = [blocks(1)] * 9 + [blocks(0, 2), blocks(), blocks()]
    items = [entry(n) for n in range(12)] + [entry(n, split="test") for n in range(12, 15)]
    return pack(root, items, masks)
