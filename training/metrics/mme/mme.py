"""MME: scores of 14 abilities, by pairs of questions about an image to answer yes or no.

Paper: MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models,
https://arxiv.org/abs/2306.13394.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate


FIELDS = ("answer", "category", "question_id")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_DESCRIPTION = """\
Per category, the share of the questions answered right plus the share of the images with both questions answered
right, times 100; summed over the categories of perception and of cognition.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: One mapping per question: `answer`, "Yes" or "No"; `category`, one of the 14 of MME; `question_id`, the
        name of its image, which two questions of a category share.

An answer is yes or no if it is that word, or else if its first four characters hold "yes" or "no", case aside; any
other is wrong. Spaces before it count among the four.

Returns:
    perception: Sum over the 10 categories of perception, up to 2000; `None` without any of them.
    cognition: Sum over the 4 categories of cognition, up to 800; `None` without any of them.
    per_category: `accuracy` and `accuracy_plus` (0 to 1) and `score` (0 to 200), by category.
    other: Share of the answers that are neither yes nor no.
"""

_CITATION = """\
@article{fu2023mme,
    title = {{MME}: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models},
    author = {Fu, Chaoyou and Chen, Peixian and Shen, Yunhang and Qin, Yulei and others},
    journal = {arXiv:2306.13394},
    year = {2023},
}
"""


def parse(prediction: str) -> str:
    """ "yes", "no", or "other" for an answer that is neither."""
    text = prediction.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def check(reference: Any) -> None:
    """Refuses what is no reference.

    Raises:
        ValueError: A field that is missing, an answer that is neither yes nor no, or an unknown category.
    """
    missing = [name for name in FIELDS if not isinstance(reference, Mapping) or not reference.get(name)]
    if missing:
        raise ValueError(
            f"`references` holds {reference!r} without {' and '.join(missing)}. Give every question its "
            "`answer`, `category` and `question_id`."
        )
    if reference["answer"].lower() not in ("yes", "no"):
        raise ValueError(f"`references` holds the answer {reference['answer']!r}. MME knows 'Yes' and 'No'.")
    if reference["category"] not in PERCEPTION + COGNITION:
        raise ValueError(
            f"`references` holds the category {reference['category']!r}, which is unknown. Known: "
            f"{', '.join(PERCEPTION + COGNITION)}."
        )


def is_right(prediction: str, reference: Mapping[str, str]) -> bool:
    """Whether an answer is that of a checked reference."""
    return parse(prediction) == reference["answer"].lower()


def score_category(images: Mapping[str, list[bool]]) -> dict[str, float]:
    """Figures of one category, from the two questions of every image, right or wrong.

    Raises:
        ValueError: An image with one question, or more than two.
    """
    for name, rights in images.items():
        if len(rights) != 2:
            raise ValueError(
                f"`references` holds {len(rights)} questions with `question_id={name!r}` in one category. MME asks "
                "two about each image: pass both, and no question twice."
            )
    accuracy = sum(sum(rights) for rights in images.values()) / (2 * len(images))
    both = sum(all(rights) for rights in images.values()) / len(images)
    return {"accuracy": accuracy, "accuracy_plus": both, "score": 100 * (accuracy + both)}


class Mme(evaluate.Metric):
    """`evaluate.load("training/metrics/mme").compute(predictions=["Yes", "No"], references=[{...}, {...}])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": dict.fromkeys(FIELDS, text)}),
            reference_urls=["https://arxiv.org/abs/2306.13394"],
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
        categories: dict[str, dict[str, list[bool]]] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            images = categories.setdefault(reference["category"], {})
            images.setdefault(reference["question_id"], []).append(is_right(prediction, reference))
        per_category = {name: score_category(images) for name, images in sorted(categories.items())}
        return {
            "perception": _sum(per_category, PERCEPTION),
            "cognition": _sum(per_category, COGNITION),
            "per_category": per_category,
            "other": [parse(prediction) for prediction in predictions].count("other") / len(predictions),
        }


def _sum(per_category: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> float | None:
    scores = [per_category[name]["score"] for name in names if name in per_category]
    return sum(scores) if scores else None
