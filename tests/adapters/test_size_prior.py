"""Size priors: Eq. 2 and its gradient by hand, the other statistics, support sets that lack a class, what travels in the file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgraft.adapters import Host
from medgraft.adapters.size_prior import Prior, Priors
from medgraft.adapters.soup import soup
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadAdapter, BadCall, UnknownName
from tests.helpers import THREE, Task, adapter, images, same_bits, says

TWO = Task("segment", ("front", "back"))
S, G = 0.25, 0.1  # target and margin: the band is 0.225 .. 0.275


def flat(value: float, classes: int = 1) -> Tensor:
    """Probabilities that are `value` everywhere, (C, 2, 5, 4)."""
    return torch.full((classes, 2, 5, 4), value, dtype=torch.float64, requires_grad=True)


def size(**options: object) -> Prior:
    return Prior("size", ((S,),), margin=G, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "wanted", "slope"),
    [(0.125, 0.1, -1), (0.2, 0.025, -1), (0.23, 0, 0), (0.25, 0, 0), (0.27, 0, 0), (0.3, 0.025, 1), (1.0, 0.725, 1)],
)
def test_equation_2_by_hand_on_both_sides_of_the_band(found: float, wanted: float, slope: int) -> None:
    p = flat(found)
    cost = size().cost(p)
    assert cost.item() == pytest.approx(wanted, abs=1e-12)
    cost.backward()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.full_like(p, slope / 40))


def test_the_penalty_has_no_jump_at_the_bounds() -> None:
    for bound in (0.225, 0.275):
        near = [size().cost(flat(bound + d)).item() for d in (-1e-9, 1e-9)]
        assert abs(near[0] - near[1]) < 1e-8


def test_voxels_are_fractions_times_the_voxels() -> None:
    p = flat(0.3)
    voxels = Prior("size", ((S * 40,),), margin=G, unit="voxels")
    assert voxels.cost(p).item() == pytest.approx(40 * size().cost(p).item())


@pytest.mark.parametrize(("found", "wanted", "slope"), [(0.125, 0.4, -4.0), (0.23, 0, 0), (0.5, 0.4, 2.0)])
def test_the_relative_form_keeps_its_denominator_out_of_the_gradient(found: float, wanted: float, slope: float) -> None:
    p = flat(found)
    cost = size(relative=True).cost(p)
    assert cost.item() == pytest.approx(wanted)  # (0.25 - 0.125) / 0.25 - 0.1, (0.5 - 0.25) / 0.5 - 0.1
    cost.backward()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.full_like(p, slope / 40))


def test_the_gradient_of_every_prior_is_its_derivative() -> None:
    p = torch.rand(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    for prior in (
        Prior("size", ((0.9,), (0.1,)), margin=0.1),
        Prior("size", ((30.0,), (2.0,)), margin=0.1, unit="voxels", weight=2.0),
        Prior("centroid", ((0.1, 0.9, 0.2), (0.9, 0.1, 0.9)), margin=0.05),
        Prior("length", ((0.01,), (5.0,)), margin=0.2),
    ):
        assert prior.cost(p).item() > 0
        assert torch.autograd.gradcheck(prior.cost, (p,))


def test_classes_are_averaged_and_can_be_left_out() -> None:
    p = torch.cat([flat(0.125), flat(0.5)])
    both = Prior("size", ((S,), (S,)), margin=G)
    assert both.cost(p).item() == pytest.approx((0.1 + 0.225) / 2)
    assert both.cost(p, without={1}).item() == pytest.approx(0.1)
    assert both.cost(p, without={0, 1}).item() == 0
    assert Prior("size", ((S,), None), margin=G).cost(p).item() == pytest.approx(0.1)


def test_a_large_margin_is_inert() -> None:
    p = flat(0.9)
    cost = Prior("size", ((S,),), margin=10).cost(p)
    cost.backward()
    assert p.grad is not None
    assert cost.item() == 0
    assert not p.grad.any()


def box(at: tuple[int, int, int], side: int = 2, value: int = 1) -> Tensor:
    """A cube of `value` in a volume of 8 x 6 x 4."""
    y = torch.zeros(8, 6, 4, dtype=torch.int64)
    x, z, w = at
    y[x : x + side, z : z + side, w : w + side] = value
    return y


def test_what_a_cube_measures() -> None:
    y = box((2, 1, 0))
    sized, centred, long = (Prior.of(kind, [y], 1) for kind in ("size", "centroid", "length"))  # type: ignore[arg-type]
    assert sized.targets == (pytest.approx((8 / 192,)),)
    assert centred.targets == (pytest.approx((3 / 8, 2 / 6, 1 / 4)),)
    assert long.targets == (pytest.approx((20 / 192,)),)  # six faces of 4, of which one lies on the border
    assert Prior.of("length", [box((2, 1, 1))], 1, unit="voxels").targets == ((24.0,),)
    assert all(prior.cost((y == 1)[None].double()).item() == 0 for prior in (sized, centred, long))


def test_the_target_is_the_mean_over_the_volumes_that_show_the_class() -> None:
    labels = [box((0, 0, 0), 2), box((0, 0, 0), 4, 1), box((1, 1, 1), 2, 2)]
    found = Prior.of("size", labels, 3)
    assert found.targets[0] == pytest.approx(((8 + 64) / 2 / 192,))
    assert found.targets[1] == pytest.approx((8 / 192,))
    assert found.targets[2] is None, "a class without a voxel in the support has a target"
    assert found.cost(torch.rand(3, 8, 6, 4)).isfinite()


def test_an_empty_prediction_has_a_finite_centroid_and_gradient() -> None:
    p = torch.zeros(1, 3, 3, 3, requires_grad=True)
    cost = Prior("centroid", ((0.5, 0.5, 0.5),), margin=0.1).cost(p)
    cost.backward()
    assert p.grad is not None
    assert cost.isfinite()
    assert p.grad.isfinite().all()


def test_it_travels_in_the_adapter_and_changes_no_prediction(meshnet: Backbone, tmp_path: Path) -> None:
    labels = [box((1, 1, 1)), box((3, 2, 0), value=2)]
    kinds = ("size", "centroid", "length")
    priors = Priors.on(meshnet, TWO, labels=labels, kinds=kinds, margin=0.2, relative=True)
    made = adapter(meshnet, {"priors": priors}, task=TWO)
    back = read_adapter(save_adapter(made, tmp_path / "a", backbone=meshnet)).parts["priors"]
    assert isinstance(back, Priors)
    assert back.each == priors.each
    assert [p.margin for p in back.each] == [0.2] * 3
    host = Host(meshnet)
    host.add(made, "with")
    host.add(made.without_site_parts(), "without")
    x = images(meshnet)
    with torch.no_grad():
        assert same_bits(host(x, "with"), host(x, "without"))


def test_a_soup_averages_the_targets(meshnet: Backbone) -> None:
    made = [
        adapter(meshnet, {"priors": Priors.on(meshnet, TWO, labels=[box((0, 0, 0), side)])}, task=TWO, seed=side)
        for side in (2, 4)
    ]
    averaged = soup(made).adapter.parts["priors"]
    assert isinstance(averaged, Priors)
    assert averaged.each[0].targets == (pytest.approx((36 / 192,)), None)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "volume"}, "no prior"),
        ({"unit": "ml"}, "unit"),
        ({"margin": -1.0}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"weight": float("inf")}, "weight"),
        ({"targets": ((0.1, 0.2),)}, "1 number"),
        ({"targets": ((-0.1,),)}, "0 or more"),
        ({"targets": ()}, "each class"),
        ({"kind": "centroid", "targets": (None,), "unit": "voxels"}, "centroid"),
        ({"kind": "centroid", "targets": (None,), "relative": True}, "centroid"),
    ],
)
def test_a_prior_refuses(change: dict[str, object], word: str) -> None:
    with pytest.raises((BadCall, UnknownName)) as refused:
        Prior(**{"kind": "size", "targets": ((0.1,),), **change})  # type: ignore[arg-type]
    says(refused.value, word)


def test_bad_calls(meshnet: Backbone) -> None:
    with pytest.raises(BadCall, match="labels of a support"):
        Prior.of("size", [], 1)
    with pytest.raises(BadCall, match="2 classes"):
        Prior("size", (None, None)).cost(torch.rand(3, 2, 2, 2))
    with pytest.raises(BadCall, match="no site"):
        Priors({"embedding": (5, 5)}, [{"kind": "size", "targets": [[0.1]]}])
    with pytest.raises(BadCall, match="same classes"):
        Priors({}, [{"kind": "size", "targets": [[0.1]]}, {"kind": "size", "targets": [None, None]}])
    assert Priors.on(meshnet, THREE, labels=[box((0, 0, 0), value=2)]).known == (False, True, False)


def test_a_strangers_prior_is_refused(meshnet: Backbone, tmp_path: Path) -> None:
    made = adapter(meshnet, {"priors": Priors.on(meshnet, TWO, labels=[box((0, 0, 0))])}, task=TWO)
    made.parts["priors"].config["priors"][0]["targets"] = "all"  # type: ignore[index,union-attr]
    with pytest.raises(BadAdapter, match="priors"):
        read_adapter(save_adapter(made, tmp_path / "a"))
