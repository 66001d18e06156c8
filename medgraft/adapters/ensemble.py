"""Ensembles: several resident adapters of one host answer as one.

    p(x) = (1 / n) sum_i p_i(x)      p_i the probabilities of member i

Members share the frozen prefix: it is computed once for all of equal preprocessing. What comes after it costs n times as much.

Source: for segmentation of the retina the mean of predictions always helped (arXiv:2405.08329).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCall, unknown
from ..images import read_image
from .host import Host
from .on_image import in_own_size
from .sliding import predict_volume
from .task import Preprocessing, Task
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
                    f"{self.names[0]} and {name} cannot answer as one: {mine.kind} {_classes(mine)} and {theirs.kind} {_classes(theirs)}"
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
    def predict(self, image: str | Path | np.ndarray, *, probabilities: bool = False) -> Any:
        """As `Host.predict`: an image to a label map (H, W) uint8 in its own size, to probabilities (K, H, W) float32, or, of a
        classifier, to {class: probability}. Each member sees the image under its own preprocessing.
        """
        members = self._members()
        if isinstance(members[0].preprocessing, VolumePreprocessing):
            answers = predict_volume(self.host, image, self.names, probabilities=True)
            return _decided(members[0].task, np.stack(answers).mean(0, dtype=np.float64), probabilities)
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image))
        by_preprocessing: dict[Preprocessing, list[int]] = {}
        for i, member in enumerate(members):
            by_preprocessing.setdefault(member.preprocessing, []).append(i)
        found: list[np.ndarray] = []
        for prepare, group in by_preprocessing.items():
            x = prepare(pixels)[None].to(next(self.host.backbone.parameters()))
            for i, logits in zip(group, self.host(x, adapters=[self.names[i] for i in group]), strict=True):
                if members[i].task.kind == "classify":
                    found.append(members[i].task.probabilities(logits)[0].cpu().numpy())
                else:
                    found.append(in_own_size(members[i], logits, pixels, probabilities=True))
        mean = np.stack(found).mean(0, dtype=np.float64)
        task = members[0].task
        if task.kind == "classify":
            return dict(zip(task.classes, mean.tolist(), strict=True))
        return _decided(task, mean, probabilities)


def _decided(task: Task, mean: np.ndarray, probabilities: bool) -> np.ndarray:
    """A label map from mean probabilities (K, ...), or these."""
    if probabilities:
        return mean.astype(np.float32)
    return task.write(mean.argmax(0) if len(mean) > 1 else (mean[0] > 0.5).astype(np.int64))


def _classes(task: Task) -> str:
    return ", ".join(f"{name} ({value})" for name, value in zip(task.classes, task.values, strict=True))
