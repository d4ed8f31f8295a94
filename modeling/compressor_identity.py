"""All patches become visual tokens, as in LLaVA-1.5.

Paper: Improved Baselines with Visual Instruction Tuning, https://arxiv.org/abs/2310.03744
Shapes: (V, height * width, dim) -> (V, height * width, dim)
"""

from __future__ import annotations

from torch import Tensor

from .compressor_base import Compressor
from .visual_tokens import VisionFeatures


class IdentityCompressor(Compressor):
    """Keep every patch; the ladder has the one rung `height * width`."""

    type_name = "identity"

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int]:
        return grid

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        return features.patches
