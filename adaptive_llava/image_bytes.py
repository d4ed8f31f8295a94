"""Images from strangers: bytes only, checked in the file's header before a pixel is decoded.

The demo and the server read images through here: no address is fetched and no path is opened on a visitor's word.
"""

from __future__ import annotations

import io
import struct
import warnings

from PIL import Image

from adaptive_llava.processing.image_loading import load_image


MAX_BYTES = 10 * 2**20
MAX_PIXELS = 24_000_000
MAX_SIDE = 10_000  # pixels
MAX_IMAGES = 8  # of one message (demo) or one request (server)
FORMATS = ("JPEG", "PNG", "WEBP")

# A photo with a preview behind it is a JPEG whose reader calls it MPO; the photo is its first frame.
_SEVERAL_FRAMES_ALLOWED = ("MPO",)
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def read_image_bytes(content: bytes, index: int = 0) -> Image.Image:
    """One image, upright, in 8-bit RGB.

    Args:
        content: The encoded file.
        index: Position in the message, for the errors, which count from 1.

    Raises:
        TypeError: `content` is no bytes: an address or a path.
        ValueError: Too many bytes, another format, too large by its header, an animation, or damaged.
    """
    name = f"Image {index + 1}"
    if not isinstance(content, bytes):
        raise TypeError(f"{name} is a {type(content).__name__}. Send the file itself: no path or address is read.")
    check_byte_count(len(content), index)
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            header = Image.open(io.BytesIO(content), formats=formats)
            width, height = header.size
            frames = getattr(header, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is too large: {error} At most {MAX_PIXELS:,} pixels are taken. Scale it down."
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"{name} is no {', '.join(FORMATS)} that can be read. Convert it, and send it again."
        ) from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < 1:
        raise ValueError(
            f"{name} has {width}x{height} pixels, and at most {MAX_PIXELS:,} with no side above {MAX_SIDE:,} are "
            "taken. Scale it down."
        )
    if frames > 1 and header.format not in _SEVERAL_FRAMES_ALLOWED:
        raise ValueError(f"{name} is an animation of {frames} frames. Send one of them as a still image.")
    return load_image(content, index=index + 1)


def check_byte_count(size: int, index: int = 0) -> None:
    """Refuse a file of more than `MAX_BYTES` bytes.

    Args:
        size: Bytes of the file.
        index: Position in the message, for the error.

    Raises:
        ValueError: It is larger.
    """
    if size > MAX_BYTES:
        raise ValueError(f"Image {index + 1} has {size:,} bytes, and at most {MAX_BYTES:,} are taken. Scale it down.")


def check_image_count(count: int) -> None:
    """Refuse more than `MAX_IMAGES` images at once.

    Raises:
        ValueError: There are more.
    """
    if count > MAX_IMAGES:
        raise ValueError(f"The request has {count} images, and at most {MAX_IMAGES} are taken. Send fewer.")
