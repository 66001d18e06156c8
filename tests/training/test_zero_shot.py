"""A promptable backbone as it is: what it is asked, how its answers are scored, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft import cli
from medgraft.adapters import Adapter, Host, MaskHead, Task
from medgraft.adapters.auto_masks import Grid
from medgraft.adapters.part import Readout
from medgraft.backbones import Backbone, Features
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.data import Dataset, load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.phantoms import write_dataset
from medgraft.training.zero_shot import NAME, _chosen, zero_shot
from tests.helpers import says

ANY = Grid(points=3, quality=0.0, stability=0.0)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=1, test=2, size=64).parent


@pytest.fixture
def data(cells: Path) -> Dataset:
    return load_dataset(cells)


@pytest.mark.parametrize("prompts", ["box", "point", "grid"])
def test_every_way_of_asking(prompts: str, sam: Backbone, data: Dataset) -> None:
    found = zero_shot(sam, data, prompts=prompts, grid=ANY)  # type: ignore[arg-type]
    assert found["n"] == 2
    assert 0 <= found["iou"] <= found["dice"] <= 1
    assert len(found["per_image"]) == 2
    assert ("found" in found) == (prompts == "grid")
    assert "truth" in found["prompts"]


def filled(self: Readout, features: Features, image: Tensor) -> Tensor:
    """A decoder that answers each box with the box, and each click with a square of 5 pixels a side."""
    prompts = features.prompts
    assert prompts is not None
    h, w = image.shape[-2:]
    y, x = torch.arange(h)[:, None], torch.arange(w)
    if prompts.boxes is not None:
        x0, y0, x1, y1 = prompts.boxes.round().unbind(-1)
    else:
        assert prompts.points is not None
        px, py = prompts.points[:, :, 0].round().unbind(-1)
        x0, y0, x1, y1 = px - 2, py - 2, px + 3, py + 3
    each = [v[..., None, None] for v in (x0, y0, x1, y1)]
    inside = (x >= each[0]) & (x < each[2]) & (y >= each[1]) & (y < each[3])
    return (inside.any(1, keepdim=True).float() - 0.5) * 20


@pytest.fixture
def squares(tmp_path: Path) -> Dataset:
    """One image of 64 pixels with a square of 24 and one of 8, and one image without an object."""
    from PIL import Image

    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 4:28, 8:32] = 255
    masks[0, 40:48, 50:58] = 255
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    items = [{"id": str(i), "image": f"images/{i}.png", "mask": f"masks/{i}.png", "split": "test"} for i in range(2)]
    said = {
        "name": "squares",
        "task": "segment",
        "dims": 2,
        "classes": {"0": "background", "255": "square"},
        "items": items,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(said))
    return load_dataset(tmp_path)


def test_boxes_lie_on_their_objects(sam: Backbone, squares: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is half the network's input: prompts and masks go there and back without a shift."""
    monkeypatch.setattr(MaskHead, "read", filled)
    found = zero_shot(sam, squares)
    assert found["dice"] > 0.98
    assert (found["n"], found["empty"]) == (1, 1)
    clicked = zero_shot(sam, squares, prompts="point")
    pixels = 2 * 2.5**2  # two squares of 5 pixels of the input, which has twice the side
    assert clicked["iou"] == pytest.approx(pixels / (24**2 + 8**2), rel=0.5)


def test_an_adapter_is_asked_by_the_truth_and_says_so(
    sam: Backbone, squares: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskHead, "read", filled)
    host, task = Host(sam), Task("segment", ("square",))
    host.add(Adapter.of(sam, task, {"head": MaskHead.on(sam, task)}), NAME)
    boxed, clicked = (evaluate(host, NAME, squares, prompts=p) for p in ("box", "point"))  # type: ignore[arg-type]
    assert boxed["per_image"][0]["dice"]["square"] > 0.98
    assert clicked["per_image"][0]["dice"]["square"] < 0.5
    assert "box" in boxed["prompts"]
    assert "truth" in boxed["prompts"]
    assert "point" in clicked["prompts"]


def test_the_grid_chooses_the_best_mask_of_each_object() -> None:
    objects = np.zeros((3, 8, 8), bool)
    objects[0, :4, :4] = objects[1, 5:7, 5:7] = objects[2, 0, 7] = True
    masks = np.stack([objects[0] & (np.arange(8) < 2), objects[0], objects[1]])
    found, best = _chosen(masks, objects)
    assert best == [1, 1, 0]
    assert np.array_equal(found, objects[0] | objects[1])
    assert _chosen(masks[:0], objects)[1] == [0, 0, 0]


def test_bad_calls(sam: Backbone, vit: Backbone, data: Dataset) -> None:
    with pytest.raises(UnknownName) as unknown:
        zero_shot(sam, data, prompts="boxs")  # type: ignore[arg-type]
    says(unknown.value, "box")
    with pytest.raises(BadCall) as refused:
        zero_shot(vit, data)
    says(refused.value, "no promptable decoder", "starter-sam")
    with pytest.raises(BadData) as nothing:
        zero_shot(sam, data, "val")
    says(nothing.value, "val", "test")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["medgraft", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_command(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.json"
    words = ("zero_shot", "--backbone", "random:sam-tiny", "--data", cells, "--json", file)
    assert run(monkeypatch, *words, "--corruptions", "contrast") == 0
    found = json.loads(file.read_text())
    assert list(found["corruptions"]) == ["contrast"]
    assert len(found["corruptions"]["contrast"]) == 5
    assert run(monkeypatch, *words, "--prompts", "clicks") == 0
    assert {"NoC@80", "NoC@85", "NoC@90", "NoF@90", "SPC"} <= json.loads(file.read_text()).keys()


def test_what_the_command_refuses(cells: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words, said in (
        (("zero_shot", "--data", cells), "--backbone"),
        (("zero_shot", "--backbone", "random:sam-tiny", "--data", cells, "--record"), "keeps nothing"),
        (("zero_shot", "--backbone", "random:sam-tiny", "--data", cells, "--corruptions", "frost"), "not drawn here"),
        (
            (
                "zero_shot",
                "--backbone",
                "random:sam-tiny",
                "--data",
                cells,
                "--prompts",
                "clicks",
                "--corruptions",
                "all",
            ),
            "plain",
        ),
    ):
        assert run(monkeypatch, *words) == 2
        assert said in capsys.readouterr().err
