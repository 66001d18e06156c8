"""A registry in a folder: `file:DIR/OWNER/NAME`, for a lab that shares over a network drive instead of the Hub.

    DIR/OWNER/NAME/       an adapter directory, replaced whole or not at all: the truth
    DIR/index.json        what is in them, for quick listing: derived, rewritten in one step, checked against the truth
    on every use

An adapter published by another machine appears in the next listing even when its entry was lost to a race, because a
listing walks the folders and takes an entry only for the very `adapter.json` that it was made of. Nothing has to be
locked for readers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BadAdapter, BadCall, MedgraftError, unknown
from .files import replacing, stands
from .store import JSON_NAME, read_record

PREFIX = "file:"
INDEX_NAME, LOCK_NAME = "index.json", ".lock"
MAX_INDEX_BYTES = 64 << 20
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class Address:
    """`file:DIR/OWNER/NAME`, taken apart."""

    root: Path
    owner: str
    name: str

    @property
    def id(self) -> str:
        """OWNER/NAME."""
        return f"{self.owner}/{self.name}"

    @property
    def directory(self) -> Path:
        """Where the adapter stands."""
        return self.root / self.owner / self.name


@dataclass(frozen=True)
class Entry:
    """One adapter of a registry. `sha256` is its description's; `stamp` tells whether the entry is still of the file
    that stands there.
    """

    id: str
    sha256: str
    backbone: str
    fingerprint: str
    task: str
    classes: tuple[str, ...]
    modality: str | None
    organ: str | None
    license: str | None
    bytes: int
    stamp: tuple[int, int, int]


def parse(target: str) -> Address:
    """Take `file:DIR/OWNER/NAME` apart. Raises BadCall."""
    text = target.removeprefix(PREFIX)
    text = text.removeprefix("//") if text.startswith("///") else text
    path = Path(os.path.expanduser(text))
    parts = path.parts
    if (
        not target.startswith(PREFIX)
        or "\0" in text
        or len(parts) < 3
        or not all(_PLAIN.fullmatch(p) for p in parts[-2:])
    ):
        raise BadCall(
            f"cannot read {target[:200]!r} as a place in a local registry; the form is "
            "file:DIR/OWNER/NAME, with names of letters, digits, "
            "dots, dashes and underscores, as in file:/lab/registry/lab/polyp"
        )
    return Address(path.parent.parent, parts[-2], parts[-1])


def publish(files: Mapping[str, bytes], target: str) -> Path:
    """Put the files of a checked adapter (`hub.publish` checks them) at `target`, replacing whatever version stood
    there.

    Raises BadCall for a target of another form, SaveFailed when the disk refuses; the older version then still stands.
    """
    address = parse(target)
    with _publishing(address.root), replacing(address.directory) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
    with contextlib.suppress(
        MedgraftError, OSError
    ):  # the adapter is there; the index will follow with the next listing
        list_adapters(address.root)
    return address.directory


def resolve(source: str) -> Path:
    """The directory behind `file:DIR/OWNER/NAME`. Raises BadCall, or UnknownName with near misses."""
    address = parse(source)
    if not stands(address.directory):
        there = [e.id for e in list_adapters(address.root)] if address.root.is_dir() else []
        raise unknown(
            f"adapter in the registry {address.root}",
            address.id,
            there,
            hint="" if address.root.is_dir() else "(the folder does not exist)",
        )
    return address.directory


def list_adapters(root: str | Path) -> list[Entry]:
    """Every readable adapter of a registry, by id; what is damaged or is no adapter is passed over. Renews the index
    where it can.

    Raises BadAdapter for a folder that does not exist.
    """
    root = Path(str(root).removeprefix(PREFIX)).expanduser()
    if not root.is_dir():
        raise BadAdapter(
            f"asked for the registry {root}: there is no such folder; publish to file:{root}/OWNER/NAME "
            "and there will be"
        )
    known = _read_index(root)
    found: list[Entry] = []
    for directory in _directories(root):
        entry = _entry(directory, known.get(f"{directory.parent.name}/{directory.name}"))
        if entry is not None:
            found.append(entry)
    if {e.id: e for e in found} != known:
        _write_index(root, found)
    return found


def search(
    root: str | Path,
    *,
    modality: str | None = None,
    organ: str | None = None,
    backbone: str | None = None,
    class_name: str | None = None,
) -> list[Entry]:
    """Adapters that fit everything given. Modality, organ and class are compared whole, a backbone by a part of its id
    or the start of its fingerprint; upper and lower case are the same.
    """

    def fits(entry: Entry) -> bool:
        same = [(modality, entry.modality), (organ, entry.organ)]
        return (
            all(want is None or (has is not None and want.casefold() == has.casefold()) for want, has in same)
            and (class_name is None or class_name.casefold() in [c.casefold() for c in entry.classes])
            and (
                backbone is None
                or backbone.casefold() in entry.backbone.casefold()
                or entry.fingerprint.startswith(backbone.lower())
            )
        )

    return [entry for entry in list_adapters(root) if fits(entry)]


def _directories(root: Path) -> Iterator[Path]:
    for owner in _names(root):
        for name in _names(root / owner):
            yield root / owner / name


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if _PLAIN.fullmatch(e.name) and e.is_dir())
    except OSError:
        return []


def _entry(directory: Path, known: Entry | None) -> Entry | None:
    try:
        stamp = _stamp(directory)
        if known is not None and known.stamp == stamp:
            return known
        record = read_record(directory)
        if _stamp(directory) != stamp:  # replaced meanwhile; the next listing will know
            stamp = (0, 0, 0)
    except (MedgraftError, OSError):
        return None
    facts = record["provenance"]
    text = {k: facts[k] if isinstance(facts.get(k), str) else None for k in ("modality", "organ", "license")}
    return Entry(
        id=f"{directory.parent.name}/{directory.name}",
        sha256=record["sha256"],
        backbone=record["backbone"]["id"],
        fingerprint=record["backbone"]["fingerprint"],
        task=record["task"]["kind"],
        classes=tuple(record["task"]["classes"]),
        bytes=record["tensors"]["bytes"],
        stamp=stamp,
        **text,
    )


def _stamp(directory: Path) -> tuple[int, int, int]:
    found = os.stat(directory / JSON_NAME)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read_index(root: Path) -> dict[str, Entry]:
    """What the index says; nothing at all where it is missing, damaged or of another form: it will be made again."""
    try:
        with open(root / INDEX_NAME, "rb") as stream:
            data: Any = json.loads(stream.read(MAX_INDEX_BYTES))
        entries = [Entry(**{**e, "classes": tuple(e["classes"]), "stamp": tuple(e["stamp"])}) for e in data["adapters"]]
        return {e.id: e for e in entries if _sound(e)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _sound(e: Entry) -> bool:
    texts = (e.id, e.sha256, e.backbone, e.fingerprint, e.task, *e.classes)
    maybe = (e.modality, e.organ, e.license)
    return (
        all(isinstance(t, str) for t in texts)
        and all(t is None or isinstance(t, str) for t in maybe)
        and all(isinstance(n, int) for n in (e.bytes, *e.stamp))
    )


def _write_index(root: Path, entries: list[Entry]) -> None:
    """Best effort, in one step: a registry that one may only read is listed all the same."""
    new = root / f".{INDEX_NAME}.{secrets.token_hex(4)}.new"
    try:
        new.write_text(
            json.dumps({"format": 1, "adapters": [asdict(e) for e in entries]}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(new, root / INDEX_NAME)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def _publishing(root: Path) -> Iterator[None]:
    """One publisher after the other, where the file system knows locks; where not, replacing in one step has to do."""
    lock = None
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / LOCK_NAME, "ab")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()
