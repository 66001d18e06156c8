"""LoRA whose LayerNorm rides along, in whole networks: the same function and gradients, only where it may, and nobody else notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module as module

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, Bottleneck, Host, LinearHead, LoRA, ScaleShift
from medgraft.adapters.explain import paths_taken
from medgraft.adapters.graft import Graft
from medgraft.adapters.norm_lora import joined
from medgraft.backbones import Backbone
from medgraft.backbones.sites import following
from tests.helpers import BACKBONES, ONE, Part, adapter, close, images
from tests.kernels.conftest import Device

TARGETS = ("blocks.1.attn.q", "blocks.1.attn.v", "blocks.1.mlp.fc1")
RIDES = {"vit": 2, "eva": 2, "sam": 2, "hf_vit": 1}
"""Norms that feed one of these layers alone; transformers' ViT has layers of their own for q, k and v."""


@pytest.fixture
def no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAM's attention in plain torch: its kernel takes float32 scalars, and long in the interpreter."""
    monkeypatch.setattr(module("medgraft.kernels.relpos_attention"), "_unfit", lambda q, w: "left out")


def placed(name: str, device: Device) -> Backbone:
    """In half precision where there is a GPU, for which the kernels are, else in double."""
    return BACKBONES[name]().to(device.torch, torch.float16 if device == "cuda" else torch.float64)


@pytest.fixture
def vit(device: Device) -> Backbone:
    return placed("vit", device)


