"""What a visitor hands in, checked before an image is decoded or a word is read by the model."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from adaptive_llava.image_bytes import check_image_count, read_image_bytes


MAX_CHARACTERS = 2000


def check_text(text: str) -> str:
    """A question, stripped. Control tokens in it stay: the chat template of the processor writes them as plain text.

    Raises:
        ValueError: Empty, or too long.
    """
    text = text.strip()
    if not text:
        raise ValueError("The question is empty. Ask something about the image.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The question has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are taken.")
    return text


def read_uploads(contents: Sequence[bytes]) -> list[Image.Image]:
    """All images of a message.

    Raises:
        ValueError: Too many, or one of them is refused by `read_image_bytes`.
    """
    check_image_count(len(contents))
    return [read_image_bytes(content, index) for index, content in enumerate(contents)]
