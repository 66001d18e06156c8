"""LoRA on linear layers: low-rank updates of frozen weights; DoRA by its algebraic norm.

    y = x W^T + b + s (x A^T) B^T,   s = alpha / r, or alpha / sqrt(r) for rsLoRA

A (r, in) is drawn, B (out, r) is zero, so a fresh part is silent. Sites may be whole projections (`*.attn.qkv`) or the q, k or v
rows of a fused one (`*.attn.q`); a site's tensors are `A`, `B` and, for DoRA, `magnitude` (out,), relative to the row norms of W.

Source: Hu et al. 2021 (arXiv:2106.09685) section 4.1; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732); DoRA: Liu et al. 2024
(arXiv:2402.09353) section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.sites import Site
from ..backbones.weights import Weights
from ..errors import BadCall
from ..kernels import dora_gain, dora_linear, lora_linear, mixed_lora_linear
from ..kernels.door import Path
from ..kernels.lora_linear import lora_path
from .part import Part, part, resolve, shapes
from .task import Task

TARGETS = ("*.attn.q", "*.attn.v")


class Factors(nn.Module):
    """A (r, in) and B (out, r) of one site, and DoRA's magnitude."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, dora: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, fan_in))
        self.B = nn.Parameter(torch.zeros(fan_out, rank))
        self.magnitude = nn.Parameter(torch.ones(fan_out)) if dora else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


