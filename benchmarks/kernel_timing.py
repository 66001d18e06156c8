"""How the operations of `medgraft.kernels` are timed beside their baselines: one process, interleaved rounds, medians of ratios."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median, ratio, rounds

BYTES, FLOPS = 4.3e12, 780e12
"""What an H200 reaches in bytes a second, read and written, and in half-precision operations a second; floors are computed from these."""


@dataclass(frozen=True)
class Way:
    """One way to compute an operation.

    call : gives the output.
    leaves : the tensors whose gradients it makes.
    trial : with MEDGRAFT_KERNELS=on, so that kernels on trial run as well.
    """

    call: Callable[[], Tensor]
    leaves: list[Tensor] = field(default_factory=list)
    trial: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation at one shape and dtype, with its ways; the first is what the others are divided by.

    target : what was asked for, in words.
    floor : seconds of the forward pass on an H200 that no arrangement can beat.
    """

    name: str
    ways: dict[str, Way]
    target: str = ""
    floor: float | None = None


def floor(flops: float, moved: float) -> float:
    """Seconds: the longer of arithmetic and traffic (bytes)."""
    return max(flops / FLOPS, moved / BYTES)


def timed(op: Operation, device: torch.device, *, repeats: int) -> dict[str, Any]:
    """Milliseconds and ratios to the first way, forward and forward + backward; on a GPU also under a CUDA graph."""
    names, first = list(op.ways), next(iter(op.ways))
    with torch.no_grad():
        forward = rounds(
            {n: _waiting(_asked(w, w.call), device) for n, w in op.ways.items()}, repeats=repeats, warmup=2
        )
        graphs = {n: g for n, w in op.ways.items() if (g := _graph(_asked(w, w.call), device)) is not None}
        graphed = (
            rounds({n: _waiting(g, device) for n, g in graphs.items()}, repeats=repeats) if first in graphs else {}
        )
        dy = torch.randn_like(op.ways[first].call())
    trained = {n: w for n, w in op.ways.items() if w.leaves}
    both = rounds({n: _waiting(_asked(w, _both(w, dy)), device) for n, w in trained.items()}, repeats=repeats, warmup=2)
    rows = []
    for name in names:
        row: dict[str, Any] = {"way": name}
        for what, times in (("forward", forward), ("both", both), ("graph", graphed)):
            if name in times and first in times:
                row[f"{what}_ms"], row[f"{what}_ratio"] = median(times[name]) * 1e3, ratio(times, name, first)
        if op.floor is not None and device.type == "cuda":
            row["of_floor"] = op.floor * 1e3 / row["forward_ms"]
        rows.append(row)
    return {"operation": op.name, "target": op.target, "rows": rows}


def _both(way: Way, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(way.call(), way.leaves, dy)

    return run


def _asked(way: Way, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, a pass of `way`, with the kernels that it asks for."""
    if not way.trial:
        return call

    def run() -> None:
        before = os.environ.get("MEDGRAFT_KERNELS", "auto")
        os.environ["MEDGRAFT_KERNELS"] = "on"
        try:
            call()
        finally:
            os.environ["MEDGRAFT_KERNELS"] = before

    return run


def _waiting(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _graph(call: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """`call` as a CUDA graph; None on a CPU, and where it copies from the host on the way."""
    if device.type != "cuda":
        return None
    try:
        call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
    except RuntimeError:
        return None
