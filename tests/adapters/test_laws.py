"""The laws of the host (DESIGN, section 4) that are about calls: 1, 3, 4 and 5. Law 2 is in the contract, 6 in test_plain.py, 7 in test_store.py."""

from __future__ import annotations

import asyncio
import copy
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgraft.adapters import (
    Adapter,
    Bottleneck,
    ClassifierHead,
    Host,
    LinearHead,
    LoRA,
    PromptTokens,
    ScaleShift,
    Tuned,
)
from medgraft.adapters.graft import Graft
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, Features
from medgraft.backbones.prompts import Prompts
from medgraft.backbones.sites import _PLAN, Plan, following
from medgraft.errors import BadCall, MedgraftError, UnknownName, WrongBackbone
from tests.helpers import BACKBONES, LABELS, ONE, THREE, acting, adapter, close, images, off_by, same_bits, says


def variety(on: Backbone) -> dict[str, Adapter]:
    """Adapters of every sort: mixable and not, one class, three, labels, beginning at the first stage and at the last."""
    last = f"*{on.depth - 1}.attn.qkv" if on.family == "vit" else "layers.1.blocks.1.attn.qkv"
    found = {
        "lora": adapter(on, seed=1),
        "lora2": adapter(on, {"lora": LoRA.on(on, ONE, rank=4, targets="*.fc1")}, seed=2),
        "three": adapter(on, task=THREE, seed=3),
        "late": adapter(on, {"lora": LoRA.on(on, ONE, targets=last)}, seed=4),
        "dora": adapter(on, {"dora": LoRA.on(on, ONE, rank=2, dora=True)}, seed=5),
        "bottleneck": adapter(on, {"b": Bottleneck.on(on, ONE)}, seed=6),
        "bundle": adapter(
            on, {"n": Tuned.on(on, ONE, targets="*.norm1"), "s": ScaleShift.on(on, ONE), "l": LoRA.on(on, ONE)}, seed=7
        ),
        "labels": adapter(on, {"l": LoRA.on(on, LABELS), "c": ClassifierHead.on(on, LABELS)}, task=LABELS, seed=8),
        "head": adapter(on, {}, seed=9),
    }
    if on.family == "vit":
        found["prompts"] = adapter(on, {"p": PromptTokens.on(on, ONE, count=3)}, seed=10)
    return found


def full_host(on: Backbone) -> Host:
    host = Host(on)
    for name, made in variety(on).items():
        host.add(made, name)
    return host


@pytest.fixture
def host(either: Backbone) -> Host:
    return full_host(either)


# 1. The backbone never changes


