"""A recipe as the trainer of a matrix: the same program on data sets that are put together in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.data import Dataset
from ..training.keeper import has_state
from ..training.matrix import Train
from .registry import find_recipe
from .run import Run


def trainer(recipe: str, shared: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> Train:
    """`train(dataset, out, seed)` for a `Matrix`. `shared` are options of `Run`, `options` the recipe's own.

    A training that was interrupted goes on from its state. Raises UnknownName for a recipe that does not exist.
    """
    found = find_recipe(recipe)

    def train(dataset: Dataset, out: Path, seed: int) -> dict[str, Any]:
        run = Run(data=dataset.root, out=out, seed=seed, **{**found.defaults, **(shared or {})})
        run = replace(run, resume=has_state(run.work_folder()))
        run.__dict__["dataset"] = dataset  # what `run.dataset` would have read from the folder
        return found.program(run, **(options or {}))

    return train
