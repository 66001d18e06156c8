"""The door says which way an operation goes, and why."""

from __future__ import annotations

import pytest
import torch

from medgraft.errors import BadCall
from medgraft.kernels import door as door_module
from medgraft.kernels.door import Path, architecture, door
from tests.helpers import says

X = torch.zeros(2)


class OnChip:
    """What `door` reads of a tensor, on a chip that is not there."""

    def __init__(self, kind: str = "cuda", dtype: torch.dtype = torch.float16) -> None:
        self.device = torch.device(kind)
        self.dtype = dtype


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch):
    return lambda number: monkeypatch.setattr(door_module, "_chip", lambda device: number)


def test_a_path_is_a_sentence() -> None:
    assert str(Path(True, "Triton on sm_90")) == "fused: Triton on sm_90"
    assert str(Path(False, "the tensors are on cpu")) == "not fused: the tensors are on cpu"


def test_tensors_on_the_cpu_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "INTERPRETED", False)
    for mode in ("auto", "on"):
        monkeypatch.setenv("MEDGRAFT_KERNELS", mode)
        assert door(X) == Path(False, "the tensors are on cpu")


def test_off_comes_first(monkeypatch: pytest.MonkeyPatch, chip) -> None:
    chip(90)
    monkeypatch.setenv("MEDGRAFT_KERNELS", "off")
    assert door(OnChip()) == Path(False, "MEDGRAFT_KERNELS=off")


@pytest.mark.parametrize(
    ("number", "mode", "fused"), [(90, "auto", True), (80, "auto", True), (86, "auto", False), (86, "on", True)]
)
def test_chips(number: int, mode: str, fused: bool, monkeypatch: pytest.MonkeyPatch, chip) -> None:
    chip(number)
    monkeypatch.setenv("MEDGRAFT_KERNELS", mode)
    path = door(OnChip())
    assert path.fused == fused
    assert f"sm_{number}" in path.why


def test_the_operation_may_decline(monkeypatch: pytest.MonkeyPatch, chip) -> None:
    chip(90)
    monkeypatch.delenv("MEDGRAFT_KERNELS", raising=False)
    assert door(OnChip(), "rank 300") == Path(False, "rank 300")


@pytest.mark.parametrize(("mode", "measured", "fused"), [("auto", 90, True), ("auto", 80, False), ("on", 80, True)])
def test_a_kernel_on_trial_waits_for_a_table(
    mode: str, measured: int, fused: bool, monkeypatch: pytest.MonkeyPatch, chip
) -> None:
    chip(90)
    monkeypatch.setenv("MEDGRAFT_KERNELS", mode)
    monkeypatch.setattr(door_module, "MEASURED", frozenset({("product", measured)}))
    path = door(OnChip(), trial="product")
    assert path.fused == fused
    if not fused:
        says(Exception(str(path)), "not measured on sm_90", "MEDGRAFT_KERNELS=on")
    assert door(OnChip(), "rank 300", trial="product") == Path(False, "rank 300")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "triton", None)
    assert "not installed" in door(X).why

    def kernel() -> None: ...

    assert door_module.jit(kernel) is kernel


@pytest.mark.parametrize(("mode", "dtype", "fused"), [("on", torch.float32, True), ("auto", torch.float32, False)])
def test_the_interpreter(mode: str, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "INTERPRETED", True)
    monkeypatch.setenv("MEDGRAFT_KERNELS", mode)
    assert door(X.to(dtype)).fused == fused


def test_the_interpreter_is_not_trusted_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "INTERPRETED", True)
    monkeypatch.setenv("MEDGRAFT_KERNELS", "on")
    assert "bfloat16" in door(X.bfloat16()).why


@pytest.mark.parametrize(("number", "column"), [(75, 80), (80, 80), (89, 80), (90, 90), (100, 90)])
def test_the_column_of_a_table(number: int, column: int, chip) -> None:
    chip(number)
    assert architecture(OnChip()) == column


def test_a_word_that_is_no_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGRAFT_KERNELS", "yes")
    with pytest.raises(BadCall) as refused:
        door(X)
    says(refused.value, "MEDGRAFT_KERNELS", "'yes'", "off, auto, on")
