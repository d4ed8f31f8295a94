"""What the metrics of `training/metrics` need to know of a sample, and which of their figures is the headline.

metric = METRICS["anls"]
reference = metric.reference(sample)
metric.score("12.50", reference)                    # one answer, 0 to 1
metric.compute(predictions, references)             # a dataset, as the benchmark reports it
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptive_llava.training.metrics.anls import anls
from adaptive_llava.training.metrics.field_f1 import field_f1
from adaptive_llava.training.metrics.gqa import gqa
from adaptive_llava.training.metrics.mmbench import mmbench
from adaptive_llava.training.metrics.mme import mme
from adaptive_llava.training.metrics.mmmu import mmmu
from adaptive_llava.training.metrics.pope import pope
from adaptive_llava.training.metrics.relaxed_accuracy import relaxed_accuracy
from adaptive_llava.training.metrics.scienceqa import scienceqa
from adaptive_llava.training.metrics.seed_bench import seed_bench
from adaptive_llava.training.metrics.vqa_accuracy import vqa_accuracy
from adaptive_llava.training.question_samples import Sample


RESAMPLES = 1000


@dataclass(frozen=True)
class Parts:
    """Answers that do not stand alone, where the headline is no mean over them.

    Attributes:
        stratum: Those whose figures are averaged or added up, as POPE's splits and MME's categories are.
        cluster: Those that are judged together, as MME's two about an image are; `None`: each by itself.
        copy: The reference of a cluster drawn more than once, told apart from the others by a number.
    """

    stratum: Callable[[Any], Hashable] = lambda reference: None
    cluster: Callable[[Any], Hashable] | None = None
    copy: Callable[[Any, int], Any] = lambda reference, number: reference


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: That of its module.
        module: Its class of `evaluate`.
        find: What the module wants to know of a sample.
        score: Score of one answer, 0 to 1.
        headline: The headline among the module's figures.
        parts: `None` if the headline is the mean of the scores.
    """

    name: str
    module: Callable[[], Any]
    find: Callable[[Sample], Any]
    score: Callable[[str, Any], float]
    headline: Callable[[Mapping[str, Any]], float]
    parts: Parts | None = field(default=None)

    def reference(self, sample: Sample) -> Any:
        """What answers to a sample are compared with.

        Raises:
            ValueError: The sample lacks what this metric needs.
        """
        try:
            found = self.find(sample)
            self.score("", found)
        except ValueError as error:
            raise ValueError(f"The metric {self.name!r} cannot judge question {sample.id}: {error}") from error
        return found

    def compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, Any]:
        """All figures of the module."""
        return self.module()._compute(list(predictions), list(references))

    def resampled(self, predictions: Sequence[str], references: Sequence[Any], *, seed: int = 0) -> np.ndarray:
        """The headline of answers drawn with replacement, `(RESAMPLES,)`; the same draws for the same references."""
        rng = np.random.default_rng(seed)
        if self.parts is None:
            scores = np.array([self.score(*pair) for pair in zip(predictions, references, strict=True)], dtype=float)
            return np.array([scores[rng.integers(len(scores), size=len(scores))].mean() for _ in range(RESAMPLES)])
        parts, module = self.parts, self.module()
        strata: dict[Hashable, dict[Hashable, list[int]]] = {}
        for index, reference in enumerate(references):
            clusters = strata.setdefault(parts.stratum(reference), {})
            clusters.setdefault(index if parts.cluster is None else parts.cluster(reference), []).append(index)
        found = []
        for _ in range(RESAMPLES):
            drawn = [
                (index, number)
                for clusters in map(list, (each.values() for each in strata.values()))
                for number, chosen in enumerate(rng.integers(len(clusters), size=len(clusters)))
                for index in clusters[chosen]
            ]
            said = [predictions[index] for index, _ in drawn]
            found.append(
                self.headline(
                    module._compute(said, [parts.copy(references[index], number) for index, number in drawn])
                )
            )
        return np.array(found)


def known_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in METRICS:
        raise ValueError(f"`metric={name!r}` is unknown. Known: {', '.join(METRICS)}.")
    return METRICS[name]


def _answers(sample: Sample) -> list[str]:
    return list(sample.answers)


