"""Pictures of the study: what an image looks like, crossed with how much of it a question can ask for.

| appearance | asks for little | asks for much |
|---|---|---|
| a board of shapes on soft ground | `scene`: one of them is whole | `mosaic`: all are |
| a board of shapes on textured ground | `busy_scene`: one is whole | `busy_mosaic`: all are |
| a form | `empty_form`: one entry is legible | `full_form`: all are |
| a large coloured digit behind small ones | `big_digit`: the large one is whole | `small_digits`: the small ones are |
| faint digits on a plain page | `faint_page`: one is legible | `faint_table`: all are |
| a chart under a coloured line | `title`: the line's colour | `chart`: the heights of the bars |
| a dense page under a coloured line | `header`: its colour; `page_1`, `page_2` | `page_4`, `page_8`, `table` |

Within a row all pictures are made alike, and what is not whole (of 36 digits, all but as many as the page is named
for) is in pieces: its blocks come from different items of the same sort, drawn at the same place. So each pixel has
the distribution that it has in a whole one, and what a picture can be asked for is seen by reading it, not by its ink
or its colours. A picture has a grid of cells, and one
patch of the models' vision tower sees one cell. Every picture is drawn from `(seed, index)` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
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
_RADIUS = 0.4  # of a shape, as a share of its box
_FAINTNESS = (50, 100)  # how much darker than its paper a faint digit is
_BRIGHT, _OPACITY = ("red", "green", "blue", "purple"), 0.8  # of a large digit, behind small dark ones


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


def _shapes(style: Style, ground: Callable[[Style], np.ndarray], whole: int) -> Any:
    """A board of coloured shapes, so many of them whole."""
    pixels, contents, side = ground(style), _ground_contents(style, ground), 2 * style.layout.cell
    stencils = _stencils(style.layout.cell)
    questions: list[tuple[str, str]] = []
    for box, is_whole in enumerate(_deal(style.rng, whole, style.layout.board**2)):
        shape, colour = int(style.rng.integers(len(SHAPES))), style.pick(list(COLOURS))
        mask = stencils[shape] if is_whole else in_pieces(style.rng, stencils, style.layout.cell)
        row, column = (side * at for at in divmod(box, style.layout.board))
        _paste(pixels, mask, row, column, np.asarray(COLOURS[colour]))
        _note(style.layout, contents, mask, (row, column), SHAPES[shape] if is_whole else "filler")
        if is_whole:
            place = None if whole == 1 else style.layout.squares[box]
            questions += [(ask("shape", place), SHAPES[shape]), (ask("colour", place), colour)]
    return pixels, questions, contents


def _form(style: Style, whole: int) -> Any:
    """Ruled lines, and an entry in every box, so many of them legible."""
    rng, pixels, size, cell = style.rng, _paper(style), style.layout.size, style.layout.cell
    ink, font, contents = _ink(rng), style.pick(style.fonts), _ground_contents(style, _paper)
    questions = []
    for line in range(cell + cell * 5 // 8, size, cell):
        pixels[line, cell // 2 : int(rng.integers(size // 2, size - cell // 2))] = ink
    glyphs = _digits(font, 2 * cell - 2)
    for box, is_whole in enumerate(_deal(rng, whole, style.layout.board**2)):
        digit = int(rng.integers(10))
        mask = glyphs[digit] if is_whole else in_pieces(rng, glyphs)
        row, column = (2 * cell * at for at in divmod(box, style.layout.board))
        pixels[row : row + 2 * cell, column : column + 2 * cell] = pixels[0, 0]
        corner = (row + int(rng.integers(3)), column + int(rng.integers(3)))
        _paste(pixels, mask, *corner, ink)
        _note(style.layout, contents, mask, corner, DIGITS[digit] if is_whole else "filler")
        if is_whole:
            questions.append((ask("digit", None if whole == 1 else style.layout.squares[box]), DIGITS[digit]))
    return pixels, questions, contents


def _large_and_small(style: Style, large_is_whole: bool) -> Any:
    """A large coloured digit behind a dark one in every cell: the large one is whole, or the small ones are."""
    rng, pixels, layout = style.rng, _paper(style), style.layout
    contents = np.full(layout.grid**2, CONTENTS.index("filler"))
    large = int(rng.integers(10))
    glyphs = _digits(style.pick(style.fonts), int(layout.size * rng.uniform(0.85, 0.95)))
    mask = glyphs[large] if large_is_whole else in_pieces(rng, glyphs)
    corner = tuple(int(at) for at in rng.integers(layout.size - len(mask) + 1, size=2))
    _paste(pixels, _OPACITY * mask, *corner, np.asarray(COLOURS[style.pick(_BRIGHT)]))
    questions = [(ask("digit"), DIGITS[large])] if large_is_whole else []
    for cell, place in enumerate(layout.cells):
        digit = int(rng.integers(10))
        digit_in_cell(style, pixels, cell, digit, _ink(rng), whole=not large_is_whole)
        if not large_is_whole:
            contents[cell] = digit
            questions.append((ask("digit", place), DIGITS[digit]))
    if large_is_whole:
        _note(layout, contents, mask, corner, DIGITS[large])
    return pixels, questions, contents


def _faint(style: Style, whole: int) -> Any:
    """Faint digits in a third of the cells, so many of them whole."""
    rng, pixels, layout = style.rng, _paper(style), style.layout
    contents = _ground_contents(style, _paper)
    questions = []
    cells = rng.permutation(layout.grid**2)[: layout.grid**2 // 3]
    for turn, cell in enumerate(cells):
        digit, ink = int(rng.integers(10)), pixels[0, 0] - rng.uniform(*_FAINTNESS)
        digit_in_cell(style, pixels, int(cell), digit, ink, whole=turn < whole)
        contents[cell] = digit if turn < whole else CONTENTS.index("filler")
        if turn < whole:
            questions.append((ask("digit", None if whole == 1 else layout.cells[cell]), DIGITS[digit]))
    return pixels, questions, contents


def _page(style: Style, whole_in_36: int) -> Any:
    """A coloured line over a page of digits, so many of them whole; with none, the line is asked for."""
    rng, layout, pixels = style.rng, style.layout, _ruled(style)
    contents = np.full(layout.grid**2, CONTENTS.index("filler"))
    below = layout.grid + rng.permutation(layout.grid**2 - layout.grid)
    whole = whole_in_36 * layout.grid**2 // 36
    questions = []
    for turn, cell in enumerate(below):
        digit = int(rng.integers(10))
        digit_in_cell(style, pixels, int(cell), digit, _ink(rng), whole=turn < whole)
        if turn < whole:
            contents[cell] = digit
            questions.append((ask("digit", layout.cells[cell]), DIGITS[digit]))
    header = _draw_header(style, pixels, contents)
    return pixels, questions or [header], contents


def _chart(style: Style, whole: bool) -> Any:
    """A coloured line over bars; where these are in pieces, the line is asked for."""
    rng, pixels, grid, cell = style.rng, _paper(style), style.layout.grid, style.layout.cell
    contents = np.full((grid, grid), CONTENTS.index("ground"))
    ink = _ink(rng)
    questions = []
    for column, bar in enumerate(style.layout.bars):
        height, width = int(rng.integers(1, grid)), int(cell * rng.uniform(0.5, 0.75))
        bars = _bars(style.layout, width, int(rng.integers(3)), outlined=bool(rng.random() < 0.5))
        mask = bars[height - 1] if whole else in_pieces(rng, bars, cell)
        _paste(pixels, mask, cell, column * cell + int(rng.integers(1, 3)), ink)
        contents[grid - height :, column] = CONTENTS.index("bar")
        questions.append((ask("height", bar), style.layout.heights[height - 1]))
    contents = contents.reshape(-1)
    if not whole:
        contents[:] = CONTENTS.index("filler")
    header = _draw_header(style, pixels, contents)
    return pixels, questions if whole else [header], contents


def _bars(layout: Layout, width: int, shift: int, *, outlined: bool) -> np.ndarray:
    """A bar of every height below the header, `(grid - 1, size - cell, width)`."""
    bars = np.zeros((layout.grid - 1, layout.size - layout.cell, width))
    for height in range(1, layout.grid):
        top = bars.shape[1] - height * layout.cell + shift
        bars[height - 1, top:] = 1
        if outlined:
            bars[height - 1, top + 1 :, 1:-1] = 0
    return bars


def _draw_header(style: Style, pixels: np.ndarray, contents: np.ndarray) -> tuple[str, str]:
    """A line of one colour in the first row of cells, drawn and noted; the question for it, and its answer."""
    colour, line = style.pick(list(COLOURS)), pixels[: style.layout.cell]
    line += (np.asarray(COLOURS[colour]) - line) * style.rng.uniform(0.75, 0.95)
    contents[: style.layout.grid] = CONTENTS.index(colour)
    return ask("header"), colour


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


def _deal(rng: np.random.Generator, whole: int, items: int) -> np.ndarray:
    """Which of the items are whole, `(items,)` bool."""
    return rng.permutation(items) < whole


def _soft(style: Style) -> np.ndarray:
    top, bottom = style.rng.uniform(170, 245, size=(2, 3))
    ramp = np.linspace(0, 1, style.layout.size)[:, None, None]
    return top * (1 - ramp) + bottom * ramp + style.rng.normal(0, 4, size=(style.layout.size, style.layout.size, 1))


def _textured(style: Style) -> np.ndarray:
    """A ruled page with a digit in pieces in every cell."""
    pixels = _ruled(style)
    for cell in range(style.layout.grid**2):
        digit_in_cell(style, pixels, cell, 0, _ink(style.rng), whole=False)
    return pixels


def _ground_contents(style: Style, ground: Callable[[Style], np.ndarray]) -> np.ndarray:
    return np.full(style.layout.grid**2, CONTENTS.index("filler" if ground is _textured else "ground"))


def _paper(style: Style) -> np.ndarray:
    tint = style.rng.uniform(200, 250) + style.rng.uniform(-8, 8, size=3)
    return np.broadcast_to(tint, (style.layout.size, style.layout.size, 3)) + style.rng.normal(
        0, 2, size=(style.layout.size, style.layout.size, 1)
    )


def _ruled(style: Style) -> np.ndarray:
    """Paper, perhaps with lines between the cells."""
    pixels, ruling, colour = _paper(style), style.pick(style.rulings), style.rng.uniform(160, 200)
    cell = style.layout.cell
    lines = slice(cell - 1, style.layout.size - 1, cell)
    if ruling in ("rows", "grid"):
        pixels[lines] = colour
    if ruling in ("columns", "grid"):
        pixels[:, lines] = colour
    if ruling == "dots":
        pixels[lines, ::2] = colour
    return pixels


def _ink(rng: np.random.Generator) -> np.ndarray:
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
    glyphs = _digits(style.pick(style.fonts), side - 1)
    mask = glyphs[digit] if whole else in_pieces(style.rng, glyphs)
    row, column = divmod(cell, style.layout.grid)
    down, right = style.rng.integers(2, size=2)
    _paste(pixels, mask, row * side + int(down), column * side + int(right), ink)


def _paste(pixels: np.ndarray, mask: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    height, width = mask.shape
    area = pixels[top : top + height, left : left + width]
    area += (ink - area) * mask[: area.shape[0], : area.shape[1], None]


def _note(layout: Layout, contents: np.ndarray, mask: np.ndarray, corner: Sequence[int], what: str) -> None:
    """Write into `contents` what the cells show of which an item covers enough."""
    covered = np.zeros((layout.size, layout.size))
    (top, left), (height, width) = corner, mask.shape
    covered[top : top + height, left : left + width] = mask[: layout.size - top, : layout.size - left]
    by_cell = covered.reshape(layout.grid, layout.cell, layout.grid, layout.cell).mean((1, 3)).reshape(-1)
    contents[by_cell > _VISIBLE_SHARE] = CONTENTS.index(what)


@cache
def _stencils(cell: int) -> np.ndarray:
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
def _digits(font: str, side: int) -> np.ndarray:
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


_ALL = 10**6  # more than any picture has

FAMILIES: dict[str, Callable[[Style], Any]] = {
    "scene": lambda style: _shapes(style, _soft, 1),
    "mosaic": lambda style: _shapes(style, _soft, _ALL),
    "busy_scene": lambda style: _shapes(style, _textured, 1),
    "busy_mosaic": lambda style: _shapes(style, _textured, _ALL),
    "empty_form": lambda style: _form(style, 1),
    "full_form": lambda style: _form(style, _ALL),
    "big_digit": lambda style: _large_and_small(style, True),
    "small_digits": lambda style: _large_and_small(style, False),
    "faint_page": lambda style: _faint(style, 1),
    "faint_table": lambda style: _faint(style, _ALL),
    "title": lambda style: _chart(style, False),
    "chart": lambda style: _chart(style, True),
    "header": lambda style: _page(style, 0),
    "page_1": lambda style: _page(style, 1),
    "page_2": lambda style: _page(style, 2),
    "page_4": lambda style: _page(style, 4),
    "page_8": lambda style: _page(style, 8),
    "table": lambda style: _page(style, _ALL),
}

# Families that look alike, from those that can be asked for little to those that can be asked for much.
LOOKS = (
    ("scene", "mosaic"),
    ("busy_scene", "busy_mosaic"),
    ("empty_form", "full_form"),
    ("big_digit", "small_digits"),
    ("faint_page", "faint_table"),
    ("title", "chart"),
    ("header", "page_1", "page_2", "page_4", "page_8", "table"),
)
PAIRS = tuple(pair for look in LOOKS for pair in combinations(look, 2))

# Families whose pictures have one thing to ask about, in one place or another.
SINGLE = ("scene", "busy_scene", "empty_form", "big_digit", "faint_page", "title", "header", "page_1")
