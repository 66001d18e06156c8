"""A program's own parameters as its command line, for recipes that are run as modules."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints


def main(program: Callable[..., Path], argv: list[str] | None = None) -> None:
    """Run `program` with its parameters read from the command line, and print the path that it returns."""
    summary = (inspect.getdoc(program) or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types = get_type_hints(program)
    for name, parameter in inspect.signature(program).parameters.items():
        flag = f"--{name.replace('_', '-')}"
        if parameter.default is parameter.empty:
            parser.add_argument(name, type=types[name])
        elif types[name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=parameter.default)
        else:
            parser.add_argument(flag, type=types[name], default=parameter.default, help=" ")
    print(program(**vars(parser.parse_args(argv))))
