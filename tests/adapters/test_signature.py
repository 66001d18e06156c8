"""Signatures: every file vouched for, by the right key, whoever changes, adds, removes or re-signs something."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

from medgraft.adapters import hub, signature
from medgraft.adapters.card import build_card, is_ours
from medgraft.adapters.signature import check, generate_key, public_hex, sign, verify
from medgraft.adapters.store import read_adapter, read_files, read_record, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, MissingExtra, SaveFailed
from tests.helpers import adapter, says


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return generate_key(tmp_path / "mine.pem")


@pytest.fixture
def mine(hf_vit: Backbone, tmp_path: Path) -> Path:
    return save_adapter(adapter(hf_vit), tmp_path / "a")


@pytest.fixture
def signed(mine: Path, keys: tuple[Path, Path]) -> Path:
    sign(mine, keys[0])
    return mine


def test_keys_are_pem_and_the_private_one_is_private(keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.name == "mine.pem.pub"


def test_an_existing_key_is_never_overwritten(keys: tuple[Path, Path], tmp_path: Path) -> None:
    before = keys[0].read_bytes()
    with pytest.raises(SaveFailed, match="never overwritten"):
        generate_key(keys[0])
    assert keys[0].read_bytes() == before
    with pytest.raises(SaveFailed):
        generate_key(tmp_path / "no" / "such" / "folder.pem")


def test_round_trip(signed: Path, keys: tuple[Path, Path]) -> None:
    signer = verify(signed, keys[1])
    assert (
        signer
        == public_hex(keys[1])
        == public_hex(keys[0])
        == public_hex(keys[1].read_text())
        == public_hex(signer.upper())
    )
    assert verify(signed) == signer
    assert verify(signed, signer) == signer
    assert set(json.loads((signed / "signature.json").read_text())["files"]) == {
        "adapter.json",
        "adapter.safetensors",
        "README.md",
    }


def test_the_adapter_is_the_same_and_other_files_stay(mine: Path, keys: tuple[Path, Path]) -> None:
    before = {name: data for name, data in read_files(mine).items() if name != "README.md"}
    (mine / "log").mkdir()
    (mine / "log" / "loss.jsonl").write_text("{}")
    (mine / "model.py").write_text("boom")
    sign(mine, keys[0])
    after = read_files(mine)
    assert {name: after[name] for name in before} == before
    assert (mine / "log" / "loss.jsonl").read_text() == "{}"
    assert verify(mine, keys[1])
    assert sorted(os.listdir(mine.parent)) == ["a", "mine.pem", "mine.pem.pub"]


def test_the_card_names_the_key(mine: Path, keys: tuple[Path, Path]) -> None:
    public = sign(mine, keys[0], repo="lab/polyp")
    card = (mine / "README.md").read_text()
    assert public in card
    assert is_ours(card)
    assert 'load_adapter("lab/polyp")' in card
    (mine / "README.md").write_text("# By hand\n")
    sign(mine, keys[0])
    assert (mine / "README.md").read_text().startswith("# By hand\n")
    assert public in (mine / "README.md").read_text()
    assert verify(mine, keys[1])


def test_signing_again_with_another_key(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = generate_key(tmp_path / "other.pem")
    sign(signed, other[0])
    assert verify(signed, other[1])
    with pytest.raises(BadAdapter) as refused:
        verify(signed, keys[1])
    says(refused.value, "signed by the key", "not by", public_hex(keys[1])[:16])
    assert public_hex(keys[1]) not in (signed / "README.md").read_text()


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "README.md", "signature.json"])
@pytest.mark.parametrize("how", ["flip", "append", "cut"])
def test_every_byte_is_covered(signed: Path, keys: tuple[Path, Path], name: str, how: str) -> None:
    data = (signed / name).read_bytes()
    middle = len(data) // 2
    changed = {
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "append": data + b"x",
        "cut": data[:-2],
    }[how]
    (signed / name).write_bytes(changed)
    with pytest.raises(BadAdapter):
        verify(signed, keys[1])
    with pytest.raises(BadAdapter):
        verify(signed)


@pytest.mark.parametrize("name", ["preview.png", "adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_appeared_is_refused(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    (signed / name).write_bytes(b"new")
    with pytest.raises(BadAdapter, match=name.replace(".", r"\.")):
        verify(signed, keys[1])


def test_a_file_that_went_missing_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "README.md").unlink()
    with pytest.raises(BadAdapter, match=r"README\.md"):
        verify(signed, keys[1])


def test_a_signature_moved_to_another_adapter_is_refused(
    hf_vit: Backbone, signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    other = save_adapter(adapter(hf_vit, seed=5), tmp_path / "b")
    sign(other, keys[0])
    (other / "signature.json").write_bytes((signed / "signature.json").read_bytes())
    with pytest.raises(BadAdapter, match=r"adapter\.safetensors"):
        verify(other, keys[1])


def test_a_hash_put_right_by_hand_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """An attacker who changes a file and its hash, and who even puts the trusted key beside it."""
    files = read_files(signed)
    files["README.md"] += b"evil"
    claim = json.loads(files["signature.json"])
    forged = {
        **claim,
        **signature._manifest({k: v for k, v in files.items() if k != "signature.json"}, claim["public_key"]),
    }
    with pytest.raises(BadAdapter, match="not valid"):
        check({**files, "signature.json": json.dumps(forged).encode()}, keys[1])


FORMS: dict[str, Any] = {
    "no-object": lambda c: [c],
    "more": lambda c: {**c, "note": 1},
    "less": lambda c: {k: v for k, v in c.items() if k != "algorithm"},
    "another-format": lambda c: {**c, "format": 2},
    "true-format": lambda c: {**c, "format": True},
    "another-algorithm": lambda c: {**c, "algorithm": "none"},
    "short-key": lambda c: {**c, "public_key": c["public_key"][:-2]},
    "no-hex": lambda c: {**c, "signature": "zz" * 64},
    "no-signature": lambda c: {**c, "signature": None},
    "climbing": lambda c: {**c, "files": {**c["files"], "../../etc/passwd": "a" * 64}},
    "list": lambda c: {**c, "files": list(c["files"])},
    "number": lambda c: {**c, "files": dict.fromkeys(c["files"], 5)},
    "zero-key": lambda c: {**c, "public_key": "00" * 32},
}


@pytest.mark.parametrize("form", FORMS)
def test_signatures_of_another_form(signed: Path, form: str) -> None:
    file = signed / "signature.json"
    file.write_text(json.dumps(FORMS[form](json.loads(file.read_text()))))
    with pytest.raises(BadAdapter):
        verify(signed)


def test_what_is_not_signed(mine: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(BadAdapter, match="not signed"):
        verify(mine, keys[1])


def test_what_is_no_adapter_is_not_signed(tmp_path: Path, mine: Path, keys: tuple[Path, Path]) -> None:
    data = bytearray((mine / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (mine / "adapter.safetensors").write_bytes(data)
    with pytest.raises(BadAdapter):
        sign(mine, keys[0])
    assert not (mine / "signature.json").exists()
    with pytest.raises(BadAdapter):
        sign(tmp_path / "nothing", keys[0])


def foreign_keys() -> dict[str, bytes]:
    private = ed25519.Ed25519PrivateKey.generate()
    out, form = pem.Encoding.PEM, pem.PrivateFormat.PKCS8
    return {
        "public": private.public_key().public_bytes(out, pem.PublicFormat.SubjectPublicKeyInfo),
        "locked": private.private_bytes(out, form, pem.BestAvailableEncryption(b"secret")),
        "elliptic": ec.generate_private_key(ec.SECP256R1()).private_bytes(out, form, pem.NoEncryption()),
        "exchange": x25519.X25519PrivateKey.generate().private_bytes(out, form, pem.NoEncryption()),
        "text": b"not a key",
        "empty": b"",
        "cut": private.private_bytes(out, form, pem.NoEncryption())[:60],
    }


@pytest.mark.parametrize("kind", foreign_keys())
def test_keys_that_are_none(kind: str, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(foreign_keys()[kind])
    with pytest.raises(BadCall):
        sign(mine, tmp_path / "key")
    if kind != "public":
        with pytest.raises(BadCall):
            public_hex(tmp_path / "key")


@pytest.mark.parametrize("key", ["", "a" * 63, "nowhere.pem", "\0", "x" * 5000])
def test_names_that_are_no_key(key: str) -> None:
    with pytest.raises(BadCall):
        public_hex(key)


def test_without_cryptography_the_extra_is_named(
    mine: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        @staticmethod
        def find_spec(name: str, *rest: Any) -> None:
            if name == "cryptography":
                raise ModuleNotFoundError("No module named 'cryptography'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(MissingExtra, match=r"medgraft\[sign\]"):
        sign(mine, keys[0])
    assert read_adapter(mine) is not None


# Loading and publishing


def test_loading_only_what_is_signed_by_a_key(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = generate_key(tmp_path / "other.pem")
    assert hub.load_adapter(signed, key=keys[1]).source is not None
    with pytest.raises(BadAdapter, match="which you trust"):
        hub.load_adapter(signed, key=other[1])


def test_publishing_keeps_a_signature_whole(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    target = f"file:{tmp_path}/reg/lab/polyp"
    hub.publish(signed, target)
    assert hub.load_adapter(target, key=keys[1]).source is not None
    (signed / "README.md").write_text(build_card(read_record(signed)))
    with pytest.raises(BadAdapter, match=r"README\.md"):
        hub.publish(signed, target)
    assert hub.load_adapter(target, key=keys[1]).source is not None
