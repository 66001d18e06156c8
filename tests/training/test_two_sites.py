from pathlib import Path

import numpy as np
import pytest

from medgraft.errors import BadCall
from medgraft.training.data import load_dataset
from medgraft.training.two_sites import write_two_sites


def test_both_sites_show_the_same_things_and_only_one_has_stripes(tmp_path: Path) -> None:
    plain, cued = (load_dataset(write_two_sites(tmp_path / f"{c}", train=3, test=2, cue=c).parent) for c in (0.0, 1.0))
    assert plain.classes == {1: "body", 2: "satellite"}
    assert [(i.domain, i.split) for i in plain.items] == [
        (site, split) for site in ("site_a", "site_b") for split in ["train"] * 3 + ["test"] * 2
    ]
    for item, other in zip(plain.items, cued.items, strict=True):
        assert set(np.unique(plain.mask(item))) == {0, 1, 2}
        assert np.array_equal(plain.mask(item), cued.mask(other)), "the cue moves nothing"
        assert np.array_equal(plain.image(item), cued.image(other)) == (item.domain == "site_a")
    more = load_dataset(write_two_sites(tmp_path / "more", train=4, test=2).parent)
    assert np.array_equal(more.image(more.items[0]), cued.image(cued.items[0])), "item k is the same in a larger set"


@pytest.mark.parametrize("wrong", [{"cue": 1.5}, {"cue": -0.1}, {"train": 0}, {"test": -1}, {"size": 16}])
def test_bad_calls(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(BadCall, match="cue in"):
        write_two_sites(tmp_path, **{"train": 1, "test": 1, **wrong})  # type: ignore[arg-type]
