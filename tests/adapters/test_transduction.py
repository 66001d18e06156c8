"""Whole sets of queries: each method against its equation, what the set does to an answer, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft.adapters.neighbours import Attention, Nearest, SequenceModel, one_hot, unit
from medgraft.adapters.transduction import Propagation, Rectification, Smoothing, graph
from medgraft.errors import BadCall
from tests.helpers import close, says

EVERY: list[SequenceModel] = [Propagation(), Propagation(balanced=True), Smoothing(), Rectification()]


def moons(n: int, *, noise: float = 0.04, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two half circles that embrace each other, (2 n, 3) on the sphere, and which is which: no line parts them."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linspace(0, math.pi, n)
    upper = torch.stack([turn.cos() - 0.5, turn.sin() - 0.25], 1)
    lower = torch.stack([0.5 - turn.cos(), 0.25 - turn.sin()], 1)
    flat = torch.cat([upper, lower]) + noise * torch.randn(2 * n, 2, generator=g)
    return unit(torch.cat([flat, torch.ones(2 * n, 1)], 1)), torch.arange(2 * n) // n


def blobs(m: int = 12, n: int = 20, *, shift: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Known samples, labels, queries, their labels: three classes in 6 dimensions; the queries moved by `shift`."""
    g = torch.Generator().manual_seed(seed)
    labels, truth = torch.arange(m) % 3, torch.arange(n) % 3
    f = one_hot(labels, 6) + 0.3 * torch.randn(m, 6, generator=g)
    z = one_hot(truth, 6) + 0.3 * torch.randn(n, 6, generator=g)
    return f, labels, z + shift * torch.tensor([1.0, 0, 0, 1, 1, 1]), truth


@pytest.mark.parametrize("model", EVERY, ids=lambda m: type(m).__name__)
class TestEvery:
    def test_answers_are_probabilities(self, model: SequenceModel) -> None:
        f, labels, z, truth = blobs()
        p = model(f, one_hot(labels, 4), z)
        assert p.shape == (20, 4)
        assert p.dtype == torch.float32
        assert (p >= 0).all()
        assert (p.sum(1) - 1).abs().max() < 1e-5
        assert (p[:, 3] == 0).all(), "no sample of the class is known"
        assert (p.argmax(1) == truth).float().mean() > 0.8

    def test_orders_do_not_matter(self, model: SequenceModel) -> None:
        f, labels, z, _ = blobs()
        p = model(f, one_hot(labels, 3), z)
        a, b = torch.randperm(12), torch.randperm(20)
        close("shuffled", model(f[a], one_hot(labels[a], 3), z[b]), p[b])

    def test_the_answer_depends_on_the_other_queries(self, model: SequenceModel) -> None:
        f, labels, z, _ = blobs()
        y = one_hot(labels, 3)
        assert not torch.allclose(model(f, y, z)[:10], model(f, y, z[:10]), atol=1e-4)

    def test_bad_input_is_refused(self, model: SequenceModel) -> None:
        f, labels, z, _ = blobs()
        y, holed = one_hot(labels, 3), z.clone()
        holed[7] = math.nan
        for known, given, queries, words in (
            (f[:0], y[:0], z, ("0 known samples",)),
            (f, y, holed, ("queries", "row 7")),
            (f, y, z[:, :4], ("(20, 4)",)),
        ):
            with pytest.raises(BadCall) as refused:
                model(known, given, queries)
            says(refused.value, *words)


class TestTheGraph:
    def test_by_hand(self) -> None:
        """Points at 0, 10, 30 and 70 degrees with one neighbour each: 0-10, 10-30, 30-70."""
        turn = torch.tensor([0.0, 10, 30, 70]).double().deg2rad()
        w = graph(torch.stack([turn.cos(), turn.sin()], 1), 1, 0.2)
        want = torch.zeros(4, 4).double()
        for i, j, degrees in ((0, 1, 10), (1, 2, 20), (2, 3, 40)):
            want[i, j] = want[j, i] = math.exp((math.cos(math.radians(degrees)) - 1) / 0.2)
        close("graph", w, want)

    def test_more_neighbours_than_others_are_all_of_them(self) -> None:
        x = unit(torch.randn(5, 3))
        assert torch.equal(graph(x, 4, 0.3), graph(x, 99, 0.3))
        assert ((graph(x, 99, 0.3) > 0) == ~torch.eye(5, dtype=torch.bool)).all()
        assert graph(x[:1], 3, 0.3).tolist() == [[0.0]]


