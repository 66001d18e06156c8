"""SAMPOT: the scorer learns Dice, the gradient reaches the click and nothing else, the score never falls."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, EvolvedPrompt, Host, MaskHead
from medgraft.adapters.evolved_prompt import Scorer, overlap
from medgraft.backbones import Backbone, Features
from medgraft.backbones.prompts import Prompts
from medgraft.errors import BadCall, BadData
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import load_dataset
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from medgraft.training.prompting import drawn
from medgraft.training.sampot import (
    Candidates,
    candidates,
    correlation,
    level_sets,
    six_clicks,
    soft_dice,
    train_scorer,
)
from tests.helpers import ONE, THREE, images, says


def disc(x: float, y: float, r: float, size: int = 32) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (xs - x) ** 2 + (ys - y) ** 2 <= r**2


# The scorer


def test_level_sets_are_smaller_and_larger() -> None:
    truth = disc(16, 16, 8)
    found = level_sets(truth, 8, drawn(0, 0))
    assert all((m & truth).sum() == m.sum() for m in found[:4]), "the first half lies inside"
    assert all((m & truth).sum() == truth.sum() for m in found[4:]), "the second half holds all of it"
    assert len({int(m.sum()) for m in found}) > 4
    assert all(m.any() for m in found)


def test_six_clicks() -> None:
    truth = np.zeros((40, 40), bool)
    truth[5:35, 10:20] = True
    found = six_clicks(truth, drawn(0, 0))
    assert np.allclose(found[:3], [[14.5, 9.5], [14.5, 19.5], [14.5, 29.5]])
    for x, y in found[3:]:
        assert not truth[max(0, int(y) - 3) : int(y) + 4, max(0, int(x) - 3) : int(x) + 4].any()
    assert six_clicks(np.ones((8, 8), bool), drawn(0, 0)).shape == (6, 2), "no outside at all"


def test_dice_is_of_decided_masks() -> None:
    a = torch.tensor([[[0.9, 0.6, 0.4, 0.0]], [[0.0] * 4]])
    b = torch.tensor([[[1.0, 0.0, 1.0, 0.0]], [[0.0] * 4]])
    assert soft_dice(a, b).tolist() == [0.5, 1.0]


def discs(count: int, seed: int) -> Candidates:
    """Bright discs in noise, each with level sets as masks."""
    rng = np.random.default_rng(seed)
    shown, masks, rows, scores = [], [], [], []
    for i in range(count):
        truth = disc(*rng.uniform(10, 22, 2), rng.uniform(5, 9))
        shown.append(np.repeat((truth + rng.normal(0, 0.2, truth.shape))[None], 3, 0))
        own = torch.from_numpy(level_sets(truth, 8, rng)).float()
        masks.append(own[:, None])
        scores.append(soft_dice(own, torch.from_numpy(truth)[None].expand_as(own)))
        rows += [i] * 8
    images = torch.from_numpy(np.stack(shown)).float()
    return Candidates(images, torch.cat(masks), torch.tensor(rows), torch.cat(scores))


def test_the_scorer_learns_dice() -> None:
    data = discs(24, 0)
    scorer, losses = train_scorer(data, side=32, steps=120)
    assert np.mean(losses[-10:]) < 0.25 * losses[0]
    assert correlation(scorer, discs(8, 1)) > 0.8, "on discs that it never saw"
    again, _ = train_scorer(data, side=32, steps=3)
    twin, _ = train_scorer(data, side=32, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_scorer_in_half_precision_answers_threads_alike() -> None:
    """It computes in float32 from the tensors that it has, and touches none of them."""
    scorer = Scorer(side=32).eval().bfloat16()
    image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    kept = [(t.data_ptr(), t.dtype) for t in scorer.state_dict().values()]
    want = scorer(image, mask)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scorer(image, mask), range(40)))
    assert all(torch.equal(f, want) for f in found)
    assert want.dtype == torch.float32
    assert [(t.data_ptr(), t.dtype) for t in scorer.state_dict().values()] == kept


def test_it_begins_with_nothing_to_score(tmp_path: Path, sam: Backbone) -> None:
    from medgraft.training.batches import Batches

    data = load_dataset(write_dataset(tmp_path / "cells", "cells", train=2, test=1, size=64).parent)
    spec = sam.spec
    batches = Batches(data, data.split("train"), size=64, mean=spec.mean, std=spec.std, batch_size=2, fit=spec.fit)
    found = candidates(sam, batches, side=32, steep=5.0)
    assert len(found) == 2 * (8 + 6)
    assert found.images.shape == (2, 3, 32, 32)
    assert found.rows.tolist() == [0] * 14 + [1] * 14
    assert (found.masks >= 0).all()
    assert (found.dice <= 1).all()
    for k in batches._kept:
        batches._kept[k] = (batches._kept[k][0], torch.zeros_like(batches._kept[k][1]))
    with pytest.raises(BadData) as refused:
        candidates(sam, batches, side=32, steep=5.0)
    says(refused.value, "has an object")


# The click


class Prefers(Scorer):
    """A scorer that likes masks to lie at x > 0 of what it sees: the mean of the mask's columns, weighted."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        w = mask.shape[-1]
        return (mask[:, 0] * torch.linspace(0, 1, w)).mean((1, 2))


