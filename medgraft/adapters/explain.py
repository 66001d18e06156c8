"""A dry run: what an adapter would touch, cost and allow on a backbone, without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.sites import Operation, Plan, following
from ..errors import MedgraftError
from .adapter import Adapter
from .graft import Acts, Graft
from .host import Host
from .peft import why_not_exportable
from .store import stored_as
from .volume_task import VolumePreprocessing


@dataclass(frozen=True)
class PartFacts:
    """One part: its kind, the sites that it hits, its parameters, and what it says of itself."""

    name: str
    kind: str
    sites: tuple[str, ...]
    parameters: int
    silent: bool
    note: str
    foldable: bool
    mixable: bool


@dataclass(frozen=True)
class Facts:
    """See `explain`. Sizes in bytes; `activations` for one image, kept for the backward pass."""

    backbone: str
    size: int
    parts: tuple[PartFacts, ...]
    trainable: int
    bytes: dict[str, int]
    activations: int
    first_stage: int
    depth: int
    mixable: bool
    foldable: bool
    not_for_peft: str | None
    paths: dict[str, dict[str, int]]
    """By part: which way its operations go on one image, each with its number of ports."""


def explain(adapter: Adapter, backbone: Backbone) -> Facts:
    """Which sites `adapter` hits on `backbone`, what it costs, and whether it folds, mixes and exports to plain peft.

    The activation memory is measured: one forward pass of one image, counting every tensor that autograd keeps. Raises what
    `Host.add` would raise.
    """
    graft = Graft.of(backbone, adapter)
    size = adapter.preprocessing.size
    parts = tuple(
        PartFacts(
            name,
            p.kind,
            tuple(p.sites),
            sum(t.numel() for t in p.parameters()),
            p.silent,
            p.why_not_silent,
            p.foldable,
            p.mixable,
        )
        for name, p in adapter.named_parts()
    )
    tensors = adapter.tensors().items()
    try:
        not_for_peft = why_not_exportable(adapter)
    except MedgraftError as reason:
        not_for_peft = str(reason)
    site_parts = [f for f in parts if f.sites]
    return Facts(
        backbone=backbone.spec.title,
        size=size,
        parts=parts,
        trainable=adapter.trainable,
        bytes={
            dtype: sum(t.numel() * stored_as(name, t, dtype).itemsize for name, t in tensors)
            for dtype in ("float16", "float32")
        },
        activations=kept_for_backward(adapter, backbone),
        first_stage=graft.first,
        depth=backbone.depth,
        mixable=graft.mixable,
        foldable=all(f.foldable for f in site_parts),
        not_for_peft=not_for_peft,
        paths=paths_taken(graft, backbone),
    )


@torch.no_grad()
def paths_taken(graft: Graft, backbone: Backbone) -> dict[str, dict[str, int]]:
    """See `Facts.paths`: every part is asked at every port in one forward pass."""
    names = {id(part): name for name, part in graft.adapter.named_parts()}
    found: dict[str, dict[str, int]] = {}

    def asking(acts: Acts, operation: Operation) -> Operation:
        def asked(inner: Any, *inputs: Any, **options: Any) -> Any:
            for i, (part, sites) in enumerate(acts):
                path = part.path(
                    sites, operation if i else inner, *inputs
                )  # only the first stands on the frozen module
                if path is not None:
                    ways = found.setdefault(names[id(part)], {})
                    ways[str(path)] = ways.get(str(path), 0) + 1
            return operation(inner, *inputs, **options)

        return asked

    operations = {port: asking(graft.ports[port], run) for port, run in graft.plan.operations.items()}
    with following(Plan(backbone.owner, operations)):
        backbone(_blank(graft.adapter, backbone))
    return found


def _blank(adapter: Adapter, backbone: Backbone) -> Tensor:
    """One image of the adapter's size, or one patch, of zeros."""
    own = adapter.preprocessing
    space = own.patch if isinstance(own, VolumePreprocessing) else (own.size, own.size)
    p = next(backbone.parameters())
    return torch.zeros(1, backbone.spec.channels, *space, device=p.device, dtype=p.dtype)


def kept_for_backward(adapter: Adapter, backbone: Backbone) -> int:
    """Bytes that autograd keeps for one image of the adapter's size, or one patch, parameters not counted."""
    known = {t.untyped_storage().data_ptr() for t in [*backbone.parameters(), *adapter.parameters()]}
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    host = Host(backbone)
    host.add(adapter, "explained", allow_mismatch=True)
    x: Any = _blank(adapter, backbone)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        host(x, "explained")
    return sum(kept.values())
