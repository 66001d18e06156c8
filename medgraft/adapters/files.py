"""Directories that are replaced whole or not at all, and read without ever seeing half of one."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BadAdapter, SaveFailed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `target` when the block ends well.

    If the block or the disk fails, the old directory stands as it was and nothing else is left. Raises SaveFailed.
    """
    target = Path(os.path.realpath(target))  # a link to a directory stays one
    if target.exists() and not target.is_dir():
        raise SaveFailed(f"asked to write the directory {target}, but a file stands there; choose another name")
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync_folder(new)
        _swap(new, target)
        _sync_folder(target.parent)
    except OSError as refused:
        raise SaveFailed(
            f"could not write {target}: {refused.strerror or refused}; what stood there before still stands. Free space, or choose another place"
        ) from refused
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises SaveFailed."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as refused:
        new.unlink(missing_ok=True)
        raise SaveFailed(
            f"could not write {path}: {refused.strerror or refused}; free space, or choose another place"
        ) from refused


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot; the files themselves are safe by now
        _sync(path)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` in one step; afterwards `new` holds what stood there, or is gone."""
    if not target.exists():
        try:
            os.rename(new, target)
            return
        except OSError:
            if not target.is_dir():  # otherwise somebody else was faster: exchange with theirs
                raise
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        exchanged = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        exchanged = False
    if not exchanged:  # not Linux, or a file system without it: two renames, the old one back if the second fails
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def stands(directory: Path, *, patience: float = 2.0) -> bool:
    """True where `directory` exists; waits while somebody is between the two renames that replace it.

    The old version then stands aside as `.NAME.*.old`; three looks without one mean that there is nothing to wait for.
    """
    end, quiet = time.monotonic() + patience, 0
    while not directory.is_dir():
        aside = any(directory.parent.glob(f".{glob.escape(directory.name)}.*.old"))
        quiet = 0 if aside else quiet + 1
        if quiet == 3 or time.monotonic() > end:
            return directory.is_dir()
        time.sleep(0.005)
    return True


def read_together(
    directory: Path, limits: Mapping[str, int], optional: Mapping[str, int] | None = None, *, patience: float = 30.0
) -> dict[str, bytes]:
    """The bytes of several files of one directory, from one and the same version of it.

    `limits` maps file names to the most bytes that are read; those of `optional` may be missing. Every file is opened before any is
    read: an open file outlives the directory that it stood in. A directory that is replaced meanwhile is opened again, for up to
    `patience` seconds. Raises BadAdapter for a missing directory or file, anything but a plain file, or one over its limit.
    """
    end = time.monotonic() + patience
    while True:
        handle = _open_directory(directory, end)
        try:
            with contextlib.ExitStack() as opened:
                files = {name: _open(handle, name, opened, directory) for name in limits}
                for name in optional or {}:
                    with contextlib.suppress(_Missing):
                        files[name] = _open(handle, name, opened, directory)
                if len(files) < len(limits) + len(optional or {}) and not _same(handle, directory):
                    raise _Missing  # perhaps it was there, and is gone with its directory
                most = {**limits, **(optional or {})}
                return {name: _read(file, directory / name, most[name]) for name, file in files.items()}
        except _Missing as missing:
            if _same(handle, directory):
                raise BadAdapter(f"{directory} has no {missing}; it holds: {_listing(directory)}") from None
            if time.monotonic() > end:
                raise BadAdapter(
                    f"{directory} was replaced again and again for {patience:g} s; try once more"
                ) from None
        finally:
            os.close(handle)


class _Missing(Exception):
    """A file that is not there, by its name."""


def _open_directory(directory: Path, end: float) -> int:
    """A handle. A directory that is just being replaced is waited for until `end`."""
    while True:
        try:
            return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as refused:
            if isinstance(refused, FileNotFoundError) and stands(directory) and time.monotonic() < end:
                continue
            kinds: dict[type[Exception], str] = {
                FileNotFoundError: "there is none",
                NotADirectoryError: "it is not a directory",
            }
            found = kinds.get(type(refused), str(refused))
            raise BadAdapter(
                f"asked for the adapter directory {directory}: {found}; give a directory that holds adapter.json"
            ) from None


def _open(handle: int, name: str, opened: contextlib.ExitStack, directory: Path) -> int:
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)  # a pipe must not hold us up
    except FileNotFoundError:
        raise _Missing(name) from None
    except OSError as refused:
        raise BadAdapter(
            f"{directory / name} cannot be read: {refused.strerror}; a plain file is wanted, no link"
        ) from None
    opened.callback(os.close, file)
    return file


def _read(file: int, path: Path, limit: int) -> bytes:
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BadAdapter(f"{path} is not a plain file and is not read")
        if found.st_size > limit:
            raise BadAdapter(f"{path} is {found.st_size:,} bytes; at most {limit:,} are read")
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read(limit + 1)
    except (OSError, MemoryError) as refused:
        raise BadAdapter(
            f"{path} cannot be read ({refused or type(refused).__name__}); fetch the adapter again"
        ) from None


def _same(handle: int, directory: Path) -> bool:
    try:
        here, there = os.fstat(handle), os.stat(directory)
    except OSError:
        return False
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)


def _listing(directory: Path) -> str:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return "nothing that can be listed"
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "") or "nothing"
