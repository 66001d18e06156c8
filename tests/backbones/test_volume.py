"""3D networks against the stock forward, to the bit and from every stage; checkpoints under other names; bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from medgraft.adapters import Host
from medgraft.backbones import Backbone, State, load_backbone
from medgraft.backbones.meshnet import DILATIONS, MODELS, MeshNetwork, mirrored
from medgraft.backbones.unet3d import MARGIN, UNet3DNetwork
from medgraft.errors import BadCall, BadData, UnknownName
from tests.helpers import TINY_SWIN_UNETR, adapter, close, images, other_spec, same_bits, says

WEIGHTS = Path(__file__).parents[2].parent / "shared" / "weights" / "meshnet_model18cls.safetensors"
TINY = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "meshnet": ("random:meshnet:model18cls", lambda: MeshNetwork(*MODELS["model18cls"])),
    "swin_unetr": (TINY_SWIN_UNETR, lambda: SwinUNETR(1, 14, **TINY)),
    "swin_unetr_v2": (f"{TINY_SWIN_UNETR}&v2=1&classes=2", lambda: SwinUNETR(1, 2, **TINY, use_v2=True)),
    "unet": ("random:monai:unet?widths=4-8-8-8", lambda: UNet(3, 1, 2, (4, 8, 8, 8), (2, 2, 2), num_res_units=2)),
    "unet_batch": (
        "random:monai:unet?widths=4-8-8&norm=batch&res=0&channels=2&classes=5",
        lambda: UNet(3, 2, 5, (4, 8, 8), (2, 2), norm="batch"),
    ),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def pair(request: pytest.FixtureRequest) -> tuple[Backbone, nn.Module]:
    """A backbone, and the stock network with the same tensors and no ports, loaded by name."""
    id, build = NETWORKS[request.param]
    on, stock = load_backbone(id), build().eval()
    stock.load_state_dict(on.network.state_dict())
    return on, stock


def batch(on: Backbone, *space: int, rows: int = 2) -> Tensor:
    """A normal batch of a size that is not the same on any two axes."""
    return torch.randn(rows, on.spec.channels, *on.spec.fitting(space or (5, 9, 33)))


# The same function


def test_it_is_the_stock_forward_to_the_bit(pair: tuple[Backbone, nn.Module]) -> None:
    on, stock = pair
    x = batch(on)
    with torch.no_grad():
        assert torch.equal(on(x).extra["logits"], stock(x))


def test_the_map_is_what_the_stock_head_reads(pair: tuple[Backbone, nn.Module]) -> None:
    on, stock = pair
    name = on.sites["head"].path if "head" in on.sites else "model.2"  # MONAI's UNet narrows in its last step up
    seen: list[Tensor] = []
    stock.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = batch(on)
    with torch.no_grad():
        stock(x)
        f = on(x)
    assert torch.equal(f.maps[-1], seen[-1])
    assert torch.equal(f.raw, seen[-1])
    close("pooled", f.pooled, seen[-1].flatten(2).mean(2))
    assert tuple(f.maps[-1].shape[2:]) == tuple(side // on.spec.strides[-1] for side in x.shape[2:])
    assert [m.shape[1] for m in f.maps] == list(on.spec.widths) == [on.spec.width]
    assert f.strides == list(on.spec.strides)


def test_it_resumes_from_any_stage(pair: tuple[Backbone, nn.Module]) -> None:
    on, _ = pair
    x, index = batch(on), torch.tensor([1, 0])
    with torch.no_grad():
        want = on(x)
        state = on.run(x, stop=0)
        for stop in range(on.depth + 1):
            assert isinstance(state, State)
            assert state.stage == stop
            assert all(t.shape[0] == 2 for t in (state.x, *state.kept.values()))
            assert same_bits(on.run(state), want)
            if stop % 4 == 1:
                assert same_bits(on.run(state.map(lambda t: t.double().float().clone())), want)
                close("rows", on.run(state.rows(index)), want.rows(index))
            state = on.run(state, stop=stop + 1) if stop < on.depth else state
        assert not state.kept, "a skip was kept to the end"


def test_every_port_is_called_and_has_the_widths_of_its_site(pair: tuple[Backbone, nn.Module]) -> None:
    on, stock = pair
    assert on.called == {site.port for site in on.sites.values()}
    for site in on.sites.values():
        layer = stock.get_submodule(site.path) if site.kind in ("conv", "linear") else None
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            assert (site.fan_in, site.fan_out) == (layer.in_channels, layer.out_channels), site
        elif isinstance(layer, nn.Linear) and site.span is None:
            assert (site.fan_in, site.fan_out) == (layer.in_features, layer.out_features), site
    convolutions = {name for name, m in stock.named_modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)}
    stem = {"swinViT.patch_embed.proj"} & convolutions
    assert convolutions - stem == {s.path for s in on.sites.values() if s.kind == "conv"}


def test_a_late_swin_level_finds_the_convolutions_beside_it_done(swin_unetr: Backbone) -> None:
    sites = swin_unetr.sites
    late = sites["layers.3.blocks.0.attn.q"].stage
    assert {sites[f"encoder{i}.conv1"].stage < late for i in (1, 2, 3, 4)} == {True}
    assert sites["layers.0.blocks.0.attn.q"].stage == 2
    assert sites["decoder1.up"].stage == swin_unetr.depth - 1
    assert sites["embedding"].stage == sites["head"].stage == swin_unetr.depth


def test_batch_norms_keep_the_backbones_statistics() -> None:
    """Whatever mode is asked for, and while an adapter learns."""
    on = load_backbone("random:monai:unet?widths=4-8-8&norm=batch", image_size=8)
    before, x = on.digest(), images(on)
    with torch.no_grad():
        want = on.train()(x)
    host = Host(on.train())
    host.add(adapter(on, {}), "a")
    host.train()(x, adapter="a").square().sum().backward()
    with torch.no_grad():
        assert same_bits(on(x), want)
    assert on.digest() == before


# MeshNet


def test_meshnets_equation() -> None:
    on = load_backbone("random:meshnet:model5_gw_ae", image_size=8)
    sd, x = on.network.state_dict(), torch.randn(1, 1, 6, 7, 8)
    y = x
    for i, d in enumerate(DILATIONS):
        y = functional.relu(
            functional.conv3d(y, sd[f"layers.{i}.weight"], sd[f"layers.{i}.bias"], padding=d, dilation=d)
        )
    with torch.no_grad():
        f = on(x)
    close("map", f.maps[0], y)
    close("logits", f.extra["logits"], functional.conv3d(y, sd["layers.9.weight"], sd["layers.9.bias"]))


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the weights of ../shared/weights are not here")
def test_meshnets_real_weights() -> None:
    on = load_backbone(f"meshnet:model18cls@{WEIGHTS}", image_size=16)
    assert on.spec.id == "meshnet:model18cls"
    assert not on.spec.random
    assert (on.spec.axcodes, on.spec.spacing, on.spec.intensity) == ("LIA", (1, 1, 1), ("percentiles", 2.0, 98.0))
    with torch.no_grad():
        dark = on(torch.zeros(1, 1, 16, 16, 16)).extra["logits"]
    assert dark.shape == (1, 18, 16, 16, 16)
    assert (dark.argmax(1) == 0).all(), "air is background"
    with pytest.raises(BadData) as refused:
        load_backbone(f"meshnet:model5_gw_ae@{WEIGHTS}")
    says(refused.value, "do not fit", "meshnet:model5_gw_ae", "shape")


# The network of valid convolutions


@pytest.fixture(scope="module")
def valid() -> tuple[Backbone, UNet3DNetwork]:
    on = load_backbone("random:volume:unet3d?filters=2&classes=3")
    network = UNet3DNetwork(2, 3)
    network.load_state_dict(on.network.state_dict())
    return on, network


def test_132_voxels_give_44(valid: tuple[Backbone, UNet3DNetwork]) -> None:
    """The published patch; no layer pads or normalises."""
    on, network = valid
    x = torch.randn(1, 1, 44, 44, 44)
    with torch.no_grad():
        want = network(functional.pad(x, [MARGIN] * 6))
        assert functional.pad(x, [MARGIN] * 6).shape[2:] == (132, 132, 132)
        assert want.shape[2:] == (44, 44, 44)
        assert torch.equal(on(x).extra["logits"], want)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert len(convolutions) == 15
    assert all(m.padding == (0, 0, 0) for m in convolutions)
    assert not any("Norm" in type(m).__name__ for m in network.modules())
    assert sum(p.numel() for p in UNet3DNetwork(32, 1).parameters()) == 5_599_713


def test_other_sides_are_padded_to_the_pooling_grid_and_cut_again(valid: tuple[Backbone, UNet3DNetwork]) -> None:
    on, network = valid
    x = torch.randn(2, 1, 4, 8, 12)
    with torch.no_grad():
        got = on(x)
        want = network(functional.pad(x, (44, 44, 46, 46, 44, 44)))[..., 2:-2, :]
        assert torch.equal(got.extra["logits"], want)
        for stop in range(on.depth + 1):
            assert same_bits(on.run(on.run(x, stop=stop)), got)
    assert on.called == {site.port for site in on.sites.values()}


def test_its_random_weights_keep_activations_alive(valid: tuple[Backbone, UNet3DNetwork]) -> None:
    with torch.no_grad():
        f = load_backbone("random:volume:unet3d?filters=8")(torch.randn(1, 1, 8, 8, 8))
    assert 0.1 < f.maps[0].std() < 10


def test_a_trained_one_is_read_off_its_file(valid: tuple[Backbone, UNet3DNetwork], tmp_path: Path) -> None:
    on, network = valid
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    back = load_backbone(f"volume:unet3d@{tmp_path / 'trained.safetensors'}")
    assert back.spec.fingerprint == on.spec.fingerprint
    assert back.spec.width == 2
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(BadData) as refused:
        load_backbone(f"volume:unet3d@{tmp_path / 'other.safetensors'}")
    says(refused.value, "other.safetensors", "head.weight")


# Checkpoints under other names


def published(names: Callable[[str], str | None], extra: dict[str, Tensor], file: Path) -> Path:
    """The tiny SwinUNETR's tensors under other names, with more beside them, as a `.pth` file."""
    own = load_backbone(TINY_SWIN_UNETR).network.state_dict()
    torch.save({"state_dict": {new: t for name, t in own.items() if (new := names(name))} | extra}, file)
    return file


