"""Scores against mean visual tokens, with their intervals, of one or several results files of `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_llava.training.token_budgets import AUTO


def draw_results(results: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """One curve of fixed budgets per file, and a square of the same colour for its router; a PNG.

    Raises:
        ValueError: No results file, or files of different metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for result in results:
        if "budgets" not in result or "metric" not in result:
            raise ValueError(f"A file to draw holds {', '.join(result)}: pass `results.json` of `evaluate`.")
    metrics = sorted({result["metric"] for result in results})
    if len(metrics) != 1:
        raise ValueError(f"The files have the metrics {', '.join(metrics)}. Draw those of one metric together.")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, result in enumerate(results):
        label, colour = ", ".join(filter(None, [result["model"], result["data"]])), f"C{index % 10}"
        rows = sorted(result["budgets"], key=lambda row: row["mean_tokens"])
        fixed = [row for row in rows if row["budget"] != AUTO]
        routed = [row for row in rows if row["budget"] == AUTO]
        _draw(axes, fixed, label, color=colour, marker="o")
        _draw(axes, routed, f"{label}: router", color=colour, marker="s", markersize=8, linestyle="none")
    axes.set(xlabel="mean visual tokens per image", ylabel=metrics[0], xscale="log")
    ticks = sorted({row["mean_tokens"] for result in results for row in result["budgets"] if row["budget"] != AUTO})
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], label: str, **style: Any) -> None:
    if not rows:
        return
    values = [row["score"]["value"] for row in rows]
    intervals = [row["score"].get("interval") or [value, value] for row, value in zip(rows, values, strict=True)]
    # a percentile interval need not hold the value itself
    below = [max(value - low, 0) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(high - value, 0) for value, (_, high) in zip(values, intervals, strict=True)]
    axes.errorbar([row["mean_tokens"] for row in rows], values, yerr=[below, above], capsize=3, label=label, **style)
