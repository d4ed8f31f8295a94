"""Matrix-multiplication FLOPs of a vision tower, projector, pre-fusion and language model's prefill, from configs.

Counted as `torch.utils.flop_counter` counts them: 2 per multiply-add, attention over the full square (a causal kernel
may skip up to half of it), no norms, activations or embeddings. A grouped query reads its shared key once per head.
"""

from __future__ import annotations

from typing import Any


def vision_tower_flops(config: Any, images: int = 1) -> int:
    """FLOPs of a CLIP or SigLIP tower, patch embedding and all layers.

    Args:
        config: The tower's config.
        images: Images in the batch.
    """
    width = config.hidden_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (1 if config.model_type == "clip_vision_model" else 0)
    embedding = 2 * patches * width * config.num_channels * config.patch_size**2
    linear = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    attention = 4 * tokens * tokens * width
    return images * (embedding + config.num_hidden_layers * (linear + attention))


def projector_flops(dim: int, text_dim: int, tokens: int) -> int:
    """FLOPs of LLaVA's two-layer projector over `tokens` visual tokens of width `dim`."""
    return 2 * tokens * (dim * text_dim + text_dim * text_dim)


def prefill_flops(config: Any, tokens: int, rows: int = 1) -> int:
    """FLOPs of a LLaMA-like language model over whole prompts, with one position scored by the head.

    Args:
        config: The language model's config.
        tokens: Length of a prompt, text and visual tokens together.
        rows: Prompts in the batch.
    """
    layers = config.num_hidden_layers * _decoder_layer_flops(config, tokens)
    return rows * (layers + 2 * config.hidden_size * config.vocab_size)


def prefusion_flops(config: Any, layers: int, patches: int, tokens: int, rows: int = 1) -> int:
    """FLOPs of modality pre-fusion, which also sends the patches through its layers.

    Args:
        config: The language model's config.
        layers: Layers of pre-fusion.
        patches: Patches of all images of a prompt.
        tokens: Instruction text and visual tokens of a prompt together.
        rows: Prompts in the batch.
    """
    return rows * layers * _decoder_layer_flops(config, patches + tokens)


def _decoder_layer_flops(config: Any, tokens: int) -> int:
    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = 2 * tokens * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
    return linear + 4 * tokens * tokens * queries
