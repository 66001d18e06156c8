"""Five adapters on one volume by sliding windows: time and memory. `python -m benchmarks.sliding_window [--only CELL] [--cells-only]`.

SwinUNETR (48 features, random weights: they cost what trained ones cost) on a part of the real CT, 96 x 64 x 30 voxels, which is two windows of
64 x 64 x 32. Each round times one adapter, five in one pass, and five passes of one, by the CPU time of the process, which does not see
who else uses the machine; the ratios are within rounds. FLOPs are counted by torch (convolutions, matrix products, attention).
Peaks are VmHWM of a process of their own, above what it held before the call; on a machine short of memory, which takes pages back, they are
too low. Finished cells are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, data_root, facts, footer, median, memory, ratio, table, write
from medgraft.adapters import Adapter, Host, Part, SpatialAdapter
from medgraft.adapters.heads import LinearHead
from medgraft.adapters.sliding import slide
from medgraft.adapters.task import segment
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import load_backbone
from medgraft.volumes import Volume, read_volume

SWIN, MESHNET = "random:monai:swin_unetr?feature_size=48", "random:meshnet:model5_gw_ae"
WINDOW, OVERLAP, COUNT = (64, 64, 32), 0.5, 5
KINDS = ("LinearHead", "SpatialAdapter")
CELLS = RESULTS / ".sliding_window.json"
GROWTH = ((128, 128, 128), (256, 128, 128))


@cache
def host_of(kind: str, id: str = SWIN) -> tuple[Host, list[str]]:
    """A host with five adapters of a kind: a linear head alone, or behind a spatial adapter in the form of the paper."""
    backbone, task = load_backbone(id, image_size=96), segment(["organ"])
    host, names = Host(backbone), [str(i) for i in range(COUNT)]
    for i, name in enumerate(names):
        torch.manual_seed(i)
        parts: dict[str, Part] = {}
        if kind == "SpatialAdapter":
            parts["spatial"] = SpatialAdapter.on(backbone, task, form="paper")
        host.add(Adapter.of(backbone, task, {**parts, "head": LinearHead.on(backbone, task)}), name)
    host.eval()
    return host, names


def scan() -> Tensor:
    """(1, 96, 64, 30): a part of the CT in an abdominal window."""
    whole = read_volume(data_root() / "ct_mr_sample" / "images" / "ct_abdomen.nii.gz")
    part = Volume(np.ascontiguousarray(whole.values[:96, :64]), whole.affine, whole.name)
    return VolumePreprocessing(WINDOW, intensity=("window", -175, 250))(part)


def run(host: Host, names: list[str], x: Tensor, window: tuple[int, int, int] = WINDOW) -> list[Tensor]:
    """The logits of the whole volume by every adapter."""
    return slide(host, x, names, window=window, overlap=OVERLAP)


def timed(kind: str, repeats: int) -> dict[str, Any]:
    """CPU seconds of interleaved rounds, FLOPs of one window, and how far shared and separate results lie apart."""
    host, names = host_of(kind)
    x = scan()
    calls: dict[str, Callable[[], Any]] = {
        "one": lambda: run(host, names[:1], x),
        "five": lambda: run(host, names, x),
        "separate": lambda: [run(host, [name], x)[0] for name in names],
    }
    together, alone = calls["five"](), calls["separate"]()
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, alone, strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    flops = {}
    for name, some in (("one", names[:1]), ("five", names)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            host(torch.zeros(1, 1, *WINDOW), adapters=some)
        flops[name] = counter.get_total_flops()
    return {
        "cpu_seconds": seconds,
        "gflops_a_window": {k: v / 1e9 for k, v in flops.items()},
        "largest_deviation": apart,
    }


def _peak(kind: str, count: int, id: str, shape: tuple[int, int, int] | None, out: Any) -> None:
    torch.set_num_threads(1)
    host, names = host_of(kind, id)
    x = scan() if shape is None else torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    before = memory("VmRSS")
    run(host, names[:count], x, WINDOW if shape is None else (64, 64, 64))
    out.put(memory("VmHWM") - before)


def peak(kind: str, count: int, id: str = SWIN, shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """MiB above what a fresh process held before the call."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_peak, args=(kind, count, id, shape, out))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the process that measures memory ended with {process.exitcode}; is there enough of it?")
    return {"peak_mib": float(out.get())}


