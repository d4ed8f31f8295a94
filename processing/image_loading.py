"""Images as users have them (paths, bytes, PIL images, arrays, tensors) to upright 8-bit RGB images.

What cannot be shown correctly is refused with a `ValueError` that names the image; nothing is fetched from the
network unless the caller allows it. Sizes are checked in the file's header, before a pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps


MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
MAX_BYTES = 256 * 1024 * 1024
MAX_ASPECT = 50
URL_TIMEOUT = 20  # seconds
# no EPS: reading it runs Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def flatten_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """All images in one list, and how many each row of a nested list holds.

    Args:
        images: One image; a batched array `(num_images, ...)`; a flat list; or a list with one entry per prompt: a
            list of images, one image, or `None` (a prompt without images).

    Returns:
        The images in order, and the number per row: `None` if the list was flat.
    """
    if images is None:
        return [], None
    if not isinstance(images, (list, tuple)):
        return _unbatched(images), None
    if not any(row is None or isinstance(row, (list, tuple)) for row in images):
        return [image for item in images for image in _unbatched(item)], None
    rows = [list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in images]
    rows = [[image for item in row for image in _unbatched(item)] for row in rows]
    return [image for row in rows for image in row], [len(row) for row in rows]


def load_image(
    source: Any, *, index: int = 0, allow_urls: bool = False, input_data_format: str | None = None
) -> Image.Image:
    """One image, upright (EXIF rotation applied), in 8-bit RGB.

    Transparency is laid on white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        source: A path, a `data:` URI, encoded bytes, a file object, `{"bytes": ..., "path": ...}` as `datasets`
            stores it, a PIL image, or an array or tensor of `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`: whole numbers 0 to 255 (`uint16`: to 65535), or fractions 0 to 1.
        index: Position of the image in the call, for the errors.
        allow_urls: Fetch `http://` and `https://` addresses.
        input_data_format: `"channels_first"` or `"channels_last"`, or transformers' own constants, for arrays whose
            shape leaves it open.

    Raises:
        ValueError: The image is empty, too large, damaged, of an unknown format or value range.
        FileNotFoundError: No file at the path.
        TypeError: `source` is none of the above.
    """
    return _decode(*_open(source, index, allow_urls, input_data_format))


def load_images(sources: Sequence[Any], **options: Any) -> list[Image.Image]:
    """All images of a call as `load_image` gives them, which takes the options too."""
    return [load_image(source, index=index, **options) for index, source in enumerate(sources)]


def image_size(
    source: Any, *, index: int = 0, allow_urls: bool = False, input_data_format: str | None = None
) -> tuple[int, int]:
    """Height and width of an image as `load_image` gives it; of a file only the header is read.

    Args and Raises: As in `load_image`.
    """
    image, name = _open(source, index, allow_urls, input_data_format)
    _check_size(image, name)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except _BROKEN as error:
        raise ValueError(f"{name} is damaged or truncated: {error}. Replace the file.") from error
    return (image.width, image.height) if turned else (image.height, image.width)


def shorten_extreme(image: Image.Image) -> Image.Image:
    """The middle of an image more than 50 times as long as wide, any other image as it is.

    For a shortest-edge resize with centre crop, which keeps no more than that middle but would first build a picture
    of millions of pixels.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _open(source: Any, index: int, allow_urls: bool, input_data_format: str | None) -> tuple[Image.Image, str]:
    """An image that is not decoded yet, and what to call it in an error."""
    name = f"Image {index}"
    if isinstance(source, dict) and (source.get("bytes") is not None or source.get("path") is not None):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, Image.Image):
        return source, name
    if hasattr(source, "is_floating_point"):  # a tensor; numpy has no bfloat16
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source, name, input_data_format), name
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        name = f"{name} ({source if len(source) <= 200 else source[:200] + '...'})"
        source = _read(source, name, allow_urls)
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    if not hasattr(source, "read"):
        raise TypeError(
            f"{name} is a {type(source).__name__}. Pass a path, bytes, a PIL image, or a NumPy or PyTorch array."
        )
    try:
        Image.init()
        image = Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, str(error))) from error
    except _BROKEN as error:
        raise ValueError(
            f"{name} is no image that can be read: {error}. Supported formats: {', '.join(FORMATS)}."
        ) from error
    return image, name


