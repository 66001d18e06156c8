"""Class prompts: SAM's own decoder as a special case, whose gradient goes where, the authors' names, other numbers of classes in a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, ClassPrompts, Host, LoRA, MaskHead, Task, Tuned
from medgraft.adapters.class_prompts import Perceptrons, from_authors
from medgraft.backbones import Backbone
from medgraft.backbones.prompts import Prompts
from medgraft.backbones.sam import Sam
from medgraft.errors import BadCall
from medgraft.recipes.sam_decoder import FIRST_MASK, tuned_decoder
from medgraft.recipes.sam_path import load_authors
from medgraft.training.losses import segmentation_loss
from tests.helpers import ONE, THREE, adapter, close, images, same_bits, says, wake


def host_with(on: Backbone, head: ClassPrompts, task: Task = THREE) -> Host:
    host = Host(on)
    host.add(Adapter.of(on, task, {"head": head}), "it")
    return host


def classes(count: int) -> Task:
    return Task("segment", tuple(f"class {i}" for i in range(1, count)))


@torch.no_grad()
def as_sam(sam: Sam) -> ClassPrompts:
    """Class prompts that hold SAM's own four mask tokens and their MLPs."""
    head, decoder = ClassPrompts.on(sam, classes(4)), sam.decoder.masks
    head.tokens.copy_(decoder.mask_tokens.weight)
    for i, mlp in enumerate(decoder.output_hypernetworks_mlps):
        for mine, theirs in zip(head.hyper, [mlp.proj_in, *mlp.layers, mlp.proj_out], strict=True):
            mine.weight[i], mine.bias[i] = theirs.weight, theirs.bias
    last = decoder.iou_prediction_head.proj_out
    head.quality[-1].weight[0], head.quality[-1].bias[0] = last.weight, last.bias
    return head


def test_with_sams_own_tokens_it_is_sams_own_decoder(sam: Sam) -> None:
    head, x = as_sam(sam).train(), images(sam)
    with torch.no_grad():
        features = sam(x)
        logits = head.read(features, x)
        for multimask, rows in ((False, slice(0, 1)), (True, slice(1, 4))):
            masks, quality = sam.decoder(features.maps[0], None, multimask=multimask)
            close("masks", head.said.masks[:, rows], masks[:, 0])
            close("IoU", head.said.quality[:, rows], quality[:, 0])
    assert logits.shape == (2, 4, 128, 128)


def test_in_the_authors_form_the_last_tokens_are_asked(sam: Sam) -> None:
    """SAM's four tokens under one class and the background: the masks of its third and fourth."""
    whole, x = as_sam(sam), images(sam)
    head = ClassPrompts.on(sam, ONE, form="code").train()
    with torch.no_grad():
        head.tokens.copy_(whole.tokens)
        for mine, theirs in zip(head.hyper, whole.hyper, strict=True):
            mine.weight.copy_(theirs.weight[2:])
            mine.bias.copy_(theirs.bias[2:])
        features = sam(x)
        head.read(features, x)
        close("masks", head.said.masks, sam.decoder(features.maps[0], None, multimask=True)[0][:, 0, 1:])


def test_every_class_begins_as_sams_first_mlp(sam: Sam) -> None:
    head = ClassPrompts.on(sam, THREE)
    first = sam.decoder.masks.output_hypernetworks_mlps[0]
    for mine, theirs in zip(head.hyper, [first.proj_in, *first.layers, first.proj_out], strict=True):
        for i in range(4):
            assert torch.equal(mine.weight[i], theirs.weight)
            assert torch.equal(mine.bias[i], theirs.bias)
    assert torch.equal(head.quality[0].weight[0], sam.decoder.masks.iou_prediction_head.proj_in.weight)
    assert head.tokens.detach().std() == pytest.approx(1, abs=0.2)
    assert torch.unique(head.tokens, dim=0).shape[0] == 4


@pytest.mark.parametrize(("form", "tokens"), [("paper", 0), ("code", 2)])
def test_there_are_k_tokens_and_k_masks_with_the_background_among_them(sam: Sam, form: str, tokens: int) -> None:
    for task, k in ((ONE, 2), (THREE, 4)):
        head = ClassPrompts.on(sam, task, form=form).train()
        head.read(sam(x := images(sam)), x)
        assert head.tokens.shape == (k + tokens, sam.spec.width)
        assert head.said.masks.shape == (2, k, 32, 32)
        assert head.said.quality.shape == (2, k)
        assert head.hyper[0].weight.shape[0] == k


