"""What the benchmarks share: medians of interleaved rounds, the facts of the machine, and writing results."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def data_root() -> Path:
    """The real packs, beside the checkout."""
    return Path(__file__).resolve().parents[1].parent / "shared" / "data"


def facts() -> dict[str, Any]:
    """Date, machine and versions."""
    packages = ("torch", "torchvision", "timm", "transformers", "peft", "numpy", "medgraft")
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} torch threads, no GPU used",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def rounds(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, busy_share: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call, interleaved: every round times every call once, so that drift of the machine meets all alike, in an order of
    its own, so that none always follows the same one.

    With `busy_share`, a round in which any call got less than that share of its threads' CPU time is dropped and repeated
    (at most three times as many rounds are tried).
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    kept: dict[str, list[float]] = {name: [] for name in calls}
    tried, order, dice = 0, list(calls), random.Random(0)
    while len(next(iter(kept.values()))) < repeats and tried < 3 * repeats:
        tried += 1
        seconds, quiet = {}, True
        dice.shuffle(order)
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            seconds[name] = wall
            quiet &= cpu / wall >= busy_share
        if quiet:
            for name, s in seconds.items():
                kept[name].append(s)
    return kept


def median(values: list[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """The median over rounds of the ratio within the round."""
    return median([a / b for a, b in zip(times[above], times[below], strict=True)])


def memory(field: str) -> float:
    """MiB of this process by /proc: resident now (VmRSS), or the most it ever was (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def write(name: str, record: dict[str, Any], markdown: str) -> None:
    """`results/NAME.json` and `results/NAME.md`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    print(markdown)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def footer(record: Mapping[str, Any]) -> str:
    """Date, machine, versions in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return f"{record['date']}; {record['machine']}; Python {record['python']}; {versions}."
