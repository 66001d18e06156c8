"""Ids, options and checkpoints of the 3D networks.

A checkpoint's own shapes say which SwinUNETR or UNet it is; an option that disagrees with them is refused. Names are brought to MONAI's:

    MONAI                    swinViT.*, encoder1..4, encoder10, decoder1..5, out.conv.conv.*
    self-supervised          (module.)patch_embed.*, layers<i>.0.blocks.<k>.mlp.fc1.*: an encoder alone; the rest is drawn with ?decoder=random
    CLIP-driven universal    (module.)backbone.*, beside organ_embedding, GAP, precls_conv, controller: no head of its own
    FSEFT foundation         (module.)swin_vit.* or swinViT.*, classifier.{weight,bias}: the head
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import BadCall, BadData, unknown
from .base import Backbone, Spec
from .checkpoint import fill, read_tensors
from .identity import fingerprint, redraw
from .registry import BackboneId, _allow, family
from .volume import SwinUNETR, VolumeUNet

OPTIONS: dict[str, dict[str, str]] = {
    "swin_unetr": {
        "feature_size": "48",
        "depths": "2-2-2-2",
        "heads": "3-6-12-24",
        "window": "7",
        "v2": "0",
        "channels": "1",
        "classes": "14",
    },
    "unet": {"widths": "16-32-64-128-256", "res": "2", "norm": "instance", "channels": "1", "classes": "2"},
}
"""Options of each network and their defaults. Lists are joined by hyphens."""

RENAMES = (
    (r"^(module\.)?(backbone\.|network\.)?", ""),
    (r"^swin_vit\.", "swinViT."),
    (r"^(patch_embed\.|layers\d)", r"swinViT.\1"),
    (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
    (r"^classifier\.", "out.conv.conv."),
)
FOREIGN = r"^(organ_embedding|precls_conv\.|GAP\.|controller\.|text_to_vision\.|rotation_(head|pre)|contrastive_(head|pre)|conv\.|norm\.|mask_token)"
"""Tensors of the checkpoints' own training tasks. They are part of the fingerprint and otherwise dropped."""


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under MONAI's names, without those of another task."""
    found = {}
    for name, t in tensors.items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if not re.match(FOREIGN, name):
            found[name] = t
    return found