def test_one_logit_is_the_softmax_of_two_masks(sam: Sam) -> None:
    head, x = wake(ClassPrompts.on(sam, ONE)).train(), images(sam)
    with torch.no_grad():
        logits = head.read(sam(x), x)
    full = torch.nn.functional.interpolate(head.said.masks, x.shape[-2:], mode="bilinear", align_corners=False)
    close("probability", logits.sigmoid()[:, 0], full.softmax(1)[:, 1])


def test_an_mlp_learns_from_its_own_mask_alone_and_tokens_from_all(sam: Sam) -> None:
    x = images(sam)
    features = sam(x)
    for i in range(4):
        head = wake(ClassPrompts.on(sam, THREE)).train()
        head.read(features, x)
        head.said.masks[:, i].square().sum().backward()
        for layer in head.hyper:
            for p in (layer.weight, layer.bias):
                reached = p.grad.flatten(1).abs().sum(1) > 0
                assert reached.tolist() == [j == i for j in range(4)]
        assert (head.tokens.grad.abs().sum(1) > 1e-3 * head.tokens.grad.abs().sum(1).max()).all()


def test_the_spare_tokens_join_the_attention(sam: Sam) -> None:
    x, head = images(sam), wake(ClassPrompts.on(sam, ONE, form="code"))
    with torch.no_grad():
        features = sam(x)
        before = head.read(features, x)
        head.tokens[:2] += 1
        assert (head.read(features, x) - before).norm() > 1e-3 * before.norm()


def test_a_decoder_that_is_adapted_answers_otherwise(sam: Sam) -> None:
    """Parts at decoder sites act inside the head, and the encoder's whole prefix stays shared."""
    host, x = Host(sam), images(sam)
    head = wake(ClassPrompts.on(sam, THREE))
    parts = {
        "plain": {},
        "lora": {"lora": wake(LoRA.on(sam, THREE, targets="decoder.*.q", rank=2))},
        "tuned": {"decoder": wake(tuned_decoder(sam, THREE))},
        "no mask": {"decoder": wake(Tuned.on(sam, THREE, targets="decoder.no_mask"))},
    }
    for name, own in parts.items():
        host.add(Adapter.of(sam, THREE, {**own, "head": copy.deepcopy(head)}), name)
    assert all(host.cut(name) == sam.depth for name in parts)
    with torch.no_grad():
        outputs = host(x, adapters=list(parts))
        for other, name in zip(outputs[1:], list(parts)[1:], strict=True):
            assert (other - outputs[0]).norm() > 1e-3 * outputs[0].norm(), name
        assert same_bits(outputs[0], host(x, adapter="plain"))


def test_decoder_side_adapters_share_one_pass_of_the_encoder(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    host, x, stages = Host(sam), images(sam, 1), []
    for name in "abc":
        host.add(adapter(sam, {"decoder": tuned_decoder(sam, ONE), "head": ClassPrompts.on(sam, ONE)}), name)
    real = Sam.stage
    monkeypatch.setattr(Sam, "stage", lambda self, state: (stages.append(state.stage), real(self, state))[1])
    with torch.no_grad():
        host(x, adapters=list("abc"))
    assert stages == list(range(sam.depth))


def test_a_fresh_copy_of_the_decoder_changes_nothing(sam: Sam) -> None:
    x, box = images(sam), Prompts(boxes=torch.tensor([[[5.0, 9, 60, 80]]] * 2))
    host = Host(sam)
    host.add(Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)}), "plain")
    tuned = tuned_decoder(sam, ONE, *FIRST_MASK, "decoder.no_mask")
    host.add(Adapter.of(sam, ONE, {"decoder": tuned, "head": MaskHead.on(sam, ONE)}), "tuned")
    with torch.no_grad():
        assert same_bits(host(x, "tuned", prompts=box), host(x, "plain", prompts=box))