def mixed_operations(on: Backbone, count: int, folder: Path) -> dict[str, int]:
    """`count` operations drawn at random, among them every kind that could touch a tensor; how often each was run."""
    draw = random.Random(0)
    host, spare = full_host(on), variety(on)
    x = images(on)
    done: dict[str, int] = {}

    def resident() -> str:
        return draw.choice(list(host.adapters))

    def add() -> None:
        name = draw.choice(list(spare))
        host.add(spare[name], f"spare {name} {draw.random()}")

    def remove() -> None:
        if len(host.adapters) > 6:
            host.remove(resident())

    def call() -> None:
        host(x, adapter=draw.choice([None, resident()]), remat=draw.random() < 0.3)

    def mixed_call() -> None:
        host(x, adapter=[draw.choice([None, resident()]) for _ in range(2)])

    def every() -> None:
        host(x, adapters=[resident(), None, resident()])

    def fold() -> None:
        plain = host.folded(resident())
        plain(x)
        plain.to(torch.bfloat16)

    def fix() -> None:
        name = resident()
        plain = host.fixed(name)
        plain.swap(host.adapters[name])
        plain(x)
        for p in plain.parameters():
            assert not p.requires_grad
        plain.to(draw.choice([torch.bfloat16, torch.float64]))

    def save_and_load() -> None:
        name = resident()
        save_adapter(host.adapters[name], folder / "a", backbone=on)
        host.add(read_adapter(folder / "a"), f"loaded {draw.random()}")

    def fail() -> None:
        def trip(site, y: Tensor) -> Tensor:
            raise draw.choice([RuntimeError, KeyboardInterrupt])("in the middle")

        bad = f"bad {draw.random()}"
        host.add(acting(on, ["norm"], trip), bad)
        for broken in (
            lambda: host(x, adapter=bad),
            lambda: host(x, adapter=[bad, resident()]),
            lambda: host(x, adapters=[resident(), bad]),
            lambda: host(x, adapter="nobody"),
            lambda: host(x[:, :2], adapter=resident()),
            lambda: host(x, adapter=[resident()]),
            lambda: host.add(spare["lora"], resident()),
        ):
            with pytest.raises((RuntimeError, KeyboardInterrupt, MedgraftError)):
                broken()
        host.remove(bad)

    def train() -> None:
        name = resident()
        host.train()
        optimiser = torch.optim.AdamW(host.adapters[name].parameters(), lr=1e-3)
        host(x, adapter=name, remat=draw.random() < 0.5).square().mean().backward()
        optimiser.step()
        host.adapters[name].zero_grad()
        host.eval()

    def copies() -> None:
        on.trainable_copy().network.requires_grad_(True)

    operations: list[Callable[[], None]] = [
        add,
        remove,
        call,
        mixed_call,
        every,
        fold,
        fix,
        save_and_load,
        fail,
        train,
        copies,
    ]
    for i in range(count):
        operation = operations[i] if i < len(operations) else draw.choice(operations)
        operation()
        done[operation.__name__] = done.get(operation.__name__, 0) + 1
    return done


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_1_the_backbone_never_changes(name: str, count: int, tmp_path: Path) -> None:
    on = BACKBONES[name]()
    with torch.no_grad():
        before, plain = on.digest(), on(images(on))
    done = mixed_operations(on, count, tmp_path)
    assert len(done) == 11
    assert on.digest() == before
    assert not any(p.requires_grad or p.grad is not None for p in on.parameters())
    with torch.no_grad():
        assert same_bits(on(images(on)), plain)


def test_1_the_digest_sees_a_single_bit() -> None:
    on = BACKBONES["vit"]()
    before = on.digest()
    weight = on.network.get_parameter("blocks.1.mlp.fc2.weight")
    bits = weight.data.view(torch.int32)
    bits[3, 5] ^= 1
    assert on.digest() != before
    bits[3, 5] ^= 1
    assert on.digest() == before


def test_1_adding_and_removing_leave_the_module_tree_alone(either: Backbone) -> None:
    host = Host(either)
    tree = [(name, id(module)) for name, module in host.named_modules()]
    names = list(host.state_dict())
    for name, made in variety(either).items():
        host.add(made, name)
    assert [(name, id(module)) for name, module in host.named_modules()] == tree
    assert list(host.state_dict()) == names
    assert not any("base" in name.split(".") for name in names)
    for name in list(host.adapters):
        host.remove(name)
    assert [(name, id(module)) for name, module in host.named_modules()] == tree


# 3. No current adapter


def expected(host: Host, x: Tensor) -> dict[str | None, Tensor | Features]:
    with torch.no_grad():
        found = {name: host(x, adapter=name) for name in (*host.adapters, None)}
    outputs = list(found.values())
    for i, a in enumerate(outputs):
        assert all(off_by(a, b) > 1e-2 for b in outputs[:i]), "two adapters agree, nothing would be noticed"
    return found


def test_3_threads_with_different_adapters_never_meet(hf_vit: Backbone) -> None:
    host, x = Host(hf_vit), images(hf_vit)
    for k in range(7):
        host.add(
            adapter(
                hf_vit, {"l": LoRA.on(hf_vit, ONE, rank=2)} if k % 2 else {"b": Bottleneck.on(hf_vit, ONE)}, seed=k
            ),
            f"a{k}",
        )
    right = expected(host, x)
    names = list(right)
    start = threading.Barrier(8)

    def work(k: int) -> int:
        draw = random.Random(k)
        wrong = 0
        start.wait(timeout=20)
        for _ in range(200):
            name = names[k] if draw.random() < 0.7 else draw.choice(names)
            with torch.no_grad():
                out = host(x, adapter=name)
            wrong += off_by(out, right[name]) > 1e-6
        return wrong

    pause = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0
    finally:
        sys.setswitchinterval(pause)


