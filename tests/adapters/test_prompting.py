"""A person's prompts: from pixels of a picture to pixels of the input, and every way to get them wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgraft.adapters import Adapter, Host, LinearHead, MaskHead
from medgraft.adapters.prompting import ask, rows_of
from medgraft.backbones import Backbone
from medgraft.backbones.prompts import Prompts
from medgraft.errors import BadCall, UnknownName
from medgraft.pixels import Frame
from tests.helpers import ONE, THREE, close, images, says

HEIGHT, WIDTH = 48, 80


def picture(h: int = HEIGHT, w: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.fixture
def promptable(sam: Backbone) -> Adapter:
    return Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)})


@pytest.fixture
def host(sam: Backbone, promptable: Adapter) -> Host:
    made = Host(sam)
    made.add(promptable, "it")
    made.add(Adapter.of(sam, THREE, {"head": LinearHead.on(sam, THREE)}), "by itself")
    return made


def asked(adapter: Adapter, prompts: dict, image: np.ndarray | None = None) -> Prompts:
    frame = Frame.of(picture() if image is None else image, 128, "pad")
    return ask(adapter, prompts, frame, torch.zeros(1, 3, 128, 128), mask_side=32)


def test_clicks_land_where_the_picture_went(promptable: Adapter) -> None:
    """80 pixels of width become 128: a scale of 1.6, and pixel centres go to pixel centres."""
    found = asked(promptable, {"points": [(0, 0), (79, 47), (39.5, 10)], "labels": [1, 0, 1]})
    want = (torch.tensor([[0.0, 0.0], [79, 47], [39.5, 10]]) + 0.5) * torch.tensor([1.6, 77 / 48]) - 0.5
    assert found.points is not None
    torch.testing.assert_close(found.points[0, 0], want)
    assert found.labels is not None
    assert found.labels.tolist() == [[[1, 0, 1]]]


def test_boxes_are_questions_and_share_the_clicks(promptable: Adapter) -> None:
    found = asked(promptable, {"boxes": [(0, 0, 10, 10), (20, 5, 60, 40)], "points": [(5, 5)]})
    assert found.questions == 2
    assert found.points is not None
    assert found.points.shape == (1, 2, 1, 2)
    assert asked(promptable, {"box": (1, 2, 3, 4)}).questions == 1


def test_a_mask_of_the_pictures_size_becomes_one_of_the_decoders(promptable: Adapter) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :40] = True
    found = asked(promptable, {"mask": mask}).masks
    assert found is not None
    assert found.shape == (1, 1, 32, 32)
    assert (found[0, 0, 2:16, 2:14] > 5).all()  # the left half of the picture
    assert (found[0, 0, 2:16, 18:] < -5).all()  # its right half
    assert (found[0, 0, 22:] < -5).all()  # the padding below


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"points": [(81, 3)]}, ("81,3", "outside", "80 x 48")),
        ({"points": [(-1, 3)]}, ("outside",)),
        ({"points": [(3, float("nan"))]}, ("finite",)),
        ({"points": [(1, 2, 3)]}, ("(x, y)",)),
        ({"points": [(1, 2)], "labels": [2]}, ("1 (on the object)", "2")),
        ({"points": [(1, 2)], "labels": [0, 1]}, ("1 points and 2 labels",)),
        ({"labels": [1]}, ("without points",)),
        ({"box": (10, 10, 10, 20)}, ("empty or inverted", "x0 < x1")),
        ({"box": (30, 10, 10, 20)}, ("empty or inverted",)),
        ({"box": (0, 0, 90, 20)}, ("corner", "outside")),
        ({"box": (0, 0, 9)}, ("x0, y0, x1, y1",)),
        ({"box": (0, 0, 9, 9), "boxes": [(0, 0, 9, 9)]}, ("not both",)),
        ({"mask": np.zeros((9, 9), bool)}, ("48 x 80", "9 x 9")),
        ({"mask": np.full((HEIGHT, WIDTH), np.inf)}, ("NaN",)),
        ({"group": "histology"}, ("sub-groups",)),
    ],
)
def test_wrong_prompts_are_refused(promptable: Adapter, prompts: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as error:
        asked(promptable, prompts)
    says(error.value, *words)


def test_unknown_words_are_named(promptable: Adapter) -> None:
    with pytest.raises(UnknownName) as error:
        asked(promptable, {"point": [(1, 2)]})
    says(error.value, "points")


def test_an_adapter_that_wants_no_prompts_says_so(host: Host) -> None:
    with pytest.raises(BadCall) as error:
        host.predict(picture(), "by itself", prompts={"box": (0, 0, 9, 9)})
    says(error.value, "takes no prompts", "cytoplasm")
    x = images(host.backbone, 1)
    with pytest.raises(BadCall):
        host(x, "by itself", prompts=Prompts(boxes=torch.tensor([[[0.0, 0, 9, 9]]])))
    with pytest.raises(BadCall):
        host(x, adapters=["it", "by itself"], prompts=Prompts(boxes=torch.tensor([[[0.0, 0, 9, 9]]])))


def test_a_promptable_adapter_wants_to_be_asked(host: Host) -> None:
    with pytest.raises(BadCall) as error:
        host.predict(picture(), "it")
    says(error.value, "box", "--point")
    assert host.on(picture()).predict("it", by_default=True).shape == (HEIGHT, WIDTH)


def test_an_answer_has_the_pictures_size_and_repeats(host: Host) -> None:
    on = host.on(picture())
    ask_box = {"box": (5, 5, 60, 40)}
    first = on.predict("it", prompts=ask_box)
    assert first.shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(first, host.predict(picture(), "it", prompts=ask_box))
    shares = on.predict("it", prompts=ask_box, probabilities=True)
    assert shares.shape == (1, HEIGHT, WIDTH)
    np.testing.assert_array_equal(first > 0, shares[0] > 0.5)


def test_the_encoder_runs_once_for_any_number_of_questions(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    stage = type(host.backbone).stage
    monkeypatch.setattr(type(host.backbone), "stage", lambda self, state: (ran.append(1), stage(self, state))[1])
    on = host.on(picture())
    for x in range(4):
        on.predict("it", prompts={"points": [(10 + x, 10)], "labels": [1]})
    on.predict("by itself")
    assert len(ran) == host.backbone.depth


def test_prompts_follow_their_rows(host: Host) -> None:
    """A batch of two images with a box each equals each alone, also beside an adapter that is not asked."""
    x = images(host.backbone, 2)
    boxes = torch.tensor([[[3.0, 3, 60, 50]], [[40.0, 20, 120, 90]]])
    both = host(x, "it", prompts=Prompts(boxes=boxes))
    for i in range(2):
        close(f"row {i}", both[i : i + 1], host(x[i : i + 1], "it", prompts=Prompts(boxes=boxes[i : i + 1])), 1e-5)
    assert (both - host(x, "it", prompts=Prompts(boxes=boxes.flip(0)))).abs().max() > 1e-3


def test_questions_that_only_fill_up_do_not_count(host: Host) -> None:
    x = images(host.backbone, 1)
    boxes = torch.tensor([[[3.0, 3, 60, 50], [40.0, 20, 120, 90]]])
    one = host(x, "it", prompts=Prompts(boxes=boxes[:, :1]))
    real = torch.tensor([[True, False]])
    close("one of two", host(x, "it", prompts=Prompts(boxes=boxes, real=real)), one, 1e-5)
    two = host(x, "it", prompts=Prompts(boxes=boxes))
    assert (two - one).abs().max() > 1e-3
    assert (two >= one - 1e-4).all()  # a maximum over more questions


def test_a_batch_of_single_prompts() -> None:
    box = Prompts(boxes=torch.zeros(1, 1, 4))
    assert rows_of([box, box]).rows == 2
    with pytest.raises(BadCall) as error:
        rows_of([box, Prompts(masks=torch.zeros(1, 1, 4, 4))])
    says(error.value, "alike")


def test_images_of_several_sizes_are_no_batch(host: Host) -> None:
    with pytest.raises(BadCall):
        host([torch.zeros(3, 128, 128), torch.zeros(3, 64, 64)], "it")  # type: ignore[call-overload]


@pytest.mark.slow
def test_a_picture_of_a_hundred_million_pixels(host: Host) -> None:
    """Averaged down to 4,096 a side on the way in; the answer has the picture's size again, in bytes, not in floats."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = np.zeros((10_000, 10_000, 3), np.uint8)
    huge[2_000:7_000, 3_000:8_000] = 200
    answer = host.predict(huge, "it", prompts={"box": (3_000, 2_000, 8_000, 7_000)})
    assert answer.shape == (10_000, 10_000)
    assert answer.dtype == np.uint8
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 1_500, f"{grown:.0f} MiB"