def test_a_tuned_decoder_equals_the_same_change_in_the_network(sam: Sam) -> None:
    """Linear layers, norms of maps and of tokens, transposed convolutions, embeddings: each copy stands where its layer stood."""
    tuned = wake(tuned_decoder(sam, THREE, "decoder.no_mask"), size=0.2)
    head, x = wake(ClassPrompts.on(sam, THREE)), images(sam)
    host = Host(sam)
    host.add(Adapter.of(sam, THREE, {"decoder": tuned, "head": head}), "it")
    changed = copy.deepcopy(sam)
    with torch.no_grad():
        for name, t in tuned.tensors().items():
            site, leaf = name.rsplit(".", 1)
            getattr(changed.network.get_submodule(changed.sites[site].path), leaf).copy_(t)
        close("tuned", host(x, "it"), head.read(changed(x), x))


def test_rows_with_other_numbers_of_classes_share_a_batch(sam: Sam) -> None:
    host, x = Host(sam), images(sam, 3)
    host.add(adapter(sam, {"head": ClassPrompts.on(sam, ONE)}, task=ONE), "one")
    host.add(adapter(sam, {"head": ClassPrompts.on(sam, THREE)}, task=THREE), "three")
    with torch.no_grad():
        rows = host(x, adapter=["one", "three", "one"])
        assert [r.shape[1] for r in rows] == [1, 4, 1]
        for i, name in enumerate(("one", "three", "one")):
            close(name, rows[i], host(x[i : i + 1], adapter=name))


def test_it_takes_no_points(sam: Sam) -> None:
    host, x = host_with(sam, ClassPrompts.on(sam, THREE)), images(sam, 1)
    point = Prompts(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[1]]]))
    with pytest.raises(BadCall) as refused:
        host(x, "it", prompts=point)
    says(refused.value, "takes no prompts", "cytoplasm")


