"""Few-shot tables: recipes side by side on real packs, equal steps and seeds. `python -m benchmarks.few_shot [--full]`.

Short form: 128 px, 20 shots, 150 steps of batch 8, bf16 autocast, 3 seeds; with --full the recipes' own steps and sizes.
Rows: avit, avit without its site parts, lora, linear_probe, full_finetune (baseline), and a random forest on multi-scale pixel
features, what a user has today. Scores are of the saved bits, on the test split, image by image, in the images' own sizes.
Per pack, the paired difference to linear_probe over images (means over seeds), with a 95 % bootstrap interval over images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.recipes import Run, find_recipe
from medgraft.training.data import Dataset, load_dataset, sample_shots
from medgraft.training.evaluate import evaluate
from medgraft.training.metrics import dice, image_means, paired_difference
from medgraft.training.model import NAME, open_model

PACKS = ("skin_ham10000", "hc18_fetal_head", "wbc")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "avit": ("avit", {}),
    "avit without site parts": ("avit", {"site_parts": False}),
    "lora": ("lora", {}),
    "linear_probe": ("linear_probe", {}),
    "full_finetune": ("full_finetune", {}),
}
SHOTS, STEPS, BATCH, SIZE = 20, 150, 8, 128


def trained(recipe: str, options: dict[str, Any], data: Path, seed: int, out: Path, full: bool) -> dict[str, Any]:
    """Train one cell and score it."""
    found = find_recipe(recipe)
    shared: dict[str, Any] = {**found.defaults, "quiet": True, "shots": SHOTS, "seed": seed}
    if not full:
        shared |= {"steps": STEPS, "batch": BATCH, "image_size": SIZE, "precision": "bf16"}
    began = time.perf_counter()
    summary = found.program(Run(data=data, out=out, **shared), **options)
    seconds = time.perf_counter() - began
    host, _ = open_model(str(out))
    score = evaluate(host, NAME, load_dataset(data))
    per_image = [
        float(np.nanmean([v for v in i["dice"].values() if v is not None] or [np.nan])) for i in score["per_image"]
    ]
    return {
        "dice": score["dice"],
        "per_image": per_image,
        "trainable": summary["trainable"],
        "bytes": summary["bytes"],
        "seconds": seconds,
    }


def features(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, F): colours, and Gaussian means, gradients and Laplacians at four scales, and the position."""
    from scipy import ndimage

    x = image.astype(np.float32) / 255
    maps = [x[..., c] for c in range(3)]
    grey = x.mean(-1)
    for sigma in (1, 2, 4, 8):
        maps += [ndimage.gaussian_filter(x[..., c], sigma) for c in range(3)]
        maps += [ndimage.gaussian_gradient_magnitude(grey, sigma), ndimage.gaussian_laplace(grey, sigma)]
    rows, columns = np.meshgrid(np.linspace(-1, 1, x.shape[0]), np.linspace(-1, 1, x.shape[1]), indexing="ij")
    return np.stack([*maps, rows, columns], -1)


def forest(dataset: Dataset, seed: int) -> dict[str, Any]:
    """A random forest on `features` of the same shots at 128 px, 2,000 pixels an image."""
    from PIL import Image
    from sklearn.ensemble import RandomForestClassifier

    def small(picture: np.ndarray, how: Any) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), how))

    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    xs, ys = [], []
    for item in sample_shots(dataset, SHOTS, seed):
        f = features(small(dataset.image(item), Image.Resampling.BILINEAR)).reshape(SIZE * SIZE, -1)
        y = small(dataset.mask(item), Image.Resampling.NEAREST).reshape(-1)
        pick = rng.choice(len(y), 2000, replace=False)
        xs.append(f[pick])
        ys.append(y[pick])
    model = RandomForestClassifier(100, min_samples_leaf=5, n_jobs=2, random_state=seed).fit(
        np.concatenate(xs), np.concatenate(ys)
    )
    seconds = time.perf_counter() - began
    scores = []
    for item in dataset.split("test"):
        image, truth = dataset.image(item), dataset.mask(item)
        p = model.predict(features(small(image, Image.Resampling.BILINEAR)).reshape(SIZE * SIZE, -1)).reshape(
            SIZE, SIZE
        )
        p = np.asarray(Image.fromarray(p.astype(np.uint8)).resize(truth.shape[::-1], Image.Resampling.NEAREST))
        scores.append(dice(p, truth, len(dataset.classes)))
    per_image = image_means(np.array(scores))
    return {
        "dice": float(np.nanmean(per_image)),
        "per_image": per_image.tolist(),
        "trainable": 0,
        "bytes": 0,
        "seconds": seconds,
    }


