"""The fused operations beside their baselines: `python -m benchmarks.kernels`, ten minutes on two idle cores, or on a GPU.

Every way of an operation runs in the same rounds, one after the other; a ratio is the median over rounds of the ratio to the first way in
the same round. On a GPU, times wait for the device and a column tells the same under a CUDA graph. peft is measured in its own layers.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import RESULTS, facts, footer, table, write
from benchmarks.kernel_errors import errors
from benchmarks.kernel_timing import Operation, Way, floor, timed
from medgraft.kernels import (
    bottleneck,
    dora_gain,
    dora_linear,
    joined_linear,
    lora_linear,
    mixed_lora_linear,
    norm_shrink,
)
from medgraft.kernels.bottleneck import bottleneck_reference
from medgraft.kernels.door import door
from medgraft.kernels.shrink import LARGEST
from medgraft.kernels.support_epilogue import support_epilogue

K, N, RANK, SCALE, EPS = 768, 2304, 8, 2.0, 1e-6
CELLS = RESULTS / ".kernels"


def drawn(*shape: int, device: torch.device, dtype: torch.dtype, grad: bool = False, size: float = 1.0) -> Tensor:
    """Normal numbers."""
    return (torch.randn(*shape, device=device) * size).to(dtype).requires_grad_(grad)


def peft_layer(
    weight: Tensor, bias: Tensor, adapters: int, *, rank: int = RANK, dora: bool = False, cast: bool = True
) -> Any:
    """peft's LoRA around the frozen layer; `cast`: its default, which keeps the factors in float32."""
    from peft import LoraConfig, get_peft_model

    base = nn.Module()
    base.qkv = nn.Linear(K, N, device=weight.device, dtype=weight.dtype)
    base.qkv.weight.data, base.qkv.bias.data = weight, bias
    config = LoraConfig(r=rank, lora_alpha=rank * SCALE, target_modules=["qkv"], use_dora=dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=cast)
        for i in range(1, adapters):
            model.add_adapter(str(i), config, autocast_adapter_dtype=cast)
    layer = model.base_model.model.qkv
    for name, p in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
        p.requires_grad_("lora" in name)
    return layer


