"""Builders that the tests share: tiny backbones, images, tasks, adapters that do something, and one table of tolerances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medgraft.adapters import (
    PARTS,
    Adapter,
    ASPPHead,
    LinearHead,
    LoRA,
    Part,
    PromptGenerator,
    Readout,
    Task,
    find_part,
)
from medgraft.adapters.graft import Graft
from medgraft.backbones import Backbone, Features, Spec, load_backbone
from medgraft.backbones.registry import BackboneId, _from_timm
from medgraft.backbones.sites import Site, following
from medgraft.backbones.timm_source import build

TOLERANCE = {  # allowed error, relative to the largest entry
    torch.float64: 1e-12,  # sums taken in another order
    torch.float32: 1e-5,  # the same
    torch.float16: 4e-3,  # intermediate results round as well, one step is 2**-10
    torch.bfloat16: 3e-2,  # the same, one step is 2**-7
}

# Backbones


def tiny_vit() -> nn.Module:
    """timm's ViT: 3 blocks of width 48, fused q, k and v, patch 16."""
    network = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True
    )
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return network


def tiny_swin() -> nn.Module:
    """timm's Swin: two levels of two blocks, windows of 7 on maps of 16 and 8, so they are padded, shifted and several an image."""
    network = SwinTransformer(
        img_size=64,
        patch_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=7,
        num_classes=0,
        strict_img_size=False,
    )
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return network


def tiny_eva() -> nn.Module:
    """timm's DINOv3: 3 blocks of width 48, rotary positions, a cls token and registers, qkv without bias."""
    return build("vit_small_patch16_dinov3", dynamic_img_size=True, embed_dim=48, depth=3, num_heads=3)


TINY_SWIN_UNETR = "random:monai:swin_unetr?feature_size=12&depths=2-1-1-1&heads=1-2-2-4&window=2"
"""Windows of 2 voxels a side, shifted in the first level's second block."""

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "vit": lambda: _from_timm(BackboneId("timm", "tiny_vit", random=True), tiny_vit(), None, 64),
    "swin": lambda: _from_timm(BackboneId("timm", "tiny_swin", random=True), tiny_swin(), None, 64),
    "eva": lambda: _from_timm(BackboneId("timm", "tiny_eva", random=True), tiny_eva(), None, 64),
    "hf_vit": lambda: load_backbone("random:hf:vit"),
    "dinov2": lambda: load_backbone("random:hf:dinov2"),
    "universeg": lambda: load_backbone("random:universeg?widths=8,8,8", image_size=16),
    "sam": lambda: load_backbone("random:sam-tiny"),
    "meshnet": lambda: load_backbone("random:meshnet:model5_gw_ae", image_size=8),
    "volume_unet": lambda: load_backbone("random:monai:unet?widths=4-8-8", image_size=8),
    "swin_unetr": lambda: load_backbone(TINY_SWIN_UNETR, image_size=32),
    "vit_tiny": lambda: load_backbone("random:timm:vit_tiny_patch16_224", image_size=64),
    "swin_tiny": lambda: load_backbone("random:timm:swin_tiny_patch4_window7_224", image_size=64),
}


@cache
def backbone(name: str) -> Backbone:
    """A backbone of `BACKBONES`, one in the whole session: tests that want to break it make their own."""
    return BACKBONES[name]()


def images(on: Backbone, rows: int = 2, *, seed: int = 0, side: int | None = None) -> Tensor:
    """(rows, C, side, side), normal; of a volume's backbone (rows, C, *space), the smallest legal space with that side."""
    space = on.spec.fitting([side or on.spec.image_size] * on.spec.dims)
    return torch.randn(rows, on.spec.channels, *space, generator=torch.Generator().manual_seed(seed))


# Tasks, parts, adapters

M = TypeVar("M", bound=nn.Module)

ONE = Task("segment", ("polyp",))
THREE = Task("segment", ("cytoplasm", "nucleus", "wall"))
LABELS = Task("classify", ("benign", "malignant", "unsure"))


