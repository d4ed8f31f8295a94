"""From compressed vision features to the language model's width.

Paper: LLaVA-1.5, https://arxiv.org/abs/2310.03744: two linear layers with a GELU between.
Shapes: (..., dim) -> (..., text_dim)
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .compressor_base import Compressor
from .configuration_adaptive_llava import AdaptiveLlavaConfig


class AdaptiveLlavaProjector(nn.Module):
    """LLaVA's two-layer projector: `(..., dim)` -> `(..., text_dim)`.

    Args:
        dim: Width of the compressor's tokens.
        text_dim: Width of the language model.
        hidden_act: Activation between the layers.
        bias: Whether the layers have biases.
    """

    def __init__(self, dim: int, text_dim: int, *, hidden_act: str = "gelu", bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(dim, text_dim, bias=bias)
        self.act = ACT2FN[hidden_act]
        self.linear_2 = nn.Linear(text_dim, text_dim, bias=bias)

    @classmethod
    def from_config(cls, config: AdaptiveLlavaConfig, compressor: Compressor) -> AdaptiveLlavaProjector | None:
        """The projector behind a compressor; `None` if that one's tokens are as wide as the language model already."""
        if compressor.projects:
            return None
        return cls(
            compressor.output_dim,
            config.text_config.hidden_size,
            hidden_act=config.projector_hidden_act,
            bias=config.multimodal_projector_bias,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(tokens)))
