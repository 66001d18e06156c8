"""Law 6: `folded` and `fixed` make new plain modules and leave everything else as it was."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from medgraft.adapters import (
    Adapter,
    ASPPHead,
    Bottleneck,
    Host,
    LinearHead,
    LoRA,
    PromptGenerator,
    PromptTokens,
    ScaleShift,
    Tuned,
)
from medgraft.backbones import Backbone
from medgraft.backbones.sites import Port
from medgraft.errors import BadCall, WrongBackbone
from tests.helpers import BACKBONES, ONE, THREE, adapter, close, images, says


def bundle(on: Backbone, seed: int = 0, *, decoder: bool = False, **options) -> Adapter:
    """Several parts at the same ports, foldable and not, and AViT's decoder with its batch norms where asked for."""
    torch.manual_seed(seed)
    parts = {
        "norms": Tuned.on(on, ONE, targets=("*.norm1", "norm")),
        "dora": LoRA.on(on, ONE, rank=2, dora=True, targets=("*.attn.q", "*.attn.v")),
        "low": LoRA.on(on, ONE, **{"rank": 2, "targets": ("*.fc1", "*.attn.qkv")} | options),
        "scale": ScaleShift.on(on, ONE),
        "necks": Bottleneck.on(on, ONE),
    }
    if on.family != "swin":
        parts["prompts"] = PromptTokens.on(on, ONE, count=2)
    if decoder:
        parts |= {"stem": PromptGenerator.on(on, ONE), "decoder": ASPPHead.on(on, ONE, prompt=64)}
    return adapter(on, parts, seed=seed)


@pytest.fixture
def host(either: Backbone) -> Host:
    host = Host(either)
    host.add(bundle(either), "a")
    host.add(bundle(either, seed=1), "b")
    return host


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()] if t.numel()}


@pytest.mark.parametrize("how", ["folded", "fixed"])
def test_a_bundle_of_everything(host: Host, how: str) -> None:
    x = images(host.backbone)
    host.remove("a")
    host.add(bundle(host.backbone, decoder=True), "a")
    with torch.no_grad():
        close(how, getattr(host, how)("a")(x), host(x, adapter="a"))


@pytest.mark.parametrize("how", ["folded", "fixed"])
def test_everything_else_stays_as_it_was(host: Host, how: str) -> None:
    on, made, x = host.backbone, host.adapters["a"], images(host.backbone)
    digest = on.digest()
    tensors = {name: t.detach().clone() for name, t in made.tensors().items()}
    grads = {name: p.requires_grad for name, p in made.named_parameters()}
    modules = [(name, id(m)) for name, m in host.named_modules()]
    with torch.no_grad():
        right = host(x, adapter="a")
        plain = getattr(host, how)("a")
        plain(x)
        assert on.digest() == digest
        assert all(torch.equal(t, tensors[name]) for name, t in made.tensors().items())
        assert {name: p.requires_grad for name, p in made.named_parameters()} == grads
        assert [(name, id(m)) for name, m in host.named_modules()] == modules
        assert torch.equal(host(x, adapter="a"), right)


def test_folded_shares_nothing(host: Host) -> None:
    mine, made = storages(host.backbone), storages(host.adapters["a"])
    assert not storages(host.folded("a")) & (mine | made)


def test_fixed_shares_the_frozen_tensors_and_nothing_else(host: Host) -> None:
    plain = host.fixed("a")
    assert storages(host.backbone) <= storages(plain)
    assert not storages(plain) & storages(host.adapters["a"])


@pytest.mark.parametrize("how", ["folded", "fixed"])
def test_no_port_and_no_selection_is_left(host: Host, how: str) -> None:
    plain = getattr(host, how)("a")
    assert not any(isinstance(m, Port) for m in plain.modules())
    assert not any(p.requires_grad for p in plain.parameters())
    assert not any(m.training for m in plain.modules())
    host.remove("a")
    x = images(host.backbone)
    with torch.no_grad():
        again = Host(host.backbone)
        again.add(bundle(host.backbone), "a")
        close(how, plain(x), again(x, adapter="a"))


@pytest.mark.parametrize("how", ["folded", "fixed"])
@pytest.mark.parametrize("change", ["cast", "thaw", "train", "load"])
def test_what_is_done_to_it_does_not_reach_the_host(host: Host, how: str, change: str) -> None:
    on, x = host.backbone, images(host.backbone)
    digest = on.digest()
    with torch.no_grad():
        right = host(x, adapter="a")
    plain = getattr(host, how)("a")
    if change == "cast":
        plain.to(torch.bfloat16)
    elif change == "thaw":
        plain.requires_grad_(True)
    elif change == "train":
        plain.train()
        with torch.no_grad():
            plain(x)
    elif how == "folded":  # the other one shares its memory by design
        plain.load_state_dict({k: torch.zeros_like(v) for k, v in plain.state_dict().items()})
    assert on.digest() == digest
    assert not any(p.requires_grad for p in on.parameters())
    with torch.no_grad():
        assert torch.equal(host(x, adapter="a"), right)


