"""Reading and writing pictures: an image is always uint8 (H, W, 3), a mask always uint8 (H, W).

How a pixel becomes 8 bits of RGB:

    grey 1 or 8 bits        repeated to three channels (1 bit: 0 and 255)
    palette, CMYK, YCbCr    converted to RGB
    alpha                   composited over black (an opaque image is unchanged)
    16 or 32 bits, float    (x - p0.1) / (p99.9 - p0.1) of this image, clipped to 0..255; a constant image is 0
    RGB with 16 bits        the high byte (Pillow reads no more)
    EXIF orientation        applied, so that what is read is what a viewer shows

H height, W width, in pixels. Whatever cannot be read so is `BadData`, naming the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import BadCall, BadData, MedgraftError, SaveFailed

SMALLEST_SIDE = 8
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".dcm")

_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_ON = (1, 255, 65535)  # what drawing programs write for "foreground"
_LOSSY = ("JPEG", "MPO")
# what Pillow's decoders raise on damaged files: they do not keep to OSError
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, ArithmeticError, struct.error)
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3) RGB; the rules stand at the top of the file.

    Raises `BadData` where the file is missing, empty, truncated, no image, several frames, beyond Pillow's pixel
    limit, a volume, not finite, or has a side below 8 pixels.
    """
    with _opened(path) as picture:
        height, width = picture.height, picture.width
        if min(height, width) < SMALLEST_SIDE:
            raise BadData(
                f"image {path} is {height} x {width} pixels (height x width); each side needs at least "
                f"{SMALLEST_SIDE}; check that the export wrote the whole picture, or leave it out"
            )
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in _DEEP:
            grey = _eight_bits(np.asarray(picture), path)
            return np.repeat(grey[..., None], 3, axis=2)
        if picture.has_transparency_data:
            seen = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen)
        return np.array(picture.convert("RGB"), dtype=np.uint8)


