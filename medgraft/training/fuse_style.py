"""FuseStyle: between two frozen stages, a row takes on a blend of its own style and that of a batch mate.

Style is the mean mu and the standard deviation sigma of every channel over the patches of one image. For row i with
partner j and l ~ Beta(alpha, alpha), drawn for each row:

    out_i = (l sigma_i + (1 - l) sigma_j) (x_i - mu_i) / sigma_i + l mu_i + (1 - l) mu_j

so the channels of out_i have exactly the blended mean and deviation, and what remains after removing both (the
content) is that of x_i. A channel of x_i that is constant has no content to scale: it becomes the blended mean.

    pair "random"  a shuffled neighbour
    pair "dot"     j = argmin_j <z_i, z_j> over the flattened patches z (the paper's rule)
    pair "cosine"  the same of z / |z|

With "dot" nothing is normalised, so among features of one sign the partner is mostly the mate of least norm: a few
rows serve the whole batch. "cosine" spreads the partners. Each row's partner is another row wherever there is one.

Source: Khamankar, Bera et al., Histopathological image analysis with style-augmented feature domain mixing for
improved generalization, section 3.2: alpha = .3; a batch is mixed with probability .5, in training only. The paper
does not say whether the statistics carry gradients; here they do not, as in MixStyle. B images, T patches, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone, State
from ..errors import BadCall, unknown

Pair = Literal["random", "dot", "cosine"]

FAMILIES = ("vit", "hf_vit", "swin")  # tokens (B, prefix + h w, C), or maps (B, h, w, C)
CONSTANT = 1e-5  # of the mean: below it a float32 deviation is rounding


@dataclass(frozen=True)
class FuseStyle:
    """A training option of `fit`: mixes the styles of a batch when a state stands at one of `stages` (0 is the stem's output).

    Draws from torch's global generator, which `fit` seeds step by step. Raises BadCall, UnknownName for bad options.
    """

    stages: tuple[int, ...]
    pair: Pair = "random"
    p: float = 0.5
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if self.pair not in get_args(Pair):
            raise unknown("pairing", self.pair, get_args(Pair))
        if not 0 <= self.p <= 1 or not self.alpha > 0:
            raise BadCall(f"p is a probability and alpha is above 0, got p={self.p} and alpha={self.alpha}")
        if not self.stages or min(self.stages) < 0:
            raise BadCall(f"mixing needs the stages after which it happens, from 0 up; got {self.stages}")

    def __call__(self, state: State) -> State:
        """The state with mixed styles, or as it is: at another stage, with probability 1 - p, or for a single row.

        Of a sequence only the patches change, prefix and prompt tokens stay.
        """
        rows = state.x.shape[0]
        if state.stage not in self.stages or rows < 2 or torch.rand(()) >= self.p:
            return state
        prefix = state.x.shape[1] - prod(state.meta["grid"]) if state.x.ndim == 3 else 0
        patches = state.x[:, prefix:] if state.x.ndim == 3 else state.x.flatten(1, -2)
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((rows,)).to(patches.device)
        mixed = fuse(patches, partners(patches, self.pair), share)
        if state.x.ndim == 3:
            return replace(state, x=torch.cat([state.x[:, :prefix], mixed], 1))
        return replace(state, x=mixed.view(state.x.shape))

    def check(self, backbone: Backbone, first: int) -> None:
        """Raise BadCall unless `backbone`'s states can be mixed at every stage, when training enters at stage `first`."""
        if backbone.family not in FAMILIES:
            raise BadCall(
                f"FuseStyle mixes the patches of {', '.join(FAMILIES)} backbones; {backbone.spec.id} is a "
                f"{backbone.family}, whose states it does not know. Train without mixing"
            )
        if min(self.stages) < first or max(self.stages) > backbone.depth:
            raise BadCall(
                f"FuseStyle was asked for at stages {', '.join(map(str, self.stages))}; training here runs from stage "
                f"{first} (what lies before is cached) to {backbone.depth}. Choose stages in between, or do without the cache"
            )


def fuse(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """Blend styles: x (B, T, C), partner (B,) int64, share (B,) = l in [0, 1] -> (B, T, C) of x's dtype.

    Statistics are taken in float32 (float64 for float64); a row of share 1 comes back as it is, bit for bit.
    """
    z = x if x.dtype == torch.float64 else x.float()
    deviation, mean = torch.std_mean(z.detach(), 1, correction=0, keepdim=True)
    own = share.to(z.dtype).view(-1, 1, 1)
    wanted = own * deviation + (1 - own) * deviation[partner]
    centre = own * mean + (1 - own) * mean[partner]
    flat = deviation <= CONSTANT * mean.abs()
    gain = torch.where(flat, 0, wanted / torch.where(flat, 1, deviation))
    return torch.where(own == 1, x, ((z - mean) * gain + centre).to(x.dtype))


@torch.no_grad()
def partners(x: Tensor, pair: Pair) -> Tensor:
    """For each row of x (B, T, C), B > 1, the row whose style it borrows, never itself: int64 (B,)."""
    rows = x.shape[0]
    if pair == "random":
        order = torch.randperm(rows)
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return partner.to(x.device)
    z = x.flatten(1).float()
    z = functional.normalize(z) if pair == "cosine" else z
    return (z @ z.T).fill_diagonal_(float("inf")).argmin(1)
