"""Parts on convolutions of every geometry: the update is a convolution of the same kind, folds exactly, and nobody else sees it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from medgraft.adapters import ConvLoRA, Host, Part, ScaleShift, Tuned
from medgraft.adapters.convolution import convolve
from medgraft.adapters.soup import soup
from medgraft.backbones import Backbone, Site
from medgraft.errors import BadCall, MedgraftError
from tests.helpers import ONE, adapter, close, images, off_by, says, wake

LAYERS: dict[str, nn.Module] = {
    "1d": nn.Conv1d(4, 6, 3, padding=1),
    "2d": nn.Conv2d(4, 6, 3),
    "3d": nn.Conv3d(4, 6, 3, padding=1, bias=False),
    "stride 2": nn.Conv3d(4, 6, 3, stride=2, padding=1),
    "dilation 2": nn.Conv3d(4, 6, 3, padding=2, dilation=2),
    "reflect": nn.Conv3d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular 2d": nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular"),
    "same": nn.Conv3d(4, 6, (3, 1, 4), padding="same"),
    "1x1x1": nn.Conv3d(4, 6, 1),
    "1x1x3": nn.Conv3d(4, 6, (1, 1, 3), stride=(1, 2, 1)),
    "groups": nn.Conv3d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "transposed 1d": nn.ConvTranspose1d(4, 6, 2, 2),
    "transposed 2d": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed 3d": nn.ConvTranspose3d(4, 6, 2, 2, bias=False),
    "transposed groups": nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
}


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A frozen convolution, checked for being as it was."""
    made = LAYERS[request.param].requires_grad_(False)
    before = {name: t.clone() for name, t in made.state_dict().items()}
    yield made
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())


def inputs(layer: nn.Module) -> Tensor:
    return torch.randn(2, 4, *(7, 8, 6)[: layer.weight.ndim - 2])


SITE = Site("c", "conv", 0, 4, 6, "c", "c")


def lora_of(layer: nn.Module, rank: int = 3, seed: int = 0) -> ConvLoRA:
    """An awake part for one layer."""
    shape = {"kernel": list(layer.kernel_size), "groups": layer.groups, "transposed": layer.transposed}
    return wake(ConvLoRA({"c": (4, layer.out_channels)}, {"c": shape}, rank, 2.0), seed, 0.3)


def test_convolve_is_the_layers_own_function(layer: nn.Module) -> None:
    x = inputs(layer)
    assert torch.equal(convolve(layer, layer.weight, layer.bias, x), layer(x))


def test_the_output_size_of_a_transposed_convolution() -> None:
    layer, x = LAYERS["transposed 2d"], torch.randn(2, 4, 7, 8)
    part = lora_of(layer)
    for size in ((13, 15), (14, 16)):
        assert torch.equal(convolve(layer, layer.weight, layer.bias, x, size), layer(x, size))
        assert part.act((SITE,), layer, x, size).shape[2:] == size


def test_folded_it_is_the_same_function(layer: nn.Module) -> None:
    x, part = inputs(layer), lora_of(layer)
    folded = part.fold((SITE,), layer)
    with torch.no_grad():
        got = part.act((SITE,), layer, x)
        assert off_by(got, folded(x)) <= 1e-5
        assert off_by(got, layer(x)) > 1e-2, "the part does nothing here"
    assert type(folded) is type(layer)
    assert not any(p.requires_grad for p in folded.parameters())


def test_the_update_is_the_kernel_that_the_equation_says(layer: nn.Module) -> None:
    part = lora_of(layer)
    a, b, got = part.cell("c").A.double(), part.cell("c").B.double(), part.kernel("c")
    assert got.shape == layer.weight.shape
    g, r = layer.groups, 3
    out, own = layer.out_channels // g, 4 // g
    want = torch.zeros_like(got)
    for j in range(g):
        for o in range(out):
            for i in range(own):
                for q in range(r):
                    if layer.transposed:
                        want[j * own + i, o] += 2 / 3 * b[j * out + o, q] * a[j * own + i, q]
                    else:
                        want[j * out + o, i] += 2 / 3 * b[j * out + o, q] * a[j * r + q, i]
    close("kernel", got.detach(), want.detach())


def test_a_fresh_part_is_silent(layer: nn.Module) -> None:
    shape = lora_of(layer).layers
    fresh, x = ConvLoRA({"c": (4, layer.out_channels)}, shape), inputs(layer)
    assert torch.equal(fresh.act((SITE,), layer, x), layer(x))
    assert fresh.cell("c").A.abs().sum() > 0


