import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.errors import BadCall, BadData, MissingExtra, SaveFailed
from medgraft.training.report import PALETTE, Log, colour_of, curves_png, overlay_png, read_log


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with Log(file) as log:
        log.write(step=1, loss=torch.tensor(0.5), dice=np.float32(0.25), per_class=np.array([0.5, float("nan")]))
        assert len(read_log(file)) == 1  # on disk at once
        log.write(step=2, loss=float("nan"), note="é", where=Path("a"), inner={"x": float("inf")})
    assert read_log(file) == [
        {"step": 1, "loss": 0.5, "dice": 0.25, "per_class": [0.5, None]},
        {"step": 2, "loss": None, "note": "é", "where": "a", "inner": {"x": None}},
    ]
    with Log(file):
        pass
    assert read_log(file) == []


def test_a_resumed_log_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    with Log(whole) as log:
        for step in range(6):
            log.write(step=step, loss=1 / (step + 1))
    lines = whole.read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:5]) + lines[5][:7])  # killed while writing, last saved at step 3
    assert len(read_log(broken)) == 5
    with Log(broken, resume_after=3) as log:
        for step in (4, 5):
            log.write(step=step, loss=1 / (step + 1))
    assert broken.read_bytes() == whole.read_bytes()
    with Log(tmp_path / "new.jsonl", resume_after=3) as log:
        log.write(step=4)
    assert read_log(tmp_path / "new.jsonl") == [{"step": 4}]


def test_bad_logs(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(BadData, match=r"log\.jsonl, line 2 is not a JSON object"):
        read_log(file)
    file.write_text("[1]\n")
    with pytest.raises(BadData, match="line 1"):
        read_log(file)
    with pytest.raises(BadData, match="no log at"):
        read_log(tmp_path / "absent")
    with pytest.raises(SaveFailed, match="does its folder exist"):
        Log(tmp_path / "absent" / "log.jsonl")


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="curves need the extra 'plots'")
    with Log(tmp_path / "log.jsonl") as log:
        for step in range(20):
            log.write(step=step, loss=1 / (step + 1), val_dice=step / 20 if step % 5 == 0 else None, kind="train")
    curves_png(tmp_path / "log.jsonl", tmp_path / "two.png")
    curves_png([{"step": 1, "loss": 0.5}], tmp_path / "one.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.width == 2 * one.width
        assert len(np.unique(np.asarray(two))) > 50
    for empty in ([], [{"step": 1, "loss": None}], [{"loss": 0.5}]):
        with pytest.raises(BadData, match="no numbers to draw"):
            curves_png(empty, tmp_path / "none.png")


def test_without_matplotlib_only_curves_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medgraft.errors

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(medgraft.errors, "import_module", absent)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"medgraft\[plots\]"):
        curves_png([{"step": 1, "loss": 0.5}], tmp_path / "c.png")
    overlay_png(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), int), None, tmp_path / "o.png", {1: "a"})


def test_overlay_fills_outlines_and_names(tmp_path: Path) -> None:
    image = np.full((300, 320, 3), 100, np.uint8)
    pred, truth = np.zeros((300, 320), np.uint8), np.zeros((300, 320), np.uint8)
    pred[50:150, 50:150] = 1
    truth[60:160, 50:150] = 1
    overlay_png(image, pred, truth, tmp_path / "o.png", {1: "polyp", 2: "never seen"})
    got = np.asarray(Image.open(tmp_path / "o.png")).astype(int)
    assert got.shape[1] >= 320
    assert got.shape[0] > 300  # the legend stands below
    assert got[10, 10].tolist() == [100, 100, 100]
    assert np.abs(got[100, 100] - (100 + np.array(colour_of(1))) / 2).max() <= 1
    assert got[50, 100].tolist() == list(colour_of(1))
    assert (got[60, 100] > np.array(colour_of(1))).any()  # the truth's lighter outline
    assert got[162, 100].tolist() == [100, 100, 100]
    legend = got[300:].reshape(-1, 3)
    assert (legend == colour_of(1)).all(1).any()
    assert not (legend == colour_of(2)).all(1).any()


def test_overlay_of_small_and_crowded_pictures(tmp_path: Path) -> None:
    names = {n: f"a structure with a long name, number {n}" for n in range(1, 16)}
    mask = np.arange(28 * 28).reshape(28, 28) % 16
    overlay_png(np.zeros((28, 28, 3), np.uint8), mask, mask, tmp_path / "o.png", names)
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.height > 28 * 10 + 15 * 20  # enlarged, a line of legend for each
    assert len({colour_of(n) for n in range(1, 22)}) == 21
    assert colour_of(1) == PALETTE[0]


def test_overlay_refuses_what_does_not_fit(tmp_path: Path) -> None:
    image, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), int)
    for bad_image, bad_mask, bad_truth in [(image[..., 0], mask, None), (image, mask.T, None), (image, mask, mask[:5])]:
        with pytest.raises(BadCall):
            overlay_png(bad_image, bad_mask, bad_truth, tmp_path / "o.png", {1: "a"})
    with pytest.raises(SaveFailed):
        overlay_png(image, mask, None, tmp_path / "absent" / "o.png", {1: "a"})
