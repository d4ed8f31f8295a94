"""What a checkpoint of the LLaVA authors' code base leaves to that code: backbone configs, options, images, chats.

Papers: LLaVA-1.5, https://arxiv.org/abs/2310.03744; LLaVA-STF, https://arxiv.org/abs/2506.07138; LLaVA-Mini,
https://arxiv.org/abs/2501.03895.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaNextConfig, PretrainedConfig

from adaptive_llava.modeling.multi_block_fusion import default_fusion_blocks
from adaptive_llava.modeling.sincos_positions import sincos_positions
from adaptive_llava.processing.chat_templates import CHAT_TEMPLATES, with_joined_content


# Their `model_type` names the language model.
_TEXT_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mini_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
# Prompt format that their training scripts use with this language model, where its tokenizer has no template.
_TEMPLATES = {"llama": "vicuna", "qwen2": "chatml"}

# LLaVA-Mini's.
_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def read_text_config(found: Mapping[str, Any], rows: int) -> PretrainedConfig:
    """Config of the language model.

    Args:
        found: The checkpoint's config.json.
        rows: Embeddings the model will have.
    """
    kind = _TEXT_TYPES[found["model_type"]]
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "rope_parameters"}
    options = {name: value for name, value in found.items() if name in known}
    return AutoConfig.for_model(kind, **(options | {"vocab_size": rows}))


def read_vision_config(folder: Path) -> PretrainedConfig:
    """Config of a CLIP vision tower, given its own folder or that of the dual encoder it is a part of.

    Raises:
        ValueError: Another kind of tower.
    """
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise ValueError(
            f"`--vision-tower`: {folder} is a {config.model_type!r}, and checkpoints in the authors' layout are "
            "converted with CLIP towers only. Of LLaVA-OneVision, take the llava-hf checkpoints."
        )
    return config


def stock_config(
    found: Mapping[str, Any], vision: PretrainedConfig, text: PretrainedConfig, image_token_id: int
) -> LlavaConfig | LlavaNextConfig:
    """The same model as transformers describes it; LLaVA-NeXT if it has tiles of several resolutions.

    Raises:
        ValueError: Tiles that are joined in another way than LLaVA-NeXT's.
    """
    options = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token_id,
        "vision_feature_layer": found.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full"
        if found.get("mm_vision_select_feature") == "cls_patch"
        else "default",
    }
    if not _is_tiled(found):
        return LlavaConfig(**options)
    aspect, merge = found["image_aspect_ratio"], found.get("mm_patch_merge_type")
    if (aspect, merge) != ("anyres", "spatial_unpad"):
        raise ValueError(
            f"`image_aspect_ratio={aspect!r}` with `mm_patch_merge_type={merge!r}` is unknown here. Known are plain "
            "images, and 'anyres' with 'spatial_unpad', as in LLaVA-NeXT. Of LLaVA-OneVision, take the llava-hf "
            "checkpoints."
        )
    return LlavaNextConfig(**options, image_grid_pinpoints=_pinpoints(found))


def system_options(
    found: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    vision: PretrainedConfig,
    preset: str,
    *,
    window: int | None = None,
    fusion_blocks: Sequence[int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Config fields of a system that was trained with its own compressor, and what had to be assumed.

    Args:
        found: The checkpoint's config.json.
        shapes: Shape of every tensor, by name.
        vision: Config of the vision tower.
        preset: `"stf"`, `"mbtf"`, `"stf-mbtf"` or `"llava-mini"`.
        window: Side of the fused windows, in patches.
        fusion_blocks: The hidden states that are fused.

    Raises:
        ValueError: Options that do not fit the shapes.
    """
    fields: dict[str, Any] = {"vision_feature_layer": found.get("mm_vision_select_layer", -2)}
    notes = []
    if preset in ("stf", "stf-mbtf"):
        reads = shapes["model.mm_projector.0.weight"][1]
        side, groups = fused_windows(reads, vision.hidden_size, window)
        fields["compressor"] = {"type": "spatial_fusion", "window": side, "fused_tokens": groups}
        if window is None:
            notes.append(f"assumed     window={side}, fused_tokens={groups}: no config tells (see --window)")
    if preset in ("mbtf", "stf-mbtf"):
        sources = shapes["model.mm_projector_crosslayer.0.weight"][1] // vision.hidden_size
        states = range(vision.num_hidden_layers + 1)
        default = [states[fields["vision_feature_layer"]], *default_fusion_blocks(vision.num_hidden_layers)[1:]]
        if fusion_blocks is None and len(default) != sources:
            raise ValueError(
                f"The checkpoint fuses {sources} hidden states of its vision tower, and which is told nowhere; the "
                f"authors' {len(default)} are {default}. Pass the right ones as `--fusion-blocks`."
            )
        fields["fusion_blocks"] = default if fusion_blocks is None else list(fusion_blocks)
        if fusion_blocks is None:
            notes.append(f"assumed     fusion_blocks={default}: no config tells (see --fusion-blocks)")
    if preset == "llava-mini":
        side = found.get("compressor_size", math.isqrt(shapes["model.compressor.query"][0]))
        fields["compressor"] = {"type": "query_resampler", "counts": [side * side]}
        fields["compressor"] |= {"key_positions": "enlarged", "initialisation": "normal"}
        layers = {name.split(".")[2] for name in shapes if name.startswith("model.prefusion_layers.")}
        fields |= {"prefusion_layers": len(layers), "prefusion_padding": "released"}
        if found.get("resolution_ratio", 1) > 1:
            fields["tiling"] = {"type": "mosaic", "n": found["resolution_ratio"]}
    return fields, notes


