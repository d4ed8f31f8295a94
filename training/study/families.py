"""Pictures of the study: what an image looks like, crossed with how much of it a question can ask for.

| appearance | asks for little | asks for much |
|---|---|---|
| soft ground | `scene`: one shape | `mosaic`: a board of squares, each of its own colour |
| textured ground | `busy_scene`: one shape | `busy_mosaic`: a board of squares |
| plain page | `big_digit`; `empty_form`: a form without entries, and one sign | `faint_page`: one faint small digit |
| dense page | `header`: the colour of its first line | `table`: a digit in each cell |
| line drawing | | `chart`: the height of each bar |
| page of filled cells | `page_1`, `page_2`: 1 or 2 in 36 cells hold a digit | `page_4`, `page_8`: 4 or 8 in 36 |

What fills the other cells of a page, and the textured ground, is made of digits too: their pixels in another order,
so that ink does not tell what can be asked. A picture has a grid of cells, and one patch of the models' vision tower
sees one cell. Every picture is drawn from `(seed, index)` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptive_llava.training.rendered_images import COLOURS, DIGITS, SHAPES, fill_shape


CONTENTS = (*DIGITS, *COLOURS, *SHAPES, "bar", "filler", "ground")  # what a patch can show, by class number

# Fonts and rulings of the training pictures, and those that only test pictures have. matplotlib brings the fonts.
TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
    "cmss10",
    "cmb10",
)
TEST_FONTS = ("DejaVuSansMono", "DejaVuSans-Oblique", "cmtt10")
TRAINING_RULINGS, TEST_RULINGS = ("none", "rows", "grid"), ("columns", "dots")

_VISIBLE_SHARE = 0.15  # something counts as seen in a cell of which it covers more than this
_OVERSAMPLING = 2  # shapes are drawn larger and reduced, for smooth edges
_FAINT = 100  # how much darker than its paper a faint digit is at most


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
        return tuple(f"height{height}" for height in range(1, self.grid + 1))

    def vocabulary(self) -> list[str]:
        """Every word that occurs in a question or an answer, sorted."""
        asked = {"which", "at", "colour", "shape", "digit", "header", "height"}
        return sorted(asked.union(self.cells, self.squares, self.bars, self.heights, COLOURS, SHAPES, DIGITS))


@dataclass(frozen=True)
class Picture:
    """One picture with everything that is known about it.

    Args:
        pixels: RGB, `(size, size, 3)`, uint8.
        family: A name in `FAMILIES`.
        questions: All `(question, answer)` pairs that can be asked about it.
        contents: What each cell shows, as indices into `CONTENTS`, row-major, `(grid * grid,)`.
    """

    pixels: np.ndarray
    family: str
    questions: tuple[tuple[str, str], ...]
    contents: np.ndarray

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


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


def render(
    count: int,
    *,
    seed: int,
    layout: Layout = Layout(),
    test: bool = False,
    families: Sequence[str] | None = None,
    start: int = 0,
) -> list[Picture]:
    """Draw `count` pictures, the families taking turns.

    Args:
        count: Number of pictures.
        seed: Sets with different seeds share no random numbers.
        layout: Size of the pictures.
        test: Use the fonts and rulings that training pictures never have.
        families: Families to draw, in turn; all by default.
        start: Index of the first picture, to draw a long series bit by bit.

    Raises:
        ValueError: A negative count or an unknown family.
    """
    families = list(FAMILIES if families is None else families)
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(f"`families={families}` must name some of {', '.join(FAMILIES)}, not {unknown}.")
    if count < 0 or start < 0:
        raise ValueError(f"`count={count}` and `start={start}` must not be negative.")
    fonts, rulings = (TEST_FONTS, TEST_RULINGS) if test else (TRAINING_FONTS, TRAINING_RULINGS)
    drawn = []
    for index in range(start, start + count):
        family = families[index % len(families)]
        style = Style(layout, np.random.default_rng((seed, int(test), index)), fonts, rulings)
        pixels, questions, contents = FAMILIES[family](style)
        drawn.append(Picture(pixels.clip(0, 255).astype(np.uint8), family, tuple(questions), contents))
    return drawn


def ask(what: str, place: str | None = None) -> str:
    """A question in the models' words."""
    return f"which {what}" if place is None else f"which {what} at {place}"


