"""peft, both ways: an adapter of ours as plain peft files, and a peft LoRA adapter as one of ours.

    ours                                           peft type   tensors of module m
    LoRA, rsLoRA, DoRA on linear layers            LORA        m.lora_A (r, in), .lora_B (out, r), .lora_magnitude_...
    LoRA on q, k, v of a fused projection          LORA        n sites of rank r are one of n r: A stacked, B in blocks
    Tuned, biases of linear layers only            BEFT        m.beft_bias (1, out), what is added to the frozen bias
    ScaleShift on linear layers, all shifts zero   IA3         m.ia3_l (out, 1)
    Tuned, norms or whole leaf layers              LN_TUNING   m.ln_tuning_layers.<tensor>
    LoRA + Tuned; any of these + a linear classifier           modules_to_save

Whatever else has no exact peft form and is not written. Every export is loaded back by plain peft onto a fresh copy of
the network and compared before a file stands. peft is imported inside functions only, the core works without it; the other
direction, `import_peft`, never needs it.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.registry import STARTER_VIT
from ..backbones.sites import Site, following
from ..backbones.state import Features
from ..errors import BadAdapter, BadCall, SaveFailed
from .adapter import Adapter
from .files import replacing
from .graft import Graft
from .heads import ClassifierHead
from .lora import LoRA
from .part import Part, Readout
from .peft_import import CONFIG_NAME, MODEL_NAME, PREFIX, import_peft, layer_of, pools_alike, probe_batch
from .scale_shift import ScaleShift
from .store import JSON_NAME, rounded
from .tuned import Tuned

__all__ = [
    "PeftForm",
    "export_peft",
    "features_of",
    "import_peft",
    "peft_files",
    "quiet",
    "statement",
    "why_not_exportable",
]

TOLERANCE = 1e-4
"""Allowed difference to plain peft, relative to the largest feature: sums in another order, through a whole network."""
OF_EFFECT = 0.02
"""Allowed difference relative to what the adapter changes: a small adapter is compared as strictly as a large one."""
ROUNDING = 2e-6
"""Differences below this, relative to the largest feature, are float32 rounding whatever the adapter changes."""


ONE_TYPE = "and an adapter_config.json holds one"


class _NotPlain(Exception):
    """The reason why an adapter has no exact peft form."""


@dataclass(frozen=True)
class PeftForm:
    """An adapter as plain peft holds it.

    config  : adapter_config.json, without anything that peft does not know.
    tensors : by module path and suffix, as in the file but without `base_model.model.`.
    head    : where a linear classifier goes along, its path in the network; else None.
    without : what is left out, as sentences.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: str | None = None
    without: list[str] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """The two files. Each tensor takes half precision where that loses nothing."""
        tensors = {PREFIX + name: _narrow(t) for name, t in self.tensors.items()}
        return {
            CONFIG_NAME: (json.dumps(self.config, indent=2, sort_keys=True) + "\n").encode(),
            MODEL_NAME: save_safetensors(tensors, metadata={"format": "pt"}),
        }


def _narrow(t: Tensor) -> Tensor:
    t = t.detach().float().cpu().contiguous().clone()
    half = t.half()
    return half if torch.equal(half.float(), t) else t


# Export


def why_not_exportable(adapter: Adapter, backbone: Backbone | None = None) -> str | None:
    """The reason why `adapter` has no exact plain-peft form, or None where it has one.

    Without the `backbone` it is judged by its parts alone; with it, also by the layers at which they act.
    """
    try:
        if backbone is None:
            _method(adapter)
        else:
            _form(adapter, backbone)
    except _NotPlain as reason:
        return str(reason)
    return None


