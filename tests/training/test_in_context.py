"""Supports chosen for each query, drawn several times, mirrored: against adapters that hold exactly those pairs."""

import numpy as np
import pytest
import torch

from medgraft.adapters import Adapter, ContextHead, Host, LoRA, Support, Task
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, UnknownName
from medgraft.training import in_context as answering
from medgraft.training.in_context import InContext
from medgraft.training.support import k_centre, slice_weighted, uniform
from tests.helpers import ONE, THREE, LinearHead, says, wake

PAIRS = 6


def drawn(classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand(PAIRS, 16, 16, generator=g),
        "labels": torch.randint(0, classes + 1, (PAIRS, 16, 16), generator=g),
    }


def holding(on: Backbone, task: Task = ONE, **pairs: torch.Tensor) -> Adapter:
    found = {**drawn(len(task.classes)), **pairs}
    return Adapter.of(on, task, {"support": Support.on(on, task, **found), "head": ContextHead.on(on, task)})


def of(on: Backbone, adapter: Adapter, chosen: list[int]) -> Adapter:
    """The adapter with some of its pairs."""
    support = adapter.parts["support"]
    assert isinstance(support, Support)
    parts = {"support": support.subset(chosen, on, adapter.task), "head": ContextHead.on(on, adapter.task)}
    return Adapter.of(on, adapter.task, parts)


def answer(on: Backbone, adapter: Adapter, image: np.ndarray) -> np.ndarray:
    host = Host(on)
    host.add(adapter, "it")
    return host.predict(image, "it", probabilities=True)


@pytest.fixture
def image() -> np.ndarray:
    """Of another size than the pairs."""
    return np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", [ONE, THREE], ids=["one", "three"])
def test_all_pairs_answer_as_the_adapter_does(universeg: Backbone, task: Task, image: np.ndarray) -> None:
    adapter = holding(universeg, task)
    mine = InContext(universeg, adapter)
    want = answer(universeg, adapter, image)
    assert want.shape == (task.outputs, 20, 24)
    np.testing.assert_allclose(mine.probabilities(image), want, atol=1e-6)
    host = Host(universeg)
    host.add(adapter, "it")
    assert np.array_equal(mine.predict(image), host.predict(image, "it"))
    assert mine.predict(image).dtype == np.uint8


def test_draws_are_averaged(universeg: Backbone, image: np.ndarray) -> None:
    adapter = holding(universeg)
    mine = InContext(universeg, adapter, select="uniform", shots=2, draws=3, seed=5)
    each = [answer(universeg, of(universeg, adapter, uniform(PAIRS, 2, [5, d])), image) for d in range(3)]
    assert np.abs(each[0] - each[1]).max() > 1e-4
    for _ in range(2):  # the second time from what is kept
        np.testing.assert_allclose(mine.probabilities(image), np.mean(each, 0), atol=1e-6)


def test_mirroring_turns_query_and_support_together(universeg: Backbone, image: np.ndarray) -> None:
    adapter = holding(universeg)
    given = {k: t.flip(-1) for k, t in drawn(1).items()}
    turned = answer(universeg, holding(universeg, **given), image[:, ::-1])[..., ::-1]
    want = (answer(universeg, adapter, image) + turned) / 2
    mine = InContext(universeg, adapter, flips="horizontal")
    np.testing.assert_allclose(mine.probabilities(image), want, atol=1e-6)
    assert len(InContext(universeg, adapter, flips="both").mirrors) == 4


def test_with_a_symmetric_support_all_mirrorings_make_the_answer_turn_with_the_query(
    universeg: Backbone, image: np.ndarray
) -> None:
    one = {k: t[:1] for k, t in drawn(1).items()}
    four = {k: torch.cat([t, t.flip(-1), t.flip(-2), t.flip(-1, -2)]) for k, t in one.items()}
    mine = InContext(universeg, holding(universeg, **four), flips="both")
    turned = mine.probabilities(np.ascontiguousarray(image[::-1, ::-1]))
    np.testing.assert_allclose(turned[:, ::-1, ::-1], mine.probabilities(image), atol=1e-5)
    plain = InContext(universeg, holding(universeg, **four))
    assert np.abs(plain.probabilities(image[::-1, ::-1])[:, ::-1, ::-1] - plain.probabilities(image)).max() > 1e-4


