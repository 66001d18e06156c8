"""Commands that run adapters: demo, predict, soup, ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import BadCall
from .shared import Adapters, BackboneOption, DeviceOption, Directory, app, console, rounded, show_facts


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where adapters and pictures go")] = Path("demo"),
    shots: int = 8,
    steps: int = 150,
) -> None:
    """Learn two tasks from a handful of drawn images on one frozen backbone, and swap between them."""
    from ..recipes.demo import run_demo

    run_demo(out, shots=shots, steps=steps, console=console)


@app.command()
def predict(
    adapter: Directory,
    images: Annotated[list[Path], typer.Argument(help="image files, or volumes")],
    out: Annotated[Path, typer.Option(help="where masks and overlays go")],
    box: Annotated[
        list[str] | None, typer.Option(help="x0,y0,x1,y1 in pixels, for promptable adapters; one for each object")
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="x,y in pixels on the object, or x,y,0 beside it; several make one question"),
    ] = None,
    group: Annotated[str | None, typer.Option(help="the images' sub-group, for adapters that know some")] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub adapter")] = None,
    frame: Annotated[int | None, typer.Option(help="which volume of a 4D file, from 0")] = None,
    transduce: Annotated[
        int, typer.Option(min=0, help="fit the adapter to each volume for so many steps, under the size it expects")
    ] = 0,
) -> None:
    """Masks (PNG, in each image's own size) and overlays; for a classifier a table and `predictions.json`.

    Volumes (NIfTI, or the folder of a DICOM series): labels as .nii.gz on the volume's own grid, and slices to look at.
    """
    from ..training.model import open_model
    from ..training.predict import predict_files
    from ..training.predict_volumes import predict_volume_files, takes_volumes

    host, found = open_model(adapter, backbone=backbone, device=device, revision=revision)
    prompts = _prompts(box, point, group)
    if takes_volumes(found, prompts):
        lines = predict_volume_files(host, images, out, frame=frame, fitting=transduce)
    elif transduce:
        raise BadCall("--transduce fits an adapter of volumes to each of them; this one is for pictures, leave it away")
    else:
        lines = predict_files(host, images, out, prompts)
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    if found.backbone.random:
        console.print("[yellow]the backbone has random weights: these results mean nothing[/]")


def _prompts(boxes: list[str] | None, points: list[str] | None, group: str | None) -> dict[str, Any] | None:
    """The prompts of a command line, for `Host.predict`; None where none is given."""
    found: dict[str, Any] = {}
    if boxes:
        found["boxes"] = [_floats(text, (4,), "--box wants x0,y0,x1,y1 in pixels") for text in boxes]
    if points:
        read = [_floats(text, (2, 3), "--point wants x,y or x,y,0 in pixels") for text in points]
        found |= {"points": [p[:2] for p in read], "labels": [p[2] if len(p) == 3 else 1 for p in read]}
    if group is not None:
        found["group"] = group
    return found or None


def _floats(text: str, counts: tuple[int, ...], wanted: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in counts:
        raise BadCall(f"{wanted}, got {text!r}")
    return found


@app.command()
def soup(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="directory that the soup replaces")],
    rank: Annotated[int | None, typer.Option(help="cut LoRA to this rank; the error is told")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="only those that together score best on --data")] = False,
    data: Annotated[Path | None, typer.Option(help="data folder that --greedy chooses by")] = None,
    split: Annotated[str, typer.Option(help="the split of --data")] = "val",
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None, typer.Option(help="storage type (default: the members')")
    ] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Average adapters of one backbone and one task into a single one (LoRA: the mean of the products, exactly)."""
    from ..adapters import Host
    from ..adapters.soup import soup as mixed
    from ..adapters.store import save_adapter
    from ..training.greedy_soup import greedy_soup, score_on
    from ..training.model import NAME, open_together, stored_dtype
    from ..training.preview import phantom_preview

    if greedy != (data is not None):
        raise BadCall("--greedy chooses by the images of --data; give both, or neither")
    host, members = open_together(adapters, backbone=backbone, device=device)
    stored = dtype or stored_dtype(adapters)
    facts: dict[str, Any] = {}
    if data is not None:
        dataset = _own_data(next(iter(members.values())), data)
        found = greedy_soup(members, score_on(host.backbone, dataset, split, dtype=stored), rank=rank)
        made, facts["score"] = found.soup, f"{found.score:.3f} on {dataset.name} ({split}), by which it was chosen"
        table = Table("tried in this order", "alone", "soup with it", "", box=None, padding=(0, 2, 0, 0))
        for t in found.tried:
            table.add_row(escape(t.name), f"{t.own:.3f}", f"{t.together:.3f}", "kept" if t.kept else "left out")
        console.print(table)
    else:
        made = mixed(members, rank=rank)
    alone = Host(host.backbone)
    alone.add(made.adapter, NAME)
    pictures = {"preview.png": phantom_preview(alone, NAME)} if made.adapter.task.kind == "segment" else {}
    save_adapter(made.adapter, out, dtype=stored, backbone=host.backbone, extra_files=pictures)
    facts |= {"members": len(made.adapter.provenance["members"]), "trainable": made.adapter.trainable, "out": out}
    if made.errors:
        worst = max(made.errors, key=lambda site: made.errors[site])
        facts["error of the cut"] = f"{made.errors[worst]:.2%} of the averaged product at {worst}, the worst site"
    show_facts(f"soup for {host.backbone.spec.title}: done", facts)


@app.command()
def ensemble(
    adapters: Adapters,
    data: Annotated[Path | None, typer.Option(help="data folder: score the members and the ensemble")] = None,
    split: Annotated[str, typer.Option(help="the split of --data")] = "test",
    image: Annotated[Path | None, typer.Option(help="an image file: write its mask to --out")] = None,
    out: Annotated[Path | None, typer.Option(help="the mask of --image, a .png")] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Let adapters of one backbone answer together: the mean of their probabilities, over one frozen prefix."""
    from ..adapters.ensemble import Ensemble
    from ..images import write_mask
    from ..training.evaluate import evaluate as score
    from ..training.model import open_together

    if (data is None) == (image is None):
        raise BadCall("give either --data, to score, or --image and --out, for a mask")
    host, members = open_together(adapters, backbone=backbone, device=device)
    together = Ensemble(host, adapters)
    console.print(escape(f"{len(adapters)} adapters on {host.backbone.spec.title}"), soft_wrap=True)
    if data is not None:
        dataset = _own_data(next(iter(members.values())), data)
        for title, names in [*((name, name) for name in adapters), ("ensemble", adapters)]:
            found = score(host, names, dataset, split)
            figures = rounded([found.get("dice", found.get("accuracy")), *found["interval"]])
            console.print(escape(f"{figures}  {title}"), soft_wrap=True)
        return
    if out is None and together.task.kind == "segment":
        raise BadCall("say where the mask goes: --out MASK.png")
    answer = together.predict(str(image))
    if out is None or together.task.kind == "classify":
        show_facts(str(image), {name: rounded(p) for name, p in answer.items()})
        return
    write_mask(out, answer)
    console.print(f"mask written to {escape(str(out))}", soft_wrap=True)


def _own_data(adapter: Any, data: Path) -> Any:
    """A data folder with the classes and the label set that `adapter` was trained on."""
    from ..training.data import load_dataset

    label_set = "label" if adapter.task.kind == "classify" else adapter.provenance.get("labels", "mask")
    return load_dataset(data, labels=label_set, classes=list(adapter.task.classes))
