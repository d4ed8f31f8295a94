"""The cheapest of several settings whose mean drop of score is at most a given figure, with a given confidence.

Papers: Learn then Test, https://arxiv.org/abs/2110.01052 (settings are hypotheses; they are tested in a fixed
sequence); p-values by betting, https://arxiv.org/abs/2010.09686; a bound that holds after the sequence: Hsu and Berger
1999, "Stepwise confidence intervals without multiplicity adjustment", JASA 94.
Shapes: drops (images, settings), each in [-1, 1]: score at all tokens minus score at the setting's count, one row per
image, settings from the most tokens to the fewest.

**p-value.** H says that the mean drop is `max_drop` or more. A gambler who stakes the share `c` of the most that can
be staked has `prod (1 + c (max_drop - drop) / (1 - max_drop))` after all images, each factor being >= 0 for 0 <= c <=
1. If H is true and images are independent, no factor is above 1 on average, so the capital exceeds `1 / p` with
probability at most `p` (Markov), whatever the distribution and the number of images. A weighted mean of such gamblers
obeys the same, if the weights do not depend on these images. They come from others, the pilot: each gambler's weight
is what it would have won there. So `p = 1 / capital`, and the order of the images does not matter.

Why betting: paired drops are mostly 0, with losses and gains that nearly cancel, so their variance is far below the
largest possible. Hoeffding's and Bentkus' bounds for the rescaled drop (drop + 1) / 2 do not see that: without a
single loss they need over 40 000 images for 1 point at 95 %. On losses alone, gains left out, they need 299, and no
valid test needs fewer; but then a count that loses 2 % and wins 2 % never passes. The gamblers make use of gains, and
pay for not knowing the right stake by needing somewhat more than 299 (`images_needed`).

**Sequence.** Settings are tested one after the other, most tokens first, each at the level `1 - confidence`, up to
the first that is not rejected. The first setting in this order whose true drop is above `max_drop`, if there is one,
passes with at most this probability, and only then can one be chosen that drops more. No correction for the number of
settings is due. That drops grow along the sequence makes it strong, and is not needed for the guarantee.

**Settings** must be fixed when these images arrive. To place thresholds at quantiles of the same images' statistics
would not do, though no answer is looked at: given the images, drops are independent, but their means differ from
image to image, and what would be tested is the mean over these images alone. Where answers are deterministic, nothing
random is left at all. The claim is about new images, and for these a threshold at the 30 % quantile of `n` images
accepts a share that varies with the images. So thresholds are placed on the pilot, and tested on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


# Shares of the largest possible stake: close together near 1, the best where nothing is lost, and near 0, the best
# where losses and gains are frequent.
_STAKES = np.append(1 / (1 + np.exp(-np.arange(-5, 3.1, 0.5))), 1.0)


@dataclass(frozen=True)
class Verdict:
    """What a sequence of tests says.

    Attributes:
        setting: Index of the cheapest setting that passed; `None` if the first one did not.
        drop: Mean drop of this setting (or the first one) on the tested images.
        bound: Upper confidence bound on its mean drop over all images of the kind, at the level asked for. It allows
            for the choice: `max_drop`, unless every setting passed; then the largest of their bounds. If none passed,
            the first one's own bound.
        num_images: Tested images.
        tested: Settings that were tested.
    """

    setting: int | None
    drop: float
    bound: float
    num_images: int
    tested: int


def learn_then_test(pilot: np.ndarray, drops: np.ndarray, *, max_drop: float, confidence: float) -> Verdict:
    """Test settings in their order, and stop at the first that may drop more.

    Args:
        pilot: Drops of the images on which the settings were fixed, `(m, settings)`; they set the stakes.
        drops: Drops of images that had no say in the settings, `(n, settings)`, from the most tokens to the fewest.
        max_drop: Largest mean drop that is accepted, above 0 and below 1.
        confidence: Probability with which the chosen setting keeps it, from 0.5 to below 1.

    Raises:
        ValueError: A figure out of its range, drops outside [-1, 1], or no images or settings.
    """
    check_goal(max_drop, confidence)
    for name, values in (("pilot", pilot), ("drops", drops)):
        if values.ndim != 2 or not values.size or not (np.abs(values) <= 1).all():
            raise ValueError(
                f"`{name}` of shape {values.shape} must hold differences of scores from -1 to 1, one row per image "
                "and one column per setting. Pass scores from 0 to 1."
            )
    passed = 0
    while passed < drops.shape[1] and p_value(pilot[:, passed], drops[:, passed], max_drop) <= 1 - confidence:
        passed += 1
    columns = range(passed) if passed == drops.shape[1] else [0] if not passed else []
    bounds = [upper_bound(pilot[:, j], drops[:, j], max_drop=max_drop, confidence=confidence) for j in columns]
    return Verdict(
        setting=passed - 1 if passed else None,
        drop=float(drops[:, max(passed - 1, 0)].mean()),
        bound=min(max(bounds), max_drop) if passed and bounds else max(bounds, default=max_drop),
        num_images=len(drops),
        tested=min(passed + 1, drops.shape[1]),
    )


def p_value(pilot: np.ndarray, drops: np.ndarray, max_drop: float, *, stakes_for: float | None = None) -> float:
    """Exactly valid p-value of "the mean drop is `max_drop` or more".

    Args:
        pilot: Drops of other images, `(m,)`, which set the stakes.
        drops: Drops, `(n,)`.
        max_drop: Above -1 and below 1.
        stakes_for: The drop against which the stakes are set, if another; for equal stakes, p falls with `max_drop`.
    """
    weights = _log_capitals(pilot, max_drop if stakes_for is None else stakes_for)
    gain = _log_sum(weights + _log_capitals(drops, max_drop)) - _log_sum(weights)
    return math.exp(min(0.0, -gain))


def upper_bound(pilot: np.ndarray, drops: np.ndarray, *, max_drop: float, confidence: float) -> float:
    """The largest mean drop that is not rejected, for one setting by itself: below or at `max_drop` if that is.

    Returns:
        Rounded up by at most 1e-6; 1 if nothing is rejected.
    """
    low, high = -1.0, 1.0  # not rejected; rejected, or nothing is
    while high - low > 1e-6:
        middle = (low + high) / 2
        rejected = p_value(pilot, drops, middle, stakes_for=max_drop) <= 1 - confidence
        low, high = (low, middle) if rejected else (middle, high)
    return high


def images_needed(max_drop: float, confidence: float, *, tested_share: float, at_least: int) -> int:
    """Smallest number of images with which a setting that loses nothing on any of them passes.

    Args:
        max_drop: Largest mean drop that is accepted.
        confidence: Wanted confidence.
        tested_share: Share of the images that is tested; the rest is the pilot.
        at_least: A number below which there is no point in asking.
    """
    check_goal(max_drop, confidence)

    def passes(number: int) -> bool:
        tested = size_of_tested(number, tested_share)
        return p_value(np.zeros(number - tested), np.zeros(tested), max_drop) <= 1 - confidence

    high = at_least
    while not passes(high):
        high *= 2
    low = max(at_least - 1, high // 2)  # too few, or not worth asking
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def size_of_tested(number: int, share: float) -> int:
    """How many of so many images are tested; at least two are, and two are not."""
    return min(max(round(share * number), 2), number - 2)


def check_goal(max_drop: float, confidence: float) -> None:
    """Refuse what no number of images can show.

    Raises:
        ValueError: `max_drop` or `confidence` is out of range.
    """
    if not 0 < max_drop < 1:
        raise ValueError(
            f"`max_drop={max_drop:g}` must lie between 0 and 1: the largest mean loss of score, 0.01 being one point "
            "of a hundred. That nothing at all is lost cannot be shown."
        )
    if not 0.5 <= confidence < 1:
        raise ValueError(f"`confidence={confidence:g}` must be at least 0.5 and below 1, such as 0.95.")


def _log_capitals(drops: np.ndarray, max_drop: float) -> np.ndarray:
    """Logarithm of what each gambler has in the end, one per stake."""
    values, counts = np.unique(drops, return_counts=True)
    with np.errstate(divide="ignore"):  # who stakes all has nothing after one full loss
        return np.log1p(np.outer(_STAKES, (max_drop - values) / (1 - max_drop))) @ counts


def _log_sum(logarithms: np.ndarray) -> float:
    largest = logarithms.max()
    return float(largest + np.log(np.exp(logarithms - largest).sum()))