def factors(device: torch.device, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """A and B in float32, as adapters keep them."""
    make = partial(drawn, device=device, dtype=torch.float32, grad=True)
    return make(rank, K, size=K**-0.5), make(N, rank, size=0.02)


def frozen(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W and b."""
    return drawn(N, K, device=device, dtype=dtype, size=0.02), drawn(N, device=device, dtype=dtype)


def compiled(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor] | None:
    """`call` under torch.compile, on a GPU only: on a CPU the products are the library's either way."""
    return torch.compile(call) if device.type == "cuda" else None


def with_compiled(ways: dict[str, Way], name: str, device: torch.device) -> dict[str, Way]:
    """`ways` and the one called `name` once more, compiled."""
    call = compiled(ways[name].call, device)
    return ways if call is None else {**ways, f"{name}, torch.compile": Way(call, ways[name].leaves)}


def lora(device: torch.device) -> Iterator[Operation]:
    """ViT-B's qkv under one adapter."""
    shapes = [(8, torch.float32), (8, torch.bfloat16), (1, torch.float32)]
    for images, dtype in shapes if device.type == "cpu" else [(8, torch.bfloat16), (64, torch.bfloat16)]:
        x = drawn(images, 197, K, device=device, dtype=dtype, grad=True)
        (weight, bias), (a, b) = frozen(device, dtype), factors(device)
        peft, low = peft_layer(weight, bias, 1), peft_layer(weight, bias, 1, cast=False)
        merged = (weight + SCALE * b.detach() @ a.detach()).to(dtype)
        leaves = [x, a, b]
        ways = {
            "frozen linear": Way(lambda x=x, w=weight, c=bias: functional.linear(x, w, c), [x]),
            "here": Way(lambda x=x, w=weight, c=bias, a=a, b=b: lora_linear(x, w, c, a, b, SCALE), leaves),
            "merged weight (serving)": Way(lambda x=x, w=merged, c=bias: functional.linear(x, w, c)),
            "peft": Way(partial(peft, x), [x, *(p for p in peft.parameters() if p.requires_grad)]),
        }
        if dtype != torch.float32:
            ways["peft, half-precision factors"] = Way(
                partial(low, x), [x, *(p for p in low.parameters() if p.requires_grad)]
            )
        yield Operation(
            f"LoRA r = {RANK}, {images} x 197 x {K} -> {N}, {_name(dtype)}",
            with_compiled(ways, "peft", device),
            target="forward <= 1.05, both <= 1.12 of the frozen linear" if (images, dtype) == shapes[0] else "",
            floor=floor(2 * images * 197 * (K + 16) * N, 2 * images * 197 * (2 * K + N)),
        )
        if device.type == "cuda":  # on a CPU the norm runs by itself
            yield behind_a_norm(device, images, dtype)


def behind_a_norm(device: torch.device, images: int, dtype: torch.dtype) -> Operation:
    """ViT-B's norm1 and qkv under one adapter."""
    x = drawn(images, 197, K, device=device, dtype=dtype, grad=True)
    gamma, beta = (drawn(K, device=device, dtype=dtype) for _ in range(2))
    (weight, bias), (a, b) = frozen(device, dtype), factors(device)
    peft = peft_layer(weight, bias, 1)

    def norm() -> Tensor:
        return functional.layer_norm(x, (K,), gamma, beta, EPS)

    def here() -> Tensor:
        return joined_linear(*norm_shrink(x, gamma, beta, EPS, [(a, b, SCALE)]), weight, bias)

    ways = {
        "LayerNorm, frozen linear": Way(lambda: functional.linear(norm(), weight, bias), [x]),
        "here": Way(here, [x, a, b]),
        "LayerNorm, LoRA here": Way(lambda: lora_linear(norm(), weight, bias, a, b, SCALE), [x, a, b]),
        "LayerNorm, peft": Way(lambda: peft(norm()), [x, *(p for p in peft.parameters() if p.requires_grad)]),
    }
    rows = images * 197
    return Operation(
        f"LayerNorm and LoRA r = {RANK}, {images} x 197 x {K} -> {N}, {_name(dtype)}",
        with_compiled(ways, "LayerNorm, peft", device),
        target="forward <= 1.08, both <= 1.25 of the LayerNorm and the frozen linear",
        floor=floor(2 * rows * (K + 16) * N, 2 * rows * (3 * K + N)),
    )


def dora(device: torch.device) -> Iterator[Operation]:
    """The same under DoRA."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, (weight, bias), (a, b) = (
        drawn(8, 197, K, device=device, dtype=dtype, grad=True),
        frozen(device, dtype),
        factors(device),
    )
    magnitude = torch.ones(N, device=device, requires_grad=True)
    peft = peft_layer(weight, bias, 1, dora=True)

    def here() -> Tensor:
        return dora_linear(x, weight, bias, a, b, SCALE, dora_gain(weight, a, b, SCALE, magnitude))

    ways = {
        "frozen linear": Way(lambda: functional.linear(x, weight, bias), [x]),
        "here": Way(here, [x, a, b, magnitude]),
        "peft": Way(partial(peft, x), [x, *(p for p in peft.parameters() if p.requires_grad)]),
    }
    yield Operation(
        f"DoRA r = {RANK}, 8 x 197 x {K} -> {N}, {_name(dtype)}",
        with_compiled(ways, "peft", device),
        target="both <= 1.25 of the frozen linear",
    )


def mixed(device: torch.device) -> Iterator[Operation]:
    """Several adapters in one batch; more than the slots hold only on a GPU, where the product that is on trial runs beside the default."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    few, many = [(8, 4, RANK), (8, 8, RANK)], [(8, 4, RANK), (64, 8, RANK), (64, 16, 16), (64, 32, 16)]
    for images, adapters, rank in few if device.type == "cpu" else many:
        x = drawn(images, 197, K, device=device, dtype=dtype, grad=True)
        weight, bias = frozen(device, dtype)
        slots = [(*factors(device, rank), SCALE) for _ in range(adapters)]
        ids = torch.arange(images, device=device) % adapters
        names = [str(i) for i in ids.tolist()]
        peft = peft_layer(weight, bias, adapters, rank=rank)
        a, b = (torch.stack([s[i].detach() for s in slots]).to(dtype) for i in (0, 1))

        def pair(
            x: Tensor = x, w: Tensor = weight, c: Tensor = bias, a: Tensor = a, b: Tensor = b, ids: Tensor = ids
        ) -> Tensor:
            """Two calls as vLLM makes them: shrink, then expand onto y."""
            y, u = functional.linear(x, w, c), torch.bmm(x, a[ids].transpose(1, 2))
            return y.baddbmm_(u, b[ids].transpose(1, 2), alpha=SCALE)

        here = Way(
            lambda x=x, w=weight, c=bias, s=slots, i=ids: mixed_lora_linear(x, w, c, s, i),
            [x, *(t for s in slots for t in s[:2])],
        )
        ways = {
            "frozen linear": Way(lambda x=x, w=weight, c=bias: functional.linear(x, w, c), [x]),
            "here": here,
            **({"here, MEDGRAFT_KERNELS=on": replace(here, trial=True)} if adapters * rank > LARGEST else {}),
            "shrink, expand": Way(pair),
            "peft": Way(partial(peft, x, adapter_names=names)),
        }
        yield Operation(
            f"{adapters} LoRA adapters r = {rank}, {images} x 197 x {K} -> {N}, {_name(dtype)}",
            ways,
            target="forward <= 1.10 of the frozen linear" if adapters == 4 else "",
            floor=floor(2 * images * 197 * (K + rank) * N, 2 * images * 197 * (2 * K + N)),
        )


def necks(device: torch.device) -> Iterator[Operation]:
    """AdaptFormer's bottleneck and AViT's."""
    dtype, images = (torch.float32, 8) if device.type == "cpu" else (torch.bfloat16, 64)
    make = partial(drawn, device=device, dtype=dtype, grad=True)
    for middle, normed in ((64, False), (64, True), (192, False), (192, True)):
        x = make(images, 197, K)
        layers = [make(middle, K, size=K**-0.5), make(middle), make(K, middle, size=middle**-0.5), make(K)]
        norm = (make(K), make(K), EPS) if normed else None
        leaves = [x, *layers, *(norm[:2] if norm else ())]
        ways = {
            "definition": Way(lambda x=x, t=layers, n=norm: bottleneck_reference(x, x, *t, norm=n), leaves),
            "here": Way(lambda x=x, t=layers, n=norm: bottleneck(x, x, *t, norm=n), leaves),
        }
        yield Operation(
            f"bottleneck of {middle}{' behind a LayerNorm' if normed else ''}, {images} x 197 x {K}, {_name(dtype)}",
            with_compiled(ways, "definition", device),
            floor=floor(4 * images * 197 * K * middle, 4 * images * 197 * K),
        )


def epilogue(device: torch.device) -> Iterator[Operation]:
    """UniverSeg's first block behind the convolutions; on a CPU the definition is what runs."""
    if device.type != "cuda":
        return
    dtype = torch.bfloat16
    t = drawn(1, 64, 64, 128, 128, device=device, dtype=dtype, grad=True)
    q = drawn(1, 64, 128, 128, device=device, dtype=dtype, grad=True)

    def eager() -> Tensor:
        maps = functional.leaky_relu(t + q.unsqueeze(1), 0.01)
        pooled = functional.max_pool2d(maps[0], 2)
        return maps.float().mean() + pooled.float().mean() + maps.sum(1, dtype=torch.float32).mean()

    def here() -> Tensor:
        mixed = support_epilogue(t, q, pool=True, fresh=False)
        assert mixed.pooled is not None
        return mixed.maps.float().mean() + mixed.pooled.float().mean() + mixed.total.mean()

    ways = {"definition": Way(eager, [t, q]), "here": Way(here, [t, q])}
    yield Operation("support epilogue, 64 x 64 x 128 x 128, bfloat16", with_compiled(ways, "definition", device))


def attention(device: torch.device) -> Iterator[Operation]:
    """SAM's attention; see `benchmarks.kernels_attention`."""
    from benchmarks.kernels_attention import operations

    yield from operations(device)


TABLES: dict[str, Callable[[torch.device], Iterator[Operation]]] = {
    "lora": lora,
    "dora": dora,
    "mixed": mixed,
    "bottleneck": necks,
    "epilogue": epilogue,
    "attention": attention,
}
SLOW = ("attention",)
"""Tables of seconds: a fifth of the rounds."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell(name: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One table, kept in a file until the page is written."""
    kept = CELLS.with_name(f"{CELLS.name}.{device.type}.{name}.json")
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    rounds = max(5, repeats // 5) if name in SLOW else repeats
    found = [timed(op, device, repeats=rounds) for op in TABLES[name](device)]
    RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def page(record: dict[str, Any]) -> str:
    """The tables in Markdown."""

    def shown(row: dict[str, Any], what: str) -> list[str]:
        if f"{what}_ms" not in row:
            return ["", ""]
        return [f"{row[f'{what}_ms']:.2f}", f"{row[f'{what}_ratio']:.2f}x"]

    parts = []
    graphs = record["device"] != "cpu"
    for found in record["operations"]:
        header = ["way", "forward ms", "of the first", "forward + backward ms", "of the first"]
        header += ["in a CUDA graph ms", "of the first", "of the floor"] if graphs else []
        rows = []
        for row in found["rows"]:
            line = [row["way"], *shown(row, "forward"), *shown(row, "both")]
            if graphs:
                line += [*shown(row, "graph"), f"{row['of_floor']:.0%}" if "of_floor" in row else ""]
            rows.append(line)
        asked = f"\n\nAsked for: {found['target']}." if found["target"] else ""
        parts.append(f"## {found['operation']}\n\n{table(header, rows)}{asked}")
    body = "\n\n".join(parts)
    return f"""# Fused operations beside their baselines

On {record["device"]} ({record["path"]}). Medians of {record["repeats"]} interleaved rounds (SAM's blocks: a fifth of them); a ratio is the
median over rounds. "Forward" is without gradients; ways that cannot train have no second column. UniverSeg has a table of its own: [universeg_speed.md](universeg_speed.md).

{body}

## Errors against float64

{table(["operation", "dtype", "value", "worst gradient"], [[r["operation"], r["dtype"], f"{r['value']:.0e}", f"{r['gradient']:.0e}"] for r in record["errors"]])}

{footer(record)}
"""


def main() -> None:
    """Measure and write `results/kernels` (or `results/kernels_cuda`)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--cells-only", action="store_true", help="measure, write no page")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    found = [row for name in asked.only for row in cell(name, device, asked.repeats)]
    if asked.cells_only:
        print(json.dumps(found, indent=1))
        return
    record: dict[str, Any] = {
        **facts(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "path": str(door(torch.zeros(1, device=device))),
        "repeats": asked.repeats,
        "operations": found,
        "errors": errors(device),
    }
    write("kernels" if device.type == "cpu" else "kernels_cuda", record, page(record))
    for kept in RESULTS.glob(f"{CELLS.name}.{device.type}.*.json"):
        Path(kept).unlink()


if __name__ == "__main__":
    main()
