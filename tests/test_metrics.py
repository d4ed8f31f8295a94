"""Metrics: agreement with recorded scores of the official scripts, cases by hand, several processes, and errors."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from adaptive_llava.training.metrics.anls.anls import levenshtein, similarity
from adaptive_llava.training.metrics.field_f1.field_f1 import read_fields


METRICS = Path(__file__).resolve().parents[1] / "training" / "metrics"
NAMES = ("anls", "field_f1")


def load(name, folder, **options):
    return evaluate.load(str(METRICS / name), cache_dir=str(folder), **options)


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "metrics" / "anls.json").read_text())["vectors"]


@pytest.mark.parametrize(("variant", "column"), [("leaderboard", "rrc"), ("paper", "pix2struct")])
def test_anls_is_that_of_the_official_scripts(golden, variant, column):
    # the paper's script divides by zero for two empty strings
    scored = [row for row in golden if isinstance(row[column], float)]
    assert len(scored) >= len(golden) - 1 > 100
    for row in scored:
        score = similarity(row["prediction"], row["references"], variant)
        assert math.isclose(score, row[column], abs_tol=1e-9), row


def test_anls_through_evaluate_is_the_mean_over_all_recorded_answers(golden, tmp_path):
    result = load("anls", tmp_path).compute(
        predictions=[row["prediction"] for row in golden], references=[row["references"] for row in golden]
    )
    assert math.isclose(result["anls"], sum(row["rrc"] for row in golden) / len(golden), abs_tol=1e-9)


def test_anls_by_hand(tmp_path):
    metric = load("anls", tmp_path)
    # half of "ab" is right; "abx" is 2/3 of "abc"
    pair = {"predictions": ["ab", "abx"], "references": [["ac"], ["abc", "zzz"]]}
    assert metric.compute(**pair)["anls"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metric.compute(**pair, variant="paper")["anls"] == pytest.approx((0 + 2 / 3) / 2)
    assert metric.compute(predictions=["Ab  c"], references=["aB c"])["anls"] == pytest.approx(1.0)
    assert similarity("", [""]) == similarity("", [""], "paper") == 1.0


@pytest.mark.parametrize(("first", "second", "steps"), [("kitten", "sitting", 3), ("", "abc", 3), ("ab", "ba", 2)])
def test_edit_distance_by_hand(first, second, steps):
    assert levenshtein(first, second) == levenshtein(second, first) == steps


def test_field_f1_by_hand(tmp_path):
    references = [{"total": "15.40", "date": "1/2/18"}, {"total": "7", "shop": "A  B"}, {"total": "3"}]
    predictions = ['{"total": 15.40, "date": "2/1/18"}', 'Sure: {"total": null, "shop": "A B", "tax": 1}', "3"]
    result = load("field_f1", tmp_path).compute(
        predictions=predictions, references=[json.dumps(page) for page in references]
    )
    # right: a total and a shop; predicted: two fields, then shop and tax; expected: two, two and one
    assert result["precision"] == pytest.approx(2 / 4) and result["recall"] == pytest.approx(2 / 5)
    assert result["field_f1"] == pytest.approx(4 / 9) and result["json_rate"] == pytest.approx(2 / 3)
    assert result["per_field"] == pytest.approx({"total": 2 / 4, "date": 0.0, "shop": 1.0})


def test_field_f1_minds_case_unless_told_otherwise(tmp_path):
    pages = {"predictions": ['{"shop": "Cafe"}'], "references": ['{"shop": "CAFE"}']}
    assert load("field_f1", tmp_path).compute(**pages)["field_f1"] == 0
    assert load("field_f1", tmp_path).compute(**pages, ignore_case=True)["field_f1"] == 1


@pytest.mark.parametrize("text", ["", "no object", "{", "}{", '["a"]', '{"a": }', "{" * 5000 + "}" * 5000])
def test_what_is_no_json_object_has_no_fields(text):
    assert read_fields(text) is None


def test_values_are_read_as_written():
    text = '```json\n{"total": 1.50, "count": 007}\n```'
    assert read_fields(text) is None  # 007 is no JSON
    assert read_fields('{"total": 1.50, "paid": true, "tax": "", "rows": [1]}') == {
        "total": "1.50", "paid": "true", "rows": '["1"]',
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_different_lengths_are_refused(name, tmp_path):
    page = '{"a": "b"}'
    with pytest.raises(ValueError, match="[Mm]ismatch in the number of predictions"):
        load(name, tmp_path).compute(predictions=[page], references=[page, page])
    with pytest.raises(ValueError, match="There are 1 `predictions` and 2 `references`. Pass one"):
        load(name, tmp_path)._compute([page], [page, page])


def test_values_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`variant='strict'` is unknown. Known: leaderboard, paper"):
        load("anls", tmp_path).compute(predictions=["a"], references=["a"], variant="strict")
    with pytest.raises(ValueError, match="`references` is empty for the prediction 'a'"):
        load("anls", tmp_path).compute(predictions=["a"], references=[[]])
    for reference in ("{}", "[1]", '{"a": null}'):
        with pytest.raises(ValueError, match="no JSON object with at least one field. Leave pages without fields out"):
            load("field_f1", tmp_path).compute(predictions=["{}"], references=[reference])


SCRIPT = """
import json, sys
import evaluate
path, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
metric = evaluate.load(path, num_process=2, process_id=rank, experiment_id="two", cache_dir=folder)
pages = [json.dumps({"total": str(number)}) for number in range(5)]
said = ["{}", *pages[1:]]
print(json.dumps(metric.compute(predictions=said[rank::2], references=pages[rank::2])))
"""


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_score_what_one_does(name, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(METRICS / name), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    joined, other = (json.loads(out.splitlines()[-1]) for out, _ in printed)
    pages = [json.dumps({"total": str(number)}) for number in range(5)]
    assert joined == load(name, tmp_path).compute(predictions=["{}", *pages[1:]], references=pages)
    assert other is None  # the first process has the result


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_s_folder_is_a_space(name):
    folder = METRICS / name
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "sdk: gradio\napp_file: app.py\n" in card and "- evaluate\n" in card
    required = {line.split(">")[0] for line in (folder / "requirements.txt").read_text().split()}
    imported = {
        alias.name.split(".")[0]
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported - set(sys.stdlib_module_names) == required == {"evaluate", "datasets"}
