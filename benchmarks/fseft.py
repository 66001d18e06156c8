"""Few-shot adaptation of MeshNet to the hippocampus. `python -m benchmarks.fseft [--only PART] [--cells-only] [--threads 1]`.

`hippocampus_msd`, anterior and posterior, K labelled volumes, MeshNet (21 channels, 18 subcortical classes) with its real weights and
with random ones, in the orientation that it was trained in, 32 voxels of its mirror image around each crop (it was trained on whole
heads; see `backbones/meshnet.py`; not for `scratch`, whose steps would cost ten times as much). Whole volumes (about 36 x 50 x 36 voxels), one a step. Rows

    scratch        every layer, from random weights
    linear probe   one linear layer a voxel on the frozen last map
    FT-last        a copy of the last convolution, and the linear layer
    adapter        the paper's spatial adapter (three convolutions, batch norm), and the linear layer
    adapter + TI   the same, with the size prior of one query volume in the loss for the second half of the steps: one training a query

Learning rates, and the form of the prior, are chosen on the validation split (K = 5, seed 0), from the paper's value and one that suits
few steps. A cell is one training; finished cells are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, data_root, facts, footer, table, write
from medgraft.adapters import Adapter, Host, LinearHead, Part, SpatialAdapter, Task, Tuned
from medgraft.adapters.size_prior import Priors
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import Backbone, State, load_backbone
from medgraft.recipes.fseft import dice_ce, last_stage
from medgraft.training.cache import PrefixCache
from medgraft.training.data import Item, load_dataset, sample_shots
from medgraft.training.fit import FitOptions, fit
from medgraft.training.metrics import dice, paired_difference
from medgraft.training.patches import Patches
from medgraft.training.transduce import Constraint
from medgraft.training.volume_data import Volumes, volumes_of

PACK, MODEL = "hippocampus_msd", "meshnet:model18cls"
SHOTS, SEEDS = (1, 5, 10), (0, 1, 2, 3, 4)
TI_SHOTS, TI_SEEDS, TI_QUERIES = 5, (0, 1), 4
METHODS = ("linear probe", "FT-last", "adapter")
TI, SCRATCH = "adapter + TI", "scratch"
WEIGHTS = ("real", "random")
RATES = {"linear probe": (0.5, 0.1), "FT-last": (1e-4, 1e-2), "adapter": (0.5, 0.05), SCRATCH: (1e-4, 3e-3)}
"""The paper's rate, then one for few steps."""
SURROUND = 32
STEPS = 60
"""In every row, one whole volume a step."""
PRIORS = {"Eq. 2": False, "relative": True}
T_95 = {2: 12.71, 5: 2.776}  # t quantiles for that many seeds


@dataclass(frozen=True)
class Cell:
    """One training. `split` "val" is a choice: one rate, or one form of the prior."""

    weights: str
    method: str
    shots: int
    seed: int
    query: int | None = None
    rate: float | None = None
    form: str | None = None
    split: str = "test"

    @property
    def key(self) -> str:
        """How the cell is called in the kept file."""
        said = (self.split, self.weights, self.method, self.shots, self.seed, self.query, self.rate, self.form)
        return "|".join("" if s is None else str(s) for s in said)


class Behind(PrefixCache):
    """States behind the last layer, one volume at a time, from those that another cache keeps before it."""

    def __init__(self, early: PrefixCache) -> None:
        super().__init__(early.backbone, early.backbone.depth)
        self.early, self.made = early, dict[tuple[str, int], State]()

    @torch.no_grad()
    def states(self, images: Tensor, items: Sequence[str], views: Sequence[int]) -> State:
        """As `PrefixCache.states`."""
        (item,), (view,) = items, views
        if (item, view) not in self.made:
            state = self.backbone.run(self.early.states(images, items, views), stop=self.stage)
            assert isinstance(state, State)
            self.made[item, view] = state
        return self.made[item, view]


