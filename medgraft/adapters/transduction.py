"""Answers for a whole set of queries at once: here, unlike in `neighbours`, an answer depends on the other queries.

    propagation     F = (I - alpha S)^-1 Y        S = D^-1/2 W D^-1/2 over known samples and queries; rows scaled to 1
    smoothing       F = (I + lam (I - D^-1 W))^-1 P        W over the queries, P (N, K) another method's answer
    rectification   nearest prototype; the queries are moved onto the known samples and help to place the prototypes

W_ij = exp((<x_i, x_j> - 1) / T) where one is among the nearest of the other, else 0; D = diag(W 1). So these are
functions of a set, and no head: a head answers row by row. Each takes what `neighbours.SequenceModel` says: known (M,
D) and labels (M, K), queries (N, D) -> probabilities (N, K). The graphs are dense and solved in float64: (M + N)^2
numbers, for some thousands.

Sources: Zhou et al. 2004 (local and global consistency); Laplacian regularisation as in Ziko et al. 2020
(LaplacianShot), here in closed form; Liu, Song and Qin 2020 (prototype rectification).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadCall
from .neighbours import Attention, SequenceModel, checked, unit


@dataclass(frozen=True)
class Propagation:
    """Labels spread over a graph of known samples and queries. `alpha` in [0, 1): how far; 0 reaches no query.

    `balanced` (ours) lets every class start with the same mass. A query that no label reaches gets equal probabilities.
    """

    neighbours: int = 10
    alpha: float = 0.9
    temperature: float = 0.1
    balanced: bool = False

    def __post_init__(self) -> None:
        _check_graph(self.neighbours, self.temperature)
        if not 0 <= self.alpha < 1:
            raise BadCall(f"alpha lies in [0, 1), got {self.alpha}")

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Probabilities (N, K) of the whole set. Raises BadCall for what `neighbours.checked` refuses."""
        f, y, z = checked(known, labels, queries)
        w = graph(torch.cat([f, z]), self.neighbours, self.temperature)
        root = w.sum(1).clamp_min(torch.finfo(w.dtype).tiny).rsqrt()
        start = w.new_zeros(len(w), y.shape[1])
        start[: len(f)] = y / y.sum(0).clamp_min(1) if self.balanced else y
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        mass = torch.linalg.solve(eye - self.alpha * root[:, None] * w * root, start)[len(f) :].clamp_min(0)
        total = mass.sum(1, keepdim=True)
        return torch.where(total > 0, mass / total, 1 / y.shape[1]).to(y.dtype)


@dataclass(frozen=True)
class Smoothing:
    """Another method's probabilities, made smooth over the graph of the queries; `strength` (lam) 0 changes nothing.

    The closed form minimises sum_i d_i |F_i - P_i|^2 + lam / 2 sum_ij W_ij |F_i - F_j|^2. Rows still add up to 1.
    """

    first: SequenceModel = Attention()  # noqa: RUF009  (frozen)
    strength: float = 1.0
    neighbours: int = 10
    temperature: float = 0.1

    def __post_init__(self) -> None:
        _check_graph(self.neighbours, self.temperature)
        if not 0 <= self.strength < float("inf"):
            raise BadCall(f"strength is 0 or more and finite, got {self.strength}")

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Probabilities (N, K) of the whole set. Raises BadCall for what `neighbours.checked` refuses."""
        p = self.first(known, labels, queries)
        z = checked(known, labels, queries)[2]
        w = graph(z, self.neighbours, self.temperature)
        degree = w.sum(1, keepdim=True)
        walk = torch.where(degree > 0, w / degree, torch.eye(len(w), dtype=w.dtype, device=w.device))
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        return torch.linalg.solve(eye + self.strength * (eye - walk), p.to(w.dtype)).to(p.dtype)


@dataclass(frozen=True)
class Rectification:
    """Nearest prototype by cosine, rectified twice with the help of the queries.

    The queries are shifted by (mean of known - mean of queries). Each class then takes in its `confident` most probable
    of the queries answered with it, and its prototype is sum_i w_i x_i, w = softmax_i(<x_i, first prototype> / T), over
    known and taken-in samples.
    A class without a known sample has no prototype and probability 0.
    """

    confident: int = 8
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.confident < 0 or not 0 < self.temperature < float("inf"):
            raise BadCall(f"confident is 0 or more, temperature above 0; got {self.confident}, {self.temperature}")

    def __call__(self, known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Probabilities (N, K) of the whole set. Raises BadCall for what `checked` refuses, and for a single query."""
        f, y, z = checked(known, labels, queries)
        if len(z) < 2:
            raise BadCall(
                f"rectification moves a set of queries onto the known samples, {len(z)} is no set: ask for more at once"
            )
        z = unit(z + f.mean(0) - z.mean(0))
        there = y.sum(0) > 0
        first = self._answer(z, unit(y.T @ f), there)
        prototypes = unit(y.T @ f)
        for c in there.nonzero()[:, 0].tolist():
            mine = (first.argmax(1) == c).nonzero()[:, 0]
            best = mine[first[mine, c].argsort(descending=True, stable=True)[: self.confident]]
            x = torch.cat([f[y[:, c] > 0], z[best]])
            prototypes[c] = unit(((x @ prototypes[c]) / self.temperature).softmax(0) @ x)
        return self._answer(z, prototypes, there)

    def _answer(self, z: Tensor, prototypes: Tensor, there: Tensor) -> Tensor:
        return (z @ prototypes.T / self.temperature).masked_fill(~there, -torch.inf).softmax(1)


def graph(x: Tensor, neighbours: int, temperature: float) -> Tensor:
    """W (N, N), float64, symmetric, of unit vectors (N, D); see the top of the file.

    Fewer others than `neighbours` means all of them; of equally similar ones the lowest index counts as nearer.
    """
    similar = x.double() @ x.double().T
    similar.fill_diagonal_(-torch.inf)  # comes last in every order, and weighs exp(-inf) = 0
    order = similar.argsort(dim=1, descending=True, stable=True)[:, :neighbours]
    near = torch.zeros_like(similar, dtype=torch.bool).scatter_(1, order, True)
    return torch.where(near | near.T, ((similar - 1) / temperature).exp(), 0.0)


def _check_graph(neighbours: int, temperature: float) -> None:
    if neighbours < 1 or not 0 < temperature < float("inf"):
        raise BadCall(f"a graph wants neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}")
