"""More tokens where neighbouring patches differ: the rule of DFMR.

Paper: LLaVA-Zip, https://arxiv.org/abs/2412.08771, section 3. No code was published and the paper leaves the statistic
and the stopping rule open; here a view gets the fewest tokens whose windows are even enough: the lowest rung at which
the mean standard deviation inside a window (per channel, biased, in fp32, then over windows and channels) is at most
the rung's threshold.
Shapes: (V, height * width, dim) -> rungs (V,)
"""

from __future__ import annotations

from collections.abc import Sequence

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
        return [_window_std(features, window) for window in windows]


def _window_std(features: VisionFeatures, window: int) -> Tensor:
    window_grid(features.grid, window, name="router.windows")
    windows = patch_windows(features.patches, features.grid, window).float()
    deviations = windows - window_means(windows)[:, :, None, :, None]
    return window_means(deviations.square()).sqrt().mean(dim=(1, 2, 3))
