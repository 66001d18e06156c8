"""Readouts: small heads, AViT's decoder and prompt generator, and AViT's parameters counted as the paper counts them."""

import pytest
import torch
from torch.nn import functional
from torchvision.models import resnet34

from medgraft.adapters import Adapter, ASPPHead, Bottleneck, ClassifierHead, Host, LinearHead, PromptGenerator, Tuned
from medgraft.backbones import Backbone, Features, load_backbone
from medgraft.errors import BadCall
from tests.helpers import LABELS, ONE, THREE, adapter, close, images, says, wake


def some_features(width: int = 8, side: int = 4) -> Features:
    raw = torch.randn(2, width, side, side)
    return Features(
        [torch.randn(2, 4, 2 * side, 2 * side), torch.randn(2, width, side, side)], [8, 16], torch.randn(2, width), raw
    )


# Small heads


def test_the_cosine_heads_equation() -> None:
    head, f = wake(ClassifierHead({}, width=8, outputs=3, form="cosine"), size=0.5), some_features()
    z, w = f.pooled, head.weight
    want = head.temperature * torch.stack([(z * w[k]).sum(1) / (z.norm(dim=1) * w[k].norm()) for k in range(3)], 1)
    close("logits", head(f, torch.zeros(2, 3, 64, 64)).detach(), want.detach())
    assert head.temperature.item() != 10


def test_the_linear_heads_equations() -> None:
    f, image = some_features(), torch.zeros(2, 3, 40, 24)
    head = wake(ClassifierHead({}, width=8, outputs=3), size=0.5)
    close("logits", head(f, image).detach(), (f.pooled @ head.weight.T + head.bias).detach())
    maps = wake(LinearHead({}, width=4, outputs=2, level=0), size=0.5)
    by_pixel = functional.linear(
        f.maps[0].permute(0, 2, 3, 1), maps.linear.weight[:, :, 0, 0], maps.linear.bias
    ).permute(0, 3, 1, 2)
    got = maps(f, image).detach()
    assert got.shape == (2, 2, 40, 24)
    close("logits", got, functional.interpolate(by_pixel, (40, 24), mode="bilinear", align_corners=False).detach())


def test_a_form_that_is_not_there() -> None:
    with pytest.raises(BadCall) as refused:
        ClassifierHead({}, width=8, outputs=3, form="cosin")
    says(refused.value, "'linear'", "'cosine'", "'cosin'")


# AViT


def test_the_decoder_reads_the_map_before_the_final_norm(either: Backbone) -> None:
    """AViT builds the encoder's last norm, counts it, and never applies it."""
    made = adapter(either, {"h": ASPPHead.on(either, ONE)}, awake=False)
    head, f = made.parts["h"], features(either)
    x = images(either)
    changed = Features([m * 7 for m in f.maps], f.strides, f.pooled * 7, f.raw)
    with torch.no_grad():
        assert torch.equal(head(changed, x), head(f, x))
        assert not torch.equal(head(Features(f.maps, f.strides, f.pooled, f.raw * 7), x), head(f, x))


def features(on: Backbone) -> Features:
    with torch.no_grad():
        return on(images(on))


def test_the_decoder_by_hand() -> None:
    """ASPP at rates 6, 12 and 18, a 1x1 and pooling, to a quarter of the image, beside the prompt, two 3x3 and a 1x1."""
    head = wake(ASPPHead({}, width=8, outputs=4, prompt=64)).eval()
    f, image = some_features(), torch.zeros(2, 3, 64, 64)
    f = f.with_extra(prompt=torch.randn(2, 64, 16, 16))

    def normed(x, conv, bn):
        return functional.relu(functional.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias))

    with torch.no_grad():
        branches = [normed(f.raw, head.aspp.convs[i][0], head.aspp.convs[i][1]) for i in range(4)]
        assert [head.aspp.convs[i][0].dilation for i in range(4)] == [(1, 1), (6, 6), (12, 12), (18, 18)]
        pooled = normed(f.raw.mean((2, 3), keepdim=True), head.aspp.convs[4][1], head.aspp.convs[4][2])
        x = torch.cat([*branches, pooled.expand(-1, -1, 4, 4)], 1)
        x = normed(x, head.aspp.project[0], head.aspp.project[1])
        x = functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
        x = torch.cat([f.extra["prompt"], x], 1)
        x = normed(x, head.final_conv[0], head.final_conv[1])
        x = normed(x, head.final_conv[3], head.final_conv[4])
        want = functional.interpolate(head.final_conv[6](x), (64, 64), mode="bilinear", align_corners=False)
        close("logits", head(f, image), want)


