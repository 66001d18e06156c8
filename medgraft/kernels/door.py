"""The door of every fused operation: whether its Triton kernel runs, and why.

The choice is a fact about the tensors and the machine, decided before anything runs and never by catching a failure. The environment
variable MEDGRAFT_KERNELS is read at each call:

off    plain torch everywhere
auto   kernels on the NVIDIA architectures that they were compiled and checked for, where the operation fits (the default)
on     kernels on trial as well, also on other NVIDIA architectures, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1),
       for tests

A kernel is on trial where it competes with products of the library and no committed table shows yet that it wins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import BadCall


def _module(name: str) -> Any:
    """A module of Triton, None where it is not installed: it comes with torch on Linux only."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton, tl = _module("triton"), _module("triton.language")
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU: settled when they are decorated, so when medgraft is imported."""

MODES = ("off", "auto", "on")
ARCHITECTURES = (80, 90)
"""Compute capabilities, times ten, for which every shipped configuration is compiled by the tests without a spill."""
MEASURED: frozenset[tuple[str, int]] = frozenset()
"""The kernels whose trial is over, by architecture: a committed table shows that they are faster there than the library."""


@dataclass(frozen=True)
class Path:
    """Which way an operation goes on given tensors, and the reason in words."""

    fused: bool
    why: str

    def __str__(self) -> str:
        return f"{'fused' if self.fused else 'not fused'}: {self.why}"


def mode() -> str:
    """MEDGRAFT_KERNELS, `auto` where it is not set. Raises BadCall for a word that is none of `MODES`."""
    found = os.environ.get("MEDGRAFT_KERNELS", "auto")
    if found not in MODES:
        raise BadCall(f"MEDGRAFT_KERNELS is {found!r}; it may be {', '.join(MODES)}")
    return found


def door(x: Tensor, unfit: str | None = None, trial: str | None = None) -> Path:
    """The path of an operation whose largest input is `x`.

    unfit : the operation's own reason to decline, if it has one.
    trial : the name under which it is looked up in `MEASURED`, if it is on trial.
    """
    asked = mode()
    if asked == "off":
        return Path(False, "MEDGRAFT_KERNELS=off")
    if triton is None:
        return Path(False, "Triton is not installed")
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return Path(False, "the kernels are for NVIDIA chips, this one is AMD's")
        chip = _chip(x.device)
        if asked == "auto" and chip not in ARCHITECTURES:
            known = ", ".join(f"sm_{c}" for c in ARCHITECTURES)
            return Path(False, f"sm_{chip} is none of the checked {known}; MEDGRAFT_KERNELS=on tries")
        if unfit is None and asked == "auto" and trial is not None and (trial, chip) not in MEASURED:
            return Path(False, f"not measured on sm_{chip} yet; MEDGRAFT_KERNELS=on takes it")
        return Path(False, unfit) if unfit else Path(True, f"Triton on sm_{chip}")
    if x.device.type != "cpu" or not INTERPRETED or asked != "on":
        return Path(False, f"the tensors are on {x.device.type}")
    if x.dtype == torch.bfloat16:
        return Path(False, "Triton's interpreter computes bfloat16 wrongly")
    return Path(False, unfit) if unfit else Path(True, "Triton's interpreter")


def architecture(x: Tensor) -> int:
    """The column of a configuration table for `x`: the largest entry of `ARCHITECTURES` that its chip can run."""
    return max((a for a in ARCHITECTURES if a <= _chip(x.device)), default=ARCHITECTURES[0])


def _chip(device: torch.device) -> int:
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *tensors_and_sizes: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first tensor, which need not be the current one."""
    with torch.cuda.device_of(tensors_and_sizes[0]):
        kernel[grid](*tensors_and_sizes, **options)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`; the function itself where Triton is not installed, for `door` never opens there."""
    return kernel if triton is None else triton.jit(kernel)