def _unbatched(item: Any) -> list[Any]:
    return list(item) if getattr(item, "ndim", 0) == 4 else [item]


def _too_large(name: str, found: str) -> str:
    return f"{name} is too large: {found}. At most {MAX_PIXELS:,} pixels are decoded; scale it down first."


def _read(source: str, name: str, allow_urls: bool) -> bytes:
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name} is no valid base64 data URI: {error}. Encode the bytes again.") from error
    if source.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(
                f"{name} is a URL, and URLs are not fetched unless you ask for it. Pass `allow_urls=True` if you "
                "trust whoever wrote it, or download the file and pass its path."
            )
        try:
            with urllib.request.urlopen(source, timeout=URL_TIMEOUT) as response:
                content = response.read(MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{name} could not be fetched: {error}. Check the address, or pass a file.") from error
    else:
        if not os.path.isfile(source):
            raise FileNotFoundError(f"{name}: there is no such file. Check the path.")
        try:
            with open(source, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{name} could not be read: {error}. Check the file and its permissions.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES:,} bytes. Scale the image down first.")
    return content


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: {width}x{height} pixels. Leave it out.")
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name, f"{width}x{height} = {width * height:,} pixels"))


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        # a copy also without EXIF data: the caller's image stays as it is
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except _BROKEN as error:
        if isinstance(error, _RangeError):
            raise
        raise ValueError(f"{name} is damaged or truncated: {error}. Replace the file.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image).astype(np.uint16), name)).convert("RGB")
    if image.mode == "I":
        # 32-bit files and older Pillows' 16-bit PNGs: the values tell which range is meant
        values = np.asarray(image)
        wide = values.max() > 255 and 0 <= values.min() and values.max() <= 65535
        return Image.fromarray(_scaled(values.astype(np.uint16) if wide else values, name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_scaled(np.asarray(image), name)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        # convert() knows no direct way from these two
        image = image.convert({"La": "LA", "PA": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class _RangeError(ValueError):
    """Values that are no pixel values: the message is complete as it is."""


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Pixel values of any type as `uint8` of the same shape."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind not in "iuf":
        raise _RangeError(f"{name} has values of type {values.dtype}. Pass numbers 0 to 255, or 0.0 to 1.0.")
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
        raise _RangeError(
            f"{name} has values from {low} to {high}. Pass whole numbers 0 to 255 or fractions 0 to 1, before any "
            "normalisation: the processor normalises."
        )
    if values.dtype.kind == "f":
        return np.rint(values.astype(np.float64) * (255 if high <= 1 else 1)).astype(np.uint8)
    return values.astype(np.uint8)


def _from_array(values: np.ndarray, name: str, input_data_format: str | None) -> Image.Image:
    shape = values.shape
    if values.size == 0:
        raise ValueError(f"{name} is empty: its array has shape {shape}. Leave it out.")
    input_data_format = getattr(input_data_format, "value", input_data_format)  # transformers' enum
    input_data_format = {"first": "channels_first", "last": "channels_last"}.get(input_data_format, input_data_format)
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"`input_data_format={input_data_format!r}` is unknown. Pass 'channels_first' or 'channels_last'."
        )
    if values.ndim == 3:
        # both ends may look like channels: first wins, as in transformers
        first = shape[0] in (1, 3) or (shape[0] == 4 and shape[2] not in (1, 3))
        if input_data_format == "channels_first" or (input_data_format is None and first):
            values = np.moveaxis(values, 0, -1)
        if values.shape[2] == 1:
            values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(
            f"{name} is an array of shape {shape}. Pass (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels."
        )
    return Image.fromarray(np.ascontiguousarray(_scaled(values, name)))
