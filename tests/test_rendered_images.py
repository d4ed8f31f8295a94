"""The rendered images and the tiny model that learns from them."""

from typing import Any

import numpy as np
import pytest
import torch

from adaptive_llava.training.rendered_images import (
    CELL,
    CELL_NAMES,
    COLOURS,
    DIGITS,
    GRID,
    IMAGE_SIZE,
    KINDS,
    PATCH_CONTENTS,
    SHAPES,
    render_images,
    vocabulary,
)


def same(first, second) -> bool:
    pixels = np.array_equal(np.asarray(first.image), np.asarray(second.image))
    return pixels and first.questions == second.questions and first.patch_contents == second.patch_contents


def test_an_image_depends_on_seed_and_index_alone():
    many, few = render_images(12, seed=3), render_images(6, seed=3)
    assert all(same(first, second) for first, second in zip(many, few, strict=False))
    assert all(same(first, second) for first, second in zip(many[6:], render_images(6, seed=3, start=6), strict=True))
    assert not any(same(first, second) for first, second in zip(few, render_images(6, seed=4), strict=True))


def test_kinds_take_turns_as_asked():
    assert [image.kind for image in render_images(4, seed=0)] == ["scene", "collage", "document", "scene"]
    assert {image.kind for image in render_images(5, seed=0, kinds=["document"])} == {"document"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_is_complete(kind):
    words = set(vocabulary())
    for image in render_images(40, seed=1, kinds=[kind]):
        assert image.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert image.image.mode == "RGB"
        assert len(image.patch_contents) == GRID**2
        for question, answer in image.questions:
            assert words.issuperset(question.split())
            assert answer in words and " " not in answer


def test_answers_of_a_document_are_its_digits_in_reading_order():
    for image in render_images(20, seed=2, kinds=["document"]):
        assert [question.split()[-1] for question, _ in image.questions] == list(CELL_NAMES)
        assert [answer for _, answer in image.questions] == [
            PATCH_CONTENTS[content] for content in image.patch_contents
        ]
        assert all(answer in DIGITS for _, answer in image.questions)


def test_cells_with_the_same_digit_look_alike_and_others_do_not():
    blocks, contents = [], []
    for image in render_images(30, seed=5, kinds=["document"]):
        page = np.asarray(image.image.convert("L"), dtype=float)
        blocks.append(page.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(GRID**2, -1))
        contents += image.patch_contents
    cells, digits = np.concatenate(blocks), np.array(contents)
    cells -= cells.mean(1, keepdims=True)
    means = np.stack([cells[digits == digit].mean(0) for digit in range(len(DIGITS))])
    nearest = ((cells[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == digits).mean() > 0.5  # chance is 0.1; the digits are jittered


def test_a_scene_shows_the_colour_and_shape_it_says():
    for image in render_images(40, seed=6, kinds=["scene"]):
        colour, shape = (answer for _, answer in image.questions)
        difference = np.abs(np.asarray(image.image, dtype=int) - COLOURS[colour]).sum(-1)
        assert (difference == 0).mean() > 0.03
        assert shape in SHAPES
        assert {PATCH_CONTENTS[content] for content in image.patch_contents} == {shape, "background"}


def test_a_collage_shows_the_colour_it_says_in_every_quadrant():
    half = IMAGE_SIZE // 2
    for image in render_images(20, seed=7, kinds=["collage"]):
        pixels = np.asarray(image.image, dtype=int)
        corners = [(0, 0), (0, half), (half, 0), (half, half)]
        for (top, left), (_, colour) in zip(corners, image.questions, strict=True):
            quadrant = pixels[top : top + half, left : left + half]
            assert (np.abs(quadrant - COLOURS[colour]).sum(-1) == 0).mean() > 0.03


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="`count=-1` and `start=0` must not be negative"):
        render_images(-1, seed=0)
    with pytest.raises(ValueError, match="must name at least one of scene, collage, document"):
        render_images(1, seed=0, kinds=["photo"])
    with pytest.raises(ValueError, match="must name at least one of"):
        render_images(1, seed=0, kinds=[])
    assert render_images(0, seed=0) == []


@pytest.fixture(scope="module")
def tiny():
    from adaptive_llava.training.tiny_model import build_model

    return build_model()


def test_tiny_model_has_one_patch_per_cell_and_three_token_counts(tiny):
    model, _ = tiny
    assert model.config.visual_token_counts == (1, 4, 16)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000


def test_training_sees_the_pixels_that_the_processor_makes(tiny):
    from adaptive_llava.training.tiny_model import pixels_of

    images = render_images(6, seed=8)
    expected = tiny[1](images=[image.image for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        pixels_of(tiny[1], [np.asarray(image.image) for image in images]), expected, atol=1e-5, rtol=0
    )


def test_training_sees_the_ids_and_labels_that_the_chat_template_makes(tiny):
    from adaptive_llava.training.tiny_model import Words, conversation

    processor, rng = tiny[1], np.random.default_rng(0)
    images = render_images(6, seed=9)
    conversations: Any = [conversation(image, rng) for image in images]
    input_ids, labels = Words(processor.tokenizer).batch(conversations)
    for chat, image in zip(conversations, images, strict=True):
        text = {"type": "text", "text": chat[0]["content"]}
        chat[0]["content"] = [{"type": "image", "image": image.image}, text]
    expected = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(labels != -100, expected["assistant_masks"] == 1)
    assert torch.equal(labels[labels != -100], input_ids[labels != -100])


def test_a_few_steps_of_training_lower_the_loss_and_move_every_part():
    from adaptive_llava.training.tiny_model import build_model, train_from_scratch

    model, processor = build_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = []
    train_from_scratch(
        model, processor, steps=25, seed=1, batch_size=16, report=lambda step, loss: losses.append(loss)
    )
    assert len(losses) == 25
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert still <= {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
