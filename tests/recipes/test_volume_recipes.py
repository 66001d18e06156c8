"""The recipes of volumes at toy size: each trains, saves, reloads, scores and explains itself; stages, priors, queries, bad calls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import medgraft
from medgraft.adapters import Host
from medgraft.adapters.explain import explain
from medgraft.adapters.size_prior import Priors
from medgraft.adapters.store import read_adapter, read_record
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.errors import BadCall, UnknownName
from medgraft.recipes import RECIPES, Run, fseft, sparse_transfer
from medgraft.recipes.dry import dry_adapter
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import NAME, open_model
from medgraft.training.transduce import transduce
from medgraft.training.volume_data import volumes_of
from tests.helpers import TINY_SWIN_UNETR, says
from tests.training.volumes import volume_pack

MESHNET = "random:meshnet:model5_gw_ae"
UNET3D = "random:volume:unet3d?filters=4"
METHODS = ("adapter", "linear_probe", "ft_last", "ft", "scratch")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return volume_pack(tmp_path_factory.mktemp("boxes"), ("train", "train", "test"))


def run(data: Path, out: Path, name: str, **more: Any) -> Run:
    shared = {"backbone": MESHNET, "image_size": 12, "steps": 2, "quiet": True, "spacing": None}
    return Run(data, out, **{**RECIPES[name].defaults, **shared, **more})


def adapt(data: Path, out: Path, name: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return RECIPES[name].program(run(data, out, name, **more), **(options or {}))


def scored(folder: Path, data: Path) -> dict[str, Any]:
    host, _ = open_model(str(folder))
    return evaluate(host, NAME, volumes_of(load_dataset(data)))


@pytest.mark.parametrize("method", METHODS)
def test_fseft_trains_saves_and_scores(method: str, boxes: Path, tmp_path: Path) -> None:
    result = adapt(boxes, tmp_path / "a", "fseft", {"method": method, "lr": 0.01}, shots=2)
    assert result["kind"] == ("network" if method in ("ft", "scratch") else "adapter")
    assert result["shots"] == 2
    assert 0 <= scored(tmp_path / "a", boxes)["dice"] <= 1
    assert (tmp_path / "a.log" / "log.jsonl").is_file()
    assert [f.name for f in (tmp_path / "a.log" / "overlays").glob("*.png")] == ["v2.png"]
    if result["kind"] == "adapter":
        made = read_adapter(tmp_path / "a")
        kinds = {"adapter": ["spatial_adapter"], "ft_last": ["tuned"], "linear_probe": []}[method]
        assert [p.kind for _, p in made.named_parts()] == ["priors", *kinds, "linear_head"]
        assert isinstance(made.preprocessing, VolumePreprocessing)
        assert made.preprocessing.axcodes == "LIA"
        assert not any(i.id in (tmp_path / "a" / "adapter.json").read_text() for i in load_dataset(boxes).items)


def test_the_prior_is_measured_on_the_whole_support_and_travels(boxes: Path, tmp_path: Path) -> None:
    adapt(boxes, tmp_path / "a", "fseft", {"priors": "size,centroid,length", "margin": 0.2}, image_size=6)
    made = read_adapter(tmp_path / "a").parts["priors"]
    assert isinstance(made, Priors)
    data = volumes_of(load_dataset(boxes))
    shares = [[(data.mask(i) == k).mean() for i in data.split("train")] for k in (1, 2)]
    assert made.each[0].targets == tuple(pytest.approx((np.mean(s),)) for s in shares)
    assert [(p.kind, p.margin) for p in made.each] == [("size", 0.2), ("centroid", 0.2), ("length", 0.2)]


def test_a_loaded_adapter_is_fitted_to_a_new_volume(boxes: Path, tmp_path: Path) -> None:
    adapt(boxes, tmp_path / "a", "fseft", {"lr": 0.01}, steps=20)
    host = Host(medgraft.load_backbone(MESHNET, image_size=12))
    host.add(medgraft.load_adapter(str(tmp_path / "a")), "organ")
    before = {k: t.clone() for k, t in host.adapters["organ"].tensors().items()}
    found = transduce(host, boxes / "images/v2.nii.gz", "organ", steps=3, trust=True)
    assert found.shape == (10, 12, 9)
    assert all(torch.equal(t, before[k]) for k, t in host.adapters["organ"].tensors().items())


def test_a_query_changes_the_second_half_of_training_only(boxes: Path, tmp_path: Path) -> None:
    query = boxes / "images/v2.nii.gz"
    ends = {}
    for name, weight in (("plain", None), ("nought", 0.0), ("pulled", 100.0)):
        options = {"lr": 0.01} | (
            {} if weight is None else {"query": query, "weight": weight, "margin": 0.01, "trust": True}
        )
        adapt(boxes, tmp_path / name, "fseft", options, steps=4, dtype="float32")
        ends[name] = load_file(tmp_path / name / "adapter.safetensors")
    assert all(torch.equal(t, ends["plain"][k]) for k, t in ends["nought"].items())
    assert not all(torch.equal(t, ends["plain"][k]) for k, t in ends["pulled"].items())
    assert read_record(tmp_path / "pulled")["provenance"]["settings"]["transduction"] == 100.0
    assert str(query) not in (tmp_path / "pulled" / "adapter.json").read_text()


@pytest.mark.parametrize("act_on", ["auto", "convolutions"])
def test_volume_lora(act_on: str, boxes: Path, tmp_path: Path) -> None:
    adapt(boxes, tmp_path / "a", "volume_lora", {"act_on": act_on, "rank": 2})
    assert [p.kind for _, p in read_adapter(tmp_path / "a").named_parts()] == ["priors", "conv_lora", "linear_head"]
    assert 0 <= scored(tmp_path / "a", boxes)["dice"] <= 1


@pytest.mark.slow
def test_volume_lora_on_attention(boxes: Path, tmp_path: Path) -> None:
    adapt(boxes, tmp_path / "a", "volume_lora", {"rank": 2}, backbone=TINY_SWIN_UNETR, image_size=32, steps=1)
    assert [p.kind for _, p in read_adapter(tmp_path / "a").named_parts()] == ["priors", "lora", "linear_head"]


@pytest.mark.parametrize("name", ["fseft", "volume_lora", "sparse_transfer", "foundation3d"])
def test_a_recipe_explains_itself(name: str) -> None:
    made, backbone = dry_adapter(name, backbone=UNET3D if name == "sparse_transfer" else MESHNET, image_size=12)
    facts = explain(made, backbone)
    assert facts.trainable == made.trainable > 0


def partly(root: Path, label: dict[str, list[str]]) -> Path:
    """A pack of volumes in which items annotate the classes that `label` names."""
    folder = volume_pack(root, ("train", "train", "test"))
    facts = json.loads((folder / "dataset.json").read_text())
    for item in facts["items"]:
        item |= {"labelled": label[item["id"]]} if item["id"] in label else {}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def test_sparse_transfer_from_partial_labels_to_a_new_organ(boxes: Path, tmp_path: Path) -> None:
    sparse = partly(tmp_path / "sparse", {"v0": ["front"], "v1": ["back"]})
    shared: dict[str, Any] = {"image_size": 8, "patches": 2, "backbone": UNET3D}
    base = adapt(sparse, tmp_path / "base", "sparse_transfer", **shared)
    assert base["kind"] == "network"
    trained = load_file(tmp_path / "base" / "backbone.safetensors")
    start = medgraft.load_backbone(UNET3D).network.state_dict()
    changed = {k for k, t in trained.items() if not torch.equal(t, start[k])}
    assert changed == {k for k in trained if not k.startswith("head.")}  # ours stands in its place
    shared["backbone"] = f"volume:unet3d@{tmp_path / 'base' / 'backbone.safetensors'}"
    ends = {}
    for strategy in ("vanilla", "two_stage"):
        result = adapt(boxes, tmp_path / strategy, "sparse_transfer", {"strategy": strategy}, **shared)
        assert result["kind"] == "network"
        ends[strategy] = load_file(tmp_path / strategy / "backbone.safetensors")
        moved = {k for k, t in ends[strategy].items() if not torch.equal(t, trained[k])}
        assert moved == changed
    assert not torch.equal(ends["vanilla"]["up.0.convs.1.weight"], ends["two_stage"]["up.0.convs.1.weight"])
    assert 0 <= scored(tmp_path / "two_stage", boxes)["dice"] <= 1


def test_stage_1_leaves_all_but_the_last_three_layers_bit_for_bit(boxes: Path, tmp_path: Path) -> None:
    made = run(boxes, tmp_path / "a", "sparse_transfer", backbone=UNET3D, image_size=8, patches=2)
    network, digest = made.frozen.trainable_copy(), made.frozen.digest()
    before = {k: t.clone() for k, t in network.network.state_dict().items()}
    head = fseft.LinearHead.on(made.frozen, made.goal)
    fresh = head.linear.weight.detach().clone()
    options = fseft.FitOptions(2, lr=1e-2)
    sparse_transfer.last_layers(
        made, network, head, ["up.0.0", "up.0.1"], options, sparse_transfer.PartialLoss("hybrid")
    )
    moved = {k for k, t in network.network.state_dict().items() if not torch.equal(t, before[k])}
    assert moved == {f"up.0.convs.{i}.{t}" for i in (0, 1) for t in ("weight", "bias")}
    assert not torch.equal(head.linear.weight, fresh)
    assert made.frozen.digest() == digest
    assert all(p.requires_grad for p in network.parameters())


def test_foundation3d_on_assembled_partial_data(boxes: Path, tmp_path: Path) -> None:
    other = partly(tmp_path / "other", {"v0": ["front"], "v1": ["front"]})
    facts = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**facts, "name": "others"}))
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"others": {"back": None}}))
    options = {"also": str(other), "mapping": mapping, "balance": "source"}
    result = adapt(boxes, tmp_path / "a", "foundation3d", options, image_size=6)
    assert result["kind"] == "network"
    assert result["classes"] == ["front", "back"]
    assert 0 <= scored(tmp_path / "a", boxes)["dice"] <= 1
    again = medgraft.load_backbone(f"meshnet:model5_gw_ae@{tmp_path / 'a' / 'backbone.safetensors'}", image_size=12)
    assert not again.spec.random


def test_pictures_are_as_before(tmp_path: Path) -> None:
    spec = Run(tmp_path, tmp_path / "a", backbone="random:timm:vit_tiny_patch16_224", image_size=64, crop=True)
    assert spec.preprocessing.to_json()["crop"] is True
    assert spec.preprocessing.size == 64


def test_spacing_and_window_go_into_the_adapter(boxes: Path, tmp_path: Path) -> None:
    adapt(boxes, tmp_path / "a", "fseft", {"method": "linear_probe"}, spacing=2.0, window="-175,250")
    found = read_adapter(tmp_path / "a").preprocessing
    assert isinstance(found, VolumePreprocessing)
    assert (found.spacing, found.intensity) == ((2.0, 2.0, 2.0), ("window", -175.0, 250.0))


def test_the_head_starts_at_rows_of_the_networks_own(boxes: Path, tmp_path: Path) -> None:
    options = {"method": "linear_probe", "rows": "2,0,1", "lr": 1e-12}
    adapt(boxes, tmp_path / "a", "fseft", options, steps=1, dtype="float32")
    own = medgraft.load_backbone(MESHNET).network.layers[-1].weight[[2, 0, 1]]
    assert torch.allclose(read_adapter(tmp_path / "a").tensors()["head.linear.weight"], own, atol=1e-6)


def test_what_a_user_gets_wrong_is_said(boxes: Path, tmp_path: Path) -> None:
    query = boxes / "images/v2.nii.gz"
    wrong: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("fseft", {"method": "adaptor"}, {}, "adapter"),
        ("fseft", {"priors": "sizes"}, {}, "size"),
        ("fseft", {"method": "ft", "query": query}, {}, "query"),
        ("fseft", {"priors": "", "query": query}, {}, "--priors"),
        ("fseft", {}, {"backbone": "random:timm:vit_tiny_patch16_224", "image_size": 64}, "3D"),
        ("fseft", {}, {"task": "classify"}, "segmented"),
        ("fseft", {"form": "papers"}, {}, "paper"),
        ("fseft", {}, {"window": "bright"}, "LOW,HIGH"),
        ("fseft", {"rows": "left,right"}, {}, "0,6,7"),
        ("fseft", {"rows": "0,1"}, {}, "3 rows"),
        ("sparse_transfer", {"strategy": "both"}, {}, "two_stage"),
        ("sparse_transfer", {"strategy": "two_stage", "last": "up.9.0"}, {}, "up.9.0"),
    ]
    for name, options, more, word in wrong:
        with pytest.raises((BadCall, UnknownName)) as refused:
            adapt(boxes, tmp_path / "a", name, options, **more)
        says(refused.value, word)
        assert not (tmp_path / "a").exists()
    weights = tmp_path / "net.safetensors"
    from safetensors.torch import save_file

    save_file(medgraft.load_backbone(MESHNET).network.state_dict(), weights)
    with pytest.raises(BadCall, match="random weights"):
        adapt(boxes, tmp_path / "a", "fseft", {"method": "scratch"}, backbone=f"meshnet:model5_gw_ae@{weights}")
