"""The U-Net that baselines train from scratch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medgraft.backbones import load_backbone
from medgraft.errors import BadCall, BadData, UnknownName
from tests.helpers import images, same_bits

ID = "random:unet:4-8?seed=3"


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, again, other = (load_backbone(id, image_size=32) for id in (ID, ID, "random:unet:4-8"))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    assert first.spec.fingerprint == again.spec.fingerprint != other.spec.fingerprint
    assert first.spec.title == "random:unet:4-8?seed=3 (random weights)"
    assert not any(p.requires_grad for p in first.parameters())


def test_one_map_at_full_size_from_every_stage() -> None:
    on = load_backbone(ID, image_size=32)
    x = images(on)
    features = on(x)
    assert features.maps[0].shape == (2, 4, 32, 32)
    assert features.strides == [1]
    assert same_bits(on.run(on.run(x, stop=1), start=1), features)
    assert same_bits(on(x[:1]), on.run(on.run(x, stop=0).rows(torch.tensor([0]))))


def test_a_trained_network_loads_from_its_file(tmp_path: Path) -> None:
    twin = load_backbone(ID, image_size=32).trainable_copy()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    save_file(twin.network.state_dict(), tmp_path / "net.safetensors")
    back = load_backbone(f"unet:4-8@{tmp_path / 'net.safetensors'}", image_size=32)
    assert not back.spec.random
    x = images(back)
    assert same_bits(back(x), twin(x))
    with pytest.raises(BadData, match="do not fit unet:4-16"):
        load_backbone(f"unet:4-16@{tmp_path / 'net.safetensors'}", image_size=32)


@pytest.mark.parametrize(
    ("id", "size", "error", "why"),
    [
        ("random:unet:4", 32, BadCall, "two or more levels"),
        ("random:unet:4-x", 32, BadCall, "two or more levels"),
        ("random:unet:4-0", 32, BadCall, "two or more levels"),
        ("unet:4-8", 32, BadData, "no trained U-Net ships"),
        ("random:unet:4-8-8", 34, BadCall, "multiple of 4"),
        ("random:unet:4-8-8", 4, BadCall, "multiple of 4, 8 or more"),
        ("random:unet:4-8?width=3", 32, UnknownName, "option"),
    ],
)
def test_bad_ids(id: str, size: int, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        load_backbone(id, image_size=size)
