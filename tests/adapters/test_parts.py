"""What is particular to the other site parts: bottlenecks, scale-shift, prompt tokens, tuned copies."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgraft.adapters import Bottleneck, Host, LinearHead, PromptTokens, ScaleShift, Tuned
from medgraft.adapters.schema import canonical
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone
from medgraft.backbones.sites import Plan, Site, following
from medgraft.errors import BadCall
from tests.helpers import BACKBONES, ONE, acting, adapter, close, features_under, images, says, wake

BRANCH = Site("b", "branch", 0, 8, 8, "b", "b")


def branch(x: Tensor) -> Tensor:
    return torch.sin(3 * x)


# Bottlenecks


@pytest.mark.parametrize("form", ["code", "paper", "parallel"])
def test_a_bottlenecks_equation(form: str) -> None:
    options = {"parallel": True, "scale": 0.1} if form == "parallel" else {"form": form}
    part = wake(Bottleneck({"b": (8, 8)}, middle=3, **options), size=0.5)
    pair, x = part.cell("b"), torch.randn(2, 5, 8)
    h = branch(x)
    down = functional.linear(x if form == "parallel" else h, pair.down.weight, pair.down.bias)
    up = functional.linear(down.relu() if form == "parallel" else functional.gelu(down), pair.up.weight, pair.up.bias)
    want = {"code": h + up, "paper": up, "parallel": h + 0.1 * up}[form]
    with torch.no_grad():
        close("y", part.act((BRANCH,), branch, x), want.detach())
    tupled = part.act((BRANCH,), lambda x: (branch(x), "attention weights"), x)
    assert tupled[1] == "attention weights"
    close("y", tupled[0].detach(), want.detach())


@pytest.mark.parametrize("form", ["code", "paper", "parallel"])
def test_a_bottleneck_with_a_norm_of_its_own(form: str) -> None:
    """What goes into the first projection is normalised; what the result is added to is not."""
    options = {"parallel": True, "scale": 0.1} if form == "parallel" else {"form": form}
    part = wake(Bottleneck({"b": (8, 8)}, middle=3, norm=True, **options), size=0.5)
    pair, x = part.cell("b"), torch.randn(2, 5, 8)
    h = branch(x)
    entered = functional.layer_norm(x if form == "parallel" else h, (8,), pair.norm.weight, pair.norm.bias, 1e-5)
    down = functional.linear(entered, pair.down.weight, pair.down.bias)
    up = functional.linear(down.relu() if form == "parallel" else functional.gelu(down), pair.up.weight, pair.up.bias)
    with torch.no_grad():
        want = {"code": h + up, "paper": up, "parallel": h + 0.1 * up}[form]
        close("y", part.act((BRANCH,), branch, x), want)


def test_a_bottlenecks_norm_starts_as_none_and_is_learnt_and_kept(vit: Backbone, tmp_path: Path) -> None:
    part = Bottleneck.on(vit, ONE, norm=True)
    made = adapter(vit, {"b": part}, awake=False)
    assert {n.rsplit(".", 2)[1] for n in part.tensors()} == {"down", "up", "norm"}
    host, x = Host(vit), images(vit)
    host.add(made, "a")
    fresh, v = Bottleneck({"b": (8, 8)}, norm=True), torch.randn(2, 5, 8)
    assert torch.equal(fresh.act((BRANCH,), branch, v), branch(v)), "a fresh one is not silent"
    wake(part)
    host(x, adapter="a").square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in part.named_parameters() if "norm" in n)
    back = read_adapter(save_adapter(made, tmp_path / "a", dtype="float32", backbone=vit))
    host.add(back, "b")
    with torch.no_grad():
        assert torch.equal(host(x, adapter="b"), host(x, adapter="a"))


def test_files_from_before_the_norm_are_read(vit: Backbone, tmp_path: Path) -> None:
    made = adapter(vit, {"b": Bottleneck.on(vit, ONE)})
    save_adapter(made, tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    assert record["parts"][0]["config"].pop("norm") is False
    record["sha256"] = canonical(record)
    (tmp_path / "adapter.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_adapter(tmp_path).parts["b"].config["norm"] is False


@pytest.mark.parametrize("norm", ["none", "in", 1, None], ids=str)
def test_a_norm_is_there_or_not(norm: object) -> None:
    """AdaptFormer's own words for it are strings, and "none" is true as any."""
    with pytest.raises(BadCall) as refused:
        Bottleneck({"b": (8, 8)}, norm=norm)
    says(refused.value, "norm", "True", "False", repr(norm))


