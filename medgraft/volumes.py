"""Reading and writing volumes: values (X, Y, Z) and the affine that says where they lie in the patient.

    (x, y, z, 1) in mm, RAS+  =  affine (4, 4)  @  (i, j, k, 1), the voxel's indices

NIfTI (.nii, .nii.gz) and what else nibabel reads come from a file, DICOM from the folder of one series. Nothing is guessed: a file
that does not say where it lies, holds values that are no numbers, or does not fit into memory, is `BadData` with the file's name.

What a network takes is made from this in `voxels`.
"""

from __future__ import annotations

import gzip
import math
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .errors import BadCall, BadData, SaveFailed, need
from .images import IMAGE_SUFFIXES

WRITTEN = (".nii.gz", ".nii")
READ = (*WRITTEN, ".mgz", ".mgh")
MOST_APART = 0.1  # voxels, between grids that count as one: files round their affines

_DAMAGED = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, ArithmeticError, zlib.error)
_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True, eq=False)
class Volume:
    """One volume on its own grid.

    values : (X, Y, Z); float32 for images, uint8 for labels.
    affine : (4, 4) float64, from voxel indices to RAS+ millimetres; invertible.
    name   : what errors call it; a path, where there is one.
    """

    values: np.ndarray
    affine: np.ndarray
    name: str = "volume"
    _header: Any = field(default=None, repr=False)  # of the NIfTI file, for writing on the same grid

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise BadCall(f"a volume is (X, Y, Z) with at least one voxel, got the shape {self.values.shape}")
        _check_affine(np.asarray(self.affine), self.name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        x, y, z = self.values.shape
        return x, y, z

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres a voxel along each axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def voxel_volume(self) -> float:
        """Cubic millimetres of one voxel, also of an oblique or sheared grid."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def axcodes(self) -> str:
        """Where each axis leads, for an oblique volume most nearly: "RAS" is right, anterior, superior."""
        return "".join(_nibabel().aff2axcodes(self.affine))

    def on_this_grid(self, values: np.ndarray) -> Volume:
        """Other values (X, Y, Z) on the same grid. Raises BadCall for another shape."""
        if values.shape != self.shape:
            raise BadCall(f"values of the shape {values.shape} do not lie on the grid of {self.name}, {self.shape}")
        return Volume(values, self.affine, self.name, self._header)


# Reading


def read_volume(path: str | Path, *, frame: int | None = None) -> Volume:
    """Read a volume as float32, with its file's scaling applied.

    `path` is a file, or the folder of one DICOM series (extra "dicom"). `frame` chooses from a 4D file; one that holds a single frame
    needs no choice. Raises `BadData` for a file that is missing, damaged, a picture, without voxels, a 4D file without `frame`,
    values that are not finite numbers, an affine that is missing or singular, and a volume too large for the memory at hand;
    `BadCall` for a frame that is not there; `MissingExtra` without nibabel or SimpleITK.
    """
    path = Path(path)
    if path.is_dir():
        if frame is not None:
            raise BadCall(
                f"frame={frame} chooses from a 4D file, {path} is the folder of a DICOM series; leave it away"
            )
        return _read_series(path)
    image = _opened(path)
    voxels = _frame(image, path, frame)
    need_memory(math.prod(image.shape[:3]) * (4 + image.get_data_dtype().itemsize), f"reading {path}")
    values = _finite(_loaded(voxels, path), path)
    return Volume(values, _affine(image, path), str(path), image.header)


def read_grid(path: str | Path) -> Volume:
    """The grid of a file by its header alone: a volume of zeros that take no memory. Raises as `read_volume`, but for the values."""
    path = Path(path)
    if path.is_dir():
        return _read_series(path)
    image = _opened(path)
    _frame(image, path, None)
    return Volume(np.broadcast_to(np.uint8(0), image.shape[:3]), _affine(image, path), str(path), image.header)


def read_labels(path: str | Path, declared: Mapping[int, str], *, like: Volume) -> Volume:
    """Read a label volume as uint8, on the grid of its image `like`.

    `declared` names the values (0 to 255) that it may hold; 0, the background, always may. Raises `BadData` as `read_volume`, and for
    a label on another grid than its image, values that are no whole numbers, or values that are not declared.
    """
    labels = read_volume(path)
    check_same_grid(labels, like)
    strange = sorted(set(_whole_numbers(labels)) - set(declared) - {0})
    if strange:
        said = ", ".join(f"{value} = {name}" for value, name in declared.items() if value)
        raise BadData(f"label volume {path} has values that no class declares: {strange[:12]}; declared: {said}")
    return like.on_this_grid(labels.values.astype(np.uint8))


def label_values(path: str | Path) -> list[int]:
    """The values that a label volume holds, in order. Raises `BadData` as `read_volume`, and for values that are no whole numbers."""
    return _whole_numbers(read_volume(path))


def _whole_numbers(labels: Volume) -> list[int]:
    found = np.unique(labels.values)
    between = found[found != np.rint(found)]
    if between.size:
        raise BadData(
            f"label volume {labels.name} holds values between whole numbers, such as {between[0]:.4g}: it was resampled "
            f"smoothly; make it again with nearest neighbours"
        )
    return found.astype(int).tolist()


def check_same_grid(labels: Volume, image: Volume) -> None:
    """Raise `BadData`, naming both, unless two volumes lie voxel on voxel: equal shapes, corners within 0.1 voxel."""
    apart = math.inf
    if labels.shape == image.shape:
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (*image.shape, 1)
        apart = float(np.linalg.norm(corners @ (labels.affine - image.affine).T, axis=1).max())
    if apart > MOST_APART * min(image.spacing):
        how = f"they lie up to {apart:.3g} mm apart" if math.isfinite(apart) else "their shapes differ"
        raise BadData(
            f"{labels.name} ({_by(labels.shape)}, {labels.axcodes}) does not lie on {image.name} "
            f"({_by(image.shape)}, {image.axcodes}): {how}; resample the label onto its image, or pair it with its own"
        )


def need_memory(wanted: int, what: str) -> None:
    """Raise `BadData` where `what` needs more than the bytes that the machine has left."""
    left = psutil.virtual_memory().available
    if wanted > left:
        raise BadData(
            f"{what} needs {wanted / 1e9:.1f} GB of memory, {left / 1e9:.1f} GB are free; crop the volume or resample it "
            f"to a coarser spacing, or use a larger machine"
        )


def _nibabel() -> Any:
    return need("nibabel", "volumes")


def _opened(path: Path) -> Any:
    """The image of a file, its header read, its voxels not yet in memory."""
    if not path.is_file():
        raise BadData(f"no volume at {path}: found nothing there; check the name and its suffix ({', '.join(READ)})")
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        raise BadData(
            f"{path} is a 2D picture, a volume is wanted ({', '.join(READ)}); pictures have recipes of their own"
        )
    nibabel = _nibabel()
    try:
        return nibabel.load(path)
    except (*_DAMAGED, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as broken:
        raise BadData(
            f"{path} is no readable volume ({broken}): it is damaged or of another format; fetch or export it again as NIfTI "
            f"({', '.join(WRITTEN)})"
        ) from None


def _frame(image: Any, path: Path, frame: int | None) -> Any:
    """The part of an image's voxels that is meant, to be loaded as (X, Y, Z)."""
    shape = image.shape
    if 0 in shape:
        raise BadData(f"{path} is empty: its shape is {_by(shape)} voxels; export it again")
    if len(shape) < 3 or 1 in shape[:3]:
        raise BadData(
            f"{path} is a 2D image ({_by(shape)}), a volume is wanted with more than one voxel along three axes; "
            f"export slices as PNG and use a 2D recipe"
        )
    frames = math.prod(shape[3:])
    if frame is not None and not 0 <= frame < frames:
        raise BadCall(f"frame {frame} of {path} was asked for, which holds {frames}; count from 0")
    if frames == 1:
        return image.dataobj
    if frame is None or len(shape) > 4:
        raise BadData(
            f"{path} holds {frames} frames ({_by(shape)}), one volume is wanted; choose one with frame=0 to {frames - 1} "
            f"(--frame), or split the series"
        )
    return _Chosen(image.dataobj, frame)


@dataclass(frozen=True)
class _Chosen:
    """One frame of a 4D file; the others are not loaded."""

    voxels: Any
    frame: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.voxels[..., self.frame], dtype=dtype)


