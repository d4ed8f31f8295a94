"""Which visual-token counts are known before the model runs, and bounds of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# In a checkpoint these stand beside this file; in the installed package they do not.
try:
    from .pixel_statistics import pixel_routing
    from .visual_token_geometry import (
        ImageCost,
        check_rungs,
        highest_rung,
        rungs_for_budget,
        rungs_for_mapping,
        shared_rungs,
    )
except ImportError:
    from adaptive_llava.modeling.pixel_statistics import pixel_routing
    from adaptive_llava.modeling.visual_token_geometry import (
        ImageCost,
        check_rungs,
        highest_rung,
        rungs_for_budget,
        rungs_for_mapping,
        shared_rungs,
    )


Routed = tuple[Sequence[int], Sequence[float]]


def routing_known_beforehand(
    router: Mapping[str, Any], images: Sequence[ImageCost], *, grid: Sequence[int] = (), pixels: Any = None
) -> Routed | None:
    """Rung and score of each view as the router will choose them, or `None` if that takes the model.

    Args:
        router: The model's router options, `{"type": ..., ...}`.
        images: Cost of each image.
        grid: Patches per side of a view, `(height, width)`.
        pixels: The views as the model's router will see them, `(V, 3, height, width)`; `None` if not at hand.

    Raises:
        ValueError: The options of a `pixel_std` router lack its windows or thresholds.
    """
    kind = router.get("type")
    if kind == "fixed":
        rungs = [range(len(image.ladder))[router.get("rung", -1)] for image in images for _ in range(image.views)]
        return rungs, [0.0] * len(rungs)
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
    images: Sequence[ImageCost],
    budget: int | Sequence[int] | Mapping[str, int] | str | None = None,
    rungs: int | Sequence[int] | None = None,
    images_per_prompt: Sequence[int] | None = None,
) -> list[int] | None:
    """The rung of each view, or `None` if only the router, inside the model, can tell.

    Args:
        routed: What the router will choose, where that is known; see `routing_known_beforehand`.
        images: Cost of each image.
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
    views = sum(image.views for image in images)
    if rungs is not None:
        return check_rungs([rungs] * views if isinstance(rungs, int) else list(rungs), images)
    if isinstance(budget, Mapping):
        if routed is None and set(budget) == {"total"}:
            return None  # whether it suffices, the model says
        decided = rungs_for_mapping(budget, images, images_per_prompt, lambda: routed or ([0] * views, [0.0] * views))
        return None if routed is None else decided
    if budget is None or budget == "auto":
        return None if routed is None else shared_rungs(routed[0], images)
    if isinstance(budget, str):
        raise ValueError(f"`visual_token_budget={budget!r}` is unknown. Pass a number of tokens or 'auto'.")
    return rungs_for_budget(budget, images)


def most_tokens(image: ImageCost, budget: Any = None) -> int:
    """Tokens that a router can spend on an image at most.

    Args:
        image: Cost of the image.
        budget: `visual_token_budget` of the call; a ceiling or a total lowers the count.
    """
    ceiling = next(iter(budget.values())) if isinstance(budget, Mapping) else None
    if ceiling is None:
        return image.counts[-1]
    # several units may differ in their rungs, and add up to any count below the ceiling
    return image.counts[highest_rung(image.counts, ceiling)] if image.units == 1 else min(ceiling, image.counts[-1])
