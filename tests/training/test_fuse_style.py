"""FuseStyle: styles blend exactly, content stays, partners are right, and a shortcut by style is weakened."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medgraft.adapters import Adapter, Host, LinearHead, LoRA, Task
from medgraft.backbones import Backbone, Features, Spec, State
from medgraft.backbones.sites import Site
from medgraft.errors import BadCall, BadData, UnknownName
from medgraft.training.batches import Batch
from medgraft.training.cache import PrefixCache
from medgraft.training.fit import FitOptions, fit, validate
from medgraft.training.fuse_style import FuseStyle, fuse, partners

TASK = Task("segment", ("on",))


# The equation


def style(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(1), x.std(1, correction=0)


def test_styles_blend_exactly_and_content_stays() -> None:
    x = torch.randn(6, 50, 8, dtype=torch.float64) * torch.rand(6, 1, 8) + torch.randn(6, 1, 8)
    partner, share = torch.tensor([1, 2, 3, 4, 5, 0]), torch.rand(6, dtype=torch.float64)
    out = fuse(x, partner, share)
    own = share[:, None]
    for got, was in zip(style(out), style(x), strict=True):
        torch.testing.assert_close(got, own * was + (1 - own) * was[partner])

    def content(z: Tensor) -> Tensor:
        mean, deviation = style(z)
        return (z - mean[:, None]) / deviation[:, None]

    torch.testing.assert_close(content(out), content(x))


def test_all_of_ones_own_style_is_the_identity_bit_for_bit() -> None:
    x = torch.randn(4, 9, 3)
    share = torch.tensor([1.0, 0.5, 1.0, 0.0])
    out = fuse(x, torch.tensor([1, 0, 3, 2]), share)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[2], x[2])
    assert not torch.equal(out[1], x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_a_constant_channel_becomes_the_blended_mean(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(2, 49, 3).to(dtype)
    x[0, :, 1] = value
    x.requires_grad_()
    out = fuse(x, torch.tensor([1, 0]), torch.tensor([0.25, 0.5]))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    level = 0.25 * x[0, 0, 1].float() + 0.75 * x[1, :, 1].float().mean()
    torch.testing.assert_close(out[0, :, 1].float(), level.expand(49), rtol=1e-2, atol=1e-5)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# Partners


@pytest.mark.parametrize("rows", [2, 3, 16])
@pytest.mark.parametrize("pair", ["random", "dot", "cosine"])
def test_a_partner_is_never_the_row_itself(pair: str, rows: int) -> None:
    for seed in range(20):
        x = torch.rand(rows, 4, 5, generator=torch.Generator().manual_seed(seed)) * 1e-3
        assert (partners(x, pair) != torch.arange(rows)).all()  # type: ignore[arg-type]


def test_random_partners_serve_once_and_follow_the_seed() -> None:
    x = torch.zeros(16, 1, 1)
    torch.manual_seed(3)
    first = partners(x, "random")
    assert sorted(first.tolist()) == list(range(16))
    torch.manual_seed(3)
    assert torch.equal(partners(x, "random"), first)
    assert not torch.equal(partners(x, "random"), first)


@pytest.mark.parametrize("pair", ["dot", "cosine"])
def test_the_partner_is_the_least_correlated_mate_by_brute_force(pair: str) -> None:
    x = torch.randn(12, 6, 4)
    for i, j in enumerate(partners(x, pair).tolist()):  # type: ignore[arg-type]
        score = {}
        for k in range(12):
            product = (x[i] * x[k]).sum()
            score[k] = float(product / (x[i].norm() * x[k].norm()) if pair == "cosine" else product)
        score.pop(i)
        assert j == min(score, key=score.__getitem__)


def test_of_features_of_one_sign_dot_crowns_a_few_hubs_and_cosine_does_not() -> None:
    """What the module says of the two rules: norms that vary make the least bright row everybody's partner."""
    x = torch.randn(64, 16, 32).relu() * torch.linspace(0.2, 5, 64).view(-1, 1, 1)
    distinct = {pair: len(set(partners(x, pair).tolist())) for pair in ("dot", "cosine")}  # type: ignore[arg-type]
    assert distinct["dot"] <= 4
    assert distinct["cosine"] >= 5 * distinct["dot"]


# Between the stages of a backbone


def test_only_the_patches_of_a_sequence_change() -> None:
    state = State(torch.randn(4, 2 + 6, 5), 3, meta={"grid": (2, 3), "prompts": 1})
    out = FuseStyle((3,), p=1.0)(state)
    assert torch.equal(out.x[:, :2], state.x[:, :2])
    assert not torch.equal(out.x[:, 2:], state.x[:, 2:])
    maps = State(torch.randn(4, 2, 3, 5), 3)
    mixed = FuseStyle((3,), p=1.0)(maps).x
    assert mixed.shape == maps.x.shape
    torch.testing.assert_close(  # over h and w: instance-normalised content is kept
        (mixed - mixed.mean((1, 2), keepdim=True)) / mixed.std((1, 2), keepdim=True),
        (maps.x - maps.x.mean((1, 2), keepdim=True)) / maps.x.std((1, 2), keepdim=True),
        atol=1e-4,
        rtol=1e-3,
    )


