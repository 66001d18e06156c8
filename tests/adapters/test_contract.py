"""What is true of every registered part. A part added tomorrow needs one line in `tests.helpers.CASES`; its own file tests the rest."""

import copy
import json
from pathlib import Path

import pytest
import torch

from medgraft.adapters import PARTS, Adapter, Host, Readout, find_part
from medgraft.adapters.store import read_adapter, rounded, save_adapter
from medgraft.backbones import Backbone
from medgraft.errors import BadCall
from medgraft.kernels.door import mode
from tests.helpers import CASES, TOLERANCE, Case, adapter, close, features_under, images, same_bits, says

ON = [
    pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.slow] if case.slow else [])
    for case in CASES
    for name in case.on
]
ON += [
    pytest.param(case, f"{name}_tiny", id=f"{case}-{name}_tiny", marks=pytest.mark.slow)
    for case in CASES
    for name in case.on
    if name in ("vit", "swin")
]


def host_of(on: Backbone, made: Adapter) -> Host:
    host = Host(on)
    host.add(made, "it")
    return host


def test_no_part_is_forgotten() -> None:
    cases = {case.kind for case in CASES}
    assert set(PARTS) == cases, f"add to tests.helpers.CASES: {sorted(set(PARTS) - cases)}"


def test_a_kind_is_registered_once() -> None:
    from medgraft.adapters.part import part

    with pytest.raises(BadCall) as refused:
        part("lora")(type("Other", (PARTS["lora"],), {}))
    says(refused.value, "lora", "already")
    assert PARTS["lora"].__name__ == "LoRA"


