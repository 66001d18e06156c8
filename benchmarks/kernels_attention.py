"""SAM's attention blocks here and elsewhere: time, peak memory, errors. `python -m benchmarks.kernels_attention`, five minutes on two cores.

A block is an encoder layer as SAM runs it (norm, attention, norm, MLP), at 1024 pixels: 64 x 64 tokens, ViT-B's width of 768 and 12 heads
of 64, on a GPU ViT-H's 1280 and 16 of 80 as well. Only the attention differs between the ways; weights are random and the same.

    transformers sdpa, eager    the published arrangement as transformers has it
    augmented heads, sdpa       q' = [q / sqrt(D), rh, rw], k' = [k, onehot(y), onehot(x)]: exact, three times the products
    FlexAttention               the bias as a score modification, compiled; on a GPU only: on a CPU it compiles for minutes, forward only
    here                        `medgraft.backbones.sam_attention`
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.common import facts, footer, memory, table, write
from benchmarks.kernel_timing import Operation, Way, floor, timed
from medgraft.backbones.sam_attention import SamAttention
from medgraft.kernels.relpos_attention import Frame, position_terms, relpos_attention, relpos_path

SIDE = 64
FIELDS = {"B": (768, 12), "H": (1280, 16)}
WINDOWS = {"global": 0, "windowed": 14}


class Augmented(SamAttention):
    """The oracle that needs no kernel. Global blocks only."""

    def _products(self, q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, grid: tuple[int, int]) -> Tensor:
        i = torch.arange(grid[0] * grid[1], device=q.device)
        ones = [
            torch.eye(n, dtype=q.dtype, device=q.device)[at]
            for n, at in zip(grid, (i // grid[1], i % grid[1]), strict=True)
        ]
        wide_q = torch.cat([q * q.shape[-1] ** -0.5, rh.mT, rw.mT], -1)
        wide_k = torch.cat([k, torch.cat(ones, 1).expand(*k.shape[:2], -1, -1)], -1)
        wide_v = functional.pad(v, (0, wide_q.shape[-1] - v.shape[-1]))
        return functional.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., : v.shape[-1]]

    def forward(self, x: Tensor) -> Tensor:
        """(1, h, w, C) -> (1, h, w, C)"""
        grid = (x.shape[1], x.shape[2])
        q, k, v = self._heads(self.qkv(x)).unbind(2)
        rh, rw = position_terms(q, self.rel_pos_h, self.rel_pos_w, Frame(grid, grid))
        out = self._products(q, k, v, rh, rw, grid)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Flex(Augmented):
    """FlexAttention with the two terms captured."""

    compiled = staticmethod(torch.compile(flex_attention, dynamic=False))

    def _products(self, q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor, grid: tuple[int, int]) -> Tensor:
        w = grid[1]

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + rh[b, h, j // w, i] + rw[b, h, j % w, i]

        return self.compiled(q, k, v, score_mod=score)


class Block(nn.Module):
    """An encoder layer of SAM with an attention of ours in the place of its own."""

    def __init__(self, layer: Any, kind: type[SamAttention]) -> None:
        super().__init__()
        self.layer = layer
        self.attn = kind(layer.attn, layer.window_size)

    def forward(self, x: Tensor) -> Tensor:
        """(1, h, w, C) -> (1, h, w, C)"""
        x = x + self.attn(self.layer.layer_norm1(x))
        return x + self.layer.mlp(self.layer.layer_norm2(x))


def blocks(size: str, window: int, *, flex: bool = False) -> dict[str, nn.Module]:
    """The ways, sharing one set of frozen weights at unit gain."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionLayer

    width, heads = FIELDS[size]
    found: dict[str, nn.Module] = {}
    torch.manual_seed(0)
    for implementation in ("sdpa", "eager"):
        config = SamVisionConfig(hidden_size=width, num_attention_heads=heads, image_size=16 * SIDE)
        config._attn_implementation = implementation
        layer = SamVisionLayer(config, window)
        for p in layer.requires_grad_(False).parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.ndim == 2 else torch.full_like(p, 0.5))
        found[f"transformers {implementation}"] = layer
    twin = found["transformers sdpa"]
    found["transformers eager"].load_state_dict(twin.state_dict())
    if not window:
        found["augmented heads, sdpa"] = Block(twin, Augmented)
        if flex:
            found["FlexAttention"] = Block(twin, Flex)
    found["here"] = Block(twin, SamAttention)
    return found


def tokens(size: str) -> Tensor:
    """What enters a block."""
    return torch.randn(1, SIDE, SIDE, FIELDS[size][0], generator=torch.Generator().manual_seed(1))


def operations(device: torch.device) -> Iterator[Operation]:
    """Global and windowed blocks, as `benchmarks.kernels` times them."""
    on_gpu = device.type == "cuda"
    for size in FIELDS if on_gpu else ("B",):
        width = FIELDS[size][0]
        for name, window in WINDOWS.items():
            dtype = torch.bfloat16 if on_gpu else torch.float32
            x = tokens(size).to(device, dtype).requires_grad_()
            keys = window**2 or SIDE**2
            n = SIDE**2
            floats = 24 * n * width**2 + 4 * n * keys * width
            yield Operation(
                f"SAM-{size} {name} block, {SIDE} x {SIDE} tokens, {str(dtype).removeprefix('torch.')}",
                {
                    way: Way(partial(block.to(device, dtype), x), [x])
                    for way, block in blocks(size, window, flex=on_gpu).items()
                },
                "" if window else "time at most that of transformers sdpa",
                floor(floats, 2 * (12 * width**2 + 2 * n * width)),
            )


