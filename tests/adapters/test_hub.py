"""Publishing and loading through the real client of the Hub, against a real server: what works, and everything that
goes wrong.

Xet itself is not exercised: the test Hub does not speak it, so HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download, scan_cache_dir
from PIL import Image

from medgraft.adapters import PARTS, Adapter, ClassifierHead, Host, LinearHead, LoRA
from medgraft.adapters.card import phantom_preview
from medgraft.adapters.hub import fetch, load_adapter, publish, pull, refuse_private
from medgraft.adapters.part import Part, part
from medgraft.adapters.peft import export_peft, features_of, import_peft
from medgraft.adapters.schema import canonical
from medgraft.adapters.signature import generate_key, sign
from medgraft.adapters.store import FILES, read_adapter, read_record, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, HubFailed, MedgraftError, SaveFailed, WrongBackbone
from tests.helpers import LABELS, ONE, adapter, images, same_bits, says
from tests.hub_server import Declared, HubServer, http_library

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's LFS upload

REPO = "medgraft/polyp"
BOTH = ("adapter.json", "adapter.safetensors")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """The Hub of this process, and its owner logged in."""
    with HubServer() as running:
        with running.in_process(tmp_path / "home", running.token, chunk=16 * 1024):
            yield running
        assert running.unknown == []


@pytest.fixture
def cache(server: HubServer, tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


@pytest.fixture
def mine(hf_vit: Backbone, tmp_path: Path) -> Path:
    return saved(hf_vit, tmp_path / "mine")


def saved(on: Backbone, where: Path, *, seed: int = 0, **facts: Any) -> Path:
    made = adapter(on, seed=seed)
    made.provenance = facts
    return save_adapter(made, where, backbone=on)


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}


def leftovers(cache: Path) -> list[str]:
    """What the next load could mistake for a whole file."""
    found = [p for p in cache.rglob("*") if p.is_file() or p.is_symlink()]
    return [
        str(p.relative_to(cache))
        for p in found
        if "snapshots" in p.parts or "blobs" in p.parts or "medgraft" in p.relative_to(cache).parts
    ]


def equal(a: Adapter, b: Adapter) -> bool:
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


# There and back


def test_an_adapter_publishes_itself(server: HubServer, hf_vit: Backbone, tmp_path: Path) -> None:
    made = adapter(hf_vit)
    assert made.publish(REPO, backbone=hf_vit, dtype="float32", message="First").endswith(server.head(REPO))
    assert equal(load_adapter(REPO, cache_dir=tmp_path / "empty"), made)
    assert made.publish(f"file:{tmp_path}/registry/lab/x", dtype="float32") == str(tmp_path / "registry" / "lab" / "x")


def test_a_plain_peft_adapter_comes_from_the_hub(server: HubServer, hf_vit: Backbone, tmp_path: Path) -> None:
    """A repository with peft's two files becomes one of ours with the same features; one with pickles is refused."""
    made = Adapter.of(hf_vit, ONE, {"lora": LoRA.on(hf_vit, ONE, rank=2), "head": LinearHead.on(hf_vit, ONE)})
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.1)
    assert export_peft(made, hf_vit, tmp_path / "plain", dtype="float32") is not None
    commit = server.put(REPO, contents(tmp_path / "plain"))
    found = import_peft(REPO, hf_vit, ONE)
    assert found.source is not None
    assert found.source.commit == commit
    x = images(hf_vit)
    torch.testing.assert_close(features_of(found, hf_vit, x).pooled, features_of(made, hf_vit, x).pooled)
    pickled = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"}
    server.put("medgraft/pickled", pickled)
    with pytest.raises(BadAdapter, match="pickled files are never loaded"):
        import_peft("medgraft/pickled", hf_vit, ONE)


def test_round_trip_on_an_empty_cache(server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path) -> None:
    """Publish, pull on an empty cache, load: the same outputs, bit for bit."""
    url = publish(mine, REPO, message="First")
    commit = server.head(REPO)
    assert url == f"{server.url}/{REPO}/commit/{commit}"
    out = pull(REPO, tmp_path / "out", cache_dir=tmp_path / "empty")
    assert set(contents(out)) == {*BOTH, "README.md"}
    x = images(hf_vit)
    outputs = []
    for one in (read_adapter(mine), read_adapter(out), load_adapter(REPO, cache_dir=tmp_path / "empty2")):
        host = Host(hf_vit)
        host.add(one, "polyp")
        with torch.no_grad():
            outputs.append(host(x, adapter="polyp"))
    assert same_bits(outputs[1], outputs[0])
    assert same_bits(outputs[2], outputs[0])
    assert str(load_adapter(REPO).source) == f"{REPO}@{commit}"


