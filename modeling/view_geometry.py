"""How an image is cut into views and what it costs in visual tokens, in whole numbers.

Papers: AnyRes of LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and, with `max_tiles`, of
LLaVA-OneVision (https://arxiv.org/abs/2408.03326, section 3.2); mosaic: LLaVA-Mini, https://arxiv.org/abs/2501.03895,
section 4.2. The processor and the model both read this file. It needs no PyTorch.
Sizes and grids are (height, width), as in transformers; the LLaVA authors write (width, height).
Differs from the LLaVA authors' code, as transformers does: sides of an unpadded map are rounded to 7 digits before
they are cut to whole numbers, which changes about one image size in 100,000 (352x110 pixels: 1360 tokens, not 1262).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .visual_token_geometry import Grid, ImageCost, visual_token_grids, visual_token_ladder


VIEW_LAYOUTS = ("sequence", "spatial_unpad")
SEVERAL_IMAGES = ("tile", "whole")

_OPTIONS = {
    "none": (),
    "anyres": ("pinpoints", "view_layout", "max_tiles", "several_images", "tile_size"),
    "mosaic": ("n",),
}


_MOST_TILES_A_SIDE = 64

FRAME_SIZE = (0, 0)  # in `image_sizes` for a frame of a video, which AnyRes does not tile


class ImageViews(NamedTuple):
    """One image under AnyRes: a view of the whole, then its tiles row by row.

    Attributes:
        tiles: Rows and columns of tiles; (0, 0) if the whole image is the only view.
        size: Height and width of the image before any resizing, in pixels.
    """

    tiles: Grid = (0, 0)
    size: Grid = (0, 0)

    @property
    def views(self) -> int:
        """Views of the image, the whole one included."""
        return 1 + self.tiles[0] * self.tiles[1]


def check_tiling(
    tiling: Mapping[str, Any] | None, *, tower_size: int | Sequence[int] | None, num_rungs: int
) -> dict[str, Any]:
    """The options of a tiling with every default filled in.

    * `{"type": "none"}`: an image is one view.
    * `{"type": "anyres"}`: the whole image and its tiles, each a view.
      `pinpoints`: resolutions to tile, `[[height, width], ...]` in pixels; LLaVA-NeXT's by default.
      `view_layout`: `"spatial_unpad"` joins the tiles to one map, cuts off the padding and ends each row with a
      newline token: LLaVA-NeXT, and the default with one token count. `"sequence"` keeps tile after tile, each with
      the count its router chose, and ends each row of tiles with a newline: the default with several counts.
      `max_tiles`: shrink larger maps to about so many tiles (9 in LLaVA-OneVision); needs `"spatial_unpad"`.
      `several_images`: in a prompt with several images, `"tile"` each, or show each as a `"whole"` (OneVision).
      `tile_size`: side of a tile in pixels; the tower's own.
    * `{"type": "mosaic", "n": 2}`: n x n tiles whose features are joined to one view, beside the whole image.

    Args:
        tiling: Options with their `"type"`; `None` is no tiling.
        tower_size: Side of the tower's input, or its two sides, in pixels; `None` if its config does not tell.
        num_rungs: Token counts of the compressor.

    Raises:
        ValueError: Unknown type or option, or a value that cannot work.
    """
    tiling = {"type": "none"} if tiling is None else tiling
    if not isinstance(tiling, Mapping) or tiling.get("type") not in tuple(_OPTIONS):
        raise ValueError(f"`tiling={tiling!r}` must be a dict with a 'type': one of {', '.join(_OPTIONS)}.")
    kind = tiling["type"]
    unknown = sorted(set(tiling) - set(_OPTIONS[kind]) - {"type"})
    if unknown:
        raise ValueError(
            f"`tiling` of type {kind!r} has no option {', '.join(map(repr, unknown))}. "
            f"Known options: {', '.join(_OPTIONS[kind]) or 'none'}."
        )
    if kind == "anyres":
        return _check_anyres(tiling, tower_size, num_rungs)
    if kind == "mosaic":
        return {"type": kind, "n": _whole_number("n", tiling.get("n", 2), minimum=2, maximum=_MOST_TILES_A_SIDE)}
    return {"type": kind}


def check_joined_map(tiling: Mapping[str, Any], compressor: Mapping[str, Any], grid: Grid) -> None:
    """Refuse tokens that form no grid where tiles are to be joined to one map.

    Raises:
        ValueError: `view_layout="spatial_unpad"` with such a compressor.
    """
    if tiling.get("view_layout") == "spatial_unpad" and visual_token_grids(compressor, grid) is None:
        raise ValueError(
            f"`tiling.view_layout='spatial_unpad'` joins the tokens of all tiles to one map, but those of the "
            f"{compressor['type']!r} compressor form no grid. Use view_layout='sequence'."
        )


def view_grid(tiling: Mapping[str, Any], grid: Sequence[int]) -> Grid:
    """Patches per side of one view, for a tower that gives `grid`: a mosaic joins n x n of them."""
    n = tiling["n"] if tiling["type"] == "mosaic" else 1
    return n * grid[0], n * grid[1]


def cut_image(tiling: Mapping[str, Any], size: Sequence[int], *, whole: bool = False) -> ImageViews:
    """The views of one image under AnyRes.

    Args:
        tiling: Complete options.
        size: Height and width of the image, in pixels; `FRAME_SIZE` for a frame of a video.
        whole: Show it as a whole only: one of several images in its prompt, see `several_images`.
    """
    size = (int(size[0]), int(size[1]))
    if whole or size == FRAME_SIZE:
        return ImageViews(size=size)
    height, width = best_resolution(size, tiling["pinpoints"])
    return ImageViews((height // tiling["tile_size"], width // tiling["tile_size"]), size)


def best_resolution(size: Grid, pinpoints: Sequence[Sequence[int]]) -> Grid:
    """The resolution that keeps most of an image's pixels, then wastes fewest, then stands first in the list."""
    height, width = size
    ranked = []
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        ranked.append((-kept, target_height * target_width - kept))
    target_height, target_width = pinpoints[min(range(len(ranked)), key=ranked.__getitem__)]
    return int(target_height), int(target_width)


