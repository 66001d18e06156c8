"""The retina recipe: adapters and whole networks side by side, and the dark border around a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgraft.adapters import Adapter, Host, LinearHead, Task
from medgraft.adapters.store import read_adapter, read_record, save_adapter
from medgraft.adapters.task import Preprocessing
from medgraft.backbones import Backbone
from medgraft.errors import BadCall
from medgraft.pixels import bright_box, put_back
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import Batches, load_dataset
from medgraft.training.model import NAME, open_model
from medgraft.training.network import is_network
from tests.training.toy_pack import entry, pack, save

TINY = "random:timm:vit_tiny_patch16_224"


def fundus(seed: int, border: int = 20, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A bright square with a brighter stripe, in a dark frame (left and right only) with a hot pixel in it."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 12, (size, size + 2 * border, 3), dtype=np.uint8)
    image[:, border:-border] = rng.integers(60, 120, (size, size, 3), dtype=np.uint8)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[20:36, border : border + 30] = 1
    image[mask == 1] = 220
    image[5, 3] = 255
    return image, mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fundus")
    items = [entry(n, split="train" if n < 4 else "test") for n in range(6)]
    pack(root, items, [fundus(0)[1]], classes={"0": "background", "1": "vessel"})
    for n in range(6):
        save(root / f"images/i{n}.png", fundus(n)[0])
    return root


def run(folder: Path, out: Path, **more: object) -> Run:
    shared = {"backbone": TINY, "image_size": 64, "steps": 2, "batch": 2, "quiet": True, "views": 2}
    return Run(folder, out, **{**find_recipe("retina").defaults, **shared, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", ["lora", "none", "full"])
def test_adapters_and_networks_side_by_side(parts: str, folder: Path, tmp_path: Path) -> None:
    result = find_recipe("retina").program(run(folder, tmp_path / "a"), parts=parts)
    assert result["kind"] == ("network" if parts == "full" else "adapter")
    assert is_network(tmp_path / "a") == (parts == "full")
    host, adapter = open_model(str(tmp_path / "a"))
    assert adapter.preprocessing.crop
    assert [p.kind for p in adapter.parts.values()][-1] == "linear_head"  # type: ignore[union-attr]
    image, _ = fundus(5)
    assert (host.predict(image, NAME)[:, :20] == 0).all()  # outside the border is background
    if parts == "lora":
        assert host.cut(NAME) == host.backbone.depth - 2


def test_fuse_style_mixes_behind_the_cached_stage_and_is_told(folder: Path, tmp_path: Path) -> None:
    find_recipe("retina").program(run(folder, tmp_path / "a", mix="cosine"))
    assert read_record(tmp_path / "a")["provenance"]["mix"] == "cosine"
    plain = find_recipe("retina").program(run(folder, tmp_path / "b"))
    assert plain["steps"] == 2
    assert "mix" not in read_record(tmp_path / "b")["provenance"]
    a, b = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in "ab")
    assert a != b
    find_recipe("retina").program(run(folder, tmp_path / "c", mix="random"), parts="full")
    with pytest.raises(BadCall, match="what lies before is cached"):
        find_recipe("retina").program(run(folder, tmp_path / "d", mix="random", mix_stage=2))
    find_recipe("retina").program(run(folder, tmp_path / "d", mix="random", mix_stage=2, cache="off"))


def test_what_a_user_gets_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCall, match="lora, none or full"):
        find_recipe("retina").program(run(folder, tmp_path / "a"), parts="all")
    for late in (0, 13):
        with pytest.raises(BadCall, match="1 to 12"):
            find_recipe("retina").program(run(folder, tmp_path / "a"), late=late)
    assert not (tmp_path / "a").exists()


# The dark border


def test_the_box_of_a_picture_by_hand() -> None:
    image, _ = fundus(0)
    assert bright_box(image) == (slice(0, 64), slice(20, 84))
    dark = np.zeros((30, 40, 3), np.uint8)
    assert bright_box(dark) == (slice(0, 30), slice(0, 40))
    dark[3:9, 5:25] = 200  # six rows: too little to be a picture
    assert bright_box(dark) == (slice(0, 30), slice(0, 40))
    dark[2:20, 5:25, 2] = 21
    assert bright_box(dark) == (slice(2, 20), slice(5, 25))
    for bad in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3))):
        with pytest.raises(BadCall, match="uint8"):
            bright_box(bad)
    inside = np.arange(6).reshape(1, 2, 3)
    whole = put_back(inside, (slice(1, 3), slice(0, 3)), (4, 5), fill=9)
    assert whole.shape == (1, 4, 5)
    assert np.array_equal(whole[:, 1:3, :3], inside)
    assert (whole == 9).sum() == 4 * 5 - 6


def test_training_and_prediction_see_the_same_pixels(folder: Path) -> None:
    dataset = load_dataset(folder)
    item = dataset.items[0]
    shared = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 1}
    cut, whole = (Batches(dataset, [item], **shared, crop=crop) for crop in (True, False))  # type: ignore[arg-type]
    x, y = cut.example(item)
    assert torch.equal(x, Preprocessing(32, (0.5,) * 3, (0.5,) * 3, crop=True)(dataset.image(item)))
    assert torch.equal(whole.example(item)[0], Preprocessing(32, (0.5,) * 3, (0.5,) * 3)(dataset.image(item)))
    assert ((x[0] > 0.5).long() == y).float().mean() > 0.98  # the stripe is where the mask says
    assert cut.digest(item) != whole.digest(item)


@pytest.mark.parametrize("classes", [("a",), ("a", "b")])
def test_a_cropped_prediction_lies_where_it_belongs(vit: Backbone, classes: tuple[str, ...], tmp_path: Path) -> None:
    task = Task("segment", classes)
    adapter = Adapter.of(vit, task, {"head": LinearHead.on(vit, task)})
    adapter.preprocessing = Preprocessing(64, (0.5,) * 3, (0.5,) * 3, crop=True)
    host = Host(vit)
    host.add(adapter, "cut")
    image, _ = fundus(1)
    inside = np.ascontiguousarray(image[:, 20:84])
    p = host.predict(image, "cut", probabilities=True)
    assert p.shape == (max(len(classes), 2 * len(classes) - 1), *image.shape[:2])
    assert np.array_equal(p[:, :, 20:84], host.predict(inside, "cut", probabilities=True))
    border = np.delete(p, np.s_[20:84], axis=2)
    assert (border[-len(classes) :] == 0).all()
    if len(classes) > 1:
        np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)
    labels = host.predict(image, "cut")
    assert (np.delete(labels, np.s_[20:84], axis=1) == 0).all()
    assert np.array_equal(labels[:, 20:84], host.predict(inside, "cut"))

    save_adapter(adapter, tmp_path / "a", dtype="float32", backbone=vit)
    assert read_adapter(tmp_path / "a").preprocessing == adapter.preprocessing
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["preprocessing"]["crop"] is True
    assert "crop" not in Preprocessing(64, (0.5,) * 3, (0.5,) * 3).to_json()  # older adapters keep their form
