"""The host: one frozen backbone in memory, many adapters beside it, selection as an argument of the call."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.base import Backbone
from ..backbones.prompts import Prompts
from ..backbones.sites import Plan, following
from ..backbones.state import Features, State
from ..errors import BadCall, WrongBackbone, nearest, unknown
from ..images import read_image
from ..volumes import Volume
from .adapter import Adapter
from .graft import Fixed, Graft, Plain, fixed, folded, mixed_plan
from .on_image import OnImage
from .prompting import refuse_unasked
from .sliding import predict_volume
from .volume_task import VolumePreprocessing

Output = Tensor | Features


class Outputs(list[Output]):
    """One output an adapter. `prefixes`, the frozen prefixes computed for them, is one: all of them see the same tensor."""

    prefixes: int = 1


class Host(nn.Module):
    """A backbone with resident adapters.

        host(x, adapter="polyp")                    the whole batch
        host(x, adapter=["polyp", None, "skin"])    one for each row
        host(x, adapters=["polyp", "skin"])         every adapter for every row; the common prefix is computed once

    There is no current adapter. Calls from any number of threads do not meet, and may overlap with `add` and `remove`: a call
    sees the adapters that were resident when it began.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self._grafts: Mapping[str, Graft] = {}
        self._lock = threading.Lock()

    # Resident adapters

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Resident adapters by name."""
        return {name: graft.adapter for name, graft in self._grafts.items()}

    def add(self, adapter: Adapter, name: str, *, allow_mismatch: bool = False) -> None:
        """Make `adapter` resident under `name`. All or nothing.

        Raises WrongBackbone for one made for other weights (`allow_mismatch` turns that into a warning), BadCall for a name that
        is taken or parts that do not fit.
        """
        if not isinstance(adapter, Adapter):
            raise BadCall(
                f"a host takes adapters, got a {type(adapter).__name__}; load a directory with medgraft.load_adapter first"
            )
        if not name or not isinstance(name, str):
            raise BadCall(f"an adapter's name must be a non-empty string, got {name!r}")
        check_backbone(adapter, self.backbone, allow_mismatch)
        graft = Graft.of(self.backbone, adapter)
        with self._lock:
            if name in self._grafts:
                raise BadCall(
                    f"an adapter called {name!r} is resident already; remove it first, or choose another name"
                )
            adapter.to(next(self.backbone.parameters()).device)  # last: a refused adapter stays where it was
            self._grafts = {**self._grafts, name: graft}

    def remove(self, name: str) -> Adapter:
        """Take the adapter called `name` out and return it."""
        with self._lock:
            graft = self._graft(name)
            self._grafts = {n: g for n, g in self._grafts.items() if n != name}
        return graft.adapter

    def _graft(self, name: str, grafts: Mapping[str, Graft] | None = None) -> Graft:
        found = (self._grafts if grafts is None else grafts).get(name)
        if found is None:
            raise unknown("resident adapter", name, self._grafts, hint="host.add(adapter, name) makes one resident")
        return found

    # Calls

    @overload
    def forward(self, x: Tensor, adapter: str, *, prompts: Prompts | None = None, remat: bool = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, adapter: None = None, *, prompts: Prompts | None = None, remat: bool = False
    ) -> Features: ...
    @overload
    def forward(
        self, x: Tensor, adapter: Sequence[str | None], *, prompts: Prompts | None = None, remat: bool = False
    ) -> Tensor | list[Output]: ...
    @overload
    def forward(
        self, x: Tensor, *, adapters: Sequence[str | None], prompts: Prompts | None = None, remat: bool = False
    ) -> Outputs: ...

    def forward(
        self,
        x: Tensor,
        adapter: str | Sequence[str | None] | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        prompts: Prompts | None = None,
        remat: bool = False,
    ) -> Output | list[Output]:
        """(B, C, H, W) -> logits; Features where the adapter is None; one output a row, in a list, where rows differ in shape.

        `prompts` are what a promptable decoder is asked, one row an image, in pixels of `x`. `remat` recomputes each stage in the
        backward pass instead of keeping its activations.
        Raises UnknownName for an adapter that is not resident, BadCall for a batch, a list or prompts that do not fit.
        """
        grafts = self._grafts  # one snapshot for the whole call
        x = self.backbone.checked(x)
        if adapters is not None:
            if adapter is not None:
                raise BadCall("give either adapter= (one for each row) or adapters= (all for every row), not both")
            chosen = [None if n is None else self._graft(n, grafts) for n in adapters]
            return self._every(self._begin(x, prompts, chosen), x, chosen, remat)
        if adapter is None or isinstance(adapter, str):
            graft = None if adapter is None else self._graft(adapter, grafts)
            return self._finish(self._begin(x, prompts, [graft]), graft, x, remat)
        if not isinstance(adapter, Sequence):
            raise BadCall(
                f"adapter= takes a resident adapter's name, None, or a list of these, one a row; got a {type(adapter).__name__}"
            )
        if len(adapter) != x.shape[0]:
            raise BadCall(
                f"adapter= names {len(adapter)} rows, the batch has {x.shape[0]}; give one name a row, or one for all"
            )
        return self._by_row(x, list(adapter), grafts, prompts, remat)

    def _begin(self, x: Tensor, prompts: Prompts | None, grafts: Sequence[Graft | None]) -> State:
        """The state before stage 1, with the prompts beside it where there are any."""
        state = self.backbone.stem(x)
        return state if prompts is None else self._ask(state, prompts, grafts)

    def _ask(self, state: State, prompts: Prompts, grafts: Sequence[Graft | None]) -> State:
        for graft in grafts:
            if graft is not None:
                refuse_unasked(graft.adapter, prompts)
        return self.backbone.prompted(state, prompts)

    def cut(self, adapter: str) -> int:
        """The stage before which `adapter` changes nothing: `backbone.run(x, stop=host.cut(name))` is its frozen prefix."""
        return self._graft(adapter).first

    def resume(
        self,
        state: State,
        image: Tensor,
        adapter: str,
        *,
        prompts: Prompts | None = None,
        remat: bool = False,
        between: Callable[[State], State] | None = None,
    ) -> Tensor:
        """Logits from a state at or before `cut(adapter)`; `image` (B, C, H, W) is what the state came from.

        `prompts` as in a call: many can be asked of one state.
        `between` acts on the state given and on the one after every later stage (feature mixing in training). `remat` as in a call.
        """
        graft = self._graft(adapter)
        if state.stage > graft.first:
            raise BadCall(
                f"{adapter!r} acts from stage {graft.first} on, the state stands at {state.stage}; stop earlier"
            )
        if state.x.shape[0] != image.shape[0]:
            raise BadCall(
                f"the state holds {state.x.shape[0]} rows, image= has {image.shape[0]}; give the images that the state came from"
            )
        state = state if prompts is None else self._ask(state, prompts, [graft])
        out = self._finish(state, graft, self.backbone.checked(image), remat, between)
        assert isinstance(out, Tensor)
        return out

    def _advance(
        self,
        state: State,
        plan: Plan | None,
        stop: int,
        remat: bool,
        between: Callable[[State], State] | None = None,
    ) -> State:
        """Stages up to `stop` under `plan`. A checkpointed stage enters its plan again when it is recomputed."""

        def one(s: State) -> State:
            with following(plan):
                return self.backbone.stage(s)

        state = state if between is None else between(state)
        while state.stage < stop:
            state = checkpoint(one, state, use_reentrant=False) if remat and torch.is_grad_enabled() else one(state)
            state = state if between is None else between(state)  # outside the checkpoint: drawn once
        return state

    def _readout(self, state: State, plan: Plan | None) -> Features:
        with following(plan):
            return self.backbone.readout(state)

    def _finish(
        self,
        state: State,
        graft: Graft | None,
        image: Tensor,
        remat: bool,
        between: Callable[[State], State] | None = None,
    ) -> Output:
        n = self.backbone.rows_at_once
        if graft is not None and n is not None and state.x.shape[0] > n and between is None:
            starts = range(0, state.x.shape[0], n)
            return torch.cat([self._few(state, slice(i, i + n), graft, image, remat) for i in starts])
        plan = None if graft is None else graft.plan
        features = self._readout(self._advance(state, plan, self.backbone.depth, remat, between), plan)
        return features if graft is None else self._read(features, graft, image)

    @staticmethod
    def _read(features: Features, graft: Graft, image: Tensor) -> Tensor:
        """The readouts, under the adapter's plan: a promptable decoder runs inside them."""
        with following(graft.plan):
            return graft.read(features, image)

    def _few(self, state: State, rows: slice, graft: Graft, image: Tensor, remat: bool) -> Tensor:
        out = self._finish(state.map(lambda t: t[rows]), graft, image[rows], remat)
        assert isinstance(out, Tensor)
        return out

    def _every(self, state: State, x: Tensor, grafts: Sequence[Graft | None], remat: bool) -> Outputs:
        """Each adapter from the stage in which it begins; the frozen prefix goes on from one to the next."""
        if not grafts:
            raise BadCall("adapters= is empty; name at least one")
        depth = self.backbone.depth
        outputs: list[Output | None] = [None] * len(grafts)
        for k in sorted(range(len(grafts)), key=lambda k: depth if (g := grafts[k]) is None else g.first):
            graft = grafts[k]
            state = self._advance(state, None, depth if graft is None else graft.first, remat)
            outputs[k] = self._finish(state, graft, x, remat)
        return Outputs(out for out in outputs if out is not None)

    def _by_row(
        self,
        x: Tensor,
        names: list[str | None],
        resident: Mapping[str, Graft],
        prompts: Prompts | None,
        remat: bool,
    ) -> Output | list[Output]:
        distinct = list(dict.fromkeys(names))
        grafts = [None if n is None else self._graft(n, resident) for n in distinct]
        if not names:
            raise BadCall("an empty batch with an empty list of adapters has no output shape; name one adapter instead")
        if len(distinct) == 1:
            out = self._finish(self._begin(x, prompts, grafts), grafts[0], x, remat)
            return out if isinstance(out, Tensor) else [out.row(i) for i in range(len(names))]
        slots = [distinct.index(n) for n in names]
        index = [
            torch.tensor([i for i, s in enumerate(slots) if s == k], device=x.device) for k in range(len(distinct))
        ]
        start = min(self.backbone.depth if g is None else g.first for g in grafts)
        state = self._advance(self._begin(x, prompts, grafts), None, start, remat)
        rows: list[Output | None] = [None] * len(names)
        if all(g is None or g.mixable for g in grafts):
            plan = mixed_plan(self.backbone, grafts, slots, x.device)
            features = self._readout(self._advance(state, plan, self.backbone.depth, remat), plan)
            results = [
                features.rows(i) if g is None else self._read(features.rows(i), g, x[i])
                for g, i in zip(grafts, index, strict=True)
            ]
        else:
            results = [self._finish(state.rows(i), g, x[i], remat) for g, i in zip(grafts, index, strict=True)]
        for result, i in zip(results, index, strict=True):
            for j, row in enumerate(i.tolist()):
                rows[row] = result[j : j + 1] if isinstance(result, Tensor) else result.row(j)
        done = [r for r in rows if r is not None]
        same = all(isinstance(r, Tensor) and r.shape == getattr(done[0], "shape", None) for r in done)
        return torch.cat(done) if same else done  # type: ignore[arg-type]

    # Images in, masks out

    @torch.no_grad()
    def predict(
        self,
        image: str | Path | np.ndarray | Volume,
        adapter: str,
        *,
        prompts: Mapping[str, Any] | None = None,
        probabilities: bool = False,
    ) -> Any:
        """An image, by path or as (H, W, 3) uint8, to a label map (H, W) uint8 in the image's own size, by the adapter's own
        preprocessing and label map; with `probabilities`, (K, H, W) float32 instead. A classifier gives {class: probability}.

        `prompts` are a person's, in pixels of the image: {"box": (x0, y0, x1, y1)}, {"points": [(x, y)], "labels": [1]}, see `ask`.
        With an adapter of volumes: a path, a DICOM folder or a `Volume` to (X, Y, Z) uint8 on its own grid, see `predict_volume`.
        """
        if isinstance(image, Volume) or isinstance(self._graft(adapter).adapter.preprocessing, VolumePreprocessing):
            self.refuse_prompts(prompts)
            return predict_volume(self, image, [adapter], probabilities=probabilities)[0]
        return self.on(image).predict(adapter, prompts=prompts, probabilities=probabilities)

    def refuse_prompts(self, prompts: Mapping[str, Any] | None) -> None:
        """Raise BadCall for prompts on volumes."""
        if prompts is not None:
            raise BadCall(f"{self.backbone.spec.id} takes no prompts; leave prompts= away")

    def on(self, image: str | Path | np.ndarray) -> OnImage:
        """One image, whose frozen prefix is kept for any number of questions to any adapter."""
        return OnImage(self, image if isinstance(image, np.ndarray) else read_image(Path(image)))

    # Plain modules

    def folded(self, name: str) -> Plain:
        """A new plain module with the adapter folded in, for export. The host stays as it is."""
        return folded(self.backbone, self._graft(name).adapter)

    def fixed(self, name: str) -> Fixed:
        """A plain module that shares the frozen tensors and holds this adapter in buffers: one graph under torch.compile."""
        return fixed(self.backbone, self._graft(name).adapter)

    def train(self, mode: bool = True) -> Host:
        """Set the mode of the resident adapters. The backbone is always in eval mode."""
        super().train(mode)
        for graft in self._grafts.values():
            graft.adapter.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Host:
        """Set whether the resident adapters are trained. The backbone never is."""
        for graft in self._grafts.values():
            graft.adapter.requires_grad_(requires_grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        twin = memo[id(self)] = Host(copy.deepcopy(self.backbone, memo))
        twin._grafts = {
            name: Graft.of(twin.backbone, copy.deepcopy(g.adapter, memo)) for name, g in self._grafts.items()
        }
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Host:
        super()._apply(fn, recurse)
        for graft in self._grafts.values():
            graft.adapter._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The resident adapters."""
        return "adapters: " + (", ".join(self._grafts) or "none")


def check_backbone(adapter: Adapter, backbone: Backbone, allow_mismatch: bool) -> None:
    """Raise WrongBackbone unless `adapter` was made for the tensors of `backbone`."""
    made_for, here = adapter.backbone, backbone.spec
    if made_for.fingerprint == here.fingerprint:
        return
    said = (
        f"this adapter was made for {made_for.id} (fingerprint {made_for.fingerprint[:12]}), "
        f"the host holds {here.title} (fingerprint {here.fingerprint[:12]})"
    )
    if not allow_mismatch:
        near = " The names look alike: is it another revision or file?" if nearest(made_for.id, [here.id], n=1) else ""
        raise WrongBackbone(f"{said}.{near} Load {made_for.id}, or pass allow_mismatch=True at your own risk")
    warnings.warn(f"{said}; loaded because allow_mismatch=True was given", stacklevel=3)
