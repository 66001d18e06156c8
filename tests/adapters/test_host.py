"""What a host offers beside its laws: shared prefixes, resuming, images in and masks out, modes and devices."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medgraft.adapters import Adapter, ClassifierHead, Host, LinearHead, LoRA, Preprocessing, ScaleShift, Task, Tuned
from medgraft.adapters.host import Outputs
from medgraft.backbones import Backbone, Features
from medgraft.errors import BadCall, UnknownName, WrongBackbone
from tests.helpers import BACKBONES, LABELS, ONE, THREE, adapter, close, images, same_bits, says, wake


def at_block(on: Backbone, block: int, seed: int = 0) -> Adapter:
    """LoRA in one block only."""
    torch.manual_seed(seed)
    name = next(n for n, s in on.sites.items() if s.stage == block and s.kind == "linear" and s.span is None)
    return adapter(on, {"l": LoRA.on(on, ONE, targets=name)}, seed=seed)


@pytest.fixture
def host(either: Backbone) -> Host:
    host = Host(either)
    for block in range(either.depth):
        host.add(at_block(either, block, seed=block), f"from {block}")
    host.add(adapter(either, {}), "head")
    host.add(adapter(either, {"t": Tuned.on(either, ONE, targets="norm")}), "norm")
    return host


@pytest.fixture
def stages(either: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stages that are run, in order."""
    seen: list[int] = []
    plain = type(either).stage

    def stage(self: Backbone, state):
        seen.append(state.stage)
        return plain(self, state)

    monkeypatch.setattr(type(either), "stage", stage)
    return seen


# Calls


def test_without_an_adapter_it_is_the_backbone(host: Host) -> None:
    x = images(host.backbone)
    with torch.no_grad():
        assert same_bits(host(x), host.backbone(x))
        assert isinstance(host(x), Features)


def test_a_host_does_not_change_what_the_backbone_gives(either: Backbone) -> None:
    x = images(either)
    with torch.no_grad():
        before = either(x)
        host = Host(either)
        host.add(adapter(either), "a")
        host(x, adapter="a")
        assert same_bits(either(x), before)


def test_one_channel_is_repeated(host: Host) -> None:
    x = images(host.backbone)[:, :1]
    with torch.no_grad():
        assert torch.equal(host(x, adapter="from 0"), host(x.repeat(1, 3, 1, 1), adapter="from 0"))
        assert torch.equal(host(x, adapter=["from 0", "head"]), host(x.repeat(1, 3, 1, 1), adapter=["from 0", "head"]))


def test_another_image_size(host: Host) -> None:
    divisor = host.backbone.spec.divisor
    x = torch.randn(2, 3, 3 * divisor, 5 * divisor)
    with torch.no_grad():
        assert host(x, adapter="from 1").shape == (2, 1, 3 * divisor, 5 * divisor)
        close("rows", host(x, adapter=["from 1", "head"])[:1], host(x[:1], adapter="from 1"))


def test_every_adapter_for_every_row(host: Host) -> None:
    x = images(host.backbone)
    names = ["from 2", None, "head", "from 0", "norm", "from 2"]
    with torch.no_grad():
        out = host(x, adapters=names)
        assert isinstance(out, Outputs)
        assert len(out) == len(names)
        for got, name in zip(out, names, strict=True):
            assert same_bits(got, host(x, adapter=name)), name


def test_the_frozen_prefix_is_run_once(host: Host, stages: list[int]) -> None:
    x, depth = images(host.backbone), host.backbone.depth
    with torch.no_grad():
        out = host(x, adapters=["head", f"from {depth - 1}", "from 1", None, "norm"])
    assert out.prefixes == 1
    assert Counter(stages) == Counter([*range(depth), *range(1, depth), depth - 1])


def test_rows_share_the_frozen_prefix(host: Host, stages: list[int]) -> None:
    last = host.backbone.depth - 1
    with torch.no_grad():
        host(images(host.backbone, 3), adapter=[f"from {last}", "norm", "head"])
    assert stages == [*range(last), last, last, last] or stages == list(range(last + 1))


def test_a_single_adapter_by_row_is_one_call(host: Host, stages: list[int]) -> None:
    x = images(host.backbone)
    with torch.no_grad():
        out = host(x, adapter=["from 0"] * 2)
        assert stages == list(range(host.backbone.depth))
        assert torch.equal(out, host(x, adapter="from 0"))


