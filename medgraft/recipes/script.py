"""What the pretraining programs share: their parameters as a command line, a checkpoint to resume from, the shipped file."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save
from torch import Tensor


def keep(state: Mapping[str, Any], checkpoint: Path) -> None:
    """Replace a checkpoint, whole or not at all."""
    torch.save(dict(state), checkpoint.with_suffix(".part"))
    os.replace(checkpoint.with_suffix(".part"), checkpoint)


def ship(tensors: Mapping[str, Tensor], out: Path, facts: Mapping[str, str]) -> None:
    """Write weights as fp16 safetensors, with `facts` as metadata, whole or not at all."""
    halves = {name: t.to(torch.float16).contiguous() for name, t in tensors.items()}
    out.with_suffix(".part").write_bytes(save(halves, metadata=dict(facts)))
    os.replace(out.with_suffix(".part"), out)


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
