"""Transduction: what it leaves alone, where the penalty pulls, the two windows' gradient, Eq. 3 inside `fit`, what it refuses."""

import copy
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import medgraft
from medgraft.adapters import Adapter, Host, LinearHead, SpatialAdapter, Task
from medgraft.adapters.size_prior import Prior, Priors, _to_json
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, Diverged, UnknownName
from medgraft.training.data import load_dataset
from medgraft.training.fit import FitOptions, fit
from medgraft.training.model import NAME
from medgraft.training.patches import Patches
from medgraft.training.predict_volumes import predict_volume_files
from medgraft.training.transduce import Constraint, Query, priors_of, transduce
from medgraft.training.volume_data import Volumes, volumes_of
from medgraft.volumes import Volume, read_volume, write_volume
from tests.helpers import ONE, adapter, close, says
from tests.training.volumes import volume_pack

TWO = Task("segment", ("front", "back"))
SHAPE = (9, 8, 7)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return volumes_of(load_dataset(volume_pack(tmp_path_factory.mktemp("pack"))))


@pytest.fixture
def volume() -> Volume:
    """Bright in one half."""
    values = np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
    values[:4] += 4
    return Volume(values, np.eye(4))


def prior(*targets: float | None, margin: float = 0.1, **options: object) -> Priors:
    made = Prior("size", tuple(None if t is None else (t,) for t in targets), margin=margin, **options)  # type: ignore[arg-type]
    return Priors({}, [_to_json(made)])


def host_of(on: Backbone, priors: Priors, *, task: Task = ONE, patch: int = 16, form: str = "residual") -> Host:
    torch.manual_seed(0)
    spatial = SpatialAdapter.on(on, task, form=form)
    prepare = VolumePreprocessing.of(on.spec, patch=patch, axcodes="RAS")
    made = Adapter.of(
        on, task, {"priors": priors, "spatial": spatial, "head": LinearHead.on(on, task)}, preprocessing=prepare
    )
    with torch.no_grad():
        made.parts["head"].linear.weight *= 300  # type: ignore[union-attr,operator]
    host = Host(on)
    host.add(made, "it")
    return host


def share(host: Host, volume: Volume, name: str = "it") -> float:
    """The soft size of class 1, a fraction."""
    return float(host.predict(volume, name, probabilities=True)[0].mean())


def state_of(host: Host) -> str:
    made = host.adapters["it"]
    said = [
        f"{k}{t.dtype}{hashlib.sha256(t.detach().numpy().tobytes()).hexdigest()}" for k, t in made.tensors().items()
    ]
    grads = [p.grad is None for p in made.parameters()]
    return repr((host.backbone.digest(), said, grads, made.training, sorted(host.adapters), made.provenance))


def test_files_are_predicted_by_an_adapter_fitted_to_each(meshnet: Backbone, volume: Volume, tmp_path: Path) -> None:
    host = host_of(meshnet, prior(0.02))
    host.add(host.adapters["it"], NAME)
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    files = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    assert len(list(predict_volume_files(host, files, tmp_path / "out", fitting=2))) == 2
    for path in files:
        want = transduce(host, path, NAME, steps=2)
        assert np.array_equal(read_volume(tmp_path / "out" / path.name).values, want)


