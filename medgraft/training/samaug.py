"""Training SAMAug's network: each picture twice, as it is and augmented, with priors that are computed once a view.

L = beta L(M(x), y) + lambda L(M(x_aug), y)         1 and 1 in the paper; 0 and 1 trains on augmented pictures alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.auto_masks import Grid, auto_masks
from ..adapters.samaug import SamAug
from ..backbones import Backbone, Features
from ..errors import BadCall
from .fit import Asked
from .items import Dataset, Item
from .losses import segmentation_loss


@dataclass
class TwoPictures:
    """The `forward` and the loss (a call) of one training; `raw` is beta, `augmented` lambda. Raises BadCall.

    Priors are kept in half precision for each item and view, 4 S^2 bytes each.
    """

    part: SamAug = field(repr=False)
    raw: float = 1.0
    augmented: float = 1.0
    _priors: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _answers: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.raw, self.augmented) < 0 or self.augmented == 0:
            raise BadCall(
                f"the loss weighs raw pictures by 0 or more and augmented ones by more than 0; got {self.raw}, {self.augmented}"
            )
        if self.raw == 0 and self.part.choose != "augmented":
            raise BadCall(
                f"a network that never learns from raw pictures has no answer for them to choose by {self.part.choose!r}; "
                "take choose=augmented, or raw above 0"
            )

    def forward(self, asked: Asked) -> Tensor:
        """The chosen answers (B, K, H, W) of a batch; both are remembered for the loss."""
        self._answers = self.part.both(asked.images, self.priors(asked))
        return self.part.chosen(*self._answers)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of the batch that `forward` saw last; `logits`, the chosen ones, are not looked at."""
        assert self._answers is not None
        raw, augmented = self._answers
        total = self.augmented * segmentation_loss(augmented, targets)
        return total + self.raw * segmentation_loss(raw, targets) if self.raw else total

    @torch.no_grad()
    def priors(self, asked: Asked) -> Tensor:
        """The priors (B, 2, H, W) of a batch, computed for views that were not seen before."""
        batch = asked.batch
        keys = [(item.id, view) for item, view in zip(batch.items, batch.views, strict=True)]
        fresh = [row for row, key in enumerate(keys) if key not in self._priors and key not in keys[:row]]
        if fresh:
            index = torch.tensor(fresh, device=asked.images.device)
            features = asked.host.backbone.run(asked.state.rows(index))
            assert isinstance(features, Features)
            for row, one in zip(fresh, self.part.priors(features, asked.images[index]), strict=True):
                self._priors[keys[row]] = one.half().cpu()
        return torch.stack([self._priors[key] for key in keys]).to(asked.images)

    @property
    def share_with_masks(self) -> float:
        """The share of the views seen so far in which SAM found at least one mask."""
        return sum(bool(one.any()) for one in self._priors.values()) / max(1, len(self._priors))


def share_with_masks(backbone: Backbone, dataset: Dataset, items: Sequence[Item], grid: Grid) -> float:
    """The share of `items` in which `backbone`, a SAM, finds at least one mask. Raises BadCall for no items."""
    if not items:
        raise BadCall("there are no items to look for masks in; choose a split that has some")
    return sum(len(auto_masks(backbone, dataset.image(item), grid).masks) > 0 for item in items) / len(items)
