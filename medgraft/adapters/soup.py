"""Soups: several adapters of one backbone and one task, averaged into a single one.

    s B A = sum_i w_i s_i B_i A_i      LoRA: the mean of the products, exactly, by stacking; rank = sum of ranks
    theta = sum_i w_i theta_i          every other part, tensor by tensor

A mean of weights is a mean of functions only where a function is linear in its weights (LoRA at its site, linear heads, scale and
shift). Running statistics of batch norm are averaged as they are; nothing is run again.

Source: Wortsman et al. 2022 (arXiv:2203.05482); for segmentation of the retina soups hardly helped (arXiv:2405.08329).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from .. import __version__
from ..errors import BadCall, WrongBackbone
from .adapter import Adapter
from .lora import LoRA
from .part import Part


class Soup(NamedTuple):
    """A soup, and for each `<part>.<site>` that was cut to a rank the error |P - P'| / |P| of its product (Frobenius)."""

    adapter: Adapter
    errors: dict[str, float]


def soup(
    members: Mapping[str, Adapter] | Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> Soup:
    """The weighted mean of `members` (by name, or numbered from 1), as an adapter of its own; they stay as they are.

    weights : one positive share a member, divided by their sum (default: equal shares).
    rank    : cuts every LoRA part of a higher rank to this one, by the best approximation of its averaged product.

    A soup of one is that adapter, bit for bit. Provenance says of what the soup was made; scores of members are not its own and are
    left out. Raises WrongBackbone for members of several backbones, BadCall for members that differ in task, preprocessing or
    parts, for a part that has no average, for bad weights, and for a rank where nothing has one.
    """
    named = dict(members) if isinstance(members, Mapping) else {str(i): m for i, m in enumerate(members, 1)}
    if not named:
        raise BadCall("a soup is made of one adapter or more, got none")
    shares = _shares(weights, len(named))
    (first_name, first), *others = named.items()
    for name, other in others:
        _refuse_unlike(first_name, first, name, other)
    pots = {name: [dict(m.named_parts())[name] for m in named.values()] for name, _ in first.named_parts()}
    parts = {name: _averaged(name, pot, shares) for name, pot in pots.items()}
    errors = {} if rank is None else _cut(parts, rank)
    made = Adapter(first.backbone, first.task, first.preprocessing, parts)
    made.provenance = _provenance(list(named.values()), shares, rank, errors)
    return Soup(made, errors)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count or not all(math.isfinite(w) and w > 0 for w in given):
        raise BadCall(
            f"a soup of {count} wants {count} positive weights, got {given}; leave out a member that is to have none"
        )
    return [w / math.fsum(given) for w in given]


def _refuse_unlike(name: str, adapter: Adapter, other_name: str, other: Adapter) -> None:
    """Raise where two adapters cannot be averaged, saying what differs."""
    mine, theirs = adapter.backbone, other.backbone
    if mine.fingerprint != theirs.fingerprint:
        raise WrongBackbone(
            f"{name} was made for {mine.id} (fingerprint {mine.fingerprint[:12]}), {other_name} for {theirs.id} (fingerprint "
            f"{theirs.fingerprint[:12]}); only adapters of one backbone are averaged"
        )
    for what, a, b in (
        ("task", adapter.task.to_json(), other.task.to_json()),
        ("preprocessing", adapter.preprocessing.to_json(), other.preprocessing.to_json()),
        ("parts", {n: p.kind for n, p in adapter.named_parts()}, {n: p.kind for n, p in other.named_parts()}),
    ):
        if list(a.items()) != list(b.items()):  # the order of parts is the order in which they act
            raise BadCall(_unlike(what, name, a, other_name, b))
    for (part, p), (_, q) in zip(adapter.named_parts(), other.named_parts(), strict=True):
        if p.why_no_soup:
            raise BadCall(
                f"part {part!r} ({p.kind}) cannot be averaged: {p.why_no_soup}; an ensemble of the adapters can"
            )
        if p.alike != q.alike:
            raise BadCall(_unlike(f"part {part!r} ({p.kind})", name, p.alike, other_name, q.alike))


def _unlike(what: str, name: str, a: Mapping[str, Any], other_name: str, b: Mapping[str, Any]) -> str:
    keys = [k for k in {**a, **b} if (k in a, a.get(k)) != (k in b, b.get(k))]
    said = "; ".join(f"{k}: {_short(k, a, b)} and {_short(k, b, a)}" for k in keys[:3]) or "the order"
    return f"{name} and {other_name} differ in {what} ({said}), so they have no average; an ensemble may do"


def _short(key: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """An entry as it stands in a message: of mappings, only what the other lacks or has otherwise."""
    value, beside = own.get(key, "none"), other.get(key)
    if isinstance(value, Mapping) and isinstance(beside, Mapping):
        value = sorted(k for k in value if k not in beside or beside[k] != value[k])
        return f"{len(value)} of its own" + (f" ({value[0]})" if value else "")
    return str(value)[:80]


def _averaged(name: str, parts: Sequence[Part], shares: Sequence[float]) -> Part:
    if len(parts) == 1:
        return copy.deepcopy(parts[0])
    try:
        return type(parts[0]).soup(parts, shares)
    except BadCall as refused:
        raise BadCall(f"part {name!r} ({parts[0].kind}) cannot be averaged: {refused}") from None


def _cut(parts: dict[str, Part], rank: int) -> dict[str, float]:
    """Cut the LoRA parts among `parts` that are of a higher rank; their errors by `<part>.<site>`."""
    low_rank = {name: p for name, p in parts.items() if isinstance(p, LoRA)}
    if rank < 1 or not low_rank:
        raise BadCall(
            f"rank {rank} was asked for; a rank is 1 or more"
            if low_rank
            else f"none of the parts ({', '.join(parts)}) has a rank to cut"
        )
    errors: dict[str, float] = {}
    for name, p in low_rank.items():
        if p.config["rank"] <= rank:
            continue
        if p.dora:
            raise BadCall(f"part {name!r} cannot be cut to rank {rank}: DoRA's magnitudes belong to the uncut product")
        parts[name], found = p.truncated(rank)
        errors |= {f"{name}.{site}": error for site, error in found.items()}
    return errors


SHARED = ("labels", "license", "modality", "organ")
OWN = ("recipe", "dataset", "shots", "seed", "members")


def _provenance(
    members: Sequence[Adapter], shares: Sequence[float], rank: int | None, errors: Mapping[str, float]
) -> dict[str, Any]:
    """What went in, by data set, seed and weight, and what all members have in common. No paths."""
    pasts = [m.provenance for m in members]
    said = [p["dataset"] if isinstance(p.get("dataset"), list) else [p["dataset"]] for p in pasts if "dataset" in p]
    names = list(dict.fromkeys(name for found in said for name in found))
    facts: dict[str, Any] = {
        "recipe": "soup",
        "members": [{"weight": w, **{k: p[k] for k in OWN if k in p}} for w, p in zip(shares, pasts, strict=True)],
        "date": date.today().isoformat(),
        "medgraft": __version__,
    }
    if names:
        facts["dataset"] = names[0] if len(names) == 1 else names
    if rank is not None:
        facts["settings"] = {"rank": rank, "largest error": max(errors.values(), default=0.0)}
    return facts | {k: pasts[0][k] for k in SHARED if k in pasts[0] and all(p.get(k) == pasts[0][k] for p in pasts)}
