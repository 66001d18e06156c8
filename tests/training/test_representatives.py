"""Choosing and ordering known samples, the prompt, and asking a model that is served elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from medgraft.adapters.neighbours import Attention, Nearest, SequenceModel, one_hot
from medgraft.errors import BadCall
from medgraft.training.representatives import as_text, ask, representativeness, representatives
from tests.helpers import close, says


def on_a_circle(*degrees: float) -> Tensor:
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turn.cos(), turn.sin()], 1)


class Fake:
    """A language model served elsewhere, as far as we see it: it keeps what it was asked and copies the last sample's label."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        self.known, self.labels, self.queries = known, labels, queries
        return labels[-1:].expand(len(queries), -1) if self.answer is None else self.answer  # type: ignore[return-value]


FOUR = on_a_circle(0, 10, 30, 90)
# Sums of cosines by hand, of the angles between the samples:
#   0: 1 + cos 10 + cos 30 + cos 90 = 2.851      10: 1 + cos 10 + cos 20 + cos 80 = 3.098
#  30: 1 + cos 30 + cos 20 + cos 60 = 3.306      90: 1 + cos 90 + cos 80 + cos 60 = 1.674


class TestRepresentatives:
    def test_the_sums_of_four_samples(self) -> None:
        rep = representativeness(5 * FOUR)
        close("rep", rep, torch.tensor([2.8508, 3.0982, 3.3057, 1.6736]).double(), 1e-4)

    @pytest.mark.parametrize(("share", "want"), [(1.0, [3, 0, 1, 2]), (0.75, [0, 1, 2]), (0.5, [1, 2]), (0.25, [2])])
    def test_the_most_representative_of_four_comes_last(self, share: float, want: list[int]) -> None:
        assert representatives(FOUR, torch.tensor([0, 1, 0, 1]), share=share).tolist() == want

    def test_a_quarter_is_kept_rounded_up(self) -> None:
        for m, kept in ((4, 1), (5, 2), (8, 2), (28, 7), (200, 50)):
            assert len(representatives(torch.randn(m, 3), torch.arange(m) % 2)) == kept
        assert len(representatives(torch.randn(30, 3), torch.arange(30) % 2, share=0.1)) == 3

    def test_by_class_each_is_ranked_by_itself_and_they_are_interleaved(self) -> None:
        f = torch.cat([on_a_circle(0, 10, 30, 90), on_a_circle(180, 200, 210)])
        labels = torch.tensor([0, 0, 0, 0, 2, 2, 2])  # class 0 ranks 2 1 0 3, class 2 ranks 5 6 4
        assert representatives(f, labels, share=1.0, by_class=True).tolist() == [3, 0, 4, 1, 6, 2, 5]
        assert representatives(f, labels, share=0.5, by_class=True).tolist() == [1, 6, 2, 5]

    def test_imbalanced_classes_are_ranked_by_class_unless_told(self) -> None:
        f = torch.cat([on_a_circle(*range(9)), on_a_circle(180)])
        labels = torch.tensor([0] * 9 + [1])
        assert representatives(f, labels)[-1] == 9
        assert 9 not in representatives(f, labels, by_class=False)
        even = torch.tensor([0] * 6 + [1] * 4)
        assert torch.equal(representatives(f, even), representatives(f, even, by_class=False))

    def test_of_equals_the_lowest_index_comes_later(self) -> None:
        assert representatives(on_a_circle(5, 5, 5, 5), torch.arange(4) % 2, share=1.0).tolist() == [3, 2, 1, 0]

    def test_lengths_do_not_matter(self) -> None:
        lengths = torch.tensor([[9.0], [0.1], [1], [30]]).double()
        labels = torch.arange(4) % 2
        assert torch.equal(representatives(lengths * FOUR, labels, share=1), representatives(FOUR, labels, share=1))

    @pytest.mark.parametrize(
        ("features", "labels", "share", "words"),
        [
            (FOUR, torch.arange(4) % 2, 0.0, ("share", "0.0")),
            (FOUR, torch.arange(4) % 2, 1.5, ("share", "1.5")),
            (FOUR, torch.arange(4) % 2, math.nan, ("share",)),
            (FOUR[:0], torch.zeros(0).long(), 0.5, ("0 known samples",)),
            (FOUR, torch.arange(3), 0.5, ("4 known samples", "3 labels")),
            (FOUR, torch.randn(4), 0.5, ("integers",)),
            (FOUR, torch.tensor([0, 1, -1, 0]), 0.5, ("-1",)),
            (FOUR * math.inf, torch.arange(4) % 2, 0.5, ("not finite",)),
        ],
    )
    def test_bad_input_is_refused(self, features: Tensor, labels: Tensor, share: float, words: tuple[str, ...]) -> None:
        with pytest.raises(BadCall) as refused:
            representatives(features, labels, share=share)
        says(refused.value, *words)


