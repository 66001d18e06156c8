"""One readable program for each published method. The signature is the configuration."""

from . import avit, full_finetune, gpt4mia, label_dropout, parameter_efficient, retina, universeg  # noqa: F401  (they register themselves)
from .registry import RECIPES, Recipe, find_recipe, recipe
from .run import Run

__all__ = ["RECIPES", "Recipe", "Run", "find_recipe", "recipe"]
