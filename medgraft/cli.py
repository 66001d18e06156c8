"""The command line. Each command is a few lines over a function that can be called without it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from .errors import BadCall, MedgraftError, unknown

app = typer.Typer(
    help="Small trained parts grafted onto large frozen vision models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Directory = Annotated[str, typer.Argument(help="an adapter: a directory, file:DIR/OWNER/NAME or a hub id")]
Adapters = Annotated[list[str], typer.Argument(help="adapters: directories, file:DIR/OWNER/NAME or hub ids")]
BackboneOption = Annotated[
    str | None, typer.Option(help="a backbone id, where the adapter's own cannot be found under its name")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


def main() -> None:
    """Run the command line; an error that a person can mend is printed as one, not as a traceback."""
    _register_recipes()
    try:
        app()
    except MedgraftError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _facts(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(_escape(key), _escape(shown))
    console.print(table)


# adapt: one sub-command a recipe, made from its signature.

adapt_app = typer.Typer(help="Train an adapter on a few labelled images.", no_args_is_help=True)


class _Recipes(typer.core.TyperGroup):
    """Says what a recipe that does not exist might have been."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("recipe", args[0], self.commands)
        return super().resolve_command(ctx, args)


def _register_recipes() -> None:
    from .recipes import RECIPES

    if adapt_app.registered_commands:  # `main` was called before in this process
        return
    for recipe in RECIPES.values():
        adapt_app.command(recipe.name, help=recipe.program.__doc__)(_command(recipe))
    app.add_typer(adapt_app, name="adapt", cls=_Recipes)


