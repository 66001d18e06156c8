"""Fused operations, one file each: the definition in plain torch comes first and settles value and dtype."""

from .bottleneck import bottleneck
from .dora_linear import dora_gain, dora_linear
from .lora_linear import lora_linear
from .mixed_lora import mixed_lora_linear
from .norm_shrink import joined_linear, norm_shrink

__all__ = [
    "bottleneck",
    "dora_gain",
    "dora_linear",
    "joined_linear",
    "lora_linear",
    "mixed_lora_linear",
    "norm_shrink",
]
