"""How many clicks a SAM needs, and clicks that move themselves. `python -m benchmarks.sam_interactive [--only PACK] [--threads 1]`.

Clicks: the frozen SAM; its own decoder tuned with simulated clicks (`sam_interactive --decoder own`, decoder-only tuning); the same with
the refine decoder (`sam_interactive`). Same images, steps, loss and clicks for all. NoC@t is the mean number of
clicks until the IoU is t (20 where it is never reached), on test images in their own sizes, the embedding cached.

SAMPOT: a scorer is trained on the training images, then the click at each test object's centroid is moved (`sampot`), at the network's
input size. Which images' true Dice rose and fell, and whether a score ever fell.

Finished cells are kept, so that an interrupted run goes on. With a network the same command works on `--backbone hf:facebook/sam-vit-base`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters import EvolvedPrompt, Host
from medgraft.backbones import load_backbone
from medgraft.backbones.prompts import Prompts
from medgraft.recipes import Run, find_recipe
from medgraft.training.batches import Batches
from medgraft.training.clicks import MOST, TARGETS, interactive_scores
from medgraft.training.data import Dataset, load_dataset
from medgraft.training.metrics import bootstrap_interval, paired_difference
from medgraft.training.model import NAME, open_model
from medgraft.training.sampot import soft_dice
from medgraft.training.zero_shot import NAME as FROZEN
from medgraft.training.zero_shot import zero_shot_host

PACKS = {"wbc": "nucleus", "hc18_fetal_head": "fetal_head", "dsb2018_nuclei": "nucleus"}
ROUND = ("wbc", "hc18_fetal_head")  # one object an image, so that its centroid is a click
SHOTS, STEPS, BATCH, SIDE, IMAGES = 32, 120, 4, 128, 20
OWN = "own decoder tuned"
ROWS: dict[str, dict[str, Any] | None] = {
    "frozen": None,
    OWN: {"decoder": "own"},
    "refine decoder": {},
}


def pack_of(name: str) -> Dataset:
    """A pack with its one class, and no more than `IMAGES` test items, evenly spread over the split."""
    data = load_dataset(data_root() / name, classes=(PACKS[name],))
    test = data.split("test")
    chosen = {test[i].id for i in np.linspace(0, len(test) - 1, min(IMAGES, len(test))).round().astype(int)}
    return replace(data, items=tuple(i for i in data.items if i.split != "test" or i.id in chosen))


def a_run(pack: str, out: Path, backbone: str, seed: int, **more: Any) -> Run:
    """What the rows share."""
    shared = {"shots": SHOTS, "image_size": SIDE, "batch": BATCH, "views": 4, "quiet": True, "dtype": "float32"}
    return Run(data_root() / pack, out, backbone=backbone, seed=seed, classes=(PACKS[pack],), **{**shared, **more})


def clicks_cell(pack: str, row: str, seed: int, backbone: str, steps: int, out: Path) -> dict[str, Any]:
    """Train one row and click through the test images."""
    options, data = ROWS[row], pack_of(pack)
    if options is None:
        host, name, said = zero_shot_host(load_backbone(backbone, image_size=SIDE)), FROZEN, {}  # type: ignore[arg-type]
    else:
        said = find_recipe("sam_interactive").program(a_run(pack, out, backbone, seed, steps=steps), **options)
        (host, _), name = open_model(str(out), device="cpu"), NAME
    found = interactive_scores(host, name, data)
    return {**found, "training seconds": said.get("seconds", 0.0), "trainable": said.get("trainable", 0)}


def sampot_cell(pack: str, seed: int, backbone: str, steps: int, out: Path) -> dict[str, Any]:
    """Train a scorer, move the centroid's click of each test image, compare true Dice before and after."""
    said = find_recipe("sampot").program(a_run(pack, out, backbone, seed, steps=steps, augment="none"))
    host, adapter = open_model(str(out), device="cpu")
    part = adapter.parts["head"]
    assert isinstance(part, EvolvedPrompt)
    data, spec = pack_of(pack), host.backbone.spec
    batches = Batches(data, data.split("test"), size=SIDE, mean=spec.mean, std=spec.std, batch_size=1, fit=spec.fit)
    rows = [moved(host, part, b.images, b.targets > 0) for b in batches.once() if (b.targets > 0).any()]
    return {"images": rows, "scorer correlation on its own masks": said["scorer correlation"]}


