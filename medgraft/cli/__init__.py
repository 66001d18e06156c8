"""The command line. Each command is a few lines over a function that can be called without it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from ..errors import MedgraftError
from . import adapting, scoring, sharing, telling, using  # noqa: F401  (they register their commands)
from .adapting import register_recipes
from .shared import app


def main() -> None:
    """Run the command line; an error that a person can mend is printed as one, not as a traceback."""
    register_recipes()
    try:
        app()
    except MedgraftError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)
