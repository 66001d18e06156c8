"""A support set as an adapter: what it stores, what the network answers from it, files from strangers, bad input."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medgraft.adapters import Adapter, ContextHead, Host, Support, Task
from medgraft.adapters.hub import publish
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone
from medgraft.backbones.universeg import Context, UniverSeg
from medgraft.errors import BadAdapter, BadCall, MedgraftError
from tests.helpers import ONE, THREE, close, pairs, says


def in_context(on: Backbone, task: Task = ONE, **options: object) -> Adapter:
    support = Support.on(on, task, **{**pairs(len(task.classes)), **options})  # type: ignore[arg-type]
    return Adapter.of(on, task, {"support": support, "head": ContextHead.on(on, task)})


def test_it_answers_like_the_bare_network(universeg: Backbone) -> None:
    """One class: the network on the stored pairs; the image is rescaled, as the stored ones were."""
    assert isinstance(universeg, UniverSeg)
    host = Host(universeg)
    host.add(in_context(universeg), "polyp")
    given = pairs(1)
    flat = given["images"].flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    images = ((given["images"] - low) / (high - low) * 255).round()[None, :, None] / 255
    x = torch.rand(2, 1, 16, 16)
    scaled = (x - x.amin((2, 3), keepdim=True)) / (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True))
    with torch.no_grad():
        want = universeg.segment(scaled, images, given["labels"][None, :, None].float())
        close("host", host(x, adapter="polyp"), want)


def test_several_classes_are_one_against_the_rest_with_the_background(universeg: Backbone) -> None:
    assert isinstance(universeg, UniverSeg)
    made = in_context(universeg, THREE)
    support = made.parts["support"]
    assert isinstance(support, Support)
    masks = support.masks()
    assert masks.shape == (4, 3, 16, 16)
    assert torch.equal(masks.sum(0), torch.ones(3, 16, 16))
    assert torch.equal(masks.argmax(0), pairs(3)["labels"])
    host = Host(universeg)
    host.add(made, "cells")
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        got = host(x, adapter="cells")
        for k in range(4):
            alone = universeg.answer(
                universeg.stem(x).x[:, 0], Context(support.images()[:, None], masks[k : k + 1, :, None])
            )
            close(f"class {k}", got[:, k : k + 1], alone)
    picture = (torch.rand(20, 24, 3) * 255).byte().numpy()
    assert host.predict(picture, "cells").shape == (20, 24)
    close("softmax", torch.from_numpy(host.predict(picture, "cells", probabilities=True)).sum(0), torch.ones(20, 24))


def test_label_values_are_kept(universeg: Backbone) -> None:
    task = Task("segment", ("nucleus", "cytoplasm"), values=(7, 200))
    labels = torch.arange(256).view(1, 16, 16) % 3
    made = in_context(universeg, task, images=labels.float(), labels=labels)
    host = Host(universeg)
    host.add(made, "it")
    written = host.predict((torch.rand(16, 16, 3) * 255).byte().numpy(), "it")
    assert set(np.unique(written)) <= {0, 7, 200}


@pytest.mark.parametrize("storage", ["png", "float"])
@pytest.mark.parametrize("soft", [False, True])
def test_what_is_stored_comes_back(universeg: Backbone, tmp_path: Path, storage: str, soft: bool) -> None:
    given = pairs(3, soft=soft)
    made = in_context(universeg, THREE, **given, soft=soft, storage=storage)
    back = read_adapter(save_adapter(made, tmp_path / "a", backbone=universeg))
    for support in (made.parts["support"], back.parts["support"]):
        assert isinstance(support, Support)
        if soft:
            assert (support.labels() - given["labels"]).abs().max() <= 0.5 / 255 + 1e-7
            assert support.masks().shape == (4, 3, 16, 16)
        else:
            assert torch.equal(support.labels(), given["labels"])
        flat = given["images"].flatten(1)
        low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
        error = (support.images() - (given["images"] - low) / (high - low)).abs().max()
        assert error <= (0.5 / 255 if storage == "png" else 2**-11) + 1e-7
    host, loaded = Host(universeg), Host(universeg)
    host.add(made, "it")
    loaded.add(back, "it")
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        close("loaded", loaded(x, adapter="it"), host(x, adapter="it"), 1e-6 if storage == "png" else 1e-2)


def test_pictures_are_compressed(universeg: Backbone) -> None:
    smooth = torch.linspace(0, 1, 16).expand(4, 16, 16)
    made = in_context(universeg, images=smooth, labels=(smooth > 0.5).long())
    assert sum(t.numel() for t in made.tensors().values() if t.dtype == torch.uint8) < 4 * 16 * 16
    assert made.trainable == 0


def test_copies_and_other_precisions_have_contexts_of_their_own(universeg: Backbone) -> None:
    made = in_context(universeg)
    host = Host(universeg)
    host.add(made, "it")
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        want = host(x, adapter="it")
        twin = copy.deepcopy(host)
        assert torch.equal(twin(x, adapter="it"), want)
        half = copy.deepcopy(host).to(torch.bfloat16)
        close("bf16", half(x.bfloat16(), adapter="it").float(), want, 5e-2)


def test_a_loaded_set_replaces_what_was_kept(universeg: Backbone) -> None:
    first = in_context(universeg, storage="float")
    second = in_context(universeg, storage="float", images=1 - pairs(1)["images"])
    host, other = Host(universeg), Host(universeg)
    host.add(first, "it")
    other.add(second, "it")
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        before = host(x, adapter="it")
        support, donor = first.parts["support"], second.parts["support"]
        assert isinstance(support, Support)
        assert isinstance(donor, Support)
        support.load_tensors(donor.tensors())
        assert torch.equal(host(x, adapter="it"), other(x, adapter="it"))
        assert not torch.equal(host(x, adapter="it"), before)


def test_a_subset(universeg: Backbone) -> None:
    support = in_context(universeg, THREE).parts["support"]
    assert isinstance(support, Support)
    some = support.subset([2, 0], universeg, THREE)
    assert torch.equal(some.labels(), support.labels()[[2, 0]])
    assert some.shots == 2


def test_publishing_it_needs_consent(universeg: Backbone, tmp_path: Path) -> None:
    made = in_context(universeg)
    saved = save_adapter(made, tmp_path / "a", backbone=universeg)
    with pytest.raises(MedgraftError) as refused:
        publish(saved, f"file:{tmp_path}/lab/me/it")
    says(refused.value, "support", "share")
    assert publish(saved, f"file:{tmp_path}/lab/me/it", share_images=True)


# Bad input


BAD: dict[str, tuple[dict, tuple[str, ...]]] = {
    "no pair at all": (
        {"images": torch.zeros(0, 16, 16), "labels": torch.zeros(0, 16, 16)},
        ("at least 1", "(0, 16, 16)"),
    ),
    "labels of another size": ({"labels": torch.zeros(3, 8, 8)}, ("(3, 8, 8)",)),
    "colour images": ({"images": torch.zeros(3, 3, 16, 16)}, ("(S, H, W)", "(3, 3, 16, 16)")),
    "a class beyond": ({"labels": torch.full((3, 16, 16), 2)}, ("0 to 1", "2")),
    "grey labels": ({"labels": torch.full((3, 16, 16), 0.5)}, ("soft=True",)),
    "soft labels beyond one": ({"labels": torch.full((3, 1, 16, 16), 2.0), "soft": True}, ("[0, 1]",)),
    "soft labels for other classes": ({"labels": torch.zeros(3, 2, 16, 16), "soft": True}, ("(S, 1, H, W)",)),
    "NaN": ({"images": torch.full((3, 16, 16), float("nan"))}, ("NaN",)),
    "an unknown storage": ({"storage": "jpeg"}, ("png", "jpeg")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_support_set(universeg: Backbone, name: str) -> None:
    options, words = BAD[name]
    with pytest.raises(BadCall) as refused:
        in_context(universeg, **options)
    says(refused.value, *words)


def test_what_is_allowed_with_a_warning(universeg: Backbone) -> None:
    with pytest.warns(UserWarning, match="nowhere labelled"):
        in_context(universeg, labels=torch.zeros(3, 16, 16, dtype=torch.long))
    with pytest.warns(UserWarning, match="3 of the 3 support images are constant"):
        made = in_context(universeg, images=torch.full((3, 16, 16), 9.0))
    assert torch.equal(made.parts["support"].images(), torch.zeros(3, 16, 16))  # type: ignore[operator]


def test_a_query_of_another_size(universeg: Backbone) -> None:
    host = Host(universeg)
    host.add(in_context(universeg), "it")
    with pytest.raises(BadCall) as refused, torch.no_grad():
        host(torch.rand(1, 1, 16, 24), adapter="it")
    says(refused.value, "16 x 16", "16 x 24")


def test_a_head_without_a_support_set(universeg: Backbone, vit: Backbone) -> None:
    host = Host(universeg)
    host.add(Adapter.of(universeg, ONE, {"head": ContextHead.on(universeg, ONE)}), "it")
    with pytest.raises(BadCall) as refused, torch.no_grad():
        host(torch.rand(1, 1, 16, 16), adapter="it")
    says(refused.value, "support set", "Support.on")
    with pytest.raises(BadCall) as refused:
        ContextHead.on(vit, ONE)
    says(refused.value, "does not segment in context")
    with pytest.raises(MedgraftError):
        Support.on(vit, ONE, **pairs(1))
    with pytest.raises(BadCall):
        ContextHead.on(universeg, Task("classify", ("a", "b")))


# Files from strangers


def tampered(universeg: Backbone, tmp_path: Path, picture: bytes | None, **config: int) -> Path:
    """A saved adapter whose only label picture is `picture`."""
    one = {k: v[:1] for k, v in pairs(1).items()}
    made = in_context(universeg, **one)
    support = made.parts["support"]
    assert isinstance(support, Support)
    if picture is not None:
        cell = support.cell("support")
        cell.labels = torch.frombuffer(bytearray(picture), dtype=torch.uint8)
        cell.label_ends = torch.tensor([len(picture)])
        support.config["label_bytes"] = len(picture)
    for name, value in config.items():
        support.config[name] = value
    return save_adapter(made, tmp_path / "a")


def png(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind)
    return stream.getvalue()


STRANGE: dict[str, bytes] = {
    "no picture": b"not a picture at all",
    "another format": png(np.zeros((16, 16), np.uint8), "BMP"),
    "another size": png(np.zeros((16, 17), np.uint8)),
    "colours": png(np.zeros((16, 16, 3), np.uint8)),
    "a label beyond the classes": png(np.full((16, 16), 9, np.uint8)),
    "cut off": png(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2)[:40],
}


@pytest.mark.parametrize("name", STRANGE)
def test_pictures_that_are_refused(universeg: Backbone, tmp_path: Path, name: str) -> None:
    with pytest.raises(BadAdapter) as refused:
        read_adapter(tampered(universeg, tmp_path, STRANGE[name]))
    says(refused.value, "support set")


def test_pictures_that_do_not_add_up(universeg: Backbone, tmp_path: Path) -> None:
    folder = tampered(universeg, tmp_path, None)
    record = json.loads((folder / "adapter.json").read_text())
    assert record["parts"][0]["config"]["shots"] == 1
    made = in_context(universeg)
    support = made.parts["support"]
    assert isinstance(support, Support)
    ends: Tensor = support.cell("support").label_ends
    ends[1] = ends[2] + 5
    with pytest.raises(BadAdapter) as refused:
        read_adapter(save_adapter(made, tmp_path / "b"))
    says(refused.value, "add up")
