"""In-context adapters from the command's point of view: built, tuned, saved, scored, on pictures and on volumes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.adapters import Support
from medgraft.adapters.explain import explain
from medgraft.adapters.hub import publish
from medgraft.adapters.store import read_adapter, read_record
from medgraft.backbones import load_backbone
from medgraft.errors import BadCall, BadData, MedgraftError, UnknownName
from medgraft.recipes import RECIPES, Run, find_recipe
from medgraft.recipes.dry import dry_adapter
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.in_context import Entering
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from medgraft.training.report import read_log
from medgraft.training.slices import slices_of
from tests.training.toy_pack import blocks, entry, pack
from tests.training.volumes import volume_pack

TINY = "random:universeg?widths=8,8,8"
VIT = "random:timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=5, test=2, size=64).parent


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("lesions"), "lesion", train=5, test=2, size=64).parent


def run(data: Path, out: Path, name: str = "universeg", **more: object) -> Run:
    shared = {**RECIPES[name].defaults, "backbone": TINY, "image_size": 32, "quiet": True, **more}
    return Run(data, out, **shared)  # type: ignore[arg-type]


def adapt(data: Path, out: Path, name: str = "universeg", own: dict | None = None, **more: object) -> dict:
    return find_recipe(name).program(run(data, out, name, **more), **(own or {}))


def support_of(folder: Path) -> Support:
    found = read_adapter(folder).parts["support"]
    assert isinstance(found, Support)
    return found


def test_the_labelled_images_are_the_adapter(cells: Path, tmp_path: Path) -> None:
    said = adapt(cells, tmp_path / "a", shots=3)
    assert (said["shots"], said["trainable"], said["classes"]) == (3, 0, ["cytoplasm", "nucleus"])
    assert "random weights" in said["backbone"]
    record = read_record(tmp_path / "a")
    assert [p["kind"] for p in record["parts"]] == ["support", "context_head"]
    assert record["provenance"]["shots"] == 3
    assert record["provenance"]["settings"] == {"select": "uniform", "roi": "any", "soft": False, "storage": "png"}
    assert "axis" not in record["provenance"]
    assert not any(i.id in json.dumps(record) for i in load_dataset(cells).items)
    host, _ = open_model(str(tmp_path / "a"))
    assert 0 <= evaluate(host, NAME, load_dataset(cells))["dice"] <= 1
    assert len(list((tmp_path / "a.log" / "overlays").glob("*.png"))) == 2
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_the_same_run_gives_the_same_file(cells: Path, tmp_path: Path) -> None:
    for n, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapt(cells, tmp_path / n, shots=2, seed=seed)
    a, b, c = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_its_options(cells: Path, lesions: Path, tmp_path: Path) -> None:
    adapt(cells, tmp_path / "all")
    assert support_of(tmp_path / "all").shots == 5
    adapt(cells, tmp_path / "soft", own={"soft": True, "storage": "float"}, shots=2)
    soft = support_of(tmp_path / "soft")
    assert (soft.soft, soft.storage) == (True, "float")
    assert ((soft.labels() > 0.05) & (soft.labels() < 0.95)).any()
    adapt(lesions, tmp_path / "spread", own={"select": "k_centre", "encoder": VIT}, shots=2)
    assert support_of(tmp_path / "spread").shots == 2
    adapt(cells, tmp_path / "one", shots=2, classes=("nucleus",))
    assert read_record(tmp_path / "one")["task"]["classes"] == ["nucleus"]


def test_images_are_published_by_consent_only(lesions: Path, tmp_path: Path) -> None:
    adapt(lesions, tmp_path / "a", shots=2)
    with pytest.raises(MedgraftError, match="share_images"):
        publish(tmp_path / "a", f"file:{tmp_path / 'registry'}/me/a")
    publish(tmp_path / "a", f"file:{tmp_path / 'registry'}/me/a", share_images=True)


@pytest.mark.parametrize("method", ["lora", "scale_shift", "tuned"])
def test_tuning_changes_its_own_part_alone(lesions: Path, tmp_path: Path, method: str) -> None:
    adapt(lesions, tmp_path / "plain", shots=4)
    said = adapt(lesions, tmp_path / "a", "universeg_tune", {"method": method}, shots=4, steps=3)
    assert (said["steps"], said["shots"]) == (3, 4)
    record = read_record(tmp_path / "a")
    assert [p["name"] for p in record["parts"]] == ["support", method, "head"]
    assert record["provenance"]["settings"]["others"] == 3
    plain, tuned = support_of(tmp_path / "plain"), support_of(tmp_path / "a")
    assert torch.equal(plain.images(), tuned.images())
    assert torch.equal(plain.labels(), tuned.labels())
    assert len(read_log(tmp_path / "a.log" / "log.jsonl")) == 3
    host, adapter = open_model(str(tmp_path / "a"))
    assert adapter.trainable == said["trainable"] > 0
    assert host.backbone.digest() == load_backbone(TINY, image_size=32).digest()
    sites = set(adapter.site_parts[method].sites)
    last = {"decoder.1.cross", "decoder.1.target", "out"}
    first = {"decoder.0.cross", "decoder.0.target", "decoder.0.support"}
    assert sites == (last if method == "tuned" else (last | first) - {"out"})
    other, _ = open_model(str(tmp_path / "plain"))
    item = load_dataset(lesions).split("test")[0]
    picture = load_dataset(lesions).image(item)
    a, b = (h.predict(picture, NAME, probabilities=True) for h in (host, other))
    assert np.abs(a - b).max() > 1e-5


def test_tuning_learns_from_the_support(tmp_path: Path) -> None:
    """Bright discs on dark ground, random weights: the loss of the episodes falls."""
    rows, columns = np.mgrid[:32, :32]
    items, images, masks = [], [], []
    for n in range(4):
        disc = (rows - 10 - 3 * n) ** 2 + (columns - 12 - 2 * n) ** 2 < 40
        images.append(np.repeat((40 + 160 * disc).astype(np.uint8)[..., None], 3, 2))
        masks.append(disc.astype(np.uint8))
        items.append(entry(n))
    root = pack(tmp_path / "discs", items, masks, classes={"0": "background", "1": "disc"})
    for n, image in enumerate(images):
        Image.fromarray(image).save(root / f"images/i{n}.png")
    adapt(root, tmp_path / "a", "universeg_tune", {"method": "tuned", "lr": 0.02}, steps=40, augment="none")
    losses = [line["loss"] for line in read_log(tmp_path / "a.log" / "log.jsonl")]
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:4])


def test_an_interrupted_tuning_resumes_to_the_same_adapter(
    lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from medgraft.recipes import universeg as program
    from medgraft.training import fit as fitting

    monkeypatch.setattr(program, "FitOptions", partial(fitting.FitOptions, keep_every=1))
    adapt(lesions, tmp_path / "a", "universeg_tune", steps=4, shots=3, batch=2)
    real, calls = fitting._step, []

    def stop(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        adapt(lesions, tmp_path / "b", "universeg_tune", steps=4, shots=3, batch=2)
    monkeypatch.setattr(fitting, "_step", real)
    adapt(lesions, tmp_path / "b", "universeg_tune", steps=4, shots=3, batch=2, resume=True)
    a, b = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_a_step_of_tuning_is_shown_the_others_alone(
    lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shown = Entering.act, []

    def watched(self: Entering, *args: object) -> object:
        found = real(self, *args)  # type: ignore[arg-type]
        shown.append(None if found is None else found.shots)
        return found

    monkeypatch.setattr(Entering, "act", watched)
    adapt(lesions, tmp_path / "a", "universeg_tune", steps=3, shots=4)
    assert shown == [3, 3, 3]
    adapt(lesions, tmp_path / "b", "universeg_tune", {"others": 2}, steps=2, shots=4, batch=2)
    assert shown == [3, 3, 3, 2, 2, 2, 2]


def test_bf16_and_epochs(lesions: Path, tmp_path: Path) -> None:
    said = adapt(lesions, tmp_path / "a", "universeg_tune", steps=2, shots=3, precision="bf16")
    assert np.isfinite(said["loss"])
    from medgraft.recipes.universeg import EPOCHS

    four = run(lesions, tmp_path / "x", "universeg_tune", steps=None, shots=4)
    assert four.steps_or(EPOCHS) == EPOCHS * 4


def test_volumes_are_read_slice_by_slice(tmp_path: Path) -> None:
    data = volume_pack(tmp_path / "boxes")
    said = adapt(data, tmp_path / "a", shots=4, axis="coronal")
    assert said["shots"] == 4
    assert read_record(tmp_path / "a")["provenance"]["axis"] == "coronal"
    assert {f.name for f in (tmp_path / "a.log" / "overlays").glob("*.png")} == {"v2_006.png", "v3_006.png"}
    host, _ = open_model(str(tmp_path / "a"))
    found = evaluate(host, NAME, slices_of(load_dataset(data), "coronal"))
    assert found["n"] == 2
    assert 0 <= found["slice_dice"] <= 1
    adapt(data, tmp_path / "shown", own={"roi": "shown"}, shots=10)
    assert (support_of(tmp_path / "shown").labels().flatten(1).amax(1) > 0).all()
    said = adapt(data, tmp_path / "t", "universeg_tune", shots=3, steps=2)
    assert said["steps"] == 2


def test_the_command_line_scores_volumes(tmp_path: Path) -> None:
    from tests.test_cli import call

    data = volume_pack(tmp_path / "boxes")
    common = ("--data", data, "--backbone", TINY, "--image-size", 32, "--shots", 3)
    code, said = call("adapt", "universeg", *common, "--out", tmp_path / "a", "--axis", "coronal")
    assert code == 0, said
    code, said = call("evaluate", tmp_path / "a", "--data", data, "--json", tmp_path / "score.json", "--record")
    assert code == 0, said
    assert "slice_dice" in said
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["n"], score["slices"]) == (2, 12)  # six coronal slices a case show a class, five axial ones
    assert read_record(tmp_path / "a")["evaluation"][0]["dataset"] == "boxes"
    code, said = call("adapt", "linear_probe", "--data", data, "--backbone", VIT, "--image-size", 32, "--shots", 3,
                      "--steps", 2, "--quiet", "--axis", "axial", "--out", tmp_path / "b")  # fmt: skip
    assert code == 0, said
    code, said = call("evaluate", tmp_path / "b", "--data", data)
    assert code == 0, said
    assert "slice_dice" in said


def test_a_dry_run_tells_sites_and_sizes() -> None:
    for name, trained in (("universeg", False), ("universeg_tune", True)):
        adapter, frozen = dry_adapter(name, backbone=TINY, image_size=32)
        facts = explain(adapter, frozen)
        assert facts.parts[0].kind == "support"
        assert (facts.trainable > 0) == trained


def test_warnings_for_what_says_nothing(tmp_path: Path) -> None:
    items = [entry(n) for n in range(3)] + [entry(3, split="test")]
    root = pack(tmp_path / "p", items, [blocks(1), blocks(), blocks()], classes={"0": "background", "1": "spot"})
    for n in (0, 1, 2):
        Image.fromarray(np.full((20, 24, 3), 50 * n, np.uint8)).save(root / f"images/i{n}.png")
    with pytest.warns(UserWarning, match="constant"):
        adapt(root, tmp_path / "a", shots=2)
    for seed in range(20):  # until the one empty image is drawn
        dataset = load_dataset(root)
        if int(np.random.default_rng(seed).integers(3)) > 0:
            break
    with pytest.warns(UserWarning, match="nowhere labelled"):
        adapt(root, tmp_path / "b", own={"select": "k_centre", "encoder": VIT}, shots=1, seed=seed)
    host, _ = open_model(str(tmp_path / "b"))
    assert host.predict(dataset.image(dataset.items[0]), NAME).shape == (20, 24)


def test_what_a_user_gets_wrong_is_said(cells: Path, lesions: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(BadData, match="16 shots asked for"):
        adapt(lesions, out, shots=16)
    with pytest.raises(BadCall, match="shots must be"):
        adapt(lesions, out, shots=0)
    with pytest.raises(BadCall, match="gpt4mia"):
        adapt(lesions, out, task="classify")
    with pytest.raises(BadCall, match="does not segment in context"):
        adapt(lesions, out, backbone=VIT)
    with pytest.raises(UnknownName, match="depends on the query"):
        adapt(lesions, out, own={"select": "nearest"})
    with pytest.raises(UnknownName, match="'k_centre'"):
        adapt(lesions, out, own={"select": "k_center"})
    with pytest.raises(BadCall, match="storage"):
        adapt(lesions, out, own={"storage": "jpeg"}, shots=2)
    with pytest.raises(BadCall, match="leaves none"):
        adapt(lesions, out, "universeg_tune", shots=1)
    with pytest.raises(UnknownName, match="'lora'"):
        adapt(lesions, out, "universeg_tune", {"method": "lorra"}, shots=2)
    with pytest.raises(UnknownName, match=r"no site matches.*decoder"):
        adapt(lesions, out, "universeg_tune", {"targets": "decodr.*"}, shots=2)
    assert not out.exists()
    damaged = volume_pack(tmp_path / "boxes")
    (damaged / "labels/v1.nii.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(BadData, match=r"v1.nii.gz"):
        adapt(damaged, out, shots=4)
    with pytest.raises(UnknownName, match="'axial'"):
        adapt(damaged, out, shots=4, axis="axail")
    assert not out.exists()
