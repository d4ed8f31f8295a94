"""What the study's pictures are drawn with: paper, grounds, digits, shapes, whole or in pieces.

Pixels are `(size, size, 3)` floats, changed in place. `contents` says what each cell of the grid shows, as indices
into `CONTENTS`, `(grid * grid,)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptive_llava.training.rendered_images import COLOURS, DIGITS, SHAPES, fill_shape


CONTENTS = (*DIGITS, *COLOURS, *SHAPES, "bar", "filler", "ground")  # what a patch can show, by class number

_VISIBLE_SHARE = 0.15  # something counts as seen in a cell of which it covers more than this
_OVERSAMPLING = 2  # shapes are drawn larger and reduced, for smooth edges
_RADIUS = 0.4  # of a shape, as a share of its box


@dataclass(frozen=True)
class Layout:
    """Size of the pictures.

    Args:
        grid: Cells per side, a multiple of 6.
        cell: Pixels per side of a cell, at least 8.
    """

    grid: int = 6
    cell: int = 8

    def __post_init__(self) -> None:
        if self.grid < 6 or self.grid % 6:
            raise ValueError(f"`grid={self.grid}` must be a multiple of 6, so that windows of 2 and 3 cells fit.")
        if self.cell < 8:
            raise ValueError(f"`cell={self.cell}` must be at least 8 pixels: a digit has to be legible in it.")

    @property
    def size(self) -> int:
        """Pixels per side."""
        return self.grid * self.cell

    @property
    def board(self) -> int:
        """Squares per side of a mosaic: one for every 2 x 2 cells."""
        return self.grid // 2

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the cells, row-major."""
        return tuple(f"r{row}c{column}" for row in range(self.grid) for column in range(self.grid))

    @property
    def squares(self) -> tuple[str, ...]:
        """Names of a mosaic's squares, row-major."""
        return tuple(f"square-{row}-{column}" for row in range(self.board) for column in range(self.board))

    @property
    def bars(self) -> tuple[str, ...]:
        """Names of a chart's bars, left to right."""
        return tuple(f"bar{column}" for column in range(self.grid))

    @property
    def heights(self) -> tuple[str, ...]:
        """Names of the heights that a bar can have, in cells."""
        return tuple(f"height{height}" for height in range(1, self.grid))

    def vocabulary(self) -> list[str]:
        """Every word that occurs in a question or an answer, sorted."""
        asked = {"which", "at", "colour", "shape", "digit", "header", "height"}
        return sorted(asked.union(self.cells, self.squares, self.bars, self.heights, COLOURS, SHAPES, DIGITS))


@dataclass(frozen=True)
class Style:
    """Random choices that all parts of a picture share.

    Args:
        layout: Size of the picture.
        rng: Where they come from.
        fonts: Names of matplotlib's fonts, to pick from.
        rulings: Names of rulings, to pick from.
    """

    layout: Layout
    rng: np.random.Generator
    fonts: tuple[str, ...]
    rulings: tuple[str, ...]

    def pick(self, options: Sequence[str]) -> str:
        return str(options[int(self.rng.integers(len(options)))])


def soft(style: Style) -> np.ndarray:
    """A ground that goes from one pale colour to another."""
    top, bottom = style.rng.uniform(170, 245, size=(2, 3))
    ramp = np.linspace(0, 1, style.layout.size)[:, None, None]
    return top * (1 - ramp) + bottom * ramp + style.rng.normal(0, 4, size=(style.layout.size, style.layout.size, 1))


def textured(style: Style) -> np.ndarray:
    """A ruled page with a digit in pieces in every cell."""
    pixels = ruled(style)
    for cell in range(style.layout.grid**2):
        digit_in_cell(style, pixels, cell, 0, any_ink(style.rng), whole=False)
    return pixels


def contents_of(layout: Layout, what: str) -> np.ndarray:
    """Contents of a picture of which every cell shows the same."""
    return np.full(layout.grid**2, CONTENTS.index(what))


def paper(style: Style) -> np.ndarray:
    """A ground of one pale colour."""
    tint = style.rng.uniform(200, 250) + style.rng.uniform(-8, 8, size=3)
    return np.broadcast_to(tint, (style.layout.size, style.layout.size, 3)) + style.rng.normal(
        0, 2, size=(style.layout.size, style.layout.size, 1)
    )


