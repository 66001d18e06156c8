"""Small packs of volumes on disk."""

import json
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (10, 12, 9)


def volume(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def labels(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A box of class 1 beside one of class 2, not in the outermost slices."""
    found = np.zeros(shape, np.uint8)
    a = 2 + seed % 2
    found[a : a + 3, 3:9, 2:-3] = 1
    found[a + 3 : a + 5, 3:9, 3:-2] = 2
    return found


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def volume_pack(
    root: Path, splits: tuple[str, ...] = ("train", "train", "test", "test"), suffix: str = "nii.gz"
) -> Path:
    """A pack of volumes v0, v1, ... that show their labels."""
    items = []
    for n, split in enumerate(splits):
        y = labels(n)
        write(root / f"images/v{n}.{suffix}", volume(n) // 4 + 400 * y.astype(np.int16))
        write(root / f"labels/v{n}.{suffix}", y)
        items.append({"id": f"v{n}", "image": f"images/v{n}.{suffix}", "mask": f"labels/v{n}.{suffix}", "split": split})
    facts = {"name": "boxes", "dims": 3, "classes": {"0": "background", "1": "front", "2": "back"}, "items": items}
    (root / "dataset.json").write_text(json.dumps(facts))
    return root
