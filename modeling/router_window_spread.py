"""Routers that give more tokens where an image varies inside windows, cut at thresholds.

Shapes: a statistic (V, num_rungs - 1), rung 0 first -> rungs (V,)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressor_base import Compressor
from .option_schema import whole_numbers
from .router_base import Router
from .visual_token_geometry import window_grid
from .visual_tokens import Routing, VisionFeatures


_PAPER_THRESHOLD = 0.05


class WindowSpreadRouter(Router):
    """Choose the lowest rung whose windows are even enough, else the top one.

    A view whose features are not finite gets the most tokens, and the highest score there is.

    A subclass says what is measured in `spreads`. Thresholds are in its units: calibrate them on your own images with
    `python -m adaptive_llava calibrate`.

    A spread that meets a threshold but for rounding may fall on either side of it: in another batch within 0.001 %, in
    bfloat16 within 3 %, on pixels that torchvision read in place of PIL within 0.2 %.

    Attributes:
        smallest_window: Smallest side of a window that can show a spread, in patches.

    Args:
        dim: Width of one hidden state of the vision tower.
        compressor: The compressor whose rungs are chosen.
        windows: Side of the window judged for each rung but the top one, in patches, rung 0 first. Default: the
            compressor's pooling factors, or 2 for each where it does not pool.
        thresholds: Largest spread at which a rung is accepted, one per window. Default: 0.05 each, as in the paper
            of DFMR.
    """

    smallest_window: int = 2

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
        self.windows = whole_numbers("router.windows", windows, minimum=self.smallest_window) if cuts else ()
        if any(isinstance(t, bool) or not isinstance(t, (int, float)) or not t >= 0 for t in thresholds):
            raise ValueError(
                f"`router.thresholds={list(thresholds)!r}` must be numbers >= 0, in units of what "
                f"{self.type_name!r} measures. Choose them with `python -m adaptive_llava calibrate`."
            )
        self.thresholds = tuple(float(threshold) for threshold in thresholds)

    def check_grid(self, grid: tuple[int, int], image_size: tuple[int, int] | None = None) -> None:
        for window in self.windows:
            window_grid(grid, window, name="router.windows")

    def spreads(self, features: VisionFeatures, windows: Sequence[int]) -> list[Tensor]:
        """Mean standard deviation inside windows of each side, `(V,)` in fp32 per side."""
        raise NotImplementedError

    def window_spread(self, features: VisionFeatures) -> Tensor:
        """The statistic that the thresholds cut, `(V, num_rungs - 1)` in fp32, rung 0 first."""
        views = features.patches.shape[0]
        if not self.windows:
            return torch.zeros(views, 0, device=features.patches.device)
        sides = sorted(set(self.windows))
        spread = dict(zip(sides, self.spreads(features, sides), strict=True))
        return torch.stack([spread[window] for window in self.windows], dim=1)

    @torch.no_grad()
    def forward(self, features: VisionFeatures) -> Routing:
        spread = self.window_spread(features)
        # added one by one: the same bits on every device, and in the processor
        scores = sum(spread.unbind(1), spread.new_zeros(spread.shape[0])) / max(len(self.windows), 1)
        largest = torch.finfo(scores.dtype).max
        return Routing(self.rungs_of(spread), scores.where(scores.isfinite(), largest))

    def rungs_of(self, spread: Tensor) -> Tensor:
        """Lowest rung whose threshold the spread keeps, else the top: `(V, num_rungs - 1)` -> `(V,)`."""
        thresholds = torch.tensor(self.thresholds, dtype=spread.dtype).to(spread.device, non_blocking=True)
        accepted = spread <= thresholds
        # argmax finds the first accepted rung; a column of True behind the last stands for the top rung
        accepted = torch.cat([accepted, accepted.new_ones(accepted.shape[0], 1)], dim=1)
        return accepted.long().argmax(dim=1)