def test_round_trip_in_another_process_by_environment(server: HubServer, mine: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as users set them; progress bars are the client's."""
    program = (
        "import sys; from medgraft.adapters import hub; p, repo, out = sys.argv[1:]\n"
        "if p != '-': print(hub.publish(p, repo, private=True))\n"
        "print(hub.load_adapter(repo).source); print(hub.pull(repo, out))"
    )

    def run(*args: str, **changes: str) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            **server.env(tmp_path / "other", server.token),
            "HF_HUB_DISABLE_PROGRESS_BARS": "0",
            "TQDM_POSITION": "-1",
            **changes,
        }
        return subprocess.run(
            [sys.executable, "-c", program, *args], env=env, capture_output=True, text=True, timeout=120
        )

    first = run(str(mine), REPO, str(tmp_path / "out"))
    assert first.returncode == 0, first.stderr
    assert f"{REPO}@{server.head(REPO)}" in first.stdout
    assert server.repo(REPO).private
    assert "%|" in first.stderr, "no progress bar was shown"
    assert contents(tmp_path / "out").keys() == {*BOTH, "README.md"}
    seen = len(server.requests)
    offline = run("-", REPO, str(tmp_path / "out2"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(server.requests) == seen
    assert contents(tmp_path / "out2") == contents(tmp_path / "out")


def test_one_commit_of_exactly_the_files_that_the_format_names(server: HubServer, mine: Path) -> None:
    for name in ("model.py", "notes.txt", "overlay_3.png", "adapter.bin", ".hidden"):
        (mine / name).write_bytes(b"stays at home")
    (mine / "log").mkdir()
    (mine / "log" / "loss.jsonl").write_text("{}")
    publish(mine, REPO)
    commits = server.repo(REPO).commits.values()
    assert [c.title for c in commits] == ["initial commit", "Publish polyp"], "the Hub's own, and one of ours"
    assert set(server.files(REPO)) - {".gitattributes"} == {*BOTH, "README.md"}


def test_the_card_carries_the_address_and_a_persons_card_stays(server: HubServer, mine: Path) -> None:
    publish(mine, REPO)
    card = server.read(REPO, "README.md") or b""
    assert f'load_adapter("{REPO}")'.encode() in card
    (mine / "README.md").write_text("---\nlibrary_name: medgraft\n---\n# By hand\n")
    publish(mine, REPO)
    assert server.read(REPO, "README.md") == b"---\nlibrary_name: medgraft\n---\n# By hand\n"


def test_the_hubs_complaint_about_a_card_is_ours(server: HubServer, mine: Path) -> None:
    (mine / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(MedgraftError, match=r"README|YAML|metadata"):
        publish(mine, REPO)


def test_files_of_the_old_version_go_in_the_same_commit(
    server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path
) -> None:
    (mine / "adapter_config.json").write_text("{}")
    (mine / "adapter_model.safetensors").write_bytes(b"12345678")
    (mine / "preview.png").write_bytes(picture(marked=True))
    publish(mine, REPO)
    server.put(REPO, {"LICENSE": b"theirs"})
    before = len(server.repo(REPO).commits)
    publish(saved(hf_vit, tmp_path / "new", seed=1), REPO)
    assert len(server.repo(REPO).commits) == before + 1
    assert set(server.files(REPO)) - {".gitattributes"} == {*BOTH, "README.md", "LICENSE"}


def test_branches_and_private_repositories(server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path) -> None:
    publish(mine, REPO, private=True)
    assert server.repo(REPO).private
    main = server.head(REPO)
    publish(saved(hf_vit, tmp_path / "new", seed=1), REPO, revision="next")
    assert server.head(REPO) == main
    assert not equal(load_adapter(REPO), load_adapter(REPO, revision="next"))
    server.tag(REPO, "v1", main)
    assert load_adapter(REPO, revision="v1").source == load_adapter(REPO, revision=main).source


def test_private_is_not_promised_for_a_public_repository(server: HubServer, mine: Path) -> None:
    publish(mine, REPO)
    head = server.head(REPO)
    with pytest.raises(BadCall, match="public"):
        publish(mine, REPO, private=True)
    assert server.head(REPO) == head


def test_publishing_the_same_again_makes_no_commit(server: HubServer, mine: Path) -> None:
    assert publish(mine, REPO) == publish(mine, REPO)


def test_a_publication_that_comes_second_starts_over(
    server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path
) -> None:
    """Another one lands between our look at the repository and our commit, with a signature: no mixture may come of
    it.
    """
    publish(saved(hf_vit, tmp_path / "first", seed=3), REPO)
    times = [0]

    def rival(method: str, path: str) -> None:
        if "/commit/" in path and times[0] < 2:
            times[0] += 1
            server.put(REPO, {"signature.json": b"{}", "adapter.json": b"rival %d" % times[0]})

    server.on_request = rival
    publish(mine, REPO)
    server.on_request = None
    assert times == [2]
    assert set(server.files(REPO)) - {".gitattributes"} == {*BOTH, "README.md"}
    assert equal(load_adapter(REPO), read_adapter(mine))


# Not leaving with images


def picture(*, marked: bool) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "png")
    return phantom_preview(out.getvalue()) if marked else out.getvalue()


@pytest.fixture
def holder() -> Iterator[type[Part]]:
    """A part that keeps images, as a support would."""

    @part("test_support")
    class Support(LinearHead):
        holds_images = True

    yield Support
    del PARTS["test_support"]


def test_parts_that_hold_images_stay_home_unless_meant(
    server: HubServer, hf_vit: Backbone, holder: Any, tmp_path: Path
) -> None:
    made = adapter(hf_vit, {"support": holder.on(hf_vit, ONE)})
    mine = save_adapter(made, tmp_path / "mine")
    for target in (REPO, f"file:{tmp_path}/reg/lab/polyp"):
        with pytest.raises(BadCall) as refused:
            publish(mine, target)
        says(refused.value, "support", "images", "share_images=True")
    assert server.repos == {}
    assert not (tmp_path / "reg").exists()
    publish(mine, REPO, share_images=True)
    assert equal(load_adapter(REPO), made.half().float())


def test_a_preview_that_may_be_an_overlay_stays_home_unless_meant(server: HubServer, mine: Path) -> None:
    (mine / "preview.png").write_bytes(picture(marked=False))
    with pytest.raises(BadCall) as refused:
        publish(mine, REPO)
    says(refused.value, "preview.png", "overlay", "share_images=True")
    publish(mine, REPO, share_images=True)
    assert server.read(REPO, "preview.png") == picture(marked=False)


def test_a_preview_on_phantoms_goes_along(server: HubServer, mine: Path) -> None:
    (mine / "preview.png").write_bytes(picture(marked=True))
    publish(mine, REPO)
    assert server.read(REPO, "preview.png") == picture(marked=True)
    assert b"](preview.png)" in (server.read(REPO, "README.md") or b"")


PRIVATE = {
    "absolute": {"data": "/home/ann/polyps"},
    "drive": {"data": "C:\\Users\\ann\\polyps"},
    "share": {"data": "\\\\nas\\polyps"},
    "home": {"data": "~/polyps"},
    "relative": {"data": "../polyps"},
    "deep": {"data": "runs/polyps/train"},
    "inside a sentence": {"note": "trained on /mnt/pacs and others"},
    "file": {"image": "case_07.png"},
    "volume": {"note": "see liver_12.nii.gz"},
    "dicom file": {"note": "IM0001.dcm"},
    "items": {"items": ["a", "b"]},
    "ids": {"shots": ["case_01", "case_07"]},
    "ids as keys": {"per_image": {"case_01": 0.5}},
    "single id": {"item_id": "ann"},
    "tag": {"note": "(0010,0010)"},
    "bare tag": {"note": "0010,0020 = 7"},
    "keyword": {"PatientName": "x"},
    "keyword in text": {"note": "Study Instance UID kept"},
    "uid": {"note": "1.2.840.113619.2.55.3.604688119"},
    "deeper": {"settings": {"cache": {"disk": "/scratch/cache"}}},
    "url of a file": {"note": "file:///data/x"},
}


@pytest.mark.parametrize("where", ["provenance", "evaluation"])
@pytest.mark.parametrize("kind", PRIVATE)
def test_what_tells_whose_images_they_were_is_refused(mine: Path, tmp_path: Path, kind: str, where: str) -> None:
    record = read_record(mine)
    record[where] = PRIVATE[kind] if where == "provenance" else [PRIVATE[kind]]
    record["sha256"] = canonical(record)
    (mine / "adapter.json").write_text(json.dumps(record))
    with pytest.raises(BadCall, match="must not be published"):
        publish(mine, f"file:{tmp_path}/reg/lab/polyp")
    assert not (tmp_path / "reg").exists()


PUBLIC: dict[str, Any] = {
    "recipe": "full_finetune",
    "settings": {"targets": ["*.attn.q", "blocks.11.mlp.fc2"], "lr": 1e-3, "schedule": "cosine", "rates": [6, 12]},
    "dataset": "lab/polyps-2",
    "labels": "mask_av",
    "shots": 5,
    "seed": 0,
    "augment": "bank",
    "license": "cc-by-nc-4.0",
    "date": "2026-11-20",
    "medgraft": "0.1.0",
    "torch": "2.15.0+cpu",
    "python": "3.11.7",
    "modality": "T1-weighted MRI",
    "paper": "https://arxiv.org/abs/2106.09685.pdf",
    "classes": ["class_1", "class_2"],
    "limits": "Adults only; and/or 3 T scanners.",
}


def test_ordinary_facts_pass(mine: Path) -> None:
    record = read_record(mine)
    record["provenance"] = PUBLIC
    record["evaluation"] = [
        {
            "dataset": "phantom polyps",
            "split": "test",
            "n": 20,
            "dice": 0.87,
            "interval": [0.8, 0.9],
            "hd95": 3.0,
            "domain": "site_2",
        }
    ]
    refuse_private(record)


def test_the_published_bytes_hold_no_trace(server: HubServer, hf_vit: Backbone, tmp_path: Path) -> None:
    """Paths, file names, items, user and host of this machine, searched in every byte that left."""
    home = tmp_path / "Ann Smith" / "polyps"
    home.mkdir(parents=True)
    mine = saved(hf_vit, home / "run_7", dataset="phantom polyps", shots=5)
    (mine / "case_0017.png").write_bytes(picture(marked=False))
    publish(mine, REPO)
    left = b"".join(data or b"" for data in server.files(REPO).values()) + b"".join(
        seen.body for seen in server.requests
    )
    for trace in (
        str(tmp_path),
        "Ann Smith",
        "run_7",
        "case_0017",
        os.uname().nodename,
        str(Path(__file__).resolve().parents[2]),
        str(Path.home()),
    ):
        assert trace.encode() not in left, f"{trace} left the house"


@pytest.mark.parametrize("text", ["see /home/ann/x", "Patient tag (0010,0010)", "C:\\data"])
def test_a_card_by_hand_is_looked_at_too(mine: Path, tmp_path: Path, text: str) -> None:
    (mine / "README.md").write_text(f"# Mine\n\n{text}\n")
    with pytest.raises(BadCall, match=r"README\.md"):
        publish(mine, f"file:{tmp_path}/reg/lab/polyp")


# Publishing what or where one may not


def test_what_is_no_adapter_is_not_published(server: HubServer, mine: Path, tmp_path: Path) -> None:
    data = bytearray((mine / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (mine / "adapter.safetensors").write_bytes(data)
    with pytest.raises(BadAdapter):
        publish(mine, REPO)
    with pytest.raises(BadAdapter):
        publish(tmp_path / "nothing", REPO)
    (mine / "adapter.json").write_text('{"kind": "network", "format": 1}')
    with pytest.raises(BadAdapter, match="whole network"):
        publish(mine, REPO)
    assert server.requests == []


@pytest.mark.parametrize(
    "target", ["polyp", "", "a/b/c", "https://x/y", "../x", "a--b/c", "a/b.git", "a b/c", "-a/b", "a/b\n"]
)
def test_targets_that_are_none(mine: Path, target: str) -> None:
    with pytest.raises(BadCall, match="user/name"):
        publish(mine, target)


def test_tokens_that_may_not_write(server: HubServer, mine: Path) -> None:
    cases = {
        "read only": server.add_token("medgraft", write=False),
        "stranger": server.add_token("eve"),
        "expired": server.add_token("medgraft", expired=True),
        "unknown": "hf_nobody",
    }
    for kind, token in cases.items():
        with pytest.raises(HubFailed) as refused:
            publish(mine, REPO, token=token)
        says(refused.value, "token")
        assert token not in str(refused.value), kind
    publish(mine, REPO)
    head = server.head(REPO)
    for token in cases.values():
        with pytest.raises(HubFailed):
            publish(mine, REPO, token=token)
    assert server.head(REPO) == head


def test_a_hub_that_fails_while_publishing(server: HubServer, mine: Path) -> None:
    publish(mine, REPO)
    head = server.head(REPO)
    (mine / "README.md").write_text("# New\n")
    for trouble in (
        lambda: server.fail(500, "/commit/"),
        lambda: server.fail(500, "/preupload/", times=None),
        lambda: server.fail(403, "/commit/"),
    ):
        trouble()
        with pytest.raises(HubFailed):
            publish(mine, REPO)
        server.heal()
        assert server.head(REPO) == head


def test_offline_nothing_is_published(server: HubServer, mine: Path, tmp_path: Path) -> None:
    with (
        server.in_process(tmp_path / "home", server.token, offline=True),
        pytest.raises(HubFailed, match="HF_HUB_OFFLINE"),
    ):
        publish(mine, REPO)


# Loading


def put(server: HubServer, directory: Path, repo: str = REPO, **more: Any) -> str:
    return server.put(repo, {**contents(directory), **more.pop("files", {})}, **more)


def test_only_what_the_format_names_is_fetched(server: HubServer, mine: Path, tmp_path: Path) -> None:
    strange = {
        "model.py": b"boom",
        "pytorch_model.bin": b"boom",
        "sub/adapter.json": b"{}",
        "../adapter.json": b"{}",
        "a/../../x": b"{}",
        "link": b"/etc/passwd",
        "README.md": b"# x",
    }
    put(server, mine, files=strange)
    load_adapter(REPO)
    folder = fetch(REPO)
    assert set(contents(folder)) == {*BOTH, "README.md"}
    assert not any(f.is_symlink() for f in folder.iterdir())
    assert equal(read_adapter(folder), read_adapter(mine))
    asked = {seen.path.rpartition("/")[2] for seen in server.asked("/resolve/")}
    assert asked == {*BOTH, "README.md"}
    assert fetch(REPO) == folder


def test_the_hubs_own_tools_still_read_the_cache(server: HubServer, mine: Path, cache: Path) -> None:
    put(server, mine)
    fetch(REPO)
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    assert [repo.repo_id for repo in scanned.repos] == [REPO]


def test_a_commit_in_the_cache_is_loaded_without_a_question(server: HubServer, mine: Path) -> None:
    sha = put(server, mine)
    load_adapter(REPO, revision=sha)
    server.forget()
    load_adapter(REPO, revision=sha)
    assert server.requests == []
    load_adapter(REPO)
    assert len(server.requests) == 1, "a branch is resolved, and no more"


def test_offline_and_a_hub_that_is_gone(server: HubServer, mine: Path, tmp_path: Path) -> None:
    put(server, mine, files={"README.md": b"# x"})
    folder = contents(fetch(REPO))
    with server.in_process(tmp_path / "home", offline=True):
        assert load_adapter(REPO).source is not None
        assert contents(fetch(REPO)) == folder
        with pytest.raises(HubFailed, match="HF_HUB_OFFLINE"):
            load_adapter("medgraft/other")
        with pytest.raises(HubFailed, match="HF_HUB_OFFLINE"):
            load_adapter(REPO, revision="v9")
    server.close()
    assert load_adapter(REPO).source is not None
    assert contents(fetch(REPO)) == folder
    with pytest.raises(HubFailed, match="cannot be reached"):
        load_adapter("medgraft/other")


def test_a_foreign_endpoint_and_an_own_cache_by_argument(mine: Path, tmp_path: Path) -> None:
    with HubServer() as other:
        put(other, mine, private=True)
        given: dict[str, Any] = {"endpoint": other.url, "token": other.token, "cache_dir": tmp_path / "c"}
        assert load_adapter(REPO, **given).source is not None
        assert fetch(REPO, **given).is_relative_to(tmp_path / "c")


def test_a_revision_that_moves_between_two_files(
    server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path
) -> None:
    """The branch moves at every single request; what is loaded is one version, and the one that is named."""
    versions = [mine, *(saved(hf_vit, tmp_path / f"v{i}", seed=i) for i in range(1, 4))]
    shas = [put(server, v) for v in versions]
    turn = [0]

    def move(method: str, path: str) -> None:
        turn[0] += 1
        server.move(REPO, "main", shas[turn[0] % 4])

    server.on_request = move
    for i in range(8):
        loaded = load_adapter(REPO, cache_dir=tmp_path / f"c{i}")
        assert loaded.source is not None
        assert equal(loaded, read_adapter(versions[shas.index(loaded.source.commit)]))


@pytest.mark.parametrize(
    "source", ["nothing-here", "a/b/c", "", "/nowhere/at/all", "./x", "user/na me", "a\0b/c", "x" * 5000, "hf://a/b"]
)
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(BadAdapter, match="adapter"):
        load_adapter(source)
    with pytest.raises(BadAdapter):
        load_adapter(Path(source or "nowhere"))


def test_a_local_directory_wins_over_the_hub(hf_vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(hf_vit, tmp_path / "medgraft" / "polyp")
    loaded = load_adapter(REPO)
    assert loaded.source is not None
    assert loaded.source.commit == read_record(tmp_path / REPO)["sha256"]
    assert fetch(REPO) == Path(REPO)


# Bad input: repositories


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_model.bin": b"\x80\x04boom", "adapter_config.json": b"{}"}, ["pickled files are never loaded"]),
        ({"model.pkl": b"\x80\x04boom"}, ["pickled files are never loaded"]),
        ({"modeling.py": b"raise SystemExit"}, ["code", "modeling.py", "never run"]),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, ["plain peft adapter"]),
        ({"README.md": b"# x"}, ["README.md"]),
        ({}, ["nothing"]),
        ({"../adapter.json": b"{}", "a/../../adapter.safetensors": b"{}", "/adapter.json": b"{}"}, ["no adapter.json"]),
        ({"evil\n\x1b[31m.pkl": b"x"}, ["evil??[31m.pkl"]),
    ],
    ids=["bin", "pickle", "code", "peft", "readme", "empty", "climbing", "terminal"],
)
def test_repositories_without_an_adapter(
    server: HubServer, cache: Path, files: dict[str, bytes], words: list[str]
) -> None:
    server.put(REPO, files)
    for call in (load_adapter, fetch):
        with pytest.raises(BadAdapter) as refused:
            call(REPO)
        says(refused.value, REPO, *words)
    assert not server.asked("/resolve/")
    assert leftovers(cache) == []


@pytest.mark.parametrize("name", list(FILES))
def test_fifty_gigabytes(server: HubServer, mine: Path, cache: Path, name: str) -> None:
    put(server, mine)
    server.put(REPO, {name: Declared(50 * 2**30)})
    for call in (load_adapter, fetch):
        with pytest.raises(BadAdapter) as refused:
            call(REPO)
        says(refused.value, name, "53,687,091,200")
    assert not server.asked("/resolve/")
    assert leftovers(cache) == []


def test_fifty_gigabytes_of_something_else_are_not_our_business(server: HubServer, mine: Path) -> None:
    put(server, mine, files={"dataset.tar": Declared(50 * 2**30), "pytorch_model.bin": Declared(50 * 2**30)})
    assert load_adapter(REPO).source is not None


def header(length: int, text: bytes = b"", rest: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + rest


LYING = {
    "too long": header(200 << 20, b"{}"),
    "really long": header(9 << 20, b" " * (9 << 20)),
    "negative": b"\xff" * 16,
    "beyond": header(58, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999]}}'[:58]),
    "offsets": header(61, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999]}}'),
    "overlap": header(
        113,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      '[
            :113
        ],
        b"\0" * 4,
    ),
    "huge shape": header(
        75, b'{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}  '[:75], b"\0" * 4
    ),
    "no json": header(4, b"abcd"),
    "empty": b"",
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93",
}


