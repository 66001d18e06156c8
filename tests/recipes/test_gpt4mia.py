"""The recipe end to end on drawn images: both uses, a classifier of one's own, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from medgraft.adapters import Host, Neighbours
from medgraft.adapters.neighbours import Attention, Nearest, UnderBagging, class_probabilities
from medgraft.adapters.store import read_adapter, read_record
from medgraft.adapters.verify import passed, verify
from medgraft.backbones import load_backbone
from medgraft.errors import BadCall, BadData
from medgraft.recipes import RECIPES, Run
from medgraft.recipes.gpt4mia import (
    LAYERS,
    NEIGHBOURS,
    TEMPERATURES,
    Judge,
    candidates,
    f_score,
    features_of,
    linear_probe,
    scored,
)
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import NAME, open_model
from tests.helpers import close, features_under, off_by, says, wake

TINY = "random:timm:vit_tiny_patch16_224"
CLASSES = ("bright", "dark", "middle")
COUNTS = {"train": 2, "val": 4, "test": 5}


def draw(root: Path, counts: dict[str, int] = COUNTS, *, spread: int = 60) -> Path:
    """Folders of grey images; class means 50 apart, single images off by up to `spread`, so that a classifier errs."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, level in zip(CLASSES, (190, 90, 140), strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                grey = level + int(rng.integers(-spread, spread + 1)) + rng.integers(-9, 10, (32, 32, 3))
                Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{split}{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("greys"))


def run(data: Path, out: Path, **more: object) -> Run:
    shared = {**RECIPES["gpt4mia"].defaults, "backbone": TINY, "image_size": 64, "quiet": True, **more}
    return Run(data, out, **shared)  # type: ignore[arg-type]


def made(data: Path, out: Path, **options: object) -> dict[str, object]:
    return RECIPES["gpt4mia"].program(run(data, out), **options)


@pytest.mark.parametrize("method", ["attention", "nearest", "under_bagging"])
def test_predictions_are_corrected_by_known_samples(method: str, data: Path, tmp_path: Path) -> None:
    result = made(data, tmp_path / "a", method=method)
    assert result["classes"] == list(CLASSES)
    assert result["shots"] == 6
    assert result["known"] == 12
    assert result["trainable"] == 0
    assert "random weights" in str(result["backbone"])
    host, adapter = open_model(str(tmp_path / "a"))
    score = evaluate(host, NAME, load_dataset(data, labels="label"))
    assert score["n"] == 15
    # The recipe's figures are those of the saved bits. Votes tie, and a logarithm unties them: no AUC there.
    for name in (
        ("accuracy", "balanced_accuracy") if method != "attention" else ("accuracy", "balanced_accuracy", "auc")
    ):
        assert result[f"test {name}"] == pytest.approx(score[name], abs=1e-4)
    (kept,) = read_record(tmp_path / "a")["evaluation"]
    assert {k: kept[k] for k in ("dataset", "split", "n")} == {k: score[k] for k in ("dataset", "split", "n")}
    assert kept["accuracy"] == score["accuracy"]
    assert kept["interval"] == score["interval"]
    assert passed(verify(tmp_path / "a", backbone=host.backbone))
    assert adapter.provenance["recipe"] == "gpt4mia"
    assert str(tmp_path) not in (tmp_path / "a" / "adapter.json").read_text()


def test_errors_are_detected(data: Path, tmp_path: Path) -> None:
    result = made(data, tmp_path / "a", use="errors")
    assert result["classes"] == ["right", "wrong"]
    judge = Judge.trained(run(data, tmp_path))
    dataset = load_dataset(data, labels="label")
    host, adapter = open_model(str(tmp_path / "a"))
    head = adapter.readouts[-1]
    assert isinstance(head, Neighbours)
    known = judge.seen(dataset, dataset.split("val"))
    wrong = known.probabilities.argmax(1) != known.labels
    assert sorted(head.labels.tolist()) == sorted(wrong.int().tolist())
    item = dataset.split("test")[0]
    answer = host.predict(dataset.image(item), NAME)
    assert list(answer) == ["right", "wrong"]
    assert sum(answer.values()) == pytest.approx(1)
    asked = judge.seen(dataset, dataset.split("test"))
    said = [host.predict(dataset.image(i), NAME)["wrong"] > 0.5 for i in dataset.split("test")]
    truth = asked.targets("errors").numpy()
    assert result["test f_score"] == pytest.approx(f_score(truth, np.array(said), 1), abs=1e-4)
    assert result["classifier's own accuracy"] == pytest.approx(1 - truth.mean(), abs=1e-4)


