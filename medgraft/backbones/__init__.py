"""Frozen models: sites, stages, fingerprints, and the registry of ids."""

from . import unet  # noqa: F401  (it registers itself)
from .base import Backbone, Spec
from .registry import FAMILIES, load_backbone
from .sites import Site
from .state import Features, State

__all__ = ["FAMILIES", "Backbone", "Features", "Site", "Spec", "State", "load_backbone"]
