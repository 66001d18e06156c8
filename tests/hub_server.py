"""A Hub on this machine: a real HTTP server that the real `huggingface_hub` client (2.4) talks to.

    with HubServer() as hub:
        sha = hub.put("medgraft/lungs", {"adapter.json": b"{}", "adapter.safetensors": b"..."})
        path = hf_hub_download("medgraft/lungs", "adapter.json", revision=sha,
                               endpoint=hub.url, cache_dir=tmp_path, token=False)

Three ways to point the client at it, from the most to the least honest:

1. another process: `subprocess.run(..., env={**os.environ, **hub.env(cache, token=hub.token)})`. `huggingface_hub`
   reads HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_DISABLE_XET, HF_HUB_OFFLINE ... once, when it is imported, so
   setting them in a process that has imported it does nothing. (HF_TOKEN alone is read at every call.)
2. this process, by argument: `HfApi(endpoint=hub.url, token=...)`, `api.resolve_revision(..., cache_dir=)`,
   `hf_hub_download(..., endpoint=, cache_dir=, token=)`, `snapshot_download(..., endpoint=, cache_dir=, token=)`.
   Pass `token=False` to be anonymous: `None` means "whatever token this machine has". There is no argument that turns
   Xet off, and with `hf_xet` installed an upload would go to Xet, so uploads need 1 or 3.
3. this process, by changing the client's constants for a while: `with hub.in_process(cache, token=...):`.

`put` and every other method may be called while the server runs, also from `on_request`. Nothing here checks what
`put` is given: names with `..`, pickles and code go in as they are, because that is what a loader must survive.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, quote, unquote

import yaml

http_library: Any = import_module("httpx2" if find_spec("httpx2") else "httpx")
"""What the real client speaks through: its own fork since release 2."""

LFS_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".h5", ".npy", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip"}
)


@dataclass(frozen=True)
class Declared:
    """A file whose size and hash are only claimed. Without `data` nobody can download it."""

    size: int
    sha256: str = "d" * 64
    data: bytes | None = None
    lfs: bool = True


@dataclass(frozen=True)
class Blob:
    """The content of one file: what is said about it, and the bytes (None when it was only declared)."""

    size: int
    sha256: str
    oid: str
    lfs: bool
    data: bytes | None

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    """An immutable state of a repository."""

    sha: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str
    message: str
    date: str
    author: str


@dataclass
class Repo:
    """A repository: commits that never change, and names that point at them."""

    id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects that were uploaded to this repository, by sha256; a commit can name only these."""


@dataclass(frozen=True)
class Token:
    """Who a token speaks for. `spaces` are the namespaces it owns beside the one of its user."""

    user: str
    write: bool = True
    expired: bool = False
    spaces: frozenset[str] = frozenset()

    def owns(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.spaces


@dataclass
class Seen:
    """One request as it came in, and what became of it (`status` is 0 until then, and for a lost answer)."""

    method: str
    path: str
    query: dict[str, list[str]]
    where: str
    token: str | None
    range: str | None
    agent: str
    raw: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False, default=b"")
    status: int = 0
    sent: int = 0


@dataclass
class _Fault:
    kind: str
    repo: str
    path: str
    left: int | None
    number: float = 0
    after: int = 0
    reset: bool = False
    change: Callable[[bytes], bytes] | None = None


@dataclass
class _Trouble:
    kind: str
    contains: str
    method: str | None
    left: int | None
    status: int = 0
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stop: int | None = None
    reset: bool = False
    stall: float = 0
    stall_at: int = 0
    lost: bool = False


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.reply = _json(status, {"error": message})
        self.reply.headers["X-Error-Message"] = message
        if code:
            self.reply.headers["X-Error-Code"] = code
        self.reply.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


