"""`fit`: train one resident adapter of a host. Small on purpose; recipes decide everything that matters.

Step t depends on the parameters, the optimiser's moments and t alone: batch t is a function of (items, seed, t) and the random
numbers of step t are drawn from (seed, t). So a run that is resumed repeats the uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..adapters import Host
from ..backbones import State
from ..errors import BadCall, Diverged
from .averaging import RunningAverage, WeightAverage, remeasure
from .batches import Batch, Batches
from .cache import PrefixCache
from .fuse_style import FuseStyle
from .keeper import Keeper
from .losses import classification_loss, segmentation_loss
from .metrics import dice, image_means
from .report import Log

Schedule = Literal["constant", "linear", "polynomial", "cosine", "halving", "drops"]


@dataclass(frozen=True)
class FitOptions:
    """How to optimise.

    steps, lr, weight_decay : AdamW, or with optimiser = "sgd" Nesterov's momentum of 0.9.
    schedule   : after `warmup` steps, constant, or down to 0 linearly, as (1 - t)^0.9 (polynomial) or by a cosine, halved after each quarter of the steps, or (drops) a tenth
                 after 2/3 and again after 5/6 of them.
    clip       : largest gradient norm, 0 for none.
    accumulate : batches a step.
    precision  : "bf16" runs the forward pass under autocast.
    keep_every : steps between two saved training states.
    patience   : stop after so many validations without a better Dice (0: never); `validate_every` steps lie between two.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Schedule = "linear"
    warmup: int = 0
    clip: float = 1.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    keep_every: int = 100
    validate_every: int = 50
    patience: int = 0
    remat: bool = False
    optimiser: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or not self.lr > 0:
            raise BadCall(
                f"fit wants steps >= 1, accumulate >= 1 and lr > 0; got {self.steps}, {self.accumulate}, {self.lr}"
            )
        if self.schedule not in get_args(Schedule) or self.precision not in ("fp32", "bf16"):
            raise BadCall(f"unknown schedule {self.schedule!r} or precision {self.precision!r}")
        if self.optimiser not in ("adamw", "sgd"):
            raise BadCall(f"optimiser is 'adamw' or 'sgd', got {self.optimiser!r}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        at = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = {
            "constant": 1.0,
            "linear": 1 - at,
            "cosine": (1 + math.cos(math.pi * at)) / 2,
            "polynomial": (1 - at) ** 0.9,
            "halving": 0.5 ** int(4 * at),
            "drops": 0.1 ** ((at >= 2 / 3) + (at >= 5 / 6)),
        }
        return self.lr * factor[self.schedule]


@dataclass
class Fitted:
    """What a run did: steps taken, the last smoothed loss, seconds of the loop, steps a second, best validation Dice."""

    steps: int
    loss: float
    seconds: float
    rate: float
    best: float | None = None


