"""What a matrix says when it is filled: one record, tables in Markdown, a heat map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.files import write_text
from ..errors import MissingExtra
from .annotation_style import NEAR, annotation_style
from .matrix import Matrix
from .report import heat_map_png

MEASURES = {"dice": "Dice", "pr_area": "area under the precision-recall curve"}


def write_matrix(matrix: Matrix) -> dict[str, Any]:
    """Write `matrix.json`, `matrix.md` and (with matplotlib) `matrix.png` beside the cells; returns the record."""
    found = {**record(matrix), "annotation_style": annotation_style(matrix.sources)}
    write_text(matrix.out / "matrix.json", json.dumps(found, indent=1) + "\n")
    write_text(matrix.out / "matrix.md", markdown(found))
    with suppress(MissingExtra):  # the JSON holds the same numbers
        heat_map(found, matrix.out / "matrix.png")
    return found


def record(matrix: Matrix) -> dict[str, Any]:
    """Everything that was scored as plain facts: rows, columns, classes, seeds, settings, cells."""
    return {
        "rows": list(dict.fromkeys(row for row, _, _ in matrix.cells)),
        "columns": list(matrix.sources),
        "classes": matrix.classes,
        "seeds": sorted({seed for _, _, seed in matrix.cells}),
        "settings": dict(matrix.settings),
        "cells": list(matrix.cells.values()),
    }


def values(found: Mapping[str, Any], name: str, measure: str) -> np.ndarray:
    """One number for each row, column and seed of class `name`: float64 (rows, columns, seeds), NaN where there is none."""
    table = np.full((len(found["rows"]), len(found["columns"]), len(found["seeds"])), np.nan)
    for cell in found["cells"]:
        value = cell["classes"].get(name, {}).get(measure)
        if value is not None:
            at = found["rows"].index(cell["train"]), found["columns"].index(cell["test"])
            table[*at, found["seeds"].index(cell["seed"])] = value
    return table


def heat_map(found: Mapping[str, Any], path: Path) -> None:
    """Means over seeds, a panel for each class and measure. Raises MissingExtra without matplotlib."""
    panels = {
        f"{name}: {title}": _mean(values(found, name, measure))
        for name in found["classes"]
        for measure, title in MEASURES.items()
    }
    heat_map_png(panels, found["rows"], found["columns"], path, across="tested on", down="trained on")


def markdown(found: Mapping[str, Any]) -> str:
    """Tables: scores by class, what each row cost, and how the sources annotate where the record says it."""
    seeds = found["seeds"]
    text = ["# Cross-dataset matrix", ""]
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items() if not isinstance(v, dict | list | None))
    text += [f"Rows: trained on. Columns: tested on. Seeds {seeds}. {settings}".rstrip(), ""]
    for name in found["classes"]:
        text += [
            f"## {name}",
            "",
            "Dice (mean over images) / area under the precision-recall curve (over all pixels)",
            "",
        ]
        text += [*score_table(found, name), ""]
    text += [
        "## Cost",
        "",
        *_lines(["row", "training images", "seconds of training", "seconds a test set"], _costs(found)),
        "",
    ]
    style = style_text(found["annotation_style"]) if "annotation_style" in found else []
    return "\n".join([*text, *style]) + "\n"


def score_table(found: Mapping[str, Any], name: str) -> list[str]:
    """Lines of one table: mean over seeds, with the standard deviation of Dice where there are several; or why not."""
    scores = {measure: values(found, name, measure) for measure in MEASURES}
    cells = {(c["train"], c["test"]): c for c in reversed(found["cells"])}
    rows = []
    for i, row in enumerate(found["rows"]):
        shown = []
        for j, column in enumerate(found["columns"]):
            dice, area = (scores[measure][i, j] for measure in MEASURES)
            if np.isnan(dice).all():
                cell = cells.get((row, column), {})
                said = cell.get("classes", {}).get(name, {}).get("lacks") or cell.get("failed") or "not scored"
                shown.append(said.replace("|", "/"))
                continue
            kept = dice[~np.isnan(dice)]
            spread = f" ± {kept.std(ddof=1):.3f}" if len(kept) > 1 else ""
            note = f" ({len(kept)} of {len(dice)} seeds)" if len(kept) < len(dice) else ""
            shown.append(
                f"{kept.mean():.3f}{spread} / {np.nanmean(area) if not np.isnan(area).all() else float('nan'):.3f}{note}"
            )
        rows.append([row, *shown])
    return _lines(["", *found["columns"]], rows)


def style_text(style: Mapping[str, Any]) -> list[str]:
    """The annotation styles as Markdown lines."""
    rows = [
        [
            source,
            name,
            f["images"],
            f"{f['roughness']:.2f}",
            f"{f['size']['median']:.2f} ({f['size']['low']:.2f} to {f['size']['high']:.2f})",
            f"{f['pieces']:.1f}",
        ]
        for source, classes in style["sources"].items()
        for name, f in classes.items()
    ]
    header = ["source", "class", "images", "roughness", "piece, 1/10000 of the picture (quartiles)", "pieces an image"]
    near = "; ".join(" and ".join(group) if len(group) > 1 else f"{group[0]} alone" for group in style["groups"])
    apart = ", ".join(f"{pair}: {'-' if d is None else f'{d:.1f}'}" for pair, d in style["distances"].items())
    return [
        "## How the sources annotate",
        "",
        "Roughness: share of the outline that a slight smoothing removes, 0 smooth or coarse, towards 1 fine detail.",
        "",
        *_lines(header, rows),
        "",
        f"Distances (mean difference in standard deviations over images): {apart}.",
        f"Nearer than {NEAR:g}, so likely to belong together: {near}.",
    ]


def _costs(found: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for row in found["rows"]:
        cells = [c for c in found["cells"] if c["train"] == row and "seconds" in c]
        models = {c["seed"]: c["model"] for c in cells}.values()
        rows.append([row, *(_typical(m.get(k) for m in models) for k in ("images", "seconds"))])
        rows[-1].append(_typical(c["seconds"] for c in cells))
    return rows


def _typical(numbers: Iterable[float | None]) -> str:
    kept = [n for n in numbers if n is not None]
    return f"{np.median(kept):.3g}" if kept else "-"


def _mean(table: np.ndarray) -> np.ndarray:
    counted = ~np.isnan(table)
    total = np.where(counted, table, 0).sum(-1)
    return np.divide(total, counted.sum(-1), out=np.full(total.shape, np.nan), where=counted.any(-1))


def _lines(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
