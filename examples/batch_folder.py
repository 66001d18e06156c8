"""Masks for a folder of images.

    python examples/batch_folder.py medgraft:starter-vit runs/polyp images/ masks/

Each mask has its image's size and the label map of the adapter, as an 8-bit PNG of the same stem. An image that cannot be read is
reported and left out; the exit status is then 1.
"""

import sys
from pathlib import Path

from PIL import Image

import medgraft


def masks(backbone: str, adapter: str, images: Path, out: Path) -> tuple[int, list[str]]:
    """Write one mask for each file of `images`; return how many, and what could not be read."""
    host = medgraft.Host(medgraft.load_backbone(backbone))
    host.add(medgraft.load_adapter(adapter), "it")
    out.mkdir(parents=True, exist_ok=True)
    done, failed = 0, []
    for image in sorted(p for p in images.iterdir() if p.is_file()):
        try:
            mask = host.predict(image, "it")
        except medgraft.MedgraftError as unreadable:
            failed.append(str(unreadable))
            continue
        Image.fromarray(mask).save(out / f"{image.stem}.png")
        done += 1
    return done, failed


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    done, failed = masks(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    print(f"{done} masks -> {sys.argv[4]}")
    sys.exit("\n".join(failed) or None)
