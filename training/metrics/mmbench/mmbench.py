"""MMBench accuracy: questions asked once per rotation of their choices, right if all rotations are.

Paper: MMBench: Is Your Multi-modal Model an All-around Player?, https://arxiv.org/abs/2307.06281. Answers are read by
its rules; one that they leave undecided, which the authors give to a judge model, is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate


FIELDS = ("index", "answer", "options")
LETTERS = "ABCD"
ROTATION = 1_000_000
FAILED = "Failed to obtain answer via API"
# how a letter stands as a word of its own, nearest to bare first
FRAMES = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")

_DESCRIPTION = """\
Share of the questions answered right in every rotation of their choices (circular evaluation). An answer is the only
letter it names, or else the only choice it holds.
"""

_INPUTS = """\
Args:
    predictions: One answer per rotation of every question.
    references: One mapping per rotation: `index`, whose remainder by 1,000,000 is the index of the question as asked
        first; `answer`, the right letter; and `options`, the texts of its choices in order of their letters.

Returns:
    accuracy: Share of the questions that are right in all their rotations, 0 to 1.
    row_accuracy: Share of the rotations answered right.
    undecided: Share of the rotations whose answer names no choice by these rules; they are wrong.
"""

_CITATION = """\
@inproceedings{liu2024mmbench,
    title = {{MMBench}: Is Your Multi-modal Model an All-around Player?},
    author = {Liu, Yuan and Duan, Haodong and Zhang, Yuanhan and Li, Bo and others},
    booktitle = {ECCV},
    year = {2024},
}
"""


def infer_option(prediction: str) -> str | None:
    """The only letter, of A to E, that is a word of an answer; `None` if none or several are."""
    if FAILED in prediction:
        return None
    words = prediction.split()
    for frame in ("{}", *FRAMES):
        found = [letter for letter in "ABCDE" if frame.format(letter) in words]
        # a bare A in more than three words may be an article
        if len(found) == 1 and not (frame == "{}" and found == ["A"] and len(words) > 3):
            return found[0]
    return None


def infer_text(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the only choice whose text an answer holds, case aside; `None` if it holds none or several."""
    found = [letter for letter, text in choices.items() if text.lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None


def infer(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer means; `None` where the rules leave it undecided."""
    return infer_option(prediction) or infer_text(prediction, choices)


def check(reference: Any) -> None:
    """Refuses what is no reference.

    Raises:
        ValueError: A field that is missing, or an answer that is none of the letters of its options.
    """
    missing = [name for name in FIELDS if not isinstance(reference, Mapping) or reference.get(name) in (None, "", [])]
    if missing:
        raise ValueError(
            f"`references` holds {reference!r} without {' and '.join(missing)}. Give every rotation its `index`, its "
            "`answer`, a letter, and its `options`, a list."
        )
    options = reference["options"]
    if len(options) > len(LETTERS) or reference["answer"] not in list(LETTERS[: len(options)]):
        raise ValueError(
            f"`references` holds the answer {reference['answer']!r} to a question of {len(options)} options. Pass the "
            f"letter of one of at most {len(LETTERS)} options."
        )


def inferred(prediction: str, reference: Mapping[str, Any]) -> str | None:
    """The letter that an answer means among the options of a checked reference."""
    return infer(prediction, dict(zip(LETTERS, reference["options"], strict=False)))


def is_right(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer means the letter of a checked reference."""
    return inferred(prediction, reference) == reference["answer"]


class MmBench(evaluate.Metric):
    """`evaluate.load("training/metrics/mmbench").compute(predictions=["B"], references=[{"index": 7, ...}])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        reference = {"index": datasets.Value("int64"), "answer": text} | {"options": datasets.List(text)}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": reference}),
            reference_urls=["https://arxiv.org/abs/2307.06281"],
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
                "one mapping per rotation."
            )
        letters = [inferred(*pair) for pair in zip(predictions, references, strict=True)]
        questions: dict[int, dict[int, bool]] = {}
        for letter, reference in zip(letters, references, strict=True):
            question, index = reference["index"] % ROTATION, reference["index"]
            rotations = questions.setdefault(question, {})
            if index in rotations:
                raise ValueError(f"`references` holds `index={index}` twice. Pass every rotation once.")
            rotations[index] = letter == reference["answer"]
        for question, rotations in questions.items():
            if question not in rotations:
                raise ValueError(
                    f"`references` holds rotations {sorted(rotations)} without `index={question}`, the question as "
                    "asked first. Pass all rotations of a question."
                )
        rights = [right for rotations in questions.values() for right in rotations.values()]
        return {
            "accuracy": sum(all(rotations.values()) for rotations in questions.values()) / len(questions),
            "row_accuracy": sum(rights) / len(rights),
            "undecided": letters.count(None) / len(letters),
        }
