"""SAM's weights: transformers checkpoints, original `segment_anything` checkpoints, random ones; for any input size.

    hf:facebook/sam-vit-base             every checkpoint of transformers' class SamModel (SlimSAM, MedSAM-style)
    sam:vit_b@sam_vit_b_01ec64.pth       the original file (vit_b, vit_l, vit_h), read without executing anything in it
    random:sam-tiny, random:sam:vit_b    random weights at unit gain

Another input size resizes the position embeddings (bilinear) and the global blocks' relative positions (linear), as SAMed does;
windows keep theirs. The fingerprint is that of the tensors as read, before any of this.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BadCall, BadData, unknown
from .base import Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint, redraw
from .sam import Sam, resized_positions
from .timm_source import hub_file

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """An architecture: encoder width, depth, heads, global blocks; input side, window; width of the decoder."""

    width: int
    depth: int
    heads: int
    globals: tuple[int, ...]
    image: int = 1024
    window: int = 14
    out: int = 256
    mlp: int = 2048
    decoder_heads: int = 8
    patch: int = 16


SIZES = {
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": Size(32, 3, 2, (1,), image=128, window=3, out=32, mlp=64, decoder_heads=2),
    "starter": Size(256, 6, 4, tuple(range(6)), image=128, out=128, mlp=512, decoder_heads=4, patch=8),
}


def network_of(size: Size, image: int | None = None) -> Any:
    """transformers' SamModel of this architecture, at input side `image`."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    side = image or size.image
    vision = SamVisionConfig(
        hidden_size=size.width,
        output_channels=size.out,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        image_size=side,
        patch_size=size.patch,
        window_size=size.window,
        global_attn_indexes=list(size.globals),
        num_pos_feats=size.out // 2,
    )
    prompt = SamPromptEncoderConfig(hidden_size=size.out, image_size=side, patch_size=size.patch)
    decoder = SamMaskDecoderConfig(
        hidden_size=size.out, mlp_dim=size.mlp, num_attention_heads=size.decoder_heads, iou_head_hidden_dim=size.out
    )
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return SamModel._from_config(config, attn_implementation="sdpa")


def random_sam(id: str, name: str, seed: int, image_size: int | None) -> Sam:
    """A SAM with random weights at unit gain, drawn from the seed at the architecture's own input size."""
    if name not in SIZES:
        raise unknown("SAM architecture", name, SIZES)
    network = network_of(SIZES[name])
    draw(network, seed)
    return wrap(id, network, network.state_dict(), image_size, random=True)


