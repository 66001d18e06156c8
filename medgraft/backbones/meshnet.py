"""MeshNet: a stack of dilated 3x3x3 convolutions at full resolution, trained on brain MRI.

    h_0 = x,   h_i = a(W_i * h_{i-1} + b_i),  i = 1 .. 9, dilation 1, 2, 4, 8, 16, 8, 4, 2, 1;   logits = V h_9 + c  (1x1x1)

meshnet:model18cls@PATH              real weights (Brainchop's): 21 channels, 18 subcortical classes, a = ELU
meshnet:model30chan50cls@PATH        30 channels, 50 cortical classes, a = ELU
meshnet:model5_gw_ae@PATH            5 channels, background, white and grey matter, a = ReLU
random:meshnet:model18cls?seed=0     the same architecture with random weights
...?surround=M                       for crops: M voxels of the volume's mirror image around it

stem    : the volume (B, 1, D, H, W), axes L, I, A, 1 mm, in [0, 1] between its 2nd and 98th percentile, and what surrounds it
stage i : one convolution and its activation; sites `layers.<i>` (conv)
readout : one map (B, channels, D, H, W) behind the site `embedding`; `extra["logits"]` (B, classes, D, H, W) of the site `head`

The networks were trained on whole heads and see 46 voxels to each side. On a crop of a few centimetres what they see is mostly the zeros
that convolutions are padded with, and every voxel comes out as background; with its mirror image around it a crop looks like tissue
that goes on. A stage keeps no more of the surroundings than later ones can see, so the result is that of the whole canvas and late
adapters pay nothing for it.

Source: Fedorov et al. 2017 (arXiv:1612.00940), section 2; weights of Masoud et al. 2023, Brainchop (JOSS 8(83)), MIT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadCall, BadData, unknown
from .base import Backbone, Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint, redraw
from .registry import BackboneId, _allow, family
from .sites import Site
from .state import Features, State

DILATIONS = (1, 2, 4, 8, 16, 8, 4, 2, 1)
MODELS: dict[str, tuple[int, int, type[nn.Module]]] = {
    "model5_gw_ae": (5, 3, nn.ReLU),
    "model18cls": (21, 18, nn.ELU),
    "model30chan50cls": (30, 50, nn.ELU),
}
"""Channels, classes and activation of each published network."""


class MeshNetwork(nn.Module):
    """The layers by the names of the published files: `layers.<i>.weight`, `layers.<i>.bias`, the classifier last."""

    def __init__(self, channels: int, classes: int, activation: type[nn.Module]) -> None:
        super().__init__()
        widths = [1] + [channels] * len(DILATIONS)
        convs = [
            nn.Conv3d(a, b, 3, padding=d, dilation=d) for a, b, d in zip(widths, widths[1:], DILATIONS, strict=False)
        ]
        self.layers = nn.ModuleList([*convs, nn.Conv3d(channels, classes, 1)])
        self.activation = activation()
        self.embedding = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> logits (B, classes, D, H, W)."""
        *convs, classifier = self.layers
        for conv in convs:
            x = self.activation(conv(x))
        return classifier(x)


class MeshNet(Backbone):
    """See the top of the file."""

    family = "meshnet"
    depth = len(DILATIONS)
    network: Any

    def __init__(self, network: nn.Module, spec: Spec, surround: int = 0) -> None:
        super().__init__(network, spec)
        self.surround = surround

    def _sites(self) -> list[Site]:
        *convs, head = self.network.layers
        sites = [conv_site(f"layers.{i}", conv, i, f"layers.{i}") for i, conv in enumerate(convs)]
        return [*sites, *end_sites(self.depth, head.in_channels, head, f"layers.{self.depth}")]

    def margin(self, stage: int) -> int:
        """Voxels around the volume that a state holds after `stage` stages: what later stages see, `surround` at most."""
        return min(self.surround, sum(DILATIONS[stage:]))

    def stem(self, x: Tensor) -> State:
        """(B, 1, D, H, W) -> the same with its surroundings."""
        return State(mirrored(x, self.margin(0)), 0)

    def stage(self, state: State) -> State:
        """One convolution and the activation; then what no later stage sees is cut off."""
        x = self.network.activation(self.network.layers[state.stage](state.x))
        cut = self.margin(state.stage) - self.margin(state.stage + 1)
        return state.step(x[(..., *(slice(cut, n - cut) for n in x.shape[2:]))] if cut else x)

    def readout(self, state: State) -> Features:
        """The last layer's map, and the classifier's logits."""
        return dense_features(state.x, self.network.embedding, self.network.layers[self.depth])

    @property
    def probe_side(self) -> int:
        """Any side is legal: nothing is strided."""
        return 4


def mirrored(x: Tensor, margin: int) -> Tensor:
    """(B, C, ...) with `margin` voxels of its mirror image at both ends of every axis (the outermost voxel is not repeated)."""
    if not margin:
        return x
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        period = max(1, 2 * n - 2)
        k = torch.arange(-margin, n + margin, device=x.device) % period
        x = x.index_select(axis, torch.where(k < n, k, period - k))
    return x


def conv_site(name: str, conv: Any, stage: int, path: str) -> Site:
    """The site of a convolution, plain or transposed, by its own channels."""
    return Site(name, "conv", stage, conv.in_channels, conv.out_channels, name, path)


def end_sites(depth: int, width: int, head: Any, path: str) -> list[Site]:
    """`embedding`, the final map of `width` channels, and `head`, the pretrained classifier at `path`, None where there is none.

    They act in the readout, behind every stage.
    """
    last = Site("embedding", "embedding", depth, width, width, "embedding", "embedding")
    return [last] if head is None else [last, conv_site("head", head, depth, path)]


def dense_features(x: Tensor, embedding: nn.Module, head: nn.Module | None) -> Features:
    """Features of a network that predicts at every voxel: one map, and `extra["logits"]` of the pretrained head where there is one."""
    last = embedding(x)
    logits = {} if head is None else {"logits": head(last)}
    return Features([last], [1], last.mean(tuple(range(2, last.ndim))), x, extra=logits)


@family("meshnet")
def _meshnet(id: BackboneId, image_size: int | None) -> Backbone:
    _allow(id, "surround", *(("seed",) if id.random else ()))
    if id.name not in MODELS:
        raise unknown("meshnet", id.name, MODELS)
    if not id.random and id.path is None:
        raise BadData(f"asked for {id}: give the file of its weights, as in meshnet:{id.name}@PATH, or ask for random:")
    side = 96 if image_size is None else image_size
    if side < 1:
        raise BadCall(f"{id}: image size must be positive, got {side}")
    stated = dict(id.options).get("surround", "0")
    if not stated.isdecimal():
        raise BadCall(f"{id}: surround is a number of voxels, such as 32; got {stated!r}")
    network = MeshNetwork(*MODELS[id.name])
    if id.random:
        redraw(network, id.seed(), gain=2**0.5)
    tensors = network.state_dict() if id.path is None else read_tensors(Path(id.path))
    fill(network, tensors, str(id))
    width = network.layers[-1].in_channels
    assert isinstance(width, int)
    spec = Spec(
        id=str(id),
        family=MeshNet.family,
        fingerprint=fingerprint(tensors),
        random=id.random,
        image_size=side,
        divisor=1,
        mean=(0.0,),
        std=(1.0,),
        width=width,
        widths=(width,),
        strides=(1,),
        channels=1,
        dims=3,
        axcodes="LIA",
        spacing=(1.0, 1.0, 1.0),
        intensity=("percentiles", 2.0, 98.0),
    )
    return MeshNet(network.float(), spec, int(stated))
