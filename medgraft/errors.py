"""One family of errors. Every message says what was asked, what was found, and a way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class MedgraftError(ValueError):
    """Something the caller can fix. The base of every error that medgraft raises on purpose."""


class UnknownName(MedgraftError):
    """A recipe, part, backbone, site or adapter that does not exist under the name asked for."""


class BadCall(MedgraftError):
    """An argument of the wrong shape, type or range."""


class BadData(MedgraftError):
    """An image, mask or data folder that cannot be used."""


class BadAdapter(MedgraftError):
    """An adapter file that is refused: damaged, foreign, of another version, or not understood."""


class WrongBackbone(BadAdapter):
    """An adapter made for a backbone other than the one at hand."""


class HubFailed(MedgraftError, OSError):
    """The Hub, or the way to it, refused: no such repository, no permission, no connection."""


class SaveFailed(MedgraftError, OSError):
    """The file system refused a write; whatever stood there before still stands."""


class Diverged(MedgraftError):
    """Training met a loss that is not finite and stopped at its last good state."""


class MissingExtra(MedgraftError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def nearest(asked: str, known: Iterable[str], *, n: int = 3) -> list[str]:
    """Up to `n` names of `known` that look like `asked`; an empty list when nothing does."""
    return get_close_matches(asked, list(known), n=n, cutoff=0.4)


def unknown(kind: str, asked: str, known: Iterable[str], *, hint: str = "") -> UnknownName:
    """The error for a name that does not exist, with near misses or else the whole list."""
    names = sorted(known)
    near = nearest(str(asked), names)
    if near:
        way_out = f"did you mean {' or '.join(repr(n) for n in near)}?"
    else:
        shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
        way_out = f"there are: {shown}" if names else "there is none"
    return UnknownName(f"no {kind} called {asked!r}; {way_out}" + (f" {hint}" if hint else ""))


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency where it is used; its absence (only its own) names the extra."""
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise
        raise MissingExtra(f"this needs {module!r}, which is not installed: pip install 'medgraft[{extra}]'") from None
