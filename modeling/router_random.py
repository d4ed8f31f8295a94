"""A random token count per image in training: the baseline that needs no decision.

Paper: the random-pooling baseline of LLaVA-Zip, https://arxiv.org/abs/2412.08771, section 4.
"""

from __future__ import annotations

import torch

from .router_base import Router
from .visual_tokens import Routing, VisionFeatures


class RandomRouter(Router):
    """Uniform over the rungs in training, from PyTorch's global CPU generator; the top rung at inference."""

    type_name = "random"

    def forward(self, features: VisionFeatures) -> Routing:
        views, device = features.patches.shape[0], features.patches.device
        if self.training:
            rungs = torch.randint(self.num_rungs, (views,)).to(device, non_blocking=True)
        else:
            rungs = torch.full((views,), self.num_rungs - 1, device=device)
        return Routing(rungs, rungs.float())
