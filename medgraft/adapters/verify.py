"""A verdict on each item of an adapter: description, tensors, backbone, probe, plain-peft form, signature.

Nothing raises for a bad adapter: what is wrong with it is what was asked. `ok` is None where an item could not be
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from ..backbones.base import Backbone
from ..backbones.registry import load_backbone, parse
from ..errors import BadAdapter, BadCall, MedgraftError, MissingExtra
from . import peft, signature
from .adapter import Adapter
from .files import read_together
from .host import check_backbone
from .schema import parse_json
from .store import FILES, JSON_NAME, MAX_HEADER_BYTES, TENSORS_NAME, adapter_from, record_of, replay_probe

ITEMS = ("schema", "tensors", "fingerprint", "probe", "peft", "signature")
MAX_PROBE_FACTOR = 4
"""Probes beyond this many times the backbone's own image size (volumes: beyond it) are not replayed: a stranger may not choose how much
memory we use.
"""


VOLUME_WEIGHTS = {"feature_size": 27_000, "filters": 20_000, "widths": 108}
"""About how many parameters a 3D network has over the square of its width, by the option that says it."""


@dataclass(frozen=True)
class Verdict:
    """What was found about one item; `ok` is None where it was not, or could not be, checked."""

    item: str
    ok: bool | None
    said: str

    def __str__(self) -> str:
        word = {True: "ok", False: "REFUSED", None: "not checked"}[self.ok]
        return f"{self.item:<12}{word:<12}{self.said}"


def verify(
    directory: str | Path, *, backbone: Backbone | str | None = None, load: bool = True, key: str | Path | None = None
) -> list[Verdict]:
    """One verdict for each of `ITEMS`, in order, about an adapter directory.

    The backbone that the adapter names is loaded (perhaps from the hub) unless one is given or `load` is False. `key`
    is the public key whose signature is wanted. Raises nothing for bad adapters; BadCall for a key that is none.
    """
    if key is not None:
        key = signature.public_hex(key)
    try:
        files = read_together(
            Path(directory), {JSON_NAME: FILES[JSON_NAME]}, {n: limit for n, limit in FILES.items() if n != JSON_NAME}
        )
        record = record_of(files)
    except MedgraftError as refused:
        return [
            Verdict("schema", False, str(refused)),
            *(Verdict(item, None, "the description cannot be trusted") for item in ITEMS[1:]),
        ]
    parts = record["parts"]
    verdicts = [
        Verdict(
            "schema",
            True,
            f"format {record['format']}, {len(parts)} part{'s' * (len(parts) != 1)}, its own sha256 matches",
        )
    ]
    adapter, verdict = _tensors(files)
    verdicts.append(verdict)
    backbone, why = _loaded(adapter, backbone, load)
    verdicts += _behaviour(adapter, record, backbone, why)
    verdicts += [_peft(files, adapter, backbone), _signature(files, key)]
    return verdicts


def passed(verdicts: list[Verdict]) -> bool:
    """True when no item was refused."""
    return all(v.ok is not False for v in verdicts)


def _tensors(files: Mapping[str, bytes]) -> tuple[Adapter | None, Verdict]:
    if TENSORS_NAME not in files:
        return None, Verdict("tensors", False, f"there is no {TENSORS_NAME}")
    try:
        adapter = adapter_from(files[JSON_NAME], files[TENSORS_NAME])
    except BadAdapter as refused:
        return None, Verdict("tensors", False, str(refused))
    tensors = adapter.tensors()
    return adapter, Verdict(
        "tensors", True, f"{len(tensors)} tensors, all expected, of the described shapes, finite; sha256 matches"
    )


def _loaded(adapter: Adapter | None, backbone: Backbone | str | None, load: bool) -> tuple[Backbone | None, str]:
    """The backbone, or None and why not."""
    if adapter is None:
        return None, "the adapter could not be read"
    if backbone is None and not load:
        return None, "no backbone was given"
    if isinstance(backbone, Backbone):
        return backbone, ""
    asked = adapter.backbone.id if backbone is None else backbone
    try:
        if backbone is None:
            _refuse_greedy(asked)
        return load_backbone(asked), ""
    except Exception as refused:  # an id from a stranger, read by other people's libraries
        return None, f"{asked} could not be loaded: {_first_line(refused)}"


def _behaviour(
    adapter: Adapter | None, record: Mapping[str, Any], backbone: Backbone | None, why: str
) -> list[Verdict]:
    """Fingerprint and probe."""
    if adapter is None or backbone is None:
        return [Verdict("fingerprint", None, why), Verdict("probe", None, why)]
    try:
        check_backbone(adapter, backbone, False)
    except MedgraftError as refused:
        return [Verdict("fingerprint", False, str(refused)), Verdict("probe", None, "made for another backbone")]
    note = ", random weights" if backbone.spec.random else ""
    right = Verdict("fingerprint", True, f"{backbone.spec.id}{note}, {backbone.spec.fingerprint[:12]}")
    return [right, _probe(adapter, record["probe"], backbone)]


def _refuse_greedy(id: str) -> None:
    """A stranger's adapter names the backbone, but not a file of this machine, nor how much memory we use. Raises
    BadCall.
    """
    asked = parse(id)
    sizes = {"width": 64, "depth": 3, "size": 64, "patch": 16} | {
        k: int(v) for k, v in asked.options if k != "seed" and v.isdecimal()
    }
    parameters, tokens = 12 * sizes["width"] ** 2 * sizes["depth"], (sizes["size"] // max(1, sizes["patch"])) ** 2
    widest = {k: max((int(n) for n in v.split("-") if n.isdecimal()), default=0) for k, v in asked.options}
    parameters = max(parameters, *(weight * widest.get(key, 0) ** 2 for key, weight in VOLUME_WEIGHTS.items()))
    if asked.path is not None:
        raise BadCall("it names a file of some machine; load the backbone yourself and give it")
    if asked.random and (parameters > 1 << 27 or sizes["size"] > 2048 or tokens > 1 << 14):
        raise BadCall(
            "it asks for a very large random network; load the backbone yourself and give it, if that is meant"
        )


def _probe(adapter: Adapter, probe: Mapping[str, Any] | None, backbone: Backbone) -> Verdict:
    if probe is None:
        return Verdict("probe", None, "the adapter holds none; save it with the backbone at hand and it will")
    if probe["size"] > (MAX_PROBE_FACTOR if backbone.spec.dims == 2 else 1) * backbone.spec.image_size:
        return Verdict(
            "probe", None, f"a probe of {probe['size']} pixels a side is too large to be replayed on {backbone.spec.id}"
        )
    try:
        off = replay_probe(adapter, backbone, probe)
    except Exception as broke:  # parts that pass every check of form may still not run
        return Verdict("probe", False, f"the adapter does not run on its backbone: {_first_line(broke)}")
    allowed = probe["tolerance"]
    return Verdict(
        "probe", off <= allowed, f"the output deviates by {off:.1e} of its largest value, {allowed:.0e} is allowed"
    )


def _peft(files: Mapping[str, bytes], adapter: Adapter | None, backbone: Backbone | None) -> Verdict:
    there = [name for name in (peft.CONFIG_NAME, peft.MODEL_NAME) if name in files]
    if not there:
        return Verdict("peft", None, "no plain-peft form stands beside it")
    if len(there) == 1:
        return Verdict("peft", False, f"{there[0]} stands alone: both files of the plain-peft form are wanted")
    try:
        config, tensors = _plain_form(files)
        if adapter is None or backbone is None or adapter.backbone.fingerprint != backbone.spec.fingerprint:
            said = f"{config['peft_type'][:40]}, {len(tensors)} tensors, of the form that plain peft reads"
            return Verdict("peft", True, f"{said}; not compared with the adapter")
        made = peft.peft_files(adapter, backbone)
        if made is None:
            raise BadAdapter(f"the adapter has no plain-peft form: {peft.why_not_exportable(adapter, backbone)}")
        wanted_config, wanted = _plain_form(made[0])
        other = [k for k in _TELLING if config.get(k) != wanted_config.get(k)]
        if other or wanted.keys() != tensors.keys():
            raise BadAdapter(
                f"it is the form of another adapter ({other[0] if other else 'its tensors have other names'})"
            )
        off = [
            n
            for n, t in wanted.items()
            if t.shape != tensors[n].shape or not torch.equal(t.float(), tensors[n].float())
        ]
        if off:
            raise BadAdapter(f"it holds other values than the adapter ({off[0][:80]})")
    except Exception as refused:  # plain peft itself is at work in there
        return Verdict("peft", False, _first_line(refused))
    difference = made[1]["max_difference"]
    return Verdict(
        "peft", True, f"{config['peft_type']}: plain peft computes the same, largest difference {difference:.1e}"
    )


_TELLING = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


def _plain_form(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of the plain form. Raises BadAdapter."""
    config, blob = parse_json(files[peft.CONFIG_NAME], peft.CONFIG_NAME), files[peft.MODEL_NAME]
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadAdapter(f"{peft.CONFIG_NAME} names no peft_type")
    if len(blob) < 8 or int.from_bytes(blob[:8], "little") > min(MAX_HEADER_BYTES, len(blob)):
        raise BadAdapter(f"{peft.MODEL_NAME} is cut short or has a header of impossible length")
    tensors = load_safetensors(blob)
    foreign = [name for name in tensors if not name.startswith(peft.PREFIX)]
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if not tensors or foreign:
        raise BadAdapter(
            f"{peft.MODEL_NAME} holds "
            f"{f'a name that peft does not know: {foreign[0][:80]}' if foreign else 'no tensor'}"
        )
    if bad:
        raise BadAdapter(f"{peft.MODEL_NAME}: tensor {bad[0][:80]} holds NaN or infinite values")
    return config, tensors


def _signature(files: Mapping[str, bytes], key: str | Path | None) -> Verdict:
    if signature.SIGNATURE_NAME not in files:
        return Verdict(
            "signature",
            None if key is None else False,
            "not signed" + ("" if key is None else ", and a signature is wanted"),
        )
    try:
        signer = signature.check(files, key)
    except MissingExtra as missing:
        return Verdict("signature", None, str(missing))
    except MedgraftError as refused:
        return Verdict("signature", False, str(refused))
    if key is None:
        return Verdict(
            "signature", None, f"intact, by the key {signer}; give the key that you trust and it will be compared"
        )
    return Verdict("signature", True, f"by the key that you trust, {signer[:16]}..., over {len(files) - 1} files")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"