@part("lora")
class LoRA(Part):
    """See the top of the file."""

    acts_on = ("linear", "weights")

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        rank: int = 8,
        alpha: float = 16.0,
        rslora: bool = False,
        dora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if rank < 1 or not 0 <= dropout < 1:
            raise BadCall(f"LoRA wants a rank >= 1 and a dropout in [0, 1), got rank={rank}, dropout={dropout}")
        super().__init__(sites, rank=rank, alpha=alpha, rslora=rslora, dora=dora, dropout=dropout)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dora, self.dropout = dora, dropout
        for name, (fan_in, fan_out) in self.sites.items():
            self.put(name, Factors(fan_in, fan_out, rank, dora))

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, targets: str | Sequence[str] = TARGETS, **options: Any) -> LoRA:
        """Low-rank factors at every linear site that matches `targets`; `options` are the constructor's."""
        return cls(shapes(resolve(cls, backbone, targets)), **options)

    @property
    def mixable(self) -> bool:
        """Rows with different LoRA adapters share one call; DoRA rescales the frozen product and does not, dropout is each part's own."""
        return not self.dora and not (self.training and self.dropout)

    @property
    def foldable(self) -> bool:
        """Always."""
        return True

    @property
    def innermost(self) -> bool:  # type: ignore[override]
        """DoRA needs the frozen weight at hand."""
        return self.dora

    def check(self, backbone: Backbone) -> None:
        """DoRA's sites may not overlap: each norm is taken of the frozen rows. It and dropout need a linear layer."""
        kernels = [name for name in self.sites if backbone.sites[name].kind == "weights"]
        if kernels and (self.dora or self.dropout):
            raise BadCall(
                f"{kernels[0]} of {backbone.spec.id} hands its weights out; LoRA acts there without dora and without dropout"
            )
        whole = [name for name in self.sites if backbone.sites[name].span is None] if self.dora else []
        for name in self.sites:
            port = backbone.sites[name].port
            if name != port and port in whole:
                raise BadCall(
                    f"DoRA at {name} and at {port} of {backbone.spec.id} would change the same rows twice; choose one of them"
                )

    def path(self, sites: tuple[Site, ...], inner: Callable[..., Any], *inputs: Any) -> Path | None:
        """Of the product on a frozen linear layer; on kernels that are handed out there is none."""
        if not inputs or not isinstance(inner, nn.Linear):
            return None
        return lora_path(inputs[0], inner.weight, sum(len(self.cell(site).A) for site in sites))

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Any], *inputs: Tensor) -> Any:
        """(..., in) -> (..., out); at a `weights` site, the effective (weight, bias)."""
        if not inputs:
            return self._effective(sites, inner)
        return self._forward(sites, inner, *inputs)

    def _effective(self, sites: tuple[Site, ...], inner: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """W + s B A with the kernel's taps as inputs: A (r, in k k), B (out, r)."""
        weight, bias = inner()
        for site in sites:
            cell = self.cell(site)
            weight = weight + self.scale * (cell.B @ cell.A).to(weight.dtype).view_as(weight)
        return weight, bias

    def _forward(self, sites: tuple[Site, ...], inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.dora:
            return self._dora(sites, inner, x)
        dropped = self.training and self.dropout > 0
        if isinstance(inner, nn.Linear) and not dropped:
            a, b = self.stacked(sites, inner.out_features)
            return lora_linear(x, inner.weight, inner.bias, a, b, self.scale)
        y = inner(x)
        a, b = self.stacked(sites, y.shape[-1])
        u = functional.linear(functional.dropout(x, self.dropout, self.training), a.to(x.dtype))
        return y + self.scale * functional.linear(u, b.to(x.dtype))

    def _dora(self, sites: tuple[Site, ...], inner: Any, x: Tensor) -> Tensor:
        """`innermost`: `inner` is the frozen layer."""
        a, b = self.stacked(sites, inner.out_features)
        gain = torch.ones(inner.out_features, device=x.device)
        for site in sites:
            cell = self.cell(site)
            start, stop = site.span or (0, inner.out_features)
            own = dora_gain(inner.weight[start:stop], cell.A, cell.B, self.scale, cell.magnitude)
            gain = gain + functional.pad(own - 1, (start, inner.out_features - stop))
        if not (self.training and self.dropout):
            return dora_linear(x, inner.weight, inner.bias, a, b, self.scale, gain)
        y = inner(x)
        u = functional.linear(functional.dropout(x, self.dropout), a.to(x.dtype))
        z = y + self.scale * functional.linear(u, b.to(x.dtype))
        return z + (gain - 1).to(z.dtype) * (z if inner.bias is None else z - inner.bias)

    def stacked(self, sites: tuple[Site, ...], width: int) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (width, R) of all sites at one port; rows of B outside a site's span are zero."""
        cells = [self.cell(site) for site in sites]
        if len(sites) == 1 and sites[0].span is None:
            return cells[0].A, cells[0].B
        blocks = []
        for site, cell in zip(sites, cells, strict=True):
            start, stop = site.span or (0, width)
            blocks.append(functional.pad(cell.B, (0, 0, start, width - stop)))
        return torch.cat([cell.A for cell in cells]), torch.cat(blocks, 1)

    @staticmethod
    def mix(
        slots: Sequence[tuple[LoRA, tuple[Site, ...]]], ids: Tensor, inner: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        """One call for rows with different adapters: ids (B,) names each row's slot, -1 for none."""
        frozen: Any = inner  # a mixed call has one part a port, and that is on a linear layer
        factors = [(*lora.stacked(sites, frozen.out_features), lora.scale) for lora, sites in slots]
        return mixed_lora_linear(x, frozen.weight, frozen.bias, factors, ids)

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Module:
        """W + s B A (rescaled for DoRA) in a new layer, summed in float32 or wider, stored in W's dtype."""
        if isinstance(base, Weights):
            twin = copy.deepcopy(base)
            with torch.no_grad():
                twin.weight.copy_(self._effective(sites, lambda: (base.weight.double(), base.bias))[0])
            return twin.requires_grad_(False)
        assert isinstance(base, nn.Linear)
        plain = nn.utils.skip_init(
            nn.Linear,
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            dtype=base.weight.dtype,
            device=base.weight.device,
        )
        weight = base.weight.detach().double().clone()
        with torch.no_grad():
            for site in sites:
                cell = self.cell(site)
                rows = slice(*(site.span or (0, base.out_features)))
                weight[rows] += self.scale * (cell.B.double() @ cell.A.double())
                if self.dora:
                    weight[rows] *= dora_gain(base.weight[rows], cell.A, cell.B, self.scale, cell.magnitude).double()[
                        :, None
                    ]
            plain.weight.copy_(weight)
            if base.bias is not None:
                plain.bias.copy_(base.bias)
        return plain.requires_grad_(False)

    @property
    def why_no_soup(self) -> str:
        """The reason, for DoRA."""
        return "DoRA rescales each row by its own norm, and a mean of such rows is no DoRA" if self.dora else ""

    @property
    def alike(self) -> dict[str, Any]:
        """The sites. Ranks and scales may differ."""
        return {"sites": self.sites, "dora": self.dora}

    @classmethod
    def soup(cls, parts: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        """The mean of the products, exactly: s B A = sum_i w_i s_i B_i A_i with the factors stacked, rank = sum of ranks.

        s is the largest w_i s_i and B_i is multiplied by w_i s_i / s, so factors of equal weight and scale keep their bits. The mean of
        the factors would be another function: it also multiplies one member's A by another's B.
        """
        scales = [w * p.scale for w, p in zip(weights, parts, strict=True)]
        scale = max(scales, key=abs) or 1.0
        a = {site: torch.cat([p.cell(site).A for p in parts]) for site in parts[0].sites}
        b = {site: [f / scale * p.cell(site).B.double() for f, p in zip(scales, parts, strict=True)] for site in a}
        return cls._of({site: (a[site], torch.cat(b[site], 1)) for site in a}, scale, parts[0])

    def truncated(self, rank: int) -> tuple[LoRA, dict[str, float]]:
        """The best approximation of at most `rank` at every site, and by site its error |P - P'| / |P| (Frobenius), P = s B A.

        P is not formed: with B = Q R and A^T = Q' R', the singular values of P are those of R R'^T, which is no larger than the rank.
        Source: Eckart and Young 1936.
        """
        factors, errors = {}, {}
        for site in self.sites:
            a, b = self.cell(site).A.detach().double(), self.cell(site).B.detach().double()
            (q, r), (q2, r2) = torch.linalg.qr(b), torch.linalg.qr(a.t())
            u, sigma, vh = torch.linalg.svd(r @ r2.t(), full_matrices=False)
            root = sigma[:rank].sqrt()
            fill = (0, 0, 0, max(rank - len(root), 0))  # a site narrower than the rank
            kept_a = functional.pad(root[:, None] * (vh[:rank] @ q2.t()), fill)
            kept_b = functional.pad(root[:, None] * (q @ u[:, :rank]).t(), fill).t()
            factors[site] = (kept_a, kept_b)
            errors[site] = float(sigma[rank:].norm() / sigma.norm()) if sigma.any() else 0.0
        return self._of(factors, self.scale, self), errors

    @classmethod
    def _of(cls, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float, like: LoRA) -> LoRA:
        """LoRA of scale `scale` with these A (R, in) and B (out, R) at the sites of `like`, in its dtype."""
        rank = next((len(a) for a, _ in factors.values()), 1)
        with torch.device("meta"):  # nothing is drawn
            made = cls(like.sites, rank=rank, alpha=scale * rank, dropout=like.dropout)
        for site, (a, b) in factors.items():
            was, cell = like.cell(site).A, made.cell(site)
            cell.A, cell.B = nn.Parameter(a.detach().to(was)), nn.Parameter(b.detach().to(was).contiguous())
        return made
