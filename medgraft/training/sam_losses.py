"""Losses of the systems that ask SAM's decoder class by class. They read what a `ClassPrompts` said in the call just made.

    SAM-Path  L = sum_i (1 - a) D(softmax(z)_i, t_i) + a F(z_i, t_i) + b (iou_i - IoU_i)^2     a = 0.25, b = 0.0625
              D soft Dice of each image, F sigmoid focal loss with gamma 2, IoU_i that of softmax(z)_i >= 1/2
              form "paper": the sum over all k classes, the background one of them.  "code": the mean without the background
    SAMed     L = (1 - l) CE(z, t) + l mean_i D2(softmax(z)_i, t_i)                            l = 0.8, at the masks' own size
              D2 Dice of the whole batch with squared denominators

z (B, k, .., ..) masks, t the target (B, H, W) int64 with 0 for background, k = classes + 1. Everything in float32.

Sources: Zhang et al. 2023 (SAM-Path) section 2.3, the weights those of its ablation on BCSS; Wang et al. 2023 (SAM meets robotic
surgery) section 6 with SAMed's code. Where SAM-Path's code zeroes logits before the softmax, nothing is done here: no label is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor
from torch.nn import functional

from ..adapters.class_prompts import ClassPrompts, Said
from ..errors import BadCall
from .losses import SMOOTH


@dataclass(frozen=True)
class SamPathLoss:
    """See the top of the file. Raises BadCall for b > 0 with a head that estimates no IoU."""

    head: ClassPrompts = field(repr=False)
    alpha: float = 0.25
    beta: float = 0.0625
    form: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.beta < 0 or self.form not in ("paper", "code"):
            raise BadCall(
                f"wanted alpha in [0, 1], beta >= 0 and form 'paper' or 'code'; got {self.alpha}, {self.beta}, {self.form!r}"
            )
        if self.beta and self.head.quality is None:
            raise BadCall(
                "beta weighs estimates of the IoU, this head makes none; give it quality=True, or take beta=0"
            )

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits (B, K, H, W) of the call that `head` answered last, target (B, H, W) -> a scalar."""
        said = said_by(self.head)
        z = functional.interpolate(said.masks.float(), target.shape[-2:], mode="bilinear", align_corners=False)
        truth = functional.one_hot(target, z.shape[1]).movedim(-1, 1).float()
        overlap = DiceLoss(softmax=True, reduction="none", smooth_nr=SMOOTH, smooth_dr=SMOOTH)(z, truth).flatten(1)
        focal = FocalLoss(gamma=2.0, reduction="none")(z, truth).mean((2, 3))
        each = (1 - self.alpha) * overlap + self.alpha * focal  # (B, k)
        if self.beta and said.quality is not None:
            each = each + self.beta * (said.quality.float() - hard_iou(z, truth)).square()
        by_class = each.mean(0)
        return by_class.sum() if self.form == "paper" else by_class[1:].mean()


@torch.no_grad()
def hard_iou(z: Tensor, truth: Tensor) -> Tensor:
    """IoU (B, k) of softmax(z) >= 1/2 with the truth; both (B, k, H, W), `truth` of zeros and ones. 1 where both are empty."""
    found, wanted = z.softmax(1) >= 0.5, truth > 0.5
    shared, either = ((found & wanted).sum((2, 3)), (found | wanted).sum((2, 3)))
    return torch.where(either > 0, shared / either.clamp_min(1), 1.0)


@dataclass(frozen=True)
class SamedLoss:
    """See the top of the file."""

    head: ClassPrompts = field(repr=False)
    dice: float = 0.8

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits (B, K, H, W) of the call that `head` answered last, target (B, H, W) -> a scalar."""
        z = said_by(self.head).masks.float()
        small = functional.interpolate(target[:, None].float(), z.shape[-2:], mode="nearest-exact")[:, 0].long()
        truth = functional.one_hot(small, z.shape[1]).movedim(-1, 1).float()
        overlap = DiceLoss(softmax=True, squared_pred=True, batch=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH)(z, truth)
        return (1 - self.dice) * functional.cross_entropy(z, small) + self.dice * overlap


def said_by(head: ClassPrompts) -> Said:
    """What the head said last. Raises BadCall outside training."""
    if head.said is None:
        raise BadCall(
            "this loss reads what a ClassPrompts said in training; put the adapter in training mode and call it first"
        )
    return head.said
