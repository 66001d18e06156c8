"""The cross-dataset matrix: sources, rows, cells that survive a kill, and sentences where there is no number."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgraft.errors import BadCall, BadData, Diverged, UnknownName
from medgraft.recipes.grid import trainer
from medgraft.training.data import Dataset, load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.matrix import Joined, Matrix, combinations_of, score, sources_of
from medgraft.training.matrix_report import markdown, record, values, write_matrix
from medgraft.training.model import NAME, open_model
from tests.training.toy_pack import blocks, entry, pack, save

TINY = {"backbone": "random:timm:vit_tiny_patch16_224", "image_size": 32, "steps": 1, "batch": 2, "quiet": True}
CLASSES = {"0": "background", "1": "artery", "2": "vein"}


def site(root: Path, number: int = 0, classes: dict[str, str] = CLASSES, **more: Any) -> Path:
    """Three training items and two test items; the pictures of two sites differ."""
    items = [entry(n, split="train" if n < 3 else "test", group=f"p{n}", **more) for n in range(5)]
    values = [int(v) for v in classes if v != "0"]
    pack(root, items, [blocks(*values)], classes=classes, name=root.name)
    for n in range(5):
        save(root / f"images/i{n}.png", _shown(100 * number + n, blocks(*values)))
    return root


def _shown(seed: int, mask: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 40, (*mask.shape, 3), dtype=np.uint8)
    return noise + (mask[..., None] * np.array([100, 60, 0])).astype(np.uint8)


def cameras(root: Path) -> Path:
    """One pack with three cameras; `left` has no vein."""
    items = []
    for n, camera in enumerate(["left"] * 3 + ["mid"] * 3 + ["right"] * 3):
        more: dict[str, Any] = {"labelled": ["artery"]} if camera == "left" else {}
        items.append(entry(n, domain=camera, split="test" if n % 3 == 2 else "train", **more))
    return pack(root, items, [blocks(1, 2)], classes=CLASSES)


def bright(image: np.ndarray) -> np.ndarray:
    """A predictor of both classes, (3, H, W), made of the colours."""
    p = image.astype(np.float32).transpose(2, 0, 1)[:2] / 255
    return np.concatenate([1 - p.max(0, keepdims=True), p / 2]) / (1 - p.max(0) + p.sum(0) / 2)


def one(image: np.ndarray) -> np.ndarray:
    """A predictor of one class."""
    return (image[None, ..., 0] / 255.0).astype(np.float32)


# Sources and rows


def test_sources_by_domain_keep_every_item_and_split(tmp_path: Path) -> None:
    found = sources_of([cameras(tmp_path / "p")], by="domain")
    assert list(found) == ["left", "mid", "right"]
    assert [len(d.items) for d in found.values()] == [3, 3, 3]
    assert {i.domain for i in found["mid"].items} == {"mid"}
    assert [len(d.split("test")) for d in found.values()] == [1, 1, 1]


def test_rows_are_singles_pairs_and_all_or_what_is_asked_for() -> None:
    assert combinations_of("ab") == [("a",), ("b",), ("a", "b")]
    assert len(combinations_of("abcd")) == 4 + 6 + 1
    assert combinations_of("abc", ["c+a", "a + c", "b"]) == [("a", "c"), ("b",)]
    with pytest.raises(UnknownName, match="did you mean 'chasedb1'"):
        combinations_of(["chasedb1", "hrf"], ["hrf+chase_db1"])


def test_what_makes_no_matrix_is_said(tmp_path: Path) -> None:
    a, b = site(tmp_path / "a"), site(tmp_path / "b", 1)
    with pytest.raises(BadCall, match="two or more are needed; got 0"):
        sources_of([])
    with pytest.raises(BadCall, match="found one: a"):
        sources_of([a])
    with pytest.raises(BadData, match="5 of 5 have none: i0, i1"):
        sources_of([a], by="domain")
    with pytest.raises(UnknownName, match="did you mean 'domain'"):
        sources_of([a], by="domains")
    with pytest.raises(BadCall, match="--by divides one"):
        sources_of([a, b], by="domain")
    with pytest.raises(UnknownName, match="did you mean 'vein'"):
        sources_of([a, b], classes=["veins"])
    with pytest.raises(BadCall, match="given twice"):
        sources_of([a, b, a, a])
    with pytest.raises(BadCall, match="no source may have a plus"):
        sources_of([a, site(tmp_path / "c+d", 2)])
    single = pack(tmp_path / "s", [entry(n, domain="only") for n in range(3)], [blocks(1)], classes=CLASSES)
    with pytest.raises(BadCall, match="found one: only"):
        sources_of([single], by="domain")
    twin = site(tmp_path / "twin", 1)
    save(twin / "images/i0.png", np.asarray(Image.open(a / "images/i4.png")))
    with pytest.raises(BadData, match="twin/i0 = a/i4"):
        sources_of([a, twin])


def test_joined_items_keep_their_masks_under_harmonised_values_and_no_test_item_enters(tmp_path: Path) -> None:
    swapped = {"0": "background", "1": "vein", "2": "artery"}
    sources = sources_of([site(tmp_path / "a"), site(tmp_path / "b", 1, swapped)], classes=["artery", "vein"])
    joined = Joined.of(sources, ["vein", "artery"])
    assert [i.id for i in joined.items] == [f"{s}/i{n}" for s in "ab" for n in range(3)]
    assert {i.split for i in joined.items} == {"train"}
    assert joined.classes == {1: "vein", 2: "artery"}
    first, second = (joined.mask(joined.items[n]) for n in (0, 3))
    assert np.array_equal(first, blocks(2, 1))  # a: 1 is artery
    assert np.array_equal(second, blocks(1, 2))  # b: 1 is vein
    assert joined.present(joined.items[0]) == {1, 2}
    assert np.array_equal(joined.image(joined.items[3]), sources["b"].image(sources["b"].items[0]))
    assert len({i.group for i in joined.items}) == 6  # p0 of a is not p0 of b
    partly = sources_of([cameras(tmp_path / "p")], by="domain")
    assert [i.id for i in Joined.of(partly, ["artery", "vein"]).items] == ["mid/i3", "mid/i4", "right/i6", "right/i7"]


# Scores


def test_scores_are_those_of_evaluate_and_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import average_precision_score

    root = site(tmp_path / "a")
    out = tmp_path / "model"
    trainer("linear_probe", {**TINY, "steps": 30, "augment": "none"})(load_dataset(root), out, 0)
    host, _ = open_model(str(out))
    dataset = load_dataset(root)
    found = score(lambda image: host.predict(image, NAME, probabilities=True), dataset)
    want = evaluate(host, NAME, dataset)
    assert found["dice"] == pytest.approx(want["dice"])
    assert found["dice"] > 0.1
    for name in ("artery", "vein"):
        assert found["classes"][name]["dice"] == pytest.approx(want["classes"][name]["mean"])
    truth = np.concatenate([dataset.mask(i).ravel() == 2 for i in dataset.split("test")])
    p = [host.predict(dataset.image(i), NAME, probabilities=True)[2].ravel() for i in dataset.split("test")]
    area = average_precision_score(truth, np.concatenate(p))
    assert found["classes"]["vein"]["pr_area"] == pytest.approx(area, abs=1e-3)


def test_images_that_do_not_annotate_a_class_are_left_out_of_it(tmp_path: Path) -> None:
    root = pack(
        tmp_path / "p",
        [entry(0, split="test"), entry(1, split="test", labelled=["artery"])],
        [blocks(1, 2), blocks(1)],
        classes=CLASSES,
    )
    found = score(bright, load_dataset(root))
    assert found["classes"]["artery"]["images"] == 2
    assert found["classes"]["vein"]["images"] == 1
    assert found["per_image"][1]["dice"][1] is None


# The grid


def fill(matrix: Matrix) -> None:
    for members in combinations_of(list(matrix.sources)):
        matrix.train(members, 0, trainer("linear_probe", TINY))


def test_a_matrix_is_filled_written_and_found_again(tmp_path: Path) -> None:
    sources = sources_of([site(tmp_path / "a"), site(tmp_path / "b", 1)])
    matrix = Matrix(tmp_path / "out", sources, {"recipe": "linear_probe"})
    fill(matrix)
    for seed in range(2):
        matrix.row("bright", ("a",), seed, lambda: (bright, {"images": 3}))
    found = write_matrix(matrix)
    assert found["rows"] == ["a", "b", "a+b", "bright"]
    assert found["columns"] == ["a", "b"]
    assert values(found, "vein", "dice").shape == (4, 2, 2)
    assert np.isnan(values(found, "vein", "pr_area")).sum() == 3 * 2  # one seed was trained
    assert {c["model"]["images"] for c in found["cells"]} == {3, 6}
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3 * 2 + 2 * 2
    text = (tmp_path / "out" / "matrix.md").read_text()
    for line in (
        "| a+b |",
        "(1 of 2 seeds)",
        "± 0.000",
        "## vein",
        "seconds of training",
        "roughness",
        "Nearer than 1",
    ):
        assert line in text
    again = Matrix(tmp_path / "out", sources, {"recipe": "linear_probe"})

    def never(*_: object) -> Mapping[str, Any]:
        pytest.fail("trained again")

    for members in combinations_of(["a", "b"]):
        again.train(members, 0, never)
    for seed in range(2):
        again.row("bright", ("a",), seed, never)
    assert record(again).items() <= found.items()
    with pytest.raises(BadCall, match="recipe: linear_probe there, lora now"):
        Matrix(tmp_path / "out", sources, {"recipe": "lora"})
    with pytest.raises(BadCall, match="classes"):
        Matrix(
            tmp_path / "out", sources_of([tmp_path / "a", tmp_path / "b"], classes=["vein"]), {"recipe": "linear_probe"}
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked copy of the test")
@pytest.mark.parametrize("moment", ["while training", "while scoring"])
def test_a_killed_matrix_goes_on_and_loses_no_finished_cell(tmp_path: Path, moment: str) -> None:
    sources = sources_of([site(tmp_path / "a"), site(tmp_path / "b", 1)])
    train = trainer("linear_probe", TINY)

    def killed(*arguments: Any) -> Mapping[str, Any]:
        if moment == "while training" and arguments[0].name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*arguments)

    child = os.fork()
    if not child:
        matrix = Matrix(tmp_path / "out", sources)
        if moment == "while scoring":
            matrix.said = lambda line: os.kill(os.getpid(), signal.SIGKILL) if line.startswith("b on a") else None
        matrix.train(("a",), 0, killed)
        matrix.train(("b",), 0, killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = {f: f.read_bytes() for f in (tmp_path / "out" / "cells").glob("*.json")}
    assert len(kept) == (2 if moment == "while training" else 3)
    assert all(json.loads(text)["classes"] for text in kept.values())  # whole or not at all
    trained = []

    def counted(*arguments: Any) -> Mapping[str, Any]:
        trained.append(arguments[0].name)
        return train(*arguments)

    matrix = Matrix(tmp_path / "out", sources)
    for members in (("a",), ("b",)):
        matrix.train(members, 0, counted)
    assert trained == (["b"] if moment == "while training" else [])
    assert all(f.read_bytes() == text for f, text in kept.items())
    straight = Matrix(tmp_path / "straight", sources)
    for members in (("a",), ("b",)):
        straight.train(members, 0, train)
    for key, cell in straight.cells.items():
        assert matrix.cells[key]["classes"] == cell["classes"]


def test_a_class_that_is_lacking_is_a_sentence_and_never_a_zero(tmp_path: Path) -> None:
    root = cameras(tmp_path / "p")
    matrix = Matrix(tmp_path / "out", sources_of([root], by="domain"))
    assert matrix.taught(["left"]) == ["artery"]
    assert matrix.taught(["mid", "right"]) == ["artery", "vein"]
    seen = {}

    def train(dataset: Dataset, out: Path, seed: int) -> Mapping[str, Any]:
        seen[dataset.name] = (list(dataset.classes.values()), len(dataset.items))
        return trainer("linear_probe", TINY)(dataset, out, seed)

    for members in (("left",), ("mid",), ("left", "mid")):
        matrix.train(members, 0, train)
    assert seen == {"left": (["artery"], 2), "mid": (["artery", "vein"], 2), "left+mid": (["artery"], 4)}
    cells = {key[:2]: cell["classes"] for key, cell in matrix.cells.items()}
    assert cells["left", "mid"]["vein"] == {"lacks": "left has no vein to train on"}
    assert cells["left+mid", "mid"]["vein"] == {"lacks": "left has no vein to train on"}
    assert cells["mid", "left"]["vein"] == {"lacks": "left has no vein to test on"}
    assert cells["mid", "left"]["artery"]["dice"] is not None
    assert cells["mid", "right"]["vein"]["dice"] is not None
    text = markdown(record(matrix))
    assert "| left | left has no vein to train on | left has no vein to train on |" in text
    assert np.isnan(values(record(matrix), "vein", "dice")[0]).all()


def test_packs_with_other_classes_share_what_they_share(tmp_path: Path) -> None:
    other = {"0": "background", "1": "disc"}
    sources = sources_of([site(tmp_path / "a"), site(tmp_path / "c", 2, other)])
    matrix = Matrix(tmp_path / "out", sources)
    assert matrix.classes == ["artery", "vein", "disc"]
    never = matrix.row("a+c", ("a", "c"), 0, lambda: pytest.fail("nothing in common, nothing to make"))
    assert never is None
    matrix.row("a", ("a",), 0, lambda: (bright, {}))
    assert matrix.cells["a+c", "a", 0]["classes"]["vein"] == {"lacks": "c has no vein to train on"}
    assert "dice" not in matrix.cells["a", "c", 0]
    assert matrix.cells["a", "c", 0]["classes"]["artery"] == {"lacks": "c has no artery to test on"}
    assert matrix.cells["a", "a", 0]["classes"]["disc"] == {"lacks": "a has no disc to train on"}


def test_a_cell_that_fails_says_why_the_others_go_on_and_it_is_tried_again(tmp_path: Path) -> None:
    a, b = site(tmp_path / "a"), site(tmp_path / "b", 1)
    sources = sources_of([a, b])
    calls = []

    def diverges(dataset: Dataset, out: Path, seed: int) -> Mapping[str, Any]:
        calls.append(dataset.name)
        raise Diverged("the loss is nan at step 3")

    matrix = Matrix(tmp_path / "out", sources)
    matrix.train(("a",), 0, diverges)
    assert calls == ["a"]  # one attempt for the whole row
    assert {c["failed"] for c in matrix.cells.values()} == {"Diverged: the loss is nan at step 3"}
    good = (b / "images/i4.png").read_bytes()
    (b / "images/i4.png").write_bytes(b"nonsense")
    matrix.train(("a",), 0, trainer("linear_probe", TINY))
    assert matrix.cells["a", "a", 0]["dice"] is not None
    assert "BadData" in matrix.cells["a", "b", 0]["failed"]
    found = record(Matrix(tmp_path / "other", {"a": sources["a"]}))  # no cells yet
    assert found["cells"] == []
    (b / "images/i4.png").write_bytes(good)
    text = markdown(record(matrix))
    assert "BadData" in text
    matrix.train(("a",), 0, diverges)  # the model is there: only the failed cell is made
    assert calls == ["a"]
    assert matrix.cells["a", "b", 0]["dice"] is not None
    with pytest.raises(UnknownName, match="linear_probe"):
        trainer("linear_prob")


def test_any_predictor_can_be_a_row_and_names_may_hold_anything(tmp_path: Path) -> None:
    items = [entry(n, domain=("a/b", "..", "x" * 200)[n % 3], split="test" if n > 2 else "train") for n in range(6)]
    root = pack(tmp_path / "p", items, [blocks(1)], classes={"0": "background", "1": "vessel"})
    matrix = Matrix(tmp_path / "out", sources_of([root], by="domain"))
    for members in combinations_of(list(matrix.sources)):
        matrix.row("ensemble of " + "+".join(members), members, 0, lambda: (one, {"images": 1}))
    assert len(matrix.cells) == 7 * 3
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 1 + 21
    assert {p.parent for p in files} == {tmp_path / "out", tmp_path / "out" / "cells"}
    again = Matrix(tmp_path / "out", matrix.sources)
    again.row("ensemble of ..", ("..",), 0, lambda: pytest.fail("cells are there"))
    assert again.cells == {k: v for k, v in matrix.cells.items() if k[0] == "ensemble of .."}


def test_no_two_cells_share_a_file(tmp_path: Path) -> None:
    """Row a on column 0.b and row a.0 on column b would, were a dot not written otherwise."""
    items = [entry(n, domain=("a", "a.0", "b", "0.b")[n % 4], split="test" if n > 3 else "train") for n in range(8)]
    root = pack(tmp_path / "p", items, [blocks(1)], classes={"0": "background", "1": "vessel"})
    matrix = Matrix(tmp_path / "out", sources_of([root], by="domain"))
    for members in (("a",), ("a.0",)):
        matrix.row(members[0], members, 0, lambda: (one, {}))
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2 * 4


def test_a_damaged_cell_is_made_again(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path / "out", sources_of([site(tmp_path / "a"), site(tmp_path / "b", 1)]))
    matrix.row("a", ("a",), 0, lambda: (bright, {}))
    before = dict(matrix.cells)
    file = tmp_path / "out" / "cells" / "a.0.b.json"
    file.write_text(file.read_text()[:40])
    matrix.row("a", ("a",), 0, lambda: (bright, {}))
    assert matrix.cells["a", "b", 0]["classes"] == before["a", "b", 0]["classes"]


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the heat map needs the extra 'plots'")
    from medgraft.training.report import heat_map_png

    table = np.array([[0.1, 0.9], [np.nan, 0.5], [0.3, 0.3]])
    heat_map_png(
        {"Dice": table, "area": table / 2}, ["a", "b", "a+b"], ["a", "b"], tmp_path / "m.png", across="tested on"
    )
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.width > picture.height
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20
    with pytest.raises(BadCall, match="3 rows and 3 columns"):
        heat_map_png({"Dice": table}, ["a", "b", "c"], ["a", "b", "c"], tmp_path / "n.png")
    assert not (tmp_path / "n.png").exists()
