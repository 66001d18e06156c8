import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.data import Batches, load_dataset, sample_shots
from tests.training.toy_pack import blocks, entry, pack, picture, save

REAL = Path(__file__).parents[2].parent / "shared" / "data"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_a_pack_is_read(tmp_path: Path) -> None:
    items = [entry(n, domain="lab", group=f"g{n}", labelled=["nucleus"], note="kept out") for n in range(3)]
    items[2]["split"] = "test"
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1, 2)]))
    assert (dataset.name, dataset.dims, dataset.labels) == ("toy", 2, "mask")
    assert dataset.classes == {1: "cytoplasm", 2: "nucleus"}
    assert [item.id for item in dataset.split("train")] == ["i0", "i1"]
    assert dataset.split("val") == []
    item = dataset.items[0]
    assert (item.domain, item.group, item.labelled, item.label) == ("lab", "g0", ("nucleus",), None)
    assert np.array_equal(dataset.image(item), picture(0))
    assert np.array_equal(dataset.mask(item), blocks(1, 2))
    assert dataset.annotated(item) == (False, True)
    assert dataset.present(item) == {2}  # cytoplasm is in the file, but nobody vouches for it
    assert dataset.digest(item) != dataset.digest(dataset.items[1])
    assert hash(item) == hash(load_dataset(tmp_path / "p").items[0])
    dataset.check()
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        dataset.split("training")


def test_chosen_classes_keep_their_order_and_the_rest_is_background(tmp_path: Path) -> None:
    root = pack(tmp_path / "p", [entry(0)], [blocks(1, 2, 5)], classes={"0": "bg", "1": "a", "2": "b", "5": "c"})
    everything = load_dataset(root)
    assert everything.classes == {1: "a", 2: "b", 3: "c"}
    assert np.array_equal(everything.mask(everything.items[0]), blocks(1, 2, 3))
    turned = load_dataset(root, classes=("c", "a"))
    assert turned.classes == {1: "c", 2: "a"}
    assert np.array_equal(turned.mask(turned.items[0]), blocks(2, 0, 1))
    with pytest.raises(UnknownName, match="no class called 'd'; there are: a, b, c"):
        load_dataset(root, classes=("a", "d"))
    for wrong in ("abc", (), ("a", "a")):
        with pytest.raises(BadCall):
            load_dataset(root, classes=wrong)


def test_other_label_sets(tmp_path: Path) -> None:
    items = [entry(0, mask_av="av/0.png"), entry(1), entry(2, mask_av="av/2.png")]
    root = pack(tmp_path / "p", items, [blocks(1)], classes_av={"0": "bg", "1": "artery", "2": "vein"})
    save(root / "av/0.png", blocks(0, 1, 2))
    save(root / "av/2.png", blocks(2))
    dataset = load_dataset(root, labels="mask_av")
    assert dataset.classes == {1: "artery", 2: "vein"}
    assert ([item.id for item in dataset.items], dataset.left_out) == (["i0", "i2"], ("i1",))
    assert np.array_equal(dataset.mask(dataset.items[0]), blocks(0, 1, 2))
    assert np.array_equal(dataset.mask(dataset.items[0], labels="mask"), blocks(1))
    whole = load_dataset(root)
    assert whole.annotated(whole.items[1], "mask_av") == (False, False)
    with pytest.raises(BadData, match="item 'i1' of 'toy' has no 'mask_av', it has: mask"):
        whole.mask(whole.items[1], labels="mask_av")
    with pytest.raises(UnknownName, match="did you mean 'mask_av'"):
        load_dataset(root, labels="mask_va")


def test_what_was_annotated_may_be_said_for_the_pack_and_for_an_item(tmp_path: Path) -> None:
    items = [entry(0), entry(1, labelled=["cytoplasm", "nucleus"]), entry(2, labelled=[])]
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1, 2)], labelled=["nucleus"]))
    assert [dataset.annotated(i) for i in dataset.items] == [(False, True), (True, True), (False, False)]
    assert [dataset.groups(i) for i in dataset.items] == [(0, 0, 2), (0, 1, 2), (0, 0, 0)]
    with pytest.raises(BadData, match="did you mean 'nucleus'"):
        load_dataset(pack(tmp_path / "q", [entry(0)], [blocks(1)], labelled=["nucleous"]))


def test_labelled_says_nothing_of_a_label_set_that_it_never_names(tmp_path: Path) -> None:
    items = [entry(0, labelled=["nucleus"], mask_av="av/0.png"), entry(1, labelled=["cytoplasm"], mask_av="av/0.png")]
    root = pack(tmp_path / "p", items, [blocks(1, 2)], classes_av={"1": "artery", "2": "vein"})
    save(root / "av/0.png", blocks(1, 2))
    dataset = load_dataset(root)
    assert [dataset.annotated(i) for i in dataset.items] == [(False, True), (True, False)]
    assert [dataset.annotated(i, "mask_av") for i in dataset.items] == [(True, True)] * 2


