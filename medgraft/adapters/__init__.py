"""Parts, the adapter that bundles them, the host that runs it, the file that holds it."""

from . import aspp_head, bottleneck, heads, lora, prompt_tokens, scale_shift, tuned  # noqa: F401  (they register themselves)
from .adapter import Adapter, BackboneRef
from .aspp_head import ASPPHead, PromptGenerator
from .bottleneck import Bottleneck
from .ensemble import Ensemble
from .heads import ClassifierHead, LinearHead
from .host import Host
from .lora import LoRA
from .neighbours import Neighbours
from .part import PARTS, Part, Readout, find_part
from .prompt_tokens import PromptTokens
from .scale_shift import ScaleShift
from .support import ContextHead, Support
from .task import Preprocessing, Task
from .tuned import Tuned

__all__ = [
    "PARTS",
    "ASPPHead",
    "Adapter",
    "BackboneRef",
    "Bottleneck",
    "ClassifierHead",
    "ContextHead",
    "Ensemble",
    "Host",
    "LinearHead",
    "LoRA",
    "Neighbours",
    "Part",
    "Preprocessing",
    "PromptGenerator",
    "PromptTokens",
    "Readout",
    "ScaleShift",
    "Support",
    "Task",
    "Tuned",
    "find_part",
]
