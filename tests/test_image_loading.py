"""Images of every kind that users have, and every kind that must be refused."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_llava.processing import image_loading
from adaptive_llava.processing.image_loading import flatten_images, load_image


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def gradient(height=6, width=9):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 20, columns * 20, rows + columns], axis=-1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same_in_every_form(tmp_path):
    image = Image.fromarray(gradient())
    path = tmp_path / "picture.png"
    image.save(path)
    content = path.read_bytes()
    array = gradient()
    return {
        "PIL image": image,
        "path": path,
        "path as text": str(path),
        "bytes": content,
        "file object": io.BytesIO(content),
        "data URI": "data:image/png;base64," + base64.b64encode(content).decode(),
        "datasets dict with bytes": {"bytes": content, "path": None},
        "datasets dict with path": {"bytes": None, "path": str(path)},
        "uint8 array": array,
        "channels-first array": array.transpose(2, 0, 1),
        "int64 array": array.astype(np.int64),
        "float array 0 to 1": array / 255,
        "float array 0 to 255": array.astype(np.float32),
        "uint16 array": array.astype(np.uint16) * 257,
        "tensor": torch.tensor(array),
        "channels-first float tensor": torch.tensor(array).permute(2, 0, 1).float() / 255,
        "lazily opened file": Image.open(path),
    }


def test_every_accepted_form_of_an_image_gives_the_same_pixels(tmp_path):
    for form, source in same_in_every_form(tmp_path).items():
        loaded = load_image(source)
        assert loaded.mode == "RGB", form
        assert np.array_equal(np.asarray(loaded), gradient()), form


def test_bfloat16_tensors_are_read_to_within_their_precision():
    tensor = (torch.tensor(gradient()).permute(2, 0, 1) / 255).to(torch.bfloat16).requires_grad_()
    error = np.abs(np.asarray(load_image(tensor)).astype(int) - gradient())
    assert error.max() <= 1


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_grey_arrays_become_three_equal_channels(shape):
    values = np.arange(35, dtype=np.uint8).reshape(shape)
    loaded = np.asarray(load_image(values))
    assert loaded.shape == (5, 7, 3)
    assert np.array_equal(loaded[..., 0], values.reshape(5, 7)) and np.array_equal(loaded[..., 2], loaded[..., 0])


def test_a_shape_that_could_be_either_is_channels_first_unless_told():
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(np.asarray(load_image(values)), values.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(load_image(values, input_data_format="channels_last")), values)


def test_four_channel_arrays_are_transparent_on_white_in_both_orders():
    values = np.zeros((5, 7, 4), dtype=np.uint8)  # black, fully transparent
    for array in (values, values.transpose(2, 0, 1)):
        assert np.array_equal(np.asarray(load_image(array)), np.full((5, 7, 3), 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "La", "RGBa"])
def test_transparent_pixels_are_white_and_opaque_ones_keep_their_colour(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.putpixel((0, 0), 0)
        image = Image.open(io.BytesIO(encoded(image, transparency=0)))
        assert image.mode == "P"
    elif mode in ("RGB", "L"):  # PNG's tRNS: one colour stands for transparent
        key = (1, 1, 1) if mode == "RGB" else 1
        image = Image.new(mode, (2, 1))
        image.putpixel((0, 0), key)
        image = Image.open(io.BytesIO(encoded(image, transparency=key)))
        assert image.mode == mode and "transparency" in image.info
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    assert np.asarray(load_image(image)).tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_half_transparent_black_is_middle_grey():
    assert np.asarray(load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_and_not_clipped(mode):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    if mode != "I;16":
        image = (
            Image.fromarray(values.astype(np.int32))
            if mode == "I"
            else Image.frombytes(mode, (4, 1), values.astype(">u2").tobytes())
        )
    assert image.mode == mode
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_png_file_is_scaled():
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    loaded = np.asarray(load_image(encoded(Image.fromarray(values))))[..., 0]
    assert np.abs(loaded.astype(int) - values / 257).max() <= 0.5


def test_float_images_and_one_bit_images_are_read():
    assert np.asarray(load_image(Image.fromarray(np.array([[0.0, 1.0]], np.float32))))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(load_image(Image.fromarray(np.array([[False, True]]))))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(load_image(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]


def test_cmyk_jpeg_keeps_its_colour():
    content = encoded(Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert np.abs(np.asarray(load_image(content)).astype(int) - (200, 30, 40)).max() <= 6


def test_exif_rotation_is_applied_and_the_callers_image_stays():
    image = Image.fromarray(gradient(height=4, width=8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    content = encoded(image, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(content))
    assert np.array_equal(np.asarray(load_image(opened)), np.rot90(gradient(height=4, width=8), k=-1))
    assert opened.size == (8, 4)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(load_image(content))[2, 2].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("size", [(1, 1), (10000, 1), (1, 10000)])
def test_tiny_and_extreme_images_are_images(size):
    assert load_image(encoded(Image.new("RGB", size, "red"))).size == size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_truncated_files_are_refused_by_index(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(ValueError, match="Image 3 is (damaged or truncated|no image that can be read)"):
        load_image(content[: int(len(content) * share)], index=3)


def test_a_damaged_file_is_named_with_its_path(tmp_path):
    path = tmp_path / "scan.png"
    path.write_bytes(encoded(Image.fromarray(gradient(64, 64)))[:100])
    with pytest.raises(ValueError, match=r"Image 2 \(.*scan.png\) is damaged or truncated"):
        load_image(path, index=2)


def test_what_is_no_image_is_refused():
    for content in (b"", b"<svg><image href='x'/></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(ValueError, match="Image 0 is no image that can be read"):
            load_image(content)
    with pytest.raises(TypeError, match="Image 1 is a int. Pass a path"):
        load_image(7, index=1)
    with pytest.raises(FileNotFoundError, match=r"Image 0 \(nowhere.png\): there is no such file"):
        load_image("nowhere.png")


def bomb_png(width, height):
    """A PNG of a few bytes whose header promises many pixels."""
    content = bytearray(encoded(Image.new("1", (1, 1))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("side", [9_500, 20_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(side):
    with pytest.raises(ValueError, match="Image 0 is too large: .* At most 89,478,485 pixels"):
        load_image(bomb_png(side, side))


def test_files_over_the_byte_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_loading, "MAX_BYTES", 50)
    path = tmp_path / "big.png"
    Image.fromarray(gradient()).save(path)
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        load_image(path)


def test_empty_images_are_refused():
    with pytest.raises(ValueError, match="Image 4 is empty: 0x5 pixels"):
        load_image(Image.new("RGB", (0, 5)), index=4)
    with pytest.raises(ValueError, match=r"Image 0 is empty: its array has shape \(0, 5, 3\)"):
        load_image(np.zeros((0, 5, 3)))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.full((4, 4, 3), -1.5), "from -1.5 to -1.5"),
        (np.full((4, 4, 3), 300), "from 300 to 300"),
        (np.full((4, 4, 3), np.nan), "from nan to nan"),
        (np.full((4, 4, 3), 1 + 1j), "type complex128"),
    ],
)
def test_values_that_are_no_pixels_are_refused(values, found):
    with pytest.raises(ValueError, match=f"Image 0 has values {found if 'from' in found else 'of ' + found}"):
        load_image(values)


@pytest.mark.parametrize("shape", [(4,), (5, 5, 2), (2, 3, 4, 5)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="is an array of shape"):
        load_image(np.ones(shape, np.uint8))


def test_urls_are_not_fetched_unless_asked_for():
    with pytest.raises(ValueError, match="is a URL, and URLs are not fetched unless you ask for it. Pass `allow_urls"):
        load_image("https://127.0.0.1:9/cat.png")
    with pytest.raises(ValueError, match="could not be fetched"):
        load_image("http://127.0.0.1:9/cat.png", allow_urls=True)


def test_data_uris_must_be_base64():
    with pytest.raises(ValueError, match="is no valid base64 data URI"):
        load_image("data:image/png;base64,&&&")


def test_nested_flat_single_and_batched_images_are_told_apart():
    image, array = Image.new("RGB", (2, 2)), np.zeros((3, 4, 4, 3), np.uint8)
    assert flatten_images(None) == ([], None)
    assert flatten_images(image) == ([image], None)
    assert flatten_images([image, "a.png"]) == ([image, "a.png"], None)
    assert flatten_images([[image], [], ["a", "b"]]) == ([image, "a", "b"], [1, 0, 2])
    assert flatten_images([[image], None, image]) == ([image, image], [1, 0, 1])
    assert len(flatten_images(array)[0]) == 3 and flatten_images([array, image])[1] is None
    assert flatten_images([[torch.zeros(2, 3, 4, 4)], []])[1] == [2, 0]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared images are not on this machine")
@pytest.mark.parametrize("name", ["charts", "documents", "photos", "nlvr", "easyvqa", "opencqa"])
def test_real_images_load_upright_in_rgb(name):
    paths = sorted((DATA / name / "images").iterdir())[:25]
    assert paths and (DATA / name / "manifest.jsonl").is_file()
    for path in paths:
        loaded = load_image(path)
        assert loaded.mode == "RGB" and min(loaded.size) > 1
