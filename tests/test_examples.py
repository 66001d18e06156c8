"""The examples, run: the service over real HTTP with four workers, the others as a user would start them."""

import io
import json
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import medgraft
from medgraft.adapters import Adapter, ClassifierHead, Host, LinearHead, LoRA, Task
from medgraft.adapters.peft import export_peft, features_of, quiet
from medgraft.adapters.store import read_adapter, save_adapter
from medgraft.backbones import Backbone, load_backbone

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[1] / "examples"
STARTER = "random:medgraft:starter-vit"
POLYP = Task("segment", ("polyp",), (255,))


def example(name: str) -> ModuleType:
    """An example as a module, from its file."""
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapter_of(backbone: Backbone, seed: int, task: Task = POLYP, size: int = 64) -> Adapter:
    """A LoRA adapter with random numbers in the place of a training."""
    torch.manual_seed(seed)
    head = (ClassifierHead if task.kind == "classify" else LinearHead).on(backbone, task)
    adapter = Adapter.of(backbone, task, {"lora": LoRA.on(backbone, task, rank=4), "head": head}, size=size)
    with torch.no_grad():
        for t in adapter.parameters():
            t.add_(0.05 * torch.randn(t.shape))
    return adapter


def picture(seed: int, height: int = 70, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def zipped(directory: Path, **extra: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{directory.name}/{file.name}")
        for name, content in extra.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture(scope="module")
def starter() -> Backbone:
    return load_backbone(STARTER)


@pytest.fixture(scope="module")
def twenty(starter: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {f"a{i:02}": save_adapter(adapter_of(starter, i), place / f"a{i:02}") for i in range(20)}


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The service on a free loopback port, in a thread; its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def service(twenty: dict[str, Path]) -> Iterator[str]:
    app = example("serve_fastapi").create_app(STARTER, {n: str(d) for n, d in twenty.items()}, max_upload=2 << 20)
    with served(app) as address:
        yield address


def ask(client: Any, service: str, name: str, image: bytes) -> np.ndarray:
    answer = client.post(f"{service}/predict/{name}", files={"image": ("x.png", image)})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.array(Image.open(io.BytesIO(answer.content)))


def test_at_most_ten_lines_of_medgraft() -> None:
    for file in EXAMPLES.glob("*.py"):
        code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL).splitlines()
        ours = [line for line in code if re.search(r"\bmedgraft\b|\bhost[.(]", line) and 'title="' not in line]
        assert len(ours) <= 10, f"{file.name}: {len(ours)}"
        assert file.name != "plain_peft.py" or not ours
        assert f"`{file.name}`" in (EXAMPLES / "README.md").read_text()


def test_service_answers_as_direct_calls_do(service: str, starter: Backbone, twenty: dict[str, Path]) -> None:
    """Twenty adapters, four workers, each answer compared bit for bit."""
    host = Host(starter)
    for name, directory in twenty.items():
        host.add(read_adapter(directory), name)
    images = [picture(i, 70 + i, 50) for i in range(4)]
    jobs = [(name, i) for i in range(4) for name in twenty]
    wanted = {(name, i): host.predict(images[i], name) for name, i in jobs}
    assert len({m.tobytes() for m in wanted.values()}) > 40, "the adapters must differ for this to show anything"
    assert {v for m in wanted.values() for v in np.unique(m)} == {0, 255}
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(4) as workers:
        assert client.get(f"{service}/health").json() == {
            "status": "ok",
            "backbone": STARTER,
            "adapters": sorted(twenty),
        }
        got = dict(
            zip(jobs, workers.map(lambda job: ask(client, service, job[0], png(images[job[1]])), jobs), strict=True)
        )
    for job, mask in wanted.items():
        np.testing.assert_array_equal(got[job], mask)


def test_adapters_come_and_go_under_load(
    service: str, starter: Backbone, twenty: dict[str, Path], tmp_path: Path
) -> None:
    """Four workers ask for resident adapters while others are added (both ways) and removed: no request fails."""
    archive = zipped(save_adapter(adapter_of(starter, 99), tmp_path / "new"))
    two = {
        "description": (tmp_path / "new" / "adapter.json").read_bytes(),
        "tensors": (tmp_path / "new" / "adapter.safetensors").read_bytes(),
    }
    host = Host(starter)
    host.add(read_adapter(tmp_path / "new"), "new")
    host.add(read_adapter(twenty["a03"]), "a03")
    pixels = picture(5)
    wanted = {name: host.predict(pixels, name) for name in ("new", "a03")}
    stop = threading.Event()

    def worker(_: int) -> int:
        served = 0
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                np.testing.assert_array_equal(ask(client, service, "a03", png(pixels)), wanted["a03"])
                served += 1
        return served

    with ThreadPoolExecutor(4) as workers, httpx.Client(timeout=60) as client:
        running = [workers.submit(worker, i) for i in range(4)]
        try:
            for round in range(12):
                files = {"archive": archive} if round % 2 else two
                added = client.post(f"{service}/adapters/new", files=files)
                assert (added.status_code, added.json()) == (201, {"added": "new"})
                np.testing.assert_array_equal(ask(client, service, "new", png(pixels)), wanted["new"])
                assert client.delete(f"{service}/adapters/new").json() == {"removed": "new"}
                assert client.post(f"{service}/predict/new", files={"image": png(pixels)}).status_code == 404
        finally:
            stop.set()
        assert sum(r.result() for r in running) >= 12
    assert "new" not in httpx.get(f"{service}/health").json()["adapters"]


def test_service_refuses_politely(service: str, starter: Backbone, twenty: dict[str, Path], tmp_path: Path) -> None:
    hf = load_backbone("random:hf:vit", image_size=64)
    foreign = zipped(save_adapter(adapter_of(hf, 0), tmp_path / "foreign"))
    good = zipped(twenty["a00"])
    damaged = bytearray((twenty["a00"] / "adapter.safetensors").read_bytes())
    damaged[-3] ^= 1
    description = (twenty["a00"] / "adapter.json").read_bytes()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter.json", b" " * (64 << 20))
        archive.writestr("adapter.safetensors", b"")
    image = png(picture(0))
    begun = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
    cases: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("POST", "/predict/a99", {"files": {"image": image}}, 404, "no resident adapter called 'a99'"),
        ("POST", "/predict/a00", {"files": {"image": ("x.png", b"no picture")}}, 422, "image.png is no image"),
        ("POST", "/predict/a00", {"files": {"image": ("x.png", b"")}}, 422, "empty"),
        ("POST", "/predict/a00", {"files": {"image": ("x.dcm", image)}}, 422, "volume"),
        ("POST", "/predict/a00", {"files": {"image": ("x.png", image[:200])}}, 422, "image.png"),
        ("POST", "/predict/a00", {"data": {"image": "text"}}, 422, "image"),
        ("POST", "/predict/a00", {}, 422, "image"),
        ("POST", "/predict/a00", {"files": {"image": b"x" * (3 << 20)}}, 413, "at most 2,097,152 bytes"),
        (
            "POST",
            "/predict/a00",
            {
                "content": iter([begun, *[b"x" * 65536] * 48]),  # without a declared length
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            413,
            "at most",
        ),
        ("POST", "/adapters/a00", {"files": {"archive": good}}, 409, "resident"),
        ("POST", "/adapters/..%2Fx", {"files": {"archive": good}}, 404, ""),
        ("POST", "/adapters/.x", {"files": {"archive": good}}, 422, "name"),
        ("POST", "/adapters/x", {"files": {"archive": foreign}}, 422, "was made for random:hf:vit"),
        ("POST", "/adapters/x", {"files": {"archive": good[:500]}}, 422, "not a zip"),
        ("POST", "/adapters/x", {"files": {"archive": b"PK\x03\x04"}}, 422, "not a zip"),
        ("POST", "/adapters/x", {"files": {"archive": bomb.getvalue()}}, 413, "unpacks to more"),
        (
            "POST",
            "/adapters/x",
            {"files": {"archive": zipped(twenty["a00"], **{"b/adapter.json": b"{}"})}},
            422,
            "one adapter.json",
        ),
        (
            "POST",
            "/adapters/x",
            {"files": {"description": description, "tensors": bytes(damaged)}},
            422,
            "sha256 differs",
        ),
        ("POST", "/adapters/x", {"files": {"description": b"{}", "tensors": b""}}, 422, "adapter.json"),
        ("POST", "/adapters/x", {"files": {"description": description}}, 422, "adapter.safetensors"),
        ("POST", "/adapters/x", {}, 422, "archive"),
        ("DELETE", "/adapters/x", {}, 404, "no resident adapter called 'x'"),
        ("GET", "/adapters/a00", {}, 405, ""),
    ]
    with httpx.Client(timeout=60) as client:
        for method, path, options, status, said in cases:
            answer = client.request(method, service + path, **options)
            assert answer.status_code == status, (method, path, answer.status_code, answer.text)
            assert said in answer.text, (said, answer.text)
            assert "Traceback" not in answer.text
            assert "/tmp" not in answer.text, answer.text
        assert client.get(f"{service}/health").json()["adapters"] == sorted(twenty)
        extra = zipped(twenty["a00"], **{"evil.py": b"raise SystemExit", "../../evil": b"x", "README.md": b""})
        assert client.post(f"{service}/adapters/extra", files={"archive": extra}).status_code == 201
        assert client.delete(f"{service}/adapters/extra").status_code == 200
        np.testing.assert_array_equal(ask(client, service, "a00", image), ask(client, service, "a00", image))


def test_service_hides_its_own_failures(
    starter: Backbone, twenty: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = example("serve_fastapi").create_app(STARTER, {"a": str(twenty["a00"])})

    def fails(*_: Any) -> None:
        raise RuntimeError("a secret")

    with served(app) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        monkeypatch.setattr(medgraft.Host, "predict", fails)
        answer = httpx.post(f"{address}/predict/a", files={"image": png(picture(0))}, timeout=60)
        assert (answer.status_code, answer.json()) == (500, {"detail": "internal error; see the server's log"})
        monkeypatch.undo()
        assert httpx.post(f"{address}/predict/a", files={"image": png(picture(0))}, timeout=60).status_code == 200


def test_service_of_a_classifier(starter: Backbone, tmp_path: Path) -> None:
    adapter = adapter_of(starter, 0, Task("classify", ("healthy", "ill")))
    save_adapter(adapter, tmp_path / "c", dtype="float32")
    host = Host(starter)
    host.add(adapter, "c")
    with served(example("serve_fastapi").create_app(STARTER, {"c": str(tmp_path / "c")})) as address:
        answer = httpx.post(f"{address}/predict/c", files={"image": png(picture(0))}, timeout=60)
    assert answer.json() == host.predict(picture(0), "c")


def run(name: str, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example as a program; what it exits with."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return None


def test_batch_folder(
    starter: Backbone,
    twenty: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(picture(i, 60 + i, 90)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    folders = [tmp_path / "in", tmp_path / "out"]
    assert "notes.txt" in run("batch_folder", STARTER, twenty["a01"], *folders, monkeypatch=monkeypatch)
    assert "3 masks" in capsys.readouterr().out
    host = Host(starter)
    host.add(read_adapter(twenty["a01"]), "it")
    for i in range(3):
        mask = np.array(Image.open(tmp_path / "out" / f"{i}.png"))
        np.testing.assert_array_equal(mask, host.predict(picture(i, 60 + i, 90), "it"))
    (tmp_path / "in" / "notes.txt").unlink()
    assert run("batch_folder", STARTER, twenty["a01"], *folders, monkeypatch=monkeypatch) is None
    assert "python examples/batch_folder.py" in run("batch_folder", monkeypatch=monkeypatch)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers, of itself
@pytest.mark.parametrize("id", ["random:timm:vit_tiny_patch16_224?seed=1", "random:hf:vit"])
def test_plain_peft(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that knows timm or transformers and peft, and not medgraft, gets the adapted features."""
    backbone = load_backbone(id, image_size=64)
    adapter = adapter_of(backbone, 0)
    assert export_peft(adapter, backbone, tmp_path / "a") is not None
    network: Any = backbone.plain_copy(lambda site, base: base, share=False).network
    Image.fromarray(picture(0)).save(tmp_path / "x.png")
    if backbone.family == "vit":
        from safetensors.torch import save_model

        save_model(network, str(tmp_path / "w.safetensors"))
        which = ["--network", "timm:vit_tiny_patch16_224", "--weights", tmp_path / "w.safetensors"]
    else:
        with quiet():
            network.save_pretrained(tmp_path / "network")
        which = ["--network", tmp_path / "network"]
    mean, std = (["--" + name, *map(str, getattr(adapter.preprocessing, name))] for name in ("mean", "std"))
    arguments = [tmp_path / "a", tmp_path / "x.png", tmp_path / "f.npy", "--size", 64, *which, *mean, *std]
    if backbone.family == "vit":  # in a process that has never heard of medgraft
        code = f"import sys, runpy; sys.modules['medgraft'] = None; sys.argv = {['x', *map(str, arguments)]}"
        program = f"{code}; runpy.run_path({str(EXAMPLES / 'plain_peft.py')!r}, run_name='__main__')"
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)
    else:
        run("plain_peft", *arguments, monkeypatch=monkeypatch)
    wanted = features_of(adapter, backbone, adapter.preprocessing(picture(0))[None])
    got = np.load(tmp_path / "f.npy")
    np.testing.assert_allclose(got, (wanted.pooled if backbone.family == "vit" else wanted.tokens).numpy(), atol=3e-5)
    assert "medgraft" not in re.sub(r'""".*?"""', "", (EXAMPLES / "plain_peft.py").read_text(), flags=re.DOTALL)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.slow
@pytest.mark.parametrize("id", [STARTER, "random:hf:vit"])
def test_onnx_export(id: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = load_backbone(id)
    adapter = adapter_of(backbone, 0, size=backbone.spec.image_size)
    save_adapter(adapter, tmp_path / "a")
    difference = example("onnx_export").export(id, str(tmp_path / "a"), tmp_path / "a.onnx")
    assert difference < 1e-4
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == ["a.onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    host = Host(backbone)
    host.add(read_adapter(tmp_path / "a"), "it")
    x = torch.randn(5, 3, backbone.spec.image_size, backbone.spec.image_size)
    (found,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        wanted = host(x, "it")
    assert float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max()) < 1e-4
