"""The pictures of a card: what the router spends on what, and scores against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptive_llava.hub_cards.card_metadata import Results, data_label, one_line, slug, wholes
from adaptive_llava.training.token_budgets import AUTO


TOKENS = "card_tokens.png"


def picture_names(results: Sequence[Results]) -> tuple[str | None, dict[str, str]]:
    """Files that `draw_pictures` writes: that of the tokens, if a router was asked, and that of each metric."""
    tokens = TOKENS if any(histograms(results)) else None
    return tokens, {result["metric"]: f"card_{slug(result['metric'])}.png" for result in results}


def histograms(results: Sequence[Results]) -> dict[str, dict[int, int]]:
    """Number of images by the tokens that the router spent on them, by dataset."""
    return {
        data_label(result): {int(count): number for count, number in row["histogram"].items()}
        for result in results
        for row in result["budgets"]
        if row["budget"] == AUTO and row.get("histogram")
    }


def draw_pictures(results: Sequence[Results], folder: Path) -> list[str]:
    """Write the PNGs of a card into a folder; their names.

    Raises:
        ValueError: matplotlib is not installed.
    """
    tokens, scores = picture_names(results)
    if not scores:
        return []
    try:
        from adaptive_llava.training.accuracy_plot import draw_results

        for metric, name in scores.items():
            shown = [{**result, **_labels(result)} for result in wholes(results) if result["metric"] == metric]
            draw_results(shown, folder / name)
        if tokens:
            _draw_tokens(histograms(results), folder / tokens)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A card's pictures need {error.name}: install `adaptive-llava[eval]`, or leave the results out."
        ) from error
    return [*([tokens] if tokens else []), *scores.values()]


def _draw_tokens(counted: dict[str, dict[int, int]], path: Path) -> None:
    """One bar per dataset, cut into the shares of its images at each count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({count for row in counted.values() for count in row})
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(counted)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [_label(name) for name in counted]
    shares = [[row.get(count, 0) / sum(row.values()) for row in counted.values()] for count in counts]
    left = [0.0] * len(counted)
    for index, (count, share) in enumerate(zip(counts, shares, strict=True)):
        shade = 0.15 + 0.7 * index / max(len(counts) - 1, 1)
        colour = (0.9 - shade, 0.95 - 0.7 * shade, 0.98 - 0.4 * shade)
        axes.barh(range(len(counted)), share, left=left, label=f"{count}", color=colour)
        left = [before + more for before, more in zip(left, share, strict=True)]
    axes.set_yticks(range(len(counted)), labels)
    axes.set(xlim=(0, 1), xlabel="share of images")
    axes.invert_yaxis()
    axes.legend(title="tokens", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _labels(result: Results) -> dict[str, str]:
    return {"model": _label(one_line(str(result.get("model", "")))), "data": _label(data_label(result))}


def _label(name: str) -> str:
    """Short, and without what matplotlib takes for formulas."""
    return (name if len(name) <= 40 else f"{name[:37]}...").replace("$", r"\$")
