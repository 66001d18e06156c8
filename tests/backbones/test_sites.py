"""Sites, ports and plans: what stands where, what passes through, and what is refused."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgraft.adapters import Adapter, Bottleneck, Host, LinearHead, LoRA, PromptTokens, ScaleShift, Tuned
from medgraft.backbones import Backbone, load_backbone
from medgraft.backbones.registry import BackboneId, _from_timm
from medgraft.backbones.sites import KINDS, Owner, Plan, Port, first_stage, following, install, match
from medgraft.errors import BadCall, UnknownName
from tests.helpers import ONE, adapter, images, same_bits, says, tiny_swin, tiny_vit, wake

EVERY = ["vit", "swin", "eva", "hf_vit", "dinov2", "vit_tiny", "swin_tiny"]


@pytest.fixture(params=EVERY)
def on(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(request.param)


# What the sites say is true


def test_a_site_knows_its_layers_widths(on: Backbone) -> None:
    for name, site in on.sites.items():
        assert site.name == name
        assert site.kind in KINDS
        assert 0 <= site.stage <= on.depth
        assert site.port in on.sites
        if site.kind != "linear":
            assert site.fan_in == site.fan_out
            continue
        layer = on.network.get_submodule(site.path)
        rows = slice(*(site.span or (0, layer.out_features)))
        assert layer.weight[rows].shape == (site.fan_out, site.fan_in), name


def test_q_k_and_v_share_out_the_fused_projection(on: Backbone) -> None:
    fused = [n for n in on.sites if n.endswith(".attn.qkv")]
    assert bool(fused) == (on.family != "hf_vit")
    for name in fused:
        spans = [on.sites[name[:-3] + leaf].span for leaf in "qkv"]
        third = on.sites[name].fan_out // 3
        assert spans == [(0, third), (third, 2 * third), (2 * third, 3 * third)]
        assert {on.sites[name[:-3] + leaf].port for leaf in "qkv"} == {name}


def test_a_layer_that_a_norm_feeds_is_given_that_norms_very_output(on: Backbone) -> None:
    fed = {s.name: s.norm for s in on.sites.values() if s.norm}
    leaves = {"vit": {"attn.qkv": "norm1", "mlp.fc1": "norm2"}, "hf_vit": {"mlp.fc1": "norm2"}, "swin": {}}[on.family]
    assert fed == {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(on.depth) for a, b in leaves.items()}
    given: dict[str, Tensor] = {}
    same: list[bool] = []

    def norm(name: str):
        return lambda inner, x: given.setdefault(name, inner(x))

    def linear(name: str):
        return lambda inner, x: (same.append(x is given[fed[name]]), inner(x))[1]

    plan = {**{name: norm(name) for name in fed.values()}, **{name: linear(name) for name in fed}}
    with torch.no_grad(), following(Plan(on.owner, plan)):
        on(images(on, 1))
    assert same == [True] * len(fed)


def test_a_forward_calls_every_site_and_each_in_its_stage(on: Backbone) -> None:
    called: list[tuple[str, int]] = []
    stage = -1

    def seer(port: str):
        return lambda inner, *a, **k: (called.append((port, stage)), inner(*a, **k))[1]

    plan = Plan(on.owner, {s.port: seer(s.port) for s in on.sites.values()})
    with torch.no_grad(), following(plan):
        state = on.run(images(on), stop=0)
        assert not called
        for stage in range(on.depth):
            state = on.run(state, stop=stage + 1)
        stage = on.depth
        on.run(state)
    assert sorted(called) == sorted((s.port, s.stage) for s in on.sites.values() if s.port == s.name)
    assert on.called == {port for port, _ in called}


@pytest.mark.parametrize(
    "id", ["vit_small_plus_patch16_dinov3", pytest.param("eva02_tiny_patch14_224", marks=pytest.mark.slow)]
)
def test_gated_mlps_have_a_second_layer_of_its_own_width(id: str) -> None:
    made = load_backbone(f"random:timm:{id}", image_size=None if "eva02" in id else 64)
    host = Host(made)
    host.add(adapter(made, {"l": LoRA.on(made, ONE, rank=1, targets="*.fc2")}), "a")
    test_a_site_knows_its_layers_widths(made)
    with torch.no_grad():
        assert not torch.equal(host(images(made, 1), adapter="a"), host(images(made, 1), adapters=["a"])[0] * 0)


def test_a_packed_gated_mlp() -> None:
    """DINOv2's giant: fc1 gives two halves, fc2 takes one."""
    from functools import partial

    from timm.layers import GluMlp
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
        mlp_layer=partial(GluMlp, gate_last=False),
    )
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    made = _from_timm(BackboneId("timm", "glu", random=True), network, None, 64)
    host = Host(made)
    host.add(adapter(made, {"l": LoRA.on(made, ONE, targets=("*.fc1", "*.fc2"))}), "a")
    assert host(images(made), adapter="a").shape == (2, 1, 64, 64)