def _scene(style: Style, ground: Callable[[Style], np.ndarray]) -> Any:
    rng = style.rng
    shape, colour = style.pick(SHAPES), style.pick(list(COLOURS))
    radius = style.layout.size * rng.uniform(0.26, 0.38)
    centre = rng.uniform(radius + 1, style.layout.size - radius - 1, size=2)
    pixels = ground(style)
    mask = _shape_mask(style.layout, shape, centre, radius)
    contents = _ground_contents(style, ground)
    contents[_coverage(style.layout, mask) > _VISIBLE_SHARE] = CONTENTS.index(shape)
    return _blend(pixels, COLOURS[colour], mask), [(ask("colour"), colour), (ask("shape"), shape)], contents


def _mosaic(style: Style, ground: Callable[[Style], np.ndarray]) -> Any:
    rng, pixels, contents = style.rng, ground(style), _ground_contents(style, ground)
    questions, side = [], 2 * style.layout.cell
    for index, place in enumerate(style.layout.squares):
        colour = style.pick(list(COLOURS))
        row, column = divmod(index, style.layout.board)
        extent = int(side * rng.uniform(0.45, 0.75))
        top, left = (int(side * at + rng.integers(1, side - extent)) for at in (row, column))
        pixels[top : top + extent, left : left + extent] = COLOURS[colour]
        mask = np.zeros(pixels.shape[:2])
        mask[top : top + extent, left : left + extent] = 1
        contents[_coverage(style.layout, mask) > _VISIBLE_SHARE] = CONTENTS.index(colour)
        questions.append((ask("colour", place), colour))
    return pixels, questions, contents


def _big_digit(style: Style) -> Any:
    rng, pixels = style.rng, _paper(style)
    digit = int(rng.integers(10))
    glyph = _glyph(style.pick(style.fonts), digit, int(style.layout.size * rng.uniform(0.5, 0.75)))
    corner = _somewhere(rng, glyph, style.layout.size)
    _paste(pixels, glyph, *corner, _ink(rng))
    return pixels, [(ask("digit"), str(digit))], _contents_under(style.layout, glyph, corner, digit)


