from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, Host, LinearHead, MaskHead, RefineDecoder
from medgraft.backbones import Backbone
from medgraft.backbones.prompts import Prompts
from medgraft.errors import BadCall
from medgraft.recipes import Run, find_recipe
from medgraft.recipes.sam_interactive import interactive_parts
from medgraft.training.batches import Batch
from medgraft.training.clicks import (
    Click,
    Clicked,
    answering,
    click_through,
    interactive_scores,
    next_click,
    normalised_focal,
)
from medgraft.training.data import load_dataset
from medgraft.training.fit import Asked, FitOptions
from medgraft.training.metrics import dice
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from medgraft.training.prompting import drawn
from tests.helpers import ONE, THREE, adapter, images, says


def disc(x: float, y: float, r: float, size: int = 32) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (xs - x) ** 2 + (ys - y) ** 2 <= r**2


NONE = np.zeros((32, 32), bool)


def test_the_first_click_is_the_middle_of_the_object() -> None:
    assert next_click(disc(12, 20, 6), NONE, NONE) == (12, 20, 1)


def test_a_click_goes_to_the_deeper_error() -> None:
    truth = disc(8, 8, 5) | disc(24, 24, 3)
    assert next_click(truth, disc(24, 24, 3), NONE) == (8, 8, 1), "what is missed"
    assert next_click(truth, truth | disc(24, 8, 4), NONE) == (24, 8, 0), "what is too much"
    before = NONE.copy()
    before[8, 8] = True
    assert next_click(truth, NONE, before)[:2] != (8, 8), "never the same pixel twice"


def test_drawn_clicks_lie_in_the_inner_half_of_the_error() -> None:
    truth = disc(16, 16, 10)
    found = {next_click(truth, NONE, NONE, drawn(0, t)) for t in range(60)}
    assert len(found) > 20
    assert all((c.x - 16) ** 2 + (c.y - 16) ** 2 <= 6**2 and c.label == 1 for c in found)


def test_nothing_left_to_mend() -> None:
    assert next_click(disc(9, 9, 4), disc(9, 9, 4), NONE) == (9, 9, 1)
    assert next_click(NONE, NONE, NONE).label == 0


def test_a_session_counts_clicks() -> None:
    truth = disc(10, 10, 6) | disc(24, 24, 5)

    def answer(clicks: list, earlier: np.ndarray | None) -> np.ndarray:
        """Finds the disc that was clicked, and adds it to what it found before."""
        new = disc(10, 10, 6) if clicks[-1].x < 17 else disc(24, 24, 5)
        return np.maximum(0 if earlier is None else earlier, new.astype(np.float32))

    done = click_through(answer, truth)
    assert len(done.ious) == 2
    assert done.ious[0] == pytest.approx(disc(10, 10, 6).sum() / truth.sum())
    assert done.ious[1] == 1
    assert (done.clicks_to(0.5), done.clicks_to(0.9)) == (1, 2)
    never = click_through(lambda clicks, earlier: NONE.astype(np.float32), truth, most=4)
    assert never.ious == (0.0,) * 4
    assert never.clicks_to(0.8) is None
    assert len(never.seconds) == 4


def test_normalised_focal_is_the_equation() -> None:
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 1, 4, 5, generator=g), torch.randint(0, 2, (2, 4, 5), generator=g)
    p = torch.where(t == 1, z[:, 0].sigmoid(), 1 - z[:, 0].sigmoid()).double()
    w = (1 - p) ** 2
    want = torch.stack([-(w[i] * p[i].log()).sum() / w[i].sum() for i in range(2)]).mean()
    assert normalised_focal(z, t).item() == pytest.approx(want.item(), rel=1e-5)