def _method(adapter: Adapter, backbone: Backbone | None = None) -> str:
    """The peft type that holds the site parts of `adapter`. Raises _NotPlain."""
    parts = adapter.site_parts
    if not parts:
        raise _NotPlain("it acts at no site of the backbone; plain peft cannot hold a head alone")
    for name, part in parts.items():
        if type(part) not in (LoRA, Tuned, ScaleShift):
            raise _NotPlain(f"part {name!r} ({part.kind}) has no peft type that computes the same")
    kinds = {type(part) for part in parts.values()}
    if ScaleShift in kinds:
        if len(kinds) > 1:
            raise _NotPlain(f"scale_shift beside other parts would need two peft types, {ONE_TYPE}")
        shifted = [
            f"{name}.{site}" for name, part in parts.items() for site in part.sites if bool(part.cell(site).shift.any())
        ]
        if shifted:
            raise _NotPlain(f"peft's IA3 scales and does not shift; the shift of {shifted[0]} is not zero")
        return "IA3"
    if LoRA in kinds:
        if len({part.dora for part in parts.values() if isinstance(part, LoRA)}) > 1:
            raise _NotPlain("DoRA and LoRA parts together: peft's use_dora holds for all layers or for none")
        return "LORA"
    on_linear = {site: _bias_of_linear(part, site, backbone) for part in parts.values() for site in part.sites}
    if all(on_linear.values()):
        return "BEFT"
    if any(on_linear.values()):
        site = next(site for site, yes in on_linear.items() if yes)
        raise _NotPlain(f"biases of linear layers ({site}) beside other copies would need two peft types, {ONE_TYPE}")
    return "LN_TUNING"


def _bias_of_linear(part: Part, site: str, backbone: Backbone | None) -> bool:
    """True for a tuned bias alone, of a linear layer; without the backbone, of a site that is not called a norm."""
    if set(part.cell(site).state_dict()) != {"bias"}:
        return False
    known = None if backbone is None else backbone.sites.get(site)
    return "norm" not in site.rpartition(".")[2] if known is None else known.kind == "linear"


def _form(adapter: Adapter, backbone: Backbone) -> PeftForm:
    """The plain form. Raises _NotPlain with the reason where there is none."""
    method = _method(adapter, backbone)
    for name, part in adapter.site_parts.items():
        for site in part.sites:
            if site not in backbone.sites or not backbone.sites[site].path:
                raise _NotPlain(f"part {name!r} acts at {site}, which is no module of the network")
    make = {"LORA": _lora_form, "BEFT": _beft_form, "IA3": _ia3_form, "LN_TUNING": _tuned_form}[method]
    with torch.no_grad():
        options, tensors, saved = make(adapter, backbone)
        head = _head_path(adapter, backbone)
    if head is not None:
        last = adapter.readouts[-1]
        assert isinstance(last, ClassifierHead)
        below = _below(backbone)
        tensors = {below + name: t for name, t in tensors.items()}
        options = {
            key: _lowered(value, below) if key in ("target_modules", "rank_pattern", "alpha_pattern") else value
            for key, value in options.items()
        }
        saved = [*(below + name for name in saved), head]
        tensors |= {f"{head}.weight": last.weight, f"{head}.bias": last.bias}
    config = {
        "peft_type": method,
        **_base_model(adapter, backbone, head),
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": saved or None,
        **options,
    }
    if saved:
        _check_saved(config, backbone, head)
    return PeftForm(config, {name: t.detach() for name, t in tensors.items()}, head, _without(adapter, head))


_Made = tuple[dict[str, Any], dict[str, Tensor], list[str]]
"""Entries of the configuration, tensors by module path and suffix, modules to save."""


def _by_module(adapter: Adapter, backbone: Backbone, kind: type[Part]) -> dict[str, list[tuple[Any, tuple[Site, ...]]]]:
    """What acts at each module: (part, its sites there), in order, by the module's path."""
    found: dict[str, list[tuple[Any, tuple[Site, ...]]]] = {}
    for part in adapter.site_parts.values():
        if isinstance(part, kind):
            at: dict[str, list[Site]] = {}
            for name in part.sites:
                at.setdefault(backbone.sites[name].path, []).append(backbone.sites[name])
            for path, sites in at.items():
                found.setdefault(path, []).append((part, tuple(sites)))
    return found


