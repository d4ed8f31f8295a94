"""What the committed results say of the shipped model, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptive_llava.training import shipped_evaluation


RESULTS = Path(__file__).resolve().parents[1] / "results" / "evaluation.json"


def test_known_words_are_those_of_the_shipped_tokenizer():
    texts = ["which digit at r1c1", "which zebra at r1c1"]
    assert shipped_evaluation.known_share(texts) == pytest.approx(7 / 8)
    assert shipped_evaluation.known_share(texts, whole=True) == 0.5


def test_it_reads_its_own_pictures_and_no_others():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert list(results) == [shipped_evaluation.OWN, *shipped_evaluation.DATASETS]
    scores = {
        name: {row["budget"]: row["score"]["value"] for row in each["budgets"]} for name, each in results.items()
    }
    own = scores.pop(shipped_evaluation.OWN)
    assert own["36"] > 0.8 and own["36"] > own["1"]
    for name, row in scores.items():
        assert max(row.values()) <= results[name]["words"]["answers_that_can_be_said"]


def test_the_command_asks_about_every_dataset(shared, tmp_path):
    output = tmp_path / "evaluation.json"
    options = ["--shared", str(shared), "--questions", "4", "--seed", "1", "--output", str(output)]
    assert shipped_evaluation.main(options) == 0
    results = json.loads(output.read_text())
    assert [each["questions"] for each in results.values()] == [4] * 6
    assert [each["data"] for each in results.values()] == [shipped_evaluation.OWN, *shipped_evaluation.DATASETS]
