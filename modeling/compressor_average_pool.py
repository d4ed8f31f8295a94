"""Average pooling of the patch grid by one of several factors.

Paper: LLaVA-Zip (DFMR), https://arxiv.org/abs/2412.08771, section 3: factors 1, 2 and 3 give 576, 144 and 64 tokens
of a 24x24 grid. With one factor it is the AvgPool baseline of LLaVA-STF.
Shapes: (V, height * width, dim) -> (V, (height // factor) * (width // factor), dim)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .compressor_base import Compressor, patch_windows, window_means
from .option_schema import whole_numbers
from .visual_token_geometry import window_grid
from .visual_tokens import VisionFeatures


class AveragePoolCompressor(Compressor):
    """Mean of non-overlapping square windows.

    Args:
        dim: Width of the vision features.
        text_dim: Width of the language model.
        factors: Sides of the pooling windows, in patches, strictly rising; the largest is rung 0.
        strict_tiling: Refuse a grid that a factor does not divide, instead of dropping trailing patches.
    """

    type_name = "average_pool"

    def __init__(self, dim: int, text_dim: int, *, factors: Sequence[int] = (1, 2, 3), strict_tiling: bool = False):
        super().__init__(dim, text_dim)
        self.factors = whole_numbers("compressor.factors", factors, minimum=1)
        if list(self.factors) != sorted(set(self.factors)):
            raise ValueError(
                f"`compressor.factors={list(factors)!r}` must rise strictly. Name each factor once, the smallest "
                f"first, like {sorted(set(self.factors))}."
            )
        self.strict_tiling = strict_tiling
        self.num_rungs = len(self.factors)
        self.pool_factors = tuple(reversed(self.factors))

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int]:
        return window_grid(grid, self.pool_factors[rung], strict=self.strict_tiling, name="factors")

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        factor = self.pool_factors[rung]
        if factor == 1:
            return features.patches
        return window_means(patch_windows(features.patches, features.grid, factor)).flatten(1, 2)
