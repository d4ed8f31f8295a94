"""Rows of what stands between tower and language model: its share of the tower's time, and batches of mixed rungs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import Workload
from adaptive_llava.training.flop_counts import compressor_flops, vision_tower_flops


_IMAGES = 8


def dfmr_share(work: Workload) -> Measurement:
    """Router and pooling over three images that go to the three rungs, as a share of the tower."""
    model, pixels = work.dfmr.model, work.pixels(3)
    with torch.no_grad():
        features = model.extract_features(pixels)
    route_and_pool = _routed(model, features, [0, 1, 2])
    pairs = work.time(route_and_pool, lambda: model.vision_tower(pixels))
    reads = _count(route_and_pool, reading=features.patches.numel() // len(pixels))
    what = f"DFMR routing + pooling of {work.patches} patches / vision tower"
    bar = 0.005 if work.device == "cpu" else 0.01
    return Measurement(what, pairs, "s", 0.0, bar, notes={"operators_that_read_all_patches": reads})


def spatial_fusion_share(work: Workload) -> Measurement:
    """Spatial token fusion in the paper's form, as a share of the tower."""
    model = work.model("stf", compressor={"type": "spatial_fusion", "variant": "paper"}).model
    return _share_of_tower(work, "spatial fusion, the paper's form", model, 0)


def resampler_share(work: Workload, rung: int) -> Measurement:
    """The query resampler at its first or second count, as a share of the tower."""
    model = work.model("dynamic-resampler").model
    return _share_of_tower(work, f"query resampler at {model.config.visual_token_counts[rung]}", model, rung)


def _share_of_tower(work: Workload, what: str, model: Any, rung: int) -> Measurement:
    images = work.batch
    features, pixels = work.features(images), work.pixels(images)
    pairs = work.time(lambda: model.compressor.compress(features, rung), lambda: model.vision_tower(pixels))
    flops = compressor_flops(model.compressor, features.grid, rung, images)
    limit = flops / vision_tower_flops(work.vision, images)
    return Measurement(f"{what}, {work.patches} patches / vision tower", pairs, "s", limit, 1.5 * limit)


def mixed_rungs(work: Workload, preset: str) -> Measurement:
    """Router and compressor over a batch of mixed rungs, over the same image by image."""
    model, features, rungs = _mixed(work, preset, _IMAGES)
    alone = [_routed(model, features.select([view]), [rung]) for view, rung in enumerate(rungs)]
    pairs = work.time(_routed(model, features, rungs), lambda: [run() for run in alone])
    return Measurement(f"{preset}: {_IMAGES} images of mixed counts at once / one by one", pairs, "s", 1.0, 1.0)


def operators_of_a_batch(work: Workload, preset: str) -> Measurement:
    """Operators called for many images, over those for few: equal unless something loops over images."""
    counts = [_count(_routed(*_mixed(work, preset, images))) for images in (4 * _IMAGES, _IMAGES)]
    what = f"{preset}: operators called for {4 * _IMAGES} images / for {_IMAGES}"
    return Measurement(what, [(counts[0], counts[1])], "operators", 1.0, 1.0, exact=True)


def _mixed(work: Workload, preset: str, images: int) -> tuple[Any, VisionFeatures, list[int]]:
    model: Any = work.model(preset).model
    return model, work.features(images), [image % model.compressor.num_rungs for image in range(images)]


def _routed(model: Any, features: VisionFeatures, rungs: list[int]) -> Callable[[], object]:
    def route_and_compress() -> None:
        model.router(features)
        model.compressor(features, rungs)

    return route_and_compress


def _count(run: Callable[[], object], reading: int = 0) -> int:
    with torch.no_grad(), _OperatorCount(reading) as counted:
        run()
    return counted.operators


class _OperatorCount(TorchDispatchMode):
    """Operators that are called and take at least so many values; views of them do not count then."""

    def __init__(self, reading: int):
        super().__init__()
        self.reading = reading
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        sizes = [value.numel() for value in args if isinstance(value, torch.Tensor)]
        self.operators += not self.reading or (not func.is_view and max(sizes, default=0) >= self.reading)
        return func(*args, **(kwargs or {}))
