"""What the table says of each metric: scores of single answers, headlines, and their resampled values."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_llava.training.metric_table import METRICS, RESAMPLES, known_metric
from adaptive_llava.training.question_samples import Sample
from tests.test_metrics import CASES


# By metric, fields and answers of a sample that asks for what `CASES` has as the first reference.
ASKED = {
    "anls": ((CASES["anls"][1][0],), {}),
    "field_f1": (('{"a": "0"}',), {}),
    "relaxed_accuracy": (("10",), {}),
    "vqa_accuracy": (("2",) * 6, {}),
    "gqa": (("left",), {}),
    "pope": (("yes",), {"category": "random"}),
    "mme": (("Yes",), {"category": "count", "question_id": "1"}),
    "mmmu": (("B",), {"options": "['cat', 'dog']"}),
    "scienceqa": (("0",), {"choices": ["cat", "dog"]}),
    "seed_bench": (("A",), {}),
    "mmbench": (("B",), {"index": 7, "A": "cat", "B": "dog", "C": "nan"}),
}


def sample(answers, fields):
    return Sample("7", "?", answers, (), fields)


@pytest.mark.parametrize("name", METRICS)
def test_references_are_those_the_modules_take(name):
    expected = CASES[name][1][0]
    found = METRICS[name].reference(sample(*ASKED[name]))
    assert found == ([expected] if isinstance(expected, str) and isinstance(found, list) else expected)


@pytest.mark.parametrize("name", METRICS)
def test_the_headline_is_the_mean_of_the_scores_unless_answers_belong_together(name):
    metric, (predictions, references) = METRICS[name], CASES[name]
    scores = [metric.score(*pair) for pair in zip(predictions, references, strict=True)]
    assert all(0 <= score <= 1 for score in scores)
    headline = metric.headline(metric.compute(predictions, references))
    if metric.parts is None:
        assert headline == pytest.approx(np.mean(scores))
    drawn = metric.resampled(predictions, references, seed=1)
    assert drawn.shape == (RESAMPLES,) and drawn.std() > 0 and drawn.min() <= headline <= drawn.max()
    assert np.array_equal(drawn, metric.resampled(predictions, references, seed=1))


def test_an_interval_is_as_wide_as_theory_says():
    right = [True] * 60 + [False] * 40
    metric = METRICS["gqa"]
    drawn = metric.resampled(["a" if each else "b" for each in right], ["a"] * 100)
    assert drawn.mean() == pytest.approx(0.6, abs=0.01) and drawn.std() == pytest.approx(np.sqrt(0.24 / 100), rel=0.1)


def test_questions_a_metric_cannot_judge_are_named():
    with pytest.raises(ValueError, match="'vqa_accuracy' cannot judge question 7: `references` holds 1 answers"):
        METRICS["vqa_accuracy"].reference(sample(("a",), {}))
    with pytest.raises(ValueError, match="'gqa' cannot judge question 7: it has 2 answers, where one is wanted"):
        METRICS["gqa"].reference(sample(("a", "b"), {}))
    for name in ("pope", "mme", "mmmu", "scienceqa", "mmbench"):
        with pytest.raises(ValueError, match=f"'{name}' cannot judge question 7: .*Give every"):
            METRICS[name].reference(sample(("yes",), {}))
    with pytest.raises(ValueError, match="`metric='f1'` is unknown. Known: anls, field_f1, "):
        known_metric("f1")
