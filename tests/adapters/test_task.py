"""What an adapter is for: classes, label map, preprocessing."""

import json

import numpy as np
import pytest
import torch

from medgraft.adapters import Preprocessing, Task
from medgraft.adapters.task import segment, task_from_json
from medgraft.errors import BadCall
from tests.helpers import LABELS, ONE, THREE, says


def test_outputs() -> None:
    assert (ONE.outputs, THREE.outputs, LABELS.outputs) == (1, 4, 3)
    assert Task("classify", ("ill",)).outputs == 1
    assert segment(["a", "b"]).values == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("detect", ("a",)), ("'segment' or 'classify'", "'detect'")),
        (("segment", ()), ("distinct class names", "[]")),
        (("segment", ("a", "a")), ("distinct class names", "['a', 'a']")),
        (("segment", ("a", "b"), (1,)), ("one a class", "[1]")),
        (("segment", ("a", "b"), (1, 1)), ("distinct", "[1, 1]")),
        (("segment", ("a",), (0,)), ("1 to 255", "[0]")),
        (("segment", ("a",), (256,)), ("1 to 255", "[256]")),
    ],
)
def test_a_task_that_makes_no_sense(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        Task(*arguments)
    says(refused.value, *words)


def test_deciding_and_writing() -> None:
    task = Task("segment", ("a", "b"), (7, 255))
    logits = torch.tensor([[0.0, 1, 2], [3, 1, 2], [0, 5, 2]]).T[None, :, None]
    indices = task.decide(logits)
    assert indices.tolist() == [[[2, 0, 1]]]
    assert task.write(indices[0].numpy()).tolist() == [[255, 0, 7]]
    assert task.write(indices[0].numpy()).dtype == np.uint8
    assert ONE.decide(torch.tensor([[[[-1.0, 0.0, 0.1]]]])).tolist() == [[[0, 0, 1]]]
    assert LABELS.decide(torch.tensor([[0.0, 3, 1]])).tolist() == [1]


def test_probabilities() -> None:
    assert torch.allclose(THREE.probabilities(torch.randn(2, 4, 3, 3).half()).sum(1), torch.ones(2, 3, 3))
    assert ONE.probabilities(torch.zeros(1, 1, 2, 2)).unique().tolist() == [0.5]


def test_json() -> None:
    task = Task("segment", ("a", "b"), (7, 255))
    assert task_from_json(json.loads(json.dumps(task.to_json()))) == task


def test_preprocessing_by_hand() -> None:
    p = Preprocessing(4, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    want = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(
        p.std
    ).view(3, 1, 1)
    assert torch.allclose(p(image), want, atol=1e-6)
    assert p(np.full((9, 30, 3), 255, np.uint8)).shape == (3, 4, 4)
    assert torch.allclose(p(np.full((9, 30, 3), 51, np.uint8))[0], torch.tensor(0.2))


IMAGES = {
    "grey": np.zeros((4, 4), np.uint8),
    "four-channels": np.zeros((4, 4, 4), np.uint8),
    "float": np.zeros((4, 4, 3), np.float32),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_an_image_that_is_none(image: np.ndarray) -> None:
    with pytest.raises(BadCall) as refused:
        Preprocessing(4, (0.5,) * 3, (0.5,) * 3)(image)
    says(refused.value, "(H, W, 3)", "uint8", str(image.shape), str(image.dtype))
