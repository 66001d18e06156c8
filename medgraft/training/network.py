"""Whole networks on disk: what baselines and pretraining leave behind. Not adapters: a host does not take them, nobody publishes them here.

    network.json            kind, backbone id, the format's version
    backbone.safetensors    every tensor of the trained network, by its author's names
    adapter/                the head, as an adapter that belongs to exactly these tensors

A network loads as a backbone by `FAMILY:NAME@DIRECTORY`; `evaluate` and `predict` read it as it is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from ..adapters import Adapter, BackboneRef
from ..adapters.files import read_together, replacing
from ..adapters.schema import MAX_JSON_BYTES, parse_json
from ..adapters.store import read_adapter, save_adapter
from ..backbones import Backbone, load_backbone
from ..backbones.identity import fingerprint
from ..errors import BadAdapter, BadData

NETWORK_JSON = "network.json"


def save_network(backbone: Backbone, adapter: Adapter, directory: Path, *, image_size: int) -> Path:
    """Write a trained network and its head, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in backbone.network.state_dict().items()}
    adapter.backbone = replace(BackboneRef.of(backbone), fingerprint=fingerprint(tensors), random=False, commit=None)
    plain_id = backbone.spec.id.removeprefix("random:").partition("?")[0]
    with replacing(directory) as new:
        save_file(tensors, new / "backbone.safetensors")
        save_adapter(adapter, new / "adapter", dtype="float32")
        record = {
            "format": 1,
            "kind": "network",
            "backbone": plain_id,
            "image_size": image_size,
            "provenance": adapter.provenance,
        }
        (new / NETWORK_JSON).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return directory


def load_network(directory: Path) -> tuple[Backbone, Adapter]:
    """The trained network as a frozen backbone, and its head. Raises BadAdapter, BadData."""
    record = parse_json(read_together(directory, {NETWORK_JSON: MAX_JSON_BYTES})[NETWORK_JSON], NETWORK_JSON)
    if not isinstance(record, dict) or record.get("kind") != "network" or record.get("format") != 1:
        raise BadAdapter(f"{directory / NETWORK_JSON} does not describe a network of format 1")
    if not isinstance(record.get("backbone"), str) or not isinstance(record.get("image_size"), int):
        raise BadData(f"{directory / NETWORK_JSON} lacks its backbone or its image size; train it again")
    backbone = load_backbone(
        f"{record['backbone']}@{directory / 'backbone.safetensors'}", image_size=record["image_size"]
    )
    return backbone, read_adapter(directory / "adapter")


def is_network(directory: Path) -> bool:
    """True for a directory that holds a network."""
    return (directory / NETWORK_JSON).is_file()
