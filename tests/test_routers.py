"""The laws every router obeys on every compressor, and each rule against an independent reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.pixel_statistics import pixel_routing
from adaptive_llava.modeling.router_base import Router
from adaptive_llava.modeling.router_feature_std import FeatureStdRouter
from adaptive_llava.modeling.router_pixel_std import PixelStdRouter
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.processing.tower_image_processor import square_image_processor
from adaptive_llava.training.image_source import open_images
from tests.conftest import TINY_COMPRESSORS, TINY_ROUTERS, tiny_vision_config


pytestmark = pytest.mark.compat

DIM, TEXT_DIM = 8, 12
every_pair = [
    pytest.mark.parametrize("router_name", TINY_ROUTERS),
    pytest.mark.parametrize("compressor_name", TINY_COMPRESSORS),
]


def on_every_pair(test):
    for mark in every_pair:
        test = mark(test)
    return test


def build(router_name: str, compressor_name: str, **options) -> Router:
    torch.manual_seed(0)
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS[compressor_name], DIM, TEXT_DIM)
    router = build_part("router", ROUTERS, TINY_ROUTERS[router_name] | options, DIM, compressor).eval()
    with torch.no_grad():
        for parameter in router.parameters():  # a learned one starts the same for every view
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return router


def pooling(*factors: int):
    return build_part("compressor", COMPRESSORS, {"type": "average_pool", "factors": list(factors)}, DIM, TEXT_DIM)


def features(views: int, grid: tuple[int, int] = (6, 6), seed: int = 0) -> VisionFeatures:
    """Views from flat to noisy."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(views, grid[0] * grid[1], DIM, generator=generator)
    scale = torch.linspace(0, 0.2, max(views, 2))[:views].view(-1, 1, 1)
    return VisionFeatures(
        patches=noise * scale + torch.randn(views, 1, DIM, generator=generator),
        grid=grid,
        cls=torch.randn(views, DIM, generator=generator),
        pixels=torch.randn(views, 3, 8, 8, generator=generator),
        views_per_image=(1,) * views,
        blocks={1: torch.randn(views, grid[0] * grid[1], DIM, generator=generator)},
        layer_cls=torch.randn(views, DIM, generator=generator),
    )


def test_every_registered_router_has_a_row_in_the_test_table():
    assert set(TINY_ROUTERS) == set(ROUTERS)
    assert all(router.type_name == name for name, router in ROUTERS.items())


@on_every_pair
@pytest.mark.parametrize("training", [False, True])
def test_routing_is_one_valid_rung_and_one_fp32_score_per_view(router_name, compressor_name, training):
    router = build(router_name, compressor_name).train(training)
    routing = router(features(5))
    assert routing.rungs.shape == (5,) and routing.rungs.dtype == torch.long
    assert routing.scores.shape == (5,) and routing.scores.dtype == torch.float32
    assert routing.scores.isfinite().all()
    assert ((routing.rungs >= 0) & (routing.rungs < router.num_rungs)).all()


@on_every_pair
def test_a_view_is_routed_without_looking_at_its_batch(router_name, compressor_name):
    router = build(router_name, compressor_name)
    views = features(6)
    together = router(views)
    for view in range(6):
        alone = router(views.select([view]))
        assert alone.rungs.item() == together.rungs[view].item()
        torch.testing.assert_close(alone.scores[0], together.scores[view], rtol=0, atol=1e-6)


@on_every_pair
def test_no_views_are_routed_to_nothing(router_name, compressor_name):
    routing = build(router_name, compressor_name)(features(0))
    assert routing.rungs.shape == (0,) and routing.scores.shape == (0,)


@on_every_pair
def test_every_parameter_gets_a_gradient(router_name, compressor_name):
    router = build(router_name, compressor_name).train().requires_grad_(True)
    routing = router(features(4))
    learned = list(router.named_parameters())
    assert bool(learned) == (routing.logits is not None)
    if learned:
        routing.logits.square().sum().backward()
    for name, parameter in learned:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@on_every_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_finite_fp32(router_name, compressor_name, dtype):
    router = build(router_name, compressor_name).to(dtype)
    views = features(5)
    blocks = {1: views.blocks[1].to(dtype)}
    routing = router(replace(views, patches=views.patches.to(dtype), cls=views.cls.to(dtype), blocks=blocks))
    assert routing.scores.dtype == torch.float32 and routing.scores.isfinite().all()
    torch.testing.assert_close(routing.scores, build(router_name, compressor_name)(views).scores, rtol=0, atol=0.02)


