"""Publishing and loading: an adapter directory to and from the Hugging Face Hub, or a registry in a folder.

    publish(DIR, "user/name")          one commit, of exactly the files that the format names
    publish(DIR, "file:/lab/reg/lab/name")
    load_adapter("user/name")          the revision is resolved to a commit once, and every file comes from that commit

What is fetched is listed first (names, sizes, hashes), refused where it is too large, downloaded by `huggingface_hub`
into its own cache, and hashed before it is used; a damaged file is taken out of the cache again. `HF_ENDPOINT`,
`HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_HUB_CACHE` and the progress bars work as everywhere. Pickles and code are never
fetched. Every failure is one of our errors.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadAdapter, BadCall, HubFailed, MedgraftError, SaveFailed
from . import local_registry, peft
from .adapter import Adapter, Source
from .card import is_phantom, refreshed
from .files import replacing
from .signature import SIGNATURE_NAME
from .signature import check as check_signature
from .store import FILES, JSON_NAME, REQUIRED, TENSORS_NAME, adapter_from, read_files, record_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
TRIES = 20
"""Times that a publication starts over because somebody else's came first."""

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII)
_FULL = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Fetched:
    """The files of an adapter in memory, all of one version, and where they came from."""

    files: dict[str, bytes]
    source: Source
    local: Path | None = None
    """The directory that holds them, where it is not the Hub's cache."""


# Loading


