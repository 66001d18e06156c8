"""Label dropout as a transform, hiding labels, and batches that say who annotated what."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Adapter, Host, LinearHead
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.cache import PrefixCache
from medgraft.training.data import Augment, Batches, Dataset, load_dataset, sample_shots
from medgraft.training.fit import FitOptions, fit, validate
from medgraft.training.label_dropout import LabelDropout, hide_labels, partial_classes
from medgraft.training.partial_losses import PartialLoss, adaptive_loss
from tests.helpers import Task
from tests.training.toy_pack import blocks, entry, pack

FULL = torch.tensor([0, 1, 2, 3])
MASK = torch.tensor([[0, 1, 2], [3, 3, 0]])


def two_labs(root: Path, **more: object) -> Dataset:
    """Six training items of two laboratories and two test items, all with cytoplasm and nucleus."""
    items = [entry(n, domain="lab_a" if n < 4 else "lab_b", **more) for n in range(6)]
    items += [entry(n, domain=("lab_a", "lab_b")[n % 2], split="test") for n in (6, 7)]
    return load_dataset(pack(root, items, [blocks(1, 2)]))


def batches(dataset: Dataset, **options: object) -> Batches:
    shared = {"size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 4, "partial": True, **options}
    return Batches(dataset, dataset.split("train"), **shared)  # type: ignore[arg-type]


# The transform


def test_drop_frequency_is_p_and_the_choice_is_uniform() -> None:
    dropped: Counter[tuple[int, ...]] = Counter()
    drop, n = LabelDropout(0.3, (1, 3)), 4000
    for visit in range(n):
        mask, groups = drop(MASK, FULL, item="a", visit=visit)
        gone = tuple(int(k) for k in (groups != FULL).nonzero()[:, 0])
        assert len(gone) <= 1
        for k in gone:
            assert groups[k] == 0
            assert torch.equal(mask, MASK.masked_fill(MASK.eq(k), 0))
        if not gone:
            assert mask is MASK
        dropped[gone] += 1
    assert set(dropped) == {(), (1,), (3,)}, "class 2 is annotated everywhere and never dropped"
    for found, share in ((n - dropped[()], 0.3), (dropped[1,], 0.15), (dropped[3,], 0.15)):
        assert abs(found - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_only_what_is_annotated_alone_and_visible_can_be_dropped() -> None:
    always = LabelDropout(1.0, (1, 2, 3))

    def dropped(mask: Tensor, groups: Tensor) -> set[int]:
        found = (always(mask, groups, item="a", visit=v)[1] for v in range(40))
        return {int(k) for g in found for k in (g != groups).nonzero()[:, 0]}

    assert dropped(MASK, FULL) == {1, 2, 3}
    assert dropped(MASK.masked_fill(MASK.eq(3), 0), FULL) == {1, 2}
    assert dropped(MASK, torch.tensor([0, 1, 0, 3])) == {1, 3}
    assert dropped(MASK, torch.tensor([0, 1, 1, 3])) == {3}, "classes drawn as one are no single class"
    assert dropped(torch.zeros_like(MASK), FULL) == set()


def test_it_is_a_function_of_seed_item_and_visit() -> None:
    def gone(seed: int, item: str) -> list[bool]:
        drop = LabelDropout(0.5, (1,), seed)
        return [bool((drop(MASK, FULL, item=item, visit=v)[1] != FULL).any()) for v in range(64)]

    torch.manual_seed(5)
    first = gone(0, "a")
    assert gone(0, "a") == first
    assert len({tuple(gone(s, i)) for s in (0, 1) for i in "ab"}) == 4


def test_zero_never_drops_and_one_always() -> None:
    for visit in range(50):
        mask, groups = LabelDropout(0.0, (1,))(MASK, FULL, item="a", visit=visit)
        assert mask is MASK
        assert groups is FULL
        assert LabelDropout(1.0, (1,))(MASK, FULL, item="a", visit=visit)[1][1] == 0


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_is_a_probability(p: float) -> None:
    with pytest.raises(BadCall, match="from 0 to 1"):
        LabelDropout(p, (1,))


def test_the_background_is_never_dropped() -> None:
    with pytest.raises(BadCall, match="never the background"):
        LabelDropout(0.5, (0, 1))


# Hiding


def test_hidden_labels_stay_in_the_test_truth(tmp_path: Path) -> None:
    whole = two_labs(tmp_path / "p")
    found = hide_labels(whole, "cytoplasm@lab_b")
    assert [found.groups(i) for i in found.split("train")] == [(0, 1, 2)] * 4 + [(0, 0, 2)] * 2
    assert [found.annotated(i) for i in found.split("test")] == [(True, True)] * 2
    assert partial_classes(found, found.split("train")) == (1,)
    assert partial_classes(whole, whole.split("train")) == ()
    assert found.present(found.items[4]) == {2}
    assert whole.present(whole.items[4]) == {1, 2}, "the data set that was given is as it was"
    assert hide_labels(whole, "") is whole
    both = hide_labels(whole, "cytoplasm@lab_b, nucleus@lab_a")
    assert {both.groups(i) for i in both.split("train")} == {(0, 1, 0), (0, 0, 2)}


def test_validation_is_part_of_training(tmp_path: Path) -> None:
    items = [entry(0, domain="a"), entry(1, domain="b"), entry(2, domain="b", split="val")]
    found = hide_labels(load_dataset(pack(tmp_path / "p", items, [blocks(1, 2)])), "nucleus@b")
    assert found.groups(found.items[2]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("cytoplasm", "CLASS@SOURCE"),
        ("@lab_b", "CLASS@SOURCE"),
        ("cytoplasm@", "CLASS@SOURCE"),
        ("cytoplasma@lab_b", "did you mean 'cytoplasm'"),
        ("cytoplasm@lab_c", "did you mean 'lab_b' or 'lab_a'"),
        ("cytoplasm@lab_a,cytoplasm@lab_b", "no training item that annotates cytoplasm"),
    ],
)
def test_rules_that_cannot_be_followed(tmp_path: Path, rule: str, why: str) -> None:
    with pytest.raises((BadCall, BadData, UnknownName), match=why):
        hide_labels(two_labs(tmp_path / "p"), rule)


# Batches


def test_batches_say_who_annotated_what(tmp_path: Path) -> None:
    dataset = hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b")
    run = batches(dataset, dropout=LabelDropout(1.0, (1,)))
    for step in range(4):
        batch = run.batch(step)
        assert batch.groups is not None
        assert batch.groups.tolist() == [[0, 0, 2]] * 4, "dropped in lab_a, hidden in lab_b"
        for row, item in enumerate(batch.items):
            assert set(batch.targets[row].unique().tolist()) == ({0, 2} if item.domain == "lab_a" else {0, 1, 2})
        again = run.batch(step)
        assert torch.equal(batch.targets, again.targets)
    (whole, rest) = run.once()
    assert torch.equal(torch.cat([whole.groups, rest.groups]), torch.tensor([[0, 1, 2]] * 4 + [[0, 0, 2]] * 2))
    assert batches(dataset, partial=False).batch(0).groups is None


def test_every_visit_draws_anew(tmp_path: Path) -> None:
    run = batches(hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b"), dropout=LabelDropout(0.5, (1,)))
    dropped: dict[str, set[bool]] = {}
    for step in range(30):  # 20 visits of each item
        batch = run.batch(step)
        assert batch.groups is not None
        for item, groups in zip(batch.items, batch.groups.tolist(), strict=True):
            dropped.setdefault(item.id, set()).add(groups[1] == 0)
    assert dropped == {f"i{n}": {True, False} for n in range(4)} | {"i4": {True}, "i5": {True}}


def test_images_do_not_depend_on_dropout(tmp_path: Path) -> None:
    dataset = hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b")
    shared = {"augment": Augment(seed=0, views=2)}
    plain, dropped = (batches(dataset, **shared, dropout=LabelDropout(p, (1,))) for p in (0.0, 0.9))
    assert all(torch.equal(plain.batch(t).images, dropped.batch(t).images) for t in range(3))
    assert not all(torch.equal(plain.batch(t).targets, dropped.batch(t).targets) for t in range(3))
    assert [plain.digest(i) for i in plain.items] == [dropped.digest(i) for i in dropped.items]
    assert plain.labels != dropped.labels


def test_balanced_batches_see_every_source_equally_often(tmp_path: Path) -> None:
    run = batches(two_labs(tmp_path / "p"), balance="domain", batch_size=3)
    rows = [item for step in range(16) for item in run.batch(step).items]  # 48 places, 24 a laboratory
    assert Counter(item.domain for item in rows) == {"lab_a": 24, "lab_b": 24}
    assert set(Counter(i.id for i in rows if i.domain == "lab_a").values()) == {6}
    assert set(Counter(i.id for i in rows if i.domain == "lab_b").values()) == {12}
    assert len(run) == 3  # 4 visits of each laboratory, 3 a batch
    assert [i.id for i in run.batch(7).items] == [i.id for i in rows[21:24]], "a function of the step alone"
    other = batches(two_labs(tmp_path / "p"), balance="domain", batch_size=3, seed=1)
    assert [i.id for t in range(4) for i in other.batch(t).items] != [i.id for i in rows[:12]]
    with pytest.raises(BadCall, match="'source' needs that key on every item; missing on i0"):
        batches(two_labs(tmp_path / "p"), balance="source")
    with pytest.raises(UnknownName, match="did you mean 'domain'"):
        batches(two_labs(tmp_path / "p"), balance="domains")


def test_items_without_any_annotation_are_named(tmp_path: Path) -> None:
    items = [entry(n, labelled=[] if n < 2 else ["nucleus"]) for n in range(4)]
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1, 2)]))
    with pytest.warns(UserWarning, match="2 of 4 items annotate none of cytoplasm, nucleus .* i0, i1"):
        batches(dataset)
    bare = replace(dataset, items=dataset.items[:2])
    with pytest.raises(BadData, match="none of the 2 items annotates any of cytoplasm, nucleus: i0, i1"):
        batches(bare)
    with pytest.raises(BadData, match="cytoplasm of 'toy' is annotated on no training item"):
        sample_shots(dataset, None, 0)


# Training

OPTIONS = FitOptions(4, lr=1e-2, keep_every=1)


def trained(vit: Backbone, run: Batches, **more: object) -> list[Tensor]:
    torch.manual_seed(0)
    task = Task("segment", ("cytoplasm", "nucleus"))
    host = Host(vit)
    host.add(Adapter.of(vit, task, {"head": LinearHead.on(vit, task)}), "x")
    fit(host, "x", run, more.pop("options", OPTIONS), quiet=True, **more)  # type: ignore[arg-type]
    return list(host.adapters["x"].tensors().values())


def test_zero_is_the_adaptive_loss_bit_for_bit_and_more_is_not(vit: Backbone, tmp_path: Path) -> None:
    dataset = hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b")
    loss = PartialLoss("adaptive")
    plain = trained(vit, batches(dataset), loss=loss)
    zero = trained(vit, batches(dataset, dropout=LabelDropout(0.0, (1,))), loss=loss)
    half = trained(vit, batches(dataset, dropout=LabelDropout(0.5, (1,))), loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, half, strict=True))


def test_the_prefix_cache_gives_the_same_training(vit: Backbone, tmp_path: Path) -> None:
    dataset = hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b")

    def run() -> Batches:
        return batches(dataset, dropout=LabelDropout(0.5, (1,)), augment=Augment(seed=0, views=2), balance="domain")

    cache = PrefixCache(vit, vit.depth)
    without = trained(vit, run(), loss=adaptive_loss)
    within = trained(vit, run(), loss=adaptive_loss, cache=cache)
    assert cache.hits
    for a, b in zip(without, within, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_interrupted_run_resumes_to_the_same_bits(
    vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = hide_labels(two_labs(tmp_path / "p"), "cytoplasm@lab_b")

    def run(p: float = 0.5) -> Batches:
        return batches(dataset, dropout=LabelDropout(p, (1,)), balance="domain")

    wanted = trained(vit, run(), loss=adaptive_loss)
    work = tmp_path / "work"
    work.mkdir()
    real, seen = Batches.batch, []

    def stop(self: Batches, step: int) -> object:
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(Batches, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(vit, run(), loss=adaptive_loss, out=work)
    monkeypatch.setattr(Batches, "batch", real)
    got = trained(vit, run(), loss=adaptive_loss, out=work, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    for other, loss in ((run(0.4), adaptive_loss), (run(), PartialLoss("marginal"))):
        with pytest.raises(BadData, match="other options"):
            trained(vit, other, loss=loss, out=work, resume=True)


def test_validation_and_the_log_score_only_what_was_annotated(vit: Backbone, tmp_path: Path) -> None:
    """A head that says nucleus everywhere: right on lab_b, where the cytoplasm was hidden, and half wrong on lab_a."""
    dataset = two_labs(tmp_path / "p")
    task = Task("segment", ("cytoplasm", "nucleus"))
    host = Host(vit)
    host.add(Adapter.of(vit, task, {"head": LinearHead.on(vit, task)}), "x")
    with torch.no_grad():
        for p in host.adapters["x"].parameters():
            p.zero_()
        host.adapters["x"].tensors()["head.linear.bias"][2] = 1.0
    whole = validate(host, "x", batches(dataset))
    nucleus = validate(host, "x", batches(hide_labels(dataset, "cytoplasm@lab_b")))
    assert 0 < whole < nucleus
    assert nucleus == pytest.approx(whole * (4 + 2 * 2) / 6)  # 4 images of two classes, one at 0; 2 images of one class


def test_sgd_is_nesterovs(vit: Backbone, tmp_path: Path) -> None:
    run = batches(two_labs(tmp_path / "p"))
    adam, sgd, again = (
        trained(vit, run, loss=adaptive_loss, options=FitOptions(2, lr=1e-2, optimiser=name))
        for name in ("adamw", "sgd", "sgd")
    )
    assert all(torch.equal(a, b) for a, b in zip(sgd, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(sgd, adam, strict=True))
    with pytest.raises(BadCall, match="'adamw' or 'sgd', got 'adam'"):
        FitOptions(2, optimiser="adam")  # type: ignore[arg-type]
