"""Volumes read slice by slice: orientation, grey levels, labels, scores of whole cases, and files that cannot be used."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medgraft import volumes
from medgraft.adapters import Adapter, ContextHead, Host, Support, Task
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, MissingExtra, UnknownName
from medgraft.training import slices as slicing
from medgraft.training.data import load_dataset, sample_shots
from medgraft.training.evaluate import evaluate
from medgraft.training.metrics import dice
from medgraft.training.slices import Slice, Slices, pictured, predict_volume, slices_of, volume_scores
from tests.helpers import pairs, says
from tests.training.toy_pack import shots_pack
from tests.training.volumes import SHAPE, labels, volume_pack, write


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    return volume_pack(tmp_path / "boxes")


def test_a_pack_of_volumes_becomes_one_of_pictures(boxes: Path) -> None:
    dataset = slices_of(load_dataset(boxes))
    assert isinstance(dataset, Slices)
    assert len(dataset.items) == 4 * SHAPE[2]
    assert dataset.axis == "axial"
    item = dataset.split("test")[4]
    assert isinstance(item, Slice)
    assert (item.id, item.volume, item.z, item.group) == ("v2/004", "v2", 4, "v2")
    assert dataset.image(item).shape == (SHAPE[1], SHAPE[0], 3)
    assert dataset.image(item).dtype == np.uint8
    assert dataset.mask(item).shape == (SHAPE[1], SHAPE[0])
    assert dataset.present(item) == {1, 2}
    assert dataset.present(dataset.split("test")[0]) == frozenset()
    assert list(dataset.volumes("train")) == ["v0", "v1"]
    assert len(dataset.digest(item)) == 64
    dataset.check("test")
    assert len(sample_shots(dataset, 5, 0)) == 5


@pytest.mark.parametrize(
    ("axis", "shape"), [("sagittal", (9, 12)), ("coronal", (9, 10)), ("axial", (12, 10))], ids=lambda v: str(v)
)
def test_a_slice_is_shown_as_in_a_viewer(tmp_path: Path, axis: str, shape: tuple[int, int]) -> None:
    """One bright voxel at the right, anterior, superior corner: up, and on the left."""
    root = volume_pack(tmp_path / "p", ("train",))
    corner = np.zeros(SHAPE, np.int16)
    corner[-1, -1, -1] = 9
    write(root / "images/v0.nii.gz", corner)
    dataset = slices_of(load_dataset(root), axis)  # type: ignore[arg-type]
    last = dataset.image(dataset.items[-1])[..., 0]
    assert last.shape == shape
    assert last[0, 0] == 255
    assert last.sum() == 255
    assert dataset.image(dataset.items[0]).sum() == 0


@pytest.mark.parametrize("codes", ["LPS", "SAR", "ILP"])
def test_how_a_file_is_stored_does_not_matter(tmp_path: Path, codes: str) -> None:
    plain, turned = (volume_pack(tmp_path / n, ("train",)) for n in ("plain", "turned"))
    for folder in ("images", "labels"):
        file = turned / folder / "v0.nii.gz"
        image = nibabel.load(file)
        change = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes)
        )
        moved = image.as_reoriented(change)
        write(file, np.asarray(moved.dataobj), moved.affine)
    assert nibabel.aff2axcodes(nibabel.load(turned / "images/v0.nii.gz").affine) == tuple(codes)
    for axis in slicing.AXES:
        a, b = (slices_of(load_dataset(root), axis) for root in (plain, turned))
        assert len(a.items) == len(b.items)
        for x, y in zip(a.items, b.items, strict=True):
            assert np.array_equal(a.image(x), b.image(y))
            assert np.array_equal(a.mask(x), b.mask(y))


def test_grey_levels_are_those_of_the_whole_volume(tmp_path: Path) -> None:
    root = volume_pack(tmp_path / "p", ("train",))
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32) * 100 - 50, SHAPE)
    write(root / "images/v0.nii.gz", ramp)
    dataset = slices_of(load_dataset(root))
    assert [int(dataset.image(item).max()) for item in dataset.items] == [round(255 * z / 8) for z in range(9)]
    write(root / "images/v0.nii.gz", np.full(SHAPE, 7, np.int16))
    assert slices_of(load_dataset(root)).image(dataset.items[3]).max() == 0


def test_labels_are_in_task_values(boxes: Path) -> None:
    both, back = (slices_of(load_dataset(boxes, classes=c)) for c in (None, ("back",)))
    middle = both.items[4]
    assert np.array_equal(np.unique(both.mask(middle)), [0, 1, 2])
    assert np.array_equal(back.mask(middle), (both.mask(middle) == 2).astype(np.uint8))
    swapped = slices_of(load_dataset(boxes, classes=("back", "front")))
    assert np.array_equal(swapped.mask(middle) == 1, both.mask(middle) == 2)


def test_volumes_leave_memory_and_come_back(boxes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = slices_of(load_dataset(boxes))
    want = [dataset.image(i) for i in dataset.items]
    monkeypatch.setattr(slicing, "KEPT_BYTES", 1)
    tight = slices_of(load_dataset(boxes))
    for item, image in zip(tight.items, want, strict=True):
        assert np.array_equal(tight.image(item), image)
        tight.mask(item)
    assert len(tight._cache["volumes"]) == 2
    assert all(np.array_equal(tight.image(i), w) for i, w in zip(tight.items, want, strict=True))


def test_the_pictures_to_look_at_are_middle_slices(boxes: Path, tmp_path: Path) -> None:
    dataset = slices_of(load_dataset(boxes))
    assert [i.id for i in pictured(dataset.split("test"), 4)] == ["v2/004", "v3/004"]
    flat = load_dataset(shots_pack(tmp_path / "flat"))
    assert pictured(flat.split("train"), 4) == flat.split("train")[:4]


# Scores


def test_scores_by_hand(boxes: Path) -> None:
    """Class 1 found whole but also one slice too far; class 2 never found."""
    dataset = slices_of(load_dataset(boxes))

    def said(item: Slice) -> np.ndarray:
        truth = dataset.mask(item)
        extra = dataset.mask(next(i for i in dataset.volumes("test")[item.volume] if i.z == 2)) if item.z == 0 else 0
        return np.where(truth == 1, 1, 0) + extra

    found = volume_scores(dataset, dataset.volumes("test"), said)
    voxels = (labels(0) == 1).sum()
    one = 2 * voxels / (2 * voxels + 18)  # 3 x 6 pixels of slice 2 in slice 0, where nothing is
    assert found["classes"]["front"]["mean"] == pytest.approx(one)
    assert found["classes"]["back"]["mean"] == 0
    assert found["dice"] == pytest.approx(one / 2)
    assert found["n"] == 2
    # Slices 2..5 show class 1, 3..6 class 2: five slices a case, and slice 0 is none of them.
    assert found["slices"] == 10
    assert found["slice_classes"]["front"] == {"mean": 1.0, "images": 8}
    assert found["slice_classes"]["back"] == {"mean": 0.0, "images": 8}
    assert found["slice_dice"] == pytest.approx((1 + 3 * 0.5 + 0) / 5)
    assert found["slice_interval"] == pytest.approx([0.5, 0.5])  # both cases score alike
    assert [e["id"] for e in found["per_image"]] == ["v2", "v3"]
    assert found["per_image"][0]["slice_dice"] == pytest.approx(0.5)


def test_a_class_that_nobody_drew_is_not_scored(boxes: Path) -> None:
    dataset = slices_of(load_dataset(boxes))
    partial = replace(dataset, items=tuple(replace(i, labelled=("front",)) for i in dataset.items))
    found = volume_scores(partial, {"v2": partial.volumes("test")["v2"]}, lambda item: partial.mask(item))
    assert found["dice"] == 1
    assert found["classes"]["back"] == {"mean": None, "images": 0}
    assert found["slice_classes"]["back"]["images"] == 0
    assert found["interval"] == found["slice_interval"] == [None, None]  # one case has no spread


def test_a_volume_without_the_structure(boxes: Path) -> None:
    write(boxes / "labels/v2.nii.gz", np.zeros(SHAPE, np.uint8))
    dataset = slices_of(load_dataset(boxes))
    own = {"v2": dataset.volumes("test")["v2"]}
    silent = volume_scores(dataset, own, lambda item: np.zeros((12, 10), int))
    assert (silent["dice"], silent["slice_dice"], silent["slices"]) == (None, None, 0)
    wrong = volume_scores(dataset, own, lambda item: np.ones((12, 10), int))
    assert (wrong["dice"], wrong["slice_dice"]) == (0, None)  # a false positive counts in 3D only


def test_evaluate_reports_cases_and_slices(boxes: Path, universeg: Backbone) -> None:
    dataset = slices_of(load_dataset(boxes))
    task = Task("segment", ("front", "back"))
    made = Adapter.of(
        universeg,
        task,
        {"support": Support.on(universeg, task, **pairs(2)), "head": ContextHead.on(universeg, task)},
    )
    host = Host(universeg)
    host.add(made, "it")
    found = evaluate(host, "it", dataset)
    assert (found["task"], found["dataset"], found["split"], found["n"]) == ("segment", "boxes", "test", 2)
    slices = dataset.volumes("test")["v2"]
    whole = predict_volume(slices, lambda item: host.predict(dataset.image(item), "it"))
    assert whole.shape == (9, 12, 10)
    want = dice(whole, np.stack([dataset.mask(i) for i in slices]), 2)
    assert [found["per_image"][0]["dice"][c] for c in task.classes] == pytest.approx(list(want))
    with pytest.raises(BadData, match="val"):
        evaluate(host, "it", dataset, "val")


# Files that cannot be used


def test_a_damaged_volume_names_itself(boxes: Path) -> None:
    file = boxes / "images/v0.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])
    dataset = slices_of(load_dataset(boxes))
    with pytest.raises(BadData) as caught:
        dataset.image(dataset.items[0])
    says(caught.value, "v0.nii.gz", "damaged or cut short")
    file.write_bytes(b"this is no volume at all")
    with pytest.raises(BadData, match=r"v0.nii.gz is no readable volume"):
        slices_of(load_dataset(boxes))
    file.write_bytes(b"")
    with pytest.raises(BadData, match=r"v0.nii.gz is no readable volume"):
        slices_of(load_dataset(boxes))


def test_a_plain_file_cut_short(tmp_path: Path) -> None:
    root = volume_pack(tmp_path / "p", ("train",), suffix="nii")
    file = root / "images/v0.nii"
    file.write_bytes(file.read_bytes()[:-200])
    dataset = slices_of(load_dataset(root))
    with pytest.raises(BadData, match="cut short"):
        dataset.image(dataset.items[0])


def test_a_file_that_does_not_say_how_it_lies(tmp_path: Path) -> None:
    root = volume_pack(tmp_path / "p", ("train",), suffix="nii")
    data = bytearray((root / "images/v0.nii").read_bytes())
    data[280:296] = bytes(16)  # the first row of the affine
    (root / "images/v0.nii").write_bytes(data)
    with pytest.raises(BadData, match="a spacing of 0 along axis 0"):
        slices_of(load_dataset(root))


@pytest.mark.parametrize(
    ("where", "values", "affine", "words"),
    [
        ("images", np.zeros((9, 9, 9, 2), np.int16), None, ("one volume", "series")),
        ("images", np.full(SHAPE, np.nan, np.float32), None, ("NaN", "export it again")),
        ("images", np.zeros((4, 12, 9), np.int16), None, ("axial slices", "4 x 12", "another axis")),
        ("labels", np.zeros((9, 12, 10), np.uint8), None, ("9 x 12 x 10", "10 x 12 x 9", "resample")),
        ("labels", np.zeros(SHAPE, np.uint8), np.diag([-1.0, 1, 1, 1]), ("LAS", "RAS", "up to 20 mm apart")),
        ("labels", np.full(SHAPE, 3, np.uint8), None, ("no class declares", "[3]", "1 = front")),
        ("labels", np.full(SHAPE, 0.5, np.float32), None, ("between whole numbers", "0.5")),
        ("labels", np.full(SHAPE, -1, np.int16), None, ("no class declares", "-1")),
    ],
)
def test_bad_volumes(boxes: Path, where: str, values: np.ndarray, affine: np.ndarray | None, words: tuple[str]) -> None:
    write(boxes / where / "v0.nii.gz", values, affine)

    def read() -> None:
        dataset = slices_of(load_dataset(boxes))
        dataset.image(dataset.items[0])
        dataset.mask(dataset.items[0])

    with pytest.raises(BadData) as caught:
        read()
    says(caught.value, "v0.nii.gz", *words)


def test_a_trailing_axis_of_one_is_no_series(boxes: Path) -> None:
    want = slices_of(load_dataset(boxes))
    plane = want.image(want.items[3])
    for folder in ("images", "labels"):
        image = nibabel.load(boxes / folder / "v0.nii.gz")
        write(boxes / folder / "v0.nii.gz", np.asarray(image.dataobj)[..., None])
    dataset = slices_of(load_dataset(boxes))
    assert np.array_equal(dataset.image(dataset.items[3]), plane)
    assert dataset.mask(dataset.items[3]).shape == plane.shape[:2]


def test_what_a_user_gets_wrong_is_said(boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(boxes)
    with pytest.raises(UnknownName, match="'axial'"):
        slices_of(dataset, "axal")  # type: ignore[arg-type]
    with pytest.raises(BadCall, match="nothing to slice"):
        slices_of(load_dataset(shots_pack(tmp_path / "flat")))
    sliced = slices_of(dataset)
    with pytest.raises(BadData, match="has no 'mask_other'"):
        replace(sliced, label_sets={**sliced.label_sets, "mask_other": {1: "x"}}).mask(sliced.items[0], "mask_other")

    def absent(module: str, extra: str) -> None:
        raise MissingExtra(f"pip install 'medgraft[{extra}]'")

    monkeypatch.setattr(volumes, "need", absent)
    with pytest.raises(MissingExtra, match=r"medgraft\[volumes\]"):
        slices_of(dataset)
