"""Volumes: what is read, what is refused and how it is said, and that nothing moves on the way back."""

from __future__ import annotations

import gzip
import locale
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from medgraft import volumes
from medgraft.errors import BadCall, BadData, MissingExtra, SaveFailed
from medgraft.volumes import Volume, read_labels, read_volume, write_volume

SHAPE = (5, 6, 7)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-0.9, 0.9, 3.0]), [12.5, -30.0, 7.25]
)


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def ramp(dtype: type = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def rewrite(path: Path, at: int, new: bytes) -> Path:
    """The file with other bytes at a place of its header: nibabel would put right what is wrong on purpose."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rb") as file:
        raw = bytearray(file.read())
    raw[at : at + len(new)] = new
    with opened(path, "wb") as file:
        file.write(raw)
    return path


def with_codes(path: Path, *, qform: int, sform: int) -> Path:
    return rewrite(path, 252, np.array([qform, sform], "<i2").tobytes())


# Reading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_every_number_becomes_float32(tmp_path: Path, suffix: str, dtype: type) -> None:
    found = read_volume(save(tmp_path / f"a{suffix}", ramp(dtype), OBLIQUE))
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, ramp(np.float32))
    assert np.allclose(found.affine, OBLIQUE, atol=1e-5)
    assert found.spacing == pytest.approx((0.9, 0.9, 3.0), abs=1e-5)
    assert found.axcodes == "LAS"


def test_the_scaling_of_a_file_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(np.float32) * 0.5 - 1024, np.eye(4))
    image.set_data_dtype(np.int16)  # nibabel finds slope and intercept
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.allclose(read_volume(tmp_path / "a.nii.gz").values, ramp(np.float32) * 0.5 - 1024, atol=0.01)


def test_a_file_of_freesurfer_is_a_volume(tmp_path: Path) -> None:
    nib.save(nib.freesurfer.MGHImage(ramp(np.float32), OBLIQUE.astype(np.float32)), tmp_path / "a.mgz")
    found = read_volume(tmp_path / "a.mgz")
    assert np.array_equal(found.values, ramp(np.float32))
    assert np.allclose(found.affine, OBLIQUE, atol=1e-4)


def test_four_dimensions_are_a_choice_of_a_frame(tmp_path: Path) -> None:
    series = save(tmp_path / "series.nii.gz", ramp(np.int16, (*SHAPE, 3)))
    assert np.array_equal(read_volume(series, frame=2).values, ramp(np.float32, (*SHAPE, 3))[..., 2])
    with pytest.raises(BadData, match=r"holds 3 frames .*frame=0 to 2"):
        read_volume(series)
    with pytest.raises(BadCall, match=r"frame 3 of .*holds 3; count from 0"):
        read_volume(series, frame=3)
    single = save(tmp_path / "single.nii.gz", ramp(np.int16, (*SHAPE, 1)))
    assert np.array_equal(read_volume(single).values, ramp(np.float32))


# What is refused


def test_a_2d_image_is_no_volume(tmp_path: Path) -> None:
    for shape in ((8, 9), (8, 9, 1), (1, 8, 9)):
        with pytest.raises(BadData, match="is a 2D image"):
            read_volume(save(tmp_path / "flat.nii", ramp(np.int16, shape)))
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x")
    with pytest.raises(BadData, match="is a 2D picture, a volume is wanted"):
        read_volume(picture)


def test_an_empty_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is empty: its shape is 0 x 6 x 7"):
        read_volume(save(tmp_path / "none.nii", ramp(np.int16, (0, 6, 7))))
    with pytest.raises(BadCall, match="at least one voxel"):
        Volume(np.zeros((0, 6, 7)), np.eye(4))


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no volume at .*found nothing"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "text.nii").write_text("this is no volume" * 40)
    for name in ("empty.nii", "text.nii"):
        with pytest.raises(BadData, match=f"{name} is no readable volume"):
            read_volume(tmp_path / name)


def test_a_missing_affine_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"neither an sform nor a qform.*set_sform"):
        read_volume(with_codes(save(tmp_path / "a.nii.gz", ramp()), qform=0, sform=0))


def test_a_singular_affine_is_refused(tmp_path: Path) -> None:
    twice = np.eye(4)
    twice[:3, 1] = twice[:3, 0]
    with pytest.raises(BadData, match="singular affine"):
        read_volume(save(tmp_path / "a.nii.gz", ramp(), twice))
    lost = np.eye(4)
    lost[0, 3] = np.nan
    with pytest.raises(BadData, match="no finite 4 x 4 matrix"):
        Volume(ramp(), lost)


def test_a_spacing_of_0_is_refused_from_either_form(tmp_path: Path) -> None:
    by_sform = save(tmp_path / "sform.nii.gz", ramp())
    with pytest.raises(BadData, match="spacing of 0 along axis 2"):
        read_volume(rewrite(by_sform, 320, np.float32(0).tobytes()))  # srow_z[2]
    by_qform = with_codes(save(tmp_path / "qform.nii", ramp()), qform=1, sform=0)
    assert read_volume(by_qform).spacing == (1, 1, 1)
    with pytest.raises(BadData, match="spacing of 0 along axis 1"):
        read_volume(rewrite(by_qform, 84, np.float32(0).tobytes()))  # pixdim[2]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_voxels_that_are_no_numbers_are_counted(tmp_path: Path, value: float, said: str) -> None:
    values = ramp(np.float32)
    values[1, :2, 3] = value
    with pytest.raises(BadData, match=f"2 of 210 voxels that are {said}; .*nan_to_num"):
        read_volume(save(tmp_path / "a.nii.gz", values))


def test_a_number_beyond_float32_is_not_lost_in_silence(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="infinite"):
        read_volume(save(tmp_path / "a.nii.gz", ramp(np.float64) * 1e300))


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_voxels_that_are_not_grey_are_refused(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(BadData, match="one real number a voxel"):
        read_volume(save(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype)))


def test_a_corrupt_gzip_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (20, 20, 20)).astype(np.int16)
    whole = save(tmp_path / "a.nii.gz", values).read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:-2000] + bytes([whole[-2000] ^ 0x55]) + whole[-1999:],
        "checksum": whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:],
        "not gzip": gzip.decompress(whole),
    }
    for name, raw in damaged.items():
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(raw)
        with pytest.raises(BadData, match=f"{name}.nii.gz is .*damaged"):
            read_volume(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match="damaged or cut short"):
        read_volume(path)


def test_a_volume_beyond_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = nib.Nifti1Image(ramp(), np.eye(4)).header
    header.set_data_shape((1024, 1024, 1024))
    path = tmp_path / "large.nii"
    with path.open("wb") as file:
        header["sform_code"], header["vox_offset"], header["magic"] = 1, 352, b"n+1"
        header.write_to(file)
        file.truncate(352 + (2 << 30))  # 2 GB without holding 2 GB of disk
    monkeypatch.setattr(volumes.psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    with pytest.raises(BadData, match=r"large.nii needs 6.4 GB of memory, 3.0 GB are free; crop"):
        read_volume(path)


# Labels


def test_labels_are_read_on_the_grid_of_their_image(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "image.nii.gz", ramp(), OBLIQUE))
    drawn = (ramp(np.float32) % 3).astype(np.float32)
    labels = read_labels(save(tmp_path / "label.nii.gz", drawn, OBLIQUE), {1: "a", 2: "b"}, like=image)
    assert labels.values.dtype == np.uint8
    assert np.array_equal(labels.values, drawn)
    assert np.array_equal(labels.affine, image.affine)


def test_a_label_on_another_grid_is_named_with_its_image(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "image.nii.gz", ramp()))
    moved = np.eye(4)
    moved[0, 3] = 0.5
    aside = save(tmp_path / "aside.nii.gz", ramp(np.uint8) % 2, moved)
    with pytest.raises(BadData, match=r"aside.nii.gz \(5 x 6 x 7, RAS\) does not lie on .*image.nii.gz.*0.5 mm apart"):
        read_labels(aside, {1: "a"}, like=image)
    short = save(tmp_path / "short.nii.gz", ramp(np.uint8, (5, 6, 6)) % 2)
    with pytest.raises(BadData, match=r"short.nii.gz .*image.nii.gz .*their shapes differ"):
        read_labels(short, {1: "a"}, like=image)
    flipped = save(tmp_path / "flipped.nii.gz", ramp(np.uint8) % 2, np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(BadData, match="LAS"):
        read_labels(flipped, {1: "a"}, like=image)
    moved[0, 3] = 0.01  # what rounding does
    close = save(tmp_path / "close.nii.gz", ramp(np.uint8) % 2, moved)
    assert read_labels(close, {1: "a"}, like=image).values.any()


def test_label_values_must_be_declared_and_whole(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "image.nii.gz", ramp()))
    strange = save(tmp_path / "strange.nii.gz", (ramp() % 4).astype(np.int16))
    with pytest.raises(BadData, match=r"no class declares: \[3\]; declared: 1 = a, 2 = b"):
        read_labels(strange, {1: "a", 2: "b"}, like=image)
    smooth = save(tmp_path / "smooth.nii.gz", ramp(np.float32) / 8)
    with pytest.raises(BadData, match=r"between whole numbers, such as 0.125.*nearest"):
        read_labels(smooth, {1: "a"}, like=image)
    negative = save(tmp_path / "negative.nii.gz", -(ramp() % 2).astype(np.int16))
    with pytest.raises(BadData, match=r"\[-1\]"):
        read_labels(negative, {1: "a"}, like=image)


# Writing


@pytest.mark.parametrize(("qform", "sform"), [(0, 1), (1, 0), (1, 4), (2, 2)])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_what_is_written_lies_where_its_image_does(tmp_path: Path, qform: int, sform: int, suffix: str) -> None:
    image = nib.Nifti1Image(ramp(), OBLIQUE)
    image.set_qform(OBLIQUE, 1)
    image.header["descrip"] = b"Jane Doe"
    image.header.set_slope_inter(2, 1)
    nib.save(image, tmp_path / "image.nii")
    source = read_volume(with_codes(tmp_path / "image.nii", qform=qform, sform=sform))
    write_volume(tmp_path / f"out{suffix}", source.on_this_grid((ramp() % 3).astype(np.uint8)))

    before, after = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / f"out{suffix}")
    assert np.array_equal(after.affine, before.affine)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.uint8
    assert np.array_equal(after.dataobj, ramp() % 3)
    for key in volumes._GEOMETRY:
        assert np.array_equal(after.header[key], before.header[key]), key
    assert after.header["descrip"].item() == b""
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(ramp(), np.eye(4))
    with pytest.raises(BadCall, match=r"written as .nii.gz or .nii, got a.png"):
        write_volume(tmp_path / "a.png", volume)
    write_volume(tmp_path / "a.nii.gz", volume)
    before = (tmp_path / "a.nii.gz").read_bytes()

    def full(image: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(SaveFailed, match="No space left"):
        write_volume(tmp_path / "a.nii.gz", volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# DICOM


def write_series(folder: Path, values: np.ndarray, series: str = "1.2.3.4") -> None:
    """Slices of (x, y, z) int16 with names that do not follow their order, as scanners write them."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(exist_ok=True)
    before = locale.setlocale(locale.LC_CTYPE)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(values.shape[2]):
        image = sitk.GetImageFromArray(values[:, :, z].T[None])
        image.SetSpacing((0.5, 0.75, 3.0))
        tags = {
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|000d": "1.2.3",
            "0020|0032": f"10\\-20\\{5 + 3 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z + 1),
            "0018|0050": "3",
            "0028|1052": "-1024",
            "0028|1053": "1",
            "0008|0018": f"{series}.{z + 1}",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{(7 * z) % 11:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, before)  # ITK's writer can leave the process in ASCII


def test_a_dicom_series_is_a_volume_in_hounsfield_units(tmp_path: Path) -> None:
    write_series(tmp_path / "series", ramp())
    before = locale.setlocale(locale.LC_CTYPE)
    found = read_volume(tmp_path / "series")
    assert locale.setlocale(locale.LC_CTYPE) == before, "reading changed the process's character set"
    assert np.allclose(found.affine @ [0, 0, 0, 1], [-10, 20, 5, 1])  # LPS -> RAS
    assert found.spacing == pytest.approx((0.5, 0.75, 3.0))
    assert found.axcodes == "LPS"
    assert np.array_equal(np.diff(found.values, axis=2), np.diff(ramp(np.float32), axis=2))
    write_volume(tmp_path / "out.nii.gz", found)
    assert np.allclose(nib.load(tmp_path / "out.nii.gz").affine, found.affine)


def test_a_folder_that_is_not_one_series_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCall, match="frame=1 chooses from a 4D file"):
        read_volume(tmp_path / "empty", frame=1)
    with pytest.raises(BadData, match="holds 0 DICOM series"):
        read_volume(tmp_path / "empty")
    write_series(tmp_path / "two", ramp())
    write_series(tmp_path / "other", ramp(), "1.2.3.5")
    for file in (tmp_path / "other").iterdir():
        file.rename(tmp_path / "two" / f"b{file.name}")
    with pytest.raises(BadData, match="holds 2 DICOM series"):
        read_volume(tmp_path / "two")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises((MissingExtra, ModuleNotFoundError), match="SimpleITK"):
        read_volume(tmp_path)
