"""Directories that are replaced whole or not at all, and read without ever seeing half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import locale
import os
import resource
import shutil
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from medgraft.adapters import Adapter
from medgraft.adapters import files as files_module
from medgraft.adapters.files import read_together, replacing
from medgraft.adapters.store import read_adapter, rounded, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, SaveFailed
from tests.helpers import adapter, says

LIMITS = {"one": 100, "two": 100}


def put(target: Path, value: str) -> None:
    with replacing(target) as new:
        for name in LIMITS:
            (new / name).write_text(value)


def look(target: Path) -> str:
    found = {v.decode() for v in read_together(target, LIMITS).values()}
    assert len(found) == 1, "files of two versions"
    return found.pop()


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, code: int, *, after: int = 0) -> None:
    """Let `owner.name` fail with an error of the system, from its call number `after` on."""
    plain, calls = getattr(owner, name), []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.fixture(params=["exchange", "two-renames"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The step of Linux, and that of systems without it."""
    if request.param == "two-renames":
        monkeypatch.setattr(files_module.ctypes, "CDLL", lambda *a, **k: object())
    elif not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system cannot exchange two directories in one step")
    return request.param


# Replacing


def test_a_new_version_takes_the_place_of_the_old(swapping: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a"
    for value in ("first", "second", "third"):
        put(target, value)
        assert look(target) == value
        assert os.listdir(target.parent) == ["a"], "something was left"


def test_what_was_there_and_is_no_more_goes(tmp_path: Path) -> None:
    put(tmp_path / "a", "old")
    (tmp_path / "a" / "three").write_text("old")
    put(tmp_path / "a", "new")
    assert sorted(os.listdir(tmp_path / "a")) == ["one", "two"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("stands", [True, False], ids=["over-one", "new"])
def test_a_block_that_fails_leaves_the_old_version(tmp_path: Path, error: type[BaseException], stands: bool) -> None:
    if stands:
        put(tmp_path / "a", "old")

    def halfway() -> None:
        with replacing(tmp_path / "a") as new:
            (new / "one").write_text("half of it")
            raise error

    with pytest.raises(error):
        halfway()
    assert os.listdir(tmp_path) == (["a"] if stands else [])
    if stands:
        assert look(tmp_path / "a") == "old"


def test_text_is_utf8_whatever_the_process_speaks(tmp_path: Path) -> None:
    """A library that reads DICOM may have set the process to ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        files_module.write_text(tmp_path / "scores.md", ".81 ± .02\n")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / "scores.md").read_bytes() == b".81 \xc2\xb1 .02\n"


SYSTEM = {
    "no space for a file": (Path, "write_text", errno.ENOSPC, 1),
    "no space for the folder": (Path, "mkdir", errno.ENOSPC, 1),
    "no space found out late": (os, "fsync", errno.ENOSPC, 0),
    "a disk that fails": (os, "fsync", errno.EIO, 0),
    "no right to rename": (os, "rename", errno.EACCES, 0),
}


@pytest.mark.parametrize("what", SYSTEM)
@pytest.mark.parametrize("stands", [True, False], ids=["over-one", "new"])
def test_a_system_that_refuses(what: str, stands: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if stands:
        put(tmp_path / "a", "old")
    owner, name, code, after = SYSTEM[what]
    with monkeypatch.context() as broken:
        fails_at(broken, owner, name, code, after=after)
        broken.setattr(files_module.ctypes, "CDLL", lambda *a, **k: object())  # and no other way to rename
        with pytest.raises(SaveFailed) as refused:
            put(tmp_path / "a", "new")
    says(refused.value, str(tmp_path / "a"), os.strerror(code), "before still stands", "another place")
    assert isinstance(refused.value, OSError)
    assert os.listdir(tmp_path) == (["a"] if stands else [])
    if stands:
        assert look(tmp_path / "a") == "old"
    put(tmp_path / "a", "new")
    assert look(tmp_path / "a") == "new"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["a-disk-that-fails", "a-key"]
)
def test_two_renames_that_stop_in_the_middle_are_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    put(tmp_path / "a", "old")
    plain, calls = os.rename, []

    def rename(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        plain(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(files_module.ctypes, "CDLL", lambda *a, **k: object())
        broken.setattr(os, "rename", rename)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            put(tmp_path / "a", "new")
    assert len(calls) == 3
    assert look(tmp_path / "a") == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network and user-space file systems answer EINVAL for a folder."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for value in ("first", "second"):
        put(tmp_path / "a", value)
        assert look(tmp_path / "a") == value


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveFailed) as refused:
        put(tmp_path / "file" / "a", "new")
    says(refused.value, "file/a", "another place")


# Adapters on a disk that is full


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size`; a real error from a real write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same(directory: Path, made: Adapter) -> bool:
    want = rounded(made, "float16").tensors()
    return all(torch.equal(t, want[n]) for n, t in read_adapter(directory).tensors().items())


def test_the_disk_fills_up_while_saving(vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tensors are written, then there is no space: as simulated at each of the writes."""
    old, new = adapter(vit, seed=1), adapter(vit, seed=2)
    save_adapter(old, tmp_path / "a")
    plain = Path.write_bytes
    for full_at in (1, 2, 3):
        calls = []

        def write_bytes(self: Path, data: bytes, calls: list = calls, full_at: int = full_at) -> int:
            calls.append(self)
            if len(calls) == full_at:
                plain(self, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(self, data)

        with monkeypatch.context() as full:
            full.setattr(Path, "write_bytes", write_bytes)
            with pytest.raises(SaveFailed) as refused:
                save_adapter(new, tmp_path / "a", extra_files={"README.md": b"card"})
        says(refused.value, "No space left", "still stands")
        assert len(calls) == full_at
        assert os.listdir(tmp_path) == ["a"]
        assert same(tmp_path / "a", old)


def test_a_write_that_the_system_really_refuses(vit: Backbone, tmp_path: Path) -> None:
    old, new = adapter(vit, seed=1), adapter(vit, seed=2)
    save_adapter(old, tmp_path / "a")
    with files_of_at_most(1000), pytest.raises(SaveFailed) as refused:
        save_adapter(new, tmp_path / "a")
    says(refused.value, "File too large", "still stands")
    assert os.listdir(tmp_path) == ["a"]
    assert same(tmp_path / "a", old)


def test_a_disk_that_is_really_full(vit: Backbone, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this machine does not let us mount a small disk")
    try:
        old, new = adapter(vit, seed=1), adapter(vit, seed=2)
        save_adapter(old, disk / "a")
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 4096))
        with pytest.raises(SaveFailed) as refused:
            save_adapter(new, disk / "a")
        says(refused.value, "No space left", "still stands")
        assert sorted(os.listdir(disk)) == ["a", "ballast"]
        assert same(disk / "a", old)
        (disk / "ballast").unlink()
        save_adapter(new, disk / "a")
        assert same(disk / "a", new)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Reading while somebody writes


def test_readers_see_one_version_or_the_other(vit: Backbone, swapping: str, tmp_path: Path) -> None:
    one, two = adapter(vit, seed=1), adapter(vit, seed=2)
    name = "lora.blocks.0.attn.q.A"
    known = {rounded(a, "float16").tensors()[name].sum().item(): k for k, a in enumerate((one, two))}
    save_adapter(one, tmp_path / "a")
    stop, start = threading.Event(), threading.Barrier(5)

    def read(_: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        start.wait(timeout=20)
        while not stop.is_set():
            seen[known[read_adapter(tmp_path / "a").tensors()[name].sum().item()]] += 1
        return seen

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read, k) for k in range(4)]
        start.wait(timeout=20)
        for k in range(14):
            save_adapter((two, one)[k % 2], tmp_path / "a")
        stop.set()
        seen = sum((job.result(timeout=30) for job in jobs), Counter())
    assert set(seen) == {0, 1}, f"only one of the versions was ever read: {seen}"
    assert os.listdir(tmp_path) == ["a"]


def test_writers_of_one_directory_do_not_hurt_each_other(vit: Backbone, tmp_path: Path) -> None:
    made = [adapter(vit, seed=k) for k in range(4)]
    start = threading.Barrier(4)

    def write(k: int) -> None:
        start.wait(timeout=20)
        for _ in range(10):
            save_adapter(made[k], tmp_path / "a")

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(write, k) for k in range(4)]:
            job.result(timeout=60)
    assert any(same(tmp_path / "a", one) for one in made)
    assert os.listdir(tmp_path) == ["a"]


