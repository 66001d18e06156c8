"""`fit`: it learns, it resumes bit for bit, it stops before damage, it caches without changing the curve."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from medgraft.adapters import Adapter, Bottleneck, Host, LinearHead, LoRA, Task
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData, Diverged, SaveFailed
from medgraft.training.cache import PrefixCache
from medgraft.training.data import Augment, Batches, load_dataset
from medgraft.training.fit import Asked, FitOptions, _said, fit, plain
from medgraft.training.phantoms import write_dataset
from medgraft.training.report import read_log

TASK = Task("segment", ("lesion",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("lesion"), "lesion", train=6, test=2, size=64).parent


def batches(folder: Path, augment: Augment | None = None, seed: int = 0) -> Batches:
    dataset = load_dataset(folder)
    return Batches(
        dataset,
        dataset.split("train"),
        size=64,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        batch_size=4,
        seed=seed,
        augment=augment,
    )


def host_with(backbone: Backbone, *, late: bool = True, dropout: float = 0.3) -> Host:
    torch.manual_seed(1)
    last = backbone.depth - 1
    targets = f"blocks.{last}.attn.*" if late else "*.attn.qkv"
    parts = {
        "lora": LoRA.on(backbone, TASK, targets=targets, rank=2, dropout=dropout),
        "head": LinearHead.on(backbone, TASK),
    }
    host = Host(backbone)
    host.add(Adapter.of(backbone, TASK, parts), "x")
    return host


def tensors(host: Host) -> list[torch.Tensor]:
    return [t.detach().clone() for t in host.adapters["x"].tensors().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_learns_and_leaves_the_backbone_alone(vit: Backbone, folder: Path, tmp_path: Path) -> None:
    before = vit.digest()
    host = host_with(vit, late=False, dropout=0.0)
    fit(host, "x", batches(folder), FitOptions(60, lr=1e-2), out=tmp_path, quiet=True)
    log = [r["loss"] for r in read_log(tmp_path / "log.jsonl")]
    assert sum(log[-5:]) < 0.8 * sum(log[:5])
    assert vit.digest() == before
    assert not host.adapters["x"].training


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    vit: Backbone, folder: Path, tmp_path: Path, stop: int
) -> None:
    """Dropout, fresh augmentation, momentum, schedule, log: everything goes on where it stopped."""
    options = FitOptions(9, lr=1e-2, keep_every=1, warmup=2)
    straight = host_with(vit)
    fit(straight, "x", batches(folder, Augment(0)), options, out=tmp_path, quiet=True)
    whole_log = read_log(tmp_path / "log.jsonl")

    class Stopped(Exception):
        pass

    class Interrupted(Batches):
        def batch(self, step: int):  # type: ignore[no-untyped-def]
            if step == stop:
                raise Stopped
            return super().batch(step)

    (tmp_path / "two").mkdir()
    dataset = load_dataset(folder)
    cut = Interrupted(
        dataset, dataset.split("train"), size=64, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=4, augment=Augment(0)
    )
    with pytest.raises(Stopped):
        fit(host_with(vit), "x", cut, options, out=tmp_path / "two", quiet=True)
    again = host_with(vit)
    torch.manual_seed(999)  # nothing may depend on the generator's state
    fit(again, "x", batches(folder, Augment(0)), options, out=tmp_path / "two", resume=True, quiet=True)
    assert equal(tensors(straight), tensors(again))
    assert [r["loss"] for r in read_log(tmp_path / "two" / "log.jsonl")] == [r["loss"] for r in whole_log]


def test_resume_refuses_another_run_and_nothing_at_all(vit: Backbone, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="without --resume"):
        fit(host_with(vit), "x", batches(folder), FitOptions(2), out=tmp_path, resume=True, quiet=True)
    fit(host_with(vit), "x", batches(folder), FitOptions(2), out=tmp_path, quiet=True)
    with pytest.raises(BadData, match="other options"):
        fit(host_with(vit), "x", batches(folder), FitOptions(3), out=tmp_path, resume=True, quiet=True)

    def forward(asked: Asked) -> torch.Tensor:
        return plain(asked) * 2

    with pytest.raises(BadData, match="other options"):
        fit(host_with(vit), "x", batches(folder), FitOptions(2), out=tmp_path, resume=True, quiet=True, forward=forward)
    (tmp_path / "training_state.pt").write_bytes(b"half a file")
    with pytest.raises(BadData, match="cannot be read"):
        fit(host_with(vit), "x", batches(folder), FitOptions(2), out=tmp_path, resume=True, quiet=True)


def test_what_computes_a_step_is_told_by_more_than_an_address() -> None:
    @dataclass(frozen=True)
    class Weighed:
        by: float

        def forward(self, asked: Asked) -> torch.Tensor:
            return plain(asked) * self.by

    class Silent:
        def __call__(self) -> None: ...

    assert _said(plain) == "plain"
    assert _said(Weighed(2).forward) == _said(Weighed(2).forward) != _said(Weighed(3).forward)
    assert _said(partial(plain, by=2)) == _said(partial(plain, by=2)) != _said(partial(plain, by=3))
    assert _said(Silent()) == _said(Silent())
    assert "0x" not in "".join(map(_said, (plain, Weighed(2).forward, partial(plain), Silent())))


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(vit: Backbone, folder: Path) -> None:
    host = host_with(vit)
    seen: list[list[torch.Tensor]] = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(tensors(host))
        return logits.square().mean() * (float("nan") if len(seen) == 4 else 1.0)

    with pytest.raises(Diverged, match=r"step 4.*after step\s+3.*learning rate"):
        fit(host, "x", batches(folder), FitOptions(9), loss=loss, quiet=True)
    assert equal(tensors(host), seen[-1])
    assert all(torch.isfinite(t).all() for t in tensors(host))


def test_an_infinite_gradient_stops_before_it_touches_a_parameter(vit: Backbone, folder: Path) -> None:
    host = host_with(vit)
    before = tensors(host)
    with pytest.raises(Diverged, match="gradient"):
        fit(host, "x", batches(folder), FitOptions(1), loss=lambda z, _: (0 * z).sum().sqrt(), quiet=True)
    assert equal(tensors(host), before)


@pytest.mark.parametrize("where", ["memory", "directory"])
@pytest.mark.parametrize("augment", [None, Augment(3, views=2)], ids=["plain", "bank"])
def test_the_prefix_cache_gives_the_same_curve(
    vit: Backbone, folder: Path, tmp_path: Path, where: str, augment: Augment | None
) -> None:
    curves = []
    for cached in (False, True):
        host = host_with(vit)
        cache = None
        if cached:
            cache = PrefixCache(vit, host.cut("x"), directory=tmp_path / "cache" if where == "directory" else None)
            assert cache.stage == vit.depth - 1
        out = tmp_path / str(cached)
        out.mkdir()
        fit(host, "x", batches(folder, augment), FitOptions(10, lr=1e-2), out=out, cache=cache, quiet=True)
        curves.append([r["loss"] for r in read_log(out / "log.jsonl")])
        if cache is not None:
            assert cache.misses == (6 if augment is None else 12)
            assert cache.hits == 40 - cache.misses
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)


def test_the_cache_refuses_what_would_be_wrong(vit: Backbone, swin: Backbone, folder: Path) -> None:
    early = host_with(vit, late=False)
    with pytest.raises(BadCall, match="acts from stage 0"):
        fit(early, "x", batches(folder), FitOptions(1), cache=PrefixCache(vit, 2), quiet=True)
    late = host_with(vit)
    with pytest.raises(BadCall, match="bank"):
        fit(late, "x", batches(folder, Augment(0)), FitOptions(1), cache=PrefixCache(vit, 2), quiet=True)
    with pytest.raises(BadCall, match="another backbone"):
        fit(late, "x", batches(folder), FitOptions(1), cache=PrefixCache(swin, 0), quiet=True)
    with pytest.raises(BadCall, match="fp32"):
        PrefixCache(vit, 1, dtype="int8")


def test_the_cache_holds_its_budget_and_survives_damage(vit: Backbone, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 64, 64)
    one = PrefixCache(vit, 1)
    full = one.states(x, list("abcd"), [0] * 4)
    small = PrefixCache(vit, 1, budget=int(2.5 * one.held / 4))
    torch.testing.assert_close(small.states(x, list("abcd"), [0] * 4).x, full.x)
    assert small.held <= small.budget
    disk = PrefixCache(vit, 1, directory=tmp_path)
    disk.states(x, list("abcd"), [0] * 4)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    again = PrefixCache(vit, 1, directory=tmp_path)
    torch.testing.assert_close(again.states(x, list("abcd"), [0] * 4).x, full.x)
    assert again.misses == 4


def test_accumulation_equals_one_large_batch(vit: Backbone, folder: Path) -> None:
    dataset = load_dataset(folder)

    def of(batch_size: int) -> Batches:
        return Batches(dataset, dataset.split("train"), size=64, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=batch_size)

    def mean_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] - target).square().mean()

    whole, parts = host_with(vit, dropout=0.0), host_with(vit, dropout=0.0)
    fit(whole, "x", of(6), FitOptions(2, lr=1e-3), loss=mean_loss, quiet=True)
    fit(parts, "x", of(3), FitOptions(2, lr=1e-3, accumulate=2), loss=mean_loss, quiet=True)
    for a, b in zip(tensors(whole), tensors(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputing_stages_gives_the_same_training(vit: Backbone, folder: Path) -> None:
    plain, again = (host_with(vit, late=False, dropout=0.0) for _ in range(2))
    fit(plain, "x", batches(folder), FitOptions(3, lr=1e-2), quiet=True)
    fit(again, "x", batches(folder), FitOptions(3, lr=1e-2, remat=True), quiet=True)
    for a, b in zip(tensors(plain), tensors(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_early_stopping_on_validation(vit: Backbone, folder: Path) -> None:
    host = host_with(vit, dropout=0.0)
    dataset = load_dataset(folder)
    val = Batches(dataset, dataset.split("test"), size=64, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=2)
    done = fit(
        host, "x", batches(folder), FitOptions(50, lr=1e-9, validate_every=1, patience=2), validation=val, quiet=True
    )
    assert done.steps == 3  # the first is the best so far, two more bring nothing
    assert done.best is not None


def test_a_full_disk_while_keeping_the_state_is_a_plain_error(
    vit: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveFailed, match="--resume"):
        fit(host_with(vit), "x", batches(folder), FitOptions(1), out=tmp_path, quiet=True)
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_options_are_checked() -> None:
    for wrong in (
        {"steps": 0},
        {"steps": 1, "lr": 0.0},
        {"steps": 1, "schedule": "stairs"},
        {"steps": 1, "precision": "int8"},
    ):
        with pytest.raises(BadCall):
            FitOptions(**wrong)  # type: ignore[arg-type]
    rates = [FitOptions(200, lr=1.0, schedule="halving").rate(s) for s in (0, 49, 50, 100, 199)]
    assert rates == [1, 1, 0.5, 0.25, 0.125]  # AViT: halved every 50 of 200 epochs
    linear = FitOptions(10, lr=1.0, warmup=2)
    assert [linear.rate(0), linear.rate(1), linear.rate(2), linear.rate(9)] == pytest.approx([0.5, 1.0, 1.0, 0.125])


def test_bf16_and_bottlenecks_train(vit: Backbone, folder: Path) -> None:
    parts = {"bottleneck": Bottleneck.on(vit, TASK, drop_path=0.2), "head": LinearHead.on(vit, TASK)}
    host = Host(vit)
    host.add(Adapter.of(vit, TASK, parts), "x")
    done = fit(host, "x", batches(folder), FitOptions(2, precision="bf16"), quiet=True)
    assert done.steps == 2
    assert all(t.dtype == torch.float32 for t in tensors(host))
