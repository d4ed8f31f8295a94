"""Models put together from a LLaVA checkpoint, or from a vision tower and a language model."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .compressor_base import averaging_weight
from .configuration_adaptive_llava import AdaptiveLlavaConfig
from .projector import AdaptiveLlavaProjector
from .vision_tower_features import extract_features, input_size, unwrap_tower, vision_geometry


logger = logging.get_logger(__name__)

# Parts whose weights belong to this package; a checkpoint must bring them all.
OWN_PARTS = (
    "multi_block_fusion",
    "compressor",
    "router",
    "multi_modal_projector",
    "view_arrangement",
    "modality_prefusion",
)

# Of transformers, by `model_type`.
LLAVA_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}

_LOADING_ARGUMENTS = (
    "revision",
    "dtype",
    "torch_dtype",
    "device_map",
    "token",
    "cache_dir",
    "local_files_only",
    "attn_implementation",
    "quantization_config",
    "low_cpu_mem_usage",
)


class BackboneAssemblyMixin:
    """`from_llava` and `from_backbones` for the model with a head."""

    @classmethod
    def from_llava(cls, model: str | os.PathLike | PreTrainedModel, preset: str = "llava", **fields: Any) -> Any:
        """Give a LLaVA model a compressor and a router; its weights are kept.

        Args:
            model: A Hub id or folder of a LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision model, or a loaded one (its modules
                are shared). The latter two bring their AnyRes `tiling`, unless `fields` name another.
            preset: One of the published systems.
            fields: Config fields that override the preset's, and, for an id, arguments of `from_pretrained`
                (`revision`, `dtype`, `device_map`, `token`).

        Raises:
            ValueError: Another architecture, or a feature selection that leaves no patch grid.
        """
        loading = {name: fields.pop(name) for name in _LOADING_ARGUMENTS if name in fields}
        if isinstance(model, PreTrainedModel):
            kind = model.config.model_type
        else:
            hub = {
                name: loading[name] for name in ("revision", "token", "cache_dir", "local_files_only") & loading.keys()
            }
            kind = PretrainedConfig.get_config_dict(model, **hub)[0].get("model_type")
        if kind not in LLAVA_CLASSES:
            raise ValueError(
                f"`model` is a {kind!r}; `from_llava` takes LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision "
                f"({', '.join(LLAVA_CLASSES.values())}). Use `from_backbones(vision, text)` for other parts."
            )
        if not isinstance(model, PreTrainedModel):
            model = getattr(transformers, LLAVA_CLASSES[kind]).from_pretrained(model, **loading)
        source = model.config
        tower = unwrap_tower(model.model.vision_tower)
        embeddings = getattr(tower, "embeddings", None)
        has_prefix = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
        if source.vision_feature_select_strategy == "full" and has_prefix:
            raise ValueError(
                "`vision_feature_select_strategy='full'` keeps the [CLS] token among the patches, which then form no "
                "grid to compress. Fine-tune with 'default', or use a tower without [CLS]."
            )
        if source.vision_feature_select_strategy != "full" and not has_prefix:
            raise ValueError(
                f"`vision_feature_select_strategy={source.vision_feature_select_strategy!r}` drops the first patch of "
                "a tower without [CLS], and the others form no grid to compress. Set it to 'full' and fine-tune."
            )
        image_token_id = getattr(source, "image_token_id", None) or source.image_token_index
        config = AdaptiveLlavaConfig.from_preset(
            preset,
            vision_config=source.vision_config,
            text_config=source.text_config,
            vision_feature_layer=source.vision_feature_layer,
            projector_hidden_act=source.projector_hidden_act,
            multimodal_projector_bias=source.multimodal_projector_bias,
            **({"image_token_id": image_token_id, "tiling": _tiling_of(source)} | fields),
        )
        if kind == "llava_onevision" and "tiling" not in fields:
            _limit_tiles(config, source.vision_aspect_ratio)
        built = _assemble(cls, config, tower, model.model.language_model, model.lm_head, model.generation_config)
        _warm_start(built, model.model)
        return built

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        preset: str = "llava",
        *,
        tokenizer: Any = None,
        **fields: Any,
    ) -> Any:
        """Join a vision tower and a language model through a new projector.

        Args:
            vision: Id, folder or loaded vision model (CLIP, SigLIP, DINOv2, convolutional towers with 4-D maps).
            text: Id, folder or loaded `AutoModelForCausalLM`.
            preset: One of the published systems.
            tokenizer: The text model's tokenizer; `<image>` is added to it if it is not there, and the embeddings
                grow where the tokenizer exceeds them. Without it, pass `image_token_id`.
            fields: Config fields that override the preset's.

        Raises:
            ValueError: No `image_token_id` can be told, a tower that gives no patch grid, or a head that needs more
                than a matrix.
        """
        if not isinstance(vision, PreTrainedModel):
            vision = AutoModel.from_pretrained(vision)
        if not isinstance(text, PreTrainedModel):
            text = AutoModelForCausalLM.from_pretrained(text)
        _check_head(text)
        if tokenizer is not None:
            if "<image>" not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
            fields.setdefault("image_token_id", tokenizer.convert_tokens_to_ids("<image>"))
            if len(tokenizer) > text.get_input_embeddings().num_embeddings:
                text.resize_token_embeddings(len(tokenizer))
        rows = text.get_input_embeddings().num_embeddings
        if not 0 <= fields.get("image_token_id", -1) < rows:
            raise ValueError(
                f"`image_token_id={fields.get('image_token_id')!r}` is no row of the text model's {rows} embeddings. "
                "Pass `tokenizer=` to have `<image>` added and the embeddings grown, or an id below that number."
            )
        tower = unwrap_tower(vision)
        fields = _measured_geometry(tower, fields) | fields
        config = AdaptiveLlavaConfig.from_preset(
            preset, vision_config=tower.config, text_config=text.config, compressor_trained=False, **fields
        )
        head = text.get_output_embeddings()
        return _assemble(cls, config, tower, text.base_model, head, text.generation_config)


def _assemble(
    model_class: Any,
    config: AdaptiveLlavaConfig,
    tower: nn.Module,
    language_model: nn.Module,
    head: nn.Module,
    generation: Any,
) -> Any:
    # built without storage; given parts take the places of theirs, and only what is new gets storage
    with torch.device("meta"):
        model = model_class(config)
    parameter = next(language_model.parameters())
    inner = model.model
    inner.vision_tower, inner.language_model, model.lm_head = tower, language_model, head
    inner.multi_block_fusion = config.build_fusion()
    inner.compressor = config.build_compressor()
    inner.router = config.build_router(inner.compressor)
    inner.multi_modal_projector = AdaptiveLlavaProjector.from_config(config, inner.compressor)
    inner.view_arrangement = config.build_arrangement()
    inner.modality_prefusion = config.build_prefusion()
    model._adopt_language_model_names()
    for name in OWN_PARTS:
        part = getattr(inner, name)
        if part is not None:
            part.apply(model._init_weights)
            # beside backbones without storage, whose weights a converter writes, new parts are real all the same
            part.to(device="cpu" if parameter.is_meta else parameter.device)
            for own in part.parameters():  # alone: rotary frequencies are buffers that lose their meaning in bf16
                own.data = own.data.to(parameter.dtype)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


def _tiling_of(source: PretrainedConfig) -> dict[str, Any] | None:
    if source.model_type == "llava":
        return None
    tiling = {"type": "anyres", "pinpoints": source.image_grid_pinpoints}
    # LLaVA-OneVision shows the images of a prompt with several as a whole
    return tiling | ({"several_images": "whole"} if source.model_type == "llava_onevision" else {})


def _limit_tiles(config: AdaptiveLlavaConfig, aspect_ratio: str) -> None:
    # "anyres_max_9" shrinks the map of joined tiles; with the tiles one after another there is none
    if config.tiling["view_layout"] == "spatial_unpad" and aspect_ratio.startswith("anyres_max_"):
        config.tiling["max_tiles"] = int(aspect_ratio.removeprefix("anyres_max_"))
        config.check_options()


def _warm_start(built: Any, source: Any) -> None:
    own, config, trained = built.model.multi_modal_projector, built.config, source.multi_modal_projector
    new = [] if config.fusion_starts_neutral else ["multi_block_fusion"]
    if own is None and not built.model.compressor.warm_start(trained):
        new.append("compressor")
    elif own is not None:
        _warm_start_projector(own, trained)
        if any(True for _ in built.model.compressor.parameters()):
            new.append("compressor")
    if built.model.view_arrangement is not None:
        newline = getattr(source, "image_newline", None)
        if newline is None:
            new.append("view_arrangement")
        else:
            built.model.view_arrangement.load_state_dict({"image_newline": newline})
    if new:
        config.compressor_trained = False
        logger.warning(
            f"New weights in: {', '.join(new)}. Fine-tune the model before use; everything else is the source's own."
        )


def _warm_start_projector(own: Any, trained: Any) -> None:
    # same width: taken over; joined windows: each position gets its share, which equals averaging them first
    weight = trained.linear_1.weight
    joined = own.linear_1.in_features // weight.shape[1]
    with torch.no_grad():
        own.load_state_dict(trained.state_dict() | {"linear_1.weight": averaging_weight(weight, joined)})


def _measured_geometry(tower: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    # Black images tell what a convolutional tower's config does not, and whether other towers give patches at all;
    # two, since some join a batch to one sequence.
    parameter = next(tower.parameters())
    if vision_geometry(tower.config) is not None and parameter.is_meta:
        return {}
    layer = fields.get("vision_feature_layer", -2)
    tile_size = (fields.get("tiling") or {}).get("tile_size")  # what AnyRes shows such a tower
    size = (tile_size, tile_size) if tile_size else input_size(tower)
    try:
        with torch.no_grad():
            images = torch.zeros(2, 3, *size, device=parameter.device, dtype=parameter.dtype)
            features = extract_features(tower, images, layer)
    except Exception as error:
        raise ValueError(
            f"`vision` ({type(tower).__name__}) gives no patch grid for images of {size[0]}x{size[1]} pixels: {error} "
            "Use a ViT with one token per patch (CLIP, SigLIP, DINOv2, DINOv3) or a convolutional tower, and a "
            "`vision_feature_layer` that it has."
        ) from error
    layers = 1 if isinstance(layer, int) else len(layer)
    return {"vision_feature_dim": features.patches.shape[-1] // layers, "vision_grid": list(features.grid)}


def _check_head(text: PreTrainedModel) -> None:
    head = text.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"`text` ({type(text).__name__}) has no head that is a plain matrix. Pass a language model whose "
            "`get_output_embeddings()` is a linear layer without a bias."
        )
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier"):
        if getattr(text.config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"`text` ({type(text).__name__}) changes its logits after the head (`{name}="
                f"{getattr(text.config, name)}`), which this package does not do. Use another language model."
            )
