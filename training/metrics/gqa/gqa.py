"""GQA accuracy: share of the answers that are their reference.

Paper: GQA, https://arxiv.org/abs/1902.09506.
"""

from __future__ import annotations

import string

import datasets
import evaluate


VARIANTS = ("official", "exact", "lmms_eval")

_DESCRIPTION = """\
Share of the answers that equal their reference, after the answer lost its capitals and its last period.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: The answer of each question.
    variant: "official" (default) writes an answer in small letters without periods at its end, as LLaVA does before
        GQA's own script compares it with the reference as it is. "exact" compares answers as they are. "lmms_eval"
        leaves out case, punctuation and spaces around it in both.

Returns:
    accuracy: Share of the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{hudson2019gqa,
    title = {{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
    author = {Hudson, Drew A. and Manning, Christopher D.},
    booktitle = {CVPR},
    year = {2019},
}
"""


def is_right(prediction: str, reference: str, variant: str = "official") -> bool:
    """Whether an answer is its reference.

    Raises:
        ValueError: An unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant={variant!r}` is unknown. Known: {', '.join(VARIANTS)}.")
    if variant == "official":
        return prediction.rstrip(".").lower() == reference
    if variant == "exact":
        return prediction == reference
    return _letters(prediction.strip()) == _letters(reference)


def _letters(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


class Gqa(evaluate.Metric):
    """`evaluate.load("training/metrics/gqa").compute(predictions=["Left."], references=["left"])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://arxiv.org/abs/1902.09506"],
        )

    def _compute(self, predictions: list[str], references: list[str], variant: str = "official") -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one answer per "
                "question in both."
            )
        right = [is_right(*pair, variant) for pair in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right)}
