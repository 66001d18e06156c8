"""The Hub of the tests, asked by the real client; what the client does by itself is pinned too: hub.py builds on it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    hf_hub_download,
    hf_hub_url,
    list_repo_refs,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from tests.hub_server import Declared, HubServer, http_library

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's LFS upload

REPO = "medgraft/lungs"
WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "adapter.json": b'{"version": 1}',
    "adapter.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: apache-2.0\nlibrary_name: medgraft\ntags: [segmentation]\n---\n# Lungs\n",
    "images/preview.png": b"\x89PNG not really",
    "empty.bin": b"",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def here(hub: HubServer, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub as this process's own, for its owner."""
    with hub.in_process(tmp_path / "cache", hub.token, chunk=32 * 1024):
        yield hub


def get(hub: HubServer, path: str, cache: Path, **more: Any) -> bytes:
    more = {"token": False, **more}
    repo = more.pop("repo", REPO)
    return Path(hf_hub_download(repo, path, endpoint=hub.url, cache_dir=cache, **more)).read_bytes()


def tree(folder: str | Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def folder_of(files: dict[str, bytes], where: Path) -> Path:
    for name, data in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)
    return where


# ---- publishing


def test_a_folder_goes_up_and_comes_back(here: HubServer, tmp_path: Path) -> None:
    api = here.api(here.token)
    url = api.create_repo(REPO, private=True)
    assert (url.repo_id, url.repo_type) == (REPO, "model")
    done = api.upload_folder(repo_id=REPO, folder_path=folder_of(FILES, tmp_path / "mine"), commit_message="first")
    assert done.oid == here.head(REPO)
    assert here.repo(REPO).private

    [put] = here.asked("/upload/", method="PUT", where="cdn")
    assert put.body == WEIGHTS
    assert put.token is None
    [commit] = here.asked("/commit/main")
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] == "lfsFile"] == ["adapter.safetensors"]

    there = tree(snapshot_download(REPO, cache_dir=tmp_path / "other", token=here.token))
    assert there.pop(".gitattributes")
    assert there == FILES
    assert [seen.token for seen in here.asked(where="cdn")] == [None, None]

    here.forget()
    again = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "mine")
    assert again.oid == done.oid
    assert not here.asked("/commit/")
    assert not here.asked("/upload/")


def test_sizes_and_hashes_are_known_before_any_byte(hub: HubServer) -> None:
    sha = hub.put(REPO, FILES)
    api = hub.api()
    blob = hashlib.sha1(b"blob %d\0" % len(FILES["adapter.json"]) + FILES["adapter.json"]).hexdigest()
    weights = hashlib.sha256(WEIGHTS).hexdigest()

    listed = {f.path: f for f in api.list_repo_tree(REPO, recursive=True, revision=sha, expand=True)}
    assert sorted(listed) == sorted([*FILES, "images"])
    assert {name: listed[name].size for name in FILES} == {name: len(data) for name, data in FILES.items()}
    assert (listed["adapter.json"].blob_id, listed["adapter.json"].lfs) == (blob, None)
    assert (listed["adapter.safetensors"].lfs.sha256, listed["adapter.safetensors"].lfs.size) == (weights, len(WEIGHTS))
    assert listed["adapter.json"].last_commit.oid == sha

    some = {f.path: f for f in api.get_paths_info(REPO, ["adapter.json", "images", "nothing"], revision=sha)}
    assert sorted(some) == ["adapter.json", "images"]
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == sha
    assert (info.library_name, info.tags) == ("medgraft", ["medgraft", "segmentation"])
    assert {s.rfilename: s.size for s in info.siblings} == {name: len(data) for name, data in FILES.items()}
    head = api.get_hf_file_metadata(url=hf_hub_url(REPO, "adapter.safetensors", endpoint=hub.url), token=False)
    assert (head.commit_hash, head.etag, head.size) == (sha, weights, len(WEIGHTS))
    assert head.location.startswith(hub.cdn_url)
    assert not [seen for seen in hub.requests if seen.sent > 4096]


def test_pages(hub: HubServer) -> None:
    hub.page = 3
    names = {f"part-{i}.json": b"x" for i in range(8)}
    hub.put(REPO, names)
    assert sorted(hub.api().list_repo_files(REPO)) == sorted(names)
    assert len(hub.asked("/tree/")) == 3


