"""SAM in stages against transformers' own forward, on weights redrawn at unit gain; original checkpoints; other input sizes."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from medgraft.backbones import Backbone, Features, State, load_backbone
from medgraft.backbones.prompts import Prompts
from medgraft.backbones.sam import Sam
from medgraft.backbones.sam_attention import SamAttention
from medgraft.backbones.sam_source import RENAMED, SIZES, draw, network_of, renamed_key, resize, wrap
from medgraft.backbones.sites import Plan, following
from medgraft.errors import BadCall, BadData, UnknownName
from tests.helpers import close, images, says

SMALL = 1e-5


def stock(on: Backbone, side: int) -> Any:
    """transformers' SamModel holding the same tensors, with eager attention."""
    network = network_of(SIZES["tiny"], side)
    network.load_state_dict(on.network.state_dict())
    network.set_attn_implementation("eager")
    return network.eval()


def asked(rows: int, side: int) -> dict[str, Prompts]:
    """Every kind of prompt, two questions an image."""
    g = torch.Generator().manual_seed(1)
    points = torch.rand(rows, 2, 3, 2, generator=g) * side
    labels = torch.tensor([1, 0, -1]).expand(rows, 2, 3)
    low = torch.rand(rows, 2, 2, generator=g) * side / 2
    boxes = torch.cat([low, low + side / 3], 2)
    masks = 4 * torch.randn(rows, 1, side // 4, side // 4, generator=g)
    return {
        "points": Prompts(points, labels),
        "boxes": Prompts(boxes=boxes),
        "both": Prompts(points, labels, boxes),
        "mask": Prompts(points[:, :1], labels[:, :1], masks=masks),
    }


def as_stock(p: Prompts) -> dict[str, Tensor | None]:
    return {"input_points": p.points, "input_labels": p.labels, "input_boxes": p.boxes, "input_masks": p.masks}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("side", [128, 64])
def test_stages_and_decoder_equal_the_stock_model(side: int, rows: int) -> None:
    """64 is half the size that the weights were drawn for, as 512 is of 1024."""
    sam = load_backbone("random:sam-tiny", image_size=side)
    network = stock(sam, side)
    x = images(sam, rows)
    with torch.no_grad():
        features = sam(x)
        close("embedding", features.maps[0], network.vision_encoder(x).last_hidden_state, SMALL)
        for name, prompts in asked(rows, side).items():
            for multimask in (False, True):
                want = network(pixel_values=x, multimask_output=multimask, **as_stock(prompts))
                masks, quality = features.decoder(features.maps[0], prompts, multimask=multimask)
                close(f"{name}: masks", masks, want.pred_masks, SMALL)
                close(f"{name}: IoU", quality, want.iou_scores, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "rows"), [(1024, 1), (1024, 3), (512, 1), (512, 3)])
def test_a_full_sized_sam_equals_the_stock_model(side: int, rows: int) -> None:
    """ViT-B's width, heads, windows of 14 on 64 x 64 and 32 x 32 patches; three of its blocks, one of them global."""
    size = replace(SIZES["vit_b"], depth=3, globals=(1,))
    network = network_of(size)
    draw(network, 0)
    sam = wrap("random:sam:three-blocks", network, network.state_dict(), side, random=True)
    twin = network_of(size)
    draw(twin, 0)
    if side != 1024:
        resize(twin, side)
    twin.eval()
    x = images(sam, rows)
    with torch.no_grad():
        features = sam(x)
        close("embedding", features.maps[0], twin.vision_encoder(x).last_hidden_state, SMALL)
        for name, prompts in asked(rows, side).items():
            want = twin(pixel_values=x, multimask_output=True, **as_stock(prompts))
            close(name, features.decoder(features.maps[0], prompts, multimask=True)[0], want.pred_masks, SMALL)


def test_the_weights_speak(sam: Sam) -> None:
    """What the stock initialisation would hide: every block, the relative positions and each prompt change the answer visibly."""
    x = images(sam, 1)
    with torch.no_grad():
        state = sam.stem(x)
        for _ in range(sam.depth):
            following_state = sam.stage(state)
            assert (following_state.x - state.x).norm() > 0.1 * state.x.norm()
            state = following_state
        embedding = sam(x).maps[0]
        answers = [sam.decoder(embedding, p)[0][:, :1] for p in asked(1, 128).values()]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert (one - other).norm() > 1e-2 * one.norm()


def test_resuming_from_every_stage_gives_the_same_bits(sam: Sam) -> None:
    x = images(sam)
    with torch.no_grad():
        whole = sam(x).maps[0]
        for stop in range(sam.depth + 1):
            state = sam.run(x, stop=stop)
            assert isinstance(state, State)
            features = sam.run(state, start=stop)
            assert isinstance(features, Features)
            assert torch.equal(features.maps[0], whole)


