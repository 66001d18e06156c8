"""Fusion: what the neck reads, how the second encoder sees the image, and that it is the right one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from medgraft.adapters import Adapter, ClassPrompts, Fusion, Host
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.backbones.sam import Sam
from medgraft.errors import BadCall, WrongBackbone
from tests.helpers import ONE, backbone, close, images, says, wake

SECOND = "random:hf:vit"


def fused(sam: Sam, encoder: str | Backbone = SECOND) -> Fusion:
    torch.manual_seed(0)
    return Fusion.on(sam, ONE, encoder=encoder)


def adapter_of(sam: Sam, fusion: Fusion) -> Adapter:
    torch.manual_seed(0)
    return Adapter.of(sam, ONE, {"fusion": fusion, "head": ClassPrompts.on(sam, ONE)})


def test_the_neck_reads_sam_before_its_neck_and_then_the_second_encoder(sam: Sam) -> None:
    fusion, x = wake(fused(sam)), images(sam)
    with torch.no_grad():
        features = sam(x)
        first = features.extra["encoder"]
        second = fusion.second(fusion.prepared(x)).maps[-1]
        h = torch.cat([first, functional.interpolate(second, first.shape[-2:], mode="bilinear")], 1)
        for conv, norm in ((fusion.neck[0], fusion.neck[1]), (fusion.neck[2], fusion.neck[3])):
            h = functional.conv2d(h, conv.weight, padding=conv.kernel_size[0] // 2)
            mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
            h = (h - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        close("embedding", fusion.read(features, x).maps[-1], h)
    assert [type(m).__name__ for m in fusion.neck] == ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert fusion.neck[0].bias is None


def test_the_second_encoder_sees_the_same_picture_in_its_own_normalisation(sam: Sam) -> None:
    fusion = fused(sam)
    picture = torch.rand(2, 3, 128, 128)
    one, two = sam.spec, fusion.second.spec
    mean, std = (torch.tensor(v)[:, None, None] for v in (one.mean, one.std))
    x = fusion.prepared((picture - mean) / std)
    mean, std = (torch.tensor(v)[:, None, None] for v in (two.mean, two.std))
    want = (picture - mean) / std
    side = 128 // sam.spec.divisor * two.strides[-1]
    if x.shape[-1] != 128:
        want = functional.interpolate(want, (side, side), mode="bilinear", antialias=True)
    close("normalised", x, want)
    assert fusion.seen(x).shape[-2:] == sam(images(sam)).maps[0].shape[-2:]


def test_maps_that_the_state_carries_are_taken(sam: Sam) -> None:
    fusion, x = wake(fused(sam)), images(sam)
    host = Host(sam)
    host.add(adapter_of(sam, fusion), "it")
    with torch.no_grad():
        state = sam.run(x, stop=sam.depth)
        seen = fusion.seen(fusion.prepared(x))
        want = host(x, "it")
        close("carried", host.resume(state.carrying(second=seen), x, "it"), want)
        other = host.resume(state.carrying(second=seen + 1), x, "it")
    assert (other - want).norm() > 1e-3 * want.norm()


def test_the_encoder_is_not_in_the_file_and_comes_back_by_its_id(sam: Sam, tmp_path: Path) -> None:
    made = adapter_of(sam, fused(sam))
    saved = save_adapter(made, tmp_path / "a", dtype="float32", backbone=sam)
    size = (saved / "adapter.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in made.parameters()) + 8192
    back, x = read_adapter(saved), images(sam)
    hosts = [Host(sam), Host(sam)]
    for host, one in zip(hosts, (made, back), strict=True):
        host.add(one, "it")
    with torch.no_grad():
        assert torch.equal(hosts[0](x, "it"), hosts[1](x, "it"))


def test_the_frozen_encoder_is_shared_by_copies_and_trained_by_none(sam: Sam) -> None:
    fusion = fused(sam)
    assert copy.deepcopy(fusion).second is fusion.second
    before = fusion.second.digest()
    assert not any("second" in name for name in fusion.state_dict())
    host = Host(sam)
    host.add(adapter_of(sam, fusion), "it")
    host(images(sam), "it").sum().backward()
    assert all(p.grad is None for p in fusion.second.parameters())
    host.to(torch.float64).to(torch.float32)
    assert fusion.second.digest() == before


def test_an_encoder_of_other_weights_is_refused(sam: Sam) -> None:
    fusion = fused(sam)
    with pytest.raises(WrongBackbone) as refused:
        fusion.use(load_backbone(f"{SECOND}?seed=1"))
    says(refused.value, SECOND, "fingerprint")
    config = {**fusion.config, "fingerprint": "0" * 64}
    with pytest.raises(WrongBackbone):
        Host(sam).add(adapter_of(sam, Fusion({}, **config)), "it")


def test_an_encoder_that_cannot_be_had_is_asked_for(sam: Sam) -> None:
    on_disk = backbone("vit")  # made in memory: no id loads it
    fusion = fused(sam, on_disk)
    back = Fusion({}, **fusion.config)
    with pytest.raises(BadCall) as refused:
        Host(sam).add(adapter_of(sam, back), "it")
    says(refused.value, "tiny_vit", "Fusion.use")
    back.use(on_disk)
    Host(sam).add(adapter_of(sam, back), "it")


def test_backbones_that_do_not_fit_are_refused(sam: Sam, vit: Backbone, universeg: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        Fusion.on(vit, ONE, encoder=SECOND)
    says(refused.value, "no promptable decoder")
    with pytest.raises(BadCall) as refused:
        Fusion.on(sam, ONE, encoder=universeg)
    says(refused.value, "channels")
    fusion = fused(sam)
    for change, words in (({"stride": 8}, ("patches of 8",)), ({"widths": [8, 32, 32]}, ("8 channels",))):
        with pytest.raises(BadCall) as refused:
            Fusion({}, **{**fusion.config, **change}).check(sam)
        says(refused.value, *words)


def test_the_authors_neck_loads(sam: Sam) -> None:
    fusion = fused(sam)
    state = {f"model.fusion_neck.{n}": t + 1 for n, t in fusion.neck.state_dict().items()}
    fusion.load_authors({**state, "model.other": torch.zeros(1)})
    assert torch.equal(fusion.neck[3].bias, torch.ones(32))
    with pytest.raises(BadCall) as refused:
        fusion.load_authors({"model.fusion_neck.0.weight": torch.zeros(1)})
    says(refused.value, "fusion neck")


def test_a_row_of_features_without_maps_of_its_own_is_not_changed(sam: Sam) -> None:
    fusion, x = fused(sam), images(sam)
    features = sam(x)
    before = features.maps[-1].clone()
    changed = fusion.read(replace(features), x)
    assert torch.equal(features.maps[-1], before)
    assert changed.extra.keys() == features.extra.keys()