@pytest.mark.parametrize("kind", LYING)
def test_lying_headers(server: HubServer, mine: Path, kind: str) -> None:
    """The description even vouches for them."""
    blob = LYING[kind]
    record = read_record(mine)
    record["tensors"] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": max(1, len(blob))}
    record["sha256"] = canonical(record)
    server.put(REPO, {"adapter.json": json.dumps(record).encode(), "adapter.safetensors": blob})
    with pytest.raises(BadAdapter, match=r"adapter\.safetensors"):
        load_adapter(REPO)


@pytest.mark.parametrize("name", BOTH)
def test_a_hash_that_does_not_match(server: HubServer, mine: Path, cache: Path, name: str) -> None:
    put(server, mine)
    server.corrupt(REPO, name)
    with pytest.raises(BadAdapter) as refused:
        load_adapter(REPO)
    says(refused.value, name, "damaged")
    assert not any(p.resolve().read_bytes() != (mine / name).read_bytes() for p in cache.glob(f"*/snapshots/*/{name}"))
    server.heal()
    assert equal(load_adapter(REPO), read_adapter(mine)), "the damaged file stayed in the cache"


def test_one_damaged_transfer_is_asked_for_again(server: HubServer, mine: Path) -> None:
    put(server, mine)
    server.corrupt(REPO, "adapter.safetensors", times=1)
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_a_file_damaged_in_the_cache_is_replaced(server: HubServer, mine: Path, cache: Path) -> None:
    put(server, mine)
    load_adapter(REPO)
    for blob in (cache / "models--medgraft--polyp" / "blobs").iterdir():
        blob.write_bytes(blob.read_bytes()[:-3])
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_a_declared_hash_that_is_not_of_the_bytes(server: HubServer, mine: Path) -> None:
    blob = (mine / "adapter.safetensors").read_bytes()
    put(server, mine, files={"adapter.safetensors": Declared(len(blob), "d" * 64, data=blob)})
    with pytest.raises(BadAdapter, match="damaged"):
        load_adapter(REPO)


