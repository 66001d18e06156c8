"""The recipe samaug on a SAM with random weights: what it trains on, what it saves, what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medgraft.adapters import Host
from medgraft.adapters.auto_masks import Grid, auto_masks
from medgraft.adapters.samaug import SamAug
from medgraft.adapters.store import read_record
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, UnknownName
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.fit import Asked, plain
from medgraft.training.losses import segmentation_loss
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from medgraft.training.samaug import TwoPictures, share_with_masks
from tests.helpers import FINDING, adapter, says

GRID = {**FINDING, "points": 2}
LOOSE = Grid(2, 0.0, 0.0, 0.9)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=3, test=2, size=64).parent


def run(data: Path, out: Path, **more: object) -> Run:
    shared = {"backbone": "random:sam-tiny", "image_size": 64, "steps": 2, "batch": 2, "quiet": True, "views": 2}
    return Run(data, out, **{**shared, **more})  # type: ignore[arg-type]


def train(data: Path, out: Path, shared: dict[str, object] | None = None, **options: object) -> dict[str, object]:
    return find_recipe("samaug").program(run(data, out, **(shared or {})), **{"channels": "4-8", **GRID, **options})


@pytest.mark.parametrize("form", ["paper", "code"])
def test_it_trains_saves_and_scores_as_an_ordinary_adapter(cells: Path, tmp_path: Path, form: str) -> None:
    result = train(cells, tmp_path / "a", form=form)
    assert result["kind"] == "adapter"
    assert result["with_masks"] == 1.0
    (part,) = read_record(tmp_path / "a")["parts"]
    assert (part["kind"], part["config"]["form"], part["config"]["points"]) == ("samaug", form, 2)
    host, made = open_model(str(tmp_path / "a"))
    score = evaluate(host, NAME, load_dataset(cells))
    assert 0 <= score["dice"] <= 1
    assert made.task.classes == ("cytoplasm", "nucleus")


def test_the_share_of_pictures_with_masks(cells: Path, tmp_path: Path) -> None:
    assert train(cells, tmp_path / "a", quality=1.0, stability=1.0)["with_masks"] == 0.0
    work = run(cells, tmp_path / "b")
    items = work.dataset.split("train")
    assert share_with_masks(work.frozen, work.dataset, items, LOOSE) == 1.0
    assert share_with_masks(work.frozen, work.dataset, items, Grid(2, 1.0, 1.0, 0.9)) == 0.0
    best = [float(auto_masks(work.frozen, work.dataset.image(item), LOOSE).quality.max()) for item in items]
    between = Grid(2, sorted(best)[1] + 1e-6, 0.0, 0.9)
    assert share_with_masks(work.frozen, work.dataset, items, between) == pytest.approx(1 / 3)
    with pytest.raises(BadCall, match="no items"):
        share_with_masks(work.frozen, work.dataset, [], LOOSE)


def asked(cells: Path, out: Path, on: Backbone, part: SamAug, step: int = 0) -> Asked:
    work = run(cells, out, image_size=on.spec.image_size)
    work.__dict__["frozen"] = on
    batch = work.batches().batch(step)
    made = adapter(on, {"it": part}, task=work.goal, awake=False)
    host = Host(on)
    host.add(made, "it")
    state = on.run(batch.images, stop=host.cut("it"))
    return Asked(host, "it", batch, state, batch.images, 0, host.resume)  # type: ignore[arg-type]


def test_both_pictures_are_trained_on_and_priors_are_computed_once(
    cells: Path, tmp_path: Path, sam: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = run(cells, tmp_path).goal
    part = SamAug.on(sam, goal, channels=(4, 8), **GRID).eval()  # type: ignore[arg-type]
    one = asked(cells, tmp_path, sam, part)
    both = TwoPictures(part, raw=0.25, augmented=2.0)
    logits = both.forward(one)
    torch.testing.assert_close(logits, plain(one), atol=2e-3, rtol=1e-3)  # the priors were kept in half precision

    raw, augmented = part.both(one.images, both.priors(one))
    targets = one.batch.targets
    want = 0.25 * segmentation_loss(raw, targets) + 2 * segmentation_loss(augmented, targets)
    torch.testing.assert_close(both(logits, targets), want)
    assert not torch.equal(raw, augmented)
    torch.testing.assert_close(
        TwoPictures(SamAug.on(sam, goal, choose="augmented"), raw=0.0).augmented * torch.ones(()), torch.tensor(1.0)
    )

    def refuse(*args: object) -> None:
        raise AssertionError("priors were computed twice")

    monkeypatch.setattr(part, "priors", refuse)
    torch.testing.assert_close(both.forward(one), logits)
    assert both.share_with_masks == 1.0


def test_each_view_has_priors_of_its_own(cells: Path, tmp_path: Path, sam: Backbone) -> None:
    part = SamAug.on(sam, run(cells, tmp_path).goal, channels=(4, 8), **GRID)  # type: ignore[arg-type]
    both = TwoPictures(part)
    seen = set()
    for step in range(3):  # three items in batches of two: each item twice
        one = asked(cells, tmp_path, sam, part, step)
        seen |= set(one.batch.views)
        features = sam(one.images)
        torch.testing.assert_close(both.priors(one), part.priors(features, one.images), atol=1e-3, rtol=1e-3)
    assert seen == {0, 1}


def test_only_the_unet_learns(cells: Path, tmp_path: Path, sam: Backbone) -> None:
    part = SamAug.on(sam, run(cells, tmp_path).goal, channels=(4, 8), **GRID)  # type: ignore[arg-type]
    one = asked(cells, tmp_path, sam, part)
    both = TwoPictures(part)
    both(both.forward(one), one.batch.targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in sam.parameters())


def test_the_same_seed_gives_the_same_adapter(cells: Path, tmp_path: Path) -> None:
    for name in "ab":
        train(cells, tmp_path / name)
    a, b = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_an_oblong_picture_is_predicted_in_its_own_size(cells: Path, tmp_path: Path) -> None:
    train(cells, tmp_path / "a")
    host, _ = open_model(str(tmp_path / "a"))
    image = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    assert host.predict(image, NAME).shape == (40, 70)


def test_bad_input(cells: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"channels": "4-x"}, ("channels", "4-x")),
        ({"raw": -1.0}, ("0 or more",)),
        ({"augmented": 0.0}, ("more than 0",)),
        ({"raw": 0.0}, ("never learns", "choose=augmented")),
        ({"points": 0}, ("points",)),
        ({"channels": "2-2-2-2-2-2-2"}, ("multiple of 64", "fewer channels")),
    ):
        with pytest.raises(BadCall) as refused:
            train(cells, tmp_path / "a", **options)
        says(refused.value, *words)
    with pytest.raises(BadCall) as refused:
        train(cells, tmp_path / "a", {"augment": "fresh"})
    says(refused.value, "come back", "bank")
    with pytest.raises(BadCall) as refused:
        train(cells, tmp_path / "a", {"backbone": "random:timm:vit_tiny_patch16_224"})
    says(refused.value, "no promptable decoder")
    with pytest.raises(BadCall) as refused:
        train(cells, tmp_path / "a", {"task": "classify"})
    says(refused.value, "segments")
    with pytest.raises(UnknownName):
        train(cells, tmp_path / "a", form="papers")
    assert not (tmp_path / "a").exists()
