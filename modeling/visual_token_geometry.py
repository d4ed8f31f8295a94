"""Counts of visual tokens, in whole numbers: ladders of the compressors, budgets and pixels that choose from them.

The processor and the model both read this file, so that a count known beforehand and the count that is later
produced cannot differ. It needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


Grid = tuple[int, int]

BUDGET_FORMS = (
    "Pass 'auto' (or None) for the router, a number of tokens per image, a list with one number per image, "
    "{'ceiling': n} or {'total': n}."
)

PIXEL_STEPS = 256  # per unit of a normalised pixel


def visual_token_ladder(compressor: Mapping[str, Any], grid: Sequence[int]) -> tuple[int, ...]:
    """Token counts that a compressor can produce from one view, fewest first.

    Args:
        compressor: A compressor's options with its `"type"`, as in `AdaptiveLlavaConfig.compressor`.
        grid: Patches per side of the view, `(height, width)`.

    Returns:
        One count per rung, in tokens, non-decreasing.

    Raises:
        ValueError: The type is unknown, or the grid is too small for one of the options.
    """
    kind = compressor.get("type")
    if kind not in _LADDERS:
        raise ValueError(
            f"`compressor.type={kind!r}` has no count ladder. Known types: {', '.join(sorted(_LADDERS))}."
        )
    height, width = grid
    return _LADDERS[kind](compressor, (int(height), int(width)))


def window_grid(grid: Grid, window: int, *, strict: bool = False, name: str = "window") -> Grid:
    """Grid of the whole `window x window` blocks in a patch grid; trailing rows and columns are dropped.

    Args:
        grid: Patches per side, `(height, width)`.
        window: Side of a block, in patches.
        strict: Refuse a grid that the blocks do not tile.
        name: What the block is called in an error.

    Raises:
        ValueError: No block fits, or `strict` and the blocks leave patches over.
    """
    height, width = grid
    if height // window == 0 or width // window == 0:
        raise ValueError(
            f"`{name}={window}` leaves nothing of a {height}x{width} patch grid: a side must hold at least one "
            f"window. Use {name} <= {min(grid)} or larger images."
        )
    if strict and (height % window or width % window):
        raise ValueError(
            f"`{name}={window}` does not tile a {height}x{width} patch grid and `strict_tiling=True`. "
            f"Choose a divisor of {height} and {width}, or set `strict_tiling=False` to drop the trailing patches."
        )
    return height // window, width // window


def highest_rung(ladder: Sequence[int], budget: int, views: int = 1) -> int:
    """Highest rung at which all `views` of an image together cost at most `budget` tokens.

    Raises:
        ValueError: Not even the smallest count fits; the message names it.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"`visual_token_budget={budget!r}` must be a whole number of tokens per image.")
    rungs = [rung for rung, count in enumerate(ladder) if count * views <= budget]
    if not rungs:
        raise ValueError(
            f"`visual_token_budget={budget}` is below the smallest count this model can produce "
            f"({ladder[0] * views} tokens for an image; counts: {[count * views for count in ladder]}). "
            f"Pass at least {ladder[0] * views}, or 'auto'."
        )
    return rungs[-1]


def rungs_for_budget(
    budget: int | Sequence[int], ladder: Sequence[int], views_per_image: Sequence[int] | int
) -> list[int]:
    """One rung per image for a budget that replaces the router.

    Args:
        budget: Tokens per image: one number for all, or a list with one per image.
        ladder: Token counts of one view, fewest first.
        views_per_image: Views of each image, or the number of images if each has one view.
    """
    views = [1] * views_per_image if isinstance(views_per_image, int) else list(views_per_image)
    budgets = [budget] * len(views) if isinstance(budget, int) else list(budget)
    if len(budgets) != len(views):
        raise ValueError(
            f"`visual_token_budget` has {len(budgets)} entries for {len(views)} images. Pass one number per image, "
            "in prompt order, or a single number for all."
        )
    return [highest_rung(ladder, tokens, count) for tokens, count in zip(budgets, views, strict=True)]


