"""Volumes end to end on a host: windows, their weights, shared prefixes, and the way back to the file's grid."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from medgraft import volumes
from medgraft.adapters import Adapter, Host
from medgraft.adapters.card import build_card
from medgraft.adapters.explain import explain
from medgraft.adapters.heads import LinearHead
from medgraft.adapters.schema import canonical
from medgraft.adapters.sliding import largest_components, predict_volume, slide
from medgraft.adapters.store import read_adapter, read_record, save_adapter
from medgraft.adapters.task import Task
from medgraft.adapters.verify import verify
from medgraft.adapters.volume_task import VolumePreprocessing
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadAdapter, BadCall, BadData, UnknownName
from medgraft.volumes import Volume

REAL = Path(__file__).parents[2].parent / "shared" / "data"
CLASSES = Task("segment", ("front", "back"), (3, 7))
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-1.0, 1.0, 2.0]), [12.5, -30.0, 7.25]
)


@pytest.fixture(scope="module")
def meshnet() -> Backbone:
    return load_backbone("random:meshnet:model5_gw_ae", image_size=12)


@pytest.fixture(scope="module")
def swin() -> Backbone:
    return load_backbone("random:monai:swin_unetr?feature_size=12&heads=1-2-4-8&window=2&depths=1-1-1-1", image_size=64)


def adapter(backbone: Backbone, seed: int = 0, task: Task = CLASSES, **changes: Any) -> Adapter:
    """With a head that says something else from place to place."""
    torch.manual_seed(seed)
    head = LinearHead.on(backbone, task)
    with torch.no_grad():
        features = backbone(torch.rand(1, 1, *backbone.spec.fitting((12, 12, 12))))
        head.linear.weight.normal_().mul_(10 / features.maps[-1].std())
        head.linear.bias.copy_(-head(features, torch.zeros(1, 1, 12, 12, 12)).mean((0, 2, 3, 4)))
    prepare = VolumePreprocessing.of(backbone.spec, **changes)
    return Adapter.of(backbone, task, {"head": head}, preprocessing=prepare)


def host_of(backbone: Backbone, *adapters: Adapter) -> Host:
    host = Host(backbone)
    for i, one in enumerate(adapters):
        host.add(one, "abcdefgh"[i])
    return host


def volume(shape: tuple[int, int, int] = (18, 10, 15), affine: np.ndarray = OBLIQUE) -> Volume:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Volume(values, affine, "the volume")


# Windows


def test_one_window_that_covers_the_volume_is_one_call(meshnet: Backbone) -> None:
    host = host_of(meshnet, adapter(meshnet))
    x = torch.randn(1, 9, 8, 10)
    assert torch.allclose(slide(host, x, ["a"], window=(9, 8, 10))[0], host(x[None], adapter="a")[0], atol=1e-6)


def test_windows_are_averaged_by_a_gaussian(meshnet: Backbone) -> None:
    """Against the sum written out, with MONAI's weights: 0.125 of the side, by axis."""
    host = host_of(meshnet, adapter(meshnet))
    x, side = torch.randn(1, 16, 8, 8), 8
    where = torch.arange(side) - (side - 1) / 2
    line = torch.exp(-(where**2) / (2 * (0.125 * side) ** 2))
    weight = (line[:, None, None] * line[:, None] * line).clamp_min(1e-3)
    total, seen = torch.zeros(3, 16, 8, 8), torch.zeros(16, 8, 8)
    for start in (0, 4, 8):
        rows = slice(start, start + side)
        total[:, rows] += weight * host(x[None, :, rows], adapter="a")[0]
        seen[rows] += weight
    found = slide(host, x, ["a"], window=(side,) * 3, overlap=0.5)[0]
    assert torch.allclose(found, total / seen, rtol=1e-4, atol=1e-4)
    plain = slide(host, x, ["a"], window=(side,) * 3, overlap=0.0)[0]
    assert (found - plain).abs().max() > 0.05 * found.abs().max()


def test_the_batch_of_windows_changes_nothing(meshnet: Backbone) -> None:
    host = host_of(meshnet, adapter(meshnet))
    x = torch.randn(1, 14, 9, 11)
    one, four = (slide(host, x, ["a"], window=(8, 8, 8), batch=n)[0] for n in (1, 4))
    assert torch.allclose(one, four, atol=1e-5)