def ruled(style: Style) -> np.ndarray:
    """Paper, perhaps with lines between the cells."""
    pixels, ruling, colour = paper(style), style.pick(style.rulings), style.rng.uniform(160, 200)
    cell = style.layout.cell
    lines = slice(cell - 1, style.layout.size - 1, cell)
    if ruling in ("rows", "grid"):
        pixels[lines] = colour
    if ruling in ("columns", "grid"):
        pixels[:, lines] = colour
    if ruling == "dots":
        pixels[lines, ::2] = colour
    return pixels


def any_ink(rng: np.random.Generator) -> np.ndarray:
    """A dark colour, `(3,)`."""
    return rng.uniform(10, 80) + rng.uniform(-10, 10, size=3)


def digit_in_cell(
    style: Style, pixels: np.ndarray, cell: int, digit: int, ink: np.ndarray, *, whole: bool = True
) -> None:
    """Draw a digit somewhere in a cell, or one in pieces.

    Args:
        style: Picks font and place.
        pixels: `(size, size, 3)`, changed in place.
        cell: Index of the cell, row-major.
        digit: 0 to 9.
        ink: Its colour, `(3,)`.
        whole: Whether it can be read.
    """
    side = style.layout.cell
    glyphs = digit_masks(style.pick(style.fonts), side - 1)
    mask = glyphs[digit] if whole else in_pieces(style.rng, glyphs)
    row, column = divmod(cell, style.layout.grid)
    down, right = style.rng.integers(2, size=2)
    paste(pixels, mask, row * side + int(down), column * side + int(right), ink)


def in_pieces(rng: np.random.Generator, masks: np.ndarray, block: int | None = None) -> np.ndarray:
    """An item in pieces: its blocks come from as many items as there are, so each pixel keeps its distribution.

    Args:
        rng: Picks the items.
        masks: Items of one sort at one place, `(items, height, width)`.
        block: Side of a block in pixels; a quarter of the height, but at least 2, by default.
    """
    _, height, width = masks.shape
    block = block or max(2, height // 4)
    rows, columns = -(-height // block), -(-width // block)
    items = rng.permutation(len(masks))[rng.permutation(rows * columns) % len(masks)]
    chosen = items.reshape(rows, columns).repeat(block, 0).repeat(block, 1)[:height, :width]
    return np.take_along_axis(masks, chosen[None], 0)[0]


def paste(pixels: np.ndarray, mask: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    """Blend ink into the pixels under a mask `(height, width)` of 0 to 1."""
    height, width = mask.shape
    area = pixels[top : top + height, left : left + width]
    area += (ink - area) * mask[: area.shape[0], : area.shape[1], None]


def note(layout: Layout, contents: np.ndarray, mask: np.ndarray, corner: Sequence[int], what: str) -> None:
    """Write into `contents` what the cells show of which an item covers enough."""
    covered = np.zeros((layout.size, layout.size))
    (top, left), (height, width) = corner, mask.shape
    covered[top : top + height, left : left + width] = mask[: layout.size - top, : layout.size - left]
    by_cell = covered.reshape(layout.grid, layout.cell, layout.grid, layout.cell).mean((1, 3)).reshape(-1)
    contents[by_cell > _VISIBLE_SHARE] = CONTENTS.index(what)


@cache
def shape_masks(cell: int) -> np.ndarray:
    """How much of each pixel of a box of 2 x 2 cells every shape covers, `(shapes, 2 * cell, 2 * cell)`, 0 to 1."""
    side = 2 * cell
    stencils = []
    for shape in SHAPES:
        stencil = Image.new("L", (_OVERSAMPLING * side,) * 2)
        centre = np.full(2, _OVERSAMPLING * side / 2)
        fill_shape(ImageDraw.Draw(stencil), shape, centre, _OVERSAMPLING * side * _RADIUS)
        stencils.append(np.asarray(stencil.reduce(_OVERSAMPLING)) / 255)
    return np.stack(stencils)


@cache
def digit_masks(font: str, side: int) -> np.ndarray:
    """Ink of each digit in the middle of a square, `(10, side, side)`, 0 to 1."""
    squares = np.zeros((10, side, side))
    for digit in range(10):
        glyph = _glyph(font, digit, side)
        top, left = ((side - extent) // 2 for extent in glyph.shape)
        squares[digit, top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return squares


@cache
def _glyph(font: str, digit: int, side: int) -> np.ndarray:
    """A digit's ink, 0 to 1, cropped; at most `side` pixels in height and width."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    for size in range(2 * side, 0, -1):
        mask = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(mask).text((side, side), DIGITS[digit], fill=255, font=ImageFont.truetype(str(path), size))
        glyph = np.asarray(mask.crop(mask.getbbox())) / 255
        if max(glyph.shape) <= side:
            return glyph
    raise ValueError(f"`side={side}` is too small for a digit.")