def test_slice_index_follows_the_query(universeg: Backbone, image: np.ndarray) -> None:
    adapter, numbers = holding(universeg), [0, 1, 2, 30, 31, 32]
    mine = InContext(universeg, adapter, select="slice_index", shots=2, slices=numbers, seed=1)
    for z in (1, 31):
        chosen = slice_weighted(numbers, z, 2, [1, 0])
        np.testing.assert_allclose(
            mine.probabilities(image, z), answer(universeg, of(universeg, adapter, chosen), image), atol=1e-6
        )
    with pytest.raises(BadCall, match="z="):
        mine.probabilities(image)


def test_the_nearest_pair_to_a_stored_image_is_itself(universeg: Backbone, vit: Backbone) -> None:
    adapter = holding(universeg)
    support = adapter.parts["support"]
    assert isinstance(support, Support)
    stored = (support.images() * 255).round().byte().numpy()
    mine = InContext(universeg, adapter, select="nearest", shots=1, encoder=vit)
    for k in (0, 3, 5):
        query = np.repeat(stored[k][..., None], 3, 2)
        np.testing.assert_allclose(
            mine.probabilities(query), answer(universeg, of(universeg, adapter, [k]), query), atol=1e-6
        )


def test_k_centre_is_one_choice_for_every_query(universeg: Backbone, vit: Backbone, image: np.ndarray) -> None:
    adapter = holding(universeg)
    mine = InContext(universeg, adapter, select="k_centre", shots=2, encoder=vit, seed=3)
    chosen = k_centre(mine.features, 2, [3, 0])
    want = answer(universeg, of(universeg, adapter, chosen), image)
    np.testing.assert_allclose(mine.probabilities(image), want, atol=1e-6)


def test_other_parts_act_and_the_adapter_stays_whole(universeg: Backbone, image: np.ndarray) -> None:
    support = Support.on(universeg, ONE, **drawn(1))
    lora = wake(LoRA.on(universeg, ONE, targets="decoder.*", rank=2), size=0.3)
    adapter = Adapter.of(universeg, ONE, {"support": support, "lora": lora, "head": ContextHead.on(universeg, ONE)})
    want = answer(universeg, adapter, image)
    assert np.abs(want - answer(universeg, holding(universeg), image)).max() > 1e-4
    np.testing.assert_allclose(InContext(universeg, adapter).probabilities(image), want, atol=1e-6)
    assert adapter.parts["support"] is support
    np.testing.assert_array_equal(answer(universeg, adapter, image), want)


def test_too_many_terms_are_not_kept(universeg: Backbone, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = holding(universeg)
    want = InContext(universeg, adapter, select="uniform", shots=2, draws=2)
    assert want.fixed is not None
    assert all(c.keep for turned in want.fixed for c in turned)
    monkeypatch.setattr(answering, "CACHE_BYTES", 1)
    mine = InContext(universeg, adapter, select="uniform", shots=2, draws=2)
    assert mine.fixed is not None
    assert not any(c.keep for turned in mine.fixed for c in turned)
    np.testing.assert_allclose(mine.probabilities(image), want.probabilities(image), atol=1e-6)


def test_a_constant_query_and_grey_ones(universeg: Backbone) -> None:
    mine = InContext(universeg, holding(universeg))
    flat = mine.probabilities(np.full((16, 16, 3), 90, np.uint8))
    assert np.isfinite(flat).all()
    np.testing.assert_allclose(flat, mine.probabilities(np.zeros((16, 16, 3), np.uint8)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select": "uniform", "shots": 7}, ("7 pairs", "holds 6")),
        ({"select": "uniform", "shots": 0}, ("0 pairs",)),
        ({"shots": 3}, ("all 6 pairs", "another selection")),
        ({"draws": 2}, ("nothing is drawn",)),
        ({"select": "uniform", "shots": 2, "draws": 0}, ("draws is 1 or more",)),
        ({"select": "nearest", "shots": 2}, ("encoder",)),
        ({"select": "slice_index", "shots": 2}, ("slices=", "6 pairs")),
        ({"select": "slice_index", "shots": 2, "slices": [1, 2]}, ("slices=", "6 pairs")),
    ],
)
def test_bad_calls(universeg: Backbone, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as caught:
        InContext(universeg, holding(universeg), **options)
    says(caught.value, *words)


def test_unknown_names_and_an_adapter_without_a_support(universeg: Backbone, vit: Backbone) -> None:
    with pytest.raises(UnknownName, match="'nearest'"):
        InContext(universeg, holding(universeg), select="nearst")
    with pytest.raises(UnknownName, match="'horizontal'"):
        InContext(universeg, holding(universeg), flips="horizontally")  # type: ignore[arg-type]
    with pytest.raises(BadCall, match="no support set"):
        InContext(vit, Adapter.of(vit, ONE, {"head": LinearHead.on(vit, ONE)}))
