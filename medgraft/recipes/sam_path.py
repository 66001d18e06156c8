"""SAM-Path: class prompts, a second frozen encoder beside SAM's, the mask decoder trained.

Zhang et al. 2023, "SAM-Path: A Segment Anything Model for Semantic Segmentation in Digital Pathology" (medagi-sam-path). Defaults: the
loss's weights are those of the paper's ablation on BCSS, the optimiser is the authors': AdamW, lr 1e-4, weight decay 0.01, 72 steps of
warm-up, 32 epochs, batch 12, two batches a step, the rate falling to a tenth twice. `encoder` is any ViT of
the house in the place of HIPT's; "none" is the paper's "fine-tuned SAM". Both encoders are frozen, so each view passes them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..adapters import ClassPrompts, Fusion, Part, Tuned
from ..adapters.fusion import SECOND
from ..backbones import Backbone
from ..backbones.sam_source import renamed_key
from ..errors import BadCall
from ..training.cache import PrefixCache
from ..training.data import Batches
from ..training.fit import Asked, FitOptions
from ..training.sam_losses import SamPathLoss
from .registry import recipe
from .run import Run
from .sam_decoder import STARTER, need_masks, tuned_decoder

EPOCHS = 32


@dataclass(frozen=True)
class SeenOnce:
    """A training step's forward pass in which the second encoder's maps come from a cache."""

    fusion: Fusion = field(repr=False)
    cache: PrefixCache = field(repr=False)
    batches: Batches = field(repr=False)

    def __call__(self, asked: Asked) -> Tensor:
        """-> logits (B, K, H, W)."""
        digests = [self.batches.digest(item) for item in asked.batch.items]
        state = self.cache.states(self.fusion.prepared(asked.images), digests, asked.batch.views)
        carrying = asked.state.carrying(**{SECOND: self.fusion.seen(state)})
        return asked.resume(carrying, asked.images, asked.name)


@recipe("sam_path", backbone=STARTER, steps=None, batch=12)
def sam_path(
    run: Run,
    *,
    encoder: str = "medgraft:starter-vit",
    alpha: float = 0.25,
    beta: float = 0.0625,
    form: Literal["paper", "code"] = "paper",
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    warmup: int = 72,
    accumulate: int = 2,
) -> dict[str, Any]:
    """SAM-Path (Zhang et al. 2023): SAM's decoder asked by class prompts, on what SAM and a second encoder see.

    encoder     : the id of the second encoder, any ViT; none for SAM alone.
    alpha, beta : weights of the focal loss against Dice, and of the IoU estimates (0 leaves them out; the paper's for CRAG: 0.125, 0).
    form        : the printed method, or the authors' tokens and mean over the foreground ("code").
    warmup      : steps of it, at most a tenth of all. accumulate : batches a step.
    """
    need_masks(run, "sam_path")
    run.seeded()
    head = ClassPrompts.on(run.frozen, run.goal, form=form, quality=beta > 0)
    parts: dict[str, Part] = {"decoder": tuned_decoder(run.frozen, run.goal)}
    batches, forward = run.batches(), None
    if encoder != "none":
        fusion = Fusion.on(run.frozen, run.goal, encoder=encoder)
        parts["fusion"] = fusion
        if run.cache != "off" and run.augment != "fresh":
            directory = None if run.cache == "memory" else run.cache
            cache = PrefixCache(fusion.second, fusion.second.depth, directory=directory)
            forward = SeenOnce(fusion, cache, batches)
    parts["head"] = head
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule="drops",
        warmup=min(warmup, steps // 10),
        accumulate=accumulate,
        seed=run.seed,
        precision=run.precision,
    )
    return run.train(
        "sam_path",
        parts,
        options,
        settings={"encoder": encoder, "alpha": alpha, "beta": beta, "form": form},
        batches=batches,
        loss=SamPathLoss(head, alpha, beta, form),
        forward=forward,
    )


def load_authors(backbone: Backbone, parts: Mapping[str, Part], state: Mapping[str, Tensor]) -> None:
    """Copy a SAM-Path checkpoint with the authors' key names into the parts of `sam_path` (form "code"). Raises BadCall for what does not fit.

    [model.]model.mask_decoder.* goes into class prompts and tuned decoder, fusion_neck.* into the fusion.
    """
    decoder = "mask_decoder."
    own = {renamed_key(decoder + name.split(decoder, 1)[1]): t for name, t in state.items() if decoder in name}
    for part in parts.values():
        if isinstance(part, ClassPrompts | Fusion):
            part.load_authors(state)
        elif isinstance(part, Tuned):
            found = {}
            for name, mine in part.tensors().items():
                site, leaf = name.rsplit(".", 1)
                theirs = f"{backbone.sites[site].path}.{leaf}"
                if theirs not in own or own[theirs].shape != mine.shape:
                    raise BadCall(
                        f"not a SAM-Path checkpoint for {backbone.spec.id}: {theirs} is missing or of another shape"
                    )
                found[name] = own[theirs]
            part.load_tensors(found)
