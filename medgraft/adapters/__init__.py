"""Parts, the adapter that bundles them, the host that runs it, the file that holds it."""

from . import (  # noqa: F401  (they register themselves)
    aspp_head,
    bottleneck,
    conv_lora,
    heads,
    lora,
    mask_head,
    prompt_tokens,
    scale_shift,
    size_prior,
    spatial,
    tuned,
)
from .adapter import Adapter, BackboneRef
from .aspp_head import ASPPHead, PromptGenerator
from .bottleneck import Bottleneck
from .class_prompts import ClassPrompts
from .condition_embedding import ConditionEmbedding
from .conv_lora import ConvLoRA
from .ensemble import Ensemble
from .evolved_prompt import EvolvedPrompt
from .fusion import Fusion
from .heads import ClassifierHead, LinearHead
from .host import Host
from .lora import LoRA
from .mask_head import MaskHead
from .neighbours import Neighbours
from .part import PARTS, Part, Readout, find_part
from .prompt_tokens import PromptTokens
from .refine_decoder import RefineDecoder
from .samaug import SamAug
from .scale_shift import ScaleShift
from .spatial import SpatialAdapter
from .support import ContextHead, Support
from .task import Preprocessing, Task
from .tuned import Tuned

__all__ = [
    "PARTS",
    "ASPPHead",
    "Adapter",
    "BackboneRef",
    "Bottleneck",
    "ClassPrompts",
    "ClassifierHead",
    "ConditionEmbedding",
    "ContextHead",
    "ConvLoRA",
    "Ensemble",
    "EvolvedPrompt",
    "Fusion",
    "Host",
    "LinearHead",
    "LoRA",
    "MaskHead",
    "Neighbours",
    "Part",
    "Preprocessing",
    "PromptGenerator",
    "PromptTokens",
    "Readout",
    "RefineDecoder",
    "SamAug",
    "ScaleShift",
    "SpatialAdapter",
    "Support",
    "Task",
    "Tuned",
    "find_part",
]
