"""Blueprints: a kind of page that the shipped model has never seen, for `make quickstart` to teach it.

Light digits on dark blue ground, one in each cell, between lighter lines: the study's pages are the other way round,
dark ink on light paper. The questions are those of its tables, so no word is new.
"""

from __future__ import annotations

import numpy as np

from adaptive_llava.training.study.drawing import CONTENTS, Layout, Style, digit_in_cell
from adaptive_llava.training.study.families import TEST_FONTS, TRAINING_FONTS, Picture, ask


NEW_DOCUMENT = "blueprint"


def render_blueprints(count: int, *, seed: int, test: bool = False) -> list[Picture]:
    """Draw blueprints, each from `(seed, index)` alone.

    Args:
        count: Number of pictures.
        seed: Sets with different seeds share no random numbers.
        test: Use the fonts that training pictures never have.

    Raises:
        ValueError: A negative count.
    """
    if count < 0:
        raise ValueError(f"`count={count}` must not be negative.")
    fonts = TEST_FONTS if test else TRAINING_FONTS
    return [_blueprint(np.random.default_rng((seed, int(test), index)), fonts) for index in range(count)]


def _blueprint(rng: np.random.Generator, fonts: tuple[str, ...]) -> Picture:
    layout = Layout()
    style = Style(layout, rng, fonts, rulings=())
    ground = rng.uniform((10, 35, 100), (35, 65, 150))
    pixels = ground + rng.normal(0, 2, size=(layout.size, layout.size, 1))
    lines = slice(layout.cell - 1, layout.size - 1, layout.cell)
    pixels[lines] = pixels[:, lines] = ground + rng.uniform(30, 60)
    ink = rng.uniform(190, 240) + rng.uniform(-10, 10, size=3)
    digits = rng.integers(10, size=layout.grid**2)
    for cell, digit in enumerate(digits):
        digit_in_cell(style, pixels, cell, int(digit), ink)
    questions = tuple((ask("digit", name), str(digit)) for name, digit in zip(layout.cells, digits, strict=True))
    contents = np.array([CONTENTS.index(str(digit)) for digit in digits])
    return Picture(pixels.clip(0, 255).astype(np.uint8), NEW_DOCUMENT, questions, contents)
