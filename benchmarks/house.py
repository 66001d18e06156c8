"""The numbers of the house: `python -m benchmarks.house`, about ten minutes on two idle cores. peft is measured in the same run.

Every figure is a ratio within one round of interleaved calls, and the median over rounds. ViT-B/16 at 224 px with random weights:
speed does not depend on the values.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import facts, footer, median, ratio, rounds, table, write
from medgraft.adapters import Adapter, ASPPHead, Host, LinearHead, LoRA, Part, Task
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.backbones.sites import Port
from medgraft.training.cache import PrefixCache
from medgraft.training.losses import segmentation_loss

VIT_B = "random:timm:vit_base_patch16_224"
TASK = Task("segment", ("lesion",))


def drawn(adapter: Adapter, seed: int) -> Adapter:
    """`adapter` with small random values everywhere, as if trained."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return adapter


def lora(backbone: Backbone, seed: int, targets: Any = ("*.attn.qkv",)) -> Adapter:
    """A LoRA r = 8 adapter with a linear head."""
    parts: dict[str, Part] = {
        "lora": LoRA.on(backbone, TASK, targets=targets, rank=8),
        "head": LinearHead.on(backbone, TASK),
    }
    return drawn(Adapter.of(backbone, TASK, parts), seed)


def peft_of(backbone: Backbone, names: list[str]) -> Any:
    """The same network under plain peft with as many LoRA r = 8 adapters on qkv."""
    from peft import LoraConfig, get_peft_model

    network = backbone.plain_copy(lambda _, base: base, share=False).network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"])
        model = get_peft_model(network, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        return model.eval()


@torch.no_grad()
def no_adapter(backbone: Backbone) -> dict[str, Any]:
    """Host without an adapter against the bare network: per-site cost times sites, over the bare time."""
    x = torch.randn(1, 3, 224, 224)
    bare = backbone.plain_copy(lambda _, base: base, share=True)
    host = Host(backbone)
    whole = rounds({"bare": lambda: bare(x), "again": lambda: bare(x), "host": lambda: host(x)}, repeats=15)
    base = torch.nn.Identity()
    port = Port(base, "none", object())
    t = torch.zeros(1)

    def many(module: Any) -> Any:
        return lambda: [module(t) for _ in range(20_000)]

    sites = rounds({"base": many(base), "port": many(port)}, repeats=7)
    per_site = median([(p - b) / 20_000 for p, b in zip(sites["port"], sites["base"], strict=True)])
    ports = sum(isinstance(m, Port) for m in backbone.modules())
    bare_time = median(whole["bare"])
    return {
        "value": 1 + per_site * ports / bare_time,
        "bar": 1.02,
        "per_site_us": per_site * 1e6,
        "ports": ports,
        "bare_ms": bare_time * 1e3,
        "whole_ratio": ratio(whole, "host", "bare"),
        "control_same_against_same": ratio(whole, "again", "bare"),
    }


@torch.no_grad()
def alternate(backbone: Backbone) -> dict[str, Any]:
    """20 calls alternating two adapters against 20 with one; peft's `set_adapter` beside."""
    host = Host(backbone)
    for seed, name in enumerate("ab"):
        host.add(lora(backbone, seed), name)
    x = torch.randn(1, 3, 224, 224)
    model = peft_of(backbone, ["a", "b"])
    model.set_adapter("a")

    def swap() -> None:
        for i in range(20):
            model.set_adapter("ab"[i % 2])
            model(x)

    times = rounds(
        {
            "one": lambda: [host(x, "a") for _ in range(20)],
            "two": lambda: [host(x, "ab"[i % 2]) for i in range(20)],
            "peft one": lambda: [model(x) for _ in range(20)],
            "peft two": swap,
        },
        repeats=5,
    )
    set_times = []
    for i in range(20):
        began = time.perf_counter()
        model.set_adapter("ab"[i % 2])
        set_times.append(time.perf_counter() - began)
    return {
        "value": ratio(times, "two", "one"),
        "bar": 1.02,
        "peft": ratio(times, "peft two", "peft one"),
        "peft_set_adapter_ms": median(set_times) * 1e3,
    }


def loading(backbone: Backbone) -> dict[str, Any]:
    """Seconds to load and add one ViT-B LoRA adapter with 0 and with 20 resident; peft's load beside."""
    from peft import PeftModel

    host = Host(backbone)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(lora(backbone, 0), Path(folder) / "ours", dtype="float32")
        for i in range(25):
            began = time.perf_counter()
            host.add(read_adapter(Path(folder) / "ours"), str(i))
            ours.append(time.perf_counter() - began)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_of(backbone, ["default"]).save_pretrained(Path(folder) / "peft")
            network = backbone.plain_copy(lambda _, base: base, share=False).network
            began = time.perf_counter()
            model = PeftModel.from_pretrained(network, Path(folder) / "peft", adapter_name="0")
            theirs.append(time.perf_counter() - began)
            for i in range(1, 25):
                began = time.perf_counter()
                model.load_adapter(str(Path(folder) / "peft"), str(i))
                theirs.append(time.perf_counter() - began)
    return {
        "value": median(ours[20:]) / median(ours[1:5]),
        "bar": "flat, and below peft's first load",
        "ours_first_ms": ours[0] * 1e3,
        "ours_few_ms": median(ours[1:5]) * 1e3,
        "ours_at_20_ms": median(ours[20:]) * 1e3,
        "peft_first_ms": theirs[0] * 1e3,
        "peft_few_ms": median(theirs[1:5]) * 1e3,
        "peft_at_20_ms": median(theirs[20:]) * 1e3,
    }


@torch.no_grad()
def mixed(backbone: Backbone) -> dict[str, Any]:
    """8 rows with 8 adapters against 8 rows with one; peft's `adapter_names` beside."""
    names = list("abcdefgh")
    host = Host(backbone)
    for seed, name in enumerate(names):
        host.add(lora(backbone, seed), name)
    x = torch.randn(8, 3, 224, 224)
    model = peft_of(backbone, names)
    model.set_adapter("a")
    times = rounds(
        {
            "one": lambda: host(x, "a"),
            "mixed": lambda: host(x, names),
            "none": lambda: host(x),
            "peft one": lambda: model(x),
            "peft mixed": lambda: model(x, adapter_names=names),
        },
        repeats=7,
    )
    return {
        "value": ratio(times, "mixed", "one"),
        "bar": 1.15,
        "one_over_none": ratio(times, "one", "none"),
        "peft": ratio(times, "peft mixed", "peft one"),
        "peft_mixed_over_ours": ratio(times, "peft mixed", "mixed"),
    }


@torch.no_grad()
def late(backbone: Backbone) -> dict[str, Any]:
    """8 adapters in the last third of the blocks, one image: one call with a shared prefix against 8 calls."""
    names = list("abcdefgh")
    host = Host(backbone)
    targets = [f"blocks.{i}.attn.qkv" for i in range(8, 12)]
    for seed, name in enumerate(names):
        host.add(lora(backbone, seed, targets), name)
    x = torch.randn(1, 3, 224, 224)

    def flops(call: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    together, apart = host(x, adapters=names), [host(x, n) for n in names]
    worst = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(together, apart, strict=True))
    times = rounds(
        {"apart": lambda: [host(x, n) for n in names], "together": lambda: host(x, adapters=names)},
        repeats=9,
        busy_share=1.9,
    )
    return {
        "value": ratio(times, "apart", "together"),
        "bar": 2.0,
        "rounds_kept": len(times["apart"]),
        "flop_ratio": flops(lambda: [host(x, n) for n in names]) / flops(lambda: host(x, adapters=names)),
        "flop_bar": 2.35,
        "largest_relative_difference": worst,
        "prefixes": together.prefixes,
    }


def cached_training(backbone: Backbone, head: str) -> dict[str, Any]:
    """Training steps of a head on ViT-B, batch 8, with and without the prefix cache (fp32, in memory)."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 224, 224, generator=g)
    masks = (torch.rand(16, 224, 224, generator=g) > 0.5).long()

    def make() -> tuple[Host, torch.optim.Optimizer]:
        torch.manual_seed(0)
        part = LinearHead.on(backbone, TASK) if head == "LinearHead" else ASPPHead.on(backbone, TASK, dropout=0.0)
        host = Host(backbone)
        host.add(Adapter.of(backbone, TASK, {"head": part}).train(), "x")  # type: ignore[arg-type]
        return host, torch.optim.AdamW(host.adapters["x"].parameters(), lr=1e-3)

    def step(host: Host, optimiser: torch.optim.Optimizer, i: int, cache: PrefixCache | None) -> float:
        rows = list(range((i % 2) * 8, (i % 2) * 8 + 8))
        x, y = images[rows], masks[rows]
        if cache is None:
            logits = host(x, "x")
        else:
            logits = host.resume(cache.states(x, [str(r) for r in rows], [0] * 8), x, "x")
        optimiser.zero_grad()
        loss = segmentation_loss(logits, y)
        loss.backward()
        optimiser.step()
        return loss.item()

    cache = PrefixCache(backbone, backbone.depth)
    live_host, live_opt = make()
    fast_host, fast_opt = make()
    live_curve, fast_curve, live_times, fast_times = [], [], [], []
    for i in range(8):
        began = time.perf_counter()
        live_curve.append(step(live_host, live_opt, i, None))
        live_times.append(time.perf_counter() - began)
    for i in range(8):
        began = time.perf_counter()
        fast_curve.append(step(fast_host, fast_opt, i, cache))
        if i >= 2:
            fast_times.append(time.perf_counter() - began)
    for i in range(8, 40):
        began = time.perf_counter()
        step(fast_host, fast_opt, i, cache)
        fast_times.append(time.perf_counter() - began)
    gap = max(abs(a - b) for a, b in zip(live_curve, fast_curve, strict=True))
    return {
        "value": median(live_times[1:]) / median(fast_times),
        "bar": 50.0 if head == "LinearHead" else "reported",
        "live_step_ms": median(live_times[1:]) * 1e3,
        "cached_step_ms": median(fast_times) * 1e3,
        "largest_loss_difference": gap,
    }


def imports() -> dict[str, Any]:
    """Wall time of `import medgraft` against `import torch`, each in a process of its own."""

    def run(code: str) -> Any:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    times = rounds(
        {"none": run("pass"), "torch": run("import torch"), "medgraft": run("import medgraft; medgraft.Host")},
        repeats=5,
    )
    light = rounds({"torch": run("import torch"), "medgraft": run("import medgraft")}, repeats=5)
    return {
        "value": ratio(light, "medgraft", "torch"),
        "bar": 2.0,
        "with_host_used": ratio(times, "medgraft", "torch"),
        "torch_s": median(times["torch"]),
        "interpreter_s": median(times["none"]),
    }


def main() -> None:
    """Measure every row and write `results/house.{json,md}`."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    backbone = load_backbone(VIT_B)
    rows: dict[str, dict[str, Any]] = {}
    for title, measure in {
        "host without adapter / bare backbone (batch 1)": lambda: no_adapter(backbone),
        "20 calls alternating two adapters / 20 with one": lambda: alternate(backbone),
        "loading an adapter with 20 resident / with few": lambda: loading(backbone),
        "8 rows with 8 adapters / 8 rows with one": lambda: mixed(backbone),
        "8 late adapters: 8 calls / one call": lambda: late(backbone),
        "LinearHead training: live step / cached step": lambda: cached_training(backbone, "LinearHead"),
        "ASPPHead training: live step / cached step": lambda: cached_training(backbone, "ASPPHead"),
        "import medgraft / import torch": imports,
    }.items():
        rows[title] = measure()
        print(title, {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[title].items()}, flush=True)
        gc.collect()
    record = {**facts(), "backbone": VIT_B, "rows": copy.deepcopy(rows)}

    def others(row: dict[str, Any]) -> str:
        return ", ".join(
            f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
            for k, v in row.items()
            if k not in ("value", "bar")
        )

    body = table(
        ["what", "measured", "bar", "beside it"],
        [[t, f"{r['value']:.3f}", r["bar"], others(r)] for t, r in rows.items()],
    )
    text = (
        f"# Numbers of the house\n\n{body}\n\nMedians of ratios within interleaved rounds; ViT-B/16, 224 px, random weights "
        f"(speed does not depend on them), LoRA r = 8 on qkv. {footer(record)}\n"
    )
    write("house", record, text)


if __name__ == "__main__":
    main()
