"""Swin transformers of timm (`swin_*`): windows are folded into the batch inside attention.

stem    : patch embedding, (B, h, w, C)
stage i : one block, with the level's patch merging in front of its first block
readout : one map a level, strides 4, 8, 16, 32; the last one after the final norm
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Backbone, Spec
from .sites import Site
from .state import Features, State
from .vit import block_sites


class Swin(Backbone):
    """timm's SwinTransformer. Finished levels travel in `State.kept`."""

    family = "swin"
    network: Any

    def __init__(self, network: Any, spec: Spec) -> None:
        self.steps = [(level, k) for level, layer in enumerate(network.layers) for k in range(len(layer.blocks))]
        self.depth = len(self.steps)
        super().__init__(network, spec)

    def _sites(self) -> list[Site]:
        sites = []
        names = {
            leaf: leaf for leaf in ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")
        }
        for i, (level, k) in enumerate(self.steps):
            block = self.network.layers[level].blocks[k]
            path = f"layers.{level}.blocks.{k}"
            sites += block_sites(i, path, path, block.dim, block, names, folded=True)
        width = self.network.num_features
        sites.append(Site("norm", "norm", self.depth, width, width, "norm", "norm"))
        return sites

    def stem(self, x: Tensor) -> State:
        """(B, C, H, W) -> (B, H / 4, W / 4, width)."""
        return State(self.network.patch_embed(x), 0)

    def stage(self, state: State) -> State:
        """One block; before a level's first block the level before it is kept, then merged."""
        level, k = self.steps[state.stage]
        layer, x, kept = self.network.layers[level], state.x, state.kept
        if k == 0:
            if level:
                kept = {**kept, f"level{level - 1}": x}
            x = layer.downsample(x)
        return state.step(layer.blocks[k](x), kept=kept)

    def readout(self, state: State) -> Features:
        """Every level as (B, C, h, w)."""

        def as_map(x: Tensor) -> Tensor:
            return x.permute(0, 3, 1, 2)

        last = as_map(self.network.norm(state.x))
        levels = [as_map(state.kept[f"level{i}"]) for i in range(len(self.network.layers) - 1)]
        return Features([*levels, last], list(self.spec.strides), last.mean((2, 3)), as_map(state.x))
