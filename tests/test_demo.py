"""The demo: what it refuses, what it draws, what it counts, and how it behaves in a real browser."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_llava.hub_cards.space.chat_turn import (
    assistant_message,
    budget_range,
    comparison_table,
    next_prompt,
    prepare,
    run_both,
    user_message,
)
from adaptive_llava.hub_cards.space.model_choice import chosen_model, example_pictures, load
from adaptive_llava.hub_cards.space.token_overlay import draw, overlays, query_tokens, tokens_of_views, window_tokens
from adaptive_llava.hub_cards.space.upload_check import check_text, read_uploads
from adaptive_llava.hub_cards.space.view_boxes import view_boxes
from adaptive_llava.image_bytes import MAX_BYTES, MAX_IMAGES, read_image_bytes
from adaptive_llava.modeling.view_geometry import ImageViews, cut_image
from adaptive_llava.training.flop_counts import count_flops
from tests.conftest import TINY_COMPRESSORS, tiny_images, tiny_model
from tests.test_loading_paths import save_checkpoint


pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def shipped():
    return load(None)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


RED = Image.new("RGB", (40, 30), (200, 0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_of_known_formats_are_read_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert read_image_bytes(encoded(RED, kind, exif=exif)).size == (30, 40)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "Image 1 is no JPEG, PNG, WEBP that can be read. Convert it"),
        (encoded(RED, "GIF"), "is no JPEG, PNG, WEBP"),
        (encoded(RED, "TIFF"), "is no JPEG, PNG, WEBP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no JPEG, PNG, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no JPEG, PNG, WEBP"),
        (bytes(MAX_BYTES + 1), "at most 10,485,760 are taken"),
        (png_of_size(6000, 5000), "has 6000x5000 pixels, and at most 24,000,000"),
        (png_of_size(20_000, 1), "has 20000x1 pixels"),
        (png_of_size(60_000, 60_000), "is too large"),
        (encoded(RED, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "animation of 2 frames"),
        (encoded(RED, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "animation of 2 frames"),
        (encoded(RED)[:60], "is damaged or truncated"),
    ],
)
def test_other_uploads_are_refused(content, said):
    with pytest.raises(ValueError, match=said):
        read_image_bytes(content)


def test_a_claimed_size_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="has 6000x5000 pixels"):
        read_image_bytes(png_of_size(6000, 5000))


@pytest.mark.parametrize("source", ["https://example.org/cat.png", "/etc/hostname", Path(__file__), None])
def test_addresses_and_paths_are_not_read(source):
    with pytest.raises(TypeError, match="no path or address is read"):
        read_image_bytes(source)


def test_texts_and_numbers_of_images_have_limits():
    assert check_text("  what is it? ") == "what is it?"
    for text, said in ((" ", "is empty"), ("a" * 2001, "2,001 characters, and at most 2,000")):
        with pytest.raises(ValueError, match=said):
            check_text(text)
    with pytest.raises(ValueError, match="has 9 images, and at most 8"):
        read_uploads([b""] * (MAX_IMAGES + 1))


def test_typed_placeholders_and_control_tokens_are_plain_text(shipped):
    model, processor = shipped
    image = example_pictures()[0][0]
    specials = {processor.image_token, *processor.tokenizer.all_special_tokens}
    ids = {processor.tokenizer.convert_tokens_to_ids(token) for token in specials} - {processor.tokenizer.unk_token_id}
    plain = prepare(processor, [user_message("which digit", [image])])["input_ids"]
    text = " ".join(["which", *sorted(specials), "digit"])
    typed = prepare(processor, [user_message(text, [image])])["input_ids"]
    assert [int((plain == one).sum()) for one in ids] == [int((typed == one).sum()) for one in ids]
    assert typed.shape[1] > plain.shape[1]
    chosen, _ = run_both(model, processor, [user_message(text, [image])], "auto")
    assert len(chosen.tokens) == 1


def test_a_chart_is_read_and_costs_are_those_of_its_tokens(shipped):
    model, processor = shipped
    image, question = example_pictures()[0]
    message = user_message(question, [image])
    chosen, full = run_both(model, processor, [message], 1)
    assert (chosen.tokens, full.tokens, full.answer[:6]) == ((1,), (36,), "height")
    text = prepare(processor, [message])["input_ids"].shape[1] - 1
    assert chosen.flops == count_flops(model.config, 1, text).end_to_end
    assert full.flops == count_flops(model.config, 36, text).end_to_end
    assert 0 < chosen.first_token_ms < chosen.total_ms
    several, _ = run_both(model, processor, [user_message(question, [image, RED])], 9)
    assert several.tokens == (9, 9)
    with pytest.raises(ValueError, match="below the smallest count"):
        run_both(model, processor, [message], 0)


def test_another_model_answers_and_shows_its_windows(tmp_path):
    model, processor = load(str(save_checkpoint(tmp_path / "model")))
    messages = [user_message("w5", [RED]), assistant_message("w6"), user_message("w7", [RED])]
    chosen, full = run_both(model, processor, messages, 9)
    assert (chosen.tokens, full.tokens) == ((9, 9), (36, 36))
    pictures = overlays(model, processor, [RED, RED], prepare(processor, messages), chosen.rungs)
    assert [caption for _, caption in pictures] == ["image 1: 9 windows", "image 2: 9 windows"]


def test_earlier_turns_are_sent_only_if_asked_for():
    first = [user_message("a", [RED]), assistant_message("b")]
    follow_up = user_message("c")
    assert next_prompt(first, follow_up, remember=True) == [*first, follow_up]
    assert next_prompt(first, follow_up, remember=False) == [user_message("c", [RED])]
    other = user_message("d", [RED, RED])
    assert next_prompt(first, other, remember=False) == [other]
    for remember in (False, True):
        with pytest.raises(ValueError, match="no image yet"):
            next_prompt([], follow_up, remember=remember)


def test_the_table_escapes_what_the_model_wrote(shipped):
    model, processor = shipped
    image, question = example_pictures()[0]
    chosen, full = run_both(model, processor, [user_message(question, [image])], "auto")
    page = comparison_table(type(chosen)("<img src=x>", (1, 4), (0, 1), None, 2.0, 3.0), full)
    assert "&lt;img src=x&gt;" in page and "<img" not in page
    assert "<td>1 + 4 = 5</td><td>36</td><td>0.14</td>" in page and "<td>not known</td>" in page


@pytest.mark.parametrize("name", TINY_COMPRESSORS)
def test_every_compressor_can_be_drawn(name):
    model = tiny_model(compressor=TINY_COMPRESSORS[name])
    ladder = model.model.compressor.ladder(model.config.view_grid)
    inputs = {"pixel_values": tiny_images(1), "image_sizes": [(30, 40)]}
    for rung, count in enumerate(ladder):
        (view,) = tokens_of_views(model, inputs, [rung])
        of_a_window = getattr(model.model.compressor, "fused_tokens", 1)
        assert len(view.boxes) * of_a_window == count
        picture = draw(RED, [((0, 0, 40, 30), view)])
        assert picture.size == (480, 360)
        assert np.asarray(picture).std(axis=(0, 1)).max() > 0


def test_windows_tile_whole_patches_and_leave_the_rest():
    boxes = window_tokens((6, 7), 3).boxes
    assert len(boxes) == 4 and boxes[-1] == pytest.approx((3 / 7, 0.5, 6 / 7, 1))


def test_a_query_that_looks_evenly_at_a_cell_is_drawn_as_that_cell():
    attention = torch.zeros(2, 6, 6)
    attention[0, 0:3, 2:4] = 1 / 6
    attention[1] = 1 / 36
    view = query_tokens(attention.flatten(1), (6, 6))
    np.testing.assert_allclose(view.boxes, [(2 / 6, 0, 4 / 6, 3 / 6), (0, 0, 1, 1)], atol=1e-5)
    assert view.heat.shape == (6, 6) and view.heat.max() == 1


class Squeeze:
    """An image processor that resizes to a square."""

    size = {"height": 48, "width": 48}  # noqa: RUF012, as transformers has it


class Crop:
    """An image processor that keeps the middle."""

    size = {"shortest_edge": 48}  # noqa: RUF012
    crop_size = {"height": 48, "width": 48}  # noqa: RUF012
    do_center_crop = True


def test_views_lie_where_the_processor_took_them_from():
    none = {"type": "none"}
    assert view_boxes(none, Squeeze(), (30, 60), ImageViews()) == [(0, 0, 60, 30)]
    assert view_boxes(none, Crop(), (30, 60), ImageViews()) == [(15, 0, 45, 30)]
    assert view_boxes({"type": "mosaic", "n": 2}, Squeeze(), (31, 61), ImageViews()) == [(0, 0, 60, 30)]
    anyres = {"type": "anyres", "tile_size": 10, "pinpoints": [[10, 20], [20, 20]]}
    # 20 x 80 pixels become 5 x 20 on a canvas of 10 x 20: 2.5 rows of padding above and below, cut to 2
    whole, left, right = view_boxes(anyres, Squeeze(), (20, 80), cut_image(anyres, (20, 80)))
    assert whole == (0, 0, 80, 20)
    assert left == (0, -8, 40, 32) and right == (40, -8, 80, 32)
    assert view_boxes(anyres, Squeeze(), (20, 80), ImageViews()) == [(0, -30, 80, 50)]


def test_overlays_show_queries_on_every_image(shipped):
    model, processor = shipped
    images = [picture for picture, _ in example_pictures()[:2]]
    inputs = prepare(processor, [user_message("which digit", images)])
    pictures = overlays(model, processor, images, inputs, [0, 3])
    assert [caption for _, caption in pictures] == ["image 1: 1 query", "image 2: 36 queries"]
    assert all(picture.size == (480, 480) for picture, _ in pictures)


def test_an_image_in_tiles_has_a_picture_of_the_whole_and_one_of_its_tiles():
    model = tiny_model("dfmr", tiling={"type": "anyres"}, router={"type": "fixed"})
    inputs = {"pixel_values": tiny_images(3)[None], "image_sizes": torch.tensor([[24, 48]])}
    image = Image.new("RGB", (48, 24))
    pictures = overlays(model, SimpleNamespace(image_processor=Squeeze()), [image], inputs, [0, 1, 2])
    assert [caption for _, caption in pictures] == ["image 1: 4 windows", "image 1, tiles: 45 windows"]
    assert all(picture.size == (480, 240) for picture, _ in pictures)


def test_the_slider_covers_every_count(shipped):
    assert budget_range(shipped[0].config) == (1, 36)
    tiled = tiny_model("dfmr", tiling={"type": "anyres"}).config
    # the whole and four tiles, each at 36 tokens, and a newline after both rows of tiles
    assert budget_range(tiled) == (2 * 4 + 4 + 1, 5 * 36 + 2)


def test_the_model_is_named_by_argument_then_variable_then_card(tmp_path):
    card = tmp_path / "README.md"
    assert chosen_model(None, {}, card) is None
    card.write_text("---\nmodels:\n- ada/model\n---\n")
    assert chosen_model(None, {}, card) == "ada/model"
    assert chosen_model(None, {"MODEL": "bob/model"}, card) == "bob/model"
    assert chosen_model("folder", {"MODEL": "bob/model"}, card) == "folder"
