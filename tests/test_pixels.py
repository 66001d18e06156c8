"""How a picture becomes a square, and how its frame is found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgraft.adapters import Preprocessing
from medgraft.errors import BadCall
from medgraft.pixels import LARGE, LARGE_SIDE, Frame, fitted, prepare, to_tensor
from medgraft.training.transforms import prepare_mask
from tests.helpers import says

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def picture(h: int, w: int) -> np.ndarray:
    return np.random.default_rng(h + w).integers(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "fit", "want"),
    [
        ((30, 60), "stretch", (64, 64)),
        ((30, 60), "pad", (32, 64)),
        ((60, 30), "pad", (64, 32)),
        ((1, 900), "pad", (1, 64)),
    ],
)
def test_sides_in_a_square(size: tuple[int, int], fit: str, want: tuple[int, int]) -> None:
    assert fitted(size, 64, fit) == want


def test_padding_is_the_mean_colour_which_is_zero_afterwards() -> None:
    x = prepare(picture(30, 60), 64, MEAN, STD, "pad")
    assert x.shape == (3, 64, 64)
    assert x[:, 32:].abs().max() < 1e-6
    inside = to_tensor(picture(30, 60)[:, :, :], 64, "pad", MEAN)[:, :32]
    torch.testing.assert_close(
        x[:, :32], (inside - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    )


def test_a_mask_is_padded_like_its_picture() -> None:
    mask = np.ones((30, 60), np.uint8)
    framed = prepare_mask(mask, 64, "pad")
    assert framed[:32].all()
    assert not framed[32:].any()


def test_a_square_picture_is_the_same_either_way() -> None:
    image = picture(40, 40)
    assert torch.equal(prepare(image, 32, MEAN, STD, "pad"), prepare(image, 32, MEAN, STD))


def test_the_frame_of_a_cropped_picture() -> None:
    image = np.zeros((50, 90, 3), np.uint8)
    image[10:40, 20:80] = 200
    frame = Frame.of(image, 64, "pad", crop=True)
    assert frame.box == (slice(10, 40), slice(20, 80))
    assert frame.inside == (32, 64)
    assert frame.scale == (64 / 60, 32 / 30)


def test_a_huge_picture_is_averaged_down_first() -> None:
    side = int(LARGE**0.5) + 64
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2] = 200
    small = to_tensor(image, 32)
    assert side > LARGE_SIDE
    assert abs(float(small[:, :15].mean()) - 200 / 255) < 1e-3
    assert float(small[:, 17:].max()) < 1e-3


def test_bad_words() -> None:
    with pytest.raises(BadCall) as error:
        fitted((3, 4), 64, "crop")  # type: ignore[arg-type]
    says(error.value, "stretch", "pad")


def test_older_adapters_keep_their_form() -> None:
    plain = Preprocessing(64, MEAN, STD)
    assert "fit" not in plain.to_json()
    padded = Preprocessing(64, MEAN, STD, fit="pad")
    assert Preprocessing.from_json(padded.to_json()) == padded
