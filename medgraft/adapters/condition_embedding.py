"""CEmb: the image embedding renormalised by the sub-group that the image belongs to (a site, a machine, a stain).

    z = relu(CIN_2(conv3x3 relu(CIN_1(conv3x3 x))))               no residual; z takes the embedding's place for what follows
    CIN(x) = g (x - E x) / (sqrt(Var x) + eps) + b                E and Var over the places of one image and channel, eps = 1e-5
    g = W_2 relu(W_1 e_g),  b = W_2 relu(W_1 e_b)                 e_g, e_b (C,) the sub-group's rows of a table, one table a CIN

form "code" is the authors': eps inside the root, and one perceptron of width 2 C, with biases, for [e_g | e_b] together.

A sub-group that was never seen is refused, or taken for what `unknown` says: "mean" (of the sub-groups' rows) or the name of one.
Where nobody says a sub-group, tensors take the mean.

Source: Shin et al. 2023 (CEmb-SAM) section 2.2; start and form "code" from the authors' code. With their start of e_b, 0, and no
bias, b would never learn; in form "paper" it is N(0, 0.02).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..errors import BadCall
from .heads import check_width
from .mask_head import check_decoder
from .part import Readout, part
from .task import Task

EPS = 1e-5
REFUSE, MEAN = "refuse", "mean"


class ConditionalNorm(nn.Module):
    """CIN; see the top of the file. `embed.weight` (m, 2 C) holds [e_g | e_b] of each sub-group."""

    def __init__(self, groups: int, width: int, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        self.embed = nn.Embedding(groups, 2 * width)
        inside = 2 * width if joint else width
        layers = [nn.Linear(inside, inside, joint) for _ in range(2)]
        self.mlp = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        with torch.no_grad():
            self.embed.weight.normal_(0.0, 0.02)
            self.embed.weight[:, :width] += 1
            if joint:
                self.embed.weight[:, width:] = 0
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                if joint:
                    nn.init.constant_(layer.bias, 0.1)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """x (B, C, h, w), group (B,) int64, -1 for the mean of the sub-groups -> (B, C, h, w)."""
        width = x.shape[1]
        table = torch.cat([self.embed.weight, self.embed.weight.mean(0, keepdim=True)])
        rows = table[group]
        told = self.mlp(rows if self.joint else rows.unflatten(1, (2, width))).reshape(-1, 2, width)
        gain, shift = told[:, 0, :, None, None], told[:, 1, :, None, None]
        return gain * self._normed(x) + shift

    def _normed(self, x: Tensor) -> Tensor:
        if self.joint:
            return functional.instance_norm(x, eps=EPS)
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) / (var.clamp_min(EPS**2).sqrt() + EPS)  # a root has no gradient at 0


@part("condition_embedding")
class ConditionEmbedding(Readout):
    """See the top of the file. `groups` are the names of the sub-groups."""

    makes_logits = False
    takes_groups = True

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        width: int,
        groups: Sequence[str],
        unknown: str = REFUSE,
        form: str = "paper",
    ) -> None:
        super().__init__(sites, width=width, groups=list(groups), unknown=unknown, form=form)
        if form not in ("paper", "code"):
            raise BadCall(f"the form of a condition embedding is 'paper' or 'code', got {form!r}")
        if not groups or len(set(groups)) != len(groups) or {REFUSE, MEAN} & set(groups):
            raise BadCall(
                f"a condition embedding wants different names of sub-groups, none of them {REFUSE!r} or {MEAN!r}; got {list(groups)}"
            )
        if unknown not in (REFUSE, MEAN, *groups):
            raise BadCall(
                f"unknown= says what a sub-group never seen is taken for: 'refuse', 'mean' or one of {', '.join(groups)}; got {unknown!r}"
            )
        joint = form == "code"
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.cin1 = ConditionalNorm(len(groups), width, joint)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.cin2 = ConditionalNorm(len(groups), width, joint)

    @classmethod
    def on(
        cls, backbone: Backbone, task: Task, *, groups: Sequence[str], unknown: str = REFUSE, form: str = "paper"
    ) -> ConditionEmbedding:
        """Drawn weights for the embedding of `backbone`. Raises BadCall."""
        check_decoder(backbone)
        return cls({}, width=backbone.spec.width, groups=groups, unknown=unknown, form=form)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the sub-groups."""
        return tuple(self.config["groups"])

    def group_index(self, name: str) -> int:
        """The number of a sub-group; -1 is their mean. Raises UnknownName for one never seen, unless the rule takes it for another."""
        rule = self.config["unknown"]
        if name in self.groups or rule == REFUSE:
            return super().group_index(name)
        return -1 if rule == MEAN else self.groups.index(rule)

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "it renormalises the embedding, without a residual"

    def check(self, backbone: Backbone) -> None:
        """The embedding must have the part's width."""
        check_decoder(backbone)
        check_width(self, backbone, self.config["width"], backbone.spec.width)

    def read(self, features: Features, image: Tensor) -> Features:
        """The features with z in the place of the embedding. Raises BadCall for sub-groups that are not there."""
        f = features.maps[-1]
        group = None if features.prompts is None else features.prompts.group
        group = torch.full((f.shape[0],), -1, device=f.device) if group is None else group
        if f.device.type == "cpu" and not bool(((group >= -1) & (group < len(self.groups))).all()):
            raise BadCall(
                f"sub-groups are numbered 0 to {len(self.groups) - 1} ({', '.join(self.groups)}), -1 is their mean; got {group.tolist()}"
            )
        x = f.to(self.conv1.weight.dtype)
        x = functional.relu(self.cin1(self.conv1(x), group))
        z = functional.relu(self.cin2(self.conv2(x), group)).to(f.dtype)
        return replace(features, maps=[*features.maps[:-1], z])