def load_adapter(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    key: str | Path | None = None,
) -> Adapter:
    """An adapter from a directory, `file:DIR/OWNER/NAME`, or a hub id; `adapter.source` says which commit it was.

    `revision` is a branch, tag or commit of the Hub; elsewhere the start of a description's sha256. With `key` (a
    public key: a PEM file or 64 hex digits) only an adapter signed by it is loaded. Raises BadAdapter for one that is
    damaged, foreign or not understood, HubFailed for a repository that cannot be read, SaveFailed for a cache that
    cannot be written.
    """
    got = _read(source, FILES if key is not None else REQUIRED, revision, token, endpoint, cache_dir)
    if key is not None:
        check_signature(got.files, key)
    adapter = adapter_from(got.files[JSON_NAME], got.files[TENSORS_NAME])
    adapter.source = got.source
    return adapter


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A directory that holds the adapter: the very one for a local source, else one in the Hub's cache, of plain files,
    with exactly those that the format names, all of one commit. Raises as `load_adapter`, which understands what was
    fetched.
    """
    got = _read(source, FILES, revision, token, endpoint, cache_dir)
    if got.local is not None:
        return got.local
    place = _cache(cache_dir) / f"models--{got.source.id.replace('/', '--')}" / "medgraft" / got.source.commit
    with contextlib.suppress(BadAdapter):
        if read_files(place) == got.files:
            return place
    try:
        return _write(got.files, place)
    except SaveFailed:  # a cache that one may only read; the files are small
        temporary = Path(tempfile.mkdtemp(prefix="medgraft-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return _write(got.files, temporary / got.source.commit)


def pull(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Copy an adapter to the directory `out`, whole or not at all, after reading it in full. Raises as `load_adapter`,
    and BadCall for a directory that holds other things.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / JSON_NAME).is_file():
        raise BadCall(f"{out} holds files that are not an adapter's; choose an empty or a new directory")
    got = _read(source, FILES, revision, token, endpoint, cache_dir)
    adapter_from(got.files[JSON_NAME], got.files[TENSORS_NAME])
    return _write(got.files, out)


def fetch_peft(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> Fetched:
    """The two files of a plain peft adapter on the Hub, of one commit, sizes and hashes checked as for ours.

    Raises BadAdapter for a repository without them (pickles are never fetched), HubFailed.
    """
    return _from_hub(repo, PEFT_FILES, revision, token, None, None, required=PEFT_FILES)


def is_hub_id(source: str) -> bool:
    """True for `user/name` as the Hub writes it."""
    return bool(_HUB_ID.fullmatch(source))


def _write(files: Mapping[str, bytes], place: Path) -> Path:
    with replacing(place) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
    return place


def _read(
    source: str | Path,
    names: Collection[str],
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | Path | None,
) -> Fetched:
    if isinstance(source, str) and source.startswith(local_registry.PREFIX):
        return _from_directory(local_registry.resolve(source), source, revision)
    if isinstance(source, Path) or os.path.isdir(source):
        return _from_directory(Path(source), str(source), revision)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise BadAdapter(
            f"asked for the adapter {str(source)[:200]!r}: there is no such directory, and it is no hub "
            "id; give a directory that holds "
            f"{JSON_NAME}, a hub id (user/name), or file:DIR/OWNER/NAME"
        )
    return _from_hub(source, names, revision, token, endpoint, cache_dir)


def _from_directory(directory: Path, named: str, revision: str | None) -> Fetched:
    files = read_files(directory)
    digest = record_of(files)["sha256"]
    if revision is not None and not (len(revision) >= 7 and digest.startswith(revision.lower())):
        raise BadAdapter(
            f"asked for {named} at {revision}: the adapter there is {digest[:12]}... now, and a directory "
            "keeps no older ones"
        )
    return Fetched(files, Source(named, digest), directory)


def _from_hub(
    repo: str,
    names: Collection[str],
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | Path | None,
    required: Collection[str] = REQUIRED,
) -> Fetched:
    api = _api(token, endpoint)
    with _speaking(f"load {repo}", api, cache_dir):
        commit = str(api.resolve_revision(repo, revision=revision, cache_dir=cache_dir).resolved)
    cached = _cached(repo, commit, names, cache_dir)
    if set(cached) >= set(names):  # a commit never changes: nothing to ask
        wanted: Mapping[str, str | None] = dict.fromkeys(cached)
    else:
        will_do = set(cached) >= set(required)
        listed = _listing(api, repo, commit, names, required, cache_dir, offline_will_do=will_do)
        wanted = dict.fromkeys(cached) if listed is None else listed

    def download(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with _speaking(f"download {name} of {repo}", api, cache_dir):
            more: dict[str, Any] = {
                "cache_dir": cache_dir,
                "token": token,
                "endpoint": endpoint,
                "library_name": "medgraft",
            }
            return Path(hf_hub_download(repo, name, revision=commit, **more))

    files = {name: _whole(name, digest, download) for name, digest in wanted.items()}
    return Fetched(files, Source(repo, commit))


def _listing(
    api: HfApi,
    repo: str,
    commit: str,
    names: Collection[str],
    required: Collection[str],
    cache_dir: str | Path | None,
    *,
    offline_will_do: bool,
) -> dict[str, str | None] | None:
    """Hash by name of those files of a commit that are wanted, after looking at what is there and how large it is.

    None where the Hub cannot be reached and the cache will do. Raises BadAdapter.
    """
    try:
        with _speaking(f"look at {repo}", api, cache_dir):
            info = api.model_info(repo, revision=commit, files_metadata=True)
    except HubFailed:
        if offline_will_do:
            return None
        raise
    there = {s.rfilename: s for s in info.siblings or []}
    missing = sorted(set(required) - set(there))
    if missing:
        raise BadAdapter(f"{repo} at {commit[:12]} has no {' and no '.join(missing)}; {_what_else(there)}")
    for name in FILES:
        size = there[name].size if name in there else 0
        if size is None or not 0 <= size <= FILES[name]:
            said = "unknown size" if size is None else f"{size:,} bytes"
            raise BadAdapter(
                f"{name} of {repo} is of {said}; at most {FILES[name]:,} bytes are downloaded. It is not an "
                "adapter of this format"
            )
    return {name: _digest(there[name]) for name in FILES if name in names and name in there}


def _digest(file: Any) -> str | None:
    return file.lfs.sha256 if file.lfs is not None else file.blob_id


def _what_else(there: Collection[str]) -> str:
    """What a repository that is no adapter of ours holds, and a way out."""
    pickles = [n for n in there if n.lower().endswith((".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"))]
    code = [n for n in there if n.lower().endswith((".py", ".ipynb", ".so"))]
    listed = ", ".join(_shown(n) for n in sorted(there)[:8]) + (" ..." if len(there) > 8 else "")
    if "adapter_config.json" in there and "adapter_model.safetensors" in there:
        return "it is a plain peft adapter; import it with medgraft.adapters.peft"
    if pickles:
        return (
            f"it holds {', '.join(map(_shown, sorted(pickles)[:3]))}, and pickled files are never loaded; "
            "ask its author to save it as safetensors"
        )
    if code:
        return (
            f"it holds code ({', '.join(map(_shown, sorted(code)[:3]))}), which is never run; is it "
            "another library's model?"
        )
    return f"it holds: {listed or 'nothing'}"


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:80]


def _cached(repo: str, commit: str, names: Collection[str], cache_dir: str | Path | None) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = {}
    for name in names:
        path = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=commit)
        if isinstance(path, str):
            found[name] = Path(path)
    return found


def _whole(name: str, digest: str | None, download: Callable[[str], Path]) -> bytes:
    """The bytes of one file that hash to what the Hub says. One that does not is dropped from the cache, and asked for
    once more: it may have been damaged on this disk. Raises BadAdapter.
    """
    for _ in range(2):
        path = download(name)
        try:
            with open(path, "rb") as stream:
                data = stream.read(FILES[name] + 1)
        except FileNotFoundError:  # somebody else dropped it just now
            continue
        except (OSError, MemoryError) as refused:
            raise SaveFailed(
                f"{path} in the Hub's cache cannot be read ({refused}); remove it, or choose another cache with HF_HOME"
            ) from None
        expected = digest or _etag(path)
        if len(data) <= FILES[name] and (expected is None or _hashes_to(data, expected)):
            return data
        _drop(path)
    raise BadAdapter(
        f"{name} arrived damaged (its hash is not the one that the Hub declares) and was thrown away; "
        "try again, or tell its publisher"
    )


def _hashes_to(data: bytes, digest: str) -> bool:
    if len(digest) == 64:
        return hashlib.sha256(data).hexdigest() == digest
    return (
        hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == digest
    )  # git's name of a file


def _etag(path: Path) -> str | None:
    """The hash by which the cache knows a file: the name of the blob that its link points at."""
    with contextlib.suppress(OSError):
        name = os.path.basename(os.readlink(path))
        return name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else None
    return None


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_symlink():
            (path.parent / os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _cache(cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()


# Publishing


def publish(
    directory: str | Path,
    target: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    share_images: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Publish a saved adapter to `user/name` on the Hub, in one commit, or to `file:DIR/OWNER/NAME`; returns the
    commit's address, or the directory.

    The adapter is read in full first. A card of ours (or none) is made anew with the new address, unless the adapter is
    signed. Files that the format does not name stay at home; those that it names and that the new version lacks are
    deleted in the same commit. Raises BadAdapter for a directory that is no adapter, BadCall for one that holds images
    or tells whose they are, HubFailed.
    """
    on_hub = not target.startswith(local_registry.PREFIX)
    if on_hub and not _HUB_ID.fullmatch(target):
        raise BadCall(
            f"cannot publish to {target[:200]!r}; give user/name for the Hub, or file:DIR/OWNER/NAME for a folder"
        )
    if not on_hub and (revision is not None or private is not None):
        raise BadCall(
            "a registry in a folder has no revisions and no private adapters; the folder's permissions say who may read"
        )
    files = read_files(directory)
    adapter = adapter_from(files[JSON_NAME], files[TENSORS_NAME])
    record = record_of(files)
    _refuse_images(adapter, files, share_images)
    refuse_private(record)
    if SIGNATURE_NAME in files:
        check_signature(files)
    else:
        said = " ".join(peft.statement(adapter)) if peft.CONFIG_NAME in files else None
        files["README.md"] = refreshed(files, repo=target if on_hub else None, peft=said).encode()
    _refuse_private_text(files["README.md"].decode(errors="replace") if "README.md" in files else "")
    if not on_hub:
        return str(local_registry.publish(files, target))
    return _commit(
        files,
        target,
        private,
        revision,
        message or f"Publish {', '.join(record['task']['classes'][:4])}"[:200],
        _api(token, endpoint),
    )