def test_a_bottlenecks_size_and_start() -> None:
    part = Bottleneck({"b": (192, 192)})
    assert {n: tuple(t.shape) for n, t in part.tensors().items()} == {
        "b.down.weight": (48, 192),
        "b.down.bias": (48,),
        "b.up.weight": (192, 48),
        "b.up.bias": (192,),
    }
    assert not part.cell("b").up.weight.any()
    assert not part.cell("b").up.bias.any()
    assert part.cell("b").down.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert Bottleneck({"b": (192, 192)}, form="paper").cell("b").up.weight.any()


@pytest.mark.parametrize("options", [{"form": "printed"}, {"form": "paper", "parallel": True}], ids=str)
def test_a_form_that_is_not_there(options: dict) -> None:
    with pytest.raises(BadCall) as refused:
        Bottleneck({"b": (8, 8)}, **options)
    says(refused.value, "'code'", "'paper'", repr(options["form"]))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_branch_ends_before_the_residual_sum(vit: Backbone, form: str) -> None:
    """x = x + A(Attn(LN x)): under the paper's form with zeros, the branch vanishes and the residual stays."""
    part = Bottleneck.on(vit, ONE, targets="blocks.0.attn", form=form)
    with torch.no_grad():
        for p in part.parameters():
            p.zero_()
    made = adapter(vit, {"b": part}, awake=False)
    x = images(vit)
    block = vit.network.blocks[0]
    with torch.no_grad(), following(None):
        entered = vit.run(x, stop=0).x
        attended = entered if form == "paper" else entered + block.attn(block.norm1(entered))
        want = attended + block.mlp(block.norm2(attended))
        from medgraft.adapters.graft import Graft

        with following(Graft.of(vit, made).plan):
            close("block", vit.run(x, stop=1).x, want, 1e-6)


def test_drop_path_grows_with_depth_and_is_for_training(vit: Backbone) -> None:
    part = Bottleneck.on(vit, ONE, drop_path=0.2)
    assert list(part.drop.values()) == pytest.approx([0.2 * i / 5 for i in range(6)])
    x = torch.randn(200, 3, 48)
    last = vit.sites["blocks.2.mlp"]
    part.eval()
    assert torch.equal(part.act((last,), branch, x), branch(x))
    part.train()
    torch.manual_seed(0)
    out = part.act((last,), branch, x)
    gone = (out == 0).flatten(1).all(1)
    assert 0.1 < gone.float().mean() < 0.3, "whole rows go, at the rate of the last site"
    close("kept rows", out[~gone], branch(x[~gone]) / 0.8, 1e-5)


# Scale and shift


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_scale_shifts_equation(kind: str) -> None:
    site = Site("s", kind, 0, 5, 6, "s", "s")
    part = wake(ScaleShift({"s": (5, 6)}), size=0.5)
    g, d = part.cell("s").scale, part.cell("s").shift
    layer, x = (
        (nn.Linear(5, 6), torch.randn(2, 3, 5)) if kind == "linear" else (nn.Conv2d(5, 6, 1), torch.randn(2, 5, 3, 4))
    )
    view = (-1,) if kind == "linear" else (-1, 1, 1)
    with torch.no_grad():
        close("y", part.act((site,), layer, x), layer(x) * g.view(view) + d.view(view))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)], ids=str
)
def test_scale_shift_folds_exactly(layer: nn.Module) -> None:
    site = Site("s", "linear", 0, 6, 6, "s", "s")
    part, x = wake(ScaleShift({"s": (6, 6)}), size=0.5), torch.randn(3, 6)
    before = copy.deepcopy(layer.state_dict())
    folded = part.fold((site,), layer)
    with torch.no_grad():
        close("folded", folded(x), part.act((site,), layer, x))
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    assert type(folded) is type(layer)
    assert not any(p.requires_grad for p in folded.parameters())


def test_scale_shift_of_some_rows(vit: Backbone) -> None:
    part = wake(ScaleShift.on(vit, ONE, targets="blocks.0.attn.k"), size=0.5)
    layer, site = vit.network.get_submodule("blocks.0.attn.qkv").base, vit.sites["blocks.0.attn.k"]
    x = torch.randn(2, 4, 48)
    with torch.no_grad():
        got, plain = part.act((site,), layer, x), layer(x)
        close("folded", part.fold((site,), layer)(x), got)
    assert torch.equal(got[..., :48], plain[..., :48])
    assert torch.equal(got[..., 96:], plain[..., 96:])
    assert not torch.equal(got[..., 48:96], plain[..., 48:96])


