"""What adapts a small SAM, on real data. `python -m benchmarks.sam [--only PACK] [--backbone ID] [--threads 1]`.

Found without prompts: `sam_path`, `surgical_sam`, `samaug`, beside `sam_decoder --prompts none` (the decoder alone) and a U-Net from
scratch that is given the CPU time of `sam_path`. Asked by a box around each object of the truth: `cemb_sam` (sub-group: the item's
`domain`, where the pack has some), beside `sam_decoder --prompts box`.

32 labelled images, the same for every row of a seed, 128 px, encoders frozen and cached in all but `surgical_sam`. Each row's learning
rate is chosen on 24 validation images of `wbc` at seed 0, then kept for all packs. Dice of 24 test images in their own sizes. Finished
cells are kept, so that an interrupted run goes on. With a network the same command works on `--backbone hf:facebook/sam-vit-base`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters.auto_masks import Grid
from medgraft.adapters.store import TENSORS_NAME
from medgraft.backbones import load_backbone
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import Dataset, Item, load_dataset
from medgraft.training.metrics import bootstrap_interval, dice, paired_difference
from medgraft.training.model import NAME, open_model
from medgraft.training.prompting import prompts_of
from medgraft.training.samaug import share_with_masks

STARTER = "medgraft:starter-sam"
UNET = "random:unet:16-32-64-128"
SHOTS, STEPS, BATCH, SIDE, IMAGES = 32, 150, 8, 128, 24
CHOSEN_ON = "wbc"


@dataclass(frozen=True)
class Row:
    """A recipe and how it is run here. `against` is the row that it is compared with, `groups` whether it needs sub-groups."""

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (5e-4, 2e-3)
    against: str = "decoder alone"
    groups: bool = False


CLICKS = 12
MASKS: dict[str, Any] = {"points": CLICKS, "quality": 0.3, "stability": 0.6, "offset": 0.3}
"""What a mask of the starter SAM must reach to be a prior, chosen on validation images: the authors' thresholds are for a full-sized one."""
ROWS = {
    "decoder alone": Row("sam_decoder", {"prompts": "none"}, against=""),
    "sam_path": Row("sam_path", {"accumulate": 1}),
    "surgical_sam": Row("surgical_sam", run={"batch": 4, "augment": "bank"}),
    "samaug": Row("samaug", MASKS, {"augment": "none"}),
    "U-Net": Row("full_finetune", run={"backbone": UNET, "augment": "bank"}, rates=(1e-3, 5e-3)),
    "decoder alone, boxes": Row("sam_decoder", {"prompts": "box", "most": 4}, against=""),
    "cemb_sam": Row("cemb_sam", {"most": 4, "unknown": "mean"}, against="decoder alone, boxes", groups=True),
}
PACKS: dict[str, tuple[str, ...] | None] = {"wbc": ("nucleus",), "dsb2018_nuclei": None, "hc18_fetal_head": None}


