"""Metrics: agreement with recorded scores of the official scripts, cases by hand, several processes, and errors."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest
import yaml

from adaptive_llava.training.metrics.anls.anls import levenshtein, similarity
from adaptive_llava.training.metrics.field_f1.field_f1 import read_fields
from adaptive_llava.training.metrics.gqa import gqa
from adaptive_llava.training.metrics.mmbench import mmbench
from adaptive_llava.training.metrics.mme import mme
from adaptive_llava.training.metrics.mmmu import mmmu
from adaptive_llava.training.metrics.pope import pope
from adaptive_llava.training.metrics.relaxed_accuracy import relaxed_accuracy
from adaptive_llava.training.metrics.scienceqa import scienceqa
from adaptive_llava.training.metrics.seed_bench import seed_bench
from adaptive_llava.training.metrics.vqa_accuracy import vqa_accuracy


METRICS = Path(__file__).resolve().parents[1] / "training" / "metrics"


def pope_question(answer, split="random"):
    return {"answer": answer, "category": split}


def mme_question(answer, image, category="count"):
    return {"answer": answer, "category": category, "question_id": image}


def mmbench_question(index, answer, *options):
    return {"index": index, "answer": answer, "options": list(options or ("cat", "dog"))}


# By metric, answers and references that all metrics can score; some are wrong.
CASES: dict[str, tuple[list, list]] = {
    "anls": (["a", "bc", "x"], ["a", "bd", "y"]),
    "field_f1": (["{}", '{"a": "1"}', '{"a": "2"}'], ['{"a": "0"}', '{"a": "1"}', '{"a": "2"}']),
    "relaxed_accuracy": (["10.4", "YES", "7"], [["10"], ["yes", "no"], ["8"]]),
    "vqa_accuracy": (["two", "cat", "no"], [["2"] * 6, ["cat", "dog", "dog", "dog"], ["yes"] * 4]),
    "gqa": (["Left.", "cat", "no"], ["left", "dog", "no"]),
    "pope": (["Yes", "No", "no"], [pope_question("yes"), pope_question("yes"), pope_question("no", "popular")]),
    "mme": (
        ["Yes", "No", "yes", "maybe"],
        [mme_question(*pair) for pair in (("Yes", "1"), ("No", "1"), ("Yes", "2"), ("No", "2"))],
    ),
    "mmmu": (
        ["(B)", "42", "x = 3.5"],
        [{"answer": ["B"], "options": ["cat", "dog"]}, {"answer": ["A"], "options": ["cat", "dog"]},
         {"answer": ["3.5"], "options": []}],
    ),
    "scienceqa": (["A", "b", "B. dog"], [{"answer": index, "choices": ["cat", "dog"]} for index in (0, 1, 1)]),
    "seed_bench": (["A", "B. cat", "C"], ["A", "B", "D"]),
    "mmbench": (
        ["B", "the dog", "no idea"],
        [mmbench_question(7, "B"), mmbench_question(1_000_007, "A", "dog", "cat"), mmbench_question(8, "A")],
    ),
}  # fmt: skip
NAMES = tuple(CASES)


def recorded_vqa(variant, column):
    return lambda row: (vqa_accuracy.accuracy(row["prediction"], row["references"], variant), row[column])


def recorded_gqa(variant, column):
    return lambda row: (gqa.is_right(row["prediction"], row["reference"], variant), row[column])


# By what is compared: the file with recorded vectors, and this code's value and the recorded one of a vector.
RECORDED: dict[str, tuple[str, Callable[[dict], tuple]]] = {
    "relaxed accuracy": (
        "relaxed_accuracy",
        lambda row: (relaxed_accuracy.is_right(row["prediction"], [row["reference"]]), row["pix2struct"]),
    ),
    "VQA accuracy": ("vqa_accuracy", recorded_vqa("official", "vqa_eval_official")),
    "VQA accuracy, normalised": ("vqa_accuracy", recorded_vqa("normalised", "lmms_vqav2")),
    "TextVQA accuracy": ("vqa_accuracy", recorded_vqa("textvqa", "textvqa_m4c")),
    "VQA answers, tidied": ("vqa_normalisation", lambda row: (vqa_accuracy.normalise(row["text"]), row["vqa_eval"])),
    "TextVQA answers, tidied": (
        "vqa_normalisation", lambda row: (vqa_accuracy.normalise_as_textvqa(row["text"]), row["evalai_m4c"]),
    ),
    "GQA": ("gqa_exact_match", recorded_gqa("official", "official_llava")),
    "GQA, exact": ("gqa_exact_match", recorded_gqa("exact", "raw_equal")),
    "GQA, lmms-eval": ("gqa_exact_match", recorded_gqa("lmms_eval", "lmms_eval")),
    "POPE answers": ("pope", lambda row: (pope.says_yes(row["prediction"]), row["parsed"] == "yes")),
    "MME answers": ("mme", lambda row: (mme.parse(row["prediction"]), row["official"])),
    "MMMU choices": (
        "mmmu_multiple_choice",
        lambda row: (mmmu.parse_choice(row["prediction"], row["options"]) or "<RANDOM>", row["official_parsed"]),
    ),
    "MMMU open answers": (
        "mmmu_open", lambda row: (set(mmmu.parse_open(row["prediction"])), set(row["official_parsed"])),
    ),
    "MMMU open scores": (
        "mmmu_open",
        lambda row: (
            mmmu.is_right_open(
                row["prediction"], row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            ),
            row["official_correct"],
        ),
    ),
    "ScienceQA": (
        "scienceqa", lambda row: (scienceqa.parse(row["prediction"]) or "FAILED", row["official_parsed"]),
    ),
    "SEED-Bench, exact": (
        "seedbench", lambda row: (seed_bench.is_right(row["prediction"], row["answer"]), row["llava_exact"]),
    ),
    "SEED-Bench, first letter": (
        "seedbench",
        lambda row: (seed_bench.is_right(row["prediction"], row["answer"], "first_letter"), row["lmms_correct"]),
    ),
    "MMBench": (
        "mmbench", lambda row: (mmbench.infer(row["prediction"], row["choices"]) or False, row["can_infer"]),
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("what", RECORDED)
def test_scores_are_those_recorded_of_the_official_scripts(shared, what):
    file, pair = RECORDED[what]
    vectors = json.loads((shared / "golden" / "metrics" / f"{file}.json").read_text())["vectors"]
    assert len(vectors) > 40
    for row in vectors:
        ours, recorded = pair(row)
        assert ours == recorded or math.isclose(ours, recorded, abs_tol=1e-9), row


def test_pope_s_figures_are_those_of_the_official_script(shared, tmp_path):
    groups = json.loads((shared / "golden" / "metrics" / "pope.json").read_text())["groups"]
    for group in groups:
        references = [pope_question(label) for label in group["labels"]]
        found = load("pope", tmp_path)._compute(group["predictions"], references)
        true_yes, _, true_no, _ = group["official"].pop("TP_FP_TN_FN")
        assert math.isclose(found["accuracy"], (true_yes + true_no) / len(references), abs_tol=1e-9)
        if group["official"].pop("error", None):  # it divides by zero
            assert found["f1"] == 0
        assert {name: found[name] for name in group["official"]} == pytest.approx(group["official"], abs=1e-9)


def test_mme_s_figures_are_those_of_the_official_script(shared, tmp_path):
    groups = json.loads((shared / "golden" / "metrics" / "mme.json").read_text())["groups"]
    for group in groups:
        found = load("mme", tmp_path)._compute([row["prediction"] for row in group["items"]], group["items"])
        for name, figures in group["official_per_category"].items():
            expected = {"accuracy": figures["acc"], "accuracy_plus": figures["acc_plus"], "score": figures["score"]}
            assert found["per_category"].pop(name) == pytest.approx(expected, abs=1e-9)
        assert not found["per_category"]
        scores = group["official_driver_scores"]
        for key, names in (("perception", mme.PERCEPTION), ("cognition", mme.COGNITION)):
            ours = [score for name, score in scores.items() if name in names]
            assert found[key] == (pytest.approx(sum(ours), abs=1e-9) if ours else None)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("relaxed_accuracy", {}, {"relaxed_accuracy": 2 / 3}),
        ("relaxed_accuracy", {"tolerance": 0.2}, {"relaxed_accuracy": 3 / 3}),
        # one of three others said cat, to three of the four annotators
        ("vqa_accuracy", {}, {"vqa_accuracy": (0 + 3 / 4 / 3 + 0) / 3}),
        ("vqa_accuracy", {"variant": "normalised"}, {"vqa_accuracy": (1 + 3 / 4 / 3 + 0) / 3}),
        ("gqa", {}, {"accuracy": 2 / 3}),
        ("gqa", {"variant": "exact"}, {"accuracy": 1 / 3}),
        ("pope", {}, {"accuracy": (1 / 2 + 1) / 2, "precision": 1 / 2, "recall": 1 / 4, "yes_ratio": 1 / 4}),
        ("mme", {}, {"perception": 100 * (3 / 4 + 1 / 2), "cognition": None, "other": 1 / 4}),
        ("mmmu", {}, {"accuracy": 2 / 3, "unparsed": 1 / 2}),
        ("mmmu", {"unparsed": "random", "seed": 0}, {"accuracy": 2 / 3, "unparsed": 1 / 2}),
        ("mmmu", {"unparsed": "random"}, {"accuracy": 3 / 3, "unparsed": 1 / 2}),
        ("scienceqa", {}, {"accuracy": 2 / 3, "unparsed": 1 / 3}),
        ("seed_bench", {}, {"accuracy": 1 / 3}),
        ("seed_bench", {"variant": "first_letter"}, {"accuracy": 2 / 3}),
        ("mmbench", {}, {"accuracy": 1 / 2, "row_accuracy": 2 / 3, "undecided": 1 / 3}),
    ],
)
def test_benchmarks_by_hand(name, options, expected, tmp_path):
    predictions, references = CASES[name]
    found = load(name, tmp_path).compute(predictions=predictions, references=references, **options)
    for key, value in expected.items():
        assert found[key] == (None if value is None else pytest.approx(value)), (key, found)


@pytest.mark.parametrize(
    ("name", "references", "options", "message"),
    [
        ("relaxed_accuracy", [[]], {}, "`references` is empty for the prediction 'x'. Pass at least one"),
        ("relaxed_accuracy", ["1"], {"tolerance": -1}, "`tolerance=-1` is below 0. Pass a share"),
        ("vqa_accuracy", [["a"] * 3], {}, "`references` holds 3 answers .* Pass the answers of all annotators"),
        ("vqa_accuracy", [["a"] * 9], {"variant": "b"}, "`variant='b'` is unknown. Known: official, normalised"),
        ("gqa", ["a"], {"variant": "b"}, "`variant='b'` is unknown. Known: official, exact"),
        ("pope", [{"answer": "no"}], {}, "without category. Give every question its `answer`"),
        ("pope", ["no"], {}, "`references` holds 'no' without answer and category"),
        ("pope", [pope_question("maybe")], {}, "holds the answer 'maybe'. POPE knows 'yes' and 'no'"),
        ("mme", [{"answer": "No", "category": "OCR"}], {}, "without question_id. Give every question"),
        ("mme", [mme_question("Yes", "1", "taste")], {}, "category 'taste', which is unknown. Known: existence"),
        ("mme", [mme_question("maybe", "1")], {}, "holds the answer 'maybe'. MME knows 'Yes' and 'No'"),
        ("mme", [mme_question("Yes", "1")], {}, "holds 1 questions with `question_id='1'`.*pass both"),
        ("mme", [mme_question("Yes", "1")] * 3, {}, "holds 3 questions with `question_id='1'`.*no question twice"),
        ("mmmu", [{"answer": ["A"]}], {}, "Give every question its `answer`, a list .* and its `options`"),
        ("mmmu", [{"answer": ["C"], "options": ["a", "b"]}], {}, "answer 'C', but the letters of its options are AB"),
        ("mmmu", [{"answer": ["C"], "options": []}], {"unparsed": "b"}, "`unparsed='b'` is unknown. Known: wrong"),
        ("scienceqa", [{"answer": 0}], {}, "Give every question its `answer`, an index, and its `choices`"),
        ("scienceqa", [{"answer": 2, "choices": ["a", "b"]}], {}, "the answer 2 to a question of 2 choices. Pass"),
        ("seed_bench", ["E"], {}, "`references` holds 'E'. Pass the letter"),
        ("seed_bench", ["A"], {"variant": "b"}, "`variant='b'` is unknown. Known: exact, first_letter"),
        ("mmbench", [{"index": 1, "answer": "A"}], {}, "without options. Give every rotation"),
        ("mmbench", [mmbench_question(1, "C")], {}, "the answer 'C' to a question of 2 options. Pass"),
        ("mmbench", [mmbench_question(1, "A")] * 2, {}, "`index=1` twice. Pass every rotation once"),
        (
            "mmbench",
            [mmbench_question(1_000_001, "A")],
            {},
            "without `index=1`, the question as asked first. Pass all",
        ),
    ],
)
def test_references_and_options_that_make_no_sense_are_refused(name, references, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path).compute(predictions=["x"] * len(references), references=references, **options)


def test_one_question_at_a_time_is_checked_and_scored_too(tmp_path):
    for name, (predictions, references) in CASES.items():
        metric = load(name, tmp_path)
        for prediction, reference in zip(predictions, references, strict=True):
            metric.add(prediction=prediction, reference=reference)
        assert metric.compute() == load(name, tmp_path).compute(predictions=predictions, references=references)
    for name in ("pope", "mme", "mmmu", "scienceqa", "mmbench"):
        with pytest.raises(ValueError, match="Give every"):
            load(name, tmp_path).add(prediction="x", reference={"answer": None})


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_different_lengths_are_refused(name, tmp_path):
    predictions, references = CASES[name]
    with pytest.raises(ValueError, match="[Mm]ismatch in the number of predictions"):
        load(name, tmp_path).compute(predictions=predictions[:1], references=references[:2])
    with pytest.raises(ValueError, match="There are 1 `predictions` and 2 `references`. Pass one"):
        load(name, tmp_path)._compute(predictions[:1], references[:2])


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
results = {}
for name, (said, expected) in json.load(sys.stdin).items():
    metric = evaluate.load(f"{path}/{name}", num_process=2, process_id=rank, experiment_id="two", cache_dir=folder)
    results[name] = metric.compute(predictions=said[rank::2], references=expected[rank::2])
print(json.dumps(results))
"""


def test_two_processes_score_what_one_does(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(METRICS), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*command, str(rank)], text=True, **pipes) for rank in (0, 1)]
    for process in processes:  # both must run before either is waited for
        process.stdin.write(json.dumps(CASES))
        process.stdin.close()
        process.stdin = None
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    joined, other = (json.loads(out.splitlines()[-1]) for out, _ in printed)
    for name, (predictions, references) in CASES.items():
        assert joined[name] == load(name, tmp_path).compute(predictions=predictions, references=references)
        assert other[name] is None  # the first process has the result


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_s_folder_is_a_space(name):
    folder = METRICS / name
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])  # the Hub refuses a card whose head is no YAML
    assert (head["sdk"], head["app_file"]) == ("gradio", "app.py") and "evaluate" in head["tags"]
    required = {line.split(">")[0] for line in (folder / "requirements.txt").read_text().split()}
    imported = {
        alias.name.split(".")[0]
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported - set(sys.stdlib_module_names) == required == {"evaluate", "datasets"}
