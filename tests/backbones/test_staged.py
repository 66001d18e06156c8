"""Stem, stages and readout against the stock forward of timm and transformers: equal to the bit, from every stage."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from medgraft.backbones import Backbone, Features, State, load_backbone
from medgraft.backbones.registry import starter_vit
from medgraft.errors import BadCall
from tests.helpers import BACKBONES, close, images, same_bits, says, tiny_eva, tiny_swin, tiny_vit

FAMILIES = {
    "vit": tiny_vit,
    "swin": tiny_swin,
    "eva": tiny_eva,
    "starter": starter_vit,
    "vit_tiny": "vit_tiny_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "registers": "vit_wee_patch16_reg1_gap_256",
    "hf_vit": "hf:vit",
    "dinov2": "hf:dinov2",
}
IDS = {"starter": "medgraft:starter-vit", "hf_vit": "hf:vit", "dinov2": "hf:dinov2"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[Backbone, nn.Module]:
    """A backbone, and the stock network with the same tensors and no ports, loaded by name."""
    import timm

    name = request.param
    made = FAMILIES[name]
    if name in BACKBONES:
        on = request.getfixturevalue(name)
    else:
        on = load_backbone(f"random:{IDS.get(name, f'timm:{made}')}", image_size=64)
    if on.family == "hf_vit":
        stock = type(on.network)(on.network.config, **({"add_pooling_layer": False} if name == "hf_vit" else {}))
    elif isinstance(made, str):
        sized = {"strict_img_size": False} if on.family == "swin" else {"dynamic_img_size": True}
        stock = timm.create_model(made, num_classes=0, **sized)
    else:
        stock = made()
    missing = stock.load_state_dict(on.network.state_dict(), strict=True)
    assert not missing.missing_keys
    return on, stock.eval()


def stock_output(stock: nn.Module, x: Tensor) -> Tensor:
    """What the authors' forward gives: the sequence (B, T, C), or (B, h, w, C) for Swin."""
    with torch.no_grad():
        if hasattr(stock, "forward_features"):
            return stock.forward_features(x)
        options = {"interpolate_pos_encoding": True} if stock.config.model_type == "vit" else {}
        return stock(x, **options).last_hidden_state


def whole(features: Features) -> Tensor:
    return features.maps[-1].permute(0, 2, 3, 1) if features.tokens is None else features.tokens


