"""How images are cut and what they cost: the authors' own tables, transformers' functions, and small cases by hand."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from adaptive_llava.modeling.view_geometry import (
    ImageViews,
    best_resolution,
    check_joined_map,
    check_tiling,
    cut_image,
    image_costs,
    shrunk_grid,
    unpadded_grid,
    view_grid,
)


pytestmark = pytest.mark.compat

IDENTITY = {"type": "identity"}
POOL = {"type": "average_pool", "factors": [1, 2, 3]}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
sides = st.integers(1, 3000)


def anyres(num_rungs: int = 1, tower_size: int = 336, **options):
    return check_tiling({"type": "anyres", **options}, tower_size=tower_size, num_rungs=num_rungs)


def tokens(tiling, compressor, size, grid=(24, 24), whole=False):
    (cost,) = image_costs(tiling, compressor, grid, [cut_image(tiling, size, whole=whole)])
    return cost


def flipped(pairs):
    """The authors write (width, height)."""
    return [[second, first] for first, second in pairs]


# ---- the authors' tables


def test_grids_and_counts_equal_the_authors_own_table(shared):
    table = json.loads((shared / "golden" / "anyres" / "resolution_table.json").read_text())
    tiling = anyres(pinpoints=flipped(table["pinpoints"]))
    assert len(table["rows"]) > 100
    for row in table["rows"]:
        size = (row["h"], row["w"])
        image = cut_image(tiling, size)
        assert best_resolution(size, tiling["pinpoints"]) == tuple(row["best_wh"][::-1]), row
        assert image.tiles == tuple(row["grid_wh"][::-1])
        assert unpadded_grid((24 * image.tiles[0], 24 * image.tiles[1]), size) == tuple(row["unpad_hw"])
        assert tokens(tiling, IDENTITY, size).counts == (row["n_tokens"],)


def test_rounding_follows_transformers_where_the_authors_differ(shared):
    found = json.loads((shared / "golden" / "anyres" / "hf523_vs_original_unpad.json").read_text())
    assert found["best_resolution_differences"] == []
    for row in found["examples"]:
        size = (row["h"], row["w"])
        best = best_resolution(size, PINPOINTS)
        assert best == tuple(row["best_wh"][::-1])
        assert unpadded_grid((best[0] // 14, best[1] // 14), size) == tuple(row["hf_hw"]) != tuple(row["orig_hw"])
        assert tokens(anyres(), IDENTITY, size).counts == (row["hf_tokens"],)


# ---- transformers' functions


@settings(max_examples=300)
@given(sides, sides)
def test_resolution_and_unpadding_equal_transformers(height, width):
    best = best_resolution((height, width), PINPOINTS)
    assert best == tuple(select_best_resolution((height, width), PINPOINTS))
    whole = (best[0] // 14, best[1] // 14)
    assert unpadded_grid(whole, (height, width)) == unpad_image(torch.empty(1, *whole), (height, width)).shape[1:]


# ---- small cases by hand


def test_a_wide_image_costs_its_map_and_its_newlines():
    # 1000x300 pixels (w x h): three tiles in a row; of 24 map rows 1 above and 1 below are padding
    assert cut_image(anyres(), (300, 1000)) == ImageViews((1, 3), (300, 1000))
    joined = tokens(anyres(), POOL, (300, 1000))
    # pooled by 2: a 12x36 map, 10 rows inside; by 3: 8x24, 7 rows inside are cut to 8
    assert joined.counts == (64 + 8 * 25, 144 + 10 * 37, 576 + 22 * 73)
    assert (joined.units, joined.views, joined.newlines) == (1, 4, 0)
    apart = tokens(anyres(num_rungs=3), POOL, (300, 1000))
    assert apart.counts == (4 * 64 + 1, 4 * 144 + 1, 4 * 576 + 1) and (apart.units, apart.newlines) == (4, 1)
    assert apart.tokens([0, 2, 1, 0]) == 64 + 576 + 144 + 64 + 1


def test_an_image_shown_whole_is_one_view():
    assert tokens(anyres(), IDENTITY, (300, 1000), whole=True).counts == (577,)  # one newline, as in transformers
    assert tokens(anyres(num_rungs=3), POOL, (300, 1000), whole=True).counts == (64, 144, 576)


def test_a_sliver_whose_map_is_all_padding_costs_the_whole_view_alone():
    assert tokens(anyres(), IDENTITY, (35, 2739)).counts == (576,)


def test_onevision_shrinks_maps_of_more_than_nine_tiles():
    # 6x6 tiles of 27x27 tokens are four times nine tiles: half a side
    assert shrunk_grid((162, 162), (27, 27), 9) == (81, 81)
    assert shrunk_grid((81, 98), (27, 27), 9) == (81, 98)  # sqrt(98 / 81) = 1.0999
    assert shrunk_grid((81, 99), (27, 27), 9) == (73, 89)  # 1.1055
    assert shrunk_grid((162, 162), (27, 27), None) == (162, 162)
    assert shrunk_grid((1, 12), (2, 2), 1) == (1, 6)  # a side stays
    points = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    tiling = anyres(tower_size=384, pinpoints=points, max_tiles=9)
    assert tokens(tiling, IDENTITY, (2304, 2304), (27, 27)).counts == (729 + 81 * 82,)
    # the limit counts tokens of the same rung
    assert tokens(tiling, POOL, (2304, 2304), (27, 27)).counts[0] == 81 + 27 * 28


def test_a_mosaic_is_one_view_of_all_its_tiles():
    tiling = check_tiling({"type": "mosaic"}, tower_size=336, num_rungs=1)
    assert tiling == {"type": "mosaic", "n": 2} and view_grid(tiling, [24, 24]) == (48, 48)
    (cost,) = image_costs(tiling, POOL, (48, 48), [ImageViews()])
    assert cost.counts == (256, 576, 2304) and cost.views == 1


# ---- options


def test_options_are_filled_in_from_the_tower_and_the_ladder():
    assert anyres() == {
        "type": "anyres",
        "pinpoints": PINPOINTS,
        "view_layout": "spatial_unpad",
        "max_tiles": None,
        "several_images": "tile",
        "tile_size": 336,
    }
    assert anyres(num_rungs=3)["view_layout"] == "sequence"
    assert anyres(tower_size=[24, 24])["pinpoints"][0] == [24, 48]
    assert check_tiling(None, tower_size=None, num_rungs=1) == {"type": "none"}
    assert check_tiling(anyres(), tower_size=336, num_rungs=3) == anyres()  # what is filled in stays
    assert check_tiling({"type": "anyres", "tile_size": 64}, tower_size=None, num_rungs=1)["tile_size"] == 64


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ("anyres", "`tiling='anyres'` must be a dict with a 'type': one of none, anyres, mosaic"),
        ({"type": "tiles"}, "must be a dict with a 'type'"),
        ({"type": "none", "n": 2}, "`tiling` of type 'none' has no option 'n'. Known options: none"),
        ({"type": "mosaic", "n": 1}, "`tiling.n=1` must be a whole number >= 2"),
        ({"type": "anyres", "pinpoints": [[336, 500]]}, r"`tiling.pinpoints=.* a multiple of the tile's 336 pixels"),
        ({"type": "anyres", "pinpoints": []}, r"`tiling.pinpoints=\[\]` must be a non-empty list"),
        ({"type": "anyres", "pinpoints": [336]}, r"`tiling.pinpoints=\[336\]` must be a non-empty list"),
        ({"type": "anyres", "view_layout": "grid"}, "`tiling.view_layout='grid'` is unknown. Pass one of: sequence"),
        ({"type": "anyres", "several_images": "none"}, "`tiling.several_images='none'` is unknown"),
        ({"type": "anyres", "max_tiles": 0}, "`tiling.max_tiles=0` must be a whole number >= 1"),
        ({"type": "anyres", "max_tiles": 9, "view_layout": "sequence"}, "`tiling.max_tiles=9` shrinks the map"),
        ({"type": "anyres", "tile_size": 224}, "`tiling.tile_size=224` must be the tower's input size, 336 pixels"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(tiling, message):
    with pytest.raises(ValueError, match=message):
        check_tiling(tiling, tower_size=336, num_rungs=1)


def test_towers_whose_tiles_are_unknown_or_not_square_are_refused():
    with pytest.raises(ValueError, match="the tower reads images of 224x336 pixels"):
        check_tiling({"type": "anyres"}, tower_size=(224, 336), num_rungs=1)
    with pytest.raises(ValueError, match="`tiling.tile_size` is missing"):
        check_tiling({"type": "anyres"}, tower_size=None, num_rungs=1)


def test_tokens_without_a_grid_cannot_be_joined_to_a_map():
    with pytest.raises(ValueError, match="those of the 'somewhere' compressor form no grid. Use view_layout='seq"):
        check_joined_map(anyres(), {"type": "somewhere"}, (24, 24))
    check_joined_map(anyres(num_rungs=2), {"type": "somewhere"}, (24, 24))