class TestPropagation:
    def test_against_numpy(self) -> None:
        f, labels, z, _ = blobs()
        w = graph(torch.cat([unit(f), unit(z)]), 4, 0.2).numpy()
        root = np.diag(w.sum(1) ** -0.5)
        start = np.concatenate([one_hot(labels, 3).numpy(), np.zeros((20, 3))])
        spread, term = np.zeros_like(start), start
        for _ in range(2000):  # the series that the closed form sums
            spread, term = spread + term, 0.8 * (root @ w @ root) @ term
        want = spread[12:] / spread[12:].sum(1, keepdims=True)
        got = Propagation(neighbours=4, alpha=0.8, temperature=0.2)(f, one_hot(labels, 3), z)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)

    def test_one_label_a_moon_is_enough(self) -> None:
        x, truth = moons(60)
        known = torch.tensor([0, 60])  # the two tips
        rest = torch.tensor([i for i in range(120) if i not in known.tolist()])
        y = one_hot(truth[known], 2)
        right = Propagation(neighbours=5, alpha=0.99, temperature=0.01)(x[known], y, x[rest]).argmax(1) == truth[rest]
        nearest = Nearest(1)(x[known], y, x[rest]).argmax(1) == truth[rest]
        assert right.all()
        assert nearest.float().mean() < 0.9

    def test_balanced_gives_every_class_the_same_mass(self) -> None:
        """A query between one sample of class 0 and nine of class 1, all equally near."""
        turn = torch.tensor([-20.0] + [20.0] * 9).double().deg2rad()
        f = torch.stack([turn.cos(), turn.sin()], 1)
        y, z = one_hot((turn > 0).long(), 2).double(), torch.tensor([[1.0, 0.0]]).double()
        plain, balanced = (Propagation(20, 0.5, 1.0, balanced=b)(f, y, z)[0, 1] for b in (False, True))
        assert plain > 0.85
        assert 0.4 < balanced < 0.6

    def test_what_no_label_reaches_is_equally_probable(self) -> None:
        f, z = torch.tensor([[1.0, 0, 0], [0.99, 0.1, 0]]), torch.tensor([[0, 0, 1.0], [0, 0.1, 0.99]])
        p = Propagation(neighbours=1, temperature=0.01)(f, torch.eye(2), z)
        assert torch.equal(p, torch.full((2, 2), 0.5))
        assert torch.equal(Propagation(alpha=0.0)(f, torch.eye(2), z), torch.full((2, 2), 0.5))


class TestSmoothing:
    def test_strength_0_changes_nothing(self) -> None:
        f, labels, z, _ = blobs()
        y = one_hot(labels, 3)
        close("as it was", Smoothing(Attention(0.3), strength=0.0)(f, y, z), Attention(0.3)(f, y, z))

    def test_it_is_the_minimum_of_its_energy(self) -> None:
        f, labels, z, _ = blobs()
        y, lam = one_hot(labels, 3).double(), 2.0
        p = Attention(0.3)(f.double(), y, z.double())
        w = graph(unit(z.double()), 4, 0.2)

        def energy(x: Tensor) -> Tensor:
            apart = (x[:, None] - x[None]).square().sum(-1)
            return (w.sum(1) * (x - p).square().sum(1)).sum() + lam / 2 * (w * apart).sum()

        best = Smoothing(Attention(0.3), lam, 4, 0.2)(f.double(), y, z.double()).requires_grad_()
        (slope,) = torch.autograd.grad(energy(best), best)
        assert slope.abs().max() < 1e-9
        assert energy(best) < energy(p)

    def test_very_strong_it_is_one_answer_for_connected_queries(self) -> None:
        f, labels, z, _ = blobs()
        p = Smoothing(strength=1e7, neighbours=19)(f, one_hot(labels, 3), z)
        assert (p - p[:1]).abs().max() < 1e-4

    def test_a_single_query_keeps_its_answer(self) -> None:
        f, labels, z, _ = blobs()
        y = one_hot(labels, 3)
        close("alone", Smoothing(strength=5.0)(f, y, z[:1]), Attention()(f, y, z[:1]))


class TestRectification:
    def test_without_queries_taken_in_it_is_the_nearest_weighted_prototype(self) -> None:
        f, labels, z, _ = blobs()
        f64, moved = unit(f.double()).numpy(), unit(z.double()).numpy()
        moved = moved + f64.mean(0) - moved.mean(0)
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        scores = []
        for c in range(3):
            own = f64[labels.numpy() == c]
            first = own.sum(0) / np.linalg.norm(own.sum(0))
            weights = np.exp(own @ first / 0.2)
            place = weights / weights.sum() @ own
            scores.append(moved @ place / np.linalg.norm(place) / 0.2)
        want = np.exp(np.stack(scores, 1))
        got = Rectification(confident=0, temperature=0.2)(f, one_hot(labels, 3), z)
        np.testing.assert_allclose(got.numpy(), want / want.sum(1, keepdims=True), atol=1e-5)

    def test_a_shift_of_all_queries_is_taken_back(self) -> None:
        f, labels, z, truth = blobs(30, 90, shift=0.8)
        y = one_hot(labels, 3)
        rectified, nearest = ((m(f, y, z).argmax(1) == truth).float().mean() for m in (Rectification(), Nearest(1)))
        assert rectified > 0.9
        assert nearest < 0.8

    def test_confident_queries_move_the_prototypes(self) -> None:
        """One known sample a class, off the middle of its blob: the queries say where the middle is."""
        _, _, z, truth = blobs(3, 120)
        off = one_hot(torch.arange(3), 6) + 0.6 * one_hot(torch.tensor([3, 4, 5]), 6)
        y = torch.eye(3)
        without, taken_in = ((Rectification(n)(off, y, z).gather(1, truth[:, None]).log().mean()) for n in (0, 30))
        assert taken_in > without

    def test_a_single_query_is_refused(self) -> None:
        f, labels, z, _ = blobs()
        with pytest.raises(BadCall) as refused:
            Rectification()(f, one_hot(labels, 3), z[:1])
        says(refused.value, "1 is no set", "more at once")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Propagation(neighbours=0), ("neighbours >= 1", "0")),
        (lambda: Propagation(temperature=0.0), ("temperature > 0",)),
        (lambda: Propagation(alpha=1.0), ("alpha", "1.0")),
        (lambda: Propagation(alpha=math.nan), ("alpha",)),
        (lambda: Smoothing(strength=-1.0), ("strength", "-1.0")),
        (lambda: Smoothing(neighbours=-2), ("neighbours",)),
        (lambda: Rectification(confident=-1), ("confident",)),
        (lambda: Rectification(temperature=math.inf), ("temperature",)),
    ],
)
def test_settings_out_of_range_are_refused(make: object, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        make()  # type: ignore[operator]
    says(refused.value, *words)