def test_more_bytes_than_declared(server: HubServer, mine: Path, cache: Path) -> None:
    put(server, mine)
    server.corrupt(REPO, "adapter.safetensors", lambda data: data + b"x" * 100)
    with pytest.raises(MedgraftError):
        load_adapter(REPO)
    server.heal()
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_files_of_two_versions_in_one_commit(server: HubServer, mine: Path, hf_vit: Backbone, tmp_path: Path) -> None:
    other = saved(hf_vit, tmp_path / "other", seed=1)
    put(server, mine, files={"adapter.safetensors": (other / "adapter.safetensors").read_bytes()})
    with pytest.raises(BadAdapter, match="sha256 differs"):
        load_adapter(REPO)


def test_a_link_committed_as_a_file(server: HubServer, mine: Path) -> None:
    put(server, mine, files={"adapter.json": b"../../../../etc/passwd"})
    with pytest.raises(BadAdapter):
        load_adapter(REPO)


# Bad input: the way


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_a_connection_cut_in_the_middle(server: HubServer, mine: Path, cache: Path, name: str, reset: bool) -> None:
    put(server, mine)
    server.cut(REPO, name, 700, times=None, reset=reset)
    with pytest.raises(HubFailed) as refused:
        load_adapter(REPO)
    says(refused.value, "hung up", "try again")
    assert not any(name in left for left in leftovers(cache))
    server.heal()
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_a_connection_cut_once_is_taken_up_again(server: HubServer, mine: Path) -> None:
    put(server, mine)
    server.cut(REPO, "adapter.safetensors", 700)
    assert equal(load_adapter(REPO), read_adapter(mine))