@torch.no_grad()
def moved(host: Host, part: EvolvedPrompt, x: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """One image: the score, the true Dice and SAM's own estimate at the start, and the first two at the end."""
    ys, xs = torch.nonzero(truth[0], as_tuple=True)
    start = torch.stack([xs.float().mean(), ys.float().mean()])[None, None, None]
    prompts = Prompts(points=start, labels=torch.ones(1, 1, 1, dtype=torch.long))
    features = replace(host.backbone(x), prompts=prompts)
    before, estimate = features.decoder(features.maps[-1], prompts)
    found = part.evolve(features, x)
    at = [functional.interpolate(m, truth.shape[1:], mode="bilinear") for m in (before[:, :, 0], found.masks)]
    dices = [soft_dice(m[:, 0].sigmoid(), truth).item() for m in at]
    return {
        "start": {"score": found.start.item(), "dice": dices[0], "estimate": estimate.item()},
        "end": {"score": found.score.item(), "dice": dices[1]},
        "pixels": (found.points - start).norm().item(),
    }


def main() -> None:
    """Fill the cells, then write `results/sam_interactive.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=PACKS, help="one pack; others' cells are taken as they are")
    parser.add_argument("--backbone", default="medgraft:starter-sam")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scorer-steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="sam_interactive", help="of the result files")
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    cells: dict[str, Any] = {}
    for pack in PACKS:
        kept = RESULTS / f".{args.name}.{pack}.{args.steps}.json"
        own: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if args.only in (None, pack):
            fill(args, pack, own, kept)
        cells |= own
    if args.cells_only:
        return
    report(args, cells)
    for pack in PACKS:
        (RESULTS / f".{args.name}.{pack}.{args.steps}.json").unlink(missing_ok=True)


def fill(args: argparse.Namespace, pack: str, own: dict[str, Any], kept: Path) -> None:
    """Every cell of one pack that is not there yet."""
    wanted = [f"{pack}|{row}|{seed}" for row in ROWS for seed in range(args.seeds) if ROWS[row] is not None or not seed]
    wanted += [f"{pack}|sampot|{seed}" for seed in range(args.seeds) if pack in ROUND]
    for key in wanted:
        if key in own:
            continue
        _, row, seed = key.split("|")
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "it"
            if row == "sampot":
                own[key] = sampot_cell(pack, int(seed), args.backbone, args.scorer_steps, out)
            else:
                own[key] = clicks_cell(pack, row, int(seed), args.backbone, args.steps, out)
        own[key]["cpu"] = time.process_time() - began
        kept.write_text(json.dumps(own), encoding="utf-8")
        print(key, f"{own[key]['cpu']:.0f} s of CPU", flush=True)


def report(args: argparse.Namespace, cells: Mapping[str, Any]) -> None:
    """The two tables of every pack that has all of its cells."""
    record = {
        **facts(),
        "backbone": args.backbone,
        "steps": args.steps,
        "seeds": list(range(args.seeds)),
        "cells": cells,
    }
    text = ["# Clicks", ""]
    text += [
        f"`{args.backbone}`, {SIDE} px, {SHOTS} labelled images, {args.steps} steps of batch {BATCH}, learning rate 5e-4 with the paper's "
        f"drops, encoder frozen; {IMAGES} test images, at most {MOST} clicks, {args.seeds} seeds. One object is all foreground of an image, as in the paper.",
        "",
    ]
    for pack in PACKS:
        if f"{pack}|{OWN}|{args.seeds - 1}" in cells:
            text += [f"## {pack}", "", clicks_table(pack, cells, args.seeds), ""]
    text += ["## SAMPOT: a click at the centroid, moved", "", sampot_table(cells, args), ""]
    total = sum(c["cpu"] for c in cells.values()) / 60
    text.append(
        "NoC and NoF are means over images and seeds, with 95 % intervals over images; SPC is the median on a machine that did other "
        f"things too. {footer(record)} All cells: {total:.1f} minutes of CPU."
    )
    write(args.name, record, "\n".join(text))


def noc(cell: Mapping[str, Any], target: float) -> np.ndarray:
    """Clicks to `target` by image, `MOST` where it was never reached."""
    ious = [row["ious"] for row in cell["per_image"]]
    return np.array([next((k for k, v in enumerate(own, 1) if v >= target), MOST) for own in ious], dtype=float)


def clicks_table(pack: str, cells: Mapping[str, Any], seeds: int) -> str:
    """NoC, NoF and SPC by row, and NoC@85 against the tuned decoder of SAM's own, image by image."""
    base = np.mean([noc(cells[f"{pack}|{OWN}|{s}"], 0.85) for s in range(seeds)], 0)
    rows = []
    for row in ROWS:
        found = [cells[f"{pack}|{row}|{s}"] for s in range(seeds) if f"{pack}|{row}|{s}" in cells]
        clicks = {t: np.mean([noc(c, t) for c in found], 0) for t in TARGETS}
        bounds = {t: bootstrap_interval(clicks[t]) for t in TARGETS}
        gap = paired_difference(clicks[0.85], base)
        rows.append(
            [
                row,
                *(f"{clicks[t].mean():.2f} [{bounds[t][0]:.2f}, {bounds[t][1]:.2f}]" for t in TARGETS),
                "" if row == OWN else f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]",
                *(f"{np.mean([c[f'NoF@{100 * t:.0f}'] for c in found]):.2f}" for t in TARGETS[1:]),
                *(f"{np.mean([c['iou_by_click'][k] for c in found]):.3f}" for k in (0, 4)),
                f"{1000 * np.median([c['SPC'] for c in found]):.0f}",
                f"{found[0]['trainable']:,}",
                f"{np.mean([c['training seconds'] for c in found]):.0f}",
            ]
        )
    header = [
        "what",
        "NoC@80",
        "NoC@85",
        "NoC@90",
        f"NoC@85 minus {OWN}",
        "NoF@85",
        "NoF@90",
        "IoU, 1 click",
        "5 clicks",
    ]
    return table([*header, "ms a click", "trained numbers", "training, s"], rows)