@on_every_pair
def test_autocast_on_the_cpu_does_not_change_the_decision(router_name, compressor_name):
    router, views = build(router_name, compressor_name), features(6)
    exact = router(views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(views)
    assert torch.equal(cast.rungs, exact.rungs)
    torch.testing.assert_close(cast.scores, exact.scores, rtol=0, atol=1e-5)


@on_every_pair
def test_saved_weights_and_options_route_alike(router_name, compressor_name, tmp_path):
    router = build(router_name, compressor_name)
    save_file(router.state_dict(), tmp_path / "weights.safetensors")
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS[compressor_name], DIM, TEXT_DIM)
    again = build_part("router", ROUTERS, router.options, DIM, compressor).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert again.options == router.options
    views = features(5)
    assert torch.equal(again(views).rungs, router(views).rungs)
    assert torch.equal(again(views).scores, router(views).scores)


@pytest.mark.parametrize(("rung", "expected"), [(-1, 2), (-3, 0), (0, 0), (1, 1)])
def test_fixed_gives_its_rung_to_every_view(rung, expected):
    router = build("fixed", "average_pool", rung=rung)
    assert router(features(3)).rungs.tolist() == [expected] * 3


@pytest.mark.parametrize("rung", [3, -4, 1.0, True, "top"])
def test_fixed_refuses_what_is_no_rung(rung):
    with pytest.raises(ValueError, match=r"is no rung of a compressor with 3. Use a whole number from -3 to 2"):
        build("fixed", "average_pool", rung=rung)


def test_random_takes_the_top_rung_at_inference():
    assert build("random", "average_pool")(features(4)).rungs.tolist() == [2] * 4


def test_random_is_uniform_in_training_and_follows_the_global_seed():
    router = build("random", "average_pool").train()
    torch.manual_seed(5)
    first = torch.cat([router(features(60)).rungs for _ in range(50)])
    torch.manual_seed(5)
    second = torch.cat([router(features(60)).rungs for _ in range(50)])
    assert torch.equal(first, second)
    shares = torch.bincount(first, minlength=3) / len(first)
    # 3000 draws: a standard deviation of a share is 0.0086
    assert (shares - 1 / 3).abs().max() < 0.04


def spread_by_hand(patches: np.ndarray, grid: tuple[int, int], window: int) -> float:
    """DFMR's statistic of one view, patch by patch, in float64."""
    patch_map = patches.astype(np.float64).reshape(*grid, -1)
    deviations = []
    for row in range(0, grid[0] - window + 1, window):
        for column in range(0, grid[1] - window + 1, window):
            for channel in range(patch_map.shape[-1]):
                values = [patch_map[row + i, column + j, channel] for i in range(window) for j in range(window)]
                mean = sum(values) / len(values)
                deviations.append((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)
    return sum(deviations) / len(deviations)


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (24, 24)])
def test_feature_std_measures_the_spread_inside_windows(grid):
    views = features(3, grid)
    router = FeatureStdRouter(DIM, pooling(1, 2, 3))
    assert router.windows == (3, 2)
    expected = [[spread_by_hand(view.numpy(), grid, window) for window in (3, 2)] for view in views.patches]
    np.testing.assert_allclose(router.window_spread(views).numpy(), expected, rtol=0, atol=2e-6)


def test_feature_std_takes_the_lowest_rung_that_qualifies():
    router = FeatureStdRouter(DIM, pooling(1, 2, 3), thresholds=[0.1, 0.2])
    spread = torch.tensor([[0.05, 0.05], [0.1, 0.9], [0.15, 0.2], [0.15, 0.21], [0.9, 0.1]])
    # a threshold that is met exactly is kept; the second row qualifies for rung 0 although its rung 1 does not
    assert router.rungs_of(spread).tolist() == [0, 0, 1, 2, 1]


