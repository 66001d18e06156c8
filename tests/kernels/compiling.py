"""Compile every shipped configuration ahead of time, without a GPU, and read the resources out of the machine code.

`LAUNCHES[operation]()` gives (case, call) pairs; `call` goes through the operation's own launcher, on CPU tensors, and what it would
launch is recorded and compiled instead. So what is compiled is what ships: tiles, warps, stages, alignment and all.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this is a program of its own: `measured` runs it, with its own cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes that one program may have, by architecture."""

Cases = Iterator[tuple[str, Callable[[], Any]]]


def measured(operation: str, arch: int, only: str = "") -> list[dict[str, Any]]:
    """A row of resources for each kernel that `operation` launches on `arch`, in cases whose name contains `only`."""
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.kernels.compiling", operation, str(arch), only]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults(row: dict[str, Any]) -> list[str]:
    """What a compiled kernel does wrong, in words; an empty list when nothing."""
    arch = row["arch"]
    wrong = {
        f"{row['stack']} bytes of stack": row["stack"] > 0,
        f"{row['spill']} spilling instructions": row["spill"] > 0,
        f"{row['smem']} bytes of shared memory of {SHARED_MEMORY[arch]}": row["smem"] > SHARED_MEMORY[arch],
        f"{row['regs']} registers for each of {32 * row['warps']} threads": row["regs"] * 32 * row["warps"] > 65_536,
        "no tensor-core instruction": row["matrix"] and not row["mma"] + row["wgmma"],
    }
    return [what for what, found in wrong.items() if found]


# What ships


def relpos_attention() -> Cases:
    """SAM's global and windowed blocks at 1024 pixels, heads of 64 (B, L) and 80 (H); a grid that windows divide; small networks."""
    import torch

    from medgraft.kernels import relpos_attention as op

    for d, side, part, dtype in (
        (64, 64, 64, "bfloat16"),
        (80, 64, 64, "bfloat16"),
        (64, 64, 14, "bfloat16"),
        (80, 64, 14, "bfloat16"),
        (64, 28, 14, "float16"),
        (64, 32, 32, "float16"),
        (16, 14, 14, "bfloat16"),
    ):
        q = torch.empty(1, side * side, 3, 2, d, dtype=getattr(torch, dtype)).unbind(2)[0].transpose(1, 2)
        rh, rw = (torch.empty(1, 2, part, side * side, dtype=q.dtype) for _ in range(2))
        frame, (out, lse) = op.Frame((side, side), (part, part)), op.empty_outputs(q)
        outside = torch.empty(1, 2, 2, d, dtype=q.dtype) if frame.ragged else None
        case = f"{side}x{side} in {part}x{part} D{d} {dtype}"
        yield f"{case} forward", partial(op._fused_forward, q, q, q, rh, rw, outside, frame)
        yield f"{case} backward", partial(op._fused_backward, out, q, q, q, rh, rw, outside, out, lse, frame)


def shrink() -> Cases:
    """The low-rank columns of ViT-B and ViT-L, of one adapter and of several."""
    import torch

    from medgraft.kernels.shrink import LARGEST, shrink

    ids, owner = torch.zeros(8, dtype=torch.int64), torch.zeros(LARGEST, dtype=torch.int64)
    for k, rank, dtype in ((768, 8, torch.bfloat16), (1024, 64, torch.float16), (768, LARGEST, torch.bfloat16)):
        x, a = torch.empty(8 * 197, k, dtype=dtype), torch.empty(rank, k, dtype=dtype)
        case = f"{k} to {rank} {str(dtype).removeprefix('torch.')}"
        yield f"{case} one adapter", partial(shrink, x, a, 2.0)
        yield f"{case} mixed", partial(shrink, x, a, ids=ids, owner=owner[:rank])


def linear_expand() -> Cases:
    """ViT-B's qkv and ViT-L's first MLP layer under many adapters; a window and a row an image, ranks off the alignment."""
    import torch

    from medgraft.kernels.linear_expand import LARGEST, linear_expand

    for k, n, rank, slots, rows, dtype in (
        (768, 2304, 16, 16, 197, torch.bfloat16),
        (1024, 4096, LARGEST, 32, 197, torch.float16),
        (768, 2304, 37, 9, 49, torch.bfloat16),
        (768, 768, 8, 32, 1, torch.bfloat16),
    ):
        x, dy, u = (torch.empty(8 * rows, size, dtype=dtype) for size in (k, n, rank))
        weight, bias = torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
        a, b = torch.empty(slots * rank, k, dtype=dtype), torch.empty(n, slots * rank, dtype=dtype)
        own = torch.zeros(8, rank, dtype=torch.int64)
        case = f"{slots} of rank {rank}, 8 x {rows} x {k} to {n} {str(dtype).removeprefix('torch.')}"
        yield f"{case} forward", partial(linear_expand, x, weight, bias, u, b.t(), own)
        yield f"{case} backward", partial(linear_expand, dy, weight.t(), None, u, a, own)