def test_sites_carry_what_they_say(sam: Sam) -> None:
    """Every port is called, sees the widths of its site, and rows come several an image where the site says folded."""
    seen: dict[str, tuple[int, ...]] = {}

    def look(name: str):
        def operation(inner: Any, *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
            seen[name] = tuple(first.shape)
            return inner(*args, **kwargs)

        return operation

    plan = Plan(sam.owner, {s.port: look(s.port) for s in sam.sites.values()})
    with torch.no_grad(), following(plan):
        features = sam(images(sam, 2))
        for multimask in (False, True):
            features.decoder(features.maps[0], asked(2, 128)["boxes"], multimask=multimask)
    assert set(seen) == {s.port for s in sam.sites.values()} == set(sam.called)
    for site in sam.sites.values():
        if site.kind == "linear" and site.span is None:
            assert seen[site.name][-1] == site.fan_in, site
        if site.kind == "conv":
            assert seen[site.name][1] == site.fan_in, site
    for i in range(sam.depth):  # in windows or not, tokens stay in their image's row
        assert seen[f"blocks.{i}.attn.qkv"] == (2, 8, 8, 32)
        assert not sam.sites[f"blocks.{i}.attn.qkv"].folded
    assert seen["decoder.layers.0.self_attn.q"][0] == 2 * 2  # two questions an image


@pytest.mark.parametrize("trained", ["tables", "bias"])
def test_gradients_through_a_windowed_block_equal_the_stock_ones(sam: Sam, trained: str) -> None:
    """Windows of 3 on 8 x 8 patches: the tokens outside feed the bias of the projection, by their keys and values."""
    ours, network = sam.trainable_copy(), stock(sam, 128)
    x = images(sam, 2)
    ours.run(ours.stem(x), stop=1).x.square().sum().backward()
    encoder = network.vision_encoder
    state = encoder.patch_embed(x) + encoder.pos_embed
    encoder.layers[0](state).square().sum().backward()
    attention, theirs = ours.network.vision_encoder.layers[0].attn, encoder.layers[0].attn
    names = {"tables": ("rel_pos_h", "rel_pos_w"), "bias": ("qkv.bias", "qkv.weight", "proj.weight")}[trained]
    for name in names:
        close(name, attention.get_parameter(name).grad, theirs.get_parameter(name).grad, SMALL)


def test_what_acts_at_the_projection_acts_outside_the_image_too(sam: Sam) -> None:
    """A shift at `attn.qkv` is a shift of the keys and values of the tokens outside: the stock model with another bias."""
    network, x, shift = stock(sam, 128), images(sam, 2), torch.linspace(-1, 1, 96)
    network.vision_encoder.layers[0].attn.qkv.bias.data += shift
    plan = Plan(sam.owner, {"blocks.0.attn.qkv": lambda inner, x: inner(x) + shift})
    with torch.no_grad(), following(plan):
        close("embedding", sam(x).maps[0], network.vision_encoder(x).last_hidden_state, SMALL)


def test_a_network_without_relative_positions() -> None:
    """Zero tables that no checkpoint holds, and the same function as transformers'."""
    config = SamVisionConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, image_size=64, use_rel_pos=False
    )
    config._attn_implementation = "eager"
    layer = SamVisionLayer(config, 3)
    x = torch.randn(2, 4, 4, 32)
    with torch.no_grad():
        normed = layer.layer_norm1(x)
        ours = SamAttention(layer.attn, 3)
        close("block", x + ours(normed) + layer.mlp(layer.layer_norm2(x + ours(normed))), layer(x), SMALL)
    assert set(ours.state_dict()) == set(layer.attn.state_dict())


