"""A service: many adapters on one backbone, chosen by request, added and removed while it runs.

    python examples/serve_fastapi.py medgraft:starter-vit polyp=runs/polyp glands=runs/glands --port 8000

    curl localhost:8000/health
    curl -F image=@colon.png localhost:8000/predict/polyp -o mask.png
    curl -F archive=@skin.zip localhost:8000/adapters/skin
    curl -F description=@adapter.json -F tensors=@adapter.safetensors localhost:8000/adapters/skin
    curl -X DELETE localhost:8000/adapters/skin

It listens on the loopback interface and asks nobody who they are: put it behind something that does. Needs fastapi, uvicorn and
python-multipart.
"""

import argparse
import io
import os
import tempfile
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi.responses import JSONResponse
from PIL import Image

import medgraft
from medgraft.errors import BadCall, UnknownName

Name = Annotated[str, InPath(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
FILES = {"adapter.json": 1 << 20, "adapter.safetensors": 1 << 30}


def create_app(backbone: str, adapters: dict[str, str], *, max_upload: int = 32 << 20, at_once: int = 0) -> FastAPI:
    """The service. `max_upload` bounds a request's bytes; `at_once` images are computed at a time (default: one a core)."""
    host = medgraft.Host(medgraft.load_backbone(backbone))
    for name, directory in adapters.items():
        host.add(medgraft.load_adapter(directory), name)

    app = FastAPI(title="medgraft")
    app.add_middleware(Limit, max_bytes=max_upload)
    app.add_exception_handler(medgraft.MedgraftError, refused)
    app.add_exception_handler(Exception, broken)
    turn = threading.BoundedSemaphore(at_once or os.cpu_count() or 1)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Alive, and with what."""
        return {"status": "ok", "backbone": backbone, "adapters": sorted(host.adapters)}

    @app.post("/predict/{name}")
    def predict(name: Name, image: UploadFile) -> Response:
        """A picture to its label map as a PNG of the same size; a classifier answers with probabilities."""
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / f"image{PurePosixPath(image.filename or '').suffix[:8]}"
            path.write_bytes(image.file.read())
            with turn:
                answer = host.predict(path, name)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        png = io.BytesIO()
        Image.fromarray(answer).save(png, "PNG")
        return Response(png.getvalue(), media_type="image/png")

    @app.post("/adapters/{name}", status_code=201)
    def add(
        name: Name,
        archive: UploadFile | None = None,
        description: UploadFile | None = None,
        tensors: UploadFile | None = None,
    ) -> dict[str, Any]:
        """Make an adapter resident: a zip of its folder, or its two files."""
        if archive is not None:
            files = unzipped(archive, max_upload)
        elif description is not None and tensors is not None:
            files = {"adapter.json": description.file.read(), "adapter.safetensors": tensors.file.read()}
        else:
            raise HTTPException(
                422, "send a zip as `archive`, or adapter.json as `description` and adapter.safetensors as `tensors`"
            )
        if name in host.adapters:
            raise HTTPException(409, f"an adapter called {name!r} is resident; delete it first, or choose another name")
        with tempfile.TemporaryDirectory() as place:
            for file, content in files.items():
                (Path(place) / file).write_bytes(content)
            host.add(medgraft.load_adapter(place), name)
        return {"added": name}

    @app.delete("/adapters/{name}")
    def remove(name: Name) -> dict[str, Any]:
        """Take an adapter out; requests that it is serving end well."""
        host.remove(name)
        return {"removed": name}

    return app


def unzipped(archive: UploadFile, limit: int) -> dict[str, bytes]:
    """The two files of an adapter in a zip, of bounded size; nothing is written, other entries are not opened."""
    try:
        with zipfile.ZipFile(archive.file) as opened:
            entries = [(PurePosixPath(e.filename).name, e) for e in opened.infolist()]
            wanted = [(name, e) for name, e in entries if name in FILES]
            if sorted(name for name, _ in wanted) != sorted(FILES):
                raise HTTPException(422, f"the zip must hold one {' and one '.join(FILES)}")
            files = {}
            for name, entry in wanted:
                with opened.open(entry) as stream:
                    files[name] = stream.read(min(limit, FILES[name]) + 1)
                if len(files[name]) > min(limit, FILES[name]):
                    raise HTTPException(413, f"{name} unpacks to more than {min(limit, FILES[name]):,} bytes")
            return files
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as damaged:
        raise HTTPException(422, f"this is not a zip that can be read ({type(damaged).__name__})") from None


class Limit:
    """Refuse bodies over `max_bytes`, by what they declare and by what arrives.

    What is refused is still read, up to eight times the limit, and thrown away: a client that is cut off while it sends would
    never see the answer.
    """

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.said = f"a request may hold at most {max_bytes:,} bytes"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await self.discard(receive)
            return await JSONResponse({"detail": self.said}, 413, {"connection": "close"})(scope, receive, send)
        arrived = 0

        async def counted() -> Any:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self.max_bytes:
                await self.discard(receive)
                raise HTTPException(413, self.said, {"connection": "close"})
            return message

        await self.app(scope, counted, send)

    async def discard(self, receive: Any) -> None:
        """Read on, and keep nothing."""
        left, more = 8 * self.max_bytes, True
        while more and left > 0:
            message = await receive()
            left, more = left - len(message.get("body", b"")), message.get("more_body", False)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """What the caller can fix: our own message, without the server's paths."""
    status = 404 if isinstance(error, UnknownName) else 409 if isinstance(error, BadCall) else 422
    words = [
        word.rpartition("/")[2] if word.startswith(tempfile.gettempdir()) else word for word in str(error).split(" ")
    ]
    return JSONResponse({"detail": " ".join(words)}, status)


async def broken(request: Request, error: Exception) -> JSONResponse:
    """Our fault: the traceback goes to the log, not to the caller."""
    return JSONResponse({"detail": "internal error; see the server's log"}, 500)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("adapters", nargs="*", metavar="NAME=DIRECTORY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-upload", type=int, default=32 << 20, help="bytes of a request (default: 32 MiB)")
    a = parser.parse_args()
    torch.set_num_threads(1)  # one core an image, several images at a time
    named = dict(pair.split("=", 1) for pair in a.adapters)
    uvicorn.run(create_app(a.backbone, named, max_upload=a.max_upload), host="127.0.0.1", port=a.port)


if __name__ == "__main__":
    main()
