"""GPT4MIA: known samples tell where a frozen classifier errs (use "errors"), or correct its predictions (use "labels").

Zhang and Chen 2023, "GPT4MIA: Utilizing GPT-3 as a Plug-and-Play Transductive Model for Medical Image Analysis"
(medagi-gpt4mia). The classifier learns from the training split; the known samples are the validation split, which it
has not seen. "errors": the label of a known sample is whether the classifier was right on it. "labels": its class.
Where we differ: no hosted language model; the transducer is an attention layer, or k nearest neighbours, which the
adapter file holds with the known samples. What is compared is the features beside the class probabilities, and settings
are chosen leaving one known sample out. The test split is read for the scores alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..adapters import Adapter, ClassifierHead, Task
from ..adapters.graft import Graft
from ..adapters.host import check_backbone
from ..adapters.hub import load_adapter
from ..adapters.neighbours import Attention, Method, Nearest, Neighbours, UnderBagging, class_probabilities
from ..adapters.store import read_adapter, record_evaluation, save_adapter
from ..adapters.task import Preprocessing
from ..backbones import Backbone
from ..backbones.sites import Plan, following
from ..errors import BadCall, BadData
from ..training.data import Dataset, Item
from ..training.leave_one_out import choose
from ..training.metrics import accuracy, auc, balanced_accuracy, bootstrap_interval
from ..training.representatives import representatives
from .registry import recipe
from .run import Run, directory_bytes

RIGHT_OR_WRONG = ("right", "wrong")
TEMPERATURES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
LAYERS = (1, 2, 4)
NEIGHBOURS = (1, 3, 5, 9, 15, 25)
ROWS = 32  # images a forward pass


@recipe("gpt4mia", task="classify", augment="none")
def gpt4mia(
    run: Run,
    *,
    use: Literal["labels", "errors"] = "labels",
    method: Literal["attention", "nearest", "under_bagging"] = "attention",
    features: Literal["pooled", "probabilities", "both"] = "both",
    share: float = 1.0,
    temperature: float | None = None,
    layers: int | None = None,
    k: int | None = None,
    classifier: str | None = None,
) -> dict[str, Any]:
    """GPT4MIA (Zhang and Chen 2023): a transductive head that corrects a frozen classifier, or says where it errs.

    use : correct its predictions ("labels"), or detect its errors ("errors": the classes are right and wrong).
    share : the part of each class of known samples that is kept, the most representative ones (the paper keeps 0.25).
    temperature, layers (attention), k : default: chosen leaving one known sample out.
    classifier : a trained classification adapter; default: a linear probe made here on the training split.
    """
    if run.task != "classify" or run.goal.kind != "classify":
        raise BadCall("gpt4mia classifies, and its size is that of its known samples: give --task classify and data")
    tried = candidates(method, temperature=temperature, layers=layers, k=k)
    items = {split: _items(run.dataset, split) for split in ("val", "test")}
    judge = Judge.trained(run) if classifier is None else Judge.loaded(run, classifier)
    known, asked = (judge.seen(run.dataset, items[split]) for split in ("val", "test"))
    goal = run.goal if use == "labels" else Task("classify", RIGHT_OR_WRONG)
    labels = known.targets(use)
    if use == "errors" and len(labels.unique()) < 2:
        raise BadData(
            f"the classifier was {RIGHT_OR_WRONG[int(labels[0])]} on each of its {len(labels)} known samples, which "
            "says nothing about errors; train it on fewer --shots, or give more validation items"
        )
    every = Neighbours.of(known.pooled, labels, goal, features=features, classifier=judge.head)
    kept = representatives(every.keys, labels, share=share, by_class=True).to(labels.device)
    best, loss = choose(tried, every.keys[kept], labels[kept], goal.outputs)
    head = Neighbours.of(known.pooled[kept], labels[kept], goal, method=best, features=features, classifier=judge.head)
    adapter = Adapter(
        judge.adapter.backbone,
        goal,
        judge.adapter.preprocessing,
        {**judge.adapter.site_parts, "head": head},
        provenance=run.provenance("gpt4mia", {"use": use, "share": share, "known": len(kept), "method": repr(best)}),
    )
    save_adapter(adapter, run.out, dtype=run.dtype, backbone=run.frozen)
    saved = read_adapter(run.out).to(run.where).readouts[-1]  # the scores are of the saved bits
    assert isinstance(saved, Neighbours)
    with torch.no_grad():
        scores = scored(asked.targets(use), saved.answer(asked.pooled))
    record_evaluation(run.out, {"dataset": run.dataset.name, "split": "test", "n": len(items["test"]), **scores})
    before = scored(asked.labels, asked.probabilities)
    return {
        "recipe": "gpt4mia",
        "use": use,
        "backbone": run.frozen.spec.title,
        "classes": list(goal.classes),
        "shots": len(run.support),
        "known": len(kept),
        "method": repr(best),
        "leave-one-out loss": round(loss, 4),
        **{f"test {name}": round(v, 4) for name, v in scores.items() if name not in ("interval", "level")},
        **{f"classifier's own {name}": round(before[name], 4) for name in ("accuracy", "balanced_accuracy", "auc")},
        "trainable": adapter.trainable,
        "bytes": directory_bytes(run.out),
        "out": str(run.out),
    }


def candidates(
    method: str, *, temperature: float | None = None, layers: int | None = None, k: int | None = None
) -> Sequence[Method]:
    """The settings that are tried, where they are not given. Raises BadCall for a setting of another method."""
    strange = [
        n for n, v in (("temperature", temperature), ("layers", layers)) if v is not None and method != "attention"
    ]
    strange += ["k"] if k is not None and method == "attention" else []
    if strange:
        raise BadCall(f"{method} has no {' and no '.join(strange)}; leave it away")
    if method == "attention":
        heats = TEMPERATURES if temperature is None else (temperature,)
        depths = LAYERS if layers is None else (layers,)
        return [Attention(t, n, balanced=True) for n in depths for t in heats]
    counts = NEIGHBOURS if k is None else (k,)
    return [Nearest(n) if method == "nearest" else UnderBagging(n) for n in counts]


# The frozen classifier


@dataclass(frozen=True)
class Seen:
    """Pooled features (N, C) of some items, their labels (N,), and the class probabilities (N, K) of the classifier."""

    pooled: Tensor
    labels: Tensor
    probabilities: Tensor

    def targets(self, use: str) -> Tensor:
        """int64 (N,): the labels, or for "errors" whether the classifier was wrong."""
        return self.labels if use == "labels" else (self.probabilities.argmax(1) != self.labels).long()


@dataclass(frozen=True)
class Judge:
    """A frozen classifier: an adapter whose last part is a `ClassifierHead`, on its backbone."""

    adapter: Adapter
    backbone: Backbone

    @property
    def head(self) -> ClassifierHead:
        """Its last part."""
        head = self.adapter.readouts[-1]
        assert isinstance(head, ClassifierHead)
        return head

    @staticmethod
    def trained(run: Run) -> Judge:
        """A linear probe on the pooled features of the run's support."""
        pooled, labels = features_of(run.frozen, run.dataset, run.support)
        probe = linear_probe(pooled, labels, run.goal.outputs)
        return Judge(Adapter.of(run.frozen, run.goal, {"head": probe}), run.frozen)

    @staticmethod
    def loaded(run: Run, source: str) -> Judge:
        """The classifier saved at `source`. Raises BadCall for another kind of adapter, or one for other classes."""
        adapter = load_adapter(source)
        check_backbone(adapter, run.frozen, False)
        if not isinstance(adapter.readouts[-1], ClassifierHead) or len(adapter.readouts) > 1:
            raise BadCall(f"{source} ends with {adapter.readouts[-1].kind!r}; a classifier_head alone is wanted there")
        if adapter.preprocessing.size != run.frozen.spec.image_size:
            raise BadCall(f"{source} was trained at {adapter.preprocessing.size} pixels; give that as --image-size")
        if adapter.task.classes != run.goal.classes:
            raise BadCall(
                f"{source} tells {', '.join(adapter.task.classes)} apart, the data has {', '.join(run.goal.classes)}"
            )
        return Judge(adapter.to(run.where), run.frozen)

    def seen(self, dataset: Dataset, items: Sequence[Item]) -> Seen:
        """What it makes of some items."""
        plan = Graft.of(self.backbone, self.adapter).plan
        pooled, labels = features_of(self.backbone, dataset, items, self.adapter.for_pictures, plan)
        with torch.no_grad():
            return Seen(pooled, labels, class_probabilities(self.head, pooled))


