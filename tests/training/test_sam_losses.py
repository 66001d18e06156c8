"""The losses of SAM-Path and SAMed, against their equations spelt out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medgraft.adapters import ClassPrompts
from medgraft.adapters.class_prompts import Said
from medgraft.backbones.sam import Sam
from medgraft.errors import BadCall
from medgraft.training.sam_losses import SamedLoss, SamPathLoss, hard_iou
from tests.helpers import ONE, THREE, says

SIDE = 16


def head_saying(sam: Sam, masks: Tensor, quality: Tensor | None) -> ClassPrompts:
    head = ClassPrompts.on(sam, THREE if masks.shape[1] == 4 else ONE, quality=quality is not None).train()
    head.said = Said(masks, quality)
    return head


def drawn(k: int, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    masks = 2 * torch.randn(3, k, side, side, generator=g)
    return masks, torch.rand(3, k, generator=g), torch.randint(0, k, (3, SIDE, SIDE), generator=g)


@pytest.mark.parametrize("k", [2, 4])
def test_sam_path_is_its_equation(sam: Sam, k: int) -> None:
    masks, quality, target = drawn(k)
    head = head_saying(sam, masks, quality)
    p = masks.softmax(1)
    by_class = torch.zeros(3, k)
    for b in range(3):
        for i in range(k):
            t = (target[b] == i).float()
            dice = 1 - (2 * (p[b, i] * t).sum() + 1e-5) / (p[b, i].sum() + t.sum() + 1e-5)
            right = torch.where(t > 0, masks[b, i].sigmoid(), 1 - masks[b, i].sigmoid())
            focal = (-((1 - right) ** 2) * right.log()).mean()
            hard = p[b, i] >= 0.5
            iou = (hard & (t > 0)).sum() / (hard | (t > 0)).sum()
            by_class[b, i] = 0.75 * dice + 0.25 * focal + 0.0625 * (quality[b, i] - iou) ** 2
    logits = torch.zeros(3, 1, SIDE, SIDE)
    assert torch.allclose(SamPathLoss(head)(logits, target), by_class.mean(0).sum(), rtol=1e-5)
    assert torch.allclose(SamPathLoss(head, form="code")(logits, target), by_class.mean(0)[1:].mean(), rtol=1e-5)


def test_samed_is_its_equation_at_the_masks_own_size(sam: Sam) -> None:
    masks, _, target = drawn(4, side=SIDE // 4)
    small = target[:, 2::4, 2::4]  # the pixel at the middle of each block
    p = masks.softmax(1)
    dice = []
    for i in range(4):
        t = (small == i).float()
        dice.append(1 - (2 * (p[:, i] * t).sum() + 1e-5) / ((p[:, i] ** 2).sum() + (t**2).sum() + 1e-5))
    cross = -p.gather(1, small[:, None]).log().mean()
    loss = SamedLoss(head_saying(sam, masks, None))(torch.zeros(()), target)
    assert torch.allclose(loss, 0.2 * cross + 0.8 * torch.stack(dice).mean(), rtol=1e-5)


def test_the_iou_of_nothing_found_where_nothing_is_is_one() -> None:
    z = torch.zeros(1, 2, 2, 2)
    z[:, 0] = 5
    truth = torch.zeros(1, 2, 2, 2)
    truth[:, 0] = 1
    assert hard_iou(z, truth).tolist() == [[1, 1]]
    truth[:, 0, 0, 0], truth[:, 1, 0, 0] = 0, 1
    assert hard_iou(z, truth).tolist() == [[0.75, 0]]


def test_estimates_learn_from_the_iou_and_masks_do_not(sam: Sam) -> None:
    masks, quality, target = drawn(2)
    both = masks.requires_grad_(), quality.requires_grad_()
    with_iou = torch.autograd.grad(SamPathLoss(head_saying(sam, *both))(masks, target), both)
    without = torch.autograd.grad(
        SamPathLoss(head_saying(sam, *both), beta=0.0)(masks, target), both, allow_unused=True
    )
    assert torch.allclose(with_iou[0], without[0])
    assert with_iou[1].abs().min() > 0
    assert without[1] is None


def test_wrong_weights_and_silent_heads_are_refused(sam: Sam) -> None:
    masks, quality, target = drawn(2)
    with pytest.raises(BadCall) as refused:
        SamPathLoss(head_saying(sam, masks, None))
    says(refused.value, "beta=0", "quality=True")
    for wrong in ({"alpha": 1.5}, {"beta": -1.0}, {"form": "printed"}):
        with pytest.raises(BadCall):
            SamPathLoss(head_saying(sam, masks, quality), **wrong)
    head = head_saying(sam, masks, quality).eval()
    for loss in (SamPathLoss(head), SamedLoss(head)):
        with pytest.raises(BadCall) as refused:
            loss(masks, target)
        says(refused.value, "training mode")


def test_a_loss_is_known_by_its_weights_alone(sam: Sam) -> None:
    """A resumed run compares losses by what they print."""
    masks, quality, _ = drawn(2)
    one, two = (repr(SamPathLoss(head_saying(sam, masks, quality))) for _ in range(2))
    assert one == two == "SamPathLoss(alpha=0.25, beta=0.0625, form='paper')"
