"""Memory and open files over many steps; `python -m tests.long_runs` is the long version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.long_runs import Watch, generate, growth


RESULT = Path(__file__).resolve().parents[1] / "results" / "long_runs.json"


def test_growth_is_the_late_median_less_that_after_the_start():
    values = [*range(20), *[20] * 70, *[23] * 10]
    assert growth(values) == {"early": 20.0, "late": 23.0, "growth": 3.0}


def test_what_is_kept_and_left_open_is_seen(tmp_path):
    kept, watch = [], Watch()
    for number in range(200):
        kept.append((bytearray(2**20), (tmp_path / str(number)).open("w")))
        watch.step()
    found = watch.summary()
    for _, file in kept:
        file.close()
    assert found["steps"] == 200 and found["open_files"]["growth"] > 100 and found["memory_mib"]["growth"] > 100
    assert not found["steady"]


@pytest.mark.compat
def test_answers_leave_no_file_open():
    assert generate(60)["open_files"]["growth"] <= 0


def test_the_written_long_runs_were_long_and_steady():
    runs = json.loads(RESULT.read_text(encoding="utf-8"))["runs"]
    assert runs["fine_tune"]["steps"] >= 500 and runs["generate"]["steps"] >= 2000
    assert all(run["steady"] for run in runs.values())