def sampot_table(cells: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Images whose true Dice rose, fell or stayed, by pack over all seeds."""
    rows = []
    for pack in ROUND:
        found = [cells[k] for s in range(args.seeds) if (k := f"{pack}|sampot|{s}") in cells]
        if not found:
            continue
        images = [i for c in found for i in c["images"]]
        gain = np.array([[i["end"]["dice"] - i["start"]["dice"] for i in c["images"]] for c in found])
        low, high = bootstrap_interval(gain.mean(0))
        start = {k: np.array([i["start"][k] for i in images]) for k in ("score", "dice", "estimate")}
        rows.append(
            [
                pack,
                len(images),
                sum(i["end"]["score"] < i["start"]["score"] for i in images),
                f"{(gain > 0).sum()} / {(gain < 0).sum()} / {(gain == 0).sum()}",
                f"{start['dice'].mean():.3f}",
                f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{gain.min():+.3f}",
                f"{np.corrcoef(start['score'], start['dice'])[0, 1]:.2f}",
                f"{np.corrcoef(start['estimate'], start['dice'])[0, 1]:.2f}",
                f"{np.mean([i['pixels'] for i in images]):.1f}",
            ]
        )
    header = [
        "pack",
        "images x seeds",
        "scores that fell",
        "Dice rose / fell / same",
        "Dice at the start",
        "change [95 % over images]",
    ]
    more = ["worst change", "score ~ Dice", "SAM's estimate ~ Dice", "pixels moved"]
    return table([*header, *more], rows)


if __name__ == "__main__":
    main()
