import numpy as np
import pytest
import torch

from medgraft.errors import BadCall
from medgraft.training.metrics import (
    PixelScores,
    accuracy,
    auc,
    balanced_accuracy,
    bootstrap_interval,
    dice,
    image_means,
    iou,
    paired_difference,
    pr_area,
    summarise,
)

NAN = float("nan")


def test_overlap_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0], [2, 2, 2, 0]])
    pred = np.array([[1, 0, 0, 0], [2, 2, 1, 0]])
    # class 1: 1 in common, 2 and 2; class 2: 2 in common, 2 and 3; class 3 nowhere
    np.testing.assert_allclose(dice(pred, truth, 3), [2 / 4, 4 / 5, NAN])
    np.testing.assert_allclose(iou(pred, truth, 3), [1 / 3, 2 / 3, NAN])


def test_absent_predicted_missed() -> None:
    nothing, something = np.zeros((4, 4), np.uint8), np.eye(4, dtype=np.uint8)
    for measure in (dice, iou):
        assert np.isnan(measure(nothing, nothing, 1)).all()
        assert measure(something, nothing, 1) == 0
        assert measure(nothing, something, 1) == 0
        assert measure(something, something, 1) == 1
        assert measure(something > 0, something, 1) == 1  # boolean is an integer mask too


def test_overlap_agrees_with_monai() -> None:
    from monai.metrics import compute_dice, compute_iou

    rng = np.random.default_rng(0)
    for _ in range(10):
        pred, truth = rng.integers(0, 4, (2, 9, 11))
        hot = [torch.nn.functional.one_hot(torch.from_numpy(m), 4).movedim(-1, 0)[None].float() for m in (pred, truth)]
        want_dice = compute_dice(*hot, include_background=False, ignore_empty=False)[0]
        want_iou = compute_iou(*hot, include_background=False, ignore_empty=False)[0]
        np.testing.assert_allclose(dice(pred, truth, 3), want_dice, rtol=1e-6)
        np.testing.assert_allclose(iou(pred, truth, 3), want_iou, rtol=1e-6)


def test_masks_that_do_not_fit_are_refused() -> None:
    mask = np.zeros((4, 4), int)
    for bad in (np.zeros((4, 5), int), np.zeros((4, 4)), mask + 2, mask - 1):
        with pytest.raises(BadCall):
            dice(bad, mask, 1)
        with pytest.raises(BadCall):
            iou(mask, bad, 1)
    with pytest.raises(BadCall):
        dice(mask, mask, 0)


def test_interval_covers_and_repeats() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.7, 0.1, 40), draws=300, seed=trial)
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.98  # nominal 0.95, a little less at n = 40
    values = rng.normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_interval_leaves_nan_out_and_knows_its_limits() -> None:
    values = [0.5, 0.6, NAN, 0.7]
    assert bootstrap_interval(values) == bootstrap_interval([0.5, 0.6, 0.7])
    for few in ([], [0.5], [0.5, NAN], [NAN, NAN]):
        assert np.isnan(bootstrap_interval(few)).all()
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(BadCall, match="one number per image"):
        bootstrap_interval(np.zeros((4, 2)))
    with pytest.raises(BadCall, match="level"):
        bootstrap_interval(values, level=95)


def test_interval_of_another_statistic() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    score = truth + rng.normal(size=60)
    low, high = bootstrap_interval(
        np.column_stack([truth, score]), statistic=lambda rows: auc(rows[:, 0].astype(int), rows[:, 1]), draws=300
    )
    assert low < auc(truth, score) < high
    assert 0.5 < low < high < 1


def test_paired_difference() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.9, 50)  # images differ much more than methods do
    better = base + 0.02 + rng.normal(0, 0.01, 50)
    gap = paired_difference(better, base)
    assert 0 < gap.low < gap.mean < gap.high
    assert gap.mean == pytest.approx((better - base).mean())
    assert gap.images == 50
    back = paired_difference(base, better)
    assert back.mean == pytest.approx(-gap.mean)
    assert paired_difference([0.5, NAN, 0.7], [0.4, 0.3, NAN]).images == 1
    assert paired_difference([NAN], [0.1]).images == 0
    with pytest.raises(BadCall, match="one order"):
        paired_difference([1, 2], [1, 2, 3])


def test_summary_by_hand() -> None:
    scores = [[0.8, NAN], [0.6, 0.4], [NAN, NAN]]
    np.testing.assert_allclose(image_means(scores), [0.8, 0.5, NAN])
    got = summarise(scores, ["a", "b"])
    assert got["mean"] == pytest.approx(0.65)
    assert got["images"] == 2
    assert got["classes"] == {"a": {"mean": pytest.approx(0.7), "images": 2}, "b": {"mean": 0.4, "images": 1}}
    assert 0.5 <= got["low"] <= got["mean"] <= got["high"] <= 0.8
    assert summarise([[NAN]], ["a"])["mean"] is None
    with pytest.raises(BadCall, match="2 columns of scores for 1 classes"):
        summarise(scores, ["a"])


