"""3D networks of MONAI: SwinUNETR and the convolutional U-Net.

monai:swin_unetr@FILE                        weights, in the names of MONAI or of the published checkpoints (see volume_source)
random:monai:swin_unetr?feature_size=12      random weights; further options: see `volume_source.OPTIONS`
monai:unet@FILE, random:monai:unet?widths=16-32-64

SwinUNETR, in 14 stages; a convolution beside the transformer runs as early as it can, so that an adapter on a late level finds it done
stem        : patch embedding, (B, F, D / 2, H / 2, W / 2)
stages 0-7  : encoder1 (on the volume), encoder2, level 0, encoder3, level 1, encoder4, level 2, level 3 of the transformer
stages 8-13 : encoder10 (the bottleneck), decoder5, decoder4, decoder3, decoder2, decoder1
sites       : `layers.<level>.blocks.<k>.attn.qkv` and the like (see vit.BLOCK), `layers.<level>.downsample.reduction`,
              `encoder<i>.conv<j>`, `decoder<i>.up`, `decoder<i>.conv<j>`

UNet, one stage a level down, the bottom, one stage a level up
sites       : `down.<level>.<...>`, `bottom.<...>`, `up.<level>.<...>`, named below the level as MONAI names them

readout     : one map behind the site `embedding`, at full resolution, or of stride 2 for the UNet, whose last step up narrows to the
              classes at once and is its head; `extra["logits"]` of the pretrained head (site `head`), where there is one
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backbone, Spec
from .meshnet import conv_site, dense_features, end_sites
from .sites import Site
from .state import Features, State
from .vit import block_sites


class MonaiVolume(Backbone):
    """What MONAI's networks share: convolutions as sites, and a network that predicts at every voxel."""

    network: Any

    def convs(self, path: str, name: str, stage: int) -> list[Site]:
        """The sites of every convolution at and below `path`, called `name` and what MONAI calls them below it."""
        found = []
        for below, module in self.network.get_submodule(path).named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                pieces = ("up" if p == "transp_conv" else p for p in below.split("."))
                site = ".".join([name, *(p for p in pieces if p not in ("", "layer", "conv_block", "conv"))])
                found.append(conv_site(site, module, stage, f"{path}.{below}".strip(".")))
        return found