def _answer(sample: Sample) -> str:
    if len(sample.answers) > 1:
        raise ValueError(f"it has {len(sample.answers)} answers, where one is wanted. Choose another metric.")
    return sample.answers[0]


def _checked(check: Callable[[Any], None], find: Callable[[Sample], dict[str, Any]]) -> Callable[[Sample], Any]:
    def found(sample: Sample) -> dict[str, Any]:
        reference = {name: value for name, value in find(sample).items() if value is not None}
        check(reference)
        return reference

    return found


def listed(value: Any) -> Any:
    """A list that a table may hold as text, as MMMU's options are."""
    if not isinstance(value, str):
        return value
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return list(found) if isinstance(found, (list, tuple)) else value


def _pope(sample: Sample) -> dict[str, Any]:
    return {"answer": _answer(sample), "category": sample.fields.get("category")}


def _mme(sample: Sample) -> dict[str, Any]:
    return _pope(sample) | {"question_id": sample.fields.get("question_id")}


def _mmmu(sample: Sample) -> dict[str, Any]:
    answers = [listed(answer) for answer in sample.answers]
    accepted = [text for answer in answers for text in (answer if isinstance(answer, list) else [answer])]
    return {"answer": accepted, "options": listed(sample.fields.get("options"))}


def _scienceqa(sample: Sample) -> dict[str, Any]:
    answer = _answer(sample)
    return {"answer": int(answer) if answer.isdecimal() else None, "choices": sample.fields.get("choices")}


def _mmbench(sample: Sample) -> dict[str, Any]:
    letters = [sample.fields.get(letter) for letter in mmbench.LETTERS]
    options = listed(sample.fields.get("options")) or [text for text in letters if text not in (None, "nan")]
    return {"answer": _answer(sample), "index": sample.fields.get("index"), "options": options}


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("anls", anls.Anls, _answers, anls.similarity, lambda found: found["anls"]),
        Metric(
            "field_f1",
            field_f1.FieldF1,
            _answer,
            field_f1.page_f1,
            lambda found: found["field_f1"],
            Parts(),
        ),
        Metric(
            "relaxed_accuracy",
            relaxed_accuracy.RelaxedAccuracy,
            _answers,
            relaxed_accuracy.is_right,
            lambda found: found["relaxed_accuracy"],
        ),
        Metric(
            "vqa_accuracy",
            vqa_accuracy.VqaAccuracy,
            _answers,
            vqa_accuracy.accuracy,
            lambda found: found["vqa_accuracy"],
        ),
        Metric("gqa", gqa.Gqa, _answer, gqa.is_right, lambda found: found["accuracy"]),
        Metric(
            "pope",
            pope.Pope,
            _checked(pope.check, _pope),
            pope.is_right,
            lambda found: found["accuracy"],
            Parts(stratum=lambda asked: asked["category"]),
        ),
        Metric(
            "mme",
            mme.Mme,
            _checked(mme.check, _mme),
            mme.is_right,
            lambda found: (found["perception"] or 0) + (found["cognition"] or 0),
            Parts(
                stratum=lambda asked: asked["category"],
                cluster=lambda asked: asked["question_id"],
                copy=lambda asked, number: asked | {"question_id": f"{number} {asked['question_id']}"},
            ),
        ),
        Metric("mmmu", mmmu.Mmmu, _checked(mmmu.check, _mmmu), mmmu.is_right, lambda found: found["accuracy"]),
        Metric(
            "scienceqa",
            scienceqa.ScienceQa,
            _checked(scienceqa.check, _scienceqa),
            scienceqa.is_right,
            lambda found: found["accuracy"],
        ),
        Metric("seed_bench", seed_bench.SeedBench, _answer, seed_bench.is_right, lambda found: found["accuracy"]),
        Metric(
            "mmbench",
            mmbench.MmBench,
            _checked(mmbench.check, _mmbench),
            mmbench.is_right,
            lambda found: found["accuracy"],
            Parts(
                cluster=lambda asked: asked["index"] % mmbench.ROTATION,
                copy=lambda asked, number: (
                    asked | {"index": asked["index"] - asked["index"] % mmbench.ROTATION + number}
                ),
            ),
        ),
    )
}
