import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medgraft.errors import BadData
from medgraft.training.data import load_dataset
from tests.training.toy_pack import blocks, picture, save


def pairs(root: Path, count: int, *values: int, suffix: str = "") -> Path:
    for n in range(count):
        save(root / f"images/p{n}.png", picture(n))
        save(root / f"masks/p{n}{suffix}.png", blocks(*values))
    return root


@pytest.mark.parametrize("on", [1, 255])
@pytest.mark.parametrize("suffix", ["", "_mask"])
def test_images_and_masks(tmp_path: Path, on: int, suffix: str) -> None:
    root = pairs(tmp_path, 10, on, suffix=suffix)
    (root / "images/.DS_Store").write_bytes(b"x")
    (root / "images/notes.txt").write_text("x")
    dataset = load_dataset(root)
    assert dataset.classes == {1: "foreground"}
    assert Counter(item.split for item in dataset.items) == {"train": 6, "val": 2, "test": 2}
    assert np.array_equal(dataset.mask(dataset.items[0]), blocks(1))
    assert load_dataset(root).items == dataset.items
    assert load_dataset(root, seed=1).items != dataset.items


def test_classes_are_named_after_the_values_found(tmp_path: Path) -> None:
    dataset = load_dataset(pairs(tmp_path, 3, 128, 255))
    assert dataset.classes == {1: "class_1", 2: "class_2"}
    assert np.array_equal(dataset.mask(dataset.items[0]), blocks(1, 2))
    only = load_dataset(tmp_path, classes=("class_2",))
    assert np.array_equal(only.mask(only.items[0]), blocks(0, 1))


def test_pairs_under_split_folders(tmp_path: Path) -> None:
    pairs(tmp_path / "train", 3, 1)
    pairs(tmp_path / "test", 2, 1)
    dataset = load_dataset(tmp_path)
    assert Counter(item.split for item in dataset.items) == {"train": 3, "test": 2}
    assert dataset.items[0].id == "train/p0"


def test_pairs_that_do_not_match(tmp_path: Path) -> None:
    root = pairs(tmp_path / "a", 3, 1)
    (root / "masks/p1.png").unlink()
    with pytest.raises(BadData, match=r"1 of 3 images without a mask.*p1\.png"):
        load_dataset(root)
    root = pairs(tmp_path / "b", 3, 1)
    (root / "images/p1.png").unlink()
    with pytest.raises(BadData, match=r"1 masks without an image.*p1\.png"):
        load_dataset(root)
    root = pairs(tmp_path / "c", 3, 1)
    save(root / "images/p1.jpg", picture(1))
    with pytest.raises(BadData, match="several files under the same name: p1;"):
        load_dataset(root)
    root = pairs(tmp_path / "d", 3, 1)
    shutil.rmtree(root / "masks")
    with pytest.raises(BadData, match="no folder masks/"):
        load_dataset(root)


def test_masks_that_are_no_class_maps(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"all 2 masks .* are empty"):
        load_dataset(pairs(tmp_path / "a", 2, 0))
    root = pairs(tmp_path / "b", 1, 1)
    save(root / "masks/p0.png", picture(0)[..., 0])
    with pytest.raises(BadData, match=r"different values.*no map of classes"):
        load_dataset(root)


def test_class_folders(tmp_path: Path) -> None:
    for n in range(10):
        save(tmp_path / f"cat/{n}.png", picture(n))
        save(tmp_path / f"dog/{n}.jpg", picture(n))
    dataset = load_dataset(tmp_path)
    assert (dataset.labels, dataset.label_names) == ("label", ("cat", "dog"))
    assert dataset.items[0].id == "cat/0"
    for name, count in {"train": 6, "val": 2, "test": 2}.items():  # in proportion
        assert Counter(item.label for item in dataset.split(name)) == {0: count, 1: count}


def test_class_folders_with_a_split(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"train/cat/{n}.png", picture(n))
        save(tmp_path / f"train/dog/{n}.png", picture(n))
    save(tmp_path / "valid/dog/0.png", picture(0))
    dataset = load_dataset(tmp_path)
    assert Counter((item.split, item.label) for item in dataset.items) == {
        ("train", 0): 3,
        ("train", 1): 3,
        ("val", 1): 1,
    }
    (tmp_path / "train/eel").mkdir()
    with pytest.raises(BadData, match="eel has no images, so there is no training item of 'eel'"):
        load_dataset(tmp_path)


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="found nothing there"):
        load_dataset(tmp_path / "absent")
    with pytest.raises(BadData, match="is empty"):
        load_dataset(tmp_path)
    save(tmp_path / "loose.png", picture(0))
    with pytest.raises(BadData, match="1 pictures and no folders; wanted: "):
        load_dataset(tmp_path)
    with pytest.raises(BadData, match="found a file there"):
        load_dataset(tmp_path / "loose.png")
    save(tmp_path / "only/a.png", picture(0))
    with pytest.raises(BadData, match=r"1 class folder \(only\)"):
        load_dataset(tmp_path)
    volumes = tmp_path / "v"
    (volumes / "images").mkdir(parents=True)
    (volumes / "images/a.nii.gz").write_bytes(b"x")
    with pytest.raises(BadData, match="v has no folder masks/"):
        load_dataset(volumes)
    (volumes / "masks").mkdir()
    (volumes / "masks/a.txt").write_text("x")
    with pytest.raises(BadData, match="masks holds no pictures and no volumes"):
        load_dataset(volumes)
