"""The frozen model: stem -> stage 1 .. stage N -> readout, stoppable after and resumable from any stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import BadCall
from .identity import digest
from .prompts import Prompts
from .sites import Operation, Owner, Plan, Port, Site, following, install
from .state import Features, State


@dataclass(frozen=True)
class Spec:
    """Facts of a loaded backbone.

    id          : what `load_backbone` was asked for, without a local path.
    fingerprint : see `identity.fingerprint`.
    commit      : the hub commit that the tensors came from, where there is one.
    random      : True when the weights are random; everything printed or saved says so.
    image_size  : the side, in pixels, that the backbone was loaded for.
    divisor     : sides must divide by this.
    mean, std   : per channel, of inputs in [0, 1].
    width       : channels of the last feature map.
    widths, strides : channels and stride of every map that the readout gives.
    fit         : how a picture becomes a square: stretched, or scaled and padded to the right and below (SAM).
    dims        : spatial axes of an input: 2 for images, 3 for volumes, whose `image_size` is the side of a patch in voxels.
    bottom      : positions that the coarsest level needs at least (a norm over one position is zero); see `fitting`.
    axcodes     : the orientation of volumes that the weights were trained in, by where each axis points, such as "LIA".
    spacing     : the voxel spacing that they were trained at, in mm, one number an axis.
    intensity   : the rule that maps their intensities to [0, 1], as volumes.py states it, such as ("percentiles", 2.0, 98.0).
    """

    id: str
    family: str
    fingerprint: str
    random: bool
    image_size: int
    divisor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    channels: int = 3
    commit: str | None = None
    fit: Literal["stretch", "pad"] = "stretch"
    dims: int = 2
    bottom: int = 1
    axcodes: str | None = None
    spacing: tuple[float, ...] | None = None
    intensity: tuple[str, float, float] | None = None

    def fitting(self, space: Sequence[int]) -> tuple[int, ...]:
        """The smallest legal size that holds `space`: sides rounded up to the divisor, the last one further where `bottom` asks for it."""
        size = [max(-(-side // self.divisor), 1) for side in space]
        size[-1] = max(size[-1], -(-self.bottom // math.prod(size[:-1])))
        return tuple(side * self.divisor for side in size)

    @property
    def title(self) -> str:
        """The id, with a warning where the weights are random."""
        return f"{self.id} (random weights)" if self.random else self.id


class Backbone(nn.Module):
    """A frozen network with named sites. Always in eval mode, never requiring gradients.

    A family implements `stem`, `stage`, `readout` and `_sites`; ports stand at every site from the start.
    """

    family: ClassVar[str] = ""

    def __init__(self, network: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.owner = Owner()
        self.sites: dict[str, Site] = {site.name: site for site in self._sites()}
        # Inner modules first: a branch's port then shares the children that are ports already.
        for site in sorted(self.sites.values(), key=lambda s: -s.path.count(".")):
            if site.name == site.port and site.path:
                install(network, site.path, site.port, self.owner)
        self.requires_grad_(False)
        self.eval()

    # What a family says

    depth: int
    """The number of stages, N."""

    rows_at_once: ClassVar[int | None] = None
    """Rows of a batch that an adapter's stages are run for at a time, where a family's activations a row are large; None: all."""

    def stem(self, x: Tensor) -> State:
        """(B, C, *space) -> the state before stage 1. `space` is (H, W), or (D, H, W) for volumes."""
        raise NotImplementedError

    def stage(self, state: State) -> State:
        """The state one stage on."""
        raise NotImplementedError

    def readout(self, state: State) -> Features:
        """The features of a state that has passed every stage."""
        raise NotImplementedError

    def _sites(self) -> list[Site]:
        raise NotImplementedError

    def prompted(self, state: State, prompts: Prompts) -> State:
        """The state with prompts beside it, for families with a promptable decoder. Raises BadCall where there is none."""
        raise BadCall(
            f"{self.spec.id} takes no prompts: it has no promptable decoder; leave prompts= away, or use a SAM"
        )

    # What every backbone does

    def run(self, x: Tensor | State, *, start: int | None = None, stop: int | None = None) -> Features | State:
        """Run from an image batch (B, C, *space) or from a state, to the features or, with `stop`, to the state after that stage.

        `start`, where given, must be the stage at which the state stands: it is a check, not a choice.
        Raises BadCall for another start, a stop that lies behind, or a batch that does not fit.
        """
        state = x if isinstance(x, State) else self.stem(self.checked(x))
        if start is not None and start != state.stage:
            raise BadCall(
                f"asked to start at stage {start}, the state stands at stage {state.stage}; pass start={state.stage}"
            )
        last = self.depth if stop is None else stop
        if not state.stage <= last <= self.depth:
            raise BadCall(f"cannot stop after stage {last}: the state stands at {state.stage} of {self.depth} stages")
        while state.stage < last:
            state = self.stage(state)
        return self.readout(state) if stop is None else state

    def forward(self, x: Tensor) -> Features:
        """(B, C, *space) -> Features."""
        features = self.run(x)
        assert isinstance(features, Features)
        return features

    def checked(self, x: Tensor) -> Tensor:
        """`x` as the stem wants it: (B, C, *space), floating point, sides that fit, one channel repeated where three are needed."""
        spec, axes = self.spec, ("D", "H", "W")[-self.spec.dims :]
        want = f"(B, {spec.channels}, {', '.join(axes)}) with {', '.join(axes[:-1])} and {axes[-1]} divisible by {spec.divisor}"
        if not isinstance(x, Tensor):
            raise BadCall(f"{spec.id} wants a tensor {want}, got a {type(x).__name__}")
        if x.ndim != 2 + spec.dims or not x.is_floating_point():
            raise BadCall(f"{spec.id} wants a floating-point batch {want}, got {tuple(x.shape)} {x.dtype}")
        if x.shape[0] == 0:
            raise BadCall(
                f"{spec.id} was given an empty batch, {tuple(x.shape)}; leave the call out where there is nothing to ask"
            )
        if x.shape[1] == 1 and spec.channels == 3:
            x = x.expand(-1, 3, *x.shape[2:])
        space = tuple(x.shape[2:])
        if x.shape[1] != spec.channels or spec.fitting(space) != space:
            few = f", {spec.bottom} or more positions at the coarsest level" if spec.bottom > 1 else ""
            raise BadCall(
                f"{spec.id} wants {want}{few}, got {tuple(x.shape)}; resize or pad the {'images' if spec.dims == 2 else 'volumes'} first"
            )
        own = self._first_tensor
        if x.device != own.device or (x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise BadCall(
                f"{self.spec.id} computes in {own.dtype} on {own.device}, the batch is {x.dtype} on {x.device}; convert it with x.to(...)"
            )
        return x

    @property
    def _first_tensor(self) -> Tensor:
        return next(self.network.parameters())

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode whatever is asked: a frozen network has no training behaviour."""
        return super().train(False)

    def digest(self) -> str:
        """A hash of the live module's every tensor. Law 1: it never changes."""
        return digest(self.network)

    @property
    def called(self) -> frozenset[str]:
        """The ports that a forward really calls, seen on one small probe."""
        return self._called

    @cached_property
    def _called(self) -> frozenset[str]:
        seen: set[str] = set()

        def seer(port: str) -> Operation:
            def look(inner: Any, *args: Any, **kwargs: Any) -> Any:
                seen.add(port)
                return inner(*args, **kwargs)

            return look

        plan = Plan(self.owner, {site.port: seer(site.port) for site in self.sites.values()})
        with torch.no_grad(), following(plan):
            self._probe()
        return frozenset(seen)

    def _probe(self) -> None:
        """One small forward through everything that has a port."""
        p = next(self.parameters())
        side = self.probe_side
        space = self.spec.fitting([side] * self.spec.dims)
        self.run(torch.zeros(1, self.spec.channels, *space, device=p.device, dtype=p.dtype))

    @property
    def probe_side(self) -> int:
        """A side, in pixels, that is cheap to run and legal."""
        return self.spec.image_size

    # Copies. A copy has ports and an owner of its own.

    def trainable_copy(self) -> Backbone:
        """A deep copy whose parameters require gradients, for recipes that train a network. `self` stays as it is."""
        twin = copy.deepcopy(self)
        twin.requires_grad_(True)
        return twin

    def plain_copy(self, stand_in: Callable[[str, nn.Module], nn.Module], *, share: bool) -> Backbone:
        """A copy without ports: where a port of site `s` stood over `base` stands `stand_in(s, base)`.

        With `share` the copy's tensors use the memory of the frozen ones, else copies of it. They are objects of their own all
        the same, so that moving or casting the copy leaves this backbone where it is.
        """
        memo: dict[int, Any] = {}
        if share:
            memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.network.parameters()}
            memo |= {id(b): b.detach() for b in self.network.buffers()}
        twin = copy.deepcopy(self, memo)
        for holder in list(twin.modules()):
            for leaf, child in list(holder._modules.items()):
                if isinstance(child, Port):
                    holder._modules[leaf] = stand_in(child.site, child.__dict__["base"])
        return twin

    def extra_repr(self) -> str:
        """Id, weights, fingerprint."""
        return f"{self.spec.title}, fingerprint={self.spec.fingerprint[:12]}, sites={len(self.sites)}"