SHAPES = [(64, 64), (96, 160), (32, 64), (128, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_stock_forward_to_the_bit(pair: tuple[Backbone, nn.Module], shape: tuple[int, int]) -> None:
    on, stock = pair
    x = torch.randn(2, 3, *shape)
    with torch.no_grad():
        assert torch.equal(whole(on(x)), stock_output(stock, x))


def test_it_is_the_stock_forward_with_gradients_and_one_channel(pair: tuple[Backbone, nn.Module]) -> None:
    on, stock = pair
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    whole(on(x)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(whole(on(x)), stock_output(stock, x.repeat(1, 3, 1, 1)))


def test_it_resumes_from_any_stage(pair: tuple[Backbone, nn.Module]) -> None:
    on, _ = pair
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = on.run(x)
        for stop in range(0, on.depth + 1, 1 if on.depth < 8 else 4):
            state = on.run(x, stop=stop)
            assert isinstance(state, State)
            assert state.stage == stop
            assert same_bits(on.run(state), want)
            assert same_bits(on.run(state, start=stop), want)
        state = on.run(x, stop=0)
        for stop in range(1, on.depth + 1):
            state = on.run(state, start=stop - 1, stop=stop)
        assert same_bits(on.run(state), want)


def test_features_have_the_shapes_that_the_spec_names(pair: tuple[Backbone, nn.Module]) -> None:
    on, _ = pair
    with torch.no_grad():
        f = on(torch.randn(2, 3, 64, 128))
    assert [m.shape[1] for m in f.maps] == list(on.spec.widths)
    assert f.strides == list(on.spec.strides)
    assert [tuple(m.shape[2:]) for m in f.maps] == [(64 // s, 128 // s) for s in on.spec.strides]
    assert f.pooled.shape == (2, on.spec.width)
    assert f.raw.shape == f.maps[-1].shape
    normed = any(True for _ in on.network.get_submodule(on.sites["norm"].path).parameters())
    assert torch.equal(f.raw, f.maps[-1]) != normed
    if f.tokens is not None:
        grid = 64 // on.spec.divisor * 128 // on.spec.divisor
        assert torch.equal(f.tokens[:, -grid:].transpose(1, 2).reshape(f.maps[-1].shape), f.maps[-1])


def test_a_state_is_batch_first_throughout(pair: tuple[Backbone, nn.Module]) -> None:
    """Rows taken at any stage give the rows of the result; moved to another type and back, nothing changes."""
    on, _ = pair
    x, index = torch.randn(3, 3, 64, 64), torch.tensor([2, 0])
    with torch.no_grad():
        want = on(x)
        for stop in {0, 1, on.depth // 2, on.depth}:
            state = on.run(x, stop=stop)
            assert all(t.shape[0] == 3 for t in (state.x, *state.kept.values()))
            close("rows", on.run(state.rows(index)), want.rows(index))
            assert same_bits(on.run(state.map(lambda t: t.double().float().clone())), want)
            doubled = state.map(lambda t: torch.cat([t, t]))
            assert doubled.nbytes == 2 * state.nbytes


def test_the_function_does_not_depend_on_the_image_size_it_was_loaded_for() -> None:
    """One fingerprint, one function: what was trained at one size may be used at another."""
    for id in ("random:timm:swin_tiny_patch4_window7_224", "random:timm:vit_tiny_patch16_224", "random:hf:vit"):
        one, two = load_backbone(id, image_size=64), load_backbone(id, image_size=128)
        assert one.spec.fingerprint == two.spec.fingerprint
        assert one.digest() == two.digest()
        x = images(one)
        with torch.no_grad():
            assert same_bits(one(x), two(x)), id


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda on, x: on.run(on.run(x, stop=1), start=0), ("start at stage 0", "stands at stage 1", "start=1")),
        (lambda on, x: on.run(x, start=2), ("start at stage 2", "stands at stage 0")),
        (lambda on, x: on.run(on.run(x, stop=2), stop=1), ("stop after stage 1", "stands at 2")),
        (lambda on, x: on.run(x, stop=-1), ("-1",)),
        (lambda on, x: on.run(x, stop=99), ("99",)),
        (lambda on, x: on(x[..., :60]), ("divisible by", "60", "resize or pad")),
        (lambda on, x: on(x[:, :2]), ("(B, 3, H, W)", "(2, 2, 64, 64)")),
        (lambda on, x: on(x[:, :0]), ("(2, 0, 64, 64)",)),
        (lambda on, x: on(x[0]), ("(3, 64, 64)",)),
        (lambda on, x: on(x.to(torch.uint8)), ("floating-point", "uint8")),
        (lambda on, x: on(x.half()), ("float16", "float32", "x.to")),
        (lambda on, x: on("image.png"), ("str", "tensor")),
    ],
)
def test_a_bad_call_says_what_is_wrong(either: Backbone, call, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        call(either, images(either))
    says(refused.value, *words)


def test_it_is_frozen_and_stays_in_eval_mode(either: Backbone) -> None:
    either.train()
    assert not any(m.training for m in either.modules())
    assert not any(p.requires_grad for p in either.parameters())


def test_a_trainable_copy_leaves_the_original_alone(either: Backbone) -> None:
    before, x = either.digest(), images(either)
    twin = either.trainable_copy()
    assert twin.owner is not either.owner
    assert {port.owner for port in twin.modules() if hasattr(port, "site")} == {twin.owner}
    with torch.no_grad():
        assert same_bits(twin(x), either(x))
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).pooled.square().sum().backward()
    optimiser.step()
    assert either.digest() == before != twin.digest()
    assert not any(p.requires_grad or p.grad is not None for p in either.parameters())


def test_casting_a_copy_leaves_the_original_alone(either: Backbone) -> None:
    before = either.digest()
    half = copy.deepcopy(either).to(torch.bfloat16)
    assert either.digest() == before
    with torch.no_grad():
        f = half(images(either).bfloat16())
        close("half", f.maps[-1].float(), either(images(either)).maps[-1], 0.1)
    assert all(t.dtype == torch.bfloat16 for t in half.state_dict().values())


def test_its_picture_says_that_the_weights_are_random(vit: Backbone) -> None:
    assert "random weights" in repr(vit)
    assert vit.spec.fingerprint[:12] in repr(vit)
    assert vit.spec.title == "random:timm:tiny_vit (random weights)"
