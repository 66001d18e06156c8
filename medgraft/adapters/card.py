"""The card: README.md with the Hub's YAML on top, built from the facts in `adapter.json` and from nothing else.

A fact that is not known is left out, never invented. Facts beyond the fixed entries of the format are read from the
provenance: recipe, settings, dataset (a name, or a list), shots, seed, license, modality, organ, intended_use, limits;
and from the evaluation: dataset, split, n, dice, interval [low, high], level, and whatever other numbers an entry
holds. What stands in `adapter.json` may come from a stranger, so it is escaped for Markdown and for Python alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import BadCall
from .store import record_of
from .volume_task import VolumePreprocessing, preprocessing_from_json

PublicKey = str
"""An Ed25519 public key as 64 hex digits."""

PIPELINES = {"segment": "image-segmentation", "classify": "image-classification"}
LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-3.0",
        "agpl-3.0",
        "mpl-2.0",
        "isc",
        "unlicense",
        "wtfpl",
        "openrail",
        "unknown",
    ]
)
"""Licence identifiers that the Hub knows; any other goes by `license: other` and its name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MARK = "<!-- medgraft card {} -->"
_SIGNED = re.compile(r"^Signed \(Ed25519\) by the public key `[0-9a-f]{64}`\.$", re.MULTILINE)
_PNG, _PHANTOM = b"\x89PNG\r\n\x1a\n", b"medgraft\0drawn on phantoms"


def build_card(
    record: Mapping[str, Any],
    *,
    repo: str | None = None,
    preview: bool = False,
    key: PublicKey | None = None,
    peft: str | None = None,
) -> str:
    """The text of README.md for a checked `adapter.json`.

    repo    : the hub id under which it is published, for "how to load"; without one the folder of the card is loaded.
    preview : whether a preview.png stands beside it.
    key     : the public key that signed it.
    peft    : what a plain peft loader will and will not reproduce, where the plain form stands beside it.
    """
    facts = record["provenance"]
    name = _name(record, repo)
    blocks = [f"# {_md(name)}", _summary(record)]
    if record["backbone"]["random"]:
        blocks.insert(1, _random(record))
    if preview:
        blocks.append("![Preview](preview.png)")
    blocks += ["## How to load", _code(record, repo)]
    blocks += [f"## {title}\n\n{text}" for title, text in _sections(record, facts, peft) if text]
    if key is not None:
        blocks.append(f"## Signature\n\nSigned (Ed25519) by the public key `{key}`.")
    head = yaml.safe_dump(_metadata(record, name), sort_keys=False, allow_unicode=False, width=1000)
    body = f"---\n{head}---\n\n" + "\n\n".join(blocks) + "\n\n"
    return body + _MARK.format(_mark(body)) + "\n"


def refreshed(
    files: Mapping[str, bytes], *, repo: str | None = None, key: PublicKey | None = None, peft: str | None = None
) -> str:
    """The README.md to go with the `files` of an adapter: a card of ours is built anew, one that a person wrote stays
    theirs.

    In either, `key` is named. Raises BadAdapter for a damaged description, BadCall for a README that is not text.
    """
    try:
        found = files.get("README.md", b"").decode()
    except UnicodeDecodeError:
        raise BadCall("README.md is not UTF-8 text; rewrite it, or remove it and a card will be built") from None
    if not found.strip() or is_ours(found):
        return build_card(
            record_of(files), repo=repo, preview="preview.png" in files, key=key, peft=_kept_peft(found) or peft
        )
    if key is None:
        return found
    line = f"Signed (Ed25519) by the public key `{key}`."
    return _SIGNED.sub(line, found) if _SIGNED.search(found) else f"{found.rstrip()}\n\n{line}\n"


def is_ours(text: str) -> bool:
    """True for a card that `build_card` made and nobody changed."""
    body, _, last = text.rstrip("\n").rpartition("\n")
    return last == _MARK.format(_mark(body + "\n"))


