"""How many visual tokens pages need: the fewest that score almost as well as all of them, if those score at all.

Scores are sums over fields, so that pages with many fields count more. Intervals are of 95 %, from pages drawn with
replacement; two budgets are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_llava.training.metrics.anls.anls import similarity
from adaptive_llava.training.metrics.field_f1.field_f1 import compare_fields, read_fields


SCORES = ("field_f1", "anls")
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class PageScores:
    """Counts per page, `(n,)` each.

    Attributes:
        right: Fields read without a mistake.
        predicted: Fields in the answer.
        expected: Fields of the page.
        similar: Sum of the ANLS of the page's fields.
        parsed: Whether the answer holds a JSON object.
    """

    right: np.ndarray
    predicted: np.ndarray
    expected: np.ndarray
    similar: np.ndarray
    parsed: np.ndarray

    def score(self, name: str, drawn: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Field F1 or ANLS over the drawn pages, `(..., n)` indices -> `(...)`."""
        expected = self.expected[drawn].sum(-1)
        if name == "anls":
            return self.similar[drawn].sum(-1) / expected
        return 2 * self.right[drawn].sum(-1) / (self.predicted[drawn].sum(-1) + expected)


def score_pages(predictions: Sequence[str], references: Sequence[str]) -> PageScores:
    """Compare answers with the pages' JSON objects, field by field.

    Raises:
        ValueError: A reference without fields.
    """
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        flags = np.array(list(compare_fields(prediction, reference).values())).sum(0)
        said, fields = read_fields(prediction), read_fields(reference) or {}
        similar = sum(similarity((said or {}).get(name, ""), [value]) for name, value in fields.items())
        rows.append((*flags, similar, said is not None))
    return PageScores(*(np.array(column) for column in zip(*rows, strict=True)))


def draw_pages(number: int, seed: int) -> np.ndarray:
    """Indices of pages, `(RESAMPLES, number)`."""
    return np.random.default_rng(seed).integers(number, size=(RESAMPLES, number))


def with_interval(value: Any, drawn: np.ndarray) -> dict[str, Any]:
    """A figure with the 95 % of its resampled values."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": round(float(value), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def summarise(scores: PageScores, full: PageScores, drawn: np.ndarray) -> dict[str, Any]:
    """Field F1, ANLS and their difference from those at full tokens, each with its interval."""
    row: dict[str, Any] = {"json_rate": round(float(scores.parsed.mean()), 4)}
    for name in SCORES:
        value, all_tokens = (each.score(name) for each in (scores, full))
        values, all_values = (each.score(name, drawn) for each in (scores, full))
        row[name] = with_interval(value, values)
        row[f"{name}_against_full"] = with_interval(value - all_tokens, values - all_values)
    return row


@dataclass(frozen=True)
class TokenNeed:
    """What follows from a curve.

    Attributes:
        reads: Whether the model reads these pages at all.
        tokens: Mean tokens of the cheapest budget within the margin; `None` if it does not read.
        budget: That budget.
        certain: Whether the interval, too, keeps the loss within the margin.
        sentence: The same in words.
    """

    reads: bool
    tokens: float | None
    budget: int | str | None
    certain: bool
    sentence: str


def token_need(
    curve: Sequence[dict[str, Any]], exchanged: dict[str, Any], *, score: str, margin: float, useful: float
) -> TokenNeed:
    """The cheapest budget of a curve whose score is within `margin` of that at full tokens.

    Args:
        curve: Rows of `summarise` with `budget` and `mean_tokens`; the last has full tokens. The router's own row,
            `auto`, is no answer: its mean is set by its thresholds.
        exchanged: The same at full tokens, each question asked about another page; its difference is from the last
            row. What is right here was not read.
        score: `"field_f1"` or `"anls"`.
        margin: Loss of score that is allowed.
        useful: Score at full tokens under which nothing is said about tokens.
    """
    full, name = curve[-1], score.replace("_", " ").replace("anls", "ANLS").replace("f1", "F1")
    best, lead = full[score]["value"], -exchanged[f"{score}_against_full"]["interval"][1]
    said = f"{name} {best:.3f} at full tokens ({full['mean_tokens']:g})"
    if best < useful or lead <= 0:
        why = (
            f"below the {useful:g} from which a score says something"
            if best < useful
            else f"and {exchanged[score]['value']:.3f} when it is shown another page than the one asked about"
        )
        return TokenNeed(
            False,
            None,
            None,
            False,
            f"No budget reaches a useful score: {said}, {why}. This model cannot read your pages, so how many tokens "
            "they need cannot be told. Train longer, on more pages, or start from a model that reads.",
        )
    fixed = [row for row in curve if row["budget"] != "auto" and row[score]["value"] >= best - margin]
    cheapest = min(fixed, key=lambda row: float(row["mean_tokens"]))
    difference = cheapest[f"{score}_against_full"]
    low, high = difference["interval"]
    certain = low >= -margin
    doubt = "" if certain else " The interval does not rule out a larger loss: hold out more pages to be sure."
    return TokenNeed(
        True,
        cheapest["mean_tokens"],
        cheapest["budget"],
        certain,
        f"Your pages need {cheapest['mean_tokens']:g} token{'' if cheapest['mean_tokens'] == 1 else 's'}: "
        f"{name} {cheapest[score]['value']:.3f}, {said}; "
        f"difference {difference['value']:+.3f} ({low:+.3f} to {high:+.3f}), {margin:g} allowed.{doubt}",
    )
