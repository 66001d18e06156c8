"""`load_backbone(id)`: the grammar of ids and the families behind it.

[random:]FAMILY:NAME[?key=value&...][@PATH]

timm:vit_base_patch16_224            weights from the hub
timm:vit_base_patch16_224@file       weights from a file
hf:facebook/dinov2-base              a transformers checkpoint, by its model_type
random:timm:vit_tiny_patch16_224?seed=3
medgraft:starter-vit                 ships with the package
universeg:PATH                       the authors' checkpoint, or one of other widths; random:universeg?widths=16,16
hf:facebook/sam-vit-base             SAM, as transformers keeps it; sam:vit_b@FILE the original file; random:sam-tiny for tests
monai:swin_unetr@file                volumes; random:monai:swin_unetr?feature_size=12, monai:unet@file; see volume_source
meshnet:model18cls@file              volumes; random:meshnet:model18cls; see meshnet
volume:unet3d@file                   volumes; random:volume:unet3d?filters=32; see unet3d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from torch import Tensor, nn

from ..errors import BadCall, BadData, unknown
from . import timm_source, universeg_source
from .base import Backbone, Spec
from .checkpoint import read_tensors, refuse
from .hf_vit import MODEL_TYPES, HfViT
from .identity import fingerprint, redraw
from .swin import Swin
from .vit import ViT

STARTER_VIT: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 256,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "img_size": 128,
}


@dataclass(frozen=True)
class BackboneId:
    """A parsed id. `str()` gives the id without its path, which is what adapters record."""

    family: str
    name: str
    random: bool = False
    options: tuple[tuple[str, str], ...] = ()
    path: str | None = None

    def __str__(self) -> str:
        query = "?" + "&".join(f"{k}={v}" for k, v in self.options) if self.options else ""
        return f"{'random:' if self.random else ''}{self.family}{':' if self.name else ''}{self.name}{query}"

    def seed(self) -> int:
        """The seed that random weights are drawn from (0 unless `?seed=` says otherwise)."""
        value = dict(self.options).get("seed", "0")
        if not value.isdecimal():
            raise BadCall(f"{self}: seed must be a whole number, got {value!r}")
        return int(value)


Loader = Callable[[BackboneId, int | None], Backbone]
FAMILIES: dict[str, Loader] = {}
SINGLE = ("universeg", "sam-tiny")
"""Families of one architecture, which needs no name where it is random: `random:universeg`."""


def family(name: str) -> Callable[[Loader], Loader]:
    """Register the loader of an id's FAMILY."""

    def keep(loader: Loader) -> Loader:
        if name in FAMILIES:
            raise BadCall(f"backbone family {name!r} is already registered")
        FAMILIES[name] = loader
        return loader

    return keep


def parse(id: str) -> BackboneId:
    """Parse an id by the grammar on top of this file. Raises BadCall or UnknownName."""
    head, at, path = id.partition("@")
    is_random = head.startswith("random:")
    head = head.removeprefix("random:")
    path_less, _, query = head.partition("?")
    kind, _, name = path_less.partition(":")
    alone = is_random and kind in SINGLE
    if (not name and not alone) or (at and not path):
        raise BadCall(
            f"cannot read backbone id {id!r}; the form is [random:]FAMILY:NAME[?key=value][@PATH], as in medgraft:starter-vit"
        )
    if kind not in FAMILIES:
        raise unknown("backbone family", kind, FAMILIES)
    if is_random and path:
        raise BadCall(f"{id!r} asks for random weights and for a file; drop 'random:' or '@{path}'")
    return BackboneId(kind, name, is_random, tuple(parse_qsl(query, keep_blank_values=True)), path or None)


def load_backbone(id: str, *, image_size: int | None = None) -> Backbone:
    """Load a frozen backbone by id, for images of `image_size` pixels a side (default: its own).

    Raises UnknownName for a family or architecture that does not exist, BadCall for an id or size that does not fit, BadData
    for weights that cannot be had or do not fit.
    """
    parsed = parse(id)
    return FAMILIES[parsed.family](parsed, image_size)


