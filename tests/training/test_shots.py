from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.data import Augment, Batches, load_dataset, prepare, sample_shots
from tests.training.toy_pack import blocks, entry, pack, picture, save, shots_pack

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_a_made_split_keeps_groups_together_and_ignores_the_order(tmp_path: Path) -> None:
    items = [entry(n, split=None, group=f"patient {n // 3}") for n in range(30)]
    first = load_dataset(pack(tmp_path / "p", items, [blocks(1)]))
    where = {item.id: item.split for item in first.items}
    assert all(len({where[f"i{3 * g + k}"] for k in range(3)}) == 1 for g in range(10))
    assert Counter(where.values()) == {"train": 18, "val": 6, "test": 6}
    again = load_dataset(pack(tmp_path / "p", items[::-1], [blocks(1)]))
    assert {item.id: item.split for item in again.items} == where


@pytest.mark.parametrize(
    ("count", "want"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (20, (12, 4, 4))]
)
def test_small_splits(tmp_path: Path, count: int, want: tuple[int, int, int]) -> None:
    dataset = load_dataset(pack(tmp_path / "p", [entry(n, split=None) for n in range(count)], [blocks(1)]))
    assert tuple(len(dataset.split(name)) for name in ("train", "val", "test")) == want


def test_shots_are_seeded_nested_and_cover_the_classes(tmp_path: Path) -> None:
    dataset = load_dataset(shots_pack(tmp_path / "p"))
    for seed in range(8):
        chosen = sample_shots(dataset, 12, seed)
        assert len({item.id for item in chosen}) == 12
        assert all(item.split == "train" for item in chosen)
        for n in (1, 2, 5):
            assert sample_shots(load_dataset(tmp_path / "p"), n, seed) == chosen[:n]
        assert dataset.present(chosen[0])  # never an empty mask alone
        assert dataset.present(chosen[0]) | dataset.present(chosen[1]) == {1, 2}
    assert len({tuple(i.id for i in sample_shots(dataset, 5, seed)) for seed in range(8)}) > 4
    assert sample_shots(dataset, None, 0) == dataset.split("train")


def test_shots_that_cannot_be_had(tmp_path: Path) -> None:
    dataset = load_dataset(shots_pack(tmp_path / "p"))
    with pytest.raises(BadData, match="13 shots asked for, 'toy' has 12 training items"):
        sample_shots(dataset, 13, 0)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(BadCall, match="shots must be a whole number"):
            sample_shots(dataset, wrong, 0)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'segment'"):
        sample_shots(dataset, 1, 0, task="segmentation")  # type: ignore[arg-type]
    with pytest.raises(BadData, match="no image labels"):
        sample_shots(dataset, 1, 0, task="classify")
    save(tmp_path / "p/masks/i9.png", blocks(1))  # the only one with class 2
    with pytest.raises(BadData, match=r"no training item with nucleus.*classes=\('cytoplasm',\)"):
        sample_shots(load_dataset(tmp_path / "p"), None, 0)
    tests_only = load_dataset(pack(tmp_path / "t", [entry(0, split="test")], [blocks(1)]))
    with pytest.raises(BadData, match="no training items"):
        sample_shots(tests_only, 1, 0)


def test_shots_per_class(tmp_path: Path) -> None:
    items = [entry(n, label=n % 3) for n in range(15)]
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1)], label_names=["a", "b", "c"]), labels="label")
    chosen = sample_shots(dataset, 4, 0, task="classify")
    assert Counter(item.label for item in chosen) == {0: 4, 1: 4, 2: 4}
    assert sample_shots(dataset, 2, 0, task="classify") == chosen[:6]
    assert sample_shots(dataset, 2, 1, task="classify") != chosen[:6]
    assert len(sample_shots(dataset, None, 0, task="classify")) == 15
    with pytest.raises(BadData, match="6 shots per class asked for, 'toy' has: a 5, b 5, c 5"):
        sample_shots(dataset, 6, 0, task="classify")
    with pytest.raises(BadData, match="no masks to learn from"):
        sample_shots(dataset, 1, 0)
    lacking = load_dataset(pack(tmp_path / "q", items, [blocks(1)], label_names=["a", "b", "c", "d"]))
    with pytest.raises(BadData, match="no training item of class d"):
        sample_shots(lacking, 1, 0, task="classify")


