"""The training state on disk: what an interrupted `fit` needs to go on as if it had not stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadData, SaveFailed
from .averaging import RunningAverage


class Keeper:
    """Parameters, buffers, moments, averages and the step of one run. Replaced whole."""

    NAME = "training_state.pt"

    def __init__(
        self,
        out: Path | None,
        identity: Mapping[str, Any],
        parameters: list[nn.Parameter],
        buffers: list[Tensor],
        optimiser: torch.optim.Optimizer,
        running: RunningAverage | None,
    ) -> None:
        """`identity` is what another run must have in common to go on from here, in JSON types; without `out` nothing is kept."""
        self.out, self.parameters, self.buffers, self.optimiser = out, parameters, buffers, optimiser
        self.running = running
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def save(self, step: int) -> None:
        """Replace what is kept. Raises SaveFailed when the disk refuses; what was kept before still is."""
        if self.out is None:
            return
        state: dict[str, Any] = {
            "run": self.run,
            "step": step,
            "parameters": [p.detach() for p in self.parameters],
            "buffers": self.buffers,
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.running is None else self.running.state(),
        }
        new = self.out / f".{self.NAME}.new"
        try:
            torch.save(state, new)
            os.replace(new, self.out / self.NAME)
        except (OSError, RuntimeError) as refused:
            new.unlink(missing_ok=True)
            raise SaveFailed(
                f"could not keep the training state in {self.out}: {refused}; free space and go on with --resume"
            ) from refused

    def load(self) -> int:
        """Put everything back and return the steps done. Raises BadData where nothing fitting is kept."""
        if self.out is None or not (self.out / self.NAME).is_file():
            raise BadData(f"nothing to resume: {self.out} holds no {self.NAME}; start without --resume")
        try:
            state = torch.load(self.out / self.NAME, weights_only=True)
        except Exception as broken:  # unpickling raises many types
            raise BadData(
                f"{self.NAME} in {self.out} cannot be read ({type(broken).__name__}); start again without --resume"
            ) from None
        if state["run"] != self.run:
            raise BadData(
                f"{self.NAME} in {self.out} belongs to a run with other options or images; resume with the same ones, or start anew"
            )
        with torch.no_grad():
            for mine, kept in zip(
                [*self.parameters, *self.buffers], state["parameters"] + state["buffers"], strict=True
            ):
                mine.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        if self.running is not None:
            self.running.load(state["average"])
        return int(state["step"])


def has_state(out: Path) -> bool:
    """True where an interrupted run left its training state."""
    return (out / Keeper.NAME).is_file()


def forget_state(out: Path) -> None:
    """Remove the training state of a finished run."""
    (out / Keeper.NAME).unlink(missing_ok=True)
