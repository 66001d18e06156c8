"""Leave-one-out episodes: what the query is, what is shown, and that a step is a function of (seed, step)."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from medgraft.adapters import ContextHead, Preprocessing, Support, Task
from medgraft.backbones import Backbone
from medgraft.errors import BadCall
from medgraft.training.data import Augment, Dataset, load_dataset
from medgraft.training.episodes import Episodes
from medgraft.training.support import pairs
from tests.helpers import says
from tests.training.toy_pack import blocks, entry, pack

TWO = Task("segment", ("cytoplasm", "nucleus"))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    items = [entry(n) for n in range(4)] + [entry(4, split="test")]
    return load_dataset(pack(tmp_path / "p", items, [blocks(1, 2), blocks(2, 0, 1), blocks(1), blocks(0, 2)]))


def of(dataset: Dataset, on: Backbone, **more: object) -> Episodes:
    return Episodes(dataset, dataset.split("train"), on, TWO, **more)  # type: ignore[arg-type]


def shown(episodes: Episodes, step: int) -> torch.Tensor:
    episodes.batch(step)
    assert episodes.entering.context is not None
    return episodes.entering.context.pairs


def test_the_query_is_left_out_and_the_others_are_the_stored_pairs(dataset: Dataset, universeg: Backbone) -> None:
    items = dataset.split("train")
    prepare = Preprocessing(16, (0.0,) * 3, (1.0,) * 3)
    images, labels = pairs(dataset, items, universeg, prepare)
    support = Support.on(universeg, TWO, images=images, labels=labels, storage="float")
    ContextHead.on(universeg, TWO)
    episodes = of(dataset, universeg)
    asked = []
    for step in range(8):
        batch = episodes.batch(step)
        assert batch.images.shape == (1, 3, 16, 16)
        n = items.index(batch.items[0])
        rest = [i for i in range(4) if i != n]
        assert torch.equal(batch.targets[0], labels[n])
        context = episodes.entering.context
        assert context is not None
        assert context.pairs.shape == (3, 3, 2, 16, 16)
        torch.testing.assert_close(context.pairs[0, :, 0], support.images()[rest])
        assert torch.equal(context.pairs[:, :, 1], support.masks()[:, rest])
        asked.append(n)
    assert sorted(asked[:4]) == sorted(asked[4:]) == [0, 1, 2, 3]


def test_one_class_is_its_own_mask(dataset: Dataset, universeg: Backbone) -> None:
    one = load_dataset(dataset.root, classes=("nucleus",))
    episodes = Episodes(one, one.split("train"), universeg, Task("segment", ("nucleus",)))
    batch = episodes.batch(0)
    context = episodes.entering.context
    assert context is not None
    assert context.pairs.shape == (1, 3, 2, 16, 16)
    rest = [i for i in one.split("train") if i.id != batch.items[0].id]
    want = pairs(one, rest, universeg, Preprocessing(16, (0.0,) * 3, (1.0,) * 3))[1]
    assert torch.equal(context.pairs[0, :, 1].long(), want)


def test_a_step_is_a_function_of_seed_and_step(dataset: Dataset, universeg: Backbone) -> None:
    first, second = (of(dataset, universeg, augment=Augment(3), others=2, seed=3) for _ in range(2))
    forwards = [shown(first, t) for t in range(6)]
    backwards = [shown(second, t) for t in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(forwards[0], shown(of(dataset, universeg, augment=Augment(4), others=2, seed=4), 0))


def test_a_view_turns_and_lights_the_whole_episode_alike(dataset: Dataset, universeg: Backbone) -> None:
    """Four times the same picture: after augmentation still the same, query and context, and another at the next step."""
    items = dataset.split("train")
    same = dataset.image(items[0])
    for item in items:
        assert item.image is not None
        Image.fromarray(same).save(item.image)
    episodes = of(dataset, universeg, augment=Augment(0))
    seen = []
    for step in range(4):
        query = episodes.batch(step).images
        grey = universeg.stem(universeg.checked(query)).x[0, 0, 0]
        assert episodes.entering.context is not None
        shown_images = episodes.entering.context.pairs[0, :, 0]
        assert torch.equal(shown_images, grey.expand_as(shown_images))
        seen.append(grey)
    assert len({g.sum().item() for g in seen}) >= 3  # a view may draw nothing


def test_a_bank_repeats_and_none_leaves_the_pictures(dataset: Dataset, universeg: Backbone) -> None:
    bank = of(dataset, universeg, augment=Augment(0, 2))
    plain = of(dataset, universeg)
    assert torch.equal(shown(bank, 0), shown(plain, 0))  # view 0 of a bank is the picture
    assert not torch.equal(shown(bank, 1), shown(plain, 1))
    assert repr(bank.augment).startswith("Together(seed=0, views=2")


def test_fewer_others(dataset: Dataset, universeg: Backbone) -> None:
    episodes = of(dataset, universeg, others=2)
    assert {shown(episodes, t).shape[1] for t in range(6)} == {2}
    assert len({shown(episodes, t).sum().item() for t in range(12)}) > 4
    assert of(dataset, universeg, others=9).others == 3


def test_one_pair_cannot_be_left_out(dataset: Dataset, universeg: Backbone) -> None:
    with pytest.raises(BadCall) as caught:
        Episodes(dataset, dataset.split("train")[:1], universeg, TWO)
    says(caught.value, "leaves none", "--shots 2", "universeg recipe")
    with pytest.raises(BadCall, match="1 or more"):
        of(dataset, universeg, others=0)