def test_commits_branches_and_tags(here: HubServer) -> None:
    api = here.api(here.token)
    first = here.put(REPO, {"adapter.json": b"1", "gone.txt": b"x"}, message="one")
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="next/big")
    operations = [CommitOperationAdd("adapter.json", b"2"), CommitOperationDelete("gone.txt")]
    second = api.create_commit(REPO, operations, commit_message="two", revision="next/big", parent_commit=first).oid
    assert here.files(REPO, second) == {"adapter.json": b"2"}
    assert here.files(REPO, first) == {"adapter.json": b"1", "gone.txt": b"x"}
    assert [c.commit_id for c in api.list_repo_commits(REPO, revision="next/big")] == [second, first]
    refs = list_repo_refs(REPO)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": first, "next/big": second}
    assert {t.name: t.target_commit for t in refs.tags} == {"v1": first}

    for revision, sha in (("v1", first), ("next/big", second), (second, second), (second[:8], second)):
        assert api.model_info(REPO, revision=revision).sha == sha
    operations = [CommitOperationAdd("adapter.json", b"3")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as stale:
        api.create_commit(REPO, operations, commit_message="x", revision="next/big", parent_commit=first)
    assert stale.value.response.status_code == 412
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("nothing")], commit_message="x")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag(REPO, tag="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="next/big")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")


