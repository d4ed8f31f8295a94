"""What a visitor hands in, checked before an image is decoded or a word is read by the model.

Images come as bytes only: no address is fetched and no path is opened on a visitor's word.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence

from PIL import Image

from adaptive_llava.processing.image_loading import load_image


MAX_BYTES = 10 * 2**20
MAX_PIXELS = 24_000_000
MAX_SIDE = 10_000  # pixels
MAX_IMAGES = 8  # of one message
MAX_CHARACTERS = 2000
FORMATS = ("JPEG", "PNG", "WEBP")

# A photo with a preview behind it is a JPEG whose reader calls it MPO; the photo is its first frame.
_SEVERAL_FRAMES_ALLOWED = ("MPO",)
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def read_upload(content: bytes, index: int = 0) -> Image.Image:
    """One uploaded image, upright, in 8-bit RGB.

    Args:
        content: The file as it was uploaded.
        index: Position in the message, for the errors.

    Raises:
        TypeError: `content` is no bytes: an address or a path.
        ValueError: Too many bytes, another format, too large by its header, an animation, or damaged.
    """
    name = f"Image {index + 1}"
    if not isinstance(content, bytes):
        raise TypeError(f"{name} is a {type(content).__name__}. Upload the file itself: no path or address is read.")
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} has {len(content):,} bytes, and at most {MAX_BYTES:,} are taken. Scale it down.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            header = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = header.size
            frames = getattr(header, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {error}. At most {MAX_PIXELS:,} pixels are taken.") from error
    except _BROKEN as error:
        raise ValueError(
            f"{name} is no {', '.join(FORMATS)} that can be read. Convert it, and upload it again."
        ) from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < 1:
        raise ValueError(
            f"{name} has {width}x{height} pixels, and at most {MAX_PIXELS:,} with no side above {MAX_SIDE:,} are "
            "taken. Scale it down."
        )
    if frames > 1 and header.format not in _SEVERAL_FRAMES_ALLOWED:
        raise ValueError(f"{name} is an animation of {frames} frames. Upload one of them as a still image.")
    return load_image(content, index=index)


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
        ValueError: Too many, or one of them is refused by `read_upload`.
    """
    if len(contents) > MAX_IMAGES:
        raise ValueError(f"The message has {len(contents)} images, and at most {MAX_IMAGES} are taken. Send fewer.")
    return [read_upload(content, index) for index, content in enumerate(contents)]
