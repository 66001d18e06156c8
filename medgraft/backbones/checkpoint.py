"""Checkpoints: tensors read from a file without executing anything in it, and loaded completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import BadData


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, or of a `.pth` file read without executing anything in it."""
    if not path.is_file():
        raise BadData(
            f"asked for weights at {path.name!r}: there is no such file; give the path of a .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as broken:
        raise BadData(f"{path.name} cannot be read as weights ({broken}); is the download complete?") from None
    except Exception as unsafe:  # torch raises pickle.UnpicklingError, and more, for code inside
        raise BadData(
            f"{path.name} holds more than tensors and is refused ({type(unsafe).__name__}); convert it to .safetensors"
        ) from None
    found = found.get("model", found.get("state_dict", found)) if isinstance(found, dict) else {}
    tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    if not tensors:
        raise BadData(f"{path.name} holds no named tensors; a state dict is wanted")
    return tensors


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    hint: str = "is it a checkpoint of another network?",
    optional: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load `tensors` into `network`: every tensor must have its place, and every place, but the `optional` ones, its tensor.

    Raises BadData, naming `what`, for tensors that are missing, not understood or of another shape. `hint` is the way out.
    """
    own = network.state_dict()
    refuse(
        what,
        [name for name in own.keys() - tensors.keys() if not optional(name)],
        tensors.keys() - own.keys(),
        {n: (tensors[n].shape, own[n].shape) for n in own.keys() & tensors.keys() if tensors[n].shape != own[n].shape},
        hint=hint,
    )
    network.load_state_dict(tensors, strict=False)


def refuse(
    what: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misfits: Mapping[str, tuple[torch.Size, torch.Size]] | None = None,
    *,
    hint: str,
) -> None:
    """Raise BadData where there are names of any kind; `misfits` are the shapes found and wanted."""
    missing, unexpected, misfits = sorted(missing), sorted(unexpected), misfits or {}
    if not missing and not unexpected and not misfits:
        return
    said = [
        f"{len(names)} {which} ({', '.join(names[:3])})"
        for which, names in (("tensors missing", missing), ("not understood", unexpected))
        if names
    ]
    if misfits:
        shown = [f"{n} is {tuple(misfits[n][0])}, {tuple(misfits[n][1])} is wanted" for n in sorted(misfits)[:2]]
        said.append(f"{len(misfits)} of another shape ({'; '.join(shown)})")
    raise BadData(f"these weights do not fit {what}: {', '.join(said)}; {hint}")
