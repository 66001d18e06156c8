"""Verification: a verdict on every item, for good adapters, bad ones, and ones made to hurt whoever looks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from medgraft.adapters.peft import export_peft
from medgraft.adapters.schema import canonical
from medgraft.adapters.signature import generate_key, public_hex, sign
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.adapters.verify import ITEMS, Verdict, passed, verify
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadCall
from tests.helpers import adapter


@pytest.fixture
def mine(hf_vit: Backbone, tmp_path: Path) -> Path:
    return save_adapter(adapter(hf_vit), tmp_path / "a", backbone=hf_vit)


def by_item(verdicts: list[Verdict]) -> dict[str, bool | None]:
    assert [v.item for v in verdicts] == list(ITEMS)
    assert all(v.said for v in verdicts)
    return {v.item: v.ok for v in verdicts}


def change(directory: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description and put its own hash right, as an attacker would."""
    record = json.loads((directory / "adapter.json").read_text())
    how(record)
    record["sha256"] = canonical(record)
    (directory / "adapter.json").write_text(json.dumps(record))


def test_a_good_adapter(mine: Path, hf_vit: Backbone) -> None:
    verdicts = verify(mine, backbone=hf_vit)
    assert by_item(verdicts) == {
        "schema": True,
        "tensors": True,
        "fingerprint": True,
        "probe": True,
        "peft": None,
        "signature": None,
    }
    assert passed(verdicts)
    assert "random weights" in verdicts[2].said
    assert all(v.item in str(v) for v in verdicts)


def test_the_backbone_is_loaded_by_the_name_in_the_adapter(mine: Path) -> None:
    assert by_item(verify(mine))["probe"] is True
    assert by_item(verify(mine, backbone="random:hf:vit"))["probe"] is True


