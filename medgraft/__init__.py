"""medgraft: small trained parts grafted onto large frozen vision models.

    backbone = medgraft.load_backbone("medgraft:starter-vit")
    host = medgraft.Host(backbone)
    host.add(medgraft.load_adapter("runs/polyp"), "polyp")
    mask = host.predict("image.png", "polyp")

Names are imported when they are first used, so that `import medgraft` costs little more than `import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "Backbone": "backbones",
    "Ensemble": "adapters",
    "Features": "backbones",
    "Host": "adapters",
    "MedgraftError": "errors",
    "Preprocessing": "adapters",
    "Prompts": "backbones",
    "Task": "adapters",
    "evaluate": "training.evaluate",
    "export_peft": "adapters.peft",
    "fit": "training.fit",
    "import_peft": "adapters.peft",
    "load_adapter": "adapters.hub",
    "load_backbone": "backbones",
    "load_dataset": "training.data",
    "publish": "adapters.hub",
    "save_adapter": "adapters.store",
    "soup": "adapters.soup",
    "transduce": "training.transduce",
}

__all__ = [
    "Adapter",
    "Backbone",
    "Ensemble",
    "Features",
    "Host",
    "MedgraftError",
    "Preprocessing",
    "Prompts",
    "Task",
    "evaluate",
    "export_peft",
    "fit",
    "import_peft",
    "load_adapter",
    "load_backbone",
    "load_dataset",
    "publish",
    "save_adapter",
    "soup",
    "transduce",
]

if TYPE_CHECKING:
    from .adapters import Adapter, Ensemble, Host, Preprocessing, Task
    from .adapters.hub import load_adapter, publish
    from .adapters.peft import export_peft, import_peft
    from .adapters.soup import soup
    from .adapters.store import save_adapter
    from .backbones import Backbone, Features, Prompts, load_backbone
    from .errors import MedgraftError
    from .training.data import load_dataset
    from .training.evaluate import evaluate
    from .training.fit import fit
    from .training.transduce import transduce


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medgraft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
