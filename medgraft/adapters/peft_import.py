"""Reading a peft LoRA adapter made for a timm or transformers network; the names and rules that both directions share.

    peft, module m                        ours
    m.lora_A, m.lora_B                    one LoRA part for each (rank, alpha), at the site whose path is m
    m.lora_magnitude_vector (out,)        magnitude / |W| row by row: ours is relative to the frozen weight
    modules_to_save: a norm or a layer    a Tuned part
    modules_to_save: a linear classifier  ClassifierHead; anything else there is left out, and the head is fresh

Paths are those of the authors' network, in any release of transformers, below any prefix (`vit.`). Only safetensors are read,
nothing of peft is imported, and whatever would not give the outputs that peft gives is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.hf_vit import LEAVES
from ..backbones.sites import Port, Site
from ..errors import BadAdapter, BadCall
from .adapter import Adapter
from .graft import Graft
from .heads import ClassifierHead, LinearHead
from .lora import LoRA
from .part import Part
from .schema import MAX_JSON_BYTES, parse_json
from .store import MAX_HEADER_BYTES, MAX_TENSOR_BYTES
from .task import Task, segment
from .tuned import Tuned

CONFIG_NAME, MODEL_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

Named = dict[str, dict[str, Tensor]]
"""Tensors by module path, then by their own name."""


# Shared with the export


def layer_of(backbone: Backbone, site: Site) -> Any:
    """The frozen module of a site, without its port."""
    found = backbone.network.get_submodule(site.path)
    return found.__dict__["base"] if isinstance(found, Port) else found


def probe_batch(backbone: Backbone) -> Tensor:
    """Two seeded images of the smallest legal size."""
    p = next(backbone.parameters())
    g = torch.Generator().manual_seed(0)
    side = backbone.probe_side
    return torch.randn(2, backbone.spec.channels, side, side, generator=g).to(p)


@torch.no_grad()
def pools_alike(backbone: Backbone) -> bool:
    """True where the vector that the authors' network classifies by is the one that our readout pools."""
    network: Any = backbone.network
    if backbone.family == "hf_vit":
        return bool(network.config.model_type == "vit")  # the cls token; DINOv2's head sees the patches' mean too
    if backbone.family not in ("vit", "swin"):
        return False
    x = probe_batch(backbone)
    ours, theirs = backbone(x).pooled, network(x)
    return bool(theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-4, rtol=1e-3))


# The configuration

_READ = {
    "peft_type", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_dropout", "modules_to_save", "init_lora_weights", "base_model_name_or_path", "bias", "fan_in_fan_out",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "exclude_modules", "layers_pattern",
    "layers_to_transform", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
"""Entries that choose layers, or speak of training alone: the tensors in the file say what was adapted."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the frozen weights too, from which peft starts again on loading."""


@dataclass(frozen=True)
class LoraConfig:
    """The entries of an adapter_config.json that decide what peft computes, checked."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    targets: str | list[str] | None
    saved: list[str]
    base: str | None

    @staticmethod
    def of(found: Any) -> LoraConfig:
        """Raises BadAdapter, naming the entry, for whatever is not understood or would change the outputs."""
        if not isinstance(found, dict):
            raise BadAdapter(f"{CONFIG_NAME} is not a JSON object")
        config = {key: value for key, value in found.items() if value is not None}
        kind = config.get("peft_type")
        if kind != "LORA":
            raise BadAdapter(f"peft type {str(kind)[:40]!r} is not imported; LORA is, also with use_rslora or use_dora")
        for key, value in sorted(config.items()):
            if key not in _READ | _WITHOUT_EFFECT and value not in (False, {}, []):
                raise BadAdapter(f"{CONFIG_NAME} sets {key[:60]!r} to {str(value)[:60]!r}, which is not imported")
        if config.get("bias", "none") != "none":
            raise BadAdapter(f"{CONFIG_NAME} sets bias to {str(config['bias'])[:20]!r}; only 'none' is imported")
        if config.get("fan_in_fan_out"):
            raise BadAdapter(f"{CONFIG_NAME} sets fan_in_fan_out: transposed weights are not imported")
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_CHANGES_BASE):
            raise BadAdapter(
                f"init_lora_weights={init[:30]!r} changes the frozen weights as well; convert it in peft with "
                "path_initial_model_for_weight_conversion"
            )
        base = config.get("base_model_name_or_path")
        saved = _names(config, "modules_to_save") or []
        return LoraConfig(
            rank=_number("r", config.get("r", 8), whole=True),
            alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
            ranks={k: _number("rank_pattern", v, whole=True) for k, v in _table(config, "rank_pattern").items()},
            alphas={k: _number("alpha_pattern", v) for k, v in _table(config, "alpha_pattern").items()},
            rslora=_flag(config, "use_rslora"),
            dora=_flag(config, "use_dora"),
            dropout=_number("lora_dropout", config.get("lora_dropout", 0.0), below=1.0),
            targets=_names(config, "target_modules"),
            saved=[saved] if isinstance(saved, str) else saved,
            base=base if isinstance(base, str) and re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", base) else None,
        )

    def rank_of(self, path: str) -> int:
        """The rank at a module."""
        return _by_pattern(self.ranks, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha at a module."""
        return _by_pattern(self.alphas, path, self.alpha)

    def targets_module(self, path: str) -> bool:
        """peft's rule: a string matches as a whole, entries of a list match the ends of paths."""
        if self.targets is None or self.targets == "all-linear":
            return True
        if isinstance(self.targets, str):
            return bool(_compiled(self.targets).fullmatch(path))
        return any(path == t or path.endswith(f".{t}") for t in self.targets)

    def saves(self, path: str) -> bool:
        """peft's rule for modules_to_save: the module or one around it ends so."""
        steps = path.split(".")
        around = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
        return any(module.endswith(name) for module in around for name in self.saved)


def _number(name: str, value: Any, *, whole: bool = False, below: float = math.inf) -> Any:
    good = isinstance(value, int) if whole else isinstance(value, int | float)
    if not good or isinstance(value, bool) or not abs(value) < 1e9 or not value < below or (whole and value < 1):
        raise BadAdapter(f"{CONFIG_NAME}: {name} holds {str(value)[:40]!r}, which is no usable number")
    return value


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise BadAdapter(f"{CONFIG_NAME}: {name} must be true or false, it is {str(value)[:40]!r}")
    return value


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name, {})
    if not isinstance(value, dict) or len(value) > 2000:
        raise BadAdapter(f"{CONFIG_NAME}: {name} must map at most 2,000 module names to numbers")
    return value