def test_both_factors_learn(layer: nn.Module) -> None:
    part = lora_of(layer)
    part.act((SITE,), layer, inputs(layer)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_a_scaled_and_shifted_convolution_folds(layer: nn.Module) -> None:
    part, x = wake(ScaleShift({"c": (4, layer.out_channels)}), size=0.5), inputs(layer)
    with torch.no_grad():
        close("folded", part.fold((SITE,), layer)(x), part.act((SITE,), layer, x))


def test_a_tuned_convolution(layer: nn.Module) -> None:
    own = {"c": {name: list(t.shape) for name, t in layer.named_parameters()}}
    part, x = wake(Tuned({"c": (4, layer.out_channels)}, own), size=0.5), inputs(layer)
    with torch.no_grad():
        assert torch.equal(part.act((SITE,), layer, x), part.fold((SITE,), layer)(x))


def test_the_soup_is_the_mean_of_the_kernels(layer: nn.Module) -> None:
    """Of ranks and scales that differ; the mean of the factors would be something else."""
    one, two = lora_of(layer, 3, 0), lora_of(layer, 2, 1)
    mean = ConvLoRA.soup([one, two], [0.25, 0.75])
    want = 0.25 * one.kernel("c") + 0.75 * two.kernel("c")
    close("kernel", mean.kernel("c").detach(), want.detach(), 1e-6)
    assert mean.config["rank"] == 5
    x = inputs(layer)
    with torch.no_grad():
        by_kernel = convolve(layer, (layer.weight.double() + want).float(), layer.bias, x)
        close("function", mean.act((SITE,), layer, x), by_kernel)


def test_a_soup_of_adapters(volume_unet: Backbone) -> None:
    members = [
        adapter(volume_unet, {"c": ConvLoRA.on(volume_unet, ONE, targets="up.*", rank=k)}, seed=k) for k in (1, 2)
    ]
    host = Host(volume_unet)
    host.add(soup(members).adapter, "soup")
    assert host(images(volume_unet), adapter="soup").shape == (2, 1, 8, 8, 8)


# On a backbone


def parts(on: Backbone) -> dict[str, dict[str, Part]]:
    return {
        "lora": {"p": ConvLoRA.on(on, ONE, targets="layers.*")},
        "tuned": {"p": Tuned.on(on, ONE, targets="layers.*")},
        "scaled": {"p": ScaleShift.on(on, ONE, targets="layers.*")},
        "two": {"p": ConvLoRA.on(on, ONE, targets="layers.[0-4]"), "q": Tuned.on(on, ONE, targets="layers.[5-8]")},
        "head": {},
    }


def test_3_threads_never_see_each_others_kernels(meshnet: Backbone) -> None:
    """A frozen convolution whose tensors were swapped for the length of a call would fail here."""
    host, x = Host(meshnet), images(meshnet)
    for k, (name, made) in enumerate(parts(meshnet).items()):
        host.add(adapter(meshnet, made, seed=k), name)
    names = [*host.adapters, None]
    with torch.no_grad():
        right = {name: host(x, adapter=name) for name in names}
    start = threading.Barrier(len(names))

    def work(k: int) -> int:
        start.wait(timeout=20)
        with torch.no_grad():
            return sum(off_by(host(x, adapter=names[k]), right[names[k]]) > 1e-6 for _ in range(60))

    pause = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            assert sum(pool.map(work, range(len(names)))) == 0
    finally:
        sys.setswitchinterval(pause)


def test_4_rows_with_different_adapters_on_convolutions(meshnet: Backbone) -> None:
    host = Host(meshnet)
    for k, (name, made) in enumerate(parts(meshnet).items()):
        host.add(adapter(meshnet, made, seed=k), name)
    names = [*host.adapters, None, *reversed(host.adapters)]
    x = images(meshnet, len(names))
    with torch.no_grad():
        rows = host(x, adapter=names)
        every = host(x[:1], adapters=list(host.adapters))
        for i, name in enumerate(names):
            close(f"row {i}, {name}", rows[i], host(x[i : i + 1], adapter=name))
        for name, out in zip(host.adapters, every, strict=True):
            close(name, out, host(x[:1], adapter=name))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda on: ConvLoRA.on(on, ONE, targets="layers.*", rank=0), ("rank >= 1", "0")),
        (lambda on: ConvLoRA.on(on, ONE, targets="embedding"), ("embedding", "conv")),
        (lambda on: ConvLoRA({"a": (1, 1)}, {}), ("kernel", "each of its sites")),
    ],
)
def test_bad_calls(meshnet: Backbone, make, words: tuple[str, ...]) -> None:
    with pytest.raises(MedgraftError) as refused:
        make(meshnet)
    says(refused.value, *words)


def test_a_convolution_of_another_kernel_is_refused(meshnet: Backbone) -> None:
    made = ConvLoRA({"layers.3": (5, 5)}, {"layers.3": {"kernel": [1, 1, 1], "groups": 1, "transposed": False}})
    host = Host(meshnet)
    with pytest.raises(BadCall) as refused:
        host.add(adapter(meshnet, {"p": made}), "a")
    says(refused.value, "layers.3", "1x1x1", "3x3x3")
    assert not host.adapters


def test_it_stands_directly_on_the_frozen_layer(meshnet: Backbone) -> None:
    made = {"s": ScaleShift.on(meshnet, ONE, targets="layers.1"), "p": ConvLoRA.on(meshnet, ONE, targets="layers.1")}
    with pytest.raises(BadCall) as refused:
        Host(meshnet).add(adapter(meshnet, made), "a")
    says(refused.value, "layers.1", "put it first")
