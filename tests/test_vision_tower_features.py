"""Towers of every kind give patches on a grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MobileNetV2Config

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.vision_tower_features import extract_features
from tests.conftest import IMAGE_TOKEN, tiny_images, tiny_model, tiny_text_config


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


class PlainTower(nn.Module):
    """A CLIP tower as transformers 5.0 has it: a plain module that keeps its hidden states to itself."""

    def __init__(self, tower: Any):
        super().__init__()
        self.embeddings, self.pre_layrnorm = tower.embeddings, tower.pre_layrnorm
        self.encoder, self.post_layernorm, self.config = tower.encoder, tower.post_layernorm, tower.config

    def forward(self, pixel_values: torch.Tensor) -> None:
        raise AssertionError("its outputs have no hidden states")


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4.57 gives the states of CLIP itself"
)
def test_a_plain_clip_tower_is_read_layer_by_layer():
    tower = tiny_model("dfmr").model.vision_tower
    pixels = tiny_images(2)
    with torch.no_grad():
        expected, found = (extract_features(each, pixels, [-2, 0], blocks=[1]) for each in (tower, PlainTower(tower)))
    for name in ("patches", "cls", "layer_cls"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-6), name
    assert torch.allclose(found.blocks[1], expected.blocks[1], atol=1e-6)


def test_positions_of_a_plain_tower_are_numbered_when_a_checkpoint_is_loaded():
    model = tiny_model("dfmr")
    embeddings = model.model.vision_tower.embeddings
    embeddings.position_ids = torch.full_like(embeddings.position_ids, 99)
    model._init_weights(embeddings)
    assert embeddings.position_ids.tolist() == [list(range(embeddings.position_ids.shape[-1]))]
