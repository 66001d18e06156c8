"""What a run leaves behind: a JSON-lines log, curves, and pictures with the prediction drawn over them.

The log has one object a line with at least "step"; numbers that are not finite are written as null, for JSON has no
NaN. Curves need matplotlib (the extra "plots"); overlays need only Pillow. H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import BadCall, BadData, SaveFailed, need
from ..images import save_picture

# Okabe and Ito's colours, told apart with any colour vision; green leads, for it is rarest in tissue and on film.
PALETTE = (
    (0, 158, 115),
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
)

_SHORT_SIDE_SHOWN, _LEGEND_FONT = 256, 14


class Log:
    """A JSON-lines file that is appended to, a flushed line at a time.

    with Log(run / "log.jsonl") as log:
        log.write(step=1, loss=0.7)

    With `resume_after` = s, lines of later steps (and a line cut short) are dropped first, so that a run that resumes
    at step s leaves the log of the uninterrupted run; without it an existing file is begun anew.
    Raises `SaveFailed` where the file cannot be written.
    """

    def __init__(self, path: str | Path, *, resume_after: int | None = None) -> None:
        self.path = Path(path)
        kept = [] if resume_after is None or not self.path.exists() else read_log(self.path)
        try:
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as refused:
            raise SaveFailed(f"could not write the log {self.path}: {refused}; does its folder exist?") from refused
        for record in kept:
            if resume_after is not None and record.get("step", 0) <= resume_after:
                self.write(**record)

    def write(self, **record: Any) -> None:
        """Append one record; tensors and NumPy numbers of one element are written as numbers."""
        line = json.dumps({key: _plain(value) for key, value in record.items()}, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as refused:
            raise SaveFailed(f"could not write the log {self.path}: {refused}") from refused

    def close(self) -> None:
        """Close the file; writing after that fails."""
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut short by a crash is left out. Raises `BadData` for any other bad line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as gone:
        raise BadData(f"no log at {path}: {gone}") from gone
    records = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as broken:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise BadData(f"{path}, line {number} is not a JSON object ({broken}); remove it") from None
        records.append(record)
    return records


def curves_png(log: str | Path | Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw every number of a log over its steps: losses on the left, everything else (Dice, ...) on the right.

    `log` is a file or its records. Raises `MissingExtra` without matplotlib, `BadData` for a log without numbers.
    """
    need("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log) if isinstance(log, str | Path) else list(log)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "seconds", "lr") or not _is_number(value) or not _is_number(record.get("step")):
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    if not curves:
        raise BadData("the log holds no numbers to draw; it needs records with a 'step' and a loss")
    losses = [name for name in curves if "loss" in name]
    sides = [names for names in (losses, [name for name in curves if name not in losses]) if names]
    figure = Figure(figsize=(5 * len(sides), 3.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global, no display, safe in threads
    for n, names in enumerate(sides, start=1):
        axes = figure.add_subplot(1, len(sides), n)
        for colour, name in enumerate(names):
            rgb = [channel / 255 for channel in PALETTE[colour % len(PALETTE)]]
            marker = "o" if len(curves[name][0]) < 30 else None
            axes.plot(*curves[name], label=name, color=rgb, marker=marker, markersize=3, linewidth=1.5)
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if names is losses else names[0] if len(names) == 1 else "score")
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False)
    canvas.draw()
    save_picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def heat_map_png(
    panels: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    *,
    across: str = "",
    down: str = "",
) -> None:
    """Draw tables (rows, columns) side by side by title, each number in its cell; a cell without one (NaN) is hatched.

    Raises `MissingExtra` without matplotlib, `BadCall` for a table of another shape.
    """
    need("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for title, table in panels.items():
        if table.shape != (len(rows), len(columns)):
            raise BadCall(f"{title!r} has shape {table.shape}, there are {len(rows)} rows and {len(columns)} columns")
    width = 1.5 + 0.08 * max(map(len, rows)) + 0.9 * len(columns)
    size = (max(width, 3.5) * max(len(panels), 1), 1.6 + 0.4 * len(rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for n, (title, table) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), n)
        axes.set_facecolor("0.95")
        axes.patch.set_hatch("///")
        axes.patch.set_edgecolor("0.8")
        axes.imshow(np.ma.masked_invalid(table), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, j in np.argwhere(~np.isnan(table)):
            ink = "white" if table[i, j] < 0.6 else "black"
            axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(down if n == 1 else "", fontsize=8)
    canvas.draw()
    save_picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def overlay_png(
    image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None, path: str | Path, classes: Mapping[int, str]
) -> None:
    """Save `image` uint8 (H, W, 3) with `mask` (H, W) filled half-transparently and `truth` (H, W) as outlines.

    `classes` names the values 1..k; those that occur stand in a legend below. Small pictures are enlarged.
    Raises `BadCall` for shapes that do not fit, `SaveFailed` where the file cannot be written.
    """
    drawn = [mask] if truth is None else [mask, truth]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BadCall(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    for values in drawn:
        if values.shape != image.shape[:2]:
            raise BadCall(f"a mask of shape {values.shape} cannot be drawn over an image of {image.shape[:2]}")

    factor = max(1, math.ceil(_SHORT_SIDE_SHOWN / min(image.shape[:2])))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    large = [np.kron(values, np.ones((factor, factor), values.dtype)) for values in drawn]
    present = [value for value in sorted(classes) if value != 0 and any((values == value).any() for values in drawn)]
    for value in present:
        inside = large[0] == value
        canvas[inside] = 0.5 * canvas[inside] + 0.5 * np.array(colour_of(value))
        canvas[edge(inside, 2)] = colour_of(value)
    for value in present if truth is not None else []:
        inside = large[-1] == value
        canvas[edge(inside, 3)] = (0, 0, 0)  # a dark line under a light one shows on any ground
        canvas[edge(inside, 2)] = np.array(colour_of(value)) * 0.5 + 127.5
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    note = "" if truth is None else "(fill: prediction, outline: truth)"
    save_picture(with_legend(picture, present, classes, note), path)


def colour_of(value: int) -> tuple[int, int, int]:
    """The colour of class `value` (1 up); beyond seven classes the palette repeats, lighter, then darker."""
    turn, place = divmod(value - 1, len(PALETTE))
    share, ground = ((1.0, 0), (0.5, 255), (0.6, 0))[turn % 3]
    red, green, blue = (round(share * channel + (1 - share) * ground) for channel in PALETTE[place])
    return red, green, blue


def edge(inside: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a region (H, W) that lie within `width` of its outside; the picture's border is no edge."""
    core = inside
    for _ in range(width):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def with_legend(picture: Image.Image, present: Sequence[int], classes: Mapping[int, str], note: str) -> Image.Image:
    """The picture with a strip below: a swatch and a name for each class, then `note`, wrapped to the width."""
    font = ImageFont.load_default(_LEGEND_FONT)
    words: list[tuple[str, tuple[int, int, int] | None]] = [(classes[value], colour_of(value)) for value in present]
    words = words or [("nothing found", None)]
    if note:
        words.append((note, None))
    height, gap, x, y = _LEGEND_FONT + 8, 8, 8, 4
    places = []
    for text, colour in words:
        width = math.ceil(font.getlength(text)) + (height if colour else 0)
        if x > gap and x + width > picture.width - gap:
            x, y = gap, y + height
        places.append((x, y, text, colour))
        x += width + 2 * gap
    widest = max(x + math.ceil(font.getlength(text)) + height + gap for x, _, text, _ in places)
    result = Image.new("RGB", (max(picture.width, widest), picture.height + y + height + 4), "white")
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    for x, y, text, colour in places:
        top = picture.height + y
        if colour is not None:
            draw.rectangle((x, top + 4, x + _LEGEND_FONT, top + 4 + _LEGEND_FONT), fill=colour, outline=(60, 60, 60))
            x += height
        draw.text((x, top + 2), text, fill=(30, 30, 30), font=font)
    return result


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers out of one-element arrays, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        listed = value.tolist()
        while isinstance(listed, list) and len(listed) == 1:
            listed = listed[0]
        return _plain(listed)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