# Ports


def test_state_dict_names_are_those_of_the_bare_network() -> None:
    for make in (tiny_vit, tiny_swin):
        bare = make()
        names = {n: t.shape for n, t in bare.state_dict().items()}
        made = _from_timm(BackboneId("timm", "x", random=True), make(), None, 64)
        assert {n: t.shape for n, t in made.network.state_dict().items()} == names
        assert [n for n, _ in made.network.named_parameters()] == [n for n, _ in bare.named_parameters()]
        assert {n for n, _ in made.named_modules()} >= {f"network.{n}" for n, _ in bare.named_modules() if n}
        bare.load_state_dict(made.network.state_dict())
        made.network.load_state_dict(bare.state_dict())


def test_a_port_passes_attributes_through(vit: Backbone) -> None:
    port = vit.network.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(port, Port)
    assert port.weight is port.base.weight
    assert (port.in_features, port.out_features) == (48, 192)
    assert port.bias is port.base.bias
    attn = vit.network.get_submodule("blocks.1.attn")
    assert attn.num_heads == 3
    assert isinstance(attn.qkv, Port)
    assert attn.qkv is attn.base.qkv, "the frozen forward would go past the inner port"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = port.nothing_like_this
    assert "site='blocks.1.mlp.fc1'" in repr(port)


def test_a_port_follows_casts_and_modes() -> None:
    port = Port(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), "s", Owner())
    port.double()
    assert port.base[0].weight.dtype == torch.float64
    port.eval()
    assert not port.base.training
    assert not port.base[1].training
    port.train()
    assert port.base.training
    assert port.base[1].training
    port.to("meta")
    assert port.base[0].weight.is_meta


def test_a_copied_port_is_a_port_of_its_own() -> None:
    owner = Owner()
    holder = nn.Sequential(nn.Linear(2, 3))
    install(holder, "0", "s", owner)
    twin = copy.deepcopy(holder)
    assert twin[0].base is not holder[0].base
    assert twin[0].weight is twin[0].base.weight
    assert twin[0].weight is not holder[0].weight
    assert twin[0].owner is not owner
    with torch.no_grad():
        twin[0].weight.zero_()
    assert holder[0].weight.any()
    x = torch.ones(1, 2)
    with following(Plan(owner, {"s": lambda inner, x: inner(x) * 0 + 7})):
        assert (holder(x) == 7).all()
        assert not (twin(x) == 7).any()


def test_replacing_a_tensor_through_a_port_reaches_the_base() -> None:
    port = Port(nn.Linear(2, 2), "s", Owner())
    port.weight = nn.Parameter(torch.zeros(2, 2))
    assert not port.base.weight.any()


def test_hooks_on_a_port_see_the_call(vit: Backbone) -> None:
    seen: list[tuple[int, ...]] = []
    handle = vit.network.get_submodule("blocks.0.mlp.fc1").register_forward_hook(
        lambda m, args, out: seen.append(tuple(out.shape))
    )
    with torch.no_grad():
        vit(images(vit))
    handle.remove()
    assert seen == [(2, 17, 192)]


def test_an_operation_may_be_left_out(vit: Backbone) -> None:
    x = images(vit)
    with torch.no_grad():
        plain = vit(x)
        with following(Plan(vit.owner, {"a site that is nowhere": lambda *a: 1 / 0})):
            assert same_bits(vit(x), plain)


# Matching


def test_patterns_cross_dots_and_keep_the_order_of_the_network(on: Backbone) -> None:
    found = match(on.sites, ("*.mlp.fc2", "*.mlp.fc1", "*.fc1"), ("linear",))
    assert [s.name for s in found] == [n for n in on.sites if n.endswith((".fc1", ".fc2"))]
    assert match(on.sites, "norm", ("norm",)) == [on.sites["norm"]]
    assert {s.kind for s in match(on.sites, "*", ("branch",))} == {"branch"}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda on: LoRA.on(on, ONE, targets="*.attn.kqv"),
            ("'*.attn.kqv'", "near misses", "attn.qkv", "medgraft explain"),
        ),
        (lambda on: LoRA.on(on, ONE, targets=("*.attn.q", "*.atn.v")), ("'*.atn.v'", "near misses")),
        (
            lambda on: LoRA.on(on, ONE, targets="*.mlp"),
            ("matches only branch sites", ".mlp", "acts on linear, weights sites"),
        ),
        (lambda on: LoRA.on(on, ONE, targets="norm"), ("matches only norm sites", "'norm'")),
        (lambda on: LoRA.on(on, ONE, targets=()), ("targets", "empty")),
        (lambda on: Bottleneck.on(on, ONE, targets="*.fc1"), ("matches only linear sites", "branch")),
        (lambda on: Tuned.on(on, ONE, targets="*.norm3"), ("'*.norm3'", "near misses", "norm1")),
        (lambda on: Tuned.on(on, ONE, targets="norm", tensors=("gamma",)), ("'norm'", "'gamma'", "weight")),
        (
            lambda on: Tuned.on(on, ONE, targets=("norm", "*.attn.q")),
            ("blocks.0.attn.q is some rows", "target", "blocks.0.attn.qkv"),
        ),
        (
            lambda on: Tuned.on(on, ONE, targets=("norm", "*.fc1"), tensors=("weight", "wait")),
            ("'wait'", "weight, bias"),
        ),
        (lambda on: ScaleShift.on(on, ONE, targets="zzz"), ("'zzz'", "near misses")),
        (lambda on: LinearHead.on(on, ONE, level=7), ("level 7", "feature maps")),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(either: Backbone, build, words: tuple[str, ...]) -> None:
    with pytest.raises((UnknownName, BadCall)) as refused:
        build(either)
    says(refused.value, *words)


