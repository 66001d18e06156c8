"""The demonstration: one frozen backbone learns two tasks from a handful of drawn images each, and swaps between them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..adapters import Adapter, Host, LinearHead, LoRA
from ..adapters.store import read_adapter
from ..backbones import load_backbone
from ..training.data import load_dataset
from ..training.evaluate import evaluate
from ..training.phantoms import write_dataset
from ..training.report import overlay_png
from .parameter_efficient import lora
from .run import Run, directory_bytes

BACKBONE = "medgraft:starter-vit"
TASKS = ("lesion", "cells")
TEST_IMAGES = 16
TARGETS = "blocks.3.attn.*,blocks.4.attn.*,blocks.5.attn.*,blocks.3.mlp.*,blocks.4.mlp.*,blocks.5.mlp.*"


def run_demo(out: Path, *, shots: int, steps: int, console: Console) -> dict[str, Any]:
    """Draw two data sets, train a LoRA adapter on each, reload both into one host, score and swap. Returns the figures."""
    console.print(
        f"one frozen backbone: {BACKBONE}; two tasks of {shots} drawn images each; everything below is measured now"
    )
    backbone = load_backbone(BACKBONE)
    before = backbone.digest()
    host = Host(backbone)
    (out / "overlays").mkdir(parents=True, exist_ok=True)
    head = ("adapter", "shots", "trainable", "bytes", "Dice before", "after [95 %]", "seconds")
    rows = Table(*head, box=None, padding=(0, 2, 0, 0))
    figures: dict[str, Any] = {}
    for name in TASKS:
        data = write_dataset(out / "data" / name, name, train=shots, test=TEST_IMAGES).parent
        dataset = load_dataset(data)
        began = time.perf_counter()
        run = Run(
            data, out / name, backbone=BACKBONE, shots=shots, steps=steps, license="apache-2.0", modality="phantom"
        )
        trained = lora(run, targets=TARGETS)
        seconds = time.perf_counter() - began
        fresh = Adapter.of(
            backbone, run.goal, {"lora": LoRA.on(backbone, run.goal), "head": LinearHead.on(backbone, run.goal)}
        )
        host.add(fresh, "untrained")
        untrained = evaluate(host, "untrained", dataset)["dice"]
        host.remove("untrained")
        host.add(read_adapter(out / name), name)
        score = evaluate(host, name, dataset)
        low, high = score["interval"]
        rows.add_row(
            name,
            str(shots),
            f"{trained['trainable']:,}",
            f"{directory_bytes(out / name):,}",
            f"{untrained:.3f}",
            f"{score['dice']:.3f} [{low:.3f}, {high:.3f}]",
            f"{seconds:.0f}",
        )
        figures[name] = {"before": untrained, "after": score["dice"]}
        for item in dataset.split("test")[:4]:
            image = dataset.image(item)
            overlay_png(
                image,
                host.predict(image, name),
                dataset.mask(item),
                out / "overlays" / f"{name}_{item.id}.png",
                dict(dataset.classes),
            )
    console.print(rows)
    figures["swap"] = _swap(host, console)
    unchanged = backbone.digest() == before
    console.print(
        f"backbone unchanged, bit for bit: {'yes' if unchanged else 'NO'}; pictures in {out / 'overlays'} (outline: truth)"
    )
    figures["unchanged"] = unchanged
    return figures


@torch.no_grad()
def _swap(host: Host, console: Console) -> dict[str, float]:
    """Selection is an argument: alternating adapters costs what one adapter costs; both at once share the frozen prefix."""
    size = host.backbone.spec.image_size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    a, b = TASKS

    def milliseconds(calls: Any) -> float:
        began = time.perf_counter()
        calls()
        return 1000 * (time.perf_counter() - began)

    rounds = [
        (
            milliseconds(lambda: [host(x, a) for _ in range(10)]),
            milliseconds(lambda: [host(x, (a, b)[i % 2]) for i in range(10)]),
            milliseconds(lambda: [host(x, adapters=[a, b]) for _ in range(5)]),
        )
        for _ in range(3)
    ]
    one, alternating, both = (sorted(r[i] for r in rounds)[1] / 10 for i in range(3))
    console.print(
        f"per answer: {one:.1f} ms with one adapter, {alternating:.1f} ms alternating, {both:.1f} ms when both are asked at once"
    )
    return {"one": one, "alternating": alternating, "both": both}