def _allow(id: BackboneId, *names: str) -> None:
    for key, _ in id.options:
        if key not in names:
            hint = "" if id.random else "Seeds are for random: ids."
            raise unknown(f"option of {id.family} backbones", key, names, hint=hint)


@family("timm")
def _timm(id: BackboneId, image_size: int | None) -> Backbone:
    _allow(id, *(("seed",) if id.random else ()))
    from timm.models.eva import Eva
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    is_swin = id.name.startswith("swin_")
    try:
        network: Any = timm_source.build(
            id.name, **({"strict_img_size": False} if is_swin else {"dynamic_img_size": True})
        )
    except TypeError:  # a network of another family, which does not know the option
        network = None
    if not isinstance(network, VisionTransformer | Eva | SwinTransformer) or hasattr(network.patch_embed, "backbone"):
        raise BadCall(
            f"timm:{id.name} is not supported; the vit, deit, DINOv2, DINOv3 and swin families are, without a convolutional stem "
            "(swinv2 and beit read weights past their layers and could not be adapted honestly)"
        )
    return _from_timm(id, network, None if id.random else timm_source.source(network, id.name, id.path), image_size)


SHIPPED = {
    "starter-vit": "starter_vit.safetensors",
    "starter-universeg": "starter_universeg.safetensors",
    "starter-sam": "starter_sam.safetensors",
}


@family("medgraft")
def _medgraft(id: BackboneId, image_size: int | None) -> Backbone:
    """Networks that ship with the package."""
    if id.name not in SHIPPED:
        raise unknown("medgraft backbone", id.name, SHIPPED)
    _allow(id, *(("seed",) if id.random else ()))
    path = id.path or str(files("medgraft") / "weights" / SHIPPED[id.name])
    if id.name == "starter-universeg":
        return _load_universeg(id, Path(path), image_size)
    if id.name == "starter-sam":
        from . import sam_source

        if id.random:
            return sam_source.random_sam(str(id), "starter", id.seed(), image_size)
        return sam_source.load_starter(str(id), Path(path), image_size)
    network = starter_vit()
    return _from_timm(id, network, None if id.random else (read_tensors(Path(path)), None), image_size)


def starter_vit() -> nn.Module:
    """The architecture of `medgraft:starter-vit`: patch 8, 6 blocks of width 256, 4.8 M parameters."""
    from timm.models.vision_transformer import VisionTransformer

    network: Any = VisionTransformer(**STARTER_VIT, num_classes=0, dynamic_img_size=True)
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return network


def _from_timm(id: BackboneId, network: Any, weights: timm_source.Weights | None, image_size: int | None) -> Backbone:
    from timm.models import eva, swin_transformer, vision_transformer

    is_swin = isinstance(network, swin_transformer.SwinTransformer)
    if weights is None:
        redraw(network, id.seed())
        tensors, commit = network.state_dict(), None
    else:
        tensors, commit = weights
        convert = swin_transformer if is_swin else eva if isinstance(network, eva.Eva) else vision_transformer
        timm_source.load(network, tensors, convert.checkpoint_filter_fn, str(id))
    print_of_tensors = fingerprint(tensors)
    network.float()

    patch = network.patch_embed.patch_size[0]
    native = network.patch_embed.img_size[0]
    side = native if image_size is None else image_size
    divisor = patch * 2 ** (len(network.layers) - 1) if is_swin else patch
    if side < divisor or side % divisor:
        raise BadCall(
            f"{id}: image size {side} does not fit; it must be a multiple of {divisor}, such as {max(1, round(side / divisor)) * divisor}"
        )
    # timm's set_input_size is left alone: it scales the windows, and the same tensors would be another function.
    config = network.pretrained_cfg
    config = config if isinstance(config, dict) else config.to_dict()
    widths = tuple(info["num_chs"] for info in network.feature_info) if is_swin else (network.num_features,)
    spec = Spec(
        id=str(id),
        family=Swin.family if is_swin else ViT.family,
        fingerprint=print_of_tensors,
        random=id.random,
        image_size=side,
        divisor=divisor,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        width=network.num_features,
        widths=widths,
        strides=tuple(patch * 2**i for i in range(len(widths))),
        channels=network.patch_embed.proj.in_channels,
        commit=commit,
    )
    return (Swin if is_swin else ViT)(network, spec)


