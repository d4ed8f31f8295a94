"""MMMU accuracy: college questions, some with options to choose from, some open.

Paper: MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert AGI,
https://arxiv.org/abs/2311.16502; answers are read as its own evaluation does.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate


UNPARSED = ("wrong", "random")
# an open answer is looked for behind the last of these
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)

_DESCRIPTION = """\
Share of the questions answered right. With options, the letter said last counts, or in a long answer the option. An
open answer is right if the reference is part of it, or is one of its numbers to two decimals.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: One mapping per question: `answer`, a list of accepted answers (the letter, where there are options),
        and `options`, the texts of the options in order of their letters, empty for an open question.
    unparsed: What an answer counts that names no option. "wrong" (default), or "random": an option drawn at random,
        as in the official script.
    seed: Of that draw. Default: 42, that of the official script.

Returns:
    accuracy: Share of the questions, 0 to 1.
    unparsed: Share of the questions with options whose answer names none; `None` without such questions.
"""

_CITATION = """\
@inproceedings{yue2024mmmu,
    title = {{MMMU}: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert {AGI}},
    author = {Yue, Xiang and Ni, Yuansheng and Zhang, Kai and Zheng, Tianyu and others},
    booktitle = {CVPR},
    year = {2024},
}
"""


def parse_choice(prediction: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, the last of several; `None` if it names none."""
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = string.ascii_uppercase[: len(options)]
    stages = [
        (text, {letter: f"({letter})" for letter in letters}),
        (text, {letter: f" {letter} " for letter in letters}),
    ]
    if len(text.split()) > 5:
        stages.append(
            (text.lower(), {letter: option.lower() for letter, option in zip(letters, options, strict=True)})
        )
    for searched, names in stages:
        named = [letter for letter, name in names.items() if name in searched]
        if named:
            return max(named, key=lambda letter: searched.rfind(names[letter]))
    return None


def normalise(text: str) -> list[float | str]:
    """A text as a number of two decimals, or else in small letters; one character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parse_open(prediction: str) -> list[float | str]:
    """What an open answer says: its concluding parts and the numbers in them, normalised."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for index, line in enumerate(lines, start=1):
        # only the last line may be an equation
        indicators = (*INDICATORS, "=") if index == len(lines) else INDICATORS
        tails = [line.split(word)[-1].strip() for word in indicators if word in line]
        # an empty tail gives way to any that follows it
        shortest = ""
        for tail in tails:
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in list(":,.!?;'"):
            parts.append(shortest)
    parts = parts or [text]
    numbers = [number for part in parts for pattern in NUMBERS for number in re.findall(pattern, part)]
    return [value for found in parts + numbers for value in normalise(found)]


def is_right_open(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an open answer holds one of the accepted answers."""
    accepted = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in accepted if isinstance(value, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in accepted
        for said in parse_open(prediction)
    )


def check(reference: Any) -> None:
    """Refuses what is no reference.

    Raises:
        ValueError: A field that is missing, or an answer that is none of the letters of its options.
    """
    fields = reference if isinstance(reference, Mapping) else {}
    answers, options = fields.get("answer"), fields.get("options")
    if not answers or options is None:
        raise ValueError(
            f"`references` holds {reference!r}. Give every question its `answer`, a list of at least one, and its "
            "`options`, a list that is empty for an open question."
        )
    letters = string.ascii_uppercase[: len(options)]
    unknown = [answer for answer in answers if options and answer not in list(letters)]
    if unknown:
        raise ValueError(
            f"`references` holds the answer {unknown[0]!r}, but the letters of its options are {letters}."
        )


def is_right(prediction: str, reference: Mapping[str, Sequence[str]]) -> bool:
    """Whether an answer is that of a checked reference; one that names no option is not."""
    if not reference["options"]:
        return is_right_open(prediction, reference["answer"])
    return parse_choice(prediction, reference["options"]) in reference["answer"]


class Mmmu(evaluate.Metric):
    """`evaluate.load("training/metrics/mmmu").compute(predictions=["B"], references=[{"answer": ["B"], ...}])`."""

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": {"answer": texts, "options": texts}}
            ),
            reference_urls=["https://arxiv.org/abs/2311.16502"],
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

    def _compute(
        self, predictions: list[str], references: list[dict[str, list[str]]], unparsed: str = "wrong", seed: int = 42
    ) -> dict[str, Any]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one answer and "
                "one mapping per question."
            )
        if unparsed not in UNPARSED:
            raise ValueError(f"`unparsed={unparsed!r}` is unknown. Known: {', '.join(UNPARSED)}.")
        draw = random.Random(seed)
        right, lost = [], []
        for prediction, reference in zip(predictions, references, strict=True):
            options = reference["options"]
            if not options:
                right.append(is_right_open(prediction, reference["answer"]))
                continue
            letter = parse_choice(prediction, options)
            lost.append(letter is None)
            if letter is None and unparsed == "random":
                letter = draw.choice(string.ascii_uppercase[: len(options)])
            right.append(letter in reference["answer"])
        return {"accuracy": sum(right) / len(right), "unparsed": sum(lost) / len(lost) if lost else None}