def _empty_form(style: Style) -> Any:
    """Lines for entries, none of them filled in, and one sign of 2 x 2 cells."""
    rng, pixels, size, cell = style.rng, _paper(style), style.layout.size, style.layout.cell
    ink = _ink(rng)
    for line in range(cell + cell * 5 // 8, size, cell):
        pixels[line, cell // 2 : int(rng.integers(size // 2, size - cell // 2))] = ink
    digit = int(rng.integers(10))
    glyph = _glyph(style.pick(style.fonts), digit, 2 * cell - 2)
    row, column = (int(at) * 2 * cell for at in rng.integers(style.layout.board, size=2))
    down, right = _somewhere(rng, glyph, 2 * cell)
    pixels[row : row + 2 * cell, column : column + 2 * cell] = pixels[0, 0]
    _paste(pixels, glyph, row + down, column + right, ink)
    contents = _contents_under(style.layout, glyph, (row + down, column + right), digit)
    return pixels, [(ask("digit"), str(digit))], contents


def _faint_page(style: Style) -> Any:
    rng, pixels = style.rng, _paper(style)
    digit, cell = int(rng.integers(10)), int(rng.integers(style.layout.grid**2))
    ink = pixels[0, 0] - rng.uniform(_FAINT / 2, _FAINT)
    digit_in_cell(style, pixels, cell, digit, ink)
    contents = np.full(style.layout.grid**2, CONTENTS.index("ground"))
    contents[cell] = digit
    return pixels, [(ask("digit"), str(digit))], contents


def _page(style: Style, share: float) -> Any:
    """A page on which a share of the cells holds a digit each, the others a digit's pixels in disorder."""
    entries = round(share * style.layout.grid**2)
    rng, pixels = style.rng, _paper(style)
    _rule(style, pixels)
    contents = np.full(style.layout.grid**2, CONTENTS.index("filler"))
    cells = rng.permutation(style.layout.grid**2)
    questions = []
    for place, cell in enumerate(cells):
        digit = int(rng.integers(10))
        digit_in_cell(style, pixels, int(cell), digit, _ink(rng), disorder=place >= entries)
        if place < entries:
            contents[cell] = digit
            questions.append((ask("digit", style.layout.cells[cell]), str(digit)))
    return pixels, questions, contents


def _header(style: Style) -> Any:
    pixels, _, contents = _page(style, style.rng.random())
    colour = style.pick(list(COLOURS))
    band = np.zeros(pixels.shape[:2])
    band[: style.layout.cell] = style.rng.uniform(0.75, 0.95)
    contents = contents.copy()
    contents[: style.layout.grid] = CONTENTS.index(colour)
    return _blend(pixels, COLOURS[colour], band), [(ask("header"), colour)], contents


def _chart(style: Style) -> Any:
    rng, pixels, grid, cell = style.rng, _paper(style), style.layout.grid, style.layout.cell
    contents = np.full((grid, grid), CONTENTS.index("ground"))
    ink = _ink(rng)
    questions = []
    for column, bar in enumerate(style.layout.bars):
        height = int(rng.integers(1, grid + 1))
        left = column * cell + int(rng.integers(1, 3))
        width = int(cell * rng.uniform(0.5, 0.75))
        top = style.layout.size - height * cell + int(rng.integers(0, 3))
        pixels[top:, left : left + width] = ink
        if rng.random() < 0.5:  # an outline
            pixels[top + 1 :, left + 1 : left + width - 1] = pixels[0, 0]
        contents[grid - height :, column] = CONTENTS.index("bar")
        questions.append((ask("height", bar), style.layout.heights[height - 1]))
    return pixels, questions, contents.reshape(-1)


def _soft(style: Style) -> np.ndarray:
    top, bottom = style.rng.uniform(170, 245, size=(2, 3))
    ramp = np.linspace(0, 1, style.layout.size)[:, None, None]
    return top * (1 - ramp) + bottom * ramp + style.rng.normal(0, 4, size=(style.layout.size, style.layout.size, 1))


def _textured(style: Style) -> np.ndarray:
    """A page on which every cell holds a digit's pixels in disorder."""
    return _page(style, 0)[0]


def _ground_contents(style: Style, ground: Callable[[Style], np.ndarray]) -> np.ndarray:
    return np.full(style.layout.grid**2, CONTENTS.index("filler" if ground is _textured else "ground"))


def _paper(style: Style) -> np.ndarray:
    tint = style.rng.uniform(200, 250) + style.rng.uniform(-8, 8, size=3)
    return np.broadcast_to(tint, (style.layout.size, style.layout.size, 3)) + style.rng.normal(
        0, 2, size=(style.layout.size, style.layout.size, 1)
    )


def _rule(style: Style, pixels: np.ndarray) -> None:
    ruling, colour = style.pick(style.rulings), style.rng.uniform(160, 200)
    cell = style.layout.cell
    lines = slice(cell - 1, style.layout.size - 1, cell)
    if ruling in ("rows", "grid"):
        pixels[lines] = colour
    if ruling in ("columns", "grid"):
        pixels[:, lines] = colour
    if ruling == "dots":
        pixels[lines, ::2] = colour


def _ink(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(10, 80) + rng.uniform(-10, 10, size=3)


def digit_in_cell(
    style: Style, pixels: np.ndarray, cell: int, digit: int, ink: np.ndarray, *, disorder: bool = False
) -> None:
    """Draw a digit somewhere in a cell, or its pixels in another order.

    Args:
        style: Picks font and place.
        pixels: `(size, size, 3)`, changed in place.
        cell: Index of the cell, row-major.
        digit: 0 to 9.
        ink: Its colour, `(3,)`.
        disorder: Shuffle the pixels of the digit.
    """
    side = style.layout.cell
    glyph = _glyph(style.pick(style.fonts), digit, side - 1)
    if disorder:
        glyph = style.rng.permutation(glyph.reshape(-1)).reshape(glyph.shape)
    row, column = divmod(cell, style.layout.grid)
    down, right = _somewhere(style.rng, glyph, side)
    _paste(pixels, glyph, row * side + down, column * side + right, ink)


def _somewhere(rng: np.random.Generator, glyph: np.ndarray, room: int) -> tuple[int, int]:
    down, right = (int(rng.integers(0, max(1, room - side + 1))) for side in glyph.shape)
    return down, right


def _paste(pixels: np.ndarray, glyph: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    height, width = glyph.shape
    area = pixels[top : top + height, left : left + width]
    area += (ink - area) * glyph[: area.shape[0], : area.shape[1], None]


def _contents_under(layout: Layout, glyph: np.ndarray, corner: tuple[int, int], digit: int) -> np.ndarray:
    """Cells over which a large digit lies show it, the others the ground."""
    mask = np.zeros((layout.size, layout.size))
    (top, left), (height, width) = corner, glyph.shape
    mask[top : top + height, left : left + width] = glyph
    return np.where(_coverage(layout, mask) > _VISIBLE_SHARE, digit, CONTENTS.index("ground"))


def _coverage(layout: Layout, mask: np.ndarray) -> np.ndarray:
    """Share of each cell that a mask `(size, size)` covers, `(grid * grid,)`."""
    return mask.reshape(layout.grid, layout.cell, layout.grid, layout.cell).mean((1, 3)).reshape(-1)


def _blend(pixels: np.ndarray, colour: Sequence[int], mask: np.ndarray) -> np.ndarray:
    return pixels + (np.asarray(colour) - pixels) * mask[..., None]


def _shape_mask(layout: Layout, shape: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, `(size, size)`, 0 to 1."""
    stencil = Image.new("L", (_OVERSAMPLING * layout.size,) * 2)
    fill_shape(ImageDraw.Draw(stencil), shape, centre * _OVERSAMPLING, radius * _OVERSAMPLING)
    return np.asarray(stencil.reduce(_OVERSAMPLING)) / 255


@cache
def _glyph(font: str, digit: int, height: int) -> np.ndarray:
    """A digit's ink, 0 to 1, cropped; at most `height` pixels in height and width."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    for size in range(2 * height, 0, -1):
        mask = Image.new("L", (4 * height, 4 * height))
        ImageDraw.Draw(mask).text((height, height), DIGITS[digit], fill=255, font=ImageFont.truetype(str(path), size))
        glyph = np.asarray(mask.crop(mask.getbbox())) / 255
        if max(glyph.shape) <= height:
            return glyph
    raise ValueError(f"`height={height}` is too small for a digit.")


FAMILIES: dict[str, Callable[[Style], Any]] = {
    "scene": lambda style: _scene(style, _soft),
    "mosaic": lambda style: _mosaic(style, _soft),
    "busy_scene": lambda style: _scene(style, _textured),
    "busy_mosaic": lambda style: _mosaic(style, _textured),
    "big_digit": _big_digit,
    "empty_form": _empty_form,
    "faint_page": _faint_page,
    "header": _header,
    "table": lambda style: _page(style, 1),
    "chart": _chart,
    "page_1": lambda style: _page(style, 1 / 36),
    "page_2": lambda style: _page(style, 2 / 36),
    "page_4": lambda style: _page(style, 4 / 36),
    "page_8": lambda style: _page(style, 8 / 36),
}

# Families whose pictures have one thing to ask about, in one place or another.
SINGLE = ("scene", "busy_scene", "big_digit", "empty_form")
