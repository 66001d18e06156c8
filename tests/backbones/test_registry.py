"""`load_backbone(id)`: the grammar of ids, where weights come from, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medgraft.backbones import FAMILIES, Backbone, load_backbone
from medgraft.backbones.identity import fingerprint
from medgraft.backbones.registry import BackboneId, family, parse, starter_vit
from medgraft.errors import BadCall, BadData, UnknownName
from tests.helpers import images, says

# The grammar


@pytest.mark.parametrize(
    ("id", "parsed", "text"),
    [
        ("timm:vit_base_patch16_224", BackboneId("timm", "vit_base_patch16_224"), None),
        ("random:timm:vit?seed=3", BackboneId("timm", "vit", True, (("seed", "3"),)), None),
        ("hf:facebook/dinov2-base", BackboneId("hf", "facebook/dinov2-base"), None),
        ("medgraft:starter-vit", BackboneId("medgraft", "starter-vit"), None),
        ("timm:vit@dir/file.pth", BackboneId("timm", "vit", path="dir/file.pth"), "timm:vit"),
        ("timm:vit@/a@b:c?d=e.pth", BackboneId("timm", "vit", path="/a@b:c?d=e.pth"), "timm:vit"),
        ("random:hf:vit?width=32&depth=2", BackboneId("hf", "vit", True, (("width", "32"), ("depth", "2"))), None),
    ],
)
def test_ids(id: str, parsed: BackboneId, text: str | None) -> None:
    assert parse(id) == parsed
    assert str(parsed) == (text or id), "the text never has a local path in it"


BAD_IDS = {
    "": ("cannot read", "FAMILY:NAME", "medgraft:starter-vit"),
    "vit_base_patch16_224": ("cannot read", "FAMILY:NAME"),
    "timm:": ("cannot read", "FAMILY:NAME"),
    "timm:vit@": ("cannot read", "@PATH"),
    ":vit": ("no backbone family called ''", "hf"),
    "timn:vit": ("'timn'", "did you mean 'timm'"),
    "random:random:timm:vit_tiny_patch16_224": ("no backbone family called 'random'",),
    "timm:vit_tiny_patch16_242?": ("'vit_tiny_patch16_242'", "did you mean 'vit_tiny_patch16_224'"),
    "random:timm:vit_tiny_patch61_224": ("did you mean", "vit_tiny_patch16_224"),
    "random:timm:vit_tiny_patch16_224@weights.pth": ("random weights and for a file", "drop"),
    "random:timm:vit_tiny_patch16_224?sede=3": ("'sede'", "did you mean 'seed'"),
    "random:timm:vit_tiny_patch16_224?seed=x": ("seed", "whole number", "'x'"),
    "random:timm:vit_tiny_patch16_224?seed=": ("seed", "whole number"),
    "random:timm:vit_tiny_patch16_224?seed=-1": ("seed", "whole number"),
    "timm:vit_tiny_patch16_224?seed=3": ("'seed'", "option", "random:"),
    "medgraft:starter-vit?seed=3": ("'seed'", "option", "random:"),
    "medgraft:starter": ("'starter'", "did you mean 'starter-vit'"),
    "random:hf:vti": ("'vti'", "did you mean 'vit'"),
    "random:hf:vit?width=many": ("width", "whole number", "'many'"),
    "random:hf:vit?width=0": ("width", "whole number"),
    "random:hf:vit?width=30": ("width 30", "heads 4"),
    "random:hf:vit?size=30": ("size 30", "patch 16"),
    "random:timm:resnet18": ("resnet18", "not supported", "swin"),
    "random:timm:swinv2_tiny_window8_256": ("swinv2", "not supported", "past their layers"),
    "random:timm:beit_base_patch16_224": ("beit", "not supported"),
    "random:timm:vit_small_resnet26d_224": ("not supported", "stem"),
    "random:timm:vit_small_patch16_rope_mixed_224": ("rotary positions that differ by block", "DINOv3"),
}


@pytest.mark.parametrize("id", BAD_IDS)
def test_an_id_that_cannot_be_loaded_says_why(id: str) -> None:
    with pytest.raises((BadCall, UnknownName)) as refused:
        load_backbone(id)
    says(refused.value, *BAD_IDS[id])


@pytest.mark.parametrize("size", [0, -16, 100])
@pytest.mark.parametrize(
    "id", ["random:timm:vit_tiny_patch16_224", "random:timm:swin_tiny_patch4_window7_224", "random:hf:vit"]
)
def test_an_image_size_that_does_not_fit(id: str, size: int) -> None:
    with pytest.raises(BadCall) as refused:
        load_backbone(id, image_size=size)
    says(refused.value, f"image size {size}", "multiple of", "32" if "swin" in id else "16")


def test_a_family_is_registered_once() -> None:
    with pytest.raises(BadCall, match="'timm' is already registered"):
        family("timm")(lambda id, size: None)
    flat, volumes = {"timm", "medgraft", "hf", "universeg", "unet", "sam", "sam-tiny"}, {"meshnet", "monai", "volume"}
    assert flat | volumes == set(FAMILIES)


def test_the_starter_is_real_and_random_is_said_to_be_random() -> None:
    real, drawn = load_backbone("medgraft:starter-vit"), load_backbone("random:medgraft:starter-vit", image_size=64)
    assert not real.spec.random
    assert "random" not in real.spec.title
    assert drawn.spec.random
    assert drawn.spec.title == "random:medgraft:starter-vit (random weights)"
    assert real.spec.fingerprint != drawn.spec.fingerprint
    assert (real.spec.image_size, drawn.spec.image_size) == (128, 64)
    assert next(real.parameters()).dtype == torch.float32, "stored in half precision, run in single"


# Weights from a file

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {k: v.clone() for k, v in load_backbone(f"random:timm:{NAME}", image_size=64).network.state_dict().items()}


def from_file(weights: dict[str, Tensor], path: Path, name: str = NAME) -> Backbone:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return load_backbone(f"timm:{name}@{path}", image_size=64)


def test_a_file_gives_the_network_that_was_saved(
    weights: dict[str, Tensor], vit_tiny: Backbone, tmp_path: Path
) -> None:
    loaded = [from_file(weights, tmp_path / f"w{suffix}") for suffix in (".safetensors", ".pth")]
    nested = from_file({"model": weights, "epoch": 3}, tmp_path / "nested.pth")
    shuffled = from_file(dict(reversed(weights.items())), tmp_path / "shuffled.pth")
    with torch.no_grad():
        want = vit_tiny(images(vit_tiny)).pooled
        for on in (*loaded, nested, shuffled):
            assert torch.equal(on(images(on)).pooled, want)
            assert on.spec.fingerprint == fingerprint(weights) == vit_tiny.spec.fingerprint
            assert on.spec.id == f"timm:{NAME}"
            assert not on.spec.random
            assert str(tmp_path) not in repr(on)


def test_a_classifier_is_dropped_but_is_part_of_the_fingerprint(
    weights: dict[str, Tensor], vit_tiny: Backbone, tmp_path: Path
) -> None:
    on = from_file(
        weights | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}, tmp_path / "w.safetensors"
    )
    assert on.digest() == vit_tiny.digest()
    assert on.spec.fingerprint != vit_tiny.spec.fingerprint


def test_half_precision_is_loaded_and_printed_as_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    half = {k: v.half() for k, v in weights.items()}
    on = from_file(half, tmp_path / "w.safetensors")
    assert on.spec.fingerprint == fingerprint(half)
    assert {p.dtype for p in on.parameters()} == {torch.float32}


def test_one_bit_is_another_backbone(weights: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {k: v.clone() for k, v in weights.items()}
    changed["norm.bias"].view(torch.int32)[0] ^= 1
    assert from_file(changed, tmp_path / "w.safetensors").spec.fingerprint != fingerprint(weights)


MISFITS = {
    "a tensor missing": (lambda w: w.pop("blocks.3.attn.qkv.bias"), ("1 tensors missing", "blocks.3.attn.qkv.bias")),
    "a tensor too many": (
        lambda w: w.update({"blocks.12.norm1.weight": torch.zeros(192)}),
        ("1 not understood", "blocks.12.norm1.weight"),
    ),
    "a name that is foreign": (
        lambda w: w.update({"exploration_head": torch.zeros(2)}),
        ("not understood", "exploration_head"),
    ),
    "another width": (
        lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.zeros(8, 192)}),
        ("size mismatch", "blocks.0.mlp.fc1"),
    ),
    "another patch size": (
        lambda w: w.update({"patch_embed.proj.weight": torch.zeros(192, 3, 32, 32)}),
        ("patch_embed.proj.weight", "(192, 3, 32, 32)", "patch size"),
    ),
    "positions of no grid": (lambda w: w.update({"pos_embed": torch.zeros(1, 12, 192)}), ("another architecture",)),
    "nothing that is known": (
        lambda w: (w.clear(), w.update({"layer1.0.conv1.weight": torch.zeros(3)})),
        ("tensors missing", "another architecture"),
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_load_completely_or_not_at_all(weights: dict[str, Tensor], what: str, tmp_path: Path) -> None:
    change, words = MISFITS[what]
    changed = dict(weights)
    change(changed)
    with pytest.raises(BadData) as refused:
        from_file(changed, tmp_path / "w.safetensors")
    says(refused.value, f"do not fit timm:{NAME}", *words)


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ("random:timm:vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("random:timm:vit_tiny_patch16_224", "vit_small_patch16_224"),
        ("random:timm:vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
        ("random:timm:swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"),
        pytest.param(
            "random:timm:swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", marks=pytest.mark.slow
        ),
        pytest.param("random:timm:swin_tiny_patch4_window7_224", "swin_s3_tiny_224", marks=pytest.mark.slow),
        ("random:hf:vit", "vit_tiny_patch16_224"),
    ],
)
def test_another_architecture(made: str, asked: str, tmp_path: Path) -> None:
    state = load_backbone(made, image_size=64).network.state_dict()
    with pytest.raises(BadData) as refused:
        from_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors", asked)
    says(refused.value, f"do not fit timm:{asked}")


class Bomb:
    """Pickled code: makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("old", [True, False], ids=["old-format", "zip"])
