"""Losses for masks that leave classes out: each row of a batch says what its annotator told apart.

`groups` (B, K) int64: groups[b, k] is the smallest class that row b does not tell k from. A class with a group of its own
was annotated; classes drawn as one (a vessel: artery or vein) share a group, called by its smallest member; a class that
nobody annotated is in group 0, with the background. `annotated` (B, K) bool may be given instead: True is a group of its own.
A pixel of the target that has an unannotated class counts as background, one of a coarse class as its group.

With z the logits, t a pixel's target, G(t) its group without the unannotated classes and U those, softmax over a set S

    -log P(t | S) = lse_{k in S} z_k - lse_{k in G(t)} z_k

    standard   S = all, U is background to the annotator and to the loss: the shortcut is taught (standard_dice: plus soft Dice)
    adaptive   S = all but U: the unannotated leave the softmax                                  (METHODS 13)
    marginal   S = all, G(0) = {0} + U; plus soft Dice of the merged probabilities               (Shi et al.; METHODS 8)
    hybrid     S = all but U, over pixels of annotated structures; plus soft Dice of these       (METHODS 14)
    bce        sum over annotated groups g of BCE(lse_{k in g} z_k - z_0, t in g)                (Petit et al.; METHODS 13)
    sigmoid_dice  mean over annotated groups g of soft Dice of sigmoid(lse_{k in g} z_k - z_0)      (FSEFT, Eq. 1; METHODS 2)

bce and sigmoid_dice take a class's log-odds against the background, so that a threshold of 1/2 for every class is the argmax over channels.
sigmoid_dice sums over each row's voxels by itself, and means over the rows that annotate something.

Reduction: mean over the pixels of the rows that annotate something; a row without any annotation adds exactly 0 to the loss and
to every gradient (in the standard losses it is all background), and a warning says so. Soft Dice sums over the batch, once for every group
that occurs, over the rows that have it: 1 - (2 sum p t + s) / (sum p + sum t + s), s = 1e-5, then the mean over groups.

B rows, K channels (background is 0; K = 1 is one class, with logits (0, z)), 2D or 3D. Everything is computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadCall, unknown
from .losses import SMOOTH

Name = Literal["standard", "standard_dice", "adaptive", "bce", "marginal", "hybrid", "sigmoid_dice"]


def standard_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """logits (B, K, ...), target (B, ...) int64, groups or annotated (B, K) -> cross-entropy, a float32 scalar."""
    z, t, g = _ready(logits, target, groups)
    return _surprise(z, t, _all_annotated(g), torch.ones_like(g, dtype=torch.bool)).mean()


def standard_dice_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Shapes as `standard_loss`; with Dice: the marginal loss, were everything annotated."""
    z, t, g = _ready(logits, target, groups)
    return marginal_loss(z, t, _all_annotated(g))


def adaptive_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Shapes as `standard_loss`. The gradient at the logits of an unannotated class is exactly 0."""
    z, t, g = _annotated_rows(*_ready(logits, target, groups))
    if not len(z):
        return _nothing(logits)
    kept = _kept(g)
    return _surprise(z, t, torch.where(kept, g, -1), kept).mean()


def bce_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Shapes as `standard_loss`; sums over classes. The gradient at the logits of an unannotated class is exactly 0."""
    z, t, g = _annotated_rows(*_ready(logits, target, groups))
    if not len(z):
        return _nothing(logits)
    total = z.new_zeros(())
    for k in range(1, z.shape[1]):
        members = g == k
        rows = members.any(1)
        if rows.any():
            odds = _lse(z[rows], _over_pixels(members[rows], z)) - z[rows, 0]
            total = total + F.binary_cross_entropy_with_logits(odds, (t[rows] == k).float(), reduction="sum")
    return total / t.numel()


