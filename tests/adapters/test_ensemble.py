"""Ensembles: the mean of probabilities, one prefix for all, and nothing but members of one task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.adapters import Adapter, ClassifierHead, Host, LoRA, MaskHead, Task
from medgraft.adapters.ensemble import Ensemble
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, UnknownName
from tests.helpers import LABELS, ONE, THREE, adapter, images, says


def host_of(on: Backbone, members: Sequence[Adapter]) -> tuple[Host, list[str]]:
    host, names = Host(on), [f"m{i}" for i in range(len(members))]
    for name, member in zip(names, members, strict=True):
        host.add(member, name)
    return host, names


def made(on: Backbone, task: Task, seed: int, **options: Any) -> Adapter:
    torch.manual_seed(seed)
    parts: dict[str, Any] = {"lora": LoRA.on(on, task, **{"rank": 2, "targets": "blocks.2.attn.*", **options})}
    if task.kind == "classify":
        parts["head"] = ClassifierHead.on(on, task)
    return adapter(on, parts, task=task, seed=seed)


def picture(seed: int = 0, size: tuple[int, int] = (70, 51)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", [ONE, THREE, LABELS], ids=["one", "three", "labels"])
def test_it_is_the_mean_of_the_members(vit: Backbone, task: Task) -> None:
    host, names = host_of(vit, [made(vit, task, s) for s in range(3)])
    x = images(vit)
    with torch.no_grad():
        want = torch.stack([task.probabilities(host(x, n)) for n in names]).mean(0)
        got = Ensemble(host, names)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    one = host.predict(picture(), names[0], probabilities=True)
    several = Ensemble(host, names).predict(picture(), probabilities=True)
    each = [host.predict(picture(), n, probabilities=True) for n in names]
    if task.kind == "classify":
        assert several.keys() == one.keys() == set(task.classes)
        for c in task.classes:
            assert several[c] == pytest.approx(np.mean([e[c] for e in each]), abs=1e-6)
        return
    assert several.dtype == np.float32
    np.testing.assert_allclose(several, np.mean(each, 0), rtol=0, atol=1e-6)
    mask = Ensemble(host, names).predict(picture())
    assert mask.dtype == np.uint8
    assert mask.shape == (70, 51)
    decided = several.argmax(0) if len(several) > 1 else several[0] > 0.5
    assert np.array_equal(mask, decided)
    assert any(not np.array_equal(mask, host.predict(picture(), n)) for n in names)


@pytest.mark.parametrize("task", [ONE, THREE, LABELS], ids=["one", "three", "labels"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_of_identical_members_it_is_the_member(vit: Backbone, task: Task, count: int) -> None:
    host, names = host_of(vit, [made(vit, task, 0) for _ in range(count)])
    together, x = Ensemble(host, names), images(vit)
    with torch.no_grad():
        assert torch.equal(together(x), task.probabilities(host(x, "m0")))
    for seed in range(3):
        got, want = together.predict(picture(seed)), host.predict(picture(seed), "m0")
        assert got == want if task.kind == "classify" else np.array_equal(got, want)


def test_label_values_are_the_tasks(vit: Backbone) -> None:
    task = Task("segment", ("a", "b"), (40, 7))
    host, names = host_of(vit, [made(vit, task, s) for s in range(2)])
    assert set(np.unique(Ensemble(host, names).predict(picture()))) <= {0, 7, 40}


def test_the_prefix_is_computed_once(vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three members that act in the last of three stages: two shared stages, and the last one three times."""
    host, names = host_of(vit, [made(vit, ONE, s) for s in range(3)])
    stages: list[int] = []
    inner = type(vit).stage

    def counted(self: Backbone, state: Any) -> Any:
        stages.append(state.stage)
        return inner(self, state)

    monkeypatch.setattr(type(vit), "stage", counted)
    Ensemble(host, names).predict(picture())
    assert sorted(stages) == [0, 1, 2, 2, 2]


def test_each_member_sees_its_own_preprocessing(vit: Backbone) -> None:
    members = [made(vit, ONE, s) for s in range(3)]
    members[1].preprocessing = replace(members[1].preprocessing, size=96)
    members[2].preprocessing = replace(members[2].preprocessing, crop=True)
    host, names = host_of(vit, members)
    shot = picture()
    shot[:20] = 0
    together = Ensemble(host, names)
    want = np.mean([host.predict(shot, n, probabilities=True) for n in names], 0)
    np.testing.assert_allclose(together.predict(shot, probabilities=True), want, rtol=0, atol=1e-6)
    with pytest.raises(BadCall) as refused:
        together(images(vit))
    says(refused.value, "preprocessing", "predict(image)")


def test_it_answers_for_a_file(vit: Backbone, tmp_path: Path) -> None:
    host, names = host_of(vit, [made(vit, ONE, s) for s in range(2)])
    Image.fromarray(picture()).save(tmp_path / "x.png")
    together = Ensemble(host, names)
    assert np.array_equal(together.predict(tmp_path / "x.png"), together.predict(picture()))
    with pytest.raises(BadData):
        together.predict(tmp_path / "y.png")


def test_promptable_members_are_asked_the_same(sam: Backbone) -> None:
    torch.manual_seed(0)
    host, names = host_of(sam, [Adapter.of(sam, ONE, {"head": MaskHead.on(sam, ONE)}) for _ in range(2)])
    together, asked = Ensemble(host, names), {"box": (5, 5, 40, 60)}
    want = np.mean([host.predict(picture(), n, prompts=asked, probabilities=True) for n in names], 0)
    np.testing.assert_allclose(together.predict(picture(), prompts=asked, probabilities=True), want, atol=1e-6)
    with pytest.raises(BadCall, match="give prompts="):
        together.predict(picture())


def test_gradients_reach_every_member(vit: Backbone) -> None:
    host, names = host_of(vit, [made(vit, ONE, s) for s in range(2)])
    Ensemble(host, names)(images(vit)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n in names for p in host.adapters[n].parameters())


def test_members_of_another_task_are_refused(vit: Backbone) -> None:
    for other in (THREE, LABELS, Task("segment", ("gland",)), Task("segment", ("polyp",), (9,))):
        host, names = host_of(vit, [made(vit, ONE, 0), made(vit, other, 1)])
        with pytest.raises(BadCall) as refused:
            Ensemble(host, names)
        says(refused.value, "m0", "m1", "polyp (1)", f"({other.values[0]})", other.classes[0])


def test_who_is_not_there_is_named(vit: Backbone) -> None:
    host, names = host_of(vit, [made(vit, ONE, 0)])
    with pytest.raises(UnknownName) as refused:
        Ensemble(host, ["m0", "m9"])
    says(refused.value, "m9", "m0")
    together = Ensemble(host, names)
    host.remove("m0")
    with pytest.raises(UnknownName):
        together.predict(picture())


@pytest.mark.parametrize("names", [[], "m0"])
def test_names_are_a_list_of_one_or_more(vit: Backbone, names: Any) -> None:
    host, _ = host_of(vit, [made(vit, ONE, 0)])
    with pytest.raises(BadCall) as refused:
        Ensemble(host, names)
    says(refused.value, "one or more")
