"""One readable program for each published method. The signature is the configuration."""

from . import (  # noqa: F401  (they register themselves)
    avit,
    cemb_sam,
    foundation3d,
    fseft,
    full_finetune,
    gpt4mia,
    label_dropout,
    parameter_efficient,
    retina,
    sam_decoder,
    sam_interactive,
    sam_path,
    samaug,
    sampot,
    sparse_transfer,
    surgical_sam,
    universeg,
    volume_lora,
)
from .registry import RECIPES, Recipe, find_recipe, recipe
from .run import Run

__all__ = ["RECIPES", "Recipe", "Run", "find_recipe", "recipe"]
