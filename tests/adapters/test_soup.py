"""Soups: every part is averaged as its kind wants, or refuses; the mean of LoRA products is exact; nothing unlike is mixed."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, Bottleneck, ConvLoRA, Host, LinearHead, LoRA, Part, ScaleShift, Task
from medgraft.adapters.soup import soup
from medgraft.adapters.store import TENSORS_NAME, read_adapter, read_record, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, WrongBackbone
from tests.helpers import CASES, ONE, THREE, Case, adapter, close, images, says, wake

ON = [pytest.param(case, case.on[0], id=str(case)) for case in CASES]


def low_rank(on: Backbone, seed: int, head: int | None = None, **options: Any) -> Adapter:
    """LoRA and a linear head, both awake; the head of seed `head` where one is given."""
    torch.manual_seed(seed)
    part = wake(LoRA.on(on, ONE, **{"rank": 2, **options}), seed)
    made = adapter(on, {"lora": part}, awake=False)
    wake(made.parts["head"], seed if head is None else head)
    return made


def products(made: Adapter, part: str = "lora") -> dict[str, Tensor]:
    """s B A of every site, in float64; of a convolution its kernel."""
    it = made.parts[part]
    if isinstance(it, ConvLoRA):
        return {site: it.kernel(site).detach() for site in it.sites}
    assert isinstance(it, LoRA)
    return {site: it.scale * it.cell(site).B.detach().double() @ it.cell(site).A.detach().double() for site in it.sites}


def answer(on: Backbone, made: Adapter, x: Tensor) -> Tensor:
    host = Host(on)
    host.add(made, "it")
    with torch.no_grad():
        return host(x, "it")


def same_tensors(a: Adapter | Part, b: Adapter | Part) -> bool:
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(
        torch.equal(t, theirs[k]) and t.dtype == theirs[k].dtype for k, t in mine.items()
    )


# Every part


@pytest.mark.parametrize(("case", "name"), ON)
class TestEveryPart:
    @pytest.fixture
    def on(self, name: str, request: pytest.FixtureRequest) -> Backbone:
        return request.getfixturevalue(name)

    def test_a_soup_of_one_is_that_adapter(self, case: Case, on: Backbone) -> None:
        made = case.adapter(on, awake=True)
        alone = soup([made]).adapter
        assert same_tensors(alone, made)
        assert [(n, p.config) for n, p in alone.named_parts()] == [(n, p.config) for n, p in made.named_parts()]
        assert torch.equal(answer(on, alone, images(on)), answer(on, made, images(on)))
        assert not any(t is made.tensors()[n] for n, t in alone.tensors().items()), "shared, not copied"

    def test_it_is_averaged_or_refused_by_name(self, case: Case, on: Backbone, tmp_path: Path) -> None:
        members = [case.adapter(on, awake=True, seed=s) for s in range(3)]
        before = [{n: t.clone() for n, t in m.tensors().items()} for m in members]
        refusing = {n: p for n, p in members[0].named_parts() if p.why_no_soup}
        if refusing:
            with pytest.raises(BadCall) as refused:
                soup(members)
            says(refused.value, next(iter(refusing)), next(iter(refusing.values())).kind, "ensemble")
            return
        made = soup(members).adapter
        for n, p in made.named_parts():
            if isinstance(p, LoRA | ConvLoRA):
                for site, got in products(made, n).items():
                    want = torch.stack([products(m, n)[site] for m in members]).mean(0)
                    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), site
                continue
            for key, t in p.tensors().items():
                found = torch.stack([m.parts[n].tensors()[key].double() for m in members])  # type: ignore[operator]
                assert t.dtype == members[0].parts[n].tensors()[key].dtype  # type: ignore[operator]
                assert torch.equal(t, found.mean(0).to(t.dtype)) or (t - found.mean(0)).abs().max() < 1e-7, key
        for m, was in zip(members, before, strict=True):
            assert all(torch.equal(t, was[n]) for n, t in m.tensors().items()), "a member was changed"
        back = read_adapter(save_adapter(made, tmp_path / "soup", dtype="float32", backbone=on))
        assert torch.equal(answer(on, back, images(on)), answer(on, made, images(on)))
        equal = soup([members[0], copy.deepcopy(members[0]), copy.deepcopy(members[0])]).adapter
        close("a soup of equals", answer(on, equal, images(on)), answer(on, members[0], images(on)))


# LoRA: the mean of the products


def test_ranks_and_scales_of_their_own_fold_into_one(vit: Backbone) -> None:
    members = [
        low_rank(vit, 0, rank=2, alpha=7.0),
        low_rank(vit, 1, rank=5, alpha=3.0, rslora=True),
        low_rank(vit, 2, rank=1, alpha=-4.0),
    ]
    made = soup(members, weights=[1, 2, 5]).adapter
    assert made.parts["lora"].config["rank"] == 8
    for site, got in products(made).items():
        want = sum(w / 8 * products(m)[site] for w, m in zip((1, 2, 5), members, strict=True))
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_the_function_is_that_of_the_averaged_weight(vit: Backbone) -> None:
    """Against plain layers whose weight is W + mean_i s_i B_i A_i, summed one by one in float64."""
    members = [low_rank(vit, s, targets="*.attn.qkv") for s in range(3)]
    made = soup(members).adapter
    mean = {site: torch.stack([products(m)[site] for m in members]).mean(0) for site in products(made)}

    def stand_in(port: str, base: torch.nn.Module) -> torch.nn.Module:
        if port in mean:
            assert isinstance(base, torch.nn.Linear)
            base.weight += mean[port].to(base.weight.dtype)
        return base

    x = images(vit)
    with torch.no_grad():
        features = vit.plain_copy(stand_in, share=False)(x)
        close("soup", answer(vit, made, x), made.parts["head"](features, x), 3e-6)
    factors = copy.deepcopy(members[0])
    with torch.no_grad():
        for name, t in factors.tensors().items():
            t.copy_(torch.stack([m.tensors()[name] for m in members]).mean(0))
        off = (answer(vit, factors, x) - answer(vit, made, x)).abs().max() / answer(vit, made, x).abs().max()
    assert off > 1e-3, "averaging A and B one by one would have been no worse, so this test says nothing"


def test_members_of_equal_weight_and_scale_keep_the_bits_of_their_factors(vit: Backbone) -> None:
    """So that a soup of adapters stored in half precision loses nothing when it is stored in half precision."""
    members = [low_rank(vit, s) for s in range(3)]
    made = soup(members).adapter.parts["lora"]
    for site in made.sites:  # type: ignore[union-attr]
        assert torch.equal(made.cell(site).A, torch.cat([m.parts["lora"].cell(site).A for m in members]))  # type: ignore[operator]
        assert torch.equal(made.cell(site).B, torch.cat([m.parts["lora"].cell(site).B for m in members], 1))  # type: ignore[operator]


def test_members_without_effect_make_a_soup_without_effect(vit: Backbone) -> None:
    made = soup([low_rank(vit, s, alpha=0.0) for s in range(2)]).adapter
    assert all(not p.any() for p in products(made).values())


def test_double_precision_stays(vit: Backbone) -> None:
    made = soup([low_rank(vit, s).double() for s in range(2)]).adapter
    assert {t.dtype for t in made.tensors().values()} == {torch.float64}


# A rank


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_is_the_best_approximation_and_says_its_error(vit: Backbone, rank: int) -> None:
    members = [low_rank(vit, s, targets="*.attn.*") for s in range(3)]
    whole, (cut, errors) = products(soup(members).adapter), soup(members, rank=rank)
    assert cut.parts["lora"].config["rank"] == rank
    assert set(errors) == {f"lora.{site}" for site in whole}
    for site, p in whole.items():
        u, sigma, vh = torch.linalg.svd(p)
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        got = products(cut)[site]
        assert (got - best).norm() <= 1e-6 * p.norm()
        assert errors[f"lora.{site}"] == pytest.approx(float((p - got).norm() / p.norm()), abs=1e-6)
    assert 0 < max(errors.values()) < 1
    assert cut.provenance["settings"] == {"rank": rank, "largest error": max(errors.values())}


def test_errors_fall_as_the_rank_grows(vit: Backbone) -> None:
    members = [low_rank(vit, s) for s in range(3)]
    by_rank = [max(soup(members, rank=r).errors.values()) for r in range(1, 6)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert len(set(by_rank)) == 5


def test_what_has_no_more_than_the_rank_is_left_alone(vit: Backbone) -> None:
    members = [low_rank(vit, s) for s in range(2)]
    for rank in (4, 64):
        made, errors = soup(members, rank=rank)
        assert not errors
        assert same_tensors(made, soup(members).adapter)


def test_a_soup_of_one_can_be_cut(vit: Backbone) -> None:
    member = low_rank(vit, 0, rank=4)
    made, errors = soup([member], rank=2)
    assert made.parts["lora"].config["rank"] == 2
    assert all(0 < e < 1 for e in errors.values())


def test_a_rank_beyond_the_width_of_a_site() -> None:
    """Four input channels hold no more than four directions: the rest of the factors is zero, and nothing is lost."""
    part = wake(LoRA({"narrow": (4, 30), "wide": (20, 30)}, rank=9, alpha=9.0))
    cut, errors = part.truncated(6)
    assert cut.cell("narrow").A.shape == (6, 4)
    assert cut.cell("narrow").B.shape == (30, 6)
    assert errors["narrow"] < 1e-12 < errors["wide"]
    close("narrow", cut.cell("narrow").B @ cut.cell("narrow").A, part.cell("narrow").B @ part.cell("narrow").A)


def test_a_silent_site_is_cut_without_error() -> None:
    cut, errors = LoRA({"a": (8, 8)}, rank=4).truncated(1)
    assert errors == {"a": 0.0}
    assert not cut.cell("a").B.any()


def test_a_soup_draws_no_random_numbers(vit: Backbone) -> None:
    members = [low_rank(vit, s) for s in range(2)]
    before = torch.get_rng_state()
    soup(members, rank=1)
    assert torch.equal(torch.get_rng_state(), before)


# On disk


def test_a_soup_of_one_has_the_same_file_of_tensors(vit: Backbone, tmp_path: Path) -> None:
    member = low_rank(vit, 0)
    save_adapter(member, tmp_path / "a", backbone=vit)
    save_adapter(soup([read_adapter(tmp_path / "a")]).adapter, tmp_path / "b", backbone=vit)
    one, two = ((tmp_path / d / TENSORS_NAME).read_bytes() for d in "ab")
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()
    assert read_record(tmp_path / "a")["parts"] == read_record(tmp_path / "b")["parts"]
    assert read_record(tmp_path / "a")["probe"] == read_record(tmp_path / "b")["probe"]


def test_provenance_says_what_went_in(vit: Backbone) -> None:
    members = [low_rank(vit, s) for s in range(3)]
    for s, m in enumerate(members):
        m.provenance = {
            "recipe": "lora",
            "dataset": "north" if s < 2 else "south",
            "seed": s,
            "labels": "mask",
            "organ": f"organ {s}",
            "settings": {"cache": "/home/she/cache"},
        }
        m.evaluation = [{"dataset": "north", "split": "test", "dice": 0.9}]
    said = soup(members, weights=[2, 1, 1]).adapter.provenance
    assert said["recipe"] == "soup"
    assert [m["weight"] for m in said["members"]] == [0.5, 0.25, 0.25]
    assert [(m["dataset"], m["seed"]) for m in said["members"]] == [("north", 0), ("north", 1), ("south", 2)]
    assert said["dataset"] == ["north", "south"]
    assert said["labels"] == "mask"
    assert "organ" not in said
    assert "/home" not in json.dumps(said)
    assert soup(members).adapter.evaluation == []
    again = soup([soup(members[:2]).adapter, members[2]]).adapter.provenance
    assert again["members"][0]["recipe"] == "soup"
    assert again["dataset"] == ["north", "south"]


# What is refused


def unlike(change: Callable[[Adapter], Adapter]) -> Callable[[Backbone], list[Adapter]]:
    return lambda on: [low_rank(on, 0), change(low_rank(on, 1))]


def altered(made: Adapter, **changes: Any) -> Adapter:
    for name, value in changes.items():
        setattr(made, name, value)
    return made


REFUSED: dict[str, tuple[Callable[[Backbone], list[Adapter]], type[Exception], tuple[str, ...]]] = {
    "another backbone": (
        unlike(lambda a: altered(a, backbone=replace(a.backbone, fingerprint="0" * 64, id="timm:other"))),
        WrongBackbone,
        ("1", "2", "timm:other", "000000000000", "one backbone"),
    ),
    "other classes": (
        unlike(lambda a: altered(a, task=Task("segment", ("gland",)))),
        BadCall,
        ("task", "polyp", "gland", "ensemble"),
    ),
    "other label values": (
        unlike(lambda a: altered(a, task=Task("segment", ("polyp",), (7,)))),
        BadCall,
        ("task", "values", "[7]"),
    ),
    "another size": (
        unlike(lambda a: altered(a, preprocessing=replace(a.preprocessing, size=96))),
        BadCall,
        ("preprocessing", "size", "96"),
    ),
    "another part": (
        lambda on: [low_rank(on, 0), adapter(on, {"bottleneck": Bottleneck.on(on, ONE)})],
        BadCall,
        ("parts", "lora", "bottleneck"),
    ),
    "another kind under the same name": (
        lambda on: [low_rank(on, 0), adapter(on, {"lora": ScaleShift.on(on, ONE)})],
        BadCall,
        ("parts", "scale_shift"),
    ),
    "parts in another order": (
        lambda on: [
            adapter(on, {"a": LoRA.on(on, ONE), "b": ScaleShift.on(on, ONE)}),
            adapter(on, {"b": ScaleShift.on(on, ONE), "a": LoRA.on(on, ONE)}),
        ],
        BadCall,
        ("parts", "order"),
    ),
    "other sites": (
        lambda on: [low_rank(on, 0), low_rank(on, 1, targets=("*.attn.q", "*.attn.k"))],
        BadCall,
        ("lora", "sites", "attn.v", "attn.k"),
    ),
    "DoRA beside LoRA": (lambda on: [low_rank(on, 0), low_rank(on, 1, dora=True)], BadCall, ("lora", "dora", "True")),
    "DoRA beside DoRA": (
        lambda on: [low_rank(on, s, dora=True) for s in range(2)],
        BadCall,
        ("lora", "norm", "ensemble"),
    ),
    "another configuration": (
        lambda on: [adapter(on, {"b": Bottleneck.on(on, ONE, middle=m)}) for m in (4, 6)],
        BadCall,
        ("'b'", "middle", "4", "6"),
    ),
    "another level of the head": (
        lambda on: [adapter(on, {"head": LinearHead.on(on, THREE, level=n)}, task=THREE) for n in (-1, 0)],
        BadCall,
        ("head", "level"),
    ),
    "none": (lambda on: [], BadCall, ("one adapter or more",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unlike_adapters_are_refused_by_name(vit: Backbone, what: str) -> None:
    members, kind, words = REFUSED[what]
    with pytest.raises(kind) as refused:
        soup(members(vit))
    says(refused.value, *words)


def test_names_given_are_the_names_said(vit: Backbone) -> None:
    with pytest.raises(BadCall) as refused:
        soup({"clinic": low_rank(vit, 0), "archive": low_rank(vit, 1, targets="*.attn.q")})
    says(refused.value, "clinic", "archive")


def test_whole_numbers_that_differ_have_no_mean(vit: Backbone) -> None:
    case = next(c for c in CASES if str(c) == "aspp_head-plain")
    members = [case.adapter(vit, awake=True, seed=s) for s in range(2)]
    count = next(t for n, t in members[1].tensors().items() if n.endswith("num_batches_tracked"))
    count += 1
    with pytest.raises(BadCall) as refused:
        soup(members)
    says(refused.value, "num_batches_tracked", "whole numbers", "aspp_head")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], []])
def test_bad_weights(vit: Backbone, weights: list[float]) -> None:
    with pytest.raises(BadCall) as refused:
        soup([low_rank(vit, 0), low_rank(vit, 1)], weights=weights)
    says(refused.value, "2 positive weights", "leave out")


def test_bad_ranks(vit: Backbone) -> None:
    members = [low_rank(vit, s) for s in range(2)]
    with pytest.raises(BadCall) as refused:
        soup(members, rank=0)
    says(refused.value, "rank 0", "1 or more")
    with pytest.raises(BadCall) as refused:
        soup([m.without_site_parts() for m in members], rank=2)
    says(refused.value, "head", "rank to cut")
    with pytest.raises(BadCall) as refused:
        soup([low_rank(vit, 0, rank=4, dora=True)], rank=2)
    says(refused.value, "DoRA", "rank 2")
