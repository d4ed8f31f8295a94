"""What `generate` can do with each family of models: the outcomes of `tests/test_generation_modes.py` as a table.

    python -m tests.generation_modes --output results/generation_modes.json [--other other/bin/python]

Every cell is one test, run by this interpreter and by `--other`: "works", "refused: ..." with the message, "other
answers than without a cache" (LLaVA of transformers), or "not here: ..." with what is missing on this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from adaptive_llava.training.benchmark import provenance
from tests.test_generation_modes import FAMILIES


TESTS = Path(__file__).with_name("test_generation_modes.py")
CELL = "test_a_mode_answers_as_without_a_cache_or_says_why_not"
_VERSIONS = "import torch, transformers; print(f'transformers {transformers.__version__}, torch {torch.__version__}')"


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """By mode and family what a test said, from pytest's JUnit file.

    Raises:
        ValueError: A test failed, or there are no cells.
    """
    table: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not (found := re.fullmatch(rf"{CELL}\[(.+)-({'|'.join(FAMILIES)})\]", case.attrib["name"])):
            continue
        said = [entry.attrib["value"] for entry in case.iter("property") if entry.attrib["name"] == "outcome"]
        said += [f"not here: {entry.attrib['message']}" for entry in case.iter("skipped")]
        if len(said) != 1 or case.find("failure") is not None or case.find("error") is not None:
            raise ValueError(f"`{case.attrib['name']}` failed. Run {TESTS.name} with pytest, and mend it first.")
        table.setdefault(found[1], {})[found[2]] = said[0]
    if not table:
        raise ValueError(f"`{report.name}` has no test of {TESTS.name}. Did pytest run?")
    return table


def run_tests(python: str) -> dict[str, Any]:
    """The table of one interpreter, with its versions."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(TESTS)]
        subprocess.run([*command, "-k", CELL], check=False, cwd=TESTS.parents[1])
        table = outcomes(report)
    versions = subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True).stdout.strip()
    return {"versions": versions, "modes": table}


def main(arguments: list[str] | None = None) -> None:
    """Run the tests with every interpreter, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results") / "generation_modes.json")
    parser.add_argument(
        "--other", type=lambda path: str(Path(path).absolute()), help="interpreter with another transformers"
    )
    options = parser.parse_args(arguments)
    told = provenance("python -m tests.generation_modes", device="cpu", threads=1)
    del told["versions"]  # each table has its own
    told["releases"] = [run_tests(python) for python in filter(None, (sys.executable, options.other))]
    options.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