class Bench:
    """The data, one backbone at a time, and the prefixes of its volumes."""

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.data: Volumes = volumes_of(load_dataset(data_root() / PACK))
        self.task = Task("segment", tuple(self.data.classes.values()))
        self._backbones: dict[str, Backbone] = {}
        self._prefixes: dict[str, tuple[PrefixCache, PrefixCache]] = {}

    def id_of(self, cell: Cell) -> str:
        """Real weights, or random ones of the cell's seed."""
        file = data_root().parent / "weights" / "meshnet_model18cls.safetensors"
        around = f"?surround={SURROUND}" if cell.method != SCRATCH else "?surround=0"
        return f"{MODEL}{around}@{file}" if cell.weights == "real" else f"random:{MODEL}{around}&seed={cell.seed}"

    def backbone(self, id: str) -> Backbone:
        """A loaded backbone."""
        if id not in self._backbones:  # the real one stays, of random ones those of this seed
            seed = id.rpartition("seed=")[2]
            self._backbones = {k: v for k, v in self._backbones.items() if "random:" not in k or k.endswith(f"={seed}")}
            self._backbones[id] = load_backbone(id)
            self._prefixes = {k: v for k, v in self._prefixes.items() if k in self._backbones}
        return self._backbones[id]

    def prefixes(self, host: Host, id: str) -> PrefixCache:
        """The frozen prefixes of every volume that was met, before the last layer or behind it."""
        if id not in self._prefixes:
            early = PrefixCache(host.backbone, host.backbone.depth - 1)
            self._prefixes[id] = (early, Behind(early))
        early, late = self._prefixes[id]
        return late if host.cut("it") == host.backbone.depth else early

    def run(self, cell: Cell, choices: dict[str, Any]) -> dict[str, Any]:
        """Train, and Dice of both classes for each case of the split (with a query: of it alone)."""
        began = time.process_time()
        id = self.id_of(cell)
        backbone = self.backbone(id)
        network = backbone.trainable_copy() if cell.method == SCRATCH else None
        on = network or backbone
        prepare = VolumePreprocessing.of(on.spec)
        support = sample_shots(self.data, cell.shots, cell.seed)
        batches = Patches(self.data, support, prepare, on.spec, seed=cell.seed)
        torch.manual_seed(cell.seed)
        parts: dict[str, Part] = {}
        if cell.method == "FT-last":
            parts["tuned"] = Tuned.on(on, self.task, targets=last_stage(on))
        if cell.method in ("adapter", TI):
            parts["spatial"] = SpatialAdapter.on(on, self.task, form="paper")
        parts["head"] = LinearHead.on(on, self.task)
        host = Host(on)
        host.add(Adapter.of(on, self.task, parts, preprocessing=prepare), "it")
        base = "adapter" if cell.method == TI else cell.method
        rate, steps = cell.rate or choices[f"{cell.weights}|{base}"], self.steps
        options = FitOptions(steps, lr=rate, schedule="cosine", seed=cell.seed)
        items = self.data.split(cell.split)
        more: dict[str, Any] = {"loss": dice_ce}
        if cell.query is not None:
            items = [items[cell.query]]
            labels = [batches.labels_of(item) for item in support]
            priors = Priors.on(on, self.task, labels=labels, relative=PRIORS[cell.form or choices["prior"]])
            constraint = Constraint(priors, self.data.volume(items[0]), start=steps // 2, support=dice_ce)
            more = {"loss": constraint, "forward": constraint.forward}
        cache = None if network else self.prefixes(host, id)
        extra: list[nn.Parameter] = [] if network is None else list(network.parameters())
        done = fit(host, "it", batches, options, cache=cache, extra=extra, quiet=True, **more)
        scores = {item.id: self.score(host, prepare, item, cache) for item in items}
        sizes = sum(p.numel() for p in [*host.adapters["it"].parameters(), *extra])
        return {"dice": scores, "loss": done.loss, "trained": sizes, "cpu seconds": time.process_time() - began}

    @torch.no_grad()
    def score(self, host: Host, prepare: VolumePreprocessing, item: Item, cache: PrefixCache | None) -> list[float]:
        """Dice by class. At 1 mm the network's grid is the volume's own, turned: no voxel is resampled, one window holds it all."""
        x = prepare(self.data.volume(item))[None]
        truth = prepare.labels(self.data.labels_of(item)).numpy()
        z = host(x, "it") if cache is None else host.resume(cache.states(x, [item.id], [0]), x, "it")
        return dice(self.task.decide(z)[0].numpy(), truth, len(self.task.classes)).tolist()


# Which cells there are


def choosing() -> Iterator[Cell]:
    """Every rate on the validation split, then both forms of the prior on two of its volumes."""
    for weights in WEIGHTS:
        for method in (*METHODS, SCRATCH) if weights == "random" else METHODS:
            for rate in RATES[method]:
                yield Cell(weights, method, TI_SHOTS, 0, rate=rate, split="val")


def choosing_prior() -> Iterator[Cell]:
    for form in PRIORS:
        for query in range(2):
            yield Cell("real", TI, TI_SHOTS, 0, query, form=form, split="val")


def table_cells() -> Iterator[Cell]:
    """The table's, one backbone after the other."""
    for seed in SEEDS:
        for weights in WEIGHTS:
            for shots in SHOTS:
                for method in (*METHODS, SCRATCH) if weights == "random" else METHODS:
                    yield Cell(weights, method, shots, seed)
            if seed in TI_SEEDS:
                for query in range(TI_QUERIES):
                    yield Cell(weights, TI, TI_SHOTS, seed, query)


def mean_dice(cells: Sequence[dict[str, Any]]) -> float:
    """Mean over classes, cases and cells; NaN (a class that is nowhere) is left out."""
    return float(np.nanmean([scores for cell in cells for scores in cell["dice"].values()]))


def chosen(cells: dict[str, Any]) -> dict[str, Any]:
    """The best rate of each weights and method, and the best form of the prior, on the validation split."""
    rates: dict[str, dict[float, float]] = {}
    for cell in choosing():
        if cell.key in cells and cell.rate is not None:
            rates.setdefault(f"{cell.weights}|{cell.method}", {})[cell.rate] = mean_dice([cells[cell.key]])
    found: dict[str, Any] = {key: max(own, key=lambda rate: own[rate]) for key, own in rates.items()}
    forms = {f: [cells[c.key] for c in choosing_prior() if c.form == f and c.key in cells] for f in PRIORS}
    if all(forms.values()):
        found["prior"] = max(PRIORS, key=lambda f: mean_dice(forms[f]))
    return found


def main() -> None:
    """Fill the cells, then write `results/fseft.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cells whose name holds this, such as 'real|adapter|5'")
    parser.add_argument("--cells-only", action="store_true", help="fill cells, write no table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="five times the steps: results/fseft_full")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # training from scratch slows down by half without
    RESULTS.mkdir(exist_ok=True)
    name_of, steps = ("fseft_full", 5 * STEPS) if args.full else ("fseft", STEPS)
    kept = RESULTS / f".{name_of}.json"
    cells: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    bench = Bench(steps)
    for group in (choosing, choosing_prior, table_cells):
        for cell in group():
            if cell.key in cells or args.only not in cell.key:
                continue
            cells[cell.key] = bench.run(cell, chosen(cells))
            kept.write_text(json.dumps(cells))
            print(
                cell.key, f"{mean_dice([cells[cell.key]]):.3f}", f"{cells[cell.key]['cpu seconds']:.0f} s", flush=True
            )
    if not args.cells_only:
        report(cells, name_of, steps)
        kept.unlink()


# The report


def by_case(
    cells: dict[str, Any], weights: str, method: str, shots: int, seeds: Sequence[int], only: Sequence[str] = ()
) -> Any:
    """(seeds, cases) Dice, mean over classes."""
    rows = []
    for seed in seeds:
        queries = range(TI_QUERIES) if method == TI else [None]
        own: dict[str, Any] = {}
        for query in queries:
            own |= cells[Cell(weights, method, shots, seed, query).key]["dice"]
        rows.append([np.nanmean(own[id]) for id in (only or sorted(own))])
    return np.array(rows)


def spread(scores: np.ndarray) -> str:
    """Mean and 95 % interval over seeds of (seeds, cases)."""
    own = scores.mean(1)
    return f"{own.mean():.3f} ± {T_95[len(own)] * own.std(ddof=1) / np.sqrt(len(own)):.3f}"


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Paired over cases, means over seeds, with its 95 % interval."""
    d = paired_difference(a.mean(0), b.mean(0))
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def report(cells: dict[str, Any], name_of: str, steps: int) -> None:
    """Dice by shots, paired differences, transduction, choices."""
    choices = chosen(cells)
    record = {
        **facts(),
        "shots": SHOTS,
        "seeds": SEEDS,
        "steps": steps,
        "choices": choices,
        "cells": cells,
    }
    rows, trained = [], {}
    for weights in WEIGHTS:
        for method in (*METHODS, SCRATCH) if weights == "random" else METHODS:
            own = [by_case(cells, weights, method, k, SEEDS) for k in SHOTS]
            trained[method] = cells[Cell(weights, method, SHOTS[0], SEEDS[0]).key]["trained"]
            rows.append([f"{method}, {weights} weights", f"{trained[method]:,}", *map(spread, own)])
    pairs = []
    for title, a, b in (
        ("linear probe: real minus random weights", ("real", "linear probe"), ("random", "linear probe")),
        ("adapter: real minus random weights", ("real", "adapter"), ("random", "adapter")),
        ("real weights: adapter minus linear probe", ("real", "adapter"), ("real", "linear probe")),
        ("real weights: adapter minus FT-last", ("real", "adapter"), ("real", "FT-last")),
        ("adapter on real weights minus scratch", ("real", "adapter"), ("random", SCRATCH)),
    ):
        pairs.append([title, *(difference(by_case(cells, *a, k, SEEDS), by_case(cells, *b, k, SEEDS)) for k in SHOTS)])
    ti = []
    for weights in WEIGHTS:
        with_ti = by_case(cells, weights, TI, TI_SHOTS, TI_SEEDS)
        ids = sorted({i for q in range(TI_QUERIES) for i in cells[Cell(weights, TI, TI_SHOTS, 0, q).key]["dice"]})
        without = by_case(cells, weights, "adapter", TI_SHOTS, TI_SEEDS, ids)
        means = [f"{m.mean():.3f}" for m in (without, with_ti)]
        ti.append([f"{weights} weights", *means, difference(with_ti, without)])
    choice_rows = [[c.weights, c.method, c.rate, f"{mean_dice([cells[c.key]]):.3f}"] for c in choosing()]
    choice_rows += [
        ["real", f"{TI}, {f}", "", f"{mean_dice([cells[c.key] for c in choosing_prior() if c.form == f]):.3f}"]
        for f in PRIORS
    ]
    minutes = sum(cell["cpu seconds"] for cell in cells.values()) / 60
    shots = [f"K = {k}" for k in SHOTS]
    text = [
        "# Few-shot adaptation of a 3D network: hippocampus",
        "",
        f"`{PACK}` (anterior, posterior; {len(SEEDS)} seeds; the 12 test volumes), MeshNet `{MODEL}`. Dice, mean of both classes; ± is "
        "the 95 % interval over seeds, which draw the K volumes, the fresh parts and the random weights. The frozen networks see "
        f"{SURROUND} voxels of a crop's mirror image around it, `scratch` does not. Shortened: "
        f"{steps} steps of one whole volume in every row (the paper: 100 epochs of six patches a volume), no largest component; transduction on "
        f"{TI_QUERIES} queries, {len(TI_SEEDS)} seeds, K = {TI_SHOTS}.",
        "",
        table(["row", "trained", *shots], rows),
        "",
        "Paired differences over cases (means over seeds), with their 95 % intervals:",
        "",
        table(["difference", *shots], pairs),
        "",
        f"Transduction (size prior, margin 0.3, weight 1, form: {choices['prior']}), K = {TI_SHOTS}, the same queries and seeds:",
        "",
        table(["adapter on", "without TI", "with TI", "difference"], ti),
        "",
        "What was chosen on the validation split (8 volumes, seed 0; the prior on 2 of them):",
        "",
        table(["weights", "row", "learning rate", "Dice"], choice_rows),
        "",
        f"{footer(record)} All cells: {minutes:.1f} core-minutes.",
    ]
    write(name_of, record, "\n".join(text))


if __name__ == "__main__":
    main()
