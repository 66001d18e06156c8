"""Transduction: an adapter is fitted once more to the volume that it is asked about, under what the support says of the organ.

    min over the adapter  L_seg(support) + lambda L_prior(query)                                                       (Eq. 3)

L_prior is the cost of the adapter's `Priors`, of probabilities over the whole query. Where the support is not at hand (an adapter that was
downloaded), the adapter's own first answer p0 to the query stands in for it (ours): L = cross-entropy of p against p0, mean over voxels.

The query is read in windows side by side, with the adapter's running statistics, as in prediction. Of several windows each is computed
again in the backward pass, so that memory does not grow with their number, but for the frozen prefixes, which are kept up to a budget.

Two rules that the paper leaves open: a class of which the first answer has not one voxel has no cost, and a warning says so (the organ may
be absent, and a size would draw one); `trust=True` applies the prior all the same. A class without a target never has a cost.

Source: Silva-Rodriguez et al. 2023 (FSEFT), section 3; in section 4, lambda = 1, over the last 50 of 100 epochs.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..adapters import Adapter, Host
from ..adapters.size_prior import Priors
from ..adapters.sliding import predict_volume
from ..adapters.volume_task import VolumePreprocessing
from ..errors import BadCall, Diverged
from ..volumes import Volume, read_volume
from .batches import Batches
from .cache import PrefixCache
from .fit import Asked, plain
from .losses import segmentation_loss
from .patches import padded

PREFIX_BYTES = 2 << 30
NAME = "query"

Loss = Callable[..., Tensor]


def transduce(
    host: Host,
    volume: str | Path | Volume,
    adapter: str,
    *,
    support: Batches | None = None,
    priors: Priors | None = None,
    steps: int = 50,
    lr: float = 1e-3,
    weight: float = 1.0,
    trust: bool = False,
    loss: Loss = segmentation_loss,
    seed: int = 0,
    probabilities: bool = False,
) -> np.ndarray:
    """What `host.predict(volume, adapter)` says after the adapter was fitted to the volume: labels (X, Y, Z) uint8 on its own grid, or
    `probabilities` (K, X, Y, Z). Host and adapter stay as they are.

    `support` are the labelled patches (Eq. 3; without them see the top of the file) and `loss` theirs, `priors` replace the adapter's own,
    `weight` is lambda. AdamW at a constant rate. Raises BadCall for an adapter of pictures, without parameters or without priors, BadData
    for a volume that cannot be read, Diverged where the loss is no longer finite.
    """
    if steps < 1 or not lr > 0 or not weight >= 0:
        raise BadCall(f"transduce wants steps >= 1, lr > 0 and weight >= 0; got {steps}, {lr}, {weight}")
    source = volume if isinstance(volume, Volume) else read_volume(volume)
    twin = Host(host.backbone)
    made = copy.deepcopy(host._graft(adapter).adapter).requires_grad_(True)
    twin.add(made, NAME)
    query = Query(twin, NAME, source)
    constraint = Constraint(priors or priors_of(made), source, weight, trust=trust)
    if not (parameters := list(made.parameters())):
        raise BadCall(f"{adapter!r} has nothing to fit; transduction wants trained parts, such as a head")
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = made.task.probabilities(query.logits(twin, NAME).detach())
        for step in range(steps):
            optimiser.zero_grad(set_to_none=True)
            logits = query.logits(twin, NAME)
            total = constraint.cost(logits, made)
            total = total + (_agreement(logits, first) if support is None else _on(support, step, twin, made, loss))
            if not torch.isfinite(total):
                raise Diverged(f"the loss is {total.item()} at step {step + 1} of transduction; lower lr (now {lr:g})")
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
    made.eval()
    return predict_volume(twin, source, [NAME], probabilities=probabilities)[0]


def priors_of(adapter: Adapter) -> Priors:
    """The priors that travel in an adapter. Raises BadCall where there are none."""
    for _, part in adapter.named_parts():
        if isinstance(part, Priors):
            return part
    raise BadCall(
        "this adapter carries no size prior, so there is nothing to hold the query to; train it with the recipe fseft, or give "
        "priors=Priors.on(backbone, task, labels=...)"
    )


class Query:
    """One volume as an adapter sees it, cut into windows side by side. `logits` may be asked for as often as wanted."""

    def __init__(self, host: Host, name: str, volume: Volume, *, budget: int = PREFIX_BYTES) -> None:
        adapter, backbone = host.adapters[name], host.backbone
        prepare = adapter.preprocessing
        if not isinstance(prepare, VolumePreprocessing) or adapter.task.kind != "segment":
            raise BadCall(f"{name!r} does not segment volumes; transduction is for adapters that do")
        x = prepare(volume)
        self.space: Sequence[int] = x.shape[1:]
        window = prepare.window(self.space, backbone.spec)
        longer = [max(n, side) for n, side in zip(self.space, window, strict=True)]
        first = next(backbone.parameters())
        self.x = padded(x, torch.zeros(x.shape[1:], dtype=torch.int64), longer)[0].to(first)
        own = (slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(longer, self.space, strict=True))
        self.inside = (slice(None), slice(None), *own)
        self.places = [
            tuple(slice(i, i + side) for i, side in zip(at, window, strict=True)) for at in _corners(longer, window)
        ]
        self.cache = PrefixCache(backbone, host.cut(name), budget=budget)

    def logits(self, host: Host, name: str) -> Tensor:
        """(1, K, D, H, W) of the whole volume by the adapter `name` as it is now, with gradients."""

        def window(place: tuple[slice, ...]) -> Tensor:
            image = self.x[(slice(None), *place)][None]
            state = self.cache.states(image, [str(place)], [0])
            with _evaluating(host.adapters[name]):
                return host.resume(state, image, name)

        if len(self.places) == 1:
            return window(self.places[0])[self.inside].float()
        total, count = None, torch.zeros(self.x.shape[1:], device=self.x.device)
        for place in self.places:
            z = checkpoint(window, place, use_reentrant=False).float()
            total = z.new_zeros(1, z.shape[1], *self.x.shape[1:]) if total is None else total
            there = (slice(None), slice(None), *place)
            total[there] = total[there] + z
            count[place] += 1
        assert total is not None
        return (total / count)[self.inside]


@dataclass(repr=False)
class Constraint:
    """The priors' cost of one query volume, on its own or inside `fit`: give it as `loss` and its `forward`, for Eq. 3 from step `start` on."""

    priors: Priors
    volume: Volume
    weight: float = 1.0
    start: int = 0
    support: Loss = segmentation_loss
    trust: bool = False
    _without: frozenset[int] | None = field(default=None, init=False)
    _cost: Tensor | None = field(default=None, init=False)
    _query: Query | None = field(default=None, init=False)

    def cost(self, logits: Tensor, adapter: Adapter) -> Tensor:
        """lambda times the cost of the query's logits (1, K, D, H, W)."""
        p = adapter.task.probabilities(logits)[0]
        if self._without is None:
            task = adapter.task
            self._without = frozenset() if self.trust else self._unseen(task.decide(logits), task.classes)
        return self.weight * self.priors.cost(p if adapter.task.outputs == 1 else p[1:], self._without)

    def forward(self, asked: Asked) -> Tensor:
        """The usual forward pass of a step, and the query's cost beside it."""
        self._cost = None
        if asked.step >= self.start:
            if self._query is None:
                self._query = Query(asked.host, asked.name, self.volume)
            logits = self._query.logits(asked.host, asked.name)
            self._cost = self.cost(logits, asked.host.adapters[asked.name])
        return plain(asked)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The support's loss plus the cost that `forward` found."""
        own = self.support(*batch)
        return own if self._cost is None else own + self._cost

    def __repr__(self) -> str:
        """What a resumed run must have in common."""
        voxels = hashlib.sha256(self.volume.values.tobytes()).hexdigest()[:16]
        return f"Constraint({self.priors.each}, {voxels}, {self.weight}, {self.start}, {self.trust})"

    def _unseen(self, decided: Tensor, classes: Sequence[str]) -> frozenset[int]:
        """Classes with a target of which the answer has no voxel, with a warning."""
        unseen = [k for k, known in enumerate(self.priors.known) if known and not (decided == k + 1).any()]
        if unseen:
            warnings.warn(
                f"not one voxel of {', '.join(classes[k] for k in unseen)} was found in this volume: it may be absent, its prior is "
                "left out; trust=True applies it all the same",
                stacklevel=3,
            )
        return frozenset(unseen)


def _agreement(logits: Tensor, first: Tensor) -> Tensor:
    """Cross-entropy against the first answer (1, K, D, H, W), mean over voxels."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits, first)
    return functional.cross_entropy(logits, first)


def _on(support: Batches, step: int, host: Host, adapter: Adapter, loss: Loss) -> Tensor:
    """The loss of one batch of the support, the adapter in training mode."""
    batch = support.batch(step)
    own = next(host.backbone.parameters())
    adapter.train()
    told = () if batch.groups is None else (batch.groups.to(own.device),)
    return loss(host(batch.images.to(own), NAME).float(), batch.targets.to(own.device), *told)


@contextmanager
def _evaluating(adapter: Adapter) -> Iterator[None]:
    """The adapter in eval mode, and as it was afterwards."""
    was = adapter.training
    adapter.eval()
    try:
        yield
    finally:
        adapter.train(was)


def _corners(space: Sequence[int], window: Sequence[int]) -> list[tuple[int, ...]]:
    """First voxels of windows side by side that cover `space`; the last one of an axis ends where the space ends."""
    along = [[min(i, n - side) for i in range(0, n, side)] for n, side in zip(space, window, strict=True)]
    return [(i, j, k) for i in along[0] for j in along[1] for k in along[2]]
