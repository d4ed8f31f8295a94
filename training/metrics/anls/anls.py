"""ANLS: average normalised Levenshtein similarity, the score of DocVQA and InfographicsVQA.

Paper: Scene Text Visual Question Answering, https://arxiv.org/abs/1905.13648, equation 1.
"""

from __future__ import annotations

import datasets
import evaluate


VARIANTS = ("leaderboard", "paper")

_DESCRIPTION = """\
Average normalised Levenshtein similarity: 1 minus the edit distance to the nearest reference, as a share of the longer
of the two strings; nothing where less than half is right; averaged over questions.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: The accepted answers of each question, as a list; or a single answer.
    variant: "leaderboard" (default) is the script of the challenge server: case and runs of spaces do not count, a
        similarity of exactly 0.5 is kept, and lengths are those of the strings as given. "paper" is equation 1: only
        case does not count, and 0.5 gives 0.

Returns:
    anls: Mean over the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{biten2019scene,
    title = {Scene Text Visual Question Answering},
    author = {Biten, Ali Furkan and Tito, Ruben and Mafla, Andres and others},
    booktitle = {ICCV},
    year = {2019},
}
"""


def similarity(prediction: str, references: list[str], variant: str = "leaderboard") -> float:
    """ANLS of one answer, 0 to 1; two empty strings are alike.

    Raises:
        ValueError: No reference, or an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant={variant!r}` is unknown. Known: {', '.join(VARIANTS)}.")
    if not references:
        raise ValueError(f"`references` is empty for the prediction {prediction!r}. Pass at least one answer.")
    strict = variant == "paper"
    best = 1 - min(_distance(prediction, reference, strict) for reference in references)
    return best if best > 0.5 or (best == 0.5 and not strict) else 0.0


def _distance(prediction: str, reference: str, strict: bool) -> float:
    longest = max(len(prediction), len(reference))
    if not longest:
        return 0.0
    first, second = prediction.lower(), reference.lower()
    if not strict:
        first, second = " ".join(first.split()), " ".join(second.split())
    return levenshtein(first, second) / longest


def levenshtein(first: str, second: str) -> int:
    """Characters to insert, delete or replace that make one string of the other."""
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, start=1):
        diagonal, row[0] = row[0], index
        for place, other in enumerate(second, start=1):
            replaced = diagonal + (character != other)
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, replaced)
    return row[-1]


class Anls(evaluate.Metric):
    """`evaluate.load("training/metrics/anls").compute(predictions=["12.50"], references=[["12.50", "$12.50"]])`."""

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
            reference_urls=["https://arxiv.org/abs/1905.13648", "https://rrc.cvc.uab.es/?ch=17"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]] | list[str], variant: str = "leaderboard"
    ) -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one list of "
                "accepted answers per prediction."
            )
        accepted = [[row] if isinstance(row, str) else list(row) for row in references]
        scores = [similarity(*pair, variant) for pair in zip(predictions, accepted, strict=True)]
        return {"anls": sum(scores) / len(scores)}
