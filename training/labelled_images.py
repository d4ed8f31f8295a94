"""Images sorted by the number of visual tokens they should get: sources with a rung each, and one table of all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_llava.training.image_source import ImageSource, open_images
from adaptive_llava.training.router_inputs import SourceInputs


MIN_IMAGES = 10  # per rung


@dataclass(frozen=True)
class LabelledSource:
    """Images that all want the same rung."""

    name: str
    images: ImageSource
    rung: int


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Different images with their labels.

    Attributes:
        values: What the router reads, `(n, input_dim)` fp32.
        rungs: The rung each should get, `(n,)`.
        sources: Index of the source each came from, `(n,)`.
        names: Name of each within its source.
    """

    values: np.ndarray
    rungs: np.ndarray
    sources: np.ndarray
    names: list[str]


def named_places(
    sources: Sequence[str], rungs: Sequence[str], positive: Sequence[str], negative: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Where each source lies and which rung it wants, as written on the command line.

    Args:
        sources: `NAME=DATA` each.
        rungs: `NAME=RUNG` each.
        positive: Data at the top rung, named after their last folder.
        negative: Data at rung 0.

    Raises:
        ValueError: A source without a rung, a rung without a source, or a name that comes twice.
    """
    found: dict[str, tuple[str, str]] = {}
    labels = dict(_pair(text, "--rung") for text in rungs)
    named = [_pair(text, "--source") for text in sources]
    for name in labels:
        if name not in dict(named):
            raise ValueError(f"`--rung {name}=...` names no source. Sources: {', '.join(dict(named)) or 'none'}.")
    entries = [(name, place, labels.get(name)) for name, place in named]
    for rung, places in (("top", positive), ("0", negative)):
        entries += [(Path(place).stem, place, rung) for place in places]
    for name, place, rung in entries:
        if rung is None:
            raise ValueError(f"The source {name!r} has no label. Say which rung it wants: `--rung {name}=top`.")
        if name in found:
            raise ValueError(f"Two sources are called {name!r}. Name them: `--source NAME=DATA --rung NAME=RUNG`.")
        found[name] = (place, rung)
    if not found:
        raise ValueError("There are no images. Pass `--positive` and `--negative`, or `--source` and `--rung`.")
    return found


def open_labelled(places: Mapping[str, tuple[str, str]], num_rungs: int, **options: Any) -> list[LabelledSource]:
    """Open the sources, whose rungs must be there and not all the same.

    Args:
        places: Result of `named_places`.
        num_rungs: Token counts of the model.
        options: Of `open_images`.

    Raises:
        ValueError: An unknown rung, or the same for all.
    """
    known = {"top": num_rungs - 1} | {str(rung): rung for rung in range(num_rungs)}
    for name, (_, rung) in places.items():
        if rung not in known:
            raise ValueError(
                f"`--rung {name}={rung}` is unknown. This model has {num_rungs} token counts: use 0 (fewest) to "
                f"{num_rungs - 1}, or 'top'."
            )
    wanted = {known[rung] for _, rung in places.values()}
    if len(wanted) == 1:
        raise ValueError(
            f"All sources want rung {wanted.pop()}, so there is nothing to tell apart. Add images that want another."
        )
    return [LabelledSource(name, open_images(place, **options), known[rung]) for name, (place, rung) in places.items()]


def labelled_images(sources: Sequence[LabelledSource], read: Sequence[SourceInputs]) -> LabelledImages:
    """All images of all sources, each once.

    Raises:
        ValueError: One image wants two rungs, or a rung has too few images.
    """
    first: dict[str, tuple[int, int]] = {}
    for index, (source, inputs) in enumerate(zip(sources, read, strict=True)):
        for row, digest in enumerate(inputs.digests):
            other, other_row = first.setdefault(digest, (index, row))
            if sources[other].rung != source.rung:
                raise ValueError(
                    f"The sources {sources[other].name!r} (rung {sources[other].rung}) and {source.name!r} (rung "
                    f"{source.rung}) overlap: {read[other].names[other_row]} and {inputs.names[row]} are the same "
                    "image. An image has one label; take it out of one of them."
                )
    kept = list(first.values())
    rungs = np.array([sources[index].rung for index, _ in kept], dtype=np.int64)
    for rung in sorted({source.rung for source in sources}):
        number = int((rungs == rung).sum())
        if number < MIN_IMAGES:
            raise ValueError(
                f"Rung {rung} has {number} different images, too few to train and measure on. Give at least "
                f"{MIN_IMAGES} per rung, better hundreds."
            )
    return LabelledImages(
        values=np.stack([read[index].values[row] for index, row in kept]).astype(np.float32),
        rungs=rungs,
        sources=np.array([index for index, _ in kept]),
        names=[read[index].names[row] for index, row in kept],
    )


def described_sources(
    sources: Sequence[LabelledSource], read: Sequence[SourceInputs], images: LabelledImages
) -> list[dict[str, Any]]:
    """Each source in the record of a training, with a digest of its images whatever their order."""
    return [
        {
            "name": source.name,
            "data": source.images.name,
            "rung": source.rung,
            "images": len(inputs.names),
            "used": int((images.sources == index).sum()),
            "sha256": hashlib.sha256("".join(sorted(inputs.digests)).encode()).hexdigest(),
        }
        for index, (source, inputs) in enumerate(zip(sources, read, strict=True))
    ]


def _pair(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ValueError(f"`{option} {text}` must have the form NAME=VALUE.")
    return name, value
