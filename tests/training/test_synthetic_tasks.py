"""Synthetic tasks: functions of their seed, in range, and worth learning from."""

import pytest
import torch

from medgraft.errors import BadCall
from medgraft.training.synthetic_tasks import SHARES, episode
from tests.helpers import says


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize(("size", "shots"), [(32, 1), (48, 5)])
def test_a_task_is_pictures_and_masks(kind: str, size: int, shots: int) -> None:
    for seed in range(6):
        task = episode(seed, size=size, shots=shots, kind=kind)
        assert task.query.shape == task.truth.shape == (1, 1, size, size)
        assert task.images.shape == task.labels.shape == (shots, 1, size, size)
        for t in task:
            assert torch.isfinite(t).all()
            assert t.min() >= 0
            assert t.max() <= 1
        for mask in (task.truth, task.labels):
            assert torch.equal(mask, mask.round())


@pytest.mark.parametrize("kind", SHARES)
def test_a_seed_is_a_task(kind: str) -> None:
    first, again, other = (episode(seed, size=32, shots=3, kind=kind) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.query, other.query)


def test_most_queries_show_the_structure_and_most_supports_too() -> None:
    tasks = [episode(seed, size=32, shots=4) for seed in range(40)]
    shown = [0.002 < float(t.truth.mean()) < 0.998 for t in tasks]
    supported = [bool(t.labels.any()) and not bool(t.labels.all()) for t in tasks]
    assert sum(shown) >= 36
    assert sum(supported) >= 36


def test_pictures_of_a_task_differ_and_belong_together() -> None:
    """In a mosaic the same label map is bent: supports overlap with the query far more than those of another task."""
    own, other = [], []
    for seed in range(30):
        task, stranger = (episode(s, size=32, shots=1, kind="mosaic") for s in (seed, seed + 1000))
        assert not torch.equal(task.query, task.images)
        own.append(float((task.truth == task.labels).float().mean()))
        other.append(float((task.truth == stranger.labels).float().mean()))
    assert sum(own) / 30 > sum(other) / 30 + 0.05


@pytest.mark.parametrize("wrong", [{"size": 8}, {"shots": 0}, {"kind": "photo"}])
def test_what_is_no_task(wrong: dict) -> None:
    with pytest.raises(BadCall) as refused:
        episode(0, **wrong)
    says(refused.value, "episode", str(next(iter(wrong.values()))))