def test_pickled_code_is_refused_and_not_run(
    weights: dict[str, Tensor], suffix: str, old: bool, tmp_path: Path
) -> None:
    path, trace = tmp_path / f"w{suffix}", tmp_path / "it ran"
    torch.save({**weights, "bomb": Bomb(trace)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(BadData) as refused:
        load_backbone(f"timm:{NAME}@{path}", image_size=64)
    says(refused.value, path.name, "more than tensors", "safetensors")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.safetensors", None, ("no such file",)),
        ("empty.safetensors", b"", ("cannot be read",)),
        ("noise.safetensors", b"\x00" * 100, ("cannot be read",)),
        ("huge-header.safetensors", b"\xff" * 16, ("cannot be read",)),
        ("noise.pth", b"\x80\x02noise", ("noise.pth",)),
        ("empty.pth", b"", ("empty.pth",)),
        ("page.pth", b"<!DOCTYPE html><html></html>", ("page.pth",)),
    ],
)
def test_a_file_that_is_no_weights(name: str, content: bytes | None, words: tuple[str, ...], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as refused:
        load_backbone(f"timm:{NAME}@{tmp_path / name}")
    says(refused.value, name, *words)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_was_cut_short(weights: dict[str, Tensor], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    from_file(weights, path)
    whole = path.read_bytes()
    for length in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadData) as refused:
            load_backbone(f"timm:{NAME}@{path}", image_size=64)
        says(refused.value, path.name)


@pytest.mark.parametrize("found", [[1, 2], {"a": 1}, torch.zeros(3), {"model": {"a": "b"}}])
def test_a_file_without_named_tensors(found: object, tmp_path: Path) -> None:
    torch.save(found, tmp_path / "w.pth")
    with pytest.raises(BadData) as refused:
        load_backbone(f"timm:{NAME}@{tmp_path / 'w.pth'}")
    says(refused.value, "w.pth", "no named tensors", "state dict")


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadData) as refused:
        load_backbone(f"timm:{NAME}@{tmp_path}")
    says(refused.value, "no such file")


