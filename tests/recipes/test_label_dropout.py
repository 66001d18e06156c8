"""The recipe label_dropout: every part and loss, several folders, coarse labels, the U-Net, the shortcut and its cure, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from medgraft.adapters.store import read_record
from medgraft.backbones import load_backbone
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import NAME, open_model
from medgraft.training.two_sites import write_two_sites
from tests.training.toy_pack import blocks, entry, pack, save

TINY = "random:timm:vit_tiny_patch16_224"
HIDE = {"hide": "satellite@site_b"}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sites(tmp_path_factory.mktemp("sites"), train=3, test=2, size=32).parent


def train(data: Path, out: Path, shared: dict[str, object] | None = None, **options: object) -> dict[str, object]:
    mine = {"backbone": TINY, "image_size": 64, "steps": 2, "batch": 3, "quiet": True, "views": 2, **(shared or {})}
    return find_recipe("label_dropout").program(Run(data, out, **mine), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["lora", "bottleneck", "ssf", "none"])
def test_every_part_on_the_last_block(sites: Path, tmp_path: Path, part: str) -> None:
    train(sites, tmp_path / "a", part=part, late=1, **HIDE)
    record = read_record(tmp_path / "a")
    parts = {p["name"]: p["sites"] for p in record["parts"]}
    assert list(parts) == ([] if part == "none" else [part]) + ["head"]
    last = load_backbone(TINY, image_size=64).depth - 1
    if part != "none":
        assert parts[part]
        assert all(f"blocks.{last}." in name or name == "norm" for name in parts[part])
    assert record["provenance"]["settings"]["hide"] == "satellite@site_b"
    assert record["provenance"]["settings"]["p"] == 0.5


@pytest.mark.parametrize("loss", ["standard", "standard_dice", "adaptive", "bce", "marginal", "hybrid"])
def test_every_loss(sites: Path, tmp_path: Path, loss: str) -> None:
    p = 0.0 if loss.startswith("standard") else 0.5
    result = train(sites, tmp_path / "a", loss=loss, p=p, part="none", balance="domain", **HIDE)
    assert result["classes"] == ["body", "satellite"]
    assert result["loss"] > 0


def test_the_unet_is_a_network_and_scores(sites: Path, tmp_path: Path) -> None:
    result = train(sites, tmp_path / "a", {"backbone": "medgraft:starter-vit"}, network="unet", **HIDE)
    assert result["kind"] == "network"
    assert result["backbone"] == "random:unet:16-32-64-128?seed=0 (random weights)"
    how = json.loads((tmp_path / "a" / "network.json").read_text())["provenance"]["settings"]
    assert (how["optimiser"], how["schedule"]) == ("sgd", "cosine")
    host, _ = open_model(str(tmp_path / "a"))
    score = evaluate(host, NAME, load_dataset(sites))
    assert all(row["dice"]["satellite"] is not None for row in score["per_image"]), "the test truth is whole"
    small = train(sites, tmp_path / "b", {"backbone": "random:unet:4-8"}, network="unet", **HIDE)
    assert small["backbone"] == "random:unet:4-8 (random weights)"


def test_several_folders_by_a_mapping(tmp_path: Path) -> None:
    one = pack(tmp_path / "one", [entry(n) for n in range(2)], [blocks(1, 2)], name="one")
    other = pack(tmp_path / "two", [entry(0)], [blocks(1, 4)], name="two", classes={"0": "bg", "1": "rim", "4": "core"})
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"two": {"rim": "cytoplasm", "core": ["nucleus", "granule"]}, "one": {}}))
    with pytest.raises(BadData, match=r"granule of 'one\+two' is annotated on no training item"):
        train(one, tmp_path / "a", also=str(other), mapping=file)
    file.write_text(json.dumps({"two": {"rim": "cytoplasm", "core": None}}))
    result = train(one, tmp_path / "a", also=str(other), mapping=file, balance="source")
    assert (result["classes"], result["shots"]) == (["cytoplasm", "nucleus"], 3)
    assert str(tmp_path) not in (tmp_path / "a" / "adapter.json").read_text()
    for text, why in (
        ("{", "cannot be read as JSON"),
        ("[]", "not of the form"),
        ('{"two": {"rim": 3}}', "'rim' of 'two' is mapped to 3"),
        ('{"two": {"rim": []}}', "'rim' of 'two' is mapped to"),
    ):
        file.write_text(text)
        with pytest.raises(BadData, match=why):
            train(one, tmp_path / "b", also=str(other), mapping=file)
    with pytest.raises(BadCall, match="name the others with also"):
        train(one, tmp_path / "b", mapping=file)
    with pytest.raises(BadCall, match="from one folder"):
        train(one, tmp_path / "b", also=str(other), coarse="mask_x:a=b+c")


def test_coarse_labels(tmp_path: Path) -> None:
    items = [entry(0, mask_av="av/0.png", domain="hrf"), entry(1, domain="chase")]
    root = pack(tmp_path / "p", items, [blocks(3)], classes={"3": "vessel"}, classes_av={"1": "artery", "2": "vein"})
    save(root / "av/0.png", blocks(1, 2))
    shared = {"labels": "mask_av"}
    result = train(root, tmp_path / "a", shared, coarse="mask:vessel=artery+vein", loss="marginal", balance="domain")
    assert (result["classes"], result["shots"]) == (["artery", "vein"], 2)


def test_what_a_user_gets_wrong_is_said(sites: Path, tmp_path: Path) -> None:
    for options, error, why in (
        ({"p": 1.5}, BadCall, "from 0 to 1"),
        ({"p": -0.5}, BadCall, "from 0 to 1"),
        ({"loss": "standard"}, BadCall, "take p=0"),
        ({"loss": "adaptiv", "p": 0.0}, UnknownName, "did you mean 'adaptive'"),
        ({"part": "vpt"}, BadCall, "lora, bottleneck, ssf or none"),
        ({"network": "resnet"}, BadCall, "adapter or unet"),
        ({"late": 99}, BadCall, "up to 12"),
        ({"balance": "camera"}, UnknownName, "key to balance by"),
        ({"hide": "satellite@site_c"}, UnknownName, "did you mean 'site_"),
        ({"hide": "satellite@site_a,satellite@site_b"}, BadData, "no training item that annotates satellite"),
    ):
        with pytest.raises(error, match=why):
            train(sites, tmp_path / "a", **options)  # type: ignore[arg-type]
    with pytest.raises(BadCall, match="nothing partial"):
        train(sites, tmp_path / "a", {"task": "classify"})
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_shortcut_and_its_cure(tmp_path: Path) -> None:
    """At the site whose satellites were hidden: missed by the standard loss, half found by the adaptive one, found with dropout."""
    data = write_two_sites(tmp_path / "data", train=24, test=8).parent
    shared = {"backbone": "random:unet:8-16-32-64", "steps": 300, "batch": 8, "augment": "none"}
    found = {}
    for loss, p in (("standard", 0.0), ("adaptive", 0.0), ("adaptive", 0.5)):
        train(data, tmp_path / "a", shared, network="unet", lr=0.2, loss=loss, p=p, **HIDE)
        score = evaluate(open_model(str(tmp_path / "a"))[0], NAME, load_dataset(data))
        rows = [r["dice"]["satellite"] for r in score["per_image"] if r["domain"] == "site_b"]
        found[loss, p] = float(np.mean(rows))
    assert found["adaptive", 0.5] > found["adaptive", 0.0] + 0.1 > found["standard", 0.0] + 0.1