def test_a_reader_in_the_middle_of_a_replacement_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is of the old version, then the old version is gone: both are read again."""
    put(tmp_path / "a", "old")
    plain, opens = files_module._open, []

    def open_it(handle: int, name: str, opened: contextlib.ExitStack, directory: Path) -> int:
        if len(opens) == 1:
            put(tmp_path / "a", "new")
        opens.append(name)
        return plain(handle, name, opened, directory)

    monkeypatch.setattr(files_module, "_open", open_it)
    assert look(tmp_path / "a") == "new"
    assert opens == ["one", "two", "one", "two"]


def test_files_once_open_are_read_whatever_becomes_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a", "old")
    plain, reads = files_module._read, []

    def read(file: int, path: Path, limit: int) -> bytes:
        put(tmp_path / "a", "new")
        reads.append(path.name)
        return plain(file, path, limit)

    monkeypatch.setattr(files_module, "_read", read)
    assert look(tmp_path / "a") == "old"
    assert reads == ["one", "two"]


def test_a_directory_that_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", "old")

    plain, opens = files_module._open, []

    def open_it(handle: int, name: str, opened: contextlib.ExitStack, directory: Path) -> int:
        opens.append(name)
        put(tmp_path / "a", "new")
        return plain(handle, name, opened, directory)

    monkeypatch.setattr(files_module, "_open", open_it)
    with pytest.raises(BadAdapter, match="replaced again and again"):
        read_together(tmp_path / "a", {"one": 100}, patience=0.2)
    assert len(opens) > 1


def test_no_handle_is_left_open(tmp_path: Path) -> None:
    put(tmp_path / "a", "x")
    (tmp_path / "a" / "big").write_bytes(b"x" * 101)
    (tmp_path / "a" / "folder").mkdir()
    (tmp_path / "a" / "link").symlink_to("one")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    look(tmp_path / "a")
    for name in ("nothing", "big", "folder", "link"):
        with pytest.raises(BadAdapter) as refused:
            read_together(tmp_path / "a", {name: 100})
        says(refused.value, name)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
