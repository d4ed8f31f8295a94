"""What a router decides by, read from many images: `(n, k)`, with AnyRes one row per view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_llava.modeling.visual_tokens import VisionFeatures


@torch.no_grad()  # not inference mode: what a module caches now must serve training later
def router_statistic(
    inner: nn.Module,
    pixel_batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    read: Callable[[VisionFeatures], Tensor],
    check: Callable[[Sequence[int]], None] = lambda counts: None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The statistic of every image, and the token counts of the router's rungs.

    Args:
        inner: The part of a model that has tower and router.
        pixel_batches: Batches of processed images, or of images and their sizes.
        read: The statistic of some views, `(views, k)`.
        check: Refuses token counts; called after the first batch.

    Raises:
        ValueError: No images, images of different counts, or a statistic that is not finite.
    """
    found, counts = [], None
    modes = [(part, part.training) for part in inner.modules()]
    inner.eval()  # batch norms of a convolutional tower must not learn from these images
    try:
        for batch in pixel_batches:
            features = inner.extract_features(*(batch if isinstance(batch, tuple) else (batch,)))
            found.append(read(features).cpu().numpy())
            ladder = inner.compressor.ladder(features.grid)
            if counts is None:
                check(ladder)  # before the other images are read
            elif counts != ladder:
                raise ValueError(f"Images of different sizes give different token counts: {counts} and {ladder}.")
            counts = ladder
    finally:
        for part, training in modes:
            part.training = training
    if counts is None:
        raise ValueError("There are no images to calibrate on. Pass at least one batch.")
    statistic = np.concatenate(found)
    if not np.isfinite(statistic).all():
        raise ValueError("The router's statistic is not finite for some images. Load the model in float32.")
    return statistic, counts


def processed_batches(
    images: Iterable[Any], processor: Any, size: int, progress: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and sizes of images as a model reads them, so many at a time.

    Args:
        images: Images, or files.
        processor: The model's.
        size: Images per batch.
        progress: A progress bar, moved by every image.
    """
    waiting: list[Any] = []

    def processed() -> tuple[Tensor, Tensor]:
        inputs = processor(images=waiting, return_tensors="pt")
        progress.update(len(waiting))
        return inputs["pixel_values"], inputs["image_sizes"]

    for image in images:
        waiting.append(image)
        if len(waiting) == size:
            yield processed()
            waiting = []
    if waiting:
        yield processed()
