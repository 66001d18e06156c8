"""The recipes that adapt SAM, at toy size: they train, save, reload, answer; what they keep frozen; bad input."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgraft.adapters import Fusion, Host
from medgraft.adapters.explain import explain
from medgraft.adapters.store import read_record
from medgraft.backbones import State
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.recipes import RECIPES, Run, find_recipe
from medgraft.recipes.dry import dry_adapter
from medgraft.recipes.sam_decoder import JITTER, SURE, ByBox, some_objects
from medgraft.training.cache import PrefixCache
from medgraft.training.data import load_dataset
from medgraft.training.fit import Asked
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from medgraft.training.prompting import objects_of
from tests.helpers import says

SAM = "random:sam-tiny"
NAMES = ("sam_path", "surgical_sam", "cemb_sam", "sam_decoder")
SMALL = {"sam_path": {"encoder": "random:hf:vit"}}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of two sub-groups."""
    folder = write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=4, test=2, size=64).parent
    said = json.loads((folder / "dataset.json").read_text())
    for i, item in enumerate(said["items"]):
        item["domain"] = ("north", "south")[i % 2]
    (folder / "dataset.json").write_text(json.dumps(said))
    return folder


def run(data: Path, out: Path, name: str, **more: object) -> Run:
    shared = {
        **RECIPES[name].defaults,
        "backbone": SAM,
        "image_size": 64,
        "steps": 2,
        "batch": 2,
        "views": 1,
        "quiet": True,
    }
    classes = ("nucleus",) if name in ("cemb_sam", "sam_decoder") else None
    return Run(data, out, **{**shared, "classes": classes, **more})  # type: ignore[arg-type]


def trained(data: Path, out: Path, name: str, options: dict | None = None, **more: object) -> dict:
    return find_recipe(name).program(run(data, out, name, **more), **{**SMALL.get(name, {}), **(options or {})})


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_saves_and_answers(name: str, cells: Path, tmp_path: Path) -> None:
    result = trained(cells, tmp_path / "a", name)
    assert "random weights" in result["backbone"]
    assert (tmp_path / "a.log" / "log.jsonl").is_file()
    assert list((tmp_path / "a.log" / "overlays").glob("*.png"))
    host, adapter = open_model(str(tmp_path / "a"))
    data = load_dataset(cells, classes=adapter.task.classes)
    item = data.split("test")[0]
    asks = any(r.takes_prompts for r in adapter.readouts)
    prompts = {"box": (2, 2, 40, 40)} if asks else None
    if name == "cemb_sam":
        assert adapter.readouts[0].groups == ("north", "south")
        prompts = {**prompts, "group": item.domain}
    found = host.predict(data.image(item), NAME, prompts=prompts)
    assert found.shape == data.mask(item).shape
    assert set(np.unique(found)) <= {0, *adapter.task.values}


@pytest.mark.parametrize("name", NAMES)
def test_it_explains_itself(name: str) -> None:
    adapter, backbone = dry_adapter(name, backbone=SAM, image_size=64)
    facts = explain(adapter, backbone)
    assert facts.trainable == adapter.trainable > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_is_frozen_in_all_but_one_so_that_its_prefix_is_computed_once(name: str) -> None:
    adapter, backbone = dry_adapter(name, backbone=SAM, image_size=64)
    host = Host(backbone)
    host.add(adapter, NAME)
    assert host.cut(NAME) == (0 if name == "surgical_sam" else backbone.depth)


def test_caching_both_encoders_changes_nothing(cells: Path, tmp_path: Path) -> None:
    made = []
    for name, cache in (("a", "memory"), ("b", "off")):
        trained(cells, tmp_path / name, "sam_path", cache=cache, dtype="float32")
        made.append(open_model(str(tmp_path / name))[1].tensors())
    for name, t in made[0].items():
        assert torch.allclose(t, made[1][name], rtol=1e-4, atol=1e-6), name


