"""Which visual-token counts are known before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# In a checkpoint this stands beside this file; in the installed package it does not.
try:
    from .visual_token_geometry import check_rungs, highest_rung, pixel_routing, rungs_for_budget, rungs_for_mapping
except ImportError:
    from adaptive_llava.modeling.visual_token_geometry import (
        check_rungs,
        highest_rung,
        pixel_routing,
        rungs_for_budget,
        rungs_for_mapping,
    )


Routed = tuple[Sequence[int], Sequence[float]]


def routing_known_beforehand(
    router: Mapping[str, Any],
    ladder: Sequence[int],
    number: int,
    *,
    grid: Sequence[int] = (),
    pixels: Any = None,
) -> Routed | None:
    """Rung and score of each image as the router will choose them, or `None` if that takes the model.

    Args:
        router: The model's router options, `{"type": ..., ...}`.
        ladder: Token counts of one image, fewest first.
        number: Number of images.
        grid: Patches per side of an image, `(height, width)`.
        pixels: The images as the model will get them, `(number, 3, height, width)`; `None` if not at hand.

    Raises:
        ValueError: The options of a `pixel_std` router lack its windows or thresholds.
    """
    kind = router.get("type")
    if kind == "fixed":
        return [range(len(ladder))[router.get("rung", -1)]] * number, [0.0] * number
    if kind == "pixel_std" and pixels is not None:
        if not {"windows", "thresholds"} <= set(router):
            raise ValueError(
                f"`router={dict(router)!r}` lacks 'windows' or 'thresholds', which decide the counts. Take the "
                "options that the model's config wrote: `AdaptiveLlavaProcessor.from_config(config, tokenizer)`."
            )
        return pixel_routing(pixels, grid, router["windows"], router["thresholds"])
    return None


def rungs_known_beforehand(
    routed: Routed | None,
    ladder: Sequence[int],
    number: int,
    budget: int | Sequence[int] | Mapping[str, int] | str | None = None,
    rungs: int | Sequence[int] | None = None,
    images_per_prompt: Sequence[int] | None = None,
) -> list[int] | None:
    """The rung of each image, or `None` if only the router, inside the model, can tell.

    Args:
        routed: What the router will choose, where that is known; see `routing_known_beforehand`.
        ladder: Token counts of one image, fewest first.
        number: Number of images.
        budget: `visual_token_budget` of the call.
        rungs: `visual_rungs` of the call.
        images_per_prompt: Images of each prompt, for `{"total": n}`; `None` takes all as one prompt.

    Raises:
        ValueError: Both are given, or one of them is impossible for the ladder.
    """
    if budget is not None and rungs is not None:
        raise ValueError(
            f"`visual_token_budget={budget!r}` and `visual_rungs={rungs!r}` were both given. Pass one of them: rungs "
            "replay an exact choice, a budget makes one."
        )
    if rungs is not None:
        return check_rungs([rungs] * number if isinstance(rungs, int) else list(rungs), ladder, number)
    if isinstance(budget, Mapping):
        if routed is None and set(budget) == {"total"}:
            return None  # whether it suffices, the model says
        decided = rungs_for_mapping(
            budget, ladder, [1] * number, images_per_prompt, lambda: routed or ([0] * number, [0.0] * number)
        )
        return None if routed is None else decided
    if budget is None or budget == "auto":
        return None if routed is None else list(routed[0])
    if isinstance(budget, str):
        raise ValueError(f"`visual_token_budget={budget!r}` is unknown. Pass a number of tokens or 'auto'.")
    return rungs_for_budget(budget, ladder, number)


def most_tokens(ladder: Sequence[int], budget: Any = None) -> int:
    """The most tokens that a router may spend on one image under a budget that leaves it a say."""
    ceiling = next(iter(budget.values())) if isinstance(budget, Mapping) else None
    return ladder[-1 if ceiling is None else highest_rung(ladder, ceiling)]