def _lora_form(adapter: Adapter, backbone: Backbone) -> _Made:
    modules = _by_module(adapter, backbone, LoRA)
    parts = [part for acts in modules.values() for part, _ in acts]
    rslora, dora = all(p.config["rslora"] for p in parts), parts[0].dora
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, acts in modules.items():
        layer = layer_of(backbone, acts[0][1][0])
        if not isinstance(layer, nn.Linear):
            raise _NotPlain(f"{path} is a {type(layer).__name__}; LoRA is exported on linear layers")
        scale = acts[0][0].scale
        factors = [(*part.stacked(sites, layer.out_features), part.scale / scale) for part, sites in acts]
        a = torch.cat([a for a, _, _ in factors])
        b = torch.cat([b if ratio == 1 else b * ratio for _, b, ratio in factors], 1)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        ranks[path] = a.shape[0]
        alphas[path] = _tidy(scale * (math.sqrt(a.shape[0]) if rslora else a.shape[0]))
        if dora:
            magnitude = torch.linalg.norm(layer.weight.double(), dim=1)
            for site in acts[0][1]:
                rows = slice(*(site.span or (0, layer.out_features)))
                magnitude[rows] *= acts[0][0].cell(site).magnitude.double().to(magnitude.device)
            tensors[f"{path}.lora_magnitude_vector"] = magnitude
    copied, saved = _copies(adapter, backbone)
    clash = sorted(set(saved) & set(modules))
    if clash:
        raise _NotPlain(f"{clash[0]} is both tuned and under LoRA; peft does one or the other")
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    options = {
        "target_modules": _regex(modules),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": v for path, v in alphas.items() if v != alpha},
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_dropout": max(p.dropout for p in parts),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return options, tensors | copied, saved


def _tidy(value: float) -> float | int:
    """A whole number as an integer: sqrt and division leave 15.999999999999998 of it."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _beft_form(adapter: Adapter, backbone: Backbone) -> _Made:
    tensors = {}
    for path, acts in _by_module(adapter, backbone, Tuned).items():
        layer, (part, sites) = layer_of(backbone, acts[0][1][0]), acts[0]
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise _NotPlain(f"{path} is no linear layer with a bias; peft's BEFT takes no other")
        bias = part.cell(sites[0]).bias
        tensors[f"{path}.beft_bias"] = (bias.double() - layer.bias.double().to(bias.device))[None]
    return {"target_modules": _regex(_by_module(adapter, backbone, Tuned))}, tensors, []


def _ia3_form(adapter: Adapter, backbone: Backbone) -> _Made:
    tensors: dict[str, Tensor] = {}
    kept: dict[str, None] = {}
    for path, acts in _by_module(adapter, backbone, ScaleShift).items():
        layer = layer_of(backbone, acts[0][1][0])
        cells = [(part.cell(site).scale, site) for part, sites in acts for site in sites]
        if all(bool((scale == 1).all()) for scale, _ in cells):
            continue
        if not isinstance(layer, nn.Linear):
            raise _NotPlain(f"{path} is a {type(layer).__name__}; only scales of linear layers are exported")
        gain = torch.ones(layer.out_features, device=cells[0][0].device)
        for scale, site in cells:
            gain[slice(*(site.span or (0, layer.out_features)))] *= scale
        tensors[f"{path}.ia3_l"] = gain[:, None]
        kept[path] = None
    if not kept:
        raise _NotPlain("all its scales are 1 and all its shifts 0: there is nothing to write")
    return {"target_modules": _regex(kept), "feedforward_modules": [], "fan_in_fan_out": False}, tensors, []


def _tuned_form(adapter: Adapter, backbone: Backbone) -> _Made:
    copied, modules = _copies(adapter, backbone)
    tensors = {}
    for name, t in copied.items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{path}.ln_tuning_layers.{leaf}"] = t
    return {"target_modules": _regex(modules)}, tensors, []


def _copies(adapter: Adapter, backbone: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """Whole tuned layers as peft stores them, each tensor of a layer: trained where it was, frozen else."""
    tensors: dict[str, Tensor] = {}
    modules = _by_module(adapter, backbone, Tuned)
    for path, acts in modules.items():
        (part, (site, *_)), layer = acts[0], layer_of(backbone, acts[0][1][0])
        own, whole = part.cell(site).state_dict(), layer.state_dict()
        if next(layer.children(), None) is not None:
            raise _NotPlain(
                f"{path} ({type(layer).__name__}) has layers inside; peft writes the names of such copies wrongly"
            )
        frozen = sum(t.numel() for name, t in whole.items() if name not in own)
        if frozen > 2 * sum(t.numel() for t in own.values()):
            raise _NotPlain(
                f"for the tuned {', '.join(own)} of {path} peft would hold {frozen:,} frozen numbers as well"
            )
        tensors |= {f"{path}.{name}": own.get(name, t) for name, t in whole.items()}
    return tensors, list(modules)


def _regex(paths: Iterable[str]) -> str:
    """Exactly these modules. peft matches a list by suffix and a string as a whole."""
    return "^(?:" + "|".join(re.escape(path) for path in paths) + ")$"


def _lowered(value: Any, below: str) -> Any:
    """The patterns of `_lora_form` and `_regex` for a network that stands inside another as `below`."""
    if isinstance(value, str):
        return value if not below else f"^{re.escape(below)}(?:{value.removeprefix('^').removesuffix('$')})$"
    return {f"^{re.escape(below)}{key.removeprefix('^')}": v for key, v in value.items()}


# The head


def _head_path(adapter: Adapter, backbone: Backbone) -> str | None:
    """Where the authors' classification network keeps the layer that is this adapter's head; None where none agrees."""
    if len(adapter.readouts) != 1:
        return None
    (head,) = adapter.readouts
    if not isinstance(head, ClassifierHead) or head.form != "linear" or not pools_alike(backbone):
        return None
    return {"vit": "head", "swin": "head.fc", "hf_vit": "classifier"}[backbone.family]


def _below(backbone: Backbone) -> str:
    return "vit." if backbone.family == "hf_vit" else ""


def _classification_network(twin: Backbone, outputs: int) -> nn.Module:
    """The authors' classification network around (hf) or upon (timm) the plain network of `twin`."""
    network: Any = twin.network
    if twin.family != "hf_vit":
        network.reset_classifier(outputs)
        return network.float()
    from transformers import ViTForImageClassification

    config = copy.deepcopy(network.config)
    config.num_labels = outputs
    with torch.device("meta"):
        whole: Any = ViTForImageClassification(config)
    whole.vit = network
    whole.classifier = nn.Linear(config.hidden_size, outputs)
    return whole


def _check_saved(config: dict[str, Any], backbone: Backbone, head: str | None) -> None:
    """peft finds modules to save by the ends of their paths: nothing else with parameters may end alike."""
    below = "" if head is None else _below(backbone)
    names = {below + name: module for name, module in backbone.network.named_modules() if name}
    for wanted in config["modules_to_save"]:
        hit = [
            n for n, m in names.items() if n.endswith(wanted) and n != wanted and next(m.parameters(), None) is not None
        ]
        if hit:
            raise _NotPlain(f"peft would take {hit[0]} for {wanted} as well: it looks at the ends of names")


# What a loader must know


def _base_model(adapter: Adapter, backbone: Backbone, head: str | None) -> dict[str, Any]:
    """The entries that say on which network the files belong; nothing is claimed of random or local weights."""
    entries: dict[str, Any] = {
        "base_model_name_or_path": _hub_name(backbone),
        "revision": backbone.spec.commit,
        "auto_mapping": None,
    }
    if backbone.family == "hf_vit":
        cls = type(backbone.network)
        name = cls.__name__ if head is None else cls.__name__.replace("Model", "ForImageClassification")
        entries["auto_mapping"] = {"base_model_class": name, "parent_library": cls.__module__}
    return entries


def _hub_name(backbone: Backbone) -> str | None:
    spec, network = backbone.spec, backbone.network
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    kind, _, name = spec.id.partition(":")
    if spec.random:
        return None
    if kind == "timm":
        known = (config if isinstance(config, dict) else config.to_dict()).get("hf_hub_id") if spec.commit else None
        return known or f"timm/{name}"
    return name if kind == "hf" and "/" in name else None


def _without(adapter: Adapter, head: str | None) -> list[str]:
    """What plain peft leaves out, as sentences."""
    lines = []
    if head is None:
        heads = ", ".join(f"{name} ({p.kind})" for name, p in adapter.named_parts() if isinstance(p, Readout))
        what = "masks" if adapter.task.kind == "segment" else "class scores"
        lines.append(
            f"The head is not reproduced: {heads}. Plain peft gives the adapted features, medgraft gives {what}."
        )
    pre = adapter.preprocessing
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (pre.mean, pre.std))
    lines.append(f"Preprocessing is yours to apply: {pre.said}, minus ({mean}), over ({std}).")
    labels = [f"{v} = {c}" for c, v in zip(adapter.task.classes, adapter.task.values, strict=True)]
    shown = ", ".join(labels[:20]) + (f", and {len(labels) - 20} more" if len(labels) > 20 else "")
    lines.append(f"The label map is not in the peft files: {shown}.")
    lines.append(
        f"peft does not check the frozen weights: they must be those of {adapter.backbone.id} "
        f"(fingerprint {adapter.backbone.fingerprint[:12]})."
    )
    return lines