def test_gradients_reach_every_adapter_of_a_mixed_batch(host: Host) -> None:
    names = ["from 0", "head", "from 2"]
    host(images(host.backbone, 3), adapter=names).square().sum().backward()
    for name, made in host.adapters.items():
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters()]
        assert all(grads) if name in names else not any(grads), name


def test_mixed_gradients_are_those_of_the_rows_alone(host: Host) -> None:
    names, x = ["from 0", "from 2", "from 0"], images(host.backbone, 3)
    used = list(dict.fromkeys(p for n in names for p in host.adapters[n].parameters()))
    host(x, adapter=names).square().sum().backward()
    mixed = [p.grad.clone() for p in used]
    host.zero_grad()
    for p in used:
        p.grad = None
    sum(host(x[i : i + 1], adapter=n).square().sum() for i, n in enumerate(names)).backward()
    for got, p in zip(mixed, used, strict=True):
        close("gradient", got, p.grad, 1e-4)


def test_dropout_of_a_mixed_batch_is_not_forgotten(either: Backbone) -> None:
    """In training, with dropout, rows do not go the way that ignores it."""
    host, x = Host(either), images(either)
    for k in range(2):
        host.add(adapter(either, {"l": LoRA.on(either, ONE, dropout=0.9)}, seed=k), f"a{k}")
    with torch.no_grad():
        quiet = host(x, adapter=["a0", "a1"])
        host.train()
        assert not torch.allclose(host(x, adapter=["a0", "a1"]), quiet, rtol=1e-3, atol=1e-3)
        host.eval()
        assert torch.equal(host(x, adapter=["a0", "a1"]), quiet)


# Cut and resume


@pytest.mark.parametrize("name", ["from 0", "from 1", "from 2", "head", "norm"])
def test_resuming_from_any_stage_before_the_cut(host: Host, name: str) -> None:
    x, on = images(host.backbone), host.backbone
    with torch.no_grad():
        want = host(x, adapter=name)
        for stop in range(host.cut(name) + 1):
            state = on.run(x, stop=stop)
            assert torch.equal(host.resume(state, x, name), want)


def test_the_cut_is_where_it_begins(host: Host) -> None:
    depth = host.backbone.depth
    assert [host.cut(f"from {k}") for k in range(depth)] == list(range(depth))
    assert host.cut("head") == host.cut("norm") == depth


def test_nothing_acts_before_the_cut(host: Host) -> None:
    """The prefix under the adapter's own plan is the frozen prefix."""
    from medgraft.adapters.graft import Graft
    from medgraft.backbones.sites import following

    x, on = images(host.backbone), host.backbone
    for name, made in host.adapters.items():
        with torch.no_grad(), following(Graft.of(on, made).plan):
            acted = on.run(x, stop=host.cut(name))
        with torch.no_grad():
            assert torch.equal(acted.x, on.run(x, stop=host.cut(name)).x)


# Images in, masks out


