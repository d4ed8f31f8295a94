"""From pixels to views in front of the vision tower, and from views to images behind the projector.

Papers and Differs from the LLaVA authors' code: see `view_geometry.py`.
Shapes: AnyRes: pixels (N, max_views, 3, S, S) -> (V, 3, S, S); tokens of V views -> tokens of N images, with newlines.
Mosaic: pixels (N, n*n + 1, 3, S, S) -> features of N views, (N, n * height * n * width, dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .view_geometry import FRAME_SIZE, ImageViews, cut_image, shrunk_grid, unpadded_grid
from .visual_token_geometry import Grid
from .visual_tokens import VisionFeatures, VisualTokens, to_host


class ViewArrangement(nn.Module):
    """Joins the tokens of an image's views: the whole image first, then its tiles with newline tokens between.

    Args:
        dim: Width of the language model.
        view_layout: `"spatial_unpad"` or `"sequence"`; see `check_tiling`.
        max_tiles: Shrink larger maps of `"spatial_unpad"` to about so many tiles.
    """

    def __init__(self, dim: int, *, view_layout: str, max_tiles: int | None = None):
        super().__init__()
        self.view_layout = view_layout
        self.max_tiles = max_tiles
        self.image_newline = nn.Parameter(torch.empty(dim))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as LLaVA-NeXT's: about as long as a token of unit length."""
        nn.init.normal_(self.image_newline, std=self.image_newline.numel() ** -0.5)

    def forward(
        self, tokens: VisualTokens, images: Sequence[ImageViews], grids: Sequence[Grid | None]
    ) -> VisualTokens:
        """Tokens per image.

        Args:
            tokens: Tokens of all views, an image's views adjacent; `values (sum(lengths), dim)`.
            images: How each image is cut.
            grids: Grid of each view's tokens, `(height, width)`; `"sequence"` does without.
        """
        # newlines stand behind all tokens, then the maps that were shrunk; in the graph also where no image has one
        pool = [tokens.values, self.image_newline.to(tokens.values).unsqueeze(0)]
        newline = torch.tensor([len(tokens.values)])
        pieces, view, start = [], 0, 0
        for image in images:
            lengths, tile = tokens.lengths[view : view + image.views], grids[view]
            if self.view_layout == "sequence":
                pieces.append(self._sequence(image, lengths, start, newline))
            else:
                assert tile is not None  # the config refuses such a compressor
                pieces.append(self._joined_map(image, tile, start, newline, pool))
            view, start = view + image.views, start + sum(lengths)
        index = torch.cat(pieces) if pieces else newline[:0]
        values = torch.cat(pool).index_select(0, index.to(tokens.values.device, non_blocking=True))
        return VisualTokens(values, tuple(len(piece) for piece in pieces))

    def _sequence(self, image: ImageViews, lengths: Sequence[int], start: int, newline: Tensor) -> Tensor:
        rows, columns = image.tiles
        whole, *tiles = torch.arange(start, start + sum(lengths)).split(list(lengths))
        lines = [torch.cat([*tiles[row * columns : (row + 1) * columns], newline]) for row in range(rows)]
        return torch.cat([whole, *lines])

    def _joined_map(self, image: ImageViews, tile: Grid, start: int, newline: Tensor, pool: list[Tensor]) -> Tensor:
        count = tile[0] * tile[1]
        index = torch.arange(start, start + image.views * count)
        if image.views == 1:
            return torch.cat([index, newline])
        # (rows, columns, height, width) -> (rows * height, columns * width)
        joined = index[count:].view(*image.tiles, *tile).transpose(1, 2).flatten(2).flatten(0, 1)
        height, width = unpadded_grid((joined.shape[0], joined.shape[1]), image.size)
        top, left = (joined.shape[0] - height) // 2, (joined.shape[1] - width) // 2
        joined = joined[top : top + height, left : left + width]
        shrunk = shrunk_grid((height, width), tile, self.max_tiles)
        if shrunk != (height, width):
            joined = self._shrink(joined, shrunk, pool)
        lines = torch.cat([joined, newline.expand(joined.shape[0], 1)], dim=1)
        return torch.cat([index[:count], lines.flatten()])

    def _shrink(self, joined: Tensor, grid: Grid, pool: list[Tensor]) -> Tensor:
        values = pool[0]
        tokens = values.index_select(0, joined.flatten().to(values.device, non_blocking=True))
        # (height * width, dim) -> (1, dim, height, width) -> (new height * new width, dim)
        picture = tokens.view(1, *joined.shape, -1).permute(0, 3, 1, 2)
        first = sum(len(part) for part in pool)
        pool.append(F.interpolate(picture, grid, mode="bilinear").flatten(2).squeeze(0).t())
        return torch.arange(first, first + grid[0] * grid[1]).view(grid)


