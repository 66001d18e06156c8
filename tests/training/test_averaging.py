"""Averages of weights along training: against sums by hand, through interruptions, and with batch norm."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medgraft.adapters import Adapter, ASPPHead, Host, LinearHead, LoRA, Task
from medgraft.backbones import Backbone
from medgraft.errors import BadCall, BadData
from medgraft.training.averaging import RunningAverage, WeightAverage
from medgraft.training.cache import PrefixCache
from medgraft.training.data import Augment, Batches, load_dataset
from medgraft.training.fit import FitOptions, fit
from medgraft.training.phantoms import write_dataset
from tests.helpers import says

TASK = Task("segment", ("lesion",))
SWA, EMA = WeightAverage("swa", start=0.4, every=2), WeightAverage("ema", start=0, every=1, decay=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("lesion"), "lesion", train=6, test=2, size=64).parent


def batches(folder: Path, augment: Augment | None = None) -> Batches:
    data = load_dataset(folder)
    half = (0.5,) * 3
    return Batches(data, data.split("train"), size=64, mean=half, std=half, batch_size=4, augment=augment)


def host_with(on: Backbone, *, dropout: float = 0.3, aspp: bool = False) -> Host:
    torch.manual_seed(1)
    lora = LoRA.on(on, TASK, targets=f"blocks.{on.depth - 1}.attn.*", rank=2, dropout=dropout)
    host = Host(on)
    host.add(Adapter.of(on, TASK, {"lora": lora, "head": (ASPPHead if aspp else LinearHead).on(on, TASK)}), "x")
    return host


def tensors(host: Host) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in host.adapters["x"].tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, b[n]) for n, t in a.items())


class Stopped(Exception):
    """A run that somebody stopped."""


def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgraft.training import fit as module

    inner, taken = module._step, iter(range(step))

    def one(*args: Any) -> Any:
        if next(taken, None) is None:
            raise Stopped
        return inner(*args)

    monkeypatch.setattr(module, "_step", one)


# The arithmetic


def after(how: WeightAverage, values: list[float]) -> float:
    """The average after steps 1, 2, ... at which a parameter had these values."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    running = RunningAverage(how, [p], len(values))
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            p.fill_(value)
        running.update(step)
    running.apply()
    return p.item()


def test_swa_is_the_plain_mean_of_its_checkpoints() -> None:
    values = [5.0, -2.0, 4.0, 1.0, 7.0, 3.0, 2.0, 10.0]
    assert after(WeightAverage("swa", start=0, every=1), values) == pytest.approx(sum(values) / 8, abs=1e-12)
    assert after(WeightAverage("swa", start=0.5, every=2), values) == pytest.approx((1 + 3 + 10) / 3, abs=1e-12)
    assert after(WeightAverage("swa", start=0.5, every=3), values) == pytest.approx((7 + 10) / 2, abs=1e-12)
    assert after(WeightAverage("swa", start=1, every=100), values) == 10


def test_ema_fades_exponentially() -> None:
    values = [5.0, -2.0, 4.0, 1.0]
    want = 5.0
    for value in values[1:]:
        want = 0.9 * want + 0.1 * value
    assert after(WeightAverage("ema", start=0, every=1, decay=0.9), values) == pytest.approx(want, abs=1e-12)
    assert after(WeightAverage("ema", start=0, every=1, decay=0), values) == 1


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_last_step_is_always_a_checkpoint(steps: int) -> None:
    for start in (0, 0.3, 1):
        for every in (1, 3, 1000):
            due = [s for s in range(1, steps + 1) if WeightAverage(start=start, every=every).due(s, steps)]
            assert due[-1] == steps
            assert due[0] >= start * steps
            assert all(b - a == every for a, b in pairwise(due))


@pytest.mark.parametrize(
    "bad", [{"kind": "mean"}, {"start": -0.1}, {"start": 1.1}, {"every": 0}, {"decay": 1.0}, {"start": float("nan")}]
)
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(BadCall) as refused:
        WeightAverage(**bad)
    says(refused.value, str(next(iter(bad.values()))))


# In training


