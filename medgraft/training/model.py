"""From a directory or a hub id to a host that can answer: adapters and trained networks alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapters import Adapter, Host
from ..adapters.hub import fetch, load_adapter
from ..adapters.store import read_record
from ..backbones import Backbone, load_backbone
from ..errors import BadCall, BadData
from .network import is_network, load_network

NAME = "adapter"


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises BadCall for a name that torch does not know."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as refused:
        raise BadCall(
            f"device {device!r} is not to be had here ({str(refused).splitlines()[0]}); use auto or cpu"
        ) from None


def open_together(
    sources: Sequence[str], *, backbone: str | None = None, device: str = "auto"
) -> tuple[Host, dict[str, Adapter]]:
    """A host with the adapters of all `sources` resident, each under its source, on the backbone of the first or the one named.

    Raises BadCall for a source named twice, WrongBackbone for adapters of several backbones.
    """
    twice = sorted({s for s in sources if list(sources).count(s) > 1})
    if twice or not sources:
        said = f"{', '.join(twice)} is named twice; name each adapter once" if twice else "name one adapter or more"
        raise BadCall(said)
    where = choose_device(device)
    adapters = {source: load_adapter(source) for source in sources}
    first = adapters[sources[0]]
    host = Host(_frozen(first, backbone).to(where))
    for source, adapter in adapters.items():
        host.add(adapter, source)
    return host.eval(), adapters  # type: ignore[return-value]


def stored_dtype(sources: Sequence[str]) -> str:
    """The storage type that the adapters of all `sources` have in common, else float32."""
    kinds = {read_record(fetch(source))["dtype"] for source in sources}
    return kinds.pop() if len(kinds) == 1 else "float32"


def open_model(
    source: str,
    *,
    backbone: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    allow_mismatch: bool = False,
) -> tuple[Host, Adapter]:
    """A host with the adapter of `source` resident as `NAME`, on its own backbone or on the one named.

    A directory that holds a whole network is opened with its own weights.
    """
    where = choose_device(device)
    if is_network(Path(source)):
        if backbone is not None:
            raise BadCall(f"{source} is a network with weights of its own; leave --backbone away")
        frozen, adapter = load_network(Path(source))
    else:
        adapter = load_adapter(source, revision=revision)
        frozen = _frozen(adapter, backbone)
    host = Host(frozen.to(where))
    host.add(adapter, NAME, allow_mismatch=allow_mismatch)
    return host.eval(), adapter  # type: ignore[return-value]


def _frozen(adapter: Adapter, named: str | None) -> Backbone:
    """The backbone `named`, or the adapter's own by its id, which says nothing of where a file lies."""
    try:
        return load_backbone(named or adapter.backbone.id, image_size=adapter.preprocessing.size)
    except BadData as absent:
        if named is not None:
            raise
        raise BadData(f"this adapter's backbone is not at hand: {absent}; name it with --backbone") from None
