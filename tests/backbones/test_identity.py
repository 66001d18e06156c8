"""Fingerprints, digests and random weights."""

import hashlib
import time

import pytest
import torch
from torch import nn

from medgraft.backbones import load_backbone
from medgraft.backbones.identity import digest, fingerprint, redraw
from tests.helpers import tiny_swin, tiny_vit


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1, 2]),
        "c": torch.zeros(0),
        "d": torch.tensor(1.5, dtype=torch.bfloat16),
    }


def test_the_definition() -> None:
    """sha256 over the sorted lines name|dtype|shape|sha256(bytes)."""
    lines = [
        f"a|float32|2x3|{hashlib.sha256(torch.arange(6.0).numpy().tobytes()).hexdigest()}",
        f"b|int64|2|{hashlib.sha256(torch.tensor([1, 2]).numpy().tobytes()).hexdigest()}",
        f"c|float32|0|{hashlib.sha256(b'').hexdigest()}",
        f"d|bfloat16||{hashlib.sha256(torch.tensor(1.5, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()}",
    ]
    assert fingerprint(tensors()) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_neither_order_nor_layout_nor_device_of_names_matter() -> None:
    found = tensors()
    assert fingerprint(dict(reversed(found.items()))) == fingerprint(found) == fingerprint(list(found.items()))
    assert fingerprint({**found, "a": found["a"].t().contiguous().t()}) == fingerprint(found)
    assert fingerprint({**found, "a": nn.Parameter(found["a"])}) == fingerprint(found)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["a"].view(torch.int32)[0, 0].__ixor__(1),
        lambda t: t.update(a=t["a"].view(3, 2)),
        lambda t: t.update(a=t["a"].view(torch.int32)),
        lambda t: t.update(e=t.pop("a")),
        lambda t: t.pop("c"),
        lambda t: t.update(e=torch.zeros(1)),
        lambda t: t.update(a=t["b"], b=t["a"]),
        lambda t: t.update(a=-t["a"]),
    ],
    ids=["a bit", "a shape", "a type", "a name", "one less", "one more", "two exchanged", "a sign of zero"],
)
def test_everything_else_does(change) -> None:
    found = tensors()
    before = fingerprint(found)
    change(found)
    assert fingerprint(found) != before


def test_a_digest_covers_buffers_also_those_that_are_not_saved() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("quiet", torch.zeros(2), persistent=False)
    before = digest(module)
    module.running_mean += 1
    middle = digest(module)
    module.quiet += 1
    assert len({before, middle, digest(module)}) == 3


def test_it_is_fast() -> None:
    """A digest of 22 M parameters takes far less than a forward pass of a large model."""
    big = {"w": torch.zeros(22_000_000)}
    begin = time.process_time()
    fingerprint(big)
    assert time.process_time() - begin < 1.0


# Random weights


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_the_seed_and_the_names_decide_alone(make) -> None:
    torch.manual_seed(1)
    one, two, three = make(), make(), make()
    redraw(one, 3)
    torch.manual_seed(2)
    redraw(two, 3)
    redraw(three, 4)
    assert digest(one) == digest(two) != digest(three)
    state = torch.get_rng_state()
    redraw(one, 3)
    assert torch.equal(torch.get_rng_state(), state), "it draws from the global generator"


def test_ids_with_seeds() -> None:
    plain, zero, one, other = (load_backbone(f"random:hf:vit{q}") for q in ("", "?seed=0", "?seed=1", "?seed=1"))
    assert plain.spec.fingerprint == zero.spec.fingerprint != one.spec.fingerprint == other.spec.fingerprint
    assert one.digest() == other.digest()
    assert one.spec.id == "random:hf:vit?seed=1"
    assert one.spec.random


@pytest.mark.parametrize(
    "id",
    [
        "random:timm:vit_tiny_patch16_224",
        "random:timm:swin_tiny_patch4_window7_224",
        "random:hf:vit",
        "random:hf:dinov2",
    ],
)
def test_random_weights_have_unit_gain(id: str) -> None:
    """Nothing hides behind a residual connection: every branch adds about as much as it gets."""
    on = load_backbone(id, image_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, last = on.run(x, stop=0).x, on.run(x, stop=on.depth).x
        gains = []
        state = on.run(x, stop=0)
        for k in range(on.depth):
            after = on.run(state, stop=k + 1)
            if after.x.shape == state.x.shape:
                gains.append(float((after.x - state.x).std()))
            state = after
    assert min(gains) > 0.2
    assert 0.5 < float(last.std() / first.std()) < 20
    assert all(p.abs().max() > 0 for p in on.parameters())
