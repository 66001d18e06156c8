"""The adapter on disk, format 1: `adapter.json` and `adapter.safetensors`, nothing executable, refused unless fully understood.

    adapter.json          parts and their configuration, task, preprocessing, backbone, provenance, probe, hashes
    adapter.safetensors   tensors named <part>.<site>.<tensor>

Saving casts to the storage dtype first, all but the statistics of batch norms; hashes, probe and whatever is measured afterwards are of
the saved bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..backbones.base import Backbone
from ..errors import BadAdapter, BadCall, MedgraftError
from .adapter import Adapter, BackboneRef
from .files import read_together, replacing
from .graft import Graft
from .host import Host, check_backbone
from .part import Part, find_part
from .schema import FORMAT, MAX_JSON_BYTES, canonical, parse_json, validate
from .task import Preprocessing, task_from_json
from .volume_task import VolumePreprocessing, preprocessing_from_json

JSON_NAME, TENSORS_NAME = "adapter.json", "adapter.safetensors"
MAX_TENSOR_BYTES = 1 << 30
MAX_HEADER_BYTES = 8 << 20
REQUIRED = {JSON_NAME: MAX_JSON_BYTES, TENSORS_NAME: MAX_TENSOR_BYTES}
OPTIONAL = {
    "README.md": 1 << 20,
    "preview.png": 8 << 20,
    "adapter_config.json": MAX_JSON_BYTES,
    "adapter_model.safetensors": MAX_TENSOR_BYTES,
    "signature.json": 1 << 16,
}
FILES = REQUIRED | OPTIONAL
"""Every file that the format names, and the most bytes that are read of it."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATISTICS = ("running_mean", "running_var")
"""Ends of the names of what a batch norm has measured: these are float32 in every file, for a variance may be beyond float16."""
PROBE_SIDE = 32  # of a cube, at most, where the backbone takes one so small
PROBE_TOLERANCE = {"float32": 1e-3}  # machines sum in other orders, through a whole network