def test_fsefts_checkpoint(tmp_path: Path) -> None:
    def names(name: str) -> str:
        return "module." + name.replace("swinViT.", "swin_vit.").replace("out.conv.conv.", "classifier.")

    on = load_backbone(f"monai:swin_unetr@{published(names, {}, tmp_path / 'fseft.pth')}", image_size=32)
    same = load_backbone(TINY_SWIN_UNETR)
    assert not on.spec.random
    assert on.spec.fingerprint != same.spec.fingerprint  # of the tensors as they are called in the file
    x = images(on, 1)
    with torch.no_grad():
        assert same_bits(on(x), same(x))


def test_a_clip_driven_checkpoint_has_no_head_of_its_own(tmp_path: Path) -> None:
    other = {"module.organ_embedding": torch.zeros(32, 4), "module.controller.weight": torch.zeros(2, 2)}
    file = published(
        lambda name: None if name.startswith("out.") else f"module.backbone.{name}", other, tmp_path / "universal.pth"
    )
    on, same = load_backbone(f"monai:swin_unetr@{file}", image_size=32), load_backbone(TINY_SWIN_UNETR)
    assert "head" not in on.sites
    x = images(on, 1)
    with torch.no_grad():
        f, want = on(x), same(x)
    assert not f.extra
    assert torch.equal(f.maps[0], want.maps[0])