class HubServer:
    """The server; a context manager. `url` is the Hub and `cdn_url` is the other host that stores large files."""

    def __init__(self, *, user: str = "medgraft") -> None:
        self.user = user
        self.token = f"hf_{user}_write"
        """A valid token that may write to `user`'s repositories, private and gated ones included."""
        self.tokens: dict[str, Token] = {self.token: Token(user)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Seen] = []
        self.unknown: list[str] = []
        """Requests for things that this server does not speak; each was answered 501."""
        self.errors: list[BaseException] = []
        """Exceptions of this server or of `on_request`; leaving the `with` raises them."""
        self.on_request: Callable[[str, str], object] | None = None
        """Called with the method and the unquoted path, before each request is looked at, in the server's thread."""
        self.ranges = True
        """Set to False for a server that ignores Range and sends the whole file with a 200."""
        self.page = 1000
        """Entries in one page of a tree listing or a commit list."""
        self.lfs_over = 10 * 1024 * 1024
        self.lfs_suffixes = set(LFS_SUFFIXES)
        self._lock = threading.RLock()
        self._faults: list[_Fault] = []
        self._troubles: list[_Trouble] = []
        self._signed: dict[str, tuple[Repo, str, Blob]] = {}
        self._uploads: dict[str, tuple[Repo, str, int]] = {}
        self._clock = 0
        self._stopped = threading.Event()
        self._doors = {name: _Door(self, name) for name in ("hub", "cdn")}

    # ---- life

    @property
    def url(self) -> str:
        return self._doors["hub"].url

    @property
    def cdn_url(self) -> str:
        return self._doors["cdn"].url

    def __enter__(self) -> HubServer:
        for door in self._doors.values():
            threading.Thread(target=door.serve_forever, args=(0.02,), name=f"hub-{door.name}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if self.errors and error is None:
            raise RuntimeError(f"the hub server failed {len(self.errors)} times") from self.errors[0]

    def close(self) -> None:
        """Stop serving and hang up: from now on the Hub cannot be reached (connection refused). Twice is fine."""
        if not self._stopped.is_set():
            self._stopped.set()
            for door in self._doors.values():
                door.shutdown()
                door.server_close()
                door.hang_up()

    # ---- how a client reaches it

    def env(self, cache: str | Path, token: str | None = None, *, offline: bool = False) -> dict[str, str]:
        """The variables for another process: `env={**os.environ, **hub.env(cache)}`. Its cache is `cache/hub`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_TOKEN_PATH": str(Path(cache) / "token"),
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def api(self, token: str | None = None) -> Any:
        """An `HfApi` of this process that speaks to this Hub; without a token it is anonymous."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=token or False)

    @contextmanager
    def in_process(
        self,
        cache: str | Path,
        token: str | None = None,
        *,
        offline: bool = False,
        hurry: bool = True,
        chunk: int = 10 * 1024 * 1024,
    ) -> Iterator[None]:
        """Make this the Hub of this process: endpoint, cache (`cache/hub`), token, Xet off. One at a time.

        `hurry` makes the client's pauses between retries short (their number stays); timeouts are not touched. After a
        cut the client resumes from the last whole `chunk` that it read, so small files start again unless it is small.
        """
        from huggingface_hub import constants, file_download, hf_api, utils
        from huggingface_hub.utils import _http

        env = self.env(cache, token, offline=offline)
        constant: dict[str, object] = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": env["HF_HOME"],
            "HF_HUB_CACHE": env["HF_HUB_CACHE"],
            "HF_TOKEN_PATH": env["HF_TOKEN_PATH"],
            "HF_HUB_OFFLINE": offline,
            "DOWNLOAD_CHUNK_SIZE": chunk,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        with ExitStack() as stack:
            keep = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NO_PROXY", "no_proxy")
            stack.enter_context(mock.patch.dict(os.environ, {name: env[name] for name in keep}))
            for name, value in constant.items():
                stack.enter_context(mock.patch.object(constants, name, value))
            stack.enter_context(mock.patch.object(hf_api.api, "endpoint", self.url))
            if hurry:
                for module in (_http, file_download):
                    stack.enter_context(mock.patch.object(module, "time", _HURRY))
            if not utils.are_progress_bars_disabled():
                utils.disable_progress_bars()
                stack.callback(utils.enable_progress_bars)
            _http.close_session()
            stack.callback(_http.close_session)
            yield

    # ---- what is on it

    def add_token(
        self, user: str, token: str = "", *, write: bool = True, expired: bool = False, spaces: Iterable[str] = ()
    ) -> str:
        """A token of `user`, who owns the namespaces `user` and `spaces`. An expired one answers 401 everywhere."""
        token = token or f"hf_{user}_{secrets.token_hex(4)}"
        with self._lock:
            self.tokens[token] = Token(user, write, expired, frozenset(spaces))
        return token

    def grant(self, repo: str, user: str, *, kind: str = "model") -> None:
        """Let `user` read a private repository and download from a gated one."""
        with self._lock:
            self.repo(repo, kind=kind).granted.add(user)

    def repo(self, repo: str, *, kind: str = "model") -> Repo:
        """The repository itself (KeyError when there is none): `commits`, `branches`, `tags`, `private`, `gated`."""
        return self.repos[kind, repo]

    def head(self, repo: str, branch: str = "main", *, kind: str = "model") -> str:
        """The commit that a branch points at."""
        return self.repo(repo, kind=kind).branches[branch]

    def read(self, repo: str, path: str, revision: str = "main", *, kind: str = "model") -> bytes | None:
        """The bytes of a file as they are stored (None when it was only declared)."""
        with self._lock:
            return self._commit(self.repo(repo, kind=kind), revision).files[path].data

    def files(self, repo: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes | None]:
        """Every file of a commit."""
        with self._lock:
            return {path: blob.data for path, blob in self._commit(self.repo(repo, kind=kind), revision).files.items()}

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes | Declared],
        private: bool | None = None,
        gated: bool | None = None,
        message: str = "put",
        *,
        branch: str = "main",
        delete: Iterable[str] = (),
        only: bool = False,
        kind: str = "model",
    ) -> str:
        """Commit `files` on top of `branch` and return the commit; `only` drops every other file.

        Makes the repository and the branch when there are none. Names are taken as they are. A file goes to LFS by its
        name or size, as with an upload. For something like a symlink put the target's path as the bytes: that is what
        the Hub serves for one.
        """
        with self._lock:
            box = self.repos.setdefault((kind, repo), Repo(repo, kind))
            box.private = box.private if private is None else private
            box.gated = box.gated if gated is None else gated
            parent = box.branches.get(branch) or (box.branches.get("main") if box.branches else None)
            tree = {} if only or parent is None else dict(box.commits[parent].files)
            for path in delete:
                del tree[path]
            for path, content in files.items():
                tree[path] = self._blob(path, content)
                if isinstance(content, bytes) and tree[path].lfs:
                    box.objects[tree[path].sha256] = content
            return self._add(box, branch, tree, message)

    def move(self, repo: str, branch: str, sha: str, *, kind: str = "model") -> None:
        """Point a branch (made when there is none) or a tag at another commit of the repository."""
        with self._lock:
            box = self.repo(repo, kind=kind)
            if sha not in box.commits:
                raise KeyError(f"{repo} has no commit {sha}")
            (box.tags if branch in box.tags else box.branches)[branch] = sha

    def tag(self, repo: str, name: str, sha: str = "", *, kind: str = "model") -> None:
        """Tag a commit (the head of main by default)."""
        with self._lock:
            box = self.repo(repo, kind=kind)
            box.tags[name] = sha or box.branches["main"]

    # ---- what goes wrong

    def cut(self, repo: str, path: str, after: int, *, times: int | None = 1, reset: bool = False) -> None:
        """Hang up when byte `after` of the file would be sent, `times` times (None: always, so it never gets past).

        `reset` hangs up rudely (a TCP reset), which the client does not take for an interruption to resume after.
        `repo` and `path` here and below are fnmatch patterns.
        """
        self._add_fault(_Fault("cut", repo, path, times, after=after, reset=reset))

    def corrupt(
        self, repo: str, path: str, how: Callable[[bytes], bytes] | bytes | None = None, *, times: int | None = None
    ) -> None:
        """Serve other bytes than those that are declared: the middle byte flipped, or what `how` says."""
        change = (lambda data: how) if isinstance(how, bytes) else (how or _flip)
        self._add_fault(_Fault("corrupt", repo, path, times, change=change))

    def stall(self, repo: str, path: str, seconds: float, *, after: int = 0, times: int | None = 1) -> None:
        """Fall silent for `seconds` before byte `after` of the file (the headers are sent)."""
        self._add_fault(_Fault("stall", repo, path, times, number=seconds, after=after))

    def fail(
        self,
        status: int,
        contains: str = "",
        *,
        method: str | None = None,
        times: int | None = 1,
        code: str = "",
        message: str = "the server is told to fail",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer `status` instead of handling a request whose path contains `contains` (uploads are `/upload/`)."""
        trouble = _Trouble("fail", contains, method, times, status, code, message, headers or {})
        with self._lock:
            self._troubles.append(trouble)

    def lose(self, contains: str, *, method: str | None = None, times: int | None = 1) -> None:
        """Handle the request and hang up without answering: done, but the client cannot know."""
        with self._lock:
            self._troubles.append(_Trouble("lose", contains, method, times))

    def heal(self) -> None:
        """Forget every cut, corrupt, stall, fail and lose."""
        with self._lock:
            self._faults.clear()
            self._troubles.clear()

    # ---- what was asked

    def asked(self, contains: str = "", *, method: str | None = None, where: str | None = None) -> list[Seen]:
        """The requests so far whose path contains `contains`, in the order they came."""
        with self._lock:
            return [
                seen
                for seen in self.requests
                if contains in seen.path and method in (None, seen.method) and where in (None, seen.where)
            ]

    def forget(self) -> None:
        """Empty the request log."""
        with self._lock:
            self.requests.clear()

    # ---- commits

    def _blob(self, path: str, content: bytes | Declared) -> Blob:
        if isinstance(content, Declared):
            oid = _git_oid(_pointer(content.sha256, content.size))
            return Blob(content.size, content.sha256, oid, content.lfs, content.data)
        lfs = self._is_lfs(path, len(content))
        sha256 = hashlib.sha256(content).hexdigest()
        oid = _git_oid(_pointer(sha256, len(content)) if lfs else content)
        return Blob(len(content), sha256, oid, lfs, content)

    def _is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (size > self.lfs_over or Path(path).suffix.lower() in self.lfs_suffixes)

    def _add(self, repo: Repo, branch: str, files: dict[str, Blob], title: str, message: str = "", by: str = "") -> str:
        self._clock += 1
        date = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._clock)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        parent = repo.branches.get(branch) or repo.branches.get("main")
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((repo.id, parent, tree, title, message, self._clock)).encode()).hexdigest()
        frozen = MappingProxyType(dict(files))
        repo.commits[sha] = Commit(sha, parent, frozen, title, message, date, by or self.user)
        repo.branches[branch] = sha
        return sha

    def _commit(self, repo: Repo, revision: str) -> Commit:
        named = repo.branches.get(revision) or repo.tags.get(revision)
        named = named or repo.branches.get(revision.removeprefix("refs/heads/"))
        named = named or repo.tags.get(revision.removeprefix("refs/tags/"))
        if named is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            named = next((sha for sha in repo.commits if sha.startswith(revision)), None)
        if named is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[named]

    # ---- faults

    def _add_fault(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _strike(self, kind: str, repo: str, path: str, wanted: Callable[[_Fault], bool]) -> _Fault | None:
        for fault in self._faults:
            if fault.kind == kind and fault.left != 0 and fnmatchcase(repo, fault.repo) and wanted(fault):
                if path != fault.path and not fnmatchcase(path, fault.path):
                    continue
                if fault.left is not None:
                    fault.left -= 1
                return fault
        return None

    def _trouble(self, seen: Seen) -> _Trouble | None:
        for trouble in self._troubles:
            if trouble.left != 0 and trouble.contains in seen.path and trouble.method in (None, seen.method):
                if trouble.left is not None:
                    trouble.left -= 1
                return trouble
        return None

    # ---- answering

    def _handle(self, seen: Seen) -> _Reply:
        with self._lock:
            self.requests.append(seen)
        try:
            if self.on_request is not None:
                self.on_request(seen.method, seen.path)
            with self._lock:
                trouble = self._trouble(seen)
                if trouble is not None and trouble.kind == "fail":
                    raise _Refusal(trouble.status, trouble.message, trouble.code, **trouble.headers)
                reply = self._cdn(seen) if seen.where == "cdn" else self._hub(seen)
                reply.lost = trouble is not None
                return reply
        except _Refusal as refusal:
            return refusal.reply
        except Exception as error:
            self.errors.append(error)
            return _json(500, {"error": f"the hub server broke: {error!r}"})

    def _caller(self, seen: Seen) -> Token | None:
        if seen.token is None:
            return None
        token = self.tokens.get(seen.token)
        if token is None:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if token.expired:
            # The client takes a 401 of https://*/api/models/* for RepoNotFound; over http it needs to be told.
            code = "" if seen.path.startswith("/api/whoami") else "RepoNotFound"
            raise _Refusal(401, f'User Access Token "{token.user}" is expired', code)
        return token

    def _see(self, seen: Seen, kind: str, name: str, *, content: bool = False, write: bool = False) -> Repo:
        """The repository if the caller may see it (`content`: may download from it; `write`: may change it)."""
        caller = self._caller(seen)
        repo = self.repos.get((kind, name))
        owns = caller is not None and caller.owns(name.partition("/")[0])
        reads = owns or (repo is not None and caller is not None and caller.user in repo.granted)
        if repo is None or (repo.private and not reads):
            if caller is None:
                raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not reads:
            if caller is None:
                text = f"Access to {kind} {name} is restricted. You must have access to it and be authenticated"
                raise _Refusal(401, f"{text} to access it. Please log in.", "GatedRepo")
            text = f"Access to {kind} {name} is restricted and you are not in the authorized list."
            raise _Refusal(403, f"{text} Visit {self.url}/{name} to ask for access.", "GatedRepo")
        if write:
            if caller is None:
                raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
            if not (owns and caller.write):
                raise _Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _hub(self, seen: Seen) -> _Reply:
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, seen.raw) if seen.method in method else None
            if found is not None:
                groups = found.groupdict()
                if "kind" in groups:
                    groups["kind"] = (groups["kind"] or "models").rstrip("/").removesuffix("s")
                return answer(self, seen, **{name: unquote(text or "") for name, text in groups.items()})
        self.unknown.append(f"{seen.method} {seen.path}")
        raise _Refusal(501, f"this hub does not speak {seen.method} {seen.path}")

    def _whoami(self, seen: Seen) -> _Reply:
        caller = self._caller(seen)
        if caller is None:
            raise _Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(caller.spaces)]
        role = "write" if caller.write else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": caller.user, "role": role}}
        return _json(200, {"type": "user", "name": caller.user, "fullname": caller.user, "orgs": orgs, "auth": auth})

    def _validate_yaml(self, seen: Seen) -> _Reply:
        self._caller(seen)
        try:
            card = _card(str(json.loads(seen.body)["content"]))
        except ValueError as error:
            return _json(400, {"errors": [{"message": str(error)}], "warnings": []})
        missing = [{"message": "empty or missing yaml metadata in repo card"}]
        return _json(200, {"errors": [], "warnings": [] if card else missing})

    def _create(self, seen: Seen) -> _Reply:
        caller = self._caller(seen)
        if caller is None:
            raise _Refusal(401, "Invalid username or password.")
        asked = json.loads(seen.body)
        kind, space = asked.get("type") or "model", asked.get("organization") or caller.user
        name = f"{space}/{asked['name']}"
        url = f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if not caller.owns(space) or not caller.write:
            text = f"You don't have the rights to create a {kind} under the namespace {space!r}"
            raise _Refusal(403, text)
        if (kind, name) in self.repos:
            return _json(409, {"error": f"You already created this {kind} repo", "url": url})
        repo = self.repos[kind, name] = Repo(name, kind, private=asked.get("visibility") == "private")
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(self.lfs_suffixes))
        rules_blob = self._blob(".gitattributes", rules.encode())
        self._add(repo, "main", {".gitattributes": rules_blob}, "initial commit", by=caller.user)
        return _json(200, {"url": url, "name": name, "id": name})

    def _delete(self, seen: Seen) -> _Reply:
        asked = json.loads(seen.body)
        caller = self._caller(seen)
        space = asked.get("organization") or (caller.user if caller else "")
        repo = self._see(seen, asked.get("type") or "model", f"{space}/{asked['name']}", write=True)
        del self.repos[repo.kind, repo.id]
        return _json(200, {})

    def _settings(self, seen: Seen, kind: str, repo: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        asked = json.loads(seen.body)
        if "visibility" in asked:
            box.private = asked["visibility"] == "private"
        if "gated" in asked:
            box.gated = bool(asked["gated"])
        return _json(200, {"private": box.private, "gated": "manual" if box.gated else False})

    def _list(self, seen: Seen, kind: str) -> _Reply:
        caller = self._caller(seen)
        want = {name: values[-1].lower() for name, values in seen.query.items()}
        found = []
        for repo in self.repos.values():
            if repo.kind != kind or "main" not in repo.branches:
                continue
            space = repo.id.partition("/")[0]
            if repo.private and not (caller and (caller.owns(space) or caller.user in repo.granted)):
                continue
            if want.get("author", space.lower()) != space.lower() or want.get("search", "") not in repo.id.lower():
                continue
            info = self._describe(repo, repo.commits[repo.branches["main"]])
            if all(tag in info["tags"] for tag in seen.query.get("filter", [])):
                found.append(info)
        return _json(200, found[: int(want.get("limit", "1000"))])

    def _describe(self, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        readme = commit.files.get("README.md")
        try:
            card = _card((readme.data or b"").decode("utf-8", "replace")) if readme else {}
        except ValueError:
            card = {}
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        library = card.get("library_name")
        tags = [*([library] if library else []), *(card.get("tags") or [])]
        return {
            "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            f"{repo.kind}Id": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "siblings": siblings,
            "cardData": card,
            **({"library_name": library} if library else {}),
        }

    def _info(self, seen: Seen, kind: str, repo: str, rev: str = "main") -> _Reply:
        box = self._see(seen, kind, repo)
        return _json(200, self._describe(box, self._commit(box, rev), blobs="blobs" in seen.query))

    def _auth_check(self, seen: Seen, kind: str, repo: str, write: str) -> _Reply:
        self._see(seen, kind, repo, content=True, write=bool(write))
        return _json(200, {})

    def _entry(self, repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any] | None:
        blob = commit.files.get(path)
        entry: dict[str, Any]
        if blob is not None:
            entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        elif any(name.startswith(f"{path}/") for name in commit.files):
            inside = sorted((name, b.oid) for name, b in commit.files.items() if name.startswith(f"{path}/"))
            entry = {"type": "directory", "oid": _git_oid(repr(inside).encode()), "size": 0, "path": path}
        else:
            return None
        if expand:
            last = self._last(repo, commit, path)
            entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
            if blob is not None:
                scan = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
                entry["securityFileStatus"] = scan
        return entry

    def _last(self, repo: Repo, commit: Commit, path: str) -> Commit:
        def state(at: Commit) -> list[tuple[str, str]]:
            return sorted((n, b.oid) for n, b in at.files.items() if n == path or n.startswith(f"{path}/"))

        while commit.parent is not None and state(repo.commits[commit.parent]) == state(commit):
            commit = repo.commits[commit.parent]
        return commit

    def _tree(self, seen: Seen, kind: str, repo: str, rev: str, path: str = "") -> _Reply:
        box = self._see(seen, kind, repo)
        commit = self._commit(box, rev)
        recursive, expand = (_true(seen.query.get(name)) for name in ("recursive", "expand"))
        under = f"{path}/" if path else ""
        names: set[str] = set()
        for name in commit.files:
            if name.startswith(under):
                parts = name[len(under) :].split("/")
                depths = range(1, len(parts) + 1) if recursive else range(1, 2)
                names |= {under + "/".join(parts[:depth]) for depth in depths} - {under}
        if path and not names:
            raise _Refusal(404, f'"{path}" does not exist on "{rev}"', "EntryNotFound")
        return self._paged(seen, [self._entry(box, commit, name, expand=expand) for name in sorted(names)])

    def _paged(self, seen: Seen, items: list[Any]) -> _Reply:
        start = int(seen.query.get("cursor", ["0"])[0])
        reply = _json(200, [item for item in items[start : start + self.page] if item is not None])
        if start + self.page < len(items):
            rest = "".join(
                f"&{quote(k)}={quote(v)}" for k, values in seen.query.items() for v in values if k != "cursor"
            )
            reply.headers["Link"] = f'<{self.url}{seen.raw}?cursor={start + self.page}{rest}>; rel="next"'
        return reply

    def _paths_info(self, seen: Seen, kind: str, repo: str, rev: str) -> _Reply:
        box = self._see(seen, kind, repo)
        commit = self._commit(box, rev)
        form = parse_qs(seen.body.decode())
        entries = [self._entry(box, commit, p, expand=_true(form.get("expand"))) for p in form.get("paths", [])]
        return _json(200, [entry for entry in entries if entry is not None])

    def _refs(self, seen: Seen, kind: str, repo: str) -> _Reply:
        box = self._see(seen, kind, repo)

        def refs(names: dict[str, str], where: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": sha} for n, sha in sorted(names.items())]

        found = {"branches": refs(box.branches, "heads"), "tags": refs(box.tags, "tags")}
        return _json(200, {**found, "converts": [], "pullRequests": []})

    def _commits(self, seen: Seen, kind: str, repo: str, rev: str) -> _Reply:
        box = self._see(seen, kind, repo)
        at: Commit | None = self._commit(box, rev)
        found = []
        while at is not None:
            found.append({"id": at.sha, "title": at.title, "message": at.message, "date": at.date})
            found[-1]["authors"] = [{"user": at.author}]  # type: ignore[assignment]
            at = box.commits[at.parent] if at.parent else None
        return self._paged(seen, found)

    def _branch(self, seen: Seen, kind: str, repo: str, name: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        if seen.method == "DELETE":
            if name == "main":
                raise _Refusal(403, "The main branch cannot be deleted")
            if name not in box.branches:
                raise _Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del box.branches[name]
            return _json(200, {})
        if name in box.branches:
            raise _Refusal(409, f"Reference already exists: refs/heads/{name}")
        box.branches[name] = self._commit(box, json.loads(seen.body or b"{}").get("startingPoint") or "main").sha
        return _json(201, {})

    def _tag(self, seen: Seen, kind: str, repo: str, name: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        if seen.method == "DELETE":
            if box.tags.pop(name, None) is None:
                raise _Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            return _json(200, {})
        tag = json.loads(seen.body)["tag"]
        commit = self._commit(box, name)
        if tag in box.tags:
            raise _Refusal(409, f"Tag reference already exists: refs/tags/{tag}")
        box.tags[tag] = commit.sha
        return _json(201, {})

    # ---- uploads

    def _preupload(self, seen: Seen, kind: str, repo: str, rev: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        commit = self._commit(box, rev)
        answers = []
        for file in json.loads(seen.body)["files"]:
            lfs = self._is_lfs(file["path"], file["size"])
            had = commit.files.get(file["path"])
            oid = {"oid": had.etag} if had is not None and had.lfs == lfs else {}
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return _json(200, {"files": answers, "commitOid": commit.sha})

    def _lfs_batch(self, seen: Seen, kind: str, repo: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        prefix = "" if kind == "model" else f"{kind}s/"
        answers: list[dict[str, Any]] = []
        for thing in json.loads(seen.body)["objects"]:
            oid, size = thing["oid"], thing["size"]
            answers.append({"oid": oid, "size": size, "authenticated": True})
            if oid not in box.objects:
                key = secrets.token_hex(8)
                self._uploads[key] = (box, oid, size)
                verify = f"{self.url}/{prefix}{repo}.git/info/lfs/objects/verify"
                upload = f"{self.cdn_url}/upload/{oid}?key={key}"
                answers[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify, "header": {}}}
        return _json(200, {"transfer": "basic", "objects": answers})

    def _lfs_verify(self, seen: Seen, kind: str, repo: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        asked = json.loads(seen.body)
        if len(box.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, f"the object {asked['oid']} was not uploaded, or not whole")
        return _json(200, {})

    def _make_commit(self, seen: Seen, kind: str, repo: str, rev: str) -> _Reply:
        box = self._see(seen, kind, repo, write=True)
        if "create_pr" in seen.query:
            raise _Refusal(501, "this hub does not speak pull requests")
        if rev not in box.branches:
            raise _Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        lines = [json.loads(line) for line in seen.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, box.branches[rev]):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(box.commits[box.branches[rev]].files)
        for line in lines:
            if line["key"] != "header":
                self._operate(box, tree, line["key"], line["value"])
        caller = self._caller(seen)
        title, message = header["summary"], header.get("description", "")
        sha = self._add(box, rev, tree, title, message, by=caller.user if caller else "")
        url = f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo}/commit/{sha}"
        return _json(200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def _operate(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
            raise _Refusal(400, f"Invalid path in repo: {path!r}")
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            tree[path] = Blob(len(data), hashlib.sha256(data).hexdigest(), _git_oid(data), False, data)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise _Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            data = repo.objects[value["oid"]]
            tree[path] = Blob(len(data), value["oid"], _git_oid(_pointer(value["oid"], len(data))), True, data)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [n for n in tree if n == path or (key == "deletedFolder" and n.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise _Refusal(400, f"unknown operation {key!r}")

    # ---- downloads

    def _resolve(self, seen: Seen, kind: str, repo: str, rev: str, path: str) -> _Reply:
        box = self._see(seen, kind, repo, content=True)
        commit = self._commit(box, rev)
        blob = commit.files.get(path)
        if blob is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"'}
        if blob.lfs:
            key = secrets.token_hex(8)
            self._signed[key] = (box, path, blob)
            where = f"{self.cdn_url}/lfs/{blob.sha256}?key={key}"
            return _Reply(302, {"X-Repo-Commit": commit.sha, "Location": where, **linked})
        prefix = f"/api/resolve-cache/{kind}s/{box.id}/{commit.sha}/"
        headers = {"X-Repo-Commit": commit.sha, "Location": prefix + quote(path), **linked}
        return _Reply(307, headers)

    def _resolve_cache(self, seen: Seen, kind: str, repo: str, rev: str, path: str) -> _Reply:
        box = self._see(seen, kind, repo, content=True)
        commit = self._commit(box, rev)
        blob = commit.files.get(path)
        if blob is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        reply = self._bytes(seen, box, path, blob)
        reply.headers["X-Repo-Commit"] = commit.sha
        return reply

    def _bytes(self, seen: Seen, repo: Repo, path: str, blob: Blob) -> _Reply:
        headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if seen.method == "HEAD":
            return _Reply(200, {**headers, "Content-Length": str(blob.size)})
        if blob.data is None:
            raise _Refusal(500, f"{path} was only declared: this hub has no bytes of it")
        data = blob.data
        fault = self._strike("corrupt", repo.id, path, lambda f: True)
        if fault is not None and fault.change is not None:
            data = fault.change(data)
        reply = _Reply(200, headers, data)
        start = 0
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", seen.range or "") if self.ranges else None
        if asked is not None and any(asked.groups()):
            first, last = asked.groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            end = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= end:
                raise _Refusal(416, "Requested range not satisfiable", Content_Range=f"bytes */{len(data)}")
            reply.status, reply.body = 206, data[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        reach = start + len(reply.body)
        fault = self._strike("cut", repo.id, path, lambda f: f.after < reach)
        if fault is not None:
            reply.stop, reply.reset = max(fault.after - start, 0), fault.reset
        fault = self._strike("stall", repo.id, path, lambda f: start <= f.after < reach)
        if fault is not None:
            reply.stall, reply.stall_at = fault.number, fault.after - start
        return reply

    def _cdn(self, seen: Seen) -> _Reply:
        key = seen.query.get("key", [""])[0]
        if seen.method in ("GET", "HEAD") and seen.path.startswith("/lfs/") and key in self._signed:
            return self._bytes(seen, *self._signed[key])
        if seen.method == "PUT" and seen.path.startswith("/upload/") and key in self._uploads:
            repo, oid, size = self._uploads[key]
            if len(seen.body) != size or hashlib.sha256(seen.body).hexdigest() != oid:
                raise _Refusal(400, "BadDigest: the bytes are not those that were announced")
            repo.objects[oid] = seen.body
            return _Reply(200, {"ETag": f'"{oid}"'})
        raise _Refusal(403, "AccessDenied: not signed")


_ID = r"(?P<repo>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
_WEB = rf"/(?P<kind>datasets/|spaces/)?{_ID}"
_REV = r"(?P<rev>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., _Reply]]] = [
    ("GET", r"/api/whoami-v2", HubServer._whoami),
    ("POST", r"/api/validate-yaml", HubServer._validate_yaml),
    ("POST", r"/api/repos/create", HubServer._create),
    ("DELETE", r"/api/repos/delete", HubServer._delete),
    ("GET", r"/api/(?P<kind>models|datasets|spaces)", HubServer._list),
    (
        "HEAD GET",
        rf"/api/resolve-cache/(?P<kind>models|datasets|spaces)/{_ID}/{_REV}/(?P<path>.+)",
        HubServer._resolve_cache,
    ),
    ("GET", _API, HubServer._info),
    ("GET", rf"{_API}/revision/{_REV}", HubServer._info),
    ("GET", rf"{_API}/tree/{_REV}", HubServer._tree),
    ("GET", rf"{_API}/tree/{_REV}/(?P<path>.+)", HubServer._tree),
    ("POST", rf"{_API}/paths-info/{_REV}", HubServer._paths_info),
    ("GET", rf"{_API}/refs", HubServer._refs),
    ("GET", rf"{_API}/commits/{_REV}", HubServer._commits),
    ("POST DELETE", rf"{_API}/branch/(?P<name>[^/]+)", HubServer._branch),
    ("POST DELETE", rf"{_API}/tag/(?P<name>[^/]+)", HubServer._tag),
    ("GET", rf"{_API}/auth-check(?P<write>/write)?", HubServer._auth_check),
    ("PUT", rf"{_API}/settings", HubServer._settings),
    ("POST", rf"{_API}/preupload/{_REV}", HubServer._preupload),
    ("POST", rf"{_API}/commit/{_REV}", HubServer._make_commit),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/verify", HubServer._lfs_verify),
    ("HEAD GET", rf"{_WEB}/resolve/{_REV}/(?P<path>.+)", HubServer._resolve),
]


class _Door(ThreadingHTTPServer):
    """One listening port."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self.open: set[socket.socket] = set()
        self.open_lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def hang_up(self) -> None:
        """Close the connections that clients keep for later, or they would go on answering."""
        with self.open_lock:
            for connection in self.open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Door

    def setup(self) -> None:
        super().setup()
        with self.server.open_lock:
            self.server.open.add(self.connection)

    def finish(self) -> None:
        with self.server.open_lock:
            self.server.open.discard(self.connection)
        try:
            super().finish()
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        return

    def _serve(self) -> None:
        raw, _, query = self.path.partition("?")
        bearer = re.fullmatch(r"Bearer (.+)", self.headers.get("Authorization") or "")
        seen = Seen(
            method=self.command,
            path=unquote(raw),
            query=parse_qs(query, keep_blank_values=True),
            where=self.server.name,
            token=bearer[1] if bearer else None,
            range=self.headers.get("Range"),
            agent=self.headers.get("User-Agent") or "",
            raw=raw,
            headers=MappingProxyType({name.lower(): value for name, value in self.headers.items()}),
            body=self._body(),
        )
        reply = self.server.hub._handle(seen)
        try:
            self._send(seen, reply)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, seen: Seen, reply: _Reply) -> None:
        if reply.lost:
            self._hang_up()
            return
        headers = {"Content-Length": str(len(reply.body)), **reply.headers}
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value.encode("utf-8").decode("latin-1"))
        self.end_headers()
        seen.status = reply.status
        if self.command == "HEAD":
            self.wfile.flush()
            return
        body = reply.body if reply.stop is None else reply.body[: reply.stop]
        if reply.stall:
            self.wfile.write(body[: reply.stall_at])
            self.wfile.flush()
            self.server.hub._stopped.wait(reply.stall)
            body = body[reply.stall_at :]
            seen.sent += reply.stall_at
        self.wfile.write(body)
        self.wfile.flush()
        seen.sent += len(body)
        if reply.stop is not None:
            self._hang_up(reset=reply.reset)

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class _Hurry:
    """The `time` module, with short sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.02))


_HURRY = _Hurry()


def _json(status: int, body: object) -> _Reply:
    return _Reply(status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(body).encode())


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _true(values: list[str] | None) -> bool:
    return values is not None and values[-1].lower() in ("true", "1")


def _card(readme: str) -> dict[str, Any]:
    """The YAML at the head of a README; ValueError when it is not a mapping that YAML can read."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|$)", readme, re.DOTALL)
    if found is None:
        return {}
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML in the metadata block: {error}") from error
    if card is not None and not isinstance(card, dict):
        raise ValueError("Invalid metadata in repo card: it must be a mapping")
    return json.loads(json.dumps(card or {}, default=str))