def _parameters(recipe: Any, without: tuple[str, ...] = ()) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The parameters of `Run`, but those named in `without`, and those of the recipe, for typer to read."""
    from .recipes import Run

    hints = get_type_hints(Run)
    shared = []
    for f in fields(Run):
        if f.name in without:
            continue
        default = recipe.defaults.get(f.name, f.default)
        required = default is MISSING
        kind = str | None if f.name == "classes" else hints[f.name]
        names = ("--" + f.name.replace("_", "-"),)
        wanted = Annotated[kind, typer.Option(*names, help=_HELP.get(f.name))]  # type: ignore[valid-type]
        shared.append(_parameter(f.name, wanted, inspect.Parameter.empty if required else default))
    own_hints = get_type_hints(recipe.program)
    own = [
        _parameter(p.name, own_hints[p.name], p.default)
        for p in inspect.signature(recipe.program).parameters.values()
        if p.name != "run"
    ]
    return shared, own


def _command(recipe: Any) -> Callable[..., None]:
    """A function whose parameters are those of `Run` and of the recipe, for typer to read."""
    from .recipes import Run

    shared, own = _parameters(recipe)

    def command(**options: Any) -> None:
        mine = {p.name: options.pop(p.name) for p in own}
        if options.get("classes"):
            options["classes"] = tuple(c.strip() for c in options["classes"].split(","))
        result = recipe.program(Run(**options), **mine)
        _facts(f"{recipe.name}: done", result)

    command.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*shared, *own]}
    return command


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


_HELP = {
    "data": "data folder: dataset.json, images/ + masks/, or class folders",
    "out": "directory that the adapter replaces",
    "backbone": "backbone id",
    "image_size": "pixels a side (default: the backbone's own)",
    "task": "segment or classify",
    "classes": "only these classes, comma separated",
    "labels": "label set: mask, mask_NAME",
    "axis": "read volumes slice by slice across: sagittal, coronal, axial",
    "shots": "training items in all (segment) or for each class (classify)",
    "steps": "optimiser steps",
    "batch": "images a step",
    "augment": "none, a fixed bank of views, or fresh ones",
    "views": "views in the bank",
    "crop": "cut off the dark border around a picture, here and in every later prediction",
    "blur": "largest blur among the augmentations, in pixels",
    "colour": "largest gain of a colour among the augmentations, 0 to 1",
    "cache": "frozen prefix: memory, off, or a directory",
    "mix": "FuseStyle: blend the feature styles of batch mates while training: none, random, dot, cosine",
    "mix_stage": "stage after which styles are blended (default: the cached one, or the first)",
    "average": "save the average of the weights along training: none, swa (last quarter), ema",
    "dtype": "storage type of the saved tensors",
    "precision": "bf16 runs the forward pass under autocast",
    "resume": "go on from the state that an interrupted run left",
    "quiet": "no progress bar",
    "license": "licence of the adapter, for its card",
    "modality": "for the card, such as CT",
    "organ": "for the card, such as liver",
}


# Using adapters


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where adapters and pictures go")] = Path("demo"),
    shots: int = 8,
    steps: int = 150,
) -> None:
    """Learn two tasks from a handful of drawn images on one frozen backbone, and swap between them."""
    from .recipes.demo import run_demo

    run_demo(out, shots=shots, steps=steps, console=console)


@app.command()
def evaluate(
    adapter: Directory,
    data: Annotated[Path, typer.Option(help="data folder")],
    split: str = "test",
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure there")] = None,
    task: Annotated[Literal["segment", "classify"] | None, typer.Option(help="must be the adapter's own")] = None,
    classes: Annotated[str | None, typer.Option(help="comma separated; default: the adapter's own")] = None,
    labels: Annotated[str | None, typer.Option(help="label set; default: the one it was trained on")] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 runs under autocast")] = "fp32",
    record: Annotated[
        bool, typer.Option("--record", help="keep the score in the adapter's own file, for its card")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub adapter")] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="take another backbone's adapter all the same")
    ] = False,
) -> None:
    """Score an adapter on a data folder: Dice and IoU with intervals, or accuracy, balanced accuracy and AUC."""
    import torch

    from .training.data import load_dataset
    from .training.evaluate import evaluate as score
    from .training.model import NAME, open_model
    from .training.slices import slices_of

    host, found = open_model(
        adapter, backbone=backbone, device=device, revision=revision, allow_mismatch=allow_mismatch
    )
    kind = found.task.kind
    if task is not None and task != kind:
        raise BadCall(f"--task {task} was asked for, this adapter is for {kind}; leave --task away")
    label_set = "label" if kind == "classify" else labels or found.provenance.get("labels", "mask")
    chosen = classes.split(",") if classes else list(found.task.classes)
    dataset = load_dataset(data, labels=label_set, classes=chosen)
    if dataset.dims == 3 and "axis" in found.provenance:
        dataset = slices_of(dataset, found.provenance["axis"])
    where = next(host.backbone.parameters()).device.type
    with torch.autocast(where, torch.bfloat16, enabled=precision == "bf16"):
        result = score(host, NAME, dataset, split)
    if json_file is not None:
        from .adapters.files import write_text

        write_text(json_file, json.dumps(result, indent=1) + "\n")
    if record:
        from .training.evaluate import record_score

        record_score(Path(adapter), result)
    shown = {k: v for k, v in result.items() if k not in ("per_image", "classes", "slice_classes")}
    shown |= {f"dice of {c}": f"{v['mean']:.3f}" for c, v in result.get("classes", {}).items() if v["mean"] is not None}
    _facts(
        f"{found.backbone.id}{' (random weights)' if found.backbone.random else ''}",
        {k: _round(v) for k, v in shown.items()},
    )


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "[" + ", ".join(str(_round(v)) for v in value) + "]" if isinstance(value, list) else value


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def matrix(
    context: typer.Context,
    data: Annotated[list[Path], typer.Option(help="data folders (one with --by)")],
    recipe: Annotated[str, typer.Option(help="how to train; its options follow (medgraft adapt RECIPE --help)")],
    out: Annotated[Path, typer.Option(help="where cells, models and tables go; an interrupted matrix goes on there")],
    by: Annotated[str | None, typer.Option(help="divide one folder by this item key: domain")] = None,
    train: Annotated[list[str] | None, typer.Option(help="rows such as a+b; default: singles, pairs, all")] = None,
    seeds: Annotated[int, typer.Option(help="seeds 0, 1, ... of every row", min=1)] = 1,
    classes: Annotated[str | None, typer.Option(help="only these classes, comma separated")] = None,
    labels: Annotated[str, typer.Option(help="label set: mask, mask_NAME")] = "mask",
) -> None:
    """Train on every combination of data sets (or of one set's domains) and score each on every test set."""
    from .recipes import find_recipe
    from .recipes.grid import trainer
    from .training.matrix import Matrix, combinations_of, sources_of
    from .training.matrix_report import score_table, write_matrix

    shared, own = _parameters(
        find_recipe(recipe), without=("data", "out", "task", "seed", "classes", "labels", "resume")
    )
    chosen = _parsed(context.args, [*shared, *own])
    folders = [*data, *chosen.pop("more")]
    sources = sources_of(folders, by=by, labels=labels, classes=_names(classes))
    settings = {"recipe": recipe, **{k: v for k, v in chosen.items() if k not in ("cache", "quiet")}}
    grid = Matrix(out, sources, settings, said=lambda line: console.print(_escape(line), soft_wrap=True))
    chosen["quiet"] = True
    mine = {p.name: chosen.pop(p.name) for p in own}
    for seed in range(seeds):
        for members in combinations_of(list(sources), train or ()):
            grid.train(members, seed, trainer(recipe, {**chosen, "labels": labels}, mine))
    found = write_matrix(grid)
    for name in found["classes"]:
        console.print(
            _escape("\n".join([f"{name}: Dice / area under the precision-recall curve", *score_table(found, name)]))
        )


def _parsed(words: list[str], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """The options in `words`, and under "more" the words that belong to none."""
    more = Annotated[list[Path] | None, typer.Argument()]

    def grab(**options: Any) -> dict[str, Any]:
        return options

    whole = [_parameter("more", more, None), *parameters]
    grab.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
    grab.__annotations__ = {p.name: p.annotation for p in whole}
    small = typer.Typer(add_completion=False)
    small.command()(grab)
    found: dict[str, Any] = typer.main.get_command(small).main(
        words, prog_name="medgraft matrix", standalone_mode=False
    )
    return {**found, "more": found["more"] or []}


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",")) if text else None


