"""ScienceQA accuracy: school questions with two to five choices, answered by letter.

Paper: Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering,
https://arxiv.org/abs/2209.09513; answers are read as LLaVA's evaluation does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import datasets
import evaluate


LETTERS = "ABCDE"

_DESCRIPTION = """\
Share of the questions whose answer is the right letter: alone, with a period and a space behind it, or in "The answer
is A." said once.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: One mapping per question: `answer`, the index of the right choice from 0, and `choices`, their texts.

Returns:
    accuracy: Share of the questions, 0 to 1.
    unparsed: Share of the answers that name no letter; they are wrong.
"""

_CITATION = """\
@inproceedings{lu2022learn,
    title = {Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering},
    author = {Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and others},
    booktitle = {NeurIPS},
    year = {2022},
}
"""


def parse(prediction: str) -> str | None:
    """The letter that an answer names; `None` if it names none, or several."""
    if prediction[:1] and prediction[0] in LETTERS and (len(prediction) == 1 or prediction[1:3] == ". "):
        return prediction[0]
    # any character ends the sentence, as in LLaVA's script
    said = re.findall(r"The answer is ([A-Z]).", prediction)
    return said[0] if len(said) == 1 else None


def check(reference: Any) -> None:
    """Refuses what is no reference.

    Raises:
        ValueError: A field that is missing, or an answer that is the index of no choice.
    """
    fields = reference if isinstance(reference, Mapping) else {}
    answer, choices = fields.get("answer"), fields.get("choices")
    if answer is None or not choices:
        raise ValueError(
            f"`references` holds {reference!r}. Give every question its `answer`, an index, and its `choices`, a list."
        )
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(
            f"`references` holds the answer {answer} to a question of {len(choices)} choices. Pass the index of the "
            f"right one, from 0, of at most {len(LETTERS)} choices."
        )


def is_right(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer names the letter of a checked reference."""
    return parse(prediction) == LETTERS[reference["answer"]]


class ScienceQa(evaluate.Metric):
    """`evaluate.load("training/metrics/scienceqa").compute(predictions=["B"], references=[{"answer": 1, ...}])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        reference = {"answer": datasets.Value("int64"), "choices": datasets.List(text)}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": reference}),
            reference_urls=["https://arxiv.org/abs/2209.09513"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **options: Any) -> None:
        """Adds a batch, checked here because `datasets` only says that a key is missing."""
        for reference in [] if references is None else references:
            check(reference)
        super().add_batch(predictions=predictions, references=references, **options)

    def add(self, *, prediction: Any = None, reference: Any = None, **options: Any) -> None:
        """Adds one answer and its reference, checked."""
        check(reference)
        super().add(prediction=prediction, reference=reference, **options)

    def _compute(self, predictions: list[str], references: list[dict[str, Any]]) -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one answer and "
                "one mapping per question."
            )
        letters = [parse(prediction) for prediction in predictions]
        right = [is_right(*pair) for pair in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right), "unparsed": letters.count(None) / len(letters)}
