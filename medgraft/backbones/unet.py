"""MONAI's 2D U-Net as a network to train from scratch: a baseline, never a frozen backbone worth adapting.

random:unet:16-32-64-128?seed=0      channels of each level, drawn from the seed by MONAI's own initialisation
unet:16-32-64-128@PATH               a trained one, as `save_network` leaves it

stem    : the image as it is
stage 0 : the whole network; it has no sites
readout : one map (B, C, H, W) at the image's own size, C the channels of the first level
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BadCall, BadData
from .base import Backbone, Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint
from .registry import BackboneId, _allow, family
from .sites import Site
from .state import Features, State

IMAGE_SIZE = 128


class UNet(Backbone):
    """One stage around MONAI's network; see the top of the file."""

    family = "unet"
    depth = 1

    def stem(self, x: Tensor) -> State:
        """(B, 3, H, W) -> the same."""
        return State(x, 0)

    def stage(self, state: State) -> State:
        """The network."""
        return state.step(self.network(state.x))

    def readout(self, state: State) -> Features:
        """The last map."""
        return Features([state.x], [1], state.x.mean((2, 3)), state.x)

    def _sites(self) -> list[Site]:
        return []


@family("unet")
def _unet(id: BackboneId, image_size: int | None) -> Backbone:
    _allow(id, *(("seed",) if id.random else ()))
    from monai.networks.nets import UNet as MonaiUNet  # slow to import

    levels = id.name.split("-")
    if len(levels) < 2 or not all(width.isdecimal() and int(width) for width in levels):
        raise BadCall(f"{id}: a U-Net is named by the channels of two or more levels, as in random:unet:16-32-64-128")
    if not id.random and id.path is None:
        raise BadData(
            f"asked for {id}: no trained U-Net ships with medgraft; give a file (unet:{id.name}@PATH) or random:"
        )
    channels = [int(width) for width in levels]
    side, divisor = image_size or IMAGE_SIZE, 2 ** (len(channels) - 1)
    if side < 2 * divisor or side % divisor:  # instance norm needs more than one pixel at the bottom
        raise BadCall(
            f"{id}: image size {side} does not fit; it must be a multiple of {divisor}, {2 * divisor} or more"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(id.seed() if id.random else 0)
        network: nn.Module = MonaiUNet(2, 3, channels[0], channels, [2] * (len(channels) - 1), num_res_units=2)
    tensors = network.state_dict() if id.random else read_tensors(Path(str(id.path)))
    fill(network, tensors, str(id))
    spec = Spec(
        id=str(id),
        family=UNet.family,
        fingerprint=fingerprint(tensors),
        random=id.random,
        image_size=side,
        divisor=divisor,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        width=channels[0],
        widths=(channels[0],),
        strides=(1,),
    )
    return UNet(network, spec)
