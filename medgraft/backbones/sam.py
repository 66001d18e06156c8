"""SAM: transformers' SamModel as stem, stages and readout over its image encoder, with a promptable decoder behind the readout.

stem    : patches and position embeddings (resized to any grid), (B, h, w, C)
stage i : block i, windowed or global
readout : the neck; one map (B, 256, h, w) at stride 16, `extra["encoder"]` the map before the neck (B, C, h, w), and `decoder`,
          which readout parts call with that map and with prompts (see `sam_decoder`)

Sites: `blocks.i.*` as of a ViT, `embedding` (the neck), `decoder.*`: linear, norm, conv layers of the mask decoder, and `prompt` sites
for its tokens. Everything of the decoder acts at the last stage, so adapters of it share the whole encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadCall
from .base import Backbone, Spec
from .prompts import PREFIX, Prompts
from .sam_attention import SamAttention
from .sam_decoder import SamDecoder
from .sites import Site
from .state import Features, State
from .vit import FED, block_sites

LEAVES = {
    "norm1": "layer_norm1",
    "attn": "attn",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "layer_norm2",
    "mlp": "mlp",
    "mlp.fc1": "mlp.lin1",
    "mlp.fc2": "mlp.lin2",
}

# Canonical leaf of a decoder layer -> path below it, and kind.
DECODER_LAYER = {
    **{
        f"{ours}.{leaf}": (f"{theirs}.{path}", "linear")
        for ours, theirs in (
            ("self_attn", "self_attn"),
            ("to_image", "cross_attn_token_to_image"),
            ("to_tokens", "cross_attn_image_to_token"),
        )
        for leaf, path in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj"))
    },
    "mlp.fc1": ("mlp.lin1", "linear"),
    "mlp.fc2": ("mlp.lin2", "linear"),
    **{f"norm{i}": (f"layer_norm{i}", "norm") for i in range(1, 5)},
}


class Sam(Backbone):
    """See the top of the file."""

    family = "sam"
    network: Any  # transformers' SamModel

    def __init__(self, network: Any, spec: Spec) -> None:
        self.depth = len(network.vision_encoder.layers)
        for layer in network.vision_encoder.layers:
            layer.attn = SamAttention(layer.attn, layer.window_size)
        super().__init__(network, spec)

    @property
    def decoder(self) -> SamDecoder:
        """The frozen decoder, its layers behind their ports."""
        return SamDecoder(self.network, self.spec.divisor)

    def _sites(self) -> list[Site]:
        encoder = self.network.vision_encoder
        width, out = encoder.config.hidden_size, encoder.config.output_channels
        sites = []
        for i, layer in enumerate(encoder.layers):
            path = f"vision_encoder.layers.{i}"
            sites += block_sites(i, f"blocks.{i}", path, width, layer, LEAVES, fed=FED)
        sites.append(Site("embedding", "embedding", self.depth, out, out, "embedding", "vision_encoder.neck"))
        for leaf in ("conv1", "conv2"):
            sites.append(self._module_site(f"neck.{leaf}", f"vision_encoder.neck.{leaf}", "conv"))
        sites += self._decoder_sites()
        return sites

    def _decoder_sites(self) -> list[Site]:
        mask = "mask_decoder"
        found = [
            self._module_site("decoder.iou_token", f"{mask}.iou_token", "prompt"),
            self._module_site("decoder.mask_tokens", f"{mask}.mask_tokens", "prompt"),
            self._module_site("decoder.no_mask", "prompt_encoder.no_mask_embed", "prompt"),
        ]
        for i in range(len(self.network.mask_decoder.transformer.layers)):
            for leaf, (path, kind) in DECODER_LAYER.items():
                full = f"{mask}.transformer.layers.{i}.{path}"
                found.append(self._module_site(f"decoder.layers.{i}.{leaf}", full, kind))
        last = f"{mask}.transformer.final_attn_token_to_image"
        for leaf, path in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj")):
            found.append(self._module_site(f"decoder.last.{leaf}", f"{last}.{path}", "linear"))
        found += [
            self._module_site("decoder.last.norm", f"{mask}.transformer.layer_norm_final_attn", "norm"),
            self._module_site("decoder.up1", f"{mask}.upscale_conv1", "conv"),
            self._module_site("decoder.up_norm", f"{mask}.upscale_layer_norm", "norm"),
            self._module_site("decoder.up2", f"{mask}.upscale_conv2", "conv"),
        ]
        for i, mlp in enumerate(self.network.mask_decoder.output_hypernetworks_mlps):
            found += self._mlp_sites(f"decoder.masks.{i}", f"{mask}.output_hypernetworks_mlps.{i}", mlp)
        head = self.network.mask_decoder.iou_prediction_head
        return found + self._mlp_sites("decoder.iou", f"{mask}.iou_prediction_head", head)

    def _mlp_sites(self, name: str, path: str, mlp: Any) -> list[Site]:
        order = ["proj_in", *(f"layers.{i}" for i in range(len(mlp.layers))), "proj_out"]
        return [self._module_site(f"{name}.{i}", f"{path}.{leaf}", "linear") for i, leaf in enumerate(order)]

    def _module_site(self, name: str, path: str, kind: str) -> Site:
        weight: Any = self.network.get_submodule(path).weight
        transposed = "up" in name and kind == "conv"  # a transposed convolution's weight is (in, out, k, k)
        if kind in ("norm", "prompt"):
            fan_in = fan_out = weight.shape[-1]
        else:
            fan_out, fan_in = weight.shape[:2][::-1] if transposed else weight.shape[:2]
        return Site(name, kind, self.depth, fan_in, fan_out, name, path, folded=name.startswith("decoder"))

    def stem(self, x: Tensor) -> State:
        """(B, 3, H, W) -> patches with their positions (B, h, w, C)."""
        encoder = self.network.vision_encoder
        tokens = encoder.patch_embed.projection(x).permute(0, 2, 3, 1)
        if encoder.pos_embed is not None:
            tokens = tokens + resized_positions(encoder.pos_embed, tokens.shape[1:3])
        return State(tokens, 0)

    def stage(self, state: State) -> State:
        """One block."""
        layer = self.network.vision_encoder.layers[state.stage]
        x = state.x + layer.attn(layer.layer_norm1(state.x))
        return state.step(x + layer.mlp(layer.layer_norm2(x)))

    def readout(self, state: State) -> Features:
        """The neck, and the decoder beside its map."""
        embedding = self.network.vision_encoder.neck(state.x)
        return Features(
            [embedding],
            list(self.spec.strides),
            embedding.mean((2, 3)),
            embedding,
            extra={"encoder": state.x.permute(0, 3, 1, 2), **state.riding},
            decoder=self.decoder,
            prompts=Prompts.of(state.kept),
        )

    def prompted(self, state: State, prompts: Prompts) -> State:
        """The state with prompts beside it, from where the readout hands them to the parts."""
        if prompts.rows != state.x.shape[0]:
            raise BadCall(
                f"prompts are given for {prompts.rows} images, the batch has {state.x.shape[0]}; give one row of prompts an image"
            )
        kept = {name: t for name, t in state.kept.items() if not name.startswith(PREFIX)}
        moved = {name: t.to(state.x.device) for name, t in prompts.kept().items()}
        return State(state.x, state.stage, {**kept, **moved}, state.meta)

    def _probe(self) -> None:
        """The encoder on two patches, then the decoder on every kind of prompt, so that each port is seen."""
        super()._probe()
        p = self._first_tensor
        side = 2
        embedding = torch.zeros(1, self.spec.width, side, side, device=p.device, dtype=p.dtype)
        points = torch.zeros(1, 1, 1, 2, device=p.device, dtype=p.dtype)
        asked = Prompts(points, torch.ones(1, 1, 1, dtype=torch.long, device=p.device))
        for multimask in (False, True):
            self.decoder(embedding, asked, multimask=multimask)

    @property
    def probe_side(self) -> int:
        """Two patches."""
        return 2 * self.spec.divisor


def resized_positions(table: Tensor, grid: tuple[int, int] | torch.Size) -> Tensor:
    """Position embeddings (1, h, w, C) for another grid, bilinear as in SAMed; the same tensor where the grid is its own."""
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    resized = functional.interpolate(
        table.permute(0, 3, 1, 2).float(), tuple(grid), mode="bilinear", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).to(table.dtype)
