"""peft, both ways: what is exported loads in plain peft, what peft wrote loads here, with the same outputs; the rest is refused."""

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medgraft.adapters import (
    Adapter,
    Bottleneck,
    ClassifierHead,
    Host,
    LinearHead,
    LoRA,
    Part,
    ScaleShift,
    Task,
    Tuned,
)
from medgraft.adapters import peft as ours
from medgraft.adapters.peft import (
    export_peft,
    features_of,
    import_peft,
    peft_files,
    quiet,
    statement,
    why_not_exportable,
)
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadAdapter, BadCall, MedgraftError
from tests import helpers

IDS = ["random:timm:vit_tiny_patch16_224", "random:hf:vit"]
POLYP = Task("segment", ("polyp",))
GRADES = Task("classify", ("none", "mild", "severe"))
LAST = ["blocks.2.attn.q", "blocks.2.attn.v"]


@pytest.fixture(scope="module", params=IDS, ids=["timm", "hf"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param, image_size=64)


@pytest.fixture(scope="module")
def timm_vit() -> Backbone:
    return load_backbone(IDS[0], image_size=64)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """What peft says inside must not reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def shaken(adapter: Adapter, amount: float = 0.05) -> Adapter:
    """Random numbers in the place of a training."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in adapter.parameters():
            t.add_(amount * torch.randn(t.shape, generator=g))
    return adapter


def scales_only(part: ScaleShift) -> ScaleShift:
    """`part` as it would be after a training without shifts."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for site in part.sites:
            scale = part.cell(site).scale
            scale.copy_(1 + 0.2 * torch.randn(scale.shape, generator=g))
    return part


def images(n: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


Make = Callable[[Backbone], dict[str, Part]]


def lora(**options: Any) -> Make:
    return lambda b: {"lora": LoRA.on(b, POLYP, **{"rank": 4, **options})}


def tuned(*targets: str, tensors: tuple[str, ...] = ("weight", "bias")) -> Make:
    return lambda b: {"tuned": Tuned.on(b, POLYP, targets=targets, tensors=tensors)}


def both(*makes: Make) -> Make:
    return lambda b: {f"{k}{i}": part for i, make in enumerate(makes) for k, part in make(b).items()}


EXPORTS: dict[str, tuple[str, Make]] = {
    "LoRA on q and v": ("LORA", lora()),
    "LoRA on q alone": ("LORA", lora(targets="*.attn.q")),
    "LoRA on the last block": ("LORA", lora(targets=LAST)),
    "LoRA on the MLP, alpha 3": ("LORA", lora(targets=["*.mlp.fc1", "*.mlp.fc2"], alpha=3)),
    "rsLoRA on q, v, proj": ("LORA", lora(targets=["*.attn.q", "*.attn.v", "*.attn.proj"], rank=3, rslora=True)),
    "DoRA on q and v": ("LORA", lora(dora=True)),
    "DoRA and rsLoRA on fc1": ("LORA", lora(dora=True, rslora=True, targets="*.mlp.fc1")),
    "two LoRA of other ranks": ("LORA", both(lora(targets="*.attn.q"), lora(targets="*.mlp.fc2", rank=2, rslora=True))),
    "two LoRA on one layer": ("LORA", both(lora(targets="*.attn.v"), lora(targets="*.attn.v", rank=2, alpha=5))),
    "LoRA and norms": ("LORA", both(tuned("*.norm1", "norm"), lora())),
    "biases of linear layers": ("BEFT", tuned("*.mlp.fc1", "*.attn.proj", tensors=("bias",))),
    "scales of linear layers": (
        "IA3",
        lambda b: {"s": scales_only(ScaleShift.on(b, POLYP, targets=["*.attn.v", "*.mlp.fc1"]))},
    ),
    "norms": ("LN_TUNING", tuned("*.norm1", "*.norm2", "norm")),
    "biases of norms": ("LN_TUNING", tuned("*.norm1", tensors=("bias",))),
    "a whole linear layer": ("LN_TUNING", tuned("blocks.2.mlp.fc2")),
}


def export_row(name: str, backbone: Backbone, directory: Path) -> dict[str, Any]:
    """One row of the export table: written, loaded by plain peft on a fresh network, compared."""
    method, make = EXPORTS[name]
    parts = make(backbone)
    adapter = Adapter.of(backbone, POLYP, {**parts, "head": LinearHead.on(backbone, POLYP)})
    if method != "IA3":
        shaken(adapter)
    report = export_peft(adapter, backbone, directory)
    assert report is not None, why_not_exportable(adapter, backbone)
    twin = backbone.plain_copy(lambda site, base: base, share=False)
    with quiet():
        PeftModel.from_pretrained(twin.network, str(directory), torch_device="cpu").eval()
    x = images()
    with torch.no_grad():
        got, want, bare = twin(x).maps[-1], features_of(adapter, backbone, x).maps[-1], backbone(x).maps[-1]
    return {
        "name": name,
        "type": report["peft_type"],
        "difference": float((got - want).abs().max()),
        "effect": float((want - bare).abs().max()),
        "bytes": report["bytes"]["adapter_model.safetensors"],
        "report": report,
        "adapter": adapter,
    }


def export_table(backbone: Backbone, directory: Path) -> str:
    """The export table in Markdown: python -c "from tests.adapters.test_peft import *; print(tables())"."""
    rows = [export_row(name, backbone, directory / str(i)) for i, name in enumerate(EXPORTS)]
    lines = [
        f"| {backbone.spec.id} | peft type | largest difference | adapter changes | bytes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['type']} | {r['difference']:.1e} | {r['effect']:.2f} | {r['bytes']:,} |" for r in rows
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("name", EXPORTS)
def test_export_is_what_plain_peft_computes(name: str, backbone: Backbone, tmp_path: Path) -> None:
    digest = backbone.digest()
    row = export_row(name, backbone, tmp_path / "a")
    assert row["type"] == EXPORTS[name][0]
    assert row["effect"] > 0.02, "the comparison would pass without any adapter"
    assert row["difference"] < 2e-5 < row["effect"] / 100
    assert row["report"]["head"] is None
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert backbone.digest() == digest, "the backbone never changes"
    assert why_not_exportable(row["adapter"]) is None


@pytest.mark.parametrize("name", [n for n, (method, _) in EXPORTS.items() if method == "LORA"])
def test_export_and_import_give_the_adapter_back(name: str, backbone: Backbone, tmp_path: Path) -> None:
    adapter = export_row(name, backbone, tmp_path)["adapter"]
    back = import_peft(tmp_path, backbone, POLYP)
    x = images()
    torch.testing.assert_close(
        features_of(back, backbone, x).maps[-1], features_of(adapter, backbone, x).maps[-1], atol=2e-5, rtol=0
    )
    assert back.provenance["head"] == "fresh, untrained"
    assert isinstance(back.readouts[-1], LinearHead)


def test_config_holds_nothing_but_peft(timm_vit: Backbone, tmp_path: Path) -> None:
    export_row("two LoRA of other ranks", timm_vit, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(LoraConfig(target_modules=["x"]).to_dict())
    assert config["base_model_name_or_path"] is None, "random weights are on no hub"
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.blocks.{i}.{m}.lora_{f}.weight"
        for i in range(12)
        for m in ("attn.qkv", "mlp.fc2")
        for f in "AB"
    }


def test_targets_are_exact(timm_vit: Backbone, tmp_path: Path) -> None:
    """`blocks.1` must not become `blocks.11`, `norm` not `q_norm`."""
    adapter = shaken(
        Adapter.of(
            timm_vit,
            POLYP,
            {"t": Tuned.on(timm_vit, POLYP, targets=["norm", "blocks.1.norm1"]), "h": LinearHead.on(timm_vit, POLYP)},
        )
    )
    export_peft(adapter, timm_vit, tmp_path)
    twin = timm_vit.plain_copy(lambda site, base: base, share=False)
    with quiet():
        model = PeftModel.from_pretrained(twin.network, str(tmp_path), torch_device="cpu")
    wrapped = [name for name, m in model.named_modules() if type(m).__name__ == "LNTuningLayer"]
    assert wrapped == ["base_model.model.blocks.1.norm1", "base_model.model.norm"]


def test_half_precision_where_it_loses_nothing(timm_vit: Backbone, tmp_path: Path) -> None:
    adapter = shaken(
        Adapter.of(timm_vit, POLYP, {"lora": LoRA.on(timm_vit, POLYP), "head": LinearHead.on(timm_vit, POLYP)})
    )
    save_adapter(adapter, tmp_path / "half")
    stored = read_adapter(tmp_path / "half")
    for subject, dtype in ((adapter, torch.float32), (stored, torch.float16)):
        export_peft(subject, timm_vit, tmp_path / str(dtype))
        assert {t.dtype for t in load_file(tmp_path / str(dtype) / "adapter_model.safetensors").values()} == {dtype}
    export_peft(adapter, timm_vit, tmp_path / "asked", dtype="float16")
    a, b = (tmp_path / d / "adapter_model.safetensors" for d in ("asked", "torch.float16"))
    assert a.read_bytes() == b.read_bytes()


def test_export_beside_an_adapter(timm_vit: Backbone, tmp_path: Path) -> None:
    adapter = shaken(
        Adapter.of(timm_vit, POLYP, {"lora": LoRA.on(timm_vit, POLYP), "head": LinearHead.on(timm_vit, POLYP)})
    )
    save_adapter(adapter, tmp_path / "a")
    stored = read_adapter(tmp_path / "a")
    assert export_peft(stored, timm_vit, tmp_path / "a") is not None
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again, x = read_adapter(tmp_path / "a"), images()
    assert torch.equal(features_of(again, timm_vit, x).pooled, features_of(stored, timm_vit, x).pooled)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(BadCall, match="not an adapter's"):
        export_peft(stored, timm_vit, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_another_precision_of_the_backbone(tmp_path: Path) -> None:
    """Verified in float32, whatever the backbone runs in."""
    backbone = load_backbone("random:hf:vit", image_size=64).to(torch.bfloat16)
    parts = {"lora": LoRA.on(backbone, POLYP, dora=True), "head": LinearHead.on(backbone, POLYP)}
    digest, report = backbone.digest(), export_peft(shaken(Adapter.of(backbone, POLYP, parts)), backbone, tmp_path)
    assert report is not None
    assert report["relative"] < 1e-5
    assert report["modules"] == 6
    assert backbone.digest() == digest


def test_statement_builds_the_network(tmp_path: Path) -> None:
    """What the card tells the owner of plain peft to do, done: for the backbone that ships, by weights from its file."""
    import timm

    backbone = load_backbone("medgraft:starter-vit")
    adapter = shaken(
        Adapter.of(backbone, GRADES, {"l": LoRA.on(backbone, GRADES), "h": ClassifierHead.on(backbone, GRADES)})
    )
    report = export_peft(adapter, backbone, tmp_path)
    (line,) = [line for line in statement(adapter, report) if line.startswith("Load: ")]
    network = eval(line.partition("from_pretrained(")[2].partition(", DIRECTORY")[0], {"timm": timm})
    weights = load_file(str(files("medgraft") / "weights" / "starter_vit.safetensors"))
    assert set(network.load_state_dict(weights, strict=False).missing_keys) == {"head.weight", "head.bias"}
    with quiet():
        model = PeftModel.from_pretrained(network, str(tmp_path), torch_device="cpu").eval()
    host, x = Host(backbone), images()
    host.add(adapter, "a")
    with torch.no_grad():
        torch.testing.assert_close(model(x), host(x, "a"), atol=2e-5, rtol=0)


def test_statement_knows_the_network(tmp_path: Path) -> None:
    """Without it, a final norm beside LoRA looks exportable; in a Swin peft would take `patch_embed.norm` for it too."""
    swin = helpers.backbone("swin")
    parts = {
        "norm": Tuned.on(swin, POLYP, targets="norm"),
        "lora": LoRA.on(swin, POLYP),
        "head": LinearHead.on(swin, POLYP),
    }
    adapter = Adapter.of(swin, POLYP, parts)
    assert export_peft(adapter, swin, tmp_path / "x") is None
    assert "patch_embed.norm" in statement(adapter, None, swin)[0]


# The head


@pytest.mark.parametrize("rank", [4])
def test_classifier_goes_along(backbone: Backbone, rank: int, tmp_path: Path) -> None:
    adapter = shaken(
        Adapter.of(
            backbone,
            GRADES,
            {"lora": LoRA.on(backbone, GRADES, rank=rank), "head": ClassifierHead.on(backbone, GRADES)},
        )
    )
    report = export_peft(adapter, backbone, tmp_path)
    assert report is not None
    assert report["head"] == ("head" if backbone.family == "vit" else "classifier")
    network: Any = backbone.plain_copy(lambda site, base: base, share=False).network
    if backbone.family == "vit":
        network.reset_classifier(3)
    else:
        from transformers import ViTForImageClassification

        config = network.config
        config.num_labels = 3
        whole = ViTForImageClassification(config)
        whole.vit = network
        network = whole
    with quiet():
        model = PeftModel.from_pretrained(network, str(tmp_path), torch_device="cpu").eval()
    host = Host(backbone)
    host.add(adapter, "a")
    x = images()
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(getattr(out, "logits", out), host(x, "a"), atol=2e-5, rtol=0)
    back = import_peft(tmp_path, backbone)
    assert back.provenance["head"] == "imported"
    assert back.task == Task("classify", ("class_0", "class_1", "class_2"))
    host.add(back, "back")
    with torch.no_grad():
        torch.testing.assert_close(host(x, "back"), host(x, "a"), atol=2e-5, rtol=0)
    named = import_peft(tmp_path, backbone, GRADES)
    assert named.task == GRADES
    with pytest.raises(BadCall, match="3 outputs"):
        import_peft(tmp_path, backbone, Task("classify", ("a", "b")))


def test_head_stays_where_no_network_has_it(tmp_path: Path) -> None:
    """DINOv2's classifier reads the cls token and the mean of the patches; a cosine head is in no network."""
    dinov2 = load_backbone("random:hf:dinov2", image_size=64)
    vit = load_backbone("random:hf:vit", image_size=64)
    for backbone, form in ((dinov2, "linear"), (vit, "cosine")):
        adapter = shaken(
            Adapter.of(
                backbone,
                GRADES,
                {"lora": LoRA.on(backbone, GRADES), "head": ClassifierHead.on(backbone, GRADES, form=form)},
            )
        )
        report = export_peft(adapter, backbone, tmp_path / form)
        assert report is not None
        assert report["head"] is None
        assert any("head is not reproduced" in line for line in statement(adapter, report))


# What has no exact form


def test_refusals_name_the_reason(timm_vit: Backbone, tmp_path: Path) -> None:
    b = timm_vit
    cases: dict[str, dict[str, Part]] = {
        "no peft type": {"b": Bottleneck.on(b, POLYP)},
        "shift of": {"s": ScaleShift.on(b, POLYP, targets="*.mlp.fc1")},
        "two peft types": {"s": ScaleShift.on(b, POLYP, targets="*.mlp.fc1"), "lora": LoRA.on(b, POLYP)},
        "beside other copies": {"t": Tuned.on(b, POLYP, targets=["*.norm1", "*.mlp.fc1"], tensors=("bias",))},
        "frozen numbers": {
            "lora": LoRA.on(b, POLYP),
            "t": Tuned.on(b, POLYP, targets=["*.mlp.fc1"], tensors=("bias",)),
        },
        "use_dora": {"d": LoRA.on(b, POLYP, targets="*.mlp.fc1", dora=True), "lora": LoRA.on(b, POLYP)},
        "both tuned and under LoRA": {
            "t": Tuned.on(b, POLYP, targets="*.mlp.fc1"),
            "l": LoRA.on(b, POLYP, targets="*.mlp.fc1"),
        },
        "acts at no site": {},
    }
    for reason, parts in cases.items():
        adapter = shaken(Adapter.of(b, POLYP, {**parts, "head": LinearHead.on(b, POLYP)}))
        assert reason in str(why_not_exportable(adapter, b)), reason
        assert export_peft(adapter, b, tmp_path / "x") is None
        assert not (tmp_path / "x").exists()
        if why_not_exportable(adapter) is not None:
            assert statement(adapter)[0].startswith("Not loadable by plain peft: ")


def test_a_mismatch_is_an_error_and_writes_nothing(
    timm_vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong factor in the file, as a bug would write it, also of an adapter that changes next to nothing."""
    right = ours._lora_form

    def wrong(adapter: Adapter, backbone: Backbone) -> Any:
        options, tensors, saved = right(adapter, backbone)
        return {**options, "lora_alpha": options["lora_alpha"] * 1.1}, tensors, saved

    monkeypatch.setattr(ours, "_lora_form", wrong)
    for amount in (0.05, 0.002):
        adapter = shaken(
            Adapter.of(timm_vit, POLYP, {"lora": LoRA.on(timm_vit, POLYP), "head": LinearHead.on(timm_vit, POLYP)}),
            amount,
        )
        with pytest.raises(BadAdapter, match="other outputs"):
            export_peft(adapter, timm_vit, tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_statement_for_the_card(timm_vit: Backbone) -> None:
    adapter = shaken(
        Adapter.of(timm_vit, POLYP, {"lora": LoRA.on(timm_vit, POLYP), "head": LinearHead.on(timm_vit, POLYP)})
    )
    made = peft_files(adapter, timm_vit)
    assert made is not None
    for report in (None, made[1]):
        text = "\n".join(statement(adapter, report))
        for fact in (
            "LORA",
            'timm.create_model("vit_tiny_patch16_224"',
            "head (linear_head)",
            "64 x 64",
            "1 = polyp",
            "random weights",
        ):
            assert fact in text, fact


# Import: what peft itself wrote


def plain_network(backbone: Backbone, classes: int = 0) -> nn.Module:
    network: Any = backbone.plain_copy(lambda site, base: base, share=False).network
    if classes:
        network.reset_classifier(classes)
    return network


def peft_wrote(network: nn.Module, directory: Path, **config: Any) -> nn.Module:
    """A LoRA adapter trained and saved by peft, so to speak."""
    with quiet():
        model = get_peft_model(network, LoraConfig(**{"lora_dropout": 0.1, **config}))  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_magnitude" in name:
                    p.mul_(1 + 0.1 * torch.randn(p.shape, generator=g))
                elif p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
        model.save_pretrained(str(directory))
    return model.eval()


IMPORTS: dict[str, dict[str, Any]] = {
    "LoRA, list of targets": {
        "target_modules": ["qkv", "proj"],
        "exclude_modules": "patch_embed.proj",
        "r": 8,
        "lora_alpha": 12,
    },
    "LoRA, regex": {"target_modules": r"blocks\.(8|9|10|11)\.mlp\.fc[12]", "r": 4},
    "LoRA, all-linear": {"target_modules": "all-linear", "r": 2},
    "rsLoRA": {"target_modules": ["qkv"], "r": 3, "use_rslora": True},
    "DoRA": {"target_modules": ["qkv", "fc1"], "r": 4, "use_dora": True},
    "rank_pattern and alpha_pattern": {
        "target_modules": ["qkv", "fc1"],
        "r": 4,
        "rank_pattern": {"fc1": 2, r"^blocks\.1\.attn\.qkv": 6},
        "alpha_pattern": {r"blocks\.\d+\.attn\.qkv": 5},
    },
    "layers_to_transform": {"target_modules": ["qkv"], "layers_to_transform": [1, 11], "layers_pattern": "blocks"},
    "norms in modules_to_save": {"target_modules": ["qkv"], "modules_to_save": ["norm1", "norm2"]},
}


def import_row(name: str, backbone: Backbone, directory: Path) -> tuple[float, float, Adapter]:
    """(largest difference to plain peft, what the adapter changes, the adapter)."""
    model = peft_wrote(plain_network(backbone), directory, **IMPORTS[name])
    adapter = import_peft(directory, backbone)
    x = images()
    with torch.no_grad():
        want, bare = model(x), backbone(x).pooled
    got = features_of(adapter, backbone, x).pooled
    return float((got - want).abs().max()), float((want - bare).abs().max()), adapter


def tables() -> str:
    """Both tables in Markdown; the numbers of the report."""
    from tempfile import TemporaryDirectory

    out = []
    with TemporaryDirectory() as place:
        for i, id in enumerate(IDS):
            out.append(export_table(load_backbone(id, image_size=64), Path(place) / f"e{i}"))
        backbone = load_backbone(IDS[0], image_size=64)
        rows = {n: import_row(n, backbone, Path(place) / f"i{i}") for i, n in enumerate(IMPORTS)}
    lines = ["| written by peft | largest difference | adapter changes |", "|---|---|---|"]
    lines += [f"| {name} | {row[0]:.1e} | {row[1]:.2f} |" for name, row in rows.items()]
    return "\n\n".join([*out, "\n".join(lines)])


@pytest.mark.parametrize("name", IMPORTS)
def test_import_is_what_peft_computes(name: str, timm_vit: Backbone, tmp_path: Path) -> None:
    difference, effect, adapter = import_row(name, timm_vit, tmp_path)
    assert effect > 0.02
    assert difference < 2e-5 < effect / 100
    assert adapter.provenance["head"] == "fresh, untrained"
    save_adapter(adapter, tmp_path / "ours", dtype="float32", backbone=timm_vit)
    x = images()
    again = read_adapter(tmp_path / "ours")
    assert torch.equal(features_of(again, timm_vit, x).pooled, features_of(adapter, timm_vit, x).pooled)


def test_import_does_without_peft(
    written: Any, timm_vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *written)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert import_peft(tmp_path, timm_vit).parts["lora"].config["rank"] == 4


def test_import_of_a_timm_classifier(timm_vit: Backbone, tmp_path: Path) -> None:
    model = peft_wrote(plain_network(timm_vit, 300), tmp_path, target_modules=["qkv"], modules_to_save=["head"])
    adapter = import_peft(tmp_path, timm_vit)
    assert adapter.provenance == {"source": "peft LORA", "head": "imported"}
    host = Host(timm_vit)
    host.add(adapter, "a")
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(host(x, "a"), model(x), atol=5e-5, rtol=0)
    other = import_peft(tmp_path, timm_vit, POLYP)
    assert other.provenance["head"] == "fresh, untrained"
    assert other.provenance["left_out"] == ["head"]


@pytest.mark.parametrize("release", ["now", "before 5"])
def test_import_of_a_transformers_classifier(release: str, tmp_path: Path) -> None:
    """Below the prefix `vit.`, and by the names that transformers used until its release 5."""
    from transformers import ViTForImageClassification

    backbone = load_backbone("random:hf:vit", image_size=64)
    network: Any = plain_network(backbone)
    network.config.num_labels = 4
    whole = ViTForImageClassification(network.config)
    whole.vit = network
    options = {"target_modules": ["q_proj", "v_proj", "mlp.fc1"], "modules_to_save": ["classifier"]}
    model = peft_wrote(whole, tmp_path, use_dora=True, **options)
    if release == "before 5":
        names = {
            "layers.": "encoder.layer.",
            "attention.q_proj": "attention.attention.query",
            "attention.v_proj": "attention.attention.value",
            "mlp.fc1": "intermediate.dense",
        }
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        for new, old in names.items():
            tensors = {name.replace(new, old): t for name, t in tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["target_modules"] = ["query", "value", "intermediate.dense"]
        config["base_model_name_or_path"] = "google/vit-base-patch16-224"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = import_peft(tmp_path, backbone)
    host = Host(backbone)
    host.add(adapter, "a")
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(host(x, "a"), model(x).logits, atol=2e-5, rtol=0)
    assert adapter.provenance["head"] == "imported"
    assert adapter.provenance.get("base_model") == ("google/vit-base-patch16-224" if release == "before 5" else None)


# Import: what is refused


@pytest.fixture(scope="module")
def written(timm_vit: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    place = tmp_path_factory.mktemp("peft")
    peft_wrote(plain_network(timm_vit), place, target_modules=["qkv"], r=4)
    return json.loads((place / "adapter_config.json").read_text()), load_file(place / "adapter_model.safetensors")


def put(directory: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    (directory / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "None"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_day": 1}, "some_day"),
        ({"r": 5}, "rank 5"),
        ({"r": "4"}, "no usable number"),
        ({"r": True}, "no usable number"),
        ({"lora_alpha": [1]}, "no usable number"),
        ({"lora_dropout": 1.5}, "no usable number"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"use_dora": True}, "magnitude"),
        ({"use_rslora": "yes"}, "true or false"),
        ({"target_modules": ["fc1"]}, "target_modules does not name"),
        ({"target_modules": 7}, "target_modules"),
        ({"target_modules": "(a+)+$"}, "too complex"),
        ({"target_modules": "(((qkv"}, "no regular expression"),
        ({"alpha_pattern": {"(.*a)*b": 3}}, "too complex"),
    ],
    ids=str,
)
def test_refused_config(change: dict[str, Any], said: str, written: Any, timm_vit: Backbone, tmp_path: Path) -> None:
    config, tensors = written
    with pytest.raises(BadAdapter, match="(?s).*" + said.replace("(", r"\(")):
        import_peft(put(tmp_path, config | change, tensors), timm_vit)


def test_refused_files(written: Any, timm_vit: Backbone, tmp_path: Path) -> None:
    config, tensors = written
    first = next(iter(tensors))
    other = {
        "no site": {first.replace("blocks.0.attn.qkv", "patch_embed.proj"): tensors[first], **tensors},
        "not finite": {**tensors, first: tensors[first] * math.nan},
        "names begin with": {"blocks.0.attn.qkv.lora_A.weight": tensors[first]},
        "not understood": {**tensors, "base_model.model.blocks.0.attn.qkv.lora_embedding_A": tensors[first]},
        "holds A;": {n: t for n, t in tensors.items() if n != first.replace("lora_A", "lora_B")},
        "does not name": {**tensors, "base_model.model.head.weight": torch.zeros(3, 192)},
        "no LoRA factors": {"base_model.model.norm.weight": torch.zeros(192)},
        "several networks": {n.replace("model.blocks.0", "model.a.blocks.0"): t for n, t in tensors.items()},
        "must be": {n: t[:, :100] if "lora_A" in n else t for n, t in tensors.items()},
    }
    for said, changed in other.items():
        with pytest.raises(BadAdapter, match=said):
            import_peft(put(tmp_path, config, changed), timm_vit)
    saves = config | {"modules_to_save": ["cls_token", "patch_embed"]}
    with pytest.raises(BadAdapter, match=r"replaces patch_embed\.proj"):
        import_peft(
            put(tmp_path, saves, {**tensors, "base_model.model.patch_embed.proj.weight": torch.zeros(1)}), timm_vit
        )
    for text, said in (
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"r": NaN}', "not valid JSON"),
        ("[" * 99, "nested"),
    ):
        with pytest.raises(BadAdapter, match=said):
            import_peft(put(tmp_path, text, tensors), timm_vit)
    put(tmp_path, config, tensors)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(BadAdapter):
            import_peft(tmp_path, timm_vit)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadAdapter, match="pickle"):
        import_peft(tmp_path, timm_vit)
    with pytest.raises(BadAdapter, match=r"adapter_config\.json cannot be read"):
        import_peft(tmp_path / "nowhere", timm_vit)


def test_mutated_files_are_read_or_refused(written: Any, timm_vit: Backbone, tmp_path: Path) -> None:
    """Bytes flipped at random: never another error than ours."""
    config, tensors = written
    put(tmp_path, config, {n: t for n, t in tensors.items() if "blocks.0." in n})
    files = {p: p.read_bytes() for p in sorted(tmp_path.iterdir())}
    g = torch.Generator().manual_seed(0)
    refused = 0
    for i in range(150):
        path = list(files)[i % 2]
        content = bytearray(files[path])
        where = len(content) if i % 2 == 0 else 600
        content[int(torch.randint(where, (), generator=g))] = int(torch.randint(256, (), generator=g))
        path.write_bytes(bytes(content))
        try:
            import_peft(tmp_path, timm_vit)
        except MedgraftError:
            refused += 1
        path.write_bytes(files[path])
    assert refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("id", ["random:timm:swin_tiny_patch4_window7_224", "random:timm:vit_small_patch16_dinov3"])
def test_other_families(id: str, tmp_path: Path) -> None:
    backbone = load_backbone(id)
    adapter = shaken(
        Adapter.of(
            backbone,
            GRADES,
            {"lora": LoRA.on(backbone, GRADES, dora=True), "head": ClassifierHead.on(backbone, GRADES)},
        )
    )
    report = export_peft(adapter, backbone, tmp_path)
    assert report is not None
    assert report["head"] == ("head.fc" if "swin" in id else None)
    back = import_peft(tmp_path, backbone)
    x = torch.randn(1, 3, backbone.spec.image_size, backbone.spec.image_size)
    torch.testing.assert_close(
        features_of(back, backbone, x).pooled, features_of(adapter, backbone, x).pooled, atol=5e-5, rtol=0
    )
