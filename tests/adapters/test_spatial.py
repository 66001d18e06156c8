"""Spatial adapters against independent statements of their three forms, their counts, statistics and files; heads on volumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.blocks import UnetResBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional

from medgraft.adapters import Adapter, Host, LinearHead, LoRA, SpatialAdapter, Tuned, store
from medgraft.adapters.spatial import parts_of_authors
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.adapters.verify import verify
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadAdapter, BadCall, BadData, MedgraftError, UnknownName
from tests.helpers import LABELS, ONE, THREE, adapter, close, images, same_bits, says, wake

SITES = {"embedding": (48, 48)}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_number_of_parameters() -> None:
    """The paper states 209.6 K for its adapter, which is SwinUNETR's decoder1; its own description gives 186.9 K."""
    assert count(SpatialAdapter(SITES, "paper")) == 186_912
    assert count(UnetrUpBlock(3, 48, 48, 3, 2, "instance", res_block=True)) == 209_664
    assert count(SpatialAdapter(SITES, "code2023")) == 124_416
    assert count(SpatialAdapter(SITES, "residual")) == 124_416
    assert count(LinearHead({}, 48, 1, dims=3)) == 49


def test_tuning_decoder1_is_the_last_block_that_the_paper_counts(swin_unetr: Backbone) -> None:
    """At 12 channels here; see above for 48."""
    last = Tuned.on(swin_unetr, ONE, targets="decoder1.*")
    assert count(last) == count(UnetrUpBlock(3, 12, 12, 3, 2, "instance", res_block=True)) == 13_104
    host = Host(swin_unetr)
    host.add(adapter(swin_unetr, {"last": last}), "a")
    assert host.cut("a") == swin_unetr.depth - 1


# The three forms


def act(part: SpatialAdapter, x: Tensor) -> Tensor:
    from medgraft.backbones import Site

    site = Site("embedding", "embedding", 0, x.shape[1], x.shape[1], "embedding", "embedding")
    return part.act((site,), nn.Identity(), x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 5, 4, 7)


def test_the_form_of_the_paper(x: Tensor) -> None:
    part = wake(SpatialAdapter({"embedding": (6, 6)}, "paper"), size=0.3)
    stack = part.cell("embedding")
    norms = [nn.BatchNorm3d(6) for _ in range(3)]
    for mine, theirs in zip(stack.norms, norms, strict=True):
        theirs.load_state_dict(mine.state_dict(), strict=False)
    leaky = nn.LeakyReLU(0.01)
    for mode in (True, False):
        part.train(mode)
        y = x
        for i, (conv, norm) in enumerate(zip(stack.convs, norms, strict=True)):
            y = norm.train(mode)(conv(y))
            y = leaky(y) if i < 2 else leaky(y + x)
        close("paper", act(part, x).detach(), y.detach())
    for mine, theirs in zip(stack.norms, norms, strict=True):
        close("running mean", mine.running_mean, theirs.running_mean)
        close("running variance", mine.running_var, theirs.running_var)


def test_the_form_of_2023_is_monais_block(x: Tensor) -> None:
    part, block = SpatialAdapter({"embedding": (6, 6)}, "code2023"), UnetResBlock(3, 6, 6, 3, 1, "instance")
    convs = part.cell("embedding").convs
    block.load_state_dict({f"conv{i + 1}.conv.weight": convs[i].weight for i in range(2)})
    assert torch.equal(act(part, x), block(x))


def test_the_residual_form(x: Tensor) -> None:
    part = SpatialAdapter({"embedding": (6, 6)})
    assert torch.equal(act(part, x), x)
    assert part.silent
    one, two = wake(part).cell("embedding").convs
    close("residual", act(part, x).detach(), (x + two(torch.relu(one(x)))).detach())


# Batch norm: the adapter's own statistics


def test_statistics_are_learnt_in_training_used_in_evaluation_and_travel(meshnet: Backbone, tmp_path: Path) -> None:
    host, v = Host(meshnet), images(meshnet, 3)
    made = adapter(meshnet, {"s": SpatialAdapter.on(meshnet, ONE, form="paper")}, awake=False)
    host.add(made, "a")
    before, frozen = made.tensors()["s.embedding.norms.0.running_mean"].clone(), meshnet.digest()
    host.train()
    for _ in range(3):
        host(v, adapter="a")
    host.eval()
    assert not torch.equal(made.tensors()["s.embedding.norms.0.running_mean"], before)
    assert meshnet.digest() == frozen
    kept = {name: t.clone() for name, t in made.tensors().items()}
    with torch.no_grad():
        want = host(v, adapter="a")
        close("a row alone", host(v[:1], adapter="a"), want[:1])
    assert all(torch.equal(t, made.tensors()[name]) for name, t in kept.items()), "evaluation changed a statistic"
    assert not any("num_batches" in name for name in kept)
    back = read_adapter(save_adapter(made, tmp_path / "a", dtype="float32", backbone=meshnet))
    host.add(back, "b")
    with torch.no_grad():
        assert torch.equal(host(v, adapter="b"), want)