def encoder_only(name: str) -> str | None:
    if not name.startswith("swinViT."):
        return None
    return "module." + name.removeprefix("swinViT.").replace("mlp.linear", "mlp.fc")


def test_a_self_supervised_encoder_needs_a_decoder_that_is_asked_for(tmp_path: Path) -> None:
    file = published(encoder_only, {"module.rotation_head.weight": torch.zeros(4, 4)}, tmp_path / "ssl.pth")
    with pytest.raises(BadData) as refused:
        load_backbone(f"monai:swin_unetr@{file}")
    says(refused.value, "decoder=random", "missing")
    on = load_backbone(f"monai:swin_unetr?decoder=random&seed=3@{file}", image_size=32)
    assert on.spec.random, "part of it is drawn, and its title says so"
    assert "random" in on.spec.title
    own, given = on.network.state_dict(), load_backbone(TINY_SWIN_UNETR).network.state_dict()
    for name, t in own.items():
        alike = torch.equal(t, given[name])
        assert alike == name.startswith("swinViT."), name
    other = load_backbone(f"monai:swin_unetr?decoder=random&seed=4@{file}", image_size=32)
    assert other.spec.fingerprint != on.spec.fingerprint


def test_options_that_disagree_with_the_file(tmp_path: Path) -> None:
    file = published(lambda name: name, {}, tmp_path / "x.pth")
    load_backbone(f"monai:swin_unetr?feature_size=12&heads=1-2-2-4@{file}", image_size=32)
    with pytest.raises(BadData) as refused:
        load_backbone(f"monai:swin_unetr?feature_size=48@{file}")
    says(refused.value, "feature_size=48", "feature_size=12", "x.pth")


