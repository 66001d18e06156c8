"""Losses for partial labels: hand-computed values, exact zeros, the golden values of ConDistFL, bad input."""

import json
from math import exp, log
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from medgraft.errors import BadCall, UnknownName
from medgraft.training.partial_losses import (
    Name,
    PartialLoss,
    adaptive_loss,
    bce_loss,
    condist_loss,
    hybrid_loss,
    marginal_loss,
    standard_loss,
)
from tests.helpers import close

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
S = 1e-5
LOSSES = {name: PartialLoss(name) for name in get_args(Name)}  # type: ignore[arg-type]
MASKED = ("adaptive", "bce", "hybrid", "sigmoid_dice")  # an unannotated class gets no gradient at all
SPACES = [(5, 4), (3, 4, 5)]

Z = [0.5, 1.0, -0.3, 2.0]  # one pixel, or the first of two
Y = [-1.0, 0.2, 0.7, 0.1]


def pixels(*rows: list[float]) -> Tensor:
    """Pixels of one image as (1, K, 1, N)."""
    return torch.tensor(rows).T[None, :, None]


def lse(*values: float) -> float:
    return log(sum(map(exp, values)))


def share(values: list[float], of: tuple[int, ...], among: tuple[int, ...]) -> float:
    return sum(exp(values[k]) for k in of) / sum(exp(values[k]) for k in among)


def random_batch(space: tuple[int, ...], rows: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return 2 * torch.randn(rows, classes, *space, generator=g), torch.randint(classes, (rows, *space), generator=g)


PARTIAL = torch.tensor([[0, 1, 2, 0], [0, 0, 2, 3], [0, 1, 2, 3]])  # class 3 is missing in row 0, class 1 in row 1
BY_HAND = torch.tensor([[0, 1, 2, 0]])  # class 3 was not annotated


def test_standard_by_hand() -> None:
    t = torch.tensor([[[1, 3]]])  # what is unannotated is background to it
    wanted = (lse(*Z) - Z[1] + lse(*Y) - Y[0]) / 2
    assert standard_loss(pixels(Z, Y), t, BY_HAND).item() == pytest.approx(wanted, abs=1e-6)


def test_standard_dice_is_the_marginal_loss_of_a_whole_annotation() -> None:
    z, t = random_batch((5, 4))
    erased = torch.where(PARTIAL.gather(1, t.flatten(1)).view_as(t) == 0, 0, t)
    wanted = marginal_loss(z, erased, torch.arange(4).expand(3, -1))
    assert torch.equal(LOSSES["standard_dice"](z, t, PARTIAL), wanted)


def test_adaptive_by_hand() -> None:
    t = torch.tensor([[[1, 3]]])
    wanted = (lse(*Z[:3]) - Z[1] + lse(*Y[:3]) - Y[0]) / 2
    assert adaptive_loss(pixels(Z, Y), t, BY_HAND).item() == pytest.approx(wanted, abs=1e-6)


def test_bce_by_hand() -> None:
    t = torch.tensor([[[1, 3]]])

    def term(z: float, hit: bool) -> float:
        return log(1 + exp(-z if hit else z))

    first = term(Z[1] - Z[0], True) + term(Z[2] - Z[0], False)
    second = term(Y[1] - Y[0], False) + term(Y[2] - Y[0], False)
    assert bce_loss(pixels(Z, Y), t, BY_HAND).item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_marginal_by_hand() -> None:
    t, every = torch.tensor([[[1, 3]]]), (0, 1, 2, 3)
    entropy = -(log(share(Z, (1,), every)) + log(share(Y, (0, 3), every))) / 2
    dice = []
    for group, hits in (((0, 3), (0, 1)), ((1,), (1, 0)), ((2,), (0, 0))):
        p = [share(Z, group, every), share(Y, group, every)]
        dice.append(1 - (2 * (p[0] * hits[0] + p[1] * hits[1]) + S) / (sum(p) + sum(hits) + S))
    assert marginal_loss(pixels(Z, Y), t, BY_HAND).item() == pytest.approx(entropy + sum(dice) / 3, abs=1e-6)


def test_hybrid_by_hand() -> None:
    t, kept = torch.tensor([[[1, 3]]]), (0, 1, 2)
    entropy = -log(share(Z, (1,), kept)) / 2  # the second pixel shows no annotated structure
    dice = []
    for k, hits in ((1, (1, 0)), (2, (0, 0))):
        p = [share(Z, (k,), kept), share(Y, (k,), kept)]
        dice.append(1 - (2 * p[0] * hits[0] + S) / (sum(p) + sum(hits) + S))
    assert hybrid_loss(pixels(Z, Y), t, BY_HAND).item() == pytest.approx(entropy + sum(dice) / 2, abs=1e-6)


def test_sigmoid_dice_by_hand() -> None:
    dice = []
    for k, hits in ((1, (1, 0)), (2, (0, 0))):  # the second pixel shows no annotated structure
        p = [1 / (1 + exp(v[0] - v[k])) for v in (Z, Y)]
        dice.append(1 - (2 * p[0] * hits[0] + S) / (sum(p) + sum(hits) + S))
    z, t = pixels(Z, Y), torch.tensor([[[1, 3]]])
    assert LOSSES["sigmoid_dice"](z, t, BY_HAND).item() == pytest.approx(sum(dice) / 2, abs=1e-6)
    rows = torch.cat([z, z]), torch.cat([t, t]), torch.cat([BY_HAND, torch.tensor([[0, 1, 0, 0]])])
    assert LOSSES["sigmoid_dice"](*rows).item() == pytest.approx((sum(dice) / 2 + dice[0]) / 2, abs=1e-6)


def test_coarse_labels_by_hand() -> None:
    """A vessel is an artery (1), a vein (2) or a crossing (3)."""
    groups, t, every = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[[1, 0]]]), (0, 1, 2, 3)
    entropy = -(log(share(Z, (1, 2, 3), every)) + log(share(Y, (0,), every))) / 2
    for name in ("standard", "adaptive"):
        assert LOSSES[name](pixels(Z, Y), t, groups).item() == pytest.approx(entropy, abs=1e-6)
    odds = [lse(*v[1:]) - v[0] for v in (Z, Y)]
    wanted = (log(1 + exp(-odds[0])) + log(1 + exp(odds[1]))) / 2
    assert bce_loss(pixels(Z, Y), t, groups).item() == pytest.approx(wanted, abs=1e-6)
    drawn_as_any = [LOSSES[name](pixels(Z, Y), 3 * t, groups).item() for name in LOSSES]
    assert drawn_as_any == [LOSSES[name](pixels(Z, Y), t, groups).item() for name in LOSSES]


