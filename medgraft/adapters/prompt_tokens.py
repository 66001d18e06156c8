"""Visual prompt tokens (VPT).

    shallow: [cls; P; x] enters the first block and the prompts travel on
    deep:    at every block the prompts are replaced by that block's own P_i

P (n, C) is drawn uniformly from +-sqrt(6 / (3 p^2 + C)), p the patch size. Tensors of a site: `prompts`.

Source: Jia et al. 2022 (arXiv:2203.12119) section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..errors import BadCall
from .part import Part, part, resolve, shapes
from .task import Task


class Prompts(nn.Module):
    """The tokens of one site."""

    def __init__(self, count: int, width: int, bound: float) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))


@part("prompt_tokens")
class PromptTokens(Part):
    """See the top of the file."""

    acts_on = ("tokens",)
    innermost = True  # a second set at one block would take the first one's tokens for patches

    def __init__(
        self, sites: Mapping[str, Sequence[int]], count: int = 10, patch: int = 16, dropout: float = 0.0
    ) -> None:
        if count < 1:
            raise BadCall(f"prompt tokens: count must be at least 1, got {count}")
        super().__init__(sites, count=count, patch=patch, dropout=dropout)
        self.dropout = dropout
        for name, (width, _) in self.sites.items():
            self.put(name, Prompts(count, width, math.sqrt(6 / (3 * patch**2 + width))))

    @classmethod
    def on(
        cls,
        backbone: Backbone,
        task: Task,
        *,
        deep: bool = True,
        targets: str | Sequence[str] | None = None,
        **options: Any,
    ) -> PromptTokens:
        """Prompts at every block (`deep`) or at the first."""
        if targets is None:
            targets = "*.tokens" if deep else "blocks.0.tokens"
        options.setdefault("patch", backbone.spec.strides[0])
        return cls(shapes(resolve(cls, backbone, targets)), **options)

    @property
    def silent(self) -> bool:
        """No."""
        return False

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "drawn tokens join the sequence and are attended to from the first call"

    def act(
        self, sites: tuple[Site, ...], inner: Callable[..., Tensor], x: Tensor, prefix: int, prompts: int
    ) -> Tensor:
        """(B, prefix + prompts + N, C) -> (B, prefix + count + N, C)."""
        x = inner(x, prefix, prompts)
        own = functional.dropout(self.cell(sites[0]).prompts.to(x.dtype), self.dropout, self.training)
        return torch.cat([x[:, :prefix], own.expand(x.shape[0], -1, -1), x[:, prefix + prompts :]], 1)
