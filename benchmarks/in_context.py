"""Segmentation in context against the number of labelled images. `python -m benchmarks.in_context [--full] [--only PACK]`.

(a) `universeg` (nothing trained) at 1, 2, 5, 10 and 16 shots, beside two baselines on the same images: the label of the support image
nearest by features of `medgraft:starter-vit`, copied; and `linear_probe` on the starter ViT. At 16 shots also: five draws of 8 averaged,
a mirrored copy averaged, the nearest 8, 8 by slice index (volumes), and 16 chosen by k-centre among all training images.
(b) `universeg_tune` (LoRA) beside the plain adapter at 5 and 16 shots.

Short form: 24 test images a pack, 4 test volumes at 64 px, the rest at 128 px, bf16 autocast, 3 seeds of the draw (the rows "at 16 shots": one). --full: all test items
at 128 px. Dice in the images' own sizes; for volumes by case (3D) and by slice that shows a class (2D). Finished cells are kept, so that an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters.store import read_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import Dataset, Item, load_dataset
from medgraft.training.in_context import InContext
from medgraft.training.metrics import bootstrap_interval, dice, image_means, paired_difference
from medgraft.training.model import NAME, open_model
from medgraft.training.slices import Slice, Slices, slices_of, volume_scores
from medgraft.training.support import choose, features_of, nearest

SHOTS = (1, 2, 5, 10, 16)
MOST, FEW = 16, 8
IMAGES, VOLUMES = 24, 4
TUNE_SHOTS, TUNE_STEPS, TUNE_OTHERS = (5, 16), 100, 8
PROBE_STEPS = 150
CURVES = ("universeg", "nearest label", "linear_probe")
AT_MOST: dict[str, dict[str, Any]] = {
    "5 draws of 8": {"select": "uniform", "shots": FEW, "draws": 5},
    "mirrored too": {"flips": "horizontal"},
    "nearest 8": {"select": "nearest", "shots": FEW},
    "8 by slice index": {"select": "slice_index", "shots": FEW},
    "16 by k-centre": {},
}


@dataclass(frozen=True)
class Pack:
    """What is asked of a pack. `size` in the short form."""

    folder: str
    classes: tuple[str, ...] | None = None
    size: int = 128
    tuned: bool = False


PACKS = {
    "hc18_fetal_head": Pack("hc18_fetal_head", tuned=True),
    "wbc": Pack("wbc", ("nucleus",)),
    "cxr_anatomy": Pack("cxr_anatomy", ("right_lung", "left_lung")),
    "hippocampus_msd": Pack("hippocampus_msd", size=64, tuned=True),
}


class Bench:
    """One pack: its data, backbones and test items."""

    def __init__(self, pack: Pack, weights: str, full: bool, folder: Path) -> None:
        self.pack, self.weights, self.folder = pack, weights, folder
        self.size = 128 if full else pack.size
        dataset = load_dataset(data_root() / pack.folder, classes=pack.classes)
        self.dataset: Dataset = slices_of(dataset) if dataset.dims == 3 else dataset
        self.images, self.volumes = (None, None) if full else (IMAGES, VOLUMES)

    @cached_property
    def network(self) -> Backbone:
        """The network that segments in context."""
        return load_backbone(self.weights, image_size=self.size)

    @cached_property
    def encoder(self) -> Backbone:
        """The ViT that tells which images are alike."""
        return load_backbone("medgraft:starter-vit")

    @cached_property
    def looks(self) -> dict[str, torch.Tensor]:
        """Features of every training and test image, by item."""
        items = [*self.dataset.split("train"), *self.test]
        return {i.id: f for i, f in zip(items, features_of(self.encoder, map(self.dataset.image, items)), strict=True)}

    @cached_property
    def test(self) -> list[Item]:
        """The images, or the slices of the volumes, that are asked for."""
        if isinstance(self.dataset, Slices):
            return [s for slices in list(self.dataset.volumes("test").values())[: self.volumes] for s in slices]
        return self.dataset.split("test")[: self.images]

    def run(self, shots: int, seed: int, **more: Any) -> Run:
        """The options of a run, with a new directory."""
        options = {
            "image_size": self.size, "classes": self.pack.classes, "axis": "axial", "shots": shots, "seed": seed,
            "precision": "bf16", "quiet": True, **more,
        }  # fmt: skip
        return Run(data_root() / self.pack.folder, self.folder / "out", **options)

    def scored(self, predict: Callable[[Item], np.ndarray]) -> dict[str, Any]:
        """Dice by case or image of class indices (H, W) in the image's own size."""
        began = time.perf_counter()
        found: dict[str, Any] = {}
        with torch.autocast("cpu", torch.bfloat16):
            if isinstance(self.dataset, Slices):
                volumes: dict[str, list[Slice]] = {}
                for item in self.test:
                    assert isinstance(item, Slice)
                    volumes.setdefault(item.volume, []).append(item)
                said = volume_scores(self.dataset, volumes, predict)
                rows = [[np.nan if d is None else d for d in e["dice"].values()] for e in said["per_image"]]
                found = {
                    "slice_dice": said["slice_dice"],
                    "slice_per_image": [e["slice_dice"] for e in said["per_image"]],
                }
            else:
                count = len(self.dataset.classes)
                rows = [
                    np.where(self.dataset.annotated(i), dice(predict(i), self.dataset.mask(i), count), np.nan)
                    for i in self.test
                ]
        means = image_means(np.array(rows))
        seconds = (time.perf_counter() - began) / len(self.test)
        return {"dice": float(np.nanmean(means)), "per_image": means.tolist(), "seconds_a_query": seconds, **found}

    # Rows

    def universeg(self, shots: int, seed: int, row: str = "universeg") -> dict[str, Any]:
        """An adapter made by the recipe, saved, read again; asked as `AT_MOST` says."""
        run = self.run(shots, seed, backbone=self.weights)
        find_recipe("universeg").program(run, select="k_centre" if row == "16 by k-centre" else "uniform")
        numbers = [i.z for i in run.support if isinstance(i, Slice)] or None
        asked = InContext(
            self.network, read_adapter(run.out), seed=seed, slices=numbers, encoder=self.encoder, **AT_MOST.get(row, {})
        )
        return self.scored(lambda i: asked.indices(self.dataset.image(i), i.z if isinstance(i, Slice) else None))

    def tuned(self, shots: int, seed: int) -> dict[str, Any]:
        """`universeg_tune`, read again."""
        run = self.run(shots, seed, backbone=self.weights, steps=TUNE_STEPS, batch=1, augment="fresh")
        began = time.perf_counter()
        find_recipe("universeg_tune").program(run, others=TUNE_OTHERS)
        seconds = time.perf_counter() - began
        asked = InContext(self.network, read_adapter(run.out))
        return {**self.scored(lambda i: asked.indices(self.dataset.image(i))), "seconds_to_tune": seconds}

    def nearest_label(self, shots: int, seed: int) -> dict[str, Any]:
        """The label of the most similar support image, resized to the query."""
        items = choose(self.dataset, shots, seed)
        known = torch.stack([self.looks[i.id] for i in items])

        def copied(item: Item) -> np.ndarray:
            label = self.dataset.mask(items[nearest(known, self.looks[item.id], 1)[0]])
            height, width = self.dataset.mask(item).shape
            return np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))

        return self.scored(copied)

    def linear_probe(self, shots: int, seed: int) -> dict[str, Any]:
        """A linear head on the starter ViT, trained on the same images."""
        run = self.run(shots, seed, steps=PROBE_STEPS, batch=8, augment="none", image_size=128)
        run.learn_from(choose(self.dataset, shots, seed))
        find_recipe("linear_probe").program(run)
        host, _ = open_model(str(run.out))
        return self.scored(lambda i: host.predict(self.dataset.image(i), NAME))


