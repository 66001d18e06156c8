"""Label dropout against the shortcut of partial labels. `python -m benchmarks.label_dropout [--only STUDY] [--full]`.

One class is hidden at one site while training and kept in its test truth. Rows: all labels (the bound), the standard loss
(unannotated is background), and the study's loss with label dropout p; p = 0 is the loss without (bit for bit, says a test).
Dice by class and site, image by image, in the images' own sizes, of the saved bits.

phantom : two drawn sites of which one has stripes; U-Net from scratch, 64 px, adaptive loss
no_cue  : the same without the stripes, as a control
wbc     : two laboratories, cytoplasm hidden at one; LoRA on the last two blocks of medgraft:starter-vit, 128 px, adaptive loss
retina  : three cameras, vein hidden at les_av; chasedb1 only has vessel = artery + vein + crossing; U-Net from scratch, 256 px,
          marginal loss (vessels are thin: cross-entropy alone finds none in so few steps), every camera seen equally often

A cell is a line of results/.label_dropout.STUDY.jsonl and is not done again, so an interrupted run goes on, and two studies can
be filled side by side (--cells-only --threads 1).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters import Host
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.metrics import dice, paired_difference
from medgraft.training.model import NAME, open_model
from medgraft.training.two_sites import write_two_sites

FEW, FINE = (0.0, 0.1, 0.5, 1.0), tuple(n / 10 for n in range(11))
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by number of seeds


@dataclass(frozen=True)
class Study:
    """One data set: what is hidden where, and how every cell is trained; `run` and `own` are options of `Run` and of the recipe."""

    title: str
    hidden: tuple[str, str]  # class, site
    run: Mapping[str, Any]
    own: Mapping[str, Any]
    loss: str = "adaptive"
    grid: tuple[float, ...] = FEW
    others: tuple[str, ...] = ()  # further losses, without dropout
    cue: float | None = None  # of a phantom
    vessel: bool = False  # score the union of all classes against the label set `mask`, too

    def rows(self, full: bool) -> dict[str, dict[str, Any]]:
        """Options of the recipe by row."""
        hide = {"hide": "@".join(self.hidden)}
        rows: dict[str, dict[str, Any]] = {"all labels": {"loss": self.loss, "p": 0.0}}
        standard = "standard_dice" if self.loss == "marginal" else "standard"  # with Dice beside what has Dice
        rows |= {"standard": {"loss": standard, "p": 0.0, **hide}}
        rows |= {f"{loss}, no dropout": {"loss": loss, "p": 0.0, **hide} for loss in self.others}
        grid = FINE if full and self.cue != 0 else self.grid
        return rows | {f"{self.loss}, p = {p:g}": {"loss": self.loss, "p": p, **hide} for p in grid}


SCRATCH = {"backbone": "random:unet:8-16-32-64", "cache": "off", "quiet": True}
DRAWN: dict[str, Any] = {"image_size": 64, "steps": 300, "batch": 8, "augment": "none", **SCRATCH}
UNET = {"network": "unet", "lr": 0.2}
STUDIES = {
    "phantom": Study("Two-site phantom", ("satellite", "site_b"), DRAWN, UNET, cue=1.0),
    "no_cue": Study(
        "Two-site phantom, no cue (control)", ("satellite", "site_b"), DRAWN, UNET, grid=(0.0, 0.5), cue=0.0
    ),
    "wbc": Study(
        "wbc: two laboratories",
        ("cytoplasm", "ds2_cellavision"),
        {"image_size": 128, "steps": 100, "batch": 8, "views": 2, "precision": "bf16", "quiet": True},
        {"late": 2},
        others=("bce", "marginal"),
    ),
    "retina": Study(
        "retina_vessels: three cameras",
        ("vein", "les_av"),
        {"image_size": 256, "steps": 300, "batch": 3, "views": 2, "colour": 0.0, "blur": 0.0, "precision": "bf16"}
        | {"labels": "mask_av", **SCRATCH},
        {**UNET, "balance": "domain", "coarse": "mask:vessel=artery+vein+crossing_or_uncertain"},
        loss="marginal",
        grid=(0.0, 0.5),  # the short form's; --full has them all
        vessel=True,
    ),
}


def cell(study: Study, options: Mapping[str, Any], seed: int, data: Path, work: Path, full: bool) -> dict[str, Any]:
    """Train one cell and score it: Dice of each test image by site and class."""
    shared: dict[str, Any] = {**find_recipe("label_dropout").defaults, **study.run, "seed": seed}
    if "cache" not in study.run:
        shared["cache"] = str(work / "prefixes")  # the rows of a seed share their frozen features
    if full:
        shared["steps"] *= 4
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as out:
        run = Run(data=data, out=Path(out) / "model", **shared)
        find_recipe("label_dropout").program(run, **study.own, **options)
        host, _ = open_model(str(Path(out) / "model"), device="cpu")
    dataset = load_dataset(data, labels=run.labels)
    found: dict[str, dict[str, list[float]]] = {}
    for image in evaluate(host, NAME, dataset)["per_image"]:
        for name, value in image["dice"].items():
            own = found.setdefault(image["domain"], {}).setdefault(name, [])
            own.append(float("nan") if value is None else value)
    if study.vessel:
        for site, values in _unions(host, data).items():
            found.setdefault(site, {})["vessel"] = values
    return {"dice": found, "seconds": time.perf_counter() - began}


def _unions(host: Host, data: Path) -> dict[str, list[float]]:
    """Dice of any class against the coarser label set, by site."""
    dataset, found = load_dataset(data), {}
    for item in dataset.split("test"):
        drawn = (host.predict(dataset.image(item), NAME) > 0).astype(np.int64)
        found.setdefault(str(item.domain), []).append(float(dice(drawn, dataset.mask(item), 1)[0]))
    return found


def fill(name: str, args: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """The cells of one study by row and seed; what is in its file is not done again."""
    study, file = STUDIES[name], RESULTS / f".{args.name}.{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    cells = {(line["row"], line["seed"]): line for line in map(_line, lines) if line}
    with tempfile.TemporaryDirectory() as folder:
        data = data_root() / {"retina": "retina_vessels"}.get(name, name)
        if study.cue is not None:
            data = write_two_sites(Path(folder) / "data", train=24, test=12, cue=study.cue).parent
        for row, options in study.rows(args.full).items():
            for seed in range(args.seeds):
                if (row, seed) in cells:
                    continue
                made = {"row": row, "seed": seed, **cell(study, options, seed, data, Path(folder), args.full)}
                with file.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(made) + "\n")
                cells[row, seed] = made
                told, site = study.hidden
                print(f"{name}, {row}, seed {seed}: {np.nanmean(made['dice'][site][told]):.3f}", end="", flush=True)
                print(f" ({told} at {site}), {made['seconds']:.0f} s", flush=True)
    return cells


def _line(text: str) -> dict[str, Any] | None:
    """A cell, or None for a line that an interruption cut short."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return None


