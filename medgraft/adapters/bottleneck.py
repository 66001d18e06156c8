"""Bottleneck adapters on a transformer's branches.

    sequential:  y = h + Wu GELU(Wd h + bd) + bu         h = branch(x): the branch's output, before the residual sum
    parallel:    y = branch(x) + s (Wu ReLU(Wd x + bd) + bu)
    form="paper" (sequential): y = Wu GELU(Wd h + bd) + bu, AViT's printed equation, which is not silent at birth

    norm=True: Wd LN(.) for Wd ., a LayerNorm of the adapter's own, in any of them

Tensors of a site: `down.weight` (m, C), `down.bias`, `up.weight` (C, m), `up.bias`; `norm.weight` and `norm.bias` (C,) where there is a
norm, whose eps is 1e-5. Wu and bu start at zero.

Source: AViT, Du et al. 2023, section 2 and the authors' code (inner skip, zero start, m = C / 4); AdaptFormer, Chen et al. 2022
(arXiv:2205.13535) section 3.2 (parallel, m = 64, s = 0.1), whose code has the norm as an option (`adapter_layernorm_option="in"`, off by
default). In models with LayerScale the branch ends before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..errors import BadCall
from ..kernels import bottleneck
from ..kernels.bottleneck import bottleneck_path
from ..kernels.door import Path
from .part import Part, on_output, part, resolve, shapes
from .task import Task

TARGETS = ("*.attn", "*.mlp")


class Pair(nn.Module):
    """The two projections of one site, and what normalises in front of them."""

    def __init__(self, width: int, middle: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.down = nn.Linear(width, middle)
        self.up = nn.Linear(middle, width)


@part("bottleneck")
class Bottleneck(Part):
    """See the top of the file. `drop_path` is the rate at the last site, growing linearly from 0 at the first (training only)."""

    acts_on = ("branch",)

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        middle: int | None = None,
        parallel: bool = False,
        scale: float = 1.0,
        form: str = "code",
        drop_path: float = 0.0,
        norm: bool = False,
    ) -> None:
        if form not in ("code", "paper") or (parallel and form == "paper"):
            raise BadCall(
                f"form must be 'code', or 'paper' for a sequential bottleneck; got form={form!r}, parallel={parallel}"
            )
        if not isinstance(norm, bool):  # "none" would count as yes
            raise BadCall(f"norm must be True (a LayerNorm of its own in front) or False (none); got {norm!r}")
        super().__init__(
            sites, middle=middle, parallel=parallel, scale=scale, form=form, drop_path=drop_path, norm=norm
        )
        self.parallel, self.scale, self.form = parallel, scale, form
        last = max(len(self.sites) - 1, 1)
        by_depth = sorted(self.sites, key=_numbers)  # a file keeps its sites in another order
        self.drop = {name: drop_path * i / last for i, name in enumerate(by_depth)}
        for name, (_, width) in self.sites.items():
            pair = Pair(width, middle or width // 4, norm)
            if parallel:
                nn.init.kaiming_uniform_(pair.down.weight, a=5**0.5)
            else:
                nn.init.trunc_normal_(pair.down.weight, std=0.02)
            nn.init.zeros_(pair.down.bias)
            nn.init.zeros_(pair.up.bias)
            if form == "code":
                nn.init.zeros_(pair.up.weight)
            else:
                nn.init.trunc_normal_(pair.up.weight, std=0.02)
            self.put(name, pair)

    @classmethod
    def on(
        cls, backbone: Backbone, task: Task, *, targets: str | Sequence[str] = TARGETS, **options: Any
    ) -> Bottleneck:
        """A bottleneck at every branch that matches `targets`; `options` are the constructor's."""
        return cls(shapes(resolve(cls, backbone, targets)), **options)

    @property
    def silent(self) -> bool:
        """Yes, in the form of the code."""
        return self.form == "code"

    @property
    def why_not_silent(self) -> str:
        """The reason, for the printed equation."""
        return (
            ""
            if self.silent
            else "the paper's equation has no inner skip: the branch's output passes through drawn weights"
        )

    def path(self, sites: tuple[Site, ...], inner: Callable[..., Any], *inputs: Any) -> Path:
        """Of the two projections."""
        return bottleneck_path(inputs[0], len(self.cell(sites[0]).down.weight))

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """At a branch: x is its input (normed), the result is what the residual sum gets."""
        (site,) = sites
        pair = self.cell(site)
        out = inner(x, *args, **kwargs)
        rate = self.drop[site.name]

        def change(h: Tensor) -> Tensor:
            tensors = pair.down.weight, pair.down.bias, pair.up.weight, pair.up.bias
            norm = None if pair.norm is None else (pair.norm.weight, pair.norm.bias, pair.norm.eps)
            if self.parallel:
                y = bottleneck(x, h, *tensors, self.scale, relu=True, norm=norm)
            elif self.form == "code":
                y = bottleneck(h, h, *tensors, self.scale, norm=norm)
            else:
                y = bottleneck(h, None, *tensors, norm=norm)
            if self.training and rate and not site.folded:
                return stochastic_depth(y, rate, "row")
            return y

        return on_output(out, change)


def _numbers(site: str) -> list[str]:
    """A sorting key by which `blocks.2` stands before `blocks.10`."""
    return [f"{int(piece):06d}" if piece.isdecimal() else piece for piece in site.split(".")]