def swin_options(tensors: Mapping[str, Tensor], what: str) -> dict[str, str]:
    """The options of the SwinUNETR that `tensors`, by MONAI's names, belong to. Raises BadData where they are another's."""
    patch = tensors.get("swinViT.patch_embed.proj.weight")
    blocks = [
        re.match(r"swinViT\.layers(\d)\.0\.blocks\.(\d+)\.attn\.relative_position_bias_table", n) for n in tensors
    ]
    depths = [sum(1 for b in blocks if b and b[1] == str(level)) for level in (1, 2, 3, 4)]
    if patch is None or patch.ndim != 5 or not all(depths):
        some = ", ".join(sorted(tensors)[:3])
        raise BadData(
            f"{what} is no SwinUNETR checkpoint: swinViT.patch_embed.proj.weight and four levels are wanted, it has {some}"
        )
    tables = [tensors[f"swinViT.layers{i}.0.blocks.0.attn.relative_position_bias_table"] for i in (1, 2, 3, 4)]
    head = tensors.get("out.conv.conv.weight")
    return {
        "feature_size": str(patch.shape[0]),
        "depths": "-".join(map(str, depths)),
        "heads": "-".join(str(t.shape[1]) for t in tables),
        "window": str((round(tables[0].shape[0] ** (1 / 3)) + 1) // 2),
        "v2": str(int(any(".layers1c." in name for name in tensors))),
        "channels": str(patch.shape[1]),
        "classes": "1" if head is None else str(head.shape[0]),
    }


def unet_options(tensors: Mapping[str, Tensor], what: str) -> dict[str, str]:
    """The options of the UNet that `tensors` belong to, as `swin_options`. Strides leave no trace in a file: they are taken to be 2."""

    def first(path: str) -> Tensor | None:
        return tensors.get(f"{path}.conv.unit0.conv.weight", tensors.get(f"{path}.conv.weight"))

    path, found = "model", []
    while (level := first(f"{path}.0")) is not None:
        found.append(level)
        path += ".1.submodule"
    bottom = first(path)
    last = tensors.get("model.2.1.conv.unit0.conv.weight")
    last = tensors.get("model.2.conv.weight") if last is None else last.transpose(0, 1)  # transposed: (in, out, ...)
    if not found or bottom is None or last is None or bottom.ndim != 5:
        some = ", ".join(sorted(tensors)[:3])
        raise BadData(f"{what} is no checkpoint of MONAI's 3D UNet: model.0 and the like are wanted, it has {some}")
    return {
        "widths": "-".join(str(t.shape[0]) for t in (*found, bottom)),
        "res": str(sum(bool(re.fullmatch(r"model\.0\.conv\.unit\d+\.conv\.weight", name)) for name in tensors)),
        "norm": "batch" if any(name.endswith("running_mean") for name in tensors) else "instance",
        "channels": str(found[0].shape[1]),
        "classes": str(last.shape[1]),
    }


def _numbers(id: BackboneId, options: Mapping[str, str], name: str, count: int | None = None) -> list[int]:
    """The whole numbers of an option; `count` of them where it is given."""
    pieces = options[name].split("-")
    least = 0 if name in ("v2", "res") else 1
    if not all(p.isdecimal() and int(p) >= least for p in pieces) or len(pieces) != (count or len(pieces)):
        form = "a whole number" if count == 1 else f"{count or 'some'} whole numbers joined by hyphens"
        raise BadCall(f"{id}: {name} is {form}, such as {OPTIONS[id.name][name]}; got {options[name]!r}")
    return [int(p) for p in pieces]


def swin_network(id: BackboneId, options: Mapping[str, str]) -> nn.Module:
    """MONAI's SwinUNETR as the options say. Raises BadCall for options that do not fit together."""
    from monai.networks.nets import SwinUNETR as Network  # slow to import

    def one(name: str) -> int:
        return _numbers(id, options, name, 1)[0]

    size, heads = one("feature_size"), _numbers(id, options, "heads", 4)
    if size % 12 or any((size << level) % h for level, h in enumerate(heads)):
        raise BadCall(
            f"{id}: feature_size must be a multiple of 12 and, doubled at each level, divide by that level's heads; "
            f"got {size} and heads {heads}"
        )
    return Network(
        in_channels=one("channels"),
        out_channels=one("classes"),
        depths=_numbers(id, options, "depths", 4),
        num_heads=heads,
        window_size=one("window"),
        feature_size=size,
        use_v2=bool(one("v2")),
    )


def unet_network(id: BackboneId, options: Mapping[str, str]) -> nn.Module:
    """MONAI's UNet as the options say."""
    from monai.networks.nets import UNet as Network

    widths = _numbers(id, options, "widths")
    if len(widths) < 3:
        raise BadCall(
            f"{id}: widths names the channels of three or more levels, such as 16-32-64; got {options['widths']!r}"
        )
    if options["norm"] not in ("instance", "batch"):
        raise BadCall(f"{id}: norm is instance or batch, got {options['norm']!r}")
    channels, classes, res = (_numbers(id, options, name, 1)[0] for name in ("channels", "classes", "res"))
    return Network(3, channels, classes, widths, [2] * (len(widths) - 1), num_res_units=res, norm=options["norm"])


def drawn(network: nn.Module, seed: int) -> None:
    """Random weights at unit gain; the slopes of PReLU, which `redraw` takes for a norm's, stay where MONAI starts them."""
    redraw(network, seed)
    for module in network.modules():
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.25)


@family("monai")
def _monai(id: BackboneId, image_size: int | None) -> Backbone:
    """`monai:NAME?options@FILE` and `random:monai:NAME?options`."""
    if id.name not in OPTIONS:
        raise unknown("monai network", id.name, OPTIONS)
    if not id.random and id.path is None:
        raise BadData(
            f"asked for {id}: no weights of it ship with medgraft; give their file, as in {id}@PATH, or ask for random:{id}"
        )
    return (_swin if id.name == "swin_unetr" else _unet)(id, image_size)


