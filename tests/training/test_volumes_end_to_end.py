"""A folder of volumes, read, predicted, written, scored and pictured: the way that the command line goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from medgraft import load_backbone
from medgraft.adapters import Adapter, Host, Task
from medgraft.adapters.heads import LinearHead
from medgraft.adapters.store import save_adapter
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import Backbone
from medgraft.cli.shared import app
from medgraft.errors import BadCall, BadData
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import NAME
from medgraft.training.predict_volumes import predict_volume_files
from medgraft.training.volume_data import Volumes, volumes_of
from medgraft.training.volume_report import cases_png, organ_table, slices_png
from medgraft.volumes import Volume, volume_stem

AFFINE = np.diag([-1.0, 1.5, 2.0, 1.0])
TASK = Task("segment", ("bright", "dark"))


class ByBrightness(LinearHead):
    """Answers from the volume itself: class 1 above 0.8, class 2 below 0.2 (of the window), background between."""

    def read(self, features: Any, image: Tensor) -> Tensor:
        x = image[:, :1]
        return torch.cat([torch.zeros_like(x), x - 0.8, 0.2 - x], 1)


@pytest.fixture(scope="module")
def meshnet() -> Backbone:
    return load_backbone("random:meshnet:model5_gw_ae", image_size=8)


def host_of(backbone: Backbone, head: type[LinearHead] = ByBrightness, task: Task = TASK) -> Host:
    prepare = VolumePreprocessing.of(backbone.spec, intensity=("window", 0, 100), axcodes="RAS", spacing=(1, 1.5, 2))
    host = Host(backbone)
    host.add(Adapter.of(backbone, task, {"head": head.on(backbone, task)}, preprocessing=prepare), NAME)
    return host


def make_pack(root: Path, cases: int = 4) -> Path:
    """Volumes with a bright and a dark box; case 0 has no dark one, case 1 has it labelled but not shown."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    items = []
    for i in range(cases):
        values, labels = np.full((9, 8, 7), 50, np.int16), np.zeros((9, 8, 7), np.uint8)
        values[1:4, 1:5, 2:6], labels[1:4, 1:5, 2:6] = 100, 4
        if i:
            labels[5:8, 2:6, 1:4] = 9
        if i > 1:
            values[5:8, 2:6, 1:4] = 0
        nib.save(nib.Nifti1Image(values, AFFINE), root / "images" / f"c{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, AFFINE), root / "labels" / f"c{i}.nii.gz")
        items.append({"id": f"c{i}", "image": f"images/c{i}.nii.gz", "mask": f"labels/c{i}.nii.gz", "split": "test"})
    classes = {"0": "background", "4": "bright", "9": "dark"}
    (root / "dataset.json").write_text(json.dumps({"name": "boxes", "dims": 3, "classes": classes, "items": items}))
    return root


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return make_pack(tmp_path / "pack")


def run(*words: str) -> Any:
    from medgraft.cli.adapting import register_recipes

    register_recipes()
    return CliRunner().invoke(app, list(map(str, words)))


# The data set


def test_a_folder_of_volumes_is_a_data_set(pack: Path) -> None:
    dataset = volumes_of(load_dataset(pack))
    item = dataset.split("test")[2]
    assert dataset.volume(item).axcodes == "LAS"
    assert dataset.image(item).shape == (9, 8, 7)
    assert sorted(np.unique(dataset.mask(item)).tolist()) == [0, 1, 2]  # task values, not 4 and 9
    assert dataset.present(item) == {1, 2}
    assert dataset.annotated(item) == (True, True)
    assert dataset.volume(item) is dataset.volume(item)
    assert dataset.digest(item) != dataset.digest(dataset.split("test")[0])
    dataset.check()
    only = volumes_of(load_dataset(pack, classes=("dark",)))
    assert np.array_equal(only.mask(item) == 1, dataset.mask(item) == 2)


def test_what_is_no_volume_stays_out(pack: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    dataset = load_dataset(pack)
    with pytest.raises(BadCall, match="holds pictures, not volumes"):
        volumes_of(replace(dataset, dims=2))
    array = replace(dataset.items[0], image=None, array=Path("a.npz"), index=0)
    with pytest.raises(BadData, match="is a row of an array"):
        volumes_of(replace(dataset, items=(array,)))
    item = replace(dataset.items[0], masks={})
    with pytest.raises(BadData, match="'c0' of 'boxes' has no 'mask', it has: no mask at all"):
        volumes_of(dataset).mask(item)
    elsewhere = tmp_path / "moved.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.uint8), AFFINE @ np.diag([1, 1, -1, 1])), elsewhere)
    with pytest.raises(BadData, match=r"moved.nii.gz .* does not lie on .*c0.nii.gz"):
        volumes_of(dataset).mask(replace(dataset.items[0], masks={"mask": elsewhere}))


def make_folder(root: Path, values: tuple[int, ...], masks: str = "labels") -> Path:
    for folder in ("images", masks):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        labels = np.zeros((4, 5, 6), np.int16)
        labels[i, : len(values), 0] = values
        nib.save(nib.Nifti1Image(labels * 10, AFFINE), root / "images" / f"c{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, AFFINE), root / masks / f"c{i}.nii.gz")
    return root


@pytest.mark.parametrize(
    ("values", "classes"),
    [((1,), ["foreground"]), ((255,), ["foreground"]), ((2,), ["class_1"]), ((3, 7), ["class_1", "class_2"])],
)
def test_a_plain_folder_of_pairs_is_a_data_set(tmp_path: Path, values: tuple[int, ...], classes: list[str]) -> None:
    for masks in ("labels", "masks"):
        dataset = volumes_of(load_dataset(make_folder(tmp_path / masks, values, masks)))
        assert list(dataset.classes.values()) == classes
        assert sorted(item.id for item in dataset.items) == ["c0", "c1", "c2"]
        assert {item.split for item in dataset.items} == {"train", "val", "test"}
        item = dataset.items[0]
        assert np.array_equal(np.unique(dataset.mask(item)), np.arange(len(values) + 1))


def test_a_folder_is_of_one_kind_and_of_few_values(tmp_path: Path) -> None:
    mixed = make_folder(tmp_path / "mixed", (1,))
    (mixed / "images" / "c0.nii.gz").unlink()
    Image.new("RGB", (8, 8)).save(mixed / "images" / "c0.png")
    with pytest.raises(BadData, match="holds pictures and volumes; keep them in two folders"):
        load_dataset(mixed)
    with pytest.raises(BadData, match="use the value 300; save them with 8 bits"):
        load_dataset(make_folder(tmp_path / "high", (1, 300)))
    smooth = make_folder(tmp_path / "smooth", (1,))
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 0.5, np.float32), AFFINE), smooth / "labels" / "c1.nii.gz")
    with pytest.raises(BadData, match=r"c1.nii.gz holds values between whole numbers, such as 0.5"):
        load_dataset(smooth)


