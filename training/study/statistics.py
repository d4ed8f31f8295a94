"""Macro accuracy, gain over the best fixed count, and a bootstrap over seeds and images.

Shapes: N images, R counts, P policies, B draws.
A fixed budget can spend any mean count between two of its counts by giving some images, picked at random, the smaller
and the others the larger one: that is the straight line between them, the chord. The gain of a policy is its accuracy
less the chord at the tokens it spends; against the hull, the best such mixture of any two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


_DRAWS_AT_ONCE = 500  # so that their weights fit into memory


@dataclass(frozen=True)
class SeedRecord:
    """What one seed's models answered.

    Args:
        families: Family of each image, `(N,)`.
        right: Answers at every count, `(N, R)`.
        choices: Each policy's choice, `(N,)` indices into the counts.
    """

    families: np.ndarray
    right: np.ndarray
    choices: dict[str, np.ndarray]


def chord(counts: Sequence[int], accuracy: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Accuracy of the mixture of the two counts next to `tokens`; `accuracy (..., R)`, `tokens (..., P)`."""
    upper = np.clip(np.searchsorted(counts, tokens, side="left"), 1, len(counts) - 1)
    steps = np.asarray(counts, dtype=float)
    share = (tokens - steps[upper - 1]) / (steps[upper] - steps[upper - 1])
    low, high = np.take_along_axis(accuracy, upper - 1, -1), np.take_along_axis(accuracy, upper, -1)
    return (1 - share) * low + share * high


def hull(counts: Sequence[int], accuracy: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Accuracy of the best mixture of any two counts that spends `tokens`; shapes as `chord`."""
    tokens = tokens.clip(counts[0], counts[-1])  # sums in fp32 may lie outside by a hair
    best = np.full(tokens.shape, -np.inf)
    for low in range(len(counts)):
        for high in range(low + 1, len(counts)):
            share = (tokens - counts[low]) / (counts[high] - counts[low])
            mixture = (1 - share) * accuracy[..., low, None] + share * accuracy[..., high, None]
            best = np.where((share >= 0) & (share <= 1), np.maximum(best, mixture), best)
    return best


def image_weights(
    families: np.ndarray, draws: int, rng: np.random.Generator, shares: dict[str, float] | None = None
) -> np.ndarray:
    """Weight of each image in each draw with replacement within its family, `(draws, N)`; rows sum to 1.

    Args:
        families: Of the images, `(N,)`.
        draws: Number of draws; 0 gives one row in which every image counts once.
        rng: Source of the draws.
        shares: Weight of each family, equal by default.
    """
    names = np.unique(families)
    weights = np.zeros((max(draws, 1), len(families)), dtype=np.float32)
    for name in names:
        members = np.flatnonzero(families == name)
        share = 1 / len(names) if shares is None else shares[name]
        drawn: np.ndarray = np.ones((1, len(members)))
        if draws:
            drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
        weights[:, members] = share * drawn / len(members)
    return weights


def measures(record: SeedRecord, counts: Sequence[int], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, tokens, and gains of every policy in every draw, each `(B, P)`, and accuracy of the counts `(B, R)`.

    `over_shuffled` is the accuracy less that of the same choices dealt to the images at random, in expectation;
    `over_family_shuffled`, dealt within each family.
    """
    counted = np.asarray(counts)
    rows = np.arange(len(record.right))
    fixed = weights @ record.right.astype(np.float32)
    choices = list(record.choices.values())
    accuracy = weights @ np.stack([record.right[rows, choice] for choice in choices], 1).astype(np.float32)
    tokens = weights @ np.stack([counted[choice] for choice in choices], 1).astype(np.float32)
    shuffled, within = [], []
    for choice in choices:
        chosen = (choice[:, None] == np.arange(len(counts))).astype(np.float32)
        shuffled.append(((weights @ chosen) * fixed).sum(1))
        parts = []
        for name in np.unique(record.families):
            members = record.families == name
            total = weights[:, members].sum(1)[:, None]
            answered = weights[:, members] @ record.right[members].astype(np.float32)
            parts.append(((weights[:, members] @ chosen[members]) * answered / np.maximum(total, 1e-12)).sum(1))
        within.append(np.sum(parts, axis=0))
    return {
        "fixed": fixed,
        "accuracy": accuracy,
        "tokens": tokens,
        "over_chord": accuracy - chord(counts, fixed, tokens),
        "over_hull": accuracy - hull(counts, fixed, tokens),
        "over_shuffled": accuracy - np.stack(shuffled, 1),
        "over_family_shuffled": accuracy - np.stack(within, 1),
    }


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty; differences of two are paired, since all see the same draws.

    Args:
        by_seed: Its value for each seed, all images counting once, `(S,)`.
        draws: Its value in each draw of seeds and images, `(B,)`.
    """

    by_seed: np.ndarray
    draws: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.by_seed - other.by_seed, self.draws - other.draws)

    def summary(self) -> dict[str, Any]:
        """Mean over the seeds, 95 % interval, and each seed's value."""
        low, high = np.percentile(self.draws, [2.5, 97.5])
        rounded = [round(float(value), 4) for value in (self.by_seed.mean(), low, high)]
        by_seed = [round(float(value), 4) for value in self.by_seed]
        return {**dict(zip(("mean", "low", "high"), rounded, strict=True)), "by_seed": by_seed}


def bootstrap(
    records: Sequence[SeedRecord],
    counts: Sequence[int],
    *,
    draws: int,
    shares: dict[str, float] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Every measure of every policy, and the accuracy of `"always N"` for each count.

    A draw takes seeds with replacement and, within each, images of each family with replacement. It depends on the
    families of the images alone, so policies of different models on the same images see the same draws.

    Args:
        records: One per seed, with the same policies.
        counts: Tokens of each rung.
        draws: Number of draws.
        shares: Weight of each family, equal by default.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    points = [measures(record, counts, image_weights(record.families, 0, rng, shares)) for record in records]
    taken = rng.integers(len(records), size=(draws, len(records)))
    sums: dict[str, np.ndarray] = {}
    for index, record in enumerate(records):
        places = np.repeat(np.arange(draws), (taken == index).sum(1))  # taken twice: two draws of its images
        for start in range(0, len(places), _DRAWS_AT_ONCE):
            part = places[start : start + _DRAWS_AT_ONCE]
            drawn = measures(record, counts, image_weights(record.families, len(part), rng, shares))
            for name, values in drawn.items():
                np.add.at(sums.setdefault(name, np.zeros((draws, values.shape[1]))), part, values)
    found: dict[str, dict[str, Estimate]] = {}
    for name, total in sums.items():
        fixed = name == "fixed"
        for column, policy in enumerate([f"always {count}" for count in counts] if fixed else records[0].choices):
            by_seed = np.stack([point[name][0, column] for point in points])
            measure = "accuracy" if fixed else name
            found.setdefault(policy, {})[measure] = Estimate(by_seed, total[:, column] / len(records))
    return found
