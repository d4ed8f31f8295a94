"""A vision-language model of 0.2 million weights that learns to see and read from nothing, in under a minute.

A CLIP tower of two layers and a Qwen2 of two layers, trained together on `rendered_images` at the largest token count.
What decides whether documents are learned at all: large embeddings and weights in the language model (`_WEIGHT_SCALE`,
`_EMBEDDING_SCALE`), positions that the tower is born with (`two_dimensional_positions`), and a second loss that asks
every patch what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.rendered_images import (
    CELL,
    GRID,
    IMAGE_SIZE,
    PATCH_CONTENTS,
    RenderedImage,
    render_images,
    vocabulary,
)


# The answer begins right after the question's last word, which says what is asked for: with a marker in between, two
# layers need several times as long to learn to look up a cell.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ ' ' }}{{ say(message) }}{{ ' <|end|> ' }}{%- endgeneration -%}
{%- else -%}{{ '<|user|> ' }}{{ say(message) }}{%- endif -%}
{%- endfor -%}
"""
_SAY = """
{%- macro say(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ image_token if part.type == 'image' else part.text }}{{ ' ' if not loop.last }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

FACTORS = (1, 2, 4)  # pooling windows per side: 16, 4 and 1 visual tokens

_WEIGHT_SCALE = 0.08
_EMBEDDING_SCALE = 0.5
_POSITION_SCALE = 2.0
_EARLY = 0.5  # share of the training
_QUESTIONS_PER_IMAGE = 4
# To look up a cell is the hardest, and comes most often until it is learned; then it is the shapes' turn.
_EARLY_MIX = ("scene", "document", "scene", "document", "collage", "document", "scene", "document")
_LATE_MIX = ("scene", "collage", "scene", "document", "scene")


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model; all widths are equal.

    Args:
        image_size: Side of the image, in pixels.
        patch_size: Side of a patch, in pixels.
        width: Hidden size of tower and language model.
        heads: Attention heads of both.
        vision_layers: Layers of the tower.
        text_layers: Layers of the language model.
    """

    image_size: int = IMAGE_SIZE
    patch_size: int = CELL
    width: int = 64
    heads: int = 2
    vision_layers: int = 2
    text_layers: int = 2


