"""Text and visual tokens fused with all patches before the language model, so that few visual tokens suffice.

Paper: modality pre-fusion of LLaVA-Mini, https://arxiv.org/abs/2501.03895: decoder layers of the language model's own
kind over patches and text; the fused text goes on, the patches end here.
Shapes: patches (P, dim), visual tokens (S, dim), text (B, L, dim) -> visual tokens (S, dim), text (B, L, dim)
At the start it changes nothing: the layers' output projections are zero. The paper does not say how it starts.
Differs from the paper's wording, as the authors' code does (`prefusion_variant="released"`): rows are [patches of all
images, their visual tokens, text], and visual tokens are fused too. With `"paper"` they neither enter nor change.
As in the authors' code: attention is causal, there is no last norm, and no gradient reaches the embeddings of fused
text. Answers and padding stay raw; there they are masked keys, here they are left out of the rows, which comes to the
same, since positions count what is attended.
Differs from the authors' code: several images in a row; a row without images stays raw whatever its companions are
(there an all-zero image is put in front of it, unless no row has one). They take ids <= 0 for padding: with
`prefusion_padding="released"` an id 0 in the text is left out too, by default the attention mask alone decides.
Padding of another id is text to them; behind all text it changes nothing, so here it is left out under both rules.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from .compressor_base import Compressor
from .encoded_images import EncodedBatch
from .placeholder_layout import prompt_starts


VARIANTS = ("released", "paper")
PADDINGS = ("attention_mask", "released")
MOST_LAYERS = 1000

# Their models are embeddings, layers and a norm, and nothing else touches the hidden states (Gemma scales them).
LANGUAGE_MODELS = ("llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3")

_OUTPUT_LAYERS = ("o_proj", "down_proj")


class ModalityPrefusion(nn.Module):
    """Decoder layers over the patches, visual tokens and text of each row.

    Args:
        text_config: Config of the language model whose kind of layer is used; every layer attends to all before it,
            also where the language model has a sliding window.
        num_layers: Number of layers.
    """

    def __init__(self, text_config: PretrainedConfig, num_layers: int):
        super().__init__()
        # a text model brings masks, rotary positions, attention back ends and gradient checkpointing with it
        self.decoder = AutoModel.from_config(_layers_alone(text_config, num_layers))
        self.decoder.set_input_embeddings(nn.Identity())
        self.decoder.norm = nn.Identity()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as the identity; the output projections learn in the first step, all else from the second on."""
        for name, parameter in self.decoder.named_parameters():
            if any(part in _OUTPUT_LAYERS for part in name.split(".")):
                nn.init.zeros_(parameter)

    def forward(self, patches: Tensor, visual: Tensor, text: Tensor, rows: PrefusionRows) -> tuple[Tensor, Tensor]:
        """Fused visual tokens and text; what is in no row comes back as it was.

        Args:
            patches: Projected patches of all images, `(P, dim)`.
            visual: Projected visual tokens of all images, `(S, dim)`.
            text: Text embeddings, `(B, L, dim)`.
            rows: What stands in which row.
        """
        states = torch.cat([visual.to(text), text.flatten(0, 1)])
        if len(rows.source):
            entering = torch.cat([patches.to(text), visual.to(text), text.detach().flatten(0, 1)])
            source = rows.source.to(text.device, non_blocking=True)
            embeds = entering.index_select(0, source.flatten()).unflatten(0, source.shape)
            mask = None if rows.attention_mask is None else rows.attention_mask.to(text.device, non_blocking=True)
            hidden = self.decoder(
                inputs_embeds=embeds.to(self.decoder.dtype), attention_mask=mask, use_cache=False
            ).last_hidden_state
            slots, places = (index.to(text.device, non_blocking=True) for index in rows.leaving(len(patches)))
            states = states.index_copy(0, places, hidden.flatten(0, 1).to(states).index_select(0, slots))
        return states[: len(visual)], states[len(visual) :].view_as(text)


@dataclass(frozen=True, eq=False)
class PrefusionRows:
    """Index tensors on the host: one row per prompt with images, padded on the right.

    Attributes:
        source: For each slot an index into all patches, then all visual tokens, then all `B * L` text embeddings,
            `(rows, T)`; padding points at 0, a patch.
        attention_mask: `(rows, T)`, or `None` if no row is padded.
    """

    source: Tensor
    attention_mask: Tensor | None

    def leaving(self, num_patches: int) -> tuple[Tensor, Tensor]:
        """Slots of what comes out fused, among `rows * T`, and their places among visual tokens and text."""
        source = self.source.flatten()
        slots = (source >= num_patches).nonzero().squeeze(1)
        return slots, source[slots] - num_patches


