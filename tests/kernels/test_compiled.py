"""Every shipped configuration compiles for the chips that it is for, without a spill, within the chip. No GPU is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from medgraft.kernels.door import ARCHITECTURES
from tests.kernels.compiling import LAUNCHES, faults, measured

pytest.importorskip("triton", reason="Triton is not installed")


LONG = ["relpos_attention", "linear_expand", "bottleneck"]
"""Operations of which only some shapes are compiled every time."""


@cache
def compiled(operation: str, only: str = "") -> dict[int, list[dict[str, Any]]]:
    """`measured` by architecture, all at the same time: each is a process of its own."""
    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        found = pool.map(lambda arch: measured(operation, arch, only), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, found, strict=True))


def wrong(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Faults by kernel."""
    assert rows
    return {f"{row['case']}, {row['kernel']}": found for row in rows if (found := faults(row))}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_of_sam_compiles_without_a_spill(arch: int) -> None:
    rows = compiled("relpos_attention", "64x64")[arch]
    assert not wrong(rows)
    if arch == 90:
        assert all(row["wgmma"] for row in rows if "64x64 in 64x64" in row["case"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_product_for_many_adapters_compiles_without_a_spill(arch: int) -> None:
    rows = compiled("linear_expand", "of rank 64")[arch]  # the most registers
    assert not wrong(rows)
    assert arch == 80 or all(row["wgmma"] for row in rows)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("only", ["to 256", "to 96 float16 relu", "to 64 bfloat16 relu"])  # an entry of the table each
def test_the_bottleneck_compiles_without_a_spill(only: str, arch: int) -> None:
    assert not wrong(compiled("bottleneck", only)[arch])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", [name for name in LAUNCHES if name not in LONG])
def test_it_compiles_without_a_spill(operation: str, arch: int) -> None:
    assert not wrong(compiled(operation)[arch])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", LONG)
def test_other_shapes_compile_without_a_spill(operation: str, arch: int) -> None:
    assert not wrong(compiled(operation)[arch])


def test_faults_are_seen() -> None:
    good = {
        "arch": 90,
        "stack": 0,
        "spill": 0,
        "smem": 1000,
        "regs": 128,
        "warps": 8,
        "matrix": True,
        "wgmma": 4,
        "mma": 0,
    }
    assert faults(good) == []
    for bad in ({"stack": 8}, {"spill": 1}, {"smem": 300_000}, {"regs": 255, "warps": 16}, {"wgmma": 0}):
        assert len(faults(good | bad)) == 1