def sigmoid_dice_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Shapes as `standard_loss`. The gradient at the logits of an unannotated class is exactly 0."""
    z, t, g = _annotated_rows(*_ready(logits, target, groups))
    if not len(z):
        return _nothing(logits)
    total = z.new_zeros(())
    for row, drawn, own in zip(z, t, g, strict=True):
        ids = [k for k in own.unique().tolist() if k]
        odds = torch.stack([row[own == k].logsumexp(0) - row[0] for k in ids]).flatten(1)
        p, y = odds.sigmoid(), torch.stack([drawn == k for k in ids]).flatten(1).float()
        total = total + (1 - (2 * (p * y).sum(1) + SMOOTH) / (p.sum(1) + y.sum(1) + SMOOTH)).mean()
    return total / len(z)


def marginal_loss(logits: Tensor, target: Tensor, groups: Tensor, *, published: bool = False) -> Tensor:
    """Shapes as `standard_loss`; cross-entropy plus Dice of merged probabilities, the background's too.

    ERRATUM: `published` is the cross-entropy of the authors' code, which takes probabilities for logits and so applies the
    softmax twice; its values lie too close together.
    """
    z, t, g = _annotated_rows(*_ready(logits, target, groups))
    if not len(z):
        return _nothing(logits)
    members = _members(g)
    merged = _merge(z.softmax(1), members)
    if published:
        entropy = F.cross_entropy(merged.masked_fill(~_over_pixels(members.any(2), z), -torch.inf), t)
    else:
        entropy = _surprise(z, t, g, torch.ones_like(g, dtype=torch.bool)).mean()
    return entropy + _soft_dice(merged, _one_hot(t, merged), members)


def hybrid_loss(logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Shapes as `standard_loss`. The gradient at the logits of an unannotated class is exactly 0."""
    z, t, g = _annotated_rows(*_ready(logits, target, groups))
    if not len(z):
        return _nothing(logits)
    kept = _kept(g)
    entropy = (_surprise(z, t, torch.where(kept, g, -1), kept) * (t != 0)).mean()
    p = z.masked_fill(~_over_pixels(kept, z), -torch.inf).softmax(1)
    members = _members(torch.where(g == 0, -1, g))  # the background is no structure
    merged = _merge(p, members)
    return entropy + _soft_dice(merged, _one_hot(t, merged), members)


def condist_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    groups: Tensor,
    *,
    organs: Sequence[Sequence[int]] = (),
    temperature: float = 0.5,
) -> Tensor:
    """Conditional distillation (Wang et al. 2023, section 2.3): what a teacher says of the classes that a row leaves out.

        p = softmax(z / T);  F the annotated classes;  q_O = sum_{k in O} p_k / (1 - sum_{k in F} p_k + 1e-5)
        1 - 2 sum q q' / (sum q + sum q' + 1e-5), of student q and teacher q', for each organ O among the rest

    logits and teacher (B, K, ...), the others as `standard_loss`. `organs` are classes that count as one (an organ and its
    lesion), other classes stand alone, the background too. Left out are pixels that the mask or the teacher puts into F, and
    rows that annotate everything. No gradient reaches the teacher. The paper has T = 0.5, its code 2.
    """
    if not temperature > 0:
        raise BadCall(f"the temperature is above 0, got {temperature}")
    if teacher.shape != logits.shape:
        raise BadCall(f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}")
    z, t, g = _ready(logits, target, groups)
    organ = _organs(organs, z.shape[1]).to(g.device)
    rows = ((g == 0).sum(1) > 1).nonzero()[:, 0]
    if not len(rows):
        return _nothing(logits)
    z, t, g, taught = z[rows], t[rows], g[rows], _two(teacher.detach().float())[rows]
    foreground = g != 0
    members = _members(torch.where(foreground, -1, organ))
    said = foreground.gather(1, taught.argmax(1).flatten(1)).view_as(t)
    asked = (~said & (t == 0))[:, None]

    def conditional(x: Tensor) -> Tensor:
        p = (x / temperature).softmax(1)
        rest = 1 - (p * _over_pixels(foreground, p)).sum(1, keepdim=True)
        return _merge(p, members) / (rest + SMOOTH) * asked

    return _soft_dice(conditional(z), conditional(taught), members, above=0.0)


# Choosing one by name


@dataclass(frozen=True)
class PartialLoss:
    """A loss by name, for `fit`: called with logits, target and groups. Raises `UnknownName`."""

    name: Name = "adaptive"
    published: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise unknown("loss for partial labels", self.name, get_args(Name))
        if self.published and self.name != "marginal":
            raise BadCall(f"published is a form of the marginal loss, {self.name!r} has no other")

    def __call__(self, logits: Tensor, target: Tensor, groups: Tensor) -> Tensor:
        """The loss, a float32 scalar."""
        if self.name == "marginal":
            return marginal_loss(logits, target, groups, published=self.published)
        return _LOSSES[self.name](logits, target, groups)


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "standard": standard_loss,
    "standard_dice": standard_dice_loss,
    "adaptive": adaptive_loss,
    "bce": bce_loss,
    "hybrid": hybrid_loss,
    "sigmoid_dice": sigmoid_dice_loss,
}


# What they share. z (B, K, ...) float32, t (B, ...) the group of each pixel, g (B, K) groups.


