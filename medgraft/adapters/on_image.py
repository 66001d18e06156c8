"""One image on a host: its frozen prefix is computed once, and answers come from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..backbones.state import State
from ..pixels import LARGE, LARGE_SIDE, put_back
from .adapter import Adapter
from .prompting import ask, missing_prompts
from .task import Preprocessing

if TYPE_CHECKING:
    from .host import Host


class OnImage:
    """An image (H, W, 3) uint8 with every state of its prefix that an answer needed: a second click costs the decoder alone.

        on = host.on("image.png")
        mask = on.predict("gland", prompts={"points": [(40, 52)], "labels": [1]})

    One state is kept for each preprocessing and each stage at which an adapter begins. Not for several threads at once.
    """

    def __init__(self, host: Host, pixels: np.ndarray) -> None:
        self.host, self.pixels = host, pixels
        self._inputs: dict[Preprocessing, Tensor] = {}
        self._states: dict[Preprocessing, dict[int, State]] = {}

    @torch.no_grad()
    def predict(
        self,
        adapter: str,
        *,
        prompts: Mapping[str, Any] | None = None,
        probabilities: bool = False,
        by_default: bool = False,
    ) -> Any:
        """As `Host.predict`. With `by_default` what is not said is not asked for: a head takes the whole image as its box.

        Raises UnknownName, and BadCall for prompts that do not fit the image or the adapter.
        """
        found = self.host._graft(adapter).adapter
        if not by_default:
            missing_prompts(found, prompts)
        logits = self.logits(adapter, prompts=prompts)
        if found.task.kind == "classify":
            return dict(zip(found.task.classes, found.task.probabilities(logits)[0].tolist(), strict=True))
        return in_own_size(found, logits, self.pixels, probabilities=probabilities)

    def logits(self, adapter: str, *, prompts: Mapping[str, Any] | None = None) -> Tensor:
        """The logits (1, K, S, S) of the prepared image, or (1, K) of a classifier. Gradients flow to the adapter."""
        graft = self.host._graft(adapter)
        prepare = graft.adapter.for_pictures
        x = self._input(prepare)
        side = 4 * x.shape[-1] // self.host.backbone.spec.divisor
        frame = prepare.frame(self.pixels)
        asked = None if prompts is None else ask(graft.adapter, prompts, frame, x, mask_side=side)
        return self.host.resume(self._state(prepare, graft.first), x, adapter, prompts=asked)

    def _input(self, prepare: Preprocessing) -> Tensor:
        if prepare not in self._inputs:
            backbone = self.host.backbone
            x = prepare(self.pixels)[None].to(next(backbone.parameters()))
            self._inputs[prepare] = backbone.checked(x)
        return self._inputs[prepare]

    @torch.no_grad()
    def _state(self, prepare: Preprocessing, stage: int) -> State:
        """The frozen state after `stage` stages, from the latest one at hand that is no later."""
        kept = self._states.setdefault(prepare, {})
        if stage not in kept:
            earlier = [s for s in kept if s < stage]
            start = kept[max(earlier)] if earlier else self.host.backbone.stem(self._input(prepare))
            state = self.host.backbone.run(start, stop=stage)
            assert isinstance(state, State)
            kept[stage] = state
        return kept[stage]


def in_own_size(adapter: Adapter, logits: Tensor, pixels: np.ndarray, *, probabilities: bool) -> np.ndarray:
    """What logits (1, K, S, S) of the prepared image say of it: a label map (H, W) uint8, or probabilities (K, H, W) float32.

    Decided at the image's own size (bilinear, half-pixel centres), the padding cut off; above `LARGE` pixels at no more than 4,096
    a side and enlarged by the nearest pixel.
    """
    task, frame = adapter.task, adapter.for_pictures.frame(pixels)
    rows, columns = frame.box
    own = (rows.stop - rows.start, columns.stop - columns.start)
    shrink = max(1, -(-max(own) // LARGE_SIDE)) if own[0] * own[1] > LARGE else 1
    side = (max(1, own[0] // shrink), max(1, own[1] // shrink))
    full = functional.interpolate(_inside(logits.float(), frame.inside, frame.square), side, mode="bilinear")
    if not probabilities:
        labels = task.write(task.decide(full)[0].cpu().numpy())
        return put_back(_enlarged(labels, own), frame.box, frame.size)
    found = _enlarged(task.probabilities(full)[0].cpu().numpy(), own)
    background = 1 if len(found) > 1 else 0  # how many of the channels are background
    around = put_back(found[:background], frame.box, frame.size, fill=1)
    return np.concatenate([around, put_back(found[background:], frame.box, frame.size)])


def _inside(logits: Tensor, inside: tuple[int, int], square: int) -> Tensor:
    """The part of a square map (1, K, s, s) that is not padding, s the map's own side."""
    h, w = (max(1, round(n * logits.shape[-1] / square)) for n in inside)
    return logits[..., :h, :w]


def _enlarged(found: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., h, w) to `size` by the nearest pixel; as it is where it has that size."""
    if found.shape[-2:] == size:
        return found
    y, x = (np.arange(n) * m // n for n, m in zip(size, found.shape[-2:], strict=True))
    return found[..., y[:, None], x]
