"""Where the views that a model reads lie on an image, in pixels of the image; the way back from `view_tiling.py`.

A box is (left, top, right, bottom); with padding it reaches beyond the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_llava.modeling.view_geometry import ImageViews, best_resolution


Box = tuple[float, float, float, float]


def view_boxes(tiling: Mapping[str, Any], image_processor: Any, size: tuple[int, int], cut: ImageViews) -> list[Box]:
    """One box per view of an image, in the order of its views.

    Args:
        tiling: Complete options.
        image_processor: What resizes a view to the tower's input; a mosaic's tiles are taken to be squeezed into it.
        size: Height and width of the image, in pixels.
        cut: How AnyRes cut it; without AnyRes `ImageViews()`.
    """
    height, width = size
    if tiling["type"] == "mosaic":
        n = tiling["n"]
        return [(0, 0, n * (width // n), n * (height // n))]
    if tiling["type"] == "none":
        return [_seen(image_processor, size)]
    if cut.views == 1:
        return [_square_around(size)]
    return [(0, 0, width, height), *_tiles(tiling, size, cut)]


def _tiles(tiling: Mapping[str, Any], size: tuple[int, int], cut: ImageViews) -> list[Box]:
    (height, width), side = size, tiling["tile_size"]
    canvas_height, canvas_width = best_resolution(size, tiling["pinpoints"])
    wide, high = canvas_width / width, canvas_height / height
    inner = (canvas_width, min(math.ceil(height * wide), canvas_height))
    if wide >= high:
        inner = (min(math.ceil(width * high), canvas_width), canvas_height)
    left, top = (canvas_width - inner[0]) // 2, (canvas_height - inner[1]) // 2
    across, down = width / inner[0], height / inner[1]  # pixels of the image per pixel of the canvas

    def box(row: int, column: int) -> Box:
        x, y = column * side - left, row * side - top
        return x * across, y * down, (x + side) * across, (y + side) * down

    return [box(row, column) for row in range(cut.tiles[0]) for column in range(cut.tiles[1])]


def _seen(image_processor: Any, size: tuple[int, int]) -> Box:
    height, width = size
    if getattr(image_processor, "do_pad", None):
        return _square_around(size)
    resized, crop = dict(image_processor.size), getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", None) or "shortest_edge" not in resized:
        return 0, 0, width, height
    pixels = min(width, height) / resized["shortest_edge"]  # of the image per pixel of the resized one
    across, down = pixels * crop["width"], pixels * crop["height"]
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _square_around(size: tuple[int, int]) -> Box:
    height, width = size
    side = max(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
