"""Which visual-token counts are known before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# In a checkpoint this stands beside this file; in the installed package it does not.
try:
    from .visual_token_geometry import check_rungs, highest_rung, rungs_for_budget
except ImportError:
    from adaptive_llava.modeling.visual_token_geometry import check_rungs, highest_rung, rungs_for_budget


def rungs_known_beforehand(
    router: Mapping[str, Any],
    ladder: Sequence[int],
    number: int,
    budget: int | Sequence[int] | Mapping[str, int] | str | None = None,
    rungs: int | Sequence[int] | None = None,
) -> list[int] | None:
    """The rung of each image, or `None` if only the router, inside the model, can tell.

    Args:
        router: The model's router options, `{"type": ..., ...}`.
        ladder: Token counts of one image, fewest first.
        number: Number of images.
        budget: `visual_token_budget` of the call.
        rungs: `visual_rungs` of the call.

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
    fixed = range(len(ladder))[router.get("rung", -1)] if router.get("type") == "fixed" else None
    if isinstance(budget, Mapping):
        if len(budget) != 1 or not set(budget) <= {"ceiling", "total"}:
            raise ValueError(
                f"`visual_token_budget={dict(budget)!r}` is not understood. As a dict, pass {{'ceiling': n}} or "
                "{'total': n}."
            )
        if "total" in budget:
            return None
        ceiling = highest_rung(ladder, budget["ceiling"])
        return None if fixed is None else [min(ceiling, fixed)] * number
    if budget is None or budget == "auto":
        return None if fixed is None else [fixed] * number
    if isinstance(budget, str):
        raise ValueError(f"`visual_token_budget={budget!r}` is unknown. Pass a number of tokens or 'auto'.")
    return rungs_for_budget(budget, ladder, number)
