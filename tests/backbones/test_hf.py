"""Checkpoints in transformers' form, made with its own `save_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from medgraft.adapters import Host
from medgraft.backbones import load_backbone
from medgraft.backbones.identity import fingerprint
from medgraft.errors import BadCall, BadData
from tests.helpers import adapter, says

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "initializer_range": 0.2,
}
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(intermediate_size=64, **SMALL)),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(intermediate_size=64, **SMALL)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **SMALL)),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL)),
}


@pytest.fixture(params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path / "checkpoint")
    return model, tmp_path / "checkpoint"


def test_a_directory_gives_transformers_own_output(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    model, where = checkpoint
    on = load_backbone(f"hf:lab/tiny@{where}")
    base = model.base_model
    options = {"interpolate_pos_encoding": True} if model.config.model_type == "vit" else {}
    for shape in ((32, 32), (48, 64)):
        x = torch.randn(2, 3, *shape)
        with torch.no_grad():
            assert torch.equal(on(x).tokens, base(x, **options).last_hidden_state)
    assert on.spec.id == "hf:lab/tiny"
    assert str(where) not in repr(on)
    assert (on.spec.image_size, on.spec.divisor, on.spec.width, on.spec.random) == (32, 8, 32, False)
    assert on.spec.fingerprint == fingerprint(load_file(where / "model.safetensors"))
    assert load_backbone(f"hf:lab/tiny@{where}", image_size=64).spec.fingerprint == on.spec.fingerprint


def test_an_adapter_works_there(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    on = load_backbone(f"hf:lab/tiny@{checkpoint[1]}")
    host = Host(on)
    host.add(adapter(on), "a")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        folded = host.folded("a")(x)
        assert torch.allclose(folded, host(x, adapter="a"), atol=1e-4)


def test_it_normalises_as_the_checkpoint_says(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    where = checkpoint[1]
    assert load_backbone(f"hf:x@{where}").spec.mean == (0.5, 0.5, 0.5)
    (where / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    spec = load_backbone(f"hf:x@{where}").spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_half_precision_is_run_in_single(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    model, where = checkpoint
    model.half().save_pretrained(where)
    on = load_backbone(f"hf:x@{where}")
    assert {p.dtype for p in on.parameters()} == {torch.float32}
    assert on.spec.fingerprint == fingerprint(load_file(where / "model.safetensors"))


def change(where: Path, edit) -> None:
    tensors = load_file(where / "model.safetensors")
    edit(tensors)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_loads_completely_or_not_at_all(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    where = checkpoint[1]
    last = next(
        n
        for n in sorted(load_file(where / "model.safetensors"), reverse=True)
        if "layernorm" in n and n.endswith("weight")
    )
    kept: list[torch.Tensor] = []
    change(where, lambda t: kept.append(t.pop(last)))
    with pytest.raises(BadData) as refused:
        load_backbone(f"hf:x@{where}")
    says(refused.value, "hf:x", "1 tensors missing", "layernorm", "complete")
    change(where, lambda t: t.update({last: kept[0], "encoder.exploration_head": torch.zeros(2)}))
    with pytest.raises(BadData) as refused:
        load_backbone(f"hf:x@{where}")
    says(refused.value, "hf:x", "1 not understood", "exploration_head")
    change(where, lambda t: (t.pop("encoder.exploration_head"), t.update({last: torch.zeros(7)})))
    with pytest.raises(BadData) as refused:
        load_backbone(f"hf:x@{where}")
    says(refused.value, "hf:x", "does not fit")


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (None, BadData, ("no configuration", "hf:x@PATH")),
        ("{", BadData, ("configuration",)),
        ("[]", BadData, ("configuration",)),
        ("{}", BadData, ("configuration",)),
        ('{"model_type": "bert"}', BadCall, ("'bert'", "supported", "vit, dinov2")),
        ('{"model_type": "no such thing"}', BadData, ("configuration",)),
    ],
)
def test_a_directory_that_is_something_else(
    config: str | None, error: type[Exception], words: tuple[str, ...], tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error) as refused:
        load_backbone(f"hf:x@{tmp_path}")
    says(refused.value, *words)


def test_a_directory_without_weights(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    (checkpoint[1] / "model.safetensors").unlink()
    with pytest.raises(BadData) as refused:
        load_backbone(f"hf:x@{checkpoint[1]}")
    says(refused.value, "model.safetensors", "no such file")


def test_a_pickle_beside_it_is_not_read(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    model, where = checkpoint
    torch.save(model.state_dict(), where / "pytorch_model.bin")
    (where / "model.safetensors").unlink()
    with pytest.raises(BadData, match="no such file"):
        load_backbone(f"hf:x@{where}")


def test_code_beside_it_is_not_run(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    where = checkpoint[1]
    config = json.loads((where / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    }
    (where / "config.json").write_text(json.dumps(config))
    (where / "evil.py").write_text(f"open({str(where / 'it ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    load_backbone(f"hf:x@{where}")
    assert not (where / "it ran").exists()
