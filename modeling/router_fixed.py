"""The same token count for every image."""

from __future__ import annotations

import torch

from .compressor_base import Compressor
from .router_base import Router
from .visual_tokens import Routing, VisionFeatures


class FixedRouter(Router):
    """Give every view the same rung.

    Args:
        dim: Width of one hidden state of the vision tower.
        compressor: The compressor whose rungs are chosen.
        rung: Index into the compressor's ladder; negative counts from the top, -1 being the most tokens.
    """

    type_name = "fixed"

    def __init__(self, dim: int, compressor: Compressor, *, rung: int = -1):
        super().__init__(dim, compressor)
        if isinstance(rung, bool) or not isinstance(rung, int) or not -self.num_rungs <= rung < self.num_rungs:
            raise ValueError(
                f"`router.rung={rung!r}` is no rung of a compressor with {self.num_rungs}. "
                f"Use a whole number from {-self.num_rungs} to {self.num_rungs - 1}."
            )
        self.rung = rung

    def forward(self, features: VisionFeatures) -> Routing:
        views, device = features.patches.shape[0], features.patches.device
        rungs = torch.full((views,), self.rung % self.num_rungs, device=device)
        return Routing(rungs, torch.zeros(views, device=device))
