"""CEmb-SAM: one decoder for several sub-groups, whose embedding is renormalised by the sub-group; asked by boxes.

Shin, Kim, Baek 2023, "CEmb-SAM: Segment Anything Model with Condition Embedding for Joint Learning from Heterogeneous Datasets"
(medagi-cemb-sam). Defaults are the paper's: lr 3e-4, Dice + cross-entropy 1:1, boxes moved outwards by 0 to 10 pixels at 256, 100
epochs, batch 8, weight decay 1e-3; encoder and prompt encoder frozen. The sub-group is the item's `domain`.
Where we differ: images keep SAM's own normalisation, which the authors' code never applies; Adam's decay is decoupled and the rate
constant, where theirs follows a validation loss taken on thresholded masks; the cross-entropy, which is always 0 in their code (one
channel), is the binary one.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..adapters import ConditionEmbedding, MaskHead, Part
from ..errors import BadData
from ..training.fit import FitOptions
from ..training.losses import segmentation_loss
from .registry import recipe
from .run import Run
from .sam_decoder import EPOCHS, FIRST_MASK, STARTER, ByBox, need_one_class, tuned_decoder


def groups_of(run: Run) -> tuple[str, ...]:
    """The domains of the items to learn from, in order of their names. Raises BadData where an item has none."""
    without = [i.id for i in run.support if i.domain is None]
    if without:
        raise BadData(
            f"cemb_sam learns by sub-group, and {len(without)} of {len(run.support)} items of {run.dataset.name!r} have no 'domain' "
            f"(such as {without[0]}); add it to dataset.json, or use sam_decoder"
        )
    return tuple(sorted({str(i.domain) for i in run.support}))


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of each image and cross-entropy, 1:1."""
    return segmentation_loss(logits, target, form="dice_ce")


@recipe("cemb_sam", backbone=STARTER, steps=None, batch=8)
def cemb_sam(
    run: Run,
    *,
    lr: float = 3e-4,
    weight_decay: float = 1e-3,
    form: Literal["paper", "code"] = "paper",
    unknown: str = "refuse",
    most: int = 8,
) -> dict[str, Any]:
    """CEmb-SAM (Shin et al. 2023): SAM's decoder, asked by boxes, on an embedding renormalised by sub-group.

    form    : the printed equations, or the authors' perceptron ("code").
    unknown : what a sub-group never seen is taken for: refuse, mean, or the name of one.
    most    : objects of an image asked for in a step.
    """
    need_one_class(run, "cemb_sam")
    groups = groups_of(run)
    run.seeded()
    parts: dict[str, Part] = {
        "decoder": tuned_decoder(run.frozen, run.goal, *FIRST_MASK),
        "condition": ConditionEmbedding.on(run.frozen, run.goal, groups=groups, unknown=unknown, form=form),
        "head": MaskHead.on(run.frozen, run.goal),
    }
    options = FitOptions(
        run.steps_or(EPOCHS),
        lr=lr,
        weight_decay=weight_decay,
        schedule="constant",
        seed=run.seed,
        precision=run.precision,
    )
    return run.train(
        "cemb_sam",
        parts,
        options,
        settings={"form": form, "unknown": unknown, "most": most},
        loss=dice_ce,
        forward=ByBox(run.seed, most, groups=groups),
    )
