"""A small untrained model that can write any text: to try the way from pages to token counts without a GPU.

    python -m adaptive_llava.training.small_document_model --output my_small_model

A CLIP tower on 256 pixels (16 x 16 patches), a Qwen2 language model that reads and writes bytes, and the `dfmr` preset
with 1, 16, 64 or 256 visual tokens; 1.1 million random weights. It learns the form of answers and frequent values in
minutes; real pages are beyond it. To read them, start from a trained model (`python -m adaptive_llava convert`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.tiny_model import add_positions
from adaptive_llava.training.whole_folder import whole_folder


FACTORS = (1, 2, 4, 16)  # pooling windows per side: 256, 64, 16 and 1 visual tokens of 16 x 16 patches

_LENGTH = 4096  # tokens of a prompt with its answer
_WEIGHT_SCALE = 0.05
_EMBEDDING_SCALE = 0.5


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and those of a chat."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=_LENGTH,
        padding_side="left",
    )


def build_model(
    *,
    width: int = 128,
    layers: int = 3,
    image_size: int = 256,
    patch_size: int = 16,
    factors: Sequence[int] = FACTORS,
    seed: int = 0,
) -> tuple[AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor]:
    """The untrained model and its processor.

    Args:
        width: Of tower and language model; a multiple of 32.
        layers: Of each.
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels.
        factors: Pooling windows per side.
        seed: Of the weights.
    """
    if width < 32 or width % 32:
        raise ValueError(f"`width={width}` must be a multiple of 32, the width of an attention head.")
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
    }
    vision = CLIPVisionModel(
        CLIPVisionConfig(**shape, image_size=image_size, patch_size=patch_size, projection_dim=width)
    )
    add_positions(vision, image_size // patch_size)
    text = Qwen2ForCausalLM(
        Qwen2Config(
            **shape,
            num_key_value_heads=shape["num_attention_heads"],
            vocab_size=len(tokenizer),
            initializer_range=_WEIGHT_SCALE,
            tie_word_embeddings=False,
            max_position_embeddings=_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(text.get_input_embeddings().weight, std=_EMBEDDING_SCALE)
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        vision,
        text,
        preset="dfmr",
        tokenizer=tokenizer,
        vision_feature_layer=-1,
        compressor={"type": "average_pool", "factors": list(factors)},
    )
    return model, AdaptiveLlavaProcessor.from_config(model.config, tokenizer, chat_template="chatml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.small_document_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--width", type=int, default=128, help="of tower and language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of each (%(default)s)")
    parser.add_argument("--image-size", type=int, default=256, help="side of the input, in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        with whole_folder(options.output) as folder:
            model, processor = build_model(
                width=options.width, layers=options.layers, image_size=options.image_size, seed=options.seed
            )
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    except ValueError as error:
        parser.error(str(error))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"written: {options.output}, {size:,} weights, {list(model.config.visual_token_counts)} visual tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
