"""Answers from a support set chosen for each query, drawn several times, or mirrored: what an adapter's one fixed set cannot do.

    p(x) = mean over draws d and mirrorings m of  m(p(m(x); m(support_d(x))))

A mirroring turns query and support together, so that what lies where stays true. Source: Kim et al. 2023, section 3.2 and table 4
(five draws averaged); mirroring as in nnU-Net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Host, Part
from ..adapters.support import Support
from ..backbones import Backbone
from ..backbones.universeg import CACHE_BYTES, Context
from ..errors import BadCall, unknown
from .support import BY_QUERY, FIXED, features_of, k_centre, nearest, slice_weighted, uniform

NAME = "in_context"
SELECTIONS = ("all", *FIXED, *BY_QUERY)
BY_FEATURES = ("k_centre", "nearest")
MIRRORS: Mapping[str, Sequence[tuple[int, ...]]] = {
    "none": ((),),
    "horizontal": ((), (1,)),
    "both": ((), (1,), (0,), (0, 1)),
}
"""The axes of a picture (H, W) that are turned over."""


class Entering(Part):
    """Stands where a support set does and hands over the `context` that it was given last. Never saved."""

    acts_on = ("support",)

    def __init__(self, sites: Mapping[str, Sequence[int]]) -> None:
        super().__init__(sites)
        self.context: Context | None = None

    def act(self, sites: Any, inner: Any, query: Tensor) -> Context | None:
        """The context."""
        return self.context


class InContext:
    """Predictions of an adapter with a support set, from parts of that set.

    select : "all" of the pairs; "uniform" or "k_centre", the same `shots` of them for every query; "slice_index" (wants `slices`,
             the slice number of each pair) or "nearest", `shots` of them for each. Features are those of `encoder`.
    draws  : choices whose probabilities are averaged, numbered by `seed`. flips : mirrorings averaged, 1, 2 or 4.

    The adapter's other parts (LoRA, say) act as always. One query at a time: threads want one of these each. Raises BadCall,
    UnknownName for what does not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        *,
        select: str = "all",
        shots: int | None = None,
        draws: int = 1,
        flips: Literal["none", "horizontal", "both"] = "none",
        seed: int = 0,
        slices: Sequence[int] | None = None,
        encoder: Backbone | None = None,
    ) -> None:
        support = next((p for p in adapter.site_parts.values() if isinstance(p, Support)), None)
        if support is None:
            raise BadCall("this adapter holds no support set to choose from; make one with `medgraft adapt universeg`")
        self.pairs = support.shots
        self.shots = self.pairs if shots is None else shots
        self.select, self.draws, self.mirrors, self.seed = select, draws, MIRRORS.get(flips, ()), seed
        self.slices, self.encoder = list(slices or ()), encoder
        self._check(flips)
        self.task = adapter.task
        self.entering = Entering(support.sites)
        parts = {name: self.entering if p is support else p for name, p in adapter.named_parts()}
        self.host = Host(backbone)
        self.host.add(Adapter(adapter.backbone, adapter.task, adapter.preprocessing, parts), NAME)
        self.images, self.masks = support.images()[:, None], support.masks()[:, :, None]
        self.features = torch.empty(0)
        if encoder is not None and select in BY_FEATURES:
            self.features = features_of(encoder, (_grey(x) for x in support.images()))
        self.fixed: list[list[Context]] | None = None
        if select not in BY_QUERY:
            terms = self.draws * len(self.mirrors) * self.masks[:, : self.shots].numel() * backbone.spec.width
            keep = 4 * terms <= CACHE_BYTES
            self.fixed = [self._mirrored(chosen, keep=keep) for chosen in self._chosen(None, None)]

    def probabilities(self, image: np.ndarray, z: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8, and its slice number where the choice depends on it -> (K, H, W) float32 in the image's own size."""
        contexts = self.fixed
        if contexts is None:
            contexts = [self._mirrored(chosen, keep=False) for chosen in self._chosen(image, z)]
        found = []
        for turned in contexts:
            for axes, context in zip(self.mirrors, turned, strict=True):
                self.entering.context = context
                p: np.ndarray = self.host.predict(np.flip(image, axes), NAME, probabilities=True)
                found.append(np.flip(p, tuple(a + 1 for a in axes)))
        return np.mean(found, 0)

    def indices(self, image: np.ndarray, z: int | None = None) -> np.ndarray:
        """Class indices (H, W), 0 for background."""
        p = self.probabilities(image, z)
        return (p[0] > 0.5).astype(np.int64) if len(p) == 1 else p.argmax(0)

    def predict(self, image: np.ndarray, z: int | None = None) -> np.ndarray:
        """The label map (H, W) uint8, as `Host.predict` gives it."""
        return self.task.write(self.indices(image, z))

    def _chosen(self, image: np.ndarray | None, z: int | None) -> list[list[int]]:
        """The pairs of each draw."""
        return [self._choice(image, z, [self.seed, draw]) for draw in range(self.draws)]

    def _choice(self, image: np.ndarray | None, z: int | None, seed: list[int]) -> list[int]:
        if self.select == "all":
            return list(range(self.pairs))
        if self.select == "uniform":
            return uniform(self.pairs, self.shots, seed)
        if self.select == "k_centre":
            return k_centre(self.features, self.shots, seed)
        if self.select == "slice_index":
            if z is None:
                raise BadCall("slice_index chooses by the query's slice number: give z=")
            return slice_weighted(self.slices, z, self.shots, seed)
        assert self.encoder is not None
        assert image is not None
        return nearest(self.features, features_of(self.encoder, [self._seen(image)])[0], self.shots)

    def _seen(self, image: np.ndarray) -> np.ndarray:
        """A query as the pairs are stored: grey, by its own range, at the adapter's size."""
        backbone = self.host.backbone
        x = self.host.adapters[NAME].for_pictures(image)[None].to(next(backbone.parameters()))
        h, w = x.shape[-2:]
        return _grey(backbone.stem(backbone.checked(x)).x[0, 0, 0, :h, :w].cpu())

    def _mirrored(self, chosen: Sequence[int], *, keep: bool) -> list[Context]:
        like = next(self.host.backbone.parameters())
        images, masks = self.images[chosen].to(like), self.masks[:, chosen].to(like)
        dims = [[a - 2 for a in axes] for axes in self.mirrors]
        return [Context(images.flip(d), masks.flip(d), keep=keep) for d in dims]

    def _check(self, flips: str) -> None:
        if self.select not in SELECTIONS:
            raise unknown("support selection", self.select, SELECTIONS)
        if flips not in MIRRORS:
            raise unknown("way to mirror", flips, MIRRORS)
        if not 1 <= self.shots <= self.pairs:
            raise BadCall(f"{self.shots} pairs asked for, the adapter holds {self.pairs}; ask for 1 to {self.pairs}")
        if self.select == "all" and self.shots < self.pairs:
            raise BadCall(
                f"'all' means all {self.pairs} pairs, shots={self.shots} was asked for; choose another selection"
            )
        if self.draws < 1 or (self.draws > 1 and self.select in ("all", "nearest")):
            raise BadCall(f"draws is 1 or more, and 1 where nothing is drawn ({self.select}); got {self.draws}")
        if self.select == "slice_index" and len(self.slices) != self.pairs:
            raise BadCall(f"slice_index wants slices=, the slice number of each of the {self.pairs} pairs")
        if self.select in BY_FEATURES and self.encoder is None:
            raise BadCall(
                f"{self.select} compares features: give encoder=, such as load_backbone('medgraft:starter-vit')"
            )


def _grey(x: Tensor) -> np.ndarray:
    """(H, W) in [0, 1] -> a grey picture, uint8 (H, W, 3)."""
    return np.repeat((x.float() * 255).round().to(torch.uint8).numpy()[..., None], 3, 2)