def test_folded_parts_are_gone_where_they_can_be() -> None:
    """LoRA, scale-shift and tuned copies leave plain layers: the folded network has the frozen one's modules and names."""
    on = BACKBONES["vit"]()
    host = Host(on)
    parts = {
        "t": Tuned.on(on, ONE, targets="*.norm1"),
        "l": LoRA.on(on, ONE, dora=True, targets=("*.q", "*.fc2")),
        "s": ScaleShift.on(on, ONE),
    }
    host.add(adapter(on, parts), "a")
    plain = host.folded("a").backbone.network
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in on.network.named_parameters()}
    assert type(plain.get_submodule("blocks.0.mlp.fc2")) is nn.Linear


def test_folding_on_a_half_precision_backbone_sums_in_full() -> None:
    """W + s B A is summed in float64 and rounded once."""
    on = BACKBONES["vit"]().to(torch.bfloat16)
    host = Host(on)
    made = adapter(on, {"l": LoRA.on(on, ONE, rank=2, targets="blocks.0.mlp.fc1")})
    host.add(made, "a")
    cell, site = made.parts["l"].cell("blocks.0.mlp.fc1"), on.network.get_submodule("blocks.0.mlp.fc1")
    want = (site.weight.double() + made.parts["l"].scale * cell.B.double() @ cell.A.double()).bfloat16()
    assert torch.equal(host.folded("a").backbone.network.get_submodule("blocks.0.mlp.fc1").weight, want)


def small(on: Backbone, seed: int) -> Adapter:
    """Few parts: tracing takes long."""
    torch.manual_seed(seed)
    low, neck = LoRA.on(on, ONE, rank=2, dora=True), Bottleneck.on(on, ONE, targets="*.mlp", middle=4)
    return adapter(on, {"norms": Tuned.on(on, ONE, targets="norm"), "low": low, "necks": neck}, seed=seed)


@pytest.fixture
def small_host(either: Backbone) -> Host:
    host = Host(either)
    host.add(small(either, 0), "a")
    host.add(small(either, 1), "b")
    return host


@pytest.mark.slow
@pytest.mark.parametrize("how", ["folded", "fixed"])
def test_it_can_be_exported(small_host: Host, how: str) -> None:
    plain, x = getattr(small_host, how)("a"), images(small_host.backbone)
    exported = torch.export.export(plain, (x,), strict=False)
    with torch.no_grad():
        close("exported", exported.module()(x), plain(x), 1e-6)


# One graph, and swapping by copy


def test_one_graph_and_no_new_one_after_a_swap(small_host: Host) -> None:
    host, x = small_host, images(small_host.backbone)
    torch._dynamo.reset()
    counters.clear()
    plain = host.fixed("a")
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    with torch.no_grad():
        close("compiled", compiled(x), host(x, adapter="a"), 1e-6)
        assert counters["stats"]["unique_graphs"] == 1
        plain.swap(host.adapters["b"])
        close("swapped", compiled(x), host(x, adapter="b"), 1e-6)
        plain.swap(host.adapters["a"])
        close("swapped back", compiled(x), host(x, adapter="a"), 1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_swapping_reaches_every_tensor(host: Host) -> None:
    plain, other = host.fixed("a"), host.adapters["b"]
    plain.swap(other)
    own = plain._graft.adapter.tensors()
    assert own.keys() == other.tensors().keys()
    assert all(torch.equal(t, other.tensors()[name]) for name, t in own.items())
    assert not any(own[name].data_ptr() == t.data_ptr() for name, t in other.tensors().items())


def test_swapping_still_works_after_a_cast(host: Host) -> None:
    """Casting and moving replace buffers: the swap has to find the new ones."""
    plain, x = host.fixed("a").to(torch.float64), images(host.backbone)
    plain.swap(host.adapters["b"])
    with torch.no_grad():
        close("cast", plain(x.double()).float(), host(x, adapter="b"), 1e-4)


def refusable(on: Backbone) -> dict[str, Adapter]:
    lora = bundle(on, rank=3)
    alpha = bundle(on, alpha=7.0)
    sites = bundle(on, targets=("*.fc1",))
    extra = adapter(on, {"low": LoRA.on(on, ONE)})
    classes = bundle(on)
    classes.parts["head"] = LinearHead.on(on, THREE)
    return {"rank": lora, "alpha": alpha, "sites": sites, "parts": extra, "classes": classes}


@pytest.mark.parametrize("what", ["rank", "alpha", "sites", "parts", "classes"])
def test_what_does_not_fit_is_not_swapped_in(host: Host, what: str) -> None:
    plain, x = host.fixed("a"), images(host.backbone)
    with torch.no_grad():
        right = plain(x)
        with pytest.raises(BadCall) as refused:
            plain.swap(refusable(host.backbone)[what])
        says(refused.value, "shapes", "host.fixed")
        assert torch.equal(plain(x), right), "half of it was swapped"


def test_an_adapter_of_another_backbone_is_not_swapped_in(either: Backbone) -> None:
    from dataclasses import replace

    host, made = Host(either), adapter(either)
    host.add(made, "a")
    stranger = copy.deepcopy(made)
    stranger.backbone = replace(made.backbone, fingerprint="0" * 64)
    with pytest.raises(WrongBackbone) as refused:
        host.fixed("a").swap(stranger)
    says(refused.value, "0" * 12, made.backbone.fingerprint[:12])
