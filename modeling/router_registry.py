"""All routers by type name."""

from __future__ import annotations

from .router_base import Router
from .router_classifier import ClassifierRouter
from .router_feature_std import FeatureStdRouter
from .router_fixed import FixedRouter
from .router_pixel_std import PixelStdRouter
from .router_random import RandomRouter


ROUTERS: dict[str, type[Router]] = {
    "fixed": FixedRouter,
    "random": RandomRouter,
    "feature_std": FeatureStdRouter,
    "classifier": ClassifierRouter,
    "pixel_std": PixelStdRouter,
}