def test_feature_std_spends_nothing_extra_on_a_flat_view_and_all_on_noise():
    router = FeatureStdRouter(DIM, pooling(1, 2, 3))
    patches = torch.stack([torch.ones(36, DIM), torch.randn(36, DIM, generator=torch.Generator().manual_seed(0))])
    routing = router(VisionFeatures(patches, (6, 6), None, torch.zeros(2, 3, 8, 8), (1, 1)))
    assert routing.rungs.tolist() == [0, 2]
    assert routing.scores[0] == 0 and routing.scores[1] > 0.5


def test_feature_std_hand_computed_case():
    # one channel, one 2x2 window of 1 2 3 4: mean 2.5, biased variance 1.25
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    compressor = build_part("compressor", COMPRESSORS, {"type": "average_pool", "factors": [1, 2]}, 1, TEXT_DIM)
    router = FeatureStdRouter(1, compressor)
    spread = router.window_spread(VisionFeatures(patches, (2, 2), None, torch.zeros(1, 3, 8, 8), (1,)))
    torch.testing.assert_close(spread, torch.tensor([[1.25**0.5]]))


def test_feature_std_on_a_compressor_with_one_count_has_nothing_to_decide():
    router = build("feature_std", "identity")
    assert router.options == {"type": "feature_std", "windows": [], "thresholds": []}
    assert router(features(3)).rungs.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.1]}, r"`router.thresholds=\[0.1\]` must be a list of 2"),
        ({"thresholds": [0.1, 0.2, 0.3]}, r"must be a list of 2: one entry per rung but the top one"),
        ({"thresholds": 0.1}, r"`router.thresholds=0.1` must be a list of 2"),
        ({"thresholds": [0.1, -0.1]}, r"must be numbers >= 0"),
        ({"thresholds": [0.1, float("nan")]}, r"must be numbers >= 0"),
        ({"thresholds": [0.1, "0.2"]}, r"must be numbers >= 0"),
        ({"windows": [2]}, r"`router.windows=\[2\]` must be a list of 2"),
        ({"windows": [3, 1]}, r"whole numbers >= 2"),
        ({"window": 2}, r"`router` of type 'feature_std' has no option 'window'. Known options: windows, thresholds"),
        (
            {"type": "entropy"},
            r"`router.type='entropy'` is unknown. Known types: classifier, feature_std, fixed, pixel_std, random",
        ),
    ],
)
def test_options_that_make_no_router_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("feature_std", "average_pool", **options)


def test_feature_std_names_a_window_that_does_not_fit_the_grid():
    router = FeatureStdRouter(DIM, pooling(1, 2, 3), windows=[9, 2])
    with pytest.raises(ValueError, match=r"`router.windows=9` leaves nothing of a 6x6 patch grid"):
        router(features(1))


def pixel_features(pixels: torch.Tensor, grid: tuple[int, int] = (6, 6)) -> VisionFeatures:
    patches = torch.zeros(len(pixels), grid[0] * grid[1], 1)
    return VisionFeatures(patches, grid, None, pixels, (1,) * len(pixels))


def test_pixel_std_hand_computed_case():
    # one window of 2x2 patches with 1 pixel each, 1 2 3 4 in every channel: biased variance 1.25
    pixels = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 3, 2, 2)
    router = PixelStdRouter(DIM, pooling(1, 2), thresholds=[1.1])
    spread = router.window_spread(pixel_features(pixels, (2, 2)))
    torch.testing.assert_close(spread, torch.tensor([[1.25**0.5]]), rtol=0, atol=1e-3)
    assert router(pixel_features(pixels, (2, 2))).rungs.tolist() == [1]
    assert PixelStdRouter(DIM, pooling(1, 2), thresholds=[1.13])(pixel_features(pixels, (2, 2))).rungs.tolist() == [0]


