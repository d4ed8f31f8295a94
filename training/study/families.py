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
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from adaptive_llava.training.rendered_images import COLOURS, DIGITS, SHAPES
from adaptive_llava.training.study.drawing import (
    CONTENTS,
    Layout,
    Style,
    any_ink,
    contents_of,
    digit_in_cell,
    digit_masks,
    in_pieces,
    note,
    paper,
    paste,
    ruled,
    shape_masks,
    soft,
    textured,
)


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

CPU_LAYOUT = Layout()

_FAINTNESS = (50, 100)  # how much darker than its paper a faint digit is
_BRIGHT, _OPACITY = ("red", "green", "blue", "purple"), 0.8  # of a large digit, behind small dark ones


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


def render(
    count: int,
    *,
    seed: int,
    layout: Layout = CPU_LAYOUT,
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


def _shapes(style: Style, *, on_texture: bool, whole: int) -> Any:
    """A board of coloured shapes, so many of them whole."""
    pixels, side = (textured if on_texture else soft)(style), 2 * style.layout.cell
    contents = contents_of(style.layout, "filler" if on_texture else "ground")
    stencils = shape_masks(style.layout.cell)
    questions: list[tuple[str, str]] = []
    for box, is_whole in enumerate(_deal(style.rng, whole, style.layout.board**2)):
        shape, colour = int(style.rng.integers(len(SHAPES))), style.pick(list(COLOURS))
        mask = stencils[shape] if is_whole else in_pieces(style.rng, stencils, style.layout.cell)
        row, column = (side * at for at in divmod(box, style.layout.board))
        paste(pixels, mask, row, column, np.asarray(COLOURS[colour]))
        note(style.layout, contents, mask, (row, column), SHAPES[shape] if is_whole else "filler")
        if is_whole:
            place = None if whole == 1 else style.layout.squares[box]
            questions += [(ask("shape", place), SHAPES[shape]), (ask("colour", place), colour)]
    return pixels, questions, contents


def _form(style: Style, whole: int) -> Any:
    """Ruled lines, and an entry in every box, so many of them legible."""
    rng, pixels, size, cell = style.rng, paper(style), style.layout.size, style.layout.cell
    ink, font, contents = any_ink(rng), style.pick(style.fonts), contents_of(style.layout, "ground")
    questions = []
    for line in range(cell + cell * 5 // 8, size, cell):
        pixels[line, cell // 2 : int(rng.integers(size // 2, size - cell // 2))] = ink
    glyphs = digit_masks(font, 2 * cell - 2)
    for box, is_whole in enumerate(_deal(rng, whole, style.layout.board**2)):
        digit = int(rng.integers(10))
        mask = glyphs[digit] if is_whole else in_pieces(rng, glyphs)
        row, column = (2 * cell * at for at in divmod(box, style.layout.board))
        pixels[row : row + 2 * cell, column : column + 2 * cell] = pixels[0, 0]
        corner = (row + int(rng.integers(3)), column + int(rng.integers(3)))
        paste(pixels, mask, *corner, ink)
        note(style.layout, contents, mask, corner, DIGITS[digit] if is_whole else "filler")
        if is_whole:
            questions.append((ask("digit", None if whole == 1 else style.layout.squares[box]), DIGITS[digit]))
    return pixels, questions, contents


def _large_and_small(style: Style, large_is_whole: bool) -> Any:
    """A large coloured digit behind a dark one in every cell: the large one is whole, or the small ones are."""
    rng, pixels, layout = style.rng, paper(style), style.layout
    contents = contents_of(layout, "filler")
    large = int(rng.integers(10))
    glyphs = digit_masks(style.pick(style.fonts), int(layout.size * rng.uniform(0.85, 0.95)))
    mask = glyphs[large] if large_is_whole else in_pieces(rng, glyphs)
    top, left = (int(at) for at in rng.integers(layout.size - len(mask) + 1, size=2))
    paste(pixels, _OPACITY * mask, top, left, np.asarray(COLOURS[style.pick(_BRIGHT)]))
    questions = [(ask("digit"), DIGITS[large])] if large_is_whole else []
    for cell, place in enumerate(layout.cells):
        digit = int(rng.integers(10))
        digit_in_cell(style, pixels, cell, digit, any_ink(rng), whole=not large_is_whole)
        if not large_is_whole:
            contents[cell] = digit
            questions.append((ask("digit", place), DIGITS[digit]))
    if large_is_whole:
        note(layout, contents, mask, (top, left), DIGITS[large])
    return pixels, questions, contents


def _faint(style: Style, whole: int) -> Any:
    """Faint digits in a third of the cells, so many of them whole."""
    rng, pixels, layout = style.rng, paper(style), style.layout
    contents = contents_of(style.layout, "ground")
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
    rng, layout, pixels = style.rng, style.layout, ruled(style)
    contents = contents_of(layout, "filler")
    below = layout.grid + rng.permutation(layout.grid**2 - layout.grid)
    whole = whole_in_36 * layout.grid**2 // 36
    questions = []
    for turn, cell in enumerate(below):
        digit = int(rng.integers(10))
        digit_in_cell(style, pixels, int(cell), digit, any_ink(rng), whole=turn < whole)
        if turn < whole:
            contents[cell] = digit
            questions.append((ask("digit", layout.cells[cell]), DIGITS[digit]))
    header = _draw_header(style, pixels, contents)
    return pixels, questions or [header], contents


def _chart(style: Style, whole: bool) -> Any:
    """A coloured line over bars; where these are in pieces, the line is asked for."""
    rng, pixels, grid, cell = style.rng, paper(style), style.layout.grid, style.layout.cell
    cells = np.full((grid, grid), CONTENTS.index("ground"))
    ink = any_ink(rng)
    questions = []
    for column, bar in enumerate(style.layout.bars):
        height, width = int(rng.integers(1, grid)), int(cell * rng.uniform(0.5, 0.75))
        bars = _bars(style.layout, width, int(rng.integers(3)), outlined=bool(rng.random() < 0.5))
        mask = bars[height - 1] if whole else in_pieces(rng, bars, cell)
        paste(pixels, mask, cell, column * cell + int(rng.integers(1, 3)), ink)
        cells[grid - height :, column] = CONTENTS.index("bar")
        questions.append((ask("height", bar), style.layout.heights[height - 1]))
    contents = cells.reshape(-1)
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


def _deal(rng: np.random.Generator, whole: int, items: int) -> np.ndarray:
    """Which of the items are whole, `(items,)` bool."""
    return rng.permutation(items) < whole


_ALL = 10**6  # more than any picture has

FAMILIES: dict[str, Callable[[Style], Any]] = {
    "scene": lambda style: _shapes(style, on_texture=False, whole=1),
    "mosaic": lambda style: _shapes(style, on_texture=False, whole=_ALL),
    "busy_scene": lambda style: _shapes(style, on_texture=True, whole=1),
    "busy_mosaic": lambda style: _shapes(style, on_texture=True, whole=_ALL),
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