def rounded(adapter: Adapter, dtype: str) -> Adapter:
    """A copy of `adapter` whose floating-point tensors hold what a file of `dtype` will hold. Raises BadCall where they overflow."""
    if dtype not in DTYPES:
        raise BadCall(f"storage dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    twin = copy.deepcopy(adapter).eval()
    with torch.no_grad():
        for name, t in twin.tensors().items():
            if t.is_floating_point():
                stored = t.to(stored_as(name, t, dtype))
                if not torch.isfinite(stored).all():
                    kind = "NaN or infinite values" if not torch.isfinite(t).all() else f"values beyond {dtype}"
                    raise BadCall(f"tensor {name} holds {kind} and is not saved; train again, or store as float32")
                t.copy_(stored)
    return twin


def save_adapter(
    adapter: Adapter,
    directory: str | Path,
    *,
    dtype: str = "float16",
    backbone: Backbone | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `adapter` to `directory`, replacing whatever adapter stood there, whole or not at all.

    With the `backbone` at hand a probe is stored: a seeded input and the expected output. `extra_files` (a card, a picture) go
    along, by the names that the format has for them. Raises BadCall for values that cannot be stored and for a directory that
    holds other files, WrongBackbone for another backbone, SaveFailed when the disk refuses.
    """
    directory = Path(directory)
    for name in extra_files or {}:
        if name not in OPTIONAL:
            raise BadCall(
                f"an adapter's directory has no place for {name!r}; beside the adapter go {', '.join(OPTIONAL)}"
            )
    if backbone is not None:
        check_backbone(adapter, backbone, False)
    stored = rounded(adapter, dtype)
    tensors = {
        name: t.detach().to("cpu", stored_as(name, t, dtype)).contiguous().clone()
        for name, t in stored.tensors().items()
    }
    blob = save_safetensors(tensors, metadata={"format": f"medgraft {FORMAT}"})
    record: dict[str, Any] = {
        "format": FORMAT,
        "kind": "adapter",
        "backbone": adapter.backbone.to_json(),
        "task": adapter.task.to_json(),
        "preprocessing": adapter.preprocessing.to_json(),
        "parts": [
            {"name": n, "kind": p.kind, "config": p.config, "sites": {s: list(shape) for s, shape in p.sites.items()}}
            for n, p in adapter.named_parts()
        ],
        "dtype": dtype,
        "tensors": {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)},
        "provenance": adapter.provenance,
        "evaluation": adapter.evaluation,
        "probe": None if backbone is None else make_probe(stored, backbone),
    }
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as misfit:
        raise BadCall(f"provenance and evaluation are saved as JSON, and cannot be: {misfit}") from None
    record["sha256"] = canonical(record)
    text = (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    validate(parse_json(text, JSON_NAME), JSON_NAME)
    if strange := _strange(directory):
        raise BadCall(
            f"{directory} holds files that are not an adapter's ({', '.join(strange[:3])}); choose an empty or a new directory"
        )
    with replacing(directory) as new:
        (new / TENSORS_NAME).write_bytes(blob)
        for name, content in (extra_files or {}).items():
            (new / name).write_bytes(content)
        (new / JSON_NAME).write_bytes(text)
    return directory


def _strange(directory: Path) -> list[str]:
    """What stands in a directory and would be lost if an adapter took its place."""
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    return [name for name in names if name not in FILES and not name.startswith(".")]


def record_evaluation(directory: str | Path, entry: Mapping[str, Any]) -> None:
    """Put a measured fact into a saved adapter's description, in the place of one of the same data set and split.

    The tensors stay as they are, bit for bit. A signature no longer fits and is taken out. Raises BadAdapter, SaveFailed.
    """
    directory = Path(directory)
    files = read_files(directory)
    record = record_of(files)
    key = (entry.get("dataset"), entry.get("split"))
    others = [e for e in record["evaluation"] if (e.get("dataset"), e.get("split")) != key]
    record["evaluation"] = [*others, json.loads(json.dumps(dict(entry), allow_nan=False))]
    record["sha256"] = canonical(record)
    text = (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    validate(parse_json(text, JSON_NAME), JSON_NAME)
    kept = {name: data for name, data in files.items() if name not in (JSON_NAME, "signature.json")}
    with replacing(directory) as new:
        for name, data in {**kept, JSON_NAME: text}.items():
            (new / name).write_bytes(data)


def stored_as(name: str, t: Tensor, dtype: str) -> torch.dtype:
    """The type of tensor `name` in a file of `dtype`."""
    if not t.is_floating_point():
        return t.dtype
    return torch.float32 if name.endswith(STATISTICS) else DTYPES[dtype]


def read_record(directory: str | Path) -> dict[str, Any]:
    """The checked `adapter.json` of a directory."""
    return validate(
        parse_json(read_together(Path(directory), {JSON_NAME: MAX_JSON_BYTES})[JSON_NAME], JSON_NAME), JSON_NAME
    )


def read_files(directory: str | Path) -> dict[str, bytes]:
    """The bytes of every file of an adapter directory that the format names, all of one version. Raises BadAdapter."""
    return read_together(Path(directory), REQUIRED, OPTIONAL)


def record_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The checked `adapter.json` among the files of an adapter. Raises BadAdapter."""
    return validate(parse_json(files[JSON_NAME], JSON_NAME), JSON_NAME)


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter directory. Every entry must be understood, every tensor expected, present, of its shape and finite.

    Raises BadAdapter, saying what was found, for anything else. Nothing is executed and no other file is opened.
    """
    read = read_together(Path(directory), {JSON_NAME: MAX_JSON_BYTES, TENSORS_NAME: MAX_TENSOR_BYTES})
    return adapter_from(read[JSON_NAME], read[TENSORS_NAME])


def adapter_from(description: bytes, blob: bytes) -> Adapter:
    """An adapter from the bytes of its two files; see `read_adapter`."""
    record = validate(parse_json(description, JSON_NAME), JSON_NAME)
    if hashlib.sha256(blob).hexdigest() != record["tensors"]["sha256"]:
        raise BadAdapter(
            f"{TENSORS_NAME} is not the file that {JSON_NAME} describes (sha256 differs); it is damaged or from another version, fetch it again"
        )
    return _build(record, _tensors(blob))


def _tensors(blob: bytes) -> dict[str, Tensor]:
    if len(blob) < 8 or int.from_bytes(blob[:8], "little") > min(MAX_HEADER_BYTES, len(blob)):
        raise BadAdapter(f"{TENSORS_NAME} is cut short or has a header of impossible length; fetch it again")
    try:
        return load_safetensors(blob)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as broken:
        raise BadAdapter(f"{TENSORS_NAME} is not a valid safetensors file ({broken}); fetch it again") from None


def _build(record: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    parts = {}
    for entry in record["parts"]:
        if entry["name"] in parts:
            raise BadAdapter(f"{JSON_NAME} names two parts {entry['name']!r}")
        try:
            cls = find_part(entry["kind"])
            _check_types(cls, entry["config"])
            with torch.device(
                "meta"
            ):  # a lying description costs no memory: shapes are compared before anything is allocated
                parts[entry["name"]] = cls(entry["sites"], **entry["config"])
        except MedgraftError as misfit:
            raise BadAdapter(f"part {entry['name']!r} of this adapter: {misfit}") from None
        except Exception as misfit:  # whatever a stranger's configuration makes a constructor say
            said = (str(misfit).splitlines() or [type(misfit).__name__])[0][:200]
            raise BadAdapter(
                f"part {entry['name']!r} ({entry['kind']}) does not understand its configuration: {said}"
            ) from None
    try:
        backbone = BackboneRef(**record["backbone"])
        task, preprocessing = task_from_json(record["task"]), _preprocessing(record["preprocessing"])
        adapter = Adapter(
            backbone, task, preprocessing, parts, provenance=record["provenance"], evaluation=record["evaluation"]
        )
    except MedgraftError as misfit:
        raise BadAdapter(f"this adapter's description contradicts itself: {misfit}") from None
    _check(adapter.tensors(), tensors, record["dtype"])
    adapter.to_empty(device="cpu")
    for name, p in adapter.named_parts():
        p.load_tensors({key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")})
    return adapter.eval()


def _check_types(cls: type[Part], config: Mapping[str, Any]) -> None:
    """Raise BadAdapter for an option whose value is not of the type that the part's constructor says."""
    hints = get_type_hints(cls.__init__)
    for key, value in config.items():
        wanted = hints.get(key)
        kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
        plain = [k for k in kinds if k in (bool, int, float, str, type(None))]
        if len(plain) == len(kinds) and not any(_is(value, k) for k in plain):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in plain)
            raise BadAdapter(f"its {key} must be {names}, got {str(value)[:40]!r}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _preprocessing(found: dict[str, Any]) -> Preprocessing | VolumePreprocessing:
    if (
        len(found["mean"]) != len(found["std"])
        or not all(abs(m) <= 1e6 for m in found["mean"])
        or not all(1e-6 <= s <= 1e6 for s in found["std"])
    ):
        raise BadAdapter(f"this adapter's normalisation cannot be applied: mean {found['mean']}, std {found['std']}")
    return preprocessing_from_json(found)


def _check(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], dtype: str) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise BadAdapter(
            f"{TENSORS_NAME} does not hold what {JSON_NAME} describes: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for name, t in wanted.items():
        other = found[name]
        stored = stored_as(name, t, dtype)
        # The first files kept statistics like weights.
        early = name.endswith(STATISTICS) and other.dtype == DTYPES[dtype]
        if other.shape != t.shape or (other.dtype != stored and not early):
            raise BadAdapter(
                f"tensor {name} is {tuple(other.shape)} {other.dtype}, {tuple(t.shape)} {stored} is described"
            )
        if other.is_floating_point() and not torch.isfinite(other).all():
            raise BadAdapter(f"tensor {name} holds NaN or infinite values; the adapter is refused")


# The probe: a numerical self-test that travels with the adapter.


def _probe_output(adapter: Adapter, backbone: Backbone, seed: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, backbone.spec.channels, *[size] * backbone.spec.dims, generator=g)
    p = next(backbone.parameters())
    graft = Graft.of(backbone, adapter)
    with torch.no_grad():
        out = Host(backbone)._finish(backbone.stem(backbone.checked(x.to(p))), graft, x.to(p), False)
    assert isinstance(out, Tensor)
    flat = out.flatten().double().cpu()
    return flat[torch.linspace(0, flat.numel() - 1, min(64, flat.numel())).long()]


def make_probe(adapter: Adapter, backbone: Backbone, seed: int = 0) -> dict[str, Any]:
    """A seeded normal input of the adapter's size (a volume: a small cube), and 64 evenly spaced values of the logits that it gives."""
    size, spec = adapter.preprocessing.size, backbone.spec
    if spec.dims == 3:
        size = max(spec.fitting((min(size, PROBE_SIDE),) * 3))
    expected = _probe_output(adapter, backbone, seed, size)
    return {
        "seed": seed,
        "size": size,
        "expected": [float(f"{v:.7g}") for v in expected.tolist()],
        "tolerance": PROBE_TOLERANCE["float32"],
    }


def replay_probe(adapter: Adapter, backbone: Backbone, probe: Mapping[str, Any]) -> float:
    """The largest deviation from the probe's expected output, relative to its largest entry."""
    expected = torch.tensor(probe["expected"], dtype=torch.float64)
    got = _probe_output(adapter, backbone, probe["seed"], probe["size"])
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