def test_accuracies_by_hand() -> None:
    truth, pred = [0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0]
    assert accuracy(truth, pred) == pytest.approx(4 / 6)
    assert balanced_accuracy(truth, pred) == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert np.isnan(accuracy([], []))
    assert np.isnan(balanced_accuracy([], []))
    with pytest.raises(BadCall):
        accuracy([0, 1], [0])


def test_auc_by_hand() -> None:
    assert auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == pytest.approx(3 / 4)
    assert auc([0, 1, 1, 0], [0.5, 0.5, 0.5, 0.5]) == pytest.approx(1 / 2)  # ties count a half
    assert auc([0, 1], [[0.9, 0.1], [0.2, 0.8]]) == 1
    assert np.isnan(auc([1, 1], [0.1, 0.2]))
    assert np.isnan(auc([], []))


def test_auc_agrees_with_scikit_learn_and_monai() -> None:
    from monai.metrics import compute_roc_auc
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 80)
    scores = np.round(rng.dirichlet(np.ones(3), 80) + 0.3 * np.eye(3)[truth], 1)  # rounded: many ties
    scores /= scores.sum(1, keepdims=True)
    assert auc(truth, scores) == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr", average="macro"))
    hot = torch.from_numpy(np.eye(3)[truth])
    assert auc(truth, scores) == pytest.approx(float(compute_roc_auc(torch.from_numpy(scores), hot, "macro")))
    assert auc(truth == 1, scores[:, 1]) == pytest.approx(roc_auc_score(truth == 1, scores[:, 1]))


def test_auc_leaves_out_classes_the_truth_lacks_and_refuses_the_rest() -> None:
    truth, scores = [0, 1, 0, 1], [[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]]
    assert auc(truth, scores) == pytest.approx((1.0 + 1.0) / 2)
    for bad_truth, bad_scores in [([0, 3, 0, 1], scores), ([0, 1], scores), (truth, [0.1, NAN, 0.2, 0.3])]:
        with pytest.raises(BadCall):
            auc(bad_truth, bad_scores)


def test_pr_area_by_hand() -> None:
    # thresholds .8, .4, .35, .1: precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1
    assert pr_area([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert pr_area([1, 0, 0, 0], [0.5] * 4) == pytest.approx(1 / 4)  # one step: the share of true ones
    assert pr_area([True, False], [0.9, 0.1]) == 1
    assert np.isnan(pr_area([0, 0], [0.1, 0.2]))
    assert np.isnan(pr_area([], []))
    for truth, scores in [([0, 1], [0.1]), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, NAN]), ([[0, 1]], [[0.1, 0.2]])]:
        with pytest.raises(BadCall):
            pr_area(truth, scores)


@pytest.mark.parametrize("digits", [1, 9])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_pr_area_agrees_with_scikit_learn(share: float, digits: int) -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    truth = rng.random(5000) < share
    scores = np.round(np.clip(0.3 * truth + rng.random(5000) * 0.7, 0, 1), digits)
    assert pr_area(truth, scores) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_pixel_scores_are_the_area_over_all_images() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    pixels = PixelScores(3)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for size in ((8, 9), (20, 3), (1, 1)):
        truth = rng.random(size) < 0.3
        scores = np.clip(0.2 * truth + rng.random(size) * 0.8, 0, 1).astype(np.float32)
        pixels.add(1, truth, scores)
        seen.append((truth.ravel(), np.rint(scores.ravel().astype(np.float64) * 65535)))
    pixels.add(2, np.zeros((4, 4), bool), rng.random((4, 4)))
    want = average_precision_score(*map(np.concatenate, zip(*seen, strict=True)))
    never, area, empty = pixels.areas
    assert area == pytest.approx(want, abs=1e-12)
    assert np.isnan(never)
    assert np.isnan(empty)
    near = PixelScores(1)  # 0.4 and 0.6 of a step are rounded to different ones, 0.6 and 1 to the same
    near.add(0, np.array([True, False, False, True]), np.array([0.6, 0.4, 1.0, 0.4]) / 65535)
    assert near.areas == [pytest.approx(pr_area([1, 0, 0, 1], [1, 0, 1, 0]))]
    for truth, scores in [(np.ones(2, bool), np.array([0, 1.1])), (np.ones(2, int), np.zeros(2))]:
        with pytest.raises(BadCall, match="probabilities"):
            pixels.add(0, truth, scores)
