"""Predictions for image files: masks in the images' own sizes and overlays to look at, or a classifier's probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import Host
from ..adapters.files import write_text
from ..errors import BadCall
from ..images import read_image, write_mask
from .model import NAME
from .report import overlay_png


def predict_files(
    host: Host, images: Sequence[Path], out: Path, prompts: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Write STEM.png and STEM_overlay.png for each image (or predictions.json) into `out`; yields a line for each.

    `prompts` as of `Host.predict`, the same for every image.

    Every image is read before anything is written. Raises BadData for one that cannot be read, BadCall for two of one stem.
    """
    stems = [path.stem for path in images]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise BadCall(
            f"several images are called {', '.join(twice)}: their masks would overwrite one another; predict them one folder at a time"
        )
    for path in images:
        read_image(path)
    out.mkdir(parents=True, exist_ok=True)
    task = host.adapters[NAME].task
    answers = {}
    for path in images:
        pixels = read_image(path)
        answer = host.predict(pixels, NAME, prompts=prompts)
        if task.kind == "classify":
            answers[path.name] = answer
            best = max(answer, key=answer.get)
            yield f"{path.name}: {best} ({answer[best]:.2f})"
            continue
        write_mask(out / f"{path.stem}.png", answer)
        classes = dict(zip(task.values, task.classes, strict=True))
        overlay_png(pixels, answer, None, out / f"{path.stem}_overlay.png", classes)
        shares = ", ".join(f"{name} {(answer == value).mean():.1%}" for value, name in classes.items())
        yield f"{out / path.stem}.png: {shares}"
    if answers:
        write_text(out / "predictions.json", json.dumps(answers, indent=1) + "\n")
