"""The laws every compressor obeys, one hand-computed case each, and the authors' own outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.fx.experimental import _config as symbolic_shapes

from adaptive_llava.modeling.compressor_average_pool import AveragePoolCompressor
from adaptive_llava.modeling.compressor_base import Compressor, patch_windows
from adaptive_llava.modeling.compressor_identity import IdentityCompressor
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.compressor_spatial_fusion import SpatialFusionCompressor
from adaptive_llava.modeling.compressor_token_concat import TokenConcatCompressor
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.projector import AdaptiveLlavaProjector
from adaptive_llava.modeling.visual_token_geometry import visual_token_ladder
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.benchmark_rows.waits_and_graphs import Graphs
from tests.conftest import TINY_COMPRESSORS


pytestmark = pytest.mark.compat

DIM, TEXT_DIM = 8, 12
GRIDS = [(6, 6), (7, 5), (3, 8)]
CASES = TINY_COMPRESSORS | {
    "spatial_fusion, paper": {"type": "spatial_fusion", "window": 2, "fused_tokens": 1, "variant": "paper"},
    "spatial_fusion, paper, 4 tokens": {"type": "spatial_fusion", "window": 3, "fused_tokens": 4, "variant": "paper"},
    "spatial_fusion, linear": {"type": "spatial_fusion", "window": 2, "fused_tokens": 1, "variant": "linear"},
}
every_compressor = pytest.mark.parametrize("name", CASES)


def build(name: str) -> Compressor:
    torch.manual_seed(0)
    return build_part("compressor", COMPRESSORS, CASES[name], DIM, TEXT_DIM).eval()


def features(views: int, grid: tuple[int, int] = (6, 6), seed: int = 0, dim: int = DIM) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return VisionFeatures(
        patches=torch.randn(views, grid[0] * grid[1], dim, generator=generator),
        grid=grid,
        cls=torch.randn(views, dim, generator=generator),
        pixels=torch.randn(views, 3, 8, 8, generator=generator),
        views_per_image=(1,) * views,
    )


def mixed_rungs(compressor: Compressor, views: int) -> list[int]:
    """Every rung occurs, out of order."""
    return [(views - 1 - view) * 5 % compressor.num_rungs for view in range(views)]


@every_compressor
@pytest.mark.parametrize("grid", GRIDS)
def test_compress_gives_what_the_ladder_promises(name, grid):
    compressor = build(name)
    ladder = compressor.ladder(grid)
    assert len(ladder) == compressor.num_rungs
    assert list(ladder) == sorted(ladder)
    assert ladder == visual_token_ladder(compressor.options, grid)
    for rung, count in enumerate(ladder):
        tokens = compressor.compress(features(2, grid), rung)
        assert tokens.shape == (2, count, compressor.output_dim)
        token_grid = compressor.grid_after(grid, rung)
        assert token_grid is None or token_grid[0] * token_grid[1] == count


@every_compressor
def test_forward_packs_each_view_at_its_own_rung_in_the_given_order(name):
    compressor = build(name)
    views = features(7)
    rungs = mixed_rungs(compressor, 7)
    tokens = compressor(views, rungs)
    ladder = compressor.ladder(views.grid)
    assert tokens.lengths == tuple(ladder[rung] for rung in rungs)
    pieces = tokens.values.split(tokens.lengths)
    for view, (rung, piece) in enumerate(zip(rungs, pieces, strict=True)):
        torch.testing.assert_close(piece, compressor.compress(views.select([view]), rung)[0], rtol=0, atol=1e-6)


@every_compressor
def test_tokens_of_a_view_do_not_depend_on_its_batch(name):
    compressor = build(name)
    views = features(5)
    rungs = mixed_rungs(compressor, 5)
    together = compressor(views, rungs)
    pieces = together.values.split(together.lengths)
    for view in range(5):
        alone = compressor(views.select([view]), [rungs[view]])
        torch.testing.assert_close(alone.values, pieces[view], rtol=0, atol=1e-6)


@every_compressor
def test_no_views_give_no_tokens(name):
    compressor = build(name)
    tokens = compressor(features(0), [])
    assert tokens.lengths == () and tokens.values.shape == (0, compressor.output_dim)


@every_compressor
def test_gradients_reach_the_patches_and_every_parameter(name):
    compressor = build(name).train()
    views = features(6)
    views.patches.requires_grad_(True)
    compressor(views, mixed_rungs(compressor, 6)).values.square().sum().backward()
    assert (views.patches.grad.abs().sum(dim=(1, 2)) > 0).all()
    for parameter_name, parameter in compressor.named_parameters():
        if parameter_name == "k_proj.bias":  # the same for all keys: softmax does not see it
            continue
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@every_compressor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_keeps_its_type(name, dtype):
    compressor = build(name).to(dtype)
    views = features(4)
    exact = build(name)(views, mixed_rungs(compressor, 4))
    halved = VisionFeatures(views.patches.to(dtype), views.grid, None, views.pixels, views.views_per_image)
    tokens = compressor(halved, mixed_rungs(compressor, 4))
    assert tokens.values.dtype == dtype
    torch.testing.assert_close(tokens.values.float(), exact.values, rtol=0.02, atol=0.03)


@every_compressor
def test_autocast_on_the_cpu_runs_and_stays_close(name):
    compressor = build(name)
    views, rungs = features(4), mixed_rungs(compressor, 4)
    exact = compressor(views, rungs).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compressor(views, rungs).values
    torch.testing.assert_close(cast.float(), exact, rtol=0.02, atol=0.05)


@every_compressor
def test_saved_weights_and_options_give_the_same_bits(name, tmp_path):
    compressor = build(name)
    save_file(compressor.state_dict(), tmp_path / "weights.safetensors")
    again = build_part("compressor", COMPRESSORS, compressor.options, DIM, TEXT_DIM).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    views, rungs = features(4), mixed_rungs(compressor, 4)
    assert torch.equal(again(views, rungs).values, compressor(views, rungs).values)


@every_compressor
def test_options_written_out_build_the_same_compressor(name):
    compressor = build(name)
    assert set(compressor.options) >= set(CASES[name])
    assert build_part("compressor", COMPRESSORS, compressor.options, DIM, TEXT_DIM).options == compressor.options
    assert COMPRESSORS[compressor.type_name] is type(compressor)


@every_compressor
def test_compressing_at_one_rung_is_one_graph(name):
    compressor = build(name)
    views = features(2)
    for rung in range(compressor.num_rungs):
        compiled = torch.compile(compressor.compress, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(views, rung), compressor.compress(views, rung), rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [2, 3])
def test_windows_that_do_not_fill_the_grid_are_one_graph_for_one_image_and_for_several(window):
    graphs = Graphs()
    with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        compiled = graphs.of(lambda patches: patch_windows(patches, (7, 7), window).mean((2, 4)))
        for images in (3, 1, 2):
            patches = torch.arange(images * 49 * 4.0).reshape(images, 49, 4)
            found = compiled(patches)
            assert found.shape == (images, 7 // window, 7 // window, 4)
            first = patches.view(images, 7, 7, 4)[:, :window, :window].mean((1, 2))
            assert torch.equal(found[:, 0, 0], first)
    assert graphs.number == 1


def test_identity_returns_the_patches_untouched():
    views = features(3)
    tokens = IdentityCompressor(DIM, TEXT_DIM)(views, [0, 0, 0])
    assert torch.equal(tokens.values, views.patches.flatten(0, 1)) and tokens.lengths == (36, 36, 36)


def test_pooling_averages_whole_windows_and_drops_the_rest():
    # a 3x5 grid of 0..14; factor 2 leaves one row of two windows
    patches = torch.arange(15.0).view(1, 15, 1)
    views = VisionFeatures(patches, (3, 5), None, torch.zeros(1, 3, 8, 8), (1,))
    pool = AveragePoolCompressor(1, TEXT_DIM, factors=[1, 2, 3])
    assert pool.ladder((3, 5)) == (1, 2, 15)
    assert pool.compress(views, 1).flatten().tolist() == [(0 + 1 + 5 + 6) / 4, (2 + 3 + 7 + 8) / 4]
    assert pool.compress(views, 0).flatten().tolist() == [(0 + 1 + 2 + 5 + 6 + 7 + 10 + 11 + 12) / 9]
    assert pool.compress(views, 2).flatten().tolist() == list(range(15))


def test_pooling_equals_a_loop_over_windows_on_any_grid():
    for grid in GRIDS:
        views = features(2, grid)
        pool = AveragePoolCompressor(DIM, TEXT_DIM, factors=[1, 2, 3])
        patch_map = views.patches.numpy().reshape(2, *grid, DIM)
        for rung, factor in enumerate((3, 2, 1)):
            rows, columns = grid[0] // factor, grid[1] // factor
            expected = np.stack(
                [
                    patch_map[:, r * factor : (r + 1) * factor, c * factor : (c + 1) * factor].mean(axis=(1, 2))
                    for r in range(rows)
                    for c in range(columns)
                ],
                axis=1,
            )
            np.testing.assert_allclose(pool.compress(views, rung).numpy(), expected, rtol=0, atol=1e-6)


def test_concatenation_lists_each_channels_window_row_by_row():
    # two channels: patch p holds (p, 100 + p) on a 2x4 grid
    patches = torch.stack([torch.arange(8.0), 100 + torch.arange(8.0)], dim=-1).unsqueeze(0)
    views = VisionFeatures(patches, (2, 4), None, torch.zeros(1, 3, 8, 8), (1,))
    tokens = TokenConcatCompressor(2, TEXT_DIM, window=2).compress(views, 0)
    assert tokens.tolist() == [[[0, 1, 4, 5, 100, 101, 104, 105], [2, 3, 6, 7, 102, 103, 106, 107]]]


def test_a_linear_layer_on_joined_windows_is_a_strided_convolution():
    views = features(2)
    convolution = torch.nn.Conv2d(DIM, 5, kernel_size=2, stride=2)
    linear = torch.nn.Linear(4 * DIM, 5)
    linear.load_state_dict({"weight": convolution.weight.detach().flatten(1), "bias": convolution.bias.detach()})
    maps = views.patches.transpose(1, 2).unflatten(2, (6, 6))
    joined = TokenConcatCompressor(DIM, TEXT_DIM, window=2).compress(views, 0)
    torch.testing.assert_close(linear(joined), convolution(maps).flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_fusion_cuts_channels_into_groups_and_keeps_the_tokens_of_a_window_together():
    # two channels, patch p holds (p, 100 + p) on a 2x4 grid; the layer adds up what it sees
    patches = torch.stack([torch.arange(8.0), 100 + torch.arange(8.0)], dim=-1).unsqueeze(0)
    views = VisionFeatures(patches, (2, 4), None, torch.zeros(1, 3, 8, 8), (1,))
    fusion = SpatialFusionCompressor(2, 1, window=2, fused_tokens=2, variant="linear")
    torch.nn.init.ones_(fusion.linear_1.weight)
    torch.nn.init.zeros_(fusion.linear_1.bias)
    expected = [0 + 1 + 4 + 5, 400 + 0 + 1 + 4 + 5, 2 + 3 + 6 + 7, 400 + 2 + 3 + 6 + 7]
    assert fusion.compress(views, 0).flatten().tolist() == expected
    assert fusion.grid_after((2, 4), 0) is None and fusion.ladder((2, 4)) == (4,)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window", [2, 3])
def test_the_papers_fusion_is_a_strided_convolution_and_two_pointwise_ones(grid, window):
    torch.manual_seed(0)
    fusion = SpatialFusionCompressor(DIM, TEXT_DIM, window=window, variant="paper")
    joined = window * window * DIM
    convolutions = [
        torch.nn.Conv2d(DIM, joined, kernel_size=window, stride=window),
        torch.nn.Conv2d(joined, TEXT_DIM, kernel_size=1),
        torch.nn.Conv2d(TEXT_DIM, TEXT_DIM, kernel_size=1),
    ]
    layers = (fusion.convolution, fusion.linear_1, fusion.linear_2)
    for convolution, layer in zip(convolutions, layers, strict=True):
        convolution.load_state_dict({"weight": layer.weight.view_as(convolution.weight), "bias": layer.bias})
    views = features(2, grid)
    maps = views.patches.transpose(1, 2).unflatten(2, grid)
    for convolution in convolutions:
        maps = torch.nn.functional.gelu(convolution(maps))
    torch.testing.assert_close(fusion.compress(views, 0), maps.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_the_released_fusion_has_the_widths_of_the_released_weights():
    with torch.device("meta"):
        fusion = SpatialFusionCompressor(1024, 4096)
    assert fusion.ladder((24, 24)) == (144,) and fusion.grid_after((24, 24), 0) == (12, 12)
    assert fusion.linear_1.weight.shape == (16384, 4096) and fusion.linear_2.weight.shape == (4096, 16384)


@pytest.mark.parametrize(
    ("options", "act"),
    [
        ({"variant": "linear"}, "gelu"),
        ({"variant": "paper"}, "gelu"),
        ({"fused_tokens": 2}, "gelu"),
        ({"window": 1}, "gelu"),  # hidden layer of 32, the projector's has 40
        ({}, "gelu_pytorch_tanh"),
        ({}, "relu"),
    ],
)
def test_a_projector_that_does_not_fit_is_left_alone(options, act):
    torch.manual_seed(0)
    fusion = SpatialFusionCompressor(DIM, 40, **options)
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    assert fusion.warm_start(AdaptiveLlavaProjector(DIM, 40, hidden_act=act)) is False
    assert all(torch.equal(value, before[name]) for name, value in fusion.state_dict().items())


def test_a_projector_of_another_width_is_left_alone():
    assert SpatialFusionCompressor(DIM, 40).warm_start(AdaptiveLlavaProjector(2 * DIM, 40)) is False


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [2, 3])
def test_fusion_takes_over_a_projector_behind_pooled_patches_and_can_still_learn(window, bias):
    torch.manual_seed(0)
    fusion = SpatialFusionCompressor(DIM, TEXT_DIM, window=window)
    projector = AdaptiveLlavaProjector(DIM, TEXT_DIM, bias=bias)
    assert fusion.warm_start(projector) is True
    views = features(2)
    pooled = AveragePoolCompressor(DIM, TEXT_DIM, factors=[window]).compress(views, 0)
    tokens = fusion.compress(views, 0)
    torch.testing.assert_close(tokens, projector(pooled), rtol=0, atol=1e-6)
    tokens.square().sum().backward()
    assert (fusion.linear_2.weight.grad.abs().sum(dim=0) > 0).all()  # also what feeds nothing yet


@pytest.mark.parametrize(("factor", "tokens"), [(24, 1), (8, 9), (4, 36), (3, 64), (2, 144), (1, 576)])
def test_pooling_equals_the_code_of_matryoshka_models(shared, factor, tokens):
    golden = load_file(shared / "golden" / "m3" / "avgpool_scales.safetensors")
    patches = golden["input.projected_features"]
    views = VisionFeatures(patches, (24, 24), None, torch.zeros(2, 3, 8, 8), (1, 1))
    pool = AveragePoolCompressor(patches.shape[-1], TEXT_DIM, factors=[factor])
    torch.testing.assert_close(pool.compress(views, 0), golden[f"output.tokens_{tokens}"], rtol=0, atol=1e-6)


def test_concatenation_orders_a_window_as_the_code_of_llava_stf(shared):
    golden = load_file(shared / "golden" / "stf" / "stf_k2_m1.safetensors")
    patches = golden["input.features"]
    side = int(patches.shape[1] ** 0.5)
    views = VisionFeatures(patches, (side, side), None, torch.zeros(2, 3, 8, 8), (1, 1))
    joined = TokenConcatCompressor(patches.shape[-1], TEXT_DIM, window=2).compress(views, 0)
    assert torch.equal(joined, golden["output.windows"])


def golden_fusion(golden, **options) -> SpatialFusionCompressor:
    """A compressor with the authors' weights: `mm_projector` is `linear_1` and `linear_2` here."""
    weights = {}
    for name, value in golden.items():
        if name.startswith("weight.mm_projector."):
            *layer, kind = name.removeprefix("weight.mm_projector.").split(".")
            weights[f"linear_{2 if layer == ['2'] else 1}.{kind}"] = value
    fusion = SpatialFusionCompressor(8, 24, **options).eval()
    fusion.load_state_dict(weights)
    return fusion