def test_which_path_attention_takes(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDGRAFT_KERNELS", raising=False)
    says(str(sam.network.vision_encoder.layers[0].attn.path(torch.zeros(1, 8, 8, 32))), "not fused", "cpu")
    monkeypatch.setenv("MEDGRAFT_KERNELS", "off")
    says(str(sam.network.vision_encoder.layers[0].attn.path(torch.zeros(1, 8, 8, 32))), "MEDGRAFT_KERNELS=off")


def test_gradients_reach_a_points_coordinates(sam: Sam) -> None:
    with torch.no_grad():
        embedding = sam(images(sam, 1)).maps[0]
    at = torch.tensor([[[[60.0, 40.0]]]], requires_grad=True)
    masks, _ = sam.decoder(embedding, Prompts(at, torch.ones(1, 1, 1, dtype=torch.long)))
    masks.sum().backward()
    assert at.grad is not None
    assert at.grad.abs().min() > 0
    assert not any(p.requires_grad for p in sam.parameters())


# Original checkpoints


INVERSE = {
    r"vision_encoder\.layers\.(\d+)\.layer_norm(\d)\.": r"image_encoder.blocks.\1.norm\2.",
    r"vision_encoder\.layers\.": "image_encoder.blocks.",
    r"vision_encoder\.patch_embed\.projection\.": "image_encoder.patch_embed.proj.",
    r"vision_encoder\.neck\.conv1\.": "image_encoder.neck.0.",
    r"vision_encoder\.neck\.layer_norm1\.": "image_encoder.neck.1.",
    r"vision_encoder\.neck\.conv2\.": "image_encoder.neck.2.",
    r"vision_encoder\.neck\.layer_norm2\.": "image_encoder.neck.3.",
    r"vision_encoder\.pos_embed": "image_encoder.pos_embed",
    r"shared_image_embedding\.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    r"prompt_encoder\.point_embed\.": "prompt_encoder.point_embeddings.",
    r"prompt_encoder\.mask_embed\.conv1\.": "prompt_encoder.mask_downscaling.0.",
    r"prompt_encoder\.mask_embed\.layer_norm1\.": "prompt_encoder.mask_downscaling.1.",
    r"prompt_encoder\.mask_embed\.conv2\.": "prompt_encoder.mask_downscaling.3.",
    r"prompt_encoder\.mask_embed\.layer_norm2\.": "prompt_encoder.mask_downscaling.4.",
    r"prompt_encoder\.mask_embed\.conv3\.": "prompt_encoder.mask_downscaling.6.",
    r"mask_decoder\.transformer\.layer_norm_final_attn\.": "mask_decoder.transformer.norm_final_attn.",
    r"mask_decoder\.transformer\.layers\.(\d)\.layer_norm(\d)\.": r"mask_decoder.transformer.layers.\1.norm\2.",
    r"mask_decoder\.upscale_conv1\.": "mask_decoder.output_upscaling.0.",
    r"mask_decoder\.upscale_layer_norm\.": "mask_decoder.output_upscaling.1.",
    r"mask_decoder\.upscale_conv2\.": "mask_decoder.output_upscaling.3.",
    r"(mask_decoder\.\w+(?:\.\d)?)\.proj_in\.": r"\1.layers.0.",
    r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.0\.": r"\1.layers.1.",
    r"(mask_decoder\.\w+(?:\.\d)?)\.proj_out\.": r"\1.layers.2.",
}
"""The authors' names, written down from METHODS and the checkpoint's own layout, not from the table under test."""


def original(network: Any) -> dict[str, Tensor]:
    """The tensors of a SamModel under the authors' names."""
    found = {}
    for name, t in network.state_dict().items():
        if name.startswith("prompt_encoder.shared_embedding"):
            continue
        for pattern, theirs in INVERSE.items():
            fresh, count = re.subn("^" + pattern, theirs, name)
            if count:
                name = fresh
                break
        found[name] = t.clone()
    return found


def test_an_original_checkpoint_is_the_same_function(sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sam_tiny.pth"
    torch.save(original(sam.network), file)
    loaded = load_backbone(f"sam:tiny@{file}")
    assert isinstance(loaded, Sam)
    assert loaded.spec.id == "sam:tiny"
    x = images(sam, 1)
    with torch.no_grad():
        features, want = loaded(x), sam(x)
        assert torch.equal(features.maps[0], want.maps[0])
        p = asked(1, 128)["both"]
        assert torch.equal(features.decoder(features.maps[0], p)[0], want.decoder(want.maps[0], p)[0])


def test_the_names_of_the_published_file(tmp_path: Path) -> None:
    """The families that the published ViT-B file has, one name each, find their places; its pixel statistics are no weights."""
    names = network_of_names()
    for published in (
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.11.norm1.weight",
        "image_encoder.blocks.2.attn.rel_pos_h",
        "image_encoder.blocks.0.attn.qkv.bias",
        "image_encoder.blocks.0.mlp.lin1.weight",
        "image_encoder.neck.3.bias",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.point_embeddings.3.weight",
        "prompt_encoder.not_a_point_embed.weight",
        "prompt_encoder.mask_downscaling.6.bias",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.transformer.layers.1.norm4.weight",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight",
        "mask_decoder.transformer.final_attn_token_to_image.out_proj.bias",
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.iou_token.weight",
        "mask_decoder.mask_tokens.weight",
        "mask_decoder.output_upscaling.3.weight",
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
        "mask_decoder.iou_prediction_head.layers.1.bias",
    ):
        assert renamed_key(published) in names, published
    assert renamed_key("pixel_mean") is None
    assert len(RENAMED) == len({pattern for pattern, _ in RENAMED})


def network_of_names() -> set[str]:
    with torch.device("meta"):
        return set(network_of(SIZES["vit_b"]).state_dict())


def test_vit_b_has_the_published_number_of_parameters() -> None:
    """93,735,728 numbers, the Gaussian matrix once among them."""
    with torch.device("meta"):
        network = network_of(SIZES["vit_b"])
    own = {n: t for n, t in network.state_dict().items() if not n.startswith("prompt_encoder.shared_embedding")}
    assert len(own) == 314
    assert sum(t.numel() for t in own.values()) == 93_735_728


class Evil:
    def __reduce__(self):  # pragma: no cover - never run
        return (print, ("code ran",))


def test_bad_checkpoints_are_refused(sam: Sam, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.pth"
    with pytest.raises(BadData) as refused:
        load_backbone("sam:vit_b")
    says(refused.value, "sam:vit_b@", "hf:facebook/sam-vit-base")
    with pytest.raises(UnknownName) as unknown_size:
        load_backbone(f"sam:vit_x@{file}")
    says(unknown_size.value, "vit_b")
    with pytest.raises(BadData):
        load_backbone(f"sam:vit_b@{file}")  # no such file
    torch.save(original(sam.network), file)
    with pytest.raises(BadData) as size:
        load_backbone(f"sam:vit_b@{file}")
    says(size.value, "holds a SAM tiny", "sam:tiny@")
    short = original(sam.network)
    del short["mask_decoder.iou_token.weight"]
    torch.save(short, file)
    with pytest.raises(BadData) as lost:
        load_backbone(f"sam:tiny@{file}")
    says(lost.value, "1 tensors missing", "iou_token")
    file.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(BadData) as evil:
        load_backbone(f"sam:tiny@{file}")
    says(evil.value, "refused")
    torch.save({"model": Evil()}, file)
    with pytest.raises(BadData):
        load_backbone(f"sam:tiny@{file}")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(BadCall):
        load_backbone("random:sam-tiny", image_size=100)
    with pytest.raises(BadCall):
        load_backbone("sam-tiny:")


def test_a_transformers_directory_loads(sam: Sam, tmp_path: Path) -> None:
    sam_dir = tmp_path / "sam"
    network = network_of(SIZES["tiny"])
    network.load_state_dict(sam.network.state_dict())
    network.save_pretrained(sam_dir)
    loaded = load_backbone(f"hf:someone/tiny-sam@{sam_dir}", image_size=64)
    assert isinstance(loaded, Sam)
    assert loaded.spec.id == "hf:someone/tiny-sam"
    assert loaded.spec.image_size == 64
    again = load_backbone(f"hf:someone/tiny-sam@{sam_dir}")
    assert again.spec.fingerprint == loaded.spec.fingerprint  # another input size is the same backbone
    x = images(sam, 1)
    with torch.no_grad():
        assert torch.equal(again(x).maps[0], sam(x).maps[0])
    tensors = {n: t for n, t in network.state_dict().items() if "iou_token" not in n and "shared_embedding" not in n}
    save_file({n: t.contiguous() for n, t in tensors.items()}, sam_dir / "model.safetensors")
    with pytest.raises(BadData) as lost:
        load_backbone(f"hf:someone/tiny-sam@{sam_dir}")
    says(lost.value, "iou_token")


def test_prompts_that_do_not_fit(sam: Sam) -> None:
    x = images(sam, 2)
    embedding = sam(x).maps[0]
    point, label = torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, dtype=torch.long)
    for wrong, words in (
        ({"points": point}, ("labels",)),
        ({"points": point, "labels": 2 * label}, ("label", "2")),
        ({"points": point, "labels": label[:, :, 0]}, ("labels",)),
        ({"boxes": torch.zeros(2, 1, 3)}, ("x0, y0, x1, y1",)),
        ({"points": point, "labels": label, "boxes": torch.zeros(3, 1, 4)}, ("numbers of images",)),
        ({"points": point, "labels": label, "boxes": torch.zeros(2, 2, 4)}, ("questions",)),
    ):
        with pytest.raises(BadCall) as error:
            Prompts(**wrong)
        says(error.value, *words)
    with pytest.raises(BadCall) as size:
        sam.decoder(embedding, Prompts(masks=torch.zeros(2, 1, 16, 16)))
    says(size.value, "32 x 32", "16 x 16")
    with pytest.raises(BadCall) as rows:
        sam.prompted(sam.stem(x), Prompts(boxes=torch.zeros(3, 1, 4)))
    says(rows.value, "3", "2")


def test_a_backbone_without_a_decoder_says_so(vit: Backbone) -> None:
    with pytest.raises(BadCall) as error:
        vit.prompted(vit.stem(images(vit, 1)), Prompts(boxes=torch.zeros(1, 1, 4)))
    says(error.value, "no promptable decoder", "SAM")
