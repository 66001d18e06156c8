"""What every part is: a small trainable module that acts at named sites, or reads features out.

A new part is one file: subclass `Part` (or `Readout`), register it with `@part("name")`, say whether it is silent at birth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.sites import Site, match
from ..backbones.state import Features
from ..errors import BadCall, unknown
from ..kernels.door import Path

Shape = tuple[int, int]
"""(fan_in, fan_out) of a site."""

PARTS: dict[str, type[Part]] = {}
P = TypeVar("P", bound="type[Part]")


def part(kind: str) -> Callable[[P], P]:
    """Register a part class under `kind`."""

    def keep(cls: P) -> P:
        if kind in PARTS:
            raise BadCall(f"part {kind!r} is already {PARTS[kind].__qualname__}")
        cls.kind = kind
        PARTS[kind] = cls
        return cls

    return keep


def find_part(kind: str) -> type[Part]:
    """The part class registered under `kind`. Raises UnknownName with near misses."""
    if kind not in PARTS:
        raise unknown("part", kind, PARTS)
    return PARTS[kind]


class Part(nn.Module):
    """One small trainable module of one kind, acting at `sites`.

    `sites` maps site names to (fan_in, fan_out); `config` is all that is needed, beside it, to allocate the part again, in JSON
    types. Tensors are named `<site>.<tensor>`. A part knows its own parameters; nobody searches for names.
    """

    kind: ClassVar[str] = ""
    acts_on: ClassVar[tuple[str, ...]] = ()
    """Kinds of site that it accepts."""
    innermost: ClassVar[bool] = False
    """True where it must stand directly on the frozen module, before every other part."""
    holds_images: ClassVar[bool] = False
    """True where its tensors are images or speak of single ones."""

    def __init__(self, sites: Mapping[str, Sequence[int]], **config: Any) -> None:
        super().__init__()
        self.sites: dict[str, Shape] = {name: (int(shape[0]), int(shape[1])) for name, shape in sites.items()}
        self.config = config
        self.at = nn.ModuleDict()

    # Facts that may depend on the configuration.

    @property
    def silent(self) -> bool:
        """True when a fresh part leaves the backbone's function as it is, bit for bit."""
        return True

    @property
    def why_not_silent(self) -> str:
        """The reason, where it is not."""
        return ""

    @property
    def mixable(self) -> bool:
        """True when rows with different adapters of this kind share one call (`mix`)."""
        return False

    @property
    def foldable(self) -> bool:
        """True when `fold` can make a plain layer of it and the frozen one."""
        return False

    # What it does.

    @classmethod
    def on(cls, *args: Any, **options: Any) -> Part:
        """`on(backbone, task, **options)`: a fresh part for `backbone` and `task`; `targets` are site patterns. Raises UnknownName for one that matches nothing."""
        raise NotImplementedError

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """`act(sites, inner, *inputs)`: what happens at a port. `inner` is the frozen module or the parts before this one; `sites` are this port's."""
        raise NotImplementedError

    def path(self, sites: tuple[Site, ...], inner: Callable[..., Any], *inputs: Any) -> Path | None:
        """Which way its operation goes at a port on these inputs, and why; None where it has no kernel of its own."""
        return None

    def check(self, backbone: Backbone) -> None:
        """Raise BadCall where the part does not fit `backbone` although its sites are there and have the right widths."""

    def fold(self, sites: tuple[Site, ...], base: nn.Module) -> nn.Module:
        """A plain module with the same function as `base` and this part together; both stay as they are."""
        raise NotImplementedError

    # Averages with others of its kind; see `soup`.

    @property
    def why_no_soup(self) -> str:
        """Why it has no average with others, empty where it has one."""
        return "it holds images, of which there is no average" if self.holds_images else ""

    @property
    def alike(self) -> dict[str, Any]:
        """What parts must have in common to be averaged."""
        return {"sites": self.sites, **self.config}

    @classmethod
    def soup(cls, parts: Sequence[Any], weights: Sequence[float]) -> Part:
        """sum_i w_i part_i, tensor by tensor, as a part of its own. `parts` are alike, `weights` sum to 1.

        Summed in float64. Raises BadCall where whole numbers or truth values among the tensors differ: they have no mean.
        """
        made = copy.deepcopy(parts[0])
        tensors = [p.tensors() for p in parts]
        with torch.no_grad():
            for name, mine in made.tensors().items():
                found = [own[name].to(mine.device) for own in tensors]
                if mine.is_floating_point():
                    mine.copy_(torch.stack([w * t.double() for w, t in zip(weights, found, strict=True)]).sum(0))
                elif not all(torch.equal(t, mine) for t in found):
                    raise BadCall(f"{name} holds whole numbers that differ, of which there is no mean")
        return made

    def cell(self, site: str | Site) -> Any:
        """The module holding the tensors of one site."""
        return self.at[_key(site if isinstance(site, str) else site.name)]

    def put(self, site: str, cell: nn.Module) -> None:
        """Give a site its tensors."""
        self.at[_key(site)] = cell

    # Tensors.

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that belongs to the part, parameters and buffers, by `<site>.<tensor>`."""
        return dict(self._named(self.state_dict(keep_vars=True)))

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the part; names, shapes and completeness were checked by the store."""
        with torch.no_grad():
            for name, mine in self.tensors().items():
                mine.copy_(tensors[name])

    @staticmethod
    def _named(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, t in state.items():
            yield name.removeprefix("at.").replace("/", "."), t

    def extra_repr(self) -> str:
        """Configuration and number of sites."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items()) + f", sites={len(self.sites)}"


class Readout(Part):
    """A part behind the last stage: turns features into logits, or adds named maps that a later one reads."""

    makes_logits: ClassVar[bool] = True
    takes_prompts: ClassVar[bool] = False
    """True where it reads points, boxes or masks from `features.prompts`."""
    takes_groups: ClassVar[bool] = False
    """True where it reads the sub-group of each row from there; then it has `groups`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the sub-groups that it knows."""
        return ()

    def group_index(self, name: str) -> int:
        """The number of a sub-group, or what the part's rule makes of an unknown one. Raises UnknownName."""
        if name not in self.groups:
            raise unknown("sub-group", str(name), self.groups)
        return self.groups.index(name)

    @property
    def silent(self) -> bool:
        """Never: it makes the output."""
        return False

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "a readout turns features into an output of its own"

    def read(self, features: Features, image: Tensor) -> Tensor | Features:
        """features and image (B, C, H, W) -> logits, or features with more maps."""
        raise NotImplementedError

    def forward(self, features: Features, image: Tensor) -> Tensor | Features:
        """`read`."""
        return self.read(features, image)


def _key(site: str) -> str:
    return site.replace(".", "/")  # module names cannot hold dots


def shapes(sites: Sequence[Site]) -> dict[str, Shape]:
    """`sites` by name, as a part's constructor takes them."""
    return {s.name: (s.fan_in, s.fan_out) for s in sites}


def resolve(cls: type[Part], backbone: Backbone, targets: str | Sequence[str]) -> list[Site]:
    """The sites of `backbone` that match `targets` and that a forward really calls.

    Raises UnknownName for a pattern without a match, BadCall for a site that would be bypassed in silence.
    """
    sites = match(backbone.sites, targets, cls.acts_on)
    refuse_uncalled(backbone, sites)
    return sites


def refuse_uncalled(backbone: Backbone, sites: Sequence[Site]) -> None:
    """Raise BadCall for sites whose port no forward calls."""
    deaf = [s.name for s in sites if s.port not in backbone.called]
    if deaf:
        raise BadCall(
            f"{backbone.spec.id} never calls {', '.join(deaf[:3])}{' ...' if len(deaf) > 3 else ''}: a part there would do "
            "nothing, in silence; choose other sites (`medgraft explain` lists those that are called)"
        )


def on_output(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a branch's output; transformers' attention returns a tuple whose first entry is meant."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