def draw(network: Any, seed: int) -> None:
    """Random weights at unit gain, as `identity.redraw`, but for what lives on another scale.

    The prompt encoder's Gaussian matrix is N(0, 1), as published; relative positions are N(0, 1 / D), so that they are seen beside
    the scores of queries and keys.
    """
    redraw(network, seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            scale = {"positional_embedding": 1.0, "rel_pos_h": p.shape[-1] ** -0.5, "rel_pos_w": p.shape[-1] ** -0.5}
            leaf = name.rpartition(".")[2]
            if leaf in scale:
                key = hashlib.sha256(f"{seed}|{leaf}|{name}".encode()).digest()
                g = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
                p.copy_(torch.randn(p.shape, generator=g) * scale[leaf])


def load_original(id: str, name: str, path: Path, image_size: int | None) -> Sam:
    """An original `segment_anything` checkpoint. Raises BadData for one of another size, which is named, or incomplete."""
    if name not in SIZES:
        raise unknown("SAM architecture", name, [n for n in SIZES if n.startswith("vit")])
    tensors = read_tensors(path)
    found = size_of(tensors)
    if found is None:
        raise BadData(
            f"{path.name} is no segment_anything checkpoint: it has no image_encoder.pos_embed; for transformers' form use hf:NAME@DIRECTORY"
        )
    if found != name:
        raise BadData(
            f"asked for {id}: {path.name} holds a SAM {found}, not a {name}; ask for sam:{found}@{path.name}"
            if found in SIZES
            else f"asked for {id}: {path.name} holds a SAM of {found}, which is none of {', '.join(SIZES)}"
        )
    network = network_of(SIZES[name])
    renamed = {theirs: t for ours, t in tensors.items() if (theirs := renamed_key(ours)) is not None}
    load(network, renamed, id)
    return wrap(id, network, tensors, image_size)


def size_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The architecture that original tensors are of, by width and depth; a description where it is none of ours."""
    table = tensors.get("image_encoder.pos_embed")
    if table is None:
        return None
    blocks = {m[1] for name in tensors if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", name))}
    for name, size in SIZES.items():
        if (size.width, size.depth) == (table.shape[-1], len(blocks)):
            return name
    return f"width {table.shape[-1]} with {len(blocks)} blocks"


RENAMED = (
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (
        r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "shared_image_embedding.positional_embedding",
    ),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.)norm(\d)\.", r"\1layer_norm\2."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^(mask_decoder\.output_hypernetworks_mlps\.\d+|mask_decoder\.iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (
        r"^(mask_decoder\.output_hypernetworks_mlps\.\d+|mask_decoder\.iou_prediction_head)\.layers\.1\.",
        r"\1.layers.0.",
    ),
    (
        r"^(mask_decoder\.output_hypernetworks_mlps\.\d+|mask_decoder\.iou_prediction_head)\.layers\.2\.",
        r"\1.proj_out.",
    ),
)
"""Original names to transformers', first match first, then the next rule on what it gave."""


def renamed_key(name: str) -> str | None:
    """transformers' name of an original tensor; None for the pixel statistics, which are no weights."""
    if name in ("pixel_mean", "pixel_std"):
        return None
    for pattern, new in RENAMED:
        fresh, count = re.subn(pattern, new, name)
        if count:
            # A block is renamed in two steps at most: its number, then its norms. One rule covers each, so the first match ends it.
            return fresh
    return name


def load(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """`fill`, the one tensor that transformers has under two names given to both."""
    twin, first = "prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding"
    either = tensors.get(first, tensors.get(twin))
    shared = {} if either is None else {twin: either, first: either}
    fill(network, {**shared, **tensors}, what, hint="is it a checkpoint of another size?")


def load_hf(id: Any, config: Any, where: str, image_size: int | None) -> Sam:
    """A transformers checkpoint of class SamModel, complete or not at all."""
    from transformers import SamModel

    file = (
        Path(where) / "model.safetensors"
        if Path(where).is_dir()
        else hub_file(where, "model.safetensors", f"hf:{id.name}@PATH")
    )
    tensors = read_tensors(file)
    network = SamModel._from_config(config, attn_implementation="sdpa")
    load(network, tensors, str(id))
    commit = None if Path(where).is_dir() else file.parent.name
    return wrap(str(id), network, tensors, image_size, commit=commit)


def load_starter(id: str, path: Path, image_size: int | None) -> Sam:
    """`medgraft:starter-sam`: weights by transformers' names, as `recipes.starter_sam` writes them. Raises BadData."""
    network, tensors = network_of(SIZES["starter"]), read_tensors(path)
    load(network, tensors, id)
    return wrap(id, network, tensors, image_size)


def wrap(
    id: str,
    network: Any,
    tensors: Mapping[str, Tensor],
    image_size: int | None,
    *,
    random: bool = False,
    commit: str | None = None,
) -> Sam:
    """The backbone around a loaded SamModel, at another input size where one is asked for."""
    print_of_tensors = fingerprint(tensors)
    network.float()
    config = network.config.vision_config
    native, patch = config.image_size, config.patch_size
    side = native if image_size is None else image_size
    if side < patch or side % patch:
        raise BadCall(
            f"{id}: image size {side} does not fit; it must be a multiple of {patch}, such as {max(1, round(side / patch)) * patch}"
        )
    if side != native:
        resize(network, side)
    spec = Spec(
        id=id,
        family=Sam.family,
        fingerprint=print_of_tensors,
        random=random,
        image_size=side,
        divisor=patch,
        mean=MEAN,
        std=STD,
        width=config.output_channels,
        widths=(config.output_channels,),
        strides=(patch,),
        channels=config.num_channels,
        commit=commit,
        fit="pad",
    )
    return Sam(network, spec)


@torch.no_grad()
def resize(network: Any, side: int) -> None:
    """Make `network` one for inputs of `side` pixels: its own position tables, resized once."""
    encoder = network.vision_encoder
    patch = encoder.config.patch_size
    grid = side // patch
    if encoder.pos_embed is not None:
        encoder.pos_embed = nn.Parameter(resized_positions(encoder.pos_embed, (grid, grid)).clone())
    for layer in encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = getattr(layer.attn, name)
                fresh = functional.interpolate(table.T[None], 2 * grid - 1, mode="linear")[0].T.contiguous()
                setattr(layer.attn, name, nn.Parameter(fresh))
    network.config.vision_config.image_size = encoder.image_size = side
    encoder.patch_embed.image_size = (side, side)
    network.config.prompt_encoder_config.image_size = network.prompt_encoder.input_image_size = side
    network.config.prompt_encoder_config.image_embedding_size = grid
    network.prompt_encoder.image_embedding_size = (grid, grid)
