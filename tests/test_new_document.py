"""Blueprints: a kind of document that the shipped model cannot read until it is taught."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_llava.training.new_document import NEW_DOCUMENT, render_blueprints
from adaptive_llava.training.study.drawing import CONTENTS, Layout
from adaptive_llava.training.study.families import FAMILIES
from adaptive_llava.training.study.ship import load_shipped
from adaptive_llava.training.study.small_model import answers


def test_blueprints_ask_in_the_words_of_the_shipped_model_and_show_what_they_answer():
    words = set(load_shipped()[1].tokenizer.get_vocab())
    for picture in render_blueprints(5, seed=1):
        assert picture.pixels.shape == (Layout().size, Layout().size, 3) and picture.pixels.dtype == np.uint8
        assert picture.family == NEW_DOCUMENT not in FAMILIES
        assert [CONTENTS[content] for content in picture.contents] == [answer for _, answer in picture.questions]
        assert {word for asked in picture.questions for text in asked for word in text.split()} <= words


def test_ink_is_lighter_than_the_ground():
    pixels = render_blueprints(1, seed=1)[0].pixels.astype(int)
    red, _, blue = np.quantile(pixels, 0.25, axis=(0, 1))  # of the ground: most pixels are
    assert red < 50 and 90 < blue < 160
    assert (pixels.min(-1) > 150).mean() > 0.05


def test_a_blueprint_depends_on_seed_and_index_alone_and_test_ones_are_others():
    few, many, tested = (
        render_blueprints(2, seed=1),
        render_blueprints(4, seed=1),
        render_blueprints(2, seed=1, test=True),
    )
    for one, other, unseen in zip(few, many[:2], tested, strict=True):
        assert np.array_equal(one.pixels, other.pixels) and one.questions == other.questions
        assert not np.array_equal(one.pixels, unseen.pixels)
    assert not np.array_equal(few[0].pixels, render_blueprints(1, seed=2)[0].pixels)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="`count=-1` must not be negative"):
        render_blueprints(-1, seed=1)


def test_the_shipped_model_cannot_read_them():
    model, processor = load_shipped()
    right = answers(model, processor, render_blueprints(100, seed=1, test=True), seed=1)
    assert right.mean(0).max() < 0.6  # at none of its token counts
