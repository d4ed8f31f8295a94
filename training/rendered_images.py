"""Images a tiny model can learn from in a minute: scenes, collages and pages, with questions and answers.

Three kinds that need different numbers of visual tokens to be answered:

* `scene`: one large shape on a soft background. One token is enough to name its colour and form.
* `collage`: four shapes, one per quadrant. Each quadrant has to keep a token of its own.
* `document`: a ruled page with one digit in every cell. Pooling two cells into one token loses both.

Every image is drawn from `(seed, index)` alone, so image 7 of a set of 10 equals image 7 of a set of 10,000.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


KINDS = ("scene", "collage", "document")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (245, 146, 27),
    "yellow": (247, 220, 70),
    "green": (46, 160, 67),
    "cyan": (64, 200, 214),
    "blue": (42, 92, 201),
    "purple": (138, 63, 178),
    "black": (32, 32, 38),
}
SHAPES = ("ring", "square", "triangle", "cross", "star")
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
DIGITS = tuple("0123456789")

GRID = 4  # cells per side; the models built for these images have one patch per cell
CELL = 16  # pixels per side of a cell
IMAGE_SIZE = GRID * CELL
PATCH_CONTENTS = (*DIGITS, *SHAPES, "background")  # what a patch can show, by class number
CELL_NAMES = tuple(f"{row}{column}" for row in "ABCD"[:GRID] for column in range(1, GRID + 1))

_OVERSAMPLING = 2  # shapes are drawn larger and reduced, for smooth edges
_VISIBLE_SHARE = 0.15  # a shape counts as seen in a cell of which it covers more than this


@dataclass(frozen=True)
class RenderedImage:
    """One image with everything that is known about it.

    Args:
        image: RGB picture, `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        kind: One of `KINDS`.
        questions: All `(question, answer)` pairs that can be asked about it.
        patch_contents: What each cell shows, as an index into `PATCH_CONTENTS`, row-major, `(GRID * GRID,)`.
    """

    image: Image.Image
    kind: str
    questions: tuple[tuple[str, str], ...]
    patch_contents: tuple[int, ...]


def render_images(count: int, *, seed: int, kinds: Sequence[str] = KINDS, start: int = 0) -> list[RenderedImage]:
    """Draws `count` images, the kinds taking turns.

    Args:
        count: Number of images.
        seed: Sets with different seeds share no random numbers: use one for training and another for testing.
        kinds: Kinds to draw, in the order in which they take turns; repeat one to draw it more often.
        start: Index of the first image, to draw a long series bit by bit.

    Raises:
        ValueError: For a negative count, no kinds, or an unknown kind.
    """
    if count < 0 or start < 0:
        raise ValueError(f"`count={count}` and `start={start}` must not be negative.")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"`kinds={list(kinds)}` must name at least one of {', '.join(KINDS)}, and nothing else.")
    indices = range(start, start + count)
    return [_DRAW[kinds[index % len(kinds)]](np.random.default_rng((seed, index))) for index in indices]


def vocabulary() -> list[str]:
    """Every word that occurs in a question or an answer, sorted."""
    sentences = [_ask("colour"), _ask("shape"), *(_ask("colour", place) for place in QUADRANTS)]
    sentences += [_ask("digit", cell) for cell in CELL_NAMES]
    words = {word for sentence in sentences for word in sentence.split()}
    return sorted(words.union(COLOURS, SHAPES, DIGITS))


def _ask(what: str, place: str | None = None) -> str:
    return f"which {what}" if place is None else f"which {what} at {place}"


def _draw_scene(rng: np.random.Generator) -> RenderedImage:
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    radius = rng.uniform(14, 20)
    centre = rng.uniform(radius + 1, IMAGE_SIZE - radius - 1, size=2)
    picture, patch_contents = _draw_shapes(_soft_background(rng), [(shape, colour, centre, radius)])
    questions = ((_ask("colour"), colour), (_ask("shape"), shape))
    return RenderedImage(picture, "scene", questions, patch_contents)


def _draw_collage(rng: np.random.Generator) -> RenderedImage:
    half = IMAGE_SIZE / 2
    shapes, questions = [], []
    for index, place in enumerate(QUADRANTS):
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        radius = rng.uniform(10, 14)
        corner = np.array([index % 2, index // 2]) * half
        centre = corner + rng.uniform(radius + 1, half - radius - 1, size=2)
        shapes.append((shape, colour, centre, radius))
        questions.append((_ask("colour", place), colour))
    picture, patch_contents = _draw_shapes(_soft_background(rng), shapes)
    return RenderedImage(picture, "collage", tuple(questions), patch_contents)


def _draw_document(rng: np.random.Generator) -> RenderedImage:
    paper = rng.uniform(225, 250) + rng.normal(0, 4, size=(IMAGE_SIZE, IMAGE_SIZE, 1)) + np.array([0.0, -1.0, -6.0])
    picture = Image.fromarray(paper.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for edge in range(CELL, IMAGE_SIZE, CELL):
        draw.line([(0, edge), (IMAGE_SIZE, edge)], fill=(176, 186, 200))
        draw.line([(edge, 0), (edge, IMAGE_SIZE)], fill=(176, 186, 200))
    digits = rng.integers(len(DIGITS), size=GRID**2)
    for index, digit in enumerate(digits):
        glyph = _glyph(DIGITS[digit])
        row, column = divmod(index, GRID)
        left = column * CELL + (CELL - glyph.width) // 2 + int(rng.integers(-1, 2))
        top = row * CELL + (CELL - glyph.height) // 2 + int(rng.integers(-1, 2))
        ink = int(rng.integers(10, 70))
        picture.paste((ink, ink, ink + 20), (left, top), glyph)
    questions = tuple((_ask("digit", cell), DIGITS[digit]) for cell, digit in zip(CELL_NAMES, digits, strict=True))
    return RenderedImage(picture, "document", questions, tuple(int(digit) for digit in digits))


_DRAW = {"scene": _draw_scene, "collage": _draw_collage, "document": _draw_document}


def _soft_background(rng: np.random.Generator) -> Image.Image:
    """A pale vertical gradient with a little noise."""
    top, bottom = rng.uniform(190, 245, size=(2, 3))
    ramp = np.linspace(0, 1, IMAGE_SIZE)[:, None, None]
    pixels = top * (1 - ramp) + bottom * ramp + rng.normal(0, 4, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_shapes(picture: Image.Image, shapes: list) -> tuple[Image.Image, tuple[int, ...]]:
    """Draws `(shape, colour, centre, radius)` entries, in pixels, and says what each cell then shows."""
    size = IMAGE_SIZE * _OVERSAMPLING
    contents = np.full(GRID**2, PATCH_CONTENTS.index("background"))
    for shape, colour, centre, radius in shapes:
        stencil = Image.new("L", (size, size))
        fill_shape(ImageDraw.Draw(stencil), shape, np.asarray(centre) * _OVERSAMPLING, radius * _OVERSAMPLING)
        picture.paste(COLOURS[colour], (0, 0), stencil.reduce(_OVERSAMPLING))
        coverage = np.asarray(stencil.reduce(CELL * _OVERSAMPLING)).reshape(-1) / 255
        contents[coverage > _VISIBLE_SHARE] = PATCH_CONTENTS.index(shape)
    return picture, tuple(int(content) for content in contents)


def fill_shape(draw: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float) -> None:
    x, y = centre
    if shape == "ring":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=255, width=round(radius * 0.5))
    elif shape == "square":
        side = radius * 0.85
        draw.rectangle([x - side, y - side, x + side, y + side], fill=255)
    elif shape == "cross":
        arm = radius * 0.32
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=255)
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=255)
    else:
        points, depth = (3, 1.0) if shape == "triangle" else (10, 0.42)
        radii = radius * np.where(np.arange(points) % 2 == 0, 1.0, depth) if shape == "star" else radius
        angles = np.arange(points) * 2 * np.pi / points - np.pi / 2
        draw.polygon(list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)), fill=255)


@cache
def _glyph(digit: str) -> Image.Image:
    """The digit as an opacity mask, cropped to its ink."""
    mask = Image.new("L", (2 * CELL, 2 * CELL))
    ImageDraw.Draw(mask).text((CELL // 2, CELL // 4), digit, fill=255, font=ImageFont.load_default(size=CELL - 2))
    return mask.crop(mask.getbbox())