class Soft:
    """In the place of SAM's decoder: the mask is a disc of radius 6 around the click, differentiable in it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, embedding: Tensor, prompts: Prompts, **more: Any) -> tuple[Tensor, Tensor]:
        assert prompts.points is not None
        at = prompts.points[:, :, 0]
        y, x = torch.arange(self.size)[:, None], torch.arange(self.size)
        far = (x - at[..., 0, None, None]) ** 2 + (y - at[..., 1, None, None]) ** 2
        return (2 - far / 18)[:, :, None], torch.zeros(*at.shape[:2], 1)


def toy(points: list[list[float]], **settings: Any) -> tuple[EvolvedPrompt, Features, Tensor]:
    part = EvolvedPrompt({}, side=64, **settings)
    part.scorer = Prefers()
    at = torch.tensor(points)[:, None, None]
    prompts = Prompts(points=at, labels=torch.ones(at.shape[:3], dtype=torch.long))
    f = torch.zeros(len(points), 4, 8, 8)
    return (
        part,
        Features([f], [8], f.mean((2, 3)), f, decoder=Soft(64), prompts=prompts),
        torch.zeros(len(points), 3, 64, 64),
    )


def test_the_click_moves_to_what_the_scorer_prefers() -> None:
    part, features, image = toy([[20.0, 30.0], [30.0, 40.0]], step=1 / 64, steps=10, trust=0.0)
    found = part.evolve(features, image)
    assert found.moved.all()
    assert (found.points[..., 0] - torch.tensor([20.0, 30.0])[:, None, None] > 8).all(), "to the right, a pixel a step"
    assert (found.score > found.start).all()
    assert (part.read(features, image)[0, 0] > 0).nonzero()[:, 1].float().mean() > 27


def test_the_trust_region_keeps_the_mask() -> None:
    free, held = (toy([[20.0, 30.0]], step=2 / 64, steps=10, trust=t) for t in (0.0, 0.6))
    far, near = (part.evolve(features, image) for part, features, image in (free, held))
    start = Soft(64)(torch.zeros(()), free[1].prompts)[0][:, :, 0]
    assert overlap(far.masks, start).item() < 0.6
    assert overlap(near.masks, start).item() >= 0.6
    assert near.moved.all()


class PrefersNothing(Scorer):
    """A scorer that likes masks to be small, so that a click runs out of the picture."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return 1 - mask.mean((1, 2, 3))


def test_a_click_stays_in_the_picture() -> None:
    part, features, image = toy([[60.0, 30.0]], step=2 / 64, steps=10, trust=0.0)
    part.scorer = PrefersNothing()
    found = part.evolve(features, image)
    assert 60 < found.points[..., 0].max() <= 63


