"""Neighbouring patches fused by a learned convolution: fewer tokens, as wide as the language model.

Paper: Spatial Token Fusion of LLaVA-STF, https://arxiv.org/abs/2506.07138; 2x2 windows, 576 -> 144 tokens.
Shapes: (V, height * width, dim) -> (V, (height // window) * (width // window) * fused_tokens, text_dim)

A window is joined channel by channel, as `token_concat` does it, so that every layer here is a linear layer, and the
first one a convolution of kernel and stride `window` with its weight flattened. It stands in place of the projector.
Differs from the paper, as the authors' code does (`variant="released"`): two layers with one GELU between, the hidden
one four times as wide as the joined window (16C at window 2), where the paper has a convolution and two 1x1
convolutions with a GELU after each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .compressor_base import Compressor, averaging_weight, joined_windows
from .option_schema import whole_numbers
from .visual_token_geometry import window_grid
from .visual_tokens import VisionFeatures


VARIANTS = ("released", "linear", "paper")


class SpatialFusionCompressor(Compressor):
    """Fuse the patches of non-overlapping square windows, each into one or a few tokens.

    With `joined = window * window * dim` and `group = joined / fused_tokens`, the layers are:
    `"released"`: group -> 4 group, GELU, -> text_dim, as in the authors' weights; `"linear"`: group -> text_dim, their
    other projector; `"paper"`: joined -> joined (the convolution), GELU, then group -> text_dim, GELU, -> text_dim,
    GELU. Of these widths the paper gives the convolution's; for the two others LLaVA's projector is followed.

    Args:
        dim: Width of the vision features.
        text_dim: Width of the language model.
        window: Side of a window, in patches.
        fused_tokens: Tokens of a window. Each sees an equal share of the channels, of all its patches, as in the
            authors' code, where no released model uses it; the tokens of a window stand side by side.
        variant: `"released"`, `"linear"` or `"paper"`.
        strict_tiling: Refuse a grid that the window does not divide, instead of dropping trailing patches.
    """

    type_name = "spatial_fusion"
    projects = True

    def __init__(
        self,
        dim: int,
        text_dim: int,
        *,
        window: int = 2,
        fused_tokens: int = 1,
        variant: str = "released",
        strict_tiling: bool = False,
    ):
        super().__init__(dim, text_dim)
        (self.window,) = whole_numbers("compressor.window", [window], minimum=1)
        (self.fused_tokens,) = whole_numbers("compressor.fused_tokens", [fused_tokens], minimum=1)
        if dim % self.fused_tokens:
            raise ValueError(
                f"`compressor.fused_tokens={fused_tokens}` cannot cut the {dim} channels of a patch into equal "
                f"groups. Use a divisor of {dim}."
            )
        if variant not in VARIANTS:
            raise ValueError(f"`compressor.variant={variant!r}` is unknown. Pass one of: {', '.join(VARIANTS)}.")
        self.variant = variant
        self.strict_tiling = strict_tiling
        joined = self.window * self.window * dim
        group = joined // self.fused_tokens
        hidden = {"released": 4 * group, "linear": None, "paper": text_dim}[variant]
        self.convolution = nn.Linear(joined, joined) if variant == "paper" else None
        self.linear_1 = nn.Linear(group, text_dim if hidden is None else hidden)
        self.linear_2 = None if hidden is None else nn.Linear(hidden, text_dim)
        self.activation = nn.GELU()

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int] | None:
        return window_grid(grid, self.window, strict=self.strict_tiling) if self.fused_tokens == 1 else None

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        windows = joined_windows(features.patches, features.grid, self.window)
        # the backbones may have been loaded in different precisions; a bias keeps its own when weights are quantised
        windows = windows.to(self.linear_1.bias.dtype)
        if self.convolution is not None:
            windows = self.activation(self.convolution(windows))
        # (V, windows, fused_tokens * group) -> (V, windows * fused_tokens, group): a group is a run of channels
        groups = windows.unflatten(2, (self.fused_tokens, -1)).flatten(1, 2)
        tokens = self.linear_1(groups)
        if self.linear_2 is not None:
            tokens = self.linear_2(self.activation(tokens))
        return self.activation(tokens) if self.variant == "paper" else tokens

    @torch.no_grad()
    def warm_start(self, projector: nn.Module) -> bool:
        """Become average pooling in front of a trained projector, which is a special case of the released layers.

        The projector takes the first rows of the hidden layer; the others keep their start and feed nothing yet.
        """
        first: Any = projector.linear_1
        second: Any = projector.linear_2
        rows = first.out_features
        fits = (
            self.variant == "released"
            and self.fused_tokens == 1
            and isinstance(projector.act, GELUActivation)
            and first.in_features == self.input_dim
            and rows <= self.linear_1.out_features
        )
        if self.linear_2 is None or not fits:
            return False
        self.linear_1.weight[:rows] = averaging_weight(first.weight, self.window * self.window)
        self.linear_2.weight.zero_()
        self.linear_2.weight[:, :rows] = second.weight
        self.linear_1.bias[:rows] = 0 if first.bias is None else first.bias
        self.linear_2.bias[:] = 0 if second.bias is None else second.bias
        return True