def _commit(
    files: Mapping[str, bytes], repo: str, private: bool | None, revision: str | None, message: str, api: HfApi
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _speaking(f"publish to {repo}", api):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    for attempt in range(TRIES):
        with _speaking(f"publish to {repo}", api):
            info = api.model_info(repo, revision=revision)
            if private and info.private is False:
                raise BadCall(
                    f"asked to publish privately, but {repo} exists and is public; make it private on the Hub "
                    "first, or choose another name"
                )
            stale = sorted({s.rfilename for s in info.siblings or []} & FILES.keys() - files.keys())
            operations: list[Any] = [
                *(CommitOperationAdd(n, c) for n, c in files.items()),
                *(CommitOperationDelete(n, is_folder=False) for n in stale),
            ]
            try:
                done = api.create_commit(
                    repo, operations, commit_message=message, revision=revision, parent_commit=info.sha
                )
            except Exception as refused:
                if getattr(getattr(refused, "response", None), "status_code", None) != 412 or attempt == TRIES - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.2) * (attempt + 1))  # somebody else published in between: look again
                continue
            return str(done.commit_url)
    raise HubFailed(f"others publish to {repo} all the time; try again later")


# What must not leave


def _refuse_images(adapter: Adapter, files: Mapping[str, bytes], share_images: bool) -> None:
    """Raise BadCall, listing them, for images or what may show them, unless that is meant."""
    held = [
        f"part {name!r} ({p.kind}) holds the images of its support"
        for name, p in adapter.named_parts()
        if getattr(p, "holds_images", False)
    ]
    if "preview.png" in files and not is_phantom(files["preview.png"]):
        held.append("preview.png is not marked as drawn on phantoms and may show an image of yours (an overlay)")
    if held and not share_images:
        raise BadCall(
            f"this adapter would take images along: {'; '.join(held)}. Publish it with share_images=True "
            "(--share-images) if you may and want to"
        )


