from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgraft.errors import BadCall, BadData, SaveFailed
from medgraft.images import image_size, read_image, read_mask, read_mask_values, write_mask

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
CLASSES = {0: "background", 1: "cytoplasm", 2: "nucleus"}
ONE = {1: "nucleus"}


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def labels(*values: int) -> np.ndarray:
    mask = np.zeros((12, 10), np.uint8)
    for n, value in enumerate(values):
        mask[2 * n : 2 * n + 2] = value
    return mask


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_colour_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    got = read_image(saved(tmp_path / f"a.{suffix}", COLOUR, **options))
    assert got.dtype == np.uint8
    assert np.array_equal(got, COLOUR)
    got[0, 0] = 0  # the caller's own memory


def test_grey_is_repeated(tmp_path: Path) -> None:
    got = read_image(saved(tmp_path / "a.png", GREY))
    assert np.array_equal(got, np.repeat(GREY[..., None], 3, axis=2))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    got = read_image(saved(tmp_path / "a.png", GREY > 100))
    assert np.array_equal(got[..., 1], np.where(GREY > 100, 255, 0))


def test_alpha_is_composited_over_black(tmp_path: Path) -> None:
    alpha = np.full((12, 10, 1), 255, np.uint8)
    alpha[:6] = 0
    got = read_image(saved(tmp_path / "a.png", np.concatenate([COLOUR, alpha], 2)))
    assert not got[:6].any()
    assert np.array_equal(got[6:], COLOUR[6:])


def test_palette_shows_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(labels(1, 2)).convert("P")
    picture.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    picture.save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    assert got[0, 0].tolist() == [10, 20, 30]
    assert got[2, 0].tolist() == [200, 100, 50]


def test_transparent_palette_entry_is_black(tmp_path: Path) -> None:
    picture = Image.fromarray(labels(1, 2)).convert("P")
    picture.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    picture.save(tmp_path / "a.png", transparency=1)
    got = read_image(tmp_path / "a.png")
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[2, 0].tolist() == [200, 100, 50]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[8, 8].tolist() == [0, 255, 255]


def test_deep_grey_uses_its_own_range(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)  # 12 bits of data in 16
    got = read_image(saved(tmp_path / "a.png", ramp))[..., 0].astype(int)
    assert got.min() == 0
    assert got.max() == 255
    assert (np.diff(got.ravel()) >= 0).all()
    assert got[50, 0] == pytest.approx(127.5, abs=1)


def test_a_hot_pixel_does_not_darken_a_deep_image(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)
    ramp[0, 0] = 65535
    assert read_image(saved(tmp_path / "a.png", ramp))[50, 0, 0] == pytest.approx(127.5, abs=1)


def test_flat_and_float_images(tmp_path: Path) -> None:
    assert not read_image(saved(tmp_path / "flat.png", np.full((12, 12), 4000, np.uint16))).any()
    ramp = np.linspace(-1, 1, 144, dtype=np.float32).reshape(12, 12)
    assert read_image(saved(tmp_path / "float.tif", ramp)).max() == 255
    ramp[3, 3] = np.nan
    with pytest.raises(BadData, match=r"nan\.tif has values that are not finite"):
        read_image(saved(tmp_path / "nan.tif", ramp))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.png"
    Image.fromarray(COLOUR).save(file, exif=exif)
    turned = {1: COLOUR, 3: COLOUR[::-1, ::-1], 6: np.rot90(COLOUR, -1), 8: np.rot90(COLOUR)}
    assert image_size(file) == read_image(file).shape[:2]
    if orientation in turned:
        assert np.array_equal(read_image(file), turned[orientation])


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.png", np.repeat(COLOUR, 20, 0)).read_bytes()
    bad = {
        "empty.png": (b"", "empty"),
        "text.png": (b"hello, I am no picture", "no image"),
        "short.png": (whole[: len(whole) // 2], "cannot be decoded|no image"),
        "head.png": (whole[:20], "cannot be decoded|no image"),
        "broken.png": (whole[:60] + bytes(40) + whole[100:], "cannot be decoded|no image"),
        "brain.nii.gz": (b"x", r"medgraft\[volumes\]"),
    }
    for name, (content, why) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadData, match=why) as refusal:
            read_image(tmp_path / name)
        assert name in str(refusal.value)
    with pytest.raises(BadData, match="found nothing there"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(BadData, match="found a folder there"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own remarks on broken TIFF tags
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    file = saved(tmp_path / f"a.{suffix}", COLOUR)
    whole, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for trial in range(150):
        damaged = bytearray(whole if trial % 5 else whole[: rng.integers(1, len(whole))])
        for place in rng.integers(0, len(damaged), 4):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        for read in (read_image, image_size, lambda path: read_mask(path, ONE, (12, 10))):
            try:
                read(file)
            except BadData as refusal:
                refused += file.name in str(refusal)
    assert refused > 50


@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (40, 7)], ids=str)
def test_tiny_images_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(BadData, match=rf"a\.png is {shape[0]} x {shape[1]} pixels.*at least 8"):
        read_image(saved(tmp_path / "a.png", np.zeros(shape, np.uint8)))
    assert read_image(saved(tmp_path / "b.png", np.zeros((8, 8), np.uint8))).shape == (8, 8, 3)


@pytest.mark.parametrize("limit", [119, 60, 40])  # just above, a warning in Pillow, an error in Pillow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    file = saved(tmp_path / "big.png", COLOUR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadData, match=r"big\.png is too large"):
        read_image(file)


def test_several_frames_are_refused(tmp_path: Path) -> None:
    first = Image.fromarray(COLOUR)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[first, first])
    with pytest.raises(BadData, match=r"stack\.tif holds 3 frames"):
        read_image(tmp_path / "stack.tif")


