"""Several packs as one: harmonised names, coarse labels, what contradicts itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.assemble import assemble, with_coarse
from medgraft.training.data import Batches, Dataset, load_dataset, sample_shots
from medgraft.training.label_dropout import hide_labels, partial_classes
from tests.training.toy_pack import blocks, entry, pack, save

REAL = Path(__file__).parents[2].parent / "shared" / "data"
KIDNEYS = {"amos": {"left kidney": "kidney", "right kidney": "kidney"}}


def packs(root: Path, **amos: object) -> dict[str, Dataset]:
    """kits draws the kidney and a tumour; amos both kidneys apart and the liver."""
    first = [entry(0, group="anna"), entry(1, split="test")]
    second = [entry(0, group="anna", domain="CT", **amos), entry(1, domain="MR", **amos), entry(2, split="val", **amos)]
    kits = pack(root / "kits", first, [blocks(1, 2)], name="kits", classes={"0": "bg", "1": "kidney", "2": "tumour"})
    names = {"0": "bg", "1": "left kidney", "5": "right kidney", "7": "liver"}
    amos_root = pack(root / "amos", second, [blocks(1, 5, 7)], name="amos", classes=names)
    return {"kits": load_dataset(kits), "amos": load_dataset(amos_root)}


def test_names_are_harmonised_and_items_know_what_was_annotated(tmp_path: Path) -> None:
    both = assemble(packs(tmp_path), KIDNEYS)
    assert both.name == "kits+amos"
    assert both.classes == {1: "kidney", 2: "tumour", 3: "liver"}
    assert [i.id for i in both.split("train")] == ["kits/i0", "amos/i0", "amos/i1"]
    assert [i.id for i in both.split("val") + both.split("test")] == ["amos/i2", "kits/i1"]
    kits, amos = both.items[0], both.items[2]
    assert (both.groups(kits), both.groups(amos)) == ((0, 1, 2, 0), (0, 1, 0, 3))
    assert np.array_equal(both.mask(kits), blocks(1, 2))
    assert np.array_equal(both.mask(amos), blocks(1, 1, 3))
    assert (kits.group, amos.group) == ("kits/anna", "amos/anna"), "two people of one name"
    assert [(i.source, i.domain) for i in both.items[1:4]] == [("kits", "kits"), ("amos", "CT"), ("amos", "MR")]
    assert both.digest(amos) == both.owners["amos/i0"][0].digest(both.owners["amos/i0"][1])
    assert partial_classes(both, both.split("train")) == (2, 3)
    assert both.present(amos) == {1, 3}
    both.check()
    hidden = hide_labels(both, "kidney@amos")
    assert [hidden.groups(i) for i in hidden.split("train")] == [(0, 1, 2, 0), (0, 0, 0, 3), (0, 0, 0, 3)]
    batch = Batches(
        both,
        sample_shots(both, 3, 0),
        size=16,
        mean=(0,) * 3,
        std=(1,) * 3,
        batch_size=4,
        partial=True,
        balance="source",
    ).batch(0)
    assert batch.groups is not None
    assert sorted(map(tuple, batch.groups.tolist())) in (
        [(0, 1, 0, 3)] * 1 + [(0, 1, 2, 0)] * 2,
        [(0, 1, 0, 3)] * 2 + [(0, 1, 2, 0)],
    )


def test_a_class_of_parts_is_annotated_where_all_parts_are(tmp_path: Path) -> None:
    both = assemble(packs(tmp_path, labelled=["left kidney", "liver"]), KIDNEYS)
    assert both.groups(both.items[2]) == (0, 0, 0, 3)
    assert both.present(both.items[2]) == {3}


def test_classes_can_be_chosen_left_out_and_ordered(tmp_path: Path) -> None:
    found = assemble(packs(tmp_path), {**KIDNEYS, "kits": {"tumour": None}}, classes=("liver", "kidney"))
    assert found.classes == {1: "liver", 2: "kidney"}
    assert np.array_equal(found.mask(found.items[0]), blocks(2))
    assert found.groups(found.items[0]) == (0, 0, 2)
    with pytest.raises(UnknownName, match="no class called 'tumour'"):
        assemble(packs(tmp_path), {**KIDNEYS, "kits": {"tumour": None}}, classes=("tumour", "liver"))


def test_coarse_labels(tmp_path: Path) -> None:
    two = packs(tmp_path)
    found = assemble(two, {"kits": {"kidney": ("left kidney", "right kidney"), "tumour": None}})
    assert list(found.classes.values()) == ["left kidney", "right kidney", "liver"]
    assert [found.groups(i) for i in found.split("train")] == [(0, 1, 1, 0), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert found.annotated(found.items[0]) == (False, False, False)
    assert np.array_equal(found.mask(found.items[0]), blocks(1))
    assert found.present(found.items[0]) == set()
    turned = assemble(
        two,
        {"kits": {"kidney": ("right kidney", "left kidney"), "tumour": None}},
        classes=("liver", "right kidney", "left kidney"),
    )
    assert turned.groups(turned.items[0]) == (0, 0, 2, 2)
    assert np.array_equal(turned.mask(turned.items[0]), blocks(2))
    assert hide_labels(turned, "left kidney@kits").groups(turned.items[0]) == (0, 0, 2, 2)
    hidden = hide_labels(turned, "left kidney@kits")
    assert hidden.groups(hidden.items[0]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("mapping", "why"),
    [
        ({"kit": {}}, "did you mean 'kits'"),
        ({"amos": {"left kidny": "kidney"}}, "did you mean 'left kidney'"),
        ({"kits": {"tumour": "kidney"}}, "overlap: other classes are mapped to kidney"),
        (
            {"amos": {"left kidney": ("x", "y"), "right kidney": ("y", "z")}},
            "'amos' overlap: 'left kidney' and 'right kidney' both hold y",
        ),
        ({"amos": {"left kidney": ("right kidney", "liver")}}, "both hold right kidney"),
        (
            {"kits": {"kidney": ("left kidney", "right kidney")}, "amos": {"liver": "kidney"}},
            "contradict each other: 'kidney' of 'kits' is left kidney or right kidney, but a class of its own in 'amos' .'liver'",
        ),
        (
            {"kits": {"kidney": ("cortex", "medulla")}},
            "cortex, medulla of 'kits.amos' is annotated on no training item",
        ),
    ],
)
def test_class_maps_that_cannot_be(tmp_path: Path, mapping: dict[str, dict[str, object]], why: str) -> None:
    with pytest.raises((BadCall, BadData, UnknownName), match=why):
        assemble(packs(tmp_path), mapping)  # type: ignore[arg-type]


def test_packs_that_do_not_go_together(tmp_path: Path) -> None:
    two = packs(tmp_path)
    with pytest.raises(BadCall, match=r"different names, got .'kits', 'kits'"):
        assemble([two["kits"], two["kits"]])
    with pytest.raises(BadCall, match="pictures and volumes"):
        assemble({"a": two["kits"], "b": replace(two["amos"], dims=3)})
    with pytest.raises(BadData, match="pack 'b' has no masks"):
        assemble({"a": two["kits"], "b": replace(two["amos"], classes={})})
    only = {**two, "kits": replace(two["kits"], items=two["kits"].items[1:])}
    with pytest.raises(BadData, match=r"tumour of 'kits\+amos' is annotated on no training item"):
        assemble(only, KIDNEYS)


# One pack with two label sets


def vessels(root: Path) -> Dataset:
    items = [entry(0, mask_av="av/0.png"), entry(1), entry(2, split="test", mask_av="av/2.png")]
    pack(root, items, [blocks(3)], classes={"0": "bg", "3": "vessel"}, classes_av={"1": "artery", "2": "vein"})
    for n in (0, 2):
        save(root / f"av/{n}.png", blocks(1, 2))
    return load_dataset(root, labels="mask_av")


def test_items_with_the_coarser_label_set_are_taken_in(tmp_path: Path) -> None:
    found = with_coarse(vessels(tmp_path / "p"), "mask:vessel=artery+vein")
    assert found.classes == {1: "artery", 2: "vein"}
    assert {i.id: found.groups(i) for i in found.items} == {
        "mask_av/i0": (0, 1, 2),
        "mask_av/i2": (0, 1, 2),
        "mask/i1": (0, 1, 1),
    }
    assert np.array_equal(found.mask(found.items[2]), blocks(1))
    for rule, why in (
        ("vessel=artery", "LABELS:CLASS=A"),
        ("mask:vessel", "LABELS:CLASS=A"),
        ("mask_av:vein=artery", "label set of the task"),
        ("mask_va:vessel=artery", "no label set called"),
        ("mask:vesel=artery+vein", "did you mean 'vessel'"),
    ):
        with pytest.raises((BadCall, UnknownName), match=why):
            with_coarse(vessels(tmp_path / "p"), rule)
    whole = load_dataset(tmp_path / "p")
    with pytest.raises(UnknownName):
        with_coarse(whole, "mask_x:vessel=artery")
    with pytest.raises(BadData, match="no item of 'toy' has 'mask_av' without 'mask'"):
        with_coarse(whole, "mask_av:artery=vessel+wall")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real packs are not at {REAL}")
def test_three_cameras() -> None:
    eyes = load_dataset(REAL / "retina_vessels", labels="mask_av")
    found = hide_labels(with_coarse(eyes, "mask:vessel=artery+vein+crossing_or_uncertain"), "vein@les_av")
    by_camera = {item.domain: found.groups(item) for item in found.split("train")}
    assert by_camera == {"chasedb1": (0, 1, 1, 1), "hrf": (0, 1, 2, 3), "les_av": (0, 1, 0, 3)}
    assert {found.groups(i) for i in found.split("test") if i.domain == "les_av"} == {(0, 1, 2, 3)}
    assert len(found.items) == 74
    assert partial_classes(found, found.split("train")) == (1, 2, 3)
