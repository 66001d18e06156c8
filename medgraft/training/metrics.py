"""The measures: overlap by image, intervals over images, and what classification is judged by.

    dice_k = 2 |P_k & T_k| / (|P_k| + |T_k|)        iou_k = |P_k & T_k| / |P_k or T_k|

NaN where class k is in neither prediction nor truth: nothing was asked, so nothing is counted. A class that is only
predicted, or only in the truth, scores 0. Counts are exact integers. (MONAI's `compute_dice` is the oracle in the
tests; its `ignore_empty` drops false positives too, and its AUC is a Python loop, slow under 2000 bootstrap draws.)

N images, k foreground classes, K = all classes of a classification. Everything is NumPy; nothing draws from the global
generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BadCall


def dice(pred: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice of one image by class: integer (H, W) twice -> float64 (num_classes,), NaN where both are empty.

    `num_classes` counts the foreground: values run from 0 (background) to num_classes. Raises `BadCall` otherwise.
    """
    both, in_pred, in_truth = _counts(pred, truth, num_classes)
    return _ratio(2 * both, in_pred + in_truth)


def iou(pred: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Intersection over union; otherwise as `dice`."""
    both, in_pred, in_truth = _counts(pred, truth, num_classes)
    return _ratio(both, in_pred + in_truth - both)


def bootstrap_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], float] | None = None,
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (N,) over resampled images; NaN values are left out.

    With `statistic`, `values` is (N, ...) and the interval is of statistic(values[rows]), draws that give NaN left
    out. Fewer than two values say nothing about spread: (nan, nan). Raises `BadCall` for a level outside (0, 1).
    """
    if not 0 < level < 1 or draws < 1:
        raise BadCall(f"level lies between 0 and 1 and draws is 1 or more, got level={level}, draws={draws}")
    found = np.asarray(values, dtype=np.float64)
    if statistic is None:
        if found.ndim != 1:
            raise BadCall(f"values must be (N,), one number per image, got shape {found.shape}; average classes first")
        found = found[~np.isnan(found)]
    if len(found) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    if statistic is None:
        means = np.array([found[rng.integers(len(found), size=len(found))].mean() for _ in range(draws)])
    else:
        means = np.array([statistic(found[rng.integers(len(found), size=len(found))]) for _ in range(draws)])
    means = means[~np.isnan(means)]
    if len(means) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """Mean of a - b over `images` images scored by both, with its interval."""

    mean: float
    low: float
    high: float
    images: int


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Difference:
    """How much better a is than b on the same images: (N,) twice; images where either is NaN are left out."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise BadCall(
            f"two lists of one score per image are needed, in one order; got {first.shape} and {second.shape}"
        )
    gap = first - second
    gap = gap[~np.isnan(gap)]
    low, high = bootstrap_interval(gap, level=level, draws=draws, seed=seed)
    return Difference(float(gap.mean()) if len(gap) else float("nan"), low, high, len(gap))


def image_means(scores: ArrayLike) -> np.ndarray:
    """(N, k) scores to (N,): the mean over the classes that count in each image, NaN where none does."""
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2:
        raise BadCall(f"scores must be (N, k), a row per image, got shape {table.shape}")
    counted = ~np.isnan(table)
    return _ratio(np.where(counted, table, 0).sum(1), counted.sum(1))


def summarise(scores: ArrayLike, classes: Sequence[str], *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """(N, k) scores as plain facts for a card: mean and interval over `image_means`, mean by class, images counted.

    {"mean", "low", "high", "images", "classes": {name: {"mean", "images"}}}; None where nothing was counted.
    """
    table = np.asarray(scores, dtype=np.float64)
    means = image_means(table)
    if table.shape[1] != len(classes):
        raise BadCall(f"{table.shape[1]} columns of scores for {len(classes)} classes: {', '.join(classes)}")
    low, high = bootstrap_interval(means, level=level, seed=seed)

    def fact(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    def mean(column: np.ndarray) -> float | None:
        counted = column[~np.isnan(column)]
        return float(counted.mean()) if len(counted) else None

    by_class = {
        name: {"mean": mean(column), "images": int((~np.isnan(column)).sum())}
        for name, column in zip(classes, table.T, strict=True)
    }
    images = int((~np.isnan(means)).sum())
    return {"mean": mean(means), "low": fact(low), "high": fact(high), "images": images, "classes": by_class}


def accuracy(truth: ArrayLike, pred: ArrayLike) -> float:
    """Share of right labels, (N,) twice; NaN for none."""
    t, p = _labels(truth, pred)
    return float((t == p).mean()) if len(t) else float("nan")


def balanced_accuracy(truth: ArrayLike, pred: ArrayLike) -> float:
    """Mean over the classes in the truth of the share found, (N,) twice; NaN for none."""
    t, p = _labels(truth, pred)
    return float(np.mean([(p[t == k] == k).mean() for k in np.unique(t)])) if len(t) else float("nan")


def auc(truth: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve, ties counting a half; for K classes the mean of one against the rest.

        AUC = (sum of ranks of the positives - n+ (n+ + 1) / 2) / (n+ n-)

    truth (N,) labels; scores (N,) of class 1, or (N, K) by class (K = 2 uses column 1). Classes that the truth lacks,
    or has only, are left out; NaN where none remains. Raises `BadCall` for shapes and scores that do not fit.
    """
    t, s = np.asarray(truth), np.asarray(scores, dtype=np.float64)
    if s.ndim == 2 and s.shape[1] <= 2:
        s = s[:, -1]
    if t.ndim != 1 or s.ndim not in (1, 2) or len(t) != len(s) or np.isnan(s).any():
        raise BadCall(f"wanted truth (N,) and finite scores (N,) or (N, K), got {t.shape} and {s.shape}")
    most = 1 if s.ndim == 1 else s.shape[1] - 1
    if len(t) and (t.min() < 0 or t.max() > most):
        raise BadCall(f"labels run from {t.min()} to {t.max()}, the scores are for 0..{most}")
    pairs = [(t == 1, s)] if s.ndim == 1 else [(t == k, s[:, k]) for k in range(s.shape[1])]
    areas = [_rank_area(positive, score) for positive, score in pairs if 0 < positive.sum() < len(t)]
    return float(np.mean(areas)) if areas else float("nan")


def _rank_area(positive: np.ndarray, score: np.ndarray) -> float:
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks = (last - (count - 1) / 2)[place]  # equal scores share the mean of their ranks
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def pr_area(truth: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve, as average precision: equal scores are one step of the curve.

        AP = sum_n (R_n - R_(n - 1)) P_n          over the distinct scores, from the highest down

    truth (N,) of booleans or 0 and 1, scores (N,), one of each a pixel; NaN where nothing is true. Raises `BadCall`.
    """
    t, s = np.asarray(truth), np.asarray(scores, dtype=np.float64)
    if t.ndim != 1 or t.shape != s.shape or np.isnan(s).any() or not np.isin(t, (0, 1)).all():
        raise BadCall(f"wanted truth (N,) of 0 and 1 and finite scores (N,), got {t.shape} and {s.shape}")
    _, place = np.unique(s, return_inverse=True)
    return _stepped_area(np.bincount(place, t), np.bincount(place))


class PixelScores:
    """Scores of the pixels of any number of images in fixed memory, by class; `areas` are their `pr_area`s.

    Scores are probabilities, rounded to 1 / 65535; with that the areas are exact.
    """

    STEPS = 65535

    def __init__(self, classes: int) -> None:
        self._found = np.zeros((classes, self.STEPS + 1), dtype=np.int64)
        self._true = np.zeros_like(self._found)

    def add(self, k: int, truth: np.ndarray, scores: np.ndarray) -> None:
        """One image's pixels of class number `k` (from 0): booleans and probabilities of one shape. Raises `BadCall`."""
        s = np.asarray(scores, dtype=np.float64)
        if s.shape != truth.shape or truth.dtype != bool or not ((s >= 0) & (s <= 1)).all():
            raise BadCall(
                f"wanted booleans and probabilities of one shape, got {truth.dtype} {truth.shape} and {s.shape}"
            )
        step = np.rint(s * self.STEPS).astype(np.int64)
        self._found[k] += np.bincount(step.ravel(), minlength=self.STEPS + 1)
        self._true[k] += np.bincount(step[truth], minlength=self.STEPS + 1)

    @property
    def areas(self) -> list[float]:
        """The area of each class over all pixels added; NaN where nothing is true."""
        return [_stepped_area(true, found) for true, found in zip(self._true, self._found, strict=True)]


def _stepped_area(true: np.ndarray, found: np.ndarray) -> float:
    """From how many pixels have each score, lowest first, and how many of them are true."""
    hits, called = np.cumsum(true[::-1]), np.cumsum(found[::-1])
    if not hits[-1:].any():
        return float("nan")
    return float((true[::-1] * hits / np.maximum(called, 1)).sum() / hits[-1])


def _counts(pred: np.ndarray, truth: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|P & T|, |P|, |T| by foreground class, int64 (k,), from one confusion matrix."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape or pred.dtype.kind not in "bui" or truth.dtype.kind not in "bui" or k < 1:
        raise BadCall(
            f"wanted two integer masks of one shape and num_classes >= 1, got {pred.dtype} {pred.shape}, "
            f"{truth.dtype} {truth.shape} and {k}"
        )
    for name, mask in (("prediction", pred), ("truth", truth)):
        if mask.size and (mask.min() < 0 or mask.max() > k):
            raise BadCall(
                f"the {name} has values {mask.min()}..{mask.max()}; with {k} foreground classes 0..{k} are known"
            )
    pairs = truth.astype(np.int64).ravel() * (k + 1) + pred.astype(np.int64).ravel()
    table = np.bincount(pairs, minlength=(k + 1) ** 2).reshape(k + 1, k + 1)
    return np.diag(table)[1:], table.sum(0)[1:], table.sum(1)[1:]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _labels(truth: ArrayLike, pred: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    t, p = np.asarray(truth), np.asarray(pred)
    if t.ndim != 1 or t.shape != p.shape:
        raise BadCall(f"two lists of labels of one length are needed, got {t.shape} and {p.shape}")
    return t, p