def cells(repeats: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by key."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind in KINDS:
        found[f"time|{kind}"] = partial(timed, kind, repeats)
        for count in (1, COUNT):
            found[f"peak|{kind}|{count}"] = partial(peak, kind, count)
    for shape in GROWTH:
        found[f"peak|MeshNet|{shape[0]}"] = partial(peak, "LinearHead", COUNT, MESHNET, shape)
    return found


def main() -> None:
    """Fill the cells, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="measure this cell (again); others are taken as they are")
    parser.add_argument("--cells-only", action="store_true", help="fill cells and stop")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done: dict[str, Any] = json.loads(CELLS.read_text(encoding="utf-8")) if CELLS.exists() else {}
    wanted = cells(args.repeats)
    for key, make in wanted.items():
        if args.only != key and (args.only is not None or key in done):
            continue
        start = time.perf_counter()
        done[key] = {**make(), "seconds": time.perf_counter() - start}
        CELLS.parent.mkdir(exist_ok=True)
        CELLS.write_text(json.dumps(done))
        print(f"{key}: {done[key]}", flush=True)
    if args.cells_only:
        return
    missing = [key for key in wanted if key not in done]
    if missing:
        raise SystemExit(f"these cells are still empty: {', '.join(missing)}")
    write("sliding_window", {**facts(), "repeats": args.repeats, "cells": done}, text(done))


def text(done: dict[str, Any]) -> str:
    """The table and what it means."""
    rows = []
    for kind in KINDS:
        cell = done[f"time|{kind}"]
        seconds, flops = cell["cpu_seconds"], cell["gflops_a_window"]
        more = ratio(seconds, "five", "one")
        wanted = flops["five"] / flops["one"]
        rows.append(
            [
                kind,
                *(f"{median(seconds[name]):.1f}" for name in ("one", "five", "separate")),
                f"{more:.2f}x",
                f"{wanted:.2f}x",
                f"{more / wanted:.2f}",
                f"{ratio(seconds, 'five', 'separate'):.2f}x",
                f"{done[f'peak|{kind}|1']['peak_mib']:.0f}",
                f"{done[f'peak|{kind}|{COUNT}']['peak_mib']:.0f}",
            ]
        )
    header = [
        "adapters",
        "one, s",
        "five, s",
        "five passes, s",
        "five / one",
        "by FLOPs",
        "time / FLOPs",
        "five / five passes",
    ]
    own = done["time|SpatialAdapter"]
    flops, seconds = own["gflops_a_window"], own["cpu_seconds"]
    added = (flops["five"] - flops["one"]) / (COUNT - 1)
    rate_adapter = 2 * added * (COUNT - 1) / (median(seconds["five"]) - median(seconds["one"]))
    rate_rest = 2 * (flops["one"] - added) / (median(seconds["one"]) - 2 * added / rate_adapter)
    apart = max(done[f"time|{kind}"]["largest_deviation"] for kind in KINDS)
    small, large = (done[f"peak|MeshNet|{shape[0]}"]["peak_mib"] for shape in GROWTH)
    voxels = np.prod(GROWTH[1]) - np.prod(GROWTH[0])
    return f"""# Sliding windows: five adapters on one volume

SwinUNETR (48 features, random weights) on 96 x 64 x 30 voxels of a real CT: two windows of 64 x 64 x 32, every window's frozen prefix computed
once. CPU seconds of one thread, medians of interleaved rounds; ratios are medians within rounds. Peaks are VmHWM in MiB above the
loaded process.

{table([*header, "peak of one", "peak of five"], rows)}

Results of one pass and of five differ by {apart:.1e} of the largest logit at most. Of its {flops["one"]:.0f} GFLOP a window with one
SpatialAdapter, the adapter takes {added:.0f}, at {rate_adapter:.0f} GFLOP/s; the network runs at {rate_rest:.0f} GFLOP/s. A ratio of times
below the ratio of FLOPs is that difference.

Memory beside the network's own: stated 4 V (C + 1 + sum of K) bytes. Five heads on MeshNet (5 channels), windows of 64 x 64 x 64: {small:.0f} MiB
for {" x ".join(map(str, GROWTH[0]))} voxels, {large:.0f} MiB for {" x ".join(map(str, GROWTH[1]))}; the difference is {large - small:.0f} MiB,
{4 * voxels * (1 + COUNT) / 2**20:.0f} MiB as stated (the volume itself was there before).

{footer(facts())}
"""


if __name__ == "__main__":
    main()