def fit(
    host: Host,
    name: str,
    batches: Batches,
    options: FitOptions,
    *,
    out: Path | None = None,
    resume: bool = False,
    cache: PrefixCache | None = None,
    extra: Iterable[nn.Parameter] = (),
    validation: Batches | None = None,
    loss: Callable[..., Tensor] | None = None,
    forward: Forward | None = None,
    mix: FuseStyle | None = None,
    average: WeightAverage | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train the adapter `name` of `host` in place; only its parameters (and `extra`, for recipes that train a network) change.

    `forward` makes the logits of a step (prompts, clicks); validation has none of it.
    `loss` is called with logits and targets and, where the labels are partial, the batch's `groups` (see `partial_losses`).

    With `out`, a JSON-lines log and the training state are kept there; `resume` goes on from that state. `mix` blends styles at
    stages that the cache does not hide. With `average` the result is an average of the weights along training; validation, patience and
    the log speak of the weights as they are. The adapter is in eval mode afterwards. Raises Diverged at a loss or gradient that is not
    finite, before it touches a parameter; BadCall for a cache that lies behind the adapter, an augmentation that never repeats, or
    mixing before the cached stage; BadData for a state of other options.
    """
    adapter = host.adapters[name]
    parameters = [*adapter.parameters(), *extra]
    if not parameters:
        raise BadCall(f"{name!r} has nothing to train")
    if cache is not None:
        _check_cache(host, name, cache, batches)
    if mix is not None:
        mix.check(host.backbone, 0 if cache is None else cache.stage)
    optimiser = _optimiser(parameters, options)
    forward = forward or plain
    loss = loss or (segmentation_loss if adapter.task.kind == "segment" else classification_loss)
    running = None if average is None else RunningAverage(average, parameters, options.steps)
    identity = _identity(options, batches, parameters, mix, average, loss, forward)
    keeper = Keeper(out, identity, parameters, list(adapter.buffers()), optimiser, running)
    step = keeper.load() if resume else 0
    log = Log(out / "log.jsonl", resume_after=step if resume else None) if out is not None else None
    smooth: float | None = None
    best: float | None = None
    waited = 0
    began, first = time.perf_counter(), step
    device = parameters[0].device
    adapter.train()
    try:
        with _progress(quiet) as bar:
            task = bar.add_task("train", total=options.steps, completed=step, loss="", dice="")
            while step < options.steps:
                for group in optimiser.param_groups:
                    group["lr"] = options.rate(step)
                value, overlap = _step(
                    host, name, batches, options, step, cache, mix, loss, forward, parameters, optimiser, device
                )
                smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
                step += 1
                if running is not None:
                    running.update(step)
                bar.update(
                    task,
                    completed=step,
                    loss=f"loss {smooth:.3f}",
                    dice="" if overlap is None else f"Dice {overlap:.3f}",
                )
                if log is not None:
                    log.write(
                        step=step,
                        loss=value,
                        lr=options.rate(step - 1),
                        **({} if overlap is None else {"dice": overlap}),
                    )
                if validation is not None and step % options.validate_every == 0:
                    score = validate(host, name, validation)
                    adapter.train()
                    if log is not None:
                        log.write(step=step, val_dice=score)
                    better = best is None or score > best
                    best, waited = (score, 0) if better else (best, waited + 1)
                    if options.patience and waited >= options.patience:
                        break
                if step % options.keep_every == 0 or step == options.steps:
                    keeper.save(step)
            if running is not None and running.count:  # a run stopped early may have come to no checkpoint
                running.apply()
                _remeasure(host, name, batches, options, cache, mix, device, forward)
    finally:
        adapter.eval()
        if log is not None:
            log.close()
    seconds = time.perf_counter() - began
    return Fitted(
        step, smooth if smooth is not None else float("nan"), seconds, (step - first) / max(seconds, 1e-9), best
    )


@dataclass(frozen=True)
class Asked:
    """One forward pass in training: `resume(state, images, name, prompts=...)` gives logits, with gradients, as often as wanted."""

    host: Host
    name: str
    batch: Batch
    state: State
    images: Tensor
    step: int
    resume: Callable[..., Tensor]


Forward = Callable[[Asked], Tensor]
"""From what a step asks to logits (B, K, H, W); recipes with prompts have one of their own."""


def plain(asked: Asked) -> Tensor:
    """The usual forward pass: no prompts."""
    return asked.resume(asked.state, asked.images, asked.name)


def _step(
    host: Host,
    name: str,
    batches: Batches,
    options: FitOptions,
    step: int,
    cache: PrefixCache | None,
    mix: FuseStyle | None,
    loss: Callable[..., Tensor],
    forward: Forward,
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[float, float | None]:
    optimiser.zero_grad(set_to_none=True)
    value, overlap = 0.0, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(options.seed, step))
        for part in range(options.accumulate):
            batch = batches.batch(step * options.accumulate + part)
            images, targets = batch.images.to(device), batch.targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                logits = _logits(host, name, images, batch, batches, cache, mix, options.remat, forward, step)
            told = () if batch.groups is None else (batch.groups.to(device),)  # what each row's annotator told apart
            one = loss(logits, targets, *told) / options.accumulate
            if not torch.isfinite(one):
                raise Diverged(
                    f"the loss is {one.item()} at step {step + 1}; training stopped, the adapter holds its last good state (after step "
                    f"{step}). Lower the learning rate (now {options.rate(step):g}), or look for damaged images"
                )
            one.backward()
            value += one.item()
            if batches.task == "segment":
                task = host.adapters[name].task
                overlap = _overlap(task.decide(logits), targets, task.outputs, batch.groups)
    norm = nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
    if not torch.isfinite(norm):
        raise Diverged(
            f"a gradient is not finite at step {step + 1}; training stopped, the adapter holds its last good state (after step {step}). "
            f"Lower the learning rate (now {options.rate(step):g})"
        )
    optimiser.step()
    return value, overlap


def _logits(
    host: Host,
    name: str,
    images: Tensor,
    batch: Batch,
    batches: Batches,
    cache: PrefixCache | None,
    mix: FuseStyle | None,
    remat: bool,
    forward: Forward,
    step: int,
) -> Tensor:
    if cache is not None:
        state, remat = cache.states(images, [batches.digest(item) for item in batch.items], batch.views), False
    else:
        state = host.backbone.stem(host.backbone.checked(images))
    return forward(Asked(host, name, batch, state, images, step, partial(host.resume, remat=remat, between=mix)))


@torch.no_grad()
def _remeasure(
    host: Host,
    name: str,
    batches: Batches,
    options: FitOptions,
    cache: PrefixCache | None,
    mix: FuseStyle | None,
    device: torch.device,
    forward: Forward,
) -> None:
    """Batch norm under averaged weights: about one pass over the training images, as they were trained on."""

    def logits(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            return _logits(
                host, name, batch.images.to(device), batch, batches, cache, mix, False, forward, options.steps
            )

    pass_over = range(-(-len(batches.items) // batches.batch_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(options.seed, options.steps))
        remeasure(host.adapters[name], (batches.batch(t) for t in pass_over), logits)


def _optimiser(parameters: list[nn.Parameter], options: FitOptions) -> torch.optim.Optimizer:
    if options.optimiser == "sgd":
        decay = options.weight_decay
        return torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, nesterov=True, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)


def _dice(decided: Tensor, targets: Tensor, outputs: int, groups: Tensor | None) -> np.ndarray:
    """Mean Dice of each image, over the foreground classes that were annotated."""
    table = np.stack([dice(p, t, max(outputs - 1, 1)) for p, t in zip(decided.numpy(), targets.numpy(), strict=True)])
    if groups is not None:
        alone = (groups[:, :, None] == groups[:, None, :]).sum(2) == 1  # a group of its own: annotated
        table = np.where(alone[:, 1:].cpu().numpy(), table, np.nan)
    return image_means(table)


def _overlap(decided: Tensor, targets: Tensor, outputs: int, groups: Tensor | None = None) -> float | None:
    """Mean Dice of the batch, over images and foreground classes."""
    means = _dice(decided.cpu(), targets.cpu(), outputs, groups).tolist()
    return (
        None
        if all(math.isnan(m) for m in means)
        else float(sum(m for m in means if not math.isnan(m)) / sum(not math.isnan(m) for m in means))
    )


@torch.no_grad()
def validate(host: Host, name: str, batches: Batches) -> float:
    """Mean Dice (or accuracy) over every item once, at the training size. Leaves the adapter in eval mode."""
    adapter = host.adapters[name].eval()
    device = next(adapter.parameters()).device
    scores: list[float] = []
    for batch in batches.once():
        decided = adapter.task.decide(host(batch.images.to(device), name)).cpu()
        if adapter.task.kind == "classify":
            scores += (decided == batch.targets).float().tolist()
            continue
        means = _dice(decided, batch.targets, adapter.task.outputs, batch.groups)
        scores += [m for m in means.tolist() if not math.isnan(m)]
    return sum(scores) / len(scores) if scores else float("nan")


def _identity(
    options: FitOptions,
    batches: Batches,
    parameters: list[nn.Parameter],
    mix: FuseStyle | None,
    average: WeightAverage | None,
    loss: Callable[..., Tensor],
    forward: Forward,
) -> dict[str, Any]:
    """What two runs must share so that one can go on where the other stopped."""
    return {
        **asdict(options),
        "items": [batches.digest(item) for item in batches.items],
        "batch": batches.batch_size,
        "shapes": [list(p.shape) for p in parameters],
        "augment": repr(batches.augment),
        "labels": batches.labels,
        "mix": repr(mix),
        "average": repr(average),
        "loss": _said(loss),
        "forward": _said(forward),
    }


def _said(call: Callable[..., Any]) -> str:
    """A function by its name, an object by what it says of itself, or by its class where it says only its address."""
    if isinstance(call, partial):
        return f"{_said(call.func)}{call.args}{call.keywords}"
    owner = getattr(call, "__self__", call)
    if hasattr(owner, "__qualname__"):
        return str(owner.__qualname__)
    return type(owner).__qualname__ if type(owner).__repr__ is object.__repr__ else repr(owner)


def _check_cache(host: Host, name: str, cache: PrefixCache, batches: Batches) -> None:
    if cache.stage > host.cut(name):
        raise BadCall(
            f"the cache holds stage {cache.stage}, {name!r} acts from stage {host.cut(name)} on; cache an earlier stage"
        )
    if cache.backbone is not host.backbone:
        raise BadCall("the cache belongs to another backbone than the host's")
    if batches.augment is not None and batches.augment.views is None:
        raise BadCall(
            "augmentation draws a new view every time, so nothing would be found again; use a bank (views=8), or none"
        )


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}".encode()).digest()[:7], "big")


def _progress(quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[dice]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=quiet, transient=True)