def test_volumes_make_room_for_others(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medgraft.training.volume_data.KEPT_BYTES", 3 * 9 * 8 * 7 * 4)
    dataset = volumes_of(load_dataset(pack))
    for item in dataset.items:
        dataset.mask(item)
    kept = dataset._cache["volumes"]
    assert sum(v.values.nbytes for v in kept.values()) <= 3 * 9 * 8 * 7 * 4
    assert ("c3", "image") in kept
    assert np.array_equal(dataset.mask(dataset.items[0]) == 1, dataset.image(dataset.items[0]) == 100)


# Scores


def test_whole_volumes_are_scored_by_case_and_class(meshnet: Backbone, pack: Path) -> None:
    dataset = volumes_of(load_dataset(pack))
    seen: list[str] = []
    result = evaluate(host_of(meshnet), NAME, dataset, each=lambda item, found: seen.append(f"{item.id} {found.max()}"))
    assert [case["dice"] for case in result["per_image"]] == [
        {"bright": 1.0, "dark": None},  # nowhere drawn and nowhere found: nothing was asked
        {"bright": 1.0, "dark": 0.0},  # drawn, not found
        {"bright": 1.0, "dark": 1.0},
        {"bright": 1.0, "dark": 1.0},
    ]
    assert result["n"] == 4
    assert result["dice"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert result["classes"]["dark"]["images"] == 3
    assert result["classes"]["dark"]["mean"] == pytest.approx(2 / 3)
    assert result["classes"]["dark"]["interval"] == pytest.approx([0, 1])
    assert result["classes"]["bright"]["interval"] == [1, 1]
    assert seen == ["c0 1", "c1 1", "c2 2", "c3 2"]
    table = organ_table(result)
    assert table[2] == "| bright | 1.000 | 1.000 to 1.000 | 4 |"
    assert table[-1].startswith("| **mean** | 0.875 |")
    json.dumps(result, allow_nan=False)


def test_an_organ_that_is_found_where_it_is_not_scores_zero(meshnet: Backbone, tmp_path: Path) -> None:
    """A query without the organ, and a prediction with it."""
    pack = make_pack(tmp_path / "one", cases=3)
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.uint8), AFFINE), pack / "labels" / "c2.nii.gz")
    result = evaluate(host_of(meshnet), NAME, volumes_of(load_dataset(pack)))
    assert result["per_image"][2]["dice"] == {"bright": 0.0, "dark": 0.0}


