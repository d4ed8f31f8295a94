"""Neighbouring patches joined along the channels: fewer, wider tokens.

Paper: the TokenConcat baseline of LLaVA-STF, https://arxiv.org/abs/2506.07138; 2x2 windows, 576 -> 144 tokens.
Shapes: (V, height * width, dim) -> (V, (height // window) * (width // window), window * window * dim)

A token lists each channel's window in row-major order (channel slowest), so that a linear layer on it is a
convolution with its weight reshaped to (out, dim, window, window).
"""

from __future__ import annotations

from torch import Tensor

from .compressor_base import Compressor, joined_windows
from .option_schema import whole_numbers
from .visual_token_geometry import window_grid
from .visual_tokens import VisionFeatures


class TokenConcatCompressor(Compressor):
    """Concatenate the patches of non-overlapping square windows.

    Args:
        dim: Width of the vision features.
        text_dim: Width of the language model.
        window: Side of a window, in patches.
        strict_tiling: Refuse a grid that the window does not divide, instead of dropping trailing patches.
    """

    type_name = "token_concat"

    def __init__(self, dim: int, text_dim: int, *, window: int = 2, strict_tiling: bool = False):
        super().__init__(dim, text_dim)
        (self.window,) = whole_numbers("compressor.window", [window], minimum=1)
        self.strict_tiling = strict_tiling
        self.output_dim = self.window * self.window * dim

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int]:
        return window_grid(grid, self.window, strict=self.strict_tiling)

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        return joined_windows(features.patches, features.grid, self.window)
