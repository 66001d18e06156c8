"""Choosing a support set: which labelled images a network that segments in context is shown.

    uniform       every item alike
    slice_index   p_i proportional to 1 / (|z_i - z| + 1), z the query's slice number, without replacement
    nearest       the largest cosines <f_i, f> of frozen features
    k_centre      greedy farthest point: next = argmax_i min_(chosen j) |f_i - f_j|, on unit features; the first is drawn

Each is a pure function of (items or features, seed), and nested: the first n of S are the n. `slice_index` draws one number for
each item and seed, whatever the query, so that the supports of neighbouring slices differ little.

Sources: Kim et al. 2023, Empirical analysis of a segmentation foundation model in prostate imaging, section 3.2 (slice index,
ROI-inclusive and ROI-agnostic); Gonzalez 1985 (k-centre); Efraimidis and Spirakis 2006 (weighted draws without replacement).
N items, S shots, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as tv

from ..adapters.task import Preprocessing
from ..backbones import Backbone
from ..errors import BadCall, BadData, unknown
from ..pixels import bright_box, square
from .items import Dataset, Item
from .shots import sample_shots
from .transforms import prepare_mask

FIXED = ("uniform", "k_centre")
BY_QUERY = ("slice_index", "nearest")
REGIONS = ("any", "shown")
MOST = 64
"""Pairs that are taken where no number is given: as many as the released network saw in training."""

ROWS = 32  # images a forward pass of the encoder


def uniform(count: int, shots: int, seed: int | Sequence[int]) -> list[int]:
    """`shots` of `count` indices. Raises BadCall for more shots than items."""
    _check(count, shots)
    return np.random.default_rng(seed).permutation(count)[:shots].tolist()


def slice_weighted(slices: Sequence[int], at: int, shots: int, seed: int | Sequence[int]) -> list[int]:
    """`shots` indices for a query at slice number `at`, items lying at `slices` (N,). Raises BadCall."""
    _check(len(slices), shots)
    weights = 1 / (np.abs(np.asarray(slices) - at) + 1.0)
    # The largest of log w + Gumbel noise are a draw by w without replacement.
    keys = np.log(weights) + np.random.default_rng(seed).gumbel(size=len(slices))
    return np.argsort(-keys, kind="stable")[:shots].tolist()


def nearest(features: Tensor, query: Tensor, shots: int) -> list[int]:
    """The `shots` items of features (N, D) most like `query` (D,), the best first; of equals the first. Raises BadCall."""
    f = _unit(features)
    _check(len(f), shots)
    if query.shape != features.shape[1:]:
        raise BadCall(f"a query has features ({features.shape[1]},) as the items have, got {tuple(query.shape)}")
    return (f @ _unit(query[None])[0]).argsort(descending=True, stable=True)[:shots].tolist()


def k_centre(features: Tensor, shots: int, seed: int | Sequence[int]) -> list[int]:
    """`shots` items that cover features (N, D): none is farther from the chosen than twice the best possible. Raises BadCall."""
    f = _unit(features)
    _check(len(f), shots)
    chosen = [int(np.random.default_rng(seed).integers(len(f)))]
    away = (f - f[chosen[0]]).norm(dim=1)
    while len(chosen) < shots:
        away[chosen] = -1  # copies lie at 0 and come last, but are never chosen twice
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (f - f[chosen[-1]]).norm(dim=1))
    return chosen


@torch.no_grad()
def features_of(encoder: Backbone, pictures: Iterable[np.ndarray]) -> Tensor:
    """Pooled features (N, D), float32, of pictures uint8 (H, W, 3) by a frozen backbone, with its own size and normalisation."""
    spec, like = encoder.spec, next(encoder.parameters())
    prepare = Preprocessing(spec.image_size, spec.mean, spec.std)
    x = torch.stack([prepare(picture) for picture in pictures])
    return torch.cat([encoder(some.to(like)).pooled.float().cpu() for some in x.split(ROWS)])


# From a data set


def candidates(dataset: Dataset, *, roi: str = "any") -> Dataset:
    """The data set with only those training items that may stand in a support set.

    They have every class drawn (what nobody drew would be taught as background). `roi` "shown" asks for a class to be seen on each,
    "any" also takes images without, which teach a network to find nothing. Raises UnknownName, BadData where none is left.
    """
    if roi not in REGIONS:
        raise unknown("kind of region", roi, REGIONS)
    items = [item for item in dataset.split("train") if all(dataset.annotated(item))]
    if roi == "shown":
        items = [item for item in items if dataset.present(item)]
    if not items:
        raise BadData(
            f"{dataset.name!r} has no training item with all of {', '.join(dataset.classes.values())} annotated"
            + (" and one of them to be seen" if roi == "shown" else "")
            + "; choose fewer --classes, or annotate some"
        )
    return replace(dataset, items=tuple(items))


def choose(
    dataset: Dataset,
    shots: int | None,
    seed: int,
    *,
    select: str = "uniform",
    roi: str = "any",
    encoder: Backbone | None = None,
) -> list[Item]:
    """The training items of a support set that serves every query: `shots` of them, by default all, but at most `MOST`.

    "uniform" is `sample_shots`, which makes sure of every class; "k_centre" wants an `encoder` and reads every candidate's image, but
    no mask. Raises UnknownName, BadCall, BadData.
    """
    if select not in FIXED:
        hint = f"{select} depends on the query: see `InContext`" if select in BY_QUERY else ""
        raise unknown("selection of a fixed support set", select, FIXED, hint=hint)
    found = candidates(dataset, roi=roi)
    count = min(MOST, len(found.items)) if shots is None else shots
    if select == "uniform":
        return sample_shots(found, count, seed)
    if encoder is None:
        raise BadCall("k_centre compares features: give an encoder, such as load_backbone('medgraft:starter-vit')")
    _check(len(found.items), count)
    features = features_of(encoder, (found.image(item) for item in found.items))
    return [found.items[i] for i in k_centre(features, count, seed)]


def pairs(
    dataset: Dataset, items: Sequence[Item], backbone: Backbone, prepare: Preprocessing, *, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """Images (S, H, W), grey as `backbone` makes them (luma of three channels), float32, and labels, as `Support.on` takes them.

    Labels int64 (S, H, W), by nearest neighbour; `soft` gives each class's share of a pixel after resizing, float32 (S, K, H, W).
    """
    if not items:
        raise BadCall("a support set has 1 pair or more; choose some items")
    like, images, labels = next(backbone.parameters()), [], []
    for item in items:
        pixels = dataset.image(item)
        mask = dataset.mask(item)[bright_box(pixels) if prepare.crop else ...]
        images.append(backbone.checked(prepare(pixels)[None].to(like))[0, 0].float().cpu())
        if soft:
            shares = torch.from_numpy(np.stack([mask == k for k in sorted(dataset.classes)])).float()
            labels.append(tv.resize(shares, square(prepare.size), antialias=True).clamp(0, 1))
        else:
            labels.append(prepare_mask(mask, prepare.size))
    return torch.stack(images), torch.stack(labels)


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1, float64."""
    if features.ndim != 2 or not len(features) or not torch.isfinite(features).all():
        raise BadCall(f"features are finite (N, D) with N at least 1, got {tuple(features.shape)}; look for NaN")
    return functional.normalize(features.double(), dim=1)


def _check(count: int, shots: int) -> None:
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise BadCall(f"a support set has 1 pair or more, got shots={shots!r}")
    if shots > count:
        raise BadCall(f"{shots} pairs asked for, there are {count} to choose from; ask for fewer")