def wanted(bench: Bench, seeds: int, full: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The cells of a pack, by key."""
    makers: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
        "universeg": bench.universeg,
        "nearest label": bench.nearest_label,
        "linear_probe": bench.linear_probe,
    }
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in range(seeds):
        for shots in SHOTS:
            for row in CURVES:
                cells[f"{row}|{shots}|{seed}"] = partial(makers[row], shots, seed)
        for row in rows_at_most(bench.dataset) if full or seed == 0 else ():
            cells[f"{row}|{MOST}|{seed}"] = partial(bench.universeg, MOST, seed, row)
        for shots in TUNE_SHOTS if bench.pack.tuned else ():
            cells[f"universeg_tune|{shots}|{seed}"] = partial(bench.tuned, shots, seed)
    return cells


def rows_at_most(dataset: Dataset) -> list[str]:
    return [row for row in AT_MOST if isinstance(dataset, Slices) or row != "8 by slice index"]


def main() -> None:
    """Fill the cells, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="all test items, 128 px")
    parser.add_argument("--only", help="one pack; others' cells are taken as they are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="medgraft:starter-universeg", help="backbone id")
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop, for a pack run beside others")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "in_context_full" if args.full else "in_context"
    RESULTS.mkdir(exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for pack in PACKS:
        file = RESULTS / f".{name}.{pack}.json"
        found[pack] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if args.only not in (None, pack):
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(PACKS[pack], args.weights, args.full, Path(folder))
            for key, make in wanted(bench, args.seeds, args.full).items():
                if key in found[pack]:
                    continue
                began = time.perf_counter()
                cell = make()
                found[pack][key] = {**cell, "seconds": time.perf_counter() - began, "n": len(cell["per_image"])}
                print(pack, key, f"{cell['dice']:.4f}", f"{found[pack][key]['seconds']:.0f} s", flush=True)
                file.write_text(json.dumps(found[pack]))
    if args.cells_only:
        return
    complete = {pack: cells for pack, cells in found.items() if all(f"universeg|{s}|0" in cells for s in SHOTS)}
    report(name, complete, args)


# Report


def by_image(
    cells: Mapping[str, Any], row: str, shots: int, seeds: Sequence[int], what: str = "per_image"
) -> np.ndarray:
    """Dice by case or image, means over seeds."""
    scores = [[np.nan if v is None else v for v in cells[f"{row}|{shots}|{s}"][what]] for s in seeds]
    return np.mean(np.array(scores, dtype=float), 0)


def cell_text(cells: Mapping[str, Any], row: str, shots: int, seeds: Sequence[int]) -> str:
    """Mean with its interval over images; the 2D Dice of volumes below."""
    scores = by_image(cells, row, shots, seeds)
    low, high = bootstrap_interval(scores)
    flat = [cells[f"{row}|{shots}|{s}"].get("slice_dice") for s in seeds]
    second = "" if flat[0] is None else f"; 2D {np.mean([f or 0.0 for f in flat]):.3f}"
    return f"{np.nanmean(scores):.3f} [{low:.3f}, {high:.3f}]{second}"


def report(name: str, found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Curves, a table for each pack, and the comparisons at equal shots."""
    seeds = list(range(args.seeds))
    seconds = sum(c["seconds"] for cells in found.values() for c in cells.values())
    weights = load_backbone(args.weights).spec.title
    record = {**facts(), "weights": weights, "seeds": seeds, "seconds": seconds, "cells": found}
    setting = (
        "all test items, 128 px"
        if args.full
        else f"{IMAGES} test images or {VOLUMES} test volumes a pack, 128 px (volumes 64 px)"
    )
    text = ["# Segmentation in context", ""]
    text += [
        f"`{weights}`, nothing trained, against the number of labelled images; {setting}, bf16 autocast, seeds {seeds} of the draw "
        "of the labelled images, the same images for every row. Dice on the test split in the images' own sizes, mean over classes, with "
        "95 % bootstrap intervals over images (volumes: cases) of the means over seeds. Volumes: 3D Dice of whole cases, 2D of the slices "
        "that show a class; a shot is a slice.",
        "",
        f"![Dice against shots]({name}.png)",
        "",
    ]
    for pack, cells in found.items():
        if any(f"{row}|{s}|{k}" not in cells for row in CURVES for s in SHOTS for k in seeds):
            continue
        dataset = load_dataset(data_root() / PACKS[pack].folder, classes=PACKS[pack].classes)
        n = cells[f"universeg|1|{seeds[0]}"]["n"]
        text += [f"## {pack}: {', '.join(dataset.classes.values())} (n = {n})", ""]
        rows = [[row, *(cell_text(cells, row, s, seeds) for s in SHOTS)] for row in CURVES]
        if PACKS[pack].tuned:
            rows.append(
                [
                    "universeg_tune",
                    *(cell_text(cells, "universeg_tune", s, seeds) if s in TUNE_SHOTS else "" for s in SHOTS),
                ]
            )
        text += [table(["row", *(f"{s} shot{'s' * (s > 1)}" for s in SHOTS)], rows), ""]
        compared = [(row, MOST) for row in AT_MOST if f"{row}|{MOST}|0" in cells]
        compared += [(row, s) for row in CURVES[1:] for s in SHOTS]
        compared += [("universeg_tune", s) for s in TUNE_SHOTS if PACKS[pack].tuned]
        lines = []
        for row, s in compared:
            drawn = [k for k in seeds if f"{row}|{s}|{k}" in cells]
            d = paired_difference(by_image(cells, row, s, drawn), by_image(cells, "universeg", s, drawn))
            own = [cells[f"{row}|{s}|{k}"] for k in drawn]
            lines.append(
                [
                    row,
                    s,
                    cell_text(cells, row, s, drawn),
                    " ".join(f"{c['dice']:.3f}" for c in own),
                    f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                    f"{np.median([c['seconds_a_query'] for c in own]):.2f}",
                ]
            )
        header = [
            "row",
            "shots",
            "Dice",
            "by seed",
            "minus universeg at equal shots and seeds [95 % over images]",
            "seconds a query",
        ]
        text += [table(header, lines), ""]
    text.append(f"{footer(record)} All cells: {seconds / 60:.0f} minutes.")
    write(name, record, "\n".join(text))
    plot(RESULTS / f"{name}.png", found, seeds)


def plot(file: Path, found: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """A panel a pack: Dice against shots, bands over images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from medgraft.training.report import colour_of

    figure = Figure(figsize=(3.6 * len(found), 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for n, (pack, cells) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), n)
        for k, row in enumerate((*CURVES, "universeg_tune"), start=1):
            shots = [s for s in SHOTS if all(f"{row}|{s}|{seed}" in cells for seed in seeds)]
            if not shots:
                continue
            scores = [by_image(cells, row, s, seeds) for s in shots]
            bands = np.array([bootstrap_interval(s) for s in scores])
            colour = [c / 255 for c in colour_of(k)]
            axes.plot(shots, [np.nanmean(s) for s in scores], marker="o", markersize=3, color=colour, label=row)
            axes.fill_between(shots, bands[:, 0], bands[:, 1], color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(SHOTS, [str(s) for s in SHOTS])
        axes.minorticks_off()
        axes.set_xlabel("labelled slices" if pack == "hippocampus_msd" else "labelled images")
        axes.set_ylabel("3D Dice" if pack == "hippocampus_msd" else "Dice")
        axes.set_title(pack, fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if n == 1:
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(file)


if __name__ == "__main__":
    main()