@pytest.mark.parametrize("what", ["missing", "unknown", "shape", "another"])
def test_a_checkpoint_that_does_not_fit(what: str, tmp_path: Path) -> None:
    lost = "decoder1.transp_conv.conv.weight"
    extra = {
        "missing": {},
        "unknown": {"decoder9.weight": torch.zeros(2)},
        "shape": {lost: torch.zeros(3, 3, 2, 2, 2)},
        "another": {},
    }[what]
    keep = {"missing": lambda n: None if n == lost else n, "another": lambda n: None if "patch_embed" in n else n}
    file = published(keep.get(what, lambda n: n), extra, tmp_path / "x.pth")
    words = {
        "missing": ("1 tensors missing", lost),
        "unknown": ("1 not understood", "decoder9"),
        "shape": ("(3, 3, 2, 2, 2)", "(12, 12, 2, 2, 2)"),
        "another": ("x.pth is no SwinUNETR", "patch_embed"),
    }[what]
    with pytest.raises(BadData) as refused:
        load_backbone(f"monai:swin_unetr@{file}")
    says(refused.value, *words)


@pytest.mark.parametrize("options", ["widths=4-8-8", "widths=4-8-8-6&res=0&norm=batch&channels=2&classes=3"])
def test_a_trained_unet_comes_back(options: str, tmp_path: Path) -> None:
    """Its options are read off the file."""
    on, file = load_backbone(f"random:monai:unet?{options}"), tmp_path / "unet.pth"
    torch.save(on.network.state_dict(), file)
    back, x = load_backbone(f"monai:unet@{file}"), batch(on)
    assert back.spec.fingerprint == on.spec.fingerprint
    assert (back.spec.id, back.spec.random) == ("monai:unet", False)
    with torch.no_grad():
        assert same_bits(back(x), on(x))
    with pytest.raises(BadData) as refused:
        load_backbone(f"monai:unet?widths=4-8-16@{file}")
    says(refused.value, "widths=4-8-16", "unet.pth")
    torch.save({"a": torch.zeros(2)}, file)
    with pytest.raises(BadData) as refused:
        load_backbone(f"monai:unet@{file}")
    says(refused.value, "unet.pth is no checkpoint of MONAI's 3D UNet", "it has a")


# Identity and sizes


@pytest.mark.parametrize(
    "id", ["random:meshnet:model18cls", "random:monai:unet?widths=4-8-8", "random:volume:unet3d?filters=2"]
)
def test_random_weights_come_from_the_seed_alone(id: str) -> None:
    mark = "&" if "?" in id else "?"
    one, again, other = (load_backbone(i).spec for i in (id, f"{id}{mark}seed=0", f"{id}{mark}seed=1"))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.random
    assert "random weights" in one.title


def test_a_random_unet_keeps_its_activations_slopes(volume_unet: Backbone) -> None:
    """A slope near 1, which a norm's scale would get, makes the network linear."""
    slopes = [m.weight for m in volume_unet.network.modules() if isinstance(m, nn.PReLU)]
    assert slopes
    assert all((slope == 0.25).all() for slope in slopes)


def test_the_smallest_legal_size_that_holds_a_volume(swin_unetr: Backbone, vit: Backbone) -> None:
    assert swin_unetr.spec.fitting((31, 1, 33)) == (32, 32, 64)
    assert swin_unetr.spec.fitting((32, 20, 32)) == (32, 32, 64)  # instance norm of one voxel would be zero
    assert swin_unetr.spec.fitting((64, 32, 32)) == (64, 32, 32)
    assert other_spec(swin_unetr, bottom=5).fitting((64, 32, 1)) == (64, 32, 96)
    assert vit.spec.fitting((17, 16)) == (32, 16)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(1, 1, 64, 64), ("(B, 1, D, H, W)", "(1, 1, 64, 64)")),
        (torch.zeros(1, 2, 32, 32, 64), ("(B, 1, D, H, W)", "(1, 2, 32, 32, 64)")),
        (torch.zeros(1, 1, 32, 32, 65), ("divisible by 32", "(1, 1, 32, 32, 65)", "volumes")),
        (torch.zeros(1, 1, 32, 32, 32), ("2 or more positions at the coarsest level", "pad the volumes")),
        (torch.zeros(1, 1, 0, 32, 64), ("(1, 1, 0, 32, 64)",)),
        (torch.zeros(1, 1, 32, 32, 64, dtype=torch.int16), ("floating-point", "int16")),
    ],
    ids=["an image", "channels", "side", "one voxel at the bottom", "empty", "integers"],
)
def test_a_batch_that_does_not_fit(swin_unetr: Backbone, x: Tensor, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCall) as refused:
        swin_unetr(x)
    says(refused.value, *words)


