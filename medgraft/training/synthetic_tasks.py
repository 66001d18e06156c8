"""An endless stream of synthetic tasks for learning to segment in context: S labelled pictures and a query, all of one structure.

Three kinds of task, drawn from a seed alone:

    mosaic  : one random label map (the arg-max of smooth noise fields, or wobbly shapes over one another), bent anew for each picture
    scatter : wobbly shapes of a few sorts strewn anew over each picture; the structure is every shape of one sort
    scene   : `phantom`s of one scene; the structure is one of its regions

The first two are coloured by a random intensity model: a grey value for each label, jittered from picture to picture, texture, light
that falls off, blur, gamma, noise. No pixel comes from a real image.

Source of the idea: Hoffmann et al. 2022, SynthMorph (IEEE TMI), and the synthetic tasks of Butoi et al. 2023, UniverSeg, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from ..errors import BadCall
from .phantoms import REGIONS, SCENES, phantom

SHARES = {"mosaic": 0.45, "scatter": 0.3, "scene": 0.25}
SMALLEST, LARGEST = 0.004, 0.6
"""The share of the query's pixels that a structure may cover."""


class Episode(NamedTuple):
    """One task: query and support images (1 or S, 1, H, W) in [0, 1], masks of the same shapes in {0, 1}."""

    query: Tensor
    truth: Tensor
    images: Tensor
    labels: Tensor


def episode(seed: int, *, size: int = 64, shots: int = 8, kind: str | None = None) -> Episode:
    """Task number `seed`, of a kind at random or the one named. Raises BadCall."""
    if size < 32 or shots < 1 or kind not in (None, *SHARES):
        raise BadCall(
            f"an episode wants size >= 32, shots >= 1 and a kind of {', '.join(SHARES)}; got {size}, {shots}, {kind!r}"
        )
    g = Generator().manual_seed(seed)
    names = list(SHARES)
    if kind is None:
        kind = names[int(torch.multinomial(torch.tensor(list(SHARES.values())), 1, generator=g))]
    draw = {"mosaic": _mosaic, "scatter": _scatter, "scene": _scene}[kind]
    for _ in range(8):  # a draw whose structure is too small or too large is drawn again
        images, masks = draw(g, size, shots + 1)
        share = masks[0].mean()
        if SMALLEST < share < LARGEST and masks[1:].any():
            break
    if _chance(g, 0.15):  # the structure's complement, as the background of a one-against-rest task is
        masks = 1 - masks
    if _chance(g, 0.3):
        images = 1 - images
    return Episode(images[:1], masks[:1], images[1:], masks[1:])


# Random numbers


