"""What a forward pass returns: outputs of transformers, and what was spent on each image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class AdaptiveLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs aligned with `input_ids (B, L)`; at a placeholder stands the state of the image's last visual token.

    Attributes:
        last_hidden_state: `(B, L, text_dim)`.
        hidden_states: One `(B, L, text_dim)` per layer, if asked for.
        attentions: Over the expanded rows the language model saw, `(B, heads, T, T)`.
        past_key_values: Cache of the expanded rows.
        image_hidden_states: Visual tokens, `(sum(num_visual_tokens), text_dim)`.
        num_visual_tokens: `(num_images,)`.
        visual_rungs: `(num_views,)`.
        visual_router_scores: `(num_views,)`, higher deserves more tokens.
    """

    image_hidden_states: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    visual_rungs: Tensor | None = None
    visual_router_scores: Tensor | None = None


@dataclass
class AdaptiveLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Like `AdaptiveLlavaModelOutputWithPast`, with `loss` and `logits (B, L, vocabulary)`."""

    image_hidden_states: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    visual_rungs: Tensor | None = None
    visual_router_scores: Tensor | None = None
