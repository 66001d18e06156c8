"""LoRA with the LayerNorm in front, the two operators in plain torch: the wiring alone. With the kernels: tests/kernels/test_norm_lora.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medgraft.adapters import Host, LoRA, norm_lora
from medgraft.backbones import Backbone
from medgraft.kernels.door import Path
from tests.helpers import ONE, adapter, close, images


@pytest.fixture
def host(vit: Backbone) -> Host:
    """Six adapters that act on the same layers."""
    host = Host(vit)
    for i in range(6):
        host.add(adapter(vit, {"l": LoRA.on(vit, ONE, rank=1 + i, targets=("*.attn.qkv", "*.fc1"))}, seed=i), f"a{i}")
    return host


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every norm rides that may. The ranks with which each was asked."""
    ranks: list[int] = []

    def path(x, gamma, beta, weight, bias, rank: int) -> Path:
        ranks.append(rank)
        return Path(True, "asked for")

    monkeypatch.setattr(norm_lora, "norm_lora_path", path)
    return ranks


def test_it_is_the_same_function(host: Host, request: pytest.FixtureRequest) -> None:
    x, everyone = images(host.backbone, 6), list(host.adapters)
    with torch.no_grad():
        apart = [host(x, adapter=name) for name in everyone], host(x, adapter=everyone)
        ranks: list[int] = request.getfixturevalue("asked")
        together = [host(x, adapter=name) for name in everyone], host(x, adapter=everyone)
    assert ranks == [rank for rank in range(1, 7) for _ in range(6)] + [sum(range(1, 7))] * 6
    close("logits", together, apart)


def test_threads_do_not_meet(host: Host, asked: list[int]) -> None:
    x, calls = images(host.backbone), [f"a{i % 6}" for i in range(60)]

    def call(name: str) -> torch.Tensor:
        with torch.no_grad():
            return host(x, adapter=name)

    alone = {name: call(name) for name in host.adapters}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(call, calls))
    assert len(asked) == 6 * 66
    assert all(torch.equal(y, alone[name]) for y, name in zip(found, calls, strict=True))
