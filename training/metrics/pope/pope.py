"""POPE: whether a model says that objects are there which are not, by questions to answer yes or no.

Paper: Evaluating Object Hallucination in Large Vision-Language Models, https://arxiv.org/abs/2305.10355.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate


FIELDS = ("answer", "category")

_DESCRIPTION = """\
Accuracy, precision, recall and F1 of "yes", and the share of answers that are yes, per split (random, popular,
adversarial) and as the mean of the splits.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: One mapping per question: `answer`, "yes" or "no", and `category`, the name of its split.

An answer is no if "No", "no" or "not" is a word of its first sentence; anything else is yes, an empty answer too.
Precision, recall and F1 are 0 where there is nothing to divide by (the authors' script ends there).

Returns:
    accuracy, precision, recall, f1, yes_ratio: Mean over the splits, 0 to 1. `yes_ratio` is the share of the answers
        that are yes, not that of the references.
    per_split: The same five figures by split.
"""

_CITATION = """\
@inproceedings{li2023evaluating,
    title = {Evaluating Object Hallucination in Large Vision-Language Models},
    author = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
    booktitle = {EMNLP},
    year = {2023},
}
"""


def says_yes(prediction: str) -> bool:
    """Whether an answer counts as yes."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def check(reference: Any) -> None:
    """Refuses what is no reference.

    Raises:
        ValueError: A field that is missing, or an answer that is neither yes nor no.
    """
    missing = [name for name in FIELDS if not isinstance(reference, Mapping) or not reference.get(name)]
    if missing:
        raise ValueError(
            f"`references` holds {reference!r} without {' and '.join(missing)}. Give every question its `answer` and "
            "the name of its split as `category`."
        )
    if reference["answer"].lower() not in ("yes", "no"):
        raise ValueError(f"`references` holds the answer {reference['answer']!r}. POPE knows 'yes' and 'no'.")


def is_right(prediction: str, reference: Mapping[str, str]) -> bool:
    """Whether an answer is that of a checked reference."""
    return says_yes(prediction) == (reference["answer"].lower() == "yes")


def figures(said: list[bool], expected: list[bool]) -> dict[str, float]:
    """The five figures of one split, from what was said and what is right, `True` for yes."""
    pairs = list(zip(said, expected, strict=True))
    right_yes = pairs.count((True, True))
    return {
        "accuracy": sum(first == second for first, second in pairs) / len(pairs),
        "precision": right_yes / sum(said) if any(said) else 0.0,
        "recall": right_yes / sum(expected) if any(expected) else 0.0,
        "f1": 2 * right_yes / (sum(said) + sum(expected)) if any(said) or any(expected) else 0.0,
        "yes_ratio": sum(said) / len(said),
    }


class Pope(evaluate.Metric):
    """`evaluate.load("training/metrics/pope").compute(predictions=["Yes"], references=[{"answer": "no", ...}])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": dict.fromkeys(FIELDS, text)}),
            reference_urls=["https://arxiv.org/abs/2305.10355"],
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

    def _compute(self, predictions: list[str], references: list[dict[str, str]]) -> dict[str, Any]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one answer and "
                "one mapping per question."
            )
        splits: dict[str, tuple[list[bool], list[bool]]] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            columns = splits.setdefault(reference["category"], ([], []))
            columns[0].append(says_yes(prediction))
            columns[1].append(reference["answer"].lower() == "yes")
        per_split = {name: figures(*columns) for name, columns in sorted(splits.items())}
        rows = list(per_split.values())
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"per_split": per_split}
