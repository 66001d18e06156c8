"""Many low-rank adapters in one batch, one for each row of the batch.

    y_i = x_i W^T + b + s_k (x_i A_k^T) B_k^T      with k = ids[i], and no second term where ids[i] = -1

All factors are stacked: one product shrinks every row by every A, a mask keeps each row's own slot, one product expands.
Cost grows with the sum of ranks, not with the way in which the ids are spread over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadCall


def mixed_lora_linear(
    x: Tensor,
    base: Tensor,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    ids: Tensor,
) -> Tensor:
    """Add each row's low-rank term to `base`, the frozen layer's output.

    x       : (B', ..., K), where B' is a multiple of len(ids): an image's rows, such as its windows, are consecutive.
    base    : (B', ..., N).
    factors : one (A (R_k, K), B (N, R_k), s_k) a slot; ranks may differ.
    ids     : (B,) int64, the slot of each image, -1 for none.

    Raises BadCall for rows that cannot be shared out among the images.
    """
    if x.shape[0] % ids.shape[0]:
        raise BadCall(
            f"{x.shape[0]} rows at this layer are no multiple of the {ids.shape[0]} images; adapters cannot be told apart there"
        )
    dtype = base.dtype
    a = torch.cat([a for a, _, _ in factors]).to(dtype)
    b = torch.cat([b * scale for _, b, scale in factors], 1).to(dtype)
    owner = torch.cat([torch.full((f[0].shape[0],), k, device=ids.device) for k, f in enumerate(factors)])
    foreign = ids[:, None] != owner[None]  # (B, sum of ranks)
    u = functional.linear(x, a)
    foreign = foreign.repeat_interleave(u.shape[0] // ids.shape[0], 0)
    # Filled, not multiplied: another adapter's overflow times zero would be NaN.
    u = u.masked_fill(foreign.view(u.shape[0], *([1] * (u.ndim - 2)), -1), 0)
    return torch.addmm(base.flatten(0, -2), u.flatten(0, -2), b.t()).view(base.shape)
