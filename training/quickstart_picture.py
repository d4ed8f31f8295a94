"""The quickstart's picture: images with token counts and answers, and the windows each was pooled into."""

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
_MARGIN, _ABOVE, _BELOW = 10, 34, 56  # pixels around it, for the texts
_WINDOW, _RIGHT, _WRONG, _PLAIN = "#e0218a", "#1b7f3b", "#c0392b", "#444444"


def draw_picture(rows: Sequence[dict[str, Any]], path: str | os.PathLike, *, title: str, windows: bool) -> None:
    """Writes a PNG with one panel per image.

    Args:
        rows: Per image `image` (path) and `tokens`; with `question`, `answer`, `right` and `expected` also those.
        path: File to write.
        title: Heading of the picture.
        windows: Draw the windows, where every token is one of a square grid.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = math.ceil(len(rows) / _COLUMNS)
    width = 0.01 * _COLUMNS * (_SIDE + 2 * _MARGIN)
    height, heading = 0.01 * lines * (_SIDE + _ABOVE + _BELOW), 0.5
    figure = Figure(figsize=(width, height + heading), facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold", y=1 - 0.15 / (height + heading), va="top")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    figure.subplots_adjust(left=0, right=1, bottom=0, top=height / (height + heading), wspace=0, hspace=0)
    for axes in panels:
        axes.axis("off")
    for axes, row in zip(panels, rows, strict=False):
        _draw_panel(axes, row, windows)
    figure.savefig(path, dpi=100)


def _draw_panel(axes: Any, row: dict[str, Any], windows: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    with Image.open(row["image"]) as image:
        axes.imshow(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    axes.set_xlim(-_MARGIN, _SIDE + _MARGIN)
    axes.set_ylim(_SIDE + _BELOW, -_ABOVE)
    side = math.isqrt(row["tokens"])
    window, gap = _SIDE / side, 4
    rounded: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=9",
        "fill": False,
        "edgecolor": _WINDOW,
        "linewidth": 1.6,
    }
    for index in range(side * side if windows else 0):
        corner = (index % side * window + gap, index // side * window + gap)
        axes.add_patch(FancyBboxPatch(corner, window - 2 * gap, window - 2 * gap, **rounded))
    centre = {"x": _SIDE / 2, "ha": "center"}
    count = f"{row['tokens']} token{'' if row['tokens'] == 1 else 's'}"
    axes.text(**centre, y=-6, s=count, va="bottom", fontsize=14, fontweight="bold", color=_WINDOW)
    if "answer" not in row:
        name = shorten(Path(row["image"]).name, 30, placeholder="...")
        axes.text(**centre, y=_SIDE + 6, s=name, va="top", fontsize=11, color=_PLAIN)
        return
    answer = f"{row['answer']}  ✓" if row["right"] else f"{row['answer']}  ✗  ({row['expected']})"
    colour = _RIGHT if row["right"] else _WRONG
    axes.text(**centre, y=_SIDE + 6, s=f"{row['question']}?", va="top", fontsize=11, color=_PLAIN)
    axes.text(**centre, y=_SIDE + 25, s=answer, va="top", fontsize=12, fontweight="bold", color=colour)