_SUFFIX = re.compile(
    r"[^\s/\\]\.(?:png|jpe?g|tiff?|bmp|gif|webp|dcm|dicom|ima|nii|nii\.gz|mh[ad]|nrrd|nhdr|img|hdr|svs|ndpi|czi|mrxs|npy|npz|h5|hdf5|csv|tsv|xlsx?|"
    r"json|jsonl|ya?ml|toml|txt|log|pdf|pkl|pickle|pth?|ckpt|bin|safetensors|onnx|zip|tar|t?gz|7z|py|ipynb)(?![\w])",
    re.IGNORECASE,
)
_ABSOLUTE = re.compile(
    r"(?:^|[\s\"'`(=:,;@])(?:~?/(?:home|users|root|data|mnt|media|scratch|work|tmp|var|opt|srv|net|nas|lab|share[ds]?|volumes|private|etc|usr|proc|dev)"
    r"(?:/|\b)|~/|\.\.?/|[A-Za-z]:[\\/]|\\\\|file:)",
    re.IGNORECASE,
)
_TAG = re.compile(
    r"\([0-9A-Fa-f]{4},[0-9A-Fa-f]{4}\)|\b00[0-9A-Fa-f]{2}\s?,\s?[0-9A-Fa-f]{4}\b|(?<![\d.])[0-2](?:\.\d+){5,}(?![\d.])"
)
_KEYWORD = re.compile(
    r"patient[\s_-]?(?:s[\s_-])?(?:name|id|birth|sex|age|address|weight|comments|number|uid)|(?:study|series|sop|instance|frame)[\s_-]?(?:instance[\s_-]?)?uid|"
    r"(?:study|series|acquisition|content|birth)[\s_-]?(?:date|time)|accession[\s_-]?n|institution[\s_-]?(?:name|address)|referring[\s_-]?physician|"
    r"operators?[\s_-]?name|performing[\s_-]?physician|station[\s_-]?name|device[\s_-]?serial|medical[\s_-]?record|\bmrn\b",
    re.IGNORECASE,
)
_KEYS = re.compile(
    r"(?:^|_)(?:paths?|files?|filenames?|folders?|director(?:y|ies)|dirs?|root|out|items?|ids?|stems?|uids?|cases?|patients?|subjects?|stud(?:y|ies)|series|"
    r"accessions?|support|hostname|host|user|username|per_?(?:item|image|case|patient|subject|volume|slide)s?)$",
    re.IGNORECASE,
)
_NAMED_LISTS = frozenset(
    {
        "classes",
        "targets",
        "tensors",
        "sites",
        "parts",
        "labels",
        "levels",
        "rates",
        "datasets",
        "domains",
        "class_names",
        "organs",
        "modalities",
    }
)


def refuse_private(record: Mapping[str, Any]) -> None:
    """Raise BadCall where a description tells whose images it was made of: paths, file names, item ids, DICOM tags.

    A net below the rule that recipes record none of it.
    """
    for where in ("provenance", "evaluation", "task", "parts", "backbone"):
        for path, key, text in _strings(record[where], where):
            why = _private(key if where in ("provenance", "evaluation") else "", text)
            if why:
                raise BadCall(
                    f"adapter.json holds {why} at {path}, which must not be published; save the adapter again "
                    f"without it (what it was: {text[:40]!r})"
                )


