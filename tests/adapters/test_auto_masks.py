"""Automatic masks on a grid, with a decoder whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft.adapters.auto_masks import Grid, auto_masks, find_masks, grid_points
from medgraft.backbones import Backbone
from medgraft.backbones.prompts import Prompts
from medgraft.errors import BadCall
from tests.helpers import says

SIDE, R = 32, 5.25
DISCS = {"firm": (8.0, 8.0, R, 9.0), "soft": (23.0, 8.0, R, 0.2), "late": (16.0, 25.0, R, 9.0)}
"""Centre x, y and radius in pixels, and how steep the logits are at the edge."""


class Discs:
    """Answers each point with the disc that it hits, three times: doubtful, good, and stabler but worse, without one column."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, embedding: Tensor, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        assert multimask
        assert prompts.points is not None
        self.asked.append(prompts.points.shape[1])
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        masks = torch.full((1, prompts.points.shape[1], 3, SIDE, SIDE), -20.0)
        quality = torch.zeros(1, prompts.points.shape[1], 3)
        for k, (px, py) in enumerate(prompts.points[0, :, 0].tolist()):
            for cx, cy, r, steep in DISCS.values():
                if (px - cx) ** 2 + (py - cy) ** 2 < r * r:
                    z = steep * (r - ((x - cx) ** 2 + (y - cy) ** 2).sqrt())
                    masks[0, k] = torch.stack([z, z, torch.where(x == int(cx), -20.0, 2 * z)])
                    quality[0, k] = torch.tensor([0.5, 0.95, 0.9])
        return masks, quality


def found(grid: Grid, inside: tuple[int, int] = (SIDE, SIDE), decoder: Discs | None = None):
    return find_masks(decoder or Discs(), torch.zeros(1, 4, 8, 8), inside, SIDE, grid)


def test_each_disc_once_the_soft_one_left_out() -> None:
    got = found(Grid(points=8))
    assert len(got.masks) == 2  # many points hit a disc, each with two good answers: one is left
    centres = {tuple(np.round(box.view(2, 2).mean(0).numpy()).astype(int)) for box in got.boxes}
    assert centres == {(8, 8), (16, 25)}
    assert (got.quality == 0.95).all()
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for mask, (px, py), box in zip(got.masks, got.points, got.boxes, strict=True):
        cx, cy = box.view(2, 2).mean(0)
        assert torch.equal(mask, (x - cx) ** 2 + (y - cy) ** 2 < R * R)
        assert (px - cx) ** 2 + (py - cy) ** 2 < R * R
    assert (got.stability >= 0.95).all()
    assert (got.stability <= 1).all()


@pytest.mark.parametrize(
    ("grid", "count"),
    [(Grid(8, quality=0.96), 0), (Grid(8, stability=0.0), 3), (Grid(8, stability=0.0, offset=30.0), 3)],
    ids=["estimates too low", "soft ones too", "no stability asked for"],
)
def test_what_each_threshold_does(grid: Grid, count: int) -> None:
    assert len(found(grid).masks) == count


def test_every_good_answer_where_none_is_suppressed() -> None:
    y, x = np.mgrid[:8, :8] * 4 + 1.5
    hits = sum(int(((x - cx) ** 2 + (y - cy) ** 2 < r * r).sum()) for cx, cy, r, steep in DISCS.values() if steep > 1)
    assert len(found(Grid(8, quality=0.4, overlap=1.0)).masks) == 3 * hits > 20
    assert len(found(Grid(8, overlap=1.0)).masks) == 2 * hits


def test_stability_by_hand() -> None:
    """z = steep (r - d): the mask at the offset is the disc of radius r - 1 / steep."""
    got = found(Grid(8, stability=0.0))
    soft = got.stability[got.boxes[:, 0] > 15].min()
    d = torch.cdist(torch.tensor([[23.0, 8.0]]), torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0)))
    assert soft == (0.2 * (R - d) > 1).sum() / (0.2 * (R - d) > -1).sum()


def test_how_many_are_asked_at_once_changes_nothing_but_memory() -> None:
    few, decoder = Discs(), Discs()
    a, b = found(Grid(7, at_once=3), decoder=few), found(Grid(7, at_once=100), decoder=decoder)
    assert max(few.asked) == 3
    assert decoder.asked == [49]
    assert torch.equal(a.masks, b.masks)
    assert torch.equal(a.points, b.points)


def test_nothing_is_asked_or_found_in_the_padding() -> None:
    got = found(Grid(8), inside=(20, SIDE))
    y, x = torch.meshgrid(torch.arange(20), torch.arange(SIDE), indexing="ij")
    assert torch.equal(got.masks[0], (x - 8) ** 2 + (y - 8) ** 2 < R * R)
    assert got.masks.shape[1:] == (20, SIDE)
    assert len(got.masks) == 1
    assert (got.points[:, 1] < 20).all()


def test_points_lie_in_the_middle_of_their_cells() -> None:
    points = grid_points((10, 20), 2)
    assert points.tolist() == [[4.5, 2.0], [14.5, 2.0], [4.5, 7.0], [14.5, 7.0]]


def test_on_a_backbone(sam: Backbone) -> None:
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    grid = Grid(3, quality=0.0, stability=0.0)
    got = auto_masks(sam, image, grid)
    side = sam.spec.image_size
    assert len(got.masks)
    assert got.masks.shape[1:] == (round(60 * side / 90), side)
    assert got.masks.flatten(1).any(1).all()
    assert (got.quality.diff() <= 0).all()
    again = auto_masks(sam, image, grid)
    assert torch.equal(got.masks, again.masks)
    assert not got.masks.requires_grad


def test_bad_input(vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        auto_masks(vit, np.zeros((32, 32, 3), np.uint8))
    says(refused.value, "no promptable decoder", "starter-sam")
    for wrong in (
        {"points": 0},
        {"at_once": 0},
        {"offset": 0.0},
        {"quality": 1.5},
        {"stability": -0.1},
        {"overlap": 2},
    ):
        with pytest.raises(BadCall) as refused:
            Grid(**wrong)  # type: ignore[arg-type]
        says(refused.value, next(iter(wrong)))
