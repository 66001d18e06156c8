"""Volumes in, label volumes out: Gaussian sliding windows, the frozen prefix computed once a window for all adapters.

    logits(v) = sum_w g(v - w) f(window w)(v) / sum_w g(v - w),    g a Gaussian over the window, sigma an eighth of its side

Windows, weights and sums are MONAI's `sliding_window_inference`. Memory, in bytes: 4 V (C + 1 + sum of K) for the prepared volume of V
voxels with C channels and the sums of all adapters with K outputs, beside what the network needs for one batch of windows, which
does not grow with the volume; then 8 K V' for the one adapter whose logits go back to the V' voxels of the file. Sums and volume
lie in the machine's memory, windows where the network is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadCall, need
from ..volumes import Volume, need_memory, read_volume
from .adapter import Adapter
from .volume_task import VolumePreprocessing

if TYPE_CHECKING:
    from .host import Host

PADDING = "replicate"  # a volume smaller than what the backbone takes goes on with its border


@torch.no_grad()
def slide(
    host: Host, x: Tensor, adapters: Sequence[str], *, window: Sequence[int], overlap: float = 0.5, batch: int = 1
) -> list[Tensor]:
    """Logits (K, D, H, W) float32 of a prepared volume (C, D, H, W) by each adapter, from `batch` windows at a time.

    One forward of the shared prefix a window, whatever the number of adapters. Raises UnknownName, BadCall as a call of the host.
    """
    from monai.inferers.utils import sliding_window_inference

    own = next(host.backbone.parameters())

    def predict(windows: Tensor) -> tuple[Tensor, ...]:
        space = windows.shape[2:]
        found = host(windows.to(own.dtype), adapters=adapters)
        return tuple(z if z.shape[2:] == space else _enlarged(z, space) for z in found)

    found = sliding_window_inference(
        x[None],
        tuple(window),
        batch,
        predict,
        overlap=overlap,
        mode="gaussian",
        padding_mode=PADDING,
        sw_device=own.device,
        device=torch.device("cpu"),
    )
    return [z[0].float() for z in (found if isinstance(found, tuple) else (found,))]


def _enlarged(logits: Tensor, space: Sequence[int]) -> Tensor:
    return functional.interpolate(logits.float(), tuple(space), mode="trilinear", align_corners=False)


def predict_volume(
    host: Host,
    volume: str | Path | Volume | np.ndarray,
    adapters: Sequence[str],
    *,
    probabilities: bool = False,
    batch: int = 1,
    frame: int | None = None,
) -> list[np.ndarray]:
    """Label volumes (X, Y, Z) uint8 on the file's own grid, one for each adapter; with `probabilities`, (K, X, Y, Z) float32.

    `volume` is a path, the folder of a DICOM series, or a `Volume`. Adapters of equal preprocessing share every window's prefix.
    Raises BadData as `read_volume`, and for one that needs more memory than there is; BadCall for adapters of pictures or classifiers.
    """
    members = [host._graft(name).adapter for name in adapters]
    prepared = [_for_volumes(member, name) for member, name in zip(members, adapters, strict=True)]
    if isinstance(volume, np.ndarray):
        raise BadCall(
            f"an array of the shape {volume.shape} does not say how it lies in space; give a path, or Volume(values, affine)"
        )
    source = volume if isinstance(volume, Volume) else read_volume(volume, frame=frame)
    groups: dict[VolumePreprocessing, list[int]] = {}
    for i, own in enumerate(prepared):
        groups.setdefault(replace(own, largest=False), []).append(i)
    found: dict[int, np.ndarray] = {}
    for prepare, group in groups.items():
        x = prepare(source)
        outputs = [members[i].task.outputs for i in group]
        voxels, own_voxels = x[0].numel(), source.values.size
        need_memory(4 * voxels * (1 + sum(outputs)) + 8 * max(outputs) * own_voxels, f"predicting {source.name}")
        window = prepare.window(x.shape[1:], host.backbone.spec)
        logits = slide(host, x, [adapters[i] for i in group], window=window, overlap=prepare.overlap, batch=batch)
        for i in group:
            own_grid = prepare.back(logits.pop(0), source)[None]  # popped: what is done with is let go
            if probabilities:
                found[i] = members[i].task.probabilities(own_grid)[0].numpy()
            else:
                labels = members[i].task.write(members[i].task.decide(own_grid)[0].numpy())
                found[i] = largest_components(labels) if prepared[i].largest else labels
    return [found[i] for i in range(len(members))]


def _for_volumes(adapter: Adapter, name: str) -> VolumePreprocessing:
    if not isinstance(adapter.preprocessing, VolumePreprocessing):
        raise BadCall(f"adapter {name!r} was trained on pictures, not on volumes; predict slices as pictures with it")
    if adapter.task.kind != "segment":
        raise BadCall(f"adapter {name!r} classifies; whole volumes are segmented only")
    return adapter.preprocessing


def largest_components(labels: np.ndarray) -> np.ndarray:
    """(X, Y, Z) uint8 with the largest 26-connected component of each class and nothing else of it."""
    from monai.transforms.post.array import KeepLargestConnectedComponent

    need("skimage", "volumes")
    keep = KeepLargestConnectedComponent(is_onehot=False, independent=True, connectivity=3)
    return np.asarray(keep(torch.from_numpy(labels.astype(np.int16))[None])[0]).astype(np.uint8)
