"""Many sources, partial labels: losses that skip what was not annotated, and label dropout against the shortcut that remains.

Source: label-dropout (arXiv 2403.07818). Its network is a U-Net trained from scratch by SGD with Nesterov momentum 0.9 and a
varying learning rate, for 500 epochs, on 256 pixels; `network="unet"` is that, with MONAI's network, a cosine and the run's own
steps and size. The default is an adapter on a frozen backbone, with AdamW. The paper's loss is cross-entropy ("adaptive").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ..adapters import Bottleneck, LoRA, Part, ScaleShift
from ..backbones import load_backbone
from ..errors import BadCall, BadData
from ..training.assemble import assemble, with_coarse
from ..training.batches import Balance
from ..training.data import Dataset, load_dataset
from ..training.fit import FitOptions
from ..training.label_dropout import LabelDropout, hide_labels, need_probability, partial_classes
from ..training.partial_losses import Name, PartialLoss
from .parameter_efficient import EPOCHS, Head
from .registry import recipe
from .run import Run

UNET = "random:unet:16-32-64-128"
KINDS = {"lora": LoRA, "bottleneck": Bottleneck, "ssf": ScaleShift}
LR = {"lora": 2e-3, "bottleneck": 1e-3, "ssf": 1e-3, "none": 1e-2, "unet": 5e-2}


@recipe("label_dropout", colour=0.1, blur=1.0)
def label_dropout(
    run: Run,
    *,
    network: Literal["adapter", "unet"] = "adapter",
    part: Literal["lora", "bottleneck", "ssf", "none"] = "lora",
    late: int = 0,
    head: Head = "linear",
    loss: Name = "adaptive",
    p: float = 0.5,
    hide: str = "",
    coarse: str = "",
    also: str = "",
    mapping: Path | None = None,
    balance: Balance = "none",
    lr: float | None = None,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """Partially labelled sources with label dropout, by an adapter or a U-Net from scratch.

    late: only the last blocks learn (0: all). hide: CLASS@SOURCE,... that training does not see. coarse: LABELS:CLASS=A+B takes in
    items that only have the coarser label set. also: more data folders, comma separated. mapping: a JSON file with harmonised class
    names, {"pack": {"left kidney": "kidney"}}. balance: see each source or domain equally often. p: of dropping a label.
    """
    need_probability(p)
    if part not in (*KINDS, "none") or network not in ("adapter", "unet"):
        raise BadCall(f"network is adapter or unet, part lora, bottleneck, ssf or none; got {network!r} and {part!r}")
    if run.task != "segment":
        raise BadCall("label_dropout segments; image labels are whole or absent, there is nothing partial about them")
    target = PartialLoss(loss)
    if loss in ("standard", "standard_dice") and p:
        raise BadCall("the standard loss would teach a dropped label as background; take p=0, or another loss")
    run.work_on(hide_labels(_together(run, also, coarse, mapping), hide))
    if network == "unet":
        _on_unet(run)
    dropout = LabelDropout(p, partial_classes(run.dataset, run.support), run.seed)
    partial = {"partial": True, "dropout": dropout, "balance": balance}

    run.seeded()
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps,
        lr=lr or LR["unet" if network == "unet" else part],
        weight_decay=0.0 if network == "unet" else weight_decay,
        schedule="cosine" if network == "unet" else "linear",
        warmup=min(20, steps // 10),
        optimiser="sgd" if network == "unet" else "adamw",
        seed=run.seed,
        precision=run.precision,
    )
    parts: dict[str, Part] = {part: _part(run, part, late)} if network == "adapter" and part != "none" else {}
    parts["head"] = run.head(head)
    settings = {"network": network, "part": part, "late": late, "head": head, "loss": loss, "p": p, "hide": hide}
    settings |= {"coarse": coarse, "also": also and len(also.split(",")), "balance": balance}
    whole = run.frozen.trainable_copy() if network == "unet" else None
    return run.train("label_dropout", parts, options, settings=settings, network=whole, partial=partial, loss=target)


def _together(run: Run, also: str, coarse: str, mapping: Path | None) -> Dataset:
    """The run's data, with the coarser label set and the other folders that were asked for."""
    if coarse:
        if also or mapping:
            raise BadCall("coarse labels are taken from one folder; with several, map a class to a list in the mapping")
        return with_coarse(run.dataset, coarse)
    if not also:
        if mapping is not None:
            raise BadCall("a mapping harmonises several data folders; name the others with also")
        return run.dataset
    folders = [run.data, *(Path(folder.strip()) for folder in also.split(","))]
    packs = [load_dataset(folder, labels=run.labels, seed=run.seed) for folder in folders]
    return assemble(packs, None if mapping is None else class_map(mapping), classes=run.classes)


def class_map(file: Path) -> dict[str, dict[str, Any]]:
    """Harmonised class names by pack, from a JSON file. Raises BadData."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as broken:
        raise BadData(f"{file} cannot be read as JSON ({broken})") from None
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise BadData(f'{file} is not of the form {{"pack": {{"class": "harmonised class"}}}}')
    for pack, own in found.items():
        for old, new in own.items():
            if (
                new is not None
                and not isinstance(new, str)
                and not (isinstance(new, list) and new and all(isinstance(name, str) for name in new))
            ):
                raise BadData(
                    f"{file}: {old!r} of {pack!r} is mapped to {new!r}; wanted a name, a list of names or null"
                )
    return found


def _on_unet(run: Run) -> None:
    """Put the U-Net in the place of the run's backbone; another U-Net that it names is kept."""
    if "unet:" not in run.backbone:
        run.__dict__["frozen"] = load_backbone(f"{UNET}?seed={run.seed}", image_size=run.image_size).to(run.where)


def _part(run: Run, part: str, late: int) -> Part:
    """The site part at its usual sites in the last `late` blocks: what lies before is frozen, and the prefix cache holds it."""
    backbone = run.frozen
    if not 0 <= late <= backbone.depth:
        raise BadCall(f"late is how many of the last blocks learn, up to {backbone.depth} (0: all); got {late}")
    kind: Any = KINDS[part]
    everywhere = kind.on(backbone, run.goal)
    if not late:
        return everywhere
    return kind.on(
        backbone, run.goal, targets=[n for n in everywhere.sites if backbone.sites[n].stage >= backbone.depth - late]
    )
