"""Heads of known samples: the methods against hand-computed answers and their laws, and the part in host and file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from medgraft.adapters import Adapter, ClassifierHead, Host, Neighbours, Task
from medgraft.adapters.neighbours import (
    LEAST,
    METHODS,
    Attention,
    Method,
    Nearest,
    UnderBagging,
    class_probabilities,
    one_hot,
    unit,
)
from medgraft.adapters.schema import canonical
from medgraft.adapters.store import make_probe, read_adapter, replay_probe, save_adapter
from medgraft.adapters.transduction import Propagation
from medgraft.adapters.verify import passed, verify
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, UnknownName
from medgraft.training.data import Batches, Dataset, Item
from medgraft.training.fit import FitOptions, fit
from tests.helpers import LABELS, ONE, close, images, says

K = 3


def samples(m: int = 30, n: int = 17, d: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, int64 labels, one-hot labels, queries."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(m) % K
    f = torch.randn(m, d, generator=g) + 0.7 * one_hot(labels, d)
    return f, labels, one_hot(labels, K), torch.randn(n, d, generator=g)


def on_a_circle(*degrees: float) -> Tensor:
    """Unit vectors (N, 2)."""
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turn.cos(), turn.sin()], 1)


EVERY: list[Method] = [
    Nearest(1),
    Nearest(5),
    UnderBagging(3, bags=4),
    Attention(0.0),
    Attention(0.1),
    Attention(0.1, layers=3, balanced=True),
]


class TestEveryMethod:
    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_answers_are_probabilities(self, method: Method) -> None:
        f, _, y, z = samples()
        p = method(f, y, z)
        assert p.shape == (17, K)
        assert p.dtype == torch.float32
        assert (p >= 0).all()
        assert (p.sum(1) - 1).abs().max() < 1e-5

    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_a_query_is_answered_alone(self, method: Method) -> None:
        f, _, y, z = samples()
        together = method(f, y, z)
        for i in (0, 16):
            close(f"query {i}", method(f, y, z[i : i + 1]), together[i : i + 1])

    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_lengths_do_not_matter(self, method: Method) -> None:
        f, _, y, z = samples()
        lengths = torch.linspace(0.1, 9, 30)[:, None]
        close("scaled", method(lengths * f, y, 40 * z), method(f, y, z))

    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_a_class_without_a_sample_has_probability_0(self, method: Method) -> None:
        f, labels, _, z = samples()
        p = method(f, one_hot(labels, K + 1), z)
        assert (p[:, K] == 0).all()
        close("the others", p[:, :K], method(f, one_hot(labels, K), z))

    @pytest.mark.parametrize("method", [m for m in EVERY if not isinstance(m, UnderBagging)], ids=str)
    def test_the_order_of_the_known_samples_does_not_matter(self, method: Method) -> None:
        f, _, y, z = samples()
        shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        close("shuffled", method(f[shuffled], y[shuffled], z), method(f, y, z))

    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_bad_input_is_refused(self, method: Method) -> None:
        f, _, y, z = samples()
        holed, infinite = f.clone(), z.clone()
        holed[4, 2], infinite[1] = math.nan, math.inf
        for known, labels, queries, words in (
            (f[:0], y[:0], z, ("0 known samples",)),
            (holed, y, z, ("known samples", "row 4", "1 in all")),
            (f, y, infinite, ("queries", "row 1")),
            (f, y[:-1], z, ("30 known samples", "29 labels")),
            (f, y, z[:, :-1], ("(30, 8)", "(17, 7)")),
            (f, y[:, 0], z, ("labels (M, K)",)),
            (f, 2 * y, z, ("adding up to 1",)),
            (f, 1.5 * y - 0.5 * y.roll(1, 1), z, ("not negative",)),
        ):
            with pytest.raises(BadCall) as refused:
                method(known, labels, queries)
            says(refused.value, *words)

    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_no_query_no_answer(self, method: Method) -> None:
        f, _, y, z = samples()
        assert method(f, y, z[:0]).shape == (0, K)


class TestNearest:
    def test_against_numpy(self) -> None:
        f, labels, y, z = samples()
        a, b = f.double().numpy(), z.double().numpy()
        similar = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
        for k in (1, 4, 30):
            near = np.argsort(-similar, axis=1, kind="stable")[:, :k]
            votes = np.stack([(labels.numpy()[near] == c).mean(1) for c in range(K)], 1)
            np.testing.assert_allclose(Nearest(k)(f, y, z).numpy(), votes, atol=1e-6)

    def test_of_equals_the_lowest_index_is_nearer(self) -> None:
        same = on_a_circle(10, 10, 10, 90)
        for labels in ([2, 1, 0, 0], [0, 1, 2, 0]):
            y = one_hot(torch.tensor(labels), K)
            assert Nearest(1)(same, y, on_a_circle(30)).argmax(1).tolist() == labels[:1]
            assert Attention(0.0)(same, y, on_a_circle(30)).argmax(1).tolist() == labels[:1]
        many = on_a_circle(*[10] * 5000)
        first_half = one_hot((torch.arange(5000) >= 2500).long(), 2)
        assert Nearest(2500)(many, first_half, on_a_circle(30)).tolist() == [[1, 0]]

    def test_more_neighbours_than_samples_are_refused(self) -> None:
        f, _, y, z = samples(6)
        assert Nearest(6)(f, y, z).allclose(torch.tensor(1 / 3))
        with pytest.raises(BadCall) as refused:
            Nearest(7)(f, y, z)
        says(refused.value, "k = 7", "6 known samples", "smaller k")


class TestUnderBagging:
    def test_every_bag_is_balanced_and_distinct(self) -> None:
        labels = torch.tensor([0] * 20 + [1] * 4 + [2] * 9)
        bags = UnderBagging(1, bags=12).drawn(one_hot(labels, 4))
        assert len(bags) == 12
        for bag in bags:
            assert labels[bag].bincount().tolist() == [4, 4, 4]
            assert len(bag.unique()) == 12
        assert len({tuple(bag.tolist()) for bag in bags}) == 12

    def test_it_is_the_mean_over_its_bags(self) -> None:
        f, _, y, z = samples()
        method = UnderBagging(3, bags=5, seed=7)
        one_by_one = [Nearest(3)(f[bag], y[bag], z) for bag in method.drawn(y)]
        close("mean", method(f, y, z), torch.stack(one_by_one).mean(0))

    def test_the_seed_decides(self) -> None:
        f, _, _, z = samples()
        y = one_hot((torch.arange(30) > 4).long(), 2)
        first = UnderBagging(3, bags=2, seed=1)(f, y, z)
        torch.manual_seed(99)
        assert torch.equal(UnderBagging(3, bags=2, seed=1)(f, y, z), first)
        assert not torch.equal(UnderBagging(3, bags=2, seed=2)(f, y, z), first)

    def test_a_rare_class_is_not_outvoted(self) -> None:
        """90 samples of class 0 everywhere, 10 of class 1 at 0 degrees: at 5 degrees class 1 is as dense as can be."""
        f = torch.cat([on_a_circle(*np.linspace(-90, 90, 90)), on_a_circle(*np.linspace(-10, 10, 10))])
        y = one_hot((torch.arange(100) >= 90).long(), 2)
        z = on_a_circle(5)
        assert Nearest(15)(f, y, z).argmax(1).item() == 0
        assert UnderBagging(9)(f, y, z).argmax(1).item() == 1
        assert Attention(0.005)(f, y, z).argmax(1).item() == 0
        assert Attention(0.005, balanced=True)(f, y, z).argmax(1).item() == 1

    def test_more_neighbours_than_a_bag_holds_are_refused(self) -> None:
        f, _, _, z = samples(30)
        y = one_hot((torch.arange(30) > 1).long(), 2)
        UnderBagging(4)(f, y, z)
        with pytest.raises(BadCall) as refused:
            UnderBagging(5)(f, y, z)
        says(refused.value, "k = 5", "bag", "holds 4", "rarest class has 2")


class TestAttention:
    @pytest.mark.parametrize("layers", [1, 2, 5])
    @pytest.mark.parametrize("balanced", [False, True])
    def test_towards_temperature_0_it_is_the_nearest_neighbour_exactly(self, layers: int, balanced: bool) -> None:
        f, _, y, z = samples(60, 200)
        want = Nearest(1)(f, y, z)
        for temperature in (0.0, 1e-45, 1e-12, 1e-9):
            p = Attention(temperature, layers, balanced)(f.double(), y.double(), z.double())
            assert torch.equal(p, want.double()), temperature

    def test_one_layer_is_the_softmax_of_the_paper(self) -> None:
        f, _, y, z = samples()
        weights = np.exp((unit(z) @ unit(f).T).double().numpy() / 0.3)
        want = (weights / weights.sum(1, keepdims=True)) @ y.double().numpy()
        np.testing.assert_allclose(Attention(0.3)(f, y, z).numpy(), want, atol=1e-6)

    def test_two_layers_by_hand(self) -> None:
        """Setup 2 of the paper, written out token by token: labels take part, the query does not attend to itself."""
        f, _, y, z = samples(7, 3)
        f, y, z = unit(f.double()), y.double(), unit(z.double())

        def layer(t: Tensor, tokens: list[Tensor]) -> Tensor:
            weights = torch.stack([(t @ token / 0.2).exp() for token in tokens])
            moved = sum(w * token for w, token in zip(weights / weights.sum(), tokens, strict=True))
            return torch.cat([moved[:8] / moved[:8].norm(), moved[8:]])

        tokens = [torch.cat([a, b]) for a, b in zip(f, y, strict=True)]
        asked = [layer(torch.cat([q, torch.zeros(K).double()]), tokens) for q in z]
        moved = [layer(t, tokens) for t in tokens]
        want = torch.stack([layer(q, moved)[8:] for q in asked])
        close("two layers", Attention(0.2, layers=2)(f, y, z), want)

    def test_layers_are_iterations_of_clustering_that_converge(self) -> None:
        """Two clusters, one label wrong in each, asked about there: the layers clean the labels, then stop."""
        f, z = on_a_circle(0, 4, 8, 12, 16, 90, 94, 98, 102, 106), on_a_circle(8, 98)
        y = one_hot(torch.tensor([0, 0, 1, 0, 0, 1, 1, 0, 1, 1]), 2).double()
        one, five, more, many = (Attention(0.1, n)(f, y, z) for n in (1, 5, 20, 40))
        assert 0.7 < float(one[0, 0]) < 0.9
        assert five[0, 0] > 0.999
        assert five[1, 1] > 0.999
        assert (many - more).abs().max() < 1e-3
        assert Nearest(1)(f, y, z).argmax(1).tolist() == [1, 0]
        close("T so large that there is one cluster", Attention(0.3, 40)(f, y, z), torch.full((2, 2), 0.5).double())

    def test_balanced_divides_by_the_size_of_the_class(self) -> None:
        """Two copies of every sample of class 0 weigh what one did."""
        f, labels, y, z = samples(12)
        twice = torch.cat([torch.arange(12), (labels == 0).nonzero()[:, 0]])
        balanced = Attention(0.2, balanced=True)
        close("doubled", balanced(f[twice], y[twice], z), balanced(f, y, z))
        assert not torch.allclose(Attention(0.2)(f[twice], y[twice], z), Attention(0.2)(f, y, z), atol=1e-3)

    def test_a_small_temperature_is_not_none(self) -> None:
        """Two samples whose similarities differ by 1e-5: at T = 1e-5 they weigh e to 1, at 0 the nearer one is all."""
        f = torch.tensor([[1.0, 0], [0, 1]]).double()
        z = torch.tensor([[0.5 + 1e-5, 0.5]]).double()
        z = z / z.norm()
        gap = float(z[0, 0] - z[0, 1])
        assert Attention(gap)(f, f, z)[0, 0].item() == pytest.approx(math.e / (math.e + 1), abs=1e-6)
        assert Attention(0.0)(f, f, z).tolist() == [[1, 0]]

    @pytest.mark.parametrize("temperature", [1e-40, 1e-3, 1.0, 1e6])
    def test_no_temperature_gives_nan(self, temperature: float) -> None:
        f, _, y, z = samples()
        z[0] = 0
        p = Attention(temperature, layers=4)(f, y, z)
        assert torch.isfinite(p).all()
        assert (p.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Nearest(0), ("k", "from 1", "0")),
        (lambda: Nearest(2.5), ("whole number", "2.5")),
        (lambda: Nearest(True), ("whole number",)),
        (lambda: UnderBagging(3, bags=0), ("bags",)),
        (lambda: UnderBagging(3, seed=-1), ("seed",)),
        (lambda: Attention(-0.1), ("temperature", "-0.1")),
        (lambda: Attention(math.nan), ("temperature", "nan")),
        (lambda: Attention(math.inf), ("temperature", "inf")),
        (lambda: Attention(0.1, layers=0), ("layers",)),
        (lambda: Attention(0.1, layers=10**9), ("layers",)),
    ],
)
def test_settings_out_of_range_are_refused(make: object, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        make()  # type: ignore[operator]
    says(refused.value, *words)


# The part


def filled(on: Backbone, m: int = 12, **options: object) -> tuple[Neighbours, Tensor, Tensor]:
    """A head that knows `m` images, the images, and their labels."""
    x, labels = images(on, m), torch.arange(m) % K
    with torch.no_grad():
        pooled = on(x).pooled
    return Neighbours.of(pooled, labels, LABELS, **options), x, labels  # type: ignore[arg-type]


def a_classifier(on: Backbone, form: str = "linear", classes: int = 4) -> ClassifierHead:
    torch.manual_seed(3)
    head = ClassifierHead({}, on.spec.width, classes, form)
    torch.nn.init.normal_(head.weight)
    return head


class TestThePart:
    @pytest.mark.parametrize("method", EVERY, ids=str)
    def test_saved_loaded_verified_the_same(self, method: Method, vit: Backbone, tmp_path: Path) -> None:
        head, x, _ = filled(vit, method=method)
        made = Adapter.of(vit, LABELS, {"head": head})
        save_adapter(made, tmp_path / "a", dtype="float32", backbone=vit)
        back = read_adapter(tmp_path / "a")
        host = Host(vit)
        host.add(made, "made")
        host.add(back, "back")
        with torch.no_grad():
            assert torch.equal(host(x, "made"), host(x, "back"))
        assert isinstance(back.readouts[0], Neighbours)
        assert back.readouts[0].method == method
        assert passed(verify(tmp_path / "a", backbone=vit))

    def test_the_file_holds_vectors_and_labels_alone(self, vit: Backbone, tmp_path: Path) -> None:
        head, _, labels = filled(vit)
        save_adapter(Adapter.of(vit, LABELS, {"head": head}), tmp_path / "a")
        tensors = load_file(tmp_path / "a" / "adapter.safetensors")
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
            "head.keys": ((12, vit.spec.width), torch.float16),
            "head.labels": ((12,), torch.int64),
        }
        assert torch.equal(tensors["head.labels"], labels)
        assert head.holds_images

    def test_a_known_image_is_its_own_nearest_neighbour(self, either: Backbone) -> None:
        head, x, labels = filled(either, method=Nearest(1))
        host = Host(either)
        host.add(Adapter.of(either, LABELS, {"head": head}), "it")
        with torch.no_grad():
            logits = host(x, "it")
        assert torch.equal(logits.argmax(1), labels)
        close("log of 1 and of the least", logits, one_hot(labels, K).clamp_min(LEAST).log())

    def test_logits_give_back_the_probabilities(self, vit: Backbone) -> None:
        head, x, _ = filled(vit, method=Attention(0.001))
        with torch.no_grad():
            features = vit(x)
            p = head.answer(features.pooled)
            assert (LABELS.probabilities(head.read(features, x)) - p).abs().max() < 1e-5
            assert torch.equal(p, head.method(head.keys, one_hot(head.labels, K), unit(features.pooled)))

    @pytest.mark.parametrize("form", ["linear", "cosine"])
    def test_class_probabilities_are_compared_too(self, form: str, vit: Backbone) -> None:
        classifier = a_classifier(vit, form)
        with torch.no_grad():
            pooled = vit(images(vit, 12)).pooled
            p = classifier.read(vit(images(vit, 12)), pooled).softmax(1)
        close("class_probabilities", class_probabilities(classifier, pooled).detach(), p)
        both, _, _ = filled(vit, features="both", classifier=classifier)
        alone, _, _ = filled(vit, features="probabilities", classifier=classifier)
        close("probabilities", alone.keys, unit(p))
        close("both", both.keys, torch.cat([unit(pooled), unit(p)], 1) / math.sqrt(2))

    def test_the_classifier_travels_along_frozen(self, vit: Backbone, tmp_path: Path) -> None:
        classifier = a_classifier(vit)
        head, x, _ = filled(vit, features="both", classifier=classifier)
        with torch.no_grad():
            classifier.weight.zero_()  # it was copied
        made = Adapter.of(vit, LABELS, {"head": head})
        save_adapter(made, tmp_path / "a", dtype="float32", backbone=vit)
        back = read_adapter(tmp_path / "a")
        assert sorted(back.tensors()) == ["head.classifier.bias", "head.classifier.weight", "head.keys", "head.labels"]
        assert back.tensors()["head.classifier.weight"].abs().sum() > 1
        assert back.trainable == made.trainable == 0
        with torch.no_grad():
            assert torch.equal(back.readouts[0](vit(x), x), head(vit(x), x))

    def test_there_is_nothing_to_train_and_fit_says_so(self, vit: Backbone, tmp_path: Path) -> None:
        head, _, _ = filled(vit)
        host = Host(vit)
        host.add(Adapter.of(vit, LABELS, {"head": head}), "it")
        batches = Batches(
            Dataset("none", tmp_path, ()),
            [Item("a", "train", label=0)],
            size=64,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            batch_size=1,
            task="classify",
        )
        with pytest.raises(BadCall) as refused:
            fit(host, "it", batches, FitOptions(1))
        says(refused.value, "nothing to train")

    def test_the_probe_replays_under_autocast_as_without(self, vit: Backbone) -> None:
        """The vote among near-equal similarities is not left to bfloat16."""
        head, x, _ = filled(vit, method=Nearest(3))
        with torch.no_grad():
            features = vit(x)
            with torch.autocast("cpu", torch.bfloat16):
                inside = head.read(features, x)
        assert torch.equal(inside, head.read(features, x))
        made = Adapter.of(vit, LABELS, {"head": head})
        assert replay_probe(made, vit, make_probe(made, vit)) == pytest.approx(0, abs=1e-6)

    def test_an_image_that_is_nan_is_refused_not_answered(self, vit: Backbone) -> None:
        head, x, _ = filled(vit)
        host = Host(vit)
        host.add(Adapter.of(vit, LABELS, {"head": head}), "it")
        x[3, 0, 5, 5] = math.nan
        with pytest.raises(BadCall) as refused:
            host(x, "it")
        says(refused.value, "not finite", "row 3")

    def test_another_width_is_refused(self, vit: Backbone) -> None:
        wrong = Neighbours.of(torch.randn(6, 20), torch.arange(6) % K, LABELS)
        with pytest.raises(BadCall) as refused:
            Host(vit).add(Adapter.of(vit, LABELS, {"head": wrong}), "it")
        says(refused.value, "20 channels", str(vit.spec.width))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"pooled": torch.zeros(0, 8), "labels": torch.zeros(0).long()}, ("0 known samples",)),
            ({"pooled": torch.full((6, 8), math.nan)}, ("not finite",)),
            ({"pooled": torch.randn(6, 8, 2)}, ("(M, C)",)),
            ({"labels": torch.tensor([0, 1, 2, 0, 1])}, ("(6, 8)", "(5,)")),
            ({"labels": torch.randn(6)}, ("integer",)),
            ({"labels": torch.tensor([0, 1, 2, 0, 1, 3])}, ("0 to 3", "classes 0 to 2")),
            ({"labels": torch.tensor([0, 1, 2, 0, 1, -1])}, ("-1",)),
            ({"labels": torch.tensor([0, 0, 2, 0, 2, 2])}, ("no known sample of malignant",)),
            ({"task": ONE}, ("segment polyp",)),
            ({"task": Task("classify", ("one",))}, ("one of several classes",)),
            ({"features": "both"}, ("classifier=",)),
            ({"method": Propagation()}, ("Attention", "not Propagation")),
            ({"features": "tokens", "classifier": ClassifierHead({}, 8, 2)}, ("tokens", "pooled")),
        ],
        ids=str,
    )
    def test_known_samples_that_cannot_be_used(self, changes: dict[str, object], words: tuple[str, ...]) -> None:
        fine = {"pooled": torch.randn(6, 8), "labels": torch.arange(6) % K, "task": LABELS}
        given = {**fine, **changes}
        with pytest.raises((BadCall, UnknownName)) as refused:
            Neighbours.of(given.pop("pooled"), given.pop("labels"), given.pop("task"), **given)  # type: ignore[arg-type]
        says(refused.value, *words)

    @pytest.mark.parametrize(
        "config",
        [
            {"method": "oracle"},
            {"options": {"heat": 3}},
            {"options": {"temperature": "hot"}},
            {"options": {"layers": 10**9}},
            {"options": [1]},
            {"samples": 0},
            {"outputs": 1},
            {"classes": 3},
            {"features": "both"},
            {"features": "everything"},
        ],
        ids=str,
    )
    def test_a_strange_description_is_refused(self, config: dict[str, object], vit: Backbone, tmp_path: Path) -> None:
        head, _, _ = filled(vit)
        saved = save_adapter(Adapter.of(vit, LABELS, {"head": head}), tmp_path / "a")
        record = json.loads((saved / "adapter.json").read_text())
        record["parts"][0]["config"] |= config
        (saved / "adapter.json").write_text(json.dumps(record | {"sha256": canonical(record)}))
        with pytest.raises(BadAdapter):
            read_adapter(saved)

    def test_labels_of_no_class_are_refused(self, vit: Backbone, tmp_path: Path) -> None:
        head, _, _ = filled(vit)
        head.labels[5] = K
        saved = save_adapter(Adapter.of(vit, LABELS, {"head": head}), tmp_path / "a")
        with pytest.raises(BadAdapter) as refused:
            read_adapter(saved)
        says(refused.value, "labels run from 0 to 3", "0 to 2")

    def test_every_method_is_registered_by_name(self) -> None:
        assert {type(m) for m in EVERY} == set(METHODS.values())