def _uniform(g: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _one(g: Generator, low: float, high: float) -> float:
    return float(_uniform(g, low, high))


def _whole(g: Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def _chance(g: Generator, p: float) -> bool:
    return float(torch.rand((), generator=g)) < p


def _noise(g: Generator, n: int, size: int, cells: int) -> Tensor:
    """Smooth fields (n, 1, size, size), about unit variance, with features of 1 / cells of the side."""
    coarse = torch.randn(n, 1, cells + 3, cells + 3, generator=g)
    return functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)


# Label maps


def _mosaic(g: Generator, size: int, n: int) -> tuple[Tensor, Tensor]:
    sorts = _whole(g, 3, 12)
    wide = size + size // 2  # room for shifts
    if _chance(g, 0.5):
        fields = _noise(g, sorts, wide, _whole(g, 2, 7)) + _one(g, 0, 0.5) * _noise(g, sorts, wide, 12)
        base = fields.argmax(0)[0]
    else:
        base = _painted(g, wide, sorts, _whole(g, 4, 16), 1)[0]
    bent = _bend(g, base.float()[None, None].expand(n, 1, -1, -1), size, crop=size / wide)
    labels = bent[:, 0].round().long()
    return _coloured(g, labels, sorts), _chosen(g, labels, sorts)


def _scatter(g: Generator, size: int, n: int) -> tuple[Tensor, Tensor]:
    sorts = _whole(g, 2, 4)
    labels = _painted(g, size, sorts, _whole(g, 2, 14), n)
    return _coloured(g, labels, sorts), _chosen(g, labels, sorts)


def _painted(g: Generator, size: int, sorts: int, count: int, n: int) -> Tensor:
    """Label maps (n, size, size): up to `count` wobbly shapes over one another; sorts differ in size, stretch, wobble and hollowness."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)
    sort = (
        1 + torch.randint(sorts - 1, (n, count), generator=g) if sorts > 1 else torch.ones(n, count, dtype=torch.long)
    )
    if n == 1:
        sort = 1 + torch.arange(count)[None] % max(sorts - 1, 1)
    big = _one(g, 0.15, 0.75) / (1 + count / 10)
    radius_of, stretch_of = big * _uniform(g, 0.4, 1.6, sorts), _uniform(g, 0.4, 1.0, sorts)
    wobble_of, hollow_of = _uniform(g, 0, 0.3, sorts), _uniform(g, -1.2, 0.8, sorts)
    turns_of = torch.randint(2, 7, (sorts,), generator=g)
    spread = _one(g, 0.5, 1.0)
    cx, cy = (_uniform(g, -spread, spread, n, count)[..., None, None] for _ in range(2))
    angle = _uniform(g, 0, 6.2832, n, count)[..., None, None]
    jitter = _uniform(g, 0.8, 1.25, n, count)

    def pick(of: Tensor) -> Tensor:
        return of[sort][..., None, None]

    dx, dy = x - cx, y - cy
    u = (dx * angle.cos() + dy * angle.sin()) * pick(stretch_of)
    v = -dx * angle.sin() + dy * angle.cos()
    r, theta = (u * u + v * v).sqrt(), torch.atan2(v, u)
    edge = pick(radius_of) * jitter[..., None, None] * (1 + pick(wobble_of) * torch.cos(pick(turns_of) * theta + angle))
    inside = (r < edge) & (r > pick(hollow_of) * edge)
    present = torch.rand(n, count, generator=g) < 0.9
    present[:, :2] = True
    labels = torch.zeros(n, size, size, dtype=torch.long)
    for k in range(count):  # painter's order
        labels = torch.where(inside[:, k] & present[:, k, None, None], sort[:, k, None, None], labels)
    return labels


def _bend(g: Generator, maps: Tensor, size: int, *, crop: float) -> Tensor:
    """Each map (n, 1, H, W) turned, scaled, shifted and bent by an amount that is the task's own; cut to `size`."""
    n = maps.shape[0]
    turn, grow, move = _one(g, 0, 0.6), _one(g, 0, 0.3), _one(g, 0, 0.3)
    angle, scale = _uniform(g, -turn, turn, n), crop * (1 + _uniform(g, -grow, grow, n))
    shift = _uniform(g, -move, move, n, 2) * crop
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(theta, [n, 1, size, size], align_corners=False)
    field = _noise(g, 2 * n, size, _whole(g, 2, 6)).view(n, 2, size, size).permute(0, 2, 3, 1)
    grid = grid + _one(g, 0, 0.12) * crop * field
    return functional.grid_sample(maps, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def _chosen(g: Generator, labels: Tensor, sorts: int) -> Tensor:
    """The mask of one label that the query shows, sometimes of two."""
    here = torch.bincount(labels[0].flatten(), minlength=sorts).float() / labels[0].numel()
    fit = ((here > SMALLEST) & (here < LARGEST)).float()
    if not fit.any():
        return torch.zeros(labels.shape)[:, None]
    count = 2 if _chance(g, 0.15) and int(fit.sum()) > 2 else 1
    wanted = torch.multinomial(fit, count, generator=g)
    return torch.isin(labels, wanted).float()[:, None]


# Appearance


def _coloured(g: Generator, labels: Tensor, sorts: int) -> Tensor:
    """Pictures (n, 1, size, size) in [0, 1] of label maps (n, size, size)."""
    n, size = labels.shape[0], labels.shape[-1]
    grey, own = torch.rand(sorts, generator=g), _one(g, 0, 0.12)
    values = grey + own * torch.randn(n, sorts, generator=g)
    x = torch.gather(values, 1, labels.flatten(1)).view(n, 1, size, size)
    rough = (_uniform(g, 0, 1, sorts) ** 2 * _one(g, 0, 0.22))[labels][:, None]
    x = x + rough * _noise(g, n, size, _whole(g, 8, max(9, size // 2)))
    if _chance(g, 0.6):
        x = _blurred(x, _one(g, 0.3, 1.6) * size / 64)
    if _chance(g, 0.5):
        x = x * (1 + _one(g, 0, 0.5) * _noise(g, n, size, 1).clamp(-1.5, 1.5))
    x = x + _one(g, 0, 0.08) * torch.randn(x.shape, generator=g)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp_min(1e-6)
    gamma = torch.exp(_uniform(g, -1, 1, n, 1, 1, 1) * _one(g, 0, 0.5))
    return x**gamma


def _blurred(x: Tensor, sigma: float) -> Tensor:
    reach = max(1, int(2.5 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    x = functional.conv2d(functional.pad(x, (reach, reach, 0, 0), mode="replicate"), taps)
    return functional.conv2d(functional.pad(x, (0, 0, reach, reach), mode="replicate"), taps.transpose(2, 3))


def _scene(g: Generator, size: int, n: int) -> tuple[Tensor, Tensor]:
    names = [
        name for name in SCENES if name not in ("shapes", "mosaic")
    ]  # their regions mean nothing from picture to picture
    scene, first, wildness = names[_whole(g, 0, len(names) - 1)], _whole(g, 0, 1 << 40), _one(g, 0, 0.8)
    drawn = [phantom(first + k, size=size, scene=scene, wildness=wildness) for k in range(n)]
    images = torch.from_numpy(np.stack([p.image for p in drawn])).float().mean(-1)[:, None] / 255
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    labels = torch.from_numpy(np.stack([p.region for p in drawn])).long()
    return (images - low) / (high - low).clamp_min(1e-6), _chosen(g, labels, len(REGIONS))