def _strings(value: Any, path: str, key: str = "", listed: bool = False) -> Iterator[tuple[str, str, str]]:
    """Every string below `value`, keys included, as (where, key that holds it, text); of lists of names the key says
    `[]`.
    """
    if isinstance(value, Mapping):
        for k, v in value.items():
            if not path.startswith("parts"):  # keys there are sites, which the store checked
                yield f"{path}/{k}", key, str(k)
            yield from _strings(v, f"{path}/{k}", str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _strings(v, f"{path}/{i}", key, True)
    elif isinstance(value, str):
        yield path, f"{key}[]" if listed and key else key, value


def _private(key: str, text: str) -> str | None:
    """What is private about a text, or None."""
    if _TAG.search(text) or _KEYWORD.search(text):
        return "a DICOM tag"
    if text.startswith(("http://", "https://", "doi:", "arXiv:", "arxiv:")):
        return None
    if text.startswith("/") or "\\" in text or _ABSOLUTE.search(text) or re.search(r"[^\s/]/[^\s/]+/[^\s/]", text):
        return "a path"
    if _SUFFIX.search(text):
        return "a file name"
    if key and _KEYS.search(key.removesuffix("[]")):
        return "a path, file name or item id"
    if key.endswith("[]") and key[:-2] not in _NAMED_LISTS and re.search(r"\d", text):
        return "what looks like item ids"
    return None


def _refuse_private_text(card: str) -> None:
    found = _TAG.search(card) or _ABSOLUTE.search(re.sub(r"https?://\S+", "", card))
    if found:
        raise BadCall(
            f"README.md holds a path or a DICOM tag ({found.group().strip()[:40]!r}), which must not be "
            "published; rewrite it, or remove it and a card will be built"
        )


# Other people's errors, said in our words


def _api(token: str | bool | None, endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    from .. import __version__

    return HfApi(endpoint=endpoint, token=token, library_name="medgraft", library_version=__version__)


@contextlib.contextmanager
def _speaking(doing: str, api: HfApi, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Turn whatever the Hub's client raises inside into one of our errors."""
    try:
        yield
    except MedgraftError:
        raise
    except Exception as refused:
        raise _ours(refused, doing, api, cache_dir) from refused


def _ours(refused: Exception, doing: str, api: HfApi, cache_dir: str | Path | None) -> MedgraftError:
    from huggingface_hub import errors

    causes = list(_chain(refused))
    status = next(
        (s for e in causes if (s := getattr(getattr(e, "response", None), "status_code", None)) is not None), None
    )
    said = (
        next((str(s) for e in causes if (s := getattr(e, "server_message", None))), "")
        or (str(refused).strip().splitlines() or [""])[0]
    )
    said = f" (it said: {said.splitlines()[0][:200]})" if said.strip() else ""
    where = f"could not {doing}"

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in causes)

    if among(errors.OfflineModeIsEnabled):
        return HubFailed(
            f"{where}: HF_HUB_OFFLINE is set and the cache does not hold it; go online once, or give a directory"
        )
    if among(errors.GatedRepoError):
        return HubFailed(
            f"{where}: its owner grants access one by one; ask for it on {api.endpoint}, then log in or pass token="
        )
    if among(errors.RevisionNotFoundError):
        return HubFailed(f"{where}: it has no such revision{said}; give a branch, a tag or a full commit")
    if among(errors.EntryNotFoundError) and status == 404:
        return BadAdapter(f"{where}: the file is not there{said}; it may have been removed just now, try again")
    if among(errors.RepositoryNotFoundError) or status == 401:
        return HubFailed(
            f"{where}: the Hub shows no such repository to you{said}; check the name, and if it is "
            "private or your token has expired log in again "
            "(hf auth login) or pass token="
        )
    if status == 403:
        return HubFailed(f"{where}: your token does not permit it{said}; use one with write access to that namespace")
    if status is not None and status < 500 and status != 429:
        return HubFailed(f"{where}: the Hub refused with status {status}{said}")
    disk = next(
        (
            e
            for e in causes
            if isinstance(e, OSError) and e.errno is not None and (e.errno in _FULL or e.filename is not None)
        ),
        None,
    )
    if disk is not None:
        return SaveFailed(
            f"{where}: the Hub's cache at {_cache(cache_dir)} cannot be written ({disk.strerror}); free "
            "space, or choose another with HF_HOME or cache_dir="
        )
    if isinstance(refused, errors.HFValidationError):
        return BadCall(f"{where}: {said.strip(' ()')}")
    return HubFailed(
        f"{where}: {api.endpoint} cannot be reached or hung up, and the cache does not hold it "
        f"({type(refused).__name__}{said}); try again, or give a directory"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
