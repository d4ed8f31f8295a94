"""Towers of every kind give patches on a grid."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, MobileNetV2Config

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.vision_tower_features import extract_features
from tests.conftest import IMAGE_TOKEN, tiny_images, tiny_text_config


pytestmark = pytest.mark.compat


@pytest.fixture
def convolutional():
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=64, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)
    text = AutoModelForCausalLM.from_config(tiny_text_config())
    return AdaptiveLlavaForConditionalGeneration.from_backbones(
        AutoModel.from_config(config), text, "dfmr", image_token_id=IMAGE_TOKEN, vision_feature_layer=5
    )


def test_a_convolutional_tower_gives_its_map_as_patches(convolutional):
    features = extract_features(convolutional.model.vision_tower, tiny_images(2, image_size=64), 5)
    height, width = features.grid
    assert features.patches.shape == (2, height * width, convolutional.config.vision_feature_dim)
    assert features.cls is None
    assert list(features.grid) == convolutional.config.vision_grid


@pytest.mark.parametrize("frozen", [True, False])
def test_only_a_frozen_convolutional_tower_keeps_its_statistics_in_training(convolutional, frozen):
    tower = convolutional.model.vision_tower
    tower.requires_grad_(not frozen)
    convolutional.train()
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    convolutional(input_ids=torch.tensor([[5, IMAGE_TOKEN, 6]]), pixel_values=tiny_images(1, image_size=64))
    unchanged = all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())
    assert unchanged == frozen


def test_a_hidden_state_that_is_not_there_is_named():
    tower = AutoModel.from_config(MobileNetV2Config(image_size=64, depth_multiplier=0.25)).eval()
    with pytest.raises(ValueError, match="vision_feature_layer=99"):
        extract_features(tower, tiny_images(1, image_size=64), 99)