def test_a_repository_from_birth_to_death(here: HubServer, tmp_path: Path) -> None:
    api = here.api(here.token)
    assert api.whoami()["name"] == "medgraft"
    api.create_repo("lungs")
    assert api.create_repo("lungs", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        api.create_repo("others/lungs")
    api.create_repo("medgraft/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="medgraft/data", repo_type="dataset")
    assert get(here, "a.txt", tmp_path, repo="medgraft/data", repo_type="dataset") == b"x"
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert [m.id for m in api.list_models(author="medgraft", search="lung")] == [REPO]
    api.update_repo_settings(REPO, private=True, gated="auto")
    assert (here.repo(REPO).private, here.repo(REPO).gated) == (True, True)
    assert list(here.api().list_models(author="medgraft")) == []
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_paths_that_a_commit_may_not_have(here: HubServer) -> None:
    here.put(REPO, {"a": b""})
    operation = CommitOperationAdd("fine", b"x")
    for name in ("../evil", "a/../../evil", "/etc/evil"):
        operation.path_in_repo = name
        with pytest.raises(BadRequestError, match="Invalid path"):
            here.api(here.token).create_commit(REPO, [operation], commit_message="x")


def test_an_upload_that_fails_leaves_the_repository_as_it_was(here: HubServer) -> None:
    api = here.api(here.token)
    sha = here.put(REPO, {"adapter.json": b"1"})
    new = {"repo_id": REPO, "commit_message": "x"}
    here.fail(500, "/commit/")
    with pytest.raises(HfHubHTTPError, match="told to fail"):
        api.create_commit(operations=[CommitOperationAdd("w.safetensors", WEIGHTS)], **new)
    assert here.head(REPO) == sha
    here.fail(503, "/upload/", times=2)
    api.create_commit(operations=[CommitOperationAdd("v.safetensors", WEIGHTS[1:])], **new)
    assert here.read(REPO, "v.safetensors") == WEIGHTS[1:]
    assert [seen.status for seen in here.asked("/upload/")][-3:] == [503, 503, 200]

    here.lose("/commit/", method="POST")
    with pytest.raises(http_library.RemoteProtocolError):
        api.create_commit(operations=[CommitOperationAdd("late.json", b"1")], **new)
    assert here.read(REPO, "late.json") == b"1"


# ---- reading, and what may come between


def test_one_file_stays_of_one_commit_when_the_branch_moves(hub: HubServer, tmp_path: Path) -> None:
    old = hub.put(REPO, {"adapter.json": b"old", "w.bin": b"old weights"})
    new = hub.put(REPO, {"adapter.json": b"new", "w.bin": b"new weights"})
    hub.move(REPO, "main", old)

    def jump(method: str, path: str) -> None:
        if method == "GET":
            hub.move(REPO, "main", new)

    hub.on_request = jump
    assert get(hub, "adapter.json", tmp_path) == b"old"
    assert hub.head(REPO) == new
    # Two calls with a branch are two answers: this is the trap that resolve_revision is for.
    assert get(hub, "w.bin", tmp_path) == b"new weights"


def test_a_revision_resolved_once_stays(hub: HubServer, tmp_path: Path) -> None:
    old = hub.put(REPO, {"adapter.json": b"old", "w.bin": b"old weights"})
    pinned = hub.api().resolve_revision(REPO, revision="main", cache_dir=tmp_path)
    assert (pinned, pinned.resolved) == ("main", old)
    hub.put(REPO, {"adapter.json": b"new", "w.bin": b"new weights"})
    assert get(hub, "adapter.json", tmp_path, revision=pinned) == b"old"
    assert get(hub, "w.bin", tmp_path, revision=pinned.resolved) == b"old weights"
    hub.forget()
    assert get(hub, "w.bin", tmp_path, revision=pinned) == b"old weights"
    assert hub.requests == []

    def jump(method: str, path: str) -> None:
        if "/tree/" in path:
            hub.put(REPO, {"adapter.json": b"newest", "w.bin": b"newest weights"})

    hub.on_request = jump
    folder = tree(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "b", token=False))
    assert folder == {"adapter.json": b"new", "w.bin": b"new weights"}
    assert hub.read(REPO, "adapter.json") == b"newest"


def test_only_the_files_asked_for_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.put(
        REPO, {**FILES, "model.pkl": b"code", "model.py": b"code", "adapter.json.bak": b"x", "sub/adapter.json": b"y"}
    )
    wanted = ["adapter.json", "adapter.safetensors"]
    got = snapshot_download(REPO, allow_patterns=wanted, endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert sorted(tree(got)) == wanted
    assert not hub.asked(".pkl")


def test_odd_names_are_listed_and_the_client_refuses_those_that_climb(hub: HubServer, tmp_path: Path) -> None:
    climbing = ["../evil", "a/../../evil", "/etc/evil", "..", "c:\\evil", "..\\evil"]
    fine = ["a b#?%41.txt", "é.txt", "model.pkl", "setup.py", "link -> .."]
    hub.put(REPO, {name: f"this is {name}".encode() for name in [*climbing, *fine]})
    assert set(hub.api().list_repo_files(REPO)) == {*climbing, *fine}
    for name in fine:
        assert get(hub, name, tmp_path) == f"this is {name}".encode()
    hub.forget()
    for name in climbing:
        with pytest.raises(ValueError, match="Invalid filename"):
            get(hub, name, tmp_path)
    assert hub.requests == []
    with pytest.raises(ValueError, match="Invalid filename"):
        snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path, token=False)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_resumed(here: HubServer, tmp_path: Path, ranges: bool) -> None:
    here.put(REPO, FILES)
    here.ranges = ranges
    here.cut(REPO, "adapter.safetensors", 100_000)
    assert get(here, "adapter.safetensors", tmp_path) == WEIGHTS
    first, second = here.asked(where="cdn")
    assert (first.status, first.sent) == (200, 100_000)
    assert second.range == "bytes=98304-"
    assert (second.status, second.sent) == ((206, len(WEIGHTS) - 98304) if ranges else (200, len(WEIGHTS)))


def test_a_connection_that_is_always_cut_fails_and_leaves_nothing(here: HubServer, tmp_path: Path) -> None:
    here.put(REPO, FILES)
    here.cut(REPO, "*.safetensors", 100_000, times=None)
    with pytest.raises(http_library.RemoteProtocolError):
        get(here, "adapter.safetensors", tmp_path)
    assert len(here.asked(where="cdn")) == 6, (
        "the first try and 5 more; each that brings a whole chunk starts the count"
    )
    here.heal()
    here.cut(REPO, "*.safetensors", 100_000, reset=True)
    with pytest.raises(http_library.ReadError):
        get(here, "adapter.safetensors", tmp_path)
    assert not [name for name in tree(tmp_path) if "blobs" in name]
    here.heal()
    assert get(here, "adapter.safetensors", tmp_path) == WEIGHTS


def test_the_client_checks_sizes_and_never_hashes(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.put(REPO, FILES)
    hub.corrupt(REPO, "adapter.*")
    for name in ("adapter.json", "adapter.safetensors"):
        bad = get(hub, name, tmp_path)
        assert len(bad) == len(FILES[name])
        assert bad != FILES[name]
    found = hub.api().verify_repo_checksums(REPO, revision=sha, cache_dir=tmp_path)
    assert sorted(wrong["path"] for wrong in found.mismatches) == ["adapter.json", "adapter.safetensors"]
    hub.heal()
    assert get(hub, "adapter.json", tmp_path) != FILES["adapter.json"], "the bad bytes stay in the cache"
    assert get(hub, "adapter.json", tmp_path, force_download=True) == FILES["adapter.json"]
    hub.corrupt(REPO, "*", lambda data: data + b"more")
    with pytest.raises(OSError, match="Consistency check failed"):
        get(hub, "adapter.json", tmp_path / "new")


def test_a_file_that_is_only_declared(hub: HubServer, tmp_path: Path) -> None:
    huge = 50 * 2**30
    hub.put(REPO, {"huge.safetensors": Declared(huge), "big.json": Declared(huge // 2, lfs=False), "a.json": b"{}"})
    listed = {f.path: f for f in hub.api().list_repo_tree(REPO)}
    assert listed["huge.safetensors"].size == listed["huge.safetensors"].lfs.size == huge
    assert listed["big.json"].size == huge // 2
    plan = hf_hub_download(REPO, "huge.safetensors", dry_run=True, endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert plan.file_size == huge
    with pytest.raises(ValueError, match="too large"):
        get(hub, "huge.safetensors", tmp_path)
    assert not hub.asked(where="cdn")
    with warnings.catch_warnings(action="ignore"), pytest.raises(HfHubHTTPError, match="only declared"):
        get(hub, "big.json", tmp_path)
    told = Declared(3, hashlib.sha256(b"abc").hexdigest(), data=b"xyz")
    hub.put(REPO, {"lie.safetensors": told})
    assert get(hub, "lie.safetensors", tmp_path) == b"xyz"


# ---- who may


def test_private_and_missing_look_the_same(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, FILES, private=True)
    stranger, friend, dead = hub.add_token("eve"), hub.add_token("ann"), hub.add_token("old", expired=True)
    hub.grant(REPO, "ann")
    for repo in (REPO, "medgraft/nothing"):
        for token, status in ((None, 401), (stranger, 404)):
            with pytest.raises(RepositoryNotFoundError) as refused:
                hub.api(token).model_info(repo)
            assert refused.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError) as refused:
                get(hub, "adapter.json", tmp_path, repo=repo, token=token or False)
            assert refused.value.response.status_code == status
            assert not isinstance(refused.value, GatedRepoError)
    for token in (friend, hub.token):
        assert get(hub, "adapter.json", tmp_path / token, token=token) == FILES["adapter.json"]
    with pytest.raises(RepositoryNotFoundError, match="is expired"):
        get(hub, "adapter.json", tmp_path, token=dead)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as wrong:
        get(hub, "adapter.json", tmp_path, token="hf_wrong")
    assert not isinstance(wrong.value, RepositoryNotFoundError)


def test_a_gated_repository_is_listed_and_not_served(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, FILES, gated=True)
    stranger = hub.add_token("eve")
    for token, status in ((None, 401), (stranger, 403)):
        api = hub.api(token)
        assert api.model_info(REPO).gated == "manual"
        assert "adapter.json" in api.list_repo_files(REPO)
        with pytest.raises(GatedRepoError) as refused:
            get(hub, "adapter.json", tmp_path, token=token or False)
        assert refused.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            api.auth_check(REPO)
    hub.grant(REPO, "eve")
    assert get(hub, "adapter.json", tmp_path, token=stranger) == FILES["adapter.json"]
    with pytest.raises(HfHubHTTPError, match="write token"):
        hub.api(stranger).create_commit(REPO, [CommitOperationAdd("x", b"")], commit_message="x")


def test_revisions_and_files_that_are_not_there(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.put(REPO, FILES)
    for revision in ("nothing", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            get(hub, "adapter.json", tmp_path, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            snapshot_download(REPO, revision=revision, endpoint=hub.url, cache_dir=tmp_path, token=False)
    with pytest.raises(EntryNotFoundError) as missing:
        get(hub, "nothing.json", tmp_path)
    assert missing.value.response.headers["X-Repo-Commit"] == sha  # type: ignore[attr-defined]


# ---- without the Hub


def test_offline_and_a_hub_that_went_away(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.put(REPO, FILES)
    assert get(hub, "adapter.json", tmp_path) == FILES["adapter.json"]
    hub.forget()
    with hub.in_process(tmp_path, offline=True):
        cache = tmp_path
        assert get(hub, "adapter.json", cache) == FILES["adapter.json"]
        assert hub.api().resolve_revision(REPO, cache_dir=cache).resolved == sha
        for name, revision in (("README.md", None), ("adapter.json", "v9")):
            with pytest.raises(LocalEntryNotFoundError):
                get(hub, name, cache, revision=revision)
        with pytest.raises(RevisionResolutionError):
            hub.api().resolve_revision(REPO, revision="v9", cache_dir=cache)
        # Without a tree listing from an earlier snapshot_download, a snapshot of one file passes for the whole.
        assert sorted(tree(snapshot_download(REPO, cache_dir=cache))) == ["adapter.json"]
    assert hub.requests == []
    snapshot_download(REPO, allow_patterns="adapter.*", endpoint=hub.url, cache_dir=tmp_path, token=False)
    with pytest.raises(IncompleteSnapshotError):
        snapshot_download(REPO, cache_dir=tmp_path, local_files_only=True)
    hub.fail(503, "/revision/main")
    assert snapshot_download(REPO, allow_patterns="adapter.*", endpoint=hub.url, cache_dir=tmp_path, token=False)
    hub.close()
    assert get(hub, "adapter.json", tmp_path) == FILES["adapter.json"]
    with hub.in_process(tmp_path), pytest.raises(LocalEntryNotFoundError):
        get(hub, "README.md", tmp_path)


def test_failures_that_pass(here: HubServer, tmp_path: Path) -> None:
    here.put(REPO, FILES)
    here.fail(503, "/resolve/", method="HEAD")
    assert get(here, "adapter.json", tmp_path / "a") == FILES["adapter.json"]
    here.fail(429, "/resolve-cache/", method="GET", headers={"Retry-After": "1"})
    assert get(here, "adapter.json", tmp_path / "b") == FILES["adapter.json"]
    here.fail(503, "/tree/", times=2)
    assert snapshot_download(REPO, cache_dir=tmp_path / "c", allow_patterns="adapter.json")
    here.fail(500, "/lfs/", method="GET")
    with pytest.raises(HfHubHTTPError, match="500"):
        get(here, "adapter.safetensors", tmp_path / "d")
    here.stall(REPO, "adapter.safetensors", 0.3, after=1000)
    start = time.monotonic()
    assert get(here, "adapter.safetensors", tmp_path / "e") == WEIGHTS
    assert time.monotonic() - start >= 0.3


# ---- another process, and many at once


def test_another_process_by_its_environment_alone(hub: HubServer, tmp_path: Path) -> None:
    script = (
        "import sys; from huggingface_hub import HfApi, hf_hub_download, whoami; api = HfApi()\n"
        "api.create_repo('box'); api.upload_folder(repo_id='medgraft/box', folder_path=sys.argv[1])\n"
        "print(whoami()['name'], hf_hub_download('medgraft/box', 'adapter.safetensors'))"
    )
    mine = folder_of(FILES, tmp_path / "mine")
    env = {**os.environ, **hub.env(tmp_path / "cache", token=hub.token)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(mine)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split()
    assert name == "medgraft"
    assert Path(path).read_bytes() == WEIGHTS
    assert Path(path).is_relative_to(tmp_path / "cache" / "hub")


def test_a_failure_of_the_server_is_not_silent() -> None:
    def broken(method: str, path: str) -> None:
        raise ZeroDivisionError("in the hook")

    with HubServer() as hub:
        hub.on_request = broken
        with pytest.raises(HfHubHTTPError, match="in the hook"):
            hub.api().model_info(REPO)
        with pytest.raises(RuntimeError, match="failed 1 times"):
            hub.__exit__(None, None, None)
        hub.errors.clear()


def test_readers_never_see_two_commits_mixed(hub: HubServer, tmp_path: Path) -> None:
    """2 publishers and 10 readers, 50 rounds each: a revision resolved once gives files of one commit."""
    rounds, publishers, readers = 50, 2, 10
    hub.put(REPO, {"adapter.json": b"start", "adapter.safetensors": b"start"})

    def publish(who: int) -> None:
        api = hub.api(hub.token)
        for i in range(rounds):
            word = f"{who}-{i}".encode()
            add = [CommitOperationAdd("adapter.json", word), CommitOperationAdd("adapter.safetensors", word)]
            api.create_commit(REPO, add, commit_message=word.decode())

    def read(who: int) -> set[bytes]:
        api, seen = hub.api(), set()
        for _ in range(rounds):
            revision = api.resolve_revision(REPO, cache_dir=cache)
            one = get(hub, "adapter.json", cache, revision=revision)
            two = get(hub, "adapter.safetensors", cache, revision=revision)
            assert one == two == hub.read(REPO, "adapter.json", revision.resolved)
            seen.add(one)
        return seen

    cache = tmp_path / "hub"
    with hub.in_process(tmp_path), ThreadPoolExecutor(publishers + readers) as pool:
        writing = [pool.submit(publish, who) for who in range(publishers)]
        reading = [pool.submit(read, who) for who in range(readers)]
        for job in writing:
            job.result()
        seen = set().union(*(job.result() for job in reading))
    assert len(hub.repo(REPO).commits) == publishers * rounds + 1
    assert len(seen) > 10