@pytest.mark.parametrize("status", [400, 404, 409, 418, 429, 500, 503])
def test_a_hub_that_answers_nonsense(server: HubServer, mine: Path, status: int) -> None:
    put(server, mine)
    for part_of_it in ("/api/models/", "/resolve/"):
        server.fail(status, part_of_it, times=None)
        with pytest.raises(MedgraftError):
            load_adapter(REPO)
        server.heal()
    assert load_adapter(REPO).source is not None


def test_an_endpoint_that_is_no_hub(tmp_path: Path) -> None:
    for endpoint in ("http://127.0.0.1:9", "nonsense", "http://"):
        with pytest.raises(HubFailed):
            load_adapter(REPO, endpoint=endpoint, token=False, cache_dir=tmp_path)


def test_who_may_not_read(server: HubServer, mine: Path, cache: Path) -> None:
    put(server, mine, private=True)
    expired = server.add_token("medgraft", expired=True)
    for token in (False, server.add_token("eve"), expired, "hf_unknown"):
        with pytest.raises(HubFailed) as refused:
            load_adapter(REPO, token=token)
        says(refused.value, REPO, "token")
        assert str(token) not in str(refused.value) or token is False
    with pytest.raises(HubFailed, match="expired"):
        load_adapter(REPO, token=expired)
    with pytest.raises(HubFailed, match="no such repository"):
        load_adapter("medgraft/nothing")
    with pytest.raises(HubFailed, match="no such revision"):
        load_adapter(REPO, revision="v9")
    with pytest.raises(HubFailed, match="no such revision"):
        load_adapter(REPO, revision="0" * 40)
    assert leftovers(cache) == []
    assert load_adapter(REPO).source is not None


