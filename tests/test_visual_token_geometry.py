"""Ladders and budget arithmetic in whole numbers, checked against enumeration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.visual_token_geometry import (
    check_rungs,
    highest_rung,
    rungs_for_budget,
    share_total,
    visual_token_ladder,
    window_grid,
)
from tests.conftest import TINY_COMPRESSORS


pytestmark = pytest.mark.compat

PAPER_LADDER = (64, 144, 576)
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


@given(ladders, st.integers(-5, 3000), st.integers(1, 5))
def test_highest_rung_is_the_dearest_affordable_one(ladder, budget, views):
    affordable = [rung for rung in range(len(ladder)) if ladder[rung] * views <= budget]
    if affordable:
        assert highest_rung(ladder, budget, views) == max(affordable)
    else:
        with pytest.raises(ValueError, match=rf"=[-]?\d+` is below.*\({ladder[0] * views} tokens"):
            highest_rung(ladder, budget, views)


@pytest.mark.parametrize("budget", [64.0, "64", None, True])
def test_a_budget_that_is_no_whole_number_is_refused(budget):
    with pytest.raises(ValueError, match=rf"`visual_token_budget={budget!r}` must be a whole number"):
        highest_rung(PAPER_LADDER, budget)


def test_one_budget_serves_all_images_and_a_list_serves_each():
    assert rungs_for_budget(200, PAPER_LADDER, 3) == [1, 1, 1]
    assert rungs_for_budget([64, 143, 10_000], PAPER_LADDER, 3) == [0, 0, 2]
    assert rungs_for_budget(600, PAPER_LADDER, [1, 4]) == [2, 1]  # 4 views at 144 are 576


@pytest.mark.parametrize("budgets", [[64], [64, 64, 64], []])
def test_a_budget_list_of_another_length_than_the_images_is_refused(budgets):
    with pytest.raises(ValueError, match=rf"has {len(budgets)} entries for 2 images"):
        rungs_for_budget(budgets, PAPER_LADDER, 2)


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
    rungs = share_total(total, ladder, scores, per_prompt)
    assert rungs == total_by_hand(total, ladder, scores, per_prompt)
    first = 0
    for views in per_prompt:
        assert sum(ladder[rung] for rung in rungs[first : first + views]) <= total
        first += views


def test_share_total_without_prompts_takes_all_views_as_one():
    assert share_total(64 + 64 + 144, PAPER_LADDER, [0.1, 0.9, 0.5], None) == [0, 1, 0]


def test_share_total_breaks_ties_in_prompt_order():
    assert share_total(64 + 144, PAPER_LADDER, [0.5, 0.5], [2]) == [1, 0]


def test_share_total_names_the_prompt_that_cannot_be_served():
    with pytest.raises(ValueError, match="smallest cost of prompt 1: 3 views at 64 tokens each. Pass at least 192"):
        share_total(150, PAPER_LADDER, [0.0] * 5, [2, 3])


@pytest.mark.parametrize("total", [True, 99.5, "99"])
def test_share_total_refuses_what_is_no_whole_number(total):
    with pytest.raises(ValueError, match="must be a whole number of tokens per prompt"):
        share_total(total, PAPER_LADDER, [0.0], [1])


def test_replayed_rungs_are_checked_one_by_one():
    assert check_rungs((0, 2, 1), PAPER_LADDER, 3) == [0, 2, 1]
    with pytest.raises(ValueError, match=r"has 2 entries for 3 images"):
        check_rungs([0, 1], PAPER_LADDER, 3)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"contains {wrong}, but this model has rungs 0 to 2"):
            check_rungs([0, wrong], PAPER_LADDER, 2)


def test_a_fractional_rung_is_refused_and_not_cut_off():
    with pytest.raises(ValueError, match=r"`visual_rungs` contains 1.5"):
        check_rungs([0, 1.5], PAPER_LADDER, 2)


def test_geometry_needs_neither_pytorch_nor_transformers():
    file = Path(__file__).resolve().parents[1] / "modeling" / "visual_token_geometry.py"
    code = (
        f"import runpy, sys; runpy.run_path({str(file)!r}); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
