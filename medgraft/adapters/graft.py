"""How adapters meet a backbone: an adapter resolved against it, the plan of a call, and plain modules for export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..backbones.base import Backbone
from ..backbones.sites import Operation, Plan, Site, first_stage
from ..backbones.state import Features
from ..backbones.weights import Weights
from ..errors import BadCall, WrongBackbone, unknown
from .adapter import Adapter
from .lora import LoRA
from .norm_lora import with_norm
from .part import Part, refuse_uncalled

Acts = list[tuple[Part, tuple[Site, ...]]]


@dataclass(frozen=True)
class Graft:
    """An adapter resolved against a backbone: what acts at which port, and from which stage on. Changes neither."""

    adapter: Adapter
    ports: Mapping[str, Acts]
    first: int
    plan: Plan

    @staticmethod
    def of(backbone: Backbone, adapter: Adapter) -> Graft:
        """Raises UnknownName, BadCall for a part that does not fit the backbone's sites."""
        ports: dict[str, Acts] = {}
        touched: list[Site] = []
        for readout in adapter.readouts:
            readout.check(backbone)
        for name, part in adapter.site_parts.items():
            sites = [_site(backbone, name, part, site, shape) for site, shape in part.sites.items()]
            part.check(backbone)
            refuse_uncalled(backbone, sites)
            touched += sites
            by_port: dict[str, list[Site]] = {}
            for site in sites:
                by_port.setdefault(site.port, []).append(site)
            for port, own in by_port.items():
                acts = ports.setdefault(port, [])
                if part.innermost and acts:
                    raise BadCall(
                        f"part {name!r} ({part.kind}) must stand directly on the frozen layer, but {acts[-1][0].kind!r} acts at {port} "
                        "before it; put it first"
                    )
                acts.append((part, tuple(own)))
        operations: dict[str, Operation] = {}
        for port, acts in ports.items():
            part, own_sites = acts[0]
            if len(acts) == 1 and isinstance(part, LoRA):
                operations |= with_norm(backbone, port, [(part, own_sites)], chain(acts), ports)
            else:
                operations[port] = chain(acts)
        return Graft(adapter, ports, first_stage(touched, none=backbone.depth), Plan(backbone.owner, operations))

    @property
    def mixable(self) -> bool:
        """True when rows of this adapter can share a call with rows of others, in the mode in which it is now."""
        return all(
            len(acts) == 1 and isinstance(acts[0][0], LoRA) and acts[0][0].mixable and acts[0][1][0].kind == "linear"
            for acts in self.ports.values()
        )

    def read(self, features: Features, image: Tensor) -> Tensor:
        """The readouts, in order: features and image -> logits."""
        out: Features | Tensor = features
        for readout in self.adapter.readouts:
            assert isinstance(out, Features)
            out = readout(out, image)
        assert isinstance(out, Tensor)
        return out


def _site(backbone: Backbone, name: str, part: Part, site: str, shape: Sequence[int]) -> Site:
    known = backbone.sites.get(site)
    if known is None:
        raise unknown(f"site (of part {name!r}) on {backbone.spec.id}", site, backbone.sites)
    if known.kind not in part.acts_on:
        raise BadCall(
            f"part {name!r} ({part.kind}) acts on {', '.join(part.acts_on)} sites; {site} of {backbone.spec.id} is a {known.kind}"
        )
    if (known.fan_in, known.fan_out) != tuple(shape):
        raise BadCall(
            f"part {name!r} was made for {shape[0]} -> {shape[1]} channels at {site}; {backbone.spec.id} has {known.fan_in} -> {known.fan_out} there"
        )
    return known