def _how_to_build(adapter: Adapter, head: bool) -> str:
    """The expression that builds the network for plain peft; without ports, which peft does not know."""
    kind, _, name = adapter.backbone.id.removeprefix("random:").partition(":")
    name, classes = name.partition("?")[0], len(adapter.task.classes) if head else 0
    if kind == "timm":
        size = "" if name.startswith("swin") else ", dynamic_img_size=True"
        return f'timm.create_model("{name}", pretrained=True, num_classes={classes}{size})'
    if kind == "medgraft":
        options = ", ".join(f"{key}={value!r}" for key, value in STARTER_VIT.items())
        return f"timm.models.VisionTransformer({options}, num_classes={classes}, dynamic_img_size=True)"
    if kind == "hf" and head:
        return f'transformers.ViTForImageClassification.from_pretrained("{name}", num_labels={classes})'
    return f'transformers.AutoModel.from_pretrained("{name}")' if kind == "hf" else "NETWORK"


def statement(adapter: Adapter, report: Mapping[str, Any] | None = None, backbone: Backbone | None = None) -> list[str]:
    """Sentences for the card: what a plain-peft loader will and will not reproduce.

    `report` is what `export_peft` returned for this adapter; where it returned None, the `backbone` decides, and without
    either it is judged by the adapter's parts alone.
    """
    reason = None if report else why_not_exportable(adapter, backbone)
    if reason is not None:
        return [f"Not loadable by plain peft: {reason}. It loads with medgraft."]
    head = bool(report and report["head"])
    method = report["peft_type"] if report else _method(adapter)
    parts = ", ".join(adapter.site_parts)
    compared = f", compared at export: largest difference {report['max_difference']:.1e}" if report else ""
    notes = {"random": "random weights", "medgraft": "with medgraft's weights/starter_vit.safetensors loaded"}
    note = notes.get(adapter.backbone.id.partition(":")[0])
    return [
        f"Plain peft loads {parts}{' and the classifier' if head else ''} as {method}{compared}.",
        f"Load: peft.PeftModel.from_pretrained({_how_to_build(adapter, head)}, DIRECTORY){f' ({note})' if note else ''}.",
        *(report["without"] if report else _without(adapter, None)),
    ]