class SwinUNETR(MonaiVolume):
    """MONAI's SwinUNETR, without or with its head; see the top of the file."""

    family = "swin_unetr"
    STEPS = (
        ("encoder", 1),
        ("encoder", 2),
        ("level", 0),
        ("encoder", 3),
        ("level", 1),
        ("encoder", 4),
        ("level", 2),
        ("level", 3),
        ("encoder", 10),
        *(("decoder", i) for i in (5, 4, 3, 2, 1)),
    )
    depth = len(STEPS)

    def _sites(self) -> list[Site]:
        sites = []
        for stage, (what, i) in enumerate(self.STEPS):
            if what == "level":
                sites += self._level_sites(stage, i)
            else:
                sites += self.convs(f"{what}{i}", f"{what}{i}", stage)
        head = None if self.network.out is None else self.network.out.conv.conv
        return [*sites, *end_sites(self.depth, self.spec.width, head, "out.conv.conv")]

    def _level_sites(self, stage: int, level: int) -> list[Site]:
        names = {leaf: leaf for leaf in ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp")}
        names |= {"mlp.fc1": "mlp.linear1", "mlp.fc2": "mlp.linear2"}
        path, sites = f"swinViT.layers{level + 1}.0", []
        layer = self.network.get_submodule(path)
        if self.network.swinViT.use_v2:
            sites += self.convs(f"swinViT.layers{level + 1}c.0", f"layers.{level}", stage)
        for k, block in enumerate(layer.blocks):
            sites += block_sites(
                stage, f"layers.{level}.blocks.{k}", f"{path}.blocks.{k}", block.dim, block, names, folded=True
            )
        merge, name = layer.downsample.reduction, f"layers.{level}.downsample.reduction"
        return [
            *sites,
            Site(name, "linear", stage, merge.in_features, merge.out_features, name, f"{path}.downsample.reduction"),
        ]

    def stem(self, x: Tensor) -> State:
        """(B, C, D, H, W) -> (B, F, D / 2, H / 2, W / 2), the volume beside it."""
        return State(self.network.swinViT.patch_embed(x), 0, {"volume": x})

    def stage(self, state: State) -> State:
        """One of `STEPS`. What a decoder joins is kept as `skip<stride>` until then."""
        net, x, kept = self.network, state.x, dict(state.kept)
        what, i = self.STEPS[state.stage]
        if what == "level":
            if i == 3:
                kept["skip16"] = self._out(x)
            return state.step(self._level(i, x), kept=kept)
        if what == "decoder":
            return state.step(getattr(net, f"decoder{i}")(x, kept.pop(f"skip{2 ** (i - 1)}")), kept=kept)
        block = getattr(net, f"encoder{i}")
        if i == 10:
            return state.step(block(self._out(x)), kept=kept)
        kept[f"skip{2 ** (i - 1)}"] = block(kept.pop("volume") if i == 1 else self._out(x))
        return state.step(x, kept=kept)

    def _level(self, i: int, x: Tensor) -> Tensor:
        vit = self.network.swinViT
        if vit.use_v2:
            x = getattr(vit, f"layers{i + 1}c")[0](x.contiguous())
        return getattr(vit, f"layers{i + 1}")[0](x.contiguous())

    def _out(self, x: Tensor) -> Tensor:
        return self.network.swinViT.proj_out(x, self.network.normalize)

    def readout(self, state: State) -> Features:
        """decoder1's map at full resolution, and the head's logits where there is one."""
        return dense_features(state.x, self.network.embedding, self.network.out)

    @property
    def probe_side(self) -> int:
        """One position a window at the coarsest level, or two."""
        return self.spec.divisor


class VolumeUNet(MonaiVolume):
    """MONAI's UNet; see the top of the file. Its last step up narrows to the classes at once: it is the head, and the map has stride 2."""

    family = "volume_unet"

    def __init__(self, network: Any, spec: Spec) -> None:
        block, path, down, up = network.model, "model", [], []
        while isinstance(block, nn.Sequential) and len(block) == 3:
            down.append(f"{path}.0")
            up.append(f"{path}.2")
            block, path = block[1].submodule, f"{path}.1.submodule"
        self.levels = len(down)
        self.paths = [*down, path, *reversed(up)]
        self.depth = 2 * self.levels
        super().__init__(network, spec)

    def _sites(self) -> list[Site]:
        n, sites = self.levels, []
        for stage, path in enumerate(self.paths[:-1]):
            name = f"down.{stage}" if stage < n else "bottom" if stage == n else f"up.{2 * n - stage}"
            sites += self.convs(path, name, stage)
        return [
            *sites,
            *end_sites(self.depth, self.spec.width, None, ""),
            *self.convs(self.paths[-1], "head", self.depth),
        ]

    def stem(self, x: Tensor) -> State:
        """(B, C, D, H, W) -> the same."""
        return State(x, 0)

    def stage(self, state: State) -> State:
        """One level down, the bottom, or one level up; the skip is joined where MONAI joins it, at the end of the level below."""
        n, i, kept = self.levels, state.stage, dict(state.kept)
        x = self.network.get_submodule(self.paths[i])(state.x)
        if i < n:
            kept[f"skip{i}"] = x
        else:
            x = torch.cat([kept.pop(f"skip{2 * n - 1 - i}"), x], 1)
        return state.step(x, kept=kept)

    def readout(self, state: State) -> Features:
        """The map that enters the last step up, stride 2, and that step's logits at full resolution."""
        features = dense_features(state.x, self.network.embedding, self.network.get_submodule(self.paths[-1]))
        return replace(features, strides=[2])

    @property
    def probe_side(self) -> int:
        """The smallest side."""
        return self.spec.divisor
