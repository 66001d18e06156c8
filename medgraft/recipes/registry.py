"""Recipes by name. A recipe is a function `(run: Run, *, options...)`; its signature is its configuration and its command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadCall, unknown

Program = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """A named program with its own defaults for what all runs share."""

    name: str
    program: Program
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.program.__doc__ or "").strip().splitlines()[0]


RECIPES: dict[str, Recipe] = {}


def recipe(name: str, **defaults: Any) -> Callable[[Program], Program]:
    """Register a program under `name`; `defaults` replace those of `Run`."""

    def keep(program: Program) -> Program:
        if name in RECIPES:
            raise BadCall(f"recipe {name!r} is already registered")
        RECIPES[name] = Recipe(name, program, defaults)
        return program

    return keep


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises UnknownName with near misses."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