def wake(module: M, seed: int = 0, size: float = 0.05) -> M:
    """Move every parameter and running statistic a little off its start, so that nothing is silent any more."""
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                key = hashlib.sha256(f"{seed}|{name}".encode()).digest()
                drawn = torch.randn(t.shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big")))
                t += size * (drawn.abs() if name.endswith("running_var") else drawn)
    return module


def adapter(
    on: Backbone, parts: Mapping[str, Part] | None = None, *, task: Task = ONE, seed: int = 0, awake: bool = True
) -> Adapter:
    """LoRA and a linear head, or `parts` and a linear head where they bring none."""
    torch.manual_seed(seed)
    parts = {"lora": LoRA.on(on, task, rank=2)} if parts is None else dict(parts)
    last = list(parts.values())[-1] if parts else None
    if not isinstance(last, Readout) or not last.makes_logits:
        parts["head"] = LinearHead.on(on, task)
    made = Adapter.of(on, task, parts)
    return wake(made, seed) if awake else made


@dataclass(frozen=True)
class Case:
    """One way to build a part, for the contract. `before` and `after` make the parts that it needs around it."""

    kind: str
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    task: Task = ONE
    on: tuple[str, ...] = ("vit", "swin")
    before: Callable[[Backbone, Task], Mapping[str, Part]] = lambda on, task: {}
    after: Callable[[Backbone, Task], Mapping[str, Part]] = lambda on, task: {}
    slow: bool = False

    def __str__(self) -> str:
        return "-".join(filter(None, (self.kind, self.variant)))

    def adapter(self, on: Backbone, *, awake: bool, seed: int = 0) -> Adapter:
        """An adapter around the part, which is called `it`."""
        torch.manual_seed(seed)
        it = find_part(self.kind).on(on, self.task, **self.options)
        parts = {**self.before(on, self.task), "it": it, **self.after(on, self.task)}
        return adapter(on, parts, task=self.task, seed=seed, awake=awake)


def pairs(classes: int, *, soft: bool = False) -> dict[str, Tensor]:
    """Three labelled images of 16 pixels a side, all classes in each."""
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(0, classes + 1, (3, 16, 16), generator=g)
    shares = torch.nn.functional.one_hot(labels, classes + 1).permute(0, 3, 1, 2)[:, 1:] * 0.8
    return {"images": torch.rand(3, 16, 16, generator=g), "labels": shares if soft else labels}


def supported(on: Backbone, task: Task) -> dict[str, Part]:
    """A support set for the task."""
    return {"support": find_part("support").on(on, task, **pairs(len(task.classes)))}


def in_context(on: Backbone, task: Task) -> dict[str, Part]:
    """The head that reads a network's own logits out."""
    return {"head": find_part("context_head").on(on, task)}


def class_prompts(on: Backbone, task: Task) -> dict[str, Part]:
    """SAM's decoder asked by class tokens."""
    return {"head": find_part("class_prompts").on(on, task)}


def mask_head(on: Backbone, task: Task) -> dict[str, Part]:
    """SAM's decoder asked by a person."""
    return {"head": find_part("mask_head").on(on, task)}


SAM_DECODER = ("decoder.layers.*", "decoder.last.*", "decoder.up*", "decoder.iou_token", "decoder.no_mask")
FINDING = {"points": 3, "quality": 0.0, "stability": 0.0, "overlap": 0.9}
"""What a SAM with random weights must be asked so that it finds masks."""

IN_CONTEXT, WEIGHTS = ("universeg",), ("encoder.*", "decoder.*", "out")

CASES = [
    Case("lora", "q_v", {"rank": 2}, on=("vit", "swin", "hf_vit", "eva")),
    Case("lora", "everywhere-rslora", {"rank": 3, "targets": ("*.qkv", "*.proj", "*.fc1", "*.fc2"), "rslora": True}),
    Case("lora", "dora", {"rank": 2, "dora": True, "targets": ("*.attn.q", "*.attn.v", "*.fc2")}),
    Case("bottleneck", "sequential", on=("vit", "swin", "hf_vit", "eva")),
    Case("bottleneck", "parallel", {"parallel": True, "middle": 6, "scale": 0.1}),
    Case("bottleneck", "paper", {"form": "paper"}),
    Case("scale_shift", "default", on=("vit", "swin", "hf_vit", "eva")),
    Case("scale_shift", "branches-and-rows", {"targets": ("*.attn", "*.mlp", "*.attn.k")}),
    Case("prompt_tokens", "deep", {"count": 3}, on=("vit", "hf_vit")),
    Case("prompt_tokens", "shallow", {"count": 3, "deep": False}, on=("vit", "hf_vit")),
    Case("tuned", "norms", {"targets": ("*.norm1", "*.norm2", "norm")}),
    Case("tuned", "biases", {"targets": ("*.qkv", "*.proj", "*.fc1"), "tensors": ("bias",)}),
    Case("support", "one-class", pairs(1), on=IN_CONTEXT, after=in_context),
    Case("support", "three-classes", pairs(3), task=THREE, on=IN_CONTEXT, after=in_context),
    Case("support", "float", {**pairs(1), "storage": "float"}, on=IN_CONTEXT, after=in_context),
    Case("support", "soft", {**pairs(3, soft=True), "soft": True}, task=THREE, on=IN_CONTEXT, after=in_context),
    Case("context_head", "", on=IN_CONTEXT, before=supported),
    Case("lora", "weights", {"rank": 2, "targets": WEIGHTS}, on=IN_CONTEXT, before=supported, after=in_context),
    Case("scale_shift", "weights", {"targets": WEIGHTS}, on=IN_CONTEXT, before=supported, after=in_context),
    Case("tuned", "weights", {"targets": ("decoder.1.*", "out")}, on=IN_CONTEXT, before=supported, after=in_context),
    Case("mask_head", "", on=("sam",)),
    Case("samaug", "paper", {"channels": (4, 8), **FINDING}, task=THREE, on=("sam",)),
    Case(
        "samaug", "code", {"channels": (4, 8), "form": "code", "choose": "mean", "points": 3}, on=("sam",)
    ),  # finds none
    Case("refine_decoder", "paper", on=("sam",)),
    Case("evolved_prompt", "", {"steps": 3, "step": 0.01}, on=("sam",)),
    Case("refine_decoder", "residual", {"residual": True}, on=("sam",)),
    Case("class_prompts", "one-class", on=("sam",)),
    Case("class_prompts", "three-classes", {"quality": False}, task=THREE, on=("sam",)),
    Case("class_prompts", "code", {"form": "code"}, on=("sam",)),
    Case("tuned", "sam-decoder", {"targets": SAM_DECODER}, on=("sam",), after=class_prompts),
    Case("lora", "sam", {"rank": 2, "targets": ("*.attn.q", "decoder.*.to_image.v")}, on=("sam",), after=class_prompts),
    Case("fusion", "", {"encoder": "random:hf:vit"}, on=("sam",), after=class_prompts),
    Case("condition_embedding", "paper", {"groups": ("a", "b")}, on=("sam",), after=mask_head),
    Case("condition_embedding", "code", {"groups": ("a", "b"), "form": "code"}, on=("sam",), after=class_prompts),
    Case("linear_head", "three-classes", task=THREE),
    Case("linear_head", "volume", {"class_rows": (2, 0, 1, 1)}, task=THREE, on=("meshnet",)),
    Case("linear_head", "strided", task=THREE, on=("volume_unet",)),
    Case("lora", "volume", {"rank": 2, "targets": "layers.[23].*.q"}, on=("swin_unetr",)),
    Case("bottleneck", "volume", {"targets": "layers.3.*.mlp", "middle": 4}, on=("swin_unetr",), slow=True),
    Case("scale_shift", "volume", {"targets": ("layers.3.*.attn", "decoder1.*")}, on=("swin_unetr",), slow=True),
    Case("scale_shift", "convolutions", {"targets": ("down.1.*", "up.*")}, on=("volume_unet",)),
    Case("tuned", "convolutions", {"targets": ("layers.[78]",)}, on=("meshnet",)),
    Case("tuned", "transposed", {"targets": ("up.1.*",)}, on=("volume_unet",)),
    Case("conv_lora", "dilated", {"targets": "layers.*", "rank": 2}, on=("meshnet",)),
    Case("conv_lora", "strided-transposed", {"targets": ("down.*.unit0", "up.*", "bottom.unit1")}, on=("volume_unet",)),
    Case("conv_lora", "decoder", {"targets": "decoder[12].*", "rank": 2}, on=("swin_unetr",)),
    Case("spatial_adapter", "paper", {"form": "paper"}, on=("meshnet",)),
    Case("spatial_adapter", "code2023", {"form": "code2023"}, on=("volume_unet",)),
    Case("spatial_adapter", "residual", on=("meshnet",)),
    Case("spatial_adapter", "large", on=("swin_unetr",), slow=True),
    Case(
        "priors",
        "",
        {"labels": [torch.tensor([[[0, 1], [1, 1]]])], "kinds": ("size", "centroid", "length")},
        on=("meshnet",),
    ),
    Case("linear_head", "first-map", {"level": 0}),
    Case("classifier_head", "linear", task=LABELS),
    Case("classifier_head", "cosine", {"form": "cosine"}, task=LABELS),
    Case("neighbours", "attention", {"samples": 12, "options": {"layers": 2}}, task=LABELS),
    Case("neighbours", "with-probabilities", {"samples": 12, "features": "both", "classes": 4}, task=LABELS),
    Case("prompt_generator", "", after=lambda on, task: {"head": ASPPHead.on(on, task, prompt=64)}),
    Case("aspp_head", "plain", task=THREE),
    Case("aspp_head", "prompted", {"prompt": 64}, before=lambda on, task: {"prompt": PromptGenerator.on(on, task)}),
]
"""Every registered part must be here: the contract is run over this table, and one test compares it with the registry."""

assert {case.kind for case in CASES} <= PARTS.keys()


# Running and comparing


def features_under(on: Backbone, made: Adapter, x: Tensor) -> Features:
    """The features as the site parts of an adapter leave them."""
    with torch.no_grad(), following(Graft.of(on, made).plan):
        return on(x)


def tensors_of(out: Any) -> list[Tensor]:
    """Every tensor of an output, in a fixed order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Features):
        tokens = [] if out.tokens is None else [out.tokens]
        return [*out.maps, out.pooled, out.raw, *tokens, *out.extra.values()]
    return [t for item in out for t in tensors_of(item)]


def same_bits(got: Any, want: Any) -> bool:
    """True when two outputs are equal, bit for bit."""
    a, b = tensors_of(got), tensors_of(want)
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def off_by(got: Any, want: Any) -> float:
    """The largest difference of two outputs, tensor by tensor relative to the largest entry; inf where shapes differ."""
    a, b = ([t.detach().double() for t in tensors_of(out)] for out in (got, want))
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(float((s - t).abs().max() / t.abs().max().clamp_min(1e-12)) for s, t in zip(a, b, strict=True))


def close(name: str, got: Any, want: Any, allowed: float | None = None) -> None:
    """Assert that two outputs agree to the table (NaN fails)."""
    limit = TOLERANCE[tensors_of(want)[0].dtype] if allowed is None else allowed
    error = off_by(got, want)
    assert error <= limit, f"{name}: off by {error:.1e}, {limit:.0e} is allowed"


def says(error: BaseException, *words: str) -> None:
    """Assert that a message has every one of `words`."""
    for word in words:
        assert word.lower() in str(error).lower(), f"{word!r} is missing from: {error}"


class Acting(Part):
    """A part made of one function, for tests: `change(site, y) -> y` at every site."""

    kind = "acting"
    acts_on = ("linear", "branch", "norm")

    def __init__(self, sites: Mapping[str, Any], change: Callable[[Site, Tensor], Tensor]) -> None:
        super().__init__(sites)
        self.change = change

    def act(self, sites: tuple[Site, ...], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = inner(*args, **kwargs)
        for site in sites:
            y = (self.change(site, y[0]), *y[1:]) if isinstance(y, tuple) else self.change(site, y)
        return y


def acting(
    on: Backbone, targets: Iterable[str], change: Callable[[Site, Tensor], Tensor], *, task: Task = ONE
) -> Adapter:
    """An adapter whose site part does `change`."""
    chosen = {name: (on.sites[name].fan_in, on.sites[name].fan_out) for name in targets}
    return adapter(on, {"acting": Acting(chosen, change)}, task=task)


def other_spec(on: Backbone, **changes: Any) -> Spec:
    """The backbone's spec with changes."""
    from dataclasses import replace

    return replace(on.spec, **changes)