def main() -> None:
    """Fill the table cell by cell; finished cells are kept, so that an interrupted run goes on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--packs", default=",".join(PACKS))
    parser.add_argument(
        "--threads", type=int, default=2, help="1 to run two packs side by side; figures do not depend on it"
    )
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop, for a pack run beside others")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "few_shot_full" if args.full else "few_shot"
    files = {pack: RESULTS / f".{name}.{pack}.json" for pack in args.packs.split(",")}
    cells: dict[str, Any] = {}
    for file in files.values():
        cells |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for pack in args.packs.split(","):
            data = data_root() / pack
            for row in (*ROWS, "random forest"):
                for seed in range(args.seeds):
                    key = f"{pack}|{row}|{seed}"
                    if key in cells:
                        continue
                    if row == "random forest":
                        cells[key] = forest(load_dataset(data), seed)
                    else:
                        recipe, options = ROWS[row]
                        cells[key] = trained(
                            recipe, options, data, seed, Path(folder) / "out" / str(len(cells)), args.full
                        )
                    print(key, round(cells[key]["dice"], 4), f"{cells[key]['seconds']:.0f} s", flush=True)
                    own = {k: v for k, v in cells.items() if k.startswith(f"{pack}|")}
                    files[pack].write_text(json.dumps(own))
    if args.cells_only:
        return
    report(name, cells, args, sum(c["seconds"] for c in cells.values()))
    for file in files.values():
        file.unlink()


def report(name: str, cells: dict[str, Any], args: argparse.Namespace, seconds: float) -> None:
    """Means over seeds with their spread, and paired differences to the linear probe."""
    record = {
        **facts(),
        "shots": SHOTS,
        "steps": None if args.full else STEPS,
        "seeds": list(range(args.seeds)),
        "seconds": seconds,
        "cells": cells,
    }
    text = ["# Few-shot segmentation on real packs", ""]
    setting = (
        "the recipes' own steps and sizes" if args.full else f"{SIZE} px, {STEPS} steps of batch {BATCH}, bf16 autocast"
    )
    text += [f"`medgraft:starter-vit`, {SHOTS} shots, {setting}, seeds {record['seeds']}; Dice on the test split.", ""]
    for pack in args.packs.split(","):
        rows = []
        probe = np.mean([cells[f"{pack}|linear_probe|{s}"]["per_image"] for s in record["seeds"]], 0)
        for row in (*ROWS, "random forest"):
            found = [cells[f"{pack}|{row}|{s}"] for s in record["seeds"]]
            scores = np.array([f["dice"] for f in found])
            d = paired_difference(np.mean([f["per_image"] for f in found], 0), probe)
            gap = "" if row == "linear_probe" else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            half = (
                4.303 * scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) == 3 else float("nan")
            )  # t quantile, 2 degrees
            size = f"{found[0]['bytes']:,}" if found[0]["bytes"] else "-"
            count = f"{found[0]['trainable']:,}" if found[0]["trainable"] else "-"
            rows.append(
                [
                    row,
                    f"{scores.mean():.3f} ± {half:.3f}",
                    " ".join(f"{s:.3f}" for s in scores),
                    gap,
                    count,
                    size,
                    f"{np.median([f['seconds'] for f in found]):.0f}",
                ]
            )
        header = [
            "row",
            "Dice (mean ± 95 % over seeds)",
            "by seed",
            "minus linear_probe [95 % over images]",
            "trained parameters",
            "bytes",
            "seconds",
        ]
        text += [f"## {pack}", "", table(header, rows), ""]
    text.append(
        f"{footer(record)} Training of all cells: {seconds / 60:.0f} minutes, on a machine that other work shared."
    )
    write(name, record, "\n".join(text))


if __name__ == "__main__":
    main()