class TestAsking:
    def test_a_model_reads_the_representatives_in_order(self) -> None:
        fake, labels = Fake(), torch.tensor([0, 1, 0, 1])
        p = ask(fake, FOUR, labels, on_a_circle(1, 2, 3), classes=2, share=0.75)
        assert torch.equal(fake.known, FOUR[[0, 1, 2]])
        assert fake.labels.tolist() == [[1, 0], [0, 1], [1, 0]]
        assert p.tolist() == [[1, 0]] * 3, "the label of the most representative, which came last"

    def test_the_methods_of_the_house_are_such_models(self) -> None:
        labels, z = torch.tensor([0, 1, 0, 1]), on_a_circle(1, 60)
        models: list[SequenceModel] = [Attention(0.2), Nearest(1), Fake()]
        for model in models[:2]:
            close("all", ask(model, FOUR, labels, z, classes=2, share=1), model(FOUR, one_hot(labels, 2), z).float())

    def test_rows_are_made_to_add_up_to_1(self) -> None:
        fake = Fake(torch.tensor([[2.0, 6.0], [0.0, 0.1]]))
        assert ask(fake, FOUR, torch.arange(4) % 2, FOUR[:2], classes=2).tolist() == [[0.25, 0.75], [0, 1]]

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (torch.ones(2, 3), ("(2, 2)", "(2, 3)")),
            (torch.ones(1, 2), ("(1, 2)",)),
            ("class 1", ("str",)),
            (torch.tensor([[1.0, 0], [math.nan, 1]]), ("non-finite",)),
            (torch.tensor([[1.0, 0], [-0.1, 1.1]]), ("negative",)),
            (torch.tensor([[1.0, 0], [0, 0]]), ("row of zeros",)),
        ],
    )
    def test_an_answer_that_is_none_is_refused(self, answer: object, words: tuple[str, ...]) -> None:
        with pytest.raises(BadCall) as refused:
            ask(Fake(answer), FOUR, torch.arange(4) % 2, FOUR[:2], classes=2)
        says(refused.value, *words)

    def test_what_cannot_be_asked_is_refused_before_the_model_is_called(self) -> None:
        fake = Fake()
        for labels, queries in ((torch.tensor([0, 1, 2, 1]), FOUR), (torch.arange(4) % 2, FOUR * math.nan)):
            with pytest.raises(BadCall):
                ask(fake, FOUR, labels, queries, classes=2)
        assert not hasattr(fake, "known")

    def test_the_text_has_the_papers_form(self) -> None:
        p = torch.tensor([[0.914, 0.086], [0.25, 0.75]])
        assert as_text(p, torch.tensor([0, 1]), torch.tensor([0.5, 0.5])) == (
            "[0.91, 0.09] is in class 0\n[0.25, 0.75] is in class 1\n[0.50, 0.50] is in class"
        )
        assert as_text(p[:1], torch.tensor([3]), p[1], digits=3).splitlines()[0] == "[0.914, 0.086] is in class 3"
