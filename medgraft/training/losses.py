"""The losses: cross-entropy plus soft Dice for masks, cross-entropy for labels.

    binary   L = mean BCE(z, t) + D(sigmoid(z), t)
    classes  L = mean CE(z, t)  + mean_k D(softmax(z)_k, t_k)          over the foreground classes k = 1 .. K - 1
    avit     D(p, t) = 1 - (2 sum p t + s) / (sum p^2 + sum t^2 + s)   sums over the whole batch
    dice_ce  D(p, t) = 1 - (2 sum p t + s) / (sum p + sum t + s)       sums over each image, then the mean
    s = 1e-5

B images, K channels (1 = binary, else background is channel 0), H height, W width; z logits, t target, p probability.
Logits of any float dtype; everything is computed in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadCall, unknown

SMOOTH = 1e-5

Form = Literal["avit", "dice_ce"]


def segmentation_loss(logits: Tensor, target: Tensor, *, form: Form = "avit") -> Tensor:
    """logits (B, K, H, W) or (B, K, D, H, W), target without K, int64 with values 0 .. max(K, 2) - 1 -> a scalar, float32.

    "avit" is AViT's loss (batch Dice, squared denominators); "dice_ce" is MONAI's usual one, image by image.
    Raises `BadCall` for other shapes, dtypes or values (looked at on the CPU only), `UnknownName` for another form.
    """
    if form not in get_args(Form):
        raise unknown("form of the segmentation loss", form, get_args(Form))
    space = logits.ndim in (4, 5) and target.shape == logits.shape[:1] + logits.shape[2:]
    _check(logits, target, space, "(B, K, H, W) or (B, K, D, H, W)")
    z = logits.float()
    overlap = _dice_loss(form, binary=z.shape[1] == 1)(z, target[:, None].float())
    if z.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(z[:, 0], target.float()) + overlap
    return F.cross_entropy(z, target) + overlap


def classification_loss(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """logits (B, K), target (B,) int64 -> cross-entropy, a scalar float32; K = 1 is binary. Raises `BadCall`."""
    _check(logits, target, logits.ndim == 2 and target.shape == logits.shape[:1], "(B, K)")
    z = logits.float()
    if z.shape[1] == 1:
        soft = target.float() * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(z[:, 0], soft)
    return F.cross_entropy(z, target, label_smoothing=label_smoothing)


@cache
def _dice_loss(form: Form, *, binary: bool) -> DiceLoss:
    return DiceLoss(
        sigmoid=binary,
        softmax=not binary,
        include_background=binary,
        to_onehot_y=not binary,
        squared_pred=form == "avit",
        batch=form == "avit",
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
    )


def _check(logits: Tensor, target: Tensor, fits: bool, shape: str) -> None:
    if not fits or not logits.is_floating_point() or 0 in logits.shape:
        got = f"{logits.dtype} {tuple(logits.shape)} and {tuple(target.shape)}"
        raise BadCall(f"wanted float logits {shape} and a target of that shape without K, got {got}")
    if target.is_floating_point() or target.is_complex():
        raise BadCall(f"the target holds class indices (int64), got {target.dtype}")
    if target.device.type == "cpu":
        low, high, most = int(target.min()), int(target.max()), max(logits.shape[1], 2) - 1
        if low < 0 or high > most:
            raise BadCall(f"the target has values {low}..{high}, {logits.shape[1]} channels allow 0..{most}")