# On backbones


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_variance_beyond_half_precision_is_saved(meshnet: Backbone, tmp_path: Path, dtype: str) -> None:
    made = adapter(meshnet, {"spatial": SpatialAdapter.on(meshnet, ONE, form="paper")}, awake=False)
    tensors = made.tensors()
    measured = [name for name in tensors if name.endswith(("running_mean", "running_var"))]
    for name in measured:
        tensors[name].fill_(123_456.7)
    save_adapter(made, tmp_path / "it", dtype=dtype, backbone=meshnet)
    again = read_adapter(tmp_path / "it").tensors()
    assert measured
    for name in measured:
        assert torch.equal(again[name], tensors[name])


def test_early_files_keep_their_statistics_in_half_precision(
    meshnet: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read as ever, and only there: a weight of another type than the file's is refused."""
    made = adapter(meshnet, {"spatial": SpatialAdapter.on(meshnet, ONE, form="paper")})
    with monkeypatch.context() as early:
        early.setattr(store, "STATISTICS", ("no tensor's name",))
        save_adapter(made, tmp_path / "early", dtype="float16", backbone=meshnet)
    read = read_adapter(tmp_path / "early")
    for name, t in made.tensors().items():
        assert torch.equal(read.tensors()[name], t.half().float()), name
    assert not [v for v in verify(tmp_path / "early", backbone=meshnet) if v.ok is False]
    save_adapter(made, tmp_path / "wide", dtype="float32")
    record = json.loads((tmp_path / "wide" / "adapter.json").read_text(encoding="utf-8"))
    record["dtype"] = "float16"
    record["sha256"] = store.canonical(record)
    (tmp_path / "wide" / "adapter.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(BadAdapter) as refused:
        read_adapter(tmp_path / "wide")
    says(refused.value, "torch.float32", "torch.float16", "described")


def test_it_begins_behind_the_last_stage(meshnet: Backbone, swin_unetr: Backbone) -> None:
    """So that several adapters share the whole frozen network."""
    for on in (meshnet, swin_unetr):
        host = Host(on)
        host.add(adapter(on, {"s": SpatialAdapter.on(on, ONE)}), "a")
        assert host.cut("a") == on.depth


def test_it_runs_on_a_flat_embedding(sam: Backbone) -> None:
    made = adapter(sam, {"s": SpatialAdapter.on(sam, ONE)})
    assert made.parts["s"].dims == 2
    host = Host(sam)
    host.add(made, "a")
    with torch.no_grad():
        assert host(images(sam), adapter="a").shape[:2] == (2, 1)


def test_4_windows_of_a_volume_with_different_adapters(swin_unetr: Backbone) -> None:
    """Low-rank rows share one call through the windows; others are grouped by adapter; one has none."""
    on, host = swin_unetr, Host(swin_unetr)
    for k, targets in enumerate(("layers.0.blocks.1.attn.[qv]", "layers.[13].*.fc1")):
        host.add(adapter(on, {"l": LoRA.on(on, ONE, rank=k + 2, targets=targets)}, seed=k), f"lora{k}")
    host.add(adapter(on, {"s": SpatialAdapter.on(on, THREE, form="paper")}, task=THREE), "spatial")
    x = images(on, 3)
    with torch.no_grad():
        for names in (["lora0", None, "lora1"], ["lora1", "spatial", None]):
            rows = host(x, adapter=names)
            for i, name in enumerate(names):
                close(f"{name} in {names}", rows[i], host(x[i : i + 1], adapter=name))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, v: SpatialAdapter.on(m, ONE, form="2023"), UnknownName, ("2023", "code2023")),
        (lambda m, v: SpatialAdapter.on(v, ONE), UnknownName, ("embedding",)),
        (lambda m, v: SpatialAdapter.on(m, ONE, targets="layers.0"), UnknownName, ("conv", "embedding")),
        (
            lambda m, v: Host(m).add(adapter(m, {"s": SpatialAdapter({"embedding": (5, 5)}, dims=2)}), "a"),
            BadCall,
            ("2D", "3D"),
        ),
        (lambda m, v: LinearHead({}, 5, 1).check(m), BadCall, ("linear_head", "2D", "3D")),
    ],
)
def test_bad_calls(
    meshnet: Backbone, vit: Backbone, make: Callable, error: type[MedgraftError], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as refused:
        make(meshnet, vit)
    says(refused.value, *words)


# The authors' files


def authors(width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    kernels = {f"classifier.0.adapter.conv{i}.conv.weight": (width, width, 3, 3, 3) for i in (1, 2)}
    shapes = kernels | {"classifier.1.linear.weight": (1, width, 1, 1, 1), "classifier.1.linear.bias": (1,)}
    return {f"module.{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}


def test_a_checkpoint_in_the_authors_names(meshnet: Backbone) -> None:
    tensors = authors(5)
    made = Adapter.of(meshnet, ONE, parts_of_authors(tensors, meshnet, ONE))
    host, v = Host(meshnet), images(meshnet)
    host.add(made, "a")
    block = UnetResBlock(3, 5, 5, 3, 1, "instance")
    block.load_state_dict(
        {f"conv{i}.conv.weight": tensors[f"module.classifier.0.adapter.conv{i}.conv.weight"] for i in (1, 2)}
    )
    weight, bias = (tensors[f"module.classifier.1.linear.{name}"] for name in ("weight", "bias"))
    with torch.no_grad():
        assert torch.equal(host(v, adapter="a"), functional.conv3d(block(meshnet(v).maps[0]), weight, bias))


@pytest.mark.parametrize("what", ["missing", "width", "classes"])
def test_a_checkpoint_that_does_not_fit(meshnet: Backbone, what: str) -> None:
    tensors = authors(48 if what == "width" else 5)
    if what == "missing":
        del tensors["module.classifier.0.adapter.conv2.conv.weight"]
    words = {
        "missing": ("conv2", "missing"),
        "width": ("conv1", "(5, 5, 3, 3, 3)", "(48, 48, 3, 3, 3)"),
        "classes": ("linear.weight", "(4, 5, 1, 1, 1)", "(1, 5, 1, 1, 1)"),
    }
    with pytest.raises(BadData) as refused:
        parts_of_authors(tensors, meshnet, THREE if what == "classes" else ONE)
    says(refused.value, *words[what])


# Linear heads on volumes


def test_a_linear_head_at_every_voxel(meshnet: Backbone, volume_unet: Backbone) -> None:
    for on in (meshnet, volume_unet):
        head, v = wake(LinearHead.on(on, THREE), size=0.5), images(on)
        with torch.no_grad():
            f = on(v)
            by_voxel = functional.linear(f.maps[0].movedim(1, -1), head.linear.weight.flatten(1), head.linear.bias)
            want = functional.interpolate(by_voxel.movedim(-1, 1), v.shape[2:], mode="trilinear")
            close("logits", head(f, v), want)


def test_class_rows_start_where_the_pretrained_head_stands(meshnet: Backbone) -> None:
    host, v = Host(meshnet), images(meshnet)
    host.add(Adapter.of(meshnet, THREE, {"h": LinearHead.on(meshnet, THREE, class_rows=(2, 0, 1, 1))}), "a")
    with torch.no_grad():
        want = meshnet(v).extra["logits"][:, [2, 0, 1, 1]]
        close("logits", host(v, adapter="a"), want)


def test_the_pretrained_logits_see_what_the_adapter_does(meshnet: Backbone) -> None:
    """`extra["logits"]` is what the frozen head says of the map that is read out."""
    host, v = Host(meshnet), images(meshnet)
    spatial = wake(SpatialAdapter.on(meshnet, ONE))
    seen = {}

    class Keeps(LinearHead):
        def read(self, features, image):
            seen.update(features.extra, map=features.maps[0])
            return super().read(features, image)

    host.add(Adapter.of(meshnet, ONE, {"s": spatial, "h": Keeps({}, 5, 1, dims=3)}), "a")
    with torch.no_grad():
        host(v, adapter="a")
        assert not same_bits(seen["logits"], meshnet(v).extra["logits"])
        close("logits", seen["logits"], meshnet.network.layers[9](seen["map"]))


@pytest.mark.parametrize(
    ("id", "rows", "words"),
    [
        ("random:meshnet:model5_gw_ae", (0,), ("4 rows", "0 to 2", "[0]")),
        ("random:meshnet:model5_gw_ae", (0, 1, 2, 3), ("0 to 2", "[0, 1, 2, 3]")),
        ("random:monai:unet?widths=4-8-8", (0, 1, 0, 1), ("pretrained head", "has none")),
        ("random:hf:vit", (0, 1, 0, 1), ("pretrained head", "has none")),
    ],
)
def test_class_rows_that_are_not_there(id: str, rows: tuple[int, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        LinearHead.on(load_backbone(id), THREE, class_rows=rows)
    says(refused.value, *words)


def test_a_classifier_reads_the_mean_of_the_map(meshnet: Backbone) -> None:
    from medgraft.adapters import ClassifierHead

    host = Host(meshnet)
    host.add(adapter(meshnet, {"c": ClassifierHead.on(meshnet, LABELS)}, task=LABELS), "a")
    assert host(images(meshnet), adapter="a").shape == (2, 3)
