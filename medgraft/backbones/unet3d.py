"""A 3D U-Net of valid convolutions without normalisation, for training on sparsely annotated scans and transfer from there.

random:volume:unet3d?filters=32&classes=1      weights drawn from the seed, as for training
volume:unet3d@FILE                             trained ones, as `save_network` leaves them; filters and classes are read off the file

Four levels of two 3x3x3 convolutions and ReLU; 2x2x2 max pooling, filters doubled at each; 2x2x2 transposed convolutions, the skip's
middle joined; a 1x1x1 convolution to the classes. An output voxel sees up to 44 voxels to every side, and 132^3 give 44^3.

A volume is not cut: the stem pads it with zeros by those 44 voxels (and up to three more to a side, cut off at the end, where the pooling
grid asks for them), so map and volume have the same voxels, and no layer inside pads. Sides divide by 4; 44 is the paper's patch.

stem      : the padded volume
stage 0-6 : down 0, down 1, down 2, bottom, up 2, up 1, up 0; sites `down.<i>.<0, 1>`, `bottom.<0, 1>`, `up.<i>.up`, `up.<i>.<0, 1>` (conv)
readout   : one map (B, filters, D, H, W) behind the site `embedding`; `extra["logits"]` of the site `head`

Source: the sparse-annotation transfer study, base model (32 filters, 4 levels, patch 132^3 in CT); the layout of Cicek et al. 2016
(arXiv:1606.06650), section 2, without its batch norm and with filters doubled only by pooling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BadCall, BadData, unknown
from .base import Backbone, Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint
from .meshnet import conv_site, dense_features, end_sites
from .registry import BackboneId, _allow, family
from .sites import Site
from .state import Features, State

LEVELS = 4
MARGIN = 44
"""What the valid convolutions take off each side: 4 at full resolution, 4 of 2 voxels, 4 of 4 and, at the bottom, 2 of 8."""
FILTERS = 32


class Double(nn.Module):
    """Two valid 3x3x3 convolutions with ReLU; before them, on the way up, the transposed convolution and the skip."""

    def __init__(self, fan_in: int, filters: int, below: int = 0) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(below, filters, 2, 2) if below else None
        self.convs = nn.ModuleList([nn.Conv3d(fan_in, filters, 3), nn.Conv3d(filters, filters, 3)])

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, *space) -> (B, filters, *space - 4), or twice the space less 4 on the way up."""
        if self.up is not None and skip is not None:
            x = self.up(x)
            x = torch.cat([middle(skip, x.shape[2:]), x], 1)
        for conv in self.convs:
            x = functional.relu(conv(x))
        return x