def test_image_labels(tmp_path: Path) -> None:
    items = [entry(n, label=label) for n, label in enumerate(["mel", "nv", "bcc", "nv", "mel"])]
    root = pack(tmp_path / "p", items, [blocks(1)])
    dataset = load_dataset(root, labels="label")
    assert dataset.label_names == ("bcc", "mel", "nv")
    assert [item.label for item in dataset.items] == [1, 2, 0, 2, 1]
    two = load_dataset(root, labels="label", classes=("nv", "mel"))
    assert [item.label for item in two.items] == [1, 0, 0, 1]
    assert (two.label_names, two.left_out) == (("nv", "mel"), ("i2",))


@pytest.mark.parametrize("name", ["images", "train_images"])
def test_rows_of_an_npz(tmp_path: Path, name: str) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 10, 12), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{name: rows})
    items = [{"id": str(n), "array": "a.npz", "index": n, "label": n % 2, "split": "train"} for n in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"items": items, "label_names": ["no", "yes"], "classes": {}}))
    dataset = load_dataset(tmp_path)
    assert (dataset.labels, dataset.label_names) == ("label", ("no", "yes"))
    assert np.array_equal(dataset.image(dataset.items[3]), np.repeat(rows[3][..., None], 3, 2))
    items[0]["index"] = 4
    (tmp_path / "dataset.json").write_text(json.dumps({"items": items, "label_names": ["no", "yes"]}))
    dataset = load_dataset(tmp_path)
    with pytest.raises(BadData, match=r"item '0' asks for row 4 of a\.npz, which has 4"):
        dataset.image(dataset.items[0])


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"other": np.zeros((4, 9, 9), np.uint8)}, "neither train_images nor images; it holds: other"),
        ({"images": np.zeros((4, 9, 9))}, "float64"),
        ({"images": np.zeros((4, 9, 9, 2), np.uint8)}, "wanted uint8"),
        ({"images": np.zeros((4, 5, 9), np.uint8)}, "at least 8 x 8"),
        ({"images": np.array([{}, {}], dtype=object)}, "no readable npz"),
        (b"nothing of the kind", "no readable npz"),
        (b"PK\x03\x04 cut short", "no readable npz"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: Any, why: str) -> None:
    if isinstance(arrays, bytes):
        (tmp_path / "a.npz").write_bytes(arrays)
    else:
        np.savez(tmp_path / "a.npz", **arrays)
    items = [{"id": "0", "array": "a.npz", "index": 0, "label": 0, "split": "train"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"items": items, "label_names": ["no", "yes"]}))
    dataset = load_dataset(tmp_path)
    with pytest.raises(BadData, match=why):
        dataset.image(dataset.items[0])


def test_volumes_load_as_facts_only(tmp_path: Path) -> None:
    root = pack(tmp_path / "p", [entry(0)], [blocks(1)], dims=3)
    dataset = load_dataset(root)
    for read in (dataset.image, dataset.mask):
        with pytest.raises(BadData, match=r"medgraft\[volumes\]"):
            read(dataset.items[0])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"items": 3}', '{"items": []}', '{"items": [1]}', '{"items": [{}]}'])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(BadData, match=r"dataset\.json"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["../out.png", "images/../../out.png", "/etc/passwd", "C:\\a.png", "a\\..\\..\\b.png"])
