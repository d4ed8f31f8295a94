"""Which visual-token counts are known before the model runs, and bounds of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# In a checkpoint these stand beside this file; in the installed package they do not.
try:
    from .pixel_statistics import pixel_routing
    from .visual_token_geometry import ImageCost, decide_rungs, highest_rung
except ImportError:
    from adaptive_llava.modeling.pixel_statistics import pixel_routing
    from adaptive_llava.modeling.visual_token_geometry import ImageCost, decide_rungs, highest_rung


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
        rung = router.get("rung", -1)
        rungs_there = {len(image.ladder) for image in images}
        if not isinstance(rung, int) or any(not -number <= rung < number for number in rungs_there):
            raise ValueError(
                f"`router={dict(router)!r}` names no rung of a model with {sorted(rungs_there)} token counts. Take "
                "the options that the model's config wrote."
            )
        rungs = [rung % len(image.ladder) for image in images for _ in range(image.views)]
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
    if routed is None and rungs is None and isinstance(budget, Mapping) and set(budget) == {"total"}:
        return None  # whether it suffices, the model says
    views = sum(image.views for image in images)
    decided = decide_rungs(
        images,
        lambda: routed or ([0] * views, [0.0] * views),
        budget=budget,
        rungs=rungs,
        images_per_prompt=images_per_prompt,
    )
    by_router = rungs is None and (budget is None or isinstance(budget, (str, Mapping)))
    return None if routed is None and by_router else decided


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