def test_the_denominator_has_no_gradient_and_a_sure_answer_is_finite() -> None:
    z = torch.tensor([[[[2.0, -1.0]]]], requires_grad=True)
    t = torch.tensor([[[1, 1]]])
    normalised_focal(z, t).backward()
    y = z.detach().requires_grad_()
    p = y.flatten().sigmoid()
    w = (1 - p) ** 2
    (-(w * p.log()).sum() / w.sum().detach()).backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, y.grad, atol=1e-6)
    sure = torch.full((1, 1, 4, 4), 100.0, requires_grad=True)
    loss = normalised_focal(sure, torch.ones(1, 4, 4, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_normalised_focal_wants_one_class() -> None:
    with pytest.raises(BadCall) as refused:
        normalised_focal(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))
    says(refused.value, "one class")


def asked_with(sam: Backbone, step: int) -> tuple[list[Prompts], Tensor]:
    """The prompts that one training step asks, and its logits: the answers always miss everything."""
    seen: list[Prompts] = []

    def resume(state: object, images: Tensor, name: str, *, prompts: Prompts) -> Tensor:
        seen.append(prompts)
        return torch.full((2, 1, 64, 64), -4.0, requires_grad=True) * 1

    targets = torch.from_numpy(np.stack([disc(20, 30, 9, 64), disc(40, 20, 6, 64)])).long()
    images = torch.zeros(2, 3, 64, 64)
    batch = Batch(images, targets, (), (0, 0))
    host = Host(sam)
    state = sam.stem(images)
    return seen, Clicked(3, most=4)(Asked(host, "it", batch, state, images, step, resume))


def test_training_clicks_follow_the_errors(sam: Backbone) -> None:
    counts = set()
    for step in range(12):
        seen, logits = asked_with(sam, step)
        counts.add(len(seen))
        assert logits.requires_grad, "the last answer learns"
        for k, prompts in enumerate(seen, 1):
            assert prompts.points is not None
            assert prompts.points.shape == (2, 1, k, 2), "clicks add up"
            assert prompts.labels is not None
            assert prompts.labels.eq(1).all(), "everything is missed, so every click is positive"
            assert (prompts.masks is None) == (k == 1), "the earlier answer is the mask prompt"
            x, y = prompts.points[0, 0, -1].tolist()
            assert disc(20, 30, 9, 64)[int(y), int(x)]
        if len(seen) > 1:
            last = seen[-1].masks
            assert last is not None
            assert last.shape == (2, 1, 16, 16)
            assert torch.allclose(last, torch.tensor(-4.0))
            assert not last.requires_grad
    assert counts == {1, 2, 3, 4}


def test_training_clicks_repeat(sam: Backbone) -> None:
    a, b = asked_with(sam, 5)[0][-1], asked_with(sam, 5)[0][-1]
    assert a.points is not None
    assert b.points is not None
    assert torch.equal(a.points, b.points)


class Listening:
    """In the place of `host.on(image)`: keeps what it was asked, and answers with 0.9 everywhere."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def predict(self, name: str, *, prompts: dict, probabilities: bool) -> np.ndarray:
        self.asked.append(prompts)
        return np.full((1, 6, 8), 0.9, np.float32)


def test_an_answer_is_told_back_as_logits() -> None:
    on = Listening()
    answer = answering(on, "it")  # type: ignore[arg-type]
    first = answer([Click(3, 2, 1)], None)
    answer([Click(3, 2, 1), Click(0, 5, 0)], first)
    assert on.asked[0] == {"points": [(3, 2)], "labels": [1]}
    assert on.asked[1]["points"] == [(3, 2), (0, 5)]
    assert on.asked[1]["labels"] == [1, 0]
    assert np.allclose(on.asked[1]["mask"], np.log(9), atol=1e-5)
    answer([Click(3, 2, 1)], np.array([[0.0, 1.0]]))
    assert np.isfinite(on.asked[2]["mask"]).all(), "a sure answer has a finite logit"


def test_only_promptable_adapters_are_clicked(vit: Backbone) -> None:
    host = Host(vit)
    host.add(adapter(vit, {"head": LinearHead.on(vit, ONE)}), "it")
    with pytest.raises(BadCall) as refused:
        interactive_scores(host, "it", None)  # type: ignore[arg-type]
    says(refused.value, "takes no clicks", "mask_head")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=4, test=2, size=64).parent


@pytest.mark.parametrize("form", [{"decoder": "own"}, {}, {"residual": True}], ids=["own", "refine", "residual"])
def test_the_recipe_trains_saves_and_is_scored(form: dict, cells: Path, tmp_path: Path) -> None:
    one = next(iter(load_dataset(cells).classes.values()))
    run = Run(
        cells, tmp_path / "it", backbone="random:sam-tiny", image_size=64, steps=3, batch=2, quiet=True, classes=(one,)
    )
    said = find_recipe("sam_interactive").program(run, **form)
    assert said["kind"] == "adapter"
    host, _ = open_model(str(tmp_path / "it"), device="cpu")
    found = interactive_scores(host, NAME, load_dataset(cells, classes=(one,)), most=3)
    assert found["n"] + found["empty"] == 2
    assert 1 <= found["NoC@80"] <= found["NoC@90"] <= 3
    assert len(found["iou_by_click"]) == 3
    assert found["SPC"] > 0


def test_a_fresh_residual_end_is_the_mask_head(sam: Backbone) -> None:
    x = images(sam, 2)
    prompts = Prompts(
        points=torch.tensor([[[[9.0, 30.0]]], [[[50.0, 20.0]]]]), labels=torch.ones(2, 1, 1, dtype=torch.long)
    )
    answers = []
    for head in (MaskHead.on(sam, ONE), RefineDecoder.on(sam, ONE, residual=True), RefineDecoder.on(sam, ONE)):
        host = Host(sam)
        host.add(Adapter.of(sam, ONE, {"head": head}), "it")
        with torch.no_grad():
            answers.append(host(x, "it", prompts=prompts))
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])


def test_a_few_steps_teach_clicks(sam: Backbone) -> None:
    """The refine decoder fits four drawn discs from one click each, with the encoder frozen."""
    torch.manual_seed(0)
    made = Adapter.of(sam, ONE, interactive_parts(sam, ONE))
    host = Host(sam)
    host.add(made, "it")
    targets = torch.from_numpy(
        np.stack([disc(x, y, 14, 64) for x, y in ((20, 20), (44, 40), (20, 44), (40, 20))])
    ).long()
    x = images(sam, 4, side=64) * 0.2 + targets[:, None] * 2
    state = sam.run(x, stop=host.cut("it"))
    prompts = Prompts(
        points=torch.tensor([[20.0, 20.0], [44, 40], [20, 44], [40, 20]])[:, None, None],
        labels=torch.ones(4, 1, 1, dtype=torch.long),
    )
    optimiser = torch.optim.AdamW(made.parameters(), lr=2e-3)
    overlap = []
    for _ in range(60):
        logits = host.resume(state, x, "it", prompts=prompts)
        overlap.append(float(dice((logits[:, 0] > 0).long().numpy(), targets.numpy(), 1).mean()))
        optimiser.zero_grad()
        normalised_focal(logits, targets).backward()
        optimiser.step()
    assert overlap[0] < 0.5
    assert overlap[-1] > 0.8


def test_the_rate_drops_twice() -> None:
    """As at epochs 20 and 25 of 30."""
    options = FitOptions(30, lr=5e-4, schedule="drops")
    assert [options.rate(t) for t in (0, 19, 20, 24, 25, 29)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6])


def test_bad_options(sam: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        interactive_parts(sam, ONE, decoder="deep")
    says(refused.value, "refine", "own", "deep")
    with pytest.raises(BadCall) as refused:
        Clicked(0, most=0)
    says(refused.value, "at least one click")
    with pytest.raises(BadCall) as refused:
        RefineDecoder.on(sam, THREE)
    says(refused.value, "one class", "class_prompts")
    with pytest.raises(BadCall) as refused:
        RefineDecoder({}, width=20)
    says(refused.value, "multiple of 8")