@pytest.mark.parametrize("key", ["image", "mask", "mask_av"])
def test_files_outside_the_folder_are_refused(tmp_path: Path, key: str, name: str) -> None:
    root = pack(tmp_path / "p", [entry(0)], [blocks(1)])
    (root / "dataset.json").write_text(json.dumps({"items": [entry(0, **{key: name})]}))
    with pytest.raises(BadData, match=f"item 'i0': '{key}' must be a name inside the folder"):
        load_dataset(root)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image": 3}, "'image' must be a file name"),
        ({"image": None}, "needs either 'image', or 'array' and 'index'"),
        ({"array": "a.npz", "index": 0}, "needs either"),
        ({"index": 0}, "needs either"),
        ({"index": -1}, "'index' must be a row number"),
        ({"label": 5}, "'label' must be an index or name of"),
        ({"label": True}, "'label' must be an index or name"),
        ({"label": -1}, "labels are -1;"),
        ({"group": 5}, "'group' must be a string"),
        ({"labelled": "nucleus"}, "'labelled' must be a list"),
        ({"labelled": ["nucleous"]}, "did you mean 'nucleus'"),
        ({"split": "training"}, "did you mean 'train'"),
        ({"id": 7}, "needs an 'id' that is a string"),
    ],
)
def test_bad_entries(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    top = {"label_names": ["a", "b"]} if change == {"label": 5} else {}
    with pytest.raises(BadData, match=why):
        load_dataset(pack(tmp_path / "p", [{**entry(0), **change}], [blocks(1)], **top))


@pytest.mark.parametrize(
    ("top", "why"),
    [
        ({"dims": 4}, "dims must be 2 or 3"),
        ({"classes": ["background", "nucleus"]}, "classes must be an object"),
        ({"classes": {"one": "nucleus"}}, "maps mask values"),
        ({"classes": {"1": "nucleus", "2": "nucleus"}}, "twice"),
        ({"classes": {"0": "background"}}, "declares no classes"),
        ({"classes": {}}, "declares no classes"),
        ({"label_names": ["a", "a"]}, "twice"),
        ({"label_names": "ab"}, "list of strings"),
    ],
)
def test_bad_top_level(tmp_path: Path, top: dict[str, Any], why: str) -> None:
    with pytest.raises(BadData, match=why):
        load_dataset(pack(tmp_path / "p", [entry(0)], [blocks(1)], **top))


def test_ids_groups_and_splits_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="same id: i0;"):
        load_dataset(pack(tmp_path / "a", [entry(0), entry(0)], [blocks(1)]))
    with pytest.raises(BadData, match="in the training split and in another: anna;"):
        load_dataset(pack(tmp_path / "b", [entry(0, group="anna"), entry(1, group="anna", split="test")], [blocks(1)]))
    with pytest.raises(BadData, match="have none: i1"):
        load_dataset(pack(tmp_path / "c", [entry(0), entry(1, split=None)], [blocks(1)]))
    said = [entry(0, split=None), entry(1, split=None)]
    dataset = load_dataset(pack(tmp_path / "d", said, [blocks(1)], split={"train": ["i1"], "test": ["i0"]}))
    assert [item.split for item in dataset.items] == ["test", "train"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    root = pack(tmp_path / "p", [entry(n) for n in range(3)], [blocks(1)])
    (root / "masks/i1.png").unlink()
    (root / "images/i2.png").unlink()
    with pytest.raises(BadData, match=r"lacks 2 of 6 files: images/i2\.png, masks/i1\.png;"):
        load_dataset(root)


def test_masks_that_do_not_fit_are_named_when_read(tmp_path: Path) -> None:
    root = pack(tmp_path / "p", [entry(0), entry(1)], [blocks(1), blocks(1, 2, 3)])
    save(root / "masks/i0.png", np.zeros((24, 20), np.uint8))
    dataset = load_dataset(root)
    with pytest.raises(BadData, match=r"i0\.png is 24 x 20 pixels.*its image 20 x 24"):
        dataset.mask(dataset.items[0])
    with pytest.raises(BadData, match=r"i1\.png has values that no class declares: 3"):
        dataset.mask(dataset.items[1])
    with pytest.raises(BadData, match=r"i0\.png"):
        dataset.check("train")


# -- the real packs

PACKS = {  # name: label sets with their number of classes, train / val / test
    "ct_mr_sample": ({"mask": 15}, (0, 0, 2)),
    "cxr_anatomy": ({"mask": 4, "mask_findings": 5}, (22, 7, 15)),
    "dsb2018_nuclei": ({"mask": 1}, (62, 23, 35)),
    "hc18_fetal_head": ({"mask": 1}, (60, 24, 36)),
    "hippocampus_msd": ({"mask": 2}, (20, 8, 12)),
    "pneumoniamnist": ({"label": 2}, (600, 200, 400)),
    "retina_vessels": ({"mask": 1, "mask_av": 3}, (37, 16, 21)),
    "skin_ham10000": ({"mask": 1, "label": 7}, (77, 28, 49)),
    "wbc": ({"mask": 2, "label": 5}, (100, 40, 60)),
}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real packs are not at {REAL}")
@pytest.mark.parametrize("name", sorted(PACKS))
def test_real_packs(name: str) -> None:
    sets, sizes = PACKS[name]
    for labels, count in sets.items():
        dataset = load_dataset(REAL / name, labels=labels)
        names = dataset.label_names if labels == "label" else dataset.classes
        assert len(names) == count
        if not dataset.left_out:
            assert tuple(len(dataset.split(part)) for part in ("train", "val", "test")) == sizes
        if dataset.dims == 3:
            continue
        task = "classify" if labels == "label" else "segment"
        chosen = sample_shots(dataset, 3, 0, task=task)  # reads every training mask
        batch = Batches(dataset, chosen, size=64, mean=MEAN, std=STD, batch_size=4, task=task).batch(0)
        assert batch.images.isfinite().all()
        for item in dataset.split("test")[:5]:
            image = dataset.image(item)
            assert image.ndim == 3
            if task == "segment":
                assert dataset.mask(item).shape == image.shape[:2]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real packs are not at {REAL}")
def test_real_partial_labels() -> None:
    chest = load_dataset(REAL / "cxr_anatomy")
    assert Counter(chest.annotated(item) for item in chest.items) == {
        (True, True, True, True): 42,
        (False, True, True, True): 1,
        (True, False, True, True): 1,
    }
    findings = load_dataset(REAL / "cxr_anatomy", labels="mask_findings")
    assert {findings.annotated(item) for item in findings.items} == {(True,) * 5}
    assert {load_dataset(REAL / "wbc").groups(i) for i in load_dataset(REAL / "wbc").items} == {(0, 1, 2)}
    eyes = load_dataset(REAL / "retina_vessels", labels="mask_av")
    assert len(eyes.left_out) == 28
    assert {item.domain for item in eyes.items} == {"hrf", "les_av"}
