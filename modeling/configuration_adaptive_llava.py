"""Configuration of adaptive LLaVA models: backbones, compressor and router in one `config.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

from .checkpoint_trust import check_stored_choices
from .code_files import auto_map, copy_code
from .compressor_base import Compressor
from .compressor_registry import COMPRESSORS
from .modality_prefusion import ModalityPrefusion, check_prefusion
from .multi_block_fusion import MultiBlockFusion, block_index, check_fusion_blocks, default_fusion_blocks
from .option_schema import build_part
from .preset_table import preset_options
from .router_base import Router
from .router_registry import ROUTERS
from .view_arrangement import ViewArrangement
from .view_geometry import check_joined_map, check_tiling, view_grid
from .vision_tower_features import has_class_token, image_side_lengths, vision_geometry
from .visual_token_geometry import visual_token_ladder


if TYPE_CHECKING:  # never run: of a local folder, transformers 4.57 copies only the files that are named here itself
    from .compressor_average_pool import AveragePoolCompressor  # noqa: F401
    from .compressor_identity import IdentityCompressor  # noqa: F401
    from .compressor_query_resampler import QueryResamplerCompressor  # noqa: F401
    from .compressor_spatial_fusion import SpatialFusionCompressor  # noqa: F401
    from .compressor_token_concat import TokenConcatCompressor  # noqa: F401
    from .encoded_images import EncodedBatch  # noqa: F401
    from .pixel_statistics import PIXEL_STEPS  # noqa: F401
    from .placeholder_layout import holds_segments  # noqa: F401
    from .router_classifier import ClassifierRouter  # noqa: F401
    from .router_feature_std import FeatureStdRouter  # noqa: F401
    from .router_fixed import FixedRouter  # noqa: F401
    from .router_pixel_std import PixelStdRouter  # noqa: F401
    from .router_random import RandomRouter  # noqa: F401
    from .router_window_spread import WindowSpreadRouter  # noqa: F401
    from .sincos_positions import sincos_positions  # noqa: F401
    from .visual_tokens import VisionFeatures  # noqa: F401

FORMAT = 1

# `transformers serve` finds the class of remote code by this table alone; transformers 4 has no such table.
getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})["adaptive_llava"] = (
    "AdaptiveLlavaForConditionalGeneration"
)

_MOST = 2**20  # channels, or patches a side

_DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class AdaptiveLlavaConfig(PretrainedConfig):
    """A LLaVA-style model whose visual-token compressor and router are part of its architecture.

    Args:
        vision_config: Config of the vision tower; LLaVA-1.5's CLIP-L/336 by default.
        text_config: Config of the language model; LLaMA by default.
        compressor: `{"type": name, option: value, ...}`; see `compressor_registry.py`.
        router: `{"type": name, option: value, ...}`; see `router_registry.py`.
        image_token_id: Id of the `<image>` placeholder.
        vision_feature_layer: Hidden state of the tower that is compressed; a list joins several on the channels.
        fusion_blocks: Hidden states that multi-block fusion joins into the features to compress, in place of
            `vision_feature_layer` alone; `"default"`: that layer and others spread over the tower; `None`: no fusion.
        fusion_variant: `"released"` or `"paper"`; see `multi_block_fusion.py`.
        prefusion_layers: Layers of modality pre-fusion; 0: none. See `modality_prefusion.py`.
        prefusion_variant: `"released"`: text and visual tokens are fused; `"paper"`: text alone.
        prefusion_padding: What of the text pre-fusion takes for padding: `"attention_mask"`, or `"released"`, which
            also leaves out id 0, as LLaVA-Mini's weights were trained.
        tiling: `{"type": "none"}`, `{"type": "anyres", ...}` or `{"type": "mosaic", "n": 2}`; see
            `view_geometry.check_tiling`.
        projector_hidden_act: Activation between the projector's two layers.
        multimodal_projector_bias: Whether the projector's layers have biases.
        vision_feature_dim: Width of one selected layer. Read from `vision_config` where that tells; to be given for
            convolutional towers.
        vision_grid: Patches per side of an image, `[height, width]`; like `vision_feature_dim`.
        compressor_trained: False while the compressor or projector has weights that were never trained.
        calibration: Where the router's thresholds come from, written by `calibrate`.
        router_training: How a learned router was trained, written by `train_router`; `None` while it was not.
        code_repository: Hub id of a repository that holds the remote code; `None` writes it beside the weights.
        adaptive_llava_format: Version of this schema.

    Raises:
        ValueError: Unknown types or options, options that do not fit each other or the patch grid, or a newer format.
    """

    model_type = "adaptive_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012, transformers reads a dict

    def __init__(
        self,
        vision_config: PretrainedConfig | Mapping[str, Any] | None = None,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        compressor: Mapping[str, Any] | None = None,
        router: Mapping[str, Any] | None = None,
        image_token_id: int = 32000,
        vision_feature_layer: int | list[int] = -2,
        fusion_blocks: list[int] | str | None = None,
        fusion_variant: str = "released",
        prefusion_layers: int = 0,
        prefusion_variant: str = "released",
        prefusion_padding: str = "attention_mask",
        tiling: Mapping[str, Any] | None = None,
        projector_hidden_act: str = "gelu",
        multimodal_projector_bias: bool = True,
        vision_feature_dim: int | None = None,
        vision_grid: list[int] | None = None,
        compressor_trained: bool = True,
        calibration: dict[str, Any] | None = None,
        router_training: dict[str, Any] | None = None,
        code_repository: str | None = None,
        adaptive_llava_format: int = FORMAT,
        **kwargs: Any,
    ):
        if _is_whole(adaptive_llava_format, -math.inf, 0):
            raise ValueError(
                f"`adaptive_llava_format={adaptive_llava_format}` must be a whole number from 1 to {FORMAT}."
            )
        if not isinstance(adaptive_llava_format, int) or adaptive_llava_format > FORMAT:
            raise ValueError(
                f"`adaptive_llava_format={adaptive_llava_format!r}` is newer than this code understands ({FORMAT}). "
                f"Install a release of adaptive-llava that reads format {adaptive_llava_format}, or load with "
                "`trust_remote_code=True` to use the code in the repository."
            )
        self.vision_config = _sub_config("vision_config", vision_config, _DEFAULT_VISION)
        self.text_config = _sub_config("text_config", text_config, {"model_type": "llama"})
        self.compressor = _own_options(compressor, "identity")
        self.router = _own_options(router, "fixed")
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.fusion_blocks: Any = fusion_blocks
        self.fusion_variant = fusion_variant
        self.prefusion_layers = prefusion_layers
        self.prefusion_variant = prefusion_variant
        self.prefusion_padding = prefusion_padding
        self.tiling = _own_options(tiling, "none")
        self.projector_hidden_act = projector_hidden_act
        self.multimodal_projector_bias = multimodal_projector_bias
        self.vision_feature_dim = vision_feature_dim
        self.vision_grid = vision_grid
        self.compressor_trained = compressor_trained
        self.calibration = calibration
        self.router_training = router_training
        self.code_repository = code_repository
        self.adaptive_llava_format = adaptive_llava_format
        self.check_options()
        # 4.57 reads the tie from the text config, 5.x from the top
        tied = kwargs.pop("tie_word_embeddings", None)
        tied = (getattr(self.text_config, "tie_word_embeddings", None) or False) if tied is None else tied
        if not isinstance(tied, bool):
            raise ValueError(f"`tie_word_embeddings={tied!r}` must be true or false.")
        self.text_config.tie_word_embeddings = tied
        try:
            super().__init__(tie_word_embeddings=tied, **kwargs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"One of `{', '.join(sorted(kwargs))}` has a value that transformers cannot take: {error}. Check "
                "these entries of the config."
            ) from error

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> AdaptiveLlavaConfig:
        """Config of a published system, by name or alias; `fields` override the preset's.

        Raises:
            ValueError: Unknown preset; the known ones are listed.
        """
        fields = preset_options(preset) | fields
        router = fields["router"]
        if isinstance(router, Mapping) and router.get("type") == "classifier" and "features" not in router:
            tower = _sub_config("vision_config", fields.get("vision_config"), _DEFAULT_VISION)
            fields["router"] = {**router, "features": "cls" if has_class_token(tower) else "mean"}
        return cls(**fields)

    def check_options(self) -> None:
        """Fill in every option's default and refuse what does not fit.

        `from_dict` sets attributes after construction, so the model and `save_pretrained` call this again.
        """
        geometry = vision_geometry(self.vision_config)
        if geometry is not None:
            self.vision_feature_dim, self.vision_grid = geometry[0], list(geometry[1])
        if self.vision_feature_dim is None or self.vision_grid is None:
            raise ValueError(
                f"`vision_config` of type {self.vision_config.model_type!r} does not tell the width and grid of its "
                "features. Pass `vision_feature_dim` and `vision_grid=[height, width]`, or use `from_backbones`, "
                "which measures them."
            )
        self._check_numbers()
        self._check_records()
        self._check_feature_layer()
        self._check_language_model()
        self._check_fusion()
        with torch.device("meta"):
            self.build_fusion()
            compressor = self.build_compressor()
            router = self.build_router(compressor)
        check_prefusion(
            self.prefusion_layers, self.prefusion_variant, self.prefusion_padding, self.text_config, compressor
        )
        if not compressor.projects and self.projector_hidden_act not in tuple(ACT2FN):
            raise ValueError(
                f"`projector_hidden_act={self.projector_hidden_act!r}` is unknown. Pass one of: "
                f"{', '.join(sorted(ACT2FN))}."
            )
        self.compressor, self.router = compressor.options, router.options
        tower_size = getattr(self.vision_config, "image_size", None)
        self.tiling = check_tiling(self.tiling, tower_size=tower_size, num_rungs=compressor.num_rungs)
        compressor.ladder(self.view_grid)
        router.check_grid(self.view_grid, image_side_lengths(self.vision_config))
        check_joined_map(self.tiling, self.compressor, self.view_grid)
        self._check_router_inputs(router)

    @property
    def feature_dim(self) -> int:
        """Width of the features that the compressor reads: all selected layers joined, or fused into one."""
        layer = self.vision_feature_layer
        layers = 1 if isinstance(layer, int) or self.fusion_blocks is not None else len(layer)
        return layers * self.vision_feature_dim

    @property
    def fusion_starts_neutral(self) -> bool:
        """Whether new multi-block fusion, if there is any, gives the features of `vision_feature_layer`."""
        if self.fusion_blocks is None:
            return True
        layer: Any = self.vision_feature_layer  # one, beside fusion
        selected = block_index(layer, self.vision_config.num_hidden_layers)
        return self.fusion_variant == "released" and self.fusion_blocks[0] == selected

    @property
    def view_grid(self) -> tuple[int, int]:
        """Patches per side of one view, `(height, width)`: of a mosaic, those of all its tiles."""
        return view_grid(self.tiling, self.vision_grid)

    @property
    def visual_token_counts(self) -> tuple[int, ...]:
        """Token counts this model can spend on a view (without AnyRes: on an image), fewest first."""
        return visual_token_ladder(self.compressor, self.view_grid)

    def build_arrangement(self) -> ViewArrangement | None:
        """New arrangement of AnyRes views, or `None` if an image is one view."""
        if self.tiling["type"] != "anyres":
            return None
        options = {name: self.tiling[name] for name in ("view_layout", "max_tiles")}
        return ViewArrangement(self.text_config.hidden_size, **options)

    def build_fusion(self) -> MultiBlockFusion | None:
        """New multi-block fusion, or `None` if this config has none."""
        if self.fusion_blocks is None:
            return None
        return MultiBlockFusion(self.vision_feature_dim, blocks=self.fusion_blocks, variant=self.fusion_variant)

    def build_compressor(self) -> Compressor:
        """A new compressor as this config describes it."""
        return build_part("compressor", COMPRESSORS, self.compressor, self.feature_dim, self.text_config.hidden_size)

    def build_router(self, compressor: Compressor) -> Router:
        """A new router for the rungs of `compressor`."""
        return build_part("router", ROUTERS, self.router, self.vision_feature_dim, compressor)

    def build_prefusion(self) -> ModalityPrefusion | None:
        """New modality pre-fusion, or `None` if this config has none."""
        return ModalityPrefusion(self.text_config, self.prefusion_layers) if self.prefusion_layers else None

    def _check_numbers(self) -> None:
        grid, width = self.vision_grid, self.vision_feature_dim
        listed = isinstance(grid, (list, tuple)) and len(grid) == 2
        if not listed or not all(_is_whole(n, 1, _MOST) for n in (*grid, width)):
            raise ValueError(
                f"`vision_grid={grid!r}` and `vision_feature_dim={width!r}` must be whole numbers >= 1, up to "
                f"{_MOST:,}: patches per side, [height, width], and channels of one hidden state. Use a tower whose "
                "images hold a patch."
            )
        for part in self.sub_configs:
            depth = getattr(getattr(self, part), "num_hidden_layers", None)
            if depth is not None and not _is_whole(depth, 0):
                raise ValueError(f"`{part}.num_hidden_layers={depth!r}` must be a whole number of layers.")
        if not _is_whole(self.image_token_id, 0):
            raise ValueError(
                f"`image_token_id={self.image_token_id!r}` must be a whole number >= 0: the tokenizer's id of <image>."
            )

    def _check_records(self) -> None:
        """Refuse values of a wrong type, which would be taken for true or written into the next checkpoint."""
        kinds: dict[str, tuple[tuple[type, ...], str]] = {
            "multimodal_projector_bias": ((bool,), "true or false"),
            "compressor_trained": ((bool,), "true or false"),
            "calibration": ((dict, type(None)), "a dict, or None"),
            "router_training": ((dict, type(None)), "a dict, or None"),
            "code_repository": ((str, type(None)), "the Hub id of a repository, or None"),
        }
        for name, (types, wanted) in kinds.items():
            if not isinstance(getattr(self, name), types):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be {wanted}.")

    def _check_feature_layer(self) -> None:
        layer, depth = self.vision_feature_layer, getattr(self.vision_config, "num_hidden_layers", None)
        layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
        if not layers or any(isinstance(index, bool) or not isinstance(index, int) for index in layers):
            raise ValueError(
                f"`vision_feature_layer={layer!r}` must be the index of a hidden state, like -2, or a non-empty list "
                "of several to join."
            )
        if depth and vision_geometry(self.vision_config) and not all(-depth - 1 <= index <= depth for index in layers):
            raise ValueError(
                f"`vision_feature_layer={layer!r}` is not there: this tower of {depth} layers has hidden states 0 to "
                f"{depth}, or -1 to -{depth + 1} from the end. Choose one of these."
            )

    def _check_language_model(self) -> None:
        text = self.text_config
        width, reason = getattr(text, "hidden_size", None), None
        if getattr(text, "is_encoder_decoder", False):
            reason = "has an encoder, which no visual token would reach"
        elif width is None or text.get_text_config() is not text:
            reason = "describes several models, and not a language model alone"
        elif not _is_whole(width, 1, _MOST):
            reason = f"has layers of width {width!r}"
        elif not hasattr(text, "num_attention_heads"):
            reason = "has no attention, and so no key-value cache to generate with"
        elif getattr(text, "word_embed_proj_dim", width) != width:
            reason = f"has embeddings of width {text.word_embed_proj_dim} in front of layers of width {width}"
        if reason is not None:
            raise ValueError(
                f"`text_config` of type {text.model_type!r} {reason}. Use the config of a decoder with attention "
                "whose embeddings are as wide as its layers, like LLaMA or Qwen."
            )

    def _check_fusion(self) -> None:
        if self.fusion_blocks is None:
            return
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if vision_geometry(self.vision_config) is None or layers is None:
            raise ValueError(
                f"`fusion_blocks={self.fusion_blocks!r}` needs a tower whose hidden states share one grid and width, "
                f"and {self.vision_config.model_type!r} has no such blocks. Use a ViT (CLIP, SigLIP, DINOv2), or "
                "`fusion_blocks=None`."
            )
        if not isinstance(self.vision_feature_layer, int):
            raise ValueError(
                f"`vision_feature_layer={self.vision_feature_layer!r}` and `fusion_blocks` both join hidden states. "
                "Give one layer, or `fusion_blocks=None`."
            )
        default = isinstance(self.fusion_blocks, str) and self.fusion_blocks == "default"
        blocks = default_fusion_blocks(layers, self.vision_feature_layer) if default else self.fusion_blocks
        self.fusion_blocks = check_fusion_blocks(blocks, layers)

    def _check_router_inputs(self, router: Router) -> None:
        kind, layers = self.vision_config.model_type, getattr(self.vision_config, "num_hidden_layers", None)
        if router.needs_class_token and not has_class_token(self.vision_config):
            raise ValueError(
                f"`router={self.router!r}` reads the [CLS] state, and {kind!r} towers have none. Set its 'features' "
                "to 'mean'."
            )
        beyond = [block for block in router.needs_blocks if layers and not -layers - 1 <= block <= layers]
        if beyond:
            raise ValueError(
                f"`router={self.router!r}` reads hidden states {beyond}, and this tower of {layers} layers has 0 to "
                f"{layers}, or -1 to -{layers + 1} from the end. Choose from these."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        refusal = (
            f"`{pretrained_model_name_or_path}` has a config.json that holds no JSON object. Save the model again."
        )
        try:
            found = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError) as error:
            raise ValueError(refusal) from error
        if not isinstance(found[0], dict):
            raise ValueError(refusal)
        return found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for name in ("", *cls.sub_configs):
            check_stored_choices(config_dict.get(name) if name else config_dict, name or "config.json")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["auto_map"] = auto_map(self.code_repository)
        for name in self.sub_configs:
            if isinstance(output.get(name), dict):
                _add_legacy_rope(output[name])
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        # the sub-configs in full: what is a default differs between transformers releases
        output, full = super().to_diff_dict(), self.to_dict()
        for name in self.sub_configs:
            output[name] = {key: value for key, value in full[name].items() if key != "_name_or_path"}
        return output

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` writes the code and `auto_map` itself."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        self.check_options()
        if self.code_repository is None:
            copy_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _sub_config(name: str, value: Any, default: dict[str, Any]) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`{name}={value!r}` must be a config of transformers, or a dict of its fields.")
    options = dict(default) if value is None else {"model_type": default["model_type"], **value}
    try:
        return AutoConfig.for_model(**options)
    except Exception as error:  # every config checks its fields in a way of its own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`{name}` of type {options['model_type']!r} cannot be read: {reason:.400}. Use the fields of a config "
            "that this release of transformers knows."
        ) from error


def _own_options(value: Any, default: str) -> Any:
    if value is None:
        return {"type": default}
    return dict(value) if isinstance(value, Mapping) else value


def _is_whole(value: Any, minimum: float, maximum: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _add_legacy_rope(config: dict[str, Any]) -> None:
    # 5.x writes `rope_parameters`; 4.57 reads `rope_theta` and `rope_scaling` and would silently use 10000
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
