"""Which questions share an image, and a name for a whole set of questions: by contents, wherever files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    from adaptive_llava.training.question_samples import Sample


@dataclass(frozen=True, eq=False)
class SampleImages:
    """The different images of some questions, in an order that follows from their contents.

    Attributes:
        first: Index of the first question about each image, `(num_images,)`.
        image: Index of each question's image, `(num_questions,)`.
        sha256: Of all images, questions and answers, whatever their order.
    """

    first: np.ndarray
    image: np.ndarray
    sha256: str

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean per image, `(num_questions, k)` -> `(num_images, k)`."""
        sums = np.zeros((len(self.first), values.shape[1]))
        np.add.at(sums, self.image, values)
        return sums / np.bincount(self.image)[:, None]


def sample_images(samples: Sequence[Sample]) -> SampleImages:
    """Find the images of questions that are about one image each.

    Raises:
        ValueError: A question about none or several images.
        FileNotFoundError: An image file that is not there.
    """
    files: dict[str, str] = {}  # digests
    digests, rows = [], []
    for sample in samples:
        images = sample.images[:]
        if len(images) != 1:
            raise ValueError(
                f"Question {sample.id} has {len(images)} images, and a router's choice can be compared with fixed "
                "counts for one. Leave such questions out."
            )
        image = images[0]
        digest = files.get(image) if isinstance(image, str) else None
        digest = digest or _digest(image)
        if isinstance(image, str):
            files[image] = digest
        digests.append(digest)
        rows.append(hashlib.sha256("\0".join((digest, sample.question, *sample.answers)).encode()).digest())
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return SampleImages(first, which, hashlib.sha256(b"".join(sorted(rows))).hexdigest())


def _digest(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, Image.Image):
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
    return hashlib.sha256(image if isinstance(image, bytes) else Path(image).read_bytes()).hexdigest()
