"""Time and memory of UniverSeg here against the published arrangement: `python -m benchmarks.universeg_speed`, ten minutes on two cores.

The published arrangement (repeat the query for every support image, concatenate, convolve) is written below for comparison, with the same
weights. Times are medians of interleaved rounds in one process; peaks are of a process each, above what it held before the call.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from benchmarks.common import data_root, facts, footer, median, memory, ratio, rounds, table, write
from medgraft.backbones import load_backbone
from medgraft.backbones.universeg import Context, UniverSeg

SIZE, SHOTS = 128, (16, 64)


def backbone() -> UniverSeg:
    """Random weights: speed does not depend on the values."""
    found = load_backbone("random:universeg")
    assert isinstance(found, UniverSeg)
    return found


def inputs(shots: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries and one support set for all."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(1, shots, 1, SIZE, SIZE, generator=g)
    return torch.rand(queries, 1, SIZE, SIZE, generator=g), images, (images > 0.5).float()


# The published arrangement


def published(network: Any, target: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, 1, H, W) with every pair concatenated in every block."""
    u, v = target[:, None], torch.cat([images, labels], 2)
    skips = []
    last = len(network.enc_blocks) - 1
    for i, block in enumerate(network.enc_blocks):
        u, v = _block(block, u, v)
        if i < last:
            skips.append((u, v))
            u, v = _each(functional.max_pool2d, u, 2), _each(functional.max_pool2d, v, 2)
    for block in network.dec_blocks:
        skip_u, skip_v = skips.pop()
        u, v = torch.cat([_each(_up, u), skip_u], 2), torch.cat([_each(_up, v), skip_v], 2)
        u, v = _block(block, u, v)
    weight, bias = network.get_submodule("out_conv.conv")()
    return functional.conv2d(u[:, 0], weight, bias)


def _block(block: Any, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    cross, target, support = (
        block.get_submodule(p)() for p in ("cross.cross_conv", "target.vmapped.conv", "support.vmapped.conv")
    )
    pairs = torch.cat([u.expand(-1, v.shape[1], -1, -1, -1), v], 2)
    z = _each(functional.conv2d, pairs, *cross, padding=1)
    u = functional.leaky_relu(_each(functional.conv2d, z.mean(1, keepdim=True), *target, padding=1))
    return u, functional.leaky_relu(_each(functional.conv2d, z, *support, padding=1))


def _each(f: Callable[..., Tensor], x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return f(x.flatten(0, 1), *rest, **options).unflatten(0, x.shape[:2])


def _up(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def check(golden: Path) -> float | None:
    """The largest deviation of the published arrangement, as written here, from the authors' output; None without the golden tensors."""
    if not golden.is_file():
        return None
    g = load_file(golden)
    model = backbone()
    model.network.load_state_dict({k.removeprefix("sd."): t for k, t in g.items() if k.startswith("sd.")})
    with torch.no_grad():
        got = published(model.network, g["in.target"], g["in.support_images"][:, :4], g["in.support_labels"][:, :4])
    return float((got - g["out.logits_S4"]).abs().max())


# Memory: a process for each call


def _peak(way: str, shots: int, queries: int, out: Any) -> None:
    torch.set_num_threads(2)
    model, (x, images, labels) = backbone(), inputs(shots, queries)
    small = inputs(1)
    with torch.no_grad():
        model.segment(*small)  # libraries loaded, pools warm
        before = memory("VmRSS")
        if way == "published":
            published(model.network, x, images, labels)
        elif way == "kept":
            model.answer(x, Context(images[0], labels))
        else:
            model.segment(x, images, labels)
    out.put(memory("VmHWM") - before)


def peak(way: str, shots: int, queries: int = 1) -> float:
    """MiB above what the process held before the call."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_peak, args=(way, shots, queries, out))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the {way} arrangement ended with {process.exitcode}; is there enough memory?")
    return float(out.get())


def main() -> None:
    """Measure and write `results/universeg_speed`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    model = backbone()
    deviation = check(data_root().parent / "golden" / "universeg.safetensors")
    record: dict[str, Any] = {**facts(), "size": SIZE, "repeats": repeats, "published_deviates": deviation, "rows": []}
    rows = []
    for shots in SHOTS:
        x, images, labels = inputs(shots)
        context = Context(images[0], labels)
        twin = _low(model)

        def at_half(m: UniverSeg = twin, given: tuple[Tensor, ...] = (x, images, labels)) -> Tensor:
            return m.segment(*(t.bfloat16() for t in given))

        calls: dict[str, Callable[[], Any]] = {
            "published": lambda x=x, i=images, y=labels: published(model.network, x, i, y),
            "here": lambda x=x, i=images, y=labels: model.segment(x, i, y),
            "support kept": lambda x=x, c=context: model.answer(x, c),
            "here, bf16": at_half,
        }
        with torch.no_grad():
            times = rounds(calls, repeats=repeats)
        peaks = {
            "published": peak("published", shots),
            "here": peak("here", shots),
            "support kept": peak("kept", shots),
        }
        for name in calls:
            gain = ratio(times, "published", name)
            share = peaks[name] / peaks["published"] if name in peaks else None
            record["rows"].append(
                {"shots": shots, "way": name, "seconds": times[name], "faster": gain, "peak_mib": peaks.get(name)}
            )
            rows.append(
                [
                    shots,
                    name,
                    f"{median(times[name]):.3f}",
                    f"{gain:.2f}x",
                    f"{peaks[name]:.0f}" if share else "",
                    f"{share:.2f}x" if share else "",
                ]
            )
    x, images, labels = inputs(16, 16)
    with torch.no_grad():
        many = rounds(
            {
                "16 queries": lambda: model.segment(x, images, labels),
                "1 query": lambda: model.segment(x[:1], images, labels),
            },
            repeats=repeats,
        )
    each = ratio(many, "16 queries", "1 query") / 16
    peaks16 = {"one": peak("here", 16), "sixteen": peak("here", 16, 16)}
    record["sixteen_queries"] = {"time_a_query": each, **{f"peak_mib_{k}": v for k, v in peaks16.items()}}
    said = "not checked, the golden tensors are not here" if deviation is None else f"{deviation:.1e}"
    text = f"""# UniverSeg: time and memory

Logits for one query at {SIZE} x {SIZE} from S labelled images, fp32 unless said, two threads. "Published" is the arrangement of the authors'
code (concatenate every pair, then convolve), written in the benchmark with the same weights; its largest deviation from the authors'
own output: {said}. Medians of {repeats} interleaved rounds; "faster" is the median ratio within a round. Peaks in MiB above the loaded process.

{table(["S", "arrangement", "seconds", "faster", "peak MiB", "of published"], rows)}

16 queries sharing one support of 16: {each:.2f}x the time of one query each; peak {peaks16["sixteen"]:.0f} MiB against {peaks16["one"]:.0f} MiB for one.

{footer(record)}
"""
    write("universeg_speed", record, text)


def _low(model: UniverSeg) -> UniverSeg:
    import copy

    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert isinstance(twin, UniverSeg)
    return twin


if __name__ == "__main__":
    main()
