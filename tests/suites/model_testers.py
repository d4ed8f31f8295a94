"""What Hugging Face's model tests ask of a model: a tiny config, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PretrainedConfig

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaModel
from tests.conftest import PAD, TINY_VARIANTS, tiny_images, tiny_text_config, tiny_vision_config


PLACEHOLDER = 3  # not the last word: the suites cut the vocabulary


class TinyModelTester:
    """Rows of one image and a few words; a subclass makes the config and says how long the placeholder is.

    Args:
        parent: The test case.
    """

    batch_size = 3
    words = 6
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    is_training = True
    continues_with_images = True  # whether a conversation that goes on from its cache brings its images again
    model_classes: tuple[type, ...]

    def __init__(self, parent: Any):
        self.parent = parent
        self.vision_config = tiny_vision_config(num_hidden_layers=2).to_dict()
        self.text_config = tiny_text_config("llama").to_dict()
        self.pad_token_id = PAD

    @property
    def placeholders(self) -> int:
        """Ids that stand for the image in a row."""
        raise NotImplementedError

    @property
    def seq_length(self) -> int:
        """Ids of a row."""
        return self.placeholders + self.words

    def get_config(self) -> PretrainedConfig:
        """A new config."""
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
        """A new config, and ids, mask and pixels of a batch."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.text_config["vocab_size"]
        words = torch.randint(PLACEHOLDER + 1, vocabulary, (self.batch_size, self.words), generator=generator)
        images = torch.full((self.batch_size, self.placeholders), PLACEHOLDER)
        input_ids = torch.cat([images, words], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": tiny_images(self.batch_size),
        }
        return self.get_config(), inputs


class StockLlavaTester(TinyModelTester):
    """LLaVA of transformers: a placeholder per patch."""

    continues_with_images = False
    model_classes = (LlavaModel, LlavaForConditionalGeneration)
    placeholders = 36

    def get_config(self) -> LlavaConfig:
        return LlavaConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            image_token_id=PLACEHOLDER,
            image_token_index=PLACEHOLDER,
            image_seq_length=self.placeholders,
            vision_feature_layer=-1,
        )


class AdaptiveTester(TinyModelTester):
    """One of our presets: a placeholder per image, or with `expanded` one per visual token at the most tokens."""

    model_classes = (AdaptiveLlavaModel, AdaptiveLlavaForConditionalGeneration)
    expanded = False
    prefusion = True
    preset: str

    @property
    def placeholders(self) -> int:
        return self.get_config().visual_token_counts[-1] if self.expanded else 1

    def get_config(self) -> AdaptiveLlavaConfig:
        preset, variant = TINY_VARIANTS.get(self.preset, (self.preset, {}))
        if preset == "dfmr":  # between the spreads of the images, so that each gets another count
            variant = {"router": {"type": "feature_std", "thresholds": [0.4, 0.8]}}
        if self.expanded:
            variant = variant | {"router": {"type": "fixed"}}
            if preset == "llava-mini":  # several tokens, or both layouts are one
                variant["compressor"] = {"type": "query_resampler", "counts": [4], "key_positions": "enlarged"}
        if not self.prefusion:
            variant = variant | {"prefusion_layers": 0}
        return AdaptiveLlavaConfig.from_preset(
            preset,
            vision_config=self.vision_config,
            text_config=self.text_config,
            image_token_id=PLACEHOLDER,
            vision_feature_layer=-1,
            **variant,
        )
