"""The study that compares certified bounds with what fresh pictures lose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_llava.training.certificate_study import main, rendered_samples, report, violations
from adaptive_llava.training.threshold_family import SpreadThresholds


RESULT = Path(__file__).resolve().parents[1] / "results" / "calibration_certificate.json"


def test_questions_are_about_pictures_of_random_kinds_and_follow_from_the_seed():
    samples, again, other = (rendered_samples(12, 2, seed=seed) for seed in (0, 0, 1))
    asked = [(sample.id, sample.question, sample.answers) for sample in samples]
    assert asked == [(sample.id, sample.question, sample.answers) for sample in again]
    assert asked != [(sample.id, sample.question, sample.answers) for sample in other]
    assert 12 < len(samples) <= 24 and {len(sample.images) for sample in samples} == {1}


def test_bounds_of_draws_are_compared_with_all_images():
    spread = np.linspace(0, 1, 3000, dtype=np.float32)[:, None]
    right = np.ones((3000, 2))
    harmless = violations(SpreadThresholds(None, (4, 36)), spread, right, draws=5, size=300, max_drop=0.02)
    assert (harmless["certified"], harmless["violated"], harmless["mean_tokens"]) == (5, 0, 4.0)
    right[:, 0] = 0
    harmful = violations(SpreadThresholds(None, (4, 36)), spread, right, draws=5, size=300, max_drop=0.02)
    assert (harmful["certified"], harmful["mean_tokens"]) == (0, None)


def test_too_few_pictures_are_refused_before_they_are_drawn():
    with pytest.raises(ValueError, match="100 images are too few for `max_drop=0.01`"):
        main(["--pictures", "100"])


def test_the_written_result_keeps_its_bounds_and_can_be_told():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    runs = [run for runs in result["routers"].values() for run in runs]
    certified = [run for run in runs if "certificate" in run]
    assert certified and all(run["certificate"]["bound"] <= run["max_drop"] for run in certified)
    told = report(result)
    assert told.count("not certified") == len(runs) - len(certified)
    assert any(draws["certified"] for draws in result["draws"].values())
    for name, draws in result["draws"].items():
        assert draws["violated"] <= 0.05 * draws["draws"]
        assert f"`{name}` was certified to lose at most {draws['max_drop']:g} on {draws['certified']}" in told