def test_files_without_a_prior_are_refused_before_anything_is_written(
    meshnet: Backbone, volume: Volume, tmp_path: Path
) -> None:
    host = Host(meshnet)
    prepare = VolumePreprocessing.of(meshnet.spec, patch=16, axcodes="RAS")
    host.add(Adapter.of(meshnet, ONE, {"head": LinearHead.on(meshnet, ONE)}, preprocessing=prepare), NAME)
    write_volume(tmp_path / "a.nii.gz", volume)
    with pytest.raises(BadCall, match="carries no size prior"):
        list(predict_volume_files(host, [tmp_path / "a.nii.gz"], tmp_path / "out", fitting=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_it_changes_nothing_outside_its_return_value(meshnet: Backbone, volume: Volume, form: str) -> None:
    host = host_of(meshnet, prior(0.02), form=form)
    before, drawn, voxels = state_of(host), torch.get_rng_state(), volume.values.copy()
    plain = host.predict(volume, "it")
    found = transduce(host, volume, "it", steps=3, lr=0.05)
    assert state_of(host) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert np.array_equal(volume.values, voxels)
    assert np.array_equal(host.predict(volume, "it"), plain)
    assert found.shape == SHAPE
    assert found.dtype == np.uint8
    assert np.array_equal(transduce(host, volume, "it", steps=3, lr=0.05), found), "it is not a function of its input"


@pytest.mark.parametrize("factor", [0.4, 1.6])
def test_a_wrong_support_size_pulls_the_prediction_into_its_band(
    meshnet: Backbone, volume: Volume, factor: float
) -> None:
    plain = share(host_of(meshnet, prior(0.5)), volume)
    wrong = min(factor * plain, 0.95)
    host = host_of(meshnet, prior(wrong))
    p = transduce(host, volume, "it", steps=150, lr=0.03, weight=100.0, probabilities=True, trust=True)
    assert not 0.9 * wrong <= plain <= 1.1 * wrong
    assert 0.88 * wrong <= p[0].mean() <= 1.12 * wrong


def test_a_large_margin_is_inert(meshnet: Backbone, volume: Volume) -> None:
    host = host_of(meshnet, prior(0.01, margin=1e6))
    plain = host.predict(volume, "it", probabilities=True)
    found = transduce(host, volume, "it", steps=5, lr=0.01, weight=1000.0, probabilities=True)
    assert np.allclose(found, plain, atol=1e-5)  # its own first answer is where it stands already


def test_the_size_inside_the_band_is_left_alone(meshnet: Backbone, volume: Volume) -> None:
    plain = share(host_of(meshnet, prior(0.5)), volume)
    host = host_of(meshnet, prior(plain))
    found = transduce(host, volume, "it", steps=5, lr=0.01, weight=1000.0, probabilities=True)
    assert np.allclose(found, host.predict(volume, "it", probabilities=True), atol=1e-5)


def test_several_classes_at_once(meshnet: Backbone, volume: Volume) -> None:
    host = host_of(meshnet, prior(0.2, None), task=TWO)
    start = host.predict(volume, "it", probabilities=True).mean((1, 2, 3))
    p = transduce(host, volume, "it", steps=150, lr=0.03, weight=100.0, probabilities=True, trust=True).mean((1, 2, 3))
    assert abs(p[1] - 0.2) < abs(start[1] - 0.2)
    assert 0.17 <= p[1] <= 0.23


def test_windows_give_the_gradient_of_the_whole(volume_unet: Backbone, volume: Volume) -> None:
    """A network without context beyond a voxel: cut into windows, logits and gradients are those of one forward."""
    del volume_unet
    on = medgraft.load_backbone("random:meshnet:model5_gw_ae", image_size=8)
    for layer in on.network.layers[:-1]:
        centre = layer.weight[..., 1:2, 1:2, 1:2].clone()
        layer.weight.zero_()
        layer.weight[..., 1:2, 1:2, 1:2] = centre
    grads, logits = [], []
    for patch in (16, 4):
        host = host_of(on, prior(0.02), patch=patch)
        host.remove("it")
        made = adapter(on, {}, task=ONE)
        made.preprocessing = VolumePreprocessing.of(on.spec, patch=patch, axcodes="RAS", intensity=("window", 0, 1))
        host.add(made, "it")
        query = Query(host, "it", volume)
        assert len(query.places) == (1 if patch == 16 else 12)
        z = query.logits(host, "it")
        z.sigmoid().pow(2).mean().backward()
        logits.append(z.detach())
        grads.append([p.grad for p in made.parameters()])
    assert logits[0].shape == (1, 1, *SHAPE)
    close("logits", logits[1], logits[0])
    close("gradients", grads[1], grads[0])


def test_padding_is_not_counted(volume_unet: Backbone, volume: Volume) -> None:
    host = host_of(volume_unet, prior(0.02), patch=16)
    assert Query(host, "it", volume).logits(host, "it").shape == (1, 1, *SHAPE)


def test_a_query_without_the_organ_is_left_alone_with_a_warning(meshnet: Backbone, volume: Volume) -> None:
    host = host_of(meshnet, prior(0.3))
    with torch.no_grad():
        host.adapters["it"].parts["head"].linear.bias -= 1000.0  # type: ignore[union-attr,operator]
    assert not host.predict(volume, "it").any()
    with pytest.warns(UserWarning, match="polyp"):
        found = transduce(host, volume, "it", steps=3, lr=0.05, weight=100.0)
    assert not found.any()


def support_of(pack: Volumes, host: Host) -> Patches:
    prepare = host.adapters["it"].preprocessing
    assert isinstance(prepare, VolumePreprocessing)
    return Patches(pack, pack.split("train"), prepare, host.backbone.spec)


def test_with_the_support_at_hand_it_is_equation_3(meshnet: Backbone, pack: Volumes) -> None:
    """One step against the gradient written out: L_seg of the first batch plus lambda times the query's cost."""
    from medgraft.training.losses import segmentation_loss

    host = host_of(meshnet, prior(0.3, 0.2), task=TWO)
    support, query = support_of(pack, host), pack.volume(pack.split("test")[0])
    twin = copy.deepcopy(host)
    made = twin.adapters["it"]
    batch = support.batch(0)
    whole = Query(twin, "it", query).logits(twin, "it")
    total = segmentation_loss(twin(batch.images, "it"), batch.targets) + 2 * priors_of(made).cost(
        whole.softmax(1)[0, 1:]
    )
    total.backward()
    parameters = list(made.parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0).step()
    want = twin.predict(query, "it", probabilities=True)
    got = transduce(host, query, "it", support=support, steps=1, lr=0.01, weight=2.0, probabilities=True, trust=True)
    assert np.allclose(got, want, atol=1e-6)
    assert not np.allclose(got, host.predict(query, "it", probabilities=True), atol=1e-4)


def test_inside_fit_the_constraint_begins_at_its_step(meshnet: Backbone, pack: Volumes) -> None:
    ends: dict[int, Tensor] = {}
    query = pack.volume(pack.split("test")[0])
    for start in (0, 3, 4):
        host = host_of(meshnet, prior(0.3, 0.2), task=TWO)
        constraint = Constraint(priors_of(host.adapters["it"]), query, 5.0, start, trust=True)
        fit(
            host,
            "it",
            support_of(pack, host),
            FitOptions(4, lr=0.01),
            forward=constraint.forward,
            loss=constraint,
            quiet=True,
        )
        ends[start] = torch.cat([p.detach().flatten() for p in host.adapters["it"].parameters()])
    host = host_of(meshnet, prior(0.3, 0.2), task=TWO)
    fit(host, "it", support_of(pack, host), FitOptions(4, lr=0.01), quiet=True)
    plain = torch.cat([p.detach().flatten() for p in host.adapters["it"].parameters()])
    assert torch.equal(ends[4], plain)
    assert not torch.equal(ends[3], plain)
    assert not torch.equal(ends[3], ends[0])


def test_the_query_moves_no_running_statistics(meshnet: Backbone, pack: Volumes) -> None:
    host = host_of(meshnet, prior(0.3), form="paper")
    host.adapters["it"].train()
    before = {k: t.clone() for k, t in host.adapters["it"].tensors().items() if "running" in k}
    Query(host, "it", pack.volume(pack.items[0])).logits(host, "it").sum().backward()
    assert len(before) == 6
    assert all(torch.equal(host.adapters["it"].tensors()[k], t) for k, t in before.items())
    assert host.adapters["it"].training


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warnings")
def test_bad_calls(meshnet: Backbone, vit: Backbone, volume: Volume) -> None:
    host = host_of(meshnet, prior(0.3))
    bare = host.adapters["it"].without_site_parts()
    host.add(bare, "bare")
    with pytest.raises(BadCall) as refused:
        transduce(host, volume, "bare")
    says(refused.value, "no size prior", "fseft")
    with pytest.raises(UnknownName):
        transduce(host, volume, "its")
    with pytest.raises(BadData, match="nowhere"):
        transduce(host, "nowhere.nii.gz", "it")
    for bad in ({"steps": 0}, {"lr": 0.0}, {"weight": -1.0}):
        with pytest.raises(BadCall, match="wants"):
            transduce(host, volume, "it", **bad)  # type: ignore[arg-type]
    pictures = Host(vit)
    pictures.add(adapter(vit, {"priors": prior(0.1)}), "it")
    with pytest.raises(BadCall, match="volumes"):
        transduce(pictures, volume, "it")
    with pytest.raises(BadCall, match="2 classes"):
        transduce(host, volume, "it", priors=prior(0.1, 0.1), trust=True)
    with torch.no_grad():
        host.adapters["it"].parts["head"].linear.weight.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(Diverged):
        transduce(host, volume, "it", trust=True)


def test_it_stands_at_the_front_door() -> None:
    assert medgraft.transduce is transduce
