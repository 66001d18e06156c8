"""What the commands share: the program, its console, arguments that several take, tables of facts."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Small trained parts grafted onto large frozen vision models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

console = Console()

Directory = Annotated[str, typer.Argument(help="an adapter: a directory, file:DIR/OWNER/NAME or a hub id")]

Adapters = Annotated[list[str], typer.Argument(help="adapters: directories, file:DIR/OWNER/NAME or hub ids")]

BackboneOption = Annotated[
    str | None, typer.Option(help="a backbone id, where the adapter's own cannot be found under its name")
]

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


def show_facts(title: str, rows: dict[str, Any]) -> None:
    """Print rows of names and values under a title."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(escape(key), escape(shown))
    console.print(table)


def rounded(value: Any) -> Any:
    """Numbers with three decimals, lists of them in brackets; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "[" + ", ".join(str(rounded(v)) for v in value) + "]" if isinstance(value, list) else value


def names_in(text: str | None) -> tuple[str, ...] | None:
    """Names of a comma-separated list; None for none."""
    return tuple(name.strip() for name in text.split(",")) if text else None