@pytest.mark.parametrize(("case", "variant"), [("stf_k2_m1", "released"), ("stf_k2_m1_linear", "linear")])
def test_fusion_equals_the_code_of_llava_stf(shared, case, variant):
    golden = load_file(shared / "golden" / "stf" / f"{case}.safetensors")
    views = VisionFeatures(golden["input.features"], (8, 8), None, torch.zeros(2, 3, 8, 8), (1, 1))
    tokens = golden_fusion(golden, variant=variant).compress(views, 0)
    torch.testing.assert_close(tokens, golden["output.tokens"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "average_pool", "factors": []}, r"`compressor.factors=\[\]` must be a non-empty list"),
        ({"type": "average_pool", "factors": 2}, r"`compressor.factors=2` must be a non-empty list"),
        ({"type": "average_pool", "factors": [0, 2]}, r"whole numbers >= 1"),
        ({"type": "average_pool", "factors": [1.5]}, r"whole numbers >= 1"),
        ({"type": "average_pool", "factors": [True]}, r"whole numbers >= 1"),
        ({"type": "average_pool", "factors": [3, 2, 1]}, r"must rise strictly"),
        ({"type": "average_pool", "factors": [2, 2]}, r"must rise strictly\. Name each factor once"),
        ({"type": "average_pool", "window": 2}, r"no option 'window'. Known options: factors, strict_tiling"),
        ({"type": "token_concat", "window": 0}, r"`compressor.window=\[0\]` must be"),
        ({"type": "token_concat", "window": "2"}, r"must be a non-empty list of whole numbers"),
        ({"type": "spatial_fusion", "window": 0}, r"`compressor.window=\[0\]` must be"),
        ({"type": "spatial_fusion", "fused_tokens": 0}, r"`compressor.fused_tokens=\[0\]` must be"),
        ({"type": "spatial_fusion", "fused_tokens": 3}, r"=3` cannot cut the 8 channels .* Use a divisor of 8"),
        (
            {"type": "spatial_fusion", "variant": "mlp"},
            r"`compressor.variant='mlp'` is unknown. Pass one of: released",
        ),
        ({"type": "identity", "factors": [1]}, r"has no option 'factors'. Known options: none"),
        (
            {"type": "pool"},
            r"`compressor.type='pool'` is unknown. Known types: average_pool, identity, .*token_concat",
        ),
        ({"factors": [1]}, r"must be a dict with a 'type': one of average_pool, identity, .*token_concat"),
        ("average_pool", r"must be a dict with a 'type'"),
    ],
)
def test_options_that_make_no_compressor_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_part("compressor", COMPRESSORS, options, DIM, TEXT_DIM)