def test_scale_shifts_default_is_every_layer_of_every_backbone(vit: Backbone, swin: Backbone, hf_vit: Backbone) -> None:
    for on in (vit, swin, hf_vit):
        acted = {on.sites[n].port for n in ScaleShift.on(on, ONE).sites}
        assert acted == {s.port for s in on.sites.values() if s.kind in ("linear", "norm")}


# Prompt tokens


def lengths(on: Backbone, made, x: Tensor) -> list[int]:
    """The number of tokens in each block, and in the final norm."""
    from medgraft.adapters.graft import Graft

    seen: list[int] = []
    plan = Graft.of(on, made).plan

    def seer(port: str, operation):
        def look(inner, first: Tensor, *a, **k):
            seen.append(first.shape[1])
            return (operation or (lambda inner, *a, **k: inner(*a, **k)))(inner, first, *a, **k)

        return look

    ports = [*(f"blocks.{i}.norm1" for i in range(on.depth)), "norm"]
    spied = Plan(on.owner, {**plan.operations, **{p: seer(p, plan.operations.get(p)) for p in ports}})
    with torch.no_grad(), following(spied):
        on(x)
    return seen


@pytest.fixture(params=["vit", "hf_vit", "dinov2"])
def sequence(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("deep", [True, False])
def test_deep_prompts_replace_and_shallow_ones_travel(sequence: Backbone, deep: bool) -> None:
    x, n = images(sequence), 1 + 16
    made = adapter(sequence, {"p": PromptTokens.on(sequence, ONE, count=3, deep=deep)})
    assert len(made.parts["p"].sites) == (3 if deep else 1)
    seen = lengths(sequence, made, x)
    assert seen[:3] == [n + 3] * 3
    with torch.no_grad():
        f = features_under(sequence, made, x)
    assert f.maps[-1].shape == f.raw.shape == (2, sequence.spec.width, 4, 4)
    assert f.tokens.shape == (2, n, sequence.spec.width)
    assert torch.equal(f.tokens[:, 1:].transpose(1, 2).reshape(f.maps[-1].shape), f.maps[-1])
    assert torch.equal(f.pooled, f.tokens[:, 0])


def by_hand(on: Backbone, prompts: list[Tensor | None], x: Tensor) -> Tensor:
    """[cls; P; x] block by block, on a copy of timm's own network."""
    blocks, tokens, count = on.network.blocks, on.run(x, stop=0).x, 0
    for block, own in zip(blocks, prompts, strict=True):
        if own is not None:
            tokens = torch.cat([tokens[:, :1], own.expand(len(x), -1, -1), tokens[:, 1 + count :]], 1)
            count = len(own)
        tokens = block(tokens)
    return on.network.norm(torch.cat([tokens[:, :1], tokens[:, 1 + count :]], 1))


@pytest.mark.parametrize("at", [(0, 1, 2), (0,), (1,), (0, 2)], ids=str)
def test_prompts_by_hand(vit: Backbone, at: tuple[int, ...]) -> None:
    x = images(vit)
    part = PromptTokens.on(vit, ONE, count=4, targets=tuple(f"blocks.{i}.tokens" for i in at))
    made = adapter(vit, {"p": part})
    own = [part.cell(f"blocks.{i}.tokens").prompts if i in at else None for i in range(3)]
    with torch.no_grad():
        close("tokens", features_under(vit, made, x).tokens, by_hand(vit, own, x), 1e-6)


def test_prompts_may_change_their_number(vit: Backbone) -> None:
    parts = {
        "a": PromptTokens.on(vit, ONE, count=5, targets="blocks.0.tokens"),
        "b": PromptTokens.on(vit, ONE, count=2, targets="blocks.2.tokens"),
    }
    x = images(vit)
    made = adapter(vit, parts)
    own = [parts["a"].cell("blocks.0.tokens").prompts, None, parts["b"].cell("blocks.2.tokens").prompts]
    assert lengths(vit, made, x) == [22, 22, 19, 19]
    with torch.no_grad():
        close("tokens", features_under(vit, made, x).tokens, by_hand(vit, own, x), 1e-6)


def test_two_sets_of_prompts_at_one_block_are_refused(vit: Backbone) -> None:
    """The second would take the first one's tokens for patches."""
    parts = {"a": PromptTokens.on(vit, ONE, count=5), "b": PromptTokens.on(vit, ONE, count=2)}
    with pytest.raises(BadCall) as refused:
        Host(vit).add(adapter(vit, parts), "a")
    says(refused.value, "'b'", "prompt_tokens", "blocks.0.tokens")


def test_prompts_and_their_bound() -> None:
    part = PromptTokens({"t": (100, 100)}, count=50, patch=4)
    bound = (6 / (3 * 16 + 100)) ** 0.5
    drawn = part.cell("t").prompts
    assert drawn.shape == (50, 100)
    assert 0.95 * bound < drawn.abs().max() <= bound
    with pytest.raises(BadCall, match="at least 1, got 0"):
        PromptTokens({}, count=0)


def test_prompt_dropout_is_for_training(vit: Backbone) -> None:
    host, x = Host(vit), images(vit)
    host.add(adapter(vit, {"p": PromptTokens.on(vit, ONE, count=4, dropout=0.5)}), "a")
    with torch.no_grad():
        quiet = host(x, adapter="a")
        assert torch.equal(quiet, host(x, adapter="a"))
        host.train()
        assert not torch.allclose(host(x, adapter="a"), host(x, adapter="a"))
        host.eval()


# Tuned copies


def test_a_copy_is_trained_and_the_original_is_not(either: Backbone) -> None:
    host, x = Host(either), images(either)
    made = adapter(either, {"t": Tuned.on(either, ONE, targets=("*.norm1", "*.fc1", "norm"))}, awake=False)
    host.add(made, "a")
    before = either.digest()
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (host(x, adapter="a") - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert either.digest() == before
    site = either.sites["norm"]
    assert not torch.equal(made.parts["t"].cell("norm").weight, either.network.get_submodule(site.path).weight)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.ConvTranspose2d(6, 6, 2, 2),
        nn.GroupNorm(2, 6),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("own", [("weight", "bias"), ("bias",), ("weight",)], ids="-".join)
def test_any_layer_can_be_copied(layer: nn.Module, own: tuple[str, ...]) -> None:
    site = Site("s", "conv" if "Conv" in type(layer).__name__ else "linear", 0, 6, 6, "s", "s")
    part = Tuned({"s": (6, 6)}, tensors={"s": {n: list(getattr(layer, n).shape) for n in own}})
    with torch.no_grad():
        for n in own:
            getattr(part.cell("s"), n).copy_(getattr(layer, n))
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear | nn.LayerNorm) else torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        assert torch.equal(part.act((site,), layer, x), layer(x))
        wake(part, size=0.3)
        changed = copy.deepcopy(layer)
        for n in own:
            getattr(changed, n).copy_(getattr(part.cell("s"), n))
        assert torch.equal(part.act((site,), layer, x), changed(x))
        assert torch.equal(part.fold((site,), layer)(x), changed(x))
        assert not torch.equal(changed(x), layer(x))


def test_rows_of_a_layer_are_not_copied_twice(vit: Backbone) -> None:
    part = Tuned.on(vit, ONE, targets="blocks.0.attn.*")
    assert set(part.sites) == {"blocks.0.attn.qkv", "blocks.0.attn.proj"}


@pytest.mark.parametrize("tensors", [{}, {"s": {}}, {"other": {"weight": [6]}}], ids=str)
def test_copies_of_nothing(tensors: dict) -> None:
    with pytest.raises(BadCall, match="at least one tensor for each"):
        Tuned({"s": (6, 6)}, tensors=tensors)


# Parts written elsewhere


def test_a_part_of_ones_own_acts_in_a_host(either: Backbone) -> None:
    """Two methods and a constructor: nothing else is needed to try an idea."""
    host, x = Host(either), images(either)
    made = acting(either, [n for n in either.sites if n.endswith(".mlp")], lambda site, y: y * (2 + site.stage))
    host.add(made, "a")
    twin = BACKBONES["vit" if either.family == "vit" else "swin"]()
    with torch.no_grad():
        for site in either.sites.values():
            if site.name.endswith(".mlp"):
                fc2 = twin.network.get_submodule(site.path).fc2
                fc2.weight *= 2 + site.stage
                fc2.bias *= 2 + site.stage
        close("host", host(x, adapter="a"), made.readouts[0](twin(x), x))


def test_heads_ask_for_a_map_that_is_there(swin: Backbone) -> None:
    assert LinearHead.on(swin, ONE, level=0).linear.in_channels == 24
    assert LinearHead.on(swin, ONE).linear.in_channels == 48
    with pytest.raises(BadCall) as refused:
        LinearHead.on(swin, ONE, level=2)
    says(refused.value, "2 feature maps", "level 2")