def _swin(id: BackboneId, image_size: int | None) -> Backbone:
    stated = dict(id.options)
    filled = not id.random and stated.get("decoder") == "random"  # an encoder from the file, the rest from a seed
    drawing = ("seed",) if id.random else ("seed", "decoder") if filled else ()
    _allow(id, *OPTIONS["swin_unetr"], *drawing)
    options = OPTIONS["swin_unetr"] | {name: value for name, value in stated.items() if name not in drawing}
    source: Mapping[str, Tensor] = {}
    if id.path is not None:
        source = read_tensors(Path(id.path))
        options = _agreed(id, swin_options(renamed(source), Path(id.path).name), stated)
    network = swin_network(id, options)
    if id.random or filled:
        drawn(network, id.seed())
    if id.path is not None:
        tensors = renamed(source)
        if "out.conv.conv.weight" not in tensors:
            network.out = cast(Any, None)
        _load(network, tensors, str(id), encoder_alone=filled)
    width = _numbers(id, options, "feature_size")[0]
    spec = _spec(id, network if id.random or filled else source, options, image_size, 32, width)
    return SwinUNETR(_ready(network), spec)


def _agreed(id: BackboneId, found: dict[str, str], stated: Mapping[str, str]) -> dict[str, str]:
    """What a file's shapes say. Raises BadData where an id's options say something else."""
    for name, value in stated.items():
        if name in found and found[name] != value:
            file = Path(str(id.path)).name
            raise BadData(f"{id} asks for {name}={value}, {file} has {name}={found[name]}; leave it away")
    return found


def _unet(id: BackboneId, image_size: int | None) -> Backbone:
    _allow(id, *OPTIONS["unet"], *(("seed",) if id.random else ()))
    options, source, tensors = OPTIONS["unet"] | dict(id.options), {}, {}
    if id.path is not None:
        source = read_tensors(Path(id.path))
        tensors = {re.sub(RENAMES[0][0], "", name): t for name, t in source.items()}
        options = _agreed(id, unet_options(tensors, Path(id.path).name), dict(id.options))
    network = unet_network(id, options)
    if id.random:
        drawn(network, id.seed())
    else:
        _load(network, tensors, str(id))
    widths, bottom = _numbers(id, options, "widths"), 1 if options["norm"] == "batch" else 2
    divisor = 2 ** (len(widths) - 1)
    spec = _spec(id, source or network, options, image_size, divisor, 2 * widths[0], stride=2, bottom=bottom)
    return VolumeUNet(_ready(network), spec)


def _ready(network: nn.Module) -> nn.Module:
    """The network in float32 with the module that stands at the site `embedding`."""
    network.embedding = nn.Identity()
    return network.float()


def _spec(
    id: BackboneId,
    source: Mapping[str, Tensor] | nn.Module,
    options: Mapping[str, str],
    image_size: int | None,
    divisor: int,
    width: int,
    *,
    stride: int = 1,
    bottom: int = 2,
) -> Spec:
    """The facts of a network whose tensors were read, or drawn where `source` is the network itself. Instance norms need a `bottom` of 2."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    side, channels = 96 if image_size is None else image_size, int(options["channels"])
    if side < divisor or side % divisor:
        usual = max(96 // divisor, 1) * divisor
        raise BadCall(f"{id}: image size {side} does not fit; it must be a multiple of {divisor}, such as {usual}")
    return Spec(
        id=str(id),
        family=SwinUNETR.family if id.name == "swin_unetr" else VolumeUNet.family,
        fingerprint=fingerprint(tensors),
        random=isinstance(source, nn.Module),
        image_size=side,
        divisor=divisor,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        width=width,
        widths=(width,),
        strides=(stride,),
        channels=channels,
        dims=3,
        bottom=bottom,
    )


def _load(network: nn.Module, tensors: Mapping[str, Tensor], what: str, *, encoder_alone: bool = False) -> None:
    """All tensors, or with `encoder_alone` those of the transformer. Raises BadData where some are missing, unknown or of another shape."""
    hint = "is it a checkpoint of another network?"
    if not encoder_alone and all(name.startswith("swinViT.") for name in tensors):
        hint = "it is an encoder alone: ?decoder=random draws the rest from a seed"

    def optional(name: str) -> bool:
        return name.endswith("relative_position_index") or (encoder_alone and not name.startswith("swinViT."))

    fill(network, tensors, what, hint=hint, optional=optional)
