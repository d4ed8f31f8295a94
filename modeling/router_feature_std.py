"""More tokens where neighbouring patches differ: the rule of DFMR.

Paper: LLaVA-Zip, https://arxiv.org/abs/2412.08771, section 3. No code was published and the paper leaves the statistic
and the stopping rule open; here a view gets the fewest tokens whose windows are even enough: the lowest rung at which
the mean standard deviation inside a window (per channel, biased, in fp32, then over windows and channels) is at most
the rung's threshold.
Shapes: (V, height * width, dim) -> rungs (V,)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .compressor_base import patch_windows, window_means
from .router_window_spread import WindowSpreadRouter
from .visual_token_geometry import window_grid
from .visual_tokens import VisionFeatures


class FeatureStdRouter(WindowSpreadRouter):
    """Choose by the spread of the features inside pooling windows.

    Thresholds are in units of the features, which differ from tower to tower.
    """

    type_name = "feature_std"

    def spreads(self, features: VisionFeatures, windows: Sequence[int]) -> list[Tensor]:
        patches = features.patches.float()
        return [_window_std(patches, features.grid, window) for window in windows]


def _window_std(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    window_grid(grid, window, name="router.windows")
    windows = patch_windows(patches, grid, window)
    means = window_means(windows)[:, :, None, :, None].expand_as(windows)
    squares = F.mse_loss(windows, means, reduction="none")  # subtracts and squares in one pass
    return window_means(squares).sqrt().mean(dim=(1, 2, 3))