@pytest.mark.parametrize(("case", "name"), ON)
class TestEveryPart:
    @pytest.fixture
    def on(self, name: str, request: pytest.FixtureRequest) -> Backbone:
        return request.getfixturevalue(name)

    def test_its_claim_to_be_silent_is_true(self, case: Case, on: Backbone) -> None:
        made, x = case.adapter(on, awake=False), images(on)
        it = made.parts["it"]
        others = {n: p for n, p in made.parts.items() if p is not it and not isinstance(p, Readout)}
        plain = features_under(on, adapter(on, others, task=case.task, awake=False), x)
        if isinstance(it, Readout):
            assert not it.silent
            assert it.why_not_silent
            assert same_bits(features_under(on, made, x), plain), "a readout changed the features before it"
        elif it.silent:
            assert not it.why_not_silent
            got = features_under(on, made, x)
            if mode() == "on":  # a kernel's LayerNorm rounds in another order than the library's
                close("features", got, plain, 1e-6)
            else:
                assert same_bits(got, plain)
        else:
            assert it.why_not_silent
            assert not same_bits(features_under(on, made, x), plain), "it claims not to be silent and is"

    def test_it_does_something_once_it_is_trained(self, case: Case, on: Backbone) -> None:
        x = images(on)
        with torch.no_grad():
            fresh, awake = (host_of(on, case.adapter(on, awake=a))(x, adapter="it") for a in (False, True))
        trained = any(t.is_floating_point() for t in case.adapter(on, awake=False).tensors().values())
        assert trained != torch.allclose(fresh, awake, rtol=1e-3, atol=1e-3)  # a support set holds bytes alone

    def test_every_parameter_learns_and_nothing_frozen_does(self, case: Case, on: Backbone) -> None:
        made = case.adapter(on, awake=True)
        it = made.parts["it"].train(hasattr(made.parts["it"], "said"))
        out = host_of(on, made)(images(on), adapter="it")
        assert out.requires_grad == (made.trainable > 0)  # known samples are no parameters: nothing to train
        if made.trainable:
            said = getattr(it, "said", None)  # in training a head may say more than its logits, for a loss to read
            beside = 0 if said is None or said.quality is None else said.quality.square().sum()
            (out.square().sum() + beside).backward()
        deaf = [n for n, p in made.parts["it"].named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not deaf
        assert all(p.grad is None and not p.requires_grad for p in on.parameters())

    def test_checkpointing_gives_the_same_gradients(self, case: Case, on: Backbone) -> None:
        grads = []
        for remat in (False, True):
            made = case.adapter(on, awake=True)
            out = host_of(on, made)(images(on), adapter="it", remat=remat)
            if made.trainable:
                out.square().sum().backward()
            grads.append([p.grad for p in made.parameters() if p.grad is not None] or [out])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_saving_keeps_the_bits(self, case: Case, on: Backbone, tmp_path: Path) -> None:
        made, x = case.adapter(on, awake=True), images(on)
        dtype = "float32" if on.family == "swin" else "float16"
        back = read_adapter(save_adapter(made, tmp_path / "a", dtype=dtype, backbone=on))
        want = rounded(made, dtype)
        assert back.tensors().keys() == made.tensors().keys()
        assert all(
            torch.equal(t, want.tensors()[name]) and t.dtype == want.tensors()[name].dtype
            for name, t in back.tensors().items()
        )
        with torch.no_grad():
            assert torch.equal(host_of(on, back)(x, adapter="it"), host_of(on, want)(x, adapter="it"))

    def test_tensors_are_named_part_site_tensor(self, case: Case, on: Backbone) -> None:
        made = case.adapter(on, awake=True)
        it = made.parts["it"]
        own = {name.removeprefix("it.") for name in made.tensors() if name.startswith("it.")}
        assert own == it.tensors().keys()
        assert sum(t.numel() for t in it.tensors().values()) == sum(t.numel() for t in it.state_dict().values())
        for name in own:
            assert not it.sites or any(name.startswith(f"{site}.") for site in it.sites), name
            assert "/" not in name
            assert not name.startswith("at.")
        assert set(it.sites) <= on.sites.keys()

    def test_its_configuration_survives_json(self, case: Case, on: Backbone) -> None:
        it = case.adapter(on, awake=True).parts["it"]
        config, sites = json.loads(json.dumps([it.config, it.sites], allow_nan=False))
        assert config == it.config, "a value changes its type in JSON"
        again = find_part(case.kind)(sites, **config)
        assert again.sites == it.sites
        assert {n: t.shape for n, t in again.tensors().items()} == {n: t.shape for n, t in it.tensors().items()}
        again.load_tensors(it.tensors())
        assert all(torch.equal(t, it.tensors()[name]) for name, t in again.tensors().items())

    def test_folding_keeps_the_function(self, case: Case, on: Backbone) -> None:
        host, x = host_of(on, case.adapter(on, awake=True)), images(on)
        with torch.no_grad():
            close("folded", host.folded("it")(x), host(x, adapter="it"))

    def test_the_fixed_module_is_the_same(self, case: Case, on: Backbone) -> None:
        host, x = host_of(on, case.adapter(on, awake=True)), images(on)
        with torch.no_grad():
            close("fixed", host.fixed("it")(x), host(x, adapter="it"), 1e-6)

    def test_rows_are_independent(self, case: Case, on: Backbone) -> None:
        host, x = host_of(on, case.adapter(on, awake=True)), images(on, 3)
        with torch.no_grad():
            together = host(x, adapter="it")
            for i in range(3):
                close(f"row {i}", together[i : i + 1], host(x[i : i + 1], adapter="it"))

    def test_a_row_of_its_own_in_a_mixed_batch(self, case: Case, on: Backbone) -> None:
        host, x = host_of(on, case.adapter(on, awake=True)), images(on, 3)
        host.add(case.adapter(on, awake=True, seed=1), "other")
        with torch.no_grad():
            rows = host(x, adapter=["other", None, "it"])
            close("row 0", rows[0], host(x[:1], adapter="other"))
            close("row 1", rows[1], on(x[1:2]))
            close("row 2", rows[2], host(x[2:], adapter="it"))

    def test_it_runs_in_half_precision(self, case: Case, on: Backbone) -> None:
        """Trained in float32, deployed on a bfloat16 backbone: added before or after the cast."""
        made, x = case.adapter(on, awake=True), images(on)
        with torch.no_grad():
            want = host_of(on, made)(x, adapter="it")
            half = copy.deepcopy(on).to(torch.bfloat16)
            late = host_of(half, copy.deepcopy(made))(x.bfloat16(), adapter="it")
            early = host_of(copy.deepcopy(on), copy.deepcopy(made)).to(torch.bfloat16)(x.bfloat16(), adapter="it")
        for got in (late, early):
            close("bfloat16", got.float(), want, 5 * TOLERANCE[torch.bfloat16])