def test_it_wants_a_decoder_of_its_own_widths(sam: Sam, vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        ClassPrompts.on(vit, THREE)
    says(refused.value, "no promptable decoder", "medgraft:starter-sam")
    other = ClassPrompts({}, width=48, outputs=4, hyper=[48, 48, 6])
    with pytest.raises(BadCall) as refused:
        host_with(sam, other)
    says(refused.value, "48 channels", "32")
    with pytest.raises(BadCall) as refused:
        ClassPrompts.on(sam, THREE, form="printed")
    says(refused.value, "'paper' or 'code'")


def test_what_was_said_is_forgotten_and_never_copied(sam: Sam) -> None:
    head, x = ClassPrompts.on(sam, THREE).eval(), images(sam)
    head.read(sam(x), x)
    assert head.said is None
    head.train().read(sam(x), x)
    assert head.said is not None
    assert copy.deepcopy(head).said is None
    assert head.eval().said is None


def test_perceptrons_side_by_side_are_perceptrons() -> None:
    rows = Perceptrons(3, [4, 5, 2])
    x = torch.randn(2, 3, 4)
    for i in range(3):
        hidden = (x[:, i] @ rows[0].weight[i].T + rows[0].bias[i]).relu()
        close(f"row {i}", rows(x)[:, i], hidden @ rows[1].weight[i].T + rows[1].bias[i])


# The authors' checkpoint


def authors(sam: Sam, classes_with_ignored: int) -> dict[str, Tensor]:
    """A checkpoint of the size of `sam`, with SAM-Path's names: classes + 1 tokens, MLPs and IoU estimates."""
    g = torch.Generator().manual_seed(3)
    c, n = sam.spec.width, classes_with_ignored + 1
    shapes = {"mask_tokens.weight": (n, c), "iou_token.weight": (1, c)}
    for i in range(n):
        for j, (a, b) in enumerate(((c, c), (c, c), (c, c // 8))):
            shapes |= {f"output_hypernetworks_mlps.{i}.layers.{j}.weight": (b, a)}
            shapes |= {f"output_hypernetworks_mlps.{i}.layers.{j}.bias": (b,)}
    for j, (a, b) in enumerate(((c, c), (c, c), (c, n))):
        shapes |= {f"iou_prediction_head.layers.{j}.weight": (b, a), f"iou_prediction_head.layers.{j}.bias": (b,)}
    state = {f"model.mask_decoder.{name}": torch.randn(s, generator=g) for name, s in shapes.items()}
    theirs = {"upscale_conv1": "output_upscaling.0", "upscale_layer_norm": "output_upscaling.1"}
    theirs |= {"upscale_conv2": "output_upscaling.3", "layer_norm_final_attn": "norm_final_attn"}
    for name, t in sam.network.mask_decoder.state_dict().items():
        for ours, their in theirs.items():
            name = name.replace(ours, their)
        if name.startswith("transformer.layers"):
            name = name.replace("layer_norm", "norm")
        if name.startswith(("transformer", "output_upscaling")):
            state[f"model.mask_decoder.{name}"] = t + 0.1
    return state


def test_the_authors_tensors_load(sam: Sam) -> None:
    """Two real classes (background, gland) and the ignored label: four tokens, of which the last two are asked for a mask."""
    state = authors(sam, 3)
    head = ClassPrompts.on(sam, ONE, form="code")
    tuned = tuned_decoder(sam, ONE)
    load_authors(sam, {"decoder": tuned, "head": head}, state)
    key = "model.mask_decoder."
    assert torch.equal(head.tokens, state[f"{key}mask_tokens.weight"])
    for i in range(2):
        assert torch.equal(head.hyper[2].weight[i], state[f"{key}output_hypernetworks_mlps.{i + 2}.layers.2.weight"])
    assert torch.equal(head.quality[2].bias[0], state[f"{key}iou_prediction_head.layers.2.bias"][2:])
    assert torch.equal(tuned.cell("decoder.up2").weight, state[f"{key}output_upscaling.3.weight"])
    assert torch.equal(tuned.cell("decoder.layers.1.norm4").bias, state[f"{key}transformer.layers.1.norm4.bias"])
    assert torch.equal(tuned.cell("decoder.iou_token").weight, state[f"{key}iou_token.weight"])


def test_other_checkpoints_are_refused(sam: Sam) -> None:
    state = authors(sam, 3)
    with pytest.raises(BadCall) as refused:
        ClassPrompts.on(sam, THREE, form="code").load_authors(state)
    says(refused.value, "tokens", "number of classes")
    with pytest.raises(BadCall) as refused:
        ClassPrompts.on(sam, ONE).load_authors(state)
    says(refused.value, "form='code'")
    with pytest.raises(BadCall) as refused:
        from_authors({"encoder.weight": torch.zeros(1)})
    says(refused.value, "mask_decoder.mask_tokens.weight")
    del state["model.mask_decoder.output_upscaling.0.bias"]
    with pytest.raises(BadCall) as refused:
        load_authors(sam, {"decoder": tuned_decoder(sam, ONE)}, state)
    says(refused.value, "upscale_conv1.bias")


# Learning

COLOURS = torch.tensor([[0.0, 0.0, 0.0], [1.5, -1.0, -1.0], [-1.0, 1.5, -1.0], [-1.0, -1.0, 1.5]])


def bands(count: int, seed: int, side: int = 128) -> tuple[Tensor, Tensor]:
    """Three coloured bands in any order beside a dark margin, images (count, 3, side, side) and labels 0 .. 3."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, side, side, dtype=torch.long)
    for one in labels:
        margin, shift, other = torch.randint(0, 48, (3,), generator=g).tolist()
        edges = [0, 34 + shift // 3, 77 + other // 3, side]
        for k, value in enumerate((torch.randperm(3, generator=g) + 1).tolist()):
            one[edges[k] : edges[k + 1], margin:] = value
    return COLOURS[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(count, 3, side, side, generator=g), labels


@pytest.mark.slow
def test_a_tiny_sam_learns_three_classes_with_its_encoder_frozen(sam: Sam) -> None:
    host, steps = Host(sam), 150
    made = Adapter.of(
        sam, THREE, {"decoder": tuned_decoder(sam, THREE), "head": ClassPrompts.on(sam, THREE, quality=False)}
    )
    host.add(made, "it")
    optimiser = torch.optim.AdamW(made.parameters())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        x, labels = bands(8, 100 + step)
        optimiser.zero_grad()
        segmentation_loss(host(x, "it"), labels).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
    x, labels = bands(16, 1)
    with torch.no_grad():
        found = host(x, "it").argmax(1)
    for value in (1, 2, 3):
        both = ((found == value) & (labels == value)).sum()
        assert 2 * both / ((found == value).sum() + (labels == value).sum()) > 0.9, value
