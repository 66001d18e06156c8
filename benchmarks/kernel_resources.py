"""Registers, shared memory and spills of every kernel that ships, compiled without a GPU: `python -m benchmarks.kernel_resources`."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from benchmarks.common import facts, footer, table, write
from medgraft.kernels.door import ARCHITECTURES
from tests.kernels.compiling import LAUNCHES, faults, measured


def main() -> None:
    """Compile and write `results/kernel_resources`; ends with 1 where a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=LAUNCHES, default=list(LAUNCHES))
    asked = parser.parse_args()
    rows = [
        {"operation": name, **row, "faults": faults(row)}
        for name in asked.only
        for arch in ARCHITECTURES
        for row in measured(name, arch)
    ]
    record = {**facts(), "triton": version("triton"), "rows": rows}
    write("kernel_resources", record, page(record))
    raise SystemExit(any(row["faults"] for row in rows))


def page(record: dict[str, Any]) -> str:
    """The table in Markdown."""
    header = [
        "operation",
        "case",
        "kernel",
        "chip",
        "warps",
        "registers",
        "stack",
        "spills",
        "shared bytes",
        "tensor cores",
    ]
    lines = [
        [
            *(
                row["operation"],
                row["case"],
                row["kernel"],
                f"sm_{row['arch']}",
                row["warps"],
                row["regs"],
                row["stack"],
            ),
            *(row["spill"], row["smem"], f"wgmma {row['wgmma']}" if row["wgmma"] else f"mma {row['mma']}"),
        ]
        for row in record["rows"]
    ]
    return f"""# What the kernels take of a chip

Every shipped configuration, compiled ahead of time by Triton {record["triton"]} with its own assembler; no kernel was run. Registers a thread; bytes of
stack; instructions that spill to memory or load back; matrix instructions in the machine code. The tests hold stack and spills at 0.

{table(header, lines)}

{footer(record)}
"""


if __name__ == "__main__":
    main()