@app.command()
def predict(
    adapter: Directory,
    images: Annotated[list[Path], typer.Argument(help="image files")],
    out: Annotated[Path, typer.Option(help="where masks and overlays go")],
    box: Annotated[str | None, typer.Option(help="x0,y0,x1,y1 in pixels, for promptable adapters")] = None,
    point: Annotated[str | None, typer.Option(help="x,y in pixels, for promptable adapters")] = None,
    backbone: BackboneOption = None,
    device: DeviceOption = "auto",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub adapter")] = None,
) -> None:
    """Masks (PNG, in each image's own size) and overlays; for a classifier a table and `predictions.json`."""
    from .training.model import open_model
    from .training.predict import predict_files

    if box or point:
        raise BadCall(
            "this adapter takes no prompts: no promptable backbone (SAM) is supported yet; leave --box and --point away"
        )
    host, found = open_model(adapter, backbone=backbone, device=device, revision=revision)
    for line in predict_files(host, images, out):
        console.print(_escape(line), soft_wrap=True)
    if found.backbone.random:
        console.print("[yellow]the backbone has random weights: these results mean nothing[/]")


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
    from .adapters import Host
    from .adapters.soup import soup as mixed
    from .adapters.store import save_adapter
    from .training.greedy_soup import greedy_soup, score_on
    from .training.model import NAME, open_together, stored_dtype
    from .training.preview import phantom_preview

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
            table.add_row(_escape(t.name), f"{t.own:.3f}", f"{t.together:.3f}", "kept" if t.kept else "left out")
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
    _facts(f"soup for {host.backbone.spec.title}: done", facts)


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
    from .adapters.ensemble import Ensemble
    from .images import write_mask
    from .training.evaluate import evaluate as score
    from .training.model import open_together

    if (data is None) == (image is None):
        raise BadCall("give either --data, to score, or --image and --out, for a mask")
    host, members = open_together(adapters, backbone=backbone, device=device)
    together = Ensemble(host, adapters)
    console.print(_escape(f"{len(adapters)} adapters on {host.backbone.spec.title}"), soft_wrap=True)
    if data is not None:
        dataset = _own_data(next(iter(members.values())), data)
        for title, names in [*((name, name) for name in adapters), ("ensemble", adapters)]:
            found = score(host, names, dataset, split)
            figures = _round([found.get("dice", found.get("accuracy")), *found["interval"]])
            console.print(_escape(f"{figures}  {title}"), soft_wrap=True)
        return
    if out is None and together.task.kind == "segment":
        raise BadCall("say where the mask goes: --out MASK.png")
    answer = together.predict(str(image))
    if out is None or together.task.kind == "classify":
        _facts(str(image), {name: _round(p) for name, p in answer.items()})
        return
    write_mask(out, answer)
    console.print(f"mask written to {_escape(str(out))}", soft_wrap=True)


def _own_data(adapter: Any, data: Path) -> Any:
    """A data folder with the classes and the label set that `adapter` was trained on."""
    from .training.data import load_dataset

    label_set = "label" if adapter.task.kind == "classify" else adapter.provenance.get("labels", "mask")
    return load_dataset(data, labels=label_set, classes=list(adapter.task.classes))


