"""A dry run: what an adapter would touch, cost and allow on a backbone, without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.sam_attention import SamAttention
from ..backbones.sites import Operation, Plan, following
from ..errors import MedgraftError
from ..kernels.door import Path
from .adapter import Adapter
from .graft import Acts, Graft
from .host import Host
from .norm_lora import joined
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
    attention: dict[str, int]
    """Which way the backbone's own attention goes, each with its number of blocks; empty where it has no kernel of its own."""


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
    paths, attention = paths_taken(graft, backbone)
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
        paths=paths,
        attention=attention,
    )


@torch.no_grad()
def paths_taken(graft: Graft, backbone: Backbone) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """See `Facts.paths` and `Facts.attention`: every part and every block is asked at its port in one forward pass."""
    names = {id(part): name for name, part in graft.adapter.named_parts()}
    found: dict[str, dict[str, int]] = {}
    attention: dict[str, int] = {}

    def asking(acts: Acts, operation: Operation) -> Operation:
        def asked(inner: Any, *inputs: Any, **options: Any) -> Any:
            if isinstance(inner, SamAttention):
                _count(attention, inner.path(*inputs))
            for i, (part, sites) in enumerate(acts):
                # Only the first stands on the frozen module; one that runs with the norm in front of it is alone.
                path = _with_norm(operation, inputs) or part.path(sites, operation if i else inner, *inputs)
                if path is not None:
                    _count(found.setdefault(names[id(part)], {}), path)
            return operation(inner, *inputs, **options)

        return asked

    branches = {site.port: _plain for site in backbone.sites.values() if site.kind == "branch"}
    planned = {**branches, **graft.plan.operations}
    operations = {port: asking(graft.ports.get(port, []), run) for port, run in planned.items()}
    with following(Plan(backbone.owner, operations)):
        backbone(_blank(graft.adapter, backbone))
    return found, attention


def _plain(inner: Any, *inputs: Any, **options: Any) -> Any:
    return inner(*inputs, **options)


def _with_norm(operation: Operation, inputs: tuple[Any, ...]) -> Path | None:
    carried = joined(inputs[0]) if inputs else None
    return carried.path if carried is not None and operation == carried.maker.at_linear else None


def _count(ways: dict[str, int], path: Path) -> None:
    ways[str(path)] = ways.get(str(path), 0) + 1


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
