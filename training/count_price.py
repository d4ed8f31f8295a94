"""A price for visual tokens: the more a token costs, the fewer an image gets that is worth little more with many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def price_for(values: np.ndarray, counts: Sequence[int], target: float) -> float:
    """Price of the largest count at which images get nearest to a mean of `target` tokens.

    Args:
        values: Value of each count to each image, such as a classifier's logits, `(images, rungs)`.
        counts: Tokens of each rung, ascending. A rung's price is in proportion to them.
        target: Wanted mean count.
    """
    counted, shares = np.asarray(counts), shares_of_largest(counts)

    def mean(price: float) -> float:
        return float(counted[(values - price * shares).argmax(1)].mean())

    finite = values[np.isfinite(values)]
    span = (float(np.ptp(finite)) if finite.size else 0.0) / (shares[1] - shares[0]) + 1
    low, high = -span, span  # at which all images with finite values get the largest and the smallest count
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > target else (low, middle)
    return min((low, high), key=lambda price: abs(mean(price) - target))


def shares_of_largest(counts: Sequence[int]) -> np.ndarray:
    """Each count as a share of the largest."""
    return np.asarray(counts) / counts[-1]
