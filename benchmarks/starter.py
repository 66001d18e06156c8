"""Are the starter's features worth anything? `python -m benchmarks.starter`, about five minutes on two idle cores.

A linear probe on frozen features of `medgraft:starter-vit` against the same architecture with random weights, on every 2D
segmentation pack, with 20 shots (with --full also with all training images), 3 seeds, equal steps; Dice on the test split, in the images' own sizes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import data_root, facts, footer, table, write
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.metrics import paired_difference
from medgraft.training.model import NAME, open_model

PACKS = ("skin_ham10000", "wbc", "dsb2018_nuclei", "retina_vessels", "hc18_fetal_head", "cxr_anatomy")
STARTER, RANDOM = "medgraft:starter-vit", "random:medgraft:starter-vit"
SEEDS, STEPS = (0, 1, 2), 150
SETTINGS: tuple[tuple[str, int | None], ...] = (("20 shots", 20), ("all training images", None))


def probe(pack: str, backbone: str, shots: int | None, seed: int, out: Path) -> list[float]:
    """Dice by test image of one linear probe."""
    data = data_root() / pack
    run = Run(
        data,
        out,
        backbone=backbone,
        shots=shots,
        seed=seed,
        steps=STEPS,
        batch=8,
        augment="none",
        image_size=128,
        quiet=True,
    )
    find_recipe("linear_probe").program(run)
    host, _ = open_model(str(out))
    result = evaluate(host, NAME, load_dataset(data))
    return [
        float(np.nanmean([v for v in i["dice"].values() if v is not None] or [np.nan])) for i in result["per_image"]
    ]


def main() -> None:
    """Fill both tables and write `results/starter.{json,md}`."""
    cells: dict[str, Any] = {}
    text = ["# Frozen starter features against frozen random features", ""]
    wins = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, shots in SETTINGS[: 2 if "--full" in sys.argv else 1]:
            rows = []
            for pack in PACKS:
                found = {
                    b: np.array(
                        [probe(pack, b, shots, s, Path(folder) / str(len(cells)) / f"{s}{b[:3]}") for s in SEEDS]
                    )
                    for b in (RANDOM, STARTER)
                }
                means = {b: np.nanmean(v, 1) for b, v in found.items()}
                d = paired_difference(np.nanmean(found[STARTER], 0), np.nanmean(found[RANDOM], 0))
                cells[f"{pack}|{title}"] = {
                    "random": means[RANDOM].tolist(),
                    "starter": means[STARTER].tolist(),
                    "difference": list(d),
                }
                wins[title] = wins.get(title, 0) + bool(d.mean > 0)
                spread = {b: f"{m.mean():.3f} ({m.min():.3f} to {m.max():.3f})" for b, m in means.items()}
                rows.append([pack, spread[RANDOM], spread[STARTER], f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"])
                print(title, rows[-1], flush=True)
            header = [
                "pack",
                "random (range over seeds)",
                "starter (range over seeds)",
                "difference [95 % over images]",
            ]
            text += [f"## Linear probe, {title}: {wins[title]} of {len(PACKS)} won", "", table(header, rows), ""]
    record = {**facts(), "seeds": SEEDS, "steps": STEPS, "cells": cells, "won": wins}
    text.append(f"128 px, {STEPS} steps of batch 8, no augmentation. {footer(record)}")
    write("starter", record, "\n".join(text))


if __name__ == "__main__":
    main()