@pytest.mark.parametrize(
    ("id", "size", "error", "words"),
    [
        ("random:monai:swin_unetr", 40, BadCall, ("40", "multiple of 32", "96")),
        ("random:monai:swin_unetr?feature_size=20", None, BadCall, ("feature_size", "12", "20")),
        ("random:monai:swin_unetr?heads=5-6-12-24", None, BadCall, ("heads", "[5, 6, 12, 24]")),
        ("random:monai:swin_unetr?heads=3-6", None, BadCall, ("heads", "4 whole numbers", "3-6")),
        ("random:monai:swin_unetr?depths=2-0-2-2", None, BadCall, ("depths", "2-0-2-2")),
        ("random:monai:swin_unetr?width=12", None, UnknownName, ("width", "did you mean", "window")),
        ("random:monai:swin_unetr?decoder=random", None, UnknownName, ("decoder",)),
        ("monai:swin_unetr", None, BadData, ("monai:swin_unetr@PATH", "random:")),
        ("random:monai:swinunetr", None, UnknownName, ("swinunetr", "swin_unetr")),
        ("random:monai:unet?widths=8-16", None, BadCall, ("three or more levels", "8-16")),
        ("random:monai:unet?norm=layer", None, BadCall, ("instance or batch", "layer")),
        ("random:meshnet:model19", None, UnknownName, ("model19", "model18cls")),
        ("meshnet:model18cls", None, BadData, ("meshnet:model18cls@PATH",)),
        ("random:meshnet:model18cls", 0, BadCall, ("positive",)),
        ("random:volume:unet3d", 30, BadCall, ("30", "multiple of 4", "44")),
        ("random:volume:unet3d?filters=0", None, BadCall, ("positive whole numbers",)),
        ("volume:unet3d", None, BadData, ("volume:unet3d@PATH",)),
        ("random:volume:unet", None, UnknownName, ("unet3d",)),
    ],
)
def test_an_id_that_cannot_be_loaded(id: str, size: int | None, error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as refused:
        load_backbone(id, image_size=size)
    says(refused.value, *words)


class TestSurroundings:
    """MeshNet on crops: the mirror image around a volume, of which stages keep what later ones see."""

    @pytest.mark.parametrize("surround", [3, 20, 60])
    def test_cutting_early_changes_nothing(self, surround: int) -> None:
        """As if the whole canvas had gone through the stock network, and the volume's own part were cut out at the end."""
        on = load_backbone(f"random:meshnet:model5_gw_ae?surround={surround}")
        x = torch.rand(1, 1, 6, 9, 7, generator=torch.Generator().manual_seed(0))
        canvas = mirrored(x, min(surround, sum(DILATIONS)))
        edge = (canvas.shape[2] - 6) // 2
        with torch.no_grad():
            want = on.network(canvas)[(..., *(slice(edge, edge + n) for n in (6, 9, 7)))]
            features = on(x)
            assert features.maps[0].shape[2:] == x.shape[2:]
            close("logits", features.extra["logits"], want, 1e-5)
            for stop in range(on.depth + 1):
                state = on.run(x, stop=stop)
                assert state.x.shape[2] == 6 + 2 * min(surround, sum(DILATIONS[stop:]))
                assert torch.equal(on.run(state).maps[0], features.maps[0])

    def test_the_mirror(self) -> None:
        x = torch.arange(4.0).reshape(1, 1, 4)
        assert mirrored(x, 5).tolist() == [[[1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]]]
        assert mirrored(x[..., :1], 2).tolist() == [[[0, 0, 0, 0, 0]]]

    def test_it_is_the_same_backbone_under_another_id(self) -> None:
        plain, around = (load_backbone(f"random:meshnet:model5_gw_ae{q}") for q in ("", "?surround=8"))
        assert plain.spec.fingerprint == around.spec.fingerprint
        assert around.spec.id.endswith("?surround=8")
        with pytest.raises(BadCall) as error:
            load_backbone("random:meshnet:model5_gw_ae?surround=far")
        says(error.value, "surround", "32")
