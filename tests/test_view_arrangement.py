"""Views joined to images: the LLaVA-NeXT authors' tensors, transformers' own packing, and small cases by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from adaptive_llava.modeling.view_arrangement import ViewArrangement, join_mosaic, split_views
from adaptive_llava.modeling.view_geometry import ImageViews, check_tiling, cut_image, image_costs, unpadded_grid
from adaptive_llava.modeling.visual_tokens import VisionFeatures, VisualTokens


pytestmark = pytest.mark.compat


def arrangement(layout: str = "spatial_unpad", dim: int = 2, newline=None, max_tiles=None) -> ViewArrangement:
    module = ViewArrangement(dim, view_layout=layout, max_tiles=max_tiles)
    if newline is not None:
        module.load_state_dict({"image_newline": newline})
    return module


def packed(*views: torch.Tensor) -> VisualTokens:
    return VisualTokens(torch.cat(views), tuple(len(view) for view in views))


# ---- the authors' tensors


def test_joined_maps_equal_llava_next(shared):
    folder = shared / "golden" / "anyres"
    info = json.loads((folder / "llava16_spatial_unpad_336.json").read_text())
    tensors = load_file(folder / "llava16_spatial_unpad_336.safetensors")
    pinpoints = [[height, width] for width, height in info["pinpoints"]]
    tiling = check_tiling({"type": "anyres", "pinpoints": pinpoints}, tower_size=336, num_rungs=1)
    cases = info["cases"]
    images = [cut_image(tiling, case["image_size_wh"][::-1]) for case in cases.values()]
    views = [view for case in cases for view in tensors[f"input.tiles_{case}"]]
    # all images at once: their tokens must not mix
    module = arrangement(newline=tensors["input.image_newline"])
    out = module(packed(*views), images, [(24, 24)] * len(views))
    assert out.lengths == tuple(case["n_tokens"] for case in cases.values())
    for case, tokens in zip(cases, out.values.split(out.lengths), strict=True):
        assert torch.equal(tokens, tensors[f"output.tokens_{case}"]), case
    costs = image_costs(tiling, {"type": "identity"}, (24, 24), images)
    assert tuple(cost.counts[0] for cost in costs) == out.lengths


def test_unpadded_maps_equal_the_authors(shared):
    folder = shared / "golden" / "anyres"
    info = json.loads((folder / "unpad_image.json").read_text())
    tensors = load_file(folder / "unpad_image.safetensors")
    for case, facts in info["cases"].items():
        whole, size = tensors[f"input.map_{case}"][0], tuple(facts["original_size_wh"][::-1])
        height, width = unpadded_grid(tuple(whole.shape), size)
        top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
        assert torch.equal(whole[top : top + height, left : left + width], tensors[f"output.map_{case}"][0])


# ---- transformers


@pytest.mark.parametrize("size", [(97, 31), (100, 100), (31, 200), (150, 149), (400, 390)])
def test_joined_and_shrunk_maps_equal_transformers_onevision(size):
    torch.manual_seed(0)
    pinpoints = [[24 * rows, 24 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    options = {"type": "anyres", "pinpoints": pinpoints, "max_tiles": 2}
    tiling = check_tiling(options, tower_size=24, num_rungs=1)
    image, newline = cut_image(tiling, size), torch.randn(5)
    views = torch.randn(image.views, 36, 5)
    vision = SimpleNamespace(image_size=24, patch_size=4)
    stock = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    (expected,), _ = LlavaOnevisionModel.pack_image_features(
        stock, [views], torch.tensor([size]), image_newline=newline, vision_aspect_ratio="anyres_max_2"
    )
    module = arrangement(dim=5, newline=newline, max_tiles=2)
    out = module(packed(*views), [image], [(6, 6)] * image.views)
    assert out.values.shape == expected.shape
    assert (out.values - expected).abs().max() <= 1e-6
    (cost,) = image_costs(tiling, {"type": "identity"}, (6, 6), [image])
    assert cost.counts == out.lengths


# ---- small cases by hand


def numbered(*counts: int) -> VisualTokens:
    """Tokens 0, 1, 2, ... of views with so many tokens."""
    return VisualTokens(torch.arange(sum(counts)).float().unsqueeze(1), counts)


def test_a_sequence_ends_each_row_of_tiles_with_a_newline():
    module = arrangement("sequence", dim=1, newline=torch.tensor([-1.0]))
    # 2 rows of 2 tiles, each view at its own count; then an image that is one view
    out = module(numbered(2, 1, 3, 1, 1, 2), [ImageViews((2, 2), (9, 9)), ImageViews()], [None] * 6)
    assert out.values.flatten().tolist() == [0, 1, 2, 3, 4, 5, -1, 6, 7, -1, 8, 9]
    assert out.lengths == (10, 2)


def test_a_joined_map_loses_its_padding_and_ends_each_row_with_a_newline():
    module = arrangement(dim=1, newline=torch.tensor([-1.0]))
    # 1 row of 2 tiles of 2x3 tokens: a 2x6 map; the image is 1x1, so 2 columns on each side are padding
    image = ImageViews((1, 2), (10, 10))
    out = module(numbered(6, 6, 6, 6), [image, ImageViews()], [(2, 3)] * 4)
    # columns 2 and 3 of the map: the last of tile 1, the first of tile 2
    assert out.values.flatten().tolist() == [*range(6), 8, 12, -1, 11, 15, -1, *range(18, 24), -1]
    assert out.lengths == (12, 7)


@pytest.mark.parametrize("layout", ["sequence", "spatial_unpad"])
def test_the_newline_is_trained_and_takes_part_where_no_image_has_one(layout):
    module = arrangement(layout, dim=1)
    tokens = VisualTokens(torch.ones(4, 1, requires_grad=True), (4,))
    module(tokens, [ImageViews()], [(2, 2)]).values.sum().backward()
    assert module.image_newline.grad.tolist() == [1.0 if layout == "spatial_unpad" else 0.0]
    assert tokens.values.grad.flatten().tolist() == [1.0] * 4


def test_a_new_newline_is_about_as_long_as_a_unit_vector():
    torch.manual_seed(0)
    assert 0.9 < arrangement(dim=4096).image_newline.norm() < 1.1


def test_bf16_tokens_stay_bf16_where_a_map_is_shrunk():
    module = arrangement(dim=3, max_tiles=1)
    views = [torch.randn(4, 3, dtype=torch.bfloat16) for _ in range(5)]
    out = module(packed(*views), [ImageViews((2, 2), (50, 50))], [(2, 2)] * 5)
    assert out.values.dtype == torch.bfloat16 and out.lengths == (4 + 2 * 3,)


# ---- pixels in


ANYRES = check_tiling({"type": "anyres"}, tower_size=4, num_rungs=1)  # pinpoints 4x8, 8x4, 8x8, 12x4, 4x12
ONEVISION = ANYRES | {"several_images": "whole"}


def test_padding_behind_an_images_views_never_reaches_the_tower():
    pixels = torch.arange(2 * 5).float().view(2, 5, 1, 1, 1).expand(2, 5, 3, 4, 4)
    views, images = split_views(pixels, [[8, 8], [4, 8]], ANYRES)
    assert views[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert images == (ImageViews((2, 2), (8, 8)), ImageViews((1, 2), (4, 8)))


def test_an_image_followed_by_zeros_is_whole_where_several_in_a_prompt_are():
    pixels = torch.ones(3, 5, 3, 4, 4)
    pixels[1, 1:] = 0
    _, images = split_views(pixels, torch.tensor([[8, 8]] * 3), ONEVISION)
    assert [image.views for image in images] == [5, 1, 5]
    _, images = split_views(pixels, torch.tensor([[8, 8]] * 3), ANYRES)
    assert [image.views for image in images] == [5, 5, 5]
    _, images = split_views(pixels[:, :1], torch.tensor([[8, 8]] * 3), ONEVISION)
    assert [image.views for image in images] == [1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "sizes", "tiling", "message"),
    [
        ((2, 5, 3, 4, 4), None, ANYRES, "`image_sizes` is missing"),
        ((2, 5, 3, 4, 4), [[8, 8]], ANYRES, "`image_sizes` must be height and width of each of the 2 images"),
        ((1, 5, 3, 4, 4), [[0, 8]], ANYRES, r"`image_sizes` must be .* got \[\[0, 8\]\]"),
        ((1, 3, 3, 4, 4), [[8, 8]], ANYRES, "holds 3 views per image, but image 0 of 8x8 pixels .* has 5 with"),
        ((5, 4, 4), None, ANYRES, r"has shape \(5, 4, 4\); this model takes \(num_images, max_views"),
        ((2, 5, 3, 4, 4), None, {"type": "none"}, r"takes one view per image, \(num_images, 3, height, width\)"),
        ((2, 4, 3, 4, 4), None, {"type": "mosaic", "n": 2}, r"takes \(num_images, 5, 3, .*the tiles of a mosaic"),
        ((2, 3, 4, 4), None, {"type": "mosaic", "n": 2}, "the tiles of a mosaic"),
    ],
)
def test_pixels_that_do_not_fit_the_tiling_are_refused(shape, sizes, tiling, message):
    with pytest.raises(ValueError, match=message):
        split_views(torch.zeros(shape), sizes, tiling)


def test_a_mosaic_is_one_map_of_its_tiles_beside_the_whole_image():
    # 2 images, 2x2 tiles of 2x1 patches, then the whole image; a patch is numbered by crop * 2 + row
    patches = torch.arange(2 * 5 * 2).float().view(10, 2, 1)
    features = VisionFeatures(
        patches=patches,
        grid=(2, 1),
        cls=torch.arange(10).float().unsqueeze(1),
        pixels=torch.arange(10).float().view(10, 1, 1, 1),
        views_per_image=(1,) * 10,
        blocks={3: patches * 10},
    )
    joined = join_mosaic(features, 2)
    assert joined.grid == (4, 2) and joined.views_per_image == (1, 1)
    raster = [0, 2, 1, 3, 4, 6, 5, 7]
    assert joined.patches.flatten(1).tolist() == [raster, [10 + number for number in raster]]
    assert torch.equal(joined.blocks[3], joined.patches * 10)
    assert joined.overview.flatten(1).tolist() == [[8, 9], [18, 19]]
    assert joined.cls.flatten().tolist() == joined.pixels.flatten().tolist() == [4, 9]
    assert joined.layer_cls is None
