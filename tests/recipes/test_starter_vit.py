import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import medgraft
from medgraft.errors import BadCall
from medgraft.recipes import starter_vit as recipe
from medgraft.recipes.starter_vit import ARCHITECTURE, READS, starter_vit

SHIPPED = Path(medgraft.__file__).parent / "weights" / "starter_vit.safetensors"


@pytest.fixture(autouse=True)
def a_toy_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ARCHITECTURE | {"img_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(recipe, "ARCHITECTURE", toy)


TOY = {"batch": 4, "small_size": 32, "warmup": 2, "lr": 3e-3, "save_every": 3}


def test_it_learns_and_writes_half_precision_under_timm_names(tmp_path: Path) -> None:
    out = starter_vit(tmp_path / "deep" / "toy.safetensors", steps=25, **TOY)
    weights = load_file(out)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert weights["blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert not out.with_suffix(".resume.pt").exists()
    lines = [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert READS.keys() <= lines[-1].keys()


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(starter_vit(tmp_path / "whole.safetensors", steps=6, **TOY))
    draw, calls = recipe._draw, []

    def trip(numbers: range, seed: int, size: int):
        calls.append(numbers)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(numbers, seed, size)

    monkeypatch.setattr(recipe, "_draw", trip)
    with pytest.raises(KeyboardInterrupt):
        starter_vit(tmp_path / "cut.safetensors", steps=6, **TOY)
    resumed = load_file(starter_vit(tmp_path / "cut.safetensors", steps=6, **TOY))
    assert len(calls) == 5 + 3  # it began again at step 3, the last checkpoint
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_the_losses_are_zero_sum_free_of_nan_when_one_thing_fills_the_picture() -> None:
    drawn = {name: torch.zeros(2, c, 8, 8) for name, c in READS.items()}
    targets = {"region": torch.zeros(2, 8, 8).long(), "texture": torch.zeros(2, 8, 8).long()}
    targets |= {"kind": torch.zeros(2, 8, 8).long(), "thing": torch.zeros(2, 8, 8), "edge": torch.zeros(2, 3, 8, 8)}
    losses = recipe._losses(drawn, torch.zeros(2, 3, 16, 16), targets, torch.Generator().manual_seed(0))
    assert losses.keys() == READS.keys()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_every_read_map_puts_each_cell_under_its_own_token() -> None:
    side, cells, total = 3, 4, sum(READS.values())
    tokens = torch.arange(side * side).float()[None, :, None].expand(1, -1, total * cells**2)
    for name, read in recipe._unfold(tokens, side, cells).items():
        assert read.shape == (1, READS[name], side * cells, side * cells)
        want = torch.arange(side * side).reshape(side, side).repeat_interleave(cells, 0).repeat_interleave(cells, 1)
        assert (read[0, 0] == want).all()


def test_blanking_leaves_every_second_picture_whole() -> None:
    blanked = recipe._blank(torch.ones(4, 3, 32, 32), 8, torch.Generator().manual_seed(0), share=0.5)
    assert (blanked[::2] == 1).all()
    assert 0 < (blanked[1::2] == 0).float().mean() < 1


def test_steps_must_be_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(BadCall, match="steps=0"):
        starter_vit(tmp_path / "x.safetensors", steps=0)


def test_the_command_line_has_the_recipes_own_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["--steps", "1", "--batch", "2", "--small-size", "32", "--no-resume"]
    recipe.main(starter_vit, [str(tmp_path / "cli.safetensors"), *toy])
    assert capsys.readouterr().out.strip().endswith("cli.safetensors")


def test_the_shipped_weights_fit_the_stated_architecture() -> None:
    assert SHIPPED.stat().st_size < 12e6
    with safe_open(SHIPPED, "pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
    assert architecture == ARCHITECTURE
    model = VisionTransformer(**architecture)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(SHIPPED).items()})
    features = model.eval().forward_features(torch.zeros(1, 3, 128, 128))
    assert features.shape == (1, 257, 256)
    assert torch.isfinite(features).all()
