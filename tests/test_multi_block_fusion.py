"""Multi-block fusion: which blocks, what their fusion computes, and where it starts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import MobileNetV2Config

from adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.modeling.multi_block_fusion import MultiBlockFusion, check_fusion_blocks, default_fusion_blocks
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from tests.conftest import IMAGE_TOKEN, tiny_images, tiny_model, tiny_text_config, tiny_vision_config
from tests.test_compressors import golden_fusion


pytestmark = pytest.mark.compat

AUTHORS_BLOCKS = [23, 21, 18, 15, 12, 9, 6, 3]


def tiny_config(**fields) -> AdaptiveLlavaConfig:
    backbones = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config()}
    return AdaptiveLlavaConfig(**({"image_token_id": IMAGE_TOKEN, "fusion_blocks": "default"} | backbones | fields))


def states_of(blocks, dim: int = 8, views: int = 2) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {block: torch.randn(views, 6, dim, generator=generator) for block in blocks}


@pytest.mark.parametrize(
    ("num_layers", "blocks"),
    [
        (24, AUTHORS_BLOCKS),
        (27, [26, 24, 20, 17, 14, 10, 7, 3]),
        (12, [11, 10, 9, 8, 6, 4, 3, 2]),
        (6, [5, 4, 3, 2, 1]),
        (3, [2, 3, 1]),
        (1, [0, 1]),
    ],
)
def test_default_blocks_spread_over_towers_of_every_depth(num_layers, blocks):
    assert default_fusion_blocks(num_layers) == blocks
    assert check_fusion_blocks(blocks, num_layers) == blocks


@pytest.mark.parametrize(("selected", "first"), [(-1, 24), (24, 24), (-2, 23), (18, 18), (20, 20)])
def test_the_selected_layer_comes_first_and_once(selected, first):
    others = [block for block in AUTHORS_BLOCKS[1:] if block != first]
    assert default_fusion_blocks(24, selected) == [first, *others]


def test_the_config_writes_the_blocks_out():
    assert AdaptiveLlavaConfig(fusion_blocks="default").fusion_blocks == AUTHORS_BLOCKS
    assert tiny_config(fusion_blocks=[-1, 1, -4]).fusion_blocks == [3, 1, 0]
    assert tiny_config(vision_feature_layer=1).fusion_blocks == [1, 3, 2]
    assert tiny_config(fusion_blocks=None).fusion_blocks is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fusion_blocks": [4]},
            r"`fusion_blocks=\[4\]` must be distinct hidden states of a tower with 3 layers: 0 to 3",
        ),
        ({"fusion_blocks": [-5]}, r"0 to 3, or -1 to -4 from the end"),
        ({"fusion_blocks": [3, -1]}, r"must be distinct hidden states"),
        ({"fusion_blocks": []}, r"must be 'default' or a non-empty list of hidden-state indices"),
        ({"fusion_blocks": "all"}, r"`fusion_blocks='all'` must be 'default' or"),
        ({"fusion_blocks": [1.0]}, r"must be 'default' or a non-empty list"),
        ({"fusion_variant": "mean"}, r"`fusion_variant='mean'` is unknown. Pass one of: released, paper"),
        ({"vision_feature_layer": [-2, -1]}, r"`vision_feature_layer=\[-2, -1\]` and `fusion_blocks` both join"),
    ],
)
def test_blocks_that_cannot_be_fused_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_a_convolutional_tower_has_no_blocks_to_fuse():
    with pytest.raises(ValueError, match=r"'mobilenet_v2' has no such blocks. Use a ViT .* or `fusion_blocks=None`"):
        tiny_config(vision_config=MobileNetV2Config(), vision_feature_dim=16, vision_grid=[5, 7])


@pytest.mark.parametrize("blocks", [[2], [2, 3], [2, 3, 1], [5, 4, 3, 2, 1], AUTHORS_BLOCKS])
def test_fusion_starts_as_its_first_block_and_learns_from_all(blocks):
    torch.manual_seed(0)
    fusion, states = MultiBlockFusion(8, blocks=blocks), states_of(blocks)
    fused = fusion(states)
    torch.testing.assert_close(fused, states[blocks[0]], rtol=0, atol=1e-6)
    fused.square().sum().backward()
    assert (fusion.linear_1.weight.grad.abs().sum(dim=0) > 0).all()  # every channel of every block
    assert (fusion.linear_2.weight.grad.abs().sum(dim=0) > 0).all()  # every hidden unit, heard at the start or not


def test_two_layers_computed_by_hand():
    fusion = MultiBlockFusion(1, blocks=[7, 2])
    for layer, weight, bias in (
        (fusion.linear_1, [[1.0, 2.0], [0.0, -1.0]], [0.0, 1.0]),
        (fusion.linear_2, [[1.0, 3.0]], [0.5]),
    ):
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    states = {2: torch.tensor([[[0.5]]]), 7: torch.tensor([[[-2.0]]])}
    # hidden: -2 + 2 * 0.5 = -1 and 1 - 0.5 = 0.5; gelu(-1) = -0.158655, gelu(0.5) = 0.345731
    assert fusion(states).item() == pytest.approx(-0.158655 + 3 * 0.345731 + 0.5, abs=1e-5)


def test_the_paper_has_a_gelu_after_each_of_two_pointwise_convolutions():
    torch.manual_seed(0)
    fusion, states = MultiBlockFusion(8, blocks=AUTHORS_BLOCKS, variant="paper"), states_of(AUTHORS_BLOCKS)
    layers = [nn.Conv2d(64, 32, kernel_size=1), nn.Conv2d(32, 8, kernel_size=1)]
    for convolution, layer in zip(layers, (fusion.linear_1, fusion.linear_2), strict=True):
        convolution.load_state_dict({"weight": layer.weight.view_as(convolution.weight), "bias": layer.bias})
    maps = torch.cat([states[block] for block in AUTHORS_BLOCKS], dim=-1).transpose(1, 2).unflatten(2, (2, 3))
    for convolution in layers:
        maps = nn.functional.gelu(convolution(maps))
    torch.testing.assert_close(fusion(states), maps.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def golden_blocks(golden) -> MultiBlockFusion:
    """Fusion with the authors' weights."""
    fusion = MultiBlockFusion(8, blocks=default_fusion_blocks(24))
    layers = [(f"linear_{number}", f"weight.mm_projector_crosslayer.{theirs}") for number, theirs in ((1, 0), (2, 2))]
    fusion.load_state_dict(
        {f"{own}.{kind}": golden[f"{theirs}.{kind}"] for own, theirs in layers for kind in ("weight", "bias")}
    )
    return fusion


