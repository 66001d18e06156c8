"""One readable program for each published method. The signature is the configuration."""

from . import avit, full_finetune, parameter_efficient  # noqa: F401  (they register themselves)
from .registry import RECIPES, Recipe, find_recipe, recipe
from .run import Run

__all__ = ["RECIPES", "Recipe", "Run", "find_recipe", "recipe"]
