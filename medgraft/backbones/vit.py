"""Vision transformers of timm: `vit_*`, `deit*`, DINOv2 (class VisionTransformer) and DINOv3 (class Eva, rotary positions).

stem    : patches, position embeddings (interpolated to any grid), cls and register tokens
stage i : block i; prompt tokens may enter before it
readout : the final norm; one map (B, C, H / patch, W / patch)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.models.eva as timm_eva
from torch import Tensor, nn

from ..errors import BadCall
from .base import Backbone, Spec
from .sites import Port, Site
from .state import Features, State


class Entrance(nn.Module):
    """Where a sequence enters a block. Prompt tokens are put in here, after the `prefix` tokens and in place of `prompts` old ones."""

    def forward(self, x: Tensor, prefix: int, prompts: int) -> Tensor:
        """(B, T, C) -> (B, T', C); as it is, without an adapter."""
        return x


BLOCK = {
    "norm1": "norm",
    "attn": "branch",
    "attn.qkv": "linear",
    "attn.q": "linear",
    "attn.k": "linear",
    "attn.v": "linear",
    "attn.proj": "linear",
    "norm2": "norm",
    "mlp": "branch",
    "mlp.fc1": "linear",
    "mlp.fc2": "linear",
}
"""The leaves of a transformer block, in order, and the kinds of site that they are."""
FED = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
"""Of a block that normalises first: the linear layers that alone read a norm's output, and that norm."""


def block_sites(
    i: int,
    prefix: str,
    path: str,
    width: int,
    block: nn.Module,
    names: Mapping[str, str],
    *,
    folded: bool = False,
    fed: Mapping[str, str] = {},
) -> list[Site]:
    """The sites of one transformer `block`. `names` maps canonical leaves (`attn.qkv`, `mlp.fc1`, ...) to module paths below `path`.

    `fed` maps linear leaves to the norms whose output they alone read.
    """
    sites = []
    for leaf, kind in BLOCK.items():
        inside = folded and leaf.startswith("attn")
        name = f"{prefix}.{leaf}"
        if leaf in names:
            module: Any = block.get_submodule(names[leaf])
            fan_in, fan_out = (module.in_features, module.out_features) if kind == "linear" else (width, width)
            norm = f"{prefix}.{fed[leaf]}" if fed.get(leaf) in names else ""
            where = f"{path}.{names[leaf]}"
            sites.append(Site(name, kind, i, fan_in, fan_out, name, where, folded=inside, norm=norm))
        elif leaf in ("attn.q", "attn.k", "attn.v") and "attn.qkv" in names:
            fused: Any = block.get_submodule(names["attn.qkv"])
            third = fused.out_features // 3
            start = "qkv".index(leaf[-1]) * third
            port, where = f"{prefix}.attn.qkv", f"{path}.{names['attn.qkv']}"
            sites.append(Site(name, kind, i, fused.in_features, third, port, where, (start, start + third), inside))
    return sites


class ViT(Backbone):
    """timm's VisionTransformer and Eva behind one interface."""

    family = "vit"
    network: Any  # timm's VisionTransformer or Eva

    def __init__(self, network: Any, spec: Spec) -> None:
        self.rotary = isinstance(network, timm_eva.Eva)
        if self.rotary and getattr(network, "rope_mixed", False):
            raise BadCall(
                f"{spec.id}: rotary positions that differ by block are not supported; use a DINOv3 or plain ViT"
            )
        self.depth = len(network.blocks)
        self.prefix = network.num_prefix_tokens
        super().__init__(network, spec)
        entrances = (
            [] if self.rotary else [Port(Entrance(), f"blocks.{i}.tokens", self.owner) for i in range(self.depth)]
        )
        self.entrances = nn.ModuleList(entrances)

    def _sites(self) -> list[Site]:
        sites = []
        width = self.network.embed_dim
        for i, block in enumerate(self.network.blocks):
            prefix = f"blocks.{i}"
            if (
                not self.rotary
            ):  # attention there rotates all but a fixed number of tokens: prompts would be rotated too
                sites.append(Site(f"{prefix}.tokens", "tokens", i, width, width, f"{prefix}.tokens", ""))
            present = {name for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
            leaves = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")
            names = {leaf: leaf for leaf in leaves if leaf in present}
            if {"attn.q_proj", "attn.k_proj", "attn.v_proj"} <= present:
                names |= {"attn.q": "attn.q_proj", "attn.k": "attn.k_proj", "attn.v": "attn.v_proj"}
            sites += block_sites(i, prefix, f"blocks.{i}", width, block, names, fed=FED)
        sites.append(Site("norm", "norm", self.depth, width, width, "norm", "norm"))
        return sites

    def stem(self, x: Tensor) -> State:
        """(B, C, H, W) -> tokens (B, prefix + N, width); a rotary table (N, 2d) travels along, expanded to the batch."""
        grid = self.network.patch_embed(x)  # (B, h, w, C): networks are built with dynamic_img_size
        meta = {"grid": tuple(grid.shape[1:3]), "prompts": 0}
        if not self.rotary:
            return State(self.network.norm_pre(self.network._pos_embed(grid)), 0, meta=meta)
        tokens, table = self.network._pos_embed(grid)
        kept = {} if table is None else {"rotary": table.expand(tokens.shape[0], *table.shape)}
        return State(self.network.norm_pre(tokens), 0, kept, meta)

    def stage(self, state: State) -> State:
        """One block."""
        block, x = self.network.blocks[state.stage], state.x
        if self.rotary:
            table = state.kept.get("rotary")
            return state.step(block(x, rope=None if table is None else table[0]))
        entered = self.entrances[state.stage](x, self.prefix, state.meta["prompts"])
        prompts = state.meta["prompts"] + entered.shape[1] - x.shape[1]
        return state.step(block(entered), meta={**state.meta, "prompts": prompts})

    def readout(self, state: State) -> Features:
        """The final norm, then the grid of patch tokens as a map; prompts are dropped."""
        h, w = state.meta["grid"]
        normed = self.network.norm(state.x)
        skip = self.prefix + state.meta["prompts"]

        def as_map(tokens: Tensor) -> Tensor:
            return tokens[:, skip:].transpose(1, 2).reshape(tokens.shape[0], -1, h, w)

        last = as_map(normed)
        pooled = normed[:, 0] if self.prefix else last.mean((2, 3))
        tokens = normed if skip == self.prefix else _without(normed, self.prefix, skip)
        return Features([last], list(self.spec.strides), pooled, as_map(state.x), tokens)

    @property
    def probe_side(self) -> int:
        """Two patches."""
        return 2 * self.spec.divisor


def _without(tokens: Tensor, start: int, stop: int) -> Tensor:
    import torch

    return torch.cat([tokens[:, :start], tokens[:, stop:]], 1)