def test_a_kind_of_site_that_is_not_there_at_all(swin: Backbone) -> None:
    with pytest.raises(UnknownName) as refused:
        PromptTokens.on(swin, ONE)
    says(refused.value, "no tokens site at all")


def test_rotary_backbones_have_no_place_for_prompts() -> None:
    on = load_backbone("random:timm:vit_small_patch16_dinov3", image_size=32)
    with pytest.raises(UnknownName) as refused:
        PromptTokens.on(on, ONE)
    says(refused.value, "no tokens site at all")


def test_the_first_stage() -> None:
    assert first_stage([], none=5) == 5


# Layers that a forward goes past


def past_its_layer(self, x: Tensor, **kwargs) -> Tensor:
    """timm's attention, reading `qkv.weight` as swinv2 and beit do."""
    b, n, c = x.shape
    q, k, v = (
        functional.linear(x, self.qkv.weight, self.qkv.bias)
        .reshape(b, n, 3, self.num_heads, -1)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


@pytest.fixture
def bypassing() -> Backbone:
    network = tiny_vit()
    for block in network.blocks:
        block.attn.forward = types.MethodType(past_its_layer, block.attn)
    return _from_timm(BackboneId("timm", "tiny_vit", random=True), network, None, 64)


def test_a_site_that_no_forward_calls_is_refused(bypassing: Backbone, vit: Backbone) -> None:
    with torch.no_grad():
        assert torch.allclose(bypassing(images(vit)).pooled, vit(images(vit)).pooled, atol=1e-4), (
            "another network altogether"
        )
    assert {n for n in bypassing.sites if n not in bypassing.called and bypassing.sites[n].span is None} == {
        f"blocks.{i}.attn.qkv" for i in range(3)
    }
    for part in (LoRA, ScaleShift):
        with pytest.raises(BadCall) as refused:
            part.on(bypassing, ONE, targets=("*.attn.q", "*.attn.v") if part is LoRA else "*.attn.qkv")
        says(refused.value, "never calls", "blocks.0.attn", "in silence", "medgraft explain")
    LoRA.on(bypassing, ONE, targets="*.attn.proj")


def test_an_adapter_for_such_a_site_is_refused_as_well(bypassing: Backbone, vit: Backbone) -> None:
    """Made where the site is called, added where it is not; the tensors are the same, so the fingerprints agree."""
    assert bypassing.spec.fingerprint == vit.spec.fingerprint
    host = Host(bypassing)
    with pytest.raises(BadCall) as refused:
        host.add(adapter(vit), "a")
    says(refused.value, "never calls", "blocks.0.attn.q")
    assert not host.adapters


def test_timms_own_networks_that_read_past_a_layer_are_refused() -> None:
    made = load_backbone("random:timm:vit_small_patch16_dinov3_qkvb", image_size=32)
    with pytest.raises(BadCall, match="never calls"):
        LoRA.on(made, ONE)
    LoRA.on(made, ONE, targets="*.attn.proj")


def test_what_is_trained_at_a_site_is_what_acts_there(on: Backbone) -> None:
    """One part at each single site in turn: the output differs, so no site is deaf."""
    x = images(on, 1)
    host = Host(on)
    names = [n for n, s in on.sites.items() if s.stage in (0, on.depth - 1, on.depth)]
    with torch.no_grad():
        plain = on(x).maps[-1]
        for name in names:
            site = on.sites[name]
            cls = PromptTokens if site.kind == "tokens" else ScaleShift
            part = wake(cls({name: (site.fan_in, site.fan_out)}), size=0.5)
            made = Adapter.of(on, ONE, {"it": part, "head": LinearHead.on(on, ONE)})
            host.add(made, name)
            with following(host._grafts[name].plan):
                assert not torch.equal(on(x).maps[-1], plain), name