def test_condist_by_hand() -> None:
    """Two pixels, class 1 annotated, 2 and 3 one organ, T = 1/2; the second pixel is in the mask."""
    student, teacher = pixels(Z, Y), pixels([1.0, -1.0, 0.4, 0.2], Y)
    t, groups = torch.tensor([[[0, 1]]]), torch.tensor([[0, 1, 0, 0]])
    q = {}
    for who, x in (("student", Z), ("teacher", [1.0, -1.0, 0.4, 0.2])):
        e = [exp(2 * v) for v in x]
        p = [v / sum(e) for v in e]
        q[who] = [p[0] / (1 - p[1] + S), (p[2] + p[3]) / (1 - p[1] + S)]
    dice = [1 - 2 * a * b / (a + b + S) for a, b in zip(q["student"], q["teacher"], strict=True)]
    got = condist_loss(student, teacher, t, groups, organs=[(2, 3)])
    assert got.item() == pytest.approx(sum(dice) / 2, abs=1e-6)
    outside = condist_loss(student, teacher, torch.ones_like(t), groups)
    assert outside.item() == pytest.approx(1.0), "no pixel is asked: Dice of nothing, without a gradient"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
def test_golden_values_of_condistfl() -> None:
    values = json.loads((GOLDEN / "condistfl.json").read_text())["values"]
    t = load_file(GOLDEN / "condistfl.safetensors")
    local, teacher, label = t["in.local_logits"], t["in.global_logits"], t["in.label"][:, 0].long()
    groups = torch.tensor([0, 1, 2, 0, 0, 0, 0, 0]).expand(2, -1)

    def near(wanted: float):
        return pytest.approx(wanted, rel=1e-4, abs=1e-5)

    corrected = values["marginal.dice_part"] + values["marginal.ce_correct_on_probabilities"]
    assert marginal_loss(local, label, groups).item() == near(corrected)
    assert marginal_loss(local, label, groups, published=True).item() == near(values["marginal.loss"])
    for temperature in (2.0, 0.5):
        got = condist_loss(local, teacher, label, groups, organs=[(4, 5), (6, 7)], temperature=temperature)
        assert got.item() == near(values[f"condist.tau{temperature}.loss"])


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_an_unannotated_class_gets_a_gradient_of_exactly_zero(name: str, space: tuple[int, ...]) -> None:
    z, t = random_batch(space)
    z.requires_grad_()
    LOSSES[name](z, t, PARTIAL).backward()
    assert z.grad is not None
    missing = PARTIAL.eq(torch.tensor([[-1, 0, 0, 0]]))
    assert missing.sum() == 2
    assert (z.grad[missing] == 0).all()
    assert (z.grad[~missing].flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_drawn_of_an_unannotated_class_changes_nothing(name: str) -> None:
    z, t = random_batch((5, 4))
    erased = torch.where(PARTIAL.gather(1, t.flatten(1)).view_as(t) == 0, 0, t)
    assert not torch.equal(erased, t)
    assert torch.equal(LOSSES[name](z, t, PARTIAL), LOSSES[name](z, erased, PARTIAL))


@pytest.mark.parametrize("name", ["adaptive", "bce", "marginal", "hybrid"])
def test_a_row_without_annotation_adds_exactly_nothing_and_a_warning(name: str) -> None:
    z, t = random_batch((5, 4))
    z.requires_grad_()
    groups = torch.cat([PARTIAL[:2], torch.zeros(1, 4, dtype=torch.long)])
    with pytest.warns(UserWarning, match="1 of 3 images have no annotated class"):
        with_bare = LOSSES[name](z, t, groups)
    with_bare.backward()
    assert torch.equal(with_bare, LOSSES[name](z[:2], t[:2], PARTIAL[:2]))
    assert z.grad is not None
    assert (z.grad[2] == 0).all()
    with pytest.warns(UserWarning, match="3 of 3"):
        nothing = LOSSES[name](z, t, torch.zeros_like(groups))
    (gradient,) = torch.autograd.grad(nothing, z)
    assert nothing.item() == 0
    assert (gradient == 0).all()


def test_all_annotated_is_the_usual_cross_entropy() -> None:
    z, t = random_batch((5, 4))
    whole = torch.arange(4).expand(3, -1)
    usual = torch.nn.functional.cross_entropy(z, t).item()
    for name in ("standard", "adaptive"):
        assert LOSSES[name](z, t, whole).item() == pytest.approx(usual, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_annotated_is_another_way_to_write_groups(name: str) -> None:
    z, t = random_batch((5, 4))
    annotated = PARTIAL.eq(torch.arange(4))
    assert torch.equal(LOSSES[name](z, t, annotated), LOSSES[name](z, t, PARTIAL))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_rows_does_not_matter_and_depth_is_only_more_pixels(name: str) -> None:
    z, t = random_batch((3, 4, 5))
    flat = LOSSES[name](z.flatten(3), t.flatten(2), PARTIAL)
    close(name, LOSSES[name](z, t, PARTIAL), flat)
    turned = [2, 0, 1]
    close(name, LOSSES[name](z[turned], t[turned], PARTIAL[turned]), flat)


@pytest.mark.parametrize("name", LOSSES)
def test_one_channel_is_a_background_of_logit_zero(name: str) -> None:
    z, t = random_batch((5, 4), classes=2)
    one = z[:, 1:]
    groups = torch.tensor([[0, 1]]).expand(3, -1)
    close(name, LOSSES[name](one, t, groups), LOSSES[name](torch.cat([torch.zeros_like(one), one], 1), t, groups))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*LOSSES, "condist"])
