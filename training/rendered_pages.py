"""Pictures that must be read and pictures that must only be looked at, drawn at full size to train a router.

Kinds to read, dense with small signs: `page`, `form`, `receipt`, `table`, `bar_chart`, `line_chart`.
Kinds to look at: `landscape`, `texture`, `objects`, `shapes`, and two that look like pages and hold next to nothing:
`big_digit` (one sign that fills the picture) and `empty_form` (a title and a few lines to be filled in).

Sizes and colours of the ground do not tell them apart. Every picture is drawn from `(seed, index)` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


READ = ("page", "form", "receipt", "table", "bar_chart", "line_chart")
LOOK = ("landscape", "texture", "objects", "shapes", "big_digit", "empty_form")

_SYLLABLES = "an be co di er fo ga ho in ka le mi no or pa qu re si to un ve wa ex ly zu".split()


def render_pictures(count: int, *, seed: int, start: int = 0) -> list[tuple[Image.Image, str]]:
    """Draw `count` pictures with their kinds, kinds to read and to look at by turns.

    Args:
        count: Number of pictures.
        seed: Sets with different seeds share no random numbers.
        start: Index of the first picture, to draw a long series bit by bit.

    Raises:
        ValueError: A negative `count` or `start`.
    """
    if count < 0 or start < 0:
        raise ValueError(f"`count={count}` and `start={start}` must not be negative.")
    kinds = [kind for pair in zip(READ, LOOK, strict=True) for kind in pair]
    drawn = []
    for index in range(start, start + count):
        rng, kind = np.random.default_rng((seed, index)), kinds[index % len(kinds)]
        width, height = (int(side) for side in rng.integers(300, 640, size=2))
        drawn.append((_DRAW[kind](rng, width, height), kind))
    return drawn


def _page(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    draw, size = ImageDraw.Draw(picture), int(rng.integers(10, 17))
    _write(draw, (16, 12), _words(rng, 3), size + 8)
    columns = int(rng.integers(1, 3))
    for column in range(columns):
        left = 16 + column * (width - 24) // columns
        for top in range(22 + 2 * size, height - size, round(1.4 * size)):
            if rng.random() > 0.12:
                _write(draw, (left, top), _fitting(rng, (width - 40) // columns, size), size)
    return picture


def _form(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    draw, size = ImageDraw.Draw(picture), int(rng.integers(10, 15))
    _write(draw, (16, 10), _words(rng, 2).upper(), size + 6)
    for top in range(44, height - 30, 3 * size):
        for left in (16, width // 2 + 8):
            _write(draw, (left, top), _words(rng, 2).title() + ":", size)
            box = [left, top + size + 3, left + width // 2 - 28, top + 2 * size + 7]
            draw.rectangle(box, outline=_ink(rng))
            if rng.random() < 0.8:
                _write(draw, (left + 4, box[1] + 1), f"{_words(rng, 1)} {rng.integers(10_000)}", size)
    return picture


def _receipt(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    draw, size = ImageDraw.Draw(picture), int(rng.integers(10, 16))
    _write(draw, (width // 3, 8), _words(rng, 2).upper(), size + 4)
    for top in range(36, height - size - 6, round(1.5 * size)):
        if rng.random() < 0.08:
            draw.line([(10, top + size // 2), (width - 10, top + size // 2)], fill=_ink(rng))
            continue
        _write(draw, (12, top), f"{rng.integers(1, 9)} {_words(rng, 2)}", size)
        _write(draw, (width - 5 * size, top), f"{rng.uniform(0.5, 99):.2f}", size)
    return picture


def _table(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    draw, columns, size = ImageDraw.Draw(picture), int(rng.integers(3, 7)), int(rng.integers(9, 14))
    step, row = (width - 16) // columns, 2 * size
    for top in range(10, height - row, row):
        draw.line([(8, top), (8 + columns * step, top)], fill=(120, 120, 120))
        for column in range(columns):
            said = _words(rng, 1).title() if top == 10 or column == 0 else f"{rng.uniform(0, 1000):.1f}"
            _write(draw, (12 + column * step, top + size // 3), said, size)
    for column in range(columns + 1):
        draw.line([(8 + column * step, 10), (8 + column * step, height - row)], fill=(120, 120, 120))
    return picture


def _bar_chart(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture, draw, left, bottom = _axes(rng, width, height)
    bars = int(rng.integers(3, 9))
    step = (width - left - 14) // bars
    colours = [_colour(rng) for _ in range(int(rng.integers(1, 4)))]
    for index in range(bars):
        top = int(rng.uniform(50, bottom - 6))
        x = left + 6 + index * step
        draw.rectangle([x, top, x + max(4, round(step * 0.7)), bottom], fill=colours[index % len(colours)])
        _write(draw, (x, top - 14), f"{bottom - top}", 11)
        _write(draw, (x, bottom + 4), _words(rng, 1)[:6].title(), 11)
    return picture


def _line_chart(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture, draw, left, bottom = _axes(rng, width, height)
    xs = np.linspace(left + 6, width - 60, int(rng.integers(5, 14)))
    for _ in range(int(rng.integers(1, 5))):
        ys = np.clip(rng.uniform(60, bottom - 20) + rng.normal(0, 18, size=len(xs)).cumsum(), 50, bottom - 4)
        colour = _colour(rng)
        points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        draw.line(points, fill=colour, width=int(rng.integers(2, 5)))
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        _write(draw, (width - 54, int(ys[-1]) - 6), _words(rng, 1).title(), 11)
    for index, x in enumerate(xs):
        _write(draw, (int(x) - 10, bottom + 4), str(2000 + 2 * index), 10)
    return picture


def _landscape(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    sky, low = rng.uniform(90, 255, size=(2, 3))
    ramp = np.linspace(0, 1, height)[:, None, None]
    pixels = np.repeat(sky * (1 - ramp) + low * ramp, width, axis=1) + 18 * _clouds(rng, width, height)[..., None]
    for depth in range(int(rng.integers(2, 5))):
        ridge = height * (0.35 + 0.17 * depth) + 60 * (_clouds(rng, width, 8)[0] - 0.2 * depth)
        ground = np.arange(height)[:, None] > ridge[None]
        shade = 1 + 0.5 * _clouds(rng, width, height, roughness=0.75)[..., None]
        pixels = np.where(ground[..., None], rng.uniform(20, 170, size=3) * shade, pixels)
    return _picture(pixels)


def _texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    first, second = rng.uniform(0, 255, size=(2, 3))
    share = 0.5 + 0.5 * _clouds(rng, width, height, roughness=rng.uniform(0.5, 0.9))[..., None]
    return _picture(first * share + second * (1 - share))


def _objects(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _texture(rng, width, height).filter(ImageFilter.GaussianBlur(int(rng.integers(2, 9))))
    for _ in range(int(rng.integers(3, 10))):
        stencil = Image.new("L", (width, height))
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.08, 0.3) * min(width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=int(rng.integers(7, 16))))
        radii = radius * rng.uniform(0.6, 1.3, size=len(angles))
        outline = zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)
        ImageDraw.Draw(stencil).polygon([(float(a), float(b)) for a, b in outline], fill=255)
        slope = np.hypot(*np.ogrid[-y : height - y, -x : width - x]) / radius
        shade = 1.25 - 0.5 * slope.clip(0, 2) + 0.25 * _clouds(rng, width, height, roughness=0.7)
        surface = _picture(rng.uniform(40, 230, size=3) * shade[..., None])
        picture.paste(surface, (0, 0), stencil.filter(ImageFilter.GaussianBlur(1.5)))
    return picture


def _shapes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), _ground(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 9))):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.15) * min(width, height)
        box, colour = [x - radius, y - radius, x + radius, y + radius], _colour(rng)
        form = int(rng.integers(3))
        if form == 0:
            draw.ellipse(box, fill=colour)
        elif form == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    return picture


def _big_digit(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    size = int(rng.uniform(0.6, 0.95) * min(width, height))
    place = (int(rng.uniform(0.1, 0.5) * (width - size // 2)), int(rng.uniform(-0.1, 0.2) * (height - size)))
    _write(ImageDraw.Draw(picture), place, str(rng.integers(10)), size, _colour(rng))
    return picture


def _empty_form(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    picture = _paper(rng, width, height)
    draw = ImageDraw.Draw(picture)
    _write(draw, (20, 14), _words(rng, 1).upper(), int(rng.integers(18, 32)))
    for _ in range(int(rng.integers(1, 5))):
        top = int(rng.uniform(0.2, 0.95) * height)
        draw.line([(20, top), (width - 20, top)], fill=(140, 140, 140), width=int(rng.integers(1, 3)))
    return picture


_DRAW: dict[str, Callable[[np.random.Generator, int, int], Image.Image]] = {
    "page": _page,
    "form": _form,
    "receipt": _receipt,
    "table": _table,
    "bar_chart": _bar_chart,
    "line_chart": _line_chart,
    "landscape": _landscape,
    "texture": _texture,
    "objects": _objects,
    "shapes": _shapes,
    "big_digit": _big_digit,
    "empty_form": _empty_form,
}


def _axes(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int, int]:
    picture = _paper(rng, width, height)
    draw, left, bottom = ImageDraw.Draw(picture), 44, height - 30
    _write(draw, (10, 8), _words(rng, 4).capitalize(), 16)
    _write(draw, (10, 28), _words(rng, 6), 11)
    for index, y in enumerate(np.linspace(bottom, 56, int(rng.integers(3, 8)))):
        draw.line([(left, int(y)), (width - 10, int(y))], fill=(205, 205, 205))
        _write(draw, (8, int(y) - 6), f"{25 * index}", 11)
    draw.line([(left, 50), (left, bottom), (width - 10, bottom)], fill=_ink(rng), width=1)
    return picture, draw, left, bottom


def _clouds(rng: np.random.Generator, width: int, height: int, roughness: float = 0.5) -> np.ndarray:
    """Smooth noise in [-1, 1], `(height, width)`: octaves of random grids, each finer one weaker by `roughness`."""
    total, strength = np.zeros((height, width)), 1.0
    for cells in (2, 4, 8, 16, 32, 64):
        coarse = Image.fromarray(rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32))
        total += strength * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        strength *= roughness
    return total / np.abs(total).max()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paper(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    grain = np.asarray(_ground(rng)) + rng.normal(0, rng.uniform(0, 5), size=(height, width, 1))
    return _picture(grain)


def _ground(rng: np.random.Generator) -> tuple[int, int, int]:
    # mostly white, as screens and paper are; else any light colour
    light = rng.uniform(238, 255) + np.zeros(3) if rng.random() < 0.6 else rng.uniform(185, 255, size=3)
    return (int(light[0]), int(light[1]), int(light[2]))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 215, size=3))
    return red, green, blue


def _ink(rng: np.random.Generator) -> tuple[int, int, int]:
    shade = int(rng.integers(0, 90))
    return shade, shade, shade


def _words(rng: np.random.Generator, number: int) -> str:
    return " ".join("".join(rng.choice(_SYLLABLES, size=int(rng.integers(1, 5)))) for _ in range(number))


def _fitting(rng: np.random.Generator, width: int, size: int) -> str:
    return _words(rng, max(2, round(width / (3.2 * size))))[: max(4, round(1.9 * width / size))]


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int] = (30, 30, 34),
) -> None:
    draw.text(place, text, fill=colour, font=_font(size))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
