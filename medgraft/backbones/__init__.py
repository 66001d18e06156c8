"""Frozen models: sites, stages, fingerprints, and the registry of ids."""

from . import meshnet, unet, unet3d, volume_source  # noqa: F401  (they register themselves)
from .base import Backbone, Spec
from .prompts import Prompts
from .registry import FAMILIES, load_backbone
from .sites import Site
from .state import Features, State

__all__ = ["FAMILIES", "Backbone", "Features", "Prompts", "Site", "Spec", "State", "load_backbone"]
