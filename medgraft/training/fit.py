"""`fit`: train one resident adapter of a host. Small on purpose; recipes decide everything that matters.

Step t depends on the parameters, the optimiser's moments and t alone: batch t is a function of (items, seed, t) and the random
numbers of step t are drawn from (seed, t). So a run that is resumed repeats the uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..adapters import Host
from ..errors import BadCall, BadData, Diverged, SaveFailed
from .batches import Batch, Batches
from .cache import PrefixCache
from .losses import classification_loss, segmentation_loss
from .metrics import dice, image_means
from .report import Log

Schedule = Literal["constant", "linear", "cosine", "halving"]


@dataclass(frozen=True)
class FitOptions:
    """How to optimise.

    steps, lr, weight_decay, betas : AdamW.
    schedule   : after `warmup` steps, constant, or down to 0 linearly or by a cosine, or halved after each quarter of the steps.
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

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or not self.lr > 0:
            raise BadCall(
                f"fit wants steps >= 1, accumulate >= 1 and lr > 0; got {self.steps}, {self.accumulate}, {self.lr}"
            )
        if self.schedule not in ("constant", "linear", "cosine", "halving") or self.precision not in ("fp32", "bf16"):
            raise BadCall(f"unknown schedule {self.schedule!r} or precision {self.precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        at = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = {
            "constant": 1.0,
            "linear": 1 - at,
            "cosine": (1 + math.cos(math.pi * at)) / 2,
            "halving": 0.5 ** int(4 * at),
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
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train the adapter `name` of `host` in place; only its parameters (and `extra`, for recipes that train a network) change.

    With `out`, a JSON-lines log and the training state are kept there; `resume` goes on from that state. The adapter is in eval
    mode afterwards. Raises Diverged at a loss or gradient that is not finite, before it touches a parameter; BadCall for a cache
    that lies behind the adapter or an augmentation that never repeats; BadData for a state of other options.
    """
    adapter = host.adapters[name]
    parameters = [*adapter.parameters(), *extra]
    if not parameters:
        raise BadCall(f"{name!r} has nothing to train")
    if cache is not None:
        _check_cache(host, name, cache, batches)
    optimiser = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    loss = loss or (segmentation_loss if adapter.task.kind == "segment" else classification_loss)
    keeper = _Keeper(out, options, batches, parameters, optimiser, list(adapter.buffers()))
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
                value, overlap = _step(host, name, batches, options, step, cache, loss, parameters, optimiser, device)
                smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
                step += 1
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
    finally:
        adapter.eval()
        if log is not None:
            log.close()
    seconds = time.perf_counter() - began
    return Fitted(
        step, smooth if smooth is not None else float("nan"), seconds, (step - first) / max(seconds, 1e-9), best
    )


def _step(
    host: Host,
    name: str,
    batches: Batches,
    options: FitOptions,
    step: int,
    cache: PrefixCache | None,
    loss: Callable[[Tensor, Tensor], Tensor],
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
                logits = _logits(host, name, images, batch, batches, cache, options.remat)
            one = loss(logits, targets) / options.accumulate
            if not torch.isfinite(one):
                raise Diverged(
                    f"the loss is {one.item()} at step {step + 1}; training stopped, the adapter holds its last good state (after step "
                    f"{step}). Lower the learning rate (now {options.rate(step):g}), or look for damaged images"
                )
            one.backward()
            value += one.item()
            if batches.task == "segment":
                overlap = _overlap(host.adapters[name].task.decide(logits), targets, host.adapters[name].task.outputs)
    norm = nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
    if not torch.isfinite(norm):
        raise Diverged(
            f"a gradient is not finite at step {step + 1}; training stopped, the adapter holds its last good state (after step {step}). "
            f"Lower the learning rate (now {options.rate(step):g})"
        )
    optimiser.step()
    return value, overlap


def _logits(
    host: Host, name: str, images: Tensor, batch: Batch, batches: Batches, cache: PrefixCache | None, remat: bool
) -> Tensor:
    if cache is None:
        return host(images, name, remat=remat)
    state = cache.states(images, [batches.digest(item) for item in batch.items], batch.views)
    return host.resume(state, images, name)


def _overlap(decided: Tensor, targets: Tensor, outputs: int) -> float | None:
    """Mean Dice of the batch, over images and foreground classes."""
    pairs = zip(decided.cpu().numpy(), targets.cpu().numpy(), strict=True)
    means = image_means([dice(p, t, max(outputs - 1, 1)) for p, t in pairs])
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
        pairs = zip(decided.numpy(), batch.targets.numpy(), strict=True)
        scores += [
            m
            for m in image_means([dice(p, t, max(adapter.task.outputs - 1, 1)) for p, t in pairs])
            if not math.isnan(m)
        ]
    return sum(scores) / len(scores) if scores else float("nan")


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


class _Keeper:
    """The training state on disk: parameters, buffers, moments, step. Replaced whole."""

    NAME = "training_state.pt"

    def __init__(
        self,
        out: Path | None,
        options: FitOptions,
        batches: Batches,
        parameters: list,
        optimiser: torch.optim.Optimizer,
        buffers: list,
    ) -> None:
        self.out, self.parameters, self.optimiser, self.buffers = out, parameters, optimiser, buffers
        shapes = [list(p.shape) for p in parameters]
        said = {
            **asdict(options),
            "items": [batches.digest(i) for i in batches.items],
            "batch": batches.batch_size,
            "shapes": shapes,
        }
        said["augment"] = repr(batches.augment)
        self.run = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def save(self, step: int) -> None:
        if self.out is None:
            return
        state: dict[str, Any] = {
            "run": self.run,
            "step": step,
            "parameters": [p.detach() for p in self.parameters],
            "buffers": list(self.buffers),
            "optimiser": self.optimiser.state_dict(),
        }
        new = self.out / f".{self.NAME}.new"
        try:
            torch.save(state, new)
            os.replace(new, self.out / self.NAME)
        except (OSError, RuntimeError) as refused:
            new.unlink(missing_ok=True)
            raise SaveFailed(
                f"could not keep the training state in {self.out}: {refused}; free space and go on with --resume"
            ) from refused

    def load(self) -> int:
        if self.out is None or not (self.out / self.NAME).is_file():
            raise BadData(f"nothing to resume: {self.out} holds no {self.NAME}; start without --resume")
        try:
            state = torch.load(self.out / self.NAME, weights_only=True)
        except Exception as broken:  # unpickling raises many types
            raise BadData(
                f"{self.NAME} in {self.out} cannot be read ({type(broken).__name__}); start again without --resume"
            ) from None
        if state["run"] != self.run:
            raise BadData(
                f"{self.NAME} in {self.out} belongs to a run with other options or images; resume with the same ones, or start anew"
            )
        with torch.no_grad():
            for mine, kept in zip(self.parameters + self.buffers, state["parameters"] + state["buffers"], strict=True):
                mine.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])

    @classmethod
    def forget(cls, out: Path) -> None:
        """Remove a finished run's training state."""
        (out / cls.NAME).unlink(missing_ok=True)


def forget_state(out: Path) -> None:
    """Remove the training state of a finished run."""
    _Keeper.forget(out)