@pytest.mark.parametrize("task", [ONE, THREE, Task("segment", ("a", "b"), (7, 255))], ids=lambda t: "-".join(t.classes))
def test_predict_gives_a_mask_in_the_images_own_size(either: Backbone, task: Task, tmp_path: Path) -> None:
    host, made = Host(either), adapter(either, task=task)
    host.add(made, "a")
    with torch.no_grad():  # so that every class is found somewhere
        made.readouts[0].linear.bias -= host(images(either), adapter="a").mean((0, 2, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = host.predict(tmp_path / "image.png", "a")
    assert mask.shape == (50, 90)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, *task.values}
    assert len(np.unique(mask)) > 1, "one value everywhere: nothing is tested"
    assert np.array_equal(mask, host.predict(pixels, "a"))
    likely = host.predict(pixels, "a", probabilities=True)
    assert likely.shape == (task.outputs, 50, 90)
    if task.outputs == 1:
        assert np.array_equal(mask != 0, likely[0] > 0.5)
    else:
        assert np.array_equal(mask, np.array([0, *task.values])[likely.argmax(0)])
        assert np.allclose(likely.sum(0), 1, atol=1e-5)


def test_predict_of_a_classifier_names_the_classes(either: Backbone) -> None:
    host = Host(either)
    host.add(adapter(either, {"c": ClassifierHead.on(either, LABELS)}, task=LABELS), "a")
    found = host.predict(np.zeros((40, 30, 3), np.uint8), "a")
    assert list(found) == list(LABELS.classes)
    assert sum(found.values()) == pytest.approx(1)


def test_predict_uses_the_adapters_own_preprocessing(vit: Backbone) -> None:
    host, made = Host(vit), adapter(vit)
    other = copy.deepcopy(made)
    other.preprocessing = Preprocessing(96, (0.2, 0.3, 0.4), (0.1, 0.2, 0.3))
    host.add(made, "a")
    host.add(other, "b")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    x = (
        torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    ) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        want = host(x, adapter="b")[0].sigmoid().numpy()
    assert np.allclose(host.predict(pixels, "b", probabilities=True), want, atol=1e-5)
    assert not np.allclose(host.predict(pixels, "a", probabilities=True), want, atol=1e-2)


def test_predict_in_half_precision(vit: Backbone) -> None:
    host = Host(copy.deepcopy(vit))
    host.add(adapter(vit), "a")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    want = host.predict(pixels, "a", probabilities=True)
    got = host.to(torch.bfloat16).predict(pixels, "a", probabilities=True)
    assert got.dtype == np.float32
    assert np.allclose(got, want, atol=0.1)


def test_predict_says_who_is_not_there(vit: Backbone) -> None:
    host = Host(vit)
    host.add(adapter(vit), "polyp")
    with pytest.raises(UnknownName) as raised:
        host.predict(np.zeros((8, 8, 3), np.uint8), "polyps")
    says(raised.value, "polyps", "did you mean 'polyp'")


# Modes, devices, copies, names


def test_the_backbone_stays_frozen_and_in_eval(host: Host) -> None:
    host.train()
    assert not any(m.training for m in host.backbone.modules())
    assert all(m.training for a in host.adapters.values() for m in a.modules())
    host.eval()
    assert not any(m.training for a in host.adapters.values() for m in a.modules())
    assert not any(p.requires_grad for p in host.backbone.parameters())


def test_thawing_a_host_thaws_adapters_only(host: Host) -> None:
    host.requires_grad_(False)
    assert not any(p.requires_grad for a in host.adapters.values() for p in a.parameters())
    host.requires_grad_(True)
    assert all(p.requires_grad for a in host.adapters.values() for p in a.parameters())
    assert not any(p.requires_grad for p in host.backbone.parameters())


def test_casting_a_host_casts_its_adapters(either: Backbone) -> None:
    host = Host(copy.deepcopy(either))
    host.add(adapter(either), "a")
    host.double()
    x = images(either)
    with torch.no_grad():
        out = host(x.double(), adapter="a")
    assert out.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in host.adapters["a"].parameters())
    plain = Host(either)
    plain.add(adapter(either), "a")
    with torch.no_grad():
        close("cast", out.float(), plain(x, adapter="a"), 1e-4)


def test_under_autocast(host: Host) -> None:
    x = images(host.backbone)
    with torch.no_grad():
        want = host(x, adapter="from 0")
        with torch.autocast("cpu", torch.bfloat16):
            got = host(x, adapter="from 0")
            host(x, adapter=["from 0", "from 1"])
    close("autocast", got.float(), want, 0.1)


def test_a_host_can_be_copied(host: Host) -> None:
    on = host.backbone
    host.add(adapter(on, {"l": LoRA.on(on, ONE, targets="*.fc1"), "s": ScaleShift.on(on, ONE, targets="*.fc1")}), "two")
    twin, x = copy.deepcopy(host), images(on)
    with torch.no_grad():
        for name in ("from 0", "two"):
            want = host(x, adapter=name)
            assert torch.equal(twin(x, adapter=name), want)
            for part in twin.adapters[name].site_parts.values():
                wake(part, seed=9)
            assert torch.equal(host(x, adapter=name), want)
            assert not torch.equal(twin(x, adapter=name), want)
    assert twin.backbone.owner is not host.backbone.owner
    twin.remove("head")
    assert "head" in host.adapters


def test_adapters_cannot_be_changed_through_the_listing(host: Host) -> None:
    host.adapters.clear()
    assert "head" in host.adapters


def test_its_picture_names_the_adapters(host: Host) -> None:
    assert "from 0, from 1" in repr(host)
    assert "random weights" in repr(host)


# Other backbones