def test_the_starter_from_a_file(tmp_path: Path) -> None:
    import medgraft

    state = load_file(Path(medgraft.__file__).parent / "weights" / "starter_vit.safetensors")
    save_file(state, tmp_path / "w.safetensors")
    on = load_backbone(f"medgraft:starter-vit@{tmp_path / 'w.safetensors'}")
    assert on.spec.fingerprint == fingerprint(state) == load_backbone("medgraft:starter-vit").spec.fingerprint
    assert starter_vit().state_dict().keys() == state.keys()


def test_no_network_is_needed_to_say_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and not cached: the message names both ways out."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(BadData) as refused:
        load_backbone(f"timm:{NAME}")
    says(refused.value, "hub cache", "go online once", f"timm:{NAME}@PATH", f"random:timm:{NAME}")


def test_an_architecture_without_published_weights() -> None:
    with pytest.raises(BadCall) as refused:
        load_backbone("timm:vit_small_patch16_18x2_224")
    says(refused.value, "publishes no weights", "'vit_small_patch16_18x2_224'", "@PATH", "random:timm:")


def test_weights_are_asked_for_by_timms_tags(weights: dict[str, Tensor], tmp_path: Path) -> None:
    on = from_file(weights, tmp_path / "w.safetensors", f"{NAME}.augreg_in21k")
    assert on.spec.id == f"timm:{NAME}.augreg_in21k"
    with pytest.raises(UnknownName) as refused:
        load_backbone(f"timm:{NAME}.augreg_in12k")
    says(refused.value, "augreg_in12k", "did you mean", f"{NAME}.augreg_in21k")