def _mark(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def _kept_peft(text: str) -> str | None:
    found = re.search(r"^## Without medgraft\n\n(.*?)\n\n(?=## |<!-- )", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


# The preview


def phantom_preview(png: bytes) -> bytes:
    """`png` with a note inside that it was drawn on phantoms; without it, `publish` takes a picture for one of a user's
    images.
    """
    if not png.startswith(_PNG) or len(png) < 45:
        raise BadCall("a preview is wanted as the bytes of a PNG file")
    if is_phantom(png):
        return png
    chunk = b"tEXt" + _PHANTOM
    note = struct.pack(">I", len(_PHANTOM)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + note + png[33:]  # behind the header chunk


def is_phantom(png: bytes) -> bool:
    """True for a preview that `phantom_preview` marked and that carries no other text or camera data."""
    return png.startswith(_PNG) and [(kind, data) for kind, data in _notes(png)] == [(b"tEXt", _PHANTOM)]


def _notes(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            found.append((kind, png[at + 8 : at + 8 + size]))
        at += 12 + size
        if kind == b"IEND":
            break
    return found if at == len(png) else [*found, (b"", b"something stands behind the picture")]


# The YAML


def _metadata(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    facts, backbone = record["provenance"], record["backbone"]
    data: dict[str, Any] = {"library_name": "medgraft", "pipeline_tag": PIPELINES[record["task"]["kind"]]}
    data |= _license(facts.get("license"))
    base = _base_model(backbone)
    if base is not None:
        data |= {"base_model": base, "base_model_relation": "adapter"}
    hub_sets = [d for d in _datasets(facts) if _HUB_ID.fullmatch(d)]
    if hub_sets:
        data["datasets"] = hub_sets
    kinds = [part["kind"] for part in record["parts"]]
    labels = [
        facts.get("modality"),
        facts.get("organ"),
        facts.get("recipe"),
        "random-weights" if backbone["random"] else None,
    ]
    tags = ["medgraft", "adapter", "medical", *kinds, *(x for x in labels if isinstance(x, str))]
    data["tags"] = list(dict.fromkeys(t for t in map(_slug, tags) if t))
    results = [r for r in (_result(record, e) for e in record["evaluation"]) if r]
    if results:
        data["model-index"] = [{"name": _plain(name), "results": results}]
    return data


def _license(given: Any) -> dict[str, str]:
    if not isinstance(given, str) or not given.strip():
        return {}
    known = given.strip().lower()
    return {"license": known} if known in LICENSES else {"license": "other", "license_name": _slug(given) or "other"}


def _base_model(backbone: Mapping[str, Any]) -> str | None:
    """The hub repository that the backbone's tensors came from; known only where a commit of it was recorded."""
    family, _, name = backbone["id"].partition(":")
    name = name.partition("?")[0]
    if backbone["random"] or backbone["commit"] is None:
        return None
    if family == "timm":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(name, allow_unregistered=True)
        name = getattr(config, "hf_hub_id", None) or ""
    return name if family in ("hf", "timm") and _HUB_ID.fullmatch(name) else None


def _datasets(facts: Mapping[str, Any]) -> list[str]:
    found = facts.get("datasets", facts.get("dataset"))
    found = found if isinstance(found, list) else [found]
    return [_plain(d) for d in found if isinstance(d, str) and d.strip()]


def _result(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any] | None:
    value = _number(entry.get("dice"))
    if value is None or not isinstance(entry.get("dataset"), str):
        return None
    dataset = {
        "name": _plain(entry["dataset"]),
        "type": entry["dataset"] if _HUB_ID.fullmatch(entry["dataset"]) else _slug(entry["dataset"]) or "dataset",
    }
    if isinstance(entry.get("split"), str):
        dataset["split"] = _plain(entry["split"])
    metric: dict[str, Any] = {"type": "dice", "name": "Dice", "value": value}
    interval = _interval(entry)
    if interval is not None:
        metric["name"] = f"Dice ({_level(entry)}interval {interval[0]:.4g} to {interval[1]:.4g})"
        metric["args"] = {"interval": interval}
    if _number(entry.get("n")) is not None:
        metric.setdefault("args", {})["n"] = entry["n"]
    return {"task": {"type": PIPELINES[record["task"]["kind"]]}, "dataset": dataset, "metrics": [metric]}


def _number(x: Any) -> float | int | None:
    return x if isinstance(x, int | float) and not isinstance(x, bool) else None


def _interval(entry: Mapping[str, Any]) -> list[float] | None:
    found = entry.get("interval")
    ends = [_number(v) for v in found] if isinstance(found, list) and len(found) == 2 else []
    return [float(v) for v in ends if v is not None] if len(ends) == 2 and None not in ends else None


def _level(entry: Mapping[str, Any]) -> str:
    level = _number(entry.get("level"))
    return f"{100 * level:g} % " if level is not None else ""


# The text


def _name(record: Mapping[str, Any], repo: str | None) -> str:
    if repo is not None:
        return repo.rpartition("/")[2]
    return f"{', '.join(record['task']['classes'][:4])} on {record['backbone']['id']}"


def _summary(record: Mapping[str, Any]) -> str:
    task, backbone = record["task"], record["backbone"]
    verb = {"segment": "segments", "classify": "tells apart"}[task["kind"]]
    facts = record["provenance"]
    about = " ".join(_md(facts[k]) for k in ("modality", "organ") if isinstance(facts.get(k), str) and facts[k])
    return (
        f"A medgraft adapter that {verb} **{', '.join(map(_md, task['classes']))}**"
        f"{f' ({about})' if about else ''} on the frozen backbone {_tick(backbone['id'])}. It holds "
        f"{', '.join(dict.fromkeys(_tick(p['kind']) for p in record['parts']))}: "
        f"{record['tensors']['bytes']:,} bytes in {record['dtype']}, "
        "safetensors and JSON only, nothing executable."
    )


def _random(record: Mapping[str, Any]) -> str:
    return (
        f"> **Warning: random weights.** The backbone {_tick(record['backbone']['id'])} was never "
        "trained. This adapter shows that the "
        "machinery works; its predictions mean nothing, and no number below says anything about images."
    )


def _code(record: Mapping[str, Any], repo: str | None) -> str:
    name = _slug(record["task"]["classes"][0]) or "task"
    where = '"."' if repo is None else _py(repo)
    note = "  # the folder of this file" if repo is None else ""
    prepare = preprocessing_from_json(record["preprocessing"])
    if isinstance(prepare, VolumePreprocessing):
        imported, given = [], 'image = "volume.nii.gz"  # yours: a NIfTI file, or the folder of a DICOM series'
        shape = "(X, Y, Z) on the volume's own grid"
    else:
        imported, shape = ["import numpy as np"], "of the image's own size"
        given = (
            f"image = np.zeros(({prepare.size}, {prepare.size}, 3), dtype=np.uint8)  # yours: (H, W, 3), any size; or the "
            "path of a picture"
        )
    return "\n".join(
        [
            "```python",
            "import medgraft",
            *imported,
            "",
            f"backbone = medgraft.load_backbone({_py(record['backbone']['id'])}, image_size={prepare.size})",
            "host = medgraft.Host(backbone)",
            f"host.add(medgraft.load_adapter({where}), name={_py(name)}){note}",
            "",
            given,
            f"result = host.predict(image, adapter={_py(name)})",
            "```",
            "",
            {
                "segment": f"`result` is a label map {shape}: 0 is background, {_values(record)}.",
                "classify": "`result` gives the probability of each class.",
            }[record["task"]["kind"]],
        ]
    )


def _values(record: Mapping[str, Any]) -> str:
    task = record["task"]
    pairs = [f"{v} is {_md(c)}" for c, v in zip(task["classes"], task["values"], strict=False)]
    return ", ".join(pairs[:40]) + (", ..." if len(pairs) > 40 else "")


def _sections(record: Mapping[str, Any], facts: Mapping[str, Any], peft: str | None) -> list[tuple[str, str]]:
    return [
        ("Measured", _table(record)),
        ("How it was made", _made(record, facts)),
        ("Intended use and limits", _use(record, facts)),
        ("Without medgraft", peft or ""),
        ("Check it", _check(record)),
    ]


def _table(record: Mapping[str, Any]) -> str:
    rows = []
    for entry in record["evaluation"]:
        dice, interval = _number(entry.get("dice")), _interval(entry)
        cells = [
            _md(entry["dataset"]) if isinstance(entry.get("dataset"), str) else "",
            _md(entry.get("split") or ""),
            _cell(entry.get("n")),
        ]
        cells += [
            "" if dice is None else f"{dice:.4g}",
            "" if interval is None else f"{_level(entry)}{interval[0]:.4g} to {interval[1]:.4g}",
        ]
        known = {"dataset", "split", "n", "dice", "interval", "level"}
        others = {k: v for k, v in entry.items() if k not in known and (isinstance(v, str) or _number(v) is not None)}
        rows.append([*cells, ", ".join(f"{_md(k)} {_cell(v)}" for k, v in others.items())])
    titles = ["data", "split", "n", "Dice", "interval", "also"]
    shown = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    if not rows or not shown:
        return ""
    lines = ["| " + " | ".join(row[i] for i in shown) + " |" for row in [titles, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(shown), *lines[1:]])


def _cell(x: Any) -> str:
    number = _number(x)
    return f"{number:.4g}" if isinstance(number, float) else str(number) if number is not None else _md(x or "")


def _made(record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    backbone = record["backbone"]
    lines = [
        f"- backbone: {_tick(backbone['id'])}, fingerprint {_tick(backbone['fingerprint'])}"
        + (f", commit {_tick(backbone['commit'])}" if backbone["commit"] else "")
    ]
    lines += [f"- data: {', '.join(map(_md, _datasets(facts)))}"] if _datasets(facts) else []
    for key in ("recipe", "shots", "seed", "modality", "organ", "license", "date", "medgraft", "torch"):
        if isinstance(facts.get(key), str | int | float) and facts[key] != "":
            lines.append(f"- {key}: {_md(facts[key])}")
    settings = facts.get("settings")
    if isinstance(settings, dict) and settings:
        shown = {str(k): v for k, v in settings.items() if isinstance(v, str | int | float | bool)}
        lines.append("- settings: " + ", ".join(f"{_md(k)} {_md(v)}" for k, v in shown.items()))
    prepare = preprocessing_from_json(record["preprocessing"])
    lines.append(f"- input: {prepare.said}, mean {list(prepare.mean)}, std {list(prepare.std)}")
    return "\n".join(lines)


def _use(record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = [_md(facts[k]) for k in ("intended_use", "limits") if isinstance(facts.get(k), str) and facts[k].strip()]
    shots = facts.get("shots")
    few = (
        f"It learnt from {shots} labelled image{'s' * (shots != 1)}. "
        if isinstance(shots, int) and not isinstance(shots, bool)
        else ""
    )
    measured = (
        "What it does beyond the data in the table above is not known. "
        if record["evaluation"]
        else "How well it does has not been measured. "
    )
    lines.append(
        f"{few}{measured}It is meant for research, is not a medical device, and must not be used to "
        "decide about a patient. Images of another "
        "scanner, stain, organ or population can fail without a sign. It belongs to one backbone and "
        "is refused by any other."
    )
    return "\n\n".join(lines)


def _check(record: Mapping[str, Any]) -> str:
    probe = (
        "and replays the probe: a seeded input, whose expected output travels with the adapter"
        if record["probe"]
        else "; it holds no probe"
    )
    return (
        "`medgraft verify` checks the description, every tensor and the backbone's "
        f"fingerprint{' ' if record['probe'] else ''}{probe}."
    )


# Escaping. What is printed is one line of plain characters.


def _plain(x: Any) -> str:
    text = str(x).encode("utf-8", "replace").decode()
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() or c.isspace() else " " for c in text)).strip()[:500]


def _md(x: Any) -> str:
    text = re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", _plain(x)).replace("\\<", "&lt;").replace("\\>", "&gt;")
    return re.sub(r"(https?|ftp|javascript|data):", r"\1&#58;", text, flags=re.IGNORECASE)


def _tick(x: Any) -> str:
    return f"`{_plain(x).replace('`', chr(39))}`"


def _py(text: str) -> str:
    return json.dumps(text, ensure_ascii=True).replace("`", "\\u0060")


def _slug(x: Any) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", _plain(x).lower()).strip("-.")[:64]
