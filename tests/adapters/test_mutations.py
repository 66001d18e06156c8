"""Mutated adapter files: every one is loaded exactly as it was, or refused with our error; nothing else, quickly, in
little memory.

`damage` is what disks, networks and editors do: hashes are not put right. `attack` is what a stranger does who puts
them right: then another, consistent adapter may come out, and all that can be asked is that loading it does no harm.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, ASPPHead, Bottleneck, ClassifierHead, Host, LoRA, PromptTokens, ScaleShift, Tuned
from medgraft.adapters.schema import MAX_JSON_BYTES, canonical
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, MedgraftError
from tests.helpers import LABELS, ONE, THREE, adapter, images

SECONDS, BYTES = 5.0, 1 << 30
"""No load may take longer, or more memory."""

Files = dict[str, bytes]
JSON, TENSORS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True)
class Original:
    files: Files
    adapter: Adapter
    output: Tensor

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.files[JSON])


@pytest.fixture(scope="module")
def originals(hf_vit: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    """Adapters of every sort of part, two storage types, with and without probe."""
    made = [
        adapter(hf_vit),
        adapter(
            hf_vit,
            {"l": LoRA.on(hf_vit, THREE, rank=2, dora=True), "s": ScaleShift.on(hf_vit, THREE)},
            task=THREE,
            seed=1,
        ),
        adapter(
            hf_vit, {"b": Bottleneck.on(hf_vit, LABELS), "c": ClassifierHead.on(hf_vit, LABELS)}, task=LABELS, seed=2
        ),
        adapter(
            hf_vit, {"t": Tuned.on(hf_vit, ONE, targets="*.norm1"), "p": PromptTokens.on(hf_vit, ONE, count=2)}, seed=3
        ),
        adapter(hf_vit, {"a": ASPPHead.on(hf_vit, ONE)}, seed=4),
    ]
    found = []
    for i, one in enumerate(made):
        one.provenance = {
            "recipe": "lora",
            "shots": 5,
            "settings": {"lr": 1e-3, "rates": [1, 2.5]},
            "note": "ünï \u2028 \U0001f9e0",
        }
        one.evaluation = [{"dataset": "phantoms", "dice": 0.5, "interval": [0.4, 0.6], "n": 3}]
        where = tmp_path_factory.mktemp("original") / "a"
        save_adapter(one, where, dtype=("float16", "float32")[i % 2], backbone=hf_vit if i % 3 else None)
        read = read_adapter(where)
        found.append(Original({name: (where / name).read_bytes() for name in (JSON, TENSORS)}, read, run(hf_vit, read)))
    return found


def run(on: Backbone, made: Adapter) -> Tensor:
    host = Host(on)
    host.add(made, "it")
    with torch.no_grad():
        return host(images(on, 1), adapter="it")


# Ways to mutate. Each takes the files, the draw and all originals, and changes the files in place.

Mutation = Callable[[Files, random.Random, list[Original]], None]


def pick(files: Files, r: random.Random) -> str:
    return r.choice((JSON, JSON, TENSORS))


def flip(files: Files, r: random.Random, _: list[Original]) -> None:
    name = pick(files, r)
    data = bytearray(files[name])
    for _i in range(r.choice((1, 1, 1, 2, 8, 64))):
        data[_near_the_start(r, len(data))] ^= 1 << r.randrange(8)
    files[name] = bytes(data)


def _near_the_start(r: random.Random, size: int) -> int:
    return r.randrange(min(size, 256)) if r.random() < 0.3 else r.randrange(size)  # headers stand there


def overwrite(files: Files, r: random.Random, _: list[Original]) -> None:
    name = pick(files, r)
    data = bytearray(files[name])
    at, size = _near_the_start(r, len(data)), r.choice((1, 2, 8, 100))
    data[at : at + size] = r.choice((b"\0" * size, b"\xff" * size, r.randbytes(size), b" " * size, b"\n" * size))
    files[name] = bytes(data)


def truncate(files: Files, r: random.Random, _: list[Original]) -> None:
    name = pick(files, r)
    files[name] = files[name][: r.choice((0, 1, 7, 8, 9, len(files[name]) - 1, r.randrange(len(files[name]))))]


def extend(files: Files, r: random.Random, _: list[Original]) -> None:
    name = pick(files, r)
    more = r.choice((b"\0", b" ", b"\n", b"{}", b"\xef\xbb\xbf", r.randbytes(r.randrange(1, 2000)), files[name]))
    files[name] = files[name] + more if r.random() < 0.7 else more + files[name]


def splice(files: Files, r: random.Random, others: list[Original]) -> None:
    name = pick(files, r)
    mine, theirs = files[name], r.choice(others).files[r.choice((name, name, name, JSON, TENSORS))]
    a, b = sorted((r.randrange(len(mine)), r.randrange(len(mine))))
    c, d = sorted((r.randrange(len(theirs)), r.randrange(len(theirs))))
    files[name] = mine[:a] + theirs[c:d] + mine[b:]


def swap_files(files: Files, r: random.Random, others: list[Original]) -> None:
    other = r.choice(others).files
    name = r.choice((JSON, TENSORS))
    files[name] = other[r.choice((JSON, TENSORS))]


def reformat(files: Files, r: random.Random, _: list[Original]) -> None:
    """The same description in other words: this may be loaded."""
    record = json.loads(files[JSON])
    keys = list(record)
    r.shuffle(keys)
    text = json.dumps({k: record[k] for k in keys}, indent=r.choice((None, 0, 1, 4)), ensure_ascii=r.random() < 0.5)
    if r.random() < 0.3:
        text = text.replace("0.5", r.choice(("5e-1", "0.50", "0.5000000000000001", ".5", "+0.5")))
    if r.random() < 0.2:
        text = text.replace(
            '"format": 1', r.choice(('"format": 1.0', '"format": true', '"format": "1"', '"format": 1, "format": 1'))
        )
    files[JSON] = text.encode(r.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), "replace")


ODD: list[Any] = [
    None, True, False, 0, -1, 1.0, 1e308, -1e308, 1 << 63, 1 << 200, 0.1, "", " ", "a", "..", "../../etc/passwd", "\0", "\ud800", "lora",
    "tuned", "float16", [], {}, [[]], {"": None}, ["a"], [1, 2], [0, 0], [-1, 1 << 40], {"weight": [1 << 40, 1 << 40]}, "a" * 5000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


def edit(record: Any, r: random.Random, others: list[Any]) -> Any:
    """One change somewhere in a tree of JSON."""
    *above, last = r.choice([p for p in places(record) if p] or [("x",)])
    holder = record
    for key in above:
        holder = holder[key]
    how = r.randrange(7)
    if how == 0:
        del holder[last]
    elif how == 1:
        holder[last] = copy.deepcopy(r.choice(ODD))
    elif how == 2:
        elsewhere = r.choice(others)
        for key in r.choice(places(elsewhere)):
            elsewhere = elsewhere[key]
        holder[last] = copy.deepcopy(elsewhere)
    elif how == 3 and isinstance(holder, dict):
        holder[r.choice(("", "x", "__class__", "sites", "config", "\0", "rank", "a.b", "self"))] = copy.deepcopy(
            r.choice(ODD)
        )
    elif how == 4 and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder) * r.choice((1, 3, 50)))
    elif how == 5 and isinstance(holder, dict):
        holder[str(last) + r.choice(("x", " ", ".weight", "0"))] = holder.pop(last)
    elif isinstance(holder[last], bool | str | None):
        holder[last] = f"{holder[last]}{r.choice(ODD)}"
    elif isinstance(holder[last], int | float):
        holder[last] = r.choice(
            (
                holder[last] + 1,
                -holder[last],
                holder[last] * 1000,
                float(holder[last]),
                int(min(abs(holder[last]), 1e9)),
            )
        )
    return record


def json_damage(files: Files, r: random.Random, others: list[Original]) -> None:
    record = json.loads(files[JSON])
    for _ in range(r.choice((1, 1, 2, 5))):
        record = edit(record, r, [o.record for o in others])
    files[JSON] = json.dumps(record).encode()


def text_damage(files: Files, r: random.Random, _: list[Original]) -> None:
    """What only the text can say: keys twice, constants that are no JSON, nesting, endless strings."""
    text = files[JSON].decode()
    at = r.randrange(len(text))
    files[JSON] = r.choice(
        (
            text.replace("{", '{"format": 1, ', 1),
            text.replace("1", "NaN", 1),
            text.replace("0.5", "1e999"),
            text.replace("0.5", "9" * r.choice((10, 400, 5000))),
            text[:at] + "[" * r.choice((10, 1000, 100_000)) + text[at:],
            text[:at] + '"' + '\\"' * r.choice((10, 1000, 300_000)),
            text + " " * MAX_JSON_BYTES,
            text[: at or 1] + "," * 100_000,
            text.replace("{}", "{" + ",".join(f'"k{i}": {{}}' for i in range(5000)) + "}", 1),
            "\ufeff" + text,
        )
    ).encode()


DAMAGE: list[Mutation] = [
    flip,
    flip,
    overwrite,
    truncate,
    extend,
    splice,
    swap_files,
    reformat,
    json_damage,
    json_damage,
    text_damage,
]


def attack(files: Files, r: random.Random, others: list[Original]) -> None:
    """Change the description, the header of the tensors or both, and make every hash right again."""
    record = json.loads(files[JSON])
    if r.random() < 0.7:
        for _ in range(r.choice((1, 1, 2, 4))):
            record = edit(record, r, [o.record for o in others])
    blob = files[TENSORS]
    if r.random() < 0.5:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        for _ in range(r.choice((1, 1, 3))):
            header = edit(header, r, [header])
        text = json.dumps(header).encode()
        length = len(text) if r.random() < 0.8 else r.choice((0, 1, len(text) + 1, 1 << 40, (1 << 64) - 1))
        blob = length.to_bytes(8, "little") + text + blob[8 + size :]
    elif r.random() < 0.3:
        blob = r.choice(others).files[TENSORS]
    if isinstance(record, dict):
        if isinstance(record.get("tensors"), dict) and "sha256" in record["tensors"]:
            record["tensors"]["sha256"] = hashlib.sha256(blob).hexdigest()
        record["sha256"] = canonical(record)
    files[JSON], files[TENSORS] = json.dumps(record).encode(), blob


# Running them


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pytest.skip("the peak of this process's memory cannot be reset here")


def same(a: Adapter, b: Adapter) -> bool:
    def described(x: Adapter) -> str:
        parts = [(n, p.kind, p.config, p.sites) for n, p in x.named_parts()]
        facts = [x.task.to_json(), x.preprocessing.to_json(), x.backbone.to_json(), parts, x.provenance, x.evaluation]
        return json.dumps(facts, sort_keys=True)

    mine, theirs = a.tensors(), b.tensors()
    equal = mine.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in mine.items()
    )
    return equal and described(a) == described(b)


def try_all(
    originals: list[Original],
    where: Path,
    count: int,
    seed: int,
    mutate: Callable[[Files, random.Random], str],
    judge: Callable[[Original, Adapter], None],
) -> Counter[str]:
    """Mutate, load, judge, `count` times; the counts by outcome. `where` is a folder that is written again and
    again.
    """
    said: Counter[str] = Counter()
    slowest = 0.0
    start = time.perf_counter()
    forget_peak()
    before = memory("VmRSS")
    for i in range(count):
        r = random.Random(f"{seed}|{i}")
        original = r.choice(originals)
        files = dict(original.files)
        kind = mutate(files, r)
        if files == original.files:
            said["unchanged"] += 1
            continue
        for name, data in files.items():
            (where / name).write_bytes(data)
        began = time.process_time()  # a busy machine makes no file dangerous
        try:
            loaded = read_adapter(where)
        except BadAdapter:
            said["refused"] += 1
        except MedgraftError as refused:
            raise AssertionError(
                f"mutation {i} ({kind}): {type(refused).__name__} where BadAdapter is wanted"
            ) from refused
        except BaseException as other:
            raise AssertionError(f"mutation {i} ({kind}) raised {type(other).__name__}: {other}") from other
        else:
            said["loaded"] += 1
            try:
                judge(original, loaded)
            except BaseException as wrong:
                raise AssertionError(f"mutation {i} ({kind}) was loaded, and is wrong: {wrong}") from wrong
        took = time.process_time() - began
        assert took < SECONDS, f"mutation {i} ({kind}) took {took:.1f} s of CPU time"
        slowest = max(slowest, took)
    grew = memory("VmHWM") - before
    assert grew < BYTES, f"memory grew by {grew:,} bytes"
    print(
        f"\n{count} mutations, seed {seed}: {dict(said)}, {time.perf_counter() - start:.1f} s, "
        f"slowest {slowest:.2f} s, memory +{grew >> 20} MiB"
    )
    return said


MANY = [pytest.param(300, 0, id="300"), pytest.param(10_000, 1, id="10000", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("count", "seed"), MANY)
def test_damage(originals: list[Original], hf_vit: Backbone, tmp_path: Path, count: int, seed: int) -> None:
    def mutate(files: Files, r: random.Random) -> str:
        mutation = r.choice(DAMAGE)
        mutation(files, r, originals)
        return mutation.__name__

    def judge(original: Original, loaded: Adapter) -> None:
        assert same(loaded, original.adapter)
        assert torch.equal(run(hf_vit, loaded), original.output)

    said = try_all(originals, tmp_path, count, seed, mutate, judge)
    assert said["loaded"] > 0, "reformatted descriptions are not read any more"
    assert said["refused"] > 0.8 * count


@pytest.mark.parametrize(("count", "seed"), MANY)
def test_attacks(originals: list[Original], tmp_path: Path, count: int, seed: int) -> None:
    def mutate(files: Files, r: random.Random) -> str:
        attack(files, r, originals)
        return "attack"

    def judge(original: Original, loaded: Adapter) -> None:
        for name, t in loaded.tensors().items():
            assert not t.is_meta, name
            assert not t.is_floating_point() or bool(torch.isfinite(t).all()), name
        again = read_adapter(save_adapter(loaded, tmp_path / "again", dtype="float32"))
        assert same(again, loaded)

    said = try_all(originals, tmp_path, count, seed, mutate, judge)
    assert said["refused"] > 0
    assert said["loaded"] > 0, "attacks that change nothing but facts come out as adapters"


def test_every_single_byte_of_a_small_adapter(originals: list[Original], tmp_path: Path) -> None:
    """Each byte of the tensors flipped once: the hash refuses every one."""
    blob = originals[0].files[TENSORS]
    (tmp_path / JSON).write_bytes(originals[0].files[JSON])
    for at in range(0, len(blob), max(1, len(blob) // 400)):
        (tmp_path / TENSORS).write_bytes(blob[:at] + bytes([blob[at] ^ 0x10]) + blob[at + 1 :])
        with pytest.raises(BadAdapter, match="sha256 differs"):
            read_adapter(tmp_path)


# Found by thinking like an attacker; each of these once took minutes, crashed, or hung.


def vouched(original: Original, change: Callable[[dict[str, Any]], Any]) -> Files:
    record = original.record
    change(record)
    record["sha256"] = canonical(record)
    return {JSON: json.dumps(record, separators=(",", ":")).encode(), TENSORS: original.files[TENSORS]}


SITES = {f"b{i}": [8, 8] for i in range(10_000)}


def parts_of(count: int, sites: int) -> list[dict[str, Any]]:
    own = dict(list(SITES.items())[:sites])
    return [{"name": f"p{k}", "kind": "bottleneck", "config": {}, "sites": own} for k in range(count)]


BOMBS: dict[str, Callable[[Original], Files]] = {
    "escapes without end": lambda o: {**o.files, JSON: b'"' + b'\\"' * 500_000},
    "a number beyond all": lambda o: {**o.files, JSON: o.files[JSON].replace(b'"shots": 5', b'"shots": 1e999')},
    "many parts": lambda o: {**o.files, JSON: b'{"parts": [' + b"{}," * 340_000 + b"{}]}"},
    "many sites": lambda o: vouched(
        o, lambda r: r["parts"].__setitem__(0, {"name": "p", "kind": "bottleneck", "config": {}, "sites": SITES})
    ),
    "sites times parts": lambda o: vouched(o, lambda r: r.update(parts=parts_of(3, 3000))),
    "more sites than fit": lambda o: vouched(o, lambda r: r.update(parts=parts_of(50, 1000))),
    "a rank beyond all": lambda o: vouched(o, lambda r: r["parts"][0]["config"].update(rank=1 << 62)),
    "a rank of a terabyte": lambda o: vouched(o, lambda r: r["parts"][0]["config"].update(rank=1 << 33)),
    "std of zero": lambda o: vouched(o, lambda r: r["preprocessing"].update(std=[0, 1, 1])),
    "mean without std": lambda o: vouched(o, lambda r: r["preprocessing"].update(mean=[0.5])),
    "a mean beyond all": lambda o: vouched(o, lambda r: r["preprocessing"].update(mean=[10**400, 0, 0])),
    "an option that cannot be hashed": lambda o: vouched(o, lambda r: r["parts"][0]["config"].update(rank=[2])),
    "an option called self": lambda o: vouched(o, lambda r: r["parts"][0]["config"].update(self=1)),
    "an option called sites": lambda o: vouched(o, lambda r: r["parts"][0]["config"].update(sites={})),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(originals: list[Original], tmp_path: Path, kind: str) -> None:
    for name, data in BOMBS[kind](originals[0]).items():
        (tmp_path / name).write_bytes(data)
    start = time.process_time()
    with pytest.raises(BadAdapter):
        read_adapter(tmp_path)
    assert time.process_time() - start < 2


def test_values_are_counted_before_anything_is_checked(originals: list[Original], tmp_path: Path) -> None:
    """A mebibyte of well-formed sites takes seconds to check against the schema, so it never gets there."""
    for name, data in BOMBS["more sites than fit"](originals[0]).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BadAdapter, match="20,000 values"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", [JSON, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "link to nothing", "link to a device", "sparse"])
def test_things_that_are_no_files(originals: list[Original], tmp_path: Path, name: str, kind: str) -> None:
    where = tmp_path / "a"
    where.mkdir()
    for file, data in originals[0].files.items():
        (where / file).write_bytes(data)
    path = where / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as stream:
            stream.truncate(50 << 30)
    else:
        target = {
            "link": tmp_path / "elsewhere",
            "link to nothing": tmp_path / "nothing",
            "link to a device": Path("/dev/zero"),
        }[kind]
        path.symlink_to(target)
    start = time.process_time()
    with pytest.raises(BadAdapter, match=name):
        read_adapter(where)
    assert time.process_time() - start < 1


def test_limits_leave_room_for_large_adapters(hf_vit: Backbone, tmp_path: Path) -> None:
    """Two thousand sites are far more than any backbone of today has; they are read, and in time."""
    sites = {f"blocks.{i}.attn.q": (8, 8) for i in range(2000)}
    made = adapter(hf_vit, {"lora": LoRA(sites, rank=1)})
    save_adapter(made, tmp_path / "a")
    start = time.process_time()
    assert len(read_adapter(tmp_path / "a").site_parts["lora"].sites) == 2000
    assert time.process_time() - start < 20


def test_what_could_not_be_read_is_not_saved(hf_vit: Backbone, tmp_path: Path) -> None:
    made = adapter(hf_vit)
    made.provenance = {"note": "x" * MAX_JSON_BYTES}
    with pytest.raises(MedgraftError):
        save_adapter(made, tmp_path / "a")
    assert not (tmp_path / "a").exists()
