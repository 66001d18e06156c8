"""Patches of volumes: places, balance, small volumes, what a view depends on, partial labels, training through `fit`."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from medgraft.adapters import Host
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData
from medgraft.training.assemble import assemble
from medgraft.training.cache import PrefixCache
from medgraft.training.data import load_dataset
from medgraft.training.fit import FitOptions, fit
from medgraft.training.label_dropout import LabelDropout
from medgraft.training.patches import Crops, Patches, padded, volume_of
from medgraft.training.volume_data import Volumes, volumes_of
from medgraft.volumes import read_volume
from tests.helpers import Task, adapter, says
from tests.training.volumes import SHAPE, volume_pack

TWO = Task("segment", ("front", "back"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return volumes_of(load_dataset(volume_pack(tmp_path_factory.mktemp("pack"))))


def patches(pack: Volumes, on: Backbone, *, patch: int | tuple[int, int, int] = 6, **options: object) -> Patches:
    prepare = VolumePreprocessing.of(on.spec, patch=patch, axcodes="RAS", intensity=("window", 0, 2000))
    return Patches(pack, pack.split("train"), prepare, on.spec, **options)  # type: ignore[arg-type]


def test_a_batch_is_six_patches_of_one_volume(pack: Volumes, meshnet: Backbone) -> None:
    batch = patches(pack, meshnet).batch(0)
    assert batch.images.shape == (6, 1, 6, 6, 6)
    assert batch.targets.shape == (6, 6, 6, 6)
    assert (batch.images.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
    assert len(set(batch.items)) == 1
    assert batch.views == (0, 1, 2, 3, 4, 5)


def test_a_patch_is_a_cut_of_the_volume_with_its_label(pack: Volumes, meshnet: Backbone) -> None:
    found = patches(pack, meshnet, crops=Crops(0, None))
    item = found.items[0]
    x, y = volume_of(pack, item).values / 2000, pack.mask(item)
    places = set()
    for view in range(12):
        own, labels = found.example(item, view)
        at = [
            (i, j, k)
            for i in range(SHAPE[0] - 5)
            for j in range(SHAPE[1] - 5)
            for k in range(SHAPE[2] - 5)
            if np.allclose(x[i : i + 6, j : j + 6, k : k + 6], own[0], atol=1e-6)
        ]
        assert len(at) == 1
        i, j, k = at[0]
        assert np.array_equal(y[i : i + 6, j : j + 6, k : k + 6], labels)
        places.add(at[0])
    assert len(places) > 6


def test_even_views_have_a_structure_in_the_middle_each_equally_often(pack: Volumes, meshnet: Backbone) -> None:
    found = patches(pack, meshnet, patch=1, crops=Crops(0, None))
    item = found.items[0]
    even = Counter(int(found.example(item, 2 * v)[1]) for v in range(300))
    odd = Counter(int(found.example(item, 2 * v + 1)[1]) for v in range(300))
    assert even[0] == 0
    assert abs(even[1] - even[2]) < 60
    assert odd[0] > 200  # most of the volume is background


def test_a_bank_repeats_and_new_views_do_not(pack: Volumes, meshnet: Backbone) -> None:
    bank, fresh = (patches(pack, meshnet, crops=Crops(3, views)) for views in (4, None))
    item = bank.items[0]
    assert bank.collate([(item, 1), (item, 5)]).views == (1, 1)
    assert fresh.collate([(item, 1), (item, 5)]).views == (1, 5)
    again = patches(pack, meshnet, crops=Crops(3, 4))
    assert torch.equal(bank.batch(7).images, again.batch(7).images)
    assert not torch.equal(bank.batch(0).images, patches(pack, meshnet, crops=Crops(4, 4)).batch(0).images)


def test_a_small_volume_is_one_view_whole(pack: Volumes, meshnet: Backbone) -> None:
    found = patches(pack, meshnet, patch=96)
    batch = found.batch(0)
    assert batch.images.shape == (1, 1, *SHAPE)
    assert batch.views == (0,)
    assert found.batch(5).views == (0,)
    assert np.array_equal(batch.targets[0], pack.mask(batch.items[0]))


def test_it_is_padded_to_the_stride_by_going_on_with_its_border(pack: Volumes, volume_unet: Backbone) -> None:
    found = patches(pack, volume_unet, patch=96)
    x, y = found.example(found.items[0])
    assert x.shape[1:] == volume_unet.spec.fitting(SHAPE) == (12, 12, 12)
    plain = found.labels_of(found.items[0])
    assert plain.shape == SHAPE
    assert torch.equal(y[1:11, :, 1:10], plain)
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[..., 10], x[..., 9])
    assert torch.equal(x[..., 11], x[..., 9])


def test_volumes_of_different_sizes_share_a_batch() -> None:
    x, y = torch.rand(1, 2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int64)
    longer, labels = padded(x, y, (5, 3, 4))
    assert torch.equal(longer[:, 1:3], x)
    assert torch.equal(longer[:, 4], x[:, 1])
    assert torch.equal(labels, torch.ones(5, 3, 4, dtype=torch.int64))


def test_turns_and_shifts_act_on_image_and_label_together(pack: Volumes, meshnet: Backbone) -> None:
    plain, turned, shifted = (
        patches(pack, meshnet, crops=Crops(0, None, **o))
        for o in ({}, {"turn": True, "p": 1.0}, {"shift": 0.5, "p": 1.0})
    )
    item = plain.items[0]
    for view in range(6):
        (x, y), (tx, ty), (sx, sy) = (b.example(item, view) for b in (plain, turned, shifted))
        assert not torch.equal(x, tx)
        assert any(
            torch.equal(x.rot90(k, (a + 1, b + 1)), tx) and torch.equal(y.rot90(k, (a, b)), ty)
            for k in (1, 2, 3)
            for a, b in ((0, 1), (0, 2), (1, 2))
        )
        assert torch.equal(sy, y)
        apart = sx - x
        assert apart.max() - apart.min() < 1e-6
        assert 0 < apart.abs().max() <= 0.5


def test_a_volume_without_a_structure_gives_patches_anywhere(pack: Volumes, meshnet: Backbone) -> None:
    x, y = torch.rand(1, 9, 9, 9), torch.zeros(9, 9, 9, dtype=torch.int64)
    found = {float(Crops(0, None)(x, y, (2, 2, 2), item="a", view=2 * v)[0].sum()) for v in range(8)}
    assert len(found) > 4


def test_the_digest_knows_labels_views_and_preparation(pack: Volumes, meshnet: Backbone, tmp_path: Path) -> None:
    item = pack.split("train")[0]
    made = [
        patches(pack, meshnet),
        patches(pack, meshnet, crops=Crops(1)),
        patches(pack, meshnet, patch=5),
        patches(pack, meshnet, crops=Crops(0, 6, turn=True)),
    ]
    assert len({p.digest(item) for p in made}) == 4
    assert made[0].digest(item) == patches(pack, meshnet).digest(item)


def test_partial_labels_and_dropout(pack: Volumes, meshnet: Backbone) -> None:
    both = assemble({"a": pack, "b": pack}, {"b": {"back": None}})
    item = next(i for i in both.split("train") if i.id.startswith("b/"))
    prepare = VolumePreprocessing.of(meshnet.spec, patch=96, axcodes="RAS")
    found = Patches(both, both.split("train"), prepare, meshnet.spec, partial=True)
    batch = found.collate([(item, 0)])
    assert batch.groups is not None
    assert batch.groups.tolist() == [[0, 1, 0]]
    assert batch.targets.max() == 1
    dropped = Patches(both, both.split("train"), prepare, meshnet.spec, dropout=LabelDropout(1.0, (2,)))
    batches = [dropped.collate([(i, 0)]) for i in dropped.items if i.id.startswith("a/")]
    assert all(b.groups is not None and b.groups.tolist() == [[0, 1, 0]] and b.targets.max() == 1 for b in batches)
    whole = [b for b in dropped.once() if b.items[0].id.startswith("a/")]
    assert all(b.groups is not None and b.groups.tolist() == [[0, 1, 2]] for b in whole)


@pytest.mark.parametrize("patch", [6, 96])
def test_fit_learns_from_patches_with_and_without_the_cache(pack: Volumes, meshnet: Backbone, patch: int) -> None:
    ends, losses = [], []
    for cached in (False, True):
        host = Host(meshnet)
        host.add(adapter(meshnet, {}, task=TWO, awake=False), "it")
        batches = patches(pack, meshnet, patch=patch)
        cache = PrefixCache(meshnet, host.cut("it")) if cached else None
        done = fit(host, "it", batches, FitOptions(6, lr=0.05), cache=cache, validation=batches, quiet=True)
        ends.append([p.detach().clone() for p in host.adapters["it"].parameters()])
        losses.append(done.loss)
        assert cache is None or (cache.misses == (2 if patch == 96 else 12) and cache.hits > 0)
    assert abs(losses[0] - losses[1]) < 1e-6
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))


def test_bad_input(pack: Volumes, meshnet: Backbone, vit: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BadCall, match="no volumes"):
        VolumePreprocessing.of(vit.spec)
    prepare = VolumePreprocessing.of(meshnet.spec)
    from dataclasses import replace

    with pytest.raises(BadData, match="pictures"):
        Patches(replace(pack, dims=2), pack.split("train"), prepare, meshnet.spec)
    with pytest.raises(BadCall, match="no items"):
        Patches(pack, [], prepare, meshnet.spec)
    for bad in ({"patches": 0}, {"volumes": 0}):
        with pytest.raises(BadCall, match="1 or more"):
            patches(pack, meshnet, **bad)
    for bad_crops in ({"views": 0}, {"p": 2.0}, {"shift": -1.0}, {"shift": float("nan")}):
        with pytest.raises(BadCall):
            Crops(**bad_crops)  # type: ignore[arg-type]
    plain = load_dataset(pack.root)
    with pytest.raises(BadData, match="volumes_of") as refused:
        volume_of(plain, plain.items[0])
    says(refused.value, "boxes")
    assert read_volume(pack.root / "images/v0.nii.gz").shape == SHAPE