def test_mask_of_class_indices(tmp_path: Path) -> None:
    got = read_mask(saved(tmp_path / "m.png", labels(1, 2)), CLASSES, (12, 10))
    assert got.dtype == np.uint8
    assert np.array_equal(got, labels(1, 2))


@pytest.mark.parametrize("on", [1, 255])
@pytest.mark.parametrize("value", [1, 7])
def test_binary_masks_are_0_1_or_0_255(tmp_path: Path, on: int, value: int) -> None:
    got = read_mask(saved(tmp_path / "m.png", labels(on)), {value: "nucleus"})
    assert np.array_equal(got, labels(value))


def test_deep_and_one_bit_masks(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(saved(tmp_path / "b.png", labels(1) > 0), ONE), labels(1))
    assert np.array_equal(read_mask(saved(tmp_path / "d.png", labels(1).astype(np.uint16) * 65535), ONE), labels(1))
    assert np.array_equal(read_mask(saved(tmp_path / "i.png", labels(1, 2).astype(np.uint16)), CLASSES), labels(1, 2))
    assert np.array_equal(read_mask(saved(tmp_path / "f.tif", labels(1, 2).astype(np.float32)), CLASSES), labels(1, 2))


def test_palette_masks_are_read_by_index(tmp_path: Path) -> None:
    picture = Image.fromarray(labels(1, 2)).convert("P")
    picture.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", CLASSES), labels(1, 2))


def test_three_equal_channels_are_a_mask_and_colours_are_not(tmp_path: Path) -> None:
    grey = np.repeat(labels(255)[..., None], 3, 2)
    assert np.array_equal(read_mask(saved(tmp_path / "m.png", grey), ONE), labels(1))
    opaque = np.concatenate([grey, np.full((12, 10, 1), 255, np.uint8)], 2)
    assert np.array_equal(read_mask(saved(tmp_path / "a.png", opaque), ONE), labels(1))
    with pytest.raises(BadData, match=r"c\.png is a colour picture"):
        read_mask(saved(tmp_path / "c.png", COLOUR), ONE)
    opaque[0, 0, 3] = 7
    with pytest.raises(BadData, match=r"t\.png is partly transparent"):
        read_mask(saved(tmp_path / "t.png", opaque), ONE)


def test_a_jpeg_mask_is_cut_when_it_is_binary(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    mask = np.where((y - 30) ** 2 + (x - 35) ** 2 < 400, 255, 0).astype(np.uint8)
    file = saved(tmp_path / "m.jpg", mask, quality=75)
    assert len(np.unique(np.asarray(Image.open(file)))) > 2  # it really is smeared
    assert (read_mask(file, ONE) != mask // 255).mean() < 0.01
    for name, content in {"dark.jpg": mask // 255 * 2, "many.jpg": mask // 2}.items():
        with pytest.raises(BadData, match=rf"{name} is a lossy JPEG"):
            read_mask(saved(tmp_path / name, content), CLASSES)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.png", labels(1, 2, 9, 17))
    with pytest.raises(BadData, match=r"m\.png is 12 x 10 pixels.*its image 10 x 12"):
        read_mask(file, CLASSES, (10, 12))
    with pytest.raises(BadData, match=r"m\.png has values.*: 9, 17; declared: 1 = cytoplasm, 2 = nucleus"):
        read_mask(file, CLASSES, (12, 10))
    with pytest.raises(BadData, match="declares: 255;"):  # 255 is foreground only when it is alone
        read_mask(saved(tmp_path / "n.png", labels(1, 255)), ONE)
    with pytest.raises(BadData, match="fractions"):
        read_mask(saved(tmp_path / "f.tif", labels(1).astype(np.float32) / 2), ONE)
    with pytest.raises(BadData, match="found nothing"):
        read_mask(tmp_path / "absent.png", ONE)


def test_written_masks_come_back(tmp_path: Path) -> None:
    mask = RNG.integers(0, 256, (31, 17), dtype=np.uint8)
    write_mask(tmp_path / "m.png", mask)
    assert np.array_equal(read_mask_values(tmp_path / "m.png"), mask)
    write_mask(tmp_path / "m.png", mask.astype(np.int64) > 9)
    assert np.array_equal(read_mask_values(tmp_path / "m.png"), (mask > 9).astype(np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_masks_that_cannot_be_written(tmp_path: Path) -> None:
    bad = [np.zeros((3, 3)), np.zeros((3, 3, 1), int), np.full((3, 3), 256), np.full((3, 3), -1), np.zeros((0, 3), int)]
    for mask in bad:
        with pytest.raises(BadCall):
            write_mask(tmp_path / "m.png", mask)
    with pytest.raises(BadCall, match="lossless"):
        write_mask(tmp_path / "m.jpg", np.zeros((3, 3), int))
    with pytest.raises(SaveFailed, match=r"absent/m\.png"):
        write_mask(tmp_path / "absent" / "m.png", np.zeros((3, 3), int))
    assert not list(tmp_path.iterdir())
