"""Class prompts: SAM's mask decoder asked for every class by a trained token of its own, without points or boxes.

    tokens, image = TwoWay([iou token | p_1 .. p_k], embedding + "no mask")          p_i (C,) trained
    mask_i = MLP_i(tokens_i) . Upscale(image)        iou_i = MLP_iou(iou token)_i     i = 1 .. k, class 1 the background
    logits = masks, softmax over classes; one class against the background (k = 2):  mask_2 - mask_1, the sigmoid of which is that softmax

The k MLPs begin as copies of SAM's first, MLP_iou as SAM's with a new last layer. Tokens attend to each other: a mask moves every
token, but only its own MLP. The transformer, the upscaling and the iou token are the backbone's, adapted where the adapter acts there.

form "paper": k tokens.   "code": the authors' k + 2; they count a label "ignored", and SAM's first token is never asked for a mask.
The two spare tokens join the attention, their masks have no use and are not kept.

Source: Zhang et al. 2023 (SAM-Path) section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.sam_decoder import SamDecoder
from ..backbones.state import Features
from ..errors import BadCall
from .heads import check_width
from .mask_head import check_decoder
from .part import Readout, part
from .task import Task

SPARE = {"paper": 0, "code": 2}
"""Tokens without a mask, by form."""


class Linears(nn.Module):
    """n linear layers side by side, each for its own row: (..., n, in) -> (..., n, out). `weight` (n, out, in), `bias` (n, out)."""

    def __init__(self, count: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(count, fan_out, fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Row i through layer i."""
        return torch.einsum("...ni,noi->...no", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)


class Perceptrons(nn.Sequential):
    """n perceptrons of `widths` with ReLU between their layers: (..., n, widths[0]) -> (..., n, widths[-1])."""

    def __init__(self, count: int, widths: Sequence[int]) -> None:
        super().__init__(*(Linears(count, a, b) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """Row i through perceptron i."""
        *inner, last = self
        for layer in inner:
            x = functional.relu(layer(x))
        return cast("Tensor", last(x))


@dataclass(frozen=True)
class Said:
    """What a loss may want beside the logits: masks (B, k, 4 h, 4 w), background first, and their estimated IoU (B, k) or None."""

    masks: Tensor
    quality: Tensor | None


@part("class_prompts")
class ClassPrompts(Readout):
    """See the top of the file.

    width : C. hyper : widths of the masks' MLPs. quality : widths of the MLP of the IoU estimates; empty for none.
    In training `said` holds what the last call made beside its logits.
    """

    said: Said | None = None

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        width: int,
        outputs: int,
        hyper: Sequence[int],
        quality: Sequence[int] = (),
        form: str = "paper",
    ) -> None:
        if form not in SPARE:
            raise BadCall(f"the form of class prompts is 'paper' or 'code', got {form!r}")
        super().__init__(sites, width=width, outputs=outputs, hyper=list(hyper), quality=list(quality), form=form)
        self.count = max(outputs, 2)
        self.spare = SPARE[form]
        self.tokens = nn.Parameter(torch.randn(self.spare + self.count, width))
        self.hyper = Perceptrons(self.count, hyper)
        self.quality = Perceptrons(1, quality) if quality else None

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, form: str = "paper", quality: bool = True) -> ClassPrompts:
        """One token, mask and MLP a class and one for the background; `quality`: with IoU estimates. Raises BadCall."""
        decoder = decoder_of(backbone)
        mask, iou = _layers(decoder.masks.output_hypernetworks_mlps[0]), _layers(decoder.masks.iou_prediction_head)
        width = decoder.masks.hidden_size
        own = cls(
            {},
            width=width,
            outputs=task.outputs,
            hyper=[width, *(layer.out_features for layer in mask)],
            quality=[width, *(layer.out_features for layer in iou[:-1]), max(task.outputs, 2)] if quality else [],
            form=form,
        )
        _copy(mask, own.hyper)
        if own.quality is not None:
            _copy(iou[:-1], own.quality)
        return own

    def check(self, backbone: Backbone) -> None:
        """The backbone must have a promptable decoder of the same widths."""
        decoder = decoder_of(backbone)
        check_width(self, backbone, self.config["width"], decoder.masks.hidden_size)
        check_width(self, backbone, self.config["hyper"][-1], decoder.masks.upscale_conv2.out_channels)

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, H, W)."""
        decoder, f = features.decoder, features.maps[-1]
        tokens = torch.cat([decoder.iou_token().to(f.dtype), self.tokens.to(f.dtype)])
        decoded = decoder.two_way(f, tokens.expand(f.shape[0], -1, -1))
        weights = self.hyper(decoded.tokens[:, 1 + self.spare :])  # (B, k, C / 8)
        masks = torch.einsum("bkc,bchw->bkhw", weights, decoded.upscaled)
        if self.training:
            quality = None if self.quality is None else self.quality(decoded.tokens[:, :1])[:, 0]
            self.said = Said(masks, quality)
        logits = masks[:, 1:] - masks[:, :1] if self.config["outputs"] == 1 else masks
        return functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)

    def train(self, mode: bool = True) -> ClassPrompts:
        """Set the mode; what was said is forgotten."""
        self.said = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "said": None}  # a copy holds no graph

    def load_authors(self, state: Mapping[str, Tensor]) -> None:
        """Copy the class prompts of a SAM-Path checkpoint, by the authors' names (`from_authors`). Raises BadCall."""
        if self.config["form"] != "code":
            raise BadCall("the authors' tensors go into ClassPrompts of form='code', which has their two spare tokens")
        found = from_authors(state, quality=self.quality is not None)
        for name, mine in self.tensors().items():
            if found[name].shape != mine.shape:
                raise BadCall(
                    f"{name} is {tuple(found[name].shape)} there, {tuple(mine.shape)} is wanted; another width or number of classes?"
                )
        self.load_tensors(found)


