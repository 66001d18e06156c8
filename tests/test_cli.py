"""The command line, as a person types it. A mistake ends in one line that helps and exit code 2, never in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgraft import cli
from medgraft.training.phantoms import write_dataset

TINY = "random:timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("lesion"), "lesion", train=4, test=3, size=64).parent


@pytest.fixture(scope="module")
def adapter(lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lesion"
    code, _ = call(
        "adapt",
        "lora",
        "--data",
        lesions,
        "--out",
        out,
        "--backbone",
        TINY,
        "--image-size",
        64,
        "--shots",
        3,
        "--steps",
        3,
        "--quiet",
    )
    assert code == 0
    return out


def call(*words: object) -> tuple[int, str]:
    """Run `medgraft words...` in this process; exit code and everything printed."""
    import contextlib
    import io

    from medgraft.cli.shared import console

    stream = io.StringIO()
    before, sys.argv = sys.argv, ["medgraft", *map(str, words)]
    console.width = 200
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return code, stream.getvalue()


def test_evaluate_writes_the_figures(adapter: Path, lesions: Path, tmp_path: Path) -> None:
    code, said = call("evaluate", adapter, "--data", lesions, "--json", tmp_path / "deep" / "score.json")
    assert code == 0
    found = json.loads((tmp_path / "deep" / "score.json").read_text())
    assert {"dice", "iou", "per_image", "interval", "n"} <= found.keys()
    assert found["n"] == 3 == len(found["per_image"])
    assert "random weights" in said


def test_predict_writes_masks_and_overlays(adapter: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 51, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    code, said = call("predict", adapter, tmp_path / "x.png", "--out", tmp_path / "out")
    assert code == 0
    assert np.asarray(Image.open(tmp_path / "out" / "x.png")).shape == (70, 51)
    assert (tmp_path / "out" / "x_overlay.png").is_file()
    assert "random weights" in said
    code, said = call("predict", adapter, tmp_path / "x.png", "--out", tmp_path / "out", "--box", "1,2,3,4")
    assert code == 2
    assert "takes no prompts" in said


def test_info_verify_list_explain(adapter: Path) -> None:
    for words, wanted in {
        ("info", adapter): "random weights",
        ("verify", adapter): "probe",
        ("list",): "starter-vit",
        ("explain", "lora", "--backbone", TINY, "--image-size", 64): "24: ",
        ("explain", adapter, "--sites"): "blocks.3.attn.qkv",
        ("explain", "bottleneck", "--backbone", TINY, "--image-size", 64): "not fused: the tensors are on cpu",
        (
            "explain",
            "surgical_sam",
            "--backbone",
            "random:sam-tiny",
            "--image-size",
            64,
        ): "attention in 3 blocks: not fused",
        ("explain", "full_finetune", "--backbone", TINY, "--image-size", 64): "readout",
    }.items():
        code, said = call(*words)
        assert code == 0, said
        assert wanted in said, said


def test_a_damaged_adapter_fails_verification(adapter: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(adapter, tmp_path / "a")
    tensors = bytearray((tmp_path / "a" / "adapter.safetensors").read_bytes())
    tensors[-5] ^= 1
    (tmp_path / "a" / "adapter.safetensors").write_bytes(tensors)
    code, said = call("verify", tmp_path / "a")
    assert code == 1
    assert "FAILED" in said


def test_publish_pull_search_in_a_folder(adapter: Path, tmp_path: Path) -> None:
    target = f"file:{tmp_path}/registry/lab/lesion"
    assert call("publish", adapter, target)[0] == 0
    assert call("pull", target, "--out", tmp_path / "mine")[0] == 0
    assert (tmp_path / "mine" / "adapter.safetensors").read_bytes() == (adapter / "adapter.safetensors").read_bytes()
    code, said = call("search", tmp_path / "registry", "--class", "lesion")
    assert code == 0
    assert "lab/lesion" in said


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("adapt", "loraa", "--data", ".", "--out", "x"), "did you mean 'lora'"),
        (("adapt", "lora", "--data", "nowhere", "--out", "x"), "nowhere"),
        (("adapt", "lora", "--data", ".", "--out", "x", "--backbone", "starter-vit"), "FAMILY:NAME"),
        (("explain", "lorra"), "did you mean 'lora'"),
        (("explain", "lora", "--backbone", "timmm:vit"), "did you mean 'timm'"),
        (("explain", "lora", "--backbone", "random:timm:vit_tiny_patch16_225"), "vit_tiny_patch16_224"),
        (("info", "nowhere"), "nowhere"),
        (("evaluate", "nowhere/at all", "--data", "."), "nowhere"),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, tuple) else "",
)
def test_mistakes_are_answered_in_words(
    words: tuple[str, ...], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    code, said = call(*words)
    assert code == 2, said
    assert wanted in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists()


def test_the_command_itself_and_what_an_import_costs() -> None:
    """One real process: help works, and `import medgraft` does not import torch."""
    done = subprocess.run([sys.executable, "-m", "medgraft", "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "adapt", "predict", "evaluate", "explain", "info", "list", "verify", "publish", "pull"):
        assert name in done.stdout
    code = "import sys, medgraft; assert 'torch' not in sys.modules; medgraft.Host; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_in_the_readme() -> None:
    import medgraft

    assert len(medgraft.__all__) <= 20
    assert set(medgraft.__all__) == set(medgraft._HOME)
    for name in medgraft.__all__:
        assert getattr(medgraft, name) is not None
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert [n for n in medgraft.__all__ if f"`{n}`" not in page] == []
    with pytest.raises(AttributeError, match="load_adapter"):
        _ = medgraft.load_adaptor  # type: ignore[attr-defined]
