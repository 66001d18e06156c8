"""UniverSeg: the golden tensors of the authors' model, the properties of a support set, checkpoints, and bad input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medgraft import load_backbone
from medgraft.backbones import Backbone
from medgraft.backbones.sites import Plan, following
from medgraft.backbones.state import State
from medgraft.backbones.universeg import CHUNK, Context, UniverSeg
from medgraft.backbones.universeg_source import blob_id
from medgraft.errors import BadCall, BadData, MedgraftError
from tests.helpers import close, says

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "universeg.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.is_file():
        pytest.skip("the golden tensors of ../shared/golden are not here")
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def authors(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> UniverSeg:
    """The network that the golden tensors came from, loaded as a user loads a checkpoint."""
    file = tmp_path_factory.mktemp("universeg") / "checkpoint.pt"
    torch.save({k.removeprefix("sd."): t for k, t in golden.items() if k.startswith("sd.")}, file)
    loaded = load_backbone(f"universeg:{file}")
    assert isinstance(loaded, UniverSeg)
    return loaded


@pytest.fixture
def small(universeg: Backbone) -> UniverSeg:
    assert isinstance(universeg, UniverSeg)
    return universeg


def draw(batch: int = 1, shots: int = 3, h: int = 16, w: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    images = torch.rand(batch, shots, 1, h, w, generator=g)
    return torch.rand(batch, 1, h, w, generator=g), images, (images > 0.6).float()


# The authors' numbers


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_golden_logits(authors: UniverSeg, golden: dict[str, Tensor], shots: int) -> None:
    inputs = [golden["in.target"], golden["in.support_images"][:, :shots], golden["in.support_labels"][:, :shots]]
    with torch.no_grad():
        got = authors.segment(*inputs)
    torch.testing.assert_close(got, golden[f"out.logits_S{shots}"], rtol=1e-4, atol=1e-5)


def test_golden_blocks(authors: UniverSeg, golden: dict[str, Tensor]) -> None:
    """Every block's query map, and the support's mean where the network computes it."""
    names = [f"enc{i}" for i in range(4)] + [f"dec{i}" for i in range(3)]
    for row in range(2):
        context = Context(golden["small.in.support_images"][row], golden["small.in.support_labels"][row][None])
        with torch.no_grad(), following(Plan(authors.owner, {"support": lambda inner, query, c=context: c})):
            state = authors._start(golden["small.in.target"][row : row + 1])
            for i, name in enumerate(names):
                state = authors.stage(state)
                # an encoder block hands its maps on pooled and lays them aside whole
                u = state.kept[f"skip{i}.u"] if i < 3 else state.x
                torch.testing.assert_close(u[0, 0], golden[f"small.mid.{name}.target"][row, 0], rtol=1e-4, atol=1e-5)
                if i < 6:
                    mean = state.kept[f"skip{i}.mean" if i < 3 else "mean"]
                    want = golden[f"small.mid.{name}.support_mean"][row].mean(0)
                    torch.testing.assert_close(mean[0, 0].mean((1, 2)), want, rtol=1e-4, atol=1e-5)


def test_parameters_and_names(golden: dict[str, Tensor]) -> None:
    network = load_backbone("random:universeg").network
    assert sum(p.numel() for p in network.parameters()) == 1_182_785
    assert {f"sd.{k}": tuple(t.shape) for k, t in network.state_dict().items()} == {
        k: tuple(t.shape) for k, t in golden.items() if k.startswith("sd.")
    }


# Properties of a support set


@pytest.mark.parametrize("shots", [1, 7, 8, 9, 20])
def test_order_does_not_matter(small: UniverSeg, shots: int) -> None:
    x, images, labels = draw(shots=shots)
    order = torch.randperm(shots)
    with torch.no_grad():
        close("shuffled", small.segment(x, images[:, order], labels[:, order]), small.segment(x, images, labels))


@pytest.mark.parametrize("copies", [2, 11])
def test_copies_of_one_pair_are_that_pair(small: UniverSeg, copies: int) -> None:
    x, images, labels = draw(shots=1)
    with torch.no_grad():
        many = small.segment(x, images.repeat(1, copies, 1, 1, 1), labels.repeat(1, copies, 1, 1, 1))
        close("copies", many, small.segment(x, images, labels))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_do_not_show(small: UniverSeg, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, images, labels = draw(shots=13)
    with torch.no_grad():
        want = small.segment(x, images, labels)
        monkeypatch.setattr("medgraft.backbones.universeg.CHUNK", chunk)
        close("chunked", small.segment(x, images, labels), want)


def test_a_support_of_a_thousand(small: UniverSeg) -> None:
    x, images, labels = draw(shots=4, h=8, w=8)
    with torch.no_grad():
        many = small.segment(x, images.repeat(1, 256, 1, 1, 1), labels.repeat(1, 256, 1, 1, 1))
        close("1024", many, small.segment(x, images, labels))


def test_queries_are_independent_and_may_share_a_support(small: UniverSeg) -> None:
    x, images, labels = draw(batch=3)
    with torch.no_grad():
        own = small.segment(x, images, labels)
        assert all(
            torch.equal(own[i : i + 1], small.segment(x[i : i + 1], images[i : i + 1], labels[i : i + 1]))
            for i in range(3)
        )
        shared = small.segment(x, images[:1], labels[:1])
        expanded = small.segment(x, images[:1].expand(3, -1, -1, -1, -1), labels[:1].expand(3, -1, -1, -1, -1))
        close("shared", shared, torch.cat([small.segment(x[i : i + 1], images[:1], labels[:1]) for i in range(3)]))
        assert torch.equal(shared, expanded)


@pytest.mark.parametrize(("h", "w"), [(17, 16), (10, 23), (1, 1), (5, 40)])
def test_any_size_is_padded_and_cropped(small: UniverSeg, h: int, w: int) -> None:
    x, images, labels = draw(h=h, w=w)
    with torch.no_grad():
        got = small.segment(x, images, labels)
        pad = (0, -w % 4, 0, -h % 4)
        want = small.segment(*(torch.nn.functional.pad(t, pad) for t in (x, images, labels)))
    assert got.shape == (1, 1, h, w)
    close("padded", got, want[..., :h, :w])


def test_several_tasks_on_the_same_images(small: UniverSeg) -> None:
    x, images, labels = draw()
    tasks = torch.stack([labels[0], 1 - labels[0]])
    with torch.no_grad():
        both = small.answer(x, Context(images[0], tasks))
        close("first", both[:, :1], small.segment(x, images, labels))
        close("second", both[:, 1:], small.segment(x, images, 1 - labels))


def test_kept_terms_change_nothing_and_are_found_again(small: UniverSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    x, images, labels = draw(batch=2, shots=9)
    context = Context(images[0], labels[:1])
    with torch.no_grad():
        first = small.answer(x[:1], context)
        kept = context._kept
        assert kept is not None
        close("kept", first, small.segment(x[:1], images[:1], labels[:1]))
        again, other = small.answer(x[:1], context), small.answer(x[1:], context)
        assert context._kept is kept
        assert torch.equal(first, again), "a kept term was written over"
        close("another query", other, small.segment(x[1:], images[:1], labels[:1]))
        with torch.autocast("cpu", torch.bfloat16):
            small.answer(x[:1], context)
        assert context._kept is not kept, "terms of another precision"
        monkeypatch.setattr("medgraft.backbones.universeg.CACHE_BYTES", 10)
        close("too large to keep", small.answer(x[:1], Context(images[0], labels[:1])), first)


def test_kept_terms_follow_the_weights() -> None:
    mine = load_backbone("random:universeg?widths=8,8")
    assert isinstance(mine, UniverSeg)
    x, images, labels = draw()
    context = Context(images[0], labels)
    with torch.no_grad():
        before = mine.answer(x, context)
        mine.network.get_submodule("enc_blocks.0.cross.cross_conv").weight.mul_(2)
        after = mine.answer(x, context)
        close("after", after, mine.segment(x, images, labels))
    assert not torch.allclose(before, after)


def test_half_the_bytes(small: UniverSeg) -> None:
    x, images, labels = draw()
    with torch.no_grad():
        want = small.segment(x, images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = small.segment(x, images, labels)
    close("autocast", got.float(), want, 3e-2)


def test_training_reaches_every_kernel() -> None:
    twin = load_backbone("random:universeg?widths=8,8,8").trainable_copy()
    assert isinstance(twin, UniverSeg)
    twin.segment(*draw()).square().sum().backward()
    deaf = [n for n, p in twin.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert deaf == ["dec_blocks.1.support.vmapped.conv.weight", "dec_blocks.1.support.vmapped.conv.bias"], (
        "the last block's support output is read by nobody"
    )


# As a backbone


def test_the_query_is_rescaled_and_made_grey(small: UniverSeg) -> None:
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(small.stem(x).x.amax((2, 3, 4)), torch.ones(2, 1))
    close("range", small.stem(7 * x - 3).x, small.stem(x).x)
    rgb = torch.rand(2, 3, 16, 16)
    want = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
    close("luma", small.checked(rgb), want)
    assert torch.equal(small.stem(torch.full((1, 1, 8, 8), 0.7)).x, torch.zeros(1, 1, 1, 8, 8))


def test_without_a_support_the_features_are_defined_and_there_are_no_logits(small: UniverSeg) -> None:
    with torch.no_grad():
        features = small(torch.rand(2, 1, 16, 16))
    assert features.maps[0].shape == (2, 8, 16, 16)
    assert torch.isfinite(features.maps[0]).all()
    assert not features.extra


def test_a_state_holds_only_what_is_still_read(small: UniverSeg) -> None:
    """The last block gets no support maps, and the first encoder's travel as their mean."""
    x, images, labels = draw(shots=9)
    context = Context(images[0], labels)
    with torch.no_grad(), following(Plan(small.owner, {"support": lambda inner, query: context})):
        states: list[State] = [small._start(x)]
        while states[-1].stage < small.depth:
            states.append(small.stage(states[-1]))
    assert not any(k.startswith("skip0.maps") for k in states[1].kept)
    assert sum(k.startswith("skip1.maps") for k in states[2].kept) == -(-9 // CHUNK)
    assert not any("maps" in k for k in states[-2].kept)
    assert not states[-1].kept
    assert all(t.shape[0] == 1 for s in states for t in s.kept.values()), "the batch is the first axis of everything"


# Checkpoints


def test_widths_are_read_off_the_shapes(tmp_path: Path) -> None:
    made = load_backbone("random:universeg?widths=4,6,8&seed=3")
    save_file(made.network.state_dict(), tmp_path / "w.safetensors")
    back = load_backbone(f"universeg:{tmp_path / 'w.safetensors'}")
    named = load_backbone(f"universeg:mine@{tmp_path / 'w.safetensors'}")
    x, images, labels = draw()
    assert isinstance(made, UniverSeg)
    assert isinstance(back, UniverSeg)
    with torch.no_grad():
        assert torch.equal(back.segment(x, images, labels), made.segment(x, images, labels))
    assert back.spec.fingerprint == made.spec.fingerprint == named.spec.fingerprint
    assert back.spec.id == named.spec.id == "universeg:custom", "no path and no file name is recorded"
    assert not back.spec.random


def test_the_released_file_is_known_by_its_blob_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hello"
    file.write_bytes(b"hello\n")
    assert blob_id(file) == "ce013625030ba8dba906f756967f9e9ca394464a"  # what `git hash-object` says
    made = load_backbone("random:universeg?widths=4,4")
    torch.save(made.network.state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr("medgraft.backbones.universeg_source.RELEASED", blob_id(tmp_path / "w.pt"))
    assert load_backbone(f"universeg:{tmp_path / 'w.pt'}").spec.id == "universeg:released"


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    good = load_backbone("random:universeg?widths=4,6").network.state_dict()
    cases = {
        "another network": ({"conv.weight": torch.zeros(3)}, ("no UniverSeg checkpoint", "conv.weight")),
        "a tensor missing": (
            {k: t for k, t in good.items() if k != "out_conv.conv.bias"},
            ("1 tensors missing", "out_conv.conv.bias"),
        ),
        "a tensor too many": ({**good, "head.bias": torch.zeros(1)}, ("not understood", "head.bias")),
        "other decoder widths": (
            {**good, "dec_blocks.0.target.vmapped.conv.weight": torch.zeros(5, 5, 3, 3)},
            ("[4, 6]", "(5, 5, 3, 3)", "decoder widths"),
        ),
    }
    for tensors, words in cases.values():
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(BadData) as refused:
            load_backbone(f"universeg:{tmp_path / 'w.safetensors'}")
        says(refused.value, *words)
    with pytest.raises(BadData) as refused:
        load_backbone("universeg:released")
    says(refused.value, "do not ship", "universeg:PATH")
    for id, words in {
        "random:universeg?widths=8": ("two encoder blocks",),
        "random:universeg?widths=8,x": ("whole numbers", "8,x"),
        "random:universeg?depth=3": ("depth", "widths"),
    }.items():
        with pytest.raises(MedgraftError) as wrong:
            load_backbone(id)
        says(wrong.value, *words)


# Bad input

BAD: dict[str, tuple] = {
    "no support": (lambda x, i, y: (x, i[:, :0], y[:, :0]), "at least one"),
    "labels for fewer images": (lambda x, i, y: (x, i, y[:, :2]), "2 entries"),
    "three channels": (lambda x, i, y: (x.expand(-1, 3, -1, -1), i, y), "3 channels"),
    "support of another size": (lambda x, i, y: (x, i[..., :12], y[..., :12]), "(16, 12)"),
    "another range": (lambda x, i, y: (x, 255 * i, y), "[0, 1]"),
    "labels beyond one": (lambda x, i, y: (x, i, 2 * y), "support_labels"),
    "NaN": (lambda x, i, y: (x * float("nan"), i, y), "nan"),
    "two supports for three queries": (
        lambda x, i, y: (x.repeat(3, 1, 1, 1), i.repeat(2, 1, 1, 1, 1), y.repeat(2, 1, 1, 1, 1)),
        "one for all",
    ),
    "an image": (lambda x, i, y: (x[0], i, y), "(B, 1, H, W)"),
    "integers": (lambda x, i, y: (x, i, y.long()), "floating-point"),
    "a list": (lambda x, i, y: ([x], i, y), "list"),
    "no pixels": (lambda x, i, y: (x[..., :0], i[..., :0], y[..., :0]), "(1, 1, 16, 0)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_what_was_found(small: UniverSeg, name: str) -> None:
    change, word = BAD[name]
    with pytest.raises(BadCall) as refused:
        small.segment(*change(*draw()))
    says(refused.value, word)


def test_soft_labels_empty_labels_and_constant_images_are_allowed(small: UniverSeg) -> None:
    x, images, labels = draw()
    with torch.no_grad():
        for case in ((x, images, 0.5 * labels), (x, images, 0 * labels), (0 * x, 0 * images, labels)):
            assert torch.isfinite(small.segment(*case)).all()
