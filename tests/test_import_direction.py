"""Imports point one way: each layer may import itself and what stands to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import medgraft

ROOT = Path(medgraft.__file__).parent
ORDER = [
    "errors",
    "pixels",
    "images",
    "volumes",
    "voxels",
    "kernels",
    "backbones",
    "adapters",
    "training",
    "recipes",
    "cli",
]
FREE = {"__init__", "__main__"}  # the front door collects from everywhere

FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))


def layer(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imported(file: Path, source: str) -> set[str]:
    """The layers of medgraft that a file imports, at its top or inside a function. `file` is relative to the package."""
    package = ("medgraft", *file.parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            base = (*stem, *(node.module or "").split(".")) if node.module else stem
            names |= {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
    return {name[1] for name in names if name[0] == "medgraft" and len(name) > 1}


def uphill(file: Path, source: str) -> set[str]:
    """What a file imports from layers to its right."""
    return {name for name in imported(file, source) if name in ORDER and ORDER.index(name) > ORDER.index(layer(file))}


def test_every_layer_has_its_place() -> None:
    assert {layer(f) for f in FILES} - FREE <= set(ORDER), "give the new layer its place in ORDER"
    assert {layer(f) for f in FILES} >= {"errors", "kernels", "backbones", "adapters"}


@pytest.mark.parametrize("file", [f for f in FILES if layer(f) not in FREE], ids=str)
def test_imports_point_one_way(file: Path) -> None:
    assert not uphill(file, (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("adapters/x.py", "from ..backbones.base import Backbone", set()),
        ("backbones/x.py", "from ..adapters import LoRA", {"adapters"}),
        ("backbones/x.py", "from ..adapters.lora import LoRA", {"adapters"}),
        ("backbones/x.py", "from .. import adapters", {"adapters"}),
        ("backbones/x.py", "import medgraft.adapters.host", {"adapters"}),
        ("backbones/x.py", "from medgraft import adapters", {"adapters"}),
        ("backbones/x.py", "def f():\n    from medgraft.recipes import avit", {"recipes"}),
        ("adapters/deep/x.py", "from ...training import fit", {"training"}),
        ("errors.py", "from .kernels import lora_linear", {"kernels"}),
        ("adapters/x.py", "import torch\nfrom .host import Host\nfrom ..errors import BadCall", set()),
        ("recipes/x.py", "from ..training.fit import fit\nfrom ..adapters import Host", set()),
    ],
)
def test_the_test_sees_what_points_the_wrong_way(file: str, source: str, found: set[str]) -> None:
    assert uphill(Path(file), source) == found


def test_nothing_imports_a_peer_or_the_hub_at_the_top() -> None:
    """`import medgraft` stays light: peft, the hub and the plotting stack are imported where they are used."""
    heavy = {"peft", "matplotlib", "nibabel", "gradio", "pandas", "sklearn", "einops"}
    for file in FILES:
        top = [
            n
            for n in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        roots = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        roots |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and not n.level}
        assert not roots & heavy, file
