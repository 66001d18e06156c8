"""Greedy soups: of several adapters, those that together score best on a validation set.

Members are taken in the order of their own scores, best first. Each is added to the soup if the score does not fall, and left out
otherwise. So the soup never scores below its best member on that set (of a rank, where one is given: below its best member cut to
it). On other images it may: report on a set that had no part in the choice.

Source: Wortsman et al. 2022 (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..adapters import Adapter, Host
from ..adapters.soup import Soup, soup
from ..adapters.store import rounded
from ..backbones import Backbone
from ..errors import BadCall, BadData
from .evaluate import evaluate
from .items import Dataset
from .model import NAME

Score = Callable[[Adapter], float]


class Tried(NamedTuple):
    """A member in the order in which it was tried: its own score, the score of the soup with it, and whether it stayed."""

    name: str
    own: float
    together: float
    kept: bool


class Greedy(NamedTuple):
    """A greedy soup, its score, and what was tried."""

    soup: Soup
    score: float
    tried: list[Tried]


def greedy_soup(members: Mapping[str, Adapter], score: Score, *, rank: int | None = None) -> Greedy:
    """The greedy soup of `members` under `score` (higher is better); equals are tried in the order given. See the top of the file.

    Scores 2 n - 1 adapters for n members. Raises as `soup`, before anything is scored, and BadData for a score that is no number.
    """
    if not members:
        raise BadCall("a soup is made of one adapter or more, got none")
    soup(members, rank=rank)
    own = {name: _number(name, score(soup({name: m}, rank=rank).adapter)) for name, m in members.items()}
    first, *others = sorted(members, key=lambda name: -own[name])
    best, chosen = own[first], [first]
    tried = [Tried(first, best, best, True)]
    for name in others:
        together = _number(name, score(soup({n: members[n] for n in (*chosen, name)}, rank=rank).adapter))
        tried.append(Tried(name, own[name], together, together >= best))
        if together >= best:
            best, chosen = together, [*chosen, name]
    made = soup({n: members[n] for n in chosen}, rank=rank)
    made.adapter.provenance["choice"] = f"greedy, {len(chosen)} of {len(members)}"
    return Greedy(made, best, tried)


def _number(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise BadData(f"the score of {name} is {value}: there is nothing on these images to choose by; use others")
    return value


def score_on(backbone: Backbone, dataset: Dataset, split: str = "val", *, dtype: str = "float16") -> Score:
    """A score for `greedy_soup`: Dice, or accuracy of a classifier, on a split, of the bits that a file of `dtype` will hold."""

    def score(adapter: Adapter) -> float:
        host = Host(backbone)
        host.add(rounded(adapter, dtype), NAME)
        found = evaluate(host, NAME, dataset, split)["dice" if adapter.task.kind == "segment" else "accuracy"]
        return math.nan if found is None else float(found)

    return score