def test_several_adapters_share_the_prefix_of_every_window(swin: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(swin, *(adapter(swin, seed) for seed in range(3)))
    x = torch.randn(1, 70, 64, 64)
    stems = 0
    stem = swin.stem

    def counted(x: Tensor) -> Any:
        nonlocal stems
        stems += 1
        return stem(x)

    alone = [slide(host, x, [name], window=(64,) * 3, overlap=0.25)[0] for name in "abc"]
    monkeypatch.setattr(swin, "stem", counted)
    together = slide(host, x, list("abc"), window=(64,) * 3, overlap=0.25)
    assert stems == 2  # windows, not windows times adapters
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_volume_smaller_than_the_patch_shrinks_it(swin: Backbone) -> None:
    prepare = VolumePreprocessing.of(swin.spec, patch=96)
    assert prepare.window((35, 50, 200), swin.spec) == (64, 64, 96)
    found = predict_volume(host_of(swin, adapter(swin, patch=96)), volume((20, 33, 9)), ["a"])[0]
    assert found.shape == (20, 33, 9)


# From a file and back


@pytest.mark.parametrize(
    ("affine", "changes"),
    [
        (np.eye(4), {}),
        (OBLIQUE, {}),
        (OBLIQUE, {"spacing": (1.5, 1.5, 1.5)}),
        (np.diag([-0.7, -0.7, 5.0, 1.0]), {"axcodes": "PSR"}),
        (np.diag([2.0, 1.0, -1.0, 1.0])[[2, 0, 1, 3]], {"spacing": (1.0, 2.0, 1.0), "axcodes": "RAS"}),
    ],
)
def test_labels_lie_on_the_grid_of_their_file(
    tmp_path: Path, meshnet: Backbone, affine: np.ndarray, changes: dict[str, Any]
) -> None:
    values = np.random.default_rng(1).integers(-1000, 1000, (11, 9, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    host = host_of(meshnet, adapter(meshnet, **changes))
    labels = host.predict(tmp_path / "a.nii.gz", "a")
    assert labels.shape == values.shape
    assert labels.dtype == np.uint8
    assert set(np.unique(labels).tolist()) <= {0, 3, 7}
    shares = host.predict(tmp_path / "a.nii.gz", "a", probabilities=True)
    assert shares.shape == (3, *values.shape)
    assert np.allclose(shares.sum(0), 1, atol=1e-5)
    assert np.array_equal(np.array((0, 3, 7))[shares.argmax(0)], labels)


def test_what_is_seen_at_a_place_is_said_of_that_place(meshnet: Backbone) -> None:
    """A bright cube in a corner is found where it is, whatever the grid, by a head that reads brightness."""

    class Bright(LinearHead):
        def read(self, features: Any, image: Tensor) -> Tensor:
            return (image - 0.5) * 10

    task = Task("segment", ("bright",))
    for affine in (np.eye(4), OBLIQUE, np.diag([1.0, -2.0, 1.0, 1.0])[[1, 2, 0, 3]]):
        for changes in ({"axcodes": "LIA"}, {"axcodes": "SPR", "spacing": (0.5, 1.0, 1.0)}):
            values = np.zeros((12, 14, 16), np.float32)
            values[1:5, 2:8, 9:15] = 1
            prepare = VolumePreprocessing.of(meshnet.spec, patch=8, intensity=("window", 0, 1), **changes)
            head = Bright.on(meshnet, task)
            host = host_of(meshnet, Adapter.of(meshnet, task, {"head": head}, preprocessing=prepare))
            found = host.predict(Volume(values, affine), "a")
            assert (found != values).mean() < 0.02, (affine, changes)
            x = prepare(Volume(values, affine))
            assert torch.equal(
                prepare.labels(Volume(values.astype(np.uint8), affine)) == 1, x[0] >= 0.5
            ) or changes.get("spacing")


def test_adapters_of_other_preprocessing_are_predicted_together(meshnet: Backbone) -> None:
    host = host_of(meshnet, adapter(meshnet, 0), adapter(meshnet, 1, spacing=(2.0, 2.0, 2.0)), adapter(meshnet, 2))
    together = predict_volume(host, volume(), ["a", "b", "c"])
    for name, found in zip("abc", together, strict=True):
        assert np.array_equal(found, host.predict(volume(), name))


def test_a_constant_volume_is_no_accident(meshnet: Backbone) -> None:
    flat = Volume(np.full((9, 9, 9), 5, np.float32), np.eye(4))
    assert host_of(meshnet, adapter(meshnet)).predict(flat, "a").shape == (9, 9, 9)


def test_the_largest_component_of_each_class_is_kept() -> None:
    labels = np.zeros((12, 6, 6), np.uint8)
    labels[0:3, :3, :3] = 3
    labels[3, 3, 3] = 3  # joined at a corner
    labels[10, 5, 5] = 3
    labels[6:8, :2, :2] = 7
    labels[11, 0, 0] = 7
    kept = largest_components(labels)
    assert kept.dtype == np.uint8
    assert kept[10, 5, 5] == kept[11, 0, 0] == 0
    assert (kept == 3).sum() == 28
    assert (kept == 7).sum() == 8
    assert not largest_components(np.zeros((4, 4, 4), np.uint8)).any()


def test_the_option_of_an_adapter_keeps_largest_components(meshnet: Backbone) -> None:
    rough = adapter(meshnet)
    clean = adapter(meshnet, largest=True)
    host = host_of(meshnet, rough, clean)
    found = predict_volume(host, volume(), ["a", "b"])
    assert np.array_equal(found[1], largest_components(found[0]))
    assert not np.array_equal(found[0], found[1])


# What is refused


def test_what_cannot_be_predicted_is_said_so(meshnet: Backbone, vit: Backbone, tmp_path: Path) -> None:
    host = host_of(meshnet, adapter(meshnet))
    with pytest.raises(BadCall, match=r"an array of the shape \(4, 4, 4\) does not say how it lies in space"):
        host.predict(np.zeros((4, 4, 4), np.float32), "a")
    with pytest.raises(BadCall, match="takes no prompts"):
        host.predict(volume(), "a", prompts={"box": (0, 0, 1, 1)})
    with pytest.raises(UnknownName, match="no resident adapter called 'x'"):
        host.predict(volume(), "x")
    with pytest.raises(BadData, match="found nothing"):
        host.predict(tmp_path / "none.nii.gz", "a")
    flat = Host(vit)
    flat.add(Adapter.of(vit, CLASSES, {"head": LinearHead.on(vit, CLASSES)}), "picture")
    with pytest.raises(BadCall, match="'picture' was trained on pictures, not on volumes"):
        flat.predict(volume(), "picture")
    with pytest.raises(BadCall, match="takes images of 2 dimensions"):
        VolumePreprocessing.of(vit.spec)


def test_a_prediction_beyond_the_memory_is_refused(meshnet: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(meshnet, adapter(meshnet))
    monkeypatch.setattr(volumes.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(BadData, match=r"predicting the volume needs 0.0 GB of memory"):
        host.predict(volume(), "a")


# The preprocessing itself


def test_a_backbone_says_how_its_volumes_are_prepared(meshnet: Backbone) -> None:
    own = Adapter.of(meshnet, CLASSES, {"head": LinearHead.on(meshnet, CLASSES)}).preprocessing
    assert isinstance(own, VolumePreprocessing)
    assert (own.axcodes, own.spacing, own.intensity) == ("LIA", (1.0, 1.0, 1.0), ("percentiles", 2.0, 98.0))
    assert own.patch == (12, 12, 12)
    assert own.size == 12
    x = own(volume())
    assert x.shape == (1, 18, 30, 10)  # the oblique volume is LAS: flipped and permuted, 2 mm slices resampled to 1 mm
    assert 0 <= x.min() <= x.max() <= 1


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (("window", -100.0, 300.0), lambda v: ((v + 100) / 400).clip(0, 1)),
        (
            ("percentiles", 10.0, 90.0),
            lambda v: ((v - np.percentile(v, 10)) / (np.percentile(v, 90) - np.percentile(v, 10))).clip(0, 1),
        ),
        (("zscore", 0.0, 100.0), lambda v: (v - v.mean()) / v.std()),
    ],
)
def test_intensities_follow_their_rule(meshnet: Backbone, rule: Any, wanted: Any) -> None:
    values = np.random.default_rng(2).normal(50, 200, (8, 8, 8)).astype(np.float32)
    prepare = VolumePreprocessing((8, 8, 8), intensity=rule, mean=(0.25,), std=(2.0,))
    x = prepare(Volume(values, np.eye(4)))
    assert np.allclose(x[0].numpy(), (wanted(values) - 0.25) / 2, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch": (8, 8)},
        {"patch": (8, 8, 0)},
        {"intensity": ("gamma", 0, 1)},
        {"intensity": ("window", 1, 1)},
        {"intensity": ("percentiles", 2, 101)},
        {"intensity": ("window", 0, float("inf"))},
        {"axcodes": "RAA"},
        {"spacing": (1, 1, 0)},
        {"spacing": (1, 1)},
        {"overlap": 1.0},
        {"std": (0.0,)},
        {"mean": (0.0, 0.0)},
    ],
)
def test_a_preprocessing_that_cannot_be_applied_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadCall):
        VolumePreprocessing(**{"patch": (8, 8, 8), **wrong})


def test_it_travels_in_the_adapter(tmp_path: Path, meshnet: Backbone) -> None:
    made = adapter(meshnet, spacing=(1.0, 1.5, 2.0), overlap=0.25, largest=True, intensity=("window", -50.0, 150.0))
    save_adapter(made, tmp_path / "a", dtype="float32", backbone=meshnet)
    read = read_adapter(tmp_path / "a")
    assert read.preprocessing == made.preprocessing
    host = host_of(meshnet, made, read)
    assert np.array_equal(host.predict(volume(), "a"), host.predict(volume(), "b"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dims": 2},
        {"patch": [8, 8, 4096]},
        {"intensity": ["window", 0]},
        {"intensity": ["window", 5, 5]},
        {"axcodes": "RRS"},
        {"spacing": [0, 1, 1]},
        {"overlap": 0.99},
        {"extra": 1},
    ],
)
def test_a_stranger_s_preprocessing_is_checked(tmp_path: Path, meshnet: Backbone, wrong: dict[str, Any]) -> None:
    save_adapter(adapter(meshnet), tmp_path / "a", dtype="float32")
    file = tmp_path / "a" / "adapter.json"
    with pytest.raises(BadAdapter):
        read_adapter(_with(file, file.read_text(), "preprocessing", **wrong))


@pytest.mark.parametrize("name", ["ct_abdomen", "mr_abdomen"])
def test_real_volumes_keep_their_grid(meshnet: Backbone, name: str) -> None:
    path = REAL / "ct_mr_sample" / "images" / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip("the shared data are not here")
    host = host_of(meshnet, adapter(meshnet, spacing=(9.0, 9.0, 9.0), patch=32))
    assert host.predict(path, "a").shape == nib.load(path).shape


# What else reads an adapter


def test_an_adapter_of_volumes_is_explained_verified_and_described(tmp_path: Path, meshnet: Backbone) -> None:
    made = adapter(meshnet, patch=12, spacing=(1.0, 1.0, 2.5))
    assert explain(made, meshnet).activations > 0
    save_adapter(made, tmp_path / "a", dtype="float32", backbone=meshnet)
    verdicts = {v.item: v for v in verify(tmp_path / "a", backbone=meshnet)}
    assert verdicts["schema"].ok
    assert verdicts["fingerprint"].ok
    assert verdicts["probe"].ok
    card = build_card(read_record(tmp_path / "a"))
    assert "patches of 12 x 12 x 12 voxels, axes LIA, 1 x 1 x 2.5 mm, intensities by percentiles 2 to 98" in card
    assert 'image = "volume.nii.gz"' in card
    assert "pixels" not in card


def test_the_code_of_its_card_runs(tmp_path: Path, meshnet: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapter(meshnet), tmp_path, dtype="float32", backbone=meshnet)
    nib.save(nib.Nifti1Image(volume().values, OBLIQUE), tmp_path / "volume.nii.gz")
    code = build_card(read_record(tmp_path)).split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["result"].shape == (18, 10, 15)


def test_a_stranger_s_probe_or_network_may_not_take_all_memory(tmp_path: Path, meshnet: Backbone) -> None:
    save_adapter(adapter(meshnet), tmp_path / "a", dtype="float32", backbone=meshnet)
    file = tmp_path / "a" / "adapter.json"
    saved = file.read_text()
    verdicts = {v.item: v for v in verify(_with(file, saved, "probe", size=64), backbone=meshnet)}
    assert "probe of 64 pixels a side is too large" in verdicts["probe"].said
    for id in (
        "random:monai:swin_unetr?feature_size=960",
        "random:volume:unet3d?filters=512",
        "random:monai:unet?widths=8-16-9999",
    ):
        said = {v.item: v for v in verify(_with(file, saved, "backbone", id=id))}["fingerprint"]
        assert said.ok is None
        assert "a very large random network" in said.said


def _with(file: Path, text: str, key: str, **changes: Any) -> Path:
    """The adapter's folder, its description rewritten with changes under `key`."""
    record = json.loads(text)
    record[key] |= changes
    del record["sha256"]
    file.write_text(json.dumps({**record, "sha256": canonical(record)}), encoding="utf-8")
    return file.parent