def scores(
    cells: Mapping[tuple[str, int], Mapping[str, Any]], row: str, site: str, name: str, seeds: range
) -> np.ndarray:
    """Dice (seeds, images)."""
    return np.array([cells[row, seed]["dice"][site][name] for seed in seeds], dtype=float)


def report(studies: Mapping[str, dict[tuple[str, int], dict[str, Any]]], args: argparse.Namespace) -> None:
    """Tables, differences, the plot."""
    seeds = range(args.seeds)
    seconds = sum(c["seconds"] for cells in studies.values() for c in cells.values())
    record: dict[str, Any] = {**facts(), "seeds": list(seeds), "seconds": seconds, "studies": {}}
    text = ["# Label dropout", ""]
    text += [
        "One class is hidden at one site in training; its test truth stays. Dice on the test split, mean over images and "
        f"seeds {list(seeds)} ± 95 % over seeds (Student); the hidden class at its site in bold.",
        "",
    ]
    if any(STUDIES[name].cue for name in studies):
        text += [
            "The phantom's cue was chosen so that the network sees it, on seed 0: with a change of colour, contrast and grain, which "
            "instance norm mostly removes, the adaptive loss missed little, and with half the stripes less than with the whole.",
            "",
        ]
    for name, cells in studies.items():
        study = STUDIES[name]
        told, where = study.hidden
        first = next(iter(cells.values()))["dice"]
        columns = [(site, c) for site in sorted(first) for c in first[site]]
        lines = []
        for row in study.rows(args.full):
            shown = []
            for site, c in columns:
                by_seed = np.nanmean(scores(cells, row, site, c, seeds), 1)
                half = (
                    STUDENT.get(len(by_seed), np.nan) * by_seed.std(ddof=1) / np.sqrt(len(by_seed))
                    if args.seeds > 1
                    else np.nan
                )
                value = f"{by_seed.mean():.3f} ± {half:.3f}"
                shown.append(f"**{value}**" if (site, c) == (where, told) else value)
            lines.append([row, *shown, f"{np.median([cells[row, s]['seconds'] for s in seeds]):.0f}"])
        header = ["row", *(f"{c} at {site}" for site, c in columns), "seconds"]
        options = {**study.run, **study.own} | ({} if study.cue is None else {"cue": study.cue})
        options["steps"] *= 4 if args.full else 1
        text += [f"## {study.title}", "", f"{told} hidden at {where}; {_shown(options)}.", "", table(header, lines), ""]
        text += [*_gaps(study, cells, seeds), ""]
        record["studies"][name] = {"hidden": study.hidden, "options": options, "cells": list(cells.values())}
    text += [f"![{args.name}]({args.name}.png)", ""]
    text.append(f"{footer(record)} All cells: {seconds / 60:.0f} minutes, training and scoring.")
    write(args.name, record, "\n".join(text))
    plot(studies, seeds, RESULTS / f"{args.name}.png")


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items() if key not in ("quiet", "cache"))


