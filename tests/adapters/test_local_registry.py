"""A registry in a folder: published whole, listed from the truth, whatever becomes of its index; many at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from medgraft.adapters import hub, local_registry
from medgraft.adapters.local_registry import Entry, list_adapters, parse, resolve, search
from medgraft.adapters.store import read_adapter, read_files, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, SaveFailed, UnknownName
from tests.helpers import THREE, adapter, says


def saved(on: Backbone, where: Path, *, seed: int = 0, **facts: Any) -> Path:
    made = adapter(on, seed=seed, **({"task": facts.pop("task")} if "task" in facts else {}))
    made.provenance = facts
    return save_adapter(made, where)


@pytest.fixture
def registry(hf_vit: Backbone, tmp_path: Path) -> Path:
    """Three adapters of two owners."""
    root = tmp_path / "registry"
    endoscopy = {"modality": "Endoscopy", "organ": "colon", "license": "mit"}
    for name, facts in {
        "lab/polyp": endoscopy,
        "lab/cells": {"modality": "histology", "task": THREE},
        "ann/polyp": {"modality": "endoscopy", "organ": "stomach"},
    }.items():
        hub.publish(saved(hf_vit, tmp_path / "mine", **facts), f"file:{root}/{name}")
    return root


def ids(found: list[Entry]) -> list[str]:
    return [entry.id for entry in found]


@pytest.mark.parametrize(
    ("target", "root", "id"),
    [
        ("file:/lab/registry/lab/polyp", "/lab/registry", "lab/polyp"),
        ("file:reg/lab/polyp.v2", "reg", "lab/polyp.v2"),
        ("file:///lab/registry/lab/polyp", "/lab/registry", "lab/polyp"),
        ("file:/lab/registry/lab/polyp/", "/lab/registry", "lab/polyp"),
    ],
)
def test_addresses(target: str, root: str, id: str) -> None:
    address = parse(target)
    assert (address.root, address.id) == (Path(root), id)


@pytest.mark.parametrize(
    "target",
    [
        "file:",
        "file:polyp",
        "file:lab/polyp",
        "file:/lab/../x",
        "file:/a/b/..",
        "file:/a/.hidden/x",
        "file:/a/b/.x",
        "lab/polyp",
        "file:/a/b c/d",
        "file:/a\0/b/c",
        "file:/a/b/-c",
    ],
)
def test_addresses_that_are_none(target: str) -> None:
    with pytest.raises(BadCall, match="file:DIR/OWNER/NAME"):
        parse(target)


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("file:~/reg/lab/polyp").root == tmp_path / "reg"


def test_what_is_published_is_loaded_again_bit_for_bit(hf_vit: Backbone, tmp_path: Path) -> None:
    mine = saved(hf_vit, tmp_path / "mine", seed=4)
    (mine / "notes.txt").write_text("stays at home")
    target = f"file:{tmp_path}/reg/lab/polyp"
    assert hub.publish(mine, target) == str(tmp_path / "reg/lab/polyp")
    there = tmp_path / "reg/lab/polyp"
    assert sorted(f.name for f in there.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]
    loaded, before = hub.load_adapter(target), read_adapter(mine)
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in before.tensors().items())
    assert str(loaded.source) == f"{target}@{json.loads((there / 'adapter.json').read_text())['sha256']}"
    assert hub.fetch(target) == there
    pulled = hub.pull(target, tmp_path / "out")
    assert read_files(pulled) == read_files(there)


def test_a_description_pins_the_version(hf_vit: Backbone, tmp_path: Path) -> None:
    target = f"file:{tmp_path}/reg/lab/polyp"
    hub.publish(saved(hf_vit, tmp_path / "mine"), target)
    adapter_source = hub.load_adapter(target).source
    assert adapter_source is not None
    pin = adapter_source.commit
    assert hub.load_adapter(target, revision=pin[:9]).source == adapter_source
    hub.publish(saved(hf_vit, tmp_path / "mine", seed=1), target)
    with pytest.raises(BadAdapter, match="keeps no older ones"):
        hub.load_adapter(target, revision=pin)
    with pytest.raises(BadAdapter):
        hub.load_adapter(target, revision="")


def test_a_new_version_drops_the_files_of_the_old(hf_vit: Backbone, tmp_path: Path) -> None:
    mine, target = saved(hf_vit, tmp_path / "mine"), f"file:{tmp_path}/reg/lab/polyp"
    (mine / "adapter_config.json").write_text("{}")
    (mine / "adapter_model.safetensors").write_bytes(b"12345678")
    there = Path(hub.publish(mine, target))
    assert (there / "adapter_config.json").is_file()
    hub.publish(saved(hf_vit, tmp_path / "other"), target)
    assert not (there / "adapter_config.json").exists()


def test_a_folder_has_no_revisions_to_publish_to(hf_vit: Backbone, tmp_path: Path) -> None:
    mine = saved(hf_vit, tmp_path / "mine")
    for options in ({"revision": "v2"}, {"private": True}):
        with pytest.raises(BadCall, match="folder"):
            hub.publish(mine, f"file:{tmp_path}/reg/lab/polyp", **options)


def test_listing(registry: Path, hf_vit: Backbone) -> None:
    found = list_adapters(registry)
    assert ids(found) == ["ann/polyp", "lab/cells", "lab/polyp"]
    polyp = found[2]
    assert (polyp.classes, polyp.modality, polyp.organ, polyp.license) == (("polyp",), "Endoscopy", "colon", "mit")
    assert (polyp.backbone, polyp.fingerprint, polyp.task) == (hf_vit.spec.id, hf_vit.spec.fingerprint, "segment")
    assert list_adapters(f"file:{registry}") == found


@pytest.mark.parametrize(
    ("query", "want"),
    [
        ({}, ["ann/polyp", "lab/cells", "lab/polyp"]),
        ({"modality": "endoscopy"}, ["ann/polyp", "lab/polyp"]),
        ({"modality": "endoscopy", "organ": "COLON"}, ["lab/polyp"]),
        ({"class_name": "Nucleus"}, ["lab/cells"]),
        ({"backbone": "hf:vit"}, ["ann/polyp", "lab/cells", "lab/polyp"]),
        ({"backbone": "swin"}, []),
        ({"organ": "liver"}, []),
    ],
    ids=str,
)
def test_searching(registry: Path, query: dict[str, str], want: list[str]) -> None:
    assert ids(search(registry, **query)) == want


def test_searching_by_fingerprint(registry: Path, hf_vit: Backbone) -> None:
    assert len(search(registry, backbone=hf_vit.spec.fingerprint[:10])) == 3


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b'{"adapters": 3}', b'{"adapters": [{"id": 1}]}', b"\xff", b"[" * 100_000, None],
    ids=lambda index: str(index)[:20],
)
def test_the_index_may_be_lost_or_broken(registry: Path, index: bytes | None) -> None:
    before = list_adapters(registry)
    file = registry / "index.json"
    file.unlink() if index is None else file.write_bytes(index)
    assert list_adapters(registry) == before
    assert len(json.loads(file.read_text())["adapters"]) == 3, "it was written anew"


def test_a_lying_index_is_not_believed(registry: Path) -> None:
    file = registry / "index.json"
    index = json.loads(file.read_text())
    for entry in index["adapters"]:
        entry.update(classes=["gold"], stamp=[1, 2, 3])
    index["adapters"].append({**index["adapters"][0], "id": "lab/ghost"})
    file.write_text(json.dumps(index))
    assert ids(list_adapters(registry)) == ["ann/polyp", "lab/cells", "lab/polyp"]
    assert search(registry, class_name="gold") == []
    index["adapters"] = [
        {**e, "modality": 5, "stamp": list(s.stamp)}
        for e, s in zip(index["adapters"], list_adapters(registry), strict=False)
    ]
    file.write_text(json.dumps(index))
    assert len(search(registry, modality="endoscopy")) == 2


def test_damaged_adapters_and_strange_folders_are_passed_over(registry: Path) -> None:
    (registry / "lab/broken").mkdir()
    (registry / "lab/broken/adapter.json").write_text("{}")
    (registry / "lab/empty").mkdir()
    (registry / "lab/.polyp.abc.new").mkdir()
    (registry / "notes.txt").write_text("x")
    os.mkfifo(registry / "lab/empty/adapter.json")
    assert ids(list_adapters(registry)) == ["ann/polyp", "lab/cells", "lab/polyp"]


def test_a_listing_needs_no_permission_to_write(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (registry / "index.json").unlink()

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(local_registry.Path, "write_text", refuse)
    assert len(list_adapters(registry)) == 3


def test_what_is_not_there_is_said_with_near_misses(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as missing:
        resolve(f"file:{registry}/lab/polyps")
    says(missing.value, "lab/polyps", "did you mean", "lab/polyp")
    with pytest.raises(UnknownName, match="does not exist"):
        hub.load_adapter(f"file:{tmp_path}/nowhere/lab/polyp")
    with pytest.raises(BadAdapter, match="no such folder"):
        list_adapters(tmp_path / "nowhere")


def test_a_disk_that_refuses_leaves_the_old_version(
    hf_vit: Backbone, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_files(registry / "lab/polyp")

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    mine = saved(hf_vit, tmp_path / "mine", seed=9)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveFailed, match="No space left"):
        hub.publish(mine, f"file:{registry}/lab/polyp")
    monkeypatch.undo()
    assert read_files(registry / "lab/polyp") == before
    assert sorted(os.listdir(registry / "lab")) == ["cells", "polyp"]


# Many at once


def _publish_often(sources: list[Path], target: str, rounds: int, seed: int) -> None:
    order = random.Random(seed)
    for _ in range(rounds):
        hub.publish(order.choice(sources), target)


def test_two_publishers_and_ten_readers(hf_vit: Backbone, tmp_path: Path) -> None:
    """500 reads while two processes publish to one name: no read is broken, and each is one of the versions, whole."""
    sources = [saved(hf_vit, tmp_path / f"v{seed}", seed=seed, shots=seed) for seed in range(4)]
    versions = {read_adapter(s).provenance["shots"]: read_adapter(s).tensors() for s in sources}
    target = f"file:{tmp_path}/reg/lab/polyp"
    hub.publish(sources[0], target)
    context = multiprocessing.get_context("fork")
    publishers = [context.Process(target=_publish_often, args=(sources, target, 10**6, seed)) for seed in range(2)]
    seen: list[int] = []
    broken: list[BaseException] = []
    lock = threading.Lock()

    def read(_: int) -> None:
        try:
            loaded = hub.load_adapter(target)
            shots = loaded.provenance["shots"]
            assert all(torch.equal(t, loaded.tensors()[name]) for name, t in versions[shots].items())
            with lock:
                seen.append(shots)
        except BaseException as error:
            broken.append(error)

    for publisher in publishers:
        publisher.start()
    try:
        with ThreadPoolExecutor(10) as readers:
            list(readers.map(read, range(500)))
    finally:
        alive = [p.is_alive() for p in publishers]
        for publisher in publishers:
            publisher.terminate()
            publisher.join()
    assert broken == []
    assert len(seen) == 500
    assert len(set(seen)) > 1, "the versions never changed while they were read"
    assert all(alive), "the publishers were done before the readers"


def test_publishers_of_different_names_do_not_lose_each_other(hf_vit: Backbone, tmp_path: Path) -> None:
    mine, root = saved(hf_vit, tmp_path / "mine"), tmp_path / "reg"
    names = [f"lab{i % 3}/a{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: hub.publish(mine, f"file:{root}/{name}"), names))
    assert ids(list_adapters(root)) == sorted(names)


def test_a_file_system_without_exchange_still_has_whole_versions(
    hf_vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames instead of one: a reader may come between them, and waits."""
    from medgraft.adapters import files

    def no_library(*args: Any, **kwargs: Any) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(files.ctypes, "CDLL", no_library)
    sources = [saved(hf_vit, tmp_path / f"v{seed}", seed=seed) for seed in range(2)]
    target = f"file:{tmp_path}/reg/lab/polyp"
    hub.publish(sources[0], target)
    stop = threading.Event()

    def publish(seed: int) -> None:
        while not stop.is_set():
            hub.publish(sources[seed], target)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(publish, seed) for seed in range(2)]
        try:
            for _ in range(60):
                hub.load_adapter(target)
        finally:
            stop.set()
        for one in running:
            one.result()
    assert os.listdir(tmp_path / "reg/lab") == ["polyp"]


def test_a_listing_is_quick_when_nothing_changed(hf_vit: Backbone, tmp_path: Path) -> None:
    mine, root = saved(hf_vit, tmp_path / "mine"), tmp_path / "reg"
    for i in range(30):
        local_registry.publish(read_files(mine), f"file:{root}/lab/a{i}")
    first = list_adapters(root)
    start = time.process_time()
    assert list_adapters(root) == first
    assert time.process_time() - start < 0.5
