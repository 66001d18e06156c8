"""`medgraft adapt` (one sub-command a recipe, made from its signature) and `medgraft matrix`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from ..errors import unknown
from .shared import app, console, names_in, show_facts

adapt_app = typer.Typer(help="Train an adapter on a few labelled images.", no_args_is_help=True)


class _Recipes(typer.core.TyperGroup):
    """Says what a recipe that does not exist might have been."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("recipe", args[0], self.commands)
        return super().resolve_command(ctx, args)


def register_recipes() -> None:
    """Make the sub-commands of `adapt`; once in a process."""
    from ..recipes import RECIPES

    if adapt_app.registered_commands:  # `main` was called before in this process
        return
    for recipe in RECIPES.values():
        adapt_app.command(recipe.name, help=recipe.program.__doc__)(_command(recipe))
    app.add_typer(adapt_app, name="adapt", cls=_Recipes)


def _parameters(recipe: Any, without: tuple[str, ...] = ()) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The parameters of `Run`, but those named in `without`, and those of the recipe, for typer to read."""
    from ..recipes import Run

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
    from ..recipes import Run

    shared, own = _parameters(recipe)

    def command(**options: Any) -> None:
        mine = {p.name: options.pop(p.name) for p in own}
        if options.get("classes"):
            options["classes"] = tuple(c.strip() for c in options["classes"].split(","))
        result = recipe.program(Run(**options), **mine)
        show_facts(f"{recipe.name}: done", result)

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
    "patches": "patches of each volume in a step (backbones of 3D; image_size is their side)",
    "spacing": "millimetres that volumes are resampled to (default: as the backbone was trained)",
    "window": "intensities of volumes, LOW,HIGH (default: as the backbone was trained)",
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
    from ..recipes import find_recipe
    from ..recipes.grid import trainer
    from ..training.matrix import Matrix, combinations_of, sources_of
    from ..training.matrix_report import score_table, write_matrix

    shared, own = _parameters(
        find_recipe(recipe), without=("data", "out", "task", "seed", "classes", "labels", "resume")
    )
    chosen = _parsed(context.args, [*shared, *own])
    folders = [*data, *chosen.pop("more")]
    sources = sources_of(folders, by=by, labels=labels, classes=names_in(classes))
    settings = {"recipe": recipe, **{k: v for k, v in chosen.items() if k not in ("cache", "quiet")}}
    grid = Matrix(out, sources, settings, said=lambda line: console.print(escape(line), soft_wrap=True))
    chosen["quiet"] = True
    mine = {p.name: chosen.pop(p.name) for p in own}
    for seed in range(seeds):
        for members in combinations_of(list(sources), train or ()):
            grid.train(members, seed, trainer(recipe, {**chosen, "labels": labels}, mine))
    found = write_matrix(grid)
    for name in found["classes"]:
        console.print(
            escape("\n".join([f"{name}: Dice / area under the precision-recall curve", *score_table(found, name)]))
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