@family("universeg")
def _universeg(id: BackboneId, image_size: int | None) -> Backbone:
    """`universeg:PATH` and `universeg:NAME@PATH`; an adapter records `universeg:released`, or `universeg:custom` for other weights."""
    if id.random:
        _allow(id, "seed", "widths")
        return _load_universeg(id, None, image_size)
    _allow(id)
    path = Path(id.path or id.name)
    if id.path is None and id.name in ("released", "custom"):
        raise BadData(
            f"asked for {id}: UniverSeg's weights do not ship with medgraft; give the checkpoint's file, as in --backbone universeg:PATH "
            "(the authors publish universeg_v1_nf64_ss64_STA.pt)"
        )
    released = path.is_file() and universeg_source.blob_id(path) == universeg_source.RELEASED
    return _load_universeg(replace(id, name="released" if released else "custom", path=None), path, image_size)


def _load_universeg(id: BackboneId, path: Path | None, image_size: int | None) -> Backbone:
    stated = dict(id.options).get("widths", "")
    if stated and not all(w.isdecimal() and int(w) for w in stated.split(",")):
        raise BadCall(
            f"{id}: widths are whole numbers of channels, one an encoder block, such as 64,64,64,64; got {stated!r}"
        )
    widths = [int(w) for w in stated.split(",")] if stated else universeg_source.WIDTHS
    seed = id.seed() if id.random else 0
    return universeg_source.load(str(id), path, random=id.random, seed=seed, widths=widths, image_size=image_size)


@family("hf")
def _hf(id: BackboneId, image_size: int | None) -> Backbone:
    """A transformers checkpoint: a hub repository, or a local directory after `@`; by its `model_type`."""
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoConfig

    where = id.path or id.name
    if id.random:
        return _random_hf(id, image_size)
    _allow(id)
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, HfHubHTTPError) as missing:
        first = str(missing).strip().partition("\n")[0] or type(missing).__name__
        raise BadData(
            f"asked for {id}: no configuration to be had from {Path(where).name!r} ({first}); go online once, or give a directory: hf:{id.name}@PATH"
        ) from None
    model = HF_MODELS.get(config.model_type)
    if model is None:
        raise BadCall(f"{id} is a {config.model_type!r} checkpoint; supported model types: {', '.join(HF_MODELS)}")
    return model(id, config, where, image_size)


HF_MODELS: dict[str, Callable[[BackboneId, Any, str, int | None], Backbone]] = {}


HF_CLASSIFIER = ("pooler.", "vit.pooler.", "classifier.", "decoder.")
"""Tensors that a classifier or a pretraining task owns; they are part of the fingerprint all the same."""


def _hf_network(config: Any) -> type[nn.Module]:
    from transformers import Dinov2Model, ViTModel

    return {"vit": partial(ViTModel, add_pooling_layer=False), "dinov2": Dinov2Model}[config.model_type]  # type: ignore[return-value]


def _load_hf_vit(id: BackboneId, config: Any, where: str, image_size: int | None) -> Backbone:
    from transformers import Dinov2Model, ViTModel

    file = (
        Path(where) / "model.safetensors"
        if Path(where).is_dir()
        else timm_source.hub_file(where, "model.safetensors", f"hf:{id.name}@PATH")
    )
    tensors = read_tensors(file)
    cls: Any = ViTModel if config.model_type == "vit" else Dinov2Model
    extra = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    try:
        network, report = cls.from_pretrained(file.parent, output_loading_info=True, **extra)
    except (RuntimeError, ValueError, OSError) as misfit:
        raise BadData(
            f"{id}: the checkpoint does not fit its own config.json ({str(misfit).strip().splitlines()[-1]})"
        ) from None
    unexpected = [k for k in report["unexpected_keys"] if not k.startswith(HF_CLASSIFIER)]
    refuse(str(id), report["missing_keys"], unexpected, hint="is the checkpoint complete?")
    commit = None if Path(where).is_dir() else file.parent.name
    return _wrap_hf(id, network, tensors, commit, image_size, where=str(file.parent))


