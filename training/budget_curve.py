"""A curve of scores against mean visual tokens, as a table for the terminal and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_llava.training.budget_sweep import FULL, Answers
from adaptive_llava.training.document_pages import DocumentPage
from adaptive_llava.training.token_need import score_pages, summarise


LABELS = {"field_f1": "field F1", "anls": "ANLS"}

_FIXED: dict[str, Any] = {"marker": "o", "color": "#2c5f8a"}
_ROUTED: tuple[dict[str, Any], ...] = (  # as it came, and calibrated
    {"marker": "s", "linestyle": "none", "color": "#d08020"},
    {"marker": "D", "linestyle": "none", "color": "#3a8a4d"},
)


def curve_of(
    answers: Mapping[str, Answers], pages: Sequence[DocumentPage], draws: np.ndarray, exchanged: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The curve, cheapest first and all tokens last; and the scores with pages exchanged, if that was asked."""
    references = [page.answer for page in pages]
    scores = {name: score_pages(given.texts, references) for name, given in answers.items()}
    rows = {
        name: {
            "budget": name,
            "mean_tokens": round(float(np.mean(given.tokens)), 2),
            "seconds_per_page": round(given.seconds / len(pages), 3),
            **summarise(scores[name], scores[FULL], draws),
        }
        for name, given in answers.items()
    }
    other = rows.pop(exchanged, {})
    return sorted(rows.values(), key=lambda row: (row["budget"] == FULL, row["mean_tokens"])), other


def table_of(results: dict[str, Any]) -> str:
    """One line per budget, cheapest first; the last is without the right page."""
    lines = [f"{'budget':<18}{'tokens':>8}{'field F1 (95 %)':>26}{'ANLS (95 %)':>26}{'JSON':>7}{'s/page':>8}"]
    for row in (*results["curve"], results["other_page"]):
        cells = [f"{row['budget']:<18}", f"{row['mean_tokens']:>8.1f}"]
        for name in LABELS:
            low, high = row[name]["interval"]
            cells.append(f"{row[name]['value']:>10.3f} ({low:.3f} to {high:.3f})")
        lines.append("".join(cells) + f"{row['json_rate']:>7.0%}{row['seconds_per_page']:>8.2f}")
    lines.append(f"{results['other_page']['budget']}: all tokens, but of another page than the one asked about")
    return "\n".join(lines)


def draw_curve(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Scores with their intervals, and as a dashed line what is right about another page; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves = [("fixed budget", [row for row in results["curve"] if not row["budget"].startswith("auto")], _FIXED)]
    routed = [row for row in results["curve"] if row["budget"].startswith("auto")]
    curves += [(row["budget"], [row], style) for row, style in zip(routed, _ROUTED, strict=False)]
    counts = [row["mean_tokens"] for row in curves[0][1]]
    for axes, (name, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
        for legend, rows, style in curves:
            values = [row[name]["value"] for row in rows]
            # a percentile interval need not hold the value itself
            below = [max(row[name]["value"] - row[name]["interval"][0], 0) for row in rows]
            above = [max(row[name]["interval"][1] - row[name]["value"], 0) for row in rows]
            tokens = [row["mean_tokens"] for row in rows]
            axes.errorbar(tokens, values, yerr=[below, above], capsize=3, label=legend, **style)
        axes.axhline(results["other_page"][name]["value"], color="#888888", linestyle="--", label="another page shown")
        if results["need"]["tokens"] is not None and name == results["score"]:
            axes.axvline(results["need"]["tokens"], color="#c0392b", linewidth=1, label="needed")
        axes.set(xlabel="mean visual tokens", ylabel=label, xscale="log", ylim=(-0.02, 1.02))
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    pages = results["pages"]
    figure.suptitle(f"{results['data']}: {pages['held_out']} held-out pages, {pages['held_out_fields']} fields")
    figure.savefig(path, dpi=110)
