"""SAM, clicked: a mask decoder tuned with simulated clicks and the earlier answer as its mask prompt.

Kim, Oh, Min, Jeong 2023, "Evaluation and Improvement of Segment Anything Model for Interactive Histopathology Image Segmentation"
(medagi-sam-histopath-interactive). The encoder and the prompt encoder stay frozen; the decoder's transformer is tuned, and its end is
the paper's (`decoder="refine"`) or SAM's own, tuned too (`decoder="own"`, the paper's SAM^MD). Defaults are the paper's: normalised
focal loss, 30 epochs, lr 5e-4, a tenth of it at epochs 20 and 25. Where we differ: the encoder is frozen, so its embeddings are
computed once; `residual` (ours) adds the new end to SAM's own mask, which few images ask for.
"""

from __future__ import annotations

from typing import Any, Literal

from ..adapters import MaskHead, Part, RefineDecoder, Task, Tuned
from ..backbones import Backbone
from ..errors import BadCall
from ..training.clicks import Clicked, normalised_focal
from ..training.fit import FitOptions
from .registry import recipe
from .run import Run

EPOCHS = 30
TRANSFORMER = ("decoder.iou_token", "decoder.mask_tokens", "decoder.layers.*", "decoder.last.*")
OWN_END = ("decoder.up*", "decoder.masks.0.*")


def interactive_parts(
    backbone: Backbone, task: Task, *, decoder: str = "refine", residual: bool = False
) -> dict[str, Part]:
    """The tuned transformer and the end of the decoder; see the top of the file. Raises BadCall."""
    if decoder not in ("refine", "own"):
        raise BadCall(f"decoder is 'refine' (the paper's) or 'own' (SAM's, tuned), got {decoder!r}")
    own = decoder == "own" or residual
    tuned = Tuned.on(backbone, task, targets=[*TRANSFORMER, *(OWN_END if own else ())])
    if decoder == "own":
        return {"decoder": tuned, "head": MaskHead.on(backbone, task)}
    return {"decoder": tuned, "head": RefineDecoder.on(backbone, task, residual=residual)}


@recipe("sam_interactive", backbone="medgraft:starter-sam", steps=None, augment="bank", batch=4)
def sam_interactive(
    run: Run,
    *,
    lr: float = 5e-4,
    weight_decay: float = 0.0,
    decoder: Literal["refine", "own"] = "refine",
    residual: bool = False,
    clicks: int = 4,
) -> dict[str, Any]:
    """A SAM that answers clicks (Kim et al. 2023): simulated clicks, the earlier answer as mask prompt, a deeper decoder.

    decoder : the paper's deeper end ("refine") or SAM's own ("own"). residual : the new end is added to SAM's own mask.
    clicks : at most so many in a training step. One class: several are asked for as one with --classes.
    """
    if run.task != "segment":
        raise BadCall("sam_interactive segments; for classification use lora, bottleneck, vpt, ssf or linear_probe")
    run.seeded()
    parts = interactive_parts(run.frozen, run.goal, decoder=decoder, residual=residual)
    options = FitOptions(
        run.steps_or(EPOCHS), lr=lr, weight_decay=weight_decay, schedule="drops", seed=run.seed, precision=run.precision
    )
    settings = {"decoder": decoder, "residual": residual, "clicks": clicks}
    return run.train(
        "sam_interactive",
        parts,
        options,
        settings=settings,
        loss=normalised_focal,
        forward=Clicked(run.seed, most=clicks),
    )
