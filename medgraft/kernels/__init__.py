"""Fused operations, one file each: the definition in plain torch comes first and settles value and dtype."""

from .lora_linear import dora_gain, lora_linear
from .mixed_lora import mixed_lora_linear

__all__ = ["dora_gain", "lora_linear", "mixed_lora_linear"]
