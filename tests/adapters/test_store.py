"""Law 7: saved and loaded, the same bits; and whatever is not understood is refused, whole."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes

from medgraft.adapters import (
    Adapter,
    ASPPHead,
    BackboneRef,
    Bottleneck,
    Host,
    LinearHead,
    LoRA,
    Preprocessing,
    PromptGenerator,
    Task,
    Tuned,
)
from medgraft.adapters.schema import FORMAT, MAX_DEPTH, MAX_JSON_BYTES, canonical, parse_json, validate
from medgraft.adapters.store import (
    adapter_from,
    make_probe,
    read_adapter,
    read_record,
    replay_probe,
    rounded,
    save_adapter,
)
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, MedgraftError, SaveFailed, WrongBackbone
from tests.helpers import ONE, THREE, adapter, images, says, wake

JSON, TENSORS = "adapter.json", "adapter.safetensors"
KINDS = Task("segment", ("polyp", "naïve Δ"), (3, 255))


@pytest.fixture
def saved(vit: Backbone, tmp_path: Path) -> Path:
    made = adapter(vit, task=KINDS)
    made.provenance, made.evaluation = {"recipe": "test", "shots": 5}, [{"dataset": "toy", "dice": 0.5}]
    return save_adapter(made, tmp_path / "a", backbone=vit)


def sealed(record: dict[str, Any]) -> bytes:
    """A description that is right about itself: damage that no hash gives away."""
    return json.dumps(record | {"sha256": canonical(record)}).encode()


def resealed(
    directory: Path,
    edit: Callable[[dict[str, Any]], Any] = lambda r: None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
) -> Path:
    """Edit a saved adapter as somebody would who knows the format."""
    record = json.loads((directory / JSON).read_text())
    if tensors is not None:
        held = load_file(directory / TENSORS)
        tensors(held)
        blob = save_bytes(held)
        (directory / TENSORS).write_bytes(blob)
        record["tensors"] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    record = edit(record) or record
    (directory / JSON).write_bytes(sealed(record))
    return directory


# The same bits


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_everything_comes_back(either: Backbone, dtype: str, tmp_path: Path) -> None:
    parts = {
        "n": Tuned.on(either, ONE, targets="*.norm1"),
        "l": LoRA.on(either, ONE, dora=True),
        "b": Bottleneck.on(either, ONE, scale=0.3),
    }
    parts |= {"p": PromptGenerator.on(either, ONE), "h": ASPPHead.on(either, KINDS, prompt=64)}
    made = wake(
        Adapter.of(either, KINDS, parts, size=96, provenance={"a": [1, {"b": None}]}, evaluation=[{"dice": 0.25}])
    )
    where = save_adapter(made, tmp_path / "deep" / "a", dtype=dtype, backbone=either)
    assert sorted(os.listdir(where)) == [JSON, TENSORS]
    back, want = read_adapter(where), rounded(made, dtype)
    for field in ("backbone", "task", "preprocessing", "provenance", "evaluation"):
        assert getattr(back, field) == getattr(made, field), field
    assert list(back.parts) == list(made.parts)
    assert [p.config for p in back.parts.values()] == [p.config for p in made.parts.values()]
    assert back.tensors().keys() == want.tensors().keys()
    assert all(
        torch.equal(t, want.tensors()[n]) and t.dtype == want.tensors()[n].dtype for n, t in back.tensors().items()
    )
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    if dtype == "float32":
        assert all(torch.equal(t, made.tensors()[n]) for n, t in back.tensors().items())
    again = save_adapter(back, tmp_path / "b", dtype=dtype, backbone=either)
    assert (again / TENSORS).read_bytes() == (where / TENSORS).read_bytes()
    assert (again / JSON).read_bytes() == (where / JSON).read_bytes()


def test_the_file_is_what_the_house_says(saved: Path) -> None:
    """Tensors named part, site, tensor, in the storage type; a description that hashes the file and itself; nothing else."""
    record = json.loads((saved / JSON).read_text())
    tensors = load_file(saved / TENSORS)
    assert "lora.blocks.0.attn.q.A" in tensors
    assert "head.linear.weight" in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert record["format"] == FORMAT == 1
    assert record["tensors"] == {
        "sha256": hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest(),
        "bytes": (saved / TENSORS).stat().st_size,
    }
    assert record["sha256"] == canonical(record)
    assert [p["name"] for p in record["parts"]] == ["lora", "head"]
    assert record["task"]["classes"] == ["polyp", "naïve Δ"]
    assert read_record(saved) == record


def test_saving_leaves_the_adapter_as_it_is(vit: Backbone, tmp_path: Path) -> None:
    made = adapter(vit)
    before = {n: t.clone() for n, t in made.tensors().items()}
    made.train()
    save_adapter(made, tmp_path / "a", backbone=vit)
    assert made.training
    assert all(torch.equal(t, before[n]) for n, t in made.tensors().items())


def test_nothing_of_the_machine_is_in_it(saved: Path, tmp_path: Path) -> None:
    everything = b"".join(f.read_bytes() for f in saved.iterdir())
    assert str(tmp_path).encode() not in everything
    assert os.uname().nodename.encode() not in everything


def test_what_half_precision_cannot_hold_is_not_saved(vit: Backbone, tmp_path: Path) -> None:
    made = adapter(vit)
    with torch.no_grad():
        made.parts["lora"].cell("blocks.1.attn.v").B[0, 0] = 1e5
    with pytest.raises(BadCall) as refused:
        save_adapter(made, tmp_path / "a")
    says(refused.value, "lora.blocks.1.attn.v.B", "values beyond float16", "float32")
    assert not (tmp_path / "a").exists()
    assert (
        read_adapter(save_adapter(made, tmp_path / "a", dtype="float32")).tensors()["lora.blocks.1.attn.v.B"][0, 0]
        == 1e5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_numbers_are_not_saved(vit: Backbone, value: float, tmp_path: Path) -> None:
    made = adapter(vit)
    with torch.no_grad():
        made.parts["head"].linear.weight[0, 0] = value
    with pytest.raises(BadCall) as refused:
        save_adapter(made, tmp_path / "a", dtype="float32")
    says(refused.value, "head.linear.weight", "NaN or infinite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.provenance.update(path=Path("x")), ("provenance", "json")),
        (lambda a: a.provenance.update(score=float("nan")), ("json",)),
        (lambda a: a.evaluation.append({"dice": float("inf")}), ("json",)),
        (lambda a: a.provenance.update(log="x" * (MAX_JSON_BYTES + 1)), ("bytes",)),
        (lambda a: a.provenance.update({f"k{i}": i for i in range(65)}), ("provenance",)),
        (lambda a: a.provenance.update(deep=json.loads("[" * 40 + "]" * 40)), ("nested deeper",)),
    ],
    ids=["a path", "nan", "inf", "too long", "too many", "too deep"],
)
def test_a_description_that_could_not_be_read_back_is_not_written(
    vit: Backbone, change, words: tuple[str, ...], tmp_path: Path
) -> None:
    made = adapter(vit)
    change(made)
    with pytest.raises(MedgraftError) as refused:
        save_adapter(made, tmp_path / "a")
    says(refused.value, *words)
    assert not list(tmp_path.iterdir())


def test_a_storage_type_that_is_not_there(vit: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BadCall) as refused:
        save_adapter(adapter(vit), tmp_path / "a", dtype="int8")
    says(refused.value, "'int8'", "float16")


@pytest.mark.parametrize("name", ["../evil", "a/b", "/tmp/evil", "..", "", JSON, TENSORS, "a\0b", "run.py"])
def test_extra_files_have_the_names_that_the_format_has(vit: Backbone, name: str, tmp_path: Path) -> None:
    with pytest.raises(BadCall) as refused:
        save_adapter(adapter(vit), tmp_path / "x" / "a", extra_files={name: b"evil"})
    says(refused.value, repr(name), "no place", "README.md")
    assert not list(tmp_path.glob("x/*"))
    assert not (tmp_path / "evil").exists()


def test_extra_files_go_along(vit: Backbone, tmp_path: Path) -> None:
    where = save_adapter(adapter(vit), tmp_path / "a", extra_files={"README.md": b"card", "preview.png": b"picture"})
    assert (where / "README.md").read_bytes() == b"card"
    read_adapter(where)


# Refusals: each message says what was found


def cut(length: Callable[[int], int], name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: length(len(data))])

    return damage


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(data)


def raw(name: str, damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(damage((directory / name).read_bytes()))


def flip(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        i = at(len(data))
        return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

    return flipped


def only_tensors(directory: Path) -> None:
    (directory / JSON).unlink()


def link(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).rename(directory.parent / "elsewhere")
        (directory / name).symlink_to(directory.parent / "elsewhere")

    return damage


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        with open(directory / name, "r+b") as f:
            f.truncate(size)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit the header of the tensors and seal it again."""

    def damage(directory: Path) -> None:
        blob = (directory / TENSORS).read_bytes()
        n = int.from_bytes(blob[:8], "little")
        head = json.loads(blob[8 : 8 + n])
        text = json.dumps(change(head) or head).encode()
        data = len(text).to_bytes(8, "little") + text + blob[8 + n :]
        (directory / TENSORS).write_bytes(data)
        record = json.loads((directory / JSON).read_text())
        record["tensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (directory / JSON).write_bytes(sealed(record))

    return damage


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: resealed(directory, change) and None


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda directory: resealed(directory, tensors=change) and None


HEAD, A = "head.linear.weight", "lora.blocks.0.attn.q.A"


def of_part(k: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda r: r["parts"][k].update(changes)


def in_config(k: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda r: r["parts"][k]["config"].update(changes)


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    # cut short, damaged, mixed up
    "no description": (only_tensors, (JSON, TENSORS)),
    "no tensors": (lambda d: (d / TENSORS).unlink(), (TENSORS, JSON)),
    "an empty description": (cut(lambda n: 0, JSON), (JSON, "JSON")),
    "a description of one byte": (cut(lambda n: 1, JSON), (JSON, "JSON")),
    "half a description": (cut(lambda n: n // 2, JSON), (JSON, "JSON", "again")),
    "a description without its end": (cut(lambda n: n - 3, JSON), (JSON, "JSON")),
    "no bytes of tensors": (cut(lambda n: 0, TENSORS), (TENSORS, "sha256")),
    "seven bytes of tensors": (cut(lambda n: 7, TENSORS), (TENSORS, "sha256")),
    "half the header": (cut(lambda n: 100, TENSORS), (TENSORS, "sha256")),
    "half the tensors": (cut(lambda n: n // 2, TENSORS), (TENSORS, "sha256", "again")),
    "all but a byte": (cut(lambda n: n - 1, TENSORS), (TENSORS, "sha256")),
    "a byte too many": (raw(TENSORS, lambda b: b + b"\0"), (TENSORS, "sha256")),
    "a flipped bit in the tensors": (raw(TENSORS, flip(lambda n: n - 5)), (TENSORS, "sha256")),
    "a flipped bit in the header": (raw(TENSORS, flip(lambda n: 20)), (TENSORS, "sha256")),
    "a changed word": (raw(JSON, lambda b: b.replace(b'"polyp"', b'"pulyp"')), (JSON, "changed after it was written")),
    "another adapter's hash": (
        lambda d: (d / JSON).write_text((d / JSON).read_text().replace('"sha256": "', '"sha256": "0', 1)),
        (JSON,),
    ),
    # hostile JSON
    "100 MB of JSON": (sparse(JSON, 100 << 20), (JSON, "bytes", f"{MAX_JSON_BYTES:,}")),
    "10,000 levels": (put(JSON, b"[" * 10_000 + b"]" * 10_000), ("nested deeper", str(MAX_DEPTH))),
    "10,000 levels of objects": (put(JSON, b'{"a":' * 10_000 + b"1" + b"}" * 10_000), ("nested deeper",)),
    "10,000 levels without an end": (put(JSON, b"[" * 10_000), ("nested deeper",)),
    "33 levels": (edit(lambda r: r["provenance"].update(x=json.loads("[" * 33 + "]" * 33))), ("nested deeper",)),
    "a key twice": (
        raw(JSON, lambda b: b.replace(b'"kind": "adapter"', b'"kind": "adapter", "kind": "adapter"', 1)),
        ("twice",),
    ),
    "NaN in the JSON": (raw(JSON, lambda b: b.replace(b'"shots": 5', b'"shots": NaN')), ("NaN",)),
    "Infinity in the JSON": (raw(JSON, lambda b: b.replace(b'"shots": 5', b'"shots": -Infinity')), ("Infinity",)),
    "1e400": (raw(JSON, lambda b: b.replace(b'"shots": 5', b'"shots": 1e400')), ("1e400",)),
    "a number of 5,000 digits": (raw(JSON, lambda b: b.replace(b'"shots": 5', b'"shots": ' + b"9" * 5000)), ("JSON",)),
    "no UTF-8": (put(JSON, b'{"a": "\xff\xfe"}'), ("JSON",)),
    "UTF-16": (put(JSON, '{"format": 1}'.encode("utf-16")), (JSON,)),
    "a list": (put(JSON, b"[]"), (JSON, "format 1")),
    "null": (put(JSON, b"null"), (JSON, "format 1")),
    "an empty object": (put(JSON, b"{}"), (JSON, "format 1")),
    "a web page": (put(JSON, b"<!DOCTYPE html>"), (JSON, "JSON")),
    "half a million quotes": (put(JSON, b'"' + b'\\"' * 500_000), (JSON,)),
    "a million errors": (put(JSON, json.dumps({"evaluation": [1] * 200_000}).encode()), (JSON,)),
    # another version, another kind
    "format 2": (edit(lambda r: r.update(format=2)), ("format 2", "format 1", "upgrade medgraft")),
    "format 0": (edit(lambda r: r.update(format=0)), ("format 0", "format 1", "save it again")),
    "format '1'": (edit(lambda r: r.update(format="1")), ("format",)),
    "format true": (edit(lambda r: r.update(format=True)), ("format",)),
    "a network": (edit(lambda r: r.update(kind="network")), ("whole network", "@PATH", "evaluate")),
    "another kind": (edit(lambda r: r.update(kind="dataset")), ("kind",)),
    # entries that are not understood
    "an entry too many": (edit(lambda r: r.update(run="rm -rf /")), ("run",)),
    "an entry too few": (edit(lambda r: r.pop("task") and r), ("task",)),
    "a backbone without fingerprint": (edit(lambda r: r["backbone"].pop("fingerprint") and r), ("fingerprint",)),
    "a fingerprint that is none": (edit(lambda r: r["backbone"].update(fingerprint="abc")), ("backbone/fingerprint",)),
    "a part of no known kind": (edit(of_part(0, kind="lorra")), ("'lora'", "lorra", "did you mean")),
    "a part that is a module path": (edit(of_part(0, kind="os.system")), ("os.system",)),
    "two parts of one name": (edit(of_part(1, name="lora")), ("two parts", "'lora'")),
    "no parts": (edit(lambda r: r.update(parts=[])), ("parts",)),
    "100 parts": (edit(lambda r: r.update(parts=r["parts"] * 50)), ("parts",)),
    "a part called ..": (edit(of_part(0, name="..")), ("parts/0/name", "..")),
    "a part called ../x": (edit(of_part(0, name="../x")), ("parts/0/name",)),
    "a part called /etc": (edit(of_part(0, name="/etc")), ("parts/0/name",)),
    "a part called keys": (edit(of_part(0, name="keys")), ("'keys'",)),
    "a part with a line end": (edit(of_part(0, name="lora\n")), ("lora",)),
    "a site called ..": (
        edit(lambda r: r["parts"][0]["sites"].update({"..": [48, 48]})),
        ("tensors missing", "lora...."),
    ),
    "a site with no name": (edit(lambda r: r["parts"][0]["sites"].update({"": [48, 48]})), ("lora",)),
    "a site that is no pair": (edit(lambda r: r["parts"][0]["sites"].update({"x": [48]})), ("sites/x",)),
    "a site of no width": (edit(lambda r: r["parts"][0]["sites"].update({"x": [0, 48]})), ("sites/x",)),
    "an unknown option": (edit(in_config(0, rankk=2)), ("'lora'", "rankk")),
    "a missing option": (edit(lambda r: r["parts"][1]["config"].pop("width") and r), ("'head'", "width")),
    "a rank that is none": (edit(in_config(0, rank=-1)), ("'lora'", "rank")),
    "a rank that is text": (edit(in_config(0, rank="2")), ("'lora'", "rank")),
    "a rank that is a fraction": (edit(in_config(0, rank=2.5)), ("'lora'", "rank")),
    "a rank that is true": (edit(in_config(0, rank=True)), ("'lora'", "rank")),
    "a switch that is text": (edit(in_config(0, rslora="no")), ("'lora'", "rslora")),
    "a scale that is nothing": (edit(in_config(0, alpha=None)), ("'lora'", "alpha")),
    "a rank of a billion": (edit(in_config(0, rank=10**9)), ("lora",)),
    "a rank of 10**30": (edit(in_config(0, rank=10**30)), ("lora",)),
    "another rank": (edit(in_config(0, rank=3)), ("tensor lora", "(2, 48)", "(3, 48)", "described")),
    "a level that is text": (edit(in_config(1, level="last")), ("'head'", "level")),
    "parts out of order": (edit(lambda r: r["parts"].reverse()), ("site parts before",)),
    "no head": (edit(lambda r: r["parts"].pop() and r), ("head",)),
    "a head for other classes": (edit(lambda r: r["task"].update(classes=["a"], values=[1])), ("outputs",)),
    "a class twice": (edit(lambda r: r["task"].update(classes=["a", "a"])), ("distinct",)),
    "values for other classes": (edit(lambda r: r["task"].update(values=[1])), ("values",)),
    "a value of 300": (edit(lambda r: r["task"].update(values=[1, 300])), ("values",)),
    "a deviation of zero": (edit(lambda r: r["preprocessing"].update(std=[0, 1, 1])), ("std", "[0, 1, 1]")),
    "means for other channels": (edit(lambda r: r["preprocessing"].update(mean=[0.5])), ("mean", "[0.5]")),
    "a huge image": (edit(lambda r: r["preprocessing"].update(size=10**9)), ("preprocessing/size",)),
    "a probe that tolerates all": (edit(lambda r: r["probe"].update(tolerance=2)), ("probe",)),
    "a probe of 10**9 pixels": (edit(lambda r: r["probe"].update(size=10**9)), ("probe",)),
    # tensors
    "a tensor missing": (tensors(lambda t: t.pop(HEAD)), ("1 tensors missing", HEAD)),
    "a tensor too many": (tensors(lambda t: t.update(extra=torch.zeros(1))), ("1 unknown", "extra")),
    "a tensor called ../x": (tensors(lambda t: t.update({"../../x": torch.zeros(1)})), ("1 unknown", "../../x")),
    "a tensor renamed": (
        tensors(lambda t: t.update({HEAD + "x": t.pop(HEAD)})),
        ("1 tensors missing", "1 unknown", HEAD + "x"),
    ),
    "another shape": (
        tensors(lambda t: t.update({HEAD: t[HEAD][:1].clone()})),
        (HEAD, "(1, 48, 1, 1)", "(3, 48, 1, 1)"),
    ),
    "another type": (tensors(lambda t: t.update({HEAD: t[HEAD].float()})), (HEAD, "float32", "float16")),
    "whole numbers": (tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int16)})), (HEAD, "int16")),
    "NaN inside": (tensors(lambda t: t[A].view(-1).__setitem__(0, float("nan"))), (A, "NaN")),
    "infinity inside": (tensors(lambda t: t[A].view(-1).__setitem__(-1, float("inf"))), (A, "infinite")),
    "no tensors at all": (tensors(lambda t: t.clear()), ("tensors missing",)),
    "a header of impossible length": (put(TENSORS, b"\xff" * 8 + b"{}"), (TENSORS,)),
    "tensors that overlap": (
        header(lambda h: h[A].update(data_offsets=h[HEAD]["data_offsets"])),
        (TENSORS, "safetensors"),
    ),
    "tensors past the end": (header(lambda h: h[A].update(data_offsets=[0, 1 << 40])), (TENSORS, "safetensors")),
    "tensors of negative size": (header(lambda h: h[A].update(data_offsets=[50, 10])), (TENSORS, "safetensors")),
    "a type from nowhere": (header(lambda h: h[A].update(dtype="F99")), (TENSORS, "safetensors")),
    "a header that is a list": (header(lambda h: [h]), (TENSORS, "safetensors")),
    # the directory
    "a description that is a link": (link(JSON), (JSON, "no link")),
    "tensors that are a link": (link(TENSORS), (TENSORS, "no link")),
    "a description that is a folder": (instead(JSON, Path.mkdir), (JSON, "plain file")),
    "tensors that are a folder": (instead(TENSORS, Path.mkdir), (TENSORS, "plain file")),
    "a description that is a pipe": (instead(JSON, os.mkfifo), (JSON, "plain file")),
    "tensors that are a pipe": (instead(TENSORS, os.mkfifo), (TENSORS, "plain file")),
    "2 TB of tensors": (sparse(TENSORS, 2 << 40), (TENSORS, "bytes")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_understood_is_refused(saved: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(saved)
    before = time.monotonic()
    with pytest.raises(BadAdapter) as refused:
        read_adapter(saved)
    says(refused.value, *words)
    assert len(str(refused.value)) < 1000, "a stranger fills the screen"
    assert "\n" not in str(refused.value)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("what", ["a tensor missing", "NaN inside", "a web page", "format 2", "an entry too many"])
def test_seals_are_real(saved: Path, what: str, tmp_path: Path) -> None:
    """The damage above is found for its own sake: the same file, sealed again without damage, loads."""
    resealed(saved)
    read_adapter(saved)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("nothing", lambda p: None, ("there is none", JSON)),
        ("file", lambda p: p.write_text("x"), ("not a directory",)),
        ("empty", Path.mkdir, (JSON, "nothing")),
        (
            "other",
            lambda p: (p.mkdir(), (p / "model.bin").write_bytes(b"x"), (p / "notes.txt").write_text("x")),
            (JSON, "model.bin", "notes.txt"),
        ),
    ],
)
def test_a_place_that_is_something_else(name: str, make, words: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / name)
    for read in (read_adapter, read_record):
        with pytest.raises(BadAdapter) as refused:
            read(tmp_path / name)
        says(refused.value, name, *words)


def test_a_lying_description_costs_no_memory(saved: Path) -> None:
    """A rank of a billion: shapes are compared before anything is allocated."""
    import resource

    resealed(saved, in_config(0, rank=10**8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadAdapter):
        read_adapter(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_a_description_of_many_sites_is_quick(saved: Path) -> None:
    sites = {f"blocks.{i}.attn.q": [48, 48] for i in range(10_000)}
    resealed(saved, of_part(0, sites=sites))
    before = time.monotonic()
    with pytest.raises(BadAdapter):
        read_adapter(saved)
    assert time.monotonic() - before < 5


def test_every_single_bit_counts(saved: Path) -> None:
    """A bit flipped anywhere in either file is refused, or (in the spaces of the JSON) changes nothing."""
    good = read_adapter(saved).tensors()
    description, blob = (saved / JSON).read_bytes(), (saved / TENSORS).read_bytes()
    draw = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        i, bit = (
            int(torch.randint(len(description), (1,), generator=draw)),
            1 << int(torch.randint(8, (1,), generator=draw)),
        )
        try:
            back = adapter_from(description[:i] + bytes([description[i] ^ bit]) + description[i + 1 :], blob)
        except BadAdapter:
            refused += 1
        else:
            assert chr(description[i]).isspace(), (i, bit)
            assert all(torch.equal(t, good[n]) for n, t in back.tensors().items())
        i = int(torch.randint(len(blob), (1,), generator=draw))
        with pytest.raises(BadAdapter):
            adapter_from(description, blob[:i] + bytes([blob[i] ^ bit]) + blob[i + 1 :])
    assert refused > 75


# Another backbone


def test_an_adapter_of_another_backbone_loads_and_is_not_added(
    saved: Path, swin: Backbone, vit: Backbone, tmp_path: Path
) -> None:
    back = read_adapter(saved)
    with pytest.raises(WrongBackbone) as refused:
        Host(swin).add(back, "a")
    says(
        refused.value,
        vit.spec.id,
        swin.spec.id,
        vit.spec.fingerprint[:12],
        swin.spec.fingerprint[:12],
        "allow_mismatch",
    )
    twin = copy.deepcopy(vit)
    twin.spec = replace(twin.spec, fingerprint="1" * 64)
    host = Host(twin)
    with pytest.warns(UserWarning, match="allow_mismatch") as seen:
        host.add(back, "a", allow_mismatch=True)
    says(seen[0].message, vit.spec.id, vit.spec.fingerprint[:12], "1" * 12)
    with pytest.warns(UserWarning, match="allow_mismatch"), pytest.raises(MedgraftError) as refused:
        Host(swin).add(back, "a", allow_mismatch=True)
    says(refused.value, "blocks.0.attn.q")


def test_a_probe_is_of_the_adapters_own_backbone(swin: Backbone, vit: Backbone, tmp_path: Path) -> None:
    with pytest.raises(WrongBackbone) as refused:
        save_adapter(adapter(vit), tmp_path / "a", backbone=swin)
    says(refused.value, vit.spec.id, swin.spec.id)
    assert not list(tmp_path.iterdir())


# The probe


def test_a_probe_replays(either: Backbone, tmp_path: Path) -> None:
    made = adapter(either, task=THREE)
    probe = read_record(save_adapter(made, tmp_path / "a", backbone=either))["probe"]
    back = read_adapter(tmp_path / "a")
    assert len(probe["expected"]) == 64
    assert len(set(probe["expected"])) > 32
    assert replay_probe(back, either, probe) <= 1e-5 < probe["tolerance"]
    wake(back, seed=7)
    assert replay_probe(back, either, probe) > probe["tolerance"]
    assert replay_probe(back, either, probe | {"size": 2 * probe["size"]}) > probe["tolerance"]
    assert replay_probe(back, either, probe | {"expected": probe["expected"][:5]}) == float("inf")


def test_a_probe_is_of_the_saved_bits(vit: Backbone, tmp_path: Path) -> None:
    """In half precision the probe is of the rounded adapter."""
    made = wake(adapter(vit), size=0.5)
    save_adapter(made, tmp_path / "a", dtype="bfloat16", backbone=vit)
    assert replay_probe(read_adapter(tmp_path / "a"), vit, read_record(tmp_path / "a")["probe"]) < 1e-5
    assert make_probe(made, vit)["expected"] != read_record(tmp_path / "a")["probe"]["expected"]


@pytest.mark.parametrize("head", ["dropout", "batchnorm"])
def test_a_probe_is_of_the_adapter_at_rest(vit: Backbone, head: str, tmp_path: Path) -> None:
    """Saved in the middle of training, with dropout on and batch statistics moving, it is still the function in use."""
    parts = {
        "l": LoRA.on(vit, ONE, dropout=0.5),
        "h": ASPPHead.on(vit, ONE) if head == "batchnorm" else LinearHead.on(vit, ONE),
    }
    made = adapter(vit, parts)
    made.train()
    probe = read_record(save_adapter(made, tmp_path / "a", dtype="float32", backbone=vit))["probe"]
    assert replay_probe(read_adapter(tmp_path / "a"), vit, probe) < 1e-5
    assert made.training


def test_a_probe_does_not_touch_the_backbone_or_the_generator(vit: Backbone) -> None:
    made, before = adapter(vit), vit.digest()
    state = torch.get_rng_state()
    make_probe(made, vit)
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.digest() == before


# The form


def test_depth_is_counted_outside_strings() -> None:
    assert parse_json(b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}', "x")["a"].startswith("[[")
    assert parse_json(b'{"a": "\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\\"}', "x")
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deepest, "x")
    with pytest.raises(BadAdapter, match="nested deeper"):
        parse_json(b"[" + deepest + b"]", "x")
    with pytest.raises(BadAdapter, match="nested deeper"):
        parse_json(b'{"\\"": ' + deepest + b"}", "x")


@pytest.mark.parametrize("size", [10_000, 1_000_000])
@pytest.mark.parametrize("piece", [b'"', b'\\"', b"\\", b"[", b'["', b'{"":', b'\\\\"', b'"\\'])
def test_reading_is_linear_in_the_length(piece: bytes, size: int) -> None:
    data = (b'"' + piece * size)[:MAX_JSON_BYTES]
    before = time.monotonic()
    with pytest.raises(BadAdapter):
        parse_json(data, "x")
    assert time.monotonic() - before < 2


def test_the_canonical_form_does_not_depend_on_the_order() -> None:
    assert canonical({"a": 1, "b": [1, 2], "sha256": "x"}) == canonical({"b": [1, 2], "a": 1})
    assert canonical({"a": 1}) != canonical({"a": 1.5})
    assert canonical({"a": [1, 2]}) != canonical({"a": [2, 1]})
    want = hashlib.sha256(b'{"a":1,"b":"\\u0394"}').hexdigest()
    assert canonical({"b": "Δ", "a": 1}) == want


def test_a_record_is_checked_before_its_hash(saved: Path) -> None:
    record = json.loads((saved / JSON).read_text())
    assert validate(record, "x") is record
    with pytest.raises(BadAdapter, match="changed after it was written"):
        validate(record | {"provenance": {}}, "x")


# Writing: whole or not at all


def versions(vit: Backbone, tmp_path: Path) -> tuple[Adapter, Adapter]:
    return adapter(vit, seed=1), adapter(vit, seed=2)


def test_saving_over_an_adapter_replaces_it_whole(vit: Backbone, tmp_path: Path) -> None:
    one, two = versions(vit, tmp_path)
    save_adapter(one, tmp_path / "a", extra_files={"README.md": b"old"})
    save_adapter(two, tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [JSON, TENSORS]
    assert os.listdir(tmp_path) == ["a"]
    assert torch.equal(read_adapter(tmp_path / "a").tensors()[A], rounded(two, "float16").tensors()[A])


def test_a_link_to_a_directory_stays_a_link(vit: Backbone, tmp_path: Path) -> None:
    one, two = versions(vit, tmp_path)
    save_adapter(one, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_adapter(two, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert torch.equal(read_adapter(tmp_path / "real").tensors()[A], rounded(two, "float16").tensors()[A])


def test_what_is_not_an_adapters_is_not_written_over(vit: Backbone, tmp_path: Path) -> None:
    (tmp_path / "theses").mkdir()
    (tmp_path / "theses" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadCall) as refused:
        save_adapter(adapter(vit), tmp_path / "theses")
    says(refused.value, "theses", "not an adapter's", "empty or a new directory")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveFailed) as refused:
        save_adapter(adapter(vit), tmp_path / "file")
    says(refused.value, "file", "stands there", "another name")
    (tmp_path / "empty").mkdir()
    save_adapter(adapter(vit), tmp_path / "empty")
    assert (tmp_path / "theses" / "thesis.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "theses"]


def test_a_strangers_file_beside_an_adapter_is_not_lost(vit: Backbone, tmp_path: Path) -> None:
    where = save_adapter(adapter(vit), tmp_path / "a")
    (where / "thesis.tex").write_text("years of work")
    with pytest.raises(BadCall) as refused:
        save_adapter(adapter(vit, seed=1), where)
    says(refused.value, "thesis.tex")
    assert (where / "thesis.tex").read_text() == "years of work"


def test_references_and_preprocessing_come_back() -> None:
    ref = BackboneRef("vit", "timm:x", "0" * 64, False, "0123456789")
    assert BackboneRef(**ref.to_json()) == ref
    p = Preprocessing(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocessing.from_json(json.loads(json.dumps(p.to_json()))) == p


def test_the_tensors_alone_are_what_safetensors_reads(saved: Path, vit: Backbone) -> None:
    held = load_bytes((saved / TENSORS).read_bytes())
    back = read_adapter(saved)
    assert held.keys() == back.tensors().keys()
    host = Host(vit)
    host.add(back, "a")
    assert host(images(vit), adapter="a").shape == (2, 3, 64, 64)