def test_a_gated_repository(server: HubServer, mine: Path) -> None:
    put(server, mine, gated=True)
    with pytest.raises(HubFailed, match="grants access"):
        load_adapter(REPO, token=server.add_token("eve"))
    server.grant(REPO, "ann")
    assert load_adapter(REPO, token=server.add_token("ann")).source is not None


# Bad input: the disk


def test_a_full_disk(server: HubServer, mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download writes half of the file, and then the disk is full."""
    from huggingface_hub import file_download

    put(server, mine)
    plain = file_download.http_get

    def half(url: str, temp_file: Any, **more: Any) -> None:
        temp_file.write(b"x" * 500)
        temp_file.flush()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", half)
    with pytest.raises(SaveFailed) as refused:
        load_adapter(REPO)
    says(refused.value, "No space left", "HF_HOME")
    assert leftovers(cache) == []
    monkeypatch.setattr(file_download, "http_get", plain)
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_a_disk_that_is_really_full(server: HubServer, mine: Path, tmp_path: Path) -> None:
    """Another process may write files of at most 1,000 bytes: the kernel refuses the rest."""
    put(server, mine)
    program = (
        "import resource, sys\nfrom medgraft.adapters import hub\nfrom medgraft.errors import SaveFailed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: hub.load_adapter({REPO!r})\nexcept SaveFailed as e: print('refused:', e)"
    )
    env = {**os.environ, **server.env(tmp_path / "small", server.token)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert "refused: could not download" in done.stdout, done.stderr
    assert [left for left in leftovers(tmp_path / "small" / "hub") if "blobs" in left] == []


def test_a_cache_that_is_a_file(server: HubServer, mine: Path, tmp_path: Path) -> None:
    put(server, mine)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveFailed, match="cache"):
        load_adapter(REPO, cache_dir=tmp_path / "file")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder outside of pytest's private one, so that another user may look into it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


class _Nobody:
    """For the length of the block: a user without rights, also when the tests run as root."""

    def __enter__(self) -> None:
        self.was = os.geteuid()
        if self.was == 0:
            os.seteuid(65534)

    def __exit__(self, *args: object) -> None:
        os.seteuid(self.was)


def test_a_read_only_cache(server: HubServer, mine: Path, open_folder: Path) -> None:
    put(server, mine)
    filled, empty = open_folder / "filled", open_folder / "empty"
    empty.mkdir()
    load_adapter(REPO, cache_dir=filled)
    for folder in (filled, empty, *filled.rglob("*")):
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o555)
    try:
        with _Nobody():
            loaded = load_adapter(REPO, cache_dir=filled)
            folder = fetch(REPO, cache_dir=filled)
            got = contents(folder)
            with pytest.raises(SaveFailed) as refused:
                load_adapter(REPO, cache_dir=empty)
    finally:
        for folder in (filled, *filled.rglob("*")):
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o755)
    assert equal(loaded, read_adapter(mine))
    assert set(got) == set(BOTH)
    says(refused.value, "cannot be written", "Permission denied")


def test_pulling_into_a_folder_of_other_things(server: HubServer, mine: Path, tmp_path: Path) -> None:
    put(server, mine)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"x")
    with pytest.raises(BadCall, match="not an adapter's"):
        pull(REPO, other)
    assert os.listdir(other) == ["me.jpg"]
    out = pull(REPO, tmp_path / "out")
    server.corrupt(REPO, "adapter.safetensors")
    with pytest.raises(BadAdapter):
        pull(REPO, tmp_path / "out", cache_dir=tmp_path / "fresh")
    assert equal(read_adapter(out), read_adapter(mine)), "what stood there still stands"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


# Bad input: whose


def test_signatures_on_the_way(server: HubServer, mine: Path, tmp_path: Path) -> None:
    key, other = generate_key(tmp_path / "a.pem"), generate_key(tmp_path / "b.pem")
    put(server, mine)
    with pytest.raises(BadAdapter, match="not signed"):
        load_adapter(REPO, key=key[1])
    sign(mine, key[0], repo=REPO)
    publish(mine, REPO)
    assert load_adapter(REPO, key=key[1]).source is not None
    with pytest.raises(BadAdapter, match="signed by the key"):
        load_adapter(REPO, key=other[1])
    server.put(REPO, {"adapter_config.json": b"{}"})
    with pytest.raises(BadAdapter, match=r"adapter_config\.json"):
        load_adapter(REPO, key=key[1])


def test_an_adapter_for_another_backbone(server: HubServer, mine: Path, dinov2: Backbone) -> None:
    publish(mine, REPO)
    loaded = load_adapter(REPO)
    with pytest.raises(WrongBackbone):
        Host(dinov2).add(loaded, "polyp")


def test_a_classifier_goes_the_same_way(server: HubServer, hf_vit: Backbone, tmp_path: Path) -> None:
    made = adapter(hf_vit, {"head": ClassifierHead.on(hf_vit, LABELS)}, task=LABELS)
    publish(save_adapter(made, tmp_path / "c"), REPO)
    assert load_adapter(REPO).task == LABELS


# Many at once


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_two_publishers_and_ten_readers(server: HubServer, hf_vit: Backbone, tmp_path: Path, count: int) -> None:
    """No broken read in 500: every one is a whole version, the very one that its commit names."""
    versions = [saved(hf_vit, tmp_path / f"v{i}", seed=i, shots=i + 1) for i in range(4)]
    known = {i + 1: read_adapter(v) for i, v in enumerate(versions)}
    publish(versions[0], REPO)
    stop = threading.Event()
    published: list[str] = []

    def keep_publishing(seed: int) -> None:
        order = random.Random(seed)
        while not stop.is_set():
            published.append(publish(order.choice(versions), REPO))

    def read(i: int) -> tuple[str, int]:
        folder = tmp_path / "caches" / str(i % 10 if i % 3 else i)  # shared caches, and every third time an empty one
        loaded = load_adapter(REPO, cache_dir=folder)
        assert loaded.source is not None
        shots = loaded.provenance["shots"]
        assert equal(loaded, known[shots])
        there = json.loads(server.read(REPO, "adapter.json", loaded.source.commit) or b"")
        assert there["provenance"]["shots"] == shots
        return loaded.source.commit, shots

    start = time.perf_counter()
    with ThreadPoolExecutor(12) as pool:
        writers = [pool.submit(keep_publishing, seed) for seed in range(2)]
        try:
            reads = [pool.submit(read, i) for i in range(count)]
            done = [one.result() for one in reads]
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    print(
        f"\n{count} reads, {len(published)} publications, {len({c for c, _ in done})} commits seen, "
        f"{time.perf_counter() - start:.1f} s"
    )
    assert len({shots for _, shots in done}) > 1


# The client's errors, whatever they are, in our words


def strange_errors() -> dict[str, Callable[[], BaseException]]:
    from huggingface_hub import errors

    response = http_library.Response(500, request=http_library.Request("GET", "http://x"))
    return {
        "transport": lambda: http_library.ReadTimeout("slow"),
        "proxy": lambda: http_library.ProxyError("proxy"),
        "url": lambda: http_library.InvalidURL("no"),
        "hub": lambda: errors.HfHubHTTPError("x", response=response),
        "xet": lambda: errors.XetDownloadError("x"),
        "assertion": lambda: AssertionError("sha"),
        "runtime": lambda: RuntimeError("xet"),
        "value": lambda: ValueError("size"),
        "type": lambda: TypeError("none"),
        "io": lambda: OSError(5, "Input/output error"),
        "permission": lambda: PermissionError(13, "Permission denied", "/cache"),
        "memory": lambda: MemoryError(),
        "empty": lambda: RuntimeError(),
    }


@pytest.mark.parametrize("kind", strange_errors())
def test_no_bare_exception_comes_through(
    server: HubServer, mine: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    put(server, mine)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise strange_errors()[kind]()

    for name in ("resolve_revision", "model_info"):
        with monkeypatch.context() as patched:
            patched.setattr(huggingface_hub.HfApi, name, broken)
            with pytest.raises(MedgraftError):
                load_adapter(REPO)
            if name == "model_info":
                with pytest.raises(MedgraftError):
                    publish(mine, REPO)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "hf_hub_download", broken)
        with pytest.raises(MedgraftError):
            load_adapter(REPO)
    assert equal(load_adapter(REPO), read_adapter(mine))


def test_other_peoples_partial_caches_do_not_confuse_us(server: HubServer, mine: Path) -> None:
    """Somebody downloaded one file by hand, from the branch, with the plain client."""
    put(server, mine)
    hf_hub_download(REPO, "adapter.json")
    assert set(contents(fetch(REPO))) == set(BOTH)
