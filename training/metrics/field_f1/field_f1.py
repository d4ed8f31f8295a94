"""Field F1: how many fields of a page were read without a mistake, from answers that are JSON objects.

The score of key information extraction (SROIE task 3, CORD): a field counts if its value is right in full.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import datasets
import evaluate


_DESCRIPTION = """\
F1 over all fields of all pages. A predicted field is right if the page has it and the values are the same string, runs
of spaces aside. A field that is missing lowers the recall, one that the page does not have lowers the precision, and a
prediction that holds no JSON object predicts nothing.
"""

_INPUTS = """\
Args:
    predictions: One answer per page: a string that holds a JSON object; text around it is left out.
    references: One JSON object per page, as a string, with at least one field.
    ignore_case: Whether "Total" equals "TOTAL". Default: False.

A number is compared as it is written: 15.40 is not 15.4. A value that is null or empty is no field.

Returns:
    field_f1, precision, recall: Over all fields, 0 to 1.
    json_rate: Share of the predictions that hold a JSON object.
    per_field: F1 by name of the field.
"""


def read_fields(text: str) -> dict[str, str] | None:
    """The fields of a JSON object as strings, spaces tidied; `None` if the text holds no such object."""
    try:
        # numbers stay as they are written
        found = json.loads(text[text.index("{") : text.rindex("}") + 1], parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    fields = {name: " ".join(_as_text(value).split()) for name, value in found.items()}
    return {name: value for name, value in fields.items() if value}


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def compare_fields(
    prediction: str, reference: str, *, ignore_case: bool = False
) -> dict[str, tuple[bool, bool, bool]]:
    """For every field of a page or its prediction: whether it is right, was predicted, was expected.

    Raises:
        ValueError: The reference is no JSON object with fields.
    """
    expected = read_fields(reference)
    if not expected:
        raise ValueError(
            f"`references` holds {reference[:80]!r}, which is no JSON object with at least one field. Leave pages "
            "without fields out."
        )
    predicted = read_fields(prediction) or {}

    def right(name: str) -> bool:
        pair = [predicted.get(name), expected.get(name)]
        return None not in pair and len({text.casefold() if ignore_case else text for text in pair}) == 1

    return {name: (right(name), name in predicted, name in expected) for name in expected | predicted}


def f1(right: int, predicted: int, expected: int) -> float:
    """Harmonic mean of precision and recall; 0 where there is nothing to count."""
    return 2 * right / (predicted + expected) if predicted + expected else 0.0


def page_f1(prediction: str, reference: str) -> float:
    """F1 over the fields of one page.

    Raises:
        ValueError: The reference is no JSON object with fields.
    """
    return f1(*map(sum, zip(*compare_fields(prediction, reference).values(), strict=True)))


class FieldF1(evaluate.Metric):
    """`evaluate.load("training/metrics/field_f1").compute(predictions=['{"total": "9"}'], references=[...])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], ignore_case: bool = False) -> dict[str, Any]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one JSON "
                "object per page in both."
            )
        counts: dict[str, list[int]] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            for name, flags in compare_fields(prediction, reference, ignore_case=ignore_case).items():
                counts[name] = [count + flag for count, flag in zip(counts.get(name, [0, 0, 0]), flags, strict=True)]
        right, predicted, expected = (sum(column) for column in zip(*counts.values(), strict=True))
        return {
            "field_f1": f1(right, predicted, expected),
            "precision": right / predicted if predicted else 0.0,
            "recall": right / expected,
            "json_rate": sum(read_fields(text) is not None for text in predictions) / len(predictions),
            "per_field": _per_field(counts),
        }


def _per_field(counts: Mapping[str, list[int]]) -> dict[str, float]:
    return {name: f1(*row) for name, row in counts.items() if row[2]}
