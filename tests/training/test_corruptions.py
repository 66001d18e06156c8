from pathlib import Path

import numpy as np
import pytest

from medgraft.errors import BadCall, UnknownName
from medgraft.training.corruptions import CORRUPTIONS, MISSING, SEVERITIES, Corrupted, corrupt, corruption_scores
from medgraft.training.data import load_dataset
from medgraft.training.phantoms import write_dataset
from tests.helpers import says


def photograph() -> np.ndarray:
    """A smooth picture with colours and an edge, 60 x 80."""
    y, x = np.mgrid[:60, :80]
    picture = np.stack([90 + x, 60 + 2 * y, 200 - x], -1).astype(np.uint8)
    picture[20:40, 30:50] = (220, 40, 60)
    return picture


def change(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_changes_the_picture_more_and_more(name: str) -> None:
    picture = photograph()
    found = [corrupt(picture, name, s) for s in SEVERITIES]
    assert all(f.shape == picture.shape and f.dtype == np.uint8 for f in found)
    changes = [change(picture, f) for f in found]
    assert min(changes) > 0.3
    if name == "saturate":  # less colour at 1 and 2, more from 3 on
        assert changes[1] > changes[0]
        assert changes[4] > changes[3] > changes[2]
    elif name == "glass_blur":  # the benchmark's strengths are not in order
        assert changes[4] > changes[0]
    else:
        assert changes == sorted(changes)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_flat_picture_under_blurs_and_codecs_stays(name: str) -> None:
    flat = np.full((40, 48, 3), 128, np.uint8)
    off = change(flat, corrupt(flat, name, 3))
    assert (off < 1) == ("noise" not in name and name != "brightness")


def test_noise_is_a_function_of_the_name() -> None:
    a, b, other = (corrupt(photograph(), "gaussian_noise", 2, seed=s) for s in ("a", "a", "b"))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, other)


def test_grey_stays_grey() -> None:
    grey = np.repeat(photograph()[..., :1], 3, -1)
    for name in ("saturate", "brightness", "contrast"):
        found = corrupt(grey, name, 5)
        assert (found == found[..., :1]).all()


def test_brightness_keeps_the_hue() -> None:
    found = corrupt(np.array([[[100, 50, 0]]], np.uint8), "brightness", 2)[0, 0]
    assert found.tolist() == [151, 76, 0]


def test_a_zoom_keeps_the_middle() -> None:
    picture = np.zeros((61, 61, 3), np.uint8)
    picture[26:35, 26:35] = 255
    found = corrupt(picture, "zoom_blur", 5)
    assert found[30, 30].min() == 255
    assert np.allclose(found.astype(float), found[::-1, ::-1].astype(float), atol=1)


def test_a_corrupted_set_keeps_its_masks_and_has_other_pixels(tmp_path: Path) -> None:
    plain = load_dataset(write_dataset(tmp_path / "cells", "cells", train=1, test=2, size=48).parent)
    worse = Corrupted.of(plain, "contrast", 5)
    item = plain.split("test")[0]
    assert np.array_equal(worse.mask(item), plain.mask(item))
    assert not np.array_equal(worse.image(item), plain.image(item))
    assert worse.digest(item) != plain.digest(item)
    found = corruption_scores(lambda d: float(d.image(item).std()), plain, ["contrast", "jpeg"])
    assert list(found) == ["contrast", "jpeg"]
    assert found["contrast"] == sorted(found["contrast"], reverse=True)


def test_what_is_not_here() -> None:
    with pytest.raises(UnknownName) as unknown:
        corrupt(photograph(), "gaussian_nois", 1)
    says(unknown.value, "gaussian_noise")
    with pytest.raises(BadCall) as refused:
        corrupt(photograph(), "contrast", 6)
    says(refused.value, "1 to 5", "6")
    assert len(CORRUPTIONS) + len(MISSING) == 18
    for name in MISSING:
        with pytest.raises(BadCall) as refused:
            corrupt(photograph(), name, 1)
        says(refused.value, name, "jpeg")
