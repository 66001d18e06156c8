"""Which known samples a sequence model reads, and in which order; and asking one that is served elsewhere.

    rep_i = sum_j <f_i, f_j>        f (M, D) unit features: how well sample i stands for all

A prompt weighs its end most, so the most representative comes LAST. The top quarter is kept. Where classes are
imbalanced, each is ranked by itself, and they are interleaved. Source: Zhang and Chen 2023 (GPT4MIA), section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapters.neighbours import SequenceModel, checked, one_hot, unit
from ..errors import BadCall

IMBALANCED = 2.0
"""Classes are imbalanced where the most frequent has more than this many times the samples of the rarest."""


def representativeness(features: Tensor) -> Tensor:
    """rep (M,), float64, of features (M, D): the sum of cosine similarities to all, itself included."""
    f = unit(features.double())
    return f @ f.sum(0)


def representatives(features: Tensor, labels: Tensor, *, share: float = 0.25, by_class: bool | None = None) -> Tensor:
    """Indices, int64, of the samples to keep, in the order of the prompt: the most representative last.

    `share` of the M samples is kept, rounded up; with `by_class` (default: where they are imbalanced) that share of
    every class that occurs, ranked within the class, interleaved so that the last ones are the best of each class, in
    class order. Of equally representative samples the one of lowest index comes later. features (M, D), labels int64
    (M,).
    Raises BadCall for a share outside (0, 1], no samples, or features that are not finite.
    """
    if not 0 < share <= 1:
        raise BadCall(f"share is the part that is kept, above 0 and up to 1; got {share}")
    if labels.ndim != 1 or labels.is_floating_point():
        raise BadCall(f"labels are integers (M,), one for each sample; got {labels.dtype} {tuple(labels.shape)}")
    checked(features, one_hot(labels, int(labels.max()) + 1) if len(labels) else labels[:, None], features)
    classes, counts = labels.unique(return_counts=True)
    if by_class is None:
        by_class = bool(counts.max() > IMBALANCED * counts.min())
    groups = [(labels == c).nonzero()[:, 0].cpu() for c in classes] if by_class else [torch.arange(len(labels))]
    ranked = [_ranked(features, own)[: math.ceil(round(share * len(own), 9))].tolist() for own in groups]
    longest = max(map(len, ranked))
    return torch.tensor([own[place] for place in reversed(range(longest)) for own in ranked if place < len(own)])


def _ranked(features: Tensor, among: Tensor) -> Tensor:
    """`among`, the most representative of them first."""
    own = features[among.to(features.device)]
    return among[representativeness(own).argsort(descending=True, stable=True).cpu()]


def ask(
    model: SequenceModel,
    known: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    share: float = 0.25,
    by_class: bool | None = None,
) -> Tensor:
    """The answer of any sequence model, given the representatives in order: probabilities (N, K), float32.

    known (M, D), labels int64 (M,), queries (N, D). Raises BadCall for an answer of another shape, that is not finite
    or negative, or has a row of zeros: a model served elsewhere may say anything.
    """
    rows = representatives(known, labels, share=share, by_class=by_class).to(known.device)
    checked(known, one_hot(labels, classes), queries)
    said = model(known[rows], one_hot(labels[rows.to(labels.device)], classes), queries)
    if not isinstance(said, Tensor) or said.shape != (len(queries), classes):
        found = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise BadCall(f"a sequence model answers {len(queries)} queries with ({len(queries)}, {classes}), got {found}")
    p = said.float()
    if not (torch.isfinite(p).all() and (p >= 0).all() and (p.sum(1) > 0).all()):
        raise BadCall(
            "a sequence model answers with probabilities; it gave negative or non-finite ones, or a row of zeros"
        )
    return p / p.sum(1, keepdim=True)


def as_text(features: Tensor, labels: Tensor, query: Tensor, *, digits: int = 2) -> str:
    """A prompt for one query (D,): a line for each known sample, in order, and an open one for it, in the paper's form.

    features (M, D), labels int64 (M,). The line of a sample reads `[0.91, 0.09] is in class 0`.
    """

    def array(row: Tensor) -> str:
        return "[" + ", ".join(f"{v:.{digits}f}" for v in row.tolist()) + "]"

    lines = [f"{array(f)} is in class {c}" for f, c in zip(features, labels.tolist(), strict=True)]
    return "\n".join([*lines, f"{array(query)} is in class"])
