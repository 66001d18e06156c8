"""Averages of an adapter's weights along its own training.

    swa    theta = mean of the checkpoints
    ema    theta <- d theta + (1 - d) theta_t,   beginning with the first checkpoint

Checkpoints are taken every `every` steps, counted back from the last one, from the fraction `start` of training on. Tensors are
averaged one by one (of LoRA's A and B too: along one run they stay close, and the rank stays as it is). Statistics of batch norm
are no average: they are measured anew under the averaged weights.

Sources: Izmailov et al. 2018 (arXiv:1803.05407), who keep the learning rate high or cyclic after `start`; under a rate that falls to
0 the checkpoints lie close together and little is left to average. Averaging itself is torch's (`torch.optim.swa_utils`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from ..errors import BadCall
from .batches import Batch


@dataclass(frozen=True)
class WeightAverage:
    """What to average; see the top of the file. `decay` is d, for `ema` alone."""

    kind: Literal["swa", "ema"] = "swa"
    start: float = 0.75
    every: int = 10
    decay: float = 0.99

    def __post_init__(self) -> None:
        if self.kind not in ("swa", "ema"):
            raise BadCall(f"the average of weights is 'swa' or 'ema', got {self.kind!r}")
        if not 0 <= self.start <= 1 or self.every < 1 or not 0 <= self.decay < 1:
            raise BadCall(
                f"an average of weights wants start in [0, 1], every >= 1 and decay in [0, 1); got start={self.start}, "
                f"every={self.every}, decay={self.decay}"
            )

    def due(self, step: int, steps: int) -> bool:
        """True where the weights after `step` (from 1) of `steps` are a checkpoint. The last step always is one."""
        return step >= self.start * steps and (steps - step) % self.every == 0


class RunningAverage:
    """The average of some parameters so far, in their own dtype. `state` and `load` carry it through an interruption."""

    def __init__(self, how: WeightAverage, parameters: Sequence[Tensor], steps: int) -> None:
        self.how, self.parameters, self.steps = how, parameters, steps
        self.count = 0
        self.mean: list[Tensor] = []
        self._blend = get_swa_multi_avg_fn() if how.kind == "swa" else get_ema_multi_avg_fn(how.decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` in, where they are a checkpoint."""
        if not self.how.due(step, self.steps):
            return
        now = [p.detach() for p in self.parameters]
        if self.count:
            self._blend(self.mean, now, self.count)
        else:
            self.mean = [t.clone() for t in now]
        self.count += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the average, of one checkpoint or more, into the parameters."""
        for p, mean in zip(self.parameters, self.mean, strict=True):
            p.copy_(mean)

    def state(self) -> dict[str, Any]:
        """What an interrupted run needs to go on."""
        return {"count": self.count, "mean": self.mean}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.count = int(state["count"])
        self.mean = list(state["mean"])


class _Forward(nn.Module):
    """An adapter as a module of batches; the host stays outside, so that nothing frozen is reset."""

    def __init__(self, adapter: nn.Module, logits: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.adapter, self.logits = adapter, logits

    def forward(self, batch: Batch) -> Tensor:
        return self.logits(batch)


def remeasure(adapter: nn.Module, batches: Iterable[Batch], logits: Callable[[Batch], Tensor]) -> None:
    """Set the running statistics of the adapter's batch norms to their means over `batches`, of which `logits` makes outputs."""
    update_bn(([batch] for batch in batches), _Forward(adapter, logits))
