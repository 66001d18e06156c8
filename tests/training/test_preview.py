"""The picture on a card: promptable adapters are asked for something that is there."""

from typing import Any

import numpy as np
import pytest

from medgraft.adapters import Adapter, Host, LinearHead, MaskHead
from medgraft.adapters.card import is_phantom
from medgraft.adapters.on_image import OnImage
from medgraft.backbones import Backbone
from medgraft.training.phantoms import preview
from medgraft.training.preview import phantom_preview
from tests.helpers import ONE


def asked_by(host: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts of every answer on the picture."""
    seen: list[Any] = []
    real = OnImage.predict

    def spy(self: OnImage, adapter: str, **options: Any) -> Any:
        seen.append(options["prompts"])
        return real(self, adapter, **options)

    monkeypatch.setattr(OnImage, "predict", spy)
    assert is_phantom(phantom_preview(host, name))
    return seen


def test_a_promptable_adapter_is_asked_for_the_largest_object(sam: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(sam)
    host.add(Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)}), "it")
    for seed, prompts in enumerate(asked_by(host, "it", monkeypatch)):
        instance = preview(seed).instance
        sizes = {k: (instance == k).sum() for k in np.unique(instance) if k}
        x0, y0, x1, y1 = prompts["boxes"].astype(int).T
        inside = instance[y0.min() : y1.max(), x0.min() : x1.max()]
        assert (inside == max(sizes, key=lambda k: sizes[k])).sum() == max(sizes.values())


def test_others_are_asked_nothing(sam: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(sam)
    host.add(Adapter.of(sam, ONE, {"head": LinearHead.on(sam, ONE)}), "it")
    assert asked_by(host, "it", monkeypatch) == [None, None, None]