def _ready(logits: Tensor, target: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    space = logits.ndim in (4, 5) and target.shape == logits.shape[:1] + logits.shape[2:] and 0 not in logits.shape
    if not space or not logits.is_floating_point() or target.dtype != torch.int64:
        got = f"{logits.dtype} {tuple(logits.shape)} and {target.dtype} {tuple(target.shape)}"
        raise BadCall(f"wanted float logits (B, K, H, W) or (B, K, D, H, W) and an int64 target without K, got {got}")
    z = _two(logits.float())
    g = groups.to(z.device)
    classes = torch.arange(z.shape[1], device=z.device)
    if g.dtype == torch.bool and g.shape == z.shape[:2]:
        g = torch.where(g, classes, 0)
    if g.dtype != torch.int64 or g.shape != z.shape[:2]:
        got = f"{g.dtype} {tuple(g.shape)}"
        raise BadCall(f"wanted groups (int64) or annotated (bool) {tuple(z.shape[:2])}, background first; got {got}")
    if z.device.type == "cpu":  # elsewhere looking would wait for the device
        if bool((g < 0).any() or (g > classes).any()) or not torch.equal(g.gather(1, g), g):
            raise BadCall(f"a group is called by its smallest class, the background's by 0; got {g.tolist()}")
        if int(target.min()) < 0 or int(target.max()) >= z.shape[1]:
            raise BadCall(f"the target has values {int(target.min())}..{int(target.max())}, 0..{z.shape[1] - 1} fit")
    return z, g.gather(1, target.flatten(1)).view_as(target), g


def _two(z: Tensor) -> Tensor:
    """One channel is the log-odds of one class: a background with logit 0 says the same."""
    return torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z


def _annotated_rows(z: Tensor, t: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = g.any(1).nonzero()[:, 0]
    if len(rows) < len(z):
        warnings.warn(
            f"{len(z) - len(rows)} of {len(z)} images have no annotated class; they add nothing to the loss",
            stacklevel=3,
        )
    return z[rows], t[rows], g[rows]


def _nothing(logits: Tensor) -> Tensor:
    """Exactly 0, with a gradient of exactly 0 wherever the logits are finite."""
    return logits.float().sum() * 0


def _all_annotated(g: Tensor) -> Tensor:
    """(B, K): the groups, had everything been annotated that was not."""
    return torch.where(g == 0, torch.arange(g.shape[1], device=g.device), g)


def _kept(g: Tensor) -> Tensor:
    """(B, K) bool: annotated, or the background."""
    kept = g != 0
    kept[:, 0] = True
    return kept


def _over_pixels(rows: Tensor, z: Tensor) -> Tensor:
    """(B, K) as (B, K, 1, ...)."""
    return rows.view(*rows.shape, *[1] * (z.ndim - 2))


def _lse(z: Tensor, of: Tensor) -> Tensor:
    """log of the sum of exp z over the channels in `of`: (B, K, ...) -> (B, ...)."""
    return z.masked_fill(~of, -torch.inf).logsumexp(1)


def _surprise(z: Tensor, t: Tensor, g: Tensor, kept: Tensor) -> Tensor:
    """-log P(t | kept) of each pixel, (B, ...)."""
    own = _over_pixels(g, z) == t[:, None]
    return _lse(z, _over_pixels(kept, z)) - _lse(z, own)


def _members(g: Tensor) -> Tensor:
    """(B, G, K) bool with G = K: is class k in group g? A class in no group has -1."""
    return g[:, None] == torch.arange(g.shape[1], device=g.device)[:, None]


def _merge(p: Tensor, members: Tensor) -> Tensor:
    """Probabilities of groups, (B, G, ...)."""
    return torch.einsum("bgk,bk...->bg...", members.float(), p)


def _one_hot(t: Tensor, like: Tensor) -> Tensor:
    """(B, ...) -> (B, G, ...) float32."""
    return F.one_hot(t, like.shape[1]).movedim(-1, 1).float()


def _soft_dice(p: Tensor, t: Tensor, members: Tensor, *, above: float = SMOOTH) -> Tensor:
    """Mean over the groups that occur of 1 - Dice over the rows that have them; p and t (B, G, ...), members (B, G, K)."""
    there = members.any(2).flatten()
    sets, which = members.flatten(0, 1)[there].unique(dim=0, return_inverse=True)
    p, t = p.flatten(0, 1).flatten(1)[there], t.flatten(0, 1).flatten(1)[there]

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(sets)).index_add(0, which, x.sum(1))

    return (1 - (2 * total(p * t) + above) / (total(p) + total(t) + SMOOTH)).mean()


def _organs(organs: Sequence[Sequence[int]], classes: int) -> Tensor:
    """(K,): the smallest class of each class's organ. Raises `BadCall` for organs that overlap or do not exist."""
    found = list(range(classes))
    named = [k for organ in organs for k in organ]
    if len(set(named)) < len(named) or any(not 0 < k < classes for k in named):
        raise BadCall(f"organs are disjoint sets of the classes 1..{classes - 1}, got {[list(o) for o in organs]}")
    for organ in organs:
        for k in organ:
            found[k] = min(organ)
    return torch.tensor(found)