def test_training_sees_each_view_through_the_second_encoder_once(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, states, images = Fusion.seen, [], []

    def seen(self: Fusion, image: torch.Tensor | State) -> torch.Tensor:
        (states if isinstance(image, State) else images).append(image)
        return real(self, image)

    monkeypatch.setattr(Fusion, "seen", seen)
    caches = []
    made = PrefixCache.__init__

    def noted(self: PrefixCache, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)  # type: ignore[arg-type]
        caches.append(self)

    monkeypatch.setattr(PrefixCache, "__init__", noted)
    trained(cells, tmp_path / "a", "sam_path", {"accumulate": 1}, steps=6, shots=2)
    assert len(states) == 6
    second, first = caches
    assert second.misses == first.misses == 2
    assert second.hits == first.hits == 10


def test_the_defaults_are_the_papers() -> None:
    def own(name: str) -> dict:
        return {n: p.default for n, p in inspect.signature(find_recipe(name).program).parameters.items()}

    path, surgical, cemb = own("sam_path"), own("surgical_sam"), own("cemb_sam")
    assert (path["alpha"], path["beta"], path["lr"], path["weight_decay"], path["warmup"]) == (
        0.25,
        0.0625,
        1e-4,
        0.01,
        72,
    )
    assert (surgical["rank"], surgical["lr"], surgical["weight_decay"], surgical["dice"]) == (4, 1e-3, 0.1, 0.8)
    assert (cemb["lr"], cemb["weight_decay"], cemb["form"], cemb["unknown"]) == (3e-4, 1e-3, "paper", "refuse")
    for name, batch in (("sam_path", 12), ("surgical_sam", 12), ("cemb_sam", 8)):
        assert find_recipe(name).defaults["batch"] == batch
        assert find_recipe(name).defaults["backbone"] == "medgraft:starter-sam"


def test_the_low_rank_part_has_no_scale_of_its_own(cells: Path, tmp_path: Path) -> None:
    trained(cells, tmp_path / "a", "surgical_sam")
    lora = open_model(str(tmp_path / "a"))[1].parts["lora"]
    assert lora.scale == 1
    assert set(lora.sites) == {f"blocks.{i}.attn.{p}" for i in range(3) for p in "qv"}


def test_without_prompts_the_decoder_finds_every_class(cells: Path, tmp_path: Path) -> None:
    result = trained(cells, tmp_path / "a", "sam_decoder", {"prompts": "none"}, classes=None)
    assert result["classes"] == ["cytoplasm", "nucleus"]
    assert [p["kind"] for p in read_record(tmp_path / "a")["parts"]] == ["tuned", "class_prompts"]


def test_sam_alone_is_the_papers_fine_tuned_sam(cells: Path, tmp_path: Path) -> None:
    trained(cells, tmp_path / "a", "sam_path", {"encoder": "none", "beta": 0.0, "form": "code"})
    record = read_record(tmp_path / "a")["parts"]
    assert [p["kind"] for p in record] == ["tuned", "class_prompts"]
    assert record[1]["config"]["quality"] == []


# Boxes in training


def asked(targets: torch.Tensor, seen: list) -> Asked:
    from medgraft.training.batches import Batch
    from medgraft.training.data import Item

    images = torch.zeros(len(targets), 3, *targets.shape[1:])
    items = tuple(Item(str(i), "train", domain="ab"[i % 2]) for i in range(len(targets)))

    def resume(state: object, images: torch.Tensor, name: str, *, prompts: object) -> torch.Tensor:
        seen.append(prompts)
        return torch.zeros(len(images), 1, *images.shape[2:], requires_grad=True)

    return Asked(None, "it", Batch(images, targets, items, (0,) * len(items)), None, images, 3, resume)  # type: ignore[arg-type]


def test_training_asks_by_some_of_the_objects_and_forgives_the_rest() -> None:
    targets = torch.zeros(2, 40, 40, dtype=torch.long)
    for i in range(4):
        targets[0, 10 * i + 2 : 10 * i + 8, 4:20] = 1
    targets[1, 5:9, 30:38] = 1
    seen: list = []
    logits = ByBox(0, most=3, groups=("a", "b"))(asked(targets, seen))
    (prompts,) = seen
    assert prompts.boxes.shape == (2, 3, 4)
    assert prompts.real.tolist() == [[True] * 3, [True, False, False]]
    assert prompts.group.tolist() == [0, 1]
    forgiven = (logits == SURE)[:, 0]
    assert forgiven.sum() == 6 * 16
    assert ((targets > 0) & forgiven).sum() == forgiven.sum()
    for box in prompts.boxes[0].tolist():
        inside = targets[0, int(box[1]) : math.ceil(box[3]), int(box[0]) : math.ceil(box[2])]
        assert inside.sum() == 6 * 16, "a training box holds its object whole"
    tight = torch.tensor([[4.0, 10 * i + 2, 20, 10 * i + 8] for i in range(4)])
    for box in prompts.boxes[0]:
        moved = min(((box - t).abs() for t in tight), key=lambda d: float(d.sum()))
        assert 0 < moved.max() <= JITTER * 40 + 1e-4
    again: list = []
    ByBox(0, most=3, groups=("a", "b"))(asked(targets, again))
    assert torch.equal(again[0].boxes, prompts.boxes)


def test_some_objects_are_objects() -> None:
    mask = np.zeros((20, 20), dtype=np.int64)
    mask[1:4, 1:4], mask[8:12, 8:12], mask[15:18, 2:6] = 1, 1, 1
    assert some_objects(mask, 3, np.random.default_rng(0)) is mask
    kept = some_objects(mask, 2, np.random.default_rng(0))
    assert len(objects_of(kept)) == 2
    assert ((kept > 0) <= (mask > 0)).all()


# Bad input


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_without_a_decoder_is_refused(name: str, cells: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCall) as refused:
        trained(cells, tmp_path / "a", name, backbone="random:timm:vit_tiny_patch16_224")
    says(refused.value, "no promptable decoder", "medgraft:starter-sam")


@pytest.mark.parametrize("name", ["cemb_sam", "sam_decoder"])
def test_a_box_is_answered_for_one_class(name: str, cells: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCall) as refused:
        trained(cells, tmp_path / "a", name, classes=None)
    says(refused.value, "2 classes", "--classes")


def test_sub_groups_must_be_there(cells: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(cells, plain)
    said = json.loads((plain / "dataset.json").read_text())
    for item in said["items"]:
        item.pop("domain")
    (plain / "dataset.json").write_text(json.dumps(said))
    with pytest.raises(BadData) as refused:
        trained(plain, tmp_path / "a", "cemb_sam")
    says(refused.value, "domain", "sam_decoder")


def test_a_sub_group_never_seen_is_refused_or_follows_the_rule(cells: Path, tmp_path: Path) -> None:
    image = np.zeros((50, 50, 3), dtype=np.uint8)
    trained(cells, tmp_path / "a", "cemb_sam")
    host, _ = open_model(str(tmp_path / "a"))
    with pytest.raises(UnknownName) as refused:
        host.predict(image, NAME, prompts={"box": (1, 1, 30, 30), "group": "east"})
    says(refused.value, "sub-group", "east")
    trained(cells, tmp_path / "b", "cemb_sam", {"unknown": "mean"})
    host, _ = open_model(str(tmp_path / "b"))
    assert host.predict(image, NAME, prompts={"box": (1, 1, 30, 30), "group": "east"}).shape == (50, 50)
    with pytest.raises(BadCall):
        trained(cells, tmp_path / "c", "cemb_sam", {"unknown": "east"})


def test_other_wrong_options_are_refused(cells: Path, tmp_path: Path) -> None:
    for name, options in (
        ("sam_decoder", {"prompts": "point"}),
        ("sam_path", {"form": "printed"}),
        ("sam_path", {"alpha": 2.0}),
    ):
        with pytest.raises(BadCall):
            trained(cells, tmp_path / "a", name, options)
    with pytest.raises(BadCall):
        find_recipe("sam_path").program(replace(run(cells, tmp_path / "a", "sam_path"), task="classify"))
    assert not (tmp_path / "a").exists()