def test_the_prompt_is_a_resnets_first_stage() -> None:
    torch.manual_seed(0)
    net = wake(resnet34()).eval()
    stem = PromptGenerator({}).eval()
    stem.load_resnet34(net.state_dict())
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        want = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))
        assert torch.equal(stem(some_features(), image).extra["prompt"], want)
    assert want.shape == (2, 64, 16, 12)
    assert sum(p.numel() for p in stem.parameters()) == 231_488
    for state in ({}, {"conv1.weight": torch.zeros(64, 1, 7, 7)}):
        with pytest.raises(BadCall, match="ResNet-34"):
            stem.load_resnet34(state)


def test_the_prompts_dropout_takes_whole_channels() -> None:
    stem = PromptGenerator({}, dropout=0.5)
    image = torch.randn(4, 3, 32, 32)
    prompt = stem.train()(some_features(), image).extra["prompt"]
    gone = (prompt == 0).flatten(2).all(2)
    assert 0.3 < gone.float().mean() < 0.7
    assert not (stem.eval()(some_features(), image).extra["prompt"] == 0).flatten(2).all(2).any()


def test_a_decoder_without_its_prompt_says_so(vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        ASPPHead({}, width=8, outputs=1, prompt=64).eval()(some_features(), torch.zeros(2, 3, 64, 64))
    says(refused.value, "prompt", "PromptGenerator before it")


def test_a_decoder_cannot_train_on_one_image(vit: Backbone) -> None:
    host = Host(vit)
    host.add(adapter(vit, {"h": ASPPHead.on(vit, ONE)}), "a")
    host.train()
    with pytest.raises(BadCall) as refused:
        host(images(vit, 1), adapter="a")
    says(refused.value, "batch statistics", "two or more")
    host.eval()
    host(images(vit, 1), adapter="a")


def test_outputs_follow_the_task(vit: Backbone) -> None:
    for task, outputs in ((ONE, 1), (THREE, 4)):
        host = Host(vit)
        host.add(adapter(vit, {"h": ASPPHead.on(vit, task)}, task=task), "a")
        assert host(images(vit), adapter="a").shape == (2, outputs, 64, 64)
    host.add(adapter(vit, {"h": ClassifierHead.on(vit, LABELS)}, task=LABELS), "labels")
    assert host(images(vit), adapter="labels").shape == (2, 3)


def test_avit_has_as_many_parameters_as_the_paper_says() -> None:
    """Du et al. 2023, table 1, ViT-B: 99.385 M in all, 13.625 M tuned. Tuned norms replace the encoder's, so they count once."""
    on = load_backbone("random:timm:vit_base_patch16_224")
    parts = {
        "necks": Bottleneck.on(on, ONE),
        "norms": Tuned.on(on, ONE, targets=("*.norm1", "*.norm2")),
        "prompt": PromptGenerator.on(on, ONE),
        "head": ASPPHead.on(on, ONE, prompt=64),
    }
    never_applied = Tuned.on(on, ONE, targets="norm")
    made = Adapter.of(on, ONE, parts)
    assert made.trainable == 13_623_169
    tuned = made.trainable + sum(p.numel() for p in never_applied.parameters())
    assert tuned == 13_624_705
    replaced = sum(p.numel() for part in (parts["norms"], never_applied) for p in part.parameters())
    assert sum(p.numel() for p in on.parameters()) - replaced + tuned == 99_384_961
    by_part = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert by_part["prompt"] == 231_488
    host = Host(on)
    host.add(made, "a")
    with torch.no_grad():
        assert host(torch.randn(1, 3, 64, 64), adapter="a").shape == (1, 1, 64, 64)
