"""Signatures: an Ed25519 key vouches for every file of an adapter.

    signature.json    {"format": 1, "algorithm": "ed25519", "public_key", "files": {name: sha256}, "signature"}, in hex

What is signed is the canonical JSON of everything but the signature itself, behind a prefix of our own, so that a
signature made for something else never passes here. The public key also stands on the card; it is worth what the way is
worth by which the reader got it. Needs the `cryptography` package (extra "sign").
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadAdapter, BadCall, SaveFailed, need
from .card import PublicKey, refreshed
from .files import replacing
from .schema import parse_json
from .store import FILES, adapter_from, read_files

SIGNATURE_NAME = "signature.json"
PREFIX = b"medgraft adapter signature, format 1\n"
_KEYS = "cryptography.hazmat.primitives.asymmetric.ed25519"
_PEM = "cryptography.hazmat.primitives.serialization"


def generate_key(path: str | Path) -> tuple[Path, Path]:
    """Write a fresh private key to `path` (PEM, readable by its owner alone) and its public half beside it, as
    `PATH.pub`.

    Raises SaveFailed where the disk refuses or a file stands there already.
    """
    pem = need(_PEM, "sign")
    key = need(_KEYS, "sign").Ed25519PrivateKey.generate()
    private, public = Path(path), Path(f"{path}.pub")
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    for file, content, mode in ((private, secret, 0o600), (public, shown, 0o644)):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
        except OSError as refused:
            raise SaveFailed(
                f"could not write the key {file}: {refused.strerror}; an existing key is never overwritten, "
                "choose another name"
            ) from None
    return private, public


def sign(directory: str | Path, key: str | Path, *, repo: str | None = None) -> PublicKey:
    """Sign a saved adapter with the private key in the PEM file `key`; returns the public key, in hex.

    The card is written anew where it is ours (for `repo`, where it will be published), and names the public key in any
    case; the directory is replaced in one step. Raises BadAdapter for a directory that is no valid adapter, BadCall for
    a key that is none.
    """
    directory = Path(directory)
    private = _private(key)
    pem = need(_PEM, "sign")
    public = private.public_key().public_bytes(pem.Encoding.Raw, pem.PublicFormat.Raw).hex()
    files = read_files(directory)
    adapter_from(files["adapter.json"], files["adapter.safetensors"])
    files["README.md"] = refreshed(files, repo=repo, key=public).encode()
    files.pop(SIGNATURE_NAME, None)
    signed = _manifest(files, public)
    signed["signature"] = private.sign(PREFIX + _canonical(signed)).hex()
    with replacing(directory) as new:
        shutil.copytree(directory, new, symlinks=True, dirs_exist_ok=True)
        for name, content in {
            "README.md": files["README.md"],
            SIGNATURE_NAME: json.dumps(signed, indent=1).encode() + b"\n",
        }.items():
            (new / name).unlink(missing_ok=True)
            (new / name).write_bytes(content)
    return public


def verify(directory: str | Path, public_key: str | Path | None = None) -> PublicKey:
    """Check the signature of an adapter directory; see `check`."""
    return check(read_files(directory), public_key)


def check(files: Mapping[str, bytes], public_key: str | Path | None = None) -> PublicKey:
    """Check the signature among the `files` of an adapter, and that it is by `public_key`: a PEM file, its text, or 64
    hex digits.

    Without a key only integrity is shown: anybody may sign. Returns the signer's public key, in hex. Raises BadAdapter
    for a missing, broken or foreign signature, BadCall for a key that is none.
    """
    wanted = None if public_key is None else public_hex(public_key)
    if SIGNATURE_NAME not in files:
        raise BadAdapter(
            "this adapter is not signed; ask its publisher to run `medgraft sign`, or load it without a key"
        )
    signed = parse_json(files[SIGNATURE_NAME], SIGNATURE_NAME)
    if not _well_formed(signed):
        raise BadAdapter(f"{SIGNATURE_NAME} does not have the form of a signature; fetch the adapter again")
    signer = signed["public_key"]
    if wanted is not None and signer != wanted:
        raise BadAdapter(
            f"this adapter is signed by the key {signer[:16]}..., not by {wanted[:16]}..., which you "
            "trust; it is refused"
        )
    module = need(_KEYS, "sign")
    rest = {name: content for name, content in files.items() if name != SIGNATURE_NAME}
    body = {k: v for k, v in signed.items() if k != "signature"}
    try:
        module.Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(
            bytes.fromhex(signed["signature"]), PREFIX + _canonical(body)
        )
    except (need("cryptography.exceptions", "sign").InvalidSignature, ValueError):
        raise BadAdapter(
            f"the signature in {SIGNATURE_NAME} is not valid; the adapter was changed after it was "
            "signed, and is refused"
        ) from None
    if _manifest(rest, signer) != body:
        other = sorted(
            name
            for name in body["files"].keys() | rest.keys()
            if body["files"].get(name) != _manifest(rest, signer)["files"].get(name)
        )
        raise BadAdapter(
            f"{', '.join(other)} changed, appeared or went missing after the adapter was signed; it is "
            "refused, fetch it again"
        )
    return signer


def public_hex(key: str | Path) -> PublicKey:
    """A public key as 64 hex digits, from those, from PEM text, or from a PEM file (of either half)."""
    text = str(key).strip()
    if re.fullmatch("[0-9a-fA-F]{64}", text):
        return text.lower()
    pem = need(_PEM, "sign")
    data = text.encode() if text.startswith("-----BEGIN") else _read(key)
    public: Any
    try:
        if b"PRIVATE KEY" in data:
            public = pem.load_pem_private_key(data, None).public_key()
        else:
            public = pem.load_pem_public_key(data)
    except (ValueError, TypeError, need("cryptography.exceptions", "sign").UnsupportedAlgorithm):
        public = None
    if not isinstance(public, need(_KEYS, "sign").Ed25519PublicKey):
        raise BadCall(
            "the key is no Ed25519 key in PEM form or 64 hex digits; signature.generate_key(path) makes a pair"
        )
    return public.public_bytes(pem.Encoding.Raw, pem.PublicFormat.Raw).hex()


def _private(key: str | Path) -> Any:
    pem = need(_PEM, "sign")
    data = _read(key)
    try:
        private = pem.load_pem_private_key(data, None)
    except (ValueError, TypeError, need("cryptography.exceptions", "sign").UnsupportedAlgorithm):
        private = None
    if not isinstance(private, need(_KEYS, "sign").Ed25519PrivateKey):
        raise BadCall(
            f"{Path(key).name} holds no unencrypted Ed25519 private key in PEM form; give the file that "
            "was made without `.pub`"
        )
    return private


def _read(key: str | Path) -> bytes:
    try:
        with open(key, "rb") as stream:
            return stream.read(1 << 16)
    except (OSError, ValueError) as refused:
        raise BadCall(
            f"the key file {str(key)[:200]!r} cannot be read: {getattr(refused, 'strerror', None) or refused}"
        ) from None


def _manifest(files: Mapping[str, bytes], public: PublicKey) -> dict[str, Any]:
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
    return {"format": 1, "algorithm": "ed25519", "public_key": public, "files": hashes}


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _well_formed(signed: Any) -> bool:
    if not isinstance(signed, dict) or set(signed) != {"format", "algorithm", "public_key", "files", "signature"}:
        return False
    files = signed["files"]
    return (
        signed["format"] == 1
        and signed["format"] is not True
        and signed["algorithm"] == "ed25519"
        and _hex(signed["public_key"], 64)
        and _hex(signed["signature"], 128)
        and isinstance(files, dict)
        and set(files) <= set(FILES)
        and all(_hex(digest, 64) for digest in files.values())
    )


def _hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is not None
