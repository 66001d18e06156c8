"""Axes, grids and intensities of volumes."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from medgraft.errors import BadCall
from medgraft.volumes import Volume
from medgraft.voxels import resized, scaled, size_at, turned, turned_back

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-0.9, 0.9, 3.0]), [12.5, -30.0, 7.25]
)


def ramp(dtype: type = np.int16, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE, np.diag([-2.0, 1.0, -1.0, 1.0])[[2, 0, 1, 3]]])
@pytest.mark.parametrize("axcodes", ["RAS", "LIA", "PSR", "SPL"])
def test_turning_moves_no_voxel_in_space_and_is_undone(affine: np.ndarray, axcodes: str) -> None:
    volume = Volume(ramp(), affine)
    there = turned(volume, axcodes)
    assert there.axcodes == axcodes
    assert np.array_equal(turned_back(there.values, axcodes, volume), volume.values)
    for index in ((0, 0, 0), (4, 0, 6), (1, 5, 2)):  # the voxel with this value, at this place
        found = np.argwhere(there.values == volume.values[index])[0]
        assert np.allclose(there.affine @ [*found, 1], affine @ [*index, 1])


@pytest.mark.parametrize("axcodes", ["RA", "RAR", "XYZ", "RASI", "ras"])
def test_an_orientation_that_is_none_is_refused(axcodes: str) -> None:
    with pytest.raises(BadCall, match="such as 'RAS'"):
        turned(Volume(ramp(), np.eye(4)), axcodes)


def test_resampling_keeps_edges_on_edges() -> None:
    volume = Volume(ramp(np.float32, (8, 6, 4)), np.diag([1.0, 2.0, 3.0, 1.0]))
    assert size_at(volume, (2.0, 2.0, 1.5)) == (4, 6, 8)
    assert size_at(volume, (100.0, 100.0, 100.0)) == (1, 1, 1)
    x = torch.from_numpy(volume.values)[None]
    assert resized(x, (8, 6, 4)) is x
    halved = resized(x, (4, 6, 4))
    assert torch.allclose(halved, (x[:, ::2] + x[:, 1::2]) / 2)  # each new voxel covers two old ones
    labels = (x % 3).round()
    assert set(resized(labels, (5, 9, 3), smooth=False).unique().tolist()) <= {0, 1, 2}
    assert torch.equal(resized(resized(labels, (16, 12, 8), smooth=False), (8, 6, 4), smooth=False), labels)


@pytest.mark.parametrize("rule", [("percentiles", 2.0, 98.0), ("zscore", 0.0, 100.0)])
def test_a_constant_volume_is_zero_and_stays_finite(rule: tuple[str, float, float]) -> None:
    flat = scaled(np.full((3, 3, 3), 7.0, np.float32), rule)
    assert flat.dtype == np.float32
    assert not flat.any()