def split_views(
    pixel_values: Tensor, image_sizes: Any, tiling: Mapping[str, Any]
) -> tuple[Tensor, tuple[ImageViews, ...] | None]:
    """Pixels as the tower reads them, and under AnyRes how each image is cut.

    Args:
        pixel_values: `(N, 3, height, width)` without tiling, or for images that AnyRes shows as a whole; else
            `(N, views, 3, height, width)`: under AnyRes the whole image, its tiles row by row and padding of zeros;
            of a mosaic the tiles row by row and the whole image last.
        image_sizes: Height and width of each image before any resizing, `(N, 2)` in pixels; AnyRes needs it.
        tiling: Complete options.

    Returns:
        Pixels `(views, 3, height, width)`, and the cuts or `None`.

    Raises:
        ValueError: A shape that does not fit the tiling, or the sizes.
    """
    kind, shape = tiling["type"], tuple(pixel_values.shape)
    crops = tiling["n"] ** 2 + 1 if kind == "mosaic" else 1
    expected = {
        "none": "one view per image, (num_images, 3, height, width)",
        "anyres": "(num_images, max_views, 3, height, width), or (num_images, 3, height, width) for whole images",
        "mosaic": f"(num_images, {crops}, 3, height, width): the tiles of a mosaic and the whole image",
    }
    dimensions = {"none": (4,), "anyres": (4, 5), "mosaic": (5,)}[kind]
    if len(shape) not in dimensions or shape[-3] != 3 or (kind == "mosaic" and shape[1] != crops):
        raise ValueError(
            f"`pixel_values` has shape {shape}; this model takes {expected[kind]}. Use the checkpoint's own processor."
        )
    if kind == "none":
        return pixel_values, None
    if kind == "mosaic":
        return pixel_values.flatten(0, 1), None
    if len(shape) == 4:
        return pixel_values, (ImageViews(),) * shape[0]
    images = _cuts(pixel_values, image_sizes, tiling)
    index = torch.cat([torch.arange(image.views) + number * shape[1] for number, image in enumerate(images)])
    views = pixel_values.flatten(0, 1)
    if len(index) < len(views):
        views = views.index_select(0, index.to(views.device, non_blocking=True))
    return views, images


def join_mosaic(features: VisionFeatures, n: int) -> VisionFeatures:
    """One view per image from `n * n` tiles and the whole image: (N * (n * n + 1)) views -> N views.

    The tiles' patches form one map of `n * height` rows; what describes an image as a whole comes from the whole one.
    """
    height, width = features.grid

    def whole(states: Tensor) -> Tensor:
        return states.unflatten(0, (-1, n * n + 1))[:, -1]

    def joined(states: Tensor) -> Tensor:
        tiles = states.unflatten(0, (-1, n * n + 1))[:, :-1].unflatten(2, features.grid).unflatten(1, (n, n))
        # (N, n, n, height, width, dim) -> (N, n * height * n * width, dim)
        return tiles.transpose(2, 3).flatten(1, 4)

    return replace(
        features,
        patches=joined(features.patches),
        grid=(n * height, n * width),
        cls=None if features.cls is None else whole(features.cls),
        pixels=whole(features.pixels),
        views_per_image=(1,) * (len(features.patches) // (n * n + 1)),
        blocks={layer: joined(states) for layer, states in features.blocks.items()},
        layer_cls=None if features.layer_cls is None else whole(features.layer_cls),
        overview=whole(features.patches),
    )


def _cuts(pixel_values: Tensor, image_sizes: Any, tiling: Mapping[str, Any]) -> tuple[ImageViews, ...]:
    number, held = pixel_values.shape[:2]
    if image_sizes is None:
        raise ValueError(
            "`image_sizes` is missing: the tiles of an image follow from its height and width before any resizing. "
            "Pass what the processor returns, (num_images, 2) in pixels."
        )
    sizes, padded = torch.as_tensor(image_sizes), None
    if tiling["several_images"] == "whole":
        # one of several images in a prompt: padding follows its first view, and no picture is all zeros
        padded = (pixel_values[:, 1:2] == 0).flatten(1).all(1)
    sizes, padded = to_host(sizes, padded)
    if sizes.shape != (number, 2) or any(min(size) < 1 and tuple(size) != FRAME_SIZE for size in sizes.tolist()):
        raise ValueError(
            f"`image_sizes` must be height and width of each of the {number} images, (num_images, 2) in pixels, got "
            f"{sizes.tolist()}. Pass what the processor returns."
        )
    alone = [False] * number if padded is None else padded.tolist()
    images = tuple(cut_image(tiling, size, whole=whole) for size, whole in zip(sizes.tolist(), alone, strict=True))
    for index, image in enumerate(images):
        if image.views > held:
            raise ValueError(
                f"`pixel_values` holds {held} views per image, but image {index} of {image.size[0]}x{image.size[1]} "
                f"pixels (height x width) has {image.views} with the pinpoints of this model. Use the checkpoint's "
                "own processor."
            )
    return images