# Peak memory: a process for each way, above what it held before the call


def _peak(way: str, window: int, backward: bool, out: Any) -> None:
    torch.set_num_threads(2)
    block = blocks("B", window)[way]
    x = tokens("B")
    with torch.no_grad():
        block.layer.mlp(x[:, :1]) if isinstance(block, Block) else block.mlp(x[:, :1])  # libraries loaded
    before = memory("VmRSS")
    if backward:
        block(x.requires_grad_()).sum().backward()
    else:
        with torch.no_grad():
            block(x)
    out.put(memory("VmHWM") - before)


def peak(way: str, window: int, backward: bool) -> float:
    """MiB."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_peak, args=(way, window, backward, out))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{way} ended with {process.exitcode}; is there enough memory?")
    return float(out.get())


# Errors


def exact(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor, side: int) -> Tensor:
    """The formula, with every score at once; global only."""
    i = torch.arange(side * side, device=q.device)
    y, x = i // side, i % side
    rh = torch.einsum("bnid,ijd->bnij", q, table_h[y[:, None] - torch.arange(side, device=q.device) + side - 1])
    rw = torch.einsum("bnid,ijd->bnij", q, table_w[x[:, None] - torch.arange(side, device=q.device) + side - 1])
    scores = q @ k.mT * q.shape[-1] ** -0.5 + rh[..., y] + rw[..., x]
    return scores.softmax(-1) @ v


def errors(device: torch.device, side: int = 32) -> list[dict[str, Any]]:
    """|got - want| / |want| of the value and of the worst gradient, want in float64 from the same rounded inputs."""
    rows = []
    for d in (64, 80):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            g = torch.Generator().manual_seed(2)
            drawn = [torch.randn(1, 2, side * side, d, generator=g) for _ in range(3)]
            drawn += [torch.randn(2 * side - 1, d, generator=g) * d**-0.5 for _ in range(2)]
            ours = [t.to(device, dtype).requires_grad_() for t in drawn]
            theirs = [t.detach().double().requires_grad_() for t in ours]
            got, want = relpos_attention(*ours, (side, side)), exact(*theirs, side)
            dy = torch.randn_like(want)
            got.backward(dy.to(dtype))
            want.backward(dy.to(dtype).double())
            off = [_off(got, want), *(_off(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
            path = relpos_path(ours[0], (side, side))
            rows.append(
                {
                    "operation": f"relpos_attention, D = {d}, {side} x {side} tokens, {path}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "value": off[0],
                    "gradient": max(off[1:]),
                }
            )
    return rows


def _off(got: Any, want: Any) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


def main() -> None:
    """Measure and write `results/kernels_attention`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device("cpu")
    found = [timed(op, device, repeats=asked.repeats) for op in operations(device)]
    peaks = [
        {"block": name, "way": way, "forward_mib": peak(way, window, False), "both_mib": peak(way, window, True)}
        for name, window in WINDOWS.items()
        for way in blocks("B", window)
    ]
    record = {**facts(), "repeats": asked.repeats, "times": found, "peaks": peaks, "errors": errors(device)}
    write("kernels_attention", record, page(record))


def page(record: dict[str, Any]) -> str:
    """The tables in Markdown."""

    def cell(row: dict[str, Any], what: str) -> list[str]:
        return [f"{row[f'{what}_ms']:.0f}", f"{row[f'{what}_ratio']:.2f}x"]

    times = [
        [found["operation"], row["way"], *cell(row, "forward"), *cell(row, "both")]
        for found in record["times"]
        for row in found["rows"]
    ]
    base = {r["block"]: r for r in record["peaks"] if r["way"] == "transformers sdpa"}
    peaks = []
    for row in record["peaks"]:
        line = [row["block"], row["way"]]
        for what in ("forward_mib", "both_mib"):
            line += [f"{row[what]:.0f}", f"{row[what] / base[row['block']][what]:.2f}x"]
        peaks.append(line)
    off = [[r["operation"], r["dtype"], f"{r['value']:.1e}", f"{r['gradient']:.1e}"] for r in record["errors"]]
    both = ["forward", "of sdpa", "forward + backward", "of sdpa"]
    return f"""# SAM's attention blocks

An encoder layer of SAM ViT-B at 1024 pixels, batch 1, fp32, random weights; gradients to the layer's input. Medians of {record["repeats"]}
interleaved rounds; a ratio is the median over rounds. Made by `python -m benchmarks.kernels_attention`.

## Milliseconds

{table(["block", "attention", *both], times)}

## Peak memory, MiB above the loaded process, a process each

{table(["block", "attention", *both], peaks)}

## Errors against float64

{table(["operation", "dtype", "value", "worst gradient"], off)}

{footer(record)}
"""


if __name__ == "__main__":
    main()