@pytest.mark.parametrize(("features", "width"), [("pooled", 192), ("probabilities", 3), ("both", 195)])
def test_what_is_compared(features: str, width: int, data: Path, tmp_path: Path) -> None:
    made(data, tmp_path / "a", features=features, temperature=0.1, layers=1)
    head = read_adapter(tmp_path / "a").readouts[-1]
    assert isinstance(head, Neighbours)
    assert head.keys.shape == (12, width)
    assert head.method == Attention(0.1, 1, balanced=True)
    assert (head.classifier is None) == (features == "pooled")


def test_the_most_representative_of_each_class_are_kept(data: Path, tmp_path: Path) -> None:
    assert made(data, tmp_path / "a", share=0.25)["known"] == 3
    head = read_adapter(tmp_path / "a").readouts[-1]
    assert isinstance(head, Neighbours)
    assert head.labels.tolist() == [0, 1, 2]
    made(data, tmp_path / "b", share=0.25, method="nearest")  # settings are chosen among these: two others leave k = 1
    assert read_adapter(tmp_path / "b").readouts[-1].method == Nearest(1)


def test_two_runs_write_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name in "ab":
        made(data, tmp_path / name)
    assert len({(tmp_path / n / "adapter.safetensors").read_bytes() for n in "ab"}) == 1


def test_a_trained_classifier_is_judged_under_its_own_parts(data: Path, tmp_path: Path) -> None:
    trained = {**RECIPES["lora"].defaults, "backbone": TINY, "image_size": 64, "quiet": True, "task": "classify"}
    RECIPES["lora"].program(Run(data, tmp_path / "lora", **{**trained, "steps": 3, "batch": 2}), rank=2)
    result = made(data, tmp_path / "a", classifier=str(tmp_path / "lora"))
    host, adapter = open_model(str(tmp_path / "a"))
    assert [p["name"] for p in read_record(tmp_path / "a")["parts"]] == ["lora", "head"]
    own = evaluate(open_model(str(tmp_path / "lora"))[0], NAME, load_dataset(data, labels="label"))
    assert result["classifier's own accuracy"] == pytest.approx(own["accuracy"], abs=1e-4)
    assert result["test accuracy"] == pytest.approx(
        evaluate(host, NAME, load_dataset(data, labels="label"))["accuracy"], abs=1e-4
    )
    source = read_adapter(tmp_path / "lora")
    head = adapter.readouts[-1]
    assert isinstance(head, Neighbours)
    assert head.classifier is not None
    close("the same head", head.classifier.weight, source.readouts[-1].weight.detach())

    judge = Judge(wake(source, size=0.3), host.backbone)
    dataset = load_dataset(data, labels="label")
    x = torch.cat([_prepared(host.backbone, dataset, item) for item in dataset.split("val")])
    seen = judge.seen(dataset, dataset.split("val"))
    close("under its parts", seen.pooled, features_under(host.backbone, source, x).pooled)
    assert off_by(seen.pooled, host.backbone(x).pooled) > 0.01

    with pytest.raises(BadCall) as refused:
        RECIPES["gpt4mia"].program(run(data, tmp_path / "b", image_size=96), classifier=str(tmp_path / "lora"))
    says(refused.value, "64 pixels", "--image-size")
    with pytest.raises(BadCall) as refused:
        RECIPES["gpt4mia"].program(
            run(data, tmp_path / "b", classes=("bright", "dark")), classifier=str(tmp_path / "lora")
        )
    says(refused.value, "middle", "bright, dark")
    with pytest.raises(BadCall) as refused:
        made(data, tmp_path / "b", classifier=str(tmp_path / "a"))
    says(refused.value, "neighbours", "classifier_head")
    assert not (tmp_path / "b").exists()


