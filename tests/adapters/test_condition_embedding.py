"""The condition embedding: the printed equations, the authors' form, sub-groups known, unknown and unsaid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from medgraft.adapters import Adapter, ConditionEmbedding, Host, MaskHead
from medgraft.backbones import Backbone, Features
from medgraft.backbones.prompts import Prompts
from medgraft.backbones.sam import Sam
from medgraft.errors import BadCall, UnknownName
from tests.helpers import ONE, close, images, says, wake

GROUPS = ("north", "south", "west")


def part(sam: Sam, **options: str) -> ConditionEmbedding:
    return wake(ConditionEmbedding.on(sam, ONE, groups=GROUPS, **options))


def told(*groups: int) -> Prompts:
    return Prompts(group=torch.tensor(groups))


def host_with(sam: Sam, it: ConditionEmbedding) -> Host:
    host = Host(sam)
    host.add(Adapter.of(sam, ONE, {"condition": it, "head": MaskHead.on(sam, ONE)}), "it")
    return host


def test_it_is_the_printed_block(sam: Sam) -> None:
    """Equations 1 to 4, spelt out for one image of the second sub-group."""
    it, x = part(sam), torch.randn(1, 32, 5, 6)
    with torch.no_grad():
        z = x
        for conv, cin in ((it.conv1, it.cin1), (it.conv2, it.cin2)):
            one_hot = functional.one_hot(torch.tensor(1), 3).float()
            w1, w2 = cin.mlp[0].weight, cin.mlp[2].weight
            w_gain, w_shift = cin.embed.weight.T.split(32)  # (C, m)
            gain = w2 @ (w1 @ (w_gain @ one_hot)).relu()
            shift = w2 @ (w1 @ (w_shift @ one_hot)).relu()
            y = functional.conv2d(z, conv.weight, padding=1)
            mean, std = y.mean((2, 3), keepdim=True), y.var((2, 3), correction=0, keepdim=True).sqrt()
            z = (gain[:, None, None] * (y - mean) / (std + 1e-5) + shift[:, None, None]).relu()
        features = features_with(sam, x, told(1))
        close("z", it.read(features, x).maps[-1], z)
    assert set(dict(it.named_parameters())) == {
        "conv1.weight", "conv2.weight", *(f"cin{i}.{n}.weight" for i in (1, 2) for n in ("embed", "mlp.0", "mlp.2")),
    }  # fmt: skip


def features_with(sam: Sam, embedding: torch.Tensor, prompts: Prompts | None) -> Features:
    return replace(sam(images(sam, embedding.shape[0])), maps=[embedding], prompts=prompts)


def test_the_authors_form_has_one_perceptron_for_both(sam: Sam) -> None:
    it, x = part(sam, form="code"), torch.randn(1, 32, 5, 6)
    with torch.no_grad():
        z = x
        for conv, cin in ((it.conv1, it.cin1), (it.conv2, it.cin2)):
            gain, shift = cin.mlp(cin.embed.weight[2:3]).chunk(2, 1)
            y = functional.conv2d(z, conv.weight, padding=1)
            mean, var = y.mean((2, 3), keepdim=True), y.var((2, 3), correction=0, keepdim=True)
            z = (gain[..., None, None] * (y - mean) / (var + 1e-5).sqrt() + shift[..., None, None]).relu()
        close("z", it.read(features_with(sam, x, told(2)), x).maps[-1], z)
    fresh = ConditionEmbedding.on(sam, ONE, groups=GROUPS, form="code")
    assert (fresh.cin1.embed.weight[:, 32:] == 0).all()
    assert (fresh.cin1.mlp[0].bias == 0.1).all()
    assert {"cin1.embed.weight", "cin2.mlp.2.bias"} <= set(fresh.tensors())


def test_each_row_has_the_sub_group_that_is_said(sam: Sam) -> None:
    host, x = host_with(sam, part(sam)), images(sam, 1).expand(3, -1, -1, -1)
    with torch.no_grad():
        together = host(x, "it", prompts=told(0, 2, 0))
        assert torch.equal(together[0], together[2])
        assert (together[0] - together[1]).norm() > 1e-3 * together[0].norm()
        close("row 1", together[1:2], host(x[:1], "it", prompts=told(2)))


def test_where_nobody_says_a_sub_group_it_is_their_mean(sam: Sam) -> None:
    it = part(sam)
    host, x = host_with(sam, it), images(sam, 1)
    with torch.no_grad():
        unsaid = host(x, "it")
        close("-1", host(x, "it", prompts=told(-1)), unsaid)
        for cin in (it.cin1, it.cin2):
            cin.embed.weight[1] = cin.embed.weight[[0, 2]].mean(0)  # then it is the mean of all three
        close("mean", host(x, "it", prompts=told(1)), host(x, "it"))


def test_a_sub_group_learns_from_its_own_images_alone(sam: Sam) -> None:
    it = part(sam)
    host_with(sam, it)(images(sam), "it", prompts=told(0, 2)).square().sum().backward()
    for cin in (it.cin1, it.cin2):
        assert (cin.embed.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True]


def test_an_embedding_without_contrast_has_a_gradient(sam: Sam) -> None:
    it, x = part(sam), torch.ones(1, 32, 4, 4, requires_grad=True)
    with torch.no_grad():
        it.conv1.weight.zero_()
    it.read(features_with(sam, x, told(0)), x).maps[-1].sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in it.parameters())


def test_a_sub_group_never_seen_is_refused_or_follows_the_rule(sam: Sam) -> None:
    with pytest.raises(UnknownName) as refused:
        part(sam).group_index("nort")
    says(refused.value, "sub-group", "nort", "north")
    assert part(sam).group_index("west") == 2
    assert part(sam, unknown="mean").group_index("east") == -1
    assert part(sam, unknown="south").group_index("east") == 1
    assert part(sam, unknown="south").group_index("west") == 2


def test_numbers_of_no_sub_group_are_refused(sam: Sam) -> None:
    host, x = host_with(sam, part(sam)), images(sam, 1)
    for wrong in (3, -2):
        with pytest.raises(BadCall) as refused:
            host(x, "it", prompts=told(wrong))
        says(refused.value, "0 to 2", "north", str(wrong))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": ()}, ("different names",)),
        ({"groups": ("a", "a")}, ("different names",)),
        ({"groups": ("mean",)}, ("none of them",)),
        ({"groups": ("a",), "unknown": "b"}, ("never seen", "'b'")),
        ({"groups": ("a",), "form": "printed"}, ("'paper' or 'code'",)),
    ],
)
def test_wrong_options_are_refused(sam: Sam, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        ConditionEmbedding.on(sam, ONE, **options)
    says(refused.value, *words)


def test_a_backbone_without_a_decoder_is_refused(vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        ConditionEmbedding.on(vit, ONE, groups=GROUPS)
    says(refused.value, "no promptable decoder")


def test_a_person_says_the_sub_group_by_name(sam: Sam) -> None:
    host, image = host_with(sam, part(sam)), np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    box = {"box": (5, 5, 30, 30)}
    maps = [host.predict(image, "it", prompts={**box, "group": g}, probabilities=True) for g in GROUPS]
    assert not np.allclose(maps[0], maps[1], atol=1e-4)
    with pytest.raises(BadCall) as refused:
        host.predict(image, "it", prompts=box)
    says(refused.value, "sub-group", "north, south, west")
    with pytest.raises(UnknownName) as unknown:
        host.predict(image, "it", prompts={**box, "group": "east"})
    says(unknown.value, "east")