@torch.no_grad()
def features_of(
    backbone: Backbone,
    dataset: Dataset,
    items: Sequence[Item],
    preprocessing: Preprocessing | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, C), float32, under a plan, and labels int64 (N,), of labelled items."""
    spec = backbone.spec
    prepare = preprocessing or Preprocessing(spec.image_size, spec.mean, spec.std)
    like = next(backbone.parameters())
    rows = []
    for start in range(0, len(items), ROWS):
        x = torch.stack([prepare(dataset.image(item)) for item in items[start : start + ROWS]]).to(like)
        with following(plan):
            rows.append(backbone(x).pooled.float())
    return torch.cat(rows), torch.tensor([item.label for item in items], device=like.device)


def linear_probe(pooled: Tensor, labels: Tensor, classes: int) -> ClassifierHead:
    """Multinomial logistic regression on standardised features, as a linear head on the features as they are.

    min over W, b of  mean_i CE(W s_i + b, y_i) + |W|^2 / (2 N)       s = (z - mean) / std,  by L-BFGS from zero
    """
    mean, std = pooled.mean(0), pooled.std(0, correction=0).clamp_min(1e-6)
    s = (pooled - mean) / std
    weight = s.new_zeros(classes, s.shape[1], requires_grad=True)
    bias = s.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        fit = functional.cross_entropy(functional.linear(s, weight, bias), labels)
        loss = fit + weight.square().sum() / (2 * len(s))
        loss.backward()
        return loss

    optimiser.step(closure)
    head = ClassifierHead({}, s.shape[1], classes).to(pooled.device)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)
    return head


# Scores


def scored(truth: Tensor, probabilities: Tensor) -> dict[str, Any]:
    """Accuracy with its 95 % interval over images, balanced accuracy, AUC; for two classes the F score of the second.

    truth int64 (N,), probabilities (N, K).
    """
    t, p = truth.cpu().numpy(), probabilities.cpu().numpy()
    said = p.argmax(1)
    scores: dict[str, Any] = {
        "accuracy": accuracy(t, said),
        "balanced_accuracy": balanced_accuracy(t, said),
        "auc": auc(t, p),
        "level": 0.95,
        "interval": list(bootstrap_interval((t == said).astype(float))),
    }
    return scores if p.shape[1] > 2 else {**scores, "f_score": f_score(t, said, 1)}


def f_score(truth: np.ndarray, said: np.ndarray, positive: int) -> float:
    """F1 of one class, 2 TP / (2 TP + FP + FN), of labels (N,) twice; 0 where it neither occurs nor is said."""
    hits = int(((truth == positive) & (said == positive)).sum())
    named = int((truth == positive).sum() + (said == positive).sum())
    return 2 * hits / named if named else 0.0


def _items(dataset: Dataset, split: str) -> list[Item]:
    items = [item for item in dataset.split(split) if item.label is not None]
    if not items:
        wanted = "known samples that the classifier has not learnt from" if split == "val" else "scores"
        raise BadData(
            f"{dataset.name!r} has no labelled items in split {split!r}, which are wanted for {wanted}; add some, or "
            "take the split out and a seeded one is made"
        )
    return items
