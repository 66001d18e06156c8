"""Requests per second and p95 of the example service, with 1 and with 20 adapters resident. `python -m benchmarks.bench_serving`.

The service of examples/serve_fastapi.py runs in a process of its own on the loopback interface; the client sends 256 x 256 pictures
from 4 workers that keep their connections. Rounds alternate between the two services, so that drift of the machine meets both alike;
the first round of each is thrown away. Besides, adapters are added and removed while the second one serves, and failures counted.
Client and service share the cores: what is compared is 1 against 20, not this machine with another.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from benchmarks.common import facts, footer, median, table, write
from medgraft.adapters import Adapter, Host, LinearHead, LoRA, Task
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, load_backbone
from medgraft.errors import BadData

SERVICE = Path(__file__).parents[1] / "examples" / "serve_fastapi.py"
WORKERS = 4


def starter() -> tuple[str, Backbone]:
    """The backbone that ships, or its architecture with random weights until it does."""
    try:
        return "medgraft:starter-vit", load_backbone("medgraft:starter-vit")
    except BadData:
        return "random:medgraft:starter-vit", load_backbone("random:medgraft:starter-vit")


def make_adapters(backbone: Backbone, place: Path, n: int) -> dict[str, Path]:
    """LoRA of rank 8 with random numbers: serving costs the same trained or not."""
    made, task = {}, Task("segment", ("thing",), (255,))
    for i in range(n):
        torch.manual_seed(i)
        parts = {"lora": LoRA.on(backbone, task), "head": LinearHead.on(backbone, task)}
        adapter = Adapter.of(backbone, task, parts)
        with torch.no_grad():
            for t in adapter.parameters():
                t.add_(0.05 * torch.randn(t.shape))
        made[f"a{i:02}"] = save_adapter(adapter, place / f"a{i:02}")
    return made


@contextmanager
def served(backbone: str, adapters: dict[str, Path]) -> Iterator[str]:
    """The service as a user starts it; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    named = [f"{name}={place}" for name, place in adapters.items()]
    command = [sys.executable, str(SERVICE), backbone, *named, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{address}/health", timeout=5)
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise RuntimeError(f"the service ended with status {process.returncode}") from None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def load(address: str, names: list[str], image: bytes, requests: int) -> tuple[float, list[float], list[bytes]]:
    """(seconds, each request's seconds, each answer) of `requests` from 4 workers, the adapters in turn."""
    seconds: list[float] = [0.0] * requests
    answers: list[bytes] = [b""] * requests

    def worker(first: int) -> None:
        with httpx.Client(timeout=120) as client:
            for i in range(first, requests, WORKERS):
                began = time.perf_counter()
                answer = client.post(f"{address}/predict/{names[i % len(names)]}", files={"image": ("x.png", image)})
                seconds[i], answers[i] = time.perf_counter() - began, answer.content
                answer.raise_for_status()

    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(worker, range(WORKERS)))
    return time.perf_counter() - began, seconds, answers


def changes_under_load(address: str, names: list[str], image: bytes, new: Path, requests: int) -> dict[str, int]:
    """Add and remove an adapter for as long as `requests` are served; what failed."""
    counts, stop = {"requests": requests, "failed": 0, "added and removed": 0}, threading.Event()

    def change() -> None:
        with httpx.Client(timeout=120) as client:
            while not stop.is_set():
                files = {
                    "description": (new / "adapter.json").read_bytes(),
                    "tensors": (new / "adapter.safetensors").read_bytes(),
                }
                client.post(f"{address}/adapters/new", files=files).raise_for_status()
                client.post(f"{address}/predict/new", files={"image": image}).raise_for_status()
                client.delete(f"{address}/adapters/new").raise_for_status()
                counts["added and removed"] += 1

    with ThreadPoolExecutor(1) as changer:
        changing = changer.submit(change)
        try:
            load(address, names, image, requests)
        except httpx.HTTPError:
            counts["failed"] += 1
        stop.set()
        changing.result()
    return counts


def picture() -> bytes:
    """256 x 256 pixels, the same every time."""
    out = io.BytesIO()
    smooth = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((256, 256), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def main(requests: int, rounds: int) -> dict[str, Any]:
    """Measure, and write results/serving.json and results/serving.md."""
    torch.set_num_threads(1)
    id, backbone = starter()
    image = picture()
    with tempfile.TemporaryDirectory() as place:
        adapters = make_adapters(backbone, Path(place), 21)
        new = adapters.pop("a20")
        first = {"a00": adapters["a00"]}
        with served(id, first) as one, served(id, adapters) as twenty:
            services = {1: (one, list(first)), 20: (twenty, list(adapters))}
            rates: dict[int, list[float]] = {n: [] for n in services}
            latencies: dict[int, list[float]] = {n: [] for n in services}
            answers: list[bytes] = []
            for round in range(rounds + 1):
                for n, (address, names) in services.items():
                    seconds, each, got = load(address, names, image, requests)
                    if round:
                        rates[n].append(requests / seconds)
                        latencies[n] += each
                    if n == 20:
                        answers = got
            changed = changes_under_load(twenty, list(adapters), image, new, requests)

        host = Host(backbone)
        pixels = np.array(Image.open(io.BytesIO(image)))
        for name, directory in adapters.items():
            host.add(read_adapter(directory), name)
        direct = {name: host.predict(pixels, name) for name in adapters}
        names = list(adapters)
        same = sum(
            bool(np.array_equal(np.array(Image.open(io.BytesIO(a))), direct[names[i % 20]]))
            for i, a in enumerate(answers)
        )
        started = time.perf_counter()
        for name in names:
            host.predict(pixels, name)
        bare = (time.perf_counter() - started) / len(names)

    def row(n: int) -> dict[str, float]:
        p50, p95 = (float(np.percentile(latencies[n], q)) * 1e3 for q in (50, 95))
        return {"requests_per_second": median(rates[n]), "p50_ms": p50, "p95_ms": p95}

    record = {
        **facts(),
        "backbone": id,
        "workers": WORKERS,
        "requests_a_round": requests,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "resident": {str(n): row(n) for n in services},
        "rate_20_over_1": statistics.median(b / a for a, b in zip(rates[1], rates[20], strict=True)),
        "answers_equal_to_direct_calls": f"{same} of {len(answers)}",
        "changes_under_load": changed,
        "direct_call_ms": bare * 1e3,
    }
    rows = [
        [n, f"{r['requests_per_second']:.1f}", f"{r['p50_ms']:.0f}", f"{r['p95_ms']:.0f}"]
        for n, r in record["resident"].items()
    ]
    markdown = "\n\n".join(
        [
            "# Serving: the FastAPI example",
            f"{id}, LoRA r=8 and a linear head, 256 x 256 pictures, {WORKERS} workers, {rounds} rounds of {requests} requests, "
            "service and client on the same cores.",
            table(["adapters resident", "requests/s (median)", "p50 ms", "p95 ms"], rows),
            f"Rate with 20 over rate with 1, median over rounds: {record['rate_20_over_1']:.2f}. "
            f"A direct call takes {bare * 1e3:.0f} ms on one thread. "
            f"Answers equal to direct calls, bit for bit: {record['answers_equal_to_direct_calls']}. "
            f"While {changed['requests']} requests were served, an adapter was added, used and removed "
            f"{changed['added and removed']} times: {changed['failed']} failed requests.",
            footer(record),
        ]
    )
    write("serving", record, markdown)
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="a round (default: 200)")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    main(a.requests, a.rounds)
