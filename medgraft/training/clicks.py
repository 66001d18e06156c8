"""Clicks made from the truth and the errors of the last answer: to train with, and to count how many a person would need.

A click goes to the region of false negatives or false positives whose inmost pixel lies deeper: positive on the former, negative
on the latter, at that pixel (evaluation) or drawn among the pixels at least half as deep (training). Pixels clicked before are
out. The last answer is the mask prompt of the next question.

Sources: Sofiuk et al. 2022 (RITM) for the clicks, Xu et al. 2016 for the evaluation, Kim et al. 2023
(medagi-sam-histopath-interactive) for the mask prompt and the measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ..adapters import Host
from ..adapters.on_image import OnImage
from ..backbones.prompts import BACKGROUND, FOREGROUND, Prompts
from ..errors import BadCall, BadData
from .fit import Asked
from .items import Dataset
from .metrics import bootstrap_interval
from .prompting import drawn

TARGETS = (0.80, 0.85, 0.90)
MOST = 20
SURE = 13.0
"""The largest logit that an answer is told back with; a probability of float32 holds little more."""


class Click(NamedTuple):
    """x, y in pixels; label 1 on the object, 0 beside it."""

    x: int
    y: int
    label: int


def next_click(
    truth: np.ndarray, answer: np.ndarray, before: np.ndarray, rng: np.random.Generator | None = None
) -> Click:
    """The next click, by the rule at the top of the file; all maps (H, W) bool, `before` marks pixels clicked already.

    With nothing left to mend it is a click on the deepest pixel of the truth, or beside an empty one.
    """
    missed, added = _depth(truth & ~answer) * ~before, _depth(~truth & answer) * ~before
    label = FOREGROUND if missed.max() >= added.max() else BACKGROUND
    depth = missed if label == FOREGROUND else added
    if not depth.max():
        label = FOREGROUND if truth.any() else BACKGROUND
        depth = _depth(truth if truth.any() else ~truth)
    if rng is None:
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    else:
        ys, xs = np.nonzero(depth >= depth.max() / 2)
        chosen = rng.integers(len(xs))
        y, x = ys[chosen], xs[chosen]
    return Click(int(x), int(y), label)


def _depth(region: np.ndarray) -> np.ndarray:
    """Pixels to the nearest one outside the region; the image's border is outside."""
    found: np.ndarray = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return found


# Training


@dataclass(frozen=True)
class Clicked:
    """The forward pass of a step with simulated clicks, for `fit(forward=...)`.

    One click drawn from the truth, then n ~ U{0 .. `most` - 1} more, each on the errors of the answer before, which is the mask prompt;
    only the last answer has gradients. n is the same for a batch, drawn from (seed, step). Raises BadCall for no click.
    """

    seed: int
    most: int = 4

    def __post_init__(self) -> None:
        if self.most < 1:
            raise BadCall(f"training wants at least one click, got {self.most}")

    def __call__(self, asked: Asked) -> Tensor:
        """-> logits (B, 1, H, W)."""
        rng = drawn(self.seed, asked.step)
        truth = asked.batch.targets.numpy() > 0
        b, h, w = truth.shape
        side = 4 * h // asked.host.backbone.spec.divisor
        answers, before = np.zeros((b, h, w), dtype=bool), np.zeros((b, h, w), dtype=bool)
        clicks = np.zeros((b, 0, 3))
        earlier: Tensor | None = None
        count = 1 + int(rng.integers(self.most))
        for k in range(count):
            fresh = [next_click(*rows, rng) for rows in zip(truth, answers, before, strict=True)]
            clicks = np.concatenate([clicks, np.array(fresh, dtype=float)[:, None]], 1)
            for row, click in zip(before, fresh, strict=True):
                row[click.y, click.x] = True
            with torch.set_grad_enabled(k == count - 1):
                prompts = _prompts(clicks, earlier, asked.images)
                logits = asked.resume(asked.state, asked.images, asked.name, prompts=prompts)
            if k < count - 1:
                answers = (logits[:, 0] > 0).cpu().numpy()
                earlier = functional.interpolate(logits.float(), (side, side), mode="bilinear", antialias=True)
        return logits


def _prompts(clicks: np.ndarray, earlier: Tensor | None, like: Tensor) -> Prompts:
    """Clicks (B, N, 3) of x, y, label and the earlier answer's logits (B, 1, 4 h, 4 w), as one question an image."""
    points = torch.from_numpy(clicks[:, None, :, :2]).to(like)
    labels = torch.from_numpy(clicks[:, None, :, 2]).long().to(like.device)
    return Prompts(points=points, labels=labels, masks=earlier)


