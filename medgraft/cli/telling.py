"""Commands that say what is there: explain, info, list."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import BadCall, unknown
from .shared import BackboneOption, Directory, app, console, rounded, show_facts


@app.command()
def explain(
    recipe_or_dir: Annotated[str, typer.Argument(help="a recipe, or an adapter directory")],
    backbone: BackboneOption = None,
    image_size: Annotated[int | None, typer.Option(help="pixels a side")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="list every site of the backbone")] = False,
) -> None:
    """What an adapter touches and costs: sites, parameters, bytes, memory, and whether it folds, mixes and exports to peft."""
    from ..adapters.explain import explain as look
    from ..backbones import load_backbone
    from ..recipes import RECIPES
    from ..recipes.dry import dry_adapter

    if recipe_or_dir in RECIPES:
        adapter, frozen = dry_adapter(recipe_or_dir, backbone=backbone, image_size=image_size)
    elif Path(recipe_or_dir).exists() or "/" in recipe_or_dir or ":" in recipe_or_dir:
        from ..adapters.hub import load_adapter

        adapter = load_adapter(recipe_or_dir)
        frozen = load_backbone(backbone or adapter.backbone.id, image_size=image_size or adapter.preprocessing.size)
    else:
        raise unknown("recipe or directory", recipe_or_dir, RECIPES)
    facts = look(adapter, frozen)
    show_facts(
        f"{recipe_or_dir} on {facts.backbone}, {facts.size} px",
        {
            "trainable parameters": facts.trainable,
            "bytes on disk (fp16)": facts.bytes["float16"],
            "memory kept for backward, one image": f"{facts.activations / 2**20:.1f} MiB (measured)",
            "acts from": f"stage {facts.first_stage} of {facts.depth}; the {facts.first_stage} before are shared and cached",
            "folds into plain layers": _yes(facts.foldable),
            "mixes with others in one batch": _yes(facts.mixable)
            + ("" if facts.mixable else " (rows are grouped by adapter)"),
            "exports to plain peft": "yes" if facts.not_for_peft is None else f"no: {facts.not_for_peft}",
        },
    )
    table = Table(
        "part", "kind", "parameters", "sites", "silent at birth", "folds", "mixes", box=None, padding=(0, 2, 0, 0)
    )
    for p in facts.parts:
        hit = f"{len(p.sites)}: {p.sites[0]} .. {p.sites[-1]}" if p.sites else "readout"
        silent = "yes" if p.silent else f"no: {p.note}"
        table.add_row(p.name, p.kind, f"{p.parameters:,}", hit, silent, _yes(p.foldable), _yes(p.mixable))
    console.print(table)
    for name, ways in facts.paths.items():
        for path, ports in ways.items():
            console.print(f"{name} at {ports} {'place' if ports == 1 else 'places'}: {path}", highlight=False)
    for path, blocks in facts.attention.items():
        console.print(
            f"the backbone's attention in {blocks} {'block' if blocks == 1 else 'blocks'}: {path}", highlight=False
        )
    if sites:
        called = frozen.called
        for site in frozen.sites.values():
            note = "" if site.port in called else "  never called"
            console.print(
                f"{site.name}  {site.kind}  stage {site.stage}  {site.fan_in} -> {site.fan_out}{note}", highlight=False
            )


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


@app.command()
def info(adapter: Directory) -> None:
    """What an adapter's own file says of it."""
    from ..adapters.hub import fetch
    from ..adapters.store import read_record
    from ..training.network import is_network

    if is_network(Path(adapter)):
        raise BadCall(
            f"{adapter} holds a whole network, not an adapter; `medgraft evaluate` and `predict` read it, or load it by @PATH"
        )
    record = read_record(fetch(adapter))
    made_for = record["backbone"]
    rows = {
        "task": f"{record['task']['kind']}: {', '.join(record['task']['classes'])}",
        "backbone": made_for["id"] + (" (random weights)" if made_for["random"] else ""),
        "fingerprint": made_for["fingerprint"],
        "parts": ", ".join(f"{p['name']} ({p['kind']}, {len(p['sites'])} sites)" for p in record["parts"]),
        "image size": record["preprocessing"].get("size")
        or "patches of {} x {} x {}".format(*record["preprocessing"]["patch"]),
        "tensors": f"{record['tensors']['bytes']:,} bytes, {record['dtype']}",
    }
    rows |= {k: v for k, v in record["provenance"].items() if k != "settings"}
    for entry in record["evaluation"]:
        score = entry.get("dice", entry.get("accuracy"))
        rows[f"score on {entry.get('dataset')}"] = (
            f"{score:.3f} {rounded(entry.get('interval'))} (n = {entry.get('n')})"
        )
    show_facts(adapter, rows)


@app.command("list")
def list_all() -> None:
    """Recipes, parts and backbones."""
    from ..adapters import PARTS
    from ..recipes import RECIPES

    show_facts("recipes", {name: r.summary for name, r in sorted(RECIPES.items())})
    show_facts("parts", {name: _said_of(cls) for name, cls in sorted(PARTS.items())})
    show_facts(
        "backbones",
        {
            "medgraft:starter-vit": "a small ViT that ships with the package (trained on drawn images)",
            "medgraft:starter-universeg": "a UniverSeg that ships with the package (trained on synthetic tasks)",
            "medgraft:starter-sam": "a small SAM that ships with the package (trained on drawn images)",
            "universeg:PATH": "the authors' UniverSeg checkpoint, or one of other widths",
            "timm:NAME[@file]": "vit_*, deit*, DINOv2, DINOv3 and swin_* of timm, weights from the hub or a file",
            "hf:ORG/NAME[@dir]": "ViT, DINO and DINOv2 checkpoints of transformers",
            "random:...": "any of them with random weights, for tests: random:timm:NAME?seed=0",
        },
    )


def _said_of(part: type) -> str:
    """The first sentence of a part's docstring, or of its file's where it only points there."""
    own, file = (" ".join((doc or "").split()) for doc in (part.__doc__, sys.modules[part.__module__].__doc__))
    return (file if own.startswith("See the top") else own).partition(". ")[0].rstrip(".")
