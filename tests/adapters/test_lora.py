"""LoRA, rsLoRA and DoRA: the rows of a fused projection, and the equations taken literally."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgraft.adapters import Adapter, Host, LinearHead, LoRA, ScaleShift
from medgraft.backbones import Backbone
from medgraft.errors import BadCall
from tests.helpers import ONE, adapter, close, images, same_bits, says, wake


def changed(on: Backbone, made: Adapter, name: str = "l") -> Backbone:
    """A copy of the backbone whose weights are W + s B A, or DoRA's W', by the equations on whole matrices."""
    twin, part = copy.deepcopy(on), made.parts[name]
    with torch.no_grad():
        for site_name in part.sites:
            site, cell = on.sites[site_name], part.cell(site_name)
            frozen = on.network.get_submodule(site.path).weight.double()
            rows = slice(*(site.span or (0, frozen.shape[0])))
            block = torch.zeros_like(frozen)
            block[rows] = part.scale * cell.B.double() @ cell.A.double()
            w = frozen + block
            if part.dora:
                norm = w.norm(dim=1)
                m = cell.magnitude.double() * frozen[rows].norm(dim=1)
                w[rows] *= (m / norm[rows])[:, None]
            twin.network.get_submodule(site.path).weight[rows] = w[rows].float()
    return twin


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "rank": 4}, {"dora": True}, {"alpha": 3.0, "rank": 5}], ids=str
)
@pytest.mark.parametrize("targets", [("*.attn.q", "*.attn.v"), "*.attn.k", "*.attn.qkv", ("*.fc1", "*.proj")], ids=str)
def test_it_is_a_changed_weight(either: Backbone, options: dict, targets) -> None:
    host, x = Host(either), images(either)
    made = adapter(either, {"l": LoRA.on(either, ONE, targets=targets, **options)})
    host.add(made, "a")
    with torch.no_grad():
        want = made.readouts[0](changed(either, made)(x), x)
        close("weights", host(x, adapter="a"), want)
        assert not torch.allclose(want, made.readouts[0](either(x), x), rtol=1e-3)


def test_q_and_v_rows_are_the_block_matrix_form(vit: Backbone) -> None:
    """Rank r on q and on v is rank 2r on the fused projection: A = [Aq; Av], B with two blocks and zeros."""
    part = wake(LoRA.on(vit, ONE, rank=3, targets=("blocks.0.attn.q", "blocks.0.attn.v")))
    q, v = part.cell("blocks.0.attn.q"), part.cell("blocks.0.attn.v")
    block = LoRA({"blocks.0.attn.qkv": (48, 144)}, rank=6, alpha=16.0 * 2)
    cell = block.cell("blocks.0.attn.qkv")
    with torch.no_grad():
        cell.A.copy_(torch.cat([q.A, v.A]))
        cell.B.zero_()
        cell.B[:48, :3], cell.B[96:, 3:] = q.B, v.B
    head = LinearHead.on(vit, ONE)
    host, x = Host(vit), images(vit)
    host.add(Adapter.of(vit, ONE, {"l": part, "h": head}), "rows")
    host.add(Adapter.of(vit, ONE, {"l": block, "h": head}), "block")
    with torch.no_grad():
        close("block", host(x, adapter="rows"), host(x, adapter="block"))


def test_the_k_rows_stay_as_they_are(either: Backbone) -> None:
    site = next(s for s in either.sites.values() if s.name.endswith("attn.qkv"))
    part = wake(LoRA.on(either, ONE, targets=(site.name[:-3] + "q", site.name[:-3] + "v")), size=1.0)
    layer, x = either.network.get_submodule(site.path).base, torch.randn(2, 5, site.fan_in)
    own = tuple(either.sites[n] for n in part.sites)
    with torch.no_grad():
        got, plain = part.act(own, layer, x), layer(x)
    third = site.fan_out // 3
    assert torch.equal(got[..., third : 2 * third], plain[..., third : 2 * third])
    assert not torch.isclose(got[..., :third], plain[..., :third]).all(-1).any()
    assert not torch.isclose(got[..., 2 * third :], plain[..., 2 * third :]).all(-1).any()


# DoRA


def doras(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """W' = m (W + s B A) / |W + s B A|, the norm held."""
    w = weight + scale * b @ a
    return (magnitude * weight.norm(dim=1) / w.norm(dim=1).detach())[:, None] * w


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("inner", ["layer", "chain"])
def test_dora_and_its_gradients(biased: bool, inner: str) -> None:
    layer = nn.Linear(9, 14, bias=biased).double().requires_grad_(False)
    part = wake(LoRA({"s": (9, 14)}, rank=3, dora=True).double(), size=0.5)
    cell, x = part.cell("s"), torch.randn(4, 6, 9, dtype=torch.float64, requires_grad=True)
    from medgraft.backbones.sites import Site

    site = Site("s", "linear", 0, 9, 14, "s", "s")
    got = part.act((site,), layer, x)
    want = functional.linear(x, doras(layer.weight, cell.A, cell.B, cell.magnitude, part.scale), layer.bias)
    close("y", got.detach(), want.detach(), 1e-5)
    leaves = (x, cell.A, cell.B, cell.magnitude)
    dy = torch.randn_like(got)
    for name, mine, theirs in zip(
        ("x", "A", "B", "magnitude"),
        torch.autograd.grad(got, leaves, dy),
        torch.autograd.grad(want, leaves, dy),
        strict=True,
    ):
        close(f"d{name}", mine, theirs, 1e-5)
    with torch.no_grad():
        close("folded", part.fold((site,), layer)(x), want, 1e-5)


