"""Annotation styles: outlines and pieces by hand, and sources that draw alike are found."""

from pathlib import Path

import numpy as np
import pytest

from medgraft.errors import BadCall
from medgraft.training.annotation_style import annotation_style, piece_sizes, roughness
from medgraft.training.data import Dataset, load_dataset
from tests.training.toy_pack import entry, pack

SIDE = 256
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]


def disc(radius: float, row: float = 128, column: float = 128, *, waves: float = 0, count: int = 60) -> np.ndarray:
    """A disc; its radius swings by `waves` pixels, `count` times around."""
    angle = np.arctan2(ROWS - row, COLUMNS - column)
    return np.hypot(ROWS - row, COLUMNS - column) < radius + waves * np.sin(count * angle)


def test_smooth_outlines_have_no_roughness_at_any_size_and_angle() -> None:
    slanted = (ROWS - 128) * 0.3 + (COLUMNS - 128) > 0
    for smooth in (disc(20), disc(60), disc(110), slanted):
        assert abs(roughness(smooth)) < 0.03
    rough = [roughness(disc(60, waves=waves)) for waves in (0, 1.5, 3)]
    assert rough[0] < rough[1] < rough[2]
    assert rough[2] > 0.1
    lines = ROWS % 16 == 0  # one pixel wide: gone at once
    assert roughness(lines) == 1


def test_roughness_does_not_depend_on_the_resolution() -> None:
    mask = disc(60, waves=4, count=40)
    assert roughness(np.kron(mask, np.ones((2, 2), bool))) == pytest.approx(roughness(mask), abs=0.05)


def test_what_has_no_outline_is_not_counted_and_what_is_no_mask_is_refused() -> None:
    assert np.isnan(roughness(np.zeros((9, 9), bool)))
    assert np.isnan(roughness(np.ones((9, 9), bool)))
    assert 0 <= roughness(np.eye(3, dtype=bool)) <= 1
    for bad in (np.zeros((9, 9), np.uint8), np.zeros((3, 9, 9), bool), np.zeros((0, 3), bool)):
        for measure in (roughness, piece_sizes):
            with pytest.raises(BadCall, match="booleans"):
                measure(bad)


def test_pieces_by_hand() -> None:
    assert piece_sizes(np.zeros((4, 4), bool)).tolist() == []
    assert piece_sizes(np.ones((4, 5), bool)).tolist() == [20]
    assert piece_sizes(np.eye(6, dtype=bool)[:, ::-1].copy()).tolist() == [6]  # diagonal neighbours touch
    board = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]], bool)
    assert piece_sizes(board).tolist() == [1, 2, 2]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.4, 0.6])
def test_pieces_agree_with_scipy(share: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy comes with the development tools only")
    mask = np.random.default_rng(0).random((90, 120)) < share
    number, _ = ndimage.label(mask, np.ones((3, 3)))
    assert piece_sizes(mask).tolist() == sorted(np.bincount(number.ravel())[1:].tolist())


def source(root: Path, masks: list[np.ndarray], **more: object) -> Dataset:
    items = [entry(n, **more) for n in range(len(masks))]
    pack(root, items, [m.astype(np.uint8) for m in masks], classes={"0": "background", "1": "lesion", "2": "other"})
    for n in range(len(masks)):
        from tests.training.toy_pack import picture, save

        save(root / f"images/i{n}.png", picture(n, masks[n].shape))
    return load_dataset(root)


def drawn(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "coarse":
        return disc(40 + 10 * rng.random(), *(100 + 50 * rng.random(2)))
    fine = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(6, 10)):
        fine |= disc(8 + 4 * rng.random(), *(30 + 190 * rng.random(2)), waves=2, count=12)
    return fine


def test_sources_that_draw_alike_form_a_group(tmp_path: Path) -> None:
    kinds = {"a": "coarse", "b": "fine", "c": "coarse", "d": "fine"}
    sources = {
        name: source(tmp_path / name, [drawn(kind, 10 * n + k) for k in range(6)])
        for n, (name, kind) in enumerate(kinds.items())
    }
    found = annotation_style(sources)
    assert found["groups"] == [["a", "c"], ["b", "d"]]
    assert found["distances"]["a | c"] < 1 < found["distances"]["a | b"]
    a, b = (found["sources"][name]["lesion"] for name in "ab")
    assert a["images"] == 6
    assert a["pieces"] == 1
    assert b["pieces"] > 4
    assert a["roughness"] < 0.03 < b["roughness"]
    assert a["size"]["low"] <= a["size"]["median"] <= a["size"]["high"]
    assert a["size"]["median"] == pytest.approx(np.pi * 45**2 / SIDE**2 * 1e4, rel=0.3)
    assert "other" not in found["sources"]["a"]  # nobody drew any


def test_classes_that_nobody_drew_and_sources_without_one_in_common(tmp_path: Path) -> None:
    masks = [disc(30 + n) for n in range(3)]
    sources = {
        "a": source(tmp_path / "a", masks),
        "silent": source(tmp_path / "b", masks, labelled=["other"]),
        "single": source(tmp_path / "c", masks[:1]),
    }
    found = annotation_style(sources)
    assert found["sources"]["silent"] == {}
    assert found["distances"] == {"a | silent": None, "a | single": None, "silent | single": None}
    assert found["groups"] == [["a"], ["silent"], ["single"]]
    assert annotation_style({"a": sources["a"]}, split="test")["sources"]["a"] == {}
