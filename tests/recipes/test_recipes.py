"""Every recipe, found by walking the registry, at toy size: it trains, saves, reloads, scores, explains itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.adapters import Host
from medgraft.adapters.explain import explain
from medgraft.adapters.store import TENSORS_NAME, read_record, save_adapter
from medgraft.backbones import load_backbone
from medgraft.errors import BadCall, BadData, SaveFailed, UnknownName
from medgraft.recipes import RECIPES, Run, find_recipe
from medgraft.recipes.avit import avit_parts, load_authors
from medgraft.recipes.dry import dry_adapter
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import NAME, open_model
from medgraft.training.phantoms import write_dataset
from tests.helpers import says

TINY = "random:timm:vit_tiny_patch16_224"
SEGMENT_ONLY = {"avit", "label_dropout"}
WITHOUT_FIT = {"gpt4mia", "universeg", "universeg_tune"} | {n for n in RECIPES if "sam" in n}
WITHOUT_FIT |= {"foundation3d", "fseft", "sparse_transfer", "volume_lora"}
"""Recipes that train nothing step by step, so that there is no log, no curve and no size without data, or that want a backbone of
another kind: tested in their own files."""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cells"), "cells", train=4, test=2, size=64).parent


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for n, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(120 * n, 120 * n + 100, (32, 32, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def run(data: Path, out: Path, name: str, **more: object) -> Run:
    shared = {
        **RECIPES[name].defaults,
        "backbone": TINY,
        "image_size": 64,
        "steps": 2,
        "batch": 2,
        "quiet": True,
        **more,
    }
    return Run(data, out, **shared)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - WITHOUT_FIT))
def test_a_recipe_trains_saves_and_scores(name: str, cells: Path, tmp_path: Path) -> None:
    result = RECIPES[name].program(run(cells, tmp_path / "a", name, shots=3))
    assert result["classes"] == ["cytoplasm", "nucleus"]
    assert result["shots"] == 3
    assert "random weights" in result["backbone"]
    host, adapter = open_model(str(tmp_path / "a"))
    score = evaluate(host, NAME, load_dataset(cells))
    assert 0 <= score["dice"] <= 1
    assert adapter.task.classes == ("cytoplasm", "nucleus")
    assert (tmp_path / "a.log" / "log.jsonl").is_file()
    assert (tmp_path / "a.log" / "curves.png").is_file()
    assert len(list((tmp_path / "a.log" / "overlays").glob("*.png"))) == 2
    assert not (tmp_path / "a.log" / "training_state.pt").exists()


@pytest.mark.parametrize("name", sorted(set(RECIPES) - SEGMENT_ONLY - WITHOUT_FIT))
def test_a_recipe_classifies(name: str, labels: Path, tmp_path: Path) -> None:
    RECIPES[name].program(run(labels, tmp_path / "a", name, task="classify", shots=2))
    host, adapter = open_model(str(tmp_path / "a"))
    assert adapter.task.kind == "classify"
    assert evaluate(host, NAME, load_dataset(labels, labels="label"))["n"] == 4


@pytest.mark.parametrize("name", sorted(set(RECIPES) - WITHOUT_FIT))
def test_a_recipe_explains_itself(name: str, tmp_path: Path) -> None:
    adapter, backbone = dry_adapter(name, backbone=TINY, image_size=64)
    facts = explain(adapter, backbone)
    assert facts.trainable == adapter.trainable > 0
    assert facts.activations > 0
    for dtype, told in facts.bytes.items():
        blob = (save_adapter(adapter, tmp_path / dtype, dtype=dtype) / TENSORS_NAME).read_bytes()
        assert told == len(blob) - 8 - int.from_bytes(blob[:8], "little"), "not what the file holds behind its header"


def test_the_defaults_of_avit_are_the_papers() -> None:
    import inspect

    recipe = find_recipe("avit")
    own = {n: p.default for n, p in inspect.signature(recipe.program).parameters.items()}
    assert own["lr"] == 1e-4
    assert own["weight_decay"] == 0.05
    assert recipe.defaults == {"steps": None, "batch": 16, "augment": "fresh", "image_size": 224}


def test_epochs_become_steps(cells: Path, tmp_path: Path) -> None:
    four = run(cells, tmp_path, "avit", steps=None, batch=3)
    assert four.steps_or(200) == 200 * 2  # 4 images in batches of 3
    assert run(cells, tmp_path, "avit", steps=7).steps_or(200) == 7


def test_without_site_parts_the_readouts_remain(cells: Path, tmp_path: Path) -> None:
    find_recipe("avit").program(run(cells, tmp_path / "a", "avit", augment="none"), site_parts=False)
    assert [p["name"] for p in read_record(tmp_path / "a")["parts"]] == ["prompt", "decoder"]


def test_provenance_tells_the_run_and_no_path(cells: Path, tmp_path: Path) -> None:
    find_recipe("lora").program(run(cells, tmp_path / "a", "lora", license="apache-2.0", modality="microscopy"), rank=2)
    facts = read_record(tmp_path / "a")["provenance"]
    assert facts["recipe"] == "lora"
    assert facts["settings"]["rank"] == 2
    assert facts["seed"] == 0
    assert facts["license"] == "apache-2.0"
    whole = (tmp_path / "a" / "adapter.json").read_text()
    assert str(tmp_path) not in whole
    assert all(i.id not in whole for i in load_dataset(cells).items)


def test_an_interrupted_run_resumes_to_the_same_adapter(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from medgraft.recipes import parameter_efficient
    from medgraft.training import fit as fitting

    monkeypatch.setattr(parameter_efficient, "FitOptions", partial(fitting.FitOptions, keep_every=1))
    find_recipe("lora").program(run(cells, tmp_path / "a", "lora", steps=4))
    real, calls = fitting._step, []

    def stop(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        find_recipe("lora").program(run(cells, tmp_path / "b", "lora", steps=4))
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.log" / "training_state.pt").is_file()
    monkeypatch.setattr(fitting, "_step", real)
    find_recipe("lora").program(run(cells, tmp_path / "b", "lora", steps=4, resume=True))
    a, b = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_what_a_user_gets_wrong_is_said(cells: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="avit"):
        find_recipe("avitt")
    with pytest.raises(BadData, match="9 shots"):
        find_recipe("lora").program(run(cells, tmp_path / "a", "lora", shots=9))
    with pytest.raises(BadCall, match="segments"):
        find_recipe("avit").program(run(labels, tmp_path / "a", "avit", task="classify"))
    with pytest.raises(UnknownName, match="nucleus"):
        find_recipe("lora").program(run(cells, tmp_path / "a", "lora", classes=("nuclei",)))
    with pytest.raises(UnknownName, match="no site matches"):
        find_recipe("lora").program(run(cells, tmp_path / "a", "lora"), targets="blocks.*.atn.qkv")
    with pytest.raises(BadCall, match="multiple of 16"):
        find_recipe("lora").program(run(cells, tmp_path / "a", "lora", image_size=65))
    assert not (tmp_path / "a").exists()


def test_avit_loads_the_authors_key_names() -> None:
    """A checkpoint with the names of METHODS: every tensor arrives where it belongs."""
    backbone = load_backbone(TINY, image_size=64)
    from medgraft.adapters import Adapter, Task

    task = Task("segment", ("lesion",))
    source, target = (Adapter.of(backbone, task, avit_parts(backbone, task)) for _ in range(2))
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    state = {}
    for name, t in source.tensors().items():
        part, _, key = name.partition(".")
        if part == "bottleneck":
            _, i, branch, layer, leaf = key.split(".")
            key = f"encoder.blocks.{i}.adapter{1 if branch == 'attn' else 2}.0.D_fc{1 if layer == 'down' else 2}.{leaf}"
        elif part == "norms":
            key = f"encoder.{key}"
        elif part == "prompt":
            key = f"prompt_encoder.{key}"
        state[key] = t.detach().clone()
    assert "aspp.convs.4.1.weight" in state
    assert "aspp.project.0.weight" in state
    assert "final_conv.6.bias" in state
    assert "prompt_encoder.layer1.2.conv2.weight" in state
    assert "encoder.blocks.11.adapter2.0.D_fc1.weight" in state
    load_authors(dict(target.named_parts()), state)
    x = torch.randn(1, 3, 64, 64)
    host = Host(backbone)
    host.add(source, "source")
    host.add(target, "target")
    assert torch.equal(host(x, "source"), host(x, "target"))
    state.pop("final_conv.6.bias")
    with pytest.raises(BadCall, match=r"final_conv\.6\.bias"):
        load_authors(dict(target.named_parts()), state)


def test_avit_on_swin_reads_the_third_level(cells: Path, tmp_path: Path) -> None:
    swin = "random:timm:swin_tiny_patch4_window7_224"
    find_recipe("avit").program(run(cells, tmp_path / "a", "avit", backbone=swin))
    decoder = next(p for p in read_record(tmp_path / "a")["parts"] if p["name"] == "decoder")
    assert decoder["config"]["level"] == 2
    assert decoder["config"]["width"] == 384


def test_a_file_in_the_place_of_the_log_is_named(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("mine")
    with pytest.raises(SaveFailed) as refused:
        RECIPES["linear_probe"].program(run(cells, tmp_path / "a", "linear_probe"))
    says(refused.value, "a.log", "--out")
    assert (tmp_path / "a.log").read_text() == "mine"
