"""SAMAug: a small U-Net on the picture, and on the picture with what a frozen SAM finds in it added to two of its channels.

    x_aug = x + (0, S, E)             S segmentation prior, E boundary prior, of the masks that SAM finds (`auto_masks`)
    M(x), M(x_aug)                    one network for both, trained on both
    answer: M of the x' in {x, x_aug} whose answer has the smaller entropy, or tau(M(x) + M(x_aug))

x is the picture in [0, 1]. The paper and its code differ, and `form` chooses:

              S                                          E                          grey picture     more certain
    paper     each mask drawn at its stability, small    outer boundaries, joined   (x, S, E)        smaller mean entropy
              over large
    code      the sum of stability times mask            both sides, joined         x + (0, S, E)    larger mean |p - 1/2|, p rescaled to [0, 1]

The network is the only thing that trains. Source: Zhang et al. 2023 (SAMAug), section 3; repository yizhezhang2000/SAMAug.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..errors import BadCall, unknown
from .auto_masks import Found, Grid, find_masks
from .mask_head import check_decoder
from .part import Readout, part
from .task import Task

Form = Literal["paper", "code"]
Choice = Literal["entropy", "mean", "augmented"]
CHANNELS = (16, 32, 64, 128)
GREY = 0.02
"""Channels of a picture in [0, 1] that differ by less are one."""


@part("samaug")
class SamAug(Readout):
    """See the top of the file. `points`, `quality`, `stability`, `overlap`, `offset` are those of `Grid`; `mean` and `std` the backbone's."""

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        outputs: int,
        mean: Sequence[float],
        std: Sequence[float],
        channels: Sequence[int] = CHANNELS,
        points: int = 32,
        quality: float = 0.5,
        stability: float = 0.95,
        overlap: float = 0.5,
        offset: float = 1.0,
        form: Form = "paper",
        choose: Choice = "entropy",
    ) -> None:
        super().__init__(
            sites,
            outputs=outputs,
            mean=list(mean),
            std=list(std),
            channels=list(channels),
            points=points,
            quality=quality,
            stability=stability,
            overlap=overlap,
            offset=offset,
            form=form,
            choose=choose,
        )
        if form not in get_args(Form):
            raise unknown("form of samaug", form, get_args(Form))
        if choose not in get_args(Choice):
            raise unknown("way to choose an answer", choose, get_args(Choice))
        if len(channels) < 2 or min(channels) < 1:
            raise BadCall(f"channels are those of the U-Net's levels, two or more; got {tuple(channels)}")
        from monai.networks.nets import UNet  # slow to import

        self.grid = Grid(points, quality, stability, overlap, offset)
        self.form, self.choose = form, choose
        self.put("unet", UNet(2, 3, outputs, channels, [2] * (len(channels) - 1), num_res_units=2))

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        channels: Sequence[int] = CHANNELS,
        points: int = 32,
        quality: float = 0.5,
        stability: float = 0.95,
        overlap: float = 0.5,
        offset: float = 1.0,
        form: Form = "paper",
        choose: Choice = "entropy",
    ) -> SamAug:
        """A fresh U-Net for the task. Raises BadCall for a backbone without a promptable decoder."""
        check_decoder(backbone)
        spec = backbone.spec
        asked = (points, quality, stability, overlap, offset)
        made = cls({}, task.outputs, spec.mean, spec.std, channels, *asked, form, choose)
        made.check(backbone)
        return made

    def check(self, backbone: Backbone) -> None:
        """The backbone must have a promptable decoder, and its sides must divide by the U-Net's."""
        check_decoder(backbone)
        divisor, side = 2 ** (len(self.config["channels"]) - 1), backbone.spec.image_size
        if side % divisor or side < 2 * divisor:
            raise BadCall(
                f"a U-Net of {len(self.config['channels'])} levels takes sides of a multiple of {divisor}, {2 * divisor} or more; "
                f"{backbone.spec.id} is loaded for {side}: choose another image size, or fewer channels"
            )

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, H, W)."""
        return self.chosen(*self.both(image, self.priors(features, image)))

    def priors(self, features: Features, image: Tensor) -> Tensor:
        """Segmentation and boundary priors (B, 2, H, W) of images (B, 3, H, W), zero in the padding. Without gradients."""
        found = image.new_zeros(image.shape[0], 2, *image.shape[2:])
        for row, (x, embedding) in enumerate(zip(image, features.maps[-1], strict=True)):
            h, w = unpadded(x)
            masks = find_masks(features.decoder, embedding[None], (h, w), image.shape[-1], self.grid)
            found[row, :, :h, :w] = drawn(masks, self.form).to(found)
        return found

    def both(self, image: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the pictures as they are and of the augmented ones, each (B, K, H, W)."""
        own = next(iter(self.tensors().values())).dtype  # computed in the network's precision, whatever the backbone's
        pairs = torch.cat([image, self.augmented(image, priors)]).to(own)
        raw, augmented = self.cell("unet")(pairs).chunk(2)
        return raw, augmented

    def augmented(self, image: Tensor, priors: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) with the priors (B, 2, H, W) in channels 2 and 3, normalised as they are."""
        mean, std = (image.new_tensor(self.config[name])[:, None, None] for name in ("mean", "std"))
        x = image * std + mean
        added = torch.cat([torch.zeros_like(priors[:, :1]), priors], 1)
        if self.form == "paper":
            padding = (image == 0).all(1, keepdim=True)
            spread = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).masked_fill(padding, 0)
            grey = spread.amax((1, 2, 3), keepdim=True) < GREY
            kept = torch.cat([x[:, :1], torch.zeros_like(priors)], 1)
            x = torch.where(grey, kept, x)
        return (x + added - mean) / std

    def chosen(self, raw: Tensor, augmented: Tensor) -> Tensor:
        """One answer (B, K, H, W) an image of the two."""
        if self.choose == "augmented":
            return augmented
        if self.choose == "mean":
            return (raw + augmented) / 2
        better = self.certainty(augmented) > self.certainty(raw)
        return torch.where(better[:, None, None, None], augmented, raw)

    def certainty(self, logits: Tensor) -> Tensor:
        """How certain an answer (B, K, H, W) is, (B,): see the top of the file."""
        z = logits.detach().float()
        p = torch.cat([z.sigmoid(), (-z).sigmoid()], 1) if z.shape[1] == 1 else z.softmax(1)
        if self.form == "paper":
            return torch.special.entr(p).sum(1).mean((1, 2)).neg()
        low, high = p.amin((1, 2, 3), keepdim=True), p.amax((1, 2, 3), keepdim=True)
        return ((p - low) / (high - low).clamp_min(1e-6) - 0.5).abs().mean((1, 2, 3))


def unpadded(image: Tensor) -> tuple[int, int]:
    """Height and width of a normalised picture (3, S, S) without what `fit="pad"` filled up, which is exactly 0."""
    there = (image != 0).any(0)
    if not there.any():
        return int(image.shape[-2]), int(image.shape[-1])
    rows, columns = (there.any(axis).nonzero()[-1] for axis in (1, 0))
    return int(rows) + 1, int(columns) + 1


def drawn(found: Found, form: Form) -> Tensor:
    """Segmentation and boundary priors (2, h, w), float32, of the masks found; all 0 where there is none."""
    masks, scores = found.masks, found.stability.float()
    area = torch.zeros(masks.shape[1:], device=masks.device)
    edge = torch.zeros_like(area, dtype=torch.bool)
    for k in masks.sum((1, 2)).argsort(descending=True, stable=True).tolist():
        grown = _grown(masks[k])
        if form == "paper":
            area = torch.where(masks[k], scores[k], area)
            edge |= grown & ~masks[k]
        else:
            area = area + scores[k] * masks[k]
            edge |= grown & _grown(~masks[k])
    return torch.stack([area, edge.float()])


def _grown(mask: Tensor) -> Tensor:
    """A mask (h, w) with every pixel that touches it by a side."""
    out = mask.clone()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out
