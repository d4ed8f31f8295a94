"""Images from strangers: what is no small still picture in a common format is refused before it is decoded."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from adaptive_llava.image_bytes import FORMATS, MAX_BYTES, MAX_IMAGES, check_image_count, read_image_bytes


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def noise(size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def still(kind: str = "PNG") -> bytes:
    return encoded(noise(), kind)


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def announcing(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose data are not there."""
    content = bytearray(still())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


REFUSED = {
    "gif": (lambda: still("GIF"), "Image 1 is no JPEG, PNG, WEBP"),
    "tiff": (lambda: still("TIFF"), "Image 1 is no JPEG, PNG, WEBP"),
    "no image": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Image 1 is no JPEG, PNG, WEBP"),
    "nothing": (lambda: b"", "Image 1 is no JPEG, PNG, WEBP"),
    "many bytes": (lambda: still() + bytes(MAX_BYTES), "Image 1 has 10,4.* bytes, and at most 10,485,760"),
    "many pixels": (lambda: announcing(9000, 9000), "Image 1 has 9000x9000 pixels, and at most 24,000,000"),
    "a long side": (lambda: announcing(10_001, 1), "Image 1 has 10001x1 pixels.*no side above 10,000"),
    "a bomb": (lambda: announcing(30_000, 30_000), "Image 1 is too large"),
    "animated png": (lambda: moving("PNG"), "Image 1 is an animation of 3 frames"),
    "animated webp": (lambda: moving("WEBP"), "Image 1 is an animation of 3 frames"),
    "half a file": (lambda: still("JPEG")[:-300], "Image 1 is damaged or truncated"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_still_picture_is_read_as_it_is(kind):
    image = read_image_bytes(still(kind))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    if kind == "PNG":
        assert np.array_equal(np.asarray(image), np.asarray(noise()))


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_a_named_rule(name):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_image_bytes(content())


@pytest.mark.parametrize("address", ["http://127.0.0.1/a.png", __file__])
def test_addresses_and_paths_are_no_bytes(address):
    with pytest.raises(TypeError, match="Image 3 is a str.*no path or address is read"):
        read_image_bytes(address, 2)


def test_a_message_has_a_largest_number_of_images():
    check_image_count(MAX_IMAGES)
    with pytest.raises(ValueError, match="The request has 9 images, and at most 8 are taken"):
        check_image_count(MAX_IMAGES + 1)