def fused_windows(reads: int, width: int, window: int | None = None) -> tuple[int, int]:
    """Side k of the windows and number m of tokens made of each, from how many numbers the projector reads.

    Spatial token fusion cuts the k * k * `width` numbers of a window into m equal groups of channels. Without
    `window`, the smallest k is taken that fits, and so the smallest m.

    Raises:
        ValueError: No such windows.
    """
    if reads % width == 0:
        share = reads // width  # k * k / m
        sides = range(1, share + 1) if window is None else [window]
        for side in sides:
            if side * side >= share and side * side % share == 0:
                return side, side * side // share
    raise ValueError(
        f"The projector reads {reads} numbers, which is no window of patches of width {width}"
        + (f" with `--window {window}`: window * window * {width} must be a multiple of it." if window else ".")
    )


def check_stored_positions(table: Tensor) -> None:
    """Refuse a LLaVA-Mini whose stored query positions are not those that its model computes by itself.

    Args:
        table: `model.compressor.pos_embed`, `(C * C, dim)`; it may have been rounded to half precision.
    """
    side = math.isqrt(len(table))
    places = torch.arange(side)
    own = sincos_positions(places, places, table.shape[1]) if side * side == len(table) else None
    if own is None or not torch.allclose(table.float(), own, rtol=0, atol=1e-2):
        raise ValueError(
            f"`model.compressor.pos_embed` of shape {tuple(table.shape)} is not the sine-cosine table of a square "
            "grid, as LLaVA-Mini stores it, and this package computes positions. Such weights cannot be converted."
        )


def original_image_processor(found: Mapping[str, Any], tower: Path, vision: PretrainedConfig) -> Any:
    """The image processor of the authors' code.

    Args:
        found: The checkpoint's config.json; its `image_aspect_ratio` says what becomes of oblong images: `"pad"`
            lays them on a square of the mean colour, tiles (`"anyres"`) keep their shape, otherwise the middle is cut
            out.
        tower: Folder of the vision tower; its preprocessor_config.json tells the normalisation.
        vision: Config of the vision tower.
    """
    size = vision.image_size
    options: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if (tower / "preprocessor_config.json").is_file():
        clip: Any = _processor_class("CLIPImageProcessor").from_pretrained(tower)
        options |= {"image_mean": list(clip.image_mean), "image_std": list(clip.image_std)}
    if _is_tiled(found):
        return _processor_class("LlavaNextImageProcessor")(**options, image_grid_pinpoints=_pinpoints(found))
    if found.get("image_aspect_ratio") == "pad":
        return _processor_class("LlavaImageProcessor")(**options, do_pad=True)
    return _processor_class("CLIPImageProcessor")(**options)


def original_chat_template(found: Mapping[str, Any], tokenizer: Any) -> str | None:
    """The chat template of the authors' code: the tokenizer's own where there is one; `None` if none is known."""
    if tokenizer.chat_template is None:
        name = _TEMPLATES.get(_TEXT_TYPES[found["model_type"]])
        return None if name is None else CHAT_TEMPLATES[name]
    system = _SYSTEM_PROMPT if found["model_type"] == "llava_mini_llama" else None
    return with_joined_content(tokenizer.chat_template, system)


def _is_tiled(found: Mapping[str, Any]) -> bool:
    return "anyres" in (found.get("image_aspect_ratio") or "")


def _pinpoints(found: Mapping[str, Any]) -> list[list[int]]:
    # theirs are (width, height)
    if not isinstance(found.get("image_grid_pinpoints"), list):
        raise ValueError(
            f"`image_grid_pinpoints={found.get('image_grid_pinpoints')!r}` in config.json is no list of sizes. Write "
            "it out as [[width, height], ...], in pixels."
        )
    return [[height, width] for width, height in found["image_grid_pinpoints"]]


def _processor_class(name: str) -> Any:
    # transformers 5 keeps the PIL back end, which needs no torchvision, under its own name
    return getattr(transformers, name + "Pil", None) or getattr(transformers, name)
