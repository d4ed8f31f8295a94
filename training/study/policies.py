"""Ways to choose the token count of each image, all on recorded answers: no model runs here.

Shapes: N images, R counts (fewest first); `right (N, R)`: whether an image's question is answered at each count.
A policy's choice is an index into the counts for every image, `(N,)`. Those that can spend more or less are set to a
mean count on calibration images, which share nothing with the test images, and never look at answers there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptive_llava.modeling.pixel_statistics import rungs_at
from adaptive_llava.training.count_price import price_for, shares_of_largest
from adaptive_llava.training.threshold_search import thresholds_for_mean


def by_spread(calibration: np.ndarray, test: np.ndarray, counts: Sequence[int], target: float) -> np.ndarray:
    """Thresholds on a statistic, as DFMR has them: the fewest tokens whose spread stays within its threshold.

    Args:
        calibration: Statistic of the calibration images, one column per count but the largest, `(M, R - 1)`.
        test: Of the test images, `(N, R - 1)`.
        counts: Tokens of each rung.
        target: Wanted mean count.
    """
    thresholds, _ = thresholds_for_mean(calibration, counts, target)
    return np.asarray(rungs_at(test, thresholds))


def by_value(calibration: np.ndarray, test: np.ndarray, counts: Sequence[int], target: float) -> np.ndarray:
    """The count of the highest value less its price; the price of a token is set to meet the target.

    Args:
        calibration: Value of each count to each calibration image, such as a classifier's log-probabilities, `(M, R)`.
        test: Of the test images, `(N, R)`.
        counts: Tokens of each rung.
        target: Wanted mean count.
    """
    return (test - price_for(calibration, counts, target) * shares_of_largest(counts)).argmax(1)


def oracle(right: np.ndarray) -> np.ndarray:
    """The smallest count that answers right; the smallest of all where none does. No router can do better."""
    return np.where(right.any(1), right.argmax(1), 0)


def family_values(right: np.ndarray, families: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Accuracy of each count on the calibration images of the same family: what is known if only the family is.

    Args:
        right: Answers of the calibration images, `(M, R)`.
        families: Their families, `(M,)`.
        wanted: Families of the images to be valued, `(N,)`.
    """
    means = {family: right[families == family].mean(0) for family in np.unique(families)}
    return np.stack([means[family] for family in wanted])


def mixed_with_shuffled(choice: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the choices dealt to each other's images, the rest as they are."""
    mixed = choice.copy()
    moved = rng.permutation(len(choice))[: round(share * len(choice))]
    mixed[moved] = choice[rng.permutation(moved)]
    return mixed


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive image has a higher score than another, ties half; nan if there is only one sort."""
    if positive.all() or not positive.any():
        return float("nan")
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())
