"""UniverSeg's weights: random ones, a checkpoint in the authors' names, of whatever widths its shapes say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadCall, BadData
from .base import Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint
from .universeg import WIDTHS, UniverSeg, UniverSegNet

RELEASED = "eedd25b13679d2f06ec4f9b59bcf02fc9205e06b"
"""The git blob id of the authors' `universeg_v1_nf64_ss64_STA.pt`."""


def blob_id(path: Path) -> str:
    """The id that git gives a file's contents."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def random_network(seed: int, widths: Sequence[int] = WIDTHS) -> UniverSegNet:
    """A network as its authors draw it, from `seed`."""
    network = UniverSegNet(widths)
    network.draw(torch.Generator().manual_seed(seed))
    return network


def network_of(tensors: Mapping[str, Tensor], what: str) -> UniverSegNet:
    """The network that `tensors` belong to, its widths read off their shapes. Raises BadData where they are another's."""
    widths: list[int] = []
    while (first := tensors.get(f"enc_blocks.{len(widths)}.cross.cross_conv.weight")) is not None:
        widths.append(first.shape[0])
    if len(widths) < 2:
        raise BadData(
            f"{what} is no UniverSeg checkpoint: it has no enc_blocks.0.cross.cross_conv.weight and the like; it has {_some(tensors)}"
        )
    network = UniverSegNet(widths)
    fill(
        network,
        {name: t.float() for name, t in tensors.items()},
        f"a UniverSeg of encoder widths {widths} ({what})",
        hint="decoder widths other than the encoder's in reverse are not supported",
    )
    return network


def _some(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(tensors)[:3])


def load(
    id: str, path: Path | None, *, random: bool, seed: int, widths: Sequence[int], image_size: int | None
) -> UniverSeg:
    """The backbone behind `id`. Without a path the weights are random. Raises BadData, BadCall."""
    side = 128 if image_size is None else image_size
    if side < 1:
        raise BadCall(f"{id}: image size must be positive, got {side}")
    if random or path is None:
        network, tensors = random_network(seed, widths), None
    else:
        tensors = read_tensors(path)
        network = network_of(tensors, path.name)
    width = network.widths[0]
    spec = Spec(
        id=id,
        family=UniverSeg.family,
        fingerprint=fingerprint(network.state_dict() if tensors is None else tensors),
        random=random,
        image_size=side,
        divisor=1,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        width=width,
        widths=(width,),
        strides=(1,),
        channels=1,
    )
    return UniverSeg(network, spec)
