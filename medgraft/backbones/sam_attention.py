"""The attention of a block of SAM's encoder, over the tensors of transformers' own, whole or in windows, without cutting them out.

Windows reach beyond the image where they do not divide it. As in the published code the tokens out there are zero behind the norm, so
their k and v are what the projection makes of zero, with whatever acts at it; they are attended to, and ask nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels.door import Path
from ..kernels.relpos_attention import relpos_attention, relpos_path


class SamAttention(nn.Module):
    """transformers' `SamVisionAttention` with its `window` inside: tokens stay in their image's row throughout."""

    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def __init__(self, stock: Any, window: int) -> None:
        super().__init__()
        self.heads: int = stock.num_attention_heads
        self.window = (window, window) if window else None
        self.qkv, self.proj = stock.qkv, stock.proj
        for name in ("rel_pos_h", "rel_pos_w"):
            if stock.use_rel_pos:
                self.register_parameter(name, getattr(stock, name))
            else:
                width = stock.qkv.in_features // self.heads
                self.register_buffer(name, stock.qkv.weight.new_zeros(1, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        b, h, w, _ = x.shape
        outside = None
        if self.window and (h % self.window[0] or w % self.window[1]):
            outside = self._heads(self.qkv(x.new_zeros(b, 1, 1, x.shape[-1])))[:, :, 1:, 0]
        q, k, v = self._heads(self.qkv(x)).unbind(2)
        out = relpos_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, (h, w), self.window, outside)
        return self.proj(out.transpose(1, 2).reshape(b, h, w, -1))

    def _heads(self, qkv: Tensor) -> Tensor:
        """(B, h, w, 3 C) -> (B, heads, 3, h w, D)"""
        return qkv.flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(0, 3, 2, 1, 4)

    def path(self, x: Tensor) -> Path:
        """Whether the attention of tokens like `x` (B, h, w, C) is fused, and why."""
        b, h, w, c = x.shape
        return relpos_path(x.view(b, h * w, self.heads, c // self.heads).transpose(1, 2), (h, w), self.window)
