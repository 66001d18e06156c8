"""SAMAug's part: priors drawn by hand, pictures augmented by hand, and the choice between two answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medgraft.adapters import SamAug
from medgraft.adapters.auto_masks import Found
from medgraft.adapters.samaug import drawn, unpadded
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, UnknownName
from tests.helpers import FINDING, ONE, THREE, images, says


def found(*masks: Tensor, stability: tuple[float, ...]) -> Found:
    stack = torch.stack(masks) if masks else torch.zeros(0, 5, 5, dtype=torch.bool)
    n = len(stack)
    return Found(stack, torch.zeros(n, 4), torch.ones(n), torch.tensor(stability), torch.zeros(n, 2))


def square(low: int, high: int) -> Tensor:
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def made(on: Backbone, **options: object) -> SamAug:
    torch.manual_seed(0)
    return SamAug.on(on, ONE, channels=(4, 8), **{**FINDING, **options})  # type: ignore[arg-type]


def test_priors_of_the_paper() -> None:
    """A small mask lies over the large one, in whichever order they come; boundaries are outer ones."""
    large, small = square(0, 4), square(1, 2)
    for order in ((large, small), (small, large)):
        scores = (0.8, 0.5) if order[0] is large else (0.5, 0.8)
        area, edge = drawn(found(*order, stability=scores), "paper")
        assert torch.equal(area, torch.where(small, 0.5, 0.8 * large))
        around = torch.zeros(5, 5)
        around[4, :4] = around[:4, 4] = 1  # of the large one: its corner is no neighbour
        around[1, 0] = around[1, 2] = around[0, 1] = around[2, 1] = 1
        assert torch.equal(edge, around)


def test_priors_of_the_code() -> None:
    """Overlaps add up beyond 1; boundaries have both sides."""
    large, small = square(0, 4), square(1, 2)
    area, edge = drawn(found(large, small, stability=(0.8, 0.5)), "code")
    assert torch.allclose(area, 0.8 * large + 0.5 * small)
    assert area.max() > 1
    both = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert torch.equal(edge, both.float())


@pytest.mark.parametrize("form", ["paper", "code"])
def test_nothing_found_adds_nothing(form: str) -> None:
    assert not drawn(found(stability=()), form).any()  # type: ignore[arg-type]


def test_augmented_pictures_by_hand(sam: Backbone) -> None:
    mean, std = (torch.tensor(v)[:, None, None] for v in (sam.spec.mean, sam.spec.std))
    colour = torch.rand(3, 4, 4)
    grey = torch.rand(1, 4, 4).expand(3, 4, 4)
    priors = torch.rand(2, 2, 4, 4)
    x = (torch.stack([colour, grey]) - mean) / std
    for form in ("paper", "code"):
        got = made(sam, form=form).augmented(x, priors) * std + mean
        want = torch.stack([colour, grey])
        if form == "paper":
            want[1, 1:] = 0
        want[:, 1:] += priors
        torch.testing.assert_close(got, want)


def test_padding_does_not_make_a_grey_picture_coloured(sam: Backbone) -> None:
    """Padding is 0 after normalisation, ImageNet's mean colour, which is not grey."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (sam.spec.mean, sam.spec.std))
    x = (torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8) - mean) / std
    x[:, :, 5:] = 0
    got = made(sam).augmented(x, torch.zeros(1, 2, 8, 8)) * std + mean
    assert got[0, 1:].abs().max() < 1e-6
    assert unpadded(x[0]) == (5, 8)
    assert unpadded(torch.zeros(3, 8, 8)) == (8, 8)


def test_the_more_certain_answer_is_chosen_image_by_image(sam: Backbone) -> None:
    sure, unsure = torch.full((1, 1, 4, 4), 6.0), torch.full((1, 1, 4, 4), 0.2)
    raw, augmented = torch.cat([sure, -unsure]), torch.cat([unsure, -sure])
    assert torch.equal(made(sam).chosen(raw, augmented), torch.cat([sure, -sure]))
    assert torch.equal(made(sam, choose="mean").chosen(raw, augmented), (raw + augmented) / 2)
    assert torch.equal(made(sam, choose="augmented").chosen(raw, augmented), augmented)
    p = torch.tensor(0.2).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(made(sam).certainty(unsure), -entropy[None])


def test_the_forms_disagree_on_certainty(sam: Backbone) -> None:
    """The code's rescaling makes faint answers look certain: halves at -0.1 and 0.1 count as black and white."""
    faint = torch.cat([torch.full((1, 1, 2, 4), -0.1), torch.full((1, 1, 2, 4), 0.1)], 2)
    firm = torch.linspace(-6, 6, 16).view(1, 1, 4, 4)
    paper, code = made(sam), made(sam, form="code")
    assert paper.certainty(faint) < paper.certainty(firm)
    assert code.certainty(faint) > code.certainty(firm)


def test_priors_come_from_the_frozen_sam_and_stay_out_of_the_padding(sam: Backbone) -> None:
    x = images(sam)
    x[:, :, :, 96:] = 0
    part = made(sam)
    features = sam(x)
    priors = part.priors(features, x)
    assert priors.shape == (2, 2, 128, 128)
    assert not priors.requires_grad
    assert priors[:, 1].any()
    assert not priors[:, :, :, 96:].any()
    alone = part.priors(sam(x[1:]), x[1:])
    torch.testing.assert_close(alone, priors[1:])
    logits = part.read(features, x)
    torch.testing.assert_close(logits, part.chosen(*part.both(x, priors)))


def test_bad_input(sam: Backbone, vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        SamAug.on(vit, THREE)
    says(refused.value, "promptable decoder")
    with pytest.raises(BadCall) as refused:
        SamAug.on(sam, ONE, channels=(2,) * 9)
    says(refused.value, "multiple of 256", "fewer channels")
    with pytest.raises(BadCall) as refused:
        SamAug.on(sam, ONE, channels=(8,))
    says(refused.value, "two or more")
    for wrong in ({"form": "codes"}, {"choose": "entropie"}):
        with pytest.raises(UnknownName) as unknown:
            SamAug.on(sam, ONE, **wrong)  # type: ignore[arg-type]
        says(unknown.value, *wrong.values())
    with pytest.raises(BadCall) as refused:
        SamAug.on(sam, ONE, stability=2.0)
    says(refused.value, "stability")