def normalised_focal(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Normalised focal loss: logits (B, 1, H, W), targets (B, H, W) with 0 and 1 -> a scalar, float32.

        L = - sum_i w_i log p_i / sum_i w_i,    w_i = (1 - p_i)^gamma

    p_i is the probability of pixel i's true class; the sums are over one image, the denominator is held constant, then the mean
    over images. So the gradient does not fade as the mask gets better. Raises BadCall for other shapes.
    Source: Sofiuk et al. 2019 (AdaptIS); without RITM's factor of 1/2, which is a rate.
    """
    if logits.shape[1] != 1 or logits.shape[0] != targets.shape[0] or logits.shape[2:] != targets.shape[1:]:
        raise BadCall(
            f"the normalised focal loss is of one class: logits (B, 1, H, W), targets (B, H, W); got {tuple(logits.shape)}, {tuple(targets.shape)}"
        )
    z = logits[:, 0].float() * (2 * targets.float() - 1)
    log_p = functional.logsigmoid(z)
    w = (1 - log_p.exp()).pow(gamma)
    total = w.sum((1, 2)).detach().clamp_min(torch.finfo(w.dtype).eps)
    return (-(w * log_p).sum((1, 2)) / total).mean()


# Measuring


@dataclass(frozen=True)
class Session:
    """One image clicked until done: IoU after each click, and the seconds that each answer took."""

    ious: tuple[float, ...]
    seconds: tuple[float, ...]

    def clicks_to(self, target: float) -> int | None:
        """How many clicks the IoU `target` took; None where it was never reached."""
        return next((k for k, v in enumerate(self.ious, 1) if v >= target), None)


Answer = Callable[[list[Click], np.ndarray | None], np.ndarray]
"""Clicks so far and the earlier probabilities (H, W) or None -> probabilities (H, W) of the object."""


def click_through(answer: Answer, truth: np.ndarray, *, most: int = MOST, target: float = max(TARGETS)) -> Session:
    """Click on the errors until the IoU with `truth` (H, W) bool reaches `target`, `most` times at most."""
    clicks: list[Click] = []
    before = np.zeros_like(truth)
    earlier: np.ndarray | None = None
    found = np.zeros_like(truth)
    ious, seconds = [], []
    while len(clicks) < most:
        clicks.append(next_click(truth, found, before))
        before[clicks[-1].y, clicks[-1].x] = True
        began = time.perf_counter()
        earlier = answer(clicks, earlier)
        seconds.append(time.perf_counter() - began)
        found = earlier > 0.5
        ious.append(float((found & truth).sum() / max(1, (found | truth).sum())))
        if ious[-1] >= target:
            break
    return Session(tuple(ious), tuple(seconds))


def answering(on: OnImage, name: str) -> Answer:
    """Answers of the resident adapter `name` for one image, whose embedding is kept between clicks."""

    def answer(clicks: list[Click], earlier: np.ndarray | None) -> np.ndarray:
        prompts: dict[str, Any] = {"points": [(c.x, c.y) for c in clicks], "labels": [c.label for c in clicks]}
        if earlier is not None:
            p = np.clip(earlier.astype(np.float64), 1e-9, 1 - 1e-9)
            prompts["mask"] = np.clip(np.log(p / (1 - p)), -SURE, SURE).astype(np.float32)
        found: np.ndarray = on.predict(name, prompts=prompts, probabilities=True)[0]
        return found

    return answer


def interactive_scores(
    host: Host, name: str, dataset: Dataset, split: str = "test", *, most: int = MOST
) -> dict[str, Any]:
    """Click through every item of `split`: how many clicks the resident adapter `name` needs for a given IoU.

    NoC@t : mean clicks until the IoU is t, an image that never gets there counting as `most`, with a 95 % `interval` over images.
    NoF@t : the share of images that never got there. SPC : median seconds a click, the image's embedding at hand.
    `iou_by_click` : mean IoU after 1, 2 ... clicks (an image that is done keeps its last).
    Items without an object are left out and counted in `empty`. Raises BadData where no item is left, BadCall for an adapter that takes no
    clicks.
    """
    adapter = host.adapters[name]
    if not any(r.takes_prompts for r in adapter.readouts):
        raise BadCall(f"{name!r} takes no clicks; they are counted for promptable adapters (mask_head, refine_decoder)")
    items = dataset.split(split)
    sessions, ids = [], []
    for item in items:
        truth = dataset.mask(item) > 0
        if not truth.any():
            continue
        on = host.on(dataset.image(item))
        on.logits(name)  # the embedding, outside the clock
        sessions.append(click_through(answering(on, name), truth, most=most))
        ids.append(item.id)
    if not sessions:
        raise BadData(
            f"{dataset.name!r} has no item with an object in split {split!r}, so there is nothing to click on"
        )
    said: dict[str, Any] = {"task": "clicks", "dataset": dataset.name, "split": split, "n": len(sessions)}
    said |= {"empty": len(items) - len(sessions), "most": most}
    for t in TARGETS:
        reached = [s.clicks_to(t) for s in sessions]
        clicks = np.array([most if c is None else c for c in reached], dtype=float)
        said[f"NoC@{100 * t:.0f}"] = float(clicks.mean())
        said[f"interval of NoC@{100 * t:.0f}"] = list(bootstrap_interval(clicks))
        said[f"NoF@{100 * t:.0f}"] = sum(c is None for c in reached) / len(reached)
    said["SPC"] = float(np.median([v for s in sessions for v in s.seconds]))
    padded = np.array([[*s.ious, *[s.ious[-1]] * (most - len(s.ious))] for s in sessions])
    said["iou_by_click"] = padded.mean(0).tolist()
    said["per_image"] = [{"id": i, "ious": list(s.ious)} for i, s in zip(ids, sessions, strict=True)]
    return said