@pytest.fixture
def rides(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The norms that rode along since it was last asked."""
    there, count = module("medgraft.kernels.norm_shrink"), []
    plain = there.fused
    monkeypatch.setattr(there, "fused", lambda *args: (count.append(1), plain(*args))[1])

    def asked() -> int:
        found = len(count)
        count.clear()
        return found

    return asked


def hosting(on: Backbone, *made: Adapter) -> Host:
    host = Host(on)
    for i, one in enumerate(made):
        one.to(next(on.parameters()))
        host.add(one, f"a{i}")
    return host


def lora(on: Backbone, **options) -> Part:
    return LoRA.on(on, ONE, **{"rank": 2, "targets": TARGETS, **options})


def batch(on: Backbone, rows: int = 4) -> Tensor:
    """Enough rows that the columns pay, few enough for the interpreter."""
    return images(on, rows, side=48 if on.family == "sam" else None).to(next(on.parameters()))


def run(host: Host, x: Tensor, names: str | list[str | None] = "a0", **how: bool) -> list[Tensor]:
    """The output, the image's gradient and every adapter's."""
    x = x.clone().requires_grad_()
    for made in host.adapters.values():
        made.zero_grad()
    y = host(x, adapter=names, **how)
    y.square().sum().backward()
    grads = [p.grad for made in host.adapters.values() for p in made.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *(g.clone() for g in grads)]


def same_as_plain(host: Host, monkeypatch: pytest.MonkeyPatch, x: Tensor, names: str | list[str | None] = "a0") -> None:
    """Values and gradients are those of the library's norm and products, which run with the kernels off."""
    got = run(host, x, names)
    monkeypatch.setenv("MEDGRAFT_KERNELS", "off")
    want = run(host, x, names)
    assert len(got) == len(want) > 2
    close("output and gradients", got, want, 5e-2 if x.dtype == torch.float16 else 1e-9)


@pytest.mark.usefixtures("no_attention")
@pytest.mark.parametrize("name", RIDES)
def test_values_and_gradients(
    name: str, device: Device, rides: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on = placed(name, device)
    host = hosting(on, adapter(on, {"l": lora(on)}))
    x = batch(on)
    host(x, adapter="a0")
    assert rides() == (RIDES[name] if device.fused else 0)
    same_as_plain(host, monkeypatch, x)


def test_what_the_norm_hands_on(vit: Backbone, device: Device) -> None:
    """h is a view of H; whatever is made of it travels alone, and LoRA then goes its ordinary way."""
    made = adapter(vit, {"l": lora(vit, targets="blocks.0.attn.qkv")}).to(next(vit.parameters()))
    plan, block = Graft.of(vit, made).plan.operations, vit.network.blocks[0]
    norm, qkv = (m.__dict__["base"] for m in (block.norm1, block.attn.qkv))
    x = vit.run(batch(vit), stop=0).x
    h = plan["blocks.0.norm1"](norm, x)
    close("h", h, norm(x), 2e-3 if device == "cuda" else 1e-9)
    assert (joined(h) is not None) == device.fused
    if device.fused:
        assert joined(h).columns.data_ptr() == h.data_ptr()
        assert all(joined(t) is None for t in (h.clone(), h[:], h.flatten(1), h.detach()))
        others = Graft.of(vit, adapter(vit, {"l": lora(vit, targets="blocks.0.attn.qkv")}, seed=5).to(x)).plan
        alone = others.operations["blocks.0.attn.qkv"](qkv, h)
        close("another adapter's", alone, others.operations["blocks.0.attn.qkv"](qkv, h.clone()), 0.0)
    got, want = (plan["blocks.0.attn.qkv"](qkv, t) for t in (h, h.clone()))
    close("either way", got, want, 2e-3 if device == "cuda" else 1e-9)


def parts_beside(on: Backbone) -> dict[str, dict[str, Part]]:
    """LoRA with others, and how many norms then ride."""
    branches = ("blocks.1.attn", "blocks.1.mlp")
    return {
        "parallel": {"l": lora(on), "b": Bottleneck.on(on, ONE, parallel=True, targets=branches, middle=4)},
        "at-the-norm": {"s": ScaleShift.on(on, ONE, targets="blocks.1.norm1"), "l": lora(on)},
        "at-the-layer": {"l": lora(on), "s": ScaleShift.on(on, ONE, targets="blocks.1.mlp.fc1")},
        "two": {"l": lora(on), "k": lora(on, targets="blocks.1.attn.k")},
        "dora": {"l": lora(on, dora=True)},
    }


@pytest.mark.parametrize(
    ("beside", "count"), [("parallel", 2), ("at-the-norm", 1), ("at-the-layer", 1), ("two", 1), ("dora", 0)]
)
def test_beside_other_parts(
    beside: str,
    count: int,
    vit: Backbone,
    device: Device,
    rides: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = hosting(vit, adapter(vit, parts_beside(vit)[beside]))
    host(batch(vit), adapter="a0")
    assert rides() == (count if device.fused else 0)
    same_as_plain(host, monkeypatch, batch(vit))


def test_dropout_keeps_it_away_while_training(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    host, x = hosting(vit, adapter(vit, {"l": lora(vit, dropout=0.5)})), batch(vit)
    host.train()
    host(x, adapter="a0")
    assert rides() == 0
    host.eval()
    host(x, adapter="a0")
    assert rides() == (2 if device.fused else 0)


def test_autocast_keeps_it_away(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    host = hosting(vit, adapter(vit, {"l": lora(vit)}))
    with torch.autocast(device.torch.type, torch.bfloat16):
        host(batch(vit), adapter="a0")
    assert rides() == 0


def test_a_network_in_training_keeps_it_away(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    twin = vit.trainable_copy()
    host = hosting(twin, adapter(twin, {"l": lora(twin)}))
    host(batch(twin), adapter="a0").sum().backward()
    assert rides() == 0
    assert twin.network.blocks[0].norm1.weight.grad.any()


def test_checkpointing(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    host = hosting(vit, adapter(vit, {"l": lora(vit)}))
    straight = run(host, batch(vit))
    assert rides() == (2 if device.fused else 0)
    again = run(host, batch(vit), remat=True)
    assert rides() == (4 if device.fused else 0)
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


@pytest.mark.usefixtures("no_attention")
@pytest.mark.parametrize("name", ["vit", "sam"])
def test_an_adapter_for_each_image(
    name: str, device: Device, rides: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on = placed(name, device)
    heads = {"h": LinearHead.on(on, ONE)}
    wide = adapter(on, {"l": lora(on), **heads}, seed=1)
    narrow = adapter(on, {"l": lora(on, rank=3, targets="blocks.1.mlp.fc1"), **heads}, seed=2)
    host = hosting(on, wide, narrow, adapter(on, heads, seed=3))
    names, x = ["a0", "a1", "a0", "a2"], batch(on)
    got = host(x, adapter=names)
    assert rides() == (2 if device.fused else 0)
    for i, who in enumerate(names):
        close(f"row {i}", got[i : i + 1], host(x[i : i + 1], adapter=who), 5e-2 if device == "cuda" else 1e-9)
    same_as_plain(host, monkeypatch, x, names)


def test_plain_modules_go_without(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    host, x = hosting(vit, adapter(vit, {"l": lora(vit)})), batch(vit)
    want = host(x, adapter="a0").detach()
    rides()
    for made in (host.fixed("a0"), host.folded("a0")):
        close("logits", made(x).detach(), want, 5e-2 if device == "cuda" else 1e-9)
    assert rides() == 0


def test_a_copied_host_has_norms_of_its_own(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    host, x = hosting(vit, adapter(vit, {"l": lora(vit)})), batch(vit)
    twin, before = copy.deepcopy(host), host(x, adapter="a0").detach()
    with torch.no_grad():
        for p in vit.parameters():
            p.zero_()
    rides()
    assert torch.equal(twin(x, adapter="a0").detach(), before)
    assert rides() == (2 if device.fused else 0)


def test_one_graph(vit: Backbone, device: Device, rides: Callable[[], int]) -> None:
    """The attribute travels within a compiled graph as well."""
    made, block = adapter(vit, {"l": lora(vit)}).to(next(vit.parameters())), vit.network.blocks[1]
    with torch.no_grad(), following(Graft.of(vit, made).plan):
        x = vit.run(batch(vit), stop=1).x
        got = torch.compile(block, backend="eager", fullgraph=True)(x)
        assert rides() == (2 if device.fused else 0)
        close("tokens", got, block(x), 2e-3 if device == "cuda" else 1e-9)


@pytest.mark.parametrize("name", ["vit", "sam"])
def test_it_is_explained(name: str, device: Device) -> None:
    on = placed(name, device)
    parts = {
        "l": lora(on, targets=("*.attn.qkv", "*.attn.proj")),
        "b": Bottleneck.on(on, ONE, parallel=True, targets="*.attn"),
    }
    made = adapter(on, parts).to(next(on.parameters()))
    made.preprocessing = replace(made.preprocessing, size=128)
    ways, attention = paths_taken(Graft.of(on, made), on)
    riding = {path: places for path, places in ways["l"].items() if "LayerNorm in front" in path}
    assert list(riding.values()) == ([3] if device.fused else [])
    assert not any("LayerNorm" in path for path in ways["b"])  # which reads the same h
    assert list(attention.values()) == ([3] if name == "sam" else [])
    assert all(path.startswith("fused" if device.fused else "not fused") for path in attention)
