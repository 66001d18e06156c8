"""The prefix cache: what the frozen stages before an adapter give for an image, computed once.

Keyed by (backbone fingerprint, item digest, view, image size, stage, dtype), so it is right for as long as the key is; kept in
memory, or in a directory that several runs and tasks may share, within a budget in bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbones import Backbone, State
from ..errors import BadCall

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PrefixCache:
    """States of single images after `stage` stages of `backbone`.

    dtype     : "fp32" gives the same training curve as no cache; "fp16" halves the bytes.
    budget    : bytes kept; the least recently used leave first (in memory; a directory stops growing instead).
    directory : where to keep them, or None for memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        stage: int,
        *,
        dtype: str = "fp32",
        budget: int = 4 << 30,
        directory: str | Path | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise BadCall(f"cache dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.backbone, self.stage, self.dtype, self.budget = backbone, stage, dtype, budget
        self.directory = None if directory is None else Path(directory)
        self.hits = self.misses = self.held = 0
        self._states: OrderedDict[str, State] = OrderedDict()
        self._meta: dict[tuple[int, ...], Any] = {}
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.held = sum(f.stat().st_size for f in self.directory.glob("*.safetensors"))

    def key(self, item: str, view: int, shape: Sequence[int]) -> str:
        """The key of one image; `item` is a digest of its content."""
        dtype = str(next(self.backbone.parameters()).dtype)
        said = f"{self.backbone.spec.fingerprint}|{item}|{view}|{tuple(shape)}|{self.stage}|{self.dtype}|{dtype}"
        return hashlib.sha256(said.encode()).hexdigest()

    def states(self, images: Tensor, items: Sequence[str], views: Sequence[int]) -> State:
        """The state of a batch (B, C, H, W): rows at hand are taken, the others computed together and kept."""
        if len(items) != images.shape[0] or len(views) != images.shape[0]:
            raise BadCall(
                f"{images.shape[0]} images need as many item digests and views, got {len(items)} and {len(views)}"
            )
        keys = [self.key(item, view, images.shape[1:]) for item, view in zip(items, views, strict=True)]
        found = {k: s for k in dict.fromkeys(keys) if (s := self._get(k, images)) is not None}
        missing = [k for k in dict.fromkeys(keys) if k not in found]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            rows = torch.tensor([keys.index(k) for k in missing], device=images.device)
            with torch.no_grad():
                fresh = self.backbone.run(images.index_select(0, rows), stop=self.stage)
            assert isinstance(fresh, State)
            self._meta[tuple(images.shape[1:])] = fresh.meta
            for i, k in enumerate(missing):
                found[k] = fresh.map(partial(self._kept, i))
                self._put(k, found[k])
        rows_of = [found[k] for k in keys]
        live = next(self.backbone.parameters()).dtype
        joined = State(
            torch.cat([s.x for s in rows_of]),
            self.stage,
            {name: torch.cat([s.kept[name] for s in rows_of]) for name in rows_of[0].kept},
            rows_of[0].meta,
        )
        return joined.map(lambda t: t.to(images.device, live))

    def _kept(self, row: int, t: Tensor) -> Tensor:
        return t[row : row + 1].to(DTYPES[self.dtype]).clone()

    def _get(self, key: str, images: Tensor) -> State | None:
        if self.directory is None:
            if key in self._states:
                self._states.move_to_end(key)
            return self._states.get(key)
        shape = tuple(images.shape[1:])
        if shape not in self._meta:
            with torch.no_grad():
                self._meta[shape] = self.backbone.stem(images[:1]).meta
        try:
            tensors = load_file(self.directory / f"{key}.safetensors")
        except (FileNotFoundError, SafetensorError):
            return None
        return State(tensors.pop("x"), self.stage, tensors, self._meta[shape])

    def _put(self, key: str, state: State) -> None:
        if self.directory is None:
            self._states[key] = state
            self.held += state.nbytes
            while self.held > self.budget and len(self._states) > 1:
                self.held -= self._states.popitem(last=False)[1].nbytes
            return
        if self.held + state.nbytes > self.budget:
            return
        temporary = self.directory / f".{uuid4().hex}"
        try:
            save_file({"x": state.x.contiguous(), **{n: t.contiguous() for n, t in state.kept.items()}}, temporary)
            os.replace(temporary, self.directory / f"{key}.safetensors")
            self.held += state.nbytes
        except OSError:  # a full disk costs speed, not the run
            self.budget = 0
        finally:
            temporary.unlink(missing_ok=True)