def test_3_two_threads_in_the_middle_of_a_call(either: Backbone) -> None:
    """Both calls are halfway through the network at the same moment, by force; a third comes and goes meanwhile."""
    host, x = Host(either), images(either)
    middle = next(name for name in either.sites if name.endswith("1.mlp"))
    meeting = threading.Barrier(2)

    def meet(factor: float) -> Callable:
        def change(site, y: Tensor) -> Tensor:
            meeting.wait(timeout=20)
            with torch.no_grad():
                assert same_bits(host(x), plain)
            meeting.wait(timeout=20)
            return y * factor

        return change

    with torch.no_grad():
        plain = host(x)
        for name, factor in (("double", 2.0), ("half", 0.5)):
            host.add(acting(either, [middle], lambda site, y, factor=factor: y * factor), f"quiet {name}")
            host.add(acting(either, [middle], meet(factor)), name)
        with ThreadPoolExecutor(2) as pool:
            jobs = {name: pool.submit(torch.no_grad()(host), x, adapter=name) for name in ("double", "half")}
            for name, job in jobs.items():
                assert torch.equal(job.result(timeout=30), host(x, adapter=f"quiet {name}"))


def test_3_adapters_come_and_go_while_others_are_called(hf_vit: Backbone) -> None:
    host, x = Host(hf_vit), images(hf_vit)
    host.add(adapter(hf_vit), "stays")
    with torch.no_grad():
        right = host(x, adapter="stays")
    stop = threading.Event()

    def come_and_go(k: int) -> int:
        mine, rounds = adapter(hf_vit, seed=k), 0
        while not stop.is_set():
            host.add(mine, f"guest {k}")
            host.remove(f"guest {k}")
            rounds += 1
        return rounds

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(come_and_go, k) for k in (1, 2)]
        with torch.no_grad():
            results = [host(x, adapter="stays") for _ in range(100)]
        stop.set()
        assert all(job.result(timeout=20) > 0 for job in jobs)
    assert all(torch.equal(r, right) for r in results)
    assert list(host.adapters) == ["stays"]


@pytest.mark.parametrize("how", ["adapter", "adapters"])
def test_3_a_call_sees_what_was_resident_when_it_began(either: Backbone, how: str) -> None:
    """One of the adapters is removed while the call looks the others up."""
    host, x = full_host(either), images(either)

    class Names(list):
        def __iter__(self):
            yield "lora"
            if "lora2" in host.adapters:
                host.remove("lora2")
            yield "lora2"

    with torch.no_grad():
        right = list(host(x, **{how: ["lora", "lora2"]}))
        got = list(host(x, **{how: Names(["lora", "lora2"])}))
    assert "lora2" not in host.adapters
    assert same_bits(got, right)


def test_3_one_name_is_given_away_once(hf_vit: Backbone) -> None:
    host, start = Host(hf_vit), threading.Barrier(8)

    def take(k: int) -> bool:
        mine = adapter(hf_vit, seed=k)
        start.wait(timeout=20)
        try:
            host.add(mine, "the name")
        except BadCall:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