def test_dora_moves_magnitude_and_direction_apart(vit: Backbone) -> None:
    """Scaling B changes no row's length as long as the magnitude stays."""
    part = wake(LoRA.on(vit, ONE, dora=True, targets="blocks.0.mlp.fc1"), size=0.3)
    site = vit.sites["blocks.0.mlp.fc1"]
    layer = vit.network.get_submodule(site.path).base
    lengths = part.fold((site,), layer).weight.norm(dim=1) / layer.weight.norm(dim=1)
    close("lengths", lengths, part.cell(site.name).magnitude.detach(), 1e-5)
    with torch.no_grad():
        part.cell(site.name).B.mul_(5)
    close("lengths", part.fold((site,), layer).weight.norm(dim=1) / layer.weight.norm(dim=1), lengths, 1e-5)


def test_dora_of_overlapping_rows_is_refused(vit: Backbone) -> None:
    """Each site's norm is taken of the frozen rows: two sites over the same rows would not be one W'."""
    with pytest.raises(BadCall) as refused:
        Host(vit).add(adapter(vit, {"l": LoRA.on(vit, ONE, dora=True, targets=("*.attn.qkv", "*.attn.q"))}), "a")
    says(refused.value, "blocks.0.attn.q", "blocks.0.attn.qkv", "DoRA")
    host, x = Host(vit), images(vit)
    host.add(adapter(vit, {"l": LoRA.on(vit, ONE, targets=("*.attn.qkv", "*.attn.q"))}), "plain LoRA adds up")
    with torch.no_grad():
        close("folded", host.folded("plain LoRA adds up")(x), host(x, adapter="plain LoRA adds up"))


# The rest


def test_the_scale() -> None:
    assert LoRA({}, rank=8, alpha=16.0).scale == 2
    assert LoRA({}, rank=16, alpha=16.0, rslora=True).scale == 4
    assert LoRA({"s": (3, 4)}, rank=2).tensors().keys() == {"s.A", "s.B"}
    assert LoRA({"s": (3, 4)}, rank=2, dora=True).tensors().keys() == {"s.A", "s.B", "s.magnitude"}
    shapes = {n: tuple(t.shape) for n, t in LoRA({"s": (3, 4)}, rank=2, dora=True).tensors().items()}
    assert shapes == {"s.A": (2, 3), "s.B": (4, 2), "s.magnitude": (4,)}


def test_a_fresh_one_is_drawn_and_zero() -> None:
    cell = LoRA({"s": (400, 4)}, rank=16).cell("s")
    assert not cell.B.any()
    assert cell.A.abs().max() <= 1 / math.sqrt(400)
    assert cell.A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.1)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": -1}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)