def chain(acts: Acts) -> Operation:
    """The operation of several parts at one port: the first stands on the frozen module, each next one on those before."""
    if len(acts) == 1:
        part, sites = acts[0]
        return partial(part.act, sites)

    def operation(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for part, sites in acts:
            inner = partial(part.act, sites, inner)
        return inner(*args, **kwargs)

    return operation


def mixed_plan(
    backbone: Backbone, grafts: Sequence[Graft | None], slot_of_row: Sequence[int], device: torch.device
) -> Plan:
    """One plan for rows with different adapters: `slot_of_row[i]` indexes `grafts`. All of them must be mixable."""
    rows = torch.tensor(slot_of_row)
    operations: dict[str, Operation] = {}
    for port in dict.fromkeys(port for g in grafts if g is not None for port in g.ports):
        slots: list[tuple[LoRA, tuple[Site, ...]]] = []
        ids = torch.full_like(rows, -1)
        for k, graft in enumerate(grafts):
            if graft is not None and port in graft.ports:
                ((part, sites),) = graft.ports[port]
                assert isinstance(part, LoRA)
                ids[rows == k] = len(slots)
                slots.append((part, sites))
        own = ids.to(device)
        operations |= with_norm(backbone, port, slots, partial(LoRA.mix, slots, own), operations, own)
    return Plan(backbone.owner, operations)


# Plain modules, without ports and without selection.


class Grafted(nn.Module):
    """A frozen module with the parts that act on it, as one ordinary module."""

    def __init__(self, base: nn.Module, acts: Acts) -> None:
        super().__init__()
        self.base = base
        self.acting = nn.ModuleList(part for part, _ in acts)
        self.sites = [sites for _, sites in acts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output under the parts."""
        inner: Callable[..., Any] = self.base
        for part, sites in zip(self.acting, self.sites, strict=True):
            inner = partial(part.act, sites, inner)  # type: ignore[arg-type,operator,misc]
        return inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Plain(nn.Module):
    """A backbone without ports and one adapter, as an ordinary module: image batch in, logits out."""

    def __init__(self, backbone: Backbone, graft: Graft, kept: Adapter) -> None:
        super().__init__()
        self.backbone = backbone
        self._graft = Graft(kept, graft.ports, graft.first, graft.plan)
        self.readouts = nn.ModuleList(kept.readouts)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits."""
        x, n = self.backbone.checked(x), self.backbone.rows_at_once
        if n is None:  # no loop over rows in an exported graph
            return self._graft.read(self.backbone(x), x)
        return torch.cat([self._graft.read(self.backbone(some), some) for some in x.split(n)])


class Fixed(Plain):
    """As `Plain`, sharing the frozen tensors and holding one adapter's tensors in buffers that `swap` overwrites."""

    def __init__(self, backbone: Backbone, graft: Graft, kept: Adapter) -> None:
        super().__init__(backbone, graft, kept)
        self._made_of = _make(kept)

    def swap(self, adapter: Adapter) -> None:
        """Copy another adapter's tensors into this module.

        Raises BadCall unless parts, sites and shapes are the same, WrongBackbone for an adapter of other weights.
        """
        mine, theirs = self._graft.adapter.backbone, adapter.backbone
        if theirs.fingerprint not in (mine.fingerprint, self.backbone.spec.fingerprint):
            raise WrongBackbone(
                f"this module was made of {mine.id} (fingerprint {mine.fingerprint[:12]}), the adapter is for {theirs.id} "
                f"(fingerprint {theirs.fingerprint[:12]}); make `host.fixed(...)` on that backbone"
            )
        if _make(adapter) != self._made_of:
            raise BadCall(
                "only adapters of the same parts, configurations and shapes swap by copy; make another `host.fixed(...)`"
            )
        slots = self._graft.adapter.tensors()  # asked for now: casting and moving replace buffers
        with torch.no_grad():
            for name, t in adapter.tensors().items():
                slots[name].copy_(t)


def _make(adapter: Adapter) -> list[Any]:
    return [
        (name, p.kind, p.config, p.sites, {k: tuple(t.shape) for k, t in p.tensors().items()})
        for name, p in adapter.named_parts()
    ]


def folded(backbone: Backbone, adapter: Adapter) -> Plain:
    """A new plain module: foldable parts merged into copies of the frozen layers, others standing behind theirs."""
    kept = copy.deepcopy(adapter).eval().requires_grad_(False)
    graft = Graft.of(backbone, kept)

    def stand_in(port: str, base: nn.Module) -> nn.Module:
        rest: Acts = []
        for part, sites in graft.ports.get(port, []):
            if part.foldable and not rest and isinstance(base, nn.Linear | nn.LayerNorm | Weights | _ConvNd):
                base = part.fold(sites, base)
            else:
                rest.append((part, sites))
        return Grafted(base, rest) if rest else base

    return Plain(backbone.plain_copy(stand_in, share=False), graft, kept)


def fixed(backbone: Backbone, adapter: Adapter) -> Fixed:
    """A plain module sharing the frozen tensors; see `Fixed`."""
    kept = copy.deepcopy(adapter).eval()
    for module in kept.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                del module._parameters[name]
                module.register_buffer(name, p.detach().clone())
    graft = Graft.of(backbone, kept)

    def stand_in(port: str, base: nn.Module) -> nn.Module:
        acts = graft.ports.get(port, [])
        return Grafted(base, acts) if acts else base

    return Fixed(backbone.plain_copy(stand_in, share=True), graft, kept)
