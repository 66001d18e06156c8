"""`medgraft soup` and `medgraft ensemble`, as a person types them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgraft.adapters import Adapter, ClassifierHead, LinearHead, LoRA, Task
from medgraft.adapters.store import TENSORS_NAME, read_adapter, read_record, save_adapter
from medgraft.adapters.verify import passed, verify
from medgraft.backbones import load_backbone
from medgraft.training.data import load_dataset
from medgraft.training.evaluate import evaluate
from medgraft.training.model import open_model, open_together
from medgraft.training.phantoms import write_dataset
from tests.helpers import wake
from tests.test_cli import TINY, call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("lesion"), "lesion", train=2, test=3, size=64).parent


LESION = Task("segment", ("lesion",))


def saved(folder: Path, seed: int, *, task: Task = LESION, dtype: str = "float16") -> Path:
    torch.manual_seed(seed)
    on = load_backbone(TINY, image_size=64)
    head = (LinearHead if task.kind == "segment" else ClassifierHead).on(on, task)
    parts = {"lora": LoRA.on(on, task, rank=2, targets="blocks.11.attn.*"), "head": head}
    made = wake(Adapter.of(on, task, parts, provenance={"dataset": "lesion", "seed": seed}), seed)
    return save_adapter(made, folder / f"a{seed}", dtype=dtype, backbone=on)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    return [saved(folder, seed) for seed in range(3)]


def test_a_soup_is_an_adapter_that_verifies(three: list[Path], tmp_path: Path) -> None:
    code, said = call("soup", *three, "--out", tmp_path / "soup")
    assert code == 0, said
    assert "random weights" in said
    record = read_record(tmp_path / "soup")
    assert record["dtype"] == "float16"
    assert record["provenance"]["recipe"] == "soup"
    assert [m["seed"] for m in record["provenance"]["members"]] == [0, 1, 2]
    assert str(three[0].parent) not in (tmp_path / "soup" / "adapter.json").read_text()
    assert passed(verify(tmp_path / "soup"))
    made, members = read_adapter(tmp_path / "soup"), [read_adapter(path) for path in three]
    lora = made.parts["lora"]
    assert isinstance(lora, LoRA)
    for site in lora.sites:  # stored in half precision, and still exact
        got = lora.scale * lora.cell(site).B.double() @ lora.cell(site).A.double()
        each = [
            m.parts["lora"].scale * m.parts["lora"].cell(site).B.double() @ m.parts["lora"].cell(site).A.double()
            for m in members
        ]  # type: ignore[operator,union-attr]
        assert (got - sum(each) / 3).abs().max() < 1e-6 * got.abs().max()


def test_a_soup_of_one_is_that_file(three: list[Path], tmp_path: Path) -> None:
    code, said = call("soup", three[0], "--out", tmp_path / "soup")
    assert code == 0, said
    assert (tmp_path / "soup" / TENSORS_NAME).read_bytes() == (three[0] / TENSORS_NAME).read_bytes()


def test_a_rank_tells_its_error(three: list[Path], tmp_path: Path) -> None:
    code, said = call("soup", *three, "--out", tmp_path / "soup", "--rank", 2)
    assert code == 0, said
    assert "error of the cut" in said
    assert "%" in said
    assert read_record(tmp_path / "soup")["parts"][0]["config"]["rank"] == 2


def test_greedy_says_what_was_tried_and_keeps_its_promise(three: list[Path], data: Path, tmp_path: Path) -> None:
    code, said = call("soup", *three, "--out", tmp_path / "soup", "--greedy", "--data", data, "--split", "test")
    assert code == 0, said
    assert "kept" in said
    assert "tried in this order" in said
    dataset = load_dataset(data)
    scores = [evaluate(open_model(str(path))[0], "adapter", dataset)["dice"] for path in (*three, tmp_path / "soup")]
    assert scores[-1] >= max(scores[:-1])


def test_members_of_several_precisions_make_a_soup_of_full_precision(three: list[Path], tmp_path: Path) -> None:
    other = saved(tmp_path, 7, dtype="float32")
    assert call("soup", three[0], other, "--out", tmp_path / "soup")[0] == 0
    assert read_record(tmp_path / "soup")["dtype"] == "float32"


def test_an_ensemble_is_scored_beside_its_members(three: list[Path], data: Path) -> None:
    code, said = call("ensemble", *three, "--data", data)
    assert code == 0, said
    host, members = open_together([str(path) for path in three])
    want = evaluate(host, list(members), load_dataset(data))["dice"]
    line = next(line for line in said.splitlines() if line.endswith("ensemble"))
    assert line.startswith(f"[{want:.3f}")
    assert all(any(row.endswith(str(path)) for row in said.splitlines()) for path in three)


def test_an_ensemble_writes_a_mask(three: list[Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 51, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    code, said = call("ensemble", *three, "--image", tmp_path / "x.png", "--out", tmp_path / "mask.png")
    assert code == 0, said
    assert np.asarray(Image.open(tmp_path / "mask.png")).shape == (70, 51)


def test_an_ensemble_of_classifiers_prints_probabilities(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(tmp_path / "x.png")
    members = [saved(tmp_path, s, task=Task("classify", ("benign", "malignant"))) for s in range(2)]
    code, said = call("ensemble", *members, "--image", tmp_path / "x.png")
    assert code == 0, said
    assert "benign" in said
    assert "0." in said


BAD = {
    "greedy without data": ("soup {0} {1} --out {out} --greedy", ("--greedy", "--data")),
    "data without greedy": ("soup {0} {1} --out {out} --data {data}", ("--greedy", "--data")),
    "a split that is not there": ("soup {0} {1} --out {out} --greedy --data {data}", ("val", "no items")),
    "one named twice": ("soup {0} {0} --out {out}", ("twice",)),
    "a rank of nothing": ("soup {0} {1} --out {out} --rank 0", ("rank 0",)),
    "no adapter there": ("soup {0} {out}/none --out {out}", ("none",)),
    "nothing to answer for": ("ensemble {0} {1}", ("--data", "--image")),
    "both at once": ("ensemble {0} {1} --data {data} --image x.png", ("--data", "--image")),
    "no place for the mask": ("ensemble {0} {1} --image x.png", ("--out",)),
    "other classes": ("ensemble {0} {other} --data {data}", ("lesion", "gland")),
    "other classes in a soup": ("soup {0} {other} --out {out}", ("lesion", "gland")),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_end_in_one_line_and_leave_nothing(three: list[Path], data: Path, tmp_path: Path, what: str) -> None:
    words, wanted = BAD[what]
    other = saved(tmp_path, 9, task=Task("segment", ("gland",))) if "{other}" in words else ""
    places = dict(zip("01", three, strict=False))
    filled = words.format(*map(str, places.values()), data=data, out=tmp_path / "out", other=other)
    code, said = call(*filled.split())
    assert code == 2, said
    assert "Traceback" not in said
    for word in wanted:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_another_backbone_is_refused_by_name(three: list[Path], tmp_path: Path) -> None:
    on = load_backbone(f"{TINY}?seed=5", image_size=64)
    parts = {"lora": LoRA.on(on, LESION, targets="blocks.11.attn.*"), "head": LinearHead.on(on, LESION)}
    foreign = save_adapter(Adapter.of(on, LESION, parts), tmp_path / "foreign", backbone=on)
    for command in (("soup", "--out", tmp_path / "soup"), ("ensemble", "--image", "x.png", "--out", "y.png")):
        code, said = call(command[0], three[0], foreign, *command[1:])
        assert code == 2
        assert "?seed=5" in said
        assert "fingerprint" in said
    assert not (tmp_path / "soup").exists()


def test_a_soup_takes_the_place_of_an_adapter_whole_or_not_at_all(three: list[Path], tmp_path: Path) -> None:
    shutil.copytree(three[1], tmp_path / "old")
    assert call("soup", *three, "--out", tmp_path / "old", "--rank", 0)[0] == 2
    assert (tmp_path / "old" / TENSORS_NAME).read_bytes() == (three[1] / TENSORS_NAME).read_bytes()
    assert call("soup", *three, "--out", tmp_path / "old")[0] == 0
    assert read_record(tmp_path / "old")["provenance"]["recipe"] == "soup"


@pytest.mark.parametrize("kind", ["none", "swa", "ema"])
def test_every_recipe_can_average_along_its_training(data: Path, tmp_path: Path, kind: str) -> None:
    words = ("--backbone", TINY, "--image-size", 64, "--steps", 8, "--augment", "none", "--quiet", "--average", kind)
    code, said = call("adapt", "linear_probe", "--data", data, "--out", tmp_path / "a", *words)
    assert code == 0, said
    assert read_record(tmp_path / "a")["provenance"].get("average") == (None if kind == "none" else kind)


def test_an_average_that_does_not_exist(data: Path, tmp_path: Path) -> None:
    code, said = call("adapt", "linear_probe", "--data", data, "--out", tmp_path / "a", "--average", "mean")
    assert code == 2
    assert "swa" in said
    assert "mean" in said