def image_size(path: str | Path) -> tuple[int, int]:
    """The (H, W) that `read_image` will return, from the header alone; `BadData` where there is none to read."""
    with _opened(path) as picture:
        turned = picture.getexif().get(_EXIF_ORIENTATION) in _TURNED
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def read_mask(path: str | Path, classes: Mapping[int, str], size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a mask as uint8 (H, W) holding 0 and the keys of `classes` (0 is background, named there or not).

    With one foreground class the mask may use 1, 255 or 65535 for it, and may be a JPEG (cut at 128). Palette masks
    are read by index. Three channels are accepted where they are equal. `size` = (H, W) of the image, checked.

    Raises `BadData` for an unreadable file, another size, colours, half-transparency and undeclared values.
    """
    values = read_mask_values(path)
    if size is not None and values.shape != tuple(size):
        raise BadData(
            f"mask {path} is {values.shape[0]} x {values.shape[1]} pixels (height x width), its image "
            f"{size[0]} x {size[1]}; export both at one size, masks with nearest-neighbour resampling"
        )
    foreground = [value for value in classes if value != 0]
    found = np.unique(values)
    strange = [int(v) for v in found if v != 0 and int(v) not in foreground]
    if len(foreground) == 1 and len(strange) == 1 and strange[0] in _ON and len(found[found != 0]) == 1:
        return np.where(values != 0, foreground[0], 0).astype(np.uint8)
    if strange:
        shown = ", ".join(map(str, strange[:12])) + (f", and {len(strange) - 12} more" if len(strange) > 12 else "")
        declared = ", ".join(f"{v} = {classes[v]}" for v in sorted(foreground)) or "none"
        raise BadData(
            f"mask {path} has values that no class declares: {shown}; declared: {declared} (0 is background). "
            f"Declare them under 'classes' in dataset.json, or rewrite the mask with class indices as a PNG"
        )
    return values.astype(np.uint8)


def read_mask_values(path: str | Path) -> np.ndarray:
    """The raw values of a mask file as an integer array (H, W), before any class is known; see `read_mask`."""
    with _opened(path) as opened:
        lossy = opened.format in _LOSSY
        picture = ImageOps.exif_transpose(opened)
        values = np.array(picture)
        mode = picture.mode
    if values.dtype == bool:
        return values.astype(np.uint8)
    if mode in ("LA", "RGBA", "PA"):
        if (values[..., -1] != 255).any():
            raise BadData(f"mask {path} is partly transparent ({mode}); flatten it to one channel of class indices")
        values = values[..., :-1]
    elif values.ndim == 3 and mode != "RGB":
        raise BadData(f"mask {path} has colour mode {mode}; save it as one channel of class indices (PNG)")
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise BadData(
                f"mask {path} is a colour picture (its channels differ); save class indices 0, 1, 2, ... in one "
                f"channel or as a palette PNG"
            )
        values = values[..., 0]
    if values.dtype.kind == "f":
        whole = np.isfinite(values).all() and (values == np.round(values)).all() and np.abs(values).max() < 2**31
        if not whole:
            raise BadData(f"mask {path} holds fractions, not class indices; threshold it and save it as a PNG")
        values = values.astype(np.int64)
    return _cut_lossy(values, path) if lossy else values


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write a boolean or integer mask (H, W) with values 0..255 as a lossless PNG of one channel.

    Raises `BadCall` for another shape, type, range or suffix, `SaveFailed` where the file system refuses.
    """
    path, mask = Path(path), np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "bui":
        raise BadCall(f"a mask is a boolean or integer array (H, W), got {mask.dtype} of shape {mask.shape}")
    if mask.dtype.kind != "b" and (mask.min() < 0 or mask.max() > 255):
        raise BadCall(f"mask values run from {mask.min()} to {mask.max()}; a PNG mask holds 0..255")
    if path.suffix.lower() != ".png":
        raise BadCall(f"masks are written as .png (lossless), got {path.name!r}")
    save_picture(Image.fromarray(mask.astype(np.uint8)), path)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Save as PNG under a temporary name, then move into place; `SaveFailed` leaves what stood there."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}.png")
    try:
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as refused:
        raise SaveFailed(f"could not write {path}: {refused}; check that the folder exists and has room") from refused
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's picture for `path`, decoded on demand; every way to fail becomes `BadData` naming the file."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise BadData(f"no image file at {path}: found {found} there; check the name and its suffix")
    if path.name.lower().endswith(VOLUME_SUFFIXES):
        raise BadData(
            f"{path} is a volume or DICOM file, not a 2D picture; volumes need pip install 'medgraft[volumes]' and a "
            f"3D recipe, or export slices as PNG"
        )
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty (0 bytes); copy or download it again")
    try:
        with Image.open(path) as picture:
            _check_frames_and_pixels(picture, path)
            yield picture
    except MedgraftError:
        raise
    except UnidentifiedImageError:
        raise BadData(f"{path} is no image that Pillow can read; formats: {', '.join(IMAGE_SUFFIXES)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
        raise BadData(f"{path} is too large: {bomb} Cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except _DAMAGED as broken:
        raise BadData(f"{path} cannot be decoded ({broken}); it is damaged or cut short: export it again") from broken


def _check_frames_and_pixels(picture: Image.Image, path: Path) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # MPO: a phone's JPEG with a preview behind it
        raise BadData(f"{path} holds {frames} frames; write the one that is meant to a file of its own")
    limit, pixels = Image.MAX_IMAGE_PIXELS, picture.width * picture.height
    if limit is not None and pixels > limit:
        raise BadData(
            f"{path} is too large: {pixels} pixels, the limit is {limit}. Cut it into tiles, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS"
        )


def _eight_bits(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Deep grey (H, W) to uint8: linear between this image's 0.1st and 99.9th percentile."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadData(f"image {path} has values that are not finite; export it again as 8 or 16 bits")
    low, high = np.percentile(values, (0.1, 99.9))
    if high <= low:  # flat but for a few pixels: use all of the range
        low, high = values.min(), values.max()
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.round(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _cut_lossy(values: np.ndarray, path: str | Path) -> np.ndarray:
    """A JPEG mask can only mean two classes: cut at 128, and refuse what is plainly something else."""
    unsure = float(((values >= 64) & (values < 192)).mean())
    if unsure > 0.05 or 0 < values.max() < 128:
        raise BadData(
            f"mask {path} is a lossy JPEG and not black and white, so its class indices are lost; save masks as PNG"
        )
    return np.where(values >= 128, 255, 0).astype(np.uint8)