@pytest.mark.parametrize(("grid", "size"), [((6, 6), (24, 24)), ((7, 5), (28, 20)), ((5, 5), (33, 38))])
def test_pixel_std_measures_the_spread_inside_windows_of_patches(grid, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    router = PixelStdRouter(DIM, pooling(1, 2, 3))
    spread = router.window_spread(pixel_features(pixels, grid)).numpy()
    patch = (size[0] // grid[0], size[1] // grid[1])
    for view in range(2):
        for column, window in enumerate(router.windows):
            high, wide = window * patch[0], window * patch[1]
            deviations = [
                pixels[view, channel, top * high : (top + 1) * high, left * wide : (left + 1) * wide].double().numpy()
                for channel in range(3)
                for top in range(grid[0] // window)
                for left in range(grid[1] // window)
            ]
            # bfloat16 has eight bits, and deviations of many pixels even that out
            assert spread[view, column] == pytest.approx(np.mean([values.std() for values in deviations]), abs=2e-3)


def test_pixel_std_accepts_a_flat_view_at_threshold_0_and_nothing_else():
    flat = torch.full((1, 3, 24, 24), 2.64)
    dotted = flat.clone()
    dotted[0, 0, 0, 0] += 0.05
    router = PixelStdRouter(DIM, pooling(1, 2, 3), thresholds=[0.0, 0.0])
    routing = router(pixel_features(torch.cat([flat, dotted])))
    assert routing.rungs.tolist() == [0, 2] and routing.scores[0] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(6, 6), (5, 4)]), st.floats(0.01, 3.0))
def test_pixel_std_agrees_with_the_processors_arithmetic_bit_by_bit(seed, grid, scale):
    pixels = torch.randn(3, 3, 26, 30, generator=torch.Generator().manual_seed(seed)) * scale
    expected = pixel_routing(pixels, grid, (4, 3, 2, 1), (0.4, 0.5, 0.6, 0.7))
    router = PixelStdRouter(DIM, pooling(1, 2, 3, 4, 5), windows=[4, 3, 2, 1], thresholds=[0.4, 0.5, 0.6, 0.7])
    for given_in in (torch.float32, torch.bfloat16):
        routing = router(pixel_features(pixels.to(given_in), grid))
        assert (routing.rungs.tolist(), routing.scores.tolist()) == expected


def test_pixel_std_does_not_depend_on_the_order_of_sums():
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    # the same windows, each of them and all of them turned around
    turned = pixels.flip(2, 3)
    router = PixelStdRouter(DIM, pooling(1, 2, 3))
    assert torch.equal(router.window_spread(pixel_features(pixels)), router.window_spread(pixel_features(turned)))


def test_pixel_std_of_real_images_is_known_to_the_processor(shared):
    images = [image for kind in ("charts", "documents", "photos", "nlvr") for image in real_images(shared, kind)]
    pixels = square_image_processor(tiny_vision_config(image_size=336))(images, return_tensors="pt")["pixel_values"]
    _, scores = pixel_routing(pixels, (24, 24), (3, 2), (0.0, 0.0))
    middle = float(np.median(scores))
    router = PixelStdRouter(DIM, pooling(1, 2, 3), thresholds=[middle, middle])
    rungs, scores = pixel_routing(pixels, (24, 24), router.windows, router.thresholds)
    assert len(set(rungs)) > 1
    for given_in in (torch.float32, torch.bfloat16):
        routing = router(pixel_features(pixels.to(given_in), (24, 24)))
        assert (routing.rungs.tolist(), routing.scores.tolist()) == (rungs, scores)
    rounded = router(pixel_features(pixels.half(), (24, 24))).scores
    torch.testing.assert_close(rounded, torch.tensor(scores), rtol=2e-3, atol=0)


def real_images(shared, kind):
    return [image for _, image in open_images(shared / "data" / kind, limit=10)]


def test_pixel_std_may_judge_single_patches_and_refuses_less_than_a_pixel_per_patch():
    assert PixelStdRouter(DIM, pooling(1, 2), windows=[1]).windows == (1,)
    with pytest.raises(
        ValueError, match=r"`pixel_values` of 5x24 pixels have less than a pixel for each of 6x6 patch"
    ):
        PixelStdRouter(DIM, pooling(1, 2))(pixel_features(torch.zeros(1, 3, 5, 24)))
    with pytest.raises(ValueError, match=r"`router.windows=9` leaves nothing of a 6x6 patch grid"):
        PixelStdRouter(DIM, pooling(1, 2), windows=[9])(pixel_features(torch.zeros(1, 3, 24, 24)))


def test_pixel_std_compiles_without_a_graph_break():
    router = PixelStdRouter(DIM, pooling(1, 2, 3), thresholds=[0.9, 0.95])
    views = pixel_features(torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    compiled = torch.compile(lambda pixels: router(replace(views, pixels=pixels)), fullgraph=True, backend="eager")
    routing = compiled(views.pixels)
    assert torch.equal(routing.rungs, router(views).rungs) and torch.equal(routing.scores, router(views).scores)
