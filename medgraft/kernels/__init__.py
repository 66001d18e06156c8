"""Fused operations, one file each: the definition in plain torch comes first and settles value and dtype."""

from .bottleneck import bottleneck
from .dora_linear import dora_gain, dora_linear
from .lora_linear import lora_linear
from .mixed_lora import mixed_lora_linear

__all__ = ["bottleneck", "dora_gain", "dora_linear", "lora_linear", "mixed_lora_linear"]