def test_nothing_trusted_is_the_start() -> None:
    part, features, image = toy([[20.0, 30.0]], step=8 / 64, steps=3, trust=1.0)
    found = part.evolve(features, image)
    assert not found.moved.any()
    assert torch.equal(found.points, features.prompts.points)
    assert torch.equal(found.score, found.start)


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_never_below_its_start(seed: int, sam: Backbone) -> None:
    torch.manual_seed(seed)
    part = EvolvedPrompt.on(sam, ONE, scorer=Scorer(), steps=4, step=0.05, trust=0.2)
    x = images(sam, 2, seed=seed, side=64)
    at = torch.rand(2, 3, 1, 2) * 60
    prompts = Prompts(points=at, labels=torch.ones(2, 3, 1, dtype=torch.long))
    with torch.no_grad():
        features = replace(sam(x), prompts=prompts)
        found = part.evolve(features, x)
        assert (found.score >= found.start).all()
        masks = sam.decoder(features.maps[-1], replace(prompts, points=found.points))[0][:, :, 0]
        sized = torch.nn.functional.interpolate(masks, x.shape[-2:], mode="bilinear")
        said = part.scorer(x.repeat_interleave(3, 0), (5 * sized).sigmoid().flatten(0, 1)[:, None]).unflatten(0, (2, 3))
    assert torch.allclose(said, found.score, atol=1e-5), "the score is that of the points returned"


def test_the_gradient_reaches_the_click_and_nothing_else(sam: Backbone) -> None:
    part = EvolvedPrompt.on(sam, ONE, steps=2).train()
    before = {name: t.clone() for name, t in part.tensors().items()}
    assert not list(part.parameters())
    x = images(sam, 1, side=64)
    prompts = Prompts(points=torch.tensor([[[[20.0, 30.0]]]]), labels=torch.ones(1, 1, 1, dtype=torch.long))
    found = part.evolve(replace(sam(x), prompts=prompts), x)
    assert not torch.equal(found.points, prompts.points) or not found.moved.any()
    assert all(torch.equal(t, before[name]) for name, t in part.tensors().items()), "batch norm stays as measured"
    assert prompts.points is not None
    place = prompts.points.clone().requires_grad_()
    masks = sam.decoder(sam(x).maps[-1], replace(prompts, points=place))[0]
    (slope,) = torch.autograd.grad(masks.square().sum(), place)
    assert slope.abs().min() > 0


def test_a_box_is_answered_as_it_is(sam: Backbone) -> None:
    x, box = images(sam, 1, side=64), Prompts(boxes=torch.tensor([[[4.0, 4.0, 40.0, 50.0]]]))
    answers = []
    for head in (MaskHead.on(sam, ONE), EvolvedPrompt.on(sam, ONE)):
        host = Host(sam)
        host.add(Adapter.of(sam, ONE, {"head": head}), "it")
        with torch.no_grad():
            answers.append(host(x, "it", prompts=box))
    assert torch.equal(*answers)


def test_the_recipe(tmp_path: Path) -> None:
    cells = write_dataset(tmp_path / "cells", "cells", train=3, test=1, size=64).parent
    data = load_dataset(cells)
    one = (next(iter(data.classes.values())),)
    run = Run(
        cells,
        tmp_path / "it",
        backbone="random:sam-tiny",
        image_size=64,
        steps=5,
        augment="none",
        classes=one,
        quiet=True,
    )
    said = find_recipe("sampot").program(run, moves=2, side=32)
    assert said["masks"] == 3 * 14
    assert -1 <= said["scorer correlation"] <= 1
    host, _ = open_model(str(tmp_path / "it"), device="cpu")
    picture = data.image(data.split("test")[0])
    assert host.predict(picture, NAME, prompts={"points": [(20, 20)]}).shape == picture.shape[:2]


def test_bad_calls(sam: Backbone, vit: Backbone) -> None:
    for call, words in (
        (lambda: EvolvedPrompt.on(sam, THREE), ("one class",)),
        (lambda: EvolvedPrompt.on(vit, ONE), ("no promptable decoder",)),
        (lambda: EvolvedPrompt.on(sam, ONE, trust=1.5), ("trust", "0 to 1")),
        (lambda: EvolvedPrompt.on(sam, ONE, steps=0), ("steps >= 1",)),
        (lambda: train_scorer(discs(1, 0), side=32, steps=0), ("one step",)),
    ):
        with pytest.raises(BadCall) as refused:
            call()
        says(refused.value, *words)
    x = images(sam, 1, side=64)
    with pytest.raises(BadCall) as refused:
        EvolvedPrompt.on(sam, ONE).evolve(sam(x), x)
    says(refused.value, "points")