def build_prefusion_rows(
    batch: EncodedBatch, image_token_id: int, instruction: Tensor, attended: Tensor, *, fuse_visual: bool = True
) -> PrefusionRows:
    """Say what is fused with what: the images and text of a prompt, or of one segment of packed rows.

    Args:
        batch: Prompts on the host beside their encoded images, with patches.
        image_token_id: Id of the placeholder.
        instruction: Text that enters and leaves, `(B, L)`.
        attended: Ids that count, `(B, L)`; an image elsewhere stays raw.
        fuse_visual: Whether visual tokens stand between patches and text, as in the authors' code and weights.
    """
    ids, encoded = batch.input_ids, batch.encoded
    places = (ids == image_token_id).flatten().nonzero().squeeze(1)
    if not batch.compact:  # an image stands where its first token does
        lengths = torch.tensor(encoded.lengths, dtype=torch.long)
        places = places[lengths.cumsum(0) - lengths]
    prompt = prompt_starts(ids.shape, batch.attention_mask, batch.position_ids).flatten().contiguous()
    kept = attended.flatten()[places]
    keys, row_of_image = torch.unique_consecutive(prompt[places[kept]], return_inverse=True)
    if len(keys) == 0:
        return PrefusionRows(torch.empty(0, 0, dtype=torch.long), None)
    rows_of_images = torch.full((len(places),), -1).masked_scatter(kept, row_of_image)
    rows_of_text = torch.searchsorted(keys, prompt).clamp(max=len(keys) - 1)
    enters = (instruction & attended & (ids != image_token_id)).flatten() & (keys[rows_of_text] == prompt)
    rows_of_patches, rows_of_visual = (
        rows_of_images.repeat_interleave(torch.tensor(lengths)) for lengths in (encoded.patch_lengths, encoded.lengths)
    )
    if not fuse_visual:
        rows_of_visual = torch.full_like(rows_of_visual, -1)
    # what stands in no row comes first; within a row, patches, visual tokens and text keep this order
    row = torch.cat([rows_of_patches, rows_of_visual, rows_of_text.where(enters, -1)])
    order = row.argsort(stable=True)[(row < 0).sum() :]
    filled = row[order].bincount(minlength=len(keys))
    source = torch.zeros(len(keys), int(filled.max()), dtype=torch.long)
    slots = torch.arange(source.shape[1]) < filled.unsqueeze(1)
    source[slots] = order
    return PrefusionRows(source, None if bool(slots.all()) else slots.long())


def check_prefusion(
    layers: Any, variant: Any, padding: Any, text_config: PretrainedConfig, compressor: Compressor
) -> None:
    """Refuse a pre-fusion that cannot be built.

    Raises:
        ValueError: Not a number of layers, an unknown variant or padding rule, a language model whose layers cannot
            stand alone, or a compressor without a projector that takes patches.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise ValueError(
            f"`prefusion_layers={layers!r}` must be a whole number of layers, up to {MOST_LAYERS}; 0 is none."
        )
    for name, value, known in (("variant", variant, VARIANTS), ("padding", padding, PADDINGS)):
        if value not in known:
            raise ValueError(f"`prefusion_{name}={value!r}` is unknown. Pass one of: {', '.join(known)}.")
    if layers == 0:
        return
    if text_config.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"`prefusion_layers={layers}` takes layers of the language model's kind, and those of "
            f"{text_config.model_type!r} are not known to work on their own. Use one of {', '.join(LANGUAGE_MODELS)}, "
            "or `prefusion_layers=0`."
        )
    if compressor.projects or compressor.output_dim != compressor.input_dim:
        raise ValueError(
            f"`prefusion_layers={layers}` reads patches through the projector, and the one behind the compressor "
            f"{compressor.type_name!r} takes no patches (it {_projector_of(compressor)}). Use a compressor whose "
            "tokens are as wide as patches, or `prefusion_layers=0`."
        )


def _projector_of(compressor: Compressor) -> str:
    if compressor.projects:
        return "is part of the compressor"
    return f"reads {compressor.output_dim} channels where a patch has {compressor.input_dim}"


def _layers_alone(text_config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    config = copy.deepcopy(text_config)
    config.num_hidden_layers = num_layers
    config.vocab_size = 1  # the embeddings are taken out again
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    config.sliding_window = None
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * num_layers
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = False
    return config
