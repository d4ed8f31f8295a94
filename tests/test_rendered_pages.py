"""Pictures to train a router on."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_llava.training.rendered_pages import LOOK, READ, render_pictures


def test_a_picture_depends_on_seed_and_index_alone():
    several = render_pictures(14, seed=3)
    later = render_pictures(2, seed=3, start=12)
    for (first, kind), (second, same_kind) in zip(several[12:], later, strict=True):
        assert kind == same_kind and np.array_equal(np.asarray(first), np.asarray(second))
    other, _ = render_pictures(1, seed=4)[0]
    assert other.size != several[0][0].size or not np.array_equal(np.asarray(other), np.asarray(several[0][0]))


def test_kinds_to_read_and_to_look_at_take_turns():
    kinds = [kind for _, kind in render_pictures(12, seed=0)]
    assert set(kinds[0::2]) == set(READ) and set(kinds[1::2]) == set(LOOK)


def test_neither_size_nor_brightness_alone_tells_them_apart():
    drawn = render_pictures(96, seed=1)
    shape = {True: [], False: []}
    paper = []
    for image, kind in drawn:
        shape[kind in READ].append(image.width / image.height)
        if kind in READ or kind in ("big_digit", "empty_form"):
            paper.append((kind in READ, np.asarray(image).mean()))
    assert abs(np.mean(shape[True]) - np.mean(shape[False])) < 0.25
    read, empty = ([light for is_read, light in paper if is_read == wanted] for wanted in (True, False))
    assert min(empty) < max(read) and np.mean(empty) - np.mean(read) < 25


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="`count=-1` and `start=0` must not be negative"):
        render_pictures(-1, seed=0)
    assert render_pictures(0, seed=0) == []
