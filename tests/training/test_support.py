"""Choosing a support set: what the draws are, that they are nested and seeded, and what a person gets wrong."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft.adapters import Preprocessing, Support
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training import support as chooser
from medgraft.training.data import load_dataset
from medgraft.training.support import candidates, choose, features_of, k_centre, nearest, pairs, slice_weighted, uniform
from tests.helpers import ONE, says
from tests.training.toy_pack import blocks, entry, pack, shots_pack


def some(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "draw",
    [
        lambda shots, seed: uniform(12, shots, seed),
        lambda shots, seed: slice_weighted(range(12), 5, shots, seed),
        lambda shots, seed: k_centre(some(12), shots, seed),
        lambda shots, seed: nearest(some(12), some(1, seed=9)[0], shots),
    ],
    ids=["uniform", "slice_index", "k_centre", "nearest"],
)
def test_choices_are_seeded_nested_and_without_replacement(draw) -> None:
    whole = draw(12, 3)
    assert sorted(whole) == list(range(12))
    for shots in range(1, 13):
        assert draw(shots, 3) == whole[:shots]


def test_draws_differ_by_seed() -> None:
    assert len({tuple(uniform(12, 4, [0, d])) for d in range(20)}) > 15
    assert len({tuple(slice_weighted(range(12), 5, 4, [0, d])) for d in range(20)}) > 15


def test_slice_index_is_a_draw_by_weight_without_replacement() -> None:
    """The first index by p, the second by p of what is left: p_i p_j / (1 - p_i)."""
    slices, at, draws = [3, 4, 4, 7, 20], 4, 20000
    w = 1 / (np.abs(np.array(slices) - at) + 1)
    p = w / w.sum()
    want = p[:, None] * p[None] / (1 - p[:, None])
    np.fill_diagonal(want, 0)
    seen = np.zeros((5, 5))
    for seed in range(draws):
        i, j = slice_weighted(slices, at, 2, seed)
        seen[i, j] += 1 / draws
    assert (np.abs(seen - want) <= 4 * np.sqrt(want / draws)).all()


def test_neighbouring_slices_share_most_of_their_support() -> None:
    numbers = list(range(40))
    shared = [
        len(set(slice_weighted(numbers, z, 8, 0)) & set(slice_weighted(numbers, z + 1, 8, 0))) for z in range(10, 30)
    ]
    assert np.mean(shared) > 6


def test_nearest_is_by_cosine() -> None:
    features, query = some(9), some(1, seed=4)[0]
    cosines = torch.nn.functional.cosine_similarity(features, query[None])
    assert nearest(features, query, 3) == cosines.argsort(descending=True)[:3].tolist()
    assert nearest(features * torch.rand(9, 1), query * 7, 3) == nearest(features, query, 3)
    assert nearest(torch.ones(3, 2), torch.ones(2), 2) == [0, 1]


def test_k_centre_covers_within_twice_the_best() -> None:
    for seed in range(5):
        f = torch.nn.functional.normalize(some(9, 3, seed), dim=1)
        away = torch.cdist(f, f)

        def radius(chosen: tuple[int, ...], away: Tensor = away) -> float:
            return float(away[:, list(chosen)].amin(1).max())

        best = min(radius(c) for c in combinations(range(9), 3))
        assert radius(tuple(k_centre(some(9, 3, seed), 3, seed))) <= 2 * best + 1e-6


def test_k_centre_takes_the_farthest_and_never_one_twice() -> None:
    angles = torch.tensor([0.0, 0.1, 1.5, 3.1])
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    first = int(np.random.default_rng(1).integers(4))
    assert k_centre(circle, 2, 1) == [first, int((circle - circle[first]).norm(dim=1).argmax())]
    assert sorted(k_centre(torch.ones(4, 2), 4, 0)) == [0, 1, 2, 3]
    seed = next(s for s in range(20) if np.random.default_rng(s).integers(4) == 0)
    assert k_centre(circle, 3, seed) == [0, 3, 2]  # index 1 is farther from 3, but lies beside 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: uniform(5, 0, 0),
        lambda: uniform(5, True, 0),
        lambda: slice_weighted([], 0, 1, 0),
        lambda: k_centre(some(4) * float("nan"), 2, 0),
        lambda: k_centre(torch.zeros(0, 3), 1, 0),
        lambda: nearest(some(4), some(1, 3)[0], 1),
    ],
)
def test_bad_calls(wrong) -> None:
    with pytest.raises(BadCall):
        wrong()


def test_more_shots_than_items_is_said() -> None:
    with pytest.raises(BadCall) as caught:
        uniform(5, 16, 0)
    says(caught.value, "16 pairs asked for", "5 to choose from", "fewer")


# From a data set


def test_candidates_have_every_class_drawn(tmp_path: Path) -> None:
    items = [entry(0), entry(1, labelled=["nucleus"]), entry(2), entry(3, split="test")]
    dataset = load_dataset(pack(tmp_path / "p", items, [blocks(1, 2), blocks(2), blocks(), blocks(1)]))
    assert [i.id for i in candidates(dataset).items] == ["i0", "i2"]
    assert [i.id for i in candidates(dataset, roi="shown").items] == ["i0"]
    one = load_dataset(tmp_path / "p", classes=("nucleus",))
    assert [i.id for i in candidates(one, roi="shown").items] == ["i0", "i1"]
    with pytest.raises(UnknownName, match="shown"):
        candidates(dataset, roi="show")


def test_no_candidate_is_said(tmp_path: Path) -> None:
    dataset = load_dataset(pack(tmp_path / "p", [entry(0, labelled=["nucleus"]), entry(1, split="test")], [blocks(2)]))
    with pytest.raises(BadData) as caught:
        candidates(dataset)
    says(caught.value, "toy", "cytoplasm, nucleus", "annotated", "--classes")


def test_choose_makes_sure_of_every_class(tmp_path: Path, vit_tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(shots_pack(tmp_path / "p"))
    for seed in range(4):
        few = choose(dataset, 2, seed)
        assert {k for item in few for k in dataset.present(item)} == {1, 2}
        assert [i.id for i in choose(dataset, 4, seed)][:2] == [i.id for i in few]
    assert all(dataset.present(i) for i in choose(dataset, None, 0, roi="shown"))
    assert len(choose(dataset, None, 0)) == 12
    monkeypatch.setattr(chooser, "MOST", 5)
    assert len(choose(dataset, None, 0)) == 5
    spread = choose(dataset, 3, 0, select="k_centre", encoder=vit_tiny)
    train = dataset.split("train")
    f = features_of(vit_tiny, (dataset.image(i) for i in train))
    assert [i.id for i in spread] == [train[k].id for k in k_centre(f, 3, 0)]


def test_what_a_user_gets_wrong_in_choosing_is_said(tmp_path: Path) -> None:
    dataset = load_dataset(shots_pack(tmp_path / "p"))
    with pytest.raises(UnknownName, match="'uniform'"):
        choose(dataset, 2, 0, select="unifrom")
    with pytest.raises(UnknownName, match="depends on the query"):
        choose(dataset, 2, 0, select="nearest")
    with pytest.raises(BadCall, match="encoder"):
        choose(dataset, 2, 0, select="k_centre")
    with pytest.raises(BadData, match="13 shots"):
        choose(dataset, 13, 0)
    with pytest.raises(BadCall, match="0"):
        choose(dataset, 0, 0)


def test_pairs_are_grey_by_the_networks_rule(tmp_path: Path, universeg: Backbone) -> None:
    dataset = load_dataset(shots_pack(tmp_path / "p"))
    items = dataset.split("train")[:3]
    prepare = Preprocessing(20, (0.0,) * 3, (1.0,) * 3)
    images, labels = pairs(dataset, items, universeg, prepare)
    assert images.shape == labels.shape == (3, 20, 20)
    assert labels.dtype == torch.int64
    rgb = prepare(dataset.image(items[1]))
    torch.testing.assert_close(images[1], 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2])
    assert torch.equal(labels[0].unique(), torch.tensor([0, 1]))
    with pytest.raises(BadCall, match="1 pair or more"):
        pairs(dataset, [], universeg, prepare)


def test_soft_labels_are_shares_of_a_pixel(tmp_path: Path, universeg: Backbone) -> None:
    """A block of 8 x 4 of 20 x 24 pixels keeps its area at 10 x 10; nearest neighbour need not."""
    root = pack(tmp_path / "p", [entry(0), entry(1, split="test")], [blocks(1, 2)])
    dataset = load_dataset(root)
    items = dataset.split("train")
    _, shares = pairs(dataset, items, universeg, Preprocessing(10, (0.0,) * 3, (1.0,) * 3), soft=True)
    assert shares.shape == (1, 2, 10, 10)
    assert 0 <= shares.min() < 0.01
    assert shares.max() <= 1
    for k in range(2):
        assert float(shares[0, k].mean()) == pytest.approx(32 / 480, rel=0.1)
    assert ((shares > 0.05) & (shares < 0.95)).any()
    only = load_dataset(root, classes=("nucleus",))
    images, shares = pairs(only, items, universeg, Preprocessing(16, (0.0,) * 3, (1.0,) * 3), soft=True)
    assert Support.on(universeg, ONE, images=images, labels=shares, soft=True).labels().shape == (1, 1, 16, 16)


def test_cropped_pairs_lose_the_dark_border_of_image_and_label(tmp_path: Path, universeg: Backbone) -> None:
    root = pack(tmp_path / "p", [entry(0), entry(1, split="test")], [blocks(1, 2)])
    dataset = load_dataset(root)
    item = dataset.split("train")[0]
    dark = dataset.image(item).copy()
    dark[:4] = 0
    from PIL import Image

    assert item.image is not None
    Image.fromarray(dark).save(item.image)
    kept = Preprocessing(16, (0.0,) * 3, (1.0,) * 3, crop=True)
    images, labels = pairs(dataset, [item], universeg, kept)
    assert (images[0, 0] > 0).any()
    assert (labels[0, 0] > 0).any()  # the blocks begin in row 4, which is now the first
