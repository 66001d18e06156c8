import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgraft.errors import BadCall, UnknownName
from medgraft.training import phantoms
from medgraft.training.phantoms import KINDS, REGIONS, SCENES, TEXTURES, phantom, preview, write_dataset


@pytest.mark.parametrize("scene", sorted(SCENES))
class TestEveryScene:
    def test_the_same_seed_gives_the_same_bytes(self, scene: str) -> None:
        one, two = phantom(5, scene=scene, size=64), phantom(5, scene=scene, size=64)
        for name in ("image", "region", "instance", "texture"):
            assert getattr(one, name).tobytes() == getattr(two, name).tobytes()

    def test_another_seed_gives_another_picture(self, scene: str) -> None:
        assert (phantom(5, scene=scene, size=64).image != phantom(6, scene=scene, size=64).image).any()

    def test_every_pixel_is_labelled_with_something_known(self, scene: str) -> None:
        for seed in range(6):
            drawn = phantom(seed, scene=scene, size=96)
            assert drawn.image.shape == (96, 96, 3)
            assert drawn.image.dtype == np.uint8
            assert drawn.region.shape == drawn.instance.shape == drawn.texture.shape == (96, 96)
            assert drawn.region.max() < len(REGIONS)
            assert drawn.texture.max() < len(TEXTURES)
            assert drawn.instance.min() >= 0

    def test_there_is_mostly_more_than_one_thing_to_see(self, scene: str) -> None:
        drawn = [phantom(seed, scene=scene, size=64) for seed in range(8)]
        assert sum(len(np.unique(p.region)) > 1 for p in drawn) >= 6


def test_the_size_is_free_and_odd_ones_work() -> None:
    assert phantom(0, size=51, scene="vessels").image.shape == (51, 51, 3)


def test_an_unknown_scene_names_the_near_one() -> None:
    with pytest.raises(UnknownName, match="nuclei"):
        phantom(0, scene="nuclie")
    with pytest.raises(BadCall, match="32"):
        phantom(0, size=8)


def test_a_preview_is_a_picture_of_its_own_stream() -> None:
    assert preview(3).image.shape == (128, 128, 3)
    assert preview(3).image.tobytes() == preview(3).image.tobytes()
    assert not any((preview(s).image == phantom(s).image).all() for s in range(3))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_the_folder_reads_like_any_other_pack(self, tmp_path: Path, kind: str) -> None:
        path = write_dataset(tmp_path / "pack", kind, train=3, test=2, size=64)
        assert path == tmp_path / "pack" / "dataset.json"
        facts = json.loads(path.read_text())
        assert {"name", "title", "task", "dims", "modality", "classes", "items"} <= facts.keys()
        assert [item["split"] for item in facts["items"]] == ["train"] * 3 + ["test"] * 2
        known = {int(value) for value in facts["classes"]}
        seen = set()
        for item in facts["items"]:
            image, mask = Image.open(path.parent / item["image"]), Image.open(path.parent / item["mask"])
            assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (64, 64), "L", (64, 64))
            seen |= set(np.unique(np.asarray(mask)).tolist())
        assert seen == known

    def test_the_test_items_do_not_depend_on_the_shots(self, tmp_path: Path, kind: str) -> None:
        few = write_dataset(tmp_path / "a", kind, train=1, test=1, size=64).parent
        many = write_dataset(tmp_path / "b", kind, train=4, test=2, size=64).parent
        for name in (f"{kind}_train_0000.png", f"{kind}_test_0000.png"):
            for part in ("images", "masks"):
                assert (few / part / name).read_bytes() == (many / part / name).read_bytes()

    def test_no_threshold_solves_it(self, tmp_path: Path, kind: str) -> None:
        folder = write_dataset(tmp_path, kind, train=10, test=0).parent
        grey, wanted = [], []
        for path in sorted((folder / "images").iterdir()):
            grey.append(np.asarray(Image.open(path).convert("L")))
            wanted.append(np.asarray(Image.open(folder / "masks" / path.name)) > 0)
        best = max(_dice(np.stack(grey) < level, np.stack(wanted)) for level in range(0, 256, 4))
        assert best < 0.75


def test_an_unknown_kind_names_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="lesion"):
        write_dataset(tmp_path, "lesions", train=1, test=1)
    with pytest.raises(BadCall, match="at least one"):
        write_dataset(tmp_path, "lesion", train=0, test=0)


def test_the_streams_of_numbers_never_meet() -> None:
    assert len({phantoms._PRETRAINING, phantoms._FEW_SHOT, phantoms._PREVIEW}) == 3


def _dice(guess: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