def _random_hf(id: BackboneId, image_size: int | None) -> Backbone:
    """random:hf:vit or random:hf:dinov2, small unless `?width=&depth=&heads=&patch=&size=` say otherwise."""
    from transformers import Dinov2Config, ViTConfig

    _allow(id, "seed", "width", "depth", "heads", "patch", "size")
    kinds = {"vit": ViTConfig, "dinov2": Dinov2Config}
    if id.name not in kinds:
        raise unknown("random hf architecture", id.name, kinds)
    got = {"width": 64, "depth": 3, "heads": 4, "patch": 16, "size": 64}
    for key, value in id.options:
        if not value.isdecimal() or (key != "seed" and not int(value)):
            raise BadCall(f"{id}: {key} must be a whole number, got {value!r}")
        got[key] = int(value)
    if got["width"] % got["heads"] or got["size"] % got["patch"]:
        raise BadCall(
            f"{id}: width {got['width']} must divide by heads {got['heads']}, size {got['size']} by patch {got['patch']}"
        )
    config = kinds[id.name](
        hidden_size=got["width"],
        num_hidden_layers=got["depth"],
        num_attention_heads=got["heads"],
        intermediate_size=4 * got["width"],
        patch_size=got["patch"],
        image_size=got["size"],
    )
    network = _hf_network(config)(config)
    redraw(network, id.seed())
    return _wrap_hf(id, network, network.state_dict(), None, image_size)


def _wrap_hf(
    id: BackboneId,
    network: Any,
    tensors: dict[str, Tensor],
    commit: str | None,
    image_size: int | None,
    where: str | None = None,
) -> Backbone:
    network.float()
    config = network.config
    side = config.image_size if image_size is None else image_size
    if side % config.patch_size or side <= 0:
        raise BadCall(f"{id}: image size {side} does not fit; it must be a multiple of {config.patch_size}")
    mean, std = _hf_normalisation(where)
    spec = Spec(
        id=str(id),
        family=HfViT.family,
        fingerprint=fingerprint(tensors),
        random=id.random,
        image_size=side,
        divisor=config.patch_size,
        mean=mean,
        std=std,
        width=config.hidden_size,
        widths=(config.hidden_size,),
        strides=(config.patch_size,),
        channels=config.num_channels,
        commit=commit,
    )
    return HfViT(network, spec)


def _hf_normalisation(where: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The checkpoint's own mean and std where it states them, else 0.5."""
    import json

    file = None if where is None else Path(where) / "preprocessor_config.json"
    if file is not None and file.is_file():
        stated = json.loads(file.read_text(encoding="utf-8"))
        if "image_mean" in stated and "image_std" in stated:
            return tuple(stated["image_mean"]), tuple(stated["image_std"])
    return (0.5,) * 3, (0.5,) * 3


@family("sam")
def _sam(id: BackboneId, image_size: int | None) -> Backbone:
    """`sam:vit_b@FILE`, the original checkpoints, and `random:sam:NAME`."""
    from . import sam_source

    _allow(id, *(("seed",) if id.random else ()))
    if id.random:
        return sam_source.random_sam(str(id), id.name, id.seed(), image_size)
    if id.path is None:
        raise BadData(
            f"asked for {id}: give the file of the original weights, as in sam:{id.name}@sam_{id.name}.pth, or the same network from the hub: "
            "hf:facebook/sam-vit-base"
        )
    return sam_source.load_original(str(id), id.name, Path(id.path), image_size)


@family("sam-tiny")
def _sam_tiny(id: BackboneId, image_size: int | None) -> Backbone:
    """`random:sam-tiny`, for tests."""
    from . import sam_source

    _allow(id, "seed")
    if not id.random:
        raise BadCall("sam-tiny exists with random weights only: random:sam-tiny")
    return sam_source.random_sam(str(id), "tiny", id.seed(), image_size)


def _load_hf_sam(id: BackboneId, config: Any, where: str, image_size: int | None) -> Backbone:
    from . import sam_source

    return sam_source.load_hf(id, config, where, image_size)


for _model_type in MODEL_TYPES:
    HF_MODELS[_model_type] = _load_hf_vit
HF_MODELS["sam"] = _load_hf_sam
