"""Commands that pass adapters on: verify, publish, pull, sign, search, export-peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .shared import BackboneOption, Directory, app, console


@app.command()
def verify(
    adapter: Directory,
    backbone: BackboneOption = None,
    key: Annotated[
        str | None, typer.Option(help="public key (PEM file or 64 hex digits) that must have signed it")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub adapter")] = None,
) -> None:
    """Check an adapter: schema, tensors, fingerprint, probe, peft form, signature. Exit code 1 when an item fails."""
    from ..adapters.hub import fetch
    from ..adapters.verify import passed
    from ..adapters.verify import verify as check

    directory = Path(adapter) if Path(adapter).is_dir() else fetch(adapter, revision=revision)
    verdicts = check(directory, backbone=backbone, key=key)
    mark = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[dim]--[/]"}
    table = Table("item", "", "what was found", box=None, padding=(0, 2, 0, 0))
    for v in verdicts:
        table.add_row(v.item, mark[v.ok], escape(v.said))
    console.print(table)
    if not passed(verdicts):
        raise typer.Exit(1)


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(help="a saved adapter")],
    target: Annotated[str, typer.Argument(help="USER/NAME on the Hub, or file:DIR/OWNER/NAME")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="visibility of a new hub repository")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch to publish to")] = None,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
    share_images: Annotated[
        bool, typer.Option("--share-images", help="publish even what holds or shows images")
    ] = False,
) -> None:
    """Publish a saved adapter to the Hub or to a folder that a lab shares."""
    from ..adapters.hub import publish as send

    console.print(
        f"published: {escape(send(directory, target, private=private, revision=revision, message=message, share_images=share_images))}",
        soft_wrap=True,
    )


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="USER/NAME on the Hub, or file:DIR/OWNER/NAME")],
    out: Annotated[Path, typer.Option(help="directory that the adapter replaces")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Copy an adapter into a directory, checked in full."""
    from ..adapters.hub import pull as get

    console.print(f"pulled to {get(source, out, revision=revision)}", soft_wrap=True)


@app.command()
def sign(
    directory: Annotated[Path, typer.Argument(help="a saved adapter")],
    key: Annotated[Path, typer.Option(help="private key (PEM); made, with its public half KEY.pub, if there is none")],
    repo: Annotated[str | None, typer.Option(help="hub id under which it will be published")] = None,
) -> None:
    """Sign an adapter's files (Ed25519)."""
    from ..adapters import signature

    if not key.exists():
        console.print(f"made a new key: {key} (keep it secret) and {signature.generate_key(key)[1]}", soft_wrap=True)
    console.print(f"signed; public key {signature.sign(directory, key, repo=repo)}", soft_wrap=True)


@app.command()
def search(
    registry: Annotated[Path, typer.Argument(help="the folder of a local registry")],
    modality: str | None = None,
    organ: str | None = None,
    backbone: Annotated[str | None, typer.Option(help="part of the id, or start of the fingerprint")] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="a class that it knows")] = None,
) -> None:
    """List the adapters of a local registry that fit."""
    from ..adapters.local_registry import search as find

    table = Table("adapter", "classes", "backbone", "bytes", box=None, padding=(0, 2, 0, 0))
    for e in find(registry, modality=modality, organ=organ, backbone=backbone, class_name=class_name):
        table.add_row(e.id, ", ".join(e.classes), e.backbone, f"{e.bytes:,}")
    console.print(table)


@app.command("export-peft")
def export_peft(
    directory: Annotated[Path, typer.Argument(help="a saved adapter")], backbone: BackboneOption = None
) -> None:
    """Add the plain peft form to an adapter whose parts allow it, checked against plain peft."""
    from ..adapters.peft import export_peft as export
    from ..adapters.peft import statement
    from ..adapters.store import read_adapter
    from ..backbones import load_backbone

    adapter = read_adapter(directory)
    frozen = load_backbone(backbone or adapter.backbone.id, image_size=adapter.preprocessing.size)
    for line in statement(adapter, export(adapter, frozen, directory)):
        console.print(escape(line), soft_wrap=True)