class UNet3DNetwork(nn.Module):
    """See the top of the file. As a module it is the plain network: (B, 1, *n) -> (B, classes, *(n - 88)), n = 4 mod 8."""

    def __init__(self, filters: int, classes: int) -> None:
        super().__init__()
        widths = [filters << i for i in range(LEVELS)]
        self.down = nn.ModuleList(Double(1 if not i else widths[i - 1], widths[i]) for i in range(LEVELS - 1))
        self.bottom = Double(widths[-2], widths[-1])
        self.up = nn.ModuleList(Double(2 * widths[i], widths[i], widths[i + 1]) for i in range(LEVELS - 1))
        self.head = nn.Conv3d(filters, classes, 1)
        self.embedding = nn.Identity()

    def draw(self, generator: torch.Generator) -> None:
        """Normal kernels of variance g / fan_in (He et al. 2015), g = 2 before a ReLU, which keeps activations alive without norms; biases zero."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.ConvTranspose3d):  # kernel = stride: an output sees one tap of each input
                    module.weight.normal_(0, module.in_channels**-0.5, generator=generator)
                elif isinstance(module, nn.Conv3d):
                    module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                else:
                    continue
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        skips = []
        for double in self.down:
            skips.append(double(x))
            x = functional.max_pool3d(skips[-1], 2)
        x = self.bottom(x)
        for i in reversed(range(LEVELS - 1)):
            x = self.up[i](x, skips[i])
        return self.head(x)


class UNet3D(Backbone):
    """See the top of the file."""

    family = "unet3d"
    depth = 2 * LEVELS - 1
    network: Any

    def _sites(self) -> list[Site]:
        names = [*(f"down.{i}" for i in range(LEVELS - 1)), "bottom", *(f"up.{i}" for i in reversed(range(LEVELS - 1)))]
        sites = []
        for stage, name in enumerate(names):
            double = self.network.get_submodule(name)
            if double.up is not None:
                sites.append(conv_site(f"{name}.up", double.up, stage, f"{name}.up"))
            sites += [conv_site(f"{name}.{k}", conv, stage, f"{name}.convs.{k}") for k, conv in enumerate(double.convs)]
        return [*sites, *end_sites(self.depth, self.spec.width, self.network.head, "head")]

    def stem(self, x: Tensor) -> State:
        """(B, 1, D, H, W) -> padded by `MARGIN`, and on to the next side that the pooling grid takes."""
        space = tuple(x.shape[2:])
        pads: list[int] = []
        for side in reversed(space):
            more = (4 - side) % 8
            pads += [MARGIN + more // 2, MARGIN + more - more // 2]
        return State(functional.pad(x, pads), 0, meta={"space": space})

    def stage(self, state: State) -> State:
        """One level. A level's map is kept until the way up has joined its middle."""
        i, net, kept = state.stage, self.network, dict(state.kept)
        pooled = state.x if i == 0 or i >= LEVELS else functional.max_pool3d(state.x, 2)
        if i < LEVELS - 1:
            kept[f"skip{i}"] = x = net.down[i](pooled)
        elif i == LEVELS - 1:
            x = net.bottom(pooled)
        else:
            level = self.depth - 1 - i
            x = net.up[level](pooled, kept.pop(f"skip{level}"))
        return state.step(x, kept=kept)

    def readout(self, state: State) -> Features:
        """The last map on the volume's own voxels, and the head's logits."""
        return dense_features(middle(state.x, state.meta["space"]), self.network.embedding, self.network.head)

    @property
    def probe_side(self) -> int:
        """The smallest side without a remainder."""
        return 4


def middle(x: Tensor, space: Any) -> Tensor:
    """The middle of x (B, C, *larger) with size `space`; where the rest is odd, one voxel more is cut behind."""
    for axis, side in enumerate(space, start=2):
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


@family("volume")
def _volume(id: BackboneId, image_size: int | None) -> Backbone:
    """`volume:unet3d@FILE` and `random:volume:unet3d?filters=32&classes=1&seed=0`."""
    if id.name != "unet3d":
        raise unknown("volume network", id.name, ["unet3d"])
    _allow(id, *(("seed", "filters", "classes") if id.random else ()))
    side = MARGIN if image_size is None else image_size
    if side < 4 or side % 4:
        raise BadCall(f"{id}: image size {side} does not fit; it must be a multiple of 4, such as {MARGIN}")
    if id.random:
        sizes = {"filters": str(FILTERS), "classes": "1"} | dict(id.options)
        if not all(sizes[k].isdecimal() and int(sizes[k]) for k in ("filters", "classes")):
            raise BadCall(f"{id}: filters and classes are positive whole numbers")
        network = UNet3DNetwork(int(sizes["filters"]), int(sizes["classes"]))
        network.draw(torch.Generator().manual_seed(id.seed()))
        tensors = network.state_dict()
    elif id.path is None:
        raise BadData(
            f"asked for {id}: no weights of it ship with medgraft; give a file, as in {id}@PATH, or random:{id}"
        )
    else:
        tensors = read_tensors(Path(id.path))
        network = _network_of(tensors, str(id), Path(id.path).name)
    width = network.head.in_channels
    spec = Spec(
        id=str(id),
        family=UNet3D.family,
        fingerprint=fingerprint(tensors),
        random=id.random,
        image_size=side,
        divisor=4,
        mean=(0.0,),
        std=(1.0,),
        width=width,
        widths=(width,),
        strides=(1,),
        channels=1,
        dims=3,
        spacing=(1.0, 1.0, 1.0),
    )
    return UNet3D(network.float(), spec)


def _network_of(tensors: dict[str, Tensor], what: str, file: str) -> UNet3DNetwork:
    head = tensors.get("head.weight")
    if head is None or head.ndim != 5:
        raise BadData(f"{file} holds no weights of {what}: head.weight (classes, filters, 1, 1, 1) is missing")
    network = UNet3DNetwork(head.shape[1], head.shape[0])
    fill(network, tensors, what)
    return network
