"""Soups, ensembles and averages along training, on a real pack. `python -m benchmarks.soup [--pack hc18_fetal_head] [--repeats 3]`.

Three LoRA adapters (rank 8, the attention of the last two blocks, three learning rates, other batches and views each) are trained
on all training images of the pack, once with a start of their own each and once from one shared start. Then

* arithmetic: what the soup computes against a plain network whose weights are W + mean_i s_i B_i A_i, summed in float64, on all
  test images; for the mean of the products, its cuts to lower ranks, and the mean of the factors A and B one by one;
* scores: Dice on the test split of members, soups, the ensemble, and of averages along one training at a constant rate.

Greedy soups choose on the validation split. A cell is one start of one repeat; finished cells are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters import Adapter, Host, LoRA
from medgraft.adapters.soup import soup
from medgraft.adapters.store import read_adapter
from medgraft.backbones import Backbone
from medgraft.recipes import Run
from medgraft.training.data import Dataset, load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.fit import FitOptions, Schedule
from medgraft.training.greedy_soup import greedy_soup, score_on
from medgraft.training.metrics import paired_difference

SIZE, BATCH, VIEWS, RANK, ALPHA = 128, 8, 4, 8, 16.0
TARGETS = ("blocks.4.attn.*", "blocks.5.attn.*")
RATES = (1e-3, 2e-3, 4e-3)
CUTS = (16, 8, 4, 2, 1)
STARTS = ("a start of their own", "one shared start")
ALONG = {"last weights": "none", "SWA": "swa", "EMA": "ema"}
BEST = "best member on val"


def trained(run: Run, start: int, rate: float, steps: int, schedule: Schedule = "linear") -> Adapter:
    """One LoRA adapter: `start` draws it, the run's seed its batches and views."""
    torch.manual_seed(start)
    lora = LoRA.on(run.frozen, run.goal, targets=TARGETS, rank=RANK, alpha=ALPHA)
    warmup = min(20, steps // 10)
    options = FitOptions(steps, rate, schedule=schedule, warmup=warmup, seed=run.seed, precision=run.precision)
    run.train("lora", {"lora": lora, "head": run.head()}, options, settings={"start": start})
    return read_adapter(run.out)


# Arithmetic


def mean_products(members: list[Adapter]) -> dict[str, Tensor]:
    """mean_i s_i B_i A_i of every site, float64, written out."""
    found: dict[str, Tensor] = {}
    for member in members:
        lora = member.parts["lora"]
        assert isinstance(lora, LoRA)
        for site in lora.sites:
            product = lora.scale * lora.cell(site).B.detach().double() @ lora.cell(site).A.detach().double()
            found[site] = found.get(site, 0) + product / len(members)
    return found


def with_weights(backbone: Backbone, delta: Mapping[str, Tensor]) -> Backbone:
    """A plain copy of the backbone in float64 with `delta` added to the weights of its sites."""

    def stand_in(port: str, base: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, d in delta.items():
                site = backbone.sites[name]
                if site.port == port:
                    assert isinstance(base, nn.Linear)
                    base.double().weight[slice(*(site.span or (0, base.out_features)))] += d
        return base

    return backbone.plain_copy(stand_in, share=False).double()


def factors_averaged(members: list[Adapter]) -> Adapter:
    """What one should not do: A and B averaged one by one."""
    made = copy.deepcopy(members[0])
    with torch.no_grad():
        for name, t in made.tensors().items():
            t.copy_(torch.stack([m.tensors()[name] for m in members]).mean(0))
    return made


def arithmetic(backbone: Backbone, members: list[Adapter], x: Tensor) -> dict[str, Any]:
    """Errors against the exact averaged weights: of the logits on images `x`, and of the products."""
    exact = mean_products(members)
    head = copy.deepcopy(soup(members).adapter.parts["head"]).double()
    with torch.no_grad():
        want = head(with_weights(backbone, exact)(x.double()), x.double())
        effect = want - head(with_weights(backbone, {})(x.double()), x.double())
    rows: dict[str, Adapter] = {"mean of products": soup(members).adapter}
    rows |= {f"cut to rank {r}": soup(members, rank=r).adapter for r in CUTS}
    rows["mean of factors"] = factors_averaged(members)
    found: dict[str, Any] = {}
    for name, made in rows.items():
        host = Host(backbone)
        host.add(made, "it")
        with torch.no_grad():
            error = torch.cat([host(part, "it") for part in x.split(16)]).double() - want
        own = mean_products([made])
        decide = made.task.decide
        found[name] = {
            "rank": made.parts["lora"].config["rank"],  # type: ignore[union-attr,index]
            "logits": float(error.abs().max() / want.abs().max()),
            "of effect": float(error.norm() / effect.norm()),
            "pixels": float((decide(want + error) != decide(want)).double().mean()),
            "products": max(float((own[s] - exact[s]).norm() / exact[s].norm()) for s in exact),
        }
    return found


# Scores


def scored(backbone: Backbone, adapters: list[Adapter], dataset: Dataset) -> dict[str, Any]:
    """Dice on the test split, of one adapter or of the ensemble of several."""
    host = Host(backbone)
    for i, adapter in enumerate(adapters):
        host.add(adapter, str(i))
    began = time.perf_counter()
    result = evaluate(host, [str(i) for i in range(len(adapters))] if len(adapters) > 1 else "0", dataset)
    per_image = [np.nanmean([np.nan if v is None else v for v in i["dice"].values()]) for i in result["per_image"]]
    seconds = (time.perf_counter() - began) / result["n"]
    return {"dice": result["dice"], "per_image": [float(d) for d in per_image], "seconds an image": seconds}


def members_cell(run: Run, repeat: int, shared: bool, steps: int) -> dict[str, Any]:
    """Three members, what is made of them, and the arithmetic."""
    began = time.perf_counter()
    members = []
    for i, rate in enumerate(RATES):
        one = replace(run, seed=100 * repeat + i, out=run.out / str(i))
        members.append(trained(one, repeat if shared else 1000 + 10 * repeat + i, rate, steps))
    seconds = (time.perf_counter() - began) / len(RATES)
    backbone, dataset = run.frozen, run.dataset
    named = {f"rate {rate:g}": m for rate, m in zip(RATES, members, strict=True)}
    greedy = greedy_soup(named, score_on(backbone, dataset, "val", dtype="float32"))
    rows = {name: [m] for name, m in named.items()}
    rows["uniform soup"] = [soup(members).adapter]
    rows[f"uniform soup, rank {RANK}"] = [soup(members, rank=RANK).adapter]
    rows["greedy soup"] = [greedy.soup.adapter]
    rows["mean of factors"] = [factors_averaged(members)]
    rows["ensemble"] = members
    scores = {name: scored(backbone, made, dataset) for name, made in rows.items()}
    x = torch.stack([members[0].preprocessing(dataset.image(item)) for item in dataset.split("test")])
    return {
        "scores": {**scores, BEST: scores[greedy.tried[0].name]},
        "arithmetic": arithmetic(backbone, members, x),
        "greedy": [t._asdict() for t in greedy.tried],
        "seconds a training": seconds,
    }


def along_cell(run: Run, repeat: int, steps: int) -> dict[str, Any]:
    """One training at a constant rate, three times: its last weights, and two averages of them."""
    scores = {}
    for name, average in ALONG.items():
        one = replace(run, seed=100 * repeat, out=run.out / average, average=average)  # type: ignore[arg-type]
        made = trained(one, 1000 + 10 * repeat, RATES[1], steps, "constant")
        scores[name] = scored(run.frozen, [made], run.dataset)
    return {"scores": scores}


def main() -> None:
    """Fill the cells, then write `results/soup.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pack", default="hc18_fetal_head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="soup", help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f".{args.name}.{args.pack}.{args.steps}.json"
    cells: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for row in (*STARTS, "along"):
                key = f"{row}|{repeat}"
                if key in cells:
                    continue
                began = time.perf_counter()
                out = Path(folder) / str(len(cells))
                run = Run(
                    data_root() / args.pack,
                    out,
                    image_size=SIZE,
                    batch=BATCH,
                    views=VIEWS,
                    precision="bf16",
                    dtype="float32",
                    quiet=True,
                )
                run = replace(run, classes=tuple(load_dataset(run.data).classes.values()))
                if row == "along":
                    cells[key] = along_cell(run, repeat, args.steps)
                else:
                    cells[key] = members_cell(run, repeat, row == STARTS[1], args.steps)
                cells[key]["seconds"] = time.perf_counter() - began
                kept.write_text(json.dumps(cells))
                print(key, f"{cells[key]['seconds']:.0f} s", flush=True)
    report(args, cells)
    kept.unlink()


def report(args: argparse.Namespace, cells: Mapping[str, Any]) -> None:
    """The tables: arithmetic (worst of the repeats) and scores (means over repeats)."""
    repeats = range(args.repeats)
    record = {**facts(), "pack": args.pack, "steps": args.steps, "seeds": list(repeats), "cells": cells}
    text = ["# Soups, ensembles and averages along training", ""]
    text += [
        f"`medgraft:starter-vit` on `{args.pack}`, {SIZE} px, all training images, {args.steps} steps of batch {BATCH}, bf16 autocast, LoRA of rank "
        f"{RANK} on the attention of the last two blocks with a linear head; members differ in learning rate "
        f"({', '.join(f'{r:g}' for r in RATES)}), batches and views; {args.repeats} repeats.",
        "",
    ]
    for start in STARTS:
        found = [cells[f"{start}|{r}"] for r in repeats]
        text += [
            f"## Three members from {start}",
            "",
            "Against the exact averaged weights (the worst of the repeats):",
            "",
        ]
        rows = []
        for name in found[0]["arithmetic"]:
            worst = {k: max(f["arithmetic"][name][k] for f in found) for k in found[0]["arithmetic"][name]}
            errors = [f"{worst[k]:.1e}" for k in ("products", "logits", "of effect")]
            rows.append([name, worst["rank"], *errors, f"{worst['pixels']:.2%}"])
        header = [
            "what",
            "rank",
            "product, worst site",
            "largest error of a logit",
            "error / what LoRA does",
            "pixels decided otherwise",
        ]
        text += [table(header, rows), "", "Dice on the test split:", ""]
        text += [scores_table(found, list(found[0]["scores"]), BEST), ""]
    found = [cells[f"along|{r}"] for r in repeats]
    text += ["## Along one training at a constant rate", "", scores_table(found, list(ALONG), "last weights"), ""]
    total = sum(c["seconds"] for c in cells.values())
    text.append(
        f"Errors of logits are relative to the largest one. {footer(record)} All cells: {total / 60:.1f} minutes."
    )
    write(args.name, record, "\n".join(text))


def scores_table(found: list[dict[str, Any]], names: list[str], baseline: str) -> str:
    """Mean Dice over repeats, and the paired difference to `baseline` over images (means over repeats)."""
    base = np.nanmean([f["scores"][baseline]["per_image"] for f in found], 0)
    rows = []
    for name in names:
        own = [f["scores"][name] for f in found]
        dice = np.array([o["dice"] for o in own])
        half = 4.303 * dice.std(ddof=1) / np.sqrt(3) if len(dice) == 3 else float("nan")  # t quantile, 2 degrees
        d = paired_difference(np.nanmean([o["per_image"] for o in own], 0), base)
        gap = "" if name == baseline else f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        speed = f"{1000 * np.median([o['seconds an image'] for o in own]):.0f}"
        rows.append([name, f"{dice.mean():.4f} ± {half:.4f}", " ".join(f"{v:.4f}" for v in dice), gap, speed])
    header = [
        "what",
        "Dice (mean ± 95 % over repeats)",
        "by repeat",
        f"minus {baseline} [95 % over images]",
        "ms an image",
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