class Bench:
    """One pack: its data and its rows. `full` takes every test image and four times the steps."""

    def __init__(self, pack: str, backbone: str, folder: Path, full: bool = False) -> None:
        self.pack, self.backbone, self.folder, self.full = pack, backbone, folder, full
        self.dataset: Dataset = load_dataset(data_root() / pack, classes=PACKS[pack])

    @property
    def rows(self) -> list[str]:
        """The rows that the pack can have."""
        domains = all(i.domain is not None for i in self.dataset.items)
        return [name for name, row in ROWS.items() if domains or not row.groups]

    def some(self, split: str) -> list[Item]:
        """`IMAGES` items, evenly spread."""
        items = self.dataset.split(split)
        count = len(items) if self.full else min(IMAGES, len(items))
        return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]

    def cell(self, name: str, seed: int, rate: float, cpu: float | None, split: str = "test") -> dict[str, Any]:
        """Train, save, read again, score. `cpu` seconds, where given, decide the steps."""
        row = ROWS[name]
        options = {**row.options, "lr": rate}
        if cpu is not None:
            probe = 4
            self.train(row, seed, options, steps=probe)  # the first calls are slow
            steps = max(10, round(cpu / (self.train(row, seed, options, steps=probe)["cpu"] / probe)))
            done = self.train(row, seed, options, steps=steps)
        else:
            done = self.train(row, seed, options)
        found = self.scored(split)
        if name == "samaug" and split == "test" and seed == 0:
            frozen = load_backbone(self.backbone, image_size=SIDE)
            grids = {"ours": Grid(CLICKS, 0.3, 0.6, 0.5, 0.3), "authors": Grid(points=CLICKS, quality=0.5)}
            shown = self.some(split)
            found["with_masks"] = {n: share_with_masks(frozen, self.dataset, shown, g) for n, g in grids.items()}
        return {**done, **found, "rate": rate}

    def train(self, row: Row, seed: int, options: Mapping[str, Any], steps: int | None = None) -> dict[str, Any]:
        """CPU seconds, steps, bytes."""
        more = {
            "backbone": self.backbone,
            "steps": STEPS * (4 if self.full else 1),
            "batch": BATCH,
            "augment": "bank",
            "views": 4,
            **row.run,
        }
        more |= {} if steps is None else {"steps": steps}
        shutil.rmtree(self.folder / "out", ignore_errors=True)  # an adapter does not replace a network
        run = Run(
            data_root() / self.pack, self.folder / "out", classes=PACKS[self.pack], image_size=SIDE, shots=SHOTS,
            seed=seed, quiet=True, **more,
        )  # fmt: skip
        began = time.process_time()
        done = find_recipe(row.recipe).program(run, **options)
        files = [f for f in run.out.iterdir() if f.name == TENSORS_NAME]
        return {
            "cpu": time.process_time() - began,
            "steps": done["steps"],
            "trainable": done["trainable"],
            "bytes": files[0].stat().st_size if files else done["bytes"],
        }

    def scored(self, split: str) -> dict[str, Any]:
        """Dice by image."""
        host, adapter = open_model(str(self.folder / "out"))
        scores = []
        for item in self.some(split):
            truth = self.dataset.mask(item)
            found = host.predict(self.dataset.image(item), NAME, prompts=prompts_of(adapter, truth, item))
            scores.append(float(dice(found, truth, 1)[0]))
        return {"dice": float(np.nanmean(scores)), "per_image": scores}


def rate_of(name: str, chosen: Mapping[str, Any]) -> float:
    """The learning rate of a row: the better one on the validation images."""
    tried = {rate: chosen[f"{name}|{rate}"]["dice"] for rate in ROWS[name].rates if f"{name}|{rate}" in chosen}
    return max(tried, key=lambda rate: tried[rate]) if tried else ROWS[name].rates[0]