def test_another_backbone_is_refused_or_named_in_a_warning(vit: Backbone) -> None:
    host = Host(vit)
    made = adapter(vit)
    made.backbone = replace(made.backbone, id="timm:vit_base_patch16_224", fingerprint="f" * 64)
    with pytest.raises(WrongBackbone) as refused:
        host.add(made, "a")
    says(
        refused.value,
        "timm:vit_base_patch16_224",
        "f" * 12,
        "random:timm:tiny_vit (random weights)",
        vit.spec.fingerprint[:12],
        "allow_mismatch=True",
    )
    assert not host.adapters
    with pytest.warns(UserWarning, match="allow_mismatch") as seen:
        host.add(made, "a", allow_mismatch=True)
    says(seen[0].message, "timm:vit_base_patch16_224", "f" * 12, "random:timm:tiny_vit", vit.spec.fingerprint[:12])
    assert seen[0].filename == __file__, "the warning points at medgraft, not at the caller"
    assert list(host.adapters) == ["a"]


def test_an_id_that_looks_alike_is_pointed_out(vit: Backbone) -> None:
    made = adapter(vit)
    made.backbone = replace(made.backbone, fingerprint="f" * 64)
    with pytest.raises(WrongBackbone, match="another revision or file"):
        Host(vit).add(made, "a")


def test_another_name_for_the_same_tensors_is_the_same_backbone(vit: Backbone) -> None:
    made = adapter(vit)
    made.backbone = replace(made.backbone, id="timm:renamed", commit="0123456")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Host(vit).add(made, "a")


def test_one_adapter_on_two_hosts(vit: Backbone) -> None:
    a, b, made, x = Host(vit), Host(BACKBONES["vit"]()), adapter(vit), images(vit)
    a.add(made, "a")
    b.add(made, "b")
    with torch.no_grad():
        assert torch.equal(a(x, adapter="a"), b(x, adapter="b"))


# Bundles


def test_an_adapter_without_its_site_parts_is_its_head(either: Backbone) -> None:
    host, made, x = Host(either), adapter(either), images(either)
    host.add(made, "a")
    host.add(made.without_site_parts(), "head")
    with torch.no_grad():
        features = either(x)
        assert torch.equal(host(x, adapter="head"), made.readouts[0](features, x))
    assert made.readouts[0] is host.adapters["head"].readouts[0]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (lambda on: {}, ("no part at all",)),
        (lambda on: {"l": LoRA.on(on, ONE)}, ("'l'", "'lora'", "linear_head")),
        (lambda on: {"h": LinearHead.on(on, ONE), "l": LoRA.on(on, ONE)}, ("site parts before its readouts", "h, l")),
        (lambda on: {"a": LinearHead.on(on, ONE), "b": LinearHead.on(on, ONE)}, ("only the last", "logits")),
        (lambda on: {"keys": LoRA.on(on, ONE), "h": LinearHead.on(on, ONE)}, ("'keys'", "name")),
        (lambda on: {"a.b": LoRA.on(on, ONE), "h": LinearHead.on(on, ONE)}, ("'a.b'", "name")),
    ],
    ids=["nothing", "no head", "head first", "two heads", "a reserved name", "a dot"],
)
def test_a_bundle_that_makes_no_sense_is_refused(vit: Backbone, parts, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        Adapter.of(vit, ONE, parts(vit))
    says(refused.value, *words)


def test_an_adapter_counts_its_parameters(vit: Backbone) -> None:
    made = adapter(vit, {"l": LoRA.on(vit, ONE, rank=2, targets="*.attn.q")})
    assert made.trainable == 3 * 2 * (48 + 48) + 48 + 1
    says(Exception(repr(made)), "segment polyp", "random weights", f"{made.trainable:,} parameters")


def test_its_outputs_are_the_tasks(vit: Backbone) -> None:
    """A head for three classes on a task of one would be cut off in silence."""
    with pytest.raises(BadCall) as refused:
        Adapter.of(vit, ONE, {"h": LinearHead.on(vit, THREE)})
    says(refused.value, "4", "1", "polyp")


def test_features_and_logits_by_hand(either: Backbone) -> None:
    host, x = Host(either), images(either)
    made = adapter(either, {}, task=THREE)
    host.add(made, "a")
    head = made.readouts[0].linear
    with torch.no_grad():
        f: Tensor = either(x).maps[-1]
        logits = torch.einsum("kc,bchw->bkhw", head.weight[:, :, 0, 0], f) + head.bias.view(1, -1, 1, 1)
        want = torch.nn.functional.interpolate(logits, x.shape[-2:], mode="bilinear")
        close("logits", host(x, adapter="a"), want)
