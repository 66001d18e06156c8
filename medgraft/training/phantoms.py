"""Procedural phantoms: pictures that look a little like medicine, drawn from a seed, with every pixel labelled.

Nothing here is copied from a real image. Ten scenes (shapes, mosaics, nuclei, glands, blood smears, vessel trees,
skin lesions, ultrasound heads, chest films, slices) are painted with simple geometry and smooth noise, then pushed
through random palettes, light, blur and noise. Three streams of random numbers never meet: one for pretraining
(`phantom`), one for the few-shot data sets of the demo (`write_dataset`), one for the pictures on cards
(`preview`). The few-shot kinds are also *drawn* differently: their outlines are thresholded noise where the
pretraining scenes use wobbly ellipses, and their colours are fixed ones that no pretraining palette is centred on.

The same seed gives the same bytes on one machine and set of library versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import BadCall, unknown

Floats = NDArray[np.float32]
Window = tuple[slice, slice]

REGIONS = (
    "background",
    "outside",
    "shape",
    "nucleus",
    "cytoplasm",
    "red_cell",
    "gland_wall",
    "gland_lumen",
    "vessel",
    "disc",
    "lesion",
    "line",
    "ring",
    "ring_inside",
    "body",
    "organ",
    "lung_on_the_left",
    "lung_on_the_right",
    "mediastinum",
    "airway",
    "bone",
    "tissue",
)
"""What a pixel of `Phantom.region` can be, by index."""

TEXTURES = ("flat", "grain", "cloud", "stripes", "dots", "mesh")
"""What a pixel of `Phantom.texture` can be, by index."""

_PRETRAINING, _FEW_SHOT, _PREVIEW = 101, 202, 303  # first word of every seed, so the three streams never meet


@dataclass(frozen=True)
class Phantom:
    """One picture and its dense labels, all (size, size)."""

    image: NDArray[np.uint8]
    """(size, size, 3) RGB."""
    region: NDArray[np.uint8]
    """Index into `REGIONS`."""
    instance: NDArray[np.int16]
    """0 for what lies behind, then one number for each separate thing."""
    texture: NDArray[np.uint8]
    """Index into `TEXTURES`."""


# -- fields: everything is made of these -----------------------------------------------------------------------------


@cache
def _grid(size: int) -> tuple[Floats, Floats]:
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(centre[:, None], (size, size)), np.broadcast_to(centre[None, :], (size, size))


@cache
def _stretch(size: int, cells: int) -> Floats:
    """(size, cells + 2): the matrix that reads a coarse grid smoothly at `size` points."""
    at = np.linspace(0.5, cells + 0.5, size, dtype=np.float32)
    weight = np.exp(-2.0 * (at[:, None] - np.arange(cells + 2, dtype=np.float32)) ** 2)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


@cache
def _blurring(size: int, quarters: int) -> Floats:
    """(size, size): Gaussian blur of `quarters` / 4 pixels as a matrix."""
    at = np.arange(size, dtype=np.float32)
    weight = np.exp(-0.5 * ((at[:, None] - at) / (quarters / 4)) ** 2)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def _blur(field: Floats, sigma: float) -> Floats:
    """Blur (..., size, size) by `sigma` pixels, to the nearest quarter."""
    matrix = _blurring(field.shape[-1], max(1, round(4 * sigma)))
    return np.matmul(np.matmul(matrix, field), matrix.T)


def _wave(rng: np.random.Generator, size: int, cells: int) -> Floats:
    """(size, size) smooth noise of zero mean and unit spread, with about `cells` bumps across."""
    matrix = _stretch(size, cells)
    field = matrix @ rng.standard_normal((cells + 2, cells + 2), dtype=np.float32) @ matrix.T
    return (field - field.mean()) / (field.std() + 1e-6)


def _texture(rng: np.random.Generator, size: int, kind: int) -> Floats:
    """(size, size) field of about unit spread, in the manner of `TEXTURES[kind]`."""
    if kind == 0:
        return np.zeros((size, size), np.float32)
    if kind == 1:
        return rng.standard_normal((size, size), dtype=np.float32)
    if kind == 2:
        return _wave(rng, size, int(rng.integers(8, 28)))
    y, x = _grid(size)
    turn, bend, pitch = rng.uniform(0, np.pi), rng.uniform(0, 0.8), rng.uniform(8, 28)
    along = (np.cos(turn) * x + np.sin(turn) * y).astype(np.float32) * np.float32(pitch * 2 * np.pi)
    along += np.float32(bend) * _wave(rng, size, 4)
    if kind == 3:
        return 1.4 * np.sin(along)
    across = (np.cos(turn) * y - np.sin(turn) * x).astype(np.float32) * np.float32(pitch * 2 * np.pi)
    bumps = np.sin(along) * np.sin(across)
    return 2.5 * np.maximum(bumps, 0) - 0.5 if kind == 4 else 1.5 - 4.0 * np.minimum(np.abs(bumps), 0.5)


def _soft(depth: Floats, size: int, pixels: float) -> Floats:
    """Turn depth (in picture widths, positive inside) into coverage 0..1 over an edge `pixels` wide."""
    return np.clip(depth * (size / max(pixels, 0.5)) + 0.5, 0, 1)


# -- the canvas ------------------------------------------------------------------------------------------------------


class _Canvas:
    """A float picture, its label maps, and the few strokes that all scenes are made of."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.y, self.x = _grid(size)
        self.image = np.zeros((3, size, size), np.float32)
        self.region = np.zeros((size, size), np.uint8)
        self.instance = np.zeros((size, size), np.int16)
        self.texture = np.zeros((size, size), np.uint8)
        self.count = 0

    @property
    def all(self) -> Window:
        return slice(0, self.size), slice(0, self.size)

    def tone(self, colour: Floats, *, kind: int = 2, depth: float = 0.1, window: Window | None = None) -> Floats:
        """(3, h, w): `colour` carrying a texture of relative strength `depth`."""
        field = _texture(self.rng, self.size, kind)[window or self.all]
        return np.asarray(colour, np.float32)[:, None, None] * (1 + np.float32(depth) * field)

    def ground(self, colour: Floats, name: str, *, kind: int = 2, depth: float = 0.1) -> None:
        """Fill the whole canvas; instance 0."""
        self.image[:] = self.tone(colour, kind=kind, depth=depth)
        self.region[:] = REGIONS.index(name)
        self.texture[:] = kind if depth >= 0.05 else 0

    def paint(
        self,
        cover: Floats,
        colour: Floats,
        name: str | None,
        *,
        window: Window | None = None,
        kind: int = 0,
        depth: float = 0.0,
        opacity: float = 1.0,
        new: bool = True,
    ) -> None:
        """Lay `colour` over the picture where `cover` is 1 and label it `name` (None: leave the labels alone)."""
        window = window or self.all
        colour = np.asarray(colour, np.float32)
        if depth > 0:
            colour = self.tone(colour, kind=kind, depth=depth, window=window)
        elif colour.ndim == 1:
            colour = colour[:, None, None]
        here = self.image[:, *window]
        here += (cover * np.float32(opacity)) * (colour - here)
        if name is None:
            return
        inside = cover > 0.5
        self.region[window][inside] = REGIONS.index(name)
        self.texture[window][inside] = kind if depth >= 0.05 else 0
        if new:
            self.count += 1
            self.instance[window][inside] = self.count

    def blob(
        self,
        centre: tuple[float, float],
        radius: float,
        *,
        stretch: float = 1.0,
        turn: float = 0.0,
        wobble: float = 0.1,
        margin: float = 1.5,
    ) -> tuple[Window, Floats]:
        """A wobbly ellipse: a window around it and the depth inside it (positive inside, in picture widths)."""
        reach = radius * max(stretch, 1 / stretch) * (1 + 2 * wobble) * margin + 2 / self.size
        edges = [int(np.clip(v * self.size, 0, self.size)) for c in centre for v in (c - reach, c + reach)]
        edges = [min(edges[0], self.size - 1), edges[1], min(edges[2], self.size - 1), edges[3]]
        window = slice(edges[0], max(edges[1], edges[0] + 1)), slice(edges[2], max(edges[3], edges[2] + 1))
        dy, dx = self.y[window] - np.float32(centre[0]), self.x[window] - np.float32(centre[1])
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = (c * dx + s * dy) / np.float32(stretch), (c * dy - s * dx) * np.float32(stretch)
        distance = np.sqrt(u * u + v * v) + np.float32(1e-6)
        edge: Floats = np.full_like(distance, radius)
        if wobble > 0:
            angle = np.arctan2(v, u)
            for k in (2, 3, 5):
                amount = radius * wobble * self.rng.normal() * 1.5 / k
                edge += np.float32(amount) * np.cos(k * angle + np.float32(self.rng.uniform(0, 6.3)))
        return window, edge - distance

    def stroke(self, points: Floats, width: Floats | float) -> Floats:
        """(size, size) depth inside the curve through `points` (n, 2); `width` is full width, per point or fixed."""
        size, half = self.size, np.broadcast_to(np.asarray(width, np.float32) / 2, (len(points),))
        depth: Floats = np.full((size, size), -1, np.float32)
        for (py, px), (qy, qx), r in zip(points[:-1].tolist(), points[1:].tolist(), half[1:].tolist(), strict=True):
            reach = r + 2.5 / size
            a, b = max(0, int((min(py, qy) - reach) * size)), min(size, int((max(py, qy) + reach) * size) + 2)
            c, d = max(0, int((min(px, qx) - reach) * size)), min(size, int((max(px, qx) + reach) * size) + 2)
            if a >= b or c >= d:
                continue
            dy, dx = self.y[a:b, :1] - np.float32(py), self.x[:1, c:d] - np.float32(px)
            uy, ux = np.float32(qy - py), np.float32(qx - px)
            part = np.clip((dy * uy + dx * ux) / (uy * uy + ux * ux + np.float32(1e-9)), 0, 1)
            here = depth[a:b, c:d]
            np.maximum(here, np.float32(r) - np.hypot(dy - part * uy, dx - part * ux), out=here)
        return depth

    def walk(self, start: tuple[float, float], heading: float, length: float, *, bend: float, step: float) -> Floats:
        """(n, 2) points of a curve that wanders; its curvature is smooth."""
        n = max(3, int(length / step))
        turning = np.cumsum(self.rng.normal(0, bend, n)) * step * 8
        angle = heading + np.cumsum(turning) * 0.5 + self.rng.normal(0, bend) * np.linspace(0, 1, n)
        moves = np.stack([np.sin(angle), np.cos(angle)], 1) * step
        return (np.asarray(start) + np.cumsum(moves, 0)).astype(np.float32)

    def tree(self, start: tuple[float, float], heading: float, width: float, length: float, level: int) -> Floats:
        """Depth inside a branching vessel."""
        points = self.walk(start, heading, length, bend=0.4, step=0.04)
        tapered = np.linspace(width, width * 0.7, len(points), dtype=np.float32)
        depth = self.stroke(points, tapered)
        if level > 0:
            for _ in range(int(self.rng.integers(1, 4))):
                at = int(self.rng.integers(len(points) // 3, len(points)))
                side = self.rng.choice([-1, 1]) * self.rng.uniform(0.4, 1.1)
                along = points[max(at - 1, 0)]
                ahead = points[at] - along
                begin = (float(points[at][0]), float(points[at][1]))
                turn = float(np.arctan2(ahead[0], ahead[1])) + side
                shrunk = width * self.rng.uniform(0.5, 0.8)
                branch = self.tree(begin, turn, shrunk, length * self.rng.uniform(0.5, 0.8), level - 1)
                np.maximum(depth, branch, out=depth)
        return depth


def _jitter(rng: np.random.Generator, colour: tuple[float, float, float], amount: float = 0.07) -> Floats:
    return np.clip(np.asarray(colour) + rng.normal(0, amount) + rng.normal(0, amount, 3), 0.01, 1).astype(np.float32)


def _anywhere(rng: np.random.Generator, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    return float(rng.uniform(low, high)), float(rng.uniform(low, high))


def _any_colour(rng: np.random.Generator) -> Floats:
    return rng.uniform(0.05, 0.95, 3).astype(np.float32)


# -- the ten pretraining scenes --------------------------------------------------------------------------------------


def _shapes(canvas: _Canvas) -> None:
    """Overlapping wobbly shapes, rings and lines, each with its own colour and texture."""
    rng, size = canvas.rng, canvas.size
    canvas.ground(_any_colour(rng), "background", kind=int(rng.integers(6)), depth=rng.uniform(0, 0.3))
    for _ in range(int(rng.integers(2, 9))):
        kind, depth, colour = int(rng.integers(6)), rng.uniform(0, 0.4), _any_colour(rng)
        if rng.random() < 0.2:
            points = canvas.walk(_anywhere(rng), rng.uniform(0, 6.3), rng.uniform(0.3, 1.2), bend=0.8, step=0.03)
            cover = _soft(canvas.stroke(points, rng.uniform(0.01, 0.08)), size, 1.5)
            canvas.paint(cover, colour, "line", kind=kind, depth=depth)
            continue
        radius, turn = rng.uniform(0.05, 0.3), rng.uniform(0, 3.2)
        stretch, wobble = rng.uniform(1, 1.7), rng.uniform(0, 0.3)
        window, inside = canvas.blob(_anywhere(rng), radius, stretch=stretch, turn=turn, wobble=wobble)
        soft = rng.uniform(1, 4)
        canvas.paint(_soft(inside, size, soft), colour, "shape", window=window, kind=kind, depth=depth)
        if rng.random() < 0.35:
            inner = _soft(inside - radius * rng.uniform(0.15, 0.5), size, soft)
            canvas.paint(inner, _any_colour(rng), "ring_inside", window=window, kind=int(rng.integers(6)), depth=0.1)


def _mosaic(canvas: _Canvas) -> None:
    """Regions told apart by texture more than by tone."""
    rng, size = canvas.rng, canvas.size
    n, base = int(rng.integers(2, 6)), _any_colour(rng)
    fields = np.stack([_wave(rng, size, int(rng.integers(2, 6))) for _ in range(n)])
    winner = fields.argmax(0)
    kinds = rng.permutation(6)[:n]
    for i, kind in enumerate(kinds):
        cover = (winner == i).astype(np.float32)
        colour = np.clip(base + rng.normal(0, 0.08, 3), 0.02, 1).astype(np.float32)
        name = "background" if i == 0 else "tissue"
        canvas.paint(cover, colour, name, kind=int(kind), depth=rng.uniform(0.1, 0.5), new=i > 0)


def _nuclei(canvas: _Canvas) -> None:
    """A field of nuclei: fluorescence, stained tissue or bright field; crowded or sparse."""
    rng, size = canvas.rng, canvas.size
    style = int(rng.integers(3))
    if style == 0:
        ground, ink, depth = _jitter(rng, (0.06, 0.06, 0.07), 0.03), _jitter(rng, (0.5, 0.5, 0.55), 0.15), 0.3
    elif style == 1:
        ground, ink, depth = _jitter(rng, (0.85, 0.66, 0.78)), _jitter(rng, (0.42, 0.26, 0.52)), 0.15
    else:
        ground, ink, depth = _jitter(rng, (0.75, 0.75, 0.75)), _jitter(rng, (0.45, 0.45, 0.45)), 0.06
    canvas.ground(ground, "background", kind=2, depth=depth)
    if style == 1:
        for _ in range(int(rng.integers(1, 4))):
            cover = _soft(0.02 * (_wave(rng, size, int(rng.integers(3, 10))) - 0.7), size, 2)
            canvas.paint(cover, _jitter(rng, (0.92, 0.85, 0.9)), None, opacity=0.7)
    radius = float(np.exp(rng.uniform(np.log(0.02), np.log(0.09))))
    count = int(min(55, rng.uniform(0.08, 0.5) / (3.14 * radius**2))) + 2
    spread, wobble, soft = rng.uniform(0.05, 0.3), rng.uniform(0, 0.15), rng.uniform(1, 2.5)
    rim, grain = rng.random() < 0.4, _texture(rng, size, int(rng.integers(1, 3))) * np.float32(rng.uniform(0, 0.25))
    if rng.random() < 0.5:
        glow = _wave(rng, size, 3) * np.float32(0.25)
        canvas.image += np.abs(glow) * (ink - ground)[:, None, None] * 0.6
    for _ in range(count):
        r = radius * float(np.exp(rng.normal(0, spread)))
        stretch, turn = rng.uniform(1, 1.35), rng.uniform(0, 3.2)
        window, inside = canvas.blob(_anywhere(rng), r, stretch=stretch, turn=turn, wobble=wobble)
        shade = ink * (1 + rng.normal(0, 0.18)) if style else ink * rng.uniform(0.35, 1.5)
        colour = shade[:, None, None] * (1 + grain[window])
        canvas.paint(_soft(inside, size, soft), np.clip(colour, 0, 1), "nucleus", window=window)
        if rim:
            edge = np.exp(-((inside * size / 1.3) ** 2)).astype(np.float32)
            canvas.paint(edge, shade * (0.7 if style else 1.3), None, window=window, opacity=0.5)


def _glands(canvas: _Canvas) -> None:
    """Gland rings with a lumen and nuclei along the wall."""
    rng, size = canvas.rng, canvas.size
    canvas.ground(_jitter(rng, (0.86, 0.62, 0.74)), "background", kind=int(rng.integers(1, 4)), depth=0.12)
    wall, lumen, ink = _jitter(rng, (0.72, 0.48, 0.68)), _jitter(rng, (0.94, 0.9, 0.93)), (0.38, 0.22, 0.5)
    for _ in range(int(rng.integers(2, 7))):
        centre, radius, turn = _anywhere(rng, 0.05, 0.95), rng.uniform(0.1, 0.24), rng.uniform(0, 3.2)
        stretch = rng.uniform(1, 1.5)
        window, inside = canvas.blob(centre, radius, stretch=stretch, turn=turn, wobble=0.18)
        canvas.paint(_soft(inside, size, 2), wall, "gland_wall", window=window, kind=2, depth=0.12)
        hollow = _soft(inside - radius * rng.uniform(0.35, 0.65), size, 2)
        canvas.paint(hollow, lumen, "gland_lumen", window=window, kind=2, depth=0.04)
        for angle in np.arange(0, 6.28, rng.uniform(0.25, 0.6)):
            u, v = 0.85 * radius * stretch * np.cos(angle), 0.85 * radius / stretch * np.sin(angle)
            at = centre[0] + u * np.sin(turn) + v * np.cos(turn), centre[1] + u * np.cos(turn) - v * np.sin(turn)
            where, deep = canvas.blob((float(at[0]), float(at[1])), rng.uniform(0.012, 0.022), stretch=1.2, wobble=0)
            canvas.paint(_soft(deep, size, 1.5), _jitter(rng, ink, 0.05), "nucleus", window=where)


def _smear(canvas: _Canvas) -> None:
    """A blood smear: pale red cells around one or two white cells with lobed nuclei."""
    rng, size = canvas.rng, canvas.size
    ground = _jitter(rng, ((0.88, 0.84, 0.8), (0.9, 0.85, 0.62), (0.85, 0.8, 0.86))[int(rng.integers(3))])
    canvas.ground(ground, "background", kind=2, depth=0.03)
    red, big = _jitter(rng, (0.8, 0.58, 0.56)), rng.uniform(0.13, 0.32)
    radius = big * rng.uniform(0.5, 0.8)
    centre = _anywhere(rng, 0.35, 0.65)
    for _ in range(int(rng.integers(2, 3 + int(0.5 / (3.1 * radius**2))))):
        window, inside = canvas.blob(_anywhere(rng), radius, stretch=rng.uniform(1, 1.15), wobble=0.05)
        cover = _soft(inside, size, 2)
        pale = cover * (1 - np.float32(rng.uniform(0, 0.6)) * np.clip(inside / radius, 0, 1))
        canvas.paint(pale, red, None, window=window)
        canvas.paint(cover, red, "red_cell", window=window, opacity=0.15)
    cytoplasm = _jitter(rng, ((0.75, 0.7, 0.85), (0.62, 0.7, 0.86), (0.88, 0.68, 0.72))[int(rng.integers(3))])
    ink = _jitter(rng, (0.42, 0.2, 0.55))
    for i in range(1 if rng.random() < 0.8 else 2):
        middle = centre if i == 0 else _anywhere(rng)
        window, inside = canvas.blob(middle, big, stretch=rng.uniform(1, 1.2), turn=rng.uniform(0, 3), wobble=0.1)
        kind, depth = int(rng.integers(1, 3)), rng.uniform(0, 0.2)
        soft = rng.uniform(1, 4)
        canvas.paint(_soft(inside, size, soft), cytoplasm, "cytoplasm", window=window, kind=kind, depth=depth)
        lobes = int(rng.integers(1, 5))
        share = (0.82, 0.6, 0.5, 0.45)[lobes - 1] * rng.uniform(0.75, 1.1)
        turn = rng.uniform(0, 6.3)
        canvas.count += 1
        chroma = _texture(rng, size, 2) * np.float32(rng.uniform(0, 0.15))
        for lobe in range(lobes):
            angle = turn + lobe * rng.uniform(0.9, 1.7)
            off = 0.0 if lobes == 1 else big * 0.42
            at = middle[0] + off * float(np.sin(angle)), middle[1] + off * float(np.cos(angle))
            where, deep = canvas.blob(at, big * share, stretch=rng.uniform(1, 1.3), turn=rng.uniform(0, 3), wobble=0.12)
            colour = ink[:, None, None] * (1 + chroma[where])
            cover = _soft(deep, size, 2)
            canvas.paint(cover, colour, "nucleus", window=where, new=False)
            canvas.instance[where][cover > 0.5] = canvas.count


def _vessels(canvas: _Canvas) -> None:
    """A vessel tree, as on the back of the eye or in an angiogram."""
    rng, size = canvas.rng, canvas.size
    ground = _jitter(rng, ((0.72, 0.36, 0.16), (0.55, 0.25, 0.12), (0.6, 0.6, 0.6))[int(rng.integers(3))])
    canvas.ground(ground, "background", kind=2, depth=rng.uniform(0.03, 0.15))
    canvas.image *= 1 + np.float32(rng.uniform(0, 0.25)) * _wave(rng, size, 3)
    root = _anywhere(rng, 0.1, 0.9)
    if rng.random() < 0.7:
        window, inside = canvas.blob(root, rng.uniform(0.05, 0.11), wobble=0.04, margin=2.0)
        cover = _soft(inside, size, rng.uniform(2, 6))
        canvas.paint(cover, _jitter(rng, (0.95, 0.8, 0.5)), "disc", window=window, opacity=rng.uniform(0.5, 1))
    dark = rng.random() < 0.8
    colour = ground * (rng.uniform(0.45, 0.75) if dark else rng.uniform(1.4, 1.9))
    turn = rng.uniform(0, 6.3)
    roots = int(rng.integers(3, 7))
    contrast, wide = rng.uniform(0.6, 1), rng.uniform(0.012, 0.035)
    depth: Floats = np.full((size, size), -1, np.float32)
    for i in range(roots):
        heading, width = turn + i * 6.28 / roots + rng.normal(0, 0.3), wide * rng.uniform(0.6, 1.1)
        np.maximum(depth, canvas.tree(root, heading, width, rng.uniform(0.4, 0.8), 2), out=depth)
    cover = _soft(depth, size, 1.5)
    canvas.paint(cover, colour, "vessel", opacity=contrast)
    if rng.random() < 0.3:
        canvas.paint(_soft(depth - wide * 0.3, size, 1.5), colour * 1.35, None, opacity=0.6)
    for _ in range(int(rng.integers(0, 6))):
        window, inside = canvas.blob(_anywhere(rng), rng.uniform(0.01, 0.05), wobble=0.2)
        canvas.paint(_soft(inside, size, 3), ground * rng.uniform(0.7, 1.4), None, window=window, opacity=0.7)
    if rng.random() < 0.7:
        window, inside = canvas.blob((0.5, 0.5), rng.uniform(0.45, 0.62), wobble=0, margin=2.0)
        canvas.paint(1 - _soft(inside, size, 2), _jitter(rng, (0.03, 0.03, 0.03), 0.02), "outside", new=False)
        canvas.instance[canvas.region == REGIONS.index("outside")] = 0


def _lesion(canvas: _Canvas) -> None:
    """A pigmented spot on skin, with hair, freckles, a ruler or a dark corner."""
    rng, size = canvas.rng, canvas.size
    skin = _jitter(rng, ((0.86, 0.66, 0.56), (0.78, 0.58, 0.52), (0.9, 0.74, 0.7))[int(rng.integers(3))])
    canvas.ground(skin, "background", kind=int(rng.integers(1, 6)), depth=rng.uniform(0.01, 0.06))
    canvas.image *= 1 + 0.06 * _wave(rng, size, 4)
    centre, radius = _anywhere(rng, 0.3, 0.7), float(np.exp(rng.uniform(np.log(0.08), np.log(0.36))))
    dark = skin * (np.asarray([0.6, 0.48, 0.42], np.float32) + np.float32(rng.uniform(-0.25, 0.3)))
    if rng.random() < 0.2:
        dark = np.clip(skin * rng.uniform(0.95, 1.1) + rng.normal(0, 0.08, 3), 0, 1).astype(np.float32)
    soft, turn, wobble = rng.uniform(2, 14), rng.uniform(0, 3.2), rng.uniform(0.03, 0.25)
    stretch = rng.uniform(1, 1.4)
    window, inside = canvas.blob(centre, radius, stretch=stretch, turn=turn, wobble=wobble, margin=2.0)
    inside = inside + np.float32(rng.uniform(0, 0.12) * radius) * _wave(rng, size, int(rng.integers(6, 16)))[window]
    kind, depth = int(rng.integers(1, 6)), rng.uniform(0, 0.3)
    canvas.paint(_soft(inside, size, soft), dark, "lesion", window=window, kind=kind, depth=depth)
    for _ in range(int(rng.integers(0, 4))):
        at = centre[0] + rng.normal(0, radius / 2), centre[1] + rng.normal(0, radius / 2)
        part, deep = canvas.blob(at, radius * 0.4, wobble=0.2)
        cover = np.where(canvas.region[part] == REGIONS.index("lesion"), _soft(deep, size, soft), np.float32(0))
        canvas.paint(cover, dark * np.float32(rng.uniform(0.5, 1.5)), None, window=part, opacity=0.7)
    for _ in range(int(rng.integers(0, 5))):
        part, deep = canvas.blob(_anywhere(rng), rng.uniform(0.008, 0.03), wobble=0.1)
        canvas.paint(_soft(deep, size, 2), skin * rng.uniform(0.6, 1.2), None, window=part, opacity=0.6)
    if rng.random() < 0.6:
        hair = skin * rng.uniform(0.15, 0.8)
        for _ in range(int(rng.integers(1, 12))):
            points = canvas.walk(_anywhere(rng), rng.uniform(0, 6.3), rng.uniform(0.3, 1), bend=0.25, step=0.04)
            cover = _soft(canvas.stroke(points, rng.uniform(0.004, 0.012)), size, 1.3)
            canvas.paint(cover, hair, "line", opacity=rng.uniform(0.5, 1))
    if rng.random() < 0.4:
        _, rim = canvas.blob((0.5, 0.5), rng.uniform(0.5, 0.68), wobble=0, margin=2.0)
        cover = 1 - _soft(rim, size, rng.uniform(2, 20))
        canvas.paint(cover, _jitter(rng, (0.05, 0.04, 0.04), 0.03), "outside", new=False)
        canvas.instance[canvas.region == REGIONS.index("outside")] = 0


def _ultrasound(canvas: _Canvas) -> None:
    """A fan of speckle with a bright, broken elliptical ring, bright layers and shadows."""
    rng, size = canvas.rng, canvas.size
    canvas.region[:] = REGIONS.index("background")
    level = 0.22 + 0.14 * _wave(rng, size, int(rng.integers(3, 8))) + 0.1 * _wave(rng, size, 16)
    y, x = canvas.y, canvas.x
    for _ in range(int(rng.integers(1, 5))):
        points = canvas.walk((float(rng.uniform(0, 1)), -0.1), rng.normal(0, 0.3), 1.3, bend=0.4, step=0.04)
        depth = canvas.stroke(points, rng.uniform(0.01, 0.06))
        level = level + rng.uniform(0.2, 0.6) * _soft(depth, size, 4)
    radius, turn, stretch = rng.uniform(0.14, 0.36), rng.uniform(0, 3.2), rng.uniform(1.0, 1.3)
    window, inside = canvas.blob(_anywhere(rng, 0.3, 0.7), radius, stretch=stretch, turn=turn, wobble=0.02, margin=2.5)
    full: Floats = np.full((size, size), -1, np.float32)
    full[window] = inside
    within, thick = _soft(full, size, 3), rng.uniform(0.012, 0.035)
    content = rng.uniform(0.04, 0.24) + rng.uniform(0.02, 0.1) * _wave(rng, size, int(rng.integers(4, 12)))
    level = level + rng.uniform(0.5, 1) * within * (content - level)
    gaps = np.clip(0.6 + 0.7 * _wave(rng, size, int(rng.integers(2, 5))), 0.05, 1.2)
    band = np.exp(-(((full - thick) / thick) ** 2))
    level = level + rng.uniform(0.35, 0.9) * band * gaps
    for _ in range(int(rng.integers(0, 3))):
        part, deep = canvas.blob(_anywhere(rng, 0.2, 0.8), rng.uniform(0.03, 0.1), stretch=1.3, wobble=0.1)
        level[part] += _soft(deep, size, 3) * rng.choice([-0.2, 0.3])
    if rng.random() < 0.5:
        at, wide = rng.uniform(0.1, 0.9), rng.uniform(0.03, 0.12)
        level = level * (1 - rng.uniform(0.3, 0.9) * np.exp(-(((x - at - (y - 0.5) * rng.normal(0, 0.4)) / wide) ** 2)))
    canvas.region[full > 0] = REGIONS.index("ring_inside")
    canvas.region[(full > 0) & (full < 2 * thick)] = REGIONS.index("ring")
    canvas.instance[full > 0] = 1
    canvas.texture[:] = 1
    speckle = np.hypot(_blur(rng.standard_normal((size, size), dtype=np.float32), 0.8), rng.standard_normal())
    grain = np.abs(_blur(rng.standard_normal((2, size, size), dtype=np.float32), rng.uniform(0.5, 1.2)))
    grain = grain.sum(0) / (grain.sum(0).mean() + 1e-6) + 0.05 * (speckle - speckle.mean())
    level = np.clip(level, 0, 1.2) * (1 + np.float32(rng.uniform(0.3, 0.8)) * (grain - 1))
    if rng.random() < 0.75:
        top, half = -rng.uniform(0.05, 0.4), rng.uniform(0.5, 0.9)
        away = np.hypot(y - top, x - 0.5)
        angle = np.abs(np.arctan2(x - 0.5, y - top))
        fan = (angle < half) & (away < 1 - top - rng.uniform(0, 0.15)) & (away > -top + rng.uniform(0, 0.08))
        level = level * fan
        canvas.region[~fan] = REGIONS.index("outside")
        canvas.instance[~fan] = 0
        canvas.texture[~fan] = 0
    canvas.image[:] = np.clip(level, 0, 1)


def _chest(canvas: _Canvas) -> None:
    """A chest film: smooth overlapping organs, two lungs, ribs, spine, a heart and sometimes a patchy lung."""
    rng, size = canvas.rng, canvas.size
    y, x = canvas.y, canvas.x
    canvas.region[:] = REGIONS.index("background")
    cx, cy, scale = 0.5 + rng.normal(0, 0.04), 0.47 + rng.normal(0, 0.05), rng.uniform(0.9, 1.35)
    level: Floats = (0.08 + 0.03 * _wave(rng, size, 4)).astype(np.float32)
    window, inside = canvas.blob((cy + 0.15, cx), 0.5 * scale, stretch=1.05, wobble=0.05, margin=2.0)
    body: Floats = np.full((size, size), -1, np.float32)
    body[window] = inside
    cover = _soft(body, size, 8)
    level += cover * (0.55 + 0.05 * _wave(rng, size, 5))
    canvas.region[cover > 0.5] = REGIONS.index("body")
    canvas.instance[cover > 0.5] = 1
    haze = rng.uniform(0, 1, 2) ** 2
    for side, name in ((-1, "lung_on_the_left"), (1, "lung_on_the_right")):
        centre = (cy + rng.normal(0, 0.02), cx + side * 0.2 * scale)
        tall, tilt = rng.uniform(1.25, 1.5), side * rng.uniform(0.05, 0.22)
        radius = 0.21 * scale * rng.uniform(0.9, 1.1)
        part, lung = canvas.blob(centre, radius, stretch=1 / tall, turn=tilt, wobble=0.07)
        floor = np.float32(centre[0] + radius * rng.uniform(0.85, 1.3)) - y[part]
        floor = floor - np.float32(rng.uniform(0.1, 0.5)) * (x[part] - np.float32(centre[1])) ** 2 / radius
        lung = np.minimum(lung, floor)
        air = _soft(lung, size, rng.uniform(3, 8))
        marks = 0.05 * _wave(rng, size, 12)[part] + 0.04 * _wave(rng, size, 24)[part]
        patchy = haze[0 if side < 0 else 1] * np.clip(_wave(rng, size, 4)[part] + 0.3, 0, 1.5) * 0.3
        level[part] += air * (-rng.uniform(0.25, 0.42) + marks + patchy)
        canvas.region[part][air > 0.5] = REGIONS.index(name)
        canvas.instance[part][air > 0.5] = 2 + (side > 0)
    part, heart = canvas.blob(
        (cy + 0.12 * scale, cx + 0.04), 0.13 * scale * rng.uniform(0.85, 1.25), stretch=1.2, turn=0.5, wobble=0.06
    )
    column = np.float32(0.055 * scale * rng.uniform(0.8, 1.4)) - np.abs(x - cx - 0.02 * _wave(rng, size, 2))
    middle = np.minimum(column, np.minimum(y - np.float32(cy - 0.28 * scale), np.float32(cy + 0.3 * scale) - y))
    middle[part] = np.maximum(middle[part], heart)
    cover = _soft(middle, size, 5)
    level += cover * (np.clip(0.72 + 0.03 * _wave(rng, size, 6), 0, 1) - level) * rng.uniform(0.6, 0.95)
    canvas.region[cover > 0.5] = REGIONS.index("mediastinum")
    canvas.instance[cover > 0.5] = 4
    stem = np.minimum(np.float32(0.018) - np.abs(x - cx), np.float32(cy - 0.05 * scale) - y)
    stem = np.minimum(stem, body + 0.1)
    pipe = _soft(np.minimum(stem, y - np.float32(cy - 0.42 * scale)), size, 3)
    level -= pipe * rng.uniform(0.08, 0.2)
    canvas.region[pipe > 0.5] = REGIONS.index("airway")
    canvas.instance[pipe > 0.5] = 5
    bow, pitch, lean = rng.uniform(0.3, 1), rng.uniform(0.07, 0.11), rng.uniform(0.1, 0.6)
    ribs = np.sin((y + bow * (x - cx) ** 2 - lean * np.abs(x - cx)) * (6.28 / pitch) + rng.uniform(0, 6))
    level += rng.uniform(0.02, 0.08) * np.clip(ribs, 0, 1) * _soft(body - 0.03, size, 6)
    spine = np.exp(-(((x - cx) / 0.035) ** 2)) * (1 + 0.3 * np.sin(y * 6.28 / 0.06))
    level += rng.uniform(0, 0.12) * spine
    for side in (-1, 1):
        start = (cy - 0.27 * scale, cx + side * 0.04)
        bone = canvas.walk(start, 0.15 if side > 0 else np.pi - 0.15, 0.3, bend=0.3, step=0.04)
        cover = _soft(canvas.stroke(bone, 0.03), size, 3)
        level += 0.12 * cover
        canvas.region[cover > 0.6] = REGIONS.index("bone")
        canvas.instance[cover > 0.6] = 6
    for _ in range(int(rng.integers(0, 4))):
        points = canvas.walk(_anywhere(rng), rng.uniform(0, 6.3), rng.uniform(0.2, 0.8), bend=0.5, step=0.04)
        level += rng.uniform(0.1, 0.4) * _soft(canvas.stroke(points, rng.uniform(0.005, 0.015)), size, 1.5)
    canvas.image[:] = np.clip(level, 0, 1)


def _slices(canvas: _Canvas) -> None:
    """A slice through a body: an outline full of organs cut from smooth noise, each with its own grey and grain."""
    rng, size = canvas.rng, canvas.size
    canvas.ground(np.full(3, rng.uniform(0, 0.12), np.float32), "outside", kind=1, depth=0.2)
    stretch, wobble = rng.uniform(1, 1.35), rng.uniform(0.02, 0.1)
    window, inside = canvas.blob(_anywhere(rng, 0.42, 0.58), rng.uniform(0.32, 0.6), stretch=stretch, wobble=wobble)
    grey = np.full(3, rng.uniform(0.2, 0.8), np.float32)
    canvas.paint(_soft(inside, size, 1.5), grey, "body", window=window, kind=2, depth=rng.uniform(0, 0.15))
    bodily = canvas.region == REGIONS.index("body")
    n = int(rng.integers(3, 9))
    cells = int(rng.integers(2, 6))
    fields = np.stack([_wave(rng, size, cells) for _ in range(n)])
    winner, best = fields.argmax(0), fields.max(0)
    for i in range(n):
        cover = _blur(((winner == i) & (best > rng.uniform(0.3, 1.2)) & bodily).astype(np.float32), 0.8)
        colour = np.clip(np.full(3, rng.uniform(0.1, 1)), 0, 1).astype(np.float32)
        canvas.paint(cover, colour, "organ", kind=int(rng.integers(1, 3)), depth=rng.uniform(0, 0.2))
    for _ in range(int(rng.integers(0, 5))):
        radius, turn = rng.uniform(0.02, 0.1), rng.uniform(0, 3)
        part, deep = canvas.blob(_anywhere(rng, 0.25, 0.75), radius, stretch=1.25, turn=turn, wobble=0.1)
        colour = np.full(3, rng.uniform(0, 1), np.float32)
        canvas.paint(_soft(deep, size, 1.5), colour, "organ", window=part, kind=2, depth=0.08)
    if rng.random() < 0.4:
        rim = np.exp(-(((inside - 0.03) / 0.015) ** 2)).astype(np.float32)
        canvas.paint(rim, np.full(3, rng.uniform(0, 1), np.float32), "bone", window=window, opacity=0.95)


SCENES: dict[str, Callable[[_Canvas], None]] = {
    "shapes": _shapes,
    "mosaic": _mosaic,
    "nuclei": _nuclei,
    "glands": _glands,
    "smear": _smear,
    "vessels": _vessels,
    "lesion": _lesion,
    "ultrasound": _ultrasound,
    "chest": _chest,
    "slices": _slices,
}
"""The pretraining scenes by name."""


# -- light, lens and film --------------------------------------------------------------------------------------------


def _develop(image: Floats, rng: np.random.Generator, wildness: float) -> NDArray[np.uint8]:
    """Random palette, light, blur and noise on a (3, size, size) picture; (size, size, 3) uint8."""
    size = image.shape[-1]
    if rng.random() < 0.6:
        image = image * (1 + np.float32(rng.uniform(0, 0.25) * wildness) * _wave(rng, size, 2))
    if rng.random() < 0.5 * wildness:
        mix = np.eye(3) + rng.normal(0, 0.35, (3, 3)) * (1 if rng.random() < 0.6 else 2)
        mix /= np.abs(mix.sum(1, keepdims=True)) + 0.3
        image = np.einsum("ij,jhw->ihw", mix.astype(np.float32), image)
        low, high = np.quantile(image[:, ::4, ::4], [0.01, 0.99])
        image = (image - np.float32(low)) / np.float32(high - low + 1e-3) * np.float32(0.9) + np.float32(0.05)
    if rng.random() < 0.25 * wildness:
        weights = rng.dirichlet([2, 2, 2]).astype(np.float32)
        image = np.broadcast_to(np.tensordot(weights, image, 1), image.shape)
    if rng.random() < 0.2 * wildness:
        image = 1 - image
    if rng.random() < 0.7:
        image = np.clip(image, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.35 * wildness)))
    gain, shift = np.exp(rng.normal(0, 0.25 * wildness)), rng.normal(0, 0.08 * wildness)
    image = (image - np.float32(0.5)) * np.float32(gain) + np.float32(0.5 + shift)
    if rng.random() < 0.35:
        image = _blur(image, float(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.7:
        strength = float(np.exp(rng.uniform(np.log(0.004), np.log(0.08))))
        shape = (3, size, size) if rng.random() < 0.5 else (1, size, size)
        image = image + np.float32(strength) * rng.standard_normal(shape, dtype=np.float32)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def phantom(seed: int, *, size: int = 128, scene: str | None = None, wildness: float = 1.0) -> Phantom:
    """Draw pretraining picture number `seed`: one of `SCENES` (at random, or the one named) and its labels.

    `wildness` scales how far palette, light and contrast may stray; 0 keeps them natural.
    """
    if size < 32:
        raise BadCall(f"a phantom needs size >= 32, got {size}")
    if scene is not None and scene not in SCENES:
        raise unknown("scene", scene, SCENES)
    rng = np.random.default_rng([_PRETRAINING, seed])
    name = scene or list(SCENES)[int(rng.integers(len(SCENES)))]
    canvas = _Canvas(rng, size)
    SCENES[name](canvas)
    return Phantom(_develop(canvas.image, rng, wildness), canvas.region, canvas.instance, canvas.texture)


def preview(seed: int, *, size: int = 128) -> Phantom:
    """A phantom for the card of an adapter, from a stream that pretraining never sees."""
    rng = np.random.default_rng([_PREVIEW, seed])
    canvas = _Canvas(rng, size)
    list(SCENES.values())[int(rng.integers(2, len(SCENES)))](canvas)
    return Phantom(_develop(canvas.image, rng, 0.1), canvas.region, canvas.instance, canvas.texture)


# -- the few-shot data sets of the demo ------------------------------------------------------------------------------


def _rough(
    canvas: _Canvas, centre: tuple[float, float], radius: float, rough: float, cells: int
) -> tuple[Window, Floats]:
    """A round thing whose outline is thresholded noise: a window and the depth inside it."""
    window, inside = canvas.blob(centre, radius, wobble=0, stretch=canvas.rng.uniform(1, 1.25), margin=1.9)
    return window, inside + np.float32(rough * radius) * _wave(canvas.rng, canvas.size, cells)[window]


def _few_shot_lesion(canvas: _Canvas) -> NDArray[np.uint8]:
    """A faint violet-brown patch on olive skin; light, corners, hair, freckles and ink are as dark as the patch."""
    rng, size = canvas.rng, canvas.size
    skin = _jitter(rng, (0.7, 0.6, 0.38), 0.04)
    canvas.ground(skin, "background", kind=2, depth=0.035)
    patch = skin * (np.asarray([0.72, 0.6, 0.78], np.float32) + np.float32(rng.uniform(-0.08, 0.1)))
    window, inside = _rough(canvas, _anywhere(rng, 0.3, 0.7), rng.uniform(0.16, 0.3), 0.16, 7)
    canvas.paint(_soft(inside, size, rng.uniform(5, 11)), patch, "lesion", window=window, kind=2, depth=0.12)
    dots = _texture(rng, size, 4)[window] * _soft(inside, size, 8)
    canvas.image[:, *window] *= 1 - np.float32(rng.uniform(0.02, 0.07)) * dots
    mask = (canvas.region == REGIONS.index("lesion")).astype(np.uint8)
    for _ in range(int(rng.integers(3, 9))):
        part, deep = _rough(canvas, _anywhere(rng), rng.uniform(0.01, 0.035), 0.2, 20)
        canvas.paint(_soft(deep, size, 2), skin * rng.uniform(0.55, 0.8), None, window=part, opacity=0.8)
    for _ in range(int(rng.integers(2, 9))):
        points = canvas.walk(_anywhere(rng), rng.uniform(0, 6.3), rng.uniform(0.4, 0.9), bend=0.2, step=0.04)
        cover = _soft(canvas.stroke(points, rng.uniform(0.005, 0.012)), size, 1.3)
        canvas.paint(cover, skin * rng.uniform(0.3, 0.6), None, opacity=0.85)
    if rng.random() < 0.4:  # an ink mark
        points = canvas.walk(_anywhere(rng), rng.uniform(0, 6.3), 0.3, bend=0.6, step=0.04)
        ink = np.asarray([0.35, 0.25, 0.55], np.float32)
        canvas.paint(_soft(canvas.stroke(points, 0.03), size, 3), ink, None, opacity=0.6)
    y, x = canvas.y - 0.5, canvas.x - 0.5
    turn = rng.uniform(0, 6.3)
    light = 1 + rng.uniform(0.15, 0.45) * (np.cos(turn) * x + np.sin(turn) * y) - rng.uniform(0, 0.9) * (x * x + y * y)
    canvas.image *= (light * (1 + 0.05 * _wave(rng, size, 3))).astype(np.float32)
    return mask


def _few_shot_cells(canvas: _Canvas) -> NDArray[np.uint8]:
    """Cells with cytoplasm and a nucleus on a teal ground, between empty ghosts and dark debris that do not count."""
    rng, size = canvas.rng, canvas.size
    ground = _jitter(rng, (0.62, 0.76, 0.74), 0.03)
    body, ink = _jitter(rng, (0.5, 0.66, 0.56), 0.03), _jitter(rng, (0.2, 0.36, 0.38), 0.03)
    canvas.ground(ground, "background", kind=2, depth=0.05)
    mask = np.zeros((size, size), np.uint8)
    base = rng.uniform(0.09, 0.14)
    for _ in range(int(rng.integers(2, 6))):  # ghosts: a rim and nothing inside
        part, deep = _rough(canvas, _anywhere(rng), base * rng.uniform(0.6, 1), 0.1, 8)
        canvas.paint(np.exp(-((deep * size / 2) ** 2)).astype(np.float32), body, None, window=part, opacity=0.8)
    for _ in range(int(rng.integers(4, 12))):  # debris: as dark as a nucleus, but bare
        part, deep = _rough(canvas, _anywhere(rng), rng.uniform(0.012, 0.04), 0.3, 14)
        canvas.paint(_soft(deep, size, 2), ink * rng.uniform(0.8, 1.4), None, window=part)
    for _ in range(int(rng.integers(3, 8))):
        centre, radius = _anywhere(rng, 0.05, 0.95), base * rng.uniform(0.8, 1.25)
        window, inside = _rough(canvas, centre, radius, 0.14, 8)
        shade = body * rng.uniform(0.9, 1.12)
        canvas.paint(_soft(inside, size, 2.5), shade, "cytoplasm", window=window, kind=2, depth=0.08)
        off = radius * 0.3 * rng.normal(size=2)
        at = float(centre[0] + off[0]), float(centre[1] + off[1])
        part, deep = _rough(canvas, at, radius * rng.uniform(0.38, 0.55), 0.12, 10)
        mask[window][inside > 0] = 1
        mask[part][deep > 0] = 2
        canvas.paint(_soft(deep, size, 2), ink * rng.uniform(0.85, 1.5), "nucleus", window=part, kind=2, depth=0.15)
    canvas.image *= (1 + 0.1 * _wave(rng, size, 2)).astype(np.float32)
    return mask


@dataclass(frozen=True)
class _Kind:
    title: str
    modality: str
    classes: tuple[str, ...]
    draw: Callable[[_Canvas], NDArray[np.uint8]]


_KINDS = {
    "cells": _Kind(
        "Phantom cells: nucleus and cytoplasm, between ghosts and debris",
        "procedural phantom (RGB), in the manner of light microscopy",
        ("background", "cytoplasm", "nucleus"),
        _few_shot_cells,
    ),
    "lesion": _Kind(
        "Phantom skin lesion: one faint patch under hair, freckles and uneven light",
        "procedural phantom (RGB), in the manner of dermoscopy",
        ("background", "lesion"),
        _few_shot_lesion,
    ),
}

KINDS = tuple(_KINDS)
"""The few-shot tasks that `write_dataset` can draw."""


def write_dataset(folder: Path, kind: str, *, train: int, test: int, size: int = 128, seed: int = 0) -> Path:
    """Draw a few-shot segmentation task of one of `KINDS` into `folder`; return the path of its `dataset.json`.

    Writes `images/*.png` (RGB), `masks/*.png` (uint8 label values) and `dataset.json`. Item k of a seed is the same
    picture whatever `train` and `test` are: the test items are numbered from 1000000, so they never meet the shots.
    """
    if kind not in _KINDS:
        raise unknown("kind of phantom data set", kind, _KINDS)
    if train < 0 or test < 0 or train + test < 1 or size < 32:
        raise BadCall(f"need train, test >= 0, at least one item and size >= 32, got {train=}, {test=}, {size=}")
    what = _KINDS[kind]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    items = []
    for split, numbers in (("train", range(train)), ("test", range(1_000_000, 1_000_000 + test))):
        for number in numbers:
            rng = np.random.default_rng([_FEW_SHOT, KINDS.index(kind), seed, number])
            canvas = _Canvas(rng, size)
            mask = what.draw(canvas)
            name = f"{kind}_{split}_{number % 1_000_000:04d}"
            Image.fromarray(_develop(canvas.image, rng, 0.15)).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            items.append({"id": name, "image": f"images/{name}.png", "mask": f"masks/{name}.png", "split": split})
    facts = {
        "name": f"phantom_{kind}",
        "title": what.title,
        "caveats": "drawn by medgraft from a seed; no patient, no clinical meaning",
        "task": ["segmentation"],
        "dims": 2,
        "modality": what.modality,
        "classes": {str(i): name for i, name in enumerate(what.classes)},
        "seed": seed,
        "items": items,
    }
    path = folder / "dataset.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path
