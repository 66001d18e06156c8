"""Many adapters of one SAM: eight decoder-side adapters on one image against one. `python -m benchmarks.sam_many [--rounds 5] [--threads 1]`.

ViT-B with random weights (time does not depend on them), 512 px, one image, CPU. Each adapter has a mask decoder of its own (tuned copies)
and class prompts or a prompted head; all of them share the encoder's one pass. Also: the bytes of each kind of adapter as saved, float16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import facts, footer, median, ratio, rounds, table, write
from medgraft.adapters import Adapter, ClassPrompts, ConditionEmbedding, Fusion, Host, LoRA, MaskHead, Part, Task
from medgraft.adapters.store import TENSORS_NAME, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.recipes.sam_decoder import FIRST_MASK, tuned_decoder

BACKBONE, SIDE, COUNT, ALLOWED = "random:sam:vit_b", 512, 8, 1.2
ONE, THREE = Task("segment", ("polyp",)), Task("segment", ("tumour", "stroma", "necrosis"))


def kinds(on: Backbone) -> dict[str, Adapter]:
    """Adapters of every recipe's shape."""
    boxes = {"decoder": tuned_decoder(on, ONE, *FIRST_MASK), "head": MaskHead.on(on, ONE)}
    condition = ConditionEmbedding.on(on, ONE, groups=("a", "b", "c"))
    made: dict[str, tuple[Task, Mapping[str, Part]]] = {
        "class prompts alone, one class": (ONE, {"head": ClassPrompts.on(on, ONE, quality=False)}),
        "class prompts alone, three classes, IoU estimates": (THREE, {"head": ClassPrompts.on(on, THREE)}),
        "sam_decoder, no prompts": (
            ONE,
            {"decoder": tuned_decoder(on, ONE), "head": ClassPrompts.on(on, ONE, quality=False)},
        ),
        "sam_decoder, boxes": (ONE, boxes),
        "sam_path, one class": (
            ONE,
            {"decoder": tuned_decoder(on, ONE), "fusion": Fusion.on(on, ONE), "head": ClassPrompts.on(on, ONE)},
        ),
        "cemb_sam, three sub-groups": (
            ONE,
            {"decoder": boxes["decoder"], "condition": condition, "head": boxes["head"]},
        ),
        "surgical_sam, one class": (
            ONE,
            {
                "lora": LoRA.on(on, ONE, targets=("blocks.*.attn.q", "blocks.*.attn.v"), rank=4, alpha=4),
                "decoder": tuned_decoder(on, ONE, "decoder.no_mask"),
                "head": ClassPrompts.on(on, ONE, quality=False),
            },
        ),
    }
    return {name: Adapter.of(on, task, parts) for name, (task, parts) in made.items()}


def eight(on: Backbone) -> Host:
    """Eight decoder-side adapters: a tuned decoder each, four under class prompts and four under a prompted head."""
    host = Host(on)
    for i in range(COUNT):
        head: Part = ClassPrompts.on(on, THREE, quality=False) if i % 2 else MaskHead.on(on, ONE)
        decoder = tuned_decoder(on, ONE, *(() if i % 2 else FIRST_MASK))
        host.add(Adapter.of(on, THREE if i % 2 else ONE, {"decoder": decoder, "head": head}), f"adapter {i}")
    return host


def main() -> None:
    """Bytes, then seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on = load_backbone(BACKBONE, image_size=SIDE)
    sizes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, adapter) in enumerate(kinds(on).items()):
            saved = save_adapter(adapter, Path(folder) / str(i))
            sizes[name] = {"trained": adapter.trainable, "bytes": (saved / TENSORS_NAME).stat().st_size}
    times = timed(eight(on), args.rounds)
    report(on, sizes, times)


@torch.no_grad()
def timed(host: Host, repeats: int) -> dict[str, list[float]]:
    """Seconds of eight adapters, of one, and of the encoder alone, interleaved."""
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    names = list(host.adapters)
    return rounds(
        {
            "eight": lambda: host(x, adapters=names),
            "one": lambda: host(x, names[1]),
            "encoder": lambda: host.backbone.run(x, stop=host.backbone.depth),
        },
        repeats=repeats,
        busy_share=0.5,
    )


def report(on: Backbone, sizes: Mapping[str, Mapping[str, int]], times: Mapping[str, list[float]]) -> None:
    """Two tables."""
    cost = ratio(times, "eight", "one")
    record: dict[str, Any] = {**facts(), "backbone": on.spec.title, "sizes": sizes, "seconds": times, "ratio": cost}
    text = ["# Many adapters of one SAM", ""]
    text += [
        f"`{on.spec.title}`, {SIDE} px, one image: {COUNT} decoder-side adapters cost **{cost:.2f} times** one (wanted: {ALLOWED} or less). "
        f"Medians of {len(times['one'])} interleaved rounds; the ratio is the median of the rounds'.",
        "",
        table(["", "seconds"], [[name, f"{median(values):.2f}"] for name, values in times.items()]),
        "",
        "Adapters as saved, float16:",
        "",
        table(
            ["adapter", "trained parameters", "bytes of tensors"],
            [[name, f"{s['trained']:,}", f"{s['bytes']:,}"] for name, s in sizes.items()],
        ),
        "",
        footer(record),
    ]
    write("sam_many", record, "\n".join(text))


if __name__ == "__main__":
    main()
