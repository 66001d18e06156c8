"""Greedy soups: never below the best member on the set that they are chosen by, in the order of the members' scores."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medgraft.adapters import Adapter, Host, LoRA
from medgraft.adapters.soup import soup
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.greedy_soup import greedy_soup, score_on
from medgraft.training.phantoms import write_dataset
from tests.helpers import ONE, Task, adapter, says


def member(on: Backbone, seed: int, task: Task = ONE) -> Adapter:
    torch.manual_seed(seed)
    return adapter(on, {"lora": LoRA.on(on, task, rank=2)}, task=task, seed=seed)


def members(on: Backbone, count: int = 4) -> dict[str, Adapter]:
    return {f"m{s}": member(on, s) for s in range(count)}


def bias(made: Adapter) -> float:
    """A number that averaging averages: the scores of these tests are functions of it."""
    return float(made.tensors()["head.linear.bias"][0].detach())


def with_biases(on: Backbone, *values: float) -> dict[str, Adapter]:
    found = members(on, len(values))
    for made, value in zip(found.values(), values, strict=True):
        with torch.no_grad():
            made.tensors()["head.linear.bias"].fill_(value)
    return found


def near(target: float) -> Callable[[Adapter], float]:
    return lambda made: -abs(bias(made) - target)


def test_it_adds_what_does_not_hurt_best_first(vit: Backbone) -> None:
    """Target 2: 3 alone is 1 off; with 0.5, 1.75 is .25 off; with 10, 4.5 would be 2.5 off; with 8, no."""
    found = greedy_soup(with_biases(vit, 10, 3, 0.5, 8), near(2))
    assert [(t.name, t.kept) for t in found.tried] == [("m1", True), ("m2", True), ("m3", False), ("m0", False)]
    assert found.tried[0].own == found.tried[0].together == pytest.approx(-1)
    assert [t.own for t in found.tried] == pytest.approx([-1, -1.5, -6, -8])
    assert found.score == pytest.approx(-0.25)
    assert bias(found.soup.adapter) == pytest.approx(1.75)
    assert found.soup.adapter.provenance["choice"] == "greedy, 2 of 4"
    assert len(found.soup.adapter.provenance["members"]) == 2


def test_equal_scores_join_in_the_order_given(vit: Backbone) -> None:
    found = greedy_soup(members(vit), lambda made: 0.5)
    assert [t.name for t in found.tried] == ["m0", "m1", "m2", "m3"]
    assert all(t.kept for t in found.tried)


@pytest.mark.parametrize("seed", range(8))
def test_it_never_scores_below_its_best_member(vit: Backbone, seed: int) -> None:
    """Under scores that are as rugged as can be, with and without a rank."""
    drawn = torch.Generator().manual_seed(seed)
    known: dict[tuple[float, ...], float] = {}

    def rugged(made: Adapter) -> float:
        key = tuple(float(t.detach().double().sum()) for t in made.tensors().values())
        return known.setdefault(key, float(torch.rand(1, generator=drawn)))

    pool = members(vit, 5)
    for rank in (None, 1):
        found = greedy_soup(pool, rugged, rank=rank)
        assert found.score >= max(t.own for t in found.tried)
        assert found.score == rugged(found.soup.adapter), "the score is of another adapter than the one returned"
        assert max(t.own for t in found.tried) == max(rugged(soup([m], rank=rank).adapter) for m in pool.values())


def test_alone_or_in_bad_company_the_best_member_stays_as_it_is(vit: Backbone) -> None:
    for biases in ([2.0], [2.0, 50.0, -90.0]):
        pool = with_biases(vit, *biases)
        made = greedy_soup(pool, near(2)).soup.adapter
        assert all(torch.equal(t, pool["m0"].tensors()[n]) for n, t in made.tensors().items())


def test_on_real_masks_it_holds_too_and_of_the_bits_that_are_saved(vit: Backbone, tmp_path: Path) -> None:
    data = load_dataset(write_dataset(tmp_path / "d", "lesion", train=2, test=4, size=64).parent)
    pool = {f"m{s}": member(vit, s, Task("segment", ("lesion",))) for s in range(3)}
    found = greedy_soup(pool, score_on(vit, data, "test"))
    saved = save_adapter(found.soup.adapter, tmp_path / "soup", dtype="float16", backbone=vit)
    host = Host(vit)
    host.add(read_adapter(saved), "soup")
    assert evaluate(host, "soup", data, "test")["dice"] == found.score
    assert found.score >= max(t.own for t in found.tried)


def test_the_score_is_of_the_bits_that_a_file_holds(vit: Backbone, tmp_path: Path) -> None:
    """A bias that half precision rounds to zero: every pixel is a lesion in full precision, none in half."""
    data = load_dataset(write_dataset(tmp_path / "d", "lesion", train=2, test=2, size=64).parent)
    made = member(vit, 0, Task("segment", ("lesion",)))
    with torch.no_grad():
        made.tensors()["head.linear.weight"].zero_()
        made.tensors()["head.linear.bias"].fill_(1e-9)
    assert score_on(vit, data, "test", dtype="float32")(made) > 0
    assert score_on(vit, data, "test", dtype="float16")(made) == 0


def test_what_cannot_be_mixed_is_refused_before_anything_is_scored(vit: Backbone) -> None:
    def never(made: Adapter) -> float:
        raise AssertionError("scored")

    with pytest.raises(BadCall):
        greedy_soup({"a": member(vit, 0), "b": member(vit, 1, Task("segment", ("gland",)))}, never)
    with pytest.raises(BadCall) as refused:
        greedy_soup({}, never)
    says(refused.value, "none")


def test_a_score_that_is_no_number(vit: Backbone) -> None:
    with pytest.raises(BadData) as refused:
        greedy_soup(members(vit), lambda made: float("nan"))
    says(refused.value, "m0", "nan")