def _names(config: Mapping[str, Any], name: str) -> str | list[str] | None:
    value = config.get(name)
    fits = (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )
    if not fits:
        raise BadAdapter(f"{CONFIG_NAME}: {name} must be a name or a list of names")
    return value


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """peft's rule for rank_pattern and alpha_pattern: the first pattern that the end of the path matches."""
    return next((v for p, v in patterns.items() if _compiled(rf"(.*\.)?({p})$").match(path)), default)


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A stranger's regular expression, unless matching it could take forever."""
    bare = re.sub(r"\\.", "x", pattern)
    if len(pattern) > 1 << 18 or len(re.findall(r"[*+]|\{\d*,\}", bare)) > 3 or re.search(r"\)\s*[*+{]", bare):
        raise BadAdapter(
            f"the pattern {pattern[:60]!r} in {CONFIG_NAME} is too complex to match safely; name the modules"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as broken:
        raise BadAdapter(f"the pattern {pattern[:60]!r} in {CONFIG_NAME} is no regular expression ({broken})") from None


# The tensors

_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


def _bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as refused:
        raise BadAdapter(f"{path.name} cannot be read: {refused.strerror}; give a directory that peft wrote") from None
    if len(content) > limit:
        raise BadAdapter(f"{path.name} is larger than {limit:,} bytes and is not read")
    return content


def _tensors(directory: Path) -> dict[str, Tensor]:
    file = directory / MODEL_NAME
    pickled = next(
        (p.name for p in sorted(directory.glob("adapter_model.*")) if p.suffix in (".bin", ".pt", ".pth")), None
    )
    if not file.is_file() and pickled:
        raise BadAdapter(f"{pickled} is a pickle, which can run code, and is not opened; save it again as safetensors")
    blob = _bytes(file, MAX_TENSOR_BYTES)
    if len(blob) < 8 or int.from_bytes(blob[:8], "little") > min(MAX_HEADER_BYTES, len(blob)):
        raise BadAdapter(f"{MODEL_NAME} is cut short or has a header of impossible length; fetch it again")
    try:
        tensors = load_safetensors(blob)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as broken:
        raise BadAdapter(f"{MODEL_NAME} is not a valid safetensors file ({broken}); fetch it again") from None
    for name, t in tensors.items():
        if not name.startswith(PREFIX) or len(name) > 300:
            raise BadAdapter(f"{MODEL_NAME} holds {name[:80]!r}; peft's names begin with {PREFIX!r}")
        if not t.is_floating_point() or not torch.isfinite(t).all():
            raise BadAdapter(f"tensor {name[:80]} is not finite floating point; the adapter is refused")
    return {name.removeprefix(PREFIX): t.float() for name, t in tensors.items()}


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[Named, Named]:
    """The low-rank factors, and the tensors of saved modules."""
    factors: Named = {}
    saved: Named = {}
    for name, t in tensors.items():
        suffix = next((s for s in _FACTORS if name.endswith(s)), None)
        if suffix is not None:
            factors.setdefault(name.removesuffix(suffix), {})[_FACTORS[suffix]] = t
        elif ".lora_" in name:
            raise BadAdapter(f"tensor {name[:100]} is not understood; LoRA on linear layers is imported")
        else:
            path, _, leaf = name.rpartition(".")
            saved.setdefault(path, {})[leaf] = t
    if not factors:
        raise BadAdapter(f"{MODEL_NAME} holds no LoRA factors; is it the adapter that {CONFIG_NAME} describes?")
    return factors, saved


# The network


def _known(backbone: Backbone) -> dict[str, Site]:
    """Sites by every path under which releases of timm and transformers keep them."""
    able = [s for s in backbone.sites.values() if s.span is None and s.kind in ("linear", "norm", "conv") and s.path]
    known = {site.path: site for site in able}
    if backbone.family == "hf_vit":
        for site in able:
            block, _, leaf = site.name.removeprefix("blocks.").partition(".")
            for path in LEAVES.get(leaf, ()):
                known |= {f"{layers}.{block}.{path}": site for layers in ("layers", "encoder.layer")}
    return known


def _prefix(factors: Named, known: Mapping[str, Site], backbone: Backbone) -> str:
    """What stands before the network's own paths, the same for all of them: `vit.` in ViTForImageClassification."""
    prefixes = set()
    for path in factors:
        starts = [0, *(m.end() for m in re.finditer(r"\.", path))]
        start = next((i for i in starts if path[i:] in known), None)
        if start is None:
            raise BadAdapter(
                f"the adapter changes {path[:100]}, where {backbone.spec.id} has no site; is it another network?"
            )
        prefixes.add(path[:start])
    if len(prefixes) > 1:
        raise BadAdapter(
            f"the adapter spans several networks ({', '.join(sorted(prefixes))[:100]}), not {backbone.spec.id} alone"
        )
    return prefixes.pop()


def _has_parameters(network: nn.Module, path: str) -> bool:
    try:
        return next(network.get_submodule(path).parameters(), None) is not None
    except AttributeError:
        return False


def import_peft(
    source: str | Path, backbone: Backbone, task: Task | None = None, *, revision: str | None = None
) -> Adapter:
    """A peft LoRA, rsLoRA or DoRA adapter, made for the network of `backbone`, as an adapter with the same features.

    `source` is a directory, or a hub id, of which `revision` (default: the main branch) is resolved to a commit once.

    A linear classifier in `modules_to_save` becomes the head; otherwise the head is fresh and `provenance["head"]` says
    so: one for `task`, or, without a task, a linear head for a class called "foreground". Tuned norms in
    `modules_to_save` come along. Only safetensors are read. Raises BadAdapter, by name, for whatever would not give the
    same outputs; BadCall for a task that does not fit the classifier in the file.
    """
    from .hub import fetch_peft, is_hub_id

    if isinstance(source, str) and not Path(source).exists() and is_hub_id(source):
        got = fetch_peft(source, revision=revision)
        with TemporaryDirectory() as folder:
            for name, content in got.files.items():
                (Path(folder) / name).write_bytes(content)
            adapter = import_peft(Path(folder), backbone, task)
        adapter.source = got.source
        return adapter
    directory = Path(source)
    config = LoraConfig.of(parse_json(_bytes(directory / CONFIG_NAME, MAX_JSON_BYTES), CONFIG_NAME))
    factors, saved = _sorted(_tensors(directory))
    known = _known(backbone)
    prefix = _prefix(factors, known, backbone)
    inside: dict[Site, dict[str, Tensor]] = {}
    outside: Named = {}
    for path, tensors in saved.items():
        own = path.removeprefix(prefix)
        if not config.saves(path):
            raise BadAdapter(f"{MODEL_NAME} holds {path[:100]}, which modules_to_save does not name: peft ignores it")
        if own in known:
            inside[known[own]] = tensors
        elif _has_parameters(backbone.network, own):
            raise BadAdapter(
                f"the adapter replaces {path[:100]}, where {backbone.spec.id} has no site; it is not imported"
            )
        else:
            outside[own] = tensors
    parts: dict[str, Part] = {"tuned": _tuned(inside, backbone)} if inside else {}
    parts |= _lora(factors, {path: known[path.removeprefix(prefix)] for path in factors}, config, backbone)
    head = _head(outside, backbone, task)
    task = task or (segment(["foreground"]) if head is None else Task("classify", _class_names(head)))
    provenance: dict[str, Any] = {"source": "peft LORA", "head": "fresh, untrained" if head is None else "imported"}
    if config.base:
        provenance["base_model"] = config.base
    if head is None and outside:
        provenance["left_out"] = sorted(outside)
    fresh: type[Part] = ClassifierHead if task.kind == "classify" else LinearHead
    parts["head"] = fresh.on(backbone, task) if head is None else head
    adapter = Adapter.of(backbone, task, parts, provenance=provenance)
    Graft.of(backbone, adapter)
    return adapter


def _lora(factors: Named, sites: Mapping[str, Site], config: LoraConfig, backbone: Backbone) -> dict[str, Part]:
    """One LoRA part for each rank and alpha."""
    groups: dict[tuple[int, float], dict[Site, dict[str, Tensor]]] = {}
    wanted = ["A", "B", "magnitude"] if config.dora else ["A", "B"]
    for path, cell in factors.items():
        site, rank, shown = sites[path], config.rank_of(path), path[:100]
        shapes = {"A": (rank, site.fan_in), "B": (site.fan_out, rank), "magnitude": (site.fan_out,)}
        if sorted(cell) != wanted:
            raise BadAdapter(f"{shown} holds {', '.join(sorted(cell))}; {CONFIG_NAME} describes {', '.join(wanted)}")
        for name, t in cell.items():
            if tuple(t.shape) != shapes[name]:
                raise BadAdapter(
                    f"{name} of {shown} is {tuple(t.shape)}; with rank {rank} here it must be {shapes[name]}"
                )
        if not isinstance(layer_of(backbone, site), nn.Linear):
            raise BadAdapter(
                f"{shown} is a {type(layer_of(backbone, site)).__name__}; LoRA on linear layers is imported"
            )
        if not config.targets_module(path):
            raise BadAdapter(
                f"{MODEL_NAME} holds factors for {shown}, which target_modules does not name: peft ignores them"
            )
        groups.setdefault((rank, float(config.alpha_of(path))), {})[site] = cell
    parts: dict[str, Part] = {}
    order = {name: i for i, name in enumerate(backbone.sites)}
    for (rank, alpha), cells in groups.items():
        shapes_of = {s.name: (s.fan_in, s.fan_out) for s in sorted(cells, key=lambda s: order[s.name])}
        part = LoRA(shapes_of, rank=rank, alpha=alpha, rslora=config.rslora, dora=config.dora, dropout=config.dropout)
        for site, cell in cells.items():
            if config.dora:
                norms = torch.linalg.norm(layer_of(backbone, site).weight.detach().double().cpu(), dim=1)
                if not (norms > 0).all():
                    raise BadAdapter(f"{site.path} has rows of zeros: DoRA's magnitude relative to them has no meaning")
                cell = {**cell, "magnitude": cell["magnitude"].double() / norms}
            with torch.no_grad():
                for name, t in cell.items():
                    getattr(part.cell(site), name).copy_(t)
        parts[f"lora_{len(parts) + 1}" if parts else "lora"] = part
    return parts


def _tuned(copies: Mapping[Site, Mapping[str, Tensor]], backbone: Backbone) -> Tuned:
    for site, own in copies.items():
        wanted = {name: t.shape for name, t in layer_of(backbone, site).state_dict().items()}
        if {name: t.shape for name, t in own.items()} != wanted:
            raise BadAdapter(f"the saved copy of {site.path} does not have the tensors of that layer")
    shapes = {site.name: {name: list(t.shape) for name, t in own.items()} for site, own in copies.items()}
    part = Tuned({s.name: (s.fan_in, s.fan_out) for s in copies}, shapes)
    part.load_tensors({f"{site.name}.{name}": t for site, own in copies.items() for name, t in own.items()})
    return part


def _head(outside: Named, backbone: Backbone, task: Task | None) -> ClassifierHead | None:
    """The one linear classifier on the pooled features among the saved modules, unless the task is another."""
    if len(outside) != 1 or not outside.keys() & {"head", "head.fc", "classifier", "fc"}:
        return None
    (own,) = outside.values()
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.ndim != 2:
        return None
    outputs, width = weight.shape
    fits = (
        set(own) <= {"weight", "bias"} and width == backbone.spec.width and (bias is None or bias.shape == (outputs,))
    )
    if not fits or (task is not None and task.kind != "classify") or not pools_alike(backbone):
        return None
    if task is not None and task.outputs != outputs:
        raise BadCall(f"the classifier in the file has {outputs} outputs, the task {task.outputs} classes")
    head = ClassifierHead({}, width=width, outputs=outputs)
    head.load_tensors({"weight": weight, "bias": torch.zeros(outputs) if bias is None else bias})
    return head


def _class_names(head: ClassifierHead) -> tuple[str, ...]:
    return tuple(f"class_{i}" for i in range(head.weight.shape[0]))
