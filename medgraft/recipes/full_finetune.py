"""Full fine-tuning: the baseline. Trains a copy of the whole network, so what it leaves is a network and no adapter."""

from __future__ import annotations

from typing import Any

from ..training.fit import FitOptions
from .parameter_efficient import EPOCHS, Head
from .registry import recipe
from .run import Run


@recipe("full_finetune", augment="fresh")
def full_finetune(run: Run, *, head: Head = "linear", lr: float = 3e-4, weight_decay: float = 0.05) -> dict[str, Any]:
    """Every parameter of a copy of the backbone, and a small head: a baseline, not an adapter."""
    run.seeded()
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps, lr=lr, weight_decay=weight_decay, warmup=min(20, steps // 10), seed=run.seed, precision=run.precision
    )
    network = run.frozen.trainable_copy()
    return run.train("full_finetune", {"head": run.head(head)}, options, settings={"head": head}, network=network)
