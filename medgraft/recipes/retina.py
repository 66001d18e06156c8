"""Retinal segmentation across data sets, after the cross-dataset study of lesions: one recipe for adapters and for whole networks.

What the study (arXiv 2405.08329, known here by its summary) fixes: geometric and colour augmentation, pictures resized to a
square, Dice and area under the precision-recall curve per class, every combination of sets scored on every set
(`medgraft matrix --recipe retina`). Zoom, rotation, flips, brightness, contrast, blur and a gain for each colour are drawn here.

What is shortened: no U-Net with a ResNet-101 encoder but any backbone of ours; the backbone's own side in place of random
512-pixel patches of 1536-pixel pictures; fixed settings in place of a search (Optuna) on each set; hundreds of steps.
"""

from __future__ import annotations

from typing import Any, Literal

from ..adapters import LoRA, Part
from ..errors import BadCall
from ..training.fit import FitOptions
from .parameter_efficient import EPOCHS, Head
from .registry import recipe
from .run import Run

LR = {"lora": 2e-3, "none": 1e-2, "full": 3e-4}


@recipe("retina", blur=1.0, colour=0.1, crop=True)
def retina(
    run: Run,
    *,
    parts: Literal["lora", "none", "full"] = "lora",
    late: int = 2,
    rank: int = 8,
    alpha: float = 16.0,
    head: Head = "linear",
    lr: float | None = None,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """Cross-dataset retinal segmentation: LoRA on the last blocks (lora), a head alone (none), or the whole network (full)."""
    if parts not in LR:
        raise BadCall(f"parts must be lora, none or full, got {parts!r}")
    run.seeded()
    steps = run.steps_or(EPOCHS)
    rate = LR[parts] if lr is None else lr
    options = FitOptions(
        steps, lr=rate, weight_decay=weight_decay, warmup=min(20, steps // 10), seed=run.seed, precision=run.precision
    )
    settings: dict[str, Any] = {"parts": parts, "head": head}
    trained: dict[str, Part] = {}
    if parts == "lora":
        settings |= {"late": late, "rank": rank, "alpha": alpha}
        trained["lora"] = LoRA.on(run.frozen, run.goal, targets=_late_attention(run, late), rank=rank, alpha=alpha)
    trained["head"] = run.head(head)
    network = run.frozen.trainable_copy() if parts == "full" else None
    return run.train("retina", trained, options, settings=settings, network=network)


def _late_attention(run: Run, late: int) -> list[str]:
    """The q and v rows of the last `late` blocks: what lies before is frozen, so the prefix cache holds it."""
    depth = run.frozen.depth
    if not 1 <= late <= depth:
        raise BadCall(f"late is how many of the last blocks learn, 1 to {depth} on {run.frozen.spec.id}; got {late}")
    sites = run.frozen.sites.values()
    return [s.name for s in sites if s.stage >= depth - late and s.name.endswith((".attn.q", ".attn.v"))]
