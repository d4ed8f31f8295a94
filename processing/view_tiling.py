"""Images cut into the views that a model reads: AnyRes tiles, or the tiles of a mosaic.

Papers: see `view_geometry.py`. Tiles are cut from 8-bit images in front of any image processor for square inputs; an
image processor of LLaVA-NeXT or LLaVA-OneVision that came with a checkpoint cuts them itself, with equal pixels.
Shapes: N images -> `pixel_values (N, max_views, 3, S, S)`, padded with zeros behind an image's views
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .image_loading import shorten_extreme


# In a checkpoint this stands beside this file; in the installed package it does not.
try:
    from .view_geometry import ImageViews, best_resolution, cut_image
except ImportError:
    from adaptive_llava.modeling.view_geometry import ImageViews, best_resolution, cut_image


def cut_images(
    tiling: Mapping[str, Any], sizes: Sequence[Sequence[int]], whole: Sequence[bool] | None = None
) -> list[ImageViews]:
    """How each image is cut.

    Args:
        tiling: The model's options.
        sizes: Height and width of each image, in pixels.
        whole: Which images are shown whole; none by default.
    """
    if tiling["type"] != "anyres":
        return [ImageViews()] * len(sizes)
    whole = [False] * len(sizes) if whole is None else whole
    return [cut_image(tiling, size, whole=alone) for size, alone in zip(sizes, whole, strict=True)]


def in_company(tiling: Mapping[str, Any], images_per_prompt: Sequence[int] | None) -> list[bool] | None:
    """Which images a model shows whole because their prompt has several; `None`: it does not, or nothing is known."""
    if images_per_prompt is None or tiling.get("several_images") != "whole":
        return None
    return [number > 1 for number in images_per_prompt for _ in range(number)]


def before_padding(tiling: Mapping[str, Any], pixel_values: Any) -> list[bool] | None:
    """Like `in_company`, told from `pixel_values (N, max_views, 3, S, S)`: padding follows the only view."""
    if pixel_values is None or tiling.get("several_images") != "whole":
        return None
    return [not np.asarray(views[1:2]).any() for views in pixel_values]


def routed_views(tiling: Mapping[str, Any], cuts: Sequence[ImageViews], pixel_values: Any) -> Any:
    """Views as the model's router sees their pixels, `(V, 3, S, S)`: without padding, and of a mosaic the whole image.

    Args:
        tiling: The model's options.
        cuts: How each image is cut.
        pixel_values: What `view_pixels` or an image processor gave, one array per image.
    """
    if tiling["type"] == "mosaic":
        return np.stack([np.asarray(views)[-1] for views in pixel_values])
    if tiling["type"] == "anyres" and np.ndim(pixel_values[0]) == 4:
        views = [np.asarray(views)[: cut.views] for views, cut in zip(pixel_values, cuts, strict=True)]
        return np.concatenate(views)
    return pixel_values


def image_pixels(
    image_processor: Any,
    images: Sequence[Image.Image],
    cuts: Sequence[ImageViews],
    tiling: Mapping[str, Any],
    options: Mapping[str, Any],
    return_tensors: str | None = None,
) -> Any:
    """`pixel_values` of a call: `(N, 3, S, S)`, or of tiled images `(N, max_views, 3, S, S)`.

    Args:
        image_processor: For square inputs, or transformers' own for LLaVA-NeXT or LLaVA-OneVision.
        images: 8-bit RGB.
        cuts: How each image is cut.
        tiling: The model's options.
        options: Call options of the image processor.
        return_tensors: As in a call; without it a list with one array per image.

    Raises:
        ValueError: `do_rescale=False`, or a normalisation that gives no finite pixels.
    """
    if options.get("do_rescale") is False:
        raise ValueError(
            "`do_rescale=False` is not possible here: every image becomes 8-bit RGB first (fractions 0 to 1 are "
            "recognised as such). Leave it out."
        )
    if tiling["type"] == "none":
        pixels = square_pixels(image_processor, images, {**options, "return_tensors": return_tensors})
    else:
        pixels = view_pixels(image_processor, images, cuts, tiling, options)
        # one array: a tensor of a list of arrays is slow to build
        pixels = np.stack(pixels) if return_tensors else pixels
    # a call of a fast image processor gives tensors, on its device
    if not all(views.isfinite().all() if hasattr(views, "isfinite") else np.isfinite(views).all() for views in pixels):
        raise ValueError(
            f"`image_std={getattr(image_processor, 'image_std', None)!r}`, `image_mean` or `rescale_factor` of the "
            "image processor gives pixels that are not finite. Use the values of the model's own "
            "preprocessor_config.json; no deviation may be 0."
        )
    return pixels


def view_pixels(
    image_processor: Any,
    images: Sequence[Image.Image],
    cuts: Sequence[ImageViews],
    tiling: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[np.ndarray]:
    """Pixels of all images, one array `(max_views, 3, height, width)` each.

    Args:
        image_processor: For square inputs, or transformers' own for LLaVA-NeXT or LLaVA-OneVision.
        images: 8-bit RGB.
        cuts: How each image is cut.
        tiling: The model's options.
        options: Call options of the image processor.
    """
    options = {**options, "return_tensors": None}
    if _cuts_tiles(image_processor) and tiling["type"] == "anyres" and all(cut.views > 1 for cut in cuts):
        own = {"image_grid_pinpoints": tiling["pinpoints"], "do_pad": True}
        return [np.asarray(views) for views in image_processor(list(images), **{**options, **own})["pixel_values"]]
    resample = options.get("resample")
    resample = getattr(image_processor, "resample", None) if resample is None else resample
    resample = Image.Resampling.BICUBIC if resample is None else resample
    if tiling["type"] == "mosaic":
        views = [mosaic_tiles(image, tiling["n"]) for image in images]
    else:
        mean = getattr(image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        views = [
            anyres_tiles(image, tiling, resample) if cut.views > 1 else [on_square(image, mean)]
            for image, cut in zip(images, cuts, strict=True)
        ]
    flat = square_pixels(image_processor, [view for row in views for view in row], options)
    pixels = iter(np.stack([np.asarray(view) for view in flat]))
    most = max(len(row) for row in views)
    grouped = [np.stack([next(pixels) for _ in row]) for row in views]
    return [np.pad(row, ((0, most - len(row)), (0, 0), (0, 0), (0, 0))) for row in grouped]


def square_pixels(image_processor: Any, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Any:
    """Pixels of images that are one view each, `(N, 3, height, width)`; a list without `return_tensors`."""
    tiles = _cuts_tiles(image_processor)
    size = options.get("size") or getattr(image_processor, "size", None) or {}
    if "shortest_edge" in dict(size) and not tiles:
        images = [shorten_extreme(image) for image in images]
    # arrays of a known layout: an image of 3 rows could be taken for 3 channels
    given = {**options, "input_data_format": "channels_last"}
    if tiles:
        given["image_grid_pinpoints"] = image_processor.image_grid_pinpoints[:1]
    pixels = image_processor([np.asarray(image) for image in images], **given)["pixel_values"]
    if not tiles:
        return pixels
    # the whole image comes first
    return pixels[:, 0] if hasattr(pixels, "shape") else [views[0] for views in pixels]


def anyres_tiles(image: Image.Image, tiling: Mapping[str, Any], resample: Any) -> list[Image.Image]:
    """The whole image squeezed into one tile, then the tiles of the best resolution row by row.

    The image keeps its aspect in the tiles, centred on black.
    """
    side = tiling["tile_size"]
    height, width = best_resolution((image.height, image.width), tiling["pinpoints"])
    wide, high = width / image.width, height / image.height
    inner = (width, min(math.ceil(image.height * wide), height))
    if wide >= high:
        inner = (min(math.ceil(image.width * high), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
    tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [image.resize((side, side), resample), *tiles]


def mosaic_tiles(image: Image.Image, n: int) -> list[Image.Image]:
    """`n * n` equal parts of an image row by row, then the whole image; pixels left over are dropped."""
    image = image.resize((max(n, image.width), max(n, image.height))) if min(image.size) < n else image
    width, height = image.width // n, image.height // n
    corners = [(column * width, row * height) for row in range(n) for column in range(n)]
    return [*(image.crop((left, top, left + width, top + height)) for left, top in corners), image]


def on_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image centred on a square of its longer side, in the mean colour (fractions of 255)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cuts_tiles(image_processor: Any) -> bool:
    return getattr(image_processor, "image_grid_pinpoints", None) is not None
