import numpy as np
import pytest
import torch

from medgraft.adapters import Adapter, LinearHead, MaskHead
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, UnknownName
from medgraft.training.items import Item
from medgraft.training.prompting import (
    box_prompts,
    boxes_of,
    drawn,
    innermost,
    objects_of,
    point_prompts,
    points_of,
    prompts_of,
)
from tests.helpers import ONE, adapter, says


def two_squares() -> np.ndarray:
    """A 4 x 4 square of class 1 in the left top, a 2 x 3 one of class 2, another of class 1 touching it by no corner."""
    mask = np.zeros((16, 20), np.uint8)
    mask[1:5, 2:6] = 1
    mask[8:10, 3:6] = 2
    mask[12:15, 12:19] = 1
    return mask


def test_objects_are_components_of_one_class() -> None:
    objects = objects_of(two_squares())
    assert [int(o.sum()) for o in objects] == [16, 21, 6]
    assert (objects.sum(0) == (two_squares() > 0)).all()
    assert objects_of(two_squares(), "image").sum() == 43
    assert objects_of(np.zeros((4, 4), np.uint8)).shape == (0, 4, 4)


def test_corners_connect() -> None:
    assert len(objects_of(np.eye(5, dtype=np.uint8))) == 1


def test_a_box_holds_its_object_exactly() -> None:
    assert boxes_of(two_squares()).tolist() == [[2, 1, 6, 5], [12, 12, 19, 15], [3, 8, 6, 10]]
    assert boxes_of(two_squares(), each="image").tolist() == [[2, 1, 19, 15]]


@pytest.mark.parametrize("outward", [False, True])
def test_jitter_stays_in_its_bounds_and_in_the_map(outward: bool) -> None:
    plain = boxes_of(two_squares())
    found = np.stack([boxes_of(two_squares(), jitter=3, rng=drawn(0, t), outward=outward) for t in range(200)])
    moved = found - plain
    assert np.abs(moved).max() <= 3
    assert np.abs(moved).max() > 2.5
    assert found[..., :2].min() >= 0
    assert (found[..., 2:] <= [20, 16]).all()
    assert (found[..., 2:] - found[..., :2] >= 1 - 1e-9).all()
    if outward:
        assert (moved[..., :2] <= 0).all()
        assert (moved[..., 2:] >= 0).all()


def test_the_same_step_draws_the_same_prompts() -> None:
    a, b, other = (boxes_of(two_squares(), jitter=3, rng=drawn(1, t)) for t in (7, 7, 8))
    assert (a == b).all()
    assert not (a == other).all()


def test_points_lie_on_their_objects() -> None:
    mask = two_squares()
    for points in (points_of(mask), points_of(mask, count=5, rng=drawn(0, 0))):
        for own, found in zip(points, objects_of(mask), strict=True):
            assert all(found[int(y), int(x)] for x, y in own)
    drawn_points = points_of(mask, count=6, rng=drawn(0, 0))[2]
    assert len({tuple(p) for p in drawn_points.tolist()}) == 6, "an object of six pixels has six different points"


def test_the_innermost_pixel_is_far_from_every_edge() -> None:
    region = np.zeros((11, 11), bool)
    region[2:9, 2:9] = True
    assert innermost(region) == (5, 5)
    assert innermost(np.ones((5, 9), bool))[1] == 2, "the border of the image is an edge too"


def test_a_batch_is_filled_up_and_says_where() -> None:
    targets = torch.from_numpy(np.stack([two_squares(), np.where(two_squares() == 2, 1, 0), 0 * two_squares()])).long()
    boxes, points = box_prompts(targets), point_prompts(targets, count=2, rng=drawn(0, 0))
    for prompts in (boxes, points):
        assert prompts.real is not None
        assert prompts.real.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert boxes.boxes is not None
    assert boxes.boxes[2, 0].tolist() == [0, 0, 20, 16], "an empty map is asked by all of it"
    assert points.labels is not None
    assert points.labels[:2].eq(1).all()
    assert points.labels[2].eq(0).all()


def test_what_a_person_would_ask(sam: Backbone, vit: Backbone) -> None:
    item = Item("a", "test", domain="north")
    prompted = Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)})
    asked = prompts_of(prompted, two_squares(), item)
    assert asked is not None
    assert np.array_equal(asked["boxes"], boxes_of(two_squares()))
    clicked = prompts_of(prompted, two_squares(), item, "point")
    assert clicked is not None
    assert len(clicked["points"]) == 3
    assert prompts_of(prompted, np.zeros((8, 9)), item) == {"boxes": [(0, 0, 9, 8)]}
    assert prompts_of(adapter(vit, {"head": LinearHead.on(vit, ONE)}), two_squares(), item) is None


def test_bad_calls(sam: Backbone) -> None:
    for call, words in (
        (lambda: boxes_of(two_squares(), jitter=2), ("jitter", "rng")),
        (lambda: points_of(two_squares(), count=2), ("count", "rng")),
        (lambda: objects_of(two_squares(), "pixel"), ("object", "image", "pixel")),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadCall) as refused:
            call()
        says(refused.value, *words)
    made = Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)})
    with pytest.raises(UnknownName) as unknown:
        prompts_of(made, two_squares(), Item("a", "test"), "boxx")  # type: ignore[arg-type]
    says(unknown.value, "boxx", "did you mean")
