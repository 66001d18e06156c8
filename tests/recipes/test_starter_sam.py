"""The pretraining program of the starter SAM: its birth, its questions, and a few steps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medgraft import load_backbone
from medgraft.backbones.prompts import Prompts
from medgraft.errors import BadCall, BadData
from medgraft.recipes import starter_sam as recipe
from medgraft.recipes.script import main
from medgraft.recipes.starter_sam import SIZE, newborn, posed, starter_sam
from medgraft.training.phantoms import REGIONS, phantom
from tests.helpers import says

TOY = {"batch": 1, "questions": 2, "rounds": 2, "warmup": 2, "save_every": 2}


def test_it_is_born_with_the_starter_vits_encoder() -> None:
    """The same patches for the same picture, the same blocks; only the class token is missing."""
    sam, vit = newborn(0), load_backbone("medgraft:starter-vit")
    picture = torch.rand(1, 3, SIZE, SIZE)
    ours, theirs = (
        (picture - torch.tensor(on.spec.mean)[:, None, None]) / torch.tensor(on.spec.std)[:, None, None]
        for on in (sam, vit)
    )
    with torch.no_grad():
        stem, tokens = sam.stem(ours), vit.stem(theirs).x[:, 1:]
        torch.testing.assert_close(stem.x.flatten(1, 2), tokens, atol=1e-4, rtol=1e-4)
        last = vit.network.blocks(tokens)
        state = sam.run(ours, stop=sam.depth)
        torch.testing.assert_close(state.x.flatten(1, 2), last, atol=1e-3, rtol=1e-3)
    assert not torch.equal(newborn(1).network.mask_decoder.iou_token.weight, sam.network.mask_decoder.iou_token.weight)


def test_questions_are_things_of_the_picture() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [phantom(k, size=SIZE) for k in range(6)]
    pictures, things = posed(drawn, 5, g, newborn(0))
    assert pictures.shape == (6, 3, SIZE, SIZE)
    assert things.shape == (6, 5, SIZE, SIZE)
    padded = 0
    for one, picture, asked in zip(drawn, pictures, things, strict=True):
        there = (picture != 0).any(0)
        padded += not there.all()
        for thing in asked:
            assert thing.sum() >= recipe.SMALLEST
            assert not (thing & ~there).any()
            found = torch.from_numpy(one.instance)[thing].unique()
            kind = torch.from_numpy(one.region)[thing].unique()
            assert len(found) == 1 or len(kind) == 1
            assert kind.min() > REGIONS.index("outside") or found.min() > 0
    assert padded


def test_boxes_and_clicks_are_about_the_thing() -> None:
    g = torch.Generator().manual_seed(0)
    thing = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    thing[..., 40:60, 10:90] = True
    exact = recipe._boxes(thing, g, jitter=0.0)
    assert exact.flatten().tolist() == [10, 40, 89, 59]
    near = torch.cat([recipe._boxes(thing, g) for _ in range(50)])[:, 0]
    off = (near - exact[0]).abs().amax(0)
    assert (off > torch.tensor([3.0, 1, 3, 1])).all()
    assert (off <= 0.2 * torch.tensor([80.0, 20, 80, 20])).all()

    truth = torch.nn.functional.max_pool2d(thing.float(), 2) > 0
    wrong = torch.zeros_like(truth)
    wrong[..., 3:5, 50:60] = True
    first = recipe._clicked(Prompts(), truth, truth, g)
    both = recipe._clicked(first, wrong, truth, g)
    assert both.points is not None
    assert both.labels is not None
    assert both.labels.tolist() == [[[1, 0]]]
    (x, y), (u, v) = both.points[0, 0].tolist()
    assert thing[0, 0, int(y), int(x)]
    assert wrong[0, 0, int(v) // 2, int(u) // 2]
    again = recipe._clicked(both, torch.zeros_like(wrong), truth, g)
    assert again.labels is not None
    assert again.labels[0, 0, 2] == 1


def test_the_loss_by_hand() -> None:
    """Mask 0 and the best of the other three count; the estimates of all four do."""
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    truth[..., :4] = True
    perfect, opposite = torch.where(truth, 30.0, -30.0), torch.where(truth, -30.0, 30.0)
    quality = torch.tensor([[[1.0, 0, 1, 0]]])
    right = torch.stack([perfect, opposite, perfect, opposite], 2)
    loss, overlap = recipe._loss(right, quality, truth)
    assert loss < 1e-5
    assert overlap == 1
    loss, overlap = recipe._loss(right[:, :, [1, 0, 2, 3]], quality[:, :, [1, 0, 2, 3]], truth)
    assert overlap == 0
    torch.testing.assert_close(loss, torch.tensor(20 * 0.5 * 30 + 1 - 1 / 65), atol=1e-2, rtol=1e-3)
    loss, _ = recipe._loss(right, 1 - quality, truth)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_a_run_writes_a_backbone_and_trains_what_it_says(tmp_path: Path) -> None:
    out = starter_sam(tmp_path / "deep" / "sam.safetensors", steps=2, blocks=1, **TOY)
    tensors = load_file(out)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert out.stat().st_size < 14e6
    assert not out.with_suffix(".resume.pt").exists()
    line = json.loads(out.with_suffix(".log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2
    assert len(line["iou"]) == 2
    loaded = load_backbone(f"medgraft:starter-sam@{out}")
    assert (loaded.spec.id, loaded.spec.image_size, loaded.spec.random) == ("medgraft:starter-sam", SIZE, False)
    born = newborn(0).network.state_dict()
    changed = {name for name, t in tensors.items() if not torch.equal(t, born[name].half())}
    assert not any(name.startswith(f"vision_encoder.layers.{i}.") for name in changed for i in range(5))
    for must in ("vision_encoder.layers.5.", "vision_encoder.neck.", "mask_decoder.", "prompt_encoder.mask_embed."):
        assert any(name.startswith(must) for name in changed), must
    assert not any("positional_embedding" in name or "patch_embed" in name for name in changed)


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(starter_sam(tmp_path / "whole.safetensors", steps=4, **TOY))
    draw, calls = recipe.phantom, []

    def trip(seed: int, **options: int):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(seed, **options)

    monkeypatch.setattr(recipe, "phantom", trip)
    with pytest.raises(KeyboardInterrupt):
        starter_sam(tmp_path / "cut.safetensors", steps=4, **TOY)
    resumed = load_file(starter_sam(tmp_path / "cut.safetensors", steps=4, **TOY))
    assert calls == [0, 1, 2, 3, 2, 3]  # it began again at step 2, the last checkpoint
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())


def test_bad_input(tmp_path: Path, vit_file: Path) -> None:
    for wrong in ({"batch": 0}, {"rounds": 0}, {"blocks": 7}):
        with pytest.raises(BadCall) as refused:
            starter_sam(tmp_path / "x.safetensors", **wrong)
        says(refused.value, next(iter(wrong)))
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(BadData) as misfit:
        load_backbone(f"medgraft:starter-sam@{vit_file}")
    says(misfit.value, "do not fit", "starter-sam")


@pytest.fixture
def vit_file() -> Path:
    return Path(recipe.__file__).parents[1] / "weights" / "starter_vit.safetensors"


def test_the_command_line_has_the_programs_own_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "1", "--batch", "1", "--questions", "1", "--rounds", "1", "--no-resume"]
    main(starter_sam, [str(tmp_path / "cli.safetensors"), *flags])
    assert capsys.readouterr().out.strip().endswith("cli.safetensors")


def test_the_shipped_weights_answer_boxes_on_new_phantoms() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [phantom(900_000_000 + k, size=SIZE) for k in range(16)]
    overlaps = {}
    for name, sam in (("shipped", load_backbone("medgraft:starter-sam")), ("newborn", newborn(0))):
        pictures, things = posed(drawn, 3, g.manual_seed(0), newborn(0))
        truth = torch.nn.functional.adaptive_avg_pool2d(things.float(), 64) >= 0.5
        with torch.no_grad():
            embedding = sam(pictures).maps[-1]
            masks, quality = recipe._four(sam.decoder, embedding, Prompts(boxes=recipe._boxes(things, g)))
        overlaps[name] = recipe._loss(masks, quality, truth)[1]
    assert overlaps["shipped"] > 0.4 > 0.2 > overlaps["newborn"], overlaps