def test_low_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    z, t = random_batch((64, 64))
    z = (20 * z).to(dtype).requires_grad_()  # wrong and sure: log(p) of a probability would be -inf

    def loss(x: Tensor) -> Tensor:
        return condist_loss(x, x.flip(1), t, PARTIAL) if name == "condist" else LOSSES[name](x, t, PARTIAL)

    got = loss(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(z.detach().float()))
    got.backward()
    assert got.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


def test_condist_teaches_only_what_the_row_leaves_out() -> None:
    z, t = random_batch((5, 4))
    z, teacher = z.requires_grad_(), z.detach().flip(0).requires_grad_()
    condist_loss(z, teacher, t, PARTIAL).backward()
    assert teacher.grad is None
    assert z.grad is not None
    assert (z.grad[2] == 0).all(), "the last row annotates everything"
    assert (z.grad[:2].abs().sum((1, 2, 3)) > 0).all()
    whole = condist_loss(z, teacher, t, torch.arange(4).expand(3, -1))
    assert whole.item() == 0
    same = condist_loss(100 * z.detach(), 100 * z.detach(), torch.zeros_like(t), PARTIAL)
    other = condist_loss(100 * z.detach(), -100 * z.detach(), torch.zeros_like(t), PARTIAL)
    assert same < 0.5 < other


def test_bad_input() -> None:
    z, t = random_batch((5, 4))
    for logits, target, groups, why in (
        (z[0], t, PARTIAL, "wanted float logits"),
        (z.long(), t, PARTIAL, "wanted float logits"),
        (z, t[:2], PARTIAL, "wanted float logits"),
        (z, t.float(), PARTIAL, "int64 target"),
        (z, t + 1, PARTIAL, r"values 1\.\.4, 0\.\.3 fit"),
        (z, t, PARTIAL[:, :3], "wanted groups"),
        (z, t, PARTIAL.float(), "wanted groups"),
        (z, t, PARTIAL + 1, "smallest class"),
        (z, t, torch.tensor([[0, 2, 2, 3]]).expand(3, -1), "smallest class"),
        (z, t, torch.tensor([[0, 1, 2, 2], [0, 3, 2, 3], [0, 1, 2, 3]]), "smallest class"),
    ):
        for loss in LOSSES.values():
            with pytest.raises(BadCall, match=why):
                loss(logits, target, groups)
    with pytest.raises(UnknownName, match="did you mean 'marginal'"):
        PartialLoss("marginl")  # type: ignore[arg-type]
    with pytest.raises(BadCall, match="published is a form of the marginal loss"):
        PartialLoss("adaptive", published=True)
    for wrong, why in (
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"organs": [(1, 2), (2, 3)]}, "organs are disjoint"),
        ({"organs": [(0, 1)]}, "organs are disjoint"),
        ({"organs": [(3, 4)]}, "organs are disjoint"),
    ):
        with pytest.raises(BadCall, match=why):
            condist_loss(z, z, t, PARTIAL, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadCall, match="the teacher's logits"):
        condist_loss(z, z[:, :3], t, PARTIAL)
