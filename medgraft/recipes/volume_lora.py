"""Low-rank updates inside a 3D network: LoRA on its attention, ConvLoRA on its convolutions, and a voxelwise head.

Source: Hu et al. 2021 (LoRA); rank 4 on the attention of a volumetric Swin as in the 2025 form of FSEFT, which compares it to its
spatial adapter. The optimiser is AdamW, as for every parameter-efficient recipe.
"""

from __future__ import annotations

from typing import Any, Literal

from ..adapters import ConvLoRA, LinearHead, LoRA, Part
from ..training.fit import FitOptions
from .fseft import EPOCHS, VOLUME_DEFAULTS, dice_ce, need_volumes, support_priors
from .registry import recipe
from .run import Run

ATTENTION, CONVOLUTIONS = "*.attn.q,*.attn.v", "*"


@recipe("volume_lora", **VOLUME_DEFAULTS)
def volume_lora(
    run: Run,
    *,
    act_on: Literal["auto", "attention", "convolutions"] = "auto",
    targets: str = "",
    rank: int = 4,
    alpha: float = 8.0,
    priors: str = "size",
    margin: float = 0.3,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """LoRA in a 3D network: on the attention's q and v where it has some, else on its convolutions.

    targets: sites by name, in the place of those. priors: size, centroid, length travel along, for transduction.
    """
    need_volumes(run)
    has_some = any(s.kind == "linear" for s in run.frozen.sites.values())
    attention = has_some if act_on == "auto" else act_on == "attention"
    sites = (targets or (ATTENTION if attention else CONVOLUTIONS)).split(",")
    run.seeded()
    parts: dict[str, Part] = {}
    if kinds := [kind.strip() for kind in priors.split(",") if kind.strip()]:
        parts["priors"] = support_priors(run, kinds, margin=margin)
    parts["lora"] = (LoRA if attention else ConvLoRA).on(run.frozen, run.goal, targets=sites, rank=rank, alpha=alpha)
    parts["head"] = LinearHead.on(run.frozen, run.goal)
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps, lr=lr, weight_decay=weight_decay, warmup=min(20, steps // 10), seed=run.seed, precision=run.precision
    )
    settings = {"act_on": "attention" if attention else "convolutions", "targets": sites, "rank": rank, "alpha": alpha}
    return run.train("volume_lora", parts, options, settings=settings, loss=dice_ce)
