"""`medgraft evaluate`: adapters, and promptable backbones as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import BadCall
from .shared import BackboneOption, DeviceOption, app, names_in, rounded, show_facts


@app.command()
def evaluate(
    adapter: Annotated[
        str, typer.Argument(help="a directory, file:DIR/OWNER/NAME or a hub id; or zero_shot, for --backbone as it is")
    ],
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
    pictures: Annotated[
        Path | None, typer.Option(help="volumes: slices of every case, a plot by case and a table by organ go there")
    ] = None,
    prompts: Annotated[
        Literal["box", "point", "clicks", "grid"],
        typer.Option(help="promptable: made from the truth; clicks counts them, grid (zero_shot) asks everywhere"),
    ] = "box",
    corruptions: Annotated[
        str | None, typer.Option(help="score worse pictures too, severity 1 to 5: all, or names, comma separated")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub adapter")] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="take another backbone's adapter all the same")
    ] = False,
) -> None:
    """Score an adapter on a data folder: Dice and IoU with intervals, or accuracy, balanced accuracy and AUC."""
    import torch

    from ..adapters.volume_task import VolumePreprocessing
    from ..training.clicks import interactive_scores
    from ..training.data import load_dataset
    from ..training.evaluate import evaluate as score
    from ..training.model import NAME, open_model
    from ..training.slices import slices_of
    from ..training.volume_data import volumes_of
    from ..training.volume_report import case_pictures, write_summary

    worse = _corruptions(corruptions, prompts)
    if adapter == "zero_shot":
        if record or pictures is not None or task == "classify":
            raise BadCall("zero_shot segments pictures and keeps nothing; leave --record, --pictures and --task away")
        _zero_shot(backbone, data, split, classes, labels, device, prompts, worse, json_file)
        return
    host, found = open_model(
        adapter, backbone=backbone, device=device, revision=revision, allow_mismatch=allow_mismatch
    )
    kind = found.task.kind
    if task is not None and task != kind:
        raise BadCall(f"--task {task} was asked for, this adapter is for {kind}; leave --task away")
    label_set = "label" if kind == "classify" else labels or found.provenance.get("labels", "mask")
    chosen = classes.split(",") if classes else list(found.task.classes)
    dataset = load_dataset(data, labels=label_set, classes=chosen)
    if isinstance(found.preprocessing, VolumePreprocessing):
        dataset = volumes_of(dataset)
    elif dataset.dims == 3 and "axis" in found.provenance:
        dataset = slices_of(dataset, found.provenance["axis"])
    each = None if pictures is None else case_pictures(dataset, pictures)
    where = next(host.backbone.parameters()).device.type
    with torch.autocast(where, torch.bfloat16, enabled=precision == "bf16"):
        if prompts == "clicks":
            result = interactive_scores(host, NAME, dataset, split)
        elif prompts == "grid":
            raise BadCall("--prompts grid is for zero_shot; an adapter is asked by box, point or clicks")
        else:
            told: Literal["box", "point"] = prompts
            result = score(host, NAME, dataset, split, each=each, prompts=told)
            result |= _worse(lambda d: score(host, NAME, d, split, prompts=told), dataset, worse)
    if pictures is not None:
        write_summary(result, pictures)
    if record:
        from ..training.evaluate import record_score

        record_score(Path(adapter), result)
    _scores(f"{found.backbone.id}{' (random weights)' if found.backbone.random else ''}", result, json_file)


def _zero_shot(
    backbone: str | None,
    data: Path,
    split: str,
    classes: str | None,
    labels: str | None,
    device: str,
    prompts: Literal["box", "point", "clicks", "grid"],
    corruptions: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """`evaluate zero_shot`: a promptable backbone with no adapter."""
    from ..backbones import load_backbone
    from ..training.clicks import interactive_scores
    from ..training.data import load_dataset
    from ..training.model import choose_device
    from ..training.zero_shot import NAME, zero_shot, zero_shot_host

    if backbone is None:
        raise BadCall("zero_shot scores a backbone as it is; name one, such as --backbone medgraft:starter-sam")
    frozen = load_backbone(backbone).to(choose_device(device))
    dataset = load_dataset(data, labels=labels or "mask", classes=names_in(classes))
    if prompts == "clicks":
        result = interactive_scores(zero_shot_host(frozen), NAME, dataset, split)  # type: ignore[arg-type]
    else:
        asking: Literal["box", "point", "grid"] = prompts
        result = zero_shot(frozen, dataset, split, prompts=asking)  # type: ignore[arg-type]
        result |= _worse(lambda d: zero_shot(frozen, d, split, prompts=asking), dataset, corruptions)  # type: ignore[arg-type]
    _scores(frozen.spec.title, result, json_file)  # type: ignore[union-attr]


def _corruptions(asked: str | None, prompts: str) -> tuple[str, ...]:
    """The corruptions that a command line names."""
    from ..training.corruptions import CORRUPTIONS, check_names

    if asked is not None and prompts == "clicks":
        raise BadCall("--corruptions measures Dice under --prompts box or point; clicks are counted on plain pictures")
    names = tuple(CORRUPTIONS) if asked == "all" else names_in(asked) or ()
    check_names(names)
    return names


def _worse(score: Callable[[Any], dict[str, Any]], dataset: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Under `corruptions`, the main score with each corruption at severity 1 to 5; empty where none was asked for."""
    from ..training.corruptions import corruption_scores

    def main_score(worse: Any) -> float:
        found = score(worse)
        return float(found["dice"] if "dice" in found else found["accuracy"])

    return {"corruptions": corruption_scores(main_score, dataset, names)} if names else {}


def _scores(title: str, result: dict[str, Any], json_file: Path | None) -> None:
    """Print a result, and write all of it where a file is named."""
    if json_file is not None:
        from ..adapters.files import write_text

        write_text(json_file, json.dumps(result, indent=1) + "\n")
    shown = {k: v for k, v in result.items() if k not in ("per_image", "classes", "slice_classes", "corruptions")}
    shown |= {f"dice of {c}": f"{v['mean']:.3f}" for c, v in result.get("classes", {}).items() if v["mean"] is not None}
    shown |= {f"under {name}": found for name, found in result.get("corruptions", {}).items()}
    show_facts(title, {k: rounded(v) for k, v in shown.items()})