def _gaps(study: Study, cells: Mapping[tuple[str, int], Mapping[str, Any]], seeds: range) -> list[str]:
    """What dropout adds to no dropout where the label was hidden, by seed and over images."""
    told, where = study.hidden
    base = scores(cells, f"{study.loss}, p = 0", where, told, seeds)
    lines = []
    for p in study.grid:
        if p == 0:
            continue
        found = scores(cells, f"{study.loss}, p = {p:g}", where, told, seeds)
        d = paired_difference(np.nanmean(found, 0), np.nanmean(base, 0))
        by_seed = np.nanmean(found, 1) - np.nanmean(base, 1)
        each = " ".join(f"{gap:+.3f}" for gap in by_seed)
        lines.append([f"{p:g}", f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", each, f"{by_seed.min():+.3f}"])
    header = [f"p against p = 0, {told} at {where}", "difference [95 % over images]", "by seed", "smallest"]
    return [table(header, lines)]


def plot(studies: Mapping[str, dict[tuple[str, int], dict[str, Any]]], seeds: range, path: Path) -> None:
    """Dice of the hidden class against p: at its site and at the others, with the bound and the standard loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(studies), 3.4), dpi=110, layout="constrained")
    for n, (name, cells) in enumerate(studies.items(), start=1):
        study = STUDIES[name]
        told, where = study.hidden
        ps = sorted(float(row.partition("p = ")[2]) for row, seed in cells if "p = " in row and seed == 0)
        axes = figure.add_subplot(1, len(studies), n)
        for site, colour in (
            (where, "C3"),
            *((s, "C0") for s in sorted(next(iter(cells.values()))["dice"]) if s != where),
        ):
            if told not in next(iter(cells.values()))["dice"][site]:
                continue
            found = [np.nanmean(scores(cells, f"{study.loss}, p = {p:g}", site, told, seeds), 1) for p in ps]
            spread = [f.std(ddof=1) if len(f) > 1 else 0.0 for f in found]
            axes.errorbar(ps, [f.mean() for f in found], spread, color=colour, marker="o", capsize=3, label=site)
        for row, style in (("all labels", "--"), ("standard", ":")):
            level = float(np.nanmean(scores(cells, row, where, told, seeds)))
            axes.axhline(level, color="C3", linestyle=style, linewidth=1, label=f"{row}, {where}")
        axes.set(title=study.title, xlabel="p", ylabel=f"Dice, {told}", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Fill the studies, then write the page of all that are complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=STUDIES, action="append", help="fill this study alone (may be repeated)")
    parser.add_argument("--full", action="store_true", help="p in steps of 0.1 and four times the steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop, for studies side by side")
    args = parser.parse_args()
    args.name = "label_dropout_full" if args.full else "label_dropout"
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    studies = {name: fill(name, args) for name in args.only or STUDIES}
    if not args.cells_only:
        report(studies, args)


if __name__ == "__main__":
    main()
