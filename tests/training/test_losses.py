from math import exp, log

import pytest
import torch
from torch import Tensor

from medgraft.errors import BadCall, UnknownName
from medgraft.training.losses import classification_loss, segmentation_loss

S = 1e-5


def sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z))


def test_binary_avit_by_hand() -> None:
    z, t = [2.0, -1.0, 0.0, -3.0], [1, 0, 1, 0]  # two images of two pixels: Dice runs over the whole batch
    p = [sigmoid(v) for v in z]
    bce = -(log(p[0]) + log(1 - p[1]) + log(p[2]) + log(1 - p[3])) / 4
    dice = (2 * (p[0] + p[2]) + S) / (sum(v * v for v in p) + 2 + S)
    got = segmentation_loss(torch.tensor(z).view(2, 1, 1, 2), torch.tensor(t).view(2, 1, 2))
    assert got.item() == pytest.approx(bce + 1 - dice, abs=1e-6)


def test_binary_dice_ce_by_hand() -> None:
    z, t = [2.0, -1.0, 0.0, -3.0], [1, 0, 1, 0]
    p = [sigmoid(v) for v in z]
    bce = -(log(p[0]) + log(1 - p[1]) + log(p[2]) + log(1 - p[3])) / 4
    first, second = (2 * p[0] + S) / (p[0] + p[1] + 1 + S), (2 * p[2] + S) / (p[2] + p[3] + 1 + S)
    got = segmentation_loss(torch.tensor(z).view(2, 1, 1, 2), torch.tensor(t).view(2, 1, 2), form="dice_ce")
    assert got.item() == pytest.approx(bce + 1 - (first + second) / 2, abs=1e-6)


def test_classes_avit_by_hand() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])  # two pixels, three channels
    t = torch.tensor([2, 0])
    p = z.softmax(1).tolist()
    ce = -(log(p[0][2]) + log(p[1][0])) / 2
    dice = [(2 * sum(p[n][k] for n in range(2) if t[n] == k) + S) for k in (1, 2)]
    below = [p[0][k] ** 2 + p[1][k] ** 2 + (t == k).sum().item() + S for k in (1, 2)]
    wanted = ce + 1 - (dice[0] / below[0] + dice[1] / below[1]) / 2
    got = segmentation_loss(z.T.reshape(1, 3, 1, 2), t.view(1, 1, 2))
    assert got.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("form", ["avit", "dice_ce"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_right_is_near_zero_and_wrong_is_not(form: str, channels: int) -> None:
    torch.manual_seed(0)
    t = torch.randint(0, max(channels, 2), (3, 8, 8))
    sure = 20 * (2 * t[:, None] - 1.0) if channels == 1 else 20.0 * torch.nn.functional.one_hot(t).movedim(-1, 1)
    assert segmentation_loss(sure, t, form=form).item() < 1e-3
    assert segmentation_loss(-sure, t, form=form).item() > 5


@pytest.mark.parametrize("form", ["avit", "dice_ce"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_low_precision_is_computed_in_float32(form: str, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (torch.randn(2, channels, 128, 128) * 4).to(dtype).requires_grad_()
    t = torch.randint(0, max(channels, 2), (2, 128, 128))
    got = segmentation_loss(z, t, form=form)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(segmentation_loss(z.detach().float(), t, form=form).item(), rel=1e-6)
    got.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_no_foreground_at_all_stays_finite(channels: int) -> None:
    z = torch.randn(2, channels, 4, 4, requires_grad=True)
    loss = segmentation_loss(z, torch.zeros(2, 4, 4, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    z, t = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    z.requires_grad_()
    (slope,) = torch.autograd.grad(segmentation_loss(z, t), z)
    step = 1e-2 * torch.randn_like(z)
    with torch.no_grad():
        change = segmentation_loss(z + step, t) - segmentation_loss(z - step, t)
    assert change.item() == pytest.approx(2 * (slope * step).sum().item(), rel=1e-2)


Z, T = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "target"),
    [(Z, T[:1]), (Z, T[:, None]), (Z[0], T), (Z.long(), T), (Z, T.float()), (Z, T + 3), (Z, T - 1), (Z[:0], T[:0])],
)
def test_what_does_not_fit_is_refused(logits: Tensor, target: Tensor) -> None:
    with pytest.raises(BadCall):
        segmentation_loss(logits, target)


def test_unknown_form_names_near_misses() -> None:
    with pytest.raises(UnknownName, match="did you mean 'dice_ce'"):
        segmentation_loss(Z, T, form="dice-ce")  # type: ignore[arg-type]
    with pytest.raises(BadCall, match=r"values 0\.\.2, 1 channels allow 0\.\.1"):
        segmentation_loss(Z[:, :1], torch.tensor([0, 2]).view(2, 1, 1).expand(2, 4, 4))


def test_classification_by_hand() -> None:
    z, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    wanted = (log(1 + exp(-1)) + log(1 + exp(2))) / 2
    assert classification_loss(z, t).item() == pytest.approx(wanted, abs=1e-6)
    assert classification_loss(z.bfloat16(), t).dtype == torch.float32
    one = classification_loss(torch.tensor([[1.0], [-2.0]]), torch.tensor([1, 1]))
    assert one.item() == pytest.approx((log(1 + exp(-1)) + log(1 + exp(2))) / 2, abs=1e-6)


def test_label_smoothing_is_the_same_for_one_and_two_channels() -> None:
    z, t = torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    two = torch.cat([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(
        classification_loss(z, t, label_smoothing=0.1), classification_loss(two, t, label_smoothing=0.1)
    )
    for bad in (torch.tensor([0, 1, 2, 0, 1]), t[:3], t.float()):
        with pytest.raises(BadCall):
            classification_loss(two, bad)