def test_3_coroutines(either: Backbone) -> None:
    """Stage by stage with an await between two: other tasks run, with other plans, in the same thread."""
    host, x = full_host(either), images(either)
    names = ["lora", "dora", "bottleneck", None, "head"]
    with torch.no_grad():
        right = {name: either(x) if name is None else host(x, adapter=name) for name in names}
    steps: list[str | None] = []

    async def slowly(name: str | None) -> Tensor | Features:
        graft = None if name is None else Graft.of(either, host.adapters[name])
        with following(None if graft is None else graft.plan):
            state = either.run(x, stop=0)
            for stop in range(1, either.depth + 1):
                steps.append(name)
                await asyncio.sleep(0)
                state = either.run(state, stop=stop)
            features = either.run(state)
        return features if graft is None else graft.read(features, x)

    async def in_a_thread(name: str | None) -> Tensor | Features:
        return await asyncio.to_thread(torch.no_grad()(host), x, name)

    async def everybody() -> list[Tensor | Features]:
        return await asyncio.gather(*(way(name) for way in (slowly, in_a_thread) for name in names))

    with torch.no_grad():
        got = asyncio.run(everybody())
    assert steps[: len(names)] == names, "the tasks did not take turns, so nothing was tested"
    for name, out in zip(names * 2, got, strict=True):
        close(str(name), out, right[name], 1e-6)


def nesting(outer: Backbone, inner: Host, x: Tensor, calls: list[tuple[str | None, object]]) -> Adapter:
    """An adapter of `outer` that, in the middle of its own call, calls `inner` with several adapters and keeps what they say."""

    def change(site, y: Tensor) -> Tensor:
        for name in ("lora", None, "bottleneck"):
            calls.append((name, inner(x, adapter=name)))
        return y * 1.5

    middle = [name for name in outer.sites if name.endswith("1.mlp")]
    return acting(outer, middle, change)


@pytest.mark.parametrize("same", [True, False], ids=["one-backbone", "two-backbones"])
def test_3_hosts_inside_hosts(either: Backbone, same: bool) -> None:
    other = either if same else BACKBONES["vit"]()
    inner, x, inside = full_host(other), images(either), images(other, seed=5)
    calls: list[tuple[str | None, object]] = []
    outer = Host(either)
    outer.add(nesting(either, inner, inside, calls), "outer")
    quiet = acting(either, [n for n in either.sites if n.endswith("1.mlp")], lambda site, y: y * 1.5)
    outer.add(quiet, "quiet")
    with torch.no_grad():
        assert torch.equal(outer(x, adapter="outer"), outer(x, adapter="quiet"))
        assert calls
        for name, said in calls:
            assert same_bits(said, inner(inside, adapter=name))


def test_3_a_port_ignores_the_plan_of_another_backbone(either: Backbone) -> None:
    """Two backbones of one architecture have sites of the same names; running the second one inside the first one's call is plain."""
    twin = copy.deepcopy(either)
    x, seen = images(either), []
    host = Host(either)
    host.add(acting(either, list(either.sites)[-1:], lambda site, y: (seen.append(twin(x)), y + 1)[1]), "norm")
    host.add(adapter(either), "lora")
    with torch.no_grad():
        host(x, adapter="norm")
        with following(Graft.of(either, host.adapters["lora"]).plan):
            seen.append(twin(x))
            assert not same_bits(either(x), twin(x))
        assert len(seen) == 2
        assert all(same_bits(s, twin(x)) for s in seen)


def test_3_what_was_selected_before_is_selected_again(either: Backbone) -> None:
    a, b = (Plan(either.owner, {}) for _ in range(2))
    with following(a):
        with suppress(KeyError), following(b):
            assert _PLAN.get() is b
            raise KeyError
        assert _PLAN.get() is a
        with following(None):
            assert _PLAN.get() is None
        assert _PLAN.get() is a
    assert _PLAN.get() is None


# Checkpointing re-enters the selection when a stage is computed again.


def gradients(
    host: Host, x: Tensor, name: str | list[str | None], *, remat: bool, how: Callable[[Tensor], None]
) -> list[Tensor]:
    for made in host.adapters.values():
        made.zero_grad()
    out = host(x, adapter=name, remat=remat)
    loss = sum(
        (o if isinstance(o, Tensor) else o.pooled).square().sum() for o in (out if isinstance(out, list) else [out])
    )
    how(loss)
    return [p.grad.clone() for made in host.adapters.values() for p in made.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["lora", "bundle", ["lora", "three", "lora2"], ["lora", "bottleneck", None]], ids=str)
