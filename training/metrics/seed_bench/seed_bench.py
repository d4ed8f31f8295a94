"""SEED-Bench accuracy: questions with four choices, answered by letter.

Paper: SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension, https://arxiv.org/abs/2307.16125.
"""

from __future__ import annotations

import datasets
import evaluate


VARIANTS = ("exact", "first_letter")

_DESCRIPTION = """\
Share of the questions whose answer is the right letter.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: The right letter of each question.
    variant: "exact" (default) takes the letter alone, as LLaVA's script does. "first_letter" takes the first character
        behind spaces, case aside, as lmms-eval does: "A. cat" is A, and so is "and".

Returns:
    accuracy: Share of the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{li2024seed,
    title = {{SEED-Bench}: Benchmarking Multimodal Large Language Models},
    author = {Li, Bohao and Ge, Yuying and Ge, Yixiao and Wang, Guangzhi and others},
    booktitle = {CVPR},
    year = {2024},
}
"""


def is_right(prediction: str, reference: str, variant: str = "exact") -> bool:
    """Whether an answer is the right letter.

    Raises:
        ValueError: A reference that is no letter from A to D, or an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant={variant!r}` is unknown. Known: {', '.join(VARIANTS)}.")
    if reference not in list("ABCD"):
        raise ValueError(f"`references` holds {reference!r}. Pass the letter of the right choice: A, B, C or D.")
    if variant == "exact":
        return prediction == reference
    return prediction.strip()[:1].upper() == reference


class SeedBench(evaluate.Metric):
    """`evaluate.load("training/metrics/seed_bench").compute(predictions=["A"], references=["A"])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://arxiv.org/abs/2307.16125"],
        )

    def _compute(self, predictions: list[str], references: list[str], variant: str = "exact") -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one answer and "
                "one letter per question."
            )
        right = [is_right(*pair, variant) for pair in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right)}
