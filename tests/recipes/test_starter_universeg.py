"""The pretraining program of the starter UniverSeg, on a toy network."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medgraft import load_backbone
from medgraft.backbones import Backbone
from medgraft.errors import BadCall
from medgraft.recipes import starter_universeg as recipe
from medgraft.recipes.script import main
from medgraft.recipes.starter_universeg import starter_universeg

TOY = {"batch": 2, "size": 32, "warmup": 2, "lr": 3e-3, "save_every": 3, "small_share": 1.0}


@pytest.fixture(autouse=True)
def a_toy_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(id: str) -> Backbone:
        return load_backbone(id + "&widths=8,8")

    monkeypatch.setattr(recipe, "load_backbone", load)


def test_it_learns_and_its_file_is_a_checkpoint(tmp_path: Path) -> None:
    out = starter_universeg(tmp_path / "deep" / "toy.safetensors", steps=100, **TOY)
    assert {t.dtype for t in load_file(out).values()} == {torch.float16}
    assert not out.with_suffix(".resume.pt").exists()
    lines = [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_backbone(f"universeg:{out}").spec.id == "universeg:custom"


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(starter_universeg(tmp_path / "whole.safetensors", steps=6, **TOY))
    draw, calls = recipe.episode, []

    def trip(seed: int, **options: int):
        calls.append(seed)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return draw(seed, **options)

    monkeypatch.setattr(recipe, "episode", trip)
    with pytest.raises(KeyboardInterrupt):
        starter_universeg(tmp_path / "cut.safetensors", steps=6, **TOY)
    resumed = load_file(starter_universeg(tmp_path / "cut.safetensors", steps=6, **TOY))
    assert len(calls) == 9 + 2 * 3  # it began again at step 3, the last checkpoint
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())


def test_steps_and_batch_must_be_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(BadCall, match="batch=0"):
        starter_universeg(tmp_path / "x.safetensors", batch=0)


def test_the_command_line_has_the_programs_own_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        starter_universeg,
        [str(tmp_path / "cli.safetensors"), "--steps", "1", "--size", "32", "--small-share", "1", "--no-resume"],
    )
    assert capsys.readouterr().out.strip().endswith("cli.safetensors")
