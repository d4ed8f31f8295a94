"""LLaVA-style models that decide per image how many visual tokens to spend.

Order of work: vision tower -> fusion -> router -> resolve_rungs -> compressor -> projector -> view arrangement ->
pre-fusion -> splice -> language model -> gather. Rows come in and go out with one placeholder per image (or, expanded,
one per visual token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .backbone_assembly import OWN_PARTS, BackboneAssemblyMixin
from .configuration_adaptive_llava import AdaptiveLlavaConfig
from .encoded_images import EncodedBatch, EncodedImages
from .modality_prefusion import PrefusionRows, build_prefusion_rows
from .model_outputs import AdaptiveLlavaCausalLMOutputWithPast, AdaptiveLlavaModelOutputWithPast
from .placeholder_generation import PlaceholderGenerationMixin
from .placeholder_layout import PlaceholderLayout, build_layout, holds_segments, prompt_starts
from .pretrained_base import AdaptiveLlavaPreTrainedModel
from .projector import AdaptiveLlavaProjector
from .view_arrangement import join_mosaic, split_views
from .view_geometry import image_costs
from .vision_tower_features import extract_features, input_size, unwrap_tower
from .visual_tokens import Budget, Routing, VisionFeatures, VisualTokens, check_no_images, resolve_rungs, to_host


if TYPE_CHECKING:  # never run: of a local folder, transformers 4.57 copies only the files that are named here itself
    from .checkpoint_trust import check_stored_weights  # noqa: F401
    from .code_files import copy_code  # noqa: F401
    from .compressor_average_pool import AveragePoolCompressor  # noqa: F401
    from .compressor_base import Compressor  # noqa: F401
    from .compressor_identity import IdentityCompressor  # noqa: F401
    from .compressor_query_resampler import QueryResamplerCompressor  # noqa: F401
    from .compressor_registry import COMPRESSORS  # noqa: F401
    from .compressor_spatial_fusion import SpatialFusionCompressor  # noqa: F401
    from .compressor_token_concat import TokenConcatCompressor  # noqa: F401
    from .multi_block_fusion import MultiBlockFusion  # noqa: F401
    from .option_schema import build_part  # noqa: F401
    from .pixel_statistics import PIXEL_STEPS  # noqa: F401
    from .preset_table import PRESETS  # noqa: F401
    from .router_base import Router  # noqa: F401
    from .router_classifier import ClassifierRouter  # noqa: F401
    from .router_feature_std import FeatureStdRouter  # noqa: F401
    from .router_fixed import FixedRouter  # noqa: F401
    from .router_pixel_std import PixelStdRouter  # noqa: F401
    from .router_random import RandomRouter  # noqa: F401
    from .router_registry import ROUTERS  # noqa: F401
    from .router_window_spread import WindowSpreadRouter  # noqa: F401
    from .sincos_positions import sincos_positions  # noqa: F401
    from .visual_token_geometry import visual_token_ladder  # noqa: F401

logger = logging.get_logger(__name__)

# Arguments that other libraries compute for the rows as they come in; wrong once visual tokens stand in them.
_COMPACT_ONLY = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "mm_token_type_ids")


class AdaptiveLlavaModel(AdaptiveLlavaPreTrainedModel):
    """Vision tower, router, compressor, projector, pre-fusion and language model, without a head.

    Args:
        config: The architecture.
    """

    def __init__(self, config: AdaptiveLlavaConfig):
        super().__init__(config)
        # never the code that a backbone's config may ask for
        tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.vision_tower = unwrap_tower(tower)
        self.multi_block_fusion = config.build_fusion()
        self.compressor = config.build_compressor()
        self.router = config.build_router(self.compressor)
        self.multi_modal_projector = AdaptiveLlavaProjector.from_config(config, self.compressor)
        self.view_arrangement = config.build_arrangement()
        self.modality_prefusion = config.build_prefusion()
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()
        # last, since `post_init` adds names; only of classes that occur: CLIP's tower also names those of its text
        # model, for which FSDP would look in vain
        occurring = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(_no_split_modules(tower, self.language_model) & occurring)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    @property
    def has_untrained_router(self) -> bool:
        """Whether the router learns, and nothing has trained it yet."""
        return self.config.router_training is None and any(True for _ in self.router.parameters())

    def train(self, mode: bool = True) -> AdaptiveLlavaModel:
        super().train(mode)
        # a frozen tower stays frozen: batch norm would go on averaging, and with its features the routing would drift
        if not _is_trainable(self.vision_tower):
            self.vision_tower.eval()
        return self

    def encode_images(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        *,
        visual_token_budget: Budget = None,
        visual_rungs: Sequence[int] | Tensor | None = None,
        images_per_prompt: Sequence[int] | None = None,
        features: VisionFeatures | None = None,
    ) -> EncodedImages:
        """Encode, route, compress and project images once; the result serves many prompts.

        Args:
            pixel_values: `(num_images, 3, height, width)`; with tiling `(num_images, views, 3, height, width)`.
            image_sizes: Original heights and widths, `(num_images, 2)`; only AnyRes needs them.
            visual_token_budget: Who decides; see `resolve_rungs`.
            visual_rungs: One rung per view (without AnyRes: per image), replayed exactly.
            images_per_prompt: Images of each prompt, for `{"total": n}`.
            features: Result of `extract_features` on these images, to encode them at several counts.

        Raises:
            ValueError: Images of a wrong shape, or a budget that no rung fits.
        """
        features = self.extract_features(pixel_values, image_sizes) if features is None else features
        routing = self.router(features)
        rungs = self._rungs(
            features,
            routing,
            images_per_prompt=images_per_prompt,
            budget=visual_token_budget,
            rungs=visual_rungs,
        )
        return self._compress(features, routing, rungs)

    def extract_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **tower_options: bool
    ) -> VisionFeatures:
        """Features of all views as routers and compressors read them.

        Args:
            pixel_values: As in `encode_images`.
            image_sizes: As in `encode_images`.
            tower_options: `keep_outputs` and `output_attentions` of `vision_tower_features.extract_features`.
        """
        views, images = split_views(pixel_values, image_sizes, self.config.tiling)
        parameter = next(self.vision_tower.parameters())
        # with PEFT and gradient checkpointing, transformers 5 marks a frozen tower's embeddings as needing gradients
        trained = pixel_values.requires_grad or _is_trainable(self.vision_tower)
        fusion = self.multi_block_fusion
        blocks = {*self.router.needs_blocks, *(() if fusion is None else fusion.blocks)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = extract_features(
                self.vision_tower,
                views.to(device=parameter.device, dtype=parameter.dtype),
                self.config.vision_feature_layer,
                sorted(blocks),
                join_unused=self.training and _is_trainable(self.vision_tower),
                **tower_options,
            )
        # a router that reads pixels must see what the processor saw, not what the tower's precision leaves of it
        features = replace(features, pixels=views.to(parameter.device))
        if fusion is not None:
            dtype = fusion.linear_1.bias.dtype  # the backbones may have been loaded in different precisions
            states = {block: features.blocks[block].to(dtype) for block in fusion.blocks}
            features = replace(features, patches=fusion(states))
        if images is not None:
            views_per_image = tuple(image.views for image in images)
            return replace(features, views_per_image=views_per_image, image_views=images)
        return join_mosaic(features, self.config.tiling["n"]) if self.config.tiling["type"] == "mosaic" else features

    def encode_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None = None,
        *,
        encoded_images: EncodedImages | None = None,
        instruction_mask: Tensor | None = None,
        visual_token_budget: Budget = None,
        visual_rungs: Sequence[int] | Tensor | None = None,
    ) -> EncodedBatch:
        """Encode a batch's images and read its ids on the host, with one device-to-host transfer for all.

        AnyRes needs another, of `image_sizes` alone, before the tower runs.

        Raises:
            ValueError: Placeholders and images disagree; the rows are named.
        """
        if encoded_images is not None:
            if pixel_values is not None or visual_token_budget is not None or visual_rungs is not None:
                raise ValueError(
                    "`encoded_images` already holds its images and their token counts; pass it without "
                    "`pixel_values`, `visual_token_budget` and `visual_rungs`."
                )
            ids, mask, positions, instruction = to_host(input_ids, attention_mask, position_ids, instruction_mask)
            compact = self._is_compact(ids, encoded_images.lengths)
            return EncodedBatch(ids, mask, positions, encoded_images, compact, instruction)
        features = self.extract_features(pixel_values, image_sizes)
        routing = self.router(features)
        ids, mask, positions, instruction, router_rungs, scores = to_host(
            input_ids, attention_mask, position_ids, instruction_mask, routing.rungs, routing.scores
        )
        prompts, prompt_of_id = prompt_starts(ids.shape, mask, positions).unique(return_inverse=True)
        per_image = prompt_of_id[ids == self.config.image_token_id]
        per_prompt = per_image.bincount(minlength=len(prompts)).tolist()
        rungs = self._rungs(
            features,
            Routing(router_rungs, scores),
            # an expanded batch's counts are fixed beforehand, and its placeholders are not its images
            images_per_prompt=per_prompt if sum(per_prompt) == len(features.views_per_image) else None,
            budget=visual_token_budget,
            rungs=visual_rungs,
        )
        encoded = self._compress(features, routing, rungs)
        return EncodedBatch(ids, mask, positions, encoded, self._is_compact(ids, encoded.lengths), instruction)

    def fuse_modalities(
        self, text: Tensor, batch: EncodedBatch, *, cached: int = 0, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text and visual tokens as the language model reads them; without pre-fusion, as they are.

        Args:
            text: Embeddings of the ids, `(B, L, text_dim)`.
            batch: The same rows on the host.
            cached: Slots in the cache. Text stays raw then; new images are fused among themselves.
            slots: Slot of each id, `(B, L)`, where `batch` has the cached ids too.

        Raises:
            ValueError: A mask of another shape.
        """
        visual = batch.encoded.values
        if self.modality_prefusion is None:
            return text, visual
        if len(batch.encoded) == 0:
            return text + self._idle_prefusion(text), visual
        ids, instruction = batch.input_ids, batch.instruction_mask
        attended = torch.ones_like(ids, dtype=torch.bool)
        if batch.attention_mask is not None:
            if batch.attention_mask.dim() != 2:
                raise ValueError(
                    f"`attention_mask` has {batch.attention_mask.dim()} dimensions; pre-fusion reads from it which "
                    "text is padding. Pass a mask of shape (batch, length)."
                )
            attended = batch.attention_mask[:, -ids.shape[1] :] != 0
        if instruction is None:
            instruction = attended
        elif instruction.shape != ids.shape:
            raise ValueError(
                f"`instruction_mask` has shape {tuple(instruction.shape)} for ids of shape {tuple(ids.shape)}. Pass "
                "one entry per id: True for instruction, False for answers and padding."
            )
        if cached:
            instruction = torch.zeros_like(attended)
            attended = attended if slots is None else attended & (slots >= cached)
        if self.config.prefusion_padding == "released":
            instruction = (instruction != 0) & (ids > 0)
        rows = build_prefusion_rows(
            batch,
            self._placeholder,
            instruction != 0,
            attended,
            fuse_visual=self.config.prefusion_variant == "released",
        )
        visual, text = self.modality_prefusion(batch.encoded.patches, visual, text, rows)
        return text, visual

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        *,
        visual_token_budget: Budget = None,
        visual_rungs: Sequence[int] | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens per image, in transformers' contract; pre-fusion, which needs a prompt, comes later.

        Returns:
            On transformers 5.x a `BaseModelOutputWithPooling` whose `pooler_output` lists one `(tokens, text_dim)` per
            image; the rest is the tower's: `last_hidden_state` `(views, tower_tokens, dim)` and, where asked for,
            `hidden_states` and `attentions`. On 4.57 that list itself.
        """
        wanted = {
            name: getattr(self.config.vision_config, name, False) if value is None else value
            for name, value in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
            )
        }
        features = self.extract_features(
            pixel_values, image_sizes, keep_outputs=True, output_attentions=wanted["output_attentions"]
        )
        encoded = self.encode_images(
            pixel_values,
            image_sizes,
            visual_token_budget=visual_token_budget,
            visual_rungs=visual_rungs,
            features=features,
        )
        per_image = list(encoded.values.split(encoded.lengths))
        if int(transformers.__version__.split(".")[0]) < 5:
            return per_image
        outputs = dict(features.tower_outputs)
        if not wanted["output_hidden_states"]:
            outputs["hidden_states"] = None
        result = BaseModelOutputWithPooling(pooler_output=per_image, **outputs)
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        *,
        encoded_images: EncodedImages | None = None,
        instruction_mask: Tensor | None = None,
        visual_token_budget: Budget = None,
        visual_rungs: Sequence[int] | Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        prefix_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> AdaptiveLlavaModelOutputWithPast | tuple:
        """Run rows of text and images.

        Args:
            input_ids: `(B, L)`, with one placeholder per image, or one per visual token.
            attention_mask: `(B, L)`; `None` attends everything, and tells packed rows apart by `position_ids`.
            pixel_values: `(num_images, 3, height, width)`, in order of the placeholders; with tiling
                `(num_images, views, 3, height, width)`.
            image_sizes: Original heights and widths, `(num_images, 2)`; only AnyRes needs them.
            encoded_images: Result of `encode_images` in place of `pixel_values`.
            instruction_mask: Text that pre-fusion takes in, `(B, L)`: prompts, not answers. `None` takes all that is
                attended. Without pre-fusion it means nothing.
            visual_token_budget: Who decides; see `resolve_rungs`.
            visual_rungs: One rung per view (without AnyRes: per image), replayed exactly.
            prefix_embeds: Visual tokens, or all, of expanded rows, `(B, K, text_dim)`; what `generate` passes.
            prefix_positions: Their slots counted from the start of the cache, `(B, K)`; -1 for none.
            position_ids: Placeholder-aligned, `(B, L)`.
            past_key_values: Cache of expanded rows.
            inputs_embeds: Text embeddings in place of `input_ids`, `(B, L, text_dim)`.
            output_attentions: Return the language model's attentions; `None` does as the config says.

        Raises:
            ValueError: Images and placeholders disagree, or budgets do not fit.
        """
        if output_attentions is not None:
            kwargs["output_attentions"] = output_attentions
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        text = inputs_embeds if inputs_embeds is not None else self.get_input_embeddings()(input_ids)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            (rows_there, slots), (rows_given, length) = attention_mask.shape, text.shape[:2]
            if rows_there != rows_given or slots < length:
                raise ValueError(
                    f"`attention_mask` covers {rows_there} rows of {slots} slots for {rows_given} rows of {length} "
                    "ids. Pass one row of the mask per row of ids, as long as these, or with cached slots before them."
                )
        layout, encoded, host_positions = None, None, position_ids
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None  # a share of a batch that got no images
        if pixel_values is not None or encoded_images is not None:
            ids = input_ids if input_ids is not None else self.ids_of_embeddings(text)
            batch = self.encode_batch(
                ids,
                attention_mask,
                position_ids,
                pixel_values,
                image_sizes,
                encoded_images=encoded_images,
                instruction_mask=instruction_mask if self.modality_prefusion is not None else None,
                visual_token_budget=visual_token_budget,
                visual_rungs=visual_rungs,
            )
            encoded, host_positions = batch.encoded, batch.position_ids
            layout = self._layout(batch, past_key_values)
            if self.training and self.modality_prefusion is not None and instruction_mask is None:
                logger.warning_once(
                    "Pre-fusion takes all text for instruction, answers too, since neither `labels` nor "
                    "`instruction_mask` reached the model; in generation it sees prompts only. Train with this "
                    "package's collator, or `mark_instruction` (GRPO), or add `instruction_mask = labels == -100`."
                )
            cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            rows = layout.splice(*self.fuse_modalities(text, batch, cached=cached))
            if batch.compact:
                attention_mask, position_ids = (
                    None if tensor is None else tensor.to(rows.device, non_blocking=True)
                    for tensor in (layout.attention_mask, layout.position_ids)
                )
                kwargs = {name: value for name, value in kwargs.items() if name not in _COMPACT_ONLY}
            else:
                layout = None
        elif prefix_embeds is not None:
            cached = 0 if past_key_values is None else past_key_values.get_seq_length()
            rows = _insert_prefix(text, prefix_embeds, prefix_positions - cached)
        else:
            check_no_images(visual_token_budget, visual_rungs)
            starts = past_key_values is None or past_key_values.get_seq_length() == 0
            joins = self.training or (starts and _is_sharded(self.vision_tower))
            rows = text + self.idle_visual_parts(text.device) + self._idle_prefusion(text) if joins else text
        kwargs.pop("mm_token_type_ids", None)
        if past_key_values is None and attention_mask is None and holds_segments(host_positions):
            kwargs["use_cache"] = False  # segments of one row share no cache, and a cache would hide them
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # count attended slots in every layout, so that rows of one cache agree
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -rows.shape[1] :]

        outputs = self.language_model(
            inputs_embeds=rows,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.hidden_states
        last_hidden_state = outputs.last_hidden_state
        if layout is not None:
            last_hidden_state = layout.gather(last_hidden_state)
            if hidden_states is not None:  # of layers that were not asked for: None
                hidden_states = tuple(state if state is None else layout.gather(state) for state in hidden_states)
        result = AdaptiveLlavaModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            **({} if encoded is None else {"image_hidden_states": encoded.values, **encoded.counts()}),
        )
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()

    def _rungs(self, features: VisionFeatures, routing: Routing, **decision: Any) -> list[int]:
        costs = image_costs(self.config.tiling, self.compressor.options, features.grid, features.images)
        return resolve_rungs(routing, costs, **decision)

    def _compress(self, features: VisionFeatures, routing: Routing, rungs: list[int]) -> EncodedImages:
        tokens = self.compressor(features, rungs)
        tokens = VisualTokens(self._project(tokens.values), tokens.lengths)
        if self.view_arrangement is not None:
            grids = [self.compressor.grid_after(features.grid, rung) for rung in rungs]
            tokens = self.view_arrangement(tokens, features.images, grids)
        encoded = EncodedImages(tokens.values, tokens.lengths, tuple(rungs), routing.scores, features.views_per_image)
        if self.modality_prefusion is None:
            return encoded
        patches = features.patches
        if features.overview is not None:
            patches = torch.cat([patches, features.overview], dim=1)
        per_image = tuple(views * patches.shape[1] for views in features.views_per_image)
        return replace(encoded, patches=self._project(patches.flatten(0, 1)), patch_lengths=per_image)

    def _project(self, tokens: Tensor) -> Tensor:
        if self.multi_modal_projector is None:
            return tokens
        # the backbones may have been loaded in different precisions; a bias keeps its own when weights are quantised
        kept = (own.dtype for own in self.multi_modal_projector.parameters() if own.is_floating_point())
        return self.multi_modal_projector(tokens.to(next(kept, tokens.dtype)))

    def _is_compact(self, input_ids: Tensor, lengths: Sequence[int]) -> bool:
        per_row = (input_ids == self.config.image_token_id).sum(1).tolist()
        if sum(per_row) == len(lengths):
            return True
        image, whole = 0, sum(per_row) == sum(lengths)
        for row, slots in enumerate(per_row):
            first = image
            while whole and slots > 0:
                slots -= lengths[image]
                image += 1
            if slots < 0:
                raise ValueError(
                    f"Row {row} of `input_ids` ends inside an image: it has {per_row[row]} placeholders for images of "
                    f"{list(lengths[first:image])} visual tokens. Use the counts of the processor, or one placeholder "
                    "per image."
                )
        if not whole:
            raise ValueError(
                f"`input_ids` has {sum(per_row)} image placeholders (by row: {per_row}), but there are {len(lengths)} "
                f"images with {sum(lengths)} visual tokens. Pass one placeholder per image, or one per visual token; "
                "truncation (`max_length`) may have cut some off."
            )
        return False

    def _layout(self, batch: EncodedBatch, past_key_values: Any) -> PlaceholderLayout:
        if not batch.compact:
            return build_layout(batch.input_ids, None, None, (1,) * sum(batch.encoded.lengths), self._placeholder)
        mask, past_mask = batch.attention_mask, None
        rows, length = batch.input_ids.shape
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` has {mask.dim()} dimensions; rows with one placeholder per image have their visual "
                "tokens added inside. Pass a mask of shape (batch, length)."
            )
        if mask is not None and mask.shape[1] not in (length, length + cached):
            raise ValueError(
                f"`attention_mask` covers {mask.shape[1]} slots for {length} ids after {cached} cached slots. "
                f"Pass {length}, or {length + cached} with the cached slots (visual tokens counted one by one)."
            )
        if cached:
            past_mask = torch.ones(rows, cached, dtype=torch.long)
            if mask is not None and mask.shape[1] > length:
                past_mask, mask = mask[:, :cached].long(), mask[:, cached:]
        return build_layout(
            batch.input_ids, mask, batch.position_ids, batch.encoded.lengths, self._placeholder, past_mask
        )

    @property
    def _placeholder(self) -> int:
        return self.config.image_token_id

    def ids_of_embeddings(self, embeddings: Tensor) -> Tensor:
        """Ids `(B, L)` for embeddings `(B, L, text_dim)`: right where a placeholder stands, and any elsewhere."""
        # placeholders are found by their embedding; every other id is unknown, and any but 0 (padding) will do
        token = torch.full((), self._placeholder, device=embeddings.device)
        is_image = (embeddings == self.get_input_embeddings()(token)).all(-1)
        other = 1 if self._placeholder != 1 else 2
        return torch.where(is_image, self._placeholder, other)

    def idle_visual_parts(self, device: torch.device) -> Tensor | float:
        """Zero, from a pass of all before pre-fusion, for rows without images: distributed processes stay in step.

        Each backward pass reaches all that learns, and each forward pass gathers a tower whose weights are sharded
        over processes (FSDP2, ZeRO-3), also a frozen one.

        Args:
            device: Where the rows are.
        """
        own = [getattr(self, name) for name in OWN_PARTS]
        tower_runs = _is_trainable(self.vision_tower) or _is_sharded(self.vision_tower)
        if not tower_runs and not any(part is not None and _is_trainable(part) for part in own):
            return 0.0
        height, width = self.config.view_grid
        if tower_runs or self.multi_block_fusion is not None:
            crops = (self.config.tiling["n"] ** 2 + 1,) if self.config.tiling["type"] == "mosaic" else ()
            pixels = torch.zeros(1, *crops, 3, *input_size(self.vision_tower), device=device)
            features = self.extract_features(pixels)
        else:
            dtype = next(self.vision_tower.parameters()).dtype
            patches = torch.zeros(1, height * width, self.config.feature_dim, device=device, dtype=dtype)
            state = patches[..., : self.config.vision_feature_dim]
            features = VisionFeatures(
                patches,
                (height, width),
                cls=state[:, 0],
                pixels=patches.new_zeros(1, 3, height, width),
                views_per_image=(1,),
                blocks=dict.fromkeys(self.router.needs_blocks, state),
                layer_cls=patches[:, 0],
            )
        routing = self.router(features)
        encoded = self._compress(features, routing, [self.compressor.num_rungs - 1])
        # each value first: their sum may overflow
        return sum((values * 0).sum().to(device) for values in (encoded.values, routing.logits) if values is not None)

    def _idle_prefusion(self, text: Tensor) -> Tensor | float:
        # the same for pre-fusion: one text embedding for a patch, in front of itself for a visual token
        if self.modality_prefusion is None:
            return 0.0
        entry, row = text.flatten(0, 1)[:1], PrefusionRows(torch.tensor([[0, 1]]), None)
        return sum((values * 0).sum() for values in self.modality_prefusion(entry, entry, text[:0], row))


class AdaptiveLlavaForConditionalGeneration(
    BackboneAssemblyMixin, AdaptiveLlavaPreTrainedModel, PlaceholderGenerationMixin
):
    """The model with its language-model head.

    Args:
        config: The architecture.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012, as above
    # of the head alone; releases name the way it is split differently
    _tp_plan = dict(LlamaForCausalLM._tp_plan)  # noqa: RUF012, as above

    def __init__(self, config: AdaptiveLlavaConfig):
        super().__init__(config)
        self.model = AdaptiveLlavaModel(config)
        self.lm_head: nn.Module = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._adopt_language_model_names()
        self.post_init()

    def _adopt_language_model_names(self) -> None:
        # where the embeddings of this language model stand, for tying; and which layers stay on one device
        decoder = self.model.language_model
        names = [name for name, module in decoder.named_modules() if module is decoder.get_input_embeddings()]
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{names[0]}.weight"}
        self._no_split_modules = self.model._no_split_modules

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model.language_model = decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def encode_images(self, *args: Any, **kwargs: Any) -> EncodedImages:
        """See `AdaptiveLlavaModel.encode_images`."""
        return self.model.encode_images(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """See `AdaptiveLlavaModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        encoded_images: EncodedImages | None = None,
        instruction_mask: Tensor | None = None,
        visual_token_budget: Budget = None,
        visual_rungs: Sequence[int] | Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        prefix_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> AdaptiveLlavaCausalLMOutputWithPast | tuple:
        """Run rows of text and images and score the next ids; arguments as in `AdaptiveLlavaModel.forward`, and:

        Args:
            labels: `(B, L)`, aligned with `input_ids`; -100 and placeholders are left out of the loss. Pre-fusion
                takes the text without label for instruction, unless `instruction_mask` is given.
            shift_labels: Targets that are already shifted, `(B, L)`: the loss is taken against them.
            logits_to_keep: Number of last positions to score, or their indices; 0 scores all.
        """
        if instruction_mask is None and labels is not None:
            instruction_mask = labels == -100
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        outputs = self.model(
            input_ids,
            attention_mask,
            pixel_values,
            image_sizes,
            encoded_images=encoded_images,
            instruction_mask=instruction_mask,
            visual_token_budget=visual_token_budget,
            visual_rungs=visual_rungs,
            prefix_embeds=prefix_embeds,
            prefix_positions=prefix_positions,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"`labels` have shape {tuple(labels.shape)} for scores of shape {tuple(logits.shape[:2])}. Pass "
                    "one label per id, and leave out `logits_to_keep`."
                )
            labels, shift_labels = (
                None if targets is None else targets.masked_fill(targets == self.config.image_token_id, -100)
                for targets in (labels, shift_labels)
            )
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                shift_labels=shift_labels,
                **loss_arguments,
            )
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        result = AdaptiveLlavaCausalLMOutputWithPast(loss=loss, logits=logits, **fields)
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self.config.compressor_trained:
            logger.warning_once(
                "This model's fusion, compressor or projector was never trained, so its answers mean nothing yet. "
                "Fine-tune it, then set `model.config.compressor_trained = True`."
            )
        if self.model.has_untrained_router and kwargs.get("visual_token_budget") in (None, "auto"):
            logger.warning_once(
                "This model's router was never trained and gives every image the most tokens. Train it with "
                "`python -m adaptive_llava train-router`, or pass `visual_token_budget`."
            )
        return super().generate(*args, **kwargs)

    generate.__doc__ = PlaceholderGenerationMixin.generate.__doc__


def _is_trainable(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _is_sharded(part: nn.Module) -> bool:
    # what FSDP2 (a DTensor) and DeepSpeed's ZeRO-3 leave of a parameter between the passes
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in part.parameters())


def _no_split_modules(*parts: nn.Module) -> set[str]:
    return {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}


def _insert_prefix(text: Tensor, prefix: Tensor, columns: Tensor) -> Tensor:
    # columns (B, K) may lie outside these rows: those go to a spare column that is cut off again
    length = text.shape[1]
    columns = torch.where((columns >= 0) & (columns < length), columns, length)
    source = torch.full((text.shape[0], length + 1), -1, device=text.device)
    source.scatter_(1, columns, torch.arange(columns.shape[1], device=text.device).expand_as(columns))
    source = source[:, :length].unsqueeze(-1)
    inserted = prefix.to(text).gather(1, source.clamp(min=0).expand(-1, -1, text.shape[-1]))
    return torch.where(source >= 0, inserted, text)


def _wants_dict(config: PretrainedConfig, return_dict: bool | None) -> bool:
    return bool(getattr(config, "return_dict", True)) if return_dict is None else return_dict
