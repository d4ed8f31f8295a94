"""Files and arrays that strangers hand in: read as they are meant, or refused by name; nothing crashes or hangs."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from adaptive_llava.image_bytes import read_image_bytes
from adaptive_llava.processing.image_loading import MAX_PIXELS, image_size, load_image
from tests.hostile_cases import cases, check_refusal, refused_well
from tests.test_image_bytes import encoded, noise
from tests.test_processing_adaptive_llava import build


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colours: int = 2) -> bytes:
    """A PNG by hand: a header that promises a size, and whatever follows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + (
        b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00;"
    )  # fmt: skip


def tiff(width: int, height: int, *, loop: bool = False) -> bytes:
    """A TIFF directory; `loop` names itself as the next page."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8 if loop else 0) + bytes(64)


def jpeg_of_size(width: int, height: int) -> bytes:
    content = bytearray(encoded(noise(), "JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def moving(kind: str, **options) -> bytes:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (40, 30), "red"), kind, exif=exif)


def palette(transparent: bool = False) -> bytes:
    image = noise().quantize(8)
    return encoded(image, "PNG", transparency=bytes([0, 128, *[255] * 6])) if transparent else encoded(image, "PNG")


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


DEEP = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
IDAT = chunk(b"IDAT", zlib.compress(b"\0" + bytes(3)))
# Each file: how it is made, and the size that is read (height, width), or what is said. Two refusals: of our loader,
# which takes more formats and larger images, and of the check for strangers' bytes in front of it.
LARGE, UNREADABLE, CUT = "is too large", "is no image that can be read", "is damaged or truncated"
OTHER, STILL, FEW = "is no JPEG, PNG, WEBP", "is an animation of 3 frames", "and at most 24,000,000"
FILES: dict[str, tuple[Callable[[], bytes], tuple[int, int] | str, tuple[int, int] | str]] = {
    "zero bytes": (lambda: b"", UNREADABLE, OTHER),
    "one byte": (lambda: b"\x89", UNREADABLE, OTHER),
    "a thousand zeros": (lambda: bytes(1000), UNREADABLE, OTHER),
    "truncated.png": (lambda: half(encoded(noise(), "PNG")), CUT, CUT),
    "truncated.jpg": (lambda: half(encoded(noise(), "JPEG")), CUT, CUT),
    "truncated.webp": (
        lambda: half(encoded(noise(), "WEBP", lossless=True)),
        f"({CUT}|{UNREADABLE})",
        f"({CUT}|{OTHER})",
    ),
    "truncated.gif": (lambda: half(encoded(noise(), "GIF")), CUT, OTHER),
    "truncated.tif": (lambda: half(encoded(noise(), "TIFF")), f"({CUT}|{UNREADABLE})", OTHER),
    "header alone.png": (lambda: encoded(noise(), "PNG")[:33], f"({CUT}|{UNREADABLE})", f"({CUT}|{OTHER})"),
    "bomb.png": (lambda: png(60_000, 60_000, IDAT), LARGE, LARGE),
    "bomb of one line.png": (lambda: png(2**31 - 1, 1, IDAT), LARGE, LARGE),
    "bomb of 9500 a side.png": (lambda: png(9_500, 9_500, IDAT), LARGE, LARGE),
    "bomb.bmp": (lambda: bmp(60_000, 60_000), LARGE, OTHER),
    "bomb.gif": (lambda: gif(65_535, 65_535), LARGE, OTHER),
    "bomb.tif": (lambda: tiff(100_000, 100_000), LARGE, OTHER),
    "bomb.jpg": (lambda: jpeg_of_size(65_500, 65_500), LARGE, LARGE),
    "bomb of text.png": (
        lambda: png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))), IDAT),
        UNREADABLE,
        OTHER,
    ),
    "no pixels.png": (lambda: png(0, 5, IDAT), f"({UNREADABLE}|is empty)", f"({OTHER}|has 0x5)"),
    "negative.bmp": (lambda: bmp(-5, 5), LARGE, OTHER),
    "wrong checksum.png": (
        lambda: encoded(noise(), "PNG").replace(b"IHDR\0\0\0\x28", b"IHDR\0\0\0\x29"),
        f"({CUT}|{UNREADABLE})",
        OTHER,
    ),
    "1x1.png": (lambda: encoded(Image.new("RGB", (1, 1))), (1, 1), (1, 1)),
    "1x20000.png": (lambda: encoded(Image.new("RGB", (1, 20_000))), (20_000, 1), "no side above 10,000"),
    "20000x1.png": (lambda: encoded(Image.new("RGB", (20_000, 1))), (1, 20_000), "no side above 10,000"),
    "5000x5000.png": (lambda: encoded(Image.new("1", (5_000, 5_000))), (5_000, 5_000), FEW),
    "cmyk.jpg": (lambda: encoded(noise().convert("CMYK"), "JPEG"), (30, 40), (30, 40)),
    "16 bit.png": (lambda: encoded(Image.fromarray(DEEP), "PNG"), (30, 40), (30, 40)),
    "16 bit.tif": (lambda: encoded(Image.fromarray(DEEP), "TIFF"), (30, 40), OTHER),
    "32 bit float.tif": (lambda: encoded(Image.fromarray(np.full((3, 4), 0.5, "f4")), "TIFF"), (3, 4), OTHER),
    "nan.tif": (lambda: encoded(Image.fromarray(np.full((3, 4), np.nan, "f4")), "TIFF"), "from nan to nan", OTHER),
    "one bit.png": (lambda: encoded(noise().convert("1"), "PNG"), (30, 40), (30, 40)),
    "grey with alpha.png": (lambda: encoded(noise().convert("LA"), "PNG"), (30, 40), (30, 40)),
    "palette.png": (palette, (30, 40), (30, 40)),
    "palette with alpha.png": (lambda: palette(transparent=True), (30, 40), (30, 40)),
    "animated.gif": (lambda: moving("GIF"), (6, 8), OTHER),
    "animated.webp": (lambda: moving("WEBP"), (6, 8), STILL),
    "animated.png": (lambda: moving("PNG"), (6, 8), STILL),
    "turned.jpg": (lambda: turned(6), (40, 30), (40, 30)),
    "turned.png": (lambda: turned(8, "PNG"), (40, 30), (40, 30)),
    "turned by no known turn.jpg": (lambda: turned(77), (30, 40), (30, 40)),
    "progressive.jpg": (lambda: encoded(noise(), "JPEG", progressive=True), (30, 40), (30, 40)),
    "a page that follows itself.tif": (lambda: tiff(8, 8, loop=True), (8, 8), OTHER),
    "jpeg named.png": (lambda: encoded(noise(), "JPEG"), (30, 40), (30, 40)),
    "gif named.jpg": (lambda: encoded(noise(), "GIF"), (30, 40), OTHER),
    "svg named.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNREADABLE, OTHER),
    "html named.png": (lambda: b"<!DOCTYPE html><img src='file:///etc/passwd'>", UNREADABLE, OTHER),
    "pdf named.png": (lambda: b"%PDF-1.7\n1 0 obj << >> endobj\n%%EOF", UNREADABLE, OTHER),
    "eps named.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNREADABLE, OTHER),
    "zip named.png": (lambda: b"PK\x03\x04" + bytes(60), UNREADABLE, OTHER),
    "a picture behind html.png": (lambda: b"<html>" + encoded(noise(), "PNG"), UNREADABLE, OTHER),
    "a page behind a picture.png": (
        lambda: encoded(noise(), "PNG") + b"<script>alert(1)</script>",
        (30, 40),
        (30, 40),
    ),
}


def seconds_and_outcome(read: Callable[[], Image.Image]) -> tuple[float, Image.Image | Exception]:
    start = time.process_time()
    try:
        outcome: Image.Image | Exception = read()
    except Exception as error:
        outcome = error
    return time.process_time() - start, outcome


def check_outcome(outcome: Image.Image | Exception, expected: tuple[int, int] | str) -> None:
    if isinstance(expected, tuple):
        assert isinstance(outcome, Image.Image), outcome
        assert (outcome.mode, outcome.height, outcome.width) == ("RGB", *expected)
    else:
        assert isinstance(outcome, Exception), outcome
        check_refusal(outcome, said=rf"Image [12].*{expected}")


def test_there_are_forty_files_and_more():
    assert len(FILES) >= 40


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_or_strange_file_is_read_or_refused_at_every_door(name, tmp_path):
    make, expected, expected_of_bytes = FILES[name]
    content = make()
    path = tmp_path / (name if "." in name else f"{name}.png")
    path.write_bytes(content)
    for source in (path, content):
        seconds, outcome = seconds_and_outcome(partial(load_image, source, index=1))
        check_outcome(outcome, expected)
        assert seconds < 5
    seconds, outcome = seconds_and_outcome(lambda: read_image_bytes(content, 0))
    check_outcome(outcome, expected_of_bytes)
    assert seconds < 5
    if isinstance(expected, tuple):
        assert image_size(path) == expected


@pytest.mark.parametrize("name", [name for name, row in FILES.items() if isinstance(row[1], tuple)])
def test_a_strange_file_gives_finite_pixels_of_the_towers_size(name):
    content = FILES[name][0]()
    pixels = build()(images=[content], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.isfinite().all()


VALID = [encoded(noise(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]
VALID += [
    palette(transparent=True),
    turned(6),
    moving("PNG"),
    moving("WEBP"),
    encoded(noise().convert("CMYK"), "JPEG"),
]
edits = st.lists(
    st.tuples(st.sampled_from(["set", "drop", "repeat", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, changes) -> bytes:
    for kind, where, new in changes:
        # half of all edits fall into the first bytes, where the headers stand
        place = int((where * 2 % 1) * (len(content) if where >= 0.5 else min(64, len(content))))
        if kind == "set":
            content = content[:place] + new + content[place + len(new) :]
        elif kind == "drop":
            content = content[:place] + content[place + len(new) :]
        elif kind == "repeat":
            content = content[: place + 40] + content[place:]
        else:
            content = content[:place] if where >= 0.5 else content
    return content


@cases(1300, st.sampled_from(VALID), edits)
def test_a_file_with_any_change_is_read_or_refused(content, changes):
    spoilt = edited(content, changes)
    for read in (load_image, read_image_bytes):
        with refused_well(said="Image [01]"):
            image = read(spoilt)
            assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
    with refused_well(said="Image 0"):
        height, width = image_size(spoilt)
        assert height > 0 and width > 0


KINDS = ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]
KINDS += ["bool", "complex64", "object", "U3", "datetime64[s]"]
FILLS = [0, 1, 255, 256, 65535, -1, 0.5, np.nan, np.inf, -np.inf, 1e300, 2**63]


@cases(
    1200,
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 6), max_size=5)
    | st.permutations([3, 4, 5])
    | st.sampled_from([(5, 7), (5, 7, 4), (1, 5, 7), (2, 2, 1), (4, 4, 4)]),
    st.lists(st.sampled_from(FILLS), min_size=1, max_size=3) | st.lists(st.integers(0, 255), min_size=1, max_size=9),
    st.sampled_from([None, "channels_first", "channels_last", "first", "sideways", 7]),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_array_of_any_type_shape_and_values_is_read_or_refused(kind, shape, fills, layout, as_tensor):
    with np.errstate(all="ignore"):
        values = np.resize(np.array(fills, dtype=object), shape)
        try:
            array = values.astype(kind)
        except (TypeError, ValueError, OverflowError):
            array = np.zeros(shape, dtype=kind)
    source: object = array
    if as_tensor:
        try:
            source = torch.from_numpy(array)
        except TypeError:
            source = array
    with refused_well(said="(Image 0|input_data_format)"):
        image = load_image(source, input_data_format=layout)
        assert image.mode == "RGB" and image.width in shape and image.height in shape


def test_a_picture_that_is_no_file_of_the_disk_is_not_opened(tmp_path):
    for path in (tmp_path, Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(FileNotFoundError, match=rf"Image 0 \({path}\): there is no such file"):
            load_image(path)


def test_a_normalisation_that_divides_by_zero_is_refused():
    processor = build()
    with (
        pytest.raises(ValueError, match=r"`image_std=.*gives pixels that are not finite. Use"),
        np.errstate(all="ignore"),
    ):
        processor(images=[noise()], image_std=[0.0, 0.0, 0.0], return_tensors="pt")
    processor.image_processor.image_std = [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match=r"`image_std=\[0.5, 0.0, 0.5\]`"), np.errstate(all="ignore"):
        processor(images=[noise()])


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 3)])
def test_an_image_of_extreme_sides_is_not_blown_up(size):
    content = io.BytesIO(encoded(Image.new("RGB", size, "red")))
    start = time.process_time()
    pixels = build()(images=[content], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and time.process_time() - start < 5