def norm_shrink() -> Cases:
    """The same behind a LayerNorm."""
    import torch

    from medgraft.kernels.norm_shrink import fused
    from medgraft.kernels.shrink import LARGEST

    ids, owner = torch.zeros(8, dtype=torch.int64), torch.zeros(LARGEST, dtype=torch.int64)
    for k, rank, dtype, mixed in (
        (768, 8, torch.bfloat16, False),
        (1024, 64, torch.float16, False),
        (768, LARGEST, torch.bfloat16, True),
    ):
        x, gamma, a = (torch.empty(*shape, k, dtype=dtype) for shape in ((8 * 197,), (), (rank,)))
        case = f"{k} to {rank} {str(dtype).removeprefix('torch.')} {'mixed' if mixed else 'one adapter'}"
        slots = (ids, owner[:rank]) if mixed else (None, None)
        yield case, partial(fused, x, gamma, gamma, 1e-6, a, 2.0, *slots)


def bottleneck() -> Cases:
    """AdaptFormer's on ViT-B, AViT's on ViT-B and the widest, without and behind a LayerNorm."""
    import torch

    from medgraft.kernels.thin_pair import LARGEST, Folded, thin_pair

    mean = torch.empty(8 * 197)
    for c, m, dtype, relus in (
        (768, 64, torch.bfloat16, (False, True)),
        (384, 96, torch.float16, (False, True)),
        (768, 192, torch.bfloat16, (False, True)),
        (1280, LARGEST, torch.bfloat16, (False,)),
    ):
        x, z = torch.empty(8 * 197, c, dtype=dtype), torch.empty(8 * 197, m, dtype=dtype)
        down, up = torch.empty(m, c, dtype=dtype), torch.empty(c, m, dtype=dtype)
        bias, c0 = torch.empty(c, dtype=dtype), torch.empty(m)
        for relu in relus:
            case = f"{c} to {m} {str(dtype).removeprefix('torch.')} {'relu' if relu else 'gelu'}"
            biases = {"first_bias": c0.to(dtype), "second_bias": bias}
            yield f"{case} forward", partial(thin_pair, x, down, up.t(), x, 1.0, relu, **biases)
            yield f"{case} backward", partial(thin_pair, x, up.t(), down, x, 1.0, relu, z=z)
            biases, norm = {"first_bias": c0, "second_bias": bias}, Folded(c0, mean, mean, 1e-5)
            case += " behind a LayerNorm"
            yield f"{case} forward", partial(thin_pair, x, down, up.t(), x, 1.0, relu, **biases, norm=norm)
            back = Folded(c0, mean, mean, x=x)
            yield f"{case} backward", partial(thin_pair, x, up.t(), down, x, 1.0, relu, first_bias=c0, z=z, norm=back)


def support_epilogue() -> Cases:
    """UniverSeg's first and second blocks."""
    import torch

    from medgraft.kernels.support_epilogue import fused_backward, fused_forward

    for side, pool, dtype in ((128, True, torch.bfloat16), (64, False, torch.bfloat16), (128, True, torch.float32)):
        t = torch.empty(1, 4, 64, side, side, dtype=dtype)
        pooled = torch.empty(1, 4, 64, side // 2, side // 2, dtype=dtype)
        case = f"64x{side}x{side} {str(dtype).removeprefix('torch.')}{' pooled' if pool else ''}"
        yield f"{case} forward", partial(fused_forward, t, t[:, 0], pool)
        yield f"{case} backward", partial(fused_backward, t, t, pooled, t[:, 0].float(), pool)


LAUNCHES: dict[str, Callable[[], Cases]] = {
    "relpos_attention": relpos_attention,
    "shrink": shrink,
    "linear_expand": linear_expand,
    "norm_shrink": norm_shrink,
    "bottleneck": bottleneck,
    "support_epilogue": support_epilogue,
}


# The program


class NoGPU:
    """A stand-in for Triton's driver: enough to compile for a chip that is not there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def recorded(call: Callable[[], Any]) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """The (kernel, arguments, options) of each launch of `call`, none of which takes place."""
    import torch
    from triton.runtime.jit import JITFunction

    launches = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in args), options))

    real = JITFunction.run
    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = real
    return launches


def compiled(kernel: Any, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """The resources of one kernel, as the assembler reports them, and what its instructions show."""
    import triton

    binary = kernel.warmup(*args, grid=(1,), **options)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found, usage
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", code))

    return {
        "kernel": kernel.fn.__name__,
        "regs": number("REG"),
        "stack": number("STACK"),
        "spill": count("(?:LDL|STL)"),
        "smem": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "wgmma": count("HGMMA"),
        "mma": count("HMMA"),
        "matrix": "dot" in binary.asm["ttir"],
    }


def main(operation: str, arch: str, only: str) -> None:
    """Print the rows of one operation on one architecture as JSON."""
    from triton.runtime import driver

    from medgraft.kernels import door

    driver.set_active(NoGPU(int(arch)))
    door._chip = lambda device: int(arch)
    rows = []
    for case, call in LAUNCHES[operation]():
        if only in case:
            rows += [{"case": case, "arch": int(arch), **compiled(*launch)} for launch in recorded(call)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