def test_a_single_case_has_no_interval(meshnet: Backbone, tmp_path: Path) -> None:
    result = evaluate(host_of(meshnet), NAME, volumes_of(load_dataset(make_pack(tmp_path / "one", cases=1))))
    assert result["classes"]["bright"]["interval"] == [None, None]
    assert organ_table(result)[2] == "| bright | 1.000 | - | 1 |"


def test_two_adapters_are_scored_as_an_ensemble(meshnet: Backbone, pack: Path) -> None:
    host = host_of(meshnet)
    host.add(host.adapters[NAME], "second")
    dataset = volumes_of(load_dataset(pack))
    assert evaluate(host, [NAME, "second"], dataset)["dice"] == evaluate(host, NAME, dataset)["dice"]


# Files


def test_predictions_overlay_on_their_images(meshnet: Backbone, pack: Path, tmp_path: Path) -> None:
    host, images = host_of(meshnet), sorted((pack / "images").iterdir())
    lines = list(predict_volume_files(host, images, tmp_path / "out"))
    for image, line in zip(images, lines, strict=True):
        before, after = nib.load(image), nib.load(tmp_path / "out" / image.name)
        assert np.array_equal(after.affine, before.affine)
        assert after.shape == before.shape
        assert after.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(after.dataobj) == 1, np.asarray(before.dataobj) == 100)
        assert "bright 0.144 ml" in line  # 48 voxels of 3 mm3
        assert (tmp_path / "out" / f"{volume_stem(image)}_slices.png").is_file()


