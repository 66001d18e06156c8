"""Ensembles: several resident adapters of one host answer as one.

    p(x) = (1 / n) sum_i p_i(x)      p_i the probabilities of member i

Members share the frozen prefix: it is computed once for all of equal preprocessing. What comes after it costs n times as much.

Source: for segmentation of the retina the mean of predictions always helped (arXiv:2405.08329).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCall, unknown
from .host import Host
from .sliding import predict_volume
from .task import Task
from .volume_task import VolumePreprocessing


class Ensemble:
    """The mean of the probabilities of `names`, adapters resident in `host`. It copies nothing, and sees later training of them.

    Raises UnknownName for an adapter that is not resident, BadCall for no member and for members of different tasks.
    """

    def __init__(self, host: Host, names: Sequence[str]) -> None:
        if isinstance(names, str) or not names:
            raise BadCall(f"an ensemble is made of the names of resident adapters, one or more; got {names!r}")
        self.host, self.names = host, list(names)
        self._members()

    def _members(self) -> list[Any]:
        resident = self.host.adapters
        for name in self.names:
            if name not in resident:
                raise unknown("resident adapter", name, resident, hint="host.add(adapter, name) makes one resident")
        found = [resident[name] for name in self.names]
        for name, member in zip(self.names, found, strict=True):
            mine, theirs = found[0].task, member.task
            if mine != theirs:
                raise BadCall(
                    f"{self.names[0]} and {name} cannot answer as one: {mine.kind} {_classes(mine)} and {theirs.kind} {_classes(theirs)}; "
                    "members have one task, with the same classes and label values: ask the others by themselves"
                )
        return found

    @property
    def task(self) -> Task:
        """The task that all members share."""
        return self._members()[0].task

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W), preprocessed -> mean probabilities, float32: (B, K, H, W), or (B, K) of a classifier.

        One prefix for all members; gradients flow. Raises BadCall for members of different preprocessing: `predict` takes images.
        """
        members = self._members()
        if len({m.preprocessing for m in members}) > 1:
            raise BadCall(
                "members of this ensemble were trained under different preprocessing, so no one tensor suits all; call predict(image)"
            )
        logits = self.host(x, adapters=self.names)
        found = [m.task.probabilities(z) for m, z in zip(members, logits, strict=True)]
        return torch.stack([p.double() for p in found]).mean(0).float()

    @torch.no_grad()
    def predict(
        self,
        image: str | Path | np.ndarray,
        *,
        prompts: Mapping[str, Any] | None = None,
        probabilities: bool = False,
    ) -> Any:
        """As `Host.predict`: an image to a label map (H, W) uint8 in its own size, to probabilities (K, H, W) float32, or, of a
        classifier, to {class: probability}. Each member sees the image under its own preprocessing, and all the same prompts.
        """
        task, volumes = self.task, isinstance(self._members()[0].preprocessing, VolumePreprocessing)
        if volumes:
            self.host.refuse_prompts(prompts)
            found = predict_volume(self.host, image, self.names, probabilities=True)
        else:
            on = self.host.on(image)
            found = [on.predict(name, prompts=prompts, probabilities=True) for name in self.names]
        if task.kind == "classify":
            return {name: sum(p[name] for p in found) / len(found) for name in task.classes}
        return _decided(task, np.stack(found).mean(0, dtype=np.float64), probabilities)


def _decided(task: Task, mean: np.ndarray, probabilities: bool) -> np.ndarray:
    """A label map from mean probabilities (K, ...), or these."""
    if probabilities:
        return mean.astype(np.float32)
    return task.write(mean.argmax(0) if len(mean) > 1 else (mean[0] > 0.5).astype(np.int64))


def _classes(task: Task) -> str:
    return ", ".join(f"{name} ({value})" for name, value in zip(task.classes, task.values, strict=True))
