"""Episodes from a support set alone, to tune a network that segments in context for it: leave one out, ask for it, show the others.

    step t:  query = pair t of a shuffled stream;  context = the other pairs, or `others` of them;  all in view t

A view turns, mirrors and lights all pictures of a step alike: where an organ lies, and which way up, is part of what the support tells.
All is a function of (seed, t).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters import Task
from ..backbones import Backbone
from ..backbones.universeg import Context
from ..errors import BadCall
from .batches import Batch, Batches
from .in_context import Entering
from .items import Dataset, Item
from .transforms import Augment


class Together(Augment):
    """An augmentation whose views are the same for every item."""

    def __call__(self, image: Tensor, mask: Tensor | None, *, item: str, view: int) -> tuple[Tensor, Tensor | None]:
        """See `Augment`."""
        return super().__call__(image, mask, item="", view=view)


class Episodes(Batches):
    """Batches of one query. Put `entering` in the support's place while training: it holds the context of the last batch asked for.

    others : pairs shown in a step, drawn by (seed, t); None for all but the query. Raises BadCall for fewer than two pairs.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        backbone: Backbone,
        task: Task,
        *,
        others: int | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        crop: bool = False,
    ) -> None:
        if len(items) < 2:
            raise BadCall(
                f"leaving one pair out of {len(items)} leaves none to show; give two labelled images or more (--shots 2), or use the "
                "universeg recipe, which trains nothing"
            )
        if others is not None and others < 1:
            raise BadCall(f"others is the number of pairs shown in a step, 1 or more; got {others}")
        spec = backbone.spec
        super().__init__(
            dataset,
            items,
            size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            batch_size=1,
            seed=seed,
            augment=None if augment is None else Together(**vars(augment)),
            crop=crop,
        )
        self.backbone, self.outputs = backbone, task.outputs
        self.others = len(items) - 1 if others is None else min(others, len(items) - 1)
        site = backbone.sites["support"]
        self.entering = Entering({site.name: (site.fan_in, site.fan_out)})

    def batch(self, step: int) -> Batch:
        """The query of step `step`; sets its context."""
        visit, place = divmod(step, len(self.items))
        query = int(np.random.default_rng([self.seed, visit]).permutation(len(self.items))[place])
        rest = [item for n, item in enumerate(self.items) if n != query]
        drawn = sorted(np.random.default_rng([self.seed, step, 1]).permutation(len(rest))[: self.others].tolist())
        shown = self.collate([(rest[i], step) for i in drawn])
        self.entering.context = self._context(shown.images, shown.targets)
        return self.collate([(self.items[query], step)])

    @torch.no_grad()
    def _context(self, images: Tensor, labels: Tensor) -> Context:
        """images (S, 3, H, W) as the network is given them, labels (S, H, W); one class against the rest, as `Support.masks`."""
        like = next(self.backbone.parameters())
        grey = self.backbone.stem(self.backbone.checked(images.to(like))).x[:, 0]
        h, w = images.shape[-2:]
        classes = [1] if self.outputs == 1 else range(self.outputs)
        masks = torch.stack([labels == k for k in classes])[:, :, None].to(like)
        return Context(grey[..., :h, :w], masks, keep=False)
