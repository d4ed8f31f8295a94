"""The quickstart's picture: images with the windows each was pooled into, token counts and answers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image


_COLUMNS = 4
_SIDE = 256  # pixels an image is shown at
_RIGHT, _WRONG, _PLAIN = "#1b7f3b", "#c0392b", "#444444"


def draw_picture(rows: Sequence[dict[str, Any]], path: str | os.PathLike, *, title: str) -> None:
    """Writes a PNG with one panel per image.

    Args:
        rows: Per image `image` (path) and `tokens`; with `question`, `answer`, `right` and `expected` also those.
        path: File to write.
        title: Heading of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = math.ceil(len(rows) / _COLUMNS)
    figure = Figure(figsize=(2.7 * _COLUMNS, 3.35 * lines + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, row in zip(panels, rows, strict=False):
        _draw_panel(axes, row)
    figure.savefig(path, dpi=110)


def _draw_panel(axes: Any, row: dict[str, Any]) -> None:
    from matplotlib.patches import FancyBboxPatch

    with Image.open(row["image"]) as image:
        axes.imshow(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    side = math.isqrt(row["tokens"])
    window, gap = _SIDE / side, 5
    for index in range(side * side):
        corner = (index % side * window + gap, index // side * window + gap)
        size = window - 2 * gap
        axes.add_patch(
            FancyBboxPatch(
                corner, size, size, boxstyle="round,pad=0,rounding_size=9", fill=False, edgecolor="#e0218a", linewidth=1.6
            )
        )
    axes.set_xlim(-3, _SIDE + 3)
    axes.set_ylim(_SIDE + 3, -3)
    plural = "token" if row["tokens"] == 1 else "tokens"
    axes.set_title(f"{row['tokens']} {plural}", fontsize=13, fontweight="bold", color="#e0218a", pad=5)
    if "answer" in row:
        mark = "✓" if row["right"] else f"✗ ({row['expected']})"
        caption, colour = f"{row['question']}?  {row['answer']} {mark}", _RIGHT if row["right"] else _WRONG
    else:
        caption, colour = shorten(Path(row["image"]).name, 34, placeholder="..."), _PLAIN
    axes.text(_SIDE / 2, _SIDE + 12, caption, ha="center", va="top", fontsize=10.5, color=colour)