def golden_states(golden, blocks) -> dict[int, torch.Tensor]:
    return {block: golden["input.hidden_states"][block][:, 1:] for block in blocks}  # without [CLS]


def test_fusion_equals_the_code_of_llava_stf(shared):
    golden = load_file(shared / "golden" / "mbtf" / "mbtf_24blocks.safetensors")
    fusion = golden_blocks(golden)
    states = golden_states(golden, fusion.blocks)
    assert torch.equal(torch.cat([states[block] for block in fusion.blocks], dim=-1), golden["output.concat"])
    torch.testing.assert_close(fusion(states), golden["output.fused"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused_tokens", [1, 2])
def test_fused_blocks_and_windows_equal_the_code_of_llava_stf(shared, fused_tokens):
    golden = load_file(shared / "golden" / "stf_mbtf" / f"stf_mbtf_k2_m{fused_tokens}.safetensors")
    blocks = golden_blocks(golden)
    fused = blocks(golden_states(golden, blocks.blocks))
    torch.testing.assert_close(fused, golden["output.fused"], rtol=0, atol=1e-5)
    views = VisionFeatures(fused, (8, 8), None, torch.zeros(2, 3, 8, 8), (1, 1))
    tokens = golden_fusion(golden, fused_tokens=fused_tokens).compress(views, 0)
    torch.testing.assert_close(tokens, golden["output.tokens"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_the_model_fuses_what_it_would_select_by_layer(vision):
    model, pixels = tiny_model("mbtf", vision=vision), tiny_images(2)
    fusion, states = model.model.multi_block_fusion, {}
    for block in (2, 3, 1):
        selecting = tiny_model("llava", vision=vision, vision_feature_layer=block)
        selecting.model.vision_tower = model.model.vision_tower
        states[block] = selecting.model.extract_features(pixels).patches
    assert fusion.blocks == tuple(states)
    torch.testing.assert_close(model.model.extract_features(pixels).patches, fusion(states), rtol=0, atol=1e-5)


def test_router_and_compressor_read_the_fused_features():
    model, pixels = tiny_model("dfmr", fusion_blocks="default"), tiny_images(3)
    with torch.no_grad():
        before = model.encode_images(pixels, visual_rungs=[0, 1, 2])
        features = model.model.extract_features(pixels)
        model.model.multi_block_fusion.linear_2.weight.mul_(2)
        model.model.multi_block_fusion.linear_2.bias.mul_(2)
        scaled = model.model.extract_features(pixels)
        after = model.encode_images(pixels, visual_rungs=[0, 1, 2])
    torch.testing.assert_close(scaled.patches, 2 * features.patches)
    torch.testing.assert_close(after.scores, 2 * before.scores)
    assert after.lengths == before.lengths == (4, 9, 36)
    assert (after.values - before.values).abs().max() > 1e-2
