"""What each visual token stands for, drawn on the image: the window it was made of, or where its query looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from adaptive_llava.hub_cards.space.view_boxes import Box, view_boxes
from adaptive_llava.modeling.view_arrangement import split_views
from adaptive_llava.modeling.view_geometry import ImageViews


SHORTEST_SHOWN = 480  # pixels of the longer side: smaller images are enlarged
LONGEST_SHOWN = 1024
_LINE, _HALO = (224, 33, 138), (255, 255, 255)
_GAP = 0.06  # of a window, left free around it


@dataclass(frozen=True, eq=False)
class ViewTokens:
    """What the tokens of one view stand for; coordinates are fractions of the view.

    Attributes:
        boxes: One box per window or query, (left, top, right, bottom).
        heat: Attention that each patch gets from all queries, `(height, width)`, from 0 at the
            patch that gets least to 1 at the one that gets most; `None` for windows.
    """

    boxes: list[Box]
    heat: np.ndarray | None = None


def window_tokens(grid: tuple[int, int], window: int) -> ViewTokens:
    """Windows of `window x window` patches on a grid; trailing patches belong to none.

    Args:
        grid: Patches per side, `(height, width)`.
        window: Side of a window, in patches.
    """
    height, width = grid
    return ViewTokens(
        [
            (
                column * window / width,
                row * window / height,
                (column + 1) * window / width,
                (row + 1) * window / height,
            )
            for row in range(height // window)
            for column in range(width // window)
        ]
    )


def query_tokens(attention: Tensor, grid: tuple[int, int]) -> ViewTokens:
    """Where queries look, from their attention.

    A query's box has its centre of attention in the middle, and is as wide as a window over which even attention would
    spread as much (a side of `2 * sqrt(3)` standard deviations).

    Args:
        attention: `(count, height * width)`, rows sum to 1.
        grid: Patches per side, `(height, width)`.
    """
    weights = attention.float().unflatten(1, grid)
    spans = []
    for axis, length in ((2, grid[0]), (1, grid[1])):
        places = (torch.arange(length) + 0.5) / length
        share = weights.sum(axis)  # (count, height) or (count, width)
        centre = share @ places
        # each patch is as wide as 1 / length, and even attention to one patch spreads over it
        variance = (share @ places.square() - centre.square()).clamp(min=0) + 1 / (12 * length**2)
        reach = (3 * variance).sqrt()
        spans.append(((centre - reach).clamp(min=0).tolist(), (centre + reach).clamp(max=1).tolist()))
    (tops, bottoms), (lefts, rights) = spans
    heat = weights.sum(0)
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=torch.finfo(heat.dtype).eps)
    return ViewTokens(list(zip(lefts, tops, rights, bottoms, strict=True)), heat.numpy())


@torch.no_grad()
def tokens_of_views(model: Any, inputs: Any, rungs: Sequence[int]) -> list[ViewTokens]:
    """What the tokens of every view stand for.

    Args:
        model: An adaptive LLaVA model.
        inputs: With `pixel_values` and `image_sizes`.
        rungs: Rung of each view.

    Raises:
        ValueError: A compressor without an entry in the table.
    """
    compressor, grid = model.model.compressor, model.config.view_grid
    if compressor.type_name in _WINDOWS:
        return [window_tokens(grid, _WINDOWS[compressor.type_name](compressor, rung)) for rung in rungs]
    if compressor.type_name != "query_resampler":
        raise ValueError(
            f"What the tokens of the compressor {compressor.type_name!r} stand for is not known. Add it to `_WINDOWS` "
            f"in token_overlay.py; known: query_resampler, {', '.join(_WINDOWS)}."
        )
    features = model.model.extract_features(inputs["pixel_values"], inputs["image_sizes"])
    weights = [compressor.attention_weights(features.select([view]), rung) for view, rung in enumerate(rungs)]
    return [query_tokens(heads[0].mean(0).cpu(), features.grid) for heads in weights]


def overlays(
    model: Any, processor: Any, images: Sequence[Image.Image], inputs: Any, rungs: Sequence[int]
) -> list[tuple[Image.Image, str]]:
    """A picture with a caption for each image; an image in tiles has two, one of the whole and one of its tiles.

    Args:
        model: An adaptive LLaVA model.
        processor: Its processor.
        images: Images of the prompt.
        inputs: The same prompt as the model read it.
        rungs: Rung of each view.
    """
    tokens, pictures, start = tokens_of_views(model, inputs, rungs), [], 0
    for number, (image, cut) in enumerate(zip(images, _cuts(model, inputs), strict=True), start=1):
        boxes = view_boxes(model.config.tiling, processor.image_processor, (image.height, image.width), cut)
        views = list(zip(boxes, tokens[start : start + len(boxes)], strict=True))
        start += len(boxes)
        for part, shown in (("", views[:1]), (", tiles", views[1:])):
            if shown:
                drawn = sum(len(view.boxes) for _, view in shown)
                what = "query" if shown[0][1].heat is not None else "window"
                plural = {"query": "queries", "window": "windows"}[what] if drawn != 1 else what
                pictures.append((draw(image, shown), f"image {number}{part}: {drawn} {plural}"))
    return pictures


def draw(image: Image.Image, views: Sequence[tuple[Box, ViewTokens]]) -> Image.Image:
    """The image with the tokens of some of its views.

    Args:
        image: RGB.
        views: Where each view lies on the image, and its tokens.
    """
    longest = max(image.size)
    scale = min(max(longest, SHORTEST_SHOWN), LONGEST_SHOWN) / longest
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for box, view in views:
        left, top, right, bottom = (scale * value for value in box)
        across, down = right - left, bottom - top
        if view.heat is not None:
            _tint(canvas, (round(left), round(top)), (max(1, round(across)), max(1, round(down))), view.heat)
        pen = ImageDraw.Draw(canvas)
        for x0, y0, x1, y1 in view.boxes:
            place = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
            _outline(pen, place, round_shape=view.heat is not None)
    return canvas


def _tint(canvas: Image.Image, corner: tuple[int, int], size: tuple[int, int], heat: np.ndarray) -> None:
    mask = Image.fromarray((110 * heat).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    canvas.paste(Image.new("RGB", size, _LINE), corner, mask)


def _outline(pen: ImageDraw.ImageDraw, place: Box, *, round_shape: bool) -> None:
    left, top, right, bottom = place
    gap = 0 if round_shape else _GAP * min(right - left, bottom - top)
    inner = (left + gap, top + gap, right - gap, bottom - gap)
    if inner[2] - inner[0] < 1 or inner[3] - inner[1] < 1:
        return
    line = max(1, min(2, math.floor(min(right - left, bottom - top) / 12)))
    for width, colour in ((line + 2, _HALO), (line, _LINE)):
        if round_shape:
            pen.ellipse(inner, outline=colour, width=width)
        else:
            radius = min(8, (inner[2] - inner[0]) / 4)
            pen.rounded_rectangle(inner, radius, outline=colour, width=width)


def _cuts(model: Any, inputs: Any) -> tuple[ImageViews, ...]:
    images = len(inputs["image_sizes"])
    _, cuts = split_views(inputs["pixel_values"], inputs["image_sizes"], model.config.tiling)
    return (ImageViews(),) * images if cuts is None else cuts


# Side of the window that a token of a rung is made of, in patches.
_WINDOWS: dict[str, Callable[[Any, int], int]] = {
    "identity": lambda compressor, rung: 1,
    "average_pool": lambda compressor, rung: compressor.pool_factors[rung],
    "token_concat": lambda compressor, rung: compressor.window,
    "spatial_fusion": lambda compressor, rung: compressor.window,
}
