"""Spread of an image's pixels, the same to the last bit in NumPy and in PyTorch, and the counts that follow from it.

The processor and the model both read this file, so that a count known beforehand and the count that is later
produced cannot differ. It needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .visual_token_geometry import Grid, window_grid


PIXEL_STEPS = 256  # per unit of a normalised pixel


def rungs_at(spread: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Lowest rung whose threshold the statistic does not exceed, else the top: `(n, num_rungs - 1)` -> `(n,)`."""
    accepted = spread <= np.asarray(thresholds, dtype=np.float32)
    return np.where(accepted.any(axis=1), accepted.argmax(axis=1), spread.shape[1])


def pixel_steps(pixels: Any) -> np.ndarray:
    """Normalised pixels as whole numbers of 1/256, the same from float32 as from bfloat16.

    Args:
        pixels: Array, CPU tensor or list of arrays, `(V, 3, height, width)`.
    """
    bits = np.ascontiguousarray(pixels, dtype=np.float32).view(np.uint32)
    # bfloat16 is the upper half of the bits: to the nearest, ties to even
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return (bits.view(np.float32).astype(np.float64) * PIXEL_STEPS).round()


def pixel_spread(steps: Any, grid: Grid, window: int) -> Any:
    """Mean standard deviation of the pixels inside windows (per channel, biased, then over windows and channels).

    Up to the last division everything is a whole number that float64 holds exactly, so that neither the device nor the
    order of a sum changes the result. Trailing pixels that fill no window are dropped.

    Args:
        steps: NumPy array or PyTorch tensor in float64, `(V, 3, height, width)`, in whole numbers of 1/256.
        grid: Patches per side, `(height, width)`.
        window: Side of a window, in patches.

    Returns:
        `(V,)`, of the type that was given, in units of the normalised pixels.

    Raises:
        ValueError: No window fits, or there are fewer pixels than patches.
    """
    views, channels, height, width = steps.shape
    rows, columns = window_grid(grid, window, name="router.windows")
    high, wide = window * (height // grid[0]), window * (width // grid[1])
    if not high * wide:
        raise ValueError(
            f"`pixel_values` of {height}x{width} pixels have less than a pixel for each of {grid[0]}x{grid[1]} "
            "patches. Use the checkpoint's own processor."
        )
    steps = steps[:, :, : rows * high, : columns * wide]
    # (V, 3, rows * high, columns * wide) -> (V, 3, rows, high, columns, wide)
    windows = steps.reshape(views, channels, rows, high, columns, wide)
    pixels = high * wide
    total, squares = (values.sum(5).sum(3) for values in (windows, windows * windows))
    # a window's variance times pixels^2; the nearest whole root is beyond rounding, being no half
    roots = ((pixels * squares - total * total) ** 0.5).round()
    return roots.sum((1, 2, 3)) / (PIXEL_STEPS * pixels * channels * rows * columns)


def pixel_routing(
    pixels: Any, grid: Sequence[int], windows: Sequence[int], thresholds: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Rung and score of every view as the `pixel_std` router chooses them inside the model.

    Args:
        pixels: What the image processor gives, `(V, 3, height, width)`.
        grid: Patches per side, `(height, width)`.
        windows: The router's option, in patches.
        thresholds: The router's option, in units of the normalised pixels.
    """
    if not windows:
        return [0] * len(pixels), [0.0] * len(pixels)
    steps = pixel_steps(pixels)
    columns = [pixel_spread(steps, (grid[0], grid[1]), window).astype(np.float32) for window in windows]
    rungs = rungs_at(np.stack(columns, axis=1), thresholds)
    with np.errstate(over="ignore"):
        scores = sum(columns) / len(columns)
    return rungs.tolist(), np.where(np.isfinite(scores), scores, np.finfo(np.float32).max).tolist()