def main() -> None:
    """Choose the rates, fill the cells, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--only", help="one pack, or one pack and row as wbc:sam_path; others' cells are taken as they are"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backbone", default=STARTER, help="any SAM")
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop")
    parser.add_argument("--full", action="store_true", help="every test image, four times the steps: results/sam_full")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    name_of = "sam_full" if args.full else "sam"
    frozen = load_backbone(args.backbone, image_size=SIDE)
    only_pack, _, only_row = (args.only or "").partition(":")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("rates", *PACKS):
            file = RESULTS / f".{name_of}.{part}.json"
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            found[part] = kept if kept.get("fingerprint") == frozen.spec.fingerprint else {}
            found[part]["fingerprint"] = frozen.spec.fingerprint  # cells of other weights do not count
            if only_pack not in ("", part) and not (part == "rates" and only_pack in PACKS):
                continue
            bench = Bench(CHOSEN_ON if part == "rates" else part, args.backbone, Path(folder), args.full)
            for name in bench.rows:
                if only_row not in ("", name):
                    continue
                fill(bench, part, name, found, args.seeds, file)
    if not args.cells_only:
        report(found, frozen.spec.title, args.seeds, name_of)


def fill(bench: Bench, part: str, name: str, found: Mapping[str, dict[str, Any]], seeds: int, file: Path) -> None:
    """The cells of a row: by rate on the validation images, or by seed on the test images."""
    cells = found[part]
    for which in ROWS[name].rates if part == "rates" else range(seeds):
        key = f"{name}|{which}"
        if key in cells:
            continue
        time_of = cells.get(f"sam_path|{which if part != 'rates' else ROWS['sam_path'].rates[0]}")
        cpu = time_of["cpu"] if name == "U-Net" and time_of else None
        if name == "U-Net" and cpu is None:
            continue  # its time is not known yet
        rate, seed, split = (which, 0, "val") if part == "rates" else (rate_of(name, found["rates"]), which, "test")
        began = time.process_time()
        cells[key] = bench.cell(name, int(seed), float(rate), cpu, split)
        cells[key]["seconds"] = time.process_time() - began
        print(part, key, f"{cells[key]['dice']:.4f}", f"{cells[key]['seconds']:.0f} CPU s", flush=True)
        file.write_text(json.dumps(cells), encoding="utf-8")


# Report


def by_image(cells: Mapping[str, Any], name: str, seeds: Sequence[int]) -> np.ndarray:
    """Dice by image, means over seeds."""
    return np.mean([cells[f"{name}|{s}"]["per_image"] for s in seeds], 0)


def report(found: Mapping[str, Mapping[str, Any]], weights: str, count: int, name_of: str) -> None:
    """One table a pack."""
    seeds = list(range(count))
    every = [c for cells in found.values() for c in cells.values() if isinstance(c, dict)]
    seconds = sum(c["seconds"] for c in every)
    record = {**facts(), "weights": weights, "seeds": seeds, "cpu_seconds": seconds, "cells": found}
    text = ["# Adapting a small SAM", ""]
    text += [
        f"`{weights}`, {SHOTS} labelled images (the same for every row of a seed), {SIDE} px, batches of {BATCH} ({ROWS['surgical_sam'].run['batch']} for "
        f"surgical_sam, whose encoder is trained and cannot be cached), seeds {seeds}. "
        f"Learning rates chosen on validation images of {CHOSEN_ON} at seed 0. Dice of {len(every[-1]['per_image'])} test images in their own sizes, means over "
        "seeds with 95 % bootstrap intervals over images. Papers' schedules are far longer, on far larger networks.",
        "",
    ]
    for pack in PACKS:
        cells = found[pack]
        names = [name for name in ROWS if all(f"{name}|{s}" in cells for s in seeds)]
        if not names:
            continue
        dataset = load_dataset(data_root() / pack, classes=PACKS[pack])
        text += [f"## {pack}: {', '.join(dataset.classes.values())}", ""]
        rows = []
        for name in names:
            scores, own = by_image(cells, name, seeds), [cells[f"{name}|{s}"] for s in seeds]
            low, high = bootstrap_interval(scores)
            against = ROWS[name].against
            d = paired_difference(scores, by_image(cells, against, seeds)) if against in names else None
            rows.append(
                [
                    name,
                    "box of the truth" if "box" in name or name == "cemb_sam" else "nothing",
                    f"{np.nanmean(scores):.3f} [{low:.3f}, {high:.3f}]",
                    " ".join(f"{c['dice']:.3f}" for c in own),
                    "" if d is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                    f"{own[0]['rate']:g}",
                    " ".join(dict.fromkeys(str(c["steps"]) for c in own)),
                    f"{np.median([c['cpu'] for c in own]):.0f}",
                    f"{own[0]['trainable']:,}",
                    f"{own[0]['bytes']:,}",
                ]
            )
        header = [
            "row",
            "asked by",
            "Dice",
            "by seed",
            "minus the decoder alone, asked alike",
            "rate",
            "steps",
            "CPU s",
            "trained",
            "bytes",
        ]
        text += [table(header, rows), ""]
        masks = cells.get("samaug|0", {}).get("with_masks")
        if masks is not None:
            text += [
                f"samaug: SAM found at least one mask in {masks['ours']:.0%} of the test images ({CLICKS} x {CLICKS} points; estimated IoU "
                f"over {MASKS['quality']}, stability over {MASKS['stability']} at offset {MASKS['offset']}); at the authors' thresholds (0.5, 0.95, 1) in "
                f"{masks['authors']:.0%}.",
                "",
            ]
    text.append(f"{footer(record)} All cells: {seconds / 60:.0f} CPU minutes, one thread.")
    write(name_of, record, "\n".join(text))


if __name__ == "__main__":
    main()
