"""Answers from known samples: a head that keeps feature vectors and their labels, where others keep trained weights.

    nearest        p = mean of y_i over the k known samples with the largest <z, f_i>
    under-bagging  p = mean of that over B bags, each of equally many samples of every class, drawn by a seed
    attention      p = sum_i a_i y_i,  a = softmax_i(<z, f_i> / T);  T -> 0 is the nearest neighbour

f (M, D) and z (N, D) are unit vectors of the M known samples and N queries, y (M, K) one-hot labels, p (N, K).
The answer for a query depends on no other query; methods of which that is not true stand in `transduction`.

Rules. Of equally similar samples the one of lowest index counts as nearer, of equally probable classes the first is
answered.
A class without a known sample has probability 0. More neighbours than samples are refused. A zero vector is similar to
nothing.

Sources: Zhang and Chen 2023 (GPT4MIA), section 2.1, Propositions 1 to 3; Hang et al. 2022 (under-bagging nearest
neighbours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..errors import BadAdapter, BadCall, unknown
from .heads import ClassifierHead, check_width
from .part import Readout, part
from .task import Task

FEATURES = ("pooled", "probabilities", "both")
LEAST = 1e-9
"""Logits are log p with p no less than this: finite, and too little to move the other probabilities in float32."""


class SequenceModel(Protocol):
    """Reads known samples, answers for new ones: the methods here, and what a language model served elsewhere can be.

    The samples come in the order of a prompt. The methods here do not look at it; a language model weighs what is last
    most (`training.representatives` orders for one, writes the text, and checks the answer).
    """

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """known (M, D), labels (M, K) one-hot, queries (N, D) -> class probabilities (N, K)."""
        ...


@dataclass(frozen=True)
class Nearest:
    """The share of each class among the `k` known samples of largest cosine similarity."""

    k: int = 5

    def __post_init__(self) -> None:
        _whole("k", self.k, 1, 1 << 20)

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """See `SequenceModel`. Raises BadCall for what `checked` refuses and for k above M."""
        f, y, z = checked(known, labels, queries)
        if self.k > len(f):
            raise BadCall(
                f"k = {self.k} neighbours were asked for, there are {len(f)} known samples; choose a smaller k"
            )
        order = (z @ f.T).sort(dim=1, descending=True, stable=True).indices
        return y[order[:, : self.k]].mean(1)


@dataclass(frozen=True)
class UnderBagging:
    """`Nearest` in `bags` balanced bags, averaged: each holds as many samples of every class as the rarest has."""

    k: int = 5
    bags: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("k", self.k, 1, 1 << 20)
        _whole("bags", self.bags, 1, 10_000)
        _whole("seed", self.seed, 0, 1 << 62)

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """See `SequenceModel`. Raises BadCall for what `checked` refuses and for k above the size of a bag."""
        f, y, z = checked(known, labels, queries)
        nearest = Nearest(self.k)
        return torch.stack([nearest(f[bag], y[bag], z) for bag in self.drawn(y)]).mean(0)

    def drawn(self, labels: Tensor) -> list[Tensor]:
        """The bags, as ascending indices into the known samples; a function of labels (M, K) and seed alone."""
        classes = labels.argmax(1).cpu()
        members = [(classes == c).nonzero()[:, 0] for c in classes.unique()]
        size = min(map(len, members))
        if self.k > size * len(members):
            raise BadCall(
                f"k = {self.k} neighbours were asked for, a balanced bag of these samples holds {size * len(members)} "
                f"(the rarest class has {size}); choose a smaller k"
            )
        g = torch.Generator().manual_seed(self.seed)
        drawn = [[own[torch.randperm(len(own), generator=g)[:size]] for own in members] for _ in range(self.bags)]
        return [torch.cat(bag).sort().values.to(labels.device) for bag in drawn]


@dataclass(frozen=True)
class Attention:
    """The attention transducer: each sample is one token t_i = (f_i, y_i), a query is (z, 0), and a layer does

        t <- sum_i a_i t_i,   a = softmax_i(<t, t_i> / T),   the feature part scaled back to unit length

    to the query and to the known samples themselves; i runs over the known samples. The answer is the query's label
    part after `layers` layers: each is one iteration of clustering. T = 0 is the limit T -> 0, the nearest neighbour,
    whatever the layers.
    `balanced` (ours) divides each sample's weight by the size of its class, so that a frequent class is not right for
    that alone.

    Proposition 2 of the paper lets the query attend to itself too; it would then be its own nearest neighbour, with no
    label, as T -> 0. Here it does not.
    """

    temperature: float = 0.1
    layers: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        _whole("layers", self.layers, 1, 100)
        if not 0 <= self.temperature < float("inf"):
            raise BadCall(f"a temperature is 0 or more and finite, got {self.temperature}")

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """See `SequenceModel`. Raises BadCall for what `checked` refuses."""
        f, y, z = checked(known, labels, queries)
        tokens, asked = torch.cat([f, y], 1), torch.cat([z, z.new_zeros(len(z), y.shape[1])], 1)
        prior = -(y @ y.sum(0)).log() if self.balanced else y.new_zeros(len(y))
        for left in reversed(range(self.layers)):
            asked, before = self._layer(asked, tokens, prior, f.shape[1]), tokens
            tokens = self._layer(tokens, before, prior, f.shape[1]) if left else tokens
        return asked[:, f.shape[1] :]

    def _layer(self, t: Tensor, tokens: Tensor, prior: Tensor, width: int) -> Tensor:
        similar = t @ tokens.T
        if self.temperature == 0:
            weights = functional.one_hot(similar.argmax(1), len(tokens)).to(t.dtype)
        else:  # differences first: a small T makes them minus infinity, never NaN
            weights = ((similar - similar.amax(1, keepdim=True)) / self.temperature + prior).softmax(1)
        moved = weights @ tokens
        return torch.cat([unit(moved[:, :width]), moved[:, width:]], 1)


Method = Nearest | UnderBagging | Attention
METHODS: dict[str, type[Nearest] | type[UnderBagging] | type[Attention]] = {
    "nearest": Nearest,
    "under_bagging": UnderBagging,
    "attention": Attention,
}


@part("neighbours")
class Neighbours(Readout):
    """Known samples in the place of weights: classifies in context, with nothing to train. See the top of the file.

    What is compared (`features`): the pooled features, the class probabilities of a frozen classifier whose tensors
    travel along (`classes` of them, of `form` linear or cosine), or both: unit vectors side by side, of equal weight.

    Tensors: `keys` (samples, D), `labels` int64 (samples,), and `classifier.*`. A key says something about the one
    image that it came from, so publishing asks for the same consent as images do. Site parts below must not be trained
    on: the keys are features under them as they are.
    """

    holds_images = True

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        width: int,
        outputs: int,
        samples: int,
        method: str = "attention",
        options: Mapping[str, Any] | None = None,
        features: str = "pooled",
        classes: int = 0,
        form: str = "linear",
    ) -> None:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        if features not in FEATURES:
            raise unknown("kind of features", features, FEATURES)
        if samples < 1 or outputs < 2:
            raise BadCall(f"known samples of two or more classes are needed, got {samples} samples, {outputs} classes")
        if (classes > 0) != (features != "pooled"):
            raise BadCall(f"features {features!r} and a classifier of {classes} classes do not go together")
        chosen = METHODS[method](**(options or {}))
        super().__init__(
            sites,
            width=width,
            outputs=outputs,
            samples=samples,
            method=method,
            options=asdict(chosen),
            features=features,
            classes=classes,
            form=form,
        )
        self.method, self.features, self.width, self.outputs = chosen, features, width, outputs
        compared = classes + (width if features != "probabilities" else 0)
        # Until it is filled a fresh head holds random directions, as a fresh linear head holds random weights.
        self.register_buffer("keys", unit(torch.randn(samples, compared)))
        self.register_buffer("labels", torch.arange(samples) % outputs)
        self.classifier = _frozen(ClassifierHead({}, width, classes, form)) if classes else None
        self.keys: Tensor
        self.labels: Tensor

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        samples: int | None = None,
        method: str = "attention",
        options: Mapping[str, Any] | None = None,
        features: str = "pooled",
        classes: int = 0,
        form: str = "linear",
    ) -> Neighbours:
        """A head with room for `samples` known samples (default: one a class), not yet filled; `of` fills one."""
        _classifies(task)
        return cls(
            {}, backbone.spec.width, task.outputs, samples or task.outputs, method, options, features, classes, form
        )

    @classmethod
    def of(
        cls,
        pooled: Tensor,
        labels: Tensor,
        task: Task,
        *,
        method: Method | None = None,
        features: str = "pooled",
        classifier: ClassifierHead | None = None,
    ) -> Neighbours:
        """A head that knows `pooled` (M, C) features and their `labels`, int64 (M,), indices into the task's classes.

        `classifier` gives the class probabilities; it is copied. Raises BadCall for no samples, features that are not
        finite, labels that do not fit, and a task with a class of which there is no sample: it could never be answered.
        """
        _classifies(task)
        if pooled.ndim != 2 or labels.shape != pooled.shape[:1] or labels.is_floating_point():
            raise BadCall(
                f"known samples are features (M, C) and integer labels (M,), got {tuple(pooled.shape)} and "
                f"{tuple(labels.shape)} {labels.dtype}"
            )
        checked(pooled, one_hot(labels, task.outputs), pooled)
        absent = [name for i, name in enumerate(task.classes) if not (labels == i).any()]
        if absent:
            raise BadCall(
                f"there is no known sample of {', '.join(absent)}, which could never be answered; add one, or "
                "leave the class out"
            )
        method = method or Attention()
        name = next((name for name, kind in METHODS.items() if type(method) is kind), None)
        if name is None:
            raise BadCall(
                f"an adapter's file can hold {', '.join(kind.__name__ for kind in METHODS.values())}, not "
                f"{type(method).__name__}; call that on the features themselves"
            )
        head = None if features == "pooled" else classifier
        if features != "pooled" and head is None:
            raise BadCall(f"features {features!r} are a classifier's; give classifier=, a ClassifierHead")
        made = cls(
            {},
            pooled.shape[1],
            task.outputs,
            len(pooled),
            name,
            asdict(method),
            features,
            0 if head is None else head.config["outputs"],
            "linear" if head is None else head.form,
        ).to(pooled.device)
        if head is not None and made.classifier is not None:
            made.classifier.load_tensors(head.tensors())
        with torch.no_grad():
            made.keys.copy_(made.compared(pooled))
            made.labels.copy_(labels)
        return made

    def check(self, backbone: Backbone) -> None:
        """The pooled features must have the width of those known."""
        check_width(self, backbone, self.width, backbone.spec.width)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As every part, and refuses labels that name no class. Raises BadAdapter."""
        labels = tensors["labels"]
        if labels.min() < 0 or labels.max() >= self.outputs:
            raise BadAdapter(
                f"its labels run from {labels.min()} to {labels.max()}, the task has classes 0 to {self.outputs - 1}"
            )
        super().load_tensors(tensors)

    def compared(self, pooled: Tensor) -> Tensor:
        """What is compared of pooled features (N, C): unit vectors (N, D), float32."""
        sides = [] if self.features == "probabilities" else [unit(pooled.float())]
        if self.classifier is not None:
            sides.append(unit(class_probabilities(self.classifier, pooled)))
        return unit(torch.cat(sides, 1))

    def answer(self, pooled: Tensor) -> Tensor:
        """Probabilities (N, K), float32, for pooled features (N, C). Raises BadCall where they are not finite."""
        with torch.autocast(pooled.device.type, enabled=False):  # similarities differ in their last digits
            return self.method(self.keys, one_hot(self.labels, self.outputs), self.compared(pooled))

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K), float32: the logarithms of the probabilities, none below log(1e-9)."""
        return self.answer(features.pooled).clamp_min(LEAST).log()


def class_probabilities(head: ClassifierHead, pooled: Tensor) -> Tensor:
    """The probabilities (N, K), float32, that a classifier gives to pooled features (N, C)."""
    z = pooled.to(head.weight.dtype)
    return head.read(Features([], [], z, z), z).float().softmax(1)  # pooled features are all that it reads


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    return functional.normalize(x, dim=-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """int64 (M,) -> float32 (M, classes). Raises BadCall for labels that name no class."""
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise BadCall(
            f"labels run from {int(labels.min())} to {int(labels.max())}, there are classes 0 to {classes - 1}"
        )
    return functional.one_hot(labels.long(), classes).float()


def checked(known: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features (M, D), labels (M, K) and unit queries (N, D), in float32 or, where the features are, float64.

    Raises BadCall for no known samples, shapes that do not fit, values that are not finite, and labels that are not
    probabilities of the classes.
    """
    if known.ndim != 2 or labels.ndim != 2 or queries.ndim != 2 or known.shape[1] != queries.shape[1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (known, labels, queries))
        raise BadCall(f"wanted known samples (M, D), labels (M, K) and queries (N, D), got {shapes}")
    if len(known) == 0 or len(known) != len(labels):
        raise BadCall(f"{len(known)} known samples with {len(labels)} labels: give one or more, each with its label")
    for name, t in (("known samples", known), ("queries", queries)):
        bad = (~torch.isfinite(t).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise BadCall(f"{name} have features that are not finite (row {bad[0]}, {len(bad)} in all); leave them out")
    if not ((labels >= 0).all() and ((labels.sum(1) - 1).abs() < 1e-4).all()):
        raise BadCall("labels are one-hot rows (M, K): not negative, adding up to 1; make them with one_hot(labels, K)")
    dtype = torch.promote_types(torch.promote_types(known.dtype, queries.dtype), torch.float32)
    return unit(known.to(dtype)), labels.to(dtype), unit(queries.to(dtype))


def _frozen(head: ClassifierHead) -> ClassifierHead:
    """`head` with buffers for parameters: it travels along and is not trained."""
    for name, p in list(head.named_parameters()):
        delattr(head, name)
        head.register_buffer(name, p.detach())
    return head


def _classifies(task: Task) -> None:
    if task.kind != "classify" or task.outputs < 2:
        raise BadCall(
            f"known samples answer with one of several classes; the task is to {task.kind} {', '.join(task.classes)}"
        )


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadCall(f"{name} is a whole number from {low} to {high}, got {value!r}")
