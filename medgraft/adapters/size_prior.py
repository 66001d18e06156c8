"""What the support says of an organ as a whole: its size, where its middle lies, how long its boundary is. Used by transduction.

    size      S(p) = sum_x p(x) / N
    centroid  c_a(p) = sum_x u_a(x) p(x) / sum_x p(x)        u_a(x) in (0, 1): the voxel's middle along axis a
    length    B(p) = sum_a sum_x |p(x + e_a) - p(x)| / N     the faces between organ and rest, of a mask

p (C, D, H, W) holds the probabilities of the C foreground classes, N = D H W. So size and length are fractions of the volume; with the
unit "voxels" N = 1. The target T of a class is the mean over the support volumes that show it, and a value v costs

    size, length    (1 - g) T - v     below the band (1 - g) T .. (1 + g) T,     v - (1 + g) T  above it,   0 within     (Eq. 2)
                    relative:  max(|T - v| / max(T, v) - g, 0),  no gradient through the denominator
    centroid        mean over a of max(|T_a - v_a| - g, 0)

with g the margin. Costs are means over the classes that have a target, and sums over priors, each times its weight. Rules that the
paper leaves open: a class that no support volume shows has no target and costs nothing (its size would be 0, which would forbid it);
a volume without it does not enter the mean.

Source: Silva-Rodriguez et al. 2023 (FSEFT), section 3, Eq. 2, for one class and the size; it prints sums and calls them
proportions. The relative form is that of the authors' code, whose cost above the band is |e| + g where |e| - g is meant; there g is
0.3, which is the default here since the paper names no value. Centroid and length as in Kervadec et al. 2021 (MIDL, shape descriptors).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..errors import BadCall, unknown
from .part import Part, part
from .task import Task

Unit = Literal["fraction", "voxels"]
Target = tuple[float, ...] | None
WIDTHS = {"size": 1, "centroid": 3, "length": 1}
"""The kinds, and how many numbers each says of a class."""


@dataclass(frozen=True)
class Prior:
    """One statistic, its target for every class (None: no support volume shows the class), and how far a query may lie from it."""

    kind: str
    targets: tuple[Target, ...]
    margin: float = 0.3
    weight: float = 1.0
    unit: Unit = "fraction"
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kind not in WIDTHS:
            raise unknown("prior", self.kind, WIDTHS)
        if self.unit not in get_args(Unit):
            raise unknown("unit of a prior", self.unit, get_args(Unit))
        if self.kind == "centroid" and (self.relative or self.unit != "fraction"):
            raise BadCall("a centroid is a part of the volume's sides: it has no relative form and no unit of voxels")
        if not (0 <= self.margin < math.inf and 0 <= self.weight < math.inf):
            raise BadCall(f"margin and weight of a prior are 0 or more, got {self.margin} and {self.weight}")
        width = WIDTHS[self.kind]
        for target in self.targets:
            if target is not None and (len(target) != width or not all(math.isfinite(t) and t >= 0 for t in target)):
                raise BadCall(f"a target of {self.kind!r} is {width} number(s), 0 or more, or None; got {target}")
        if not self.targets:
            raise BadCall("a prior wants a target, or None, for each class; got none")

    @staticmethod
    def of(kind: str, labels: Sequence[Tensor], classes: int, **options: Any) -> Prior:
        """The prior of a support: `labels` are int64 (D, H, W) with values 0 .. `classes`. Raises BadCall for none at all."""
        if not labels:
            raise BadCall("a prior is measured on the labels of a support, got none")
        made = Prior(kind, (None,) * classes, **options)
        masks = [torch.stack([(y == k) for k in range(1, classes + 1)]).double() for y in labels]
        shown = torch.stack([m.flatten(1).any(1) for m in masks])
        values = torch.stack([made.measure(m) for m in masks])
        means = [values[shown[:, k], k].mean(0).tolist() if shown[:, k].any() else None for k in range(classes)]
        return Prior(kind, tuple(None if m is None else tuple(m) for m in means), **options)

    def measure(self, p: Tensor) -> Tensor:
        """(C, D, H, W) probabilities to (C, 1), or (C, 3) for a centroid."""
        if self.kind == "centroid":
            mass = p.flatten(1).sum(1).clamp_min(torch.finfo(p.dtype).tiny)
            return torch.stack([_first_moment(p, axis) / mass for axis in (1, 2, 3)], 1)
        scale = 1 if self.unit == "voxels" else p[0].numel()
        if self.kind == "size":
            return p.flatten(1).sum(1, keepdim=True) / scale
        return (
            torch.stack([p.diff(dim=axis).abs().flatten(1).sum(1) for axis in (1, 2, 3)], 1).sum(1, keepdim=True)
            / scale
        )

    def cost(self, p: Tensor, without: Collection[int] = ()) -> Tensor:
        """The cost of (C, D, H, W) probabilities, a scalar; classes in `without` (from 0 up) are left out."""
        if p.ndim != 4 or p.shape[0] != len(self.targets):
            raise BadCall(f"a prior for {len(self.targets)} classes wants probabilities of them, got {tuple(p.shape)}")
        rows = [k for k, target in enumerate(self.targets) if target is not None and k not in without]
        if not rows:
            return p.sum() * 0
        wanted = p.new_tensor([self.targets[k] for k in rows])
        return self.weight * self._beyond(self.measure(p)[rows], wanted).mean()

    def _beyond(self, value: Tensor, target: Tensor) -> Tensor:
        """How far outside its band each number lies."""
        if self.kind == "centroid":
            return ((target - value).abs() - self.margin).relu()
        if self.relative:
            worst = torch.maximum(target, value).detach().clamp_min(torch.finfo(value.dtype).tiny)
            return ((target - value).abs() / worst - self.margin).relu()
        return ((1 - self.margin) * target - value).relu() + (value - (1 + self.margin) * target).relu()


def _first_moment(p: Tensor, axis: int) -> Tensor:
    """(C,): the sum over voxels of p times the voxel's middle along `axis`, in parts of that side."""
    along = p.sum([a for a in (1, 2, 3) if a != axis])
    middles = (torch.arange(along.shape[1], device=p.device, dtype=p.dtype) + 0.5) / along.shape[1]
    return along @ middles


