from collections.abc import Iterator

import pytest
import torch

from medgraft.backbones import Backbone
from medgraft.backbones.sites import _PLAN
from tests import helpers

torch.set_num_threads(1)


def _shared(name: str):
    @pytest.fixture(scope="session", name=name)
    def one() -> Iterator[Backbone]:
        """A backbone that every test shares; law 1 is checked once more when the session ends."""
        shared = helpers.backbone(name)
        before = shared.digest()
        yield shared
        assert shared.digest() == before, f"a test changed the frozen tensors of {name}"
        assert not any(p.requires_grad or p.grad is not None for p in shared.parameters()), f"a test thawed {name}"

    return one


vit, swin, eva, hf_vit, dinov2 = map(_shared, ("vit", "swin", "eva", "hf_vit", "dinov2"))
vit_tiny, swin_tiny, universeg, sam = map(_shared, ("vit_tiny", "swin_tiny", "universeg", "sam"))
meshnet, volume_unet, swin_unetr = map(_shared, ("meshnet", "volume_unet", "swin_unetr"))


@pytest.fixture(params=["vit", "swin"])
def either(request: pytest.FixtureRequest) -> Backbone:
    """The ViT, then the Swin."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def the_same_random_numbers() -> None:
    """Every test begins with the same generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_plan_is_left_behind() -> Iterator[None]:
    """Law 5, after every test: nothing is selected any more."""
    yield
    assert _PLAN.get() is None, "a plan is still selected after this test"