@app.command()
def explain(
    recipe_or_dir: Annotated[str, typer.Argument(help="a recipe, or an adapter directory")],
    backbone: BackboneOption = None,
    image_size: Annotated[int | None, typer.Option(help="pixels a side")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="list every site of the backbone")] = False,
) -> None:
    """What an adapter touches and costs: sites, parameters, bytes, memory, and whether it folds, mixes and exports to peft."""
    from .adapters.explain import explain as look
    from .backbones import load_backbone
    from .recipes import RECIPES
    from .recipes.dry import dry_adapter

    if recipe_or_dir in RECIPES:
        adapter, frozen = dry_adapter(recipe_or_dir, backbone=backbone, image_size=image_size)
    elif Path(recipe_or_dir).exists() or "/" in recipe_or_dir or ":" in recipe_or_dir:
        from .adapters.hub import load_adapter

        adapter = load_adapter(recipe_or_dir)
        frozen = load_backbone(backbone or adapter.backbone.id, image_size=image_size or adapter.preprocessing.size)
    else:
        raise unknown("recipe or directory", recipe_or_dir, RECIPES)
    facts = look(adapter, frozen)
    _facts(
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
    from .adapters.hub import fetch
    from .adapters.store import read_record
    from .training.network import is_network

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
        "image size": record["preprocessing"]["size"],
        "tensors": f"{record['tensors']['bytes']:,} bytes, {record['dtype']}",
    }
    rows |= {k: v for k, v in record["provenance"].items() if k != "settings"}
    for entry in record["evaluation"]:
        score = entry.get("dice", entry.get("accuracy"))
        rows[f"score on {entry.get('dataset')}"] = f"{score:.3f} {_round(entry.get('interval'))} (n = {entry.get('n')})"
    _facts(adapter, rows)


@app.command("list")
def list_all() -> None:
    """Recipes, parts and backbones."""
    from .adapters import PARTS
    from .recipes import RECIPES

    _facts("recipes", {name: r.summary for name, r in sorted(RECIPES.items())})
    _facts("parts", {name: _said_of(cls) for name, cls in sorted(PARTS.items())})
    _facts(
        "backbones",
        {
            "medgraft:starter-vit": "a small ViT that ships with the package (trained on drawn images)",
            "medgraft:starter-universeg": "a UniverSeg that ships with the package (trained on synthetic tasks)",
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


# Sharing adapters


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
    from .adapters.hub import fetch
    from .adapters.verify import passed
    from .adapters.verify import verify as check

    directory = Path(adapter) if Path(adapter).is_dir() else fetch(adapter, revision=revision)
    verdicts = check(directory, backbone=backbone, key=key)
    mark = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[dim]--[/]"}
    table = Table("item", "", "what was found", box=None, padding=(0, 2, 0, 0))
    for v in verdicts:
        table.add_row(v.item, mark[v.ok], _escape(v.said))
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
    from .adapters.hub import publish as send

    console.print(
        f"published: {_escape(send(directory, target, private=private, revision=revision, message=message, share_images=share_images))}",
        soft_wrap=True,
    )


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="USER/NAME on the Hub, or file:DIR/OWNER/NAME")],
    out: Annotated[Path, typer.Option(help="directory that the adapter replaces")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Copy an adapter into a directory, checked in full."""
    from .adapters.hub import pull as get

    console.print(f"pulled to {get(source, out, revision=revision)}", soft_wrap=True)


@app.command()
def sign(
    directory: Annotated[Path, typer.Argument(help="a saved adapter")],
    key: Annotated[Path, typer.Option(help="private key (PEM); made, with its public half KEY.pub, if there is none")],
    repo: Annotated[str | None, typer.Option(help="hub id under which it will be published")] = None,
) -> None:
    """Sign an adapter's files (Ed25519)."""
    from .adapters import signature

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
    from .adapters.local_registry import search as find

    table = Table("adapter", "classes", "backbone", "bytes", box=None, padding=(0, 2, 0, 0))
    for e in find(registry, modality=modality, organ=organ, backbone=backbone, class_name=class_name):
        table.add_row(e.id, ", ".join(e.classes), e.backbone, f"{e.bytes:,}")
    console.print(table)


@app.command("export-peft")
def export_peft(
    directory: Annotated[Path, typer.Argument(help="a saved adapter")], backbone: BackboneOption = None
) -> None:
    """Add the plain peft form to an adapter whose parts allow it, checked against plain peft."""
    from .adapters.peft import export_peft as export
    from .adapters.peft import statement
    from .adapters.store import read_adapter
    from .backbones import load_backbone

    adapter = read_adapter(directory)
    frozen = load_backbone(backbone or adapter.backbone.id, image_size=adapter.preprocessing.size)
    for line in statement(adapter, export(adapter, frozen, directory)):
        console.print(_escape(line), soft_wrap=True)
