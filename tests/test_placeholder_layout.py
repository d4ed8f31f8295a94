"""The vectorised layout against a slow one that walks every row slot by slot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adaptive_llava.modeling.placeholder_layout import build_layout


pytestmark = pytest.mark.compat

IMAGE, PAD = 9, 0


def text_marker(row: int, column: int) -> float:
    return 1000.0 * (row + 1) + column


def visual_marker(token: int) -> float:
    return -1.0 - token


def by_hand(ids, mask, positions, lengths):
    """Expanded rows as lists of (marker, attended, position, owner column), without filling."""
    rows, next_token = [], 0
    counts = iter(lengths)
    for row, tokens in enumerate(ids):
        attended = [1] * len(tokens) if mask is None else mask[row]
        kept = [c for c in range(len(tokens)) if any(attended[: c + 1]) and any(attended[c:])]
        slots, seen, surplus, previous = [], 0, 0, None
        for column, token in enumerate(tokens):
            width = 1
            first = next_token
            if token == IMAGE:
                width = next(counts)
                next_token += width
            if positions is not None and previous is not None and positions[row][column] <= previous:
                surplus = 0  # a new segment
            if positions is not None:
                previous = positions[row][column]
            if column not in kept:
                continue
            for place in range(width):
                if positions is not None:
                    position = positions[row][column] + surplus + place
                else:
                    position = max(0, seen - 1 + (1 if attended[column] else 0))
                seen += 1 if attended[column] else 0
                marker = visual_marker(first + place) if token == IMAGE else text_marker(row, column)
                slots.append((marker, attended[column], position, column))
            surplus += width - 1
        rows.append(slots)
    return rows


def check(ids, mask, positions, lengths):
    """Compare `build_layout` with the loop in every slot; returns the layout."""
    ids_tensor, mask_tensor, positions_tensor = (
        None if value is None else torch.tensor(value) for value in (ids, mask, positions)
    )
    layout = build_layout(ids_tensor, mask_tensor, positions_tensor, lengths, IMAGE)
    expected = by_hand(ids, mask, positions, lengths)
    batch, length, total = len(ids), len(ids[0]), max(1, *(len(slots) for slots in expected))
    assert layout.source.shape == (batch, total) and layout.aligned.shape == (batch, length)
    assert layout.surplus == total - length

    text = torch.tensor([[[text_marker(r, c)] for c in range(length)] for r in range(batch)])
    visual = torch.tensor([[visual_marker(token)] for token in range(sum(lengths))]).view(-1, 1)
    rows = layout.splice(text, visual)
    states = layout.gather(rows)
    new_ids = layout.expand_ids(ids_tensor, IMAGE, PAD)
    embeds, places = layout.prefix(visual)
    whole_mask = layout.attention_mask if layout.attention_mask is not None else torch.ones(batch, total)
    packed = mask is None and any(later <= earlier for row in positions or [] for earlier, later in pairwise(row))
    pad_left = (mask is None or all(row[-1] for row in mask)) and not packed
    for row, slots in enumerate(expected):
        start = total - len(slots) if pad_left else 0
        inside = range(start, start + len(slots))
        assert rows[row, list(inside), 0].tolist() == [marker for marker, *_ in slots]
        if packed:
            assert layout.attention_mask is None
        else:
            attended = [whole_mask[row, slot].item() for slot in range(total)]
            assert attended == [slots[slot - start][1] if slot in inside else 0 for slot in range(total)]
        if layout.position_ids is None:
            # transformers counts up from 0: right only if that is what the slots need
            assert [position for _, _, position, _ in slots] == list(range(total))
        else:
            assert layout.position_ids[row, list(inside)].tolist() == [position for _, _, position, _ in slots]
        last_slot = {column: start + slot for slot, (*_, column) in enumerate(slots)}
        assert layout.aligned[row].tolist() == [last_slot.get(column, -1) for column in range(length)]
        for column in range(length):
            seen = states[row, column, 0].item()
            assert seen == (rows[row, last_slot[column], 0].item() if column in last_slot else 0)
        expected_ids = [PAD] * total
        for slot, (marker, _, _, column) in zip(inside, slots, strict=True):
            expected_ids[slot] = IMAGE if marker < 0 else ids[row][column]
        assert new_ids[row].tolist() == expected_ids
        pairs = {p: embeds[row, k, 0].item() for k, p in enumerate(places[row].tolist()) if p >= 0}
        assert pairs == {slot: marker for slot, (marker, *_) in zip(inside, slots, strict=True) if marker < 0}
    return layout


@st.composite
def ragged_batches(draw, *, interior: bool = False, padding: bool = True):
    """Rows of text and images with padding on one side, and token counts of all images."""
    side = draw(st.sampled_from(["left", "right"])) if padding else None
    token = st.sampled_from([IMAGE, 1, 2, 3])
    rows = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=4))
    width = max(map(len, rows))
    if not padding:
        rows = [row + [4] * (width - len(row)) for row in rows]
    ids, mask = [], []
    for row in rows:
        attended = [1] * len(row)
        if interior:
            holes = draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
            attended = [int(not hole) for hole in holes]
        fill = width - len(row)
        ids.append([PAD] * fill + row if side == "left" else row + [PAD] * fill)
        mask.append([0] * fill + attended if side == "left" else attended + [0] * fill)
    images = sum(row.count(IMAGE) for row in rows)
    lengths = draw(st.lists(st.integers(1, 5), min_size=images, max_size=images))
    return ids, mask, tuple(lengths)


@settings(max_examples=150, deadline=None)
@given(ragged_batches())
def test_ragged_rows_with_padding_on_either_side(case):
    ids, mask, lengths = case
    check(ids, mask, None, lengths)


@settings(max_examples=150, deadline=None)
@given(ragged_batches(interior=True))
def test_masked_ids_inside_a_row_stay_in_place_and_unattended(case):
    ids, mask, lengths = case
    check(ids, mask, None, lengths)


@settings(max_examples=100, deadline=None)
@given(ragged_batches(padding=False))
def test_rows_without_a_mask(case):
    ids, _, lengths = case
    check(ids, None, None, lengths)


@settings(max_examples=150, deadline=None)
@given(ragged_batches(padding=False), st.data())
def test_packed_rows_count_the_surplus_of_each_segment_alone(case, data):
    ids, _, lengths = case
    positions = []
    for row in ids:
        resets = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
        mine: list[int] = []
        for column, reset in enumerate(resets):
            mine.append(0 if column == 0 or reset else mine[-1] + 1)
        positions.append(mine)
    check(ids, None, positions, lengths)


@settings(max_examples=100, deadline=None)
@given(ragged_batches())
def test_positions_given_beside_a_mask_are_shifted_by_earlier_images(case):
    ids, mask, lengths = case
    positions = [[max(0, sum(row[: column + 1]) - 1) for column in range(len(row))] for row in mask]
    layout = check(ids, mask, positions, lengths)
    counted = check(ids, mask, None, lengths)
    if layout.attention_mask is not None and counted.position_ids is not None:
        attended = layout.attention_mask.bool()
        assert torch.equal(layout.position_ids[attended], counted.position_ids[attended])


def test_filling_behind_a_packed_row_is_a_segment_of_its_own():
    layout = build_layout(
        torch.tensor([[1, 2, 3], [IMAGE, 1, 2]]), None, torch.tensor([[0, 1, 0], [0, 1, 2]]), (3,), IMAGE
    )
    assert layout.attention_mask is None
    assert layout.position_ids.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]


def test_filling_before_a_row_of_given_positions_is_masked():
    layout = build_layout(torch.tensor([[1, 2], [IMAGE, 2]]), None, torch.tensor([[0, 1], [0, 1]]), (3,), IMAGE)
    assert layout.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert layout.position_ids[0, 2:].tolist() == [0, 1]
    assert layout.position_ids[1].tolist() == [0, 1, 2, 3]


def test_a_batch_without_images_is_laid_out_as_it_is():
    ids = torch.tensor([[1, 2, 3]])
    layout = build_layout(ids, None, None, (), IMAGE)
    assert layout.surplus == 0 and layout.attention_mask is None and layout.position_ids is None
    assert torch.equal(layout.expand_ids(ids, IMAGE, PAD), ids)
    embeds, places = layout.prefix(torch.zeros(1, 4))
    assert (places == -1).all() and embeds.shape == (1, 1, 4)


def test_an_image_in_dropped_padding_takes_its_tokens_with_it():
    layout = build_layout(torch.tensor([[IMAGE, 1, IMAGE]]), torch.tensor([[0, 1, 1]]), None, (2, 3), IMAGE)
    visual = torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0], [-5.0]])
    rows = layout.splice(torch.tensor([[[10.0], [11.0], [12.0]]]), visual)
    assert rows.flatten().tolist() == [11.0, -3.0, -4.0, -5.0]
    assert layout.aligned.tolist() == [[-1, 0, 3]]


def test_rows_after_a_cache_count_on_from_its_attended_slots():
    past = torch.tensor([[0, 0, 1], [1, 1, 1]])
    layout = build_layout(torch.tensor([[IMAGE, 1], [2, 3]]), None, None, (2,), IMAGE, past)
    assert layout.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]
    assert layout.position_ids[0].tolist() == [1, 2, 3]
    assert layout.position_ids[1, 1:].tolist() == [3, 4]


def test_an_empty_row_leaves_nothing_but_filling():
    layout = build_layout(torch.tensor([[PAD, PAD], [1, 2]]), torch.tensor([[0, 0], [1, 1]]), None, (), IMAGE)
    assert layout.aligned[0].tolist() == [-1, -1]
    assert layout.attention_mask[0].sum() == 0


@pytest.mark.parametrize(
    ("case", "side"), [("right_maxNone", "right"), ("left_maxNone", "left"), ("right_max9", "right")]
)
def test_spliced_rows_equal_those_of_llavas_code(shared, case, side):
    golden = load_file(shared / "golden" / "llava15" / f"splice_{case}.safetensors")
    ids, mask, labels = (golden[f"input.{name}"].long() for name in ("input_ids", "attention_mask", "labels"))
    if case.startswith("left"):  # the authors' rows come padded right and leave padded left; ours stay as they came
        shifts = [int((row == 0).sum()) for row in mask]
        ids, mask, labels = (
            torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
            for rows in (ids, mask, labels)
        )
    features = golden["input.image_features"]
    images = int(((ids == -200) & (mask == 1)).sum())  # their text-only row has one too, of which nothing is used
    layout = build_layout(ids, mask, None, (features.shape[1],) * images, -200)
    rows = layout.splice(golden["input.embed_tokens"][ids.clamp(min=0)], features[:images].flatten(0, 1))
    scored = torch.full(rows.shape[:2], -100)
    columns = layout.aligned.clamp(min=0)
    scored.scatter_(1, columns, labels.masked_fill((ids == -200) | (layout.aligned < 0), -100))
    length = golden["output.labels"].shape[1]  # they cut what is too long; here the processor refuses it
    attended = golden["output.attention_mask"].bool()
    assert torch.equal(layout.attention_mask[:, :length].bool(), attended)
    torch.testing.assert_close(rows[:, :length][attended], golden["output.inputs_embeds"][attended], rtol=0, atol=0)
    assert torch.equal(scored[:, :length][attended], golden["output.labels"][attended])