def test_options_that_make_no_sense(vit: Backbone, options: dict) -> None:
    with pytest.raises(BadCall) as refused:
        LoRA.on(vit, ONE, **options)
    says(refused.value, "rank", "dropout", str(next(iter(options.values()))))


def test_dropout_is_for_training(either: Backbone) -> None:
    host, x = Host(either), images(either)
    for name, options in (("l", {}), ("d", {"dora": True})):
        torch.manual_seed(0)
        host.add(adapter(either, {"l": LoRA.on(either, ONE, dropout=0.8, **options)}), name)
        with torch.no_grad():
            quiet = host(x, adapter=name)
            assert torch.equal(host(x, adapter=name), quiet)
            host.train()
            one, two = host(x, adapter=name), host(x, adapter=name)
            assert not torch.allclose(one, two)
            host.eval()
            assert torch.equal(host(x, adapter=name), quiet)


def test_dropout_keeps_the_frozen_path_whole(either: Backbone) -> None:
    """Only the low-rank branch is dropped: a fresh part is silent in training as well."""
    host, x = Host(either), images(either)
    head = LinearHead.on(either, ONE)
    host.add(Adapter.of(either, ONE, {"h": head}), "head")
    for name, options in (("l", {}), ("d", {"dora": True})):
        host.add(Adapter.of(either, ONE, {"l": LoRA.on(either, ONE, dropout=0.5, **options), "h": head}), name)
        host.train()
        with torch.no_grad():
            close(name, host(x, adapter=name), host(x, adapter="head"), 1e-6)


def test_two_parts_at_one_layer_act_one_on_the_other(either: Backbone) -> None:
    """LoRA then scale-shift scales the low-rank term too; the other way round it does not."""
    parts = {"l": LoRA.on(either, ONE, targets="*.fc1"), "s": ScaleShift.on(either, ONE, targets="*.fc1")}
    host, x = Host(either), images(either)
    host.add(adapter(either, parts), "ls")
    flipped = {
        "s": copy.deepcopy(parts["s"]),
        "l": copy.deepcopy(parts["l"]),
        "head": copy.deepcopy(host.adapters["ls"].parts["head"]),
    }
    host.add(Adapter.of(either, ONE, flipped), "sl")
    site = next(s for s in either.sites.values() if s.name.endswith("fc1"))
    layer = either.network.get_submodule(site.path).base
    xs = torch.randn(2, 3, site.fan_in)
    cell, affine = parts["l"].cell(site.name), parts["s"].cell(site.name)
    low = parts["l"].scale * xs @ cell.A.T @ cell.B.T
    from medgraft.adapters.graft import chain

    with torch.no_grad():
        close(
            "ls", chain(host._grafts["ls"].ports[site.name])(layer, xs), (layer(xs) + low) * affine.scale + affine.shift
        )
        close(
            "sl", chain(host._grafts["sl"].ports[site.name])(layer, xs), layer(xs) * affine.scale + affine.shift + low
        )
        assert not same_bits(host(x, adapter="ls"), host(x, adapter="sl"))
        for name in ("ls", "sl"):
            close("folded", host.folded(name)(x), host(x, adapter=name))


def test_mixed_rows_do_not_depend_on_ranks_scales_or_targets(either: Backbone) -> None:
    host, x = Host(either), images(either, 6)
    options = [
        {"rank": 1},
        {"rank": 7, "rslora": True},
        {"targets": "*.fc2", "alpha": 1.0},
        {"targets": ("*.attn.qkv", "*.fc2")},
    ]
    for k, o in enumerate(options):
        torch.manual_seed(k)
        host.add(adapter(either, {"l": LoRA.on(either, ONE, **o)}, seed=k), f"a{k}")
    names = ["a3", "a0", None, "a1", "a2", "a3"]
    assert all(g.mixable for g in host._grafts.values())
    with torch.no_grad():
        rows = host(x, adapter=names)
        for i, name in enumerate(names):
            close(f"row {i}", rows[i], host(x[i : i + 1], adapter=name))
