"""Counts of visual tokens, in whole numbers: ladders of the compressors and the budgets that choose from them.

The processor and the model both read this file, so that a count known beforehand and the count that is later
produced cannot differ. It needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


Grid = tuple[int, int]

BUDGET_FORMS = (
    "Pass 'auto' (or None) for the router, a number of tokens per image, a list with one number per image, "
    "{'ceiling': n} or {'total': n}."
)


class ImageCost(NamedTuple):
    """What one image costs; each of its units chooses a rung. Without tiling an image is one unit of one view.

    Attributes:
        ladder: Tokens of one unit at each rung.
        units: Parts of the image that choose a rung of their own.
        views_per_unit: Views that share a unit's rung.
        newlines: Tokens between the units, the same at every rung.
    """

    ladder: tuple[int, ...]
    units: int = 1
    views_per_unit: int = 1
    newlines: int = 0

    @property
    def views(self) -> int:
        """Views of the image, each with an entry in `visual_rungs`."""
        return self.units * self.views_per_unit

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of the image with all of it at one rung, for every rung."""
        return tuple(self.units * count + self.newlines for count in self.ladder)

    def tokens(self, rungs: Sequence[int]) -> int:
        """Tokens of the image with one rung per view."""
        return sum(self.ladder[rung] for rung in rungs[:: self.views_per_unit]) + self.newlines


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
    if kind not in tuple(_LADDERS):
        raise ValueError(
            f"`compressor.type={kind!r}` has no count ladder. Known types: {', '.join(sorted(_LADDERS))}."
        )
    try:
        height, width = grid
        return _LADDERS[kind](compressor, (int(height), int(width)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"`compressor={dict(compressor)!r}` gives no token counts for the patch `grid={grid!r}`: "
            f"{type(error).__name__} {error}. Take the complete options that the model's config wrote."
        ) from error


def visual_token_grids(compressor: Mapping[str, Any], grid: Sequence[int]) -> tuple[Grid, ...] | None:
    """Grids of a compressor's tokens, one per rung, `(height, width)`; `None` if its tokens form no grid.

    Args:
        compressor: A compressor's options with its `"type"`.
        grid: Patches per side of the view, `(height, width)`.
    """
    make = _GRIDS.get(compressor.get("type", ""))
    return None if make is None else make(compressor, (int(grid[0]), int(grid[1])))


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


def highest_rung(counts: Sequence[int], budget: int) -> int:
    """Highest rung at which an image costs at most `budget` tokens.

    Args:
        counts: Tokens of the whole image at each rung.
        budget: Tokens for the image.

    Raises:
        ValueError: Not even the smallest count fits; the message names it.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"`visual_token_budget={budget!r}` must be a whole number of tokens per image.")
    rungs = [rung for rung, count in enumerate(counts) if count <= budget]
    if not rungs:
        raise ValueError(
            f"`visual_token_budget={budget}` is below the smallest count this model can produce "
            f"({counts[0]} tokens for an image; counts: {list(counts)}). Pass at least {counts[0]}, or 'auto'."
        )
    return rungs[-1]


def rungs_for_budget(budget: int | Sequence[int], images: Sequence[ImageCost]) -> list[int]:
    """One rung per view for a budget that replaces the router; the views of an image get the same.

    Args:
        budget: Tokens per image: one number for all, or a list with one per image.
        images: Cost of each image.
    """
    budgets = [budget] * len(images) if isinstance(budget, int) else list(budget)
    if len(budgets) != len(images):
        raise ValueError(
            f"`visual_token_budget` has {len(budgets)} entries for {len(images)} images. Pass one number per image, "
            "in prompt order, or a single number for all."
        )
    rungs = [highest_rung(image.counts, tokens) for image, tokens in zip(images, budgets, strict=True)]
    return [rung for image, rung in zip(images, rungs, strict=True) for _ in range(image.views)]


def rungs_below(ceiling: int, images: Sequence[ImageCost], rungs: Sequence[int]) -> list[int]:
    """Rungs per view lowered until no image costs more than `ceiling` tokens.

    The views of such an image that lie above a certain rung are lowered to it: the highest at which the image fits.

    Args:
        ceiling: Tokens per image.
        images: Cost of each image.
        rungs: What the router chose, one rung per view.
    """
    lowered, start = [], 0
    for image in images:
        common = highest_rung(image.counts, ceiling)
        chosen = rungs[start : start + image.views]
        caps = range(len(image.ladder) - 1, -1, -1)
        capped = ([min(rung, cap) for rung in chosen] for cap in caps)
        lowered += next((row for row in capped if image.tokens(row) <= ceiling), [common] * image.views)
        start += image.views
    return lowered


def share_total(
    total: int, images: Sequence[ImageCost], scores: Sequence[float], images_per_prompt: Sequence[int] | None
) -> list[int]:
    """One rung per view so that each prompt spends at most `total` tokens, the highest scores served first.

    Every unit of an image starts at rung 0; then, by falling score (ties in prompt order), each is raised to the
    highest rung that still fits. The score of a unit is the highest of its views'.

    Args:
        total: Tokens for all images of one prompt.
        images: Cost of each image.
        scores: Router scores, one per view.
        images_per_prompt: Images of each prompt; `None` takes all images as one prompt.

    Raises:
        ValueError: `total` does not cover the smallest count of every image of a prompt, or `images_per_prompt` tells
            of another number of images.
    """
    if isinstance(total, bool) or not isinstance(total, int):
        raise ValueError(f"`visual_token_budget={{'total': {total!r}}}` must be a whole number of tokens per prompt.")
    per_prompt = [len(images)] if images_per_prompt is None else list(images_per_prompt)
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in per_prompt):
        raise ValueError(f"`images_per_prompt={per_prompt}` must be whole numbers >= 0, one per prompt, in order.")
    if sum(per_prompt) != len(images):
        raise ValueError(
            f"`images_per_prompt={per_prompt}` tells of {sum(per_prompt)} images, but there are {len(images)}. Pass "
            "the number of images of each prompt, in order."
        )
    rungs = [0] * len(scores)
    remaining, start = iter(images), 0
    for prompt, number in enumerate(per_prompt):
        mine = [next(remaining) for _ in range(number)]
        smallest = sum(image.counts[0] for image in mine)
        left = total - smallest
        if left < 0:
            raise ValueError(
                f"`visual_token_budget={{'total': {total}}}` is below the smallest cost of prompt {prompt}: "
                f"{smallest} tokens for {number} images with {sum(image.views for image in mine)} views. Pass at "
                f"least {smallest}, or fewer images."
            )
        units = []
        for image in mine:
            for _ in range(image.units):
                views = range(start, start + image.views_per_unit)
                units.append((max(scores[view] for view in views), image.ladder, views))
                start += image.views_per_unit
        for _, ladder, views in sorted(units, key=lambda unit: -unit[0]):
            chosen = max(rung for rung, count in enumerate(ladder) if count - ladder[0] <= left)
            left -= ladder[chosen] - ladder[0]
            for view in views:
                rungs[view] = chosen
    return rungs


def shared_rungs(rungs: Sequence[int], images: Sequence[ImageCost]) -> list[int]:
    """One rung per view, where the views of one unit share the largest of theirs."""
    shared, start = [], 0
    for image in images:
        for _ in range(image.units):
            end = start + image.views_per_unit
            shared += [max(rungs[start:end])] * image.views_per_unit
            start = end
    return shared


def check_rungs(rungs: Any, images: Sequence[ImageCost]) -> list[int]:
    """`visual_rungs` as a list of valid rungs, one per view.

    Args:
        rungs: One rung per view, or a single one for all.
        images: Cost of each image.

    Raises:
        ValueError: No rungs, another number of them than of views, or one that is no rung of the ladder.
    """
    views = sum(image.views for image in images)
    given = [rungs] * views if isinstance(rungs, int) else rungs
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ValueError(f"`visual_rungs={rungs!r}` must be a list of whole numbers, one rung per view.")
    if len(given) != views:
        parts, part = ("images", "image") if views == len(images) else ("views", "view")
        raise ValueError(f"`visual_rungs` has {len(given)} entries for {views} {parts}. Pass one rung per {part}.")
    ladders = [image.ladder for image in images for _ in range(image.views)]
    for rung, ladder in zip(given, ladders, strict=True):
        if rung not in range(len(ladder)):
            raise ValueError(
                f"`visual_rungs` contains {rung!r}, but this model has rungs 0 to {len(ladder) - 1} "
                f"(token counts {list(ladder)}). Pass one of these per view."
            )
    return shared_rungs([int(rung) for rung in given], images)


def decide_rungs(
    images: Sequence[ImageCost],
    routed: Callable[[], tuple[Sequence[int], Sequence[float]]],
    *,
    budget: Any = None,
    rungs: Any = None,
    images_per_prompt: Sequence[int] | None = None,
) -> list[int]:
    """Who decides: the rung of every view, from the router, a budget, or an exact replay.

    Args:
        images: Cost of each image.
        routed: Gives the router's rungs and scores, one of each per view; asked only where it has a say.
        budget: `None` or `"auto"`, an int or one int per image, `{"ceiling": n}`, or `{"total": n}`.
        rungs: One rung per view, replayed exactly; not together with a budget.
        images_per_prompt: Images of each prompt (for `{"total": n}`); `None` takes all as one prompt.

    Raises:
        ValueError: Both `budget` and `rungs`, an unknown form of budget, or one that no rung fits.
    """
    # tensors and arrays of any library
    budget, rungs = (value.tolist() if hasattr(value, "tolist") else value for value in (budget, rungs))
    if rungs is not None and budget is not None:
        raise ValueError(
            f"`visual_token_budget={budget!r}` and `visual_rungs` were both given. Pass one of them: rungs replay an "
            "exact choice, a budget makes one."
        )
    if rungs is not None:
        return check_rungs(rungs, images)
    if budget is None or budget == "auto":
        return shared_rungs(routed()[0], images)
    if isinstance(budget, Mapping):
        return rungs_for_mapping(budget, images, images_per_prompt, routed)
    if isinstance(budget, (int, list, tuple)):
        return rungs_for_budget(budget, images)
    raise ValueError(f"`visual_token_budget={budget!r}` is not known. {BUDGET_FORMS}")


def rungs_for_mapping(
    budget: Mapping[str, Any],
    images: Sequence[ImageCost],
    images_per_prompt: Sequence[int] | None,
    routed: Callable[[], tuple[Sequence[int], Sequence[float]]],
) -> list[int]:
    """One rung per view for a budget that the router has a say in, `{"ceiling": n}` or `{"total": n}`.

    Args:
        budget: The budget; `n` in tokens.
        images: Cost of each image.
        images_per_prompt: Images of each prompt; `None` takes all as one prompt.
        routed: Gives the router's rungs and scores, one of each per view.

    Raises:
        ValueError: Another form of budget, or one that no rung fits.
    """
    if set(budget) == {"total"}:
        return share_total(budget["total"], images, routed()[1], images_per_prompt)
    if set(budget) == {"ceiling"}:
        return rungs_below(budget["ceiling"], images, shared_rungs(routed()[0], images))
    raise ValueError(f"`visual_token_budget={dict(budget)!r}` is not known. {BUDGET_FORMS}")


def _identity_grids(options: Mapping[str, Any], grid: Grid) -> tuple[Grid, ...]:
    return (grid,)


def _average_pool_grids(options: Mapping[str, Any], grid: Grid) -> tuple[Grid, ...]:
    strict = bool(options.get("strict_tiling", False))
    return tuple(window_grid(grid, factor, strict=strict, name="factors") for factor in reversed(options["factors"]))


def _query_resampler_grids(options: Mapping[str, Any], grid: Grid) -> tuple[Grid, ...]:
    return tuple((math.isqrt(count),) * 2 for count in options["counts"])


def _token_concat_grids(options: Mapping[str, Any], grid: Grid) -> tuple[Grid, ...]:
    return (window_grid(grid, options["window"], strict=bool(options.get("strict_tiling", False))),)


def _spatial_fusion_grids(options: Mapping[str, Any], grid: Grid) -> tuple[Grid, ...] | None:
    return _token_concat_grids(options, grid) if options["fused_tokens"] == 1 else None


def _spatial_fusion_ladder(options: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    ((height, width),) = _token_concat_grids(options, grid)
    return (height * width * options["fused_tokens"],)


def _counts(grids: Callable[[Mapping[str, Any], Grid], tuple[Grid, ...]]) -> Callable[..., tuple[int, ...]]:
    return lambda options, grid: tuple(height * width for height, width in grids(options, grid))


# Compressors whose tokens form a grid at every rung.
_GRIDS: dict[str, Callable[[Mapping[str, Any], Grid], tuple[Grid, ...] | None]] = {
    "identity": _identity_grids,
    "average_pool": _average_pool_grids,
    "query_resampler": _query_resampler_grids,
    "token_concat": _token_concat_grids,
    "spatial_fusion": _spatial_fusion_grids,
}

_LADDERS: dict[str, Callable[[Mapping[str, Any], Grid], tuple[int, ...]]] = {
    "identity": _counts(_identity_grids),
    "average_pool": _counts(_average_pool_grids),
    "query_resampler": _counts(_query_resampler_grids),
    "token_concat": _counts(_token_concat_grids),
    "spatial_fusion": _spatial_fusion_ladder,
}