def test_it_mixes_at_its_stages_with_its_probability_and_never_one_row() -> None:
    state = State(torch.randn(4, 6, 5), 2, meta={"grid": (2, 3)})
    assert FuseStyle((1, 3), p=1.0)(state) is state
    assert FuseStyle((2,), p=0.0)(state) is state
    alone = state.rows(torch.tensor([0]))
    assert FuseStyle((2,), p=1.0)(alone) is alone
    changed = sum(FuseStyle((2,))(state) is not state for _ in range(400))
    assert 160 <= changed <= 240  # 200 +- 4 standard deviations


def host_on(backbone: Backbone, targets: str = "blocks.2.attn.*", task: Task = TASK) -> Host:
    torch.manual_seed(1)
    parts = {"lora": LoRA.on(backbone, task, targets=targets, rank=2), "head": LinearHead.on(backbone, task)}
    host = Host(backbone)
    host.add(Adapter.of(backbone, task, parts), "x")
    return host


def test_between_acts_on_every_state_once_and_nothing_else_changes(either: Backbone) -> None:
    host = Host(either)
    host.add(Adapter.of(either, TASK, {"head": LinearHead.on(either, TASK)}), "x")
    images, seen = torch.randn(2, 3, 64, 64), []

    def look(state: State) -> State:
        seen.append(state.stage)
        return state

    stem = either.stem(images)
    for remat in (False, True):
        assert torch.equal(host.resume(stem, images, "x", between=look, remat=remat), host(images, "x"))
    assert seen == 2 * list(range(either.depth + 1))
    out = host.resume(stem, images, "x", between=FuseStyle((1,), p=1.0))
    assert out.shape == host(images, "x").shape
    assert not torch.equal(out, host(images, "x"))


class Toy:
    """Batches out of memory, in the interface that `fit` reads."""

    task, augment, batch_size, items, labels = "segment", None, 8, (), ""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def batch(self, step: int) -> Batch:
        rows = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(step))[: self.batch_size]
        return Batch(self.images[rows], self.targets[rows], tuple(map(str, rows.tolist())), (0,) * len(rows))  # type: ignore[arg-type]

    def digest(self, item: str) -> str:
        return item

    def once(self) -> list[Batch]:
        return [Batch(self.images, self.targets, (), ())]


def noise(size: int = 64) -> Toy:
    return Toy(torch.randn(12, 3, size, size), torch.randint(2, (12, size, size)))