def test_labels_never_take_the_place_of_images(meshnet: Backbone, pack: Path, tmp_path: Path) -> None:
    host, image = host_of(meshnet), pack / "images" / "c0.nii.gz"
    before = image.read_bytes()
    with pytest.raises(BadCall, match="would take its place; choose another folder"):
        list(predict_volume_files(host, [image], pack / "images"))
    assert image.read_bytes() == before
    with pytest.raises(BadCall, match="several volumes are called c0"):
        list(predict_volume_files(host, [image, pack / "labels" / "c0.nii.gz"], tmp_path / "out"))
    (tmp_path / "bad.nii.gz").write_bytes(before[:80])
    with pytest.raises(BadData, match=r"bad.nii.gz"):
        list(predict_volume_files(host, [image, tmp_path / "bad.nii.gz"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.NII.GZ", "a.mgz", "a"])
def test_a_stem_is_a_name_without_its_format(name: str) -> None:
    assert volume_stem(Path("folder") / name) == "a"


def test_the_command_line_predicts_and_scores_volumes(meshnet: Backbone, pack: Path, tmp_path: Path) -> None:
    adapter = host_of(meshnet, LinearHead).adapters[NAME]
    save_adapter(adapter, tmp_path / "adapter", dtype="float32", backbone=meshnet)
    series = nib.Nifti1Image(np.zeros((9, 8, 7, 2), np.int16), AFFINE)
    nib.save(series, tmp_path / "series.nii.gz")
    said = run("predict", tmp_path / "adapter", tmp_path / "series.nii.gz", "--frame", 1, "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert "random weights" in said.output
    written = nib.load(tmp_path / "out" / "series.nii.gz")
    assert written.shape == (9, 8, 7)
    assert np.array_equal(written.affine, AFFINE)
    refused = run("predict", tmp_path / "adapter", tmp_path / "series.nii.gz", "--out", tmp_path / "out")
    assert isinstance(refused.exception, BadData)
    prompted = run("predict", tmp_path / "adapter", pack / "images/c0.nii.gz", "--box", "0,0,1,1", "--out", tmp_path)
    assert isinstance(prompted.exception, BadCall)
    assert "takes no prompts" in str(prompted.exception)

    said = run(
        "evaluate", tmp_path / "adapter", "--data", pack, "--json", tmp_path / "r.json", "--pictures", tmp_path / "seen"
    )
    assert said.exit_code == 0, said.output
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 4
    names = sorted(file.name for file in (tmp_path / "seen").iterdir())
    assert names == [*(f"c{i}_slices.png" for i in range(4)), "dice.png", "organs.md"]
    said = run("info", tmp_path / "adapter")
    assert "patches of 8 x 8 x 8" in said.output


# Pictures


def test_three_slices_show_what_is_labelled(tmp_path: Path) -> None:
    values = np.zeros((10, 20, 30), np.float32)
    labels = np.zeros(values.shape, np.uint8)
    labels[2:6, 5:15, 20:28] = 1
    volume = Volume(values, np.diag([2.0, 1.0, 1.0, 1.0]))
    slices_png(volume, labels, None, tmp_path / "a.png", {1: "box"})
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    green = (picture == (0, 158, 115)).all(-1)
    columns = np.flatnonzero(green[:-30].any(0))
    assert len(np.flatnonzero(np.diff(columns) > 20)) >= 2  # three separate contours, side by side
    # 20 x 20 x 30 mm at 384 pixels for 30 mm: 256 wide each, two of them 384 high
    slices_png(volume, labels, labels, tmp_path / "b.png", {1: "box"})
    assert Image.open(tmp_path / "b.png").size[0] == 3 * 256 + 2 * 4
    assert 384 < Image.open(tmp_path / "b.png").size[1] < 450
    with pytest.raises(BadCall, match="cannot be drawn over"):
        slices_png(volume, labels[1:], None, tmp_path / "c.png", {1: "box"})


def test_a_contour_lies_where_a_viewer_shows_it(tmp_path: Path) -> None:
    """The patient's left, anterior, superior corner: right, up, up on the slices that show it."""
    values = np.zeros((20, 20, 20), np.float32)
    labels = np.zeros(values.shape, np.uint8)
    labels[:5, -5:, -5:] = 1  # RAS: the first voxels lie to the left
    for affine, flip in ((np.eye(4), labels), (np.diag([-1.0, 1, 1, 1]), labels[::-1])):
        slices_png(Volume(values, affine), np.ascontiguousarray(flip), None, tmp_path / "a.png", {1: "box"})
        picture = np.asarray(Image.open(tmp_path / "a.png"))
        green = (picture == (0, 158, 115)).all(-1)[:384]
        axial = green[:, -384:]
        rows, columns = np.nonzero(axial)
        assert rows.max() < 100  # anterior is up
        assert columns.min() > 284  # the patient's left is on the right


def test_cases_are_drawn_from_the_worst(meshnet: Backbone, pack: Path, tmp_path: Path) -> None:
    result = evaluate(host_of(meshnet), NAME, volumes_of(load_dataset(pack)))
    cases_png(result, tmp_path / "dice.png")
    assert Image.open(tmp_path / "dice.png").size[0] > 300
    with pytest.raises(BadCall, match="no case with a score"):
        cases_png({"per_image": [{"id": "a", "dice": {"x": None}}], "classes": {"x": {}}}, tmp_path / "none.png")


def test_real_packs_are_read(tmp_path: Path) -> None:
    root = Path(__file__).parents[2].parent / "shared" / "data"
    if not root.is_dir():
        pytest.skip("the shared data are not here")
    for name in ("hippocampus_msd", "ct_mr_sample"):
        dataset = volumes_of(load_dataset(root / name))
        assert isinstance(dataset, Volumes)
        item = dataset.items[-1]
        assert dataset.mask(item).shape == dataset.image(item).shape
        assert dataset.present(item)
