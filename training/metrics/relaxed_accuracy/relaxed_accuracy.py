"""Relaxed accuracy: the score of ChartQA, where a number may be 5% off.

Paper: ChartQA, https://arxiv.org/abs/2203.10244, section 5.1.
"""

from __future__ import annotations

import datasets
import evaluate


_DESCRIPTION = """\
Share of the questions answered right. A number is right within 5% of its reference, bounds included; any other answer
is right if it is its reference, case aside.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: The answer of each question; or a list of accepted answers.
    tolerance: Largest distance of a number, as a share of its reference. Default: 0.05.

"5%" is the number 0.05. Nothing else is tidied: "1,000" and "$5" are no numbers, "5" is not "5%", a reference of 0 is
compared as text, and 2018 is right for 2017.

Returns:
    relaxed_accuracy: Mean over the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{masry2022chartqa,
    title = {{ChartQA}: A Benchmark for Question Answering about Charts with Visual and Logical Reasoning},
    author = {Masry, Ahmed and Long, Do Xuan and Tan, Jia Qing and Joty, Shafiq and Hoque, Enamul},
    booktitle = {Findings of ACL},
    year = {2022},
}
"""


def as_number(text: str) -> float | None:
    """The number a text is, percent as a share; `None` if it is no number."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_right(prediction: str, references: list[str], tolerance: float = 0.05) -> bool:
    """Whether an answer is near enough to one of its references.

    Raises:
        ValueError: No reference, or a tolerance below 0.
    """
    if tolerance < 0:
        raise ValueError(f"`tolerance={tolerance}` is below 0. Pass a share of the reference, such as 0.05.")
    if not references:
        raise ValueError(f"`references` is empty for the prediction {prediction!r}. Pass at least one answer.")
    return any(_is_near(prediction, reference, tolerance) for reference in references)


def _is_near(prediction: str, reference: str, tolerance: float) -> bool:
    said, expected = as_number(prediction), as_number(reference)
    if said is not None and expected:
        return abs(said - expected) / abs(expected) <= tolerance
    return prediction.lower() == reference.lower()


class RelaxedAccuracy(evaluate.Metric):
    """`evaluate.load("training/metrics/relaxed_accuracy").compute(predictions=["10.4"], references=["10"])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
            reference_urls=["https://arxiv.org/abs/2203.10244"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]] | list[str], tolerance: float = 0.05
    ) -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one list of "
                "accepted answers per prediction."
            )
        accepted = [[row] if isinstance(row, str) else list(row) for row in references]
        right = [is_right(*pair, tolerance) for pair in zip(predictions, accepted, strict=True)]
        return {"relaxed_accuracy": sum(right) / len(right)}