def share_total(
    total: int, ladder: Sequence[int], scores: Sequence[float], images_per_prompt: Sequence[int] | None
) -> list[int]:
    """One rung per view so that each prompt spends at most `total` tokens, the highest scores served first.

    Every view starts at rung 0; then, by falling score (ties in prompt order), each view is raised to the highest
    rung that still fits.

    Args:
        total: Tokens for all views of one prompt.
        ladder: Token counts of one view, fewest first.
        scores: Router scores, one per view.
        images_per_prompt: Views of each prompt; `None` takes all views as one prompt.

    Raises:
        ValueError: `total` does not cover the smallest count for every view of a prompt.
    """
    if isinstance(total, bool) or not isinstance(total, int):
        raise ValueError(f"`visual_token_budget={{'total': {total!r}}}` must be a whole number of tokens per prompt.")
    rungs = [0] * len(scores)
    start = 0
    for prompt, views in enumerate(images_per_prompt if images_per_prompt is not None else [len(scores)]):
        left = total - views * ladder[0]
        if left < 0:
            raise ValueError(
                f"`visual_token_budget={{'total': {total}}}` is below the smallest cost of prompt {prompt}: {views} "
                f"views at {ladder[0]} tokens each. Pass at least {views * ladder[0]}, or fewer images."
            )
        for view in sorted(range(start, start + views), key=lambda view: -scores[view]):
            rungs[view] = max(rung for rung, count in enumerate(ladder) if count - ladder[0] <= left)
            left -= ladder[rungs[view]] - ladder[0]
        start += views
    return rungs


def check_rungs(rungs: Sequence[int], ladder: Sequence[int], num_views: int) -> list[int]:
    """`visual_rungs` as a list of valid rungs, one per view.

    Raises:
        ValueError: The number of rungs is not `num_views`, or one of them is no rung of the ladder.
    """
    rungs = list(rungs)
    if len(rungs) != num_views:
        raise ValueError(f"`visual_rungs` has {len(rungs)} entries for {num_views} images. Pass one rung per image.")
    for rung in rungs:
        if rung not in range(len(ladder)):
            raise ValueError(
                f"`visual_rungs` contains {rung}, but this model has rungs 0 to {len(ladder) - 1} "
                f"(token counts {list(ladder)})."
            )
    return [int(rung) for rung in rungs]


def rungs_for_mapping(
    budget: Mapping[str, Any],
    ladder: Sequence[int],
    views_per_image: Sequence[int],
    images_per_prompt: Sequence[int] | None,
    routed: Callable[[], tuple[Sequence[int], Sequence[float]]],
) -> list[int]:
    """One rung per view for a budget that the router has a say in, `{"ceiling": n}` or `{"total": n}`.

    Args:
        budget: The budget; `n` in tokens.
        ladder: Token counts of one view, fewest first.
        views_per_image: Views of each image.
        images_per_prompt: Images of each prompt; `None` takes all as one prompt.
        routed: Gives the router's rungs and scores, one of each per view.

    Raises:
        ValueError: Another form of budget, or one that no rung fits.
    """
    if set(budget) == {"total"}:
        prompts = None
        if images_per_prompt is not None:
            views = iter(views_per_image)
            prompts = [sum(next(views) for _ in range(images)) for images in images_per_prompt]
        return share_total(budget["total"], ladder, routed()[1], prompts)
    if set(budget) == {"ceiling"}:
        ceilings = [highest_rung(ladder, budget["ceiling"], views) for views in views_per_image]
        chosen = iter(routed()[0])
        return [
            min(next(chosen), ceiling)
            for ceiling, views in zip(ceilings, views_per_image, strict=True)
            for _ in range(views)
        ]
    raise ValueError(f"`visual_token_budget={dict(budget)!r}` is not known. {BUDGET_FORMS}")


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
    return rungs.tolist(), (sum(columns) / len(columns)).tolist()


def _identity_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    return (grid[0] * grid[1],)


def _average_pool_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    strict = bool(options.get("strict_tiling", False))
    grids = [window_grid(grid, factor, strict=strict, name="factors") for factor in options["factors"]]
    return tuple(height * width for height, width in reversed(grids))


def _query_resampler_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    return tuple(options["counts"])


def _token_concat_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    height, width = window_grid(grid, options["window"], strict=bool(options.get("strict_tiling", False)))
    return (height * width,)


def _spatial_fusion_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    (windows,) = _token_concat_ladder(options, grid)
    return (windows * options["fused_tokens"],)


_LADDERS: dict[str, Callable[[Mapping[str, Any], Grid], tuple[int, ...]]] = {
    "identity": _identity_ladder,
    "average_pool": _average_pool_ladder,
    "query_resampler": _query_resampler_ladder,
    "token_concat": _token_concat_ladder,
    "spatial_fusion": _spatial_fusion_ladder,
}