def from_authors(state: Mapping[str, Tensor], *, quality: bool = True) -> dict[str, Tensor]:
    """Tensors of SAM-Path's `mask_decoder.*`, under any prefix, by the names of `ClassPrompts` of form "code". Raises BadCall.

    mask_tokens.weight (k + 2, C), output_hypernetworks_mlps.I.layers.J.{weight,bias}, iou_prediction_head.layers.J.{weight,bias}
    """
    own = {name.split("mask_decoder.", 1)[1]: t for name, t in state.items() if "mask_decoder." in name}

    def layers(path: str) -> int:
        return len({name for name in own if name.startswith(f"{path}.layers.") and name.endswith(".weight")})

    count, mask, iou = len(own.get("mask_tokens.weight", ())), "output_hypernetworks_mlps", "iou_prediction_head"
    if count <= SPARE["code"] or not layers(f"{mask}.{count - 1}") or not layers(iou):
        raise BadCall(
            "no class prompts of SAM-Path: mask_decoder.mask_tokens.weight, one mask_decoder.output_hypernetworks_mlps a token and "
            "mask_decoder.iou_prediction_head are wanted"
        )
    asked = range(SPARE["code"], count)
    found = {"tokens": own["mask_tokens.weight"]}
    for j in range(layers(f"{mask}.{count - 1}")):
        for leaf in ("weight", "bias"):
            found[f"hyper.{j}.{leaf}"] = torch.stack([own[f"{mask}.{i}.layers.{j}.{leaf}"] for i in asked])
    for j in range(last := layers(iou)) if quality else ():
        for leaf in ("weight", "bias"):
            t = own[f"{iou}.layers.{j}.{leaf}"]
            found[f"quality.{j}.{leaf}"] = (t[SPARE["code"] :] if j == last - 1 else t)[None]
    return found


def decoder_of(backbone: Backbone) -> SamDecoder:
    """The promptable decoder of a backbone. Raises BadCall for one without."""
    check_decoder(backbone)
    return cast("SamDecoder", backbone.decoder)


def _layers(mlp: Any) -> list[Any]:
    """The linear layers of a SamFeedForward."""
    return [mlp.proj_in, *mlp.layers, mlp.proj_out]


@torch.no_grad()
def _copy(layers: Sequence[Any], into: Perceptrons) -> None:
    """Give every row of `into` the tensors of `layers`, as far as there are any."""
    for theirs, mine in zip(layers, cast("Iterable[Linears]", into), strict=False):
        mine.weight.copy_(theirs.weight.expand_as(mine.weight))
        mine.bias.copy_(theirs.bias.expand_as(mine.bias))