# Writing and verifying

_SUFFIX = r"\.(lora_[AB]\.weight|ln_tuning_layers\.\w+|\w+)$"
"""What follows a module's path in the name of a tensor."""


def peft_files(
    adapter: Adapter, backbone: Backbone, *, dtype: str | None = None
) -> tuple[dict[str, bytes], dict[str, Any]] | None:
    """The two files by name and a report, verified against plain peft; None where there is no exact form.

    With `dtype` the tensors are rounded to it first, as `save_adapter` does. The report holds `peft_type`, `modules`,
    `bytes`, `head` (its path, or None), `without` (sentences), `max_difference`, `relative` (to the largest feature),
    `effect` (what the adapter changes at most). Raises BadAdapter where plain peft computes something else.
    """
    stored = copy.deepcopy(adapter) if dtype is None else rounded(adapter, dtype)
    stored.eval()
    try:
        form = _form(stored, backbone)
    except _NotPlain:
        return None
    files = form.files()
    report = {
        "peft_type": form.config["peft_type"],
        "modules": len({re.sub(_SUFFIX, "", name) for name in form.tensors}),
        "bytes": {name: len(content) for name, content in files.items()},
        "head": form.head,
        "without": form.without,
        **_verify(stored, backbone, form, files),
    }
    return files, report