@pytest.mark.parametrize("how", [SWA, EMA], ids=["swa", "ema"])
def test_the_result_is_the_average_of_the_run_without(
    vit: Backbone, folder: Path, how: WeightAverage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaging does not disturb training: its result is made of the weights that the plain run goes through."""
    from medgraft.training import fit as module

    seen: list[dict[str, Tensor]] = []
    plain, inner = host_with(vit), module._step

    def watched(*args: Any) -> Any:
        result = inner(*args)
        seen.append(tensors(plain))
        return result

    options = FitOptions(9, lr=1e-2, schedule="constant")
    monkeypatch.setattr(module, "_step", watched)
    fit(plain, "x", batches(folder), options, quiet=True)
    monkeypatch.undo()
    averaged = host_with(vit)
    fit(averaged, "x", batches(folder), options, average=how, quiet=True)
    steps = [s for s in range(1, 10) if how.due(s, 9)]
    assert len(steps) > 2
    for name, got in tensors(averaged).items():
        points = [seen[s - 1][name].double() for s in steps]
        want = points[0]
        for n, p in enumerate(points[1:], 1):
            want = (want * n + p) / (n + 1) if how.kind == "swa" else how.decay * want + (1 - how.decay) * p
        assert (got - want).abs().max() < 1e-6, name
        assert not torch.equal(got, seen[-1][name]), f"{name} is as without"


@pytest.mark.parametrize("how", [SWA, EMA], ids=["swa", "ema"])
@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_has_the_same_average_bit_for_bit(
    vit: Backbone, folder: Path, tmp_path: Path, how: WeightAverage, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FitOptions(9, lr=1e-2, keep_every=1)
    straight = host_with(vit)
    fit(straight, "x", batches(folder, Augment(0)), options, average=how, quiet=True)
    stopped_after(stop, monkeypatch)
    with pytest.raises(Stopped):
        fit(host_with(vit), "x", batches(folder, Augment(0)), options, average=how, out=tmp_path, quiet=True)
    monkeypatch.undo()
    again = host_with(vit)
    with torch.no_grad():
        for p in again.adapters["x"].parameters():
            p += 1
    fit(again, "x", batches(folder, Augment(0)), options, average=how, out=tmp_path, resume=True, quiet=True)
    assert same(tensors(again), tensors(straight))


def test_a_finished_run_resumes_to_the_same_average(vit: Backbone, folder: Path, tmp_path: Path) -> None:
    """Stopped after the last step was kept and before the adapter was saved."""
    options = FitOptions(5, lr=1e-2)
    first = host_with(vit)
    fit(first, "x", batches(folder), options, average=SWA, out=tmp_path, quiet=True)
    again = host_with(vit)
    fit(again, "x", batches(folder), options, average=SWA, out=tmp_path, resume=True, quiet=True)
    assert same(tensors(again), tensors(first))


@pytest.mark.parametrize("other", [None, EMA, WeightAverage("swa", start=0.4, every=3)])
def test_a_run_with_another_average_is_another_run(
    vit: Backbone, folder: Path, tmp_path: Path, other: WeightAverage | None
) -> None:
    fit(host_with(vit), "x", batches(folder), FitOptions(2), average=SWA, out=tmp_path, quiet=True)
    with pytest.raises(BadData) as refused:
        fit(host_with(vit), "x", batches(folder), FitOptions(2), average=other, out=tmp_path, resume=True, quiet=True)
    says(refused.value, "other options")


def test_a_run_stopped_early_before_any_checkpoint_keeps_its_last_weights(vit: Backbone, folder: Path) -> None:
    options = FitOptions(20, lr=1e-12, validate_every=1, patience=1, weight_decay=0)
    results = []
    for how in (None, WeightAverage("swa", start=0.9, every=1)):
        host = host_with(vit)
        done = fit(host, "x", batches(folder), options, validation=batches(folder), average=how, quiet=True)
        assert done.steps == 2
        results.append(tensors(host))
    assert same(*results)


# Batch norm


@pytest.mark.parametrize("cached", [False, True])
def test_batch_norm_is_measured_under_the_averaged_weights(vit: Backbone, folder: Path, cached: bool) -> None:
    """Against a pass by hand: every norm's running mean is the mean of what really enters it."""
    host = host_with(vit, dropout=0.0, aspp=True)
    adapter = host.adapters["x"]
    data = batches(folder)
    cache = PrefixCache(vit, host.cut("x")) if cached else None
    for m in adapter.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    fit(host, "x", data, FitOptions(6, lr=1e-2), average=SWA, cache=cache, quiet=True)
    norm = adapter.parts["head"].final_conv[1]  # type: ignore[union-attr,index]
    entered: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: entered.append(args[0].mean((0, 2, 3))))
    kept = {n: t.clone() for n, t in adapter.tensors().items()}
    adapter.train()
    with torch.no_grad():
        for t in range(2):  # six images in batches of four
            host(data.batch(t).images, "x")
    hook.remove()
    assert kept["head.final_conv.1.num_batches_tracked"] == 2
    torch.testing.assert_close(
        kept["head.final_conv.1.running_mean"], torch.stack(entered).mean(0), rtol=1e-4, atol=1e-5
    )
    assert norm.momentum == 0.1


def test_the_backbone_is_left_alone(vit: Backbone, folder: Path) -> None:
    before = vit.digest()
    host = host_with(vit, aspp=True)
    fit(host, "x", batches(folder), FitOptions(3), average=EMA, quiet=True)
    assert vit.digest() == before
    assert not host.adapters["x"].training


def test_batch_norm_resumes_bit_for_bit(
    vit: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FitOptions(4, keep_every=1)
    straight = host_with(vit, aspp=True)
    fit(straight, "x", batches(folder), options, average=SWA, quiet=True)
    stopped_after(2, monkeypatch)
    with pytest.raises(Stopped):
        fit(host_with(vit, aspp=True), "x", batches(folder), options, average=SWA, out=tmp_path, quiet=True)
    monkeypatch.undo()
    again = host_with(vit, aspp=True)
    torch.rand(7)  # another process has drawn other numbers before
    fit(again, "x", batches(folder), options, average=SWA, out=tmp_path, resume=True, quiet=True)
    assert same(tensors(again), tensors(straight))
