"""What flows through a backbone: a `State` between stages, `Features` at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompts

RIDING = "extra."


@dataclass(frozen=True)
class State:
    """A backbone's activations after `stage` stages.

    `x` and every tensor of `kept` have the batch as their first axis; `meta` is static (sizes, counts) and equal for all rows,
    so one method, `map`, moves, indexes, expands or stores a whole state.
    """

    x: Tensor
    stage: int
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """The state with `fn` applied to every tensor."""
        return replace(self, x=fn(self.x), kept={name: fn(t) for name, t in self.kept.items()})

    def rows(self, index: Tensor) -> State:
        """The rows named by `index` (int64, shape (rows,))."""
        return self.map(lambda t: t.index_select(0, index))

    def step(self, x: Tensor, **changes: Any) -> State:
        """The state one stage on, holding `x`."""
        return replace(self, x=x, stage=self.stage + 1, **changes)

    def carrying(self, **maps: Tensor) -> State:
        """The state with named maps beside it, which the readout hands to the parts among `Features.extra`."""
        return replace(self, kept={**self.kept, **{RIDING + name: t for name, t in maps.items()}})

    @property
    def riding(self) -> dict[str, Tensor]:
        """The maps that it carries, by name."""
        return {name.removeprefix(RIDING): t for name, t in self.kept.items() if name.startswith(RIDING)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.x, *self.kept.values()))


@dataclass(frozen=True)
class Features:
    """What a backbone reads out.

    maps    : feature maps (B, C, h, w), finest first, after the backbone's final norm where it has one.
    strides : input pixels per map pixel, one number per map.
    tokens  : (B, T, C) the normed sequence with its prefix (cls, registers) in front, or None for maps-only backbones.
    pooled  : (B, C) one vector an image: the cls token, or the mean of the last map.
    raw     : (B, C, h, w) the last map before the final norm (AViT's decoder reads this one).
    extra   : maps that readout parts computed from the image, by name (AViT's prompt), and further maps that a family reads out.
    decoder : the frozen promptable decoder of a family that has one (SAM), as a callable; static.
    prompts : what the call asks of it, or None.
    """

    maps: list[Tensor]
    strides: list[int]
    pooled: Tensor
    raw: Tensor
    tokens: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    decoder: Any = None
    prompts: Prompts | None = None

    def rows(self, index: Tensor) -> Features:
        """The rows named by `index` (int64, shape (rows,))."""

        def take(t: Tensor) -> Tensor:
            return t.index_select(0, index)

        return replace(
            self,
            maps=[take(m) for m in self.maps],
            pooled=take(self.pooled),
            raw=take(self.raw),
            tokens=None if self.tokens is None else take(self.tokens),
            extra={name: take(m) for name, m in self.extra.items()},
            prompts=None if self.prompts is None else self.prompts.take(index),
        )

    def row(self, i: int) -> Features:
        """Row `i` alone, as a batch of one."""
        return self.rows(torch.tensor([i], device=self.pooled.device))

    def with_extra(self, **maps: Tensor) -> Features:
        """The same features with more named maps."""
        return replace(self, extra={**self.extra, **maps})
