"""FLOPs and cache bytes of one prompt with images, from a config alone: `count_flops(config, visual_tokens, text)`.

    counts = count_flops(AdaptiveLlavaConfig.from_preset("stf"), visual_tokens=144, text_tokens=40)
    counts.end_to_end, counts.vision_tower, counts.visual_only

Counted as `torch.utils.flop_counter` counts them: 2 per multiply-add, attention over the full square (a causal kernel
may skip up to half of it), no norms, activations, pooling or embeddings. A grouped query reads its shared key once per
head. Two conventions are in use: `end_to_end`, all parts of the prompt up to the first answer token, and
`visual_only`, the decoder layers over the visual tokens alone, which is what LLaVA-STF's paper counts
(https://arxiv.org/abs/2506.07138). Nothing is allocated: parts are built on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from adaptive_llava.modeling.compressor_base import Compressor
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.modeling.projector import AdaptiveLlavaProjector
from adaptive_llava.modeling.view_geometry import ImageViews, cut_image, image_costs


Size = tuple[int, int]

# Decoders whose layers are attention with q, k, v and o and a gated MLP, and nothing else that multiplies matrices.
LANGUAGE_MODELS = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs of one prompt, by part.

    Attributes:
        vision_tower: Patch embedding and all layers, over every view.
        multi_block_fusion: Multi-block fusion.
        router: The router; only a classifier multiplies matrices.
        compressor: The compressor; pooling and concatenation cost nothing here.
        projector: The projector over the visual tokens and, with pre-fusion, over the patches too.
        modality_prefusion: Pre-fusion over patches, visual tokens and text.
        decoder: The language model's layers over visual tokens and text.
        head: The language model's head, at one position.
        visual_only: The language model's layers over the visual tokens alone. A convention, and no part of the sums.
    """

    vision_tower: int
    multi_block_fusion: int
    router: int
    compressor: int
    projector: int
    modality_prefusion: int
    decoder: int
    head: int
    visual_only: int

    @property
    def encoding(self) -> int:
        """From pixels to visual tokens as wide as the language model."""
        return self.vision_tower + self.multi_block_fusion + self.router + self.compressor + self.projector

    @property
    def prefill(self) -> int:
        """From visual tokens and text to the first answer token."""
        return self.modality_prefusion + self.decoder + self.head

    @property
    def end_to_end(self) -> int:
        """From pixels and text to the first answer token."""
        return self.encoding + self.prefill

    @property
    def parts(self) -> dict[str, int]:
        """The parts that `end_to_end` sums, by name."""
        names = [field.name for field in fields(self) if field.name != "visual_only"]
        return {name: getattr(self, name) for name in names}


