"""Scores, predictions for files, whole networks on disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.adapters import Adapter, ClassifierHead, Host, LinearHead, Task
from medgraft.adapters.store import read_adapter, read_record, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadAdapter, BadCall, BadData, WrongBackbone
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate, record_score
from medgraft.training.model import NAME, choose_device, open_model, open_together
from medgraft.training.network import load_network, save_network
from medgraft.training.phantoms import write_dataset
from medgraft.training.predict import predict_files
from tests.helpers import says

STARTER = "random:medgraft:starter-vit"


@pytest.fixture(scope="module")
def starter() -> Backbone:
    return load_backbone(STARTER, image_size=64)


class Always(LinearHead):
    """A head whose logits are constant: class `winner` everywhere."""

    winner = 0

    def read(self, features, image):  # type: ignore[no-untyped-def]
        logits = torch.full((image.shape[0], self.config["outputs"], *image.shape[-2:]), -5.0)
        logits[:, self.winner] = 5.0
        return logits


def cells(folder: Path) -> Path:
    return write_dataset(folder, "cells", train=3, test=3, size=64).parent


def test_dice_and_iou_by_hand(starter: Backbone, tmp_path: Path) -> None:
    """Everything predicted as nucleus: Dice is 2 n / (n + N) by image, cytoplasm scores 0 where it is."""
    dataset = load_dataset(cells(tmp_path))
    task = Task("segment", ("cytoplasm", "nucleus"))
    head = Always({}, width=starter.spec.width, outputs=3)
    head.winner = 2
    host = Host(starter)
    host.add(Adapter.of(starter, task, {"head": head}), NAME)
    result = evaluate(host, NAME, dataset)
    wanted, wanted_iou = [], []
    for item in dataset.split("test"):
        truth = dataset.mask(item)
        share = (truth == 2).mean()
        wanted.append(np.mean([0.0, 2 * share / (1 + share)]))
        wanted_iou.append(np.mean([0.0, share]))
    assert result["dice"] == pytest.approx(np.mean(wanted))
    assert result["iou"] == pytest.approx(np.mean(wanted_iou))
    assert result["n"] == 3
    assert result["interval"][0] <= result["dice"] <= result["interval"][1]
    assert {"dice", "iou", "per_image", "interval", "n"} <= result.keys()
    json.dumps(result, allow_nan=False)


def test_a_class_nobody_drew_on_an_image_is_not_scored(starter: Backbone, tmp_path: Path) -> None:
    folder = cells(tmp_path)
    pack = json.loads((folder / "dataset.json").read_text())
    test = [i for i in pack["items"] if i["split"] == "test"]
    test[0]["labelled"] = ["nucleus"]
    (folder / "dataset.json").write_text(json.dumps(pack))
    host = Host(starter)
    head = Always({}, width=starter.spec.width, outputs=3)
    host.add(Adapter.of(starter, Task("segment", ("cytoplasm", "nucleus")), {"head": head}), NAME)
    result = evaluate(host, NAME, load_dataset(folder))
    scores = {i["id"]: i["dice"] for i in result["per_image"]}
    assert scores[test[0]["id"]]["cytoplasm"] is None
    assert scores[test[1]["id"]]["cytoplasm"] is not None


def test_classes_and_splits_that_do_not_fit_are_named(starter: Backbone, tmp_path: Path) -> None:
    host = Host(starter)
    task = Task("segment", ("nucleus",))
    host.add(Adapter.of(starter, task, {"head": LinearHead.on(starter, task)}), NAME)
    with pytest.raises(BadCall, match=r"segments nucleus.*cytoplasm, nucleus.*--classes nucleus"):
        evaluate(host, NAME, load_dataset(cells(tmp_path)))
    with pytest.raises(BadData, match="no items in split 'val'"):
        evaluate(host, NAME, load_dataset(tmp_path, classes=("nucleus",)), "val")


def test_classification_scores(starter: Backbone, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for n, name in enumerate(("dark", "light")):
            for i in range(3):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((40, 40, 3), 40 + 170 * n + i, np.uint8)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    task = Task("classify", ("dark", "light"))
    host = Host(starter)
    host.add(Adapter.of(starter, task, {"head": ClassifierHead.on(starter, task)}), NAME)
    result = evaluate(host, NAME, load_dataset(tmp_path, labels="label"))
    assert {"accuracy", "balanced_accuracy", "auc", "interval", "per_image", "n"} <= result.keys()
    assert result["n"] == 6
    other = Host(starter)
    other.add(Adapter.of(starter, Task("classify", ("a", "b")), {"head": ClassifierHead.on(starter, task)}), NAME)
    dataset = load_dataset(tmp_path, labels="label")
    with pytest.raises(BadCall, match="dark, light"):
        evaluate(other, NAME, dataset)


def saved(starter: Backbone, out: Path, values: tuple[int, ...] = ()) -> Path:
    task = Task("segment", ("cytoplasm", "nucleus"), values)
    return save_adapter(Adapter.of(starter, task, {"head": LinearHead.on(starter, task)}), out, backbone=starter)


def test_a_backbone_whose_file_is_not_known_is_asked_for(starter: Backbone, tmp_path: Path) -> None:
    """An adapter holds no path: what came from a file has to be named again."""
    adapter = read_adapter(saved(starter, tmp_path / "a"))
    adapter.backbone = replace(adapter.backbone, id="meshnet:model18cls")
    save_adapter(adapter, tmp_path / "b")
    for opening in (open_model, lambda source: open_together([source])):
        with pytest.raises(BadData) as asked:
            opening(str(tmp_path / "b"))
        says(asked.value, "backbone is not at hand", "meshnet:model18cls@PATH", "--backbone")
    with pytest.raises(BadData) as named:
        open_model(str(tmp_path / "b"), backbone="meshnet:model18cls")
    assert "not at hand" not in str(named.value)


def test_files_get_masks_in_their_own_size_and_label_values(starter: Backbone, tmp_path: Path) -> None:
    host, _ = open_model(str(saved(starter, tmp_path / "a", (7, 200))))
    sizes = {"wide.png": (50, 90), "odd.png": (33, 17)}
    for name, (h, w) in sizes.items():
        Image.fromarray(np.random.default_rng(h).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / name)
    list(predict_files(host, [tmp_path / n for n in sizes], tmp_path / "out"))
    for name, size in sizes.items():
        mask = np.asarray(Image.open(tmp_path / "out" / name))
        assert mask.shape == size
        assert set(np.unique(mask)) <= {0, 7, 200}
        assert (tmp_path / "out" / name.replace(".png", "_overlay.png")).is_file()


def test_a_bad_image_among_many_stops_before_anything_is_written(starter: Backbone, tmp_path: Path) -> None:
    host, _ = open_model(str(saved(starter, tmp_path / "a")))
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(BadData, match=r"bad\.png"):
        list(predict_files(host, [tmp_path / "good.png", tmp_path / "bad.png"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadCall, match="good"):
        list(predict_files(host, [tmp_path / "good.png", tmp_path / "sub" / "good.jpg"], tmp_path / "out"))


def test_a_score_is_kept_with_the_adapter_and_its_tensors_stay(starter: Backbone, tmp_path: Path) -> None:
    where = saved(starter, tmp_path / "a")
    before = (where / "adapter.safetensors").read_bytes()
    entry = {
        "dataset": "toy",
        "split": "test",
        "n": 3,
        "dice": 0.5,
        "interval": [0.4, 0.6],
        "per_image": [{"id": "patient_7"}],
    }
    record_score(where, entry)
    record_score(where, {**entry, "dice": 0.6})
    kept = read_record(where)["evaluation"]
    assert [e["dice"] for e in kept] == [0.6]
    assert b"patient_7" not in (where / "adapter.json").read_bytes()
    assert (where / "adapter.safetensors").read_bytes() == before
    assert read_adapter(where).evaluation == kept


def test_a_network_loads_as_a_backbone_and_is_no_adapter(starter: Backbone, tmp_path: Path) -> None:
    copied = starter.trainable_copy()
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(0.01)
    task = Task("segment", ("lesion",))
    adapter = Adapter.of(copied, task, {"head": LinearHead.on(copied, task)})
    save_network(copied, adapter, tmp_path / "net", image_size=64)
    x = torch.randn(1, 3, 64, 64)
    backbone, head = load_network(tmp_path / "net")
    host, _ = open_model(str(tmp_path / "net"))
    torch.testing.assert_close(host(x, NAME), adapter.readouts[0](copied(x), x))
    named = load_backbone(f"medgraft:starter-vit@{tmp_path / 'net' / 'backbone.safetensors'}", image_size=64)
    assert named.spec.fingerprint == backbone.spec.fingerprint != starter.spec.fingerprint
    with pytest.raises(BadAdapter, match=r"adapter\.json"):
        read_adapter(tmp_path / "net")
    with pytest.raises(WrongBackbone, match="made for"):
        Host(starter).add(head, "head")
    with pytest.raises(BadCall, match="weights of its own"):
        open_model(str(tmp_path / "net"), backbone=STARTER)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(BadCall, match="auto or cpu"):
        choose_device("toaster")
