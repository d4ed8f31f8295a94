"""Does appearance alone tell what a picture needs? A linear probe on a tower that has learned nothing.

If it did, a router would be right for reasons that have nothing to do with reading. Families come in pairs that look
alike (`families.PAIRS`); a pair whose members the probe tells apart is left out of the study.
"""

from __future__ import annotations

import numpy as np


_RIDGE = 1e-3  # of the largest possible penalty: keeps the fit defined where features are nearly copies


def probe(train: np.ndarray, positive: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of a linear discriminant, `(N,)`: above 0 says positive.

    Args:
        train: Features, `(M, D)`.
        positive: Whether each has the property, `(M,)` bool.
        test: Features to score, `(N, D)`.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-8
    inputs = (train - mean) / scale
    wanted = np.where(positive, 1 / positive.mean(), -1 / (1 - positive.mean()))
    penalty = _RIDGE * len(inputs) * np.eye(inputs.shape[1])
    weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted)
    return ((test - mean) / scale) @ weights


def told_apart(
    train: np.ndarray, train_families: np.ndarray, test: np.ndarray, test_families: np.ndarray, pair: tuple[str, str]
) -> float:
    """Share of the test pictures of two families whose family the probe names; chance is 0.5.

    Args:
        train: Features to learn from, `(M, D)`.
        train_families: Their families, `(M,)`.
        test: Features to be told apart, `(N, D)`.
        test_families: Their families, `(N,)`.
        pair: The two families.
    """
    learned, asked = np.isin(train_families, pair), np.isin(test_families, pair)
    scores = probe(train[learned], train_families[learned] == pair[1], test[asked])
    return float(((scores > 0) == (test_families[asked] == pair[1])).mean())