def count_flops(
    config: AdaptiveLlavaConfig,
    visual_tokens: int | Sequence[int],
    text_tokens: int,
    *,
    images: int = 1,
    image_size: Size | Sequence[Size] | None = None,
    rungs: Sequence[int] | None = None,
) -> FlopCounts:
    """FLOPs of one prompt up to its first answer token.

    Args:
        config: The model's config; no weights are needed.
        visual_tokens: Visual tokens of each image, newlines included: without `rungs`, counts this model makes with
            all views of an image at one rung. One number for all `images`, or a list with one per image.
        text_tokens: Text ids of the prompt, without placeholders; pre-fusion takes all of them for instruction.
        images: Images in the prompt; of a list, its length.
        image_size: Height and width of the images, in pixels, or a list with one pair per image; only AnyRes needs it.
        rungs: Rung of each view, image after image, as the model's `visual_rungs`; the views of an image may differ.

    Raises:
        ValueError: A count that the model cannot make, no text or no image, an `image_size` that is missing or not
            needed, rungs that are not those of these views, or a part whose FLOPs are not known.
    """
    counts = [visual_tokens] * images if isinstance(visual_tokens, int) else list(visual_tokens)
    for name, value in (("text_tokens", text_tokens), ("images", len(counts))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}={value!r}` must be a whole number >= 1.")
    cuts = _cuts(config, image_size, len(counts))
    views: Counter[int] = Counter()  # by rung
    if rungs is None:
        for tokens, cut in zip(counts, cuts, strict=True):
            views[_rung(config, tokens, cut)] += cut.views
    else:
        views.update(_checked_rungs(config, rungs, sum(cut.views for cut in cuts)))
    towers = sum(config.tiling["n"] ** 2 + 1 if config.tiling["type"] == "mosaic" else cut.views for cut in cuts)
    with torch.device("meta"):
        fusion, compressor = config.build_fusion(), config.build_compressor()
        router = config.build_router(compressor)
        projector = AdaptiveLlavaProjector.from_config(config, compressor)
    text, ladder, grid, visual = config.text_config, config.visual_token_counts, config.view_grid, sum(counts)
    height, width = config.vision_grid
    patches = towers * height * width
    projected = sum(ladder[rung] * number for rung, number in views.items())
    fused_visual = visual if config.prefusion_variant == "released" else 0
    return FlopCounts(
        vision_tower=vision_tower_flops(config.vision_config, towers),
        multi_block_fusion=_linear_flops(fusion, patches),
        router=_linear_flops(router, views.total()),
        compressor=sum(compressor_flops(compressor, grid, rung, number) for rung, number in views.items()),
        projector=_linear_flops(projector, projected + (patches if config.prefusion_layers else 0)),
        modality_prefusion=prefusion_flops(text, config.prefusion_layers, patches, fused_visual + text_tokens),
        decoder=decoder_flops(text, visual + text_tokens),
        head=2 * text.hidden_size * text.vocab_size,
        visual_only=decoder_flops(text, visual),
    )


def vision_tower_flops(config: Any, images: int = 1) -> int:
    """FLOPs of a CLIP or SigLIP tower, patch embedding, all layers and SigLIP's pooling head.

    Args:
        config: The tower's config.
        images: Images in the batch.

    Raises:
        ValueError: Another kind of tower.
    """
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r}: its FLOPs are not known. "
            f"Known: {', '.join(VISION_TOWERS)}."
        )
    width, hidden = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (1 if config.model_type == "clip_vision_model" else 0)
    embedding = 2 * patches * width * config.num_channels * config.patch_size**2
    linear = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = 4 * tokens * tokens * width
    head = 0
    if config.model_type == "siglip_vision_model" and getattr(config, "vision_use_head", True):
        # one query attends to all tokens, and goes through an MLP
        head = 2 * (2 + 2 * tokens) * width * width + 4 * tokens * width + 4 * width * hidden
    return images * (embedding + config.num_hidden_layers * (linear + attention) + head)


def compressor_flops(compressor: Compressor, grid: tuple[int, int], rung: int, views: int = 1) -> int:
    """FLOPs of `compress` over views that share a rung.

    Args:
        compressor: The compressor; it may be on the meta device.
        grid: Patches per side of a view, `(height, width)`.
        rung: Index into its ladder.
        views: Views in the batch.

    Raises:
        ValueError: A compressor without an entry in the table.
    """
    if compressor.type_name not in _COMPRESSORS:
        raise ValueError(
            f"The FLOPs of the compressor {compressor.type_name!r} are not known. Add it to `_COMPRESSORS` in "
            f"training/flop_counts.py; known: {', '.join(sorted(_COMPRESSORS))}."
        )
    return _COMPRESSORS[compressor.type_name](compressor, grid, rung, views)


def prefusion_flops(config: Any, layers: int, patches: int, tokens: int) -> int:
    """FLOPs of modality pre-fusion, which also sends the patches through its layers.

    Args:
        config: The language model's config.
        layers: Layers of pre-fusion.
        patches: Patches of all images of a prompt.
        tokens: Instruction text and visual tokens of a prompt together.
    """
    return layers * _decoder_layer_flops(config, patches + tokens)


def decoder_flops(config: Any, tokens: int) -> int:
    """FLOPs of a language model's layers over one prompt, without its head.

    Args:
        config: The language model's config.
        tokens: Length of the prompt, text and visual tokens together.

    Raises:
        ValueError: A language model of another kind than `LANGUAGE_MODELS`.
    """
    return config.num_hidden_layers * _decoder_layer_flops(config, tokens)


def prefill_flops(config: Any, tokens: int) -> int:
    """FLOPs of a language model over one prompt, with one position scored by the head.

    Args:
        config: The language model's config.
        tokens: Length of the prompt, text and visual tokens together.
    """
    return decoder_flops(config, tokens) + 2 * config.hidden_size * config.vocab_size


def kv_cache_bytes(config: Any, tokens: int, *, bytes_per_value: int = 2) -> int:
    """Bytes that keys and values of `tokens` tokens take in the language model's cache.

    Args:
        config: The language model's config.
        tokens: Visual tokens, text, or both.
        bytes_per_value: 2 in bfloat16, 4 in float32.
    """
    return 2 * config.num_hidden_layers * _head_widths(config)[1] * tokens * bytes_per_value


def _cuts(config: AdaptiveLlavaConfig, size: Size | Sequence[Size] | None, images: int) -> list[ImageViews]:
    """How each image is cut into views."""
    tiling = config.tiling
    if (tiling["type"] == "anyres") != (size is not None):
        rule = "needs it, to cut images into views" if size is None else "makes the same views of every image"
        raise ValueError(f"`image_size={size!r}`: tiling {tiling['type']!r} {rule}. Height and width in pixels.")
    if size is None:
        return [ImageViews()] * images
    sizes: list[Any] = [size] * images if isinstance(size[0], int) else list(size)
    if len(sizes) != images:
        raise ValueError(
            f"`image_size` has {len(sizes)} entries for {images} images. Pass one pair, or one per image."
        )
    whole = images > 1 and tiling["several_images"] == "whole"
    return [cut_image(tiling, each, whole=whole) for each in sizes]


def _checked_rungs(config: AdaptiveLlavaConfig, rungs: Sequence[int], views: int) -> Sequence[int]:
    if len(rungs) != views:
        raise ValueError(f"`rungs` has {len(rungs)} entries, and these images have {views} views. Pass one for each.")
    wrong = [rung for rung in rungs if not 0 <= rung < len(config.visual_token_counts)]
    if wrong:
        raise ValueError(f"`rungs` has {wrong[0]}. Pass numbers from 0 to {len(config.visual_token_counts) - 1}.")
    return rungs


def _rung(config: AdaptiveLlavaConfig, visual_tokens: int, image: ImageViews) -> int:
    (cost,) = image_costs(config.tiling, config.compressor, config.view_grid, [image])
    if visual_tokens not in cost.counts:
        raise ValueError(
            f"`visual_tokens={visual_tokens!r}` is no count that this model makes of an image. "
            f"Pass one of: {', '.join(map(str, cost.counts))}."
        )
    return cost.counts.index(visual_tokens)


def _decoder_layer_flops(config: Any, tokens: int) -> int:
    if config.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"`text_config` of type {config.model_type!r}: its FLOPs are not known. "
            f"Known: {', '.join(LANGUAGE_MODELS)}."
        )
    width = config.hidden_size
    queries, keys = _head_widths(config)
    linear = 2 * tokens * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
    return linear + 4 * tokens * tokens * queries


def _head_widths(config: Any) -> tuple[int, int]:
    # all queries of a token, and all its keys
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def _linear_flops(part: nn.Module | None, rows: int) -> int:
    """FLOPs of a part each of whose linear layers sees `rows` rows."""
    layers = [] if part is None else [module for module in part.modules() if isinstance(module, nn.Linear)]
    return 2 * rows * sum(layer.weight.numel() for layer in layers)


def _no_flops(compressor: Any, grid: tuple[int, int], rung: int, views: int) -> int:
    return 0


def _spatial_fusion_flops(compressor: Any, grid: tuple[int, int], rung: int, views: int) -> int:
    tokens = views * compressor.ladder(grid)[rung]
    # the convolution makes whole windows, the other layers one token each
    convolution = _linear_flops(compressor.convolution, tokens // compressor.fused_tokens)
    return convolution + sum(_linear_flops(layer, tokens) for layer in (compressor.linear_1, compressor.linear_2))


def _query_resampler_flops(compressor: Any, grid: tuple[int, int], rung: int, views: int) -> int:
    queries, patches, width = compressor.ladder(grid)[rung], grid[0] * grid[1], compressor.input_dim
    # the queries are the same for all views and projected once
    linear = 2 * width * width * (queries + views * (2 * patches + queries))
    return linear + views * 4 * queries * patches * width


_COMPRESSORS: dict[str, Callable[[Any, tuple[int, int], int, int], int]] = {
    "identity": _no_flops,
    "average_pool": _no_flops,
    "token_concat": _no_flops,
    "spatial_fusion": _spatial_fusion_flops,
    "query_resampler": _query_resampler_flops,
}