def build_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the questions and answers."""
    words = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<image>", *vocabulary]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<image>"],
        model_max_length=1024,
        padding_side="left",
    )


def build_model(seed: int = 0, **fields: Any) -> tuple[AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor]:
    """An untrained model of the `dfmr` preset with 16, 4 or 1 visual tokens per image, and its processor.

    Args:
        seed: Of the weights.
        fields: Config fields that override the preset's, such as another `router`.
    """
    fields = {"compressor": {"type": "average_pool", "factors": list(FACTORS)}, **fields}
    return assemble(seed, build_tokenizer(vocabulary()), Shape(), **fields)


def assemble(
    seed: int, tokenizer: PreTrainedTokenizerFast, shape: Shape, **fields: Any
) -> tuple[AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor]:
    """An untrained model that can learn to read, and its processor.

    Args:
        seed: Of the weights.
        tokenizer: One token per word.
        shape: Sizes of its parts.
        fields: Config fields on top of the `dfmr` preset's.
    """
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "intermediate_size": 2 * shape.width,
    }
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            **sizes,
            num_hidden_layers=shape.vision_layers,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            projection_dim=shape.width,
        )
    )
    text = Qwen2ForCausalLM(
        Qwen2Config(
            **sizes,
            num_hidden_layers=shape.text_layers,
            num_key_value_heads=shape.heads,
            vocab_size=len(tokenizer),
            initializer_range=_WEIGHT_SCALE,
            tie_word_embeddings=False,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        vision, text, preset="dfmr", tokenizer=tokenizer, vision_feature_layer=-1, **fields
    )
    with torch.no_grad():
        nn.init.normal_(text.get_input_embeddings().weight, std=_EMBEDDING_SCALE)
        add_positions(vision, shape.image_size // shape.patch_size)
        projector = model.model.multi_modal_projector
        for layer in (projector.linear_1, projector.linear_2) if hasattr(projector, "linear_1") else ():
            layer.reset_parameters()
    processor = AdaptiveLlavaProcessor.from_config(model.config, tokenizer, chat_template=_SAY + CHAT_TEMPLATE)
    return model, processor


@torch.no_grad()
def add_positions(vision: CLIPVisionModel, grid: int) -> None:
    """Lets an untrained tower of `grid * grid` patches know where each of them is."""
    # transformers 5 dropped the `vision_model` level
    embeddings: Any = next(part for part in vision.modules() if hasattr(part, "position_embedding"))
    positions = embeddings.position_embedding.weight
    positions[1:] += _POSITION_SCALE * two_dimensional_positions(grid, positions.shape[1])


def two_dimensional_positions(grid: int, dim: int) -> Tensor:
    """Sine-cosine codes of row and column, `(grid * grid, dim)`."""
    frequencies = 100 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([codes.repeat_interleave(grid, dim=0), codes.repeat(grid, 1)], dim=1)


def conversation(image: RenderedImage, rng: np.random.Generator) -> list[dict[str, str]]:
    """Messages that ask up to four of the image's questions, in random order."""
    chosen = rng.permutation(len(image.questions))[:_QUESTIONS_PER_IMAGE]
    asked = (image.questions[index] for index in chosen)
    return [
        message
        for question, answer in asked
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def train_from_scratch(
    model: AdaptiveLlavaForConditionalGeneration,
    processor: AdaptiveLlavaProcessor,
    *,
    steps: int,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
) -> None:
    """Trains everything at the largest token count, in place.

    Args:
        model: The model of `build_model`.
        processor: Its processor.
        steps: Optimiser steps, each on newly rendered images.
        seed: Seed of the images and of the questions asked.
        report: Called after every step with the number of steps done and the loss.
        batch_size: Images per step.
        learning_rate: Peak; warmed up over the first 5 %, then a half cosine down to 5 %.
    """
    words = Words(processor.tokenizer)
    patches = LastPatches(model.model.vision_tower)
    content_head = nn.Linear(model.config.vision_config.hidden_size, len(PATCH_CONTENTS))
    parameters = [*model.parameters(), *content_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / steps))
    rng = np.random.default_rng(seed)
    model.train()
    for step in range(1, steps + 1):
        mix = _EARLY_MIX if step <= _EARLY * steps else _LATE_MIX
        images = render_images(batch_size, seed=seed, kinds=mix, start=(step - 1) * batch_size)
        input_ids, labels = words.batch([conversation(image, rng) for image in images])
        loss = model(
            input_ids=input_ids,
            attention_mask=(input_ids != processor.tokenizer.pad_token_id).long(),
            pixel_values=pixels_of(processor, [np.asarray(image.image) for image in images]),
            labels=labels,
            visual_token_budget=GRID**2,
        ).loss
        contents = torch.tensor([image.patch_contents for image in images])
        content_loss = F.cross_entropy(content_head(patches.features).flatten(0, 1), contents.flatten())
        optimizer.zero_grad()
        (loss + content_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    patches.remove()
    model.config.compressor_trained = True
    model.eval()


def pixels_of(processor: AdaptiveLlavaProcessor, images: Sequence[np.ndarray]) -> Tensor:
    """What the processor makes of images that need no resizing, without its overhead: `(N, 3, size, size)`."""
    options = processor.image_processor
    pixels = np.stack(list(images)).astype(np.float32) / 255
    normalised = (pixels - np.float32(options.image_mean)) / np.float32(options.image_std)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def rate_at(progress: float) -> float:
    """Share of the peak learning rate at a share of the training."""
    return min(1.0, progress / 0.05 + 0.01) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class LastPatches:
    """Keeps what the tower gave out last: patch features `(N, patches, dim)`, still attached to the graph."""

    def __init__(self, tower: nn.Module):
        self._handle = tower.register_forward_hook(self._keep)

    def _keep(self, tower: nn.Module, arguments: tuple, output: Any) -> None:
        self.features = output.last_hidden_state[:, 1:]

    def remove(self) -> None:
        self._handle.remove()


class Words:
    """Conversations to ids, as chat template and tokenizer give them but without their overhead."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.ids = tokenizer.get_vocab()
        self.pad = tokenizer.pad_token_id

    def batch(self, conversations: Sequence[list[dict[str, str]]]) -> tuple[Tensor, Tensor]:
        """Right-padded `input_ids (B, L)` and `labels (B, L)`, -100 on what the user says and on padding."""
        rows = [self._row(messages) for messages in conversations]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.tensor([ids + [self.pad] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        return input_ids, labels

    def _row(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            by_user = message["role"] == "user"
            start = "<|user|> <image>" if not ids else "<|user|>"
            said = f"{start} {message['content']}" if by_user else f"{message['content']} <|end|>"
            tokens = [self.ids[word] for word in said.split()]
            ids += tokens
            labels += [-100] * len(tokens) if by_user else tokens
        return ids, labels
