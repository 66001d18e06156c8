"""`medgraft matrix` as a person types it."""

import json
from pathlib import Path

import pytest

from tests.test_cli import TINY, call
from tests.training.test_matrix import cameras, site

SHORT = ("--backbone", TINY, "--image-size", 32, "--steps", 1, "--batch", 2)


def test_domains_of_one_pack(tmp_path: Path) -> None:
    words = (
        "matrix",
        "--data",
        cameras(tmp_path / "p"),
        "--by",
        "domain",
        "--recipe",
        "lora",
        "--out",
        tmp_path / "out",
    )
    code, said = call(*words, "--train", "mid", "--train", "mid+right", "--seeds", 2, *SHORT, "--rank", 2)
    assert code == 0, said
    assert "mid+right" in said
    assert "left has no vein to test on" in said
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert found["rows"] == ["mid", "mid+right"]
    assert found["seeds"] == [0, 1]
    assert found["settings"]["recipe"] == "lora"
    assert found["settings"]["rank"] == 2
    assert len(found["cells"]) == 2 * 3 * 2
    assert (tmp_path / "out" / "matrix.md").is_file()
    code, said = call(*words, "--train", "mid", *SHORT, "--rank", 4)
    assert code == 2
    assert "rank: 2 there, 4 now" in said


def test_several_folders_after_one_flag_and_several_flags(tmp_path: Path) -> None:
    a, b, c = (site(tmp_path / name, n) for n, name in enumerate("abc"))
    shared = ("--recipe", "linear_probe", "--train", "a", *SHORT, "--classes", "vein")
    code, said = call("matrix", "--data", a, b, c, "--out", tmp_path / "x", *shared)
    assert code == 0, said
    assert json.loads((tmp_path / "x" / "matrix.json").read_text())["columns"] == ["a", "b", "c"]
    code, said = call("matrix", "--data", a, "--data", b, "--out", tmp_path / "y", *shared)
    assert code == 0, said
    assert json.loads((tmp_path / "y" / "matrix.json").read_text())["classes"] == ["vein"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--by", "domain"), "have none"),
        (("--by", "camera"), "there are: domain"),
        ((), "found one: a"),
        (("--recipe", "lorra"), "did you mean 'lora'"),
        (("--by", "domain", "--rnak", "3"), "No such option"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    shared = {"--recipe": "lora"} | dict(zip(words[::2], words[1::2], strict=True))
    flat = [w for pair in shared.items() for w in pair]
    code, answer = call("matrix", "--data", site(tmp_path / "a"), "--out", tmp_path / "out", *flat)
    assert code == 2
    assert said in answer
    assert not (tmp_path / "out").exists()


def test_a_misspelt_domain_names_the_near_one(tmp_path: Path) -> None:
    root = cameras(tmp_path / "p")
    code, said = call(
        "matrix",
        "--data",
        root,
        "--by",
        "domain",
        "--recipe",
        "lora",
        "--out",
        tmp_path / "out",
        "--train",
        "mid+rigth",
    )
    assert code == 2
    assert "did you mean 'right'" in said
