"""Thresholds of a router that cuts a statistic, chosen so that images get a wanted number of tokens.

The rule is the router's: an image gets the lowest rung whose threshold its statistic does not exceed, else the top.
Shapes: statistics (n, num_rungs - 1) in fp32, rung 0 first; counts (num_rungs,) in tokens, fewest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptive_llava.modeling.pixel_statistics import rungs_at


def check_mean(counts: Sequence[int], target: float) -> None:
    """Refuse a mean that no choice of counts has.

    Raises:
        ValueError: `target` lies outside the counts.
    """
    if not counts[0] <= target <= counts[-1]:
        raise ValueError(
            f"`target_mean={target:g}` cannot be reached: this model spends {counts[0]} to {counts[-1]} tokens on an "
            f"image (counts: {list(counts)}). Choose a mean between the two."
        )


def check_shares(counts: Sequence[int], shares: Sequence[float]) -> None:
    """Refuse shares that are no distribution over the counts.

    Raises:
        ValueError: Not one share per count, a negative share, or a sum other than 1.
    """
    if len(shares) != len(counts):
        raise ValueError(
            f"`shares={list(shares)}` must have {len(counts)} entries, one per token count {list(counts)}."
        )
    if not all(share >= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"`shares={list(shares)}` must be numbers >= 0 that add up to 1, not to {sum(shares):g}.")


def thresholds_for_mean(spread: np.ndarray, counts: Sequence[int], target: float) -> tuple[list[float], float]:
    """One quantile for all cuts, such that the mean count comes nearest to `target`.

    A larger quantile raises every threshold, so no image moves up and the mean cannot grow: bisection finds the step
    at which the mean crosses the target, and the nearer side of it is taken.

    Returns:
        The thresholds, and the quantile in [0, 1].
    """
    number, ladder = len(spread), np.asarray(counts)

    def mean_at(accepted: int) -> float:
        return float(ladder[rungs_at(spread, [_cut(column, accepted) for column in spread.T])].mean())

    low, high = 0, number  # the smallest number of accepted images whose mean is at most the target
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mean_at(middle) <= target else (middle + 1, high)
    accepted = min((step for step in (low, low - 1) if step >= 0), key=lambda step: abs(mean_at(step) - target))
    return [_cut(column, accepted) for column in spread.T], accepted / number


def thresholds_for_shares(spread: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Thresholds that give each rung its share of the images, cut by cut from rung 0 upward."""
    left, thresholds, wanted = np.ones(len(spread), dtype=bool), [], 0.0
    for column, share in zip(spread.T, shares, strict=False):
        wanted += share * len(spread)  # images that should by now have a rung
        missing = round(wanted) - int((~left).sum())
        values = column[left]
        # images that a lower rung has taken do not count here, wherever their statistic stands
        thresholds.append(_cut(values if len(values) else column, min(max(missing, 0), len(values))))
        left &= column > np.float32(thresholds[-1])
    return thresholds


def _cut(values: np.ndarray, accepted: int) -> float:
    """The fp32 value midway between the `accepted` smallest values and the others; equal values stay together."""
    ordered = np.sort(values)
    if 0 < accepted < len(ordered) and ordered[accepted - 1] == ordered[accepted]:
        first, last = (int(np.searchsorted(ordered, ordered[accepted], side)) for side in ("left", "right"))
        accepted = first if accepted - first < last - accepted else last
    if accepted == 0:
        return float(ordered[0] / np.float32(2))  # an image of spread 0 is always accepted
    if accepted == len(ordered):
        return float(ordered[-1] * np.float32(2))  # far enough for images not seen here
    low, high = ordered[accepted - 1], ordered[accepted]
    middle = np.float32(low + (high - low) / 2)
    return float(middle if middle < high else low)