def test_nothing_is_loaded_when_that_is_asked(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medgraft.adapters.verify.load_backbone", lambda id: pytest.fail("a backbone was loaded"))
    found = by_item(verify(mine, load=False))
    assert (found["tensors"], found["fingerprint"], found["probe"]) == (True, None, None)


def test_another_backbone(mine: Path) -> None:
    verdicts = verify(mine, backbone=load_backbone("random:hf:vit?seed=1"))
    assert by_item(verdicts)["fingerprint"] is False
    assert by_item(verdicts)["probe"] is None
    assert not passed(verdicts)


def test_a_backbone_that_cannot_be_had(mine: Path) -> None:
    change(mine, lambda r: r["backbone"].update(id="timm:no_such_network"))
    verdicts = verify(mine)
    assert by_item(verdicts)["fingerprint"] is None
    assert "no_such_network" in verdicts[2].said


@pytest.mark.parametrize(
    "id",
    [
        "timm:vit_tiny_patch16_224@/etc/passwd",
        "hf:x@/proc/self",
        "random:hf:vit?width=65536&depth=1000",
        "random:hf:vit?size=65536&patch=1",
        "random:hf:vit?width=x",
        "nonsense",
        "random:hf:vit?patch=0",
    ],
)
def test_a_stranger_does_not_choose_our_files_or_our_memory(mine: Path, id: str) -> None:
    change(mine, lambda r: r["backbone"].update(id=id))
    start = time.process_time()
    assert by_item(verify(mine))["fingerprint"] is None
    assert time.process_time() - start < 2


def test_an_adapter_without_a_probe(hf_vit: Backbone, tmp_path: Path) -> None:
    found = verify(save_adapter(adapter(hf_vit), tmp_path / "a"), backbone=hf_vit)
    assert by_item(found)["probe"] is None


def test_a_probe_that_says_otherwise(mine: Path, hf_vit: Backbone) -> None:
    change(mine, lambda r: r["probe"]["expected"].__setitem__(0, 1.5))
    assert by_item(verify(mine, backbone=hf_vit))["probe"] is False


def test_probes_made_to_hurt(mine: Path, hf_vit: Backbone) -> None:
    change(mine, lambda r: r["probe"].update(size=16384))
    verdicts = verify(mine, backbone=hf_vit)
    assert by_item(verdicts)["probe"] is None
    assert "too large" in verdicts[3].said
    change(mine, lambda r: r["probe"].update(size=63))
    assert by_item(verify(mine, backbone=hf_vit))["probe"] is False
    change(mine, lambda r: r["probe"].update(size=64, seed=10**30))
    assert by_item(verify(mine, backbone=hf_vit))["probe"] is False


def test_parts_of_the_right_form_that_do_not_run(mine: Path, hf_vit: Backbone) -> None:
    change(mine, lambda r: r["parts"][1]["config"].update(level=7))
    verdicts = verify(mine, backbone=hf_vit)
    assert by_item(verdicts)["tensors"] is True
    assert by_item(verdicts)["probe"] is False
    assert "does not run" in verdicts[3].said


def break_json(d: Path) -> None:
    (d / "adapter.json").write_bytes(b"{")


def break_hash(d: Path) -> None:
    text = (d / "adapter.json").read_text()
    (d / "adapter.json").write_text(text.replace("polyp", "gland"))


def break_tensors(d: Path) -> None:
    data = bytearray((d / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (d / "adapter.safetensors").write_bytes(data)


def no_tensors(d: Path) -> None:
    (d / "adapter.safetensors").unlink()


def no_json(d: Path) -> None:
    (d / "adapter.json").unlink()


def pipe(d: Path) -> None:
    (d / "adapter.json").unlink()
    os.mkfifo(d / "adapter.json")


def folder(d: Path) -> None:
    (d / "adapter.json").unlink()
    (d / "adapter.json").mkdir()


def link(d: Path) -> None:
    (d / "adapter.safetensors").rename(d / "elsewhere")
    (d / "adapter.safetensors").symlink_to(d / "elsewhere")


@pytest.mark.parametrize(
    ("how", "item"),
    [
        (break_json, "schema"),
        (break_hash, "schema"),
        (no_json, "schema"),
        (pipe, "schema"),
        (folder, "schema"),
        (link, "schema"),
        (break_tensors, "tensors"),
        (no_tensors, "tensors"),
    ],
)
def test_bad_adapters_get_a_verdict_and_raise_nothing(
    mine: Path, hf_vit: Backbone, how: Callable[[Path], None], item: str
) -> None:
    how(mine)
    verdicts = verify(mine, backbone=hf_vit)
    found = by_item(verdicts)
    assert found[item] is False
    assert [i for i, ok in found.items() if ok is False] == [item]
    assert found["fingerprint"] is None
    assert not passed(verdicts)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert by_item(verify(tmp_path / "nothing"))["schema"] is False


# The plain-peft form

TENSOR = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    ("config", "tensors", "ok"),
    [
        (b'{"peft_type": "LORA"}', save_safetensors(TENSOR), True),
        (b'{"peft_type": "LORA"}', None, False),
        (None, save_safetensors(TENSOR), False),
        (b"{", save_safetensors(TENSOR), False),
        (b"[]", save_safetensors(TENSOR), False),
        (b"{}", save_safetensors(TENSOR), False),
        (b'{"peft_type": "LORA"}', b"", False),
        (b'{"peft_type": "LORA"}', b"\xff" * 64, False),
        (b'{"peft_type": "LORA"}', save_safetensors({}), False),
        (b'{"peft_type": "LORA"}', save_safetensors({"other": torch.zeros(2)}), False),
        (b'{"peft_type": "LORA"}', save_safetensors({k: t * float("nan") for k, t in TENSOR.items()}), False),
    ],
    ids=["good", "alone", "lonely", "cut", "list", "untyped", "empty", "lying", "nothing", "foreign", "nan"],
)
def test_the_plain_form(mine: Path, config: bytes | None, tensors: bytes | None, ok: bool) -> None:
    for name, data in {"adapter_config.json": config, "adapter_model.safetensors": tensors}.items():
        if data is not None:
            (mine / name).write_bytes(data)
    assert by_item(verify(mine, load=False))["peft"] is ok


def test_the_plain_form_is_compared_with_the_adapter(mine: Path, hf_vit: Backbone, tmp_path: Path) -> None:
    export_peft(read_adapter(mine), hf_vit, mine)
    verdicts = verify(mine, backbone=hf_vit)
    assert by_item(verdicts)["peft"] is True
    assert "computes the same" in verdicts[4].said
    tensors = load_safetensors((mine / "adapter_model.safetensors").read_bytes())
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = tensors[name] * 2
    (mine / "adapter_model.safetensors").write_bytes(save_safetensors(tensors))
    verdicts = verify(mine, backbone=hf_vit)
    assert by_item(verdicts)["peft"] is False
    assert "other values" in verdicts[4].said


# Signatures


def test_signatures(mine: Path, tmp_path: Path) -> None:
    mine_key, other = generate_key(tmp_path / "mine.pem"), generate_key(tmp_path / "other.pem")

    def verdict(key: Any = None) -> Verdict:
        return verify(mine, load=False, key=key)[-1]

    assert verdict().ok is None
    assert verdict(mine_key[1]).ok is False
    sign(mine, mine_key[0])
    assert verdict(mine_key[1]).ok is True
    assert verdict(other[1]).ok is False
    assert verdict().ok is None
    assert public_hex(mine_key[1]) in verdict().said
    (mine / "README.md").write_text("changed")
    assert verdict().ok is False
    with pytest.raises(BadCall):
        verdict("no key")