def test_remat_gives_the_same_gradients(host: Host, name: str | list[str | None]) -> None:
    """Also when the backward pass runs in a thread of its own, as on a GPU, or while something else is selected."""
    x = images(host.backbone, 3)
    elsewhere = Graft.of(host.backbone, host.adapters["dora"]).plan

    def in_another_thread(loss: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()

    def under_another_plan(loss: Tensor) -> None:
        with following(elsewhere):
            loss.backward()

    want = gradients(host, x, name, remat=False, how=Tensor.backward)
    assert want
    for how in (Tensor.backward, in_another_thread, under_another_plan):
        got = gradients(host, x, name, remat=True, how=how)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_remat_recomputes(either: Backbone) -> None:
    calls = []
    host = Host(either)
    made = acting(
        either, [n for n in either.sites if n.endswith(".norm2")], lambda site, y: (calls.append(site.name), y * 2)[1]
    )
    made.parts["acting"].dummy = torch.nn.Parameter(torch.zeros(1))
    host.add(made, "a")
    x = images(either).requires_grad_()
    out = host(x, adapter="a", remat=True)
    assert len(calls) == either.depth
    out.sum().backward()
    assert len(calls) == 2 * either.depth


def test_remat_repeats_dropout(either: Backbone) -> None:
    """The recomputed stage draws the same masks."""
    grads = []
    for remat in (False, True):
        host = Host(either)
        torch.manual_seed(0)
        host.add(adapter(either, {"l": LoRA.on(either, ONE, dropout=0.5)}), "a")
        host.train()
        torch.manual_seed(0)
        host(images(either), adapter="a", remat=remat).square().sum().backward()
        grads.append([p.grad for p in host.adapters["a"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# 4. Rows are independent


def test_4_rows_with_different_adapters(host: Host) -> None:
    names = [*host.adapters, None, *reversed(host.adapters)]
    x = images(host.backbone, len(names))
    with torch.no_grad():
        rows = host(x, adapter=names)
        assert isinstance(rows, list)
        for i, name in enumerate(names):
            close(f"row {i}, {name}", rows[i], host(x[i : i + 1], adapter=name))


@pytest.mark.parametrize(
    "names", [["lora", "lora2", "late"], ["lora", "dora", "bottleneck"], ["late", "head", "late"]], ids=str
)
def test_4_rows_of_one_shape_come_as_one_tensor(host: Host, names: list[str]) -> None:
    x = images(host.backbone, 3)
    with torch.no_grad():
        out = host(x, adapter=names)
        assert isinstance(out, Tensor)
        close("rows", out, torch.cat([host(x[i : i + 1], adapter=n) for i, n in enumerate(names)]))


def test_4_rows_with_different_classes_come_as_a_list(host: Host) -> None:
    x = images(host.backbone, 3)
    with torch.no_grad():
        rows = host(x, adapter=["lora", "three", "labels"])
    assert [tuple(r.shape[:2]) for r in rows] == [(1, 1), (1, 4), (1, 3)]


def test_4_rows_without_an_adapter_are_plain(host: Host) -> None:
    x = images(host.backbone, 2)
    with torch.no_grad():
        rows = host(x, adapter=[None, None])
        assert [type(r) for r in rows] == [Features, Features]
        for i in range(2):
            close("row", rows[i], host(x[i : i + 1]))


def test_4_company_does_not_matter(host: Host) -> None:
    """One image among others that change, with the adapters of its neighbours changing too."""
    x = images(host.backbone, 4)
    draw = random.Random(0)
    for mine in ("lora", "bundle", "dora", None):
        with torch.no_grad():
            alone = host(x[:1], adapter=mine)
            for seed in range(3):
                crowd = torch.cat([images(host.backbone, 3, seed=seed) * 10**seed, x[:1]])
                names = [draw.choice([*host.adapters, None]) for _ in range(3)]
                out = host(crowd, adapter=[*names, mine])
                close(f"{mine} beside {names}", out[3] if isinstance(out, list) else out[3:], alone)


FAMILIES = ("vit", "swin", "eva", "hf_vit", "dinov2", "vit_tiny", "swin_tiny")


@pytest.mark.parametrize("name", [*FAMILIES, "sam", "meshnet", "volume_unet", "swin_unetr"])
def test_4_every_site_folds_rows_batch_first(name: str, request: pytest.FixtureRequest) -> None:
    """Change the second image: no port may see the first rows of its input change. Sequence-first layouts fail here."""
    on: Backbone = request.getfixturevalue(name)

    def inputs(x: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def seer(port: str) -> Callable:
            def look(inner, first: Tensor, *args, **kwargs):
                seen[port] = first
                return inner(first, *args, **kwargs)

            return look

        plan = Plan(on.owner, {site.port: seer(site.port) for site in on.sites.values()})
        with torch.no_grad(), following(plan):
            features = on(x)
            if (
                features.decoder is not None
            ):  # two questions an image, which change with the image; then the other masks
                corner = 20 + 10 * x.sign()[:, 0, :2, :2]
                asked = Prompts(boxes=torch.cat([corner, corner + 40], 2))
                for multimask in (True, False):
                    features.decoder(features.maps[-1], asked, multimask=multimask)
        return seen

    x = images(on, 2)
    y = torch.cat([x[:1], -x[1:]])
    one, two = inputs(x), inputs(y)
    assert one.keys() == {site.port for site in on.sites.values()}
    folded = {site.port for site in on.sites.values() if site.folded}
    for port, t in one.items():
        if on.sites[port].kind == "prompt":  # tokens of the network's own: the same for every image
            continue
        ratio, rest = divmod(t.shape[0], 2)
        assert rest == 0, port
        first, second = (u.unflatten(0, (2, ratio)) for u in (t, two[port]))
        close(f"first row at {port}", second[0], first[0], 1e-6)
        assert off_by(second[1], first[1]) > 1e-2, f"the second row at {port} did not change"
        assert (ratio > 1) <= (port in folded), f"{port} folds rows and does not say so"
    if on.family in ("swin", "swin_unetr"):
        assert any(one[port].shape[0] > 2 for port in folded), "one window an image: nothing was tested"


# 5. A failed call leaves nothing behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, BadCall])
def test_5_an_exception_inside_a_part(host: Host, error: type[BaseException]) -> None:
    on, x = host.backbone, images(host.backbone)
    with torch.no_grad():
        right = {name: host(x, adapter=name) for name in ("lora", None)}

        def trip(site, y: Tensor) -> Tensor:
            raise error("in the middle")

        host.add(acting(on, [n for n in on.sites if n.endswith("1.mlp")], trip), "bad")
        calls = {
            "alone": lambda: host(x, adapter="bad"),
            "mixed": lambda: host(x, adapter=["lora", "bad"]),
            "every": lambda: host(x, adapters=["late", "bad", "lora"]),
            "remat": lambda: torch.enable_grad()(host)(x, adapter="bad", remat=True),
            "resumed": lambda: host.resume(on.run(x, stop=0), x, "bad"),
        }
        for how, call in calls.items():
            with pytest.raises(error, match="in the middle"):
                call()
            assert _PLAN.get() is None, how
            for name, want in right.items():
                assert same_bits(host(x, adapter=name), want), f"after a failed call ({how})"


def test_5_an_exception_in_the_backward_pass(host: Host) -> None:
    on, x = host.backbone, images(host.backbone).requires_grad_()
    calls = []

    def trip_later(site, y: Tensor) -> Tensor:
        calls.append(site)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return y

    host.add(acting(on, [n for n in on.sites if n.endswith("1.norm1")][:1], trip_later), "bad")
    out = host(x, adapter="bad", remat=True)
    with pytest.raises(KeyboardInterrupt):
        out.sum().backward()
    assert _PLAN.get() is None
    with torch.no_grad():
        assert same_bits(host(x), on(x))


BAD_CALLS: dict[str, tuple[Callable[[Host, Tensor], object], type[MedgraftError], tuple[str, ...]]] = {
    "a name that is not resident": (
        lambda h, x: h(x, adapter="lorra"),
        UnknownName,
        ("lorra", "did you mean 'lora'", "host.add"),
    ),
    "one such in a list": (lambda h, x: h(x, adapter=["lora", "lorra"]), UnknownName, ("lorra", "did you mean")),
    "one such among many": (lambda h, x: h(x, adapters=["lora", "lorra"]), UnknownName, ("lorra", "did you mean")),
    "a name that is no string": (lambda h, x: h(x, adapter=["lora", 3]), UnknownName, ("3", "resident")),
    "an empty name": (lambda h, x: h(x, adapter=""), UnknownName, ("there are", "lora")),
    "too few names": (lambda h, x: h(x, adapter=["lora"]), BadCall, ("1 rows", "has 2", "one name a row")),
    "no names": (lambda h, x: h(x, adapter=[]), BadCall, ("0 rows", "has 2")),
    "no names for every row": (lambda h, x: h(x, adapters=[]), BadCall, ("empty", "at least one")),
    "both arguments": (lambda h, x: h(x, adapter="lora", adapters=["lora"]), BadCall, ("not both",)),
    "an image without a batch": (lambda h, x: h(x[0], adapter="lora"), BadCall, ("(3, 64, 64)", "(B, 3, H, W)")),
    "no images": (lambda h, x: h(x[:0], adapter="lora"), BadCall, ("empty batch", "(0, 3, 64, 64)")),
    "two channels": (lambda h, x: h(x[:, :2], adapter="lora"), BadCall, ("(2, 2, 64, 64)", "(B, 3, H, W)")),
    "a side that does not fit": (
        lambda h, x: h(x[..., :61], adapter="lora"),
        BadCall,
        ("(2, 3, 64, 61)", "divisible by", "resize or pad"),
    ),
    "a side of nothing": (lambda h, x: h(x[..., :0], adapter="lora"), BadCall, ("(2, 3, 64, 0)",)),
    "integers": (lambda h, x: h(x.long(), adapter="lora"), BadCall, ("floating-point", "int64")),
    "another precision": (lambda h, x: h(x.double(), adapter="lora"), BadCall, ("float64", "float32")),
    "not a tensor": (lambda h, x: h(x.numpy(), adapter="lora"), BadCall, ("ndarray", "tensor")),
    "an adapter in the place of its name": (
        lambda h, x: h(x, adapter=h.adapters["lora"]),
        BadCall,
        ("Adapter", "name"),
    ),
    "a state that is too far": (
        lambda h, x: h.resume(h.backbone.run(x, stop=2), x, "lora"),
        BadCall,
        ("stage 0", "stands at 2", "stop earlier"),
    ),
    "a state of other images": (
        lambda h, x: h.resume(h.backbone.run(x, stop=0), x[:1], "lora"),
        BadCall,
        ("2", "1", "rows"),
    ),
    "the cut of nobody": (lambda h, x: h.cut("lorra"), UnknownName, ("lorra", "did you mean")),
    "folding nobody": (lambda h, x: h.folded("lorra"), UnknownName, ("lorra", "did you mean")),
    "fixing nobody": (lambda h, x: h.fixed("lorra"), UnknownName, ("lorra", "did you mean")),
    "removing nobody": (lambda h, x: h.remove("lorra"), UnknownName, ("lorra", "did you mean")),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_5_a_bad_call_says_what_is_wrong_and_changes_nothing(host: Host, what: str) -> None:
    call, error, words = BAD_CALLS[what]
    x, resident = images(host.backbone), list(host.adapters)
    with torch.no_grad():
        right = host(x, adapter="lora")
        with pytest.raises(error) as raised:
            call(host, x)
        says(raised.value, *words)
        assert list(host.adapters) == resident
        assert torch.equal(host(x, adapter="lora"), right)


def test_5_a_message_does_not_suggest_what_has_gone(host: Host) -> None:
    host.remove("lora2")
    with pytest.raises(UnknownName) as raised:
        host(images(host.backbone), adapter="lora2")
    assert "lora2'?" not in str(raised.value)


def test_5_adding_is_all_or_nothing(either: Backbone) -> None:
    host, x = Host(either), images(either)
    host.add(adapter(either), "lora")
    with torch.no_grad():
        right = host(x, adapter="lora")
    block = next(n for n in either.sites if n.endswith("1.mlp")).removesuffix(".mlp")
    width = either.sites[f"{block}.mlp"].fan_in

    def of(kind, sites, **config) -> Adapter:
        return adapter(either, {"it": kind(sites, **config)})

    elsewhere = adapter(BACKBONES["hf_vit"]())
    lora, tuned = LoRA.on(either, ONE, targets="*.fc1"), Tuned.on(either, ONE, targets="*.fc1")
    refused: dict[str, tuple[object, str, type[MedgraftError], tuple[str, ...]]] = {
        "a name that is taken": (adapter(either, seed=1), "lora", BadCall, ("'lora'", "resident already", "remove it")),
        "no name": (adapter(either), "", BadCall, ("non-empty string",)),
        "a path": ("runs/polyp", "a", BadCall, ("str", "load_adapter")),
        "a part": (LoRA.on(either, ONE), "a", BadCall, ("LoRA", "takes adapters")),
        "another backbone": (
            elsewhere,
            "a",
            WrongBackbone,
            ("random:hf:vit", elsewhere.backbone.fingerprint[:12], either.spec.fingerprint[:12], "allow_mismatch"),
        ),
        "a site that is not there": (
            of(LoRA, {f"{block}.attn.qvk": (width, 3 * width)}),
            "a",
            UnknownName,
            ("attn.qvk", f"{block}.attn.qkv"),
        ),
        "another width": (
            of(LoRA, {f"{block}.attn.q": (width, width + 1)}),
            "a",
            BadCall,
            (f"{width} -> {width + 1}", f"{width} -> {width} there"),
        ),
        "a site of another kind": (of(LoRA, {f"{block}.mlp": (width, width)}), "a", BadCall, ("linear", "branch")),
        "DoRA on top of another part": (
            adapter(
                either,
                {"a": LoRA.on(either, ONE, targets="*.fc1"), "b": LoRA.on(either, ONE, targets="*.fc1", dora=True)},
            ),
            "a",
            BadCall,
            ("'b'", "directly on the frozen layer", "put it first"),
        ),
        "copies on top of another part": (
            adapter(either, {"a": lora, "b": tuned}),
            "a",
            BadCall,
            ("'b'", "put it first"),
        ),
        "copies of other tensors": (
            of(Tuned, {f"{block}.norm1": (width, width)}, tensors={f"{block}.norm1": {"wait": [width]}}),
            "a",
            BadCall,
            ("wait", "weight", "bias"),
        ),
        "copies of another shape": (
            of(Tuned, {f"{block}.norm1": (width, width)}, tensors={f"{block}.norm1": {"weight": [1, width]}}),
            "a",
            BadCall,
            (f"(1, {width})", f"({width},)"),
        ),
        "a head for other features": (
            adapter(either, {"head": LinearHead({}, width=width + 1, outputs=1)}),
            "a",
            BadCall,
            (str(width + 1),),
        ),
    }
    for what, (made, name, error, words) in refused.items():
        with pytest.raises(error) as raised:
            host.add(made, name)  # type: ignore[arg-type]
        says(raised.value, *words)
        assert list(host.adapters) == ["lora"], what
        with torch.no_grad():
            assert torch.equal(host(x, adapter="lora"), right), what


def test_5_removing_gives_the_adapter_back(either: Backbone) -> None:
    host, x, made = Host(either), images(either), adapter(either)
    host.add(made, "a")
    with torch.no_grad():
        right = host(x, adapter="a")
        assert host.remove("a") is made
        with pytest.raises(UnknownName, match="there is none"):
            host(x, adapter="a")
        host.add(made, "again")
        assert torch.equal(host(x, adapter="again"), right)
