"""More tokens where neighbouring patches differ: the rule of DFMR.

Paper: LLaVA-Zip, https://arxiv.org/abs/2412.08771, section 3. No code was published and the paper leaves the statistic
and the stopping rule open; here a view gets the fewest tokens whose windows are even enough: the lowest rung at which
the mean standard deviation inside a window (per channel, biased, in fp32, then over windows and channels) is at most
the rung's threshold.
Shapes: (V, height * width, dim) -> rungs (V,)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressor_base import Compressor, patch_windows, window_means
from .option_schema import whole_numbers
from .router_base import Router
from .visual_token_geometry import window_grid
from .visual_tokens import Routing, VisionFeatures


_PAPER_THRESHOLD = 0.05


class FeatureStdRouter(Router):
    """Choose by the spread of the features inside pooling windows.

    Thresholds are in units of the features, which differ from tower to tower: calibrate them on your own images with
    `python -m adaptive_llava calibrate`.

    Args:
        dim: Width of one hidden state of the vision tower.
        compressor: The compressor whose rungs are chosen.
        windows: Side of the window judged for each rung but the top one, in patches, rung 0 first. Default: the
            compressor's pooling factors, or 2 for each where it does not pool.
        thresholds: Largest spread at which a rung is accepted, one per window. Default: 0.05 each, as in the paper.
    """

    type_name = "feature_std"

    def __init__(
        self,
        dim: int,
        compressor: Compressor,
        *,
        windows: Sequence[int] | None = None,
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__(dim, compressor)
        cuts = self.num_rungs - 1
        if windows is None:
            windows = compressor.pool_factors[:-1] if compressor.pool_factors else (2,) * cuts
        if thresholds is None:
            thresholds = (_PAPER_THRESHOLD,) * cuts
        for name, values in (("windows", windows), ("thresholds", thresholds)):
            if not isinstance(values, (list, tuple)) or len(values) != cuts:
                raise ValueError(
                    f"`router.{name}={values!r}` must be a list of {cuts}: one entry per rung but the top one of a "
                    f"compressor with {self.num_rungs} token counts."
                )
        self.windows = whole_numbers("router.windows", windows, minimum=2) if cuts else ()
        if any(isinstance(t, bool) or not isinstance(t, (int, float)) or not t >= 0 for t in thresholds):
            raise ValueError(
                f"`router.thresholds={list(thresholds)!r}` must be numbers >= 0, in units of the features."
            )
        self.thresholds = tuple(float(threshold) for threshold in thresholds)

    def check_grid(self, grid: tuple[int, int]) -> None:
        for window in self.windows:
            window_grid(grid, window, name="router.windows")

    def window_spread(self, features: VisionFeatures) -> Tensor:
        """The statistic that the thresholds cut, `(V, num_rungs - 1)` in fp32, rung 0 first."""
        spread = {window: _window_std(features, window) for window in set(self.windows)}
        views = features.patches.shape[0]
        if not self.windows:
            return torch.zeros(views, 0, device=features.patches.device)
        return torch.stack([spread[window] for window in self.windows], dim=1)

    @torch.no_grad()
    def forward(self, features: VisionFeatures) -> Routing:
        spread = self.window_spread(features)
        if not self.windows:
            return Routing(spread.new_zeros(spread.shape[0], dtype=torch.long), spread.new_zeros(spread.shape[0]))
        return Routing(self.rungs_of(spread), spread.mean(dim=1))

    def rungs_of(self, spread: Tensor) -> Tensor:
        """Lowest rung whose threshold the spread keeps, else the top: `(V, num_rungs - 1)` -> `(V,)`."""
        thresholds = torch.tensor(self.thresholds).to(spread.device, non_blocking=True)
        accepted = spread <= thresholds
        # argmax finds the first accepted rung; a column of True behind the last stands for the top rung
        accepted = torch.cat([accepted, accepted.new_ones(accepted.shape[0], 1)], dim=1)
        return accepted.long().argmax(dim=1)


def _window_std(features: VisionFeatures, window: int) -> Tensor:
    window_grid(features.grid, window, name="router.windows")
    windows = patch_windows(features.patches, features.grid, window).float()
    deviations = windows - window_means(windows)[:, :, None, :, None]
    return window_means(deviations.square()).sqrt().mean(dim=(1, 2, 3))
