"""Ladders and budget arithmetic in whole numbers, checked against enumeration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.visual_token_geometry import (
    ImageCost,
    check_rungs,
    highest_rung,
    rungs_below,
    rungs_for_budget,
    share_total,
    shared_rungs,
    visual_token_grids,
    visual_token_ladder,
    window_grid,
)
from tests.conftest import TINY_COMPRESSORS


pytestmark = pytest.mark.compat

PAPER_LADDER = (64, 144, 576)
ONE_VIEW = ImageCost(PAPER_LADDER)
ladders = st.lists(st.integers(1, 600), min_size=1, max_size=5).map(sorted)


@pytest.mark.parametrize(
    ("options", "grid", "counts"),
    [
        ({"type": "identity"}, (24, 24), (576,)),
        ({"type": "identity"}, (3, 7), (21,)),
        ({"type": "average_pool", "factors": [1, 2, 3]}, (24, 24), (64, 144, 576)),
        ({"type": "average_pool", "factors": [2]}, (27, 27), (169,)),
        ({"type": "average_pool", "factors": [1, 2, 3]}, (7, 5), (2, 6, 35)),
        ({"type": "token_concat", "window": 2}, (24, 24), (144,)),
        ({"type": "token_concat", "window": 3}, (7, 5), (2,)),
        ({"type": "spatial_fusion", "window": 2, "fused_tokens": 1}, (24, 24), (144,)),
        ({"type": "spatial_fusion", "window": 5, "fused_tokens": 1}, (24, 24), (16,)),
        ({"type": "spatial_fusion", "window": 4, "fused_tokens": 8}, (24, 27), (288,)),
        ({"type": "query_resampler", "counts": [1, 256]}, (24, 24), (1, 256)),
        ({"type": "query_resampler", "counts": [1, 4]}, (3, 7), (1, 4)),
    ],
)
def test_ladder_lists_the_counts_of_the_papers_and_of_odd_grids(options, grid, counts):
    assert visual_token_ladder(options, grid) == counts


def test_every_registered_compressor_has_a_ladder_and_a_row_in_the_test_table():
    assert {options["type"] for options in TINY_COMPRESSORS.values()} == set(COMPRESSORS)
    for options in TINY_COMPRESSORS.values():
        assert all(count > 0 for count in visual_token_ladder(options, (6, 6)))


@pytest.mark.parametrize("name", sorted(TINY_COMPRESSORS))
def test_grids_known_to_the_processor_are_those_of_the_compressor(name):
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS[name], 8, 8)
    grids = visual_token_grids(compressor.options, (6, 7))
    assert list(grids or [None] * compressor.num_rungs) == [
        compressor.grid_after((6, 7), rung) for rung in range(compressor.num_rungs)
    ]


def test_ladder_of_an_unknown_compressor_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`compressor.type='pool'`.*average_pool, identity, .*token_concat"):
        visual_token_ladder({"type": "pool"}, (4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"type": "average_pool", "factors": [1, 5]},
        {"type": "token_concat", "window": 5},
        {"type": "spatial_fusion", "window": 5, "fused_tokens": 4},
    ],
)
@pytest.mark.parametrize("grid", [(4, 24), (24, 4)])
def test_a_window_larger_than_a_side_is_refused(options, grid):
    with pytest.raises(ValueError, match=rf"=5` leaves nothing of a {grid[0]}x{grid[1]} patch grid"):
        visual_token_ladder(options, grid)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "average_pool", "factors": [1, 2]},
        {"type": "token_concat", "window": 2},
        {"type": "spatial_fusion", "window": 2, "fused_tokens": 1},
    ],
)
def test_strict_tiling_refuses_only_grids_with_patches_left_over(options):
    strict = options | {"strict_tiling": True}
    assert visual_token_ladder(strict, (6, 4))[0] == 6
    with pytest.raises(ValueError, match="does not tile a 6x5 patch grid and `strict_tiling=True`"):
        visual_token_ladder(strict, (6, 5))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_window_grid_counts_the_windows_that_fit(height, width, window):
    if window > min(height, width):
        with pytest.raises(ValueError, match="leaves nothing"):
            window_grid((height, width), window)
    else:
        rows = len(range(0, height - window + 1, window))
        columns = len(range(0, width - window + 1, window))
        assert window_grid((height, width), window) == (rows, columns)


@given(ladders, st.integers(-5, 3000), st.integers(1, 5), st.integers(0, 3))
def test_highest_rung_is_the_dearest_affordable_one(ladder, budget, units, newlines):
    image = ImageCost(tuple(ladder), units=units, newlines=newlines)
    affordable = [rung for rung in range(len(ladder)) if ladder[rung] * units + newlines <= budget]
    if affordable:
        assert highest_rung(image.counts, budget) == max(affordable)
        assert image.tokens(rungs_for_budget(budget, [image])) <= budget
    else:
        with pytest.raises(ValueError, match=rf"=[-]?\d+` is below.*\({ladder[0] * units + newlines} tokens"):
            highest_rung(image.counts, budget)


@pytest.mark.parametrize("budget", [64.0, "64", None, True])
def test_a_budget_that_is_no_whole_number_is_refused(budget):
    with pytest.raises(ValueError, match=rf"`visual_token_budget={budget!r}` must be a whole number"):
        highest_rung(PAPER_LADDER, budget)


def test_one_budget_serves_all_images_and_a_list_serves_each():
    three = [ONE_VIEW] * 3
    assert rungs_for_budget(200, three) == [1, 1, 1]
    assert rungs_for_budget([64, 143, 10_000], three) == [0, 0, 2]
    # the second image has four views: 4 x 144 are 576
    assert rungs_for_budget(600, [ONE_VIEW, ImageCost(PAPER_LADDER, units=4)]) == [2, 1, 1, 1, 1]
    # with two newlines they are 578
    assert rungs_for_budget(577, [ImageCost(PAPER_LADDER, units=4, newlines=2)]) == [0, 0, 0, 0]
    # views that share one rung have their counts in the ladder already
    assert rungs_for_budget(600, [ImageCost((320, 600, 2500), views_per_unit=5)]) == [1] * 5


@pytest.mark.parametrize("budgets", [[64], [64, 64, 64], []])
def test_a_budget_list_of_another_length_than_the_images_is_refused(budgets):
    with pytest.raises(ValueError, match=rf"has {len(budgets)} entries for 2 images"):
        rungs_for_budget(budgets, [ONE_VIEW] * 2)


def test_a_ceiling_lowers_only_the_highest_views_of_an_image():
    image = ImageCost(PAPER_LADDER, units=4, newlines=2)
    # 576 + 64 + 64 + 144 + 2 are 850
    assert rungs_below(850, [image], [2, 0, 0, 1]) == [2, 0, 0, 1]
    assert rungs_below(849, [image], [2, 0, 0, 1]) == [1, 0, 0, 1]
    assert rungs_below(417, [image], [2, 0, 0, 1]) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"`visual_token_budget=257` is below .*\(258 tokens for an image"):
        rungs_below(257, [image], [2, 0, 0, 1])


@given(ladders, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_a_ceiling_is_kept_and_never_raises_a_view(ladder, units, data):
    images = [ImageCost(tuple(ladder), units=number) for number in units]
    wanted = data.draw(st.lists(st.integers(0, len(ladder) - 1), min_size=sum(units), max_size=sum(units)))
    ceiling = data.draw(st.integers(ladder[0] * max(units), 3000))
    lowered = iter(rungs_below(ceiling, images, wanted))
    chosen = iter(wanted)
    for image in images:
        before, after = ([next(source) for _ in range(image.units)] for source in (chosen, lowered))
        assert image.tokens(after) <= ceiling
        assert all(low <= high for low, high in zip(after, before, strict=True))
        assert after == before or image.tokens(before) > ceiling


def test_views_of_one_unit_share_the_largest_of_their_rungs():
    joined = ImageCost((10, 20, 50), views_per_unit=3)
    assert shared_rungs([0, 1, 0, 2, 1], [joined, ONE_VIEW, ONE_VIEW]) == [1, 1, 1, 2, 1]
    assert check_rungs([0, 2, 1], [joined]) == [2, 2, 2]


def total_by_hand(total, ladder, scores, per_prompt):
    """The rule of the design, one view at a time."""
    chosen, first = [], 0
    for views in per_prompt:
        mine = [0] * views
        by_score = sorted(range(views), key=lambda view: (-scores[first + view], view))
        for view in by_score:
            for rung in range(len(ladder)):
                trial = [*mine[:view], rung, *mine[view + 1 :]]
                if sum(ladder[r] for r in trial) <= total:
                    mine = trial
        chosen += mine
        first += views
    return chosen


@settings(max_examples=200)
@given(ladders, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_share_total_serves_by_score_and_never_exceeds_the_total(ladder, per_prompt, data):
    scores = data.draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=sum(per_prompt), max_size=sum(per_prompt))
    )
    total = data.draw(st.integers(ladder[0] * max(per_prompt), 3000))
    rungs = share_total(total, [ImageCost(tuple(ladder))] * sum(per_prompt), scores, per_prompt)
    assert rungs == total_by_hand(total, ladder, scores, per_prompt)
    first = 0
    for views in per_prompt:
        assert sum(ladder[rung] for rung in rungs[first : first + views]) <= total
        first += views


def test_share_total_without_prompts_takes_all_views_as_one():
    assert share_total(64 + 64 + 144, [ONE_VIEW] * 3, [0.1, 0.9, 0.5], None) == [0, 1, 0]


def test_share_total_breaks_ties_in_prompt_order():
    assert share_total(64 + 144, [ONE_VIEW] * 2, [0.5, 0.5], [2]) == [1, 0]


def test_share_total_pays_newlines_and_serves_joined_views_by_their_highest_score():
    tiles = ImageCost(PAPER_LADDER, units=2, newlines=1)
    joined = ImageCost((100, 300, 900), views_per_unit=2)
    scores = [0.2, 0.1, 0.0, 0.9]
    assert share_total(64 * 2 + 1 + 100 + 199, [tiles, joined], scores, [2]) == [1, 1, 0, 0]  # 200 more would be due
    assert share_total(64 * 2 + 1 + 100 + 280, [tiles, joined], scores, [2]) == [1, 0, 1, 1]


@pytest.mark.parametrize("per_prompt", [[1], [2, 1], []])
def test_share_total_leaves_no_image_out(per_prompt):
    with pytest.raises(
        ValueError, match=rf"`images_per_prompt=.*` tells of {sum(per_prompt)} images, but there are 2"
    ):
        share_total(200, [ONE_VIEW] * 2, [0.0] * 2, per_prompt)


def test_share_total_names_the_prompt_that_cannot_be_served():
    images = [ONE_VIEW, ImageCost(PAPER_LADDER, units=2, newlines=1)]
    with pytest.raises(ValueError, match="cost of prompt 1: 129 tokens for 1 images with 2 views. Pass at least 129"):
        share_total(128, images, [0.0] * 3, [1, 1])


@pytest.mark.parametrize("total", [True, 99.5, "99"])
def test_share_total_refuses_what_is_no_whole_number(total):
    with pytest.raises(ValueError, match="must be a whole number of tokens per prompt"):
        share_total(total, [ONE_VIEW], [0.0], [1])


def test_replayed_rungs_are_checked_one_by_one():
    assert check_rungs((0, 2, 1), [ONE_VIEW] * 3) == [0, 2, 1]
    with pytest.raises(ValueError, match=r"has 2 entries for 3 images. Pass one rung per image"):
        check_rungs([0, 1], [ONE_VIEW] * 3)
    with pytest.raises(ValueError, match=r"has 2 entries for 4 views. Pass one rung per view"):
        check_rungs([0, 1], [ONE_VIEW, ImageCost(PAPER_LADDER, units=3)])
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"contains {wrong}, but this model has rungs 0 to 2"):
            check_rungs([0, wrong], [ONE_VIEW] * 2)


def test_a_fractional_rung_is_refused_and_not_cut_off():
    with pytest.raises(ValueError, match=r"`visual_rungs` contains 1.5"):
        check_rungs([0, 1.5], [ONE_VIEW] * 2)


def test_geometry_needs_neither_pytorch_nor_transformers(tmp_path):
    # beside each other, as in a checkpoint
    for name in ("visual_token_geometry", "view_geometry"):
        source = Path(__file__).resolve().parents[1] / "modeling" / f"{name}.py"
        (tmp_path / "checkpoint" / source.name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoint" / source.name).write_text(source.read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import checkpoint.view_geometry; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
