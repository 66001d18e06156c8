"""Sites: the named places where a part may act; ports: what stands there; plans: what happens in one call.

A port is installed once, when the backbone is loaded. It knows its site and nothing else. Which operation runs there is a fact
of the call, carried by one context variable, so threads and coroutines with different adapters never meet, and adding or
removing an adapter never touches the module tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import BadCall, UnknownName, nearest

KINDS = ("linear", "branch", "norm", "tokens", "conv", "embedding", "prompt", "weights", "support")

Operation = Callable[..., Any]
"""`operation(inner, *args, **kwargs)`: `inner` is the frozen module, or a chain that ends in it."""


@dataclass(frozen=True)
class Site:
    """A named place in a backbone.

    name  : canonical, the same on every backbone of a kind: `blocks.3.attn.qkv`.
    kind  : one of `KINDS`.
    stage : the stage (counted from 0) in which it acts; everything before can be computed without the adapter.
    fan_in, fan_out : widths of what goes in and comes out.
    port  : the site whose port carries it; differs from `name` for q, k and v of a fused projection.
    span  : the rows (start, stop) of the port's output that belong to this site, or None for all.
    path  : the module's path in the network as its authors named it.
    folded : True where the module sees each image's row as several consecutive rows (windows).
    norm  : of a linear layer that alone reads a LayerNorm's output, as it is, the norm's site; else empty.
    """

    name: str
    kind: str
    stage: int
    fan_in: int
    fan_out: int
    port: str
    path: str
    span: tuple[int, int] | None = None
    folded: bool = False
    norm: str = ""


@dataclass(frozen=True)
class Plan:
    """What one call does: operations by port, for the ports of one owner. Immutable, carried by a context variable."""

    owner: object
    operations: Mapping[str, Operation]


_PLAN: ContextVar[Plan | None] = ContextVar("medgraft_plan", default=None)


@contextmanager
def following(plan: Plan | None) -> Iterator[None]:
    """Run the block under `plan`; what was selected before is selected again after it, whatever happens inside."""
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


class Port(nn.Module):
    """Stands where `base` stood. Runs it as it is, unless the plan of the current call says otherwise.

    The port shares the base's dictionaries of parameters, buffers and children, so state-dict names, `.to()` and attribute
    access are those of the bare network; `base` itself is not a child.
    """

    def __init__(self, base: nn.Module, site: str, owner: object) -> None:
        super().__init__()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = getattr(base, shared)
        self.__dict__["base"] = base
        self.site = site
        self.owner = owner
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    def train(self, mode: bool = True) -> Port:
        """Set the mode of the port and of what it stands for."""
        super().train(mode)
        self.__dict__["base"].training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, or the planned operation's."""
        plan = _PLAN.get()
        if plan is not None and plan.owner is self.owner:
            operation = plan.operations.get(self.site)
            if operation is not None:
                return operation(self.__dict__["base"], *args, **kwargs)
        return self.__dict__["base"](*args, **kwargs)

    def extra_repr(self) -> str:
        """The site's name."""
        return f"site={self.site!r}"


class Owner:
    """The identity that ties a backbone's ports to the plans made for it. A copied backbone keeps one owner of its own."""


def install(network: nn.Module, path: str, site: str, owner: Owner) -> None:
    """Put a port in the place of the module at `path`."""
    parent, _, leaf = path.rpartition(".")
    holder = network.get_submodule(parent)
    base = getattr(holder, leaf)
    # `_modules` is written directly: a holder that is itself behind a port shares this very dictionary.
    holder._modules[leaf] = Port(base, site, owner)


def match(sites: Mapping[str, Site], patterns: str | Sequence[str], kinds: Iterable[str]) -> list[Site]:
    """The sites whose name matches any of `patterns` (shell style, `*` crosses dots) and whose kind is in `kinds`.

    Raises UnknownName for a pattern that matches nothing, with near misses, or with the kinds that it did match; BadCall for no pattern.
    """
    wanted = tuple(kinds)
    if not patterns:
        raise BadCall("targets is empty: name at least one site or pattern (`medgraft explain` lists the sites)")
    hits: dict[str, Site] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        named = [s for s in sites.values() if fnmatchcase(s.name, pattern)]
        fitting = [s for s in named if s.kind in wanted]
        if not fitting:
            raise UnknownName(_no_match(pattern, named, sites, wanted))
        hits.update((s.name, s) for s in fitting)
    order = list(sites)
    return sorted(hits.values(), key=lambda s: order.index(s.name))


def _no_match(pattern: str, named: list[Site], sites: Mapping[str, Site], wanted: tuple[str, ...]) -> str:
    if named:
        kinds = ", ".join(sorted({s.kind for s in named}))
        return (
            f"site pattern {pattern!r} matches only {kinds} sites (such as {named[0].name!r}); "
            f"this part acts on {', '.join(wanted)} sites"
        )
    able = [s.name for s in sites.values() if s.kind in wanted]
    leaves = dict.fromkeys(re.sub(r"^.*\.\d+\.", "*.", name) for name in able)
    near = nearest(pattern, [*leaves, *able]) or [*leaves][:3]
    way_out = f"near misses: {', '.join(near)}" if near else f"this backbone has no {' or '.join(wanted)} site at all"
    return f"no site matches {pattern!r}; {way_out} (`medgraft explain` lists the sites)"


def first_stage(sites: Iterable[Site], *, none: int) -> int:
    """The earliest stage in which any of `sites` acts; `none` where there is no site."""
    return min((s.stage for s in sites), default=none)