def trained(host: Host, toy: Toy, mix: FuseStyle | None, steps: int = 6, **more: object) -> list[Tensor]:
    fit(host, "x", toy, FitOptions(steps, lr=1e-2, keep_every=1), mix=mix, quiet=True, **more)  # type: ignore[arg-type]
    return [t.detach().clone() for t in host.adapters["x"].tensors().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_mixes_by_the_seed_and_evaluation_never(vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mix = noise(), FuseStyle((1,), "cosine")
    first, again, without = (trained(host_on(vit), toy, m) for m in (mix, mix, None))
    assert same(first, again)
    assert not same(first, without)
    host = host_on(vit)
    trained(host, toy, mix)
    monkeypatch.setattr(FuseStyle, "__call__", lambda *_: pytest.fail("mixed outside training"))
    assert torch.equal(host(toy.images, "x"), host(toy.images, "x"))
    validate(host, "x", toy)  # type: ignore[arg-type]


def test_with_the_cache_it_mixes_the_same_at_the_cached_stage_and_behind(vit: Backbone) -> None:
    toy = noise()
    for stages in ((2,), (2, 3)):
        plain, cached = host_on(vit), host_on(vit)
        mix = FuseStyle(stages, "dot", p=1.0)
        a = trained(plain, toy, mix)
        b = trained(cached, toy, mix, cache=PrefixCache(vit, 2))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_mixes_as_the_uninterrupted_one(vit: Backbone, tmp_path: Path) -> None:
    toy, mix = noise(), FuseStyle((1,), p=1.0)
    straight = trained(host_on(vit), toy, mix, out=tmp_path)

    class Interrupted(Toy):
        def batch(self, step: int) -> Batch:
            if step == 3:
                raise InterruptedError
            return super().batch(step)

    (tmp_path / "two").mkdir()
    with pytest.raises(InterruptedError):
        trained(host_on(vit), Interrupted(toy.images, toy.targets), mix, out=tmp_path / "two")
    with pytest.raises(BadData, match="other options"):
        trained(host_on(vit), toy, FuseStyle((1,), "dot", p=1.0), out=tmp_path / "two", resume=True)
    assert same(trained(host_on(vit), toy, mix, out=tmp_path / "two", resume=True), straight)


def test_what_cannot_be_mixed_is_said(vit: Backbone) -> None:
    with pytest.raises(UnknownName, match="cosine"):
        FuseStyle((1,), "cosin")  # type: ignore[arg-type]
    for bad in ({"p": 1.5}, {"p": -0.1}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(BadCall, match="probability"):
            FuseStyle((1,), **bad)
    for stages in ((), (-1,)):
        with pytest.raises(BadCall, match="stages"):
            FuseStyle(stages)
    host, toy = host_on(vit), noise()
    before = [t.clone() for t in host.adapters["x"].tensors().values()]
    with pytest.raises(BadCall, match=r"stage 2 \(what lies before is cached\)"):
        trained(host, toy, FuseStyle((1,)), cache=PrefixCache(vit, 2))
    with pytest.raises(BadCall, match="to 3"):
        trained(host, toy, FuseStyle((4,)))
    assert same(before, [t.detach() for t in host.adapters["x"].tensors().values()])

    class Other:
        family, depth = "universeg", 8
        spec = vit.spec

    with pytest.raises(BadCall, match="without mixing"):
        FuseStyle((1,)).check(Other(), 0)  # type: ignore[arg-type]


# What it is for


class Colours(Backbone):
    """One frozen tanh layer on the mean colour of each patch. No norm: a camera's gain and offset reach every feature."""

    family, depth = "vit", 1

    def _sites(self) -> list[Site]:
        return [Site("fc", "linear", 0, 3, 64, "fc", "fc")]

    def stem(self, x: Tensor) -> State:
        grid = nn.functional.avg_pool2d(x, 8)
        return State(grid.flatten(2).transpose(1, 2), 0, meta={"grid": tuple(grid.shape[2:])})

    def stage(self, state: State) -> State:
        return state.step(torch.tanh(self.network.get_submodule("fc")(state.x)))

    def readout(self, state: State) -> Features:
        last = state.x.transpose(1, 2).unflatten(2, state.meta["grid"])
        return Features([last], [8], state.x.mean(1), last)


def scenes(n: int, seed: int, follow: float | None) -> tuple[Tensor, Tensor]:
    """Content: two colours that vary together (label 1) or against each other (0); every channel's statistics are alike.

    Camera: gain and offset by channel. `follow` is how often camera 0 or 1 follows the label; None is a third camera.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    s = (torch.rand(n, 16, generator=g).argsort(1) < 8).float().view(n, 4, 4) * 2 - 1
    x = torch.stack([s, s * (2 * y - 1).view(n, 1, 1), torch.zeros_like(s)], 1)
    x = x + 0.5 * torch.randn(n, 3, 4, 4, generator=g)
    camera = torch.full_like(y, 2) if follow is None else torch.where(torch.rand(n, generator=g) < follow, y, 1 - y)
    gain = torch.tensor([[0.8, 1, 1.2], [1.2, 1, 0.8], [1, 1, 1]])[camera][..., None, None]
    offset = torch.tensor([[-0.3, 0.3, 1], [0.3, -0.3, -1], [0, 0, 0]])[camera][..., None, None]
    images = (x * gain + offset).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return images, y.view(n, 1, 1).expand(n, 32, 32).contiguous()


def test_an_adapter_trained_with_it_holds_better_on_a_camera_it_never_saw() -> None:
    network = nn.ModuleDict({"fc": nn.Linear(3, 64)})
    for p in network.parameters():
        nn.init.normal_(p)
    spec = Spec("toy:colours", "vit", "0" * 64, True, 32, 8, (0.5,) * 3, (0.5,) * 3, 64, (64,), (8,))
    backbone = Colours(network, spec)

    def accuracies(seed: int, mix: FuseStyle | None) -> Tensor:
        """On a third camera, and where cameras and labels are swapped."""
        host = host_on(backbone, "*")
        fit(host, "x", Toy(*scenes(64, seed, 0.9)), FitOptions(200, lr=1e-2, seed=seed), mix=mix, quiet=True)  # type: ignore[arg-type]
        tests = [scenes(128, 100 + seed, follow) for follow in (None, 0.1)]
        return torch.stack([((host(images, "x")[:, 0] > 0) == truth).float().mean() for images, truth in tests])

    for seed in range(2):
        without = accuracies(seed, None)
        for pair in ("random", "cosine"):
            third, swapped = (accuracies(seed, FuseStyle((0,), pair)) - without).tolist()  # type: ignore[arg-type]
            assert third > 0.005, f"{pair}, seed {seed}: {third} on a third camera"
            assert swapped > 0.05, f"{pair}, seed {seed}: {swapped} where the cameras' labels are swapped"