def _loaded(voxels: Any, path: Path) -> np.ndarray:
    try:
        if path.name.lower().endswith("gz"):
            with gzip.open(path) as stream:  # a reader that stops at the last voxel never sees the checksum behind it
                while stream.read(1 << 20):
                    pass
        found = np.asarray(voxels)
    except _DAMAGED as broken:
        raise BadData(f"{path} is damaged or cut short ({broken}); fetch or export it again") from None
    if found.dtype.kind not in "biuf":
        raise BadData(f"{path} holds {found.dtype} voxels, one real number a voxel is wanted; export it again in grey")
    with np.errstate(over="ignore"):  # beyond float32: infinite, and refused as such
        return found.reshape(found.shape[:3]).astype(np.float32)


def _finite(values: np.ndarray, path: Path) -> np.ndarray:
    bad = ~np.isfinite(values)
    if bad.any():
        kinds = " and ".join(k for k, n in (("NaN", np.isnan(values).any()), ("infinite", np.isinf(values).any())) if n)
        raise BadData(
            f"{path} has {bad.sum():,} of {values.size:,} voxels that are {kinds}; if they lie outside the body, replace "
            f"them (numpy.nan_to_num), else export it again"
        )
    return values


def _affine(image: Any, path: Path) -> np.ndarray:
    nibabel = _nibabel()
    header = image.header
    if isinstance(header, nibabel.Nifti1Header) and not header["sform_code"]:
        if not header["qform_code"]:
            raise BadData(
                f"{path} does not say how it lies in space (it has neither an sform nor a qform); export it again, or set "
                f"the affine that you know: image.set_sform(affine, code=1) in nibabel"
            )
        with image.file_map["image"].get_prepare_fileobj("rb") as file:  # nibabel has made 1 of a spacing of 0
            written = type(header).from_fileobj(file, check=False)["pixdim"][1:4]
        if not written.all():
            raise _no_size(path, int(np.argmin(np.abs(written))))
    return np.asarray(image.affine, dtype=np.float64)


