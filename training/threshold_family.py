"""All thresholds of a router as one dial, from the most tokens to the fewest.

A family reads a statistic of each image and turns a wanted mean count into a setting of the router. Settings are
chosen on some images and applied to others. Shapes: statistic (n, k), float32; rungs (n,).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.modeling.router_window_spread import WindowSpreadRouter
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.count_price import price_for, shares_of_largest
from adaptive_llava.training.router_fit import route
from adaptive_llava.training.threshold_search import rungs_at, thresholds_for_mean


Setting = tuple[float, ...]


class ThresholdFamily:
    """A router's thresholds as one dial.

    Attributes:
        name: What the numbers of a setting are.
        in_weights: Whether a setting is kept in the router's weights, and not in its options.
    """

    name = "thresholds"
    in_weights = False

    def __init__(self, router: Any, counts: Sequence[int]):
        self.router, self.counts = router, tuple(counts)

    def statistic(self, features: VisionFeatures) -> Tensor:
        """What decides, `(views, k)`, in fp32."""
        raise NotImplementedError

    def setting(self, statistic: np.ndarray, target: float) -> Setting:
        """The setting that gives images of this statistic a mean nearest to `target` tokens."""
        raise NotImplementedError

    def rungs(self, statistic: np.ndarray, setting: Setting) -> np.ndarray:
        """What a router with this setting chooses."""
        raise NotImplementedError

    def put_into(self, router: nn.Module, setting: Setting) -> None:
        """Let a router choose by this setting."""
        raise NotImplementedError


class SpreadThresholds(ThresholdFamily):
    """Of routers that cut the spread in windows: each threshold is the same quantile of its own statistic."""

    def statistic(self, features: VisionFeatures) -> Tensor:
        return self.router.window_spread(features)

    def setting(self, statistic: np.ndarray, target: float) -> Setting:
        return tuple(thresholds_for_mean(statistic, self.counts, target)[0])

    def rungs(self, statistic: np.ndarray, setting: Setting) -> np.ndarray:
        return rungs_at(statistic, setting)

    def put_into(self, router: Any, setting: Setting) -> None:
        router.thresholds = setting


class ClassifierThreshold(SpreadThresholds):
    """Of a classifier with two counts: the probability above which an image gets the larger one."""

    def statistic(self, features: VisionFeatures) -> Tensor:
        return self.router(features).scores[:, None].float()

    def setting(self, statistic: np.ndarray, target: float) -> Setting:
        return tuple(min(cut, 1.0) for cut in super().setting(statistic, target))

    def put_into(self, router: Any, setting: Setting) -> None:
        router.threshold = setting[0]


class ClassifierPrice(ThresholdFamily):
    """Of a classifier with more counts: the price of the largest count in log-probability.

    A rung's price is in proportion to its count and is taken off its logit, that is, off the last layer's bias. The
    setting is added to the prices that the biases may already hold.
    """

    name = "price of all tokens"
    in_weights = True

    def statistic(self, features: VisionFeatures) -> Tensor:
        return self.router.inputs(features)

    @torch.no_grad()
    def setting(self, statistic: np.ndarray, target: float) -> Setting:
        device = self.router.linear_1.weight.device
        logits = self.router.logits(torch.from_numpy(statistic).to(device)).double().cpu().numpy()
        return (price_for(logits, self.counts, target),)

    def rungs(self, statistic: np.ndarray, setting: Setting) -> np.ndarray:
        priced = copy.deepcopy(self.router)
        self.put_into(priced, setting)
        return route(priced, statistic)[0]

    @torch.no_grad()
    def put_into(self, router: Any, setting: Setting) -> None:
        prices = torch.from_numpy(setting[0] * shares_of_largest(self.counts))
        router.linear_2.bias.sub_(prices.to(router.linear_2.bias))


def threshold_family(router: nn.Module, counts: Sequence[int]) -> ThresholdFamily:
    """The family of a model's router.

    Args:
        router: The router.
        counts: Token counts of its rungs, fewest first.

    Raises:
        ValueError: A router that has nothing to set, or one count only; the routers that can be set are named.
    """
    if len(counts) > 1 and isinstance(router, WindowSpreadRouter):
        return SpreadThresholds(router, counts)
    if len(counts) > 1 and isinstance(router, ClassifierRouter):
        return (ClassifierThreshold if len(counts) == 2 else ClassifierPrice)(router, counts)
    known = sorted(name for name, kind in ROUTERS.items() if issubclass(kind, (WindowSpreadRouter, ClassifierRouter)))
    raise ValueError(
        f"The model's router of type {getattr(router, 'type_name', type(router).__name__)!r}, with token counts "
        f"{list(counts)}, has no thresholds to set. Routers that have, with several counts: {', '.join(known)}."
    )
