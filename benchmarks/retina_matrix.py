"""Cross-dataset matrix on retinal vessels by camera. `python -m benchmarks.retina_matrix [--full]`.

One pack, three cameras, class vessel. Rows: trained on each camera, each pair, all three; columns: each camera's test split. The
recipe `retina` trains adapters (LoRA on the last two blocks and a head, on a cached prefix) and, side by side, the whole
network. Beside these rows, of adapters: the ensemble and the soup of the three single-camera adapters, stochastic weight averaging
on all cameras, with --full FuseStyle on pairs, and over seeds the ensemble and the soup of the adapters trained on all.
Short form: 128 px, a linear head, 80 steps of batch 8, bf16 autocast, 3 seeds; with --full 256 px, AViT's decoder and 400 steps (on `val`, one
seed at 128 px, that decoder scored .207 against .144 of the linear head, at several times the cost). Scores are of the saved bits, image
by image, in the images' own sizes. Cells are kept in results/.retina_matrix until the table is written: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters.ensemble import Ensemble
from medgraft.adapters.soup import soup
from medgraft.recipes.grid import trainer
from medgraft.training.annotation_style import annotation_style
from medgraft.training.data import Dataset
from medgraft.training.matrix import Matrix, Predict, combinations_of, sources_of
from medgraft.training.matrix_report import record, score_table, style_text, values
from medgraft.training.metrics import paired_difference
from medgraft.training.model import NAME, open_model
from medgraft.training.report import heat_map_png

CLASS = "vessel"
STEPS, BATCH, SIZE, VIEWS = 80, 8, 128, 4
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the run, options of the recipe
    "adapter": ({}, {"parts": "lora", "head": "linear"}),
    "full": ({"augment": "fresh"}, {"parts": "full", "head": "linear"}),
    "swa": ({"average": "swa"}, {"parts": "lora", "head": "linear"}),
    "fuse": ({"mix": "cosine"}, {"parts": "lora", "head": "linear"}),
}


def together(models: Sequence[Path], *, stirred: bool) -> tuple[Predict, Mapping[str, Any]]:
    """The ensemble of saved adapters, or (`stirred`) their uniform soup."""
    host, first = open_model(str(models[0]))
    members = {NAME: first} | {f"m{n}": open_model(str(model))[1] for n, model in enumerate(models[1:])}
    if stirred:
        host.add(soup(members).adapter, "soup")
        return lambda image: host.predict(image, "soup", probabilities=True), {"members": len(models)}
    for name, adapter in members.items():
        if name != NAME:
            host.add(adapter, name)
    ensemble = Ensemble(host, list(members))
    return lambda image: ensemble.predict(image, probabilities=True), {"members": len(models)}


def grids(work: Path, sources: Mapping[str, Dataset], args: argparse.Namespace) -> dict[str, Matrix]:
    """Fill every matrix; what is on disk is not done again."""
    shared: dict[str, Any] = {"image_size": SIZE, "steps": STEPS, "batch": BATCH, "views": VIEWS}
    if args.full:
        shared |= {"image_size": 256, "steps": 400}
    if args.steps:
        shared |= {"steps": args.steps}
    names = list(sources)
    every = combinations_of(names)
    rows = {"adapter": every, "full": every, "swa": [every[-1]]}
    if args.full:
        rows["fuse"] = [r for r in every if len(r) == 2]
    found: dict[str, Matrix] = {}
    for method in rows:
        run, own = METHODS[method]
        own = {**own, "head": "aspp"} if args.full else own
        settings = {"method": method, **shared, **run, **own}
        found[method] = Matrix(work / method, sources, settings, said=lambda line: print(line, flush=True))
        train = trainer("retina", {**shared, **run, "precision": "bf16", "quiet": True}, own)
        for seed in range(args.seeds):
            for members in rows[method]:
                print(f"[{method}] ", end="")
                found[method].train(members, seed, train)

    def models(members: Iterable[str], seeds: Iterable[int]) -> list[Path]:
        return [found["adapter"].model(m, s) for m in members for s in seeds]

    def maker(paths: list[Path], stirred: bool) -> Callable[[], tuple[Predict, Mapping[str, Any]]]:
        return lambda: together(paths, stirred=stirred)

    found["over seeds"] = Matrix(work / "seeds", sources, {"seeds": args.seeds, **shared})
    for stirred, name in ((False, "ensemble"), (True, "soup")):
        for seed in range(args.seeds):
            found["adapter"].row(f"{name} of the three alone", names, seed, maker(models(names, [seed]), stirred))
        paths = models(["+".join(names)], range(args.seeds))
        found["over seeds"].row(f"{name} of {args.seeds} seeds on all", names, 0, maker(paths, stirred))
    return found


def images(grid: Matrix, row: str, columns: Iterable[str]) -> np.ndarray:
    """Dice of each test image of some columns, mean over seeds: (N,)."""
    seeds = sorted({seed for r, _, seed in grid.cells if r == row})
    return np.concatenate(
        [
            np.mean([[i["dice"][0] for i in grid.cells[row, column, s]["per_image"]] for s in seeds], 0, dtype=float)
            for column in columns
        ]
    )


def differences(found: Mapping[str, Matrix], names: list[str]) -> list[list[str]]:
    """Paired differences over images, with 95 % bootstrap intervals."""
    adapter, every = found["adapter"], "+".join(names)
    alone = {n: [m for m in names if m != n] for n in names}
    pairs = {"+".join(p): next(n for n in names if n not in p) for p in combinations_of(names) if len(p) == 2}

    def over(grid: Matrix, where: Mapping[str, Iterable[str]]) -> np.ndarray:
        return np.concatenate([images(grid, row, columns) for row, columns in where.items()])

    own, unseen = {n: [n] for n in names}, {row: [n] for row, n in pairs.items()}
    on_all = images(adapter, every, names)
    mean_alone = np.mean([images(adapter, n, names) for n in names], 0)
    ensemble, stirred = (images(adapter, f"{k} of the three alone", names) for k in ("ensemble", "soup"))
    seeds = {row.split()[0]: images(found["over seeds"], row, names) for row, _, _ in found["over seeds"].cells}
    compared = {
        "whole network - adapter, all cameras": (images(found["full"], every, names), on_all),
        "whole network - adapter, one camera, on the other two": (over(found["full"], alone), over(adapter, alone)),
        "adapter: all cameras - the camera alone, on itself": (on_all, over(adapter, own)),
        "ensemble of the three alone - their mean score": (ensemble, mean_alone),
        "ensemble of the three alone - one adapter on all": (ensemble, on_all),
        "soup of the three alone - their mean score": (stirred, mean_alone),
        "ensemble over seeds - mean of its members": (seeds["ensemble"], on_all),
        "soup over seeds - mean of its members": (seeds["soup"], on_all),
        "SWA - last weights, all cameras": (images(found["swa"], every, names), on_all),
    }
    if "fuse" in found:
        both = over(found["fuse"], unseen), over(adapter, unseen)
        compared["FuseStyle - without, pairs, on the unseen camera"] = both
    rows = []
    for name, both in compared.items():
        d = paired_difference(*both)
        rows.append([name, f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", str(d.images)])
    return rows


def report(found: Mapping[str, Matrix], args: argparse.Namespace, seconds: float) -> None:
    """One page: the two grids, the rows beside them, differences, costs, and how the cameras are annotated."""
    records = {name: record(grid) for name, grid in found.items()}
    names = list(found["adapter"].sources)
    style = annotation_style(found["adapter"].sources)
    gaps = differences(found, names)
    whole = {**facts(), "seconds": seconds, "matrices": records, "annotation_style": style, "differences": gaps}
    how = dict(found["adapter"].settings)
    text = ["# Retinal vessels across three cameras", ""]
    text += [
        f"`medgraft:starter-vit`, recipe `retina`, {how['image_size']} px, {how['steps']} steps of batch {BATCH}, bf16 autocast, "
        f"seeds {list(range(args.seeds))}. Rows: trained on; columns: tested on. Dice (mean over test images, ± standard deviation "
        f"over seeds) / area under the precision-recall curve (over all pixels).",
        "",
    ]
    titles = {
        "adapter": "Adapters (LoRA on the last two blocks, head)",
        "full": "The whole network",
        "swa": "Adapters, stochastic weight averaging",
        "fuse": "Adapters, FuseStyle (cosine)",
        "over seeds": "Over seeds",
    }
    for name, title in ((n, t) for n, t in titles.items() if n in records):
        text += [f"## {title}", "", *score_table(records[name], CLASS), ""]
    text += ["## Differences in Dice", "", table(["", "mean [95 % over images]", "images"], gaps), ""]
    text += [
        "## Time per cell",
        "",
        table(["", "seconds of training", "seconds of scoring a test set"], _times(found)),
        "",
    ]
    text += [*style_text(style), "", f"{footer(whole)} All cells: {seconds / 60:.0f} minutes."]
    here = json.loads(json.dumps(whole).replace(f"{RESULTS.resolve()}/", ""))  # results name no folder of this machine
    write(args.name, here, "\n".join(text))
    rows = records["full"]["rows"]
    panels = {
        f"{titles[m].partition(' (')[0]}: {measure}": np.nanmean(values(records[m], CLASS, key)[: len(rows)], -1)
        for m in ("adapter", "full")
        for key, measure in (("dice", "Dice"), ("pr_area", "PR area"))
    }
    heat_map_png(panels, rows, names, RESULTS / f"{args.name}.png", across="tested on", down="trained on")


def _times(found: Mapping[str, Matrix]) -> list[list[str]]:
    rows = []
    for name, grid in found.items():
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for (row, _, _), cell in grid.cells.items():
            kinds.setdefault(row if " of " in row else f"{name}, {row.count('+') + 1} camera(s)", []).append(cell)
        for kind, cells in kinds.items():
            trained = [c["model"]["seconds"] for c in cells if "seconds" in c["model"]]
            shown = f"{np.median(trained):.1f}" if trained else "-"
            rows.append([kind, shown, f"{np.median([c['seconds'] for c in cells]):.2f}"])
    return rows


def main() -> None:
    """Fill, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="another number of steps, to try it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="", help="of the files in results/ (default: retina_matrix)")
    args = parser.parse_args()
    args.name = args.name or ("retina_matrix_full" if args.full else "retina_matrix")
    torch.set_num_threads(args.threads)
    work = RESULTS / f".{args.name}"
    began = time.perf_counter()
    sources = sources_of([data_root() / "retina_vessels"], by="domain", classes=[CLASS])
    found = grids(work, sources, args)
    cells = [cell for grid in found.values() for cell in grid.cells.values()]
    failed = [f"{c['train']} on {c['test']}: {c['failed']}" for c in cells if "failed" in c]
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} cells failed; run again to try them once more:", *failed]))
    trained = {
        (c["train"], c["seed"], id(g)): c["model"].get("seconds", 0.0) for g in found.values() for c in g.cells.values()
    }
    spent = sum(trained.values()) + sum(c["seconds"] for c in cells)
    print(f"this call: {(time.perf_counter() - began) / 60:.1f} minutes")
    report(found, args, spent)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
