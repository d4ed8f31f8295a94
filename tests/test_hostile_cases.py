"""What counts as a good refusal, and the record of the long run of all hostile cases."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from adaptive_llava.processing.image_loading import _RangeError
from tests.hostile_cases import RAN, WAY_OUT, cases, check_refusal, refused_well, scalars


ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "hostile_cases.json"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("`x` is missing. Pass it."),
        IndexError("list index out of range"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "`x`. Pass text."),
        ValueError("`budget=3` is wrong."),
        ValueError("something is wrong. Pass something else."),
        TypeError("`x=3` must be a string."),
    ],
)
def test_a_bad_refusal_is_told_from_a_good_one(error):
    with pytest.raises(AssertionError):
        check_refusal(error)


def test_a_good_refusal_names_the_rule_and_the_way_out():
    check_refusal(ValueError("`budget=3` is below 4. Pass at least 4."), said="below 4")
    check_refusal(_RangeError("Image 3 has values from 1 to 300. Pass whole numbers 0 to 255."))
    check_refusal(TypeError("Image 1 is a int. Pass a path."), TypeError)
    with pytest.raises(AssertionError, match="lacks beyond 4"):
        check_refusal(ValueError("`budget=3` is below 4. Pass at least 4."), said="beyond 4")


@pytest.mark.parametrize("folder", ["adaptive_llava", "modeling", "processing"])
def test_every_refusal_of_the_model_and_its_processor_says_what_to_do(folder):
    found = [
        f"{path.name}:{line} {text}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for line, text in refusals_of(ast.parse(path.read_text(encoding="utf-8")))
        if not WAY_OUT.search(text)
    ]
    assert not found


def refusals_of(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and fixed words of every error that is raised, with those of the names and functions that it uses."""
    words: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            words[node.name] = fixed_words(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            words[node.targets[0].id] = fixed_words(node.value)
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return [
        (error.lineno, " ".join([fixed_words(error), *(words.get(name, "") for name in names_in(error))]))
        for error in raised
        if isinstance(error, ast.Call)
    ]


def fixed_words(node: ast.AST) -> str:
    found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return "".join(value for value in found if isinstance(value, str))


def names_in(node: ast.AST) -> list[str]:
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def test_cases_and_refusals_are_counted():
    @cases(7, scalars)
    def of_seven(value):
        with refused_well():
            raise ValueError("`x` is wrong. Pass another.")

    of_seven()
    assert RAN.pop("of_seven").items() >= {"cases": 7, "refused": 7, "passed": True}.items()


def test_the_long_run_had_a_hundred_thousand_cases_of_every_property_and_all_passed():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_hostile_*.py")]
    properties = {
        name for text in texts for name in re.findall(r"^@cases\((?:.|\n)*?^def (test_\w+)", text, re.MULTILINE)
    }
    assert set(record["properties"]) == properties
    assert record["passed"] and record["cases"] >= 100_000
