"""VQA accuracy: the score of VQAv2, TextVQA, OK-VQA and VizWiz, where ten people answered every question.

Paper: VQA: Visual Question Answering, https://arxiv.org/abs/1505.00468; the form that leaves out one annotator at a
time is that of https://visualqa.org/evaluation.html.
"""

from __future__ import annotations

import re

import datasets
import evaluate


VARIANTS = ("official", "normalised", "textvqa")

_DESCRIPTION = """\
An answer that three of the other annotators gave is right, one that two or one gave is right to two or one thirds;
averaged over the annotators left out, then over questions.
"""

_INPUTS = """\
Args:
    predictions: One answer per question.
    references: The answers of all annotators of each question, as a list of at least 4; repetitions count.
    variant: "official" (default) is the script of the VQA challenge, which compares strings as they are where all
        annotators gave the same one. "normalised" tidies all answers of all questions: case, punctuation, articles,
        number words and missing apostrophes do not count. "textvqa" is that with the first steps of the TextVQA and
        VizWiz servers: commas and question marks are deleted, "'s" is a word.

Returns:
    vqa_accuracy: Mean over the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{antol2015vqa,
    title = {{VQA}: Visual Question Answering},
    author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and others},
    booktitle = {ICCV},
    year = {2015},
}
"""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# the script passes a flag, whose value is 32, where `re.sub` takes its count
MOST_PERIODS = 32
NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# a word that lacks one of its apostrophes gets it back; the script's table takes one away
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def tidy_spaces(text: str) -> str:
    """The text on one line, without spaces around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """An answer as the VQA challenge compares it: without case, punctuation and articles."""
    text = tidy_spaces(text)
    joined = text
    thousands = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        # a mark goes where it touches a space or numbers are grouped; elsewhere it parts two words
        apart = thousands or f"{mark} " in text or f" {mark}" in text
        joined = joined.replace(mark, "" if apart else " ")
    joined = re.sub(r"\.(?!\d)", "", joined, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in joined.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_as_textvqa(text: str) -> str:
    """An answer as the servers of TextVQA and VizWiz compare it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(text.strip())


def accuracy(prediction: str, references: list[str], variant: str = "official") -> float:
    """VQA accuracy of one answer, 0 to 1.

    Raises:
        ValueError: Fewer than four references, or an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant={variant!r}` is unknown. Known: {', '.join(VARIANTS)}.")
    if len(references) < 4:
        raise ValueError(
            f"`references` holds {len(references)} answers for the prediction {prediction!r}: no answer could be "
            "right in full. Pass the answers of all annotators, 10 in VQAv2, at least 4."
        )
    tidy = {"official": normalise, "normalised": normalise, "textvqa": normalise_as_textvqa}[variant]
    if variant == "official" and len({tidy_spaces(reference) for reference in references}) == 1:
        tidy = tidy_spaces
    said = tidy(prediction)
    matches = [tidy(reference) == said for reference in references]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


class VqaAccuracy(evaluate.Metric):
    """`evaluate.load("training/metrics/vqa_accuracy").compute(predictions=["2"], references=[["two"] * 10])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
            reference_urls=["https://arxiv.org/abs/1505.00468", "https://visualqa.org/evaluation.html"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], variant: str = "official"
    ) -> dict[str, float]:
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`. Pass one list of "
                "annotators' answers per prediction."
            )
        scores = [accuracy(*pair, variant) for pair in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}
