"""ViT, DINO and DINOv2 of transformers, by the checkpoint's `model_type`, with the same sites as timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Backbone, Spec
from .sites import Port, Site
from .state import Features, State
from .vit import FED, Entrance, block_sites

MODEL_TYPES = ("vit", "dinov2")

# Canonical leaf -> where transformers keeps it, in the order of its releases.
LEAVES: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before", "norm1"),
    "attn": ("attention",),
    "attn.q": ("attention.q_proj", "attention.attention.query"),
    "attn.k": ("attention.k_proj", "attention.attention.key"),
    "attn.v": ("attention.v_proj", "attention.attention.value"),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "norm2": ("layernorm_after", "norm2"),
    "mlp": ("mlp",),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}


class HfViT(Backbone):
    """transformers' ViTModel and Dinov2Model without their poolers."""

    family = "hf_vit"
    network: Any

    def __init__(self, network: Any, spec: Spec) -> None:
        self.layers_path = "layers" if hasattr(network, "layers") else "encoder.layer"
        self.depth = len(network.get_submodule(self.layers_path))
        super().__init__(network, spec)
        self.entrances = nn.ModuleList(Port(Entrance(), f"blocks.{i}.tokens", self.owner) for i in range(self.depth))

    def _sites(self) -> list[Site]:
        sites = []
        width = self.network.config.hidden_size
        for i, layer in enumerate(self.network.get_submodule(self.layers_path)):
            present = {name for name, _ in layer.named_modules()}
            names = {leaf: path for leaf, paths in LEAVES.items() for path in paths if path in present}
            prefix = f"blocks.{i}"
            sites.append(Site(f"{prefix}.tokens", "tokens", i, width, width, f"{prefix}.tokens", ""))
            sites += block_sites(i, prefix, f"{self.layers_path}.{i}", width, layer, names, fed=FED)
        sites.append(Site("norm", "norm", self.depth, width, width, "norm", "layernorm"))
        return sites

    def stem(self, x: Tensor) -> State:
        """(B, C, H, W) -> tokens (B, 1 + N, width), positions interpolated to the grid."""
        patch = self.spec.divisor
        options = {"interpolate_pos_encoding": True} if self.network.config.model_type == "vit" else {}
        tokens = self.network.embeddings(x, **options)
        return State(tokens, 0, meta={"grid": (x.shape[2] // patch, x.shape[3] // patch), "prompts": 0})

    def stage(self, state: State) -> State:
        """One layer."""
        entered = self.entrances[state.stage](state.x, 1, state.meta["prompts"])
        prompts = state.meta["prompts"] + entered.shape[1] - state.x.shape[1]
        out = self.network.get_submodule(self.layers_path)[state.stage](entered)
        out = out[0] if isinstance(out, tuple) else out
        return state.step(out, meta={**state.meta, "prompts": prompts})

    def readout(self, state: State) -> Features:
        """The final norm; prompts are dropped."""
        import torch

        h, w = state.meta["grid"]
        prompts = state.meta["prompts"]
        raw = state.x if not prompts else torch.cat([state.x[:, :1], state.x[:, 1 + prompts :]], 1)
        normed = self.network.layernorm(raw)

        def as_map(tokens: Tensor) -> Tensor:
            return tokens[:, 1:].transpose(1, 2).reshape(tokens.shape[0], -1, h, w)

        return Features([as_map(normed)], list(self.spec.strides), normed[:, 0], as_map(raw), normed)

    @property
    def probe_side(self) -> int:
        """Two patches."""
        return 2 * self.spec.divisor