def unpadded_grid(grid: Grid, size: Grid) -> Grid:
    """What is left of a map of a padded image without the rows or columns that hold padding alone.

    Args:
        grid: Tokens per side of the map.
        size: Height and width of the image, in pixels.
    """
    height, width = grid
    if size[1] / size[0] > width / height:
        inside = int(round(size[0] * (width / size[1]), 7))
        return height - 2 * ((height - inside) // 2), width
    inside = int(round(size[1] * (height / size[0]), 7))
    return height, width - 2 * ((width - inside) // 2)


def shrunk_grid(grid: Grid, tile: Grid, max_tiles: int | None) -> Grid:
    """A map brought down to about `max_tiles` tiles of tokens; one whose sides are at most 1.1 times that is left."""
    if max_tiles is None:
        return grid
    ratio = math.sqrt(grid[0] * grid[1] / (max_tiles * tile[0] * tile[1]))
    if ratio <= 1.1:
        return grid
    return max(1, int(grid[0] // ratio)), max(1, int(grid[1] // ratio))


def image_costs(
    tiling: Mapping[str, Any], compressor: Mapping[str, Any], grid: Grid, images: Sequence[ImageViews]
) -> list[ImageCost]:
    """What each image costs at every rung, newline tokens included.

    Args:
        tiling: Complete options.
        compressor: The compressor's options.
        grid: Patches per side of one view.
        images: How each image is cut; without AnyRes `ImageViews()` each.
    """
    ladder = visual_token_ladder(compressor, grid)
    if tiling.get("view_layout") != "spatial_unpad":
        # one newline after each row of tiles
        return [ImageCost(ladder, units=image.views, newlines=image.tiles[0]) for image in images]
    grids = visual_token_grids(compressor, grid) or ()
    maps = {image: tuple(_map_tokens(image, tile, tiling["max_tiles"]) for tile in grids) for image in set(images)}
    return [
        ImageCost(
            tuple(count + extra for count, extra in zip(ladder, maps[image], strict=True)), views_per_unit=image.views
        )
        for image in images
    ]


def _map_tokens(image: ImageViews, tile: Grid, max_tiles: int | None) -> int:
    # tokens behind those of the whole image: a lone newline, or the map with one more column
    if image.views == 1:
        return 1
    whole = (image.tiles[0] * tile[0], image.tiles[1] * tile[1])
    height, width = shrunk_grid(unpadded_grid(whole, image.size), tile, max_tiles)
    return height * (width + 1)


def _check_anyres(tiling: Mapping[str, Any], tower_size: int | Sequence[int] | None, num_rungs: int) -> dict[str, Any]:
    sides = (tower_size,) if isinstance(tower_size, int) else tuple(tower_size or ())
    if len(set(sides)) > 1:
        raise ValueError(
            f"`tiling` of type 'anyres' cuts square tiles, but the tower reads images of {sides[0]}x{sides[1]} "
            "pixels. Use a tower with a square input, or tiling 'none' or 'mosaic'."
        )
    side = tiling.get("tile_size") or (sides[0] if sides else None)
    if side is None:
        raise ValueError(
            "`tiling.tile_size` is missing: the tower's config does not tell its input size. Pass it in pixels."
        )
    _whole_number("tile_size", side, minimum=1)
    if sides and side != sides[0]:
        raise ValueError(f"`tiling.tile_size={side}` must be the tower's input size, {sides[0]} pixels. Leave it out.")
    default = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    layout = tiling.get("view_layout") or VIEW_LAYOUTS[num_rungs == 1]
    pinpoints, max_tiles = tiling.get("pinpoints"), tiling.get("max_tiles")
    several = tiling.get("several_images", "tile")
    for name, value, known in (("view_layout", layout, VIEW_LAYOUTS), ("several_images", several, SEVERAL_IMAGES)):
        if value not in known:
            raise ValueError(f"`tiling.{name}={value!r}` is unknown. Pass one of: {', '.join(known)}.")
    if max_tiles is not None:
        _whole_number("max_tiles", max_tiles, minimum=1)
        if layout != "spatial_unpad":
            raise ValueError(
                f"`tiling.max_tiles={max_tiles}` shrinks the map that view_layout='spatial_unpad' joins the tiles to, "
                f"and {layout!r} makes none. Leave it out and name fewer `pinpoints`."
            )
    return {
        "type": "anyres",
        "pinpoints": _check_pinpoints(default if pinpoints is None else pinpoints, side),
        "view_layout": layout,
        "max_tiles": max_tiles,
        "several_images": several,
        "tile_size": side,
    }


def _check_pinpoints(pinpoints: Any, side: int) -> list[list[int]]:
    listed = (
        isinstance(pinpoints, (list, tuple))
        and pinpoints
        and all(
            isinstance(point, (list, tuple)) and len(point) == 2 and all(isinstance(pixels, int) for pixels in point)
            for point in pinpoints
        )
    )
    most = _MOST_TILES_A_SIDE * side
    if not listed or any(not side <= pixels <= most or pixels % side for point in pinpoints for pixels in point):
        raise ValueError(
            f"`tiling.pinpoints={pinpoints!r}` must be a non-empty list of [height, width] in pixels, each a multiple "
            f"of the tile's {side} pixels, up to {most}, like [[{side}, {2 * side}], [{2 * side}, {side}]]."
        )
    return [list(point) for point in pinpoints]


def _whole_number(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`tiling.{name}={value!r}` must be a whole number >= {minimum}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"`tiling.{name}={value!r}` must be a whole number of at most {maximum}.")
    return value