@part("priors")
class Priors(Part):
    """Priors that travel in an adapter. It acts at no site: `transduce` and the recipes read it. See the top of the file."""

    def __init__(self, sites: Mapping[str, Sequence[int]], priors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(sites, priors=[dict(p) for p in priors])
        if self.sites or not priors:
            raise BadCall("Priors act at no site, and want one prior or more")
        self.each = tuple(_from_json(p) for p in priors)
        if len({len(p.targets) for p in self.each}) > 1:
            raise BadCall("priors of one adapter speak of the same classes")

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        labels: Sequence[Tensor],
        kinds: Sequence[str] = ("size",),
        margin: float = 0.3,
        unit: Unit = "fraction",
        relative: bool = False,
    ) -> Priors:
        """Priors of a support: `labels` int64 (D, H, W) in task values, on the grid that the adapter sees. A centroid is neither
        `relative` nor in voxels, whatever is asked for the others."""
        options = {k: {} if k == "centroid" else {"unit": unit, "relative": relative} for k in kinds}
        made = [Prior.of(k, labels, len(task.classes), margin=margin, **options[k]) for k in kinds]
        return cls({}, [_to_json(p) for p in made])

    @property
    def known(self) -> tuple[bool, ...]:
        """For each class: does any prior speak of it?"""
        return tuple(any(t is not None for t in own) for own in zip(*(p.targets for p in self.each), strict=True))

    @property
    def alike(self) -> dict[str, Any]:
        """Everything but the targets, which are averaged; the same classes must have one."""
        return {"priors": [{**_to_json(p), "targets": [t is not None for t in p.targets]} for p in self.each]}

    @classmethod
    def soup(cls, parts: Sequence[Any], weights: Sequence[float]) -> Priors:
        """The targets averaged."""
        made = []
        for same in zip(*(p.each for p in parts), strict=True):
            own = zip(*(prior.targets for prior in same), strict=True)
            made.append(replace(same[0], targets=tuple(_mean(of_class, weights) for of_class in own)))
        return cls({}, [_to_json(p) for p in made])

    def cost(self, p: Tensor, without: Collection[int] = ()) -> Tensor:
        """The sum of the priors' costs of (C, D, H, W) probabilities; classes in `without` (from 0 up) are left out."""
        return torch.stack([prior.cost(p, without) for prior in self.each]).sum()


def _mean(targets: Sequence[Target], weights: Sequence[float]) -> Target:
    known = [t for t in targets if t is not None]
    return tuple(sum(w * v for w, v in zip(weights, own, strict=True)) for own in zip(*known, strict=True)) or None


def _to_json(prior: Prior) -> dict[str, Any]:
    return asdict(prior) | {"targets": [None if t is None else list(t) for t in prior.targets]}


def _from_json(found: Mapping[str, Any]) -> Prior:
    return Prior(**{**found, "targets": tuple(None if t is None else tuple(t) for t in found["targets"])})