def export_peft(
    adapter: Adapter, backbone: Backbone, directory: str | Path, *, dtype: str | None = None
) -> dict[str, Any] | None:
    """Write adapter_config.json and adapter_model.safetensors to `directory`, beside an adapter that stands there.

    Returns the report of `peft_files`, or None, having written nothing, where `why_not_exportable` gives a reason.
    Raises BadAdapter, having written nothing, where plain peft computes something else, BadCall for a directory that
    holds other files.
    """
    directory = Path(directory)
    made = peft_files(adapter, backbone, dtype=dtype)
    if made is None:
        return None
    standing = list(directory.iterdir()) if directory.is_dir() else []
    if standing and not {JSON_NAME, CONFIG_NAME} & {f.name for f in standing}:
        raise BadCall(f"{directory} holds files that are not an adapter's; choose an empty or a new directory")
    with replacing(directory) as new:
        for old in standing:
            if not old.is_file() or old.is_symlink():
                raise SaveFailed(f"{old} is not a plain file; an adapter's directory holds nothing else")
            (new / old.name).write_bytes(old.read_bytes())
        for name, content in made[0].items():
            (new / name).write_bytes(content)
    return made[1]


@torch.no_grad()
def _verify(adapter: Adapter, backbone: Backbone, form: PeftForm, files: Mapping[str, bytes]) -> dict[str, float]:
    """Load the files with plain peft onto a fresh copy in float32; compare features, the network's own output or logits."""
    p = next(backbone.parameters())
    if p.dtype != torch.float32 or p.device.type != "cpu":
        backbone, adapter = copy.deepcopy(backbone).cpu().float(), copy.deepcopy(adapter).cpu()
    graft = Graft.of(backbone, adapter)
    x = probe_batch(backbone)
    bare = backbone(x)
    with following(graft.plan):
        wanted, native = (
            backbone(x),
            _native(backbone.network, x) if backbone.family in ("vit", "swin", "hf_vit") else None,
        )
    twin = backbone.plain_copy(lambda site, base: base, share=False)
    network = twin.network if form.head is None else _classification_network(twin, adapter.task.outputs)
    model = _plain_peft(network, files)
    got = twin(x)
    pairs = [(got.pooled, wanted.pooled), (got.raw, wanted.raw), *zip(got.maps, wanted.maps, strict=True)]
    if form.head is not None:
        pairs.append((_native(model, x), graft.read(wanted, x)))
    elif native is not None:
        pairs.append((_native(model, x), native))
    difference, relative = _largest(pairs)
    effect, _ = _largest([(bare.pooled, wanted.pooled), *zip(bare.maps, wanted.maps, strict=True)])
    most = max(float(m.abs().max()) for m in wanted.maps)
    allowed = max(ROUNDING, min(TOLERANCE, OF_EFFECT * effect / most))
    if not relative <= allowed:
        raise BadAdapter(
            f"exported as {form.config['peft_type']}, plain peft gives other outputs (largest difference "
            f"{difference:.1e}, relative {relative:.1e}, allowed {allowed:.1e}); nothing was written. Publish without "
            "the peft form, and please report this"
        )
    return {"max_difference": difference, "relative": relative, "effect": effect}


def _native(network: Any, x: Tensor) -> Tensor:
    """What a timm or transformers network itself gives for images of any size."""
    resizes = getattr(getattr(network, "config", None), "model_type", None) == "vit"
    out = network(x, interpolate_pos_encoding=True) if resizes else network(x)
    if isinstance(out, Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest difference, and the largest relative to a pair's largest entry; infinite for NaN or other shapes."""
    worst = relative = 0.0
    for got, want in pairs:
        if got.shape != want.shape or not torch.isfinite(got).all():
            return math.inf, math.inf
        difference = float((got - want).abs().max())
        worst, relative = max(worst, difference), max(relative, difference / max(float(want.abs().max()), 1e-12))
    return worst, relative


def _plain_peft(network: nn.Module, files: Mapping[str, bytes]) -> nn.Module:
    """What any user of plain peft gets from these files on `network`, which is changed."""
    with quiet(), tempfile.TemporaryDirectory() as place:
        from peft import PeftModel

        for name, content in files.items():
            (Path(place) / name).write_bytes(content)
        return PeftModel.from_pretrained(network, place, torch_device="cpu").eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Run the block without the warnings and log lines of peft and transformers."""
    loggers = [logging.getLogger(name) for name in ("peft", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def features_of(adapter: Adapter, backbone: Backbone, x: Tensor) -> Features:
    """The features under the adapter's site parts: what plain peft and medgraft have in common."""
    with torch.no_grad(), following(Graft.of(backbone, adapter).plan):
        return backbone(x)
