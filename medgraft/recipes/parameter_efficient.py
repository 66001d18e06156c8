"""The parameter-efficient recipes with one site part and a small head: lora, bottleneck, vpt, ssf, and linear_probe without any.

Structure and sizes are the papers' (named in each part's file); the optimiser is AdamW for all, so that they can be compared. The
papers train for ImageNet-sized tasks with schedules of their own; with a handful of images a few hundred steps are enough.
"""

from __future__ import annotations

from typing import Any, Literal

from ..adapters import Bottleneck, LoRA, Part, PromptTokens, ScaleShift
from ..training.fit import FitOptions
from .registry import recipe
from .run import Run

Head = Literal["linear", "aspp"]
EPOCHS = 100  # where no number of steps is given


def _train(
    run: Run, name: str, part: Part | None, head: Head, lr: float, weight_decay: float, settings: dict[str, Any]
) -> dict[str, Any]:
    parts: dict[str, Part] = {} if part is None else {name: part}
    parts["head"] = run.head(head)
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule="linear",
        warmup=min(20, steps // 10),
        seed=run.seed,
        precision=run.precision,
    )
    return run.train(name, parts, options, settings={**settings, "head": head})


@recipe("lora")
def lora(
    run: Run,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "*.attn.q,*.attn.v",
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    head: Head = "linear",
    lr: float = 2e-3,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """LoRA (Hu et al. 2021) on the q and v rows of every attention, with a small head; rsLoRA and DoRA by option."""
    run.seeded()
    part = LoRA.on(
        run.frozen,
        run.goal,
        targets=targets.split(","),
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        dora=dora,
        dropout=dropout,
    )
    return _train(run, "lora", part, head, lr, weight_decay, {"rank": rank, "alpha": alpha, "targets": targets})


@recipe("bottleneck")
def bottleneck(
    run: Run,
    *,
    middle: int = 64,
    parallel: bool = True,
    scale: float = 0.1,
    targets: str = "*.mlp",
    head: Head = "linear",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """AdaptFormer (Chen et al. 2022): a bottleneck of 64 beside every MLP, scaled by 0.1; sequential by option."""
    run.seeded()
    part = Bottleneck.on(
        run.frozen, run.goal, targets=targets.split(","), middle=middle, parallel=parallel, scale=scale
    )
    return _train(
        run, "bottleneck", part, head, lr, weight_decay, {"middle": middle, "parallel": parallel, "scale": scale}
    )


@recipe("vpt")
def vpt(
    run: Run,
    *,
    count: int = 10,
    deep: bool = True,
    dropout: float = 0.1,
    head: Head = "linear",
    lr: float = 5e-3,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """Visual prompt tuning (Jia et al. 2022): learned tokens before every block (deep) or the first (shallow)."""
    run.seeded()
    part = PromptTokens.on(run.frozen, run.goal, count=count, deep=deep, dropout=dropout)
    return _train(run, "vpt", part, head, lr, weight_decay, {"count": count, "deep": deep})


@recipe("ssf")
def ssf(run: Run, *, head: Head = "linear", lr: float = 1e-3, weight_decay: float = 0.0) -> dict[str, Any]:
    """Scale and shift (SSF, Lian et al. 2022) behind every linear layer and norm."""
    run.seeded()
    return _train(run, "ssf", ScaleShift.on(run.frozen, run.goal), head, lr, weight_decay, {})


@recipe("linear_probe")
def linear_probe(run: Run, *, head: Head = "linear", lr: float = 1e-2, weight_decay: float = 0.01) -> dict[str, Any]:
    """A head alone on the frozen features; with the prefix cache a step costs milliseconds."""
    run.seeded()
    return _train(run, "linear_probe", None, head, lr, weight_decay, {})
