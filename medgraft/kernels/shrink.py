"""A layer's input beside its low-rank activations, so that one library product does the whole adapted layer.

    out = [x | s x A^T | 0]          one adapter
    out = [x | u | 0]                several: u_ij = (x A^T)_ij where column j belongs to the adapter of row i, else 0

The product of `out` with [W | B | 0]^T reads K + R columns and writes y once. `lora_linear` and `mixed_lora` call this behind their
doors. One read of x, one write of `out`; sums in float32 (float64 for float64), no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .door import architecture, jit, launch, tl, triton

SLOT = 16
"""The low-rank columns are filled up with zeros to a multiple of this: rows of half precision stay aligned to 32 bytes."""
LARGEST = 128
"""Low-rank columns that fit a program's registers."""
CONFIGS = {  # by architecture; chosen by compiling, not by measuring
    80: {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
    90: {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
}


@jit
def store_columns(u, ids_ptr, owner_ptr, out_ptr, scale, m, r, M, T, K, R, OUT_ROW, MIXED: tl.constexpr):
    """What stands right of column K in rows m: u (BM, BR) times the scale, or where it is the row's own, and zeros up to the end."""
    if MIXED:
        owner = tl.load(owner_ptr + r, mask=r < R, other=-2)
        image = tl.load(ids_ptr + m // T, mask=m < M, other=-1)
        u = tl.where(image[:, None] == owner[None], u, 0.0)
    else:
        u *= scale
    tl.store(out_ptr + m[:, None] * OUT_ROW + K + r[None], u, mask=(m[:, None] < M) & (K + r[None] < OUT_ROW))


@jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    ids_ptr,
    owner_ptr,
    out_ptr,
    scale,
    M,
    T,
    K,
    R,
    X_ROW,
    OUT_ROW,
    MIXED: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """BM rows of x (M, K): copied, and multiplied by A (R, K) on the way. T rows an image."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    u = tl.zeros((BM, BR), ACC)
    for start in range(0, K, BK):
        inside = (m[:, None] < M) & (start + k[None] < K)
        x = tl.load(x_ptr + m[:, None] * X_ROW + start + k[None], mask=inside, other=0.0)
        a = tl.load(a_ptr + r[None] * K + start + k[:, None], mask=(r[None] < R) & (start + k[:, None] < K), other=0.0)
        u = tl.dot(x, a, u, input_precision="ieee", out_dtype=ACC)
        tl.store(out_ptr + m[:, None] * OUT_ROW + start + k[None], x, mask=inside)
    store_columns(u, ids_ptr, owner_ptr, out_ptr, scale, m, r, M, T, K, R, OUT_ROW, MIXED)


def shrink(
    x: Tensor, a: Tensor, scale: float = 1.0, *, ids: Tensor | None = None, owner: Tensor | None = None
) -> Tensor:
    """x (M, K), a (R, K) -> (M, K + R rounded up to SLOT).

    With `owner` (R,) and `ids` (images,), both int64, column j of row i is kept where owner[j] == ids[image of i]; M is a multiple
    of the number of images.
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(m, k + slot(len(a)))
    if m == 0:
        return out
    config = CONFIGS[architecture(x)]
    launch(
        shrink_kernel,
        (triton.cdiv(m, config["BM"]),),
        x,
        a.contiguous(),
        x if ids is None else ids,
        x if owner is None else owner,
        out,
        scale,
        m,
        1 if ids is None else m // len(ids),
        k,
        len(a),
        x.stride(0),
        out.stride(0),
        MIXED=ids is not None,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BR=max(16, triton.next_power_of_2(len(a))),
        **config,
    )
    return out


def half_only(x: Tensor) -> str | None:
    """Why a kernel of matrix products declines x: on a GPU the tensor cores take half precision, and wider tiles spill."""
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(x.dtype).removeprefix('torch.')} is left to the library"
    return None


def beside(weight: Tensor, b: Tensor) -> Tensor:
    """[W | B | 0] for W (N, K) and B (N, R), as wide as what `shrink` writes."""
    return torch.cat([weight, functional.pad(b, (0, slot(b.shape[1]) - b.shape[1]))], 1)


def slot(rank: int) -> int:
    """Columns that `rank` low-rank ones take."""
    return -(-rank // SLOT) * SLOT
