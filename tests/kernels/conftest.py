"""One test file, three machines: the definition on the CPU, the kernels in Triton's interpreter, the kernels on a GPU.

A test that takes `device` runs on "cpu", and on "cuda" where there is one. Triton decides about its interpreter when a kernel is
decorated, so "interpreter" is a process of its own: `test_interpreter.py` starts pytest over these files with TRITON_INTERPRET=1, and
there `device` is "interpreter" and nothing else. bfloat16 is never trusted to it.

While a test with `device` runs, whatever medgraft allocates without filling it is NaN, between two bands of NaN; the bands are looked at
when the test ends. So an entry that nobody wrote, and one written next to where it belongs, are both seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["interpreter"] if INTERPRETED else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BAND = 64


class Device(str):
    """The fixture's name of a device, with what torch calls it and whether the kernels run there."""

    @property
    def torch(self) -> torch.device:
        return torch.device("cuda" if self == "cuda" else "cpu")

    @property
    def fused(self) -> bool:
        return self != "cpu"


def carved(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A NaN-filled tensor with the shape, strides, dtype and device of `like`, and the bands in front of it and behind it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    room = torch.full((extent + 2 * BAND,), float("nan"), dtype=like.dtype, device=like.device)
    return room.as_strided(like.shape, like.stride(), BAND), room[:BAND], room[BAND + extent :]


def surrounded(t: Tensor) -> Tensor:
    """`t` again, amid NaN: whatever reads beyond it is poisoned."""
    return carved(t)[0].copy_(t)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """See the top of the file."""
    bands: list[Tensor] = []

    def poisoning(plain: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            made = plain(*args, **kwargs)
            if type(made) is not Tensor or not made.is_floating_point() or made.device.type == "meta":
                return made
            inner, *outer = carved(made)
            bands.extend(outer)
            return inner

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    yield
    assert all(band.isnan().all() for band in bands), "something was written next to where it belongs"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, guarded: None) -> Device:
    """Where the operation runs, with the kernels on but for "cpu", which runs the definition."""
    here = Device(request.param)
    monkeypatch.setenv("MEDGRAFT_KERNELS", "on" if here.fused else "off")
    return here