def test_what_a_user_gets_wrong_is_said(data: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"method": "nearest", "temperature": 0.1}, ("nearest has no temperature",)),
        ({"k": 3}, ("attention has no k",)),
        ({"method": "nearest", "k": 50}, ("k = 50", "12 known samples")),
        ({"share": 0.0}, ("share",)),
        ({"temperature": -1.0}, ("temperature",)),
    ):
        with pytest.raises(BadCall) as refused:
            made(data, tmp_path / "a", **options)
        says(refused.value, *words)
    with pytest.raises(BadCall) as refused:
        RECIPES["gpt4mia"].program(run(data, tmp_path / "a", task="segment"))
    says(refused.value, "--task classify")
    for missing in ("val", "test"):
        root = draw(tmp_path / missing, {k: v for k, v in COUNTS.items() if k != missing})
        with pytest.raises(BadData) as bad:
            made(root, tmp_path / "a")
        says(bad.value, missing)
    sure = draw(tmp_path / "sure", spread=0)
    with pytest.raises(BadData) as bad:
        made(sure, tmp_path / "a", use="errors")
    says(bad.value, "right on each of its 12", "--shots")
    assert not (tmp_path / "a").exists()


def test_the_settings_that_are_tried() -> None:
    grid = candidates("attention")
    assert len(grid) == len(TEMPERATURES) * len(LAYERS)
    assert grid[0] == Attention(TEMPERATURES[0], LAYERS[0], balanced=True)
    assert candidates("attention", layers=3, temperature=0.7) == [Attention(0.7, 3, balanced=True)]
    assert candidates("nearest") == [Nearest(k) for k in NEIGHBOURS]
    assert candidates("under_bagging", k=2) == [UnderBagging(2)]


class TestTheProbe:
    def test_it_is_logistic_regression(self) -> None:
        from sklearn.linear_model import LogisticRegression

        g = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        x = 5 + 3 * torch.randn(60, 6, generator=g) + 2 * functional.one_hot(labels, 6)
        head = linear_probe(x, labels, 3)
        s = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
        oracle = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(s, labels)
        got = class_probabilities(head, x).detach().numpy()
        np.testing.assert_allclose(got, oracle.predict_proba(s), atol=2e-3)

    def test_a_constant_feature_does_no_harm(self) -> None:
        x = torch.randn(20, 4)
        x[:, 2] = 7.0
        head = linear_probe(x, torch.arange(20) % 2, 2)
        assert torch.isfinite(head.weight).all()
        assert torch.isfinite(class_probabilities(head, x)).all()


def test_features_do_not_depend_on_the_batch(data: Path) -> None:
    backbone, dataset = load_backbone(TINY, image_size=64), load_dataset(data, labels="label")
    items = dataset.split("test")
    together, labels = features_of(backbone, dataset, items)
    alone, _ = features_of(backbone, dataset, items[3:4])
    close("alone", alone, together[3:4])
    assert labels.tolist() == [i.label for i in items]
    with torch.no_grad():
        close("as the host", Host(backbone)(_prepared(backbone, dataset, items[3])).pooled, alone)


def _prepared(backbone: object, dataset: object, item: object) -> torch.Tensor:
    from medgraft.training.data import prepare

    spec = backbone.spec  # type: ignore[attr-defined]
    return prepare(dataset.image(item), spec.image_size, spec.mean, spec.std)[None]  # type: ignore[attr-defined]


class TestScores:
    def test_the_f_score_by_hand(self) -> None:
        truth, said = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0])
        assert f_score(truth, said, 1) == pytest.approx(2 * 2 / (3 + 3))
        assert f_score(np.zeros(3), np.zeros(3), 1) == 0.0
        assert f_score(truth, 1 - truth, 1) == 0.0

    def test_two_classes_have_an_f_score_more_have_none(self) -> None:
        p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
        two = scored(torch.tensor([0, 0, 1]), p)
        assert two["accuracy"] == pytest.approx(2 / 3)
        assert two["balanced_accuracy"] == pytest.approx(0.75)
        assert two["auc"] == 1.0
        assert two["f_score"] == pytest.approx(2 / 3)
        three = scored(torch.tensor([0, 1, 2]), torch.eye(3))
        assert "f_score" not in three
        assert math.isclose(three["auc"], 1.0)