def _no_size(name: object, axis: int) -> BadData:
    return BadData(f"{name} has a spacing of 0 along axis {axis}, so its voxels have no size; correct its header")


def _check_affine(affine: np.ndarray, name: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise BadData(f"{name} has an affine that is no finite 4 x 4 matrix; export it again")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (flat := np.flatnonzero(spacing < 1e-6)).size:
        raise _no_size(name, int(flat[0]))
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise BadData(f"{name} has a singular affine (two of its axes lead the same way); correct its header")


def _read_series(folder: Path) -> Volume:
    """The one DICOM series of a folder, slices in order of position, rescaled to its units (CT: Hounsfield)."""
    sitk = need("SimpleITK", "dicom")
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise BadData(
            f"the folder {folder} holds {len(series)} DICOM series, one is wanted; give a file, or a folder with the slices "
            f"of one series and nothing else"
        )
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        image = reader.Execute()
    except RuntimeError as broken:
        said = str(broken).strip().splitlines()[-1]
        raise BadData(f"the DICOM series in {folder} cannot be read ({said}); export it again") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1 or 1 in image.GetSize():
        raise BadData(f"the DICOM series in {folder} is no grey volume: its size is {image.GetSize()}")
    values = sitk.GetArrayFromImage(image).T.astype(np.float32)  # (z, y, x) -> (x, y, z)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(_finite(values, folder), np.diag((-1.0, -1.0, 1.0, 1.0)) @ affine, str(folder))  # LPS -> RAS


def volume_stem(path: Path) -> str:
    """A file's name without what says that it is a volume; of a folder (of a DICOM series) its name."""
    known = next((s for s in READ if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(known)]


# Writing


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write `volume` as NIfTI (.nii.gz or .nii), whole or not at all, in the dtype of its values.

    On the grid of a NIfTI file, the file's sform, qform and their codes are written bit for bit; nothing else of its header goes
    along. Raises BadCall for another suffix, SaveFailed when the disk refuses.
    """
    path, nibabel = Path(path), _nibabel()
    suffix = next((s for s in WRITTEN if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise BadCall(f"a volume is written as {' or '.join(WRITTEN)}, got {path.name}")
    image, source = nibabel.Nifti1Image(volume.values, volume.affine), volume._header
    if isinstance(source, nibabel.Nifti1Header):
        for key in _GEOMETRY:
            image.header[key] = source[key]
    new = path.with_name(f".{path.name.removesuffix(suffix)}.{secrets.token_hex(4)}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, new)
        os.replace(new, path)
    except OSError as refused:
        raise SaveFailed(
            f"could not write {path}: {refused.strerror or refused}; free space, or choose another place"
        ) from refused
    finally:
        new.unlink(missing_ok=True)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
