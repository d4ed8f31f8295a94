"""How well a probability separates two classes, and how far it can be believed.

Shapes: probabilities, labels and weights (n,).
"""

from __future__ import annotations

from typing import Any

import numpy as np


RESAMPLES = 1000
BINS = 10


def area_under_curve(higher: np.ndarray, lower: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Chance that a value of `higher` exceeds one of `lower`, ties counted half, with a bootstrap 95 % interval.

    Raises:
        ValueError: One of the two is empty.
    """
    if not len(higher) or not len(lower):
        raise ValueError(f"An area under the curve needs values on both sides; got {len(higher)} and {len(lower)}.")
    distinct, place = np.unique(np.concatenate([higher, lower]), return_inverse=True)
    above = np.bincount(place[: len(higher)], minlength=len(distinct))
    below = np.bincount(place[len(higher) :], minlength=len(distinct))
    rng = np.random.default_rng(seed)
    # drawing with replacement, counted per distinct value
    drawn = zip(
        rng.multinomial(len(higher), above / len(higher), size=RESAMPLES),
        rng.multinomial(len(lower), below / len(lower), size=RESAMPLES),
        strict=True,
    )
    interval = np.quantile([_share_won(first, second) for first, second in drawn], [0.025, 0.975])
    return {"auc": round(_share_won(above, below), 4), "interval": [round(float(x), 4) for x in interval]}


def reliability(probability: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> dict[str, Any]:
    """Do events forecast with 70 % happen 7 times in 10?

    Args:
        probability: Forecast of the event.
        label: Whether it happened.
        weight: Say of each forecast; all the same if left out.

    Returns:
        `brier`, the mean squared error; `ece`, the mean distance between forecast and share over ten equal bins; and
        the `bins` that are not empty, each with its edges, number, mean forecast and share of events.
    """
    label = label.astype(np.float64)
    weight = np.ones(len(label)) if weight is None else weight
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins: list[dict[str, Any]] = []
    distance = 0.0
    for index in range(BINS):
        inside = place == index
        if not inside.any():
            continue
        forecast, share = (float(np.average(x[inside], weights=weight[inside])) for x in (probability, label))
        distance += abs(forecast - share) * float(weight[inside].sum() / weight.sum())
        bins.append(
            {
                "from": index / BINS,
                "to": (index + 1) / BINS,
                "number": int(inside.sum()),
                "forecast": round(forecast, 4),
                "share": round(share, 4),
            }
        )
    brier = float(np.average((probability - label) ** 2, weights=weight))
    return {"brier": round(brier, 4), "ece": round(distance, 4), "bins": bins}


def confusion(actual: np.ndarray, chosen: np.ndarray, classes: int) -> list[list[int]]:
    """Counts by actual (row) and chosen (column) class."""
    return np.bincount(actual * classes + chosen, minlength=classes**2).reshape(classes, classes).tolist()


def _share_won(above: np.ndarray, below: np.ndarray) -> float:
    lower = np.cumsum(below) - below / 2  # ties count half
    return float((above * lower).sum() / (above.sum() * below.sum()))
