"""The two ends of the version matrix; `make matrix` runs those in between too."""

from __future__ import annotations

import json
import sys

import pytest
import transformers

from tests.test_loading_paths import OTHER_PYTHON, with_the_other_transformers
from tests.version_matrix.__main__ import ROOT, VERSIONS, report, run


RESULT = ROOT / "results" / "version_matrix.json"


@pytest.mark.compat
@with_the_other_transformers
def test_both_ends_load_answer_fine_tune_save_and_load_each_other(tmp_path):
    rows = run({"this": sys.executable, "other": OTHER_PYTHON}, tmp_path)
    assert rows[0]["versions"]["transformers"] == transformers.__version__ != rows[1]["versions"]["transformers"]
    steps = {"load", "generate", "pipeline", "fine_tune", "save", "loaded by this", "loaded by other"}
    assert [row["steps"] for row in rows] == [dict.fromkeys(steps, "ok")] * 2, report({"rows": rows})


def test_a_step_that_fails_is_told_in_the_table(tmp_path):
    rows = run({"broken": "/bin/false"}, tmp_path)
    assert rows[0]["steps"] == {"start": "exit status 1", "loaded by broken": "exit status 1"}
    assert "| failed | failed |" in report({"rows": rows}) and "broken, start: exit status 1" in report({"rows": rows})


def test_the_written_matrix_has_every_version_and_no_failure():
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    assert [row["asked"] for row in rows] == list(VERSIONS)
    assert {outcome for row in rows for outcome in row["steps"].values()} == {"ok"}
