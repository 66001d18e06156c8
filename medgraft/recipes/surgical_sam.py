"""SurgicalSAM, after SAMed: LoRA in SAM's image encoder and a decoder that finds every class by itself.

Wang, Islam, Xu, Zhang, Ren 2023, "SAM Meets Robotic Surgery" (medagi-sam-robotic-surgery), section 6. Defaults are the paper's: rank 4 on
q and v of every block without a further scale, the mask decoder and "no mask" trained, 0.2 cross-entropy + 0.8 Dice, AdamW with lr 1e-3 and
weight decay 0.1, 250 steps of warm-up, 160 epochs, batch 12, 512 px, flips, rotation and crops. The rate then falls as (1 - t)^0.9, SAMed's
form (the paper calls it exponential). Where we differ: a class's MLP begins as a copy of SAM's first, SAMed draws it; images keep SAM's
own normalisation.
The encoder is adapted from its first block on, so no prefix can be cached.
"""

from __future__ import annotations

from typing import Any

from ..adapters import ClassPrompts, LoRA, Part
from ..training.fit import FitOptions
from ..training.sam_losses import SamedLoss
from .registry import recipe
from .run import Run
from .sam_decoder import STARTER, need_masks, tuned_decoder

EPOCHS = 160


@recipe("surgical_sam", backbone=STARTER, steps=None, batch=12, augment="fresh")
def surgical_sam(
    run: Run, *, rank: int = 4, lr: float = 1e-3, weight_decay: float = 0.1, warmup: int = 250, dice: float = 0.8
) -> dict[str, Any]:
    """SurgicalSAM (Wang et al. 2023) after SAMed: LoRA in SAM's encoder, a decoder that finds every class.

    dice : the weight of the Dice loss, the rest is cross-entropy. warmup : steps of it, at most a tenth of all.
    The paper works at 512 px (--image-size 512).
    """
    need_masks(run, "surgical_sam")
    run.seeded()
    head = ClassPrompts.on(run.frozen, run.goal, quality=False)
    parts: dict[str, Part] = {
        "lora": LoRA.on(run.frozen, run.goal, targets=("blocks.*.attn.q", "blocks.*.attn.v"), rank=rank, alpha=rank),
        "decoder": tuned_decoder(run.frozen, run.goal, "decoder.no_mask"),
        "head": head,
    }
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule="polynomial",
        warmup=min(warmup, steps // 10),
        seed=run.seed,
        precision=run.precision,
    )
    return run.train("surgical_sam", parts, options, settings={"rank": rank, "dice": dice}, loss=SamedLoss(head, dice))