def batches(root: Path, **options: Any) -> Batches:
    dataset = load_dataset(root)
    options = {"size": 16, "mean": MEAN, "std": STD, "batch_size": 4, "augment": Augment(seed=1), **options}
    return Batches(dataset, sample_shots(dataset, 5, 0), **options)


def test_batches_depend_on_their_number_alone(tmp_path: Path) -> None:
    root = shots_pack(tmp_path / "p")
    run, resumed = batches(root), batches(root, keep_bytes=0)
    for step in range(7):
        run.batch(step)
    first, again = run.batch(7), resumed.batch(7)
    assert (first.images.shape, first.targets.shape) == ((4, 3, 16, 16), (4, 16, 16))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert (first.items, first.views) == (again.items, again.views)
    assert not torch.equal(first.images, run.batch(8).images)


def test_the_stream_visits_every_item_equally(tmp_path: Path) -> None:
    run = batches(shots_pack(tmp_path / "p"), augment=Augment(views=2))
    rows = [row for step in range(5) for row in zip(*run.batch(step)[2:4], strict=True)]  # 20 places = 4 rounds of 5
    assert Counter(item.id for item, _ in rows) == {item.id: 4 for item in run.items}
    assert Counter(view for _, view in rows) == {0: 10, 1: 10}
    assert len(run) == 2
    rounds = {tuple(item.id for item, _ in rows[n : n + 5]) for n in range(0, 20, 5)}
    assert len(rounds) > 1  # shuffled anew


def test_once_is_plain_and_in_order(tmp_path: Path) -> None:
    run = batches(shots_pack(tmp_path / "p"), batch_size=3)
    parts = list(run.once())
    assert [len(part.images) for part in parts] == [3, 2]
    assert sum((part.items for part in parts), ()) == run.items
    want = prepare(run.dataset.image(run.items[4]), 16, MEAN, STD)
    assert torch.equal(parts[1].images[1], want)
    assert batches(tmp_path / "p", batch_size=99).batch_size == 5


def test_batches_of_labels_and_bad_batches(tmp_path: Path) -> None:
    items = [entry(n, label=n % 2) for n in range(6)]
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1)], label_names=["a", "b"]))
    settings: dict[str, Any] = {"size": 16, "mean": MEAN, "std": STD, "batch_size": 4}
    batch = Batches(dataset, dataset.items, task="classify", augment=Augment(), **settings).batch(0)
    assert batch.targets.tolist() == [item.label for item in batch.items]
    with pytest.raises(BadCall, match="no items"):
        Batches(dataset, [], **settings)
    with pytest.raises(UnknownName):
        Batches(dataset, dataset.items, task="guess", **settings)
    unlabelled = load_dataset(pack(tmp_path / "q", [entry(0)], [blocks(1)]))
    with pytest.raises(BadCall, match="item 'i0' has no label"):
        Batches(unlabelled, unlabelled.items, task="classify", **settings).batch(0)


def test_the_key_of_a_cache_tells_views_apart(tmp_path: Path) -> None:
    root = pack(tmp_path / "p", [entry(0), entry(1)], [blocks(1)])
    save(root / "images/i1.png", picture(0))  # the same pixels under two names
    dataset = load_dataset(root)
    settings: dict[str, Any] = {"size": 16, "mean": MEAN, "std": STD, "batch_size": 2}
    first, second = dataset.items
    plain = Batches(dataset, dataset.items, **settings)
    assert plain.digest(first) == plain.digest(second)
    drawn = Batches(dataset, dataset.items, augment=Augment(views=4), **settings)
    assert len({drawn.digest(first), drawn.digest(second), plain.digest(first)}) == 3
    assert not torch.equal(drawn.example(first, 1)[0], drawn.example(second, 1)[0])
