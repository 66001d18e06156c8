"""Settings chosen on the known samples alone: nobody answers for itself."""

import math

import pytest
import torch
from torch import Tensor

from medgraft.adapters.neighbours import Attention, Nearest, UnderBagging, one_hot
from medgraft.errors import BadCall
from medgraft.training.leave_one_out import LEAST, choose, class_mean_loss, leave_one_out
from tests.helpers import close, says


def two_clouds(n: int = 40, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return torch.randn(n, 5, generator=g) + 1.5 * one_hot(labels, 5), labels


def test_the_nearest_other_answers() -> None:
    turn = torch.tensor([0.0, 10, 25, 90]).double().deg2rad()
    f = torch.stack([turn.cos(), turn.sin()], 1)
    p = leave_one_out(Nearest(1), f, torch.tensor([0, 1, 2, 3]), 4)
    assert p.argmax(1).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("model", [Nearest(3), UnderBagging(3), Attention(0.1), Attention(0.1, layers=3)], ids=str)
def test_a_samples_own_label_never_reaches_its_answer(model: Nearest) -> None:
    f, labels = two_clouds()
    before = leave_one_out(model, f, labels, 3)
    for i in (0, 21):
        changed = labels.clone()
        changed[i] = 2
        others = torch.arange(40) != i
        after = leave_one_out(model, f, changed, 3)
        close("its own answer", after[i], before[i])
        assert not torch.equal(after[others], before[others])


def test_the_loss_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    want = ((-math.log(0.5) - math.log(0.25)) / 2 + (-math.log(0.1) - math.log(LEAST)) / 2) / 2
    assert class_mean_loss(p, torch.tensor([0, 0, 1, 1])) == pytest.approx(want, abs=1e-5)
    three_to_one = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.8, 0.2]])
    want = (-math.log(0.5) - math.log(0.2)) / 2
    assert class_mean_loss(three_to_one, torch.tensor([0, 0, 0, 1])) == pytest.approx(want, abs=1e-5)


class TestChoosing:
    def test_the_best_of_a_grid_is_taken(self) -> None:
        f, labels = two_clouds()
        tried = [Attention(t) for t in (1e-4, 0.1, 100.0)]
        losses = [class_mean_loss(leave_one_out(m, f, labels, 2), labels) for m in tried]
        assert choose(tried, f, labels, 2) == (tried[1], min(losses))
        assert losses[1] < min(losses[0], losses[2])
        assert losses[2] == pytest.approx(math.log(39 / 19), abs=0.01), "T so large that only the others' shares count"

    def test_of_equals_the_first(self) -> None:
        f, labels = two_clouds()
        tried = [Attention(0.0, layers=2), Attention(0.0), Nearest(1)]
        assert choose(tried, f, labels, 2)[0] is tried[0]

    def test_what_the_samples_do_not_allow_is_passed_over(self) -> None:
        f, labels = two_clouds(6)
        assert choose([Nearest(6), Nearest(3)], f, labels, 2)[0] == Nearest(3)
        with pytest.raises(BadCall) as refused:
            choose([Nearest(6), Nearest(50)], f, labels, 2)
        says(refused.value, "none of 2", "6 known samples", "k = 50")

    def test_bad_input_is_refused(self) -> None:
        f, labels = two_clouds(4)
        with pytest.raises(BadCall) as refused:
            leave_one_out(Nearest(1), f[:1], labels[:1], 2)
        says(refused.value, "1 known samples", "two or more")
        with pytest.raises(BadCall):
            leave_one_out(Nearest(1), f * math.nan, labels, 2)
        with pytest.raises(BadCall) as refused:
            choose([], f, labels, 2)
        says(refused.value, "no candidate")
