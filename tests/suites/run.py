"""Run Hugging Face's own tests and the generation suite on our presets, and on stock LLaVA as the peer.

    python -m tests.suites.run --presets llava dfmr llava-mini
    python -m tests.suites.run --output results/

A run with `--output` writes `suites.json`, which holds one run per release of transformers. Where the tests cannot be
downloaded nothing runs; in CI (`CI` is set) that is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers

from adaptive_llava import PRESETS
from adaptive_llava.training.benchmark import provenance
from adaptive_llava.training.markdown_table import table
from tests.suites.generation_suite import GenerationTesterMixin
from tests.suites.preset_names import PEER, suite_name
from tests.suites.source_tests import NotFetched, cache_folder, fetch_tests


NAME = "suites"
FOLDER = Path(__file__).parent
SUITES = {
    "model": "ModelTesterMixin",
    "generation": "the generation suite",
    "processor": "ProcessorTesterMixin",
    "image_processor": "ImageProcessingTestMixin",
}
OUTCOMES = ("passed", "skipped", "failed")


class Recorder:
    """A pytest plug-in that keeps the outcome of every test, by suite and test class.

    Attributes:
        outcomes: `{(suite, test class): {test: (outcome, reason)}}`.
    """

    def __init__(self):
        self.outcomes: dict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep what one phase of a test, or one of its subtests, came to: a failure of any is the test's."""
        path, owner, test = report.nodeid.split("::")
        suite = Path(path).stem.removesuffix("_suite")
        if suite == "model" and hasattr(GenerationTesterMixin, test):
            suite = "generation"
        tests = self.outcomes[suite, owner]
        is_subtest = hasattr(report, "context")
        if report.failed:
            tests[test] = ("failed", _last_line(report))
        elif report.skipped and not is_subtest:
            tests.setdefault(test, ("skipped", _skip_reason(report)))
        elif report.when == "call" and not is_subtest:
            tests.setdefault(test, ("passed", ""))


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, and write the report; 1 if a preset fails a test or does not pass more than the peer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="all by default")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    options = parser.parse_args(arguments)
    try:
        fetch_tests(transformers.__version__, cache_folder())
    except NotFetched as error:
        print(f"Skipped, which is no pass: {error}")
        return int(bool(os.environ.get("CI")))
    names = {suite_name(preset): preset for preset in options.presets}
    files = sorted(FOLDER.glob("*_suite.py"), key=lambda path: list(SUITES).index(path.stem.removesuffix("_suite")))
    nodes = [f"{path}::{name}" for path in files if path.stem != "generation_suite" for name in (PEER, *names)]
    recorder, started, cpu = Recorder(), time.monotonic(), time.process_time()
    code = pytest.main([*nodes, "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not recorder.outcomes:
        return int(code) or 1
    result = report(recorder, {PEER: "stock LLaVA", **names})
    result |= {"seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time() - cpu)}
    print(f"\ntransformers {transformers.__version__}, {result['cpu_seconds']} CPU seconds\n\n{_table(result)}")
    if options.output is not None:
        path = _write(options.output, sys.argv[1:] if arguments is None else arguments, result)
        print(f"Results: {path}")
    return int(bool(result["failures_of_presets"]) or not all(result["more_passed_than_stock"].values()))


def report(recorder: Recorder, names: dict[str, str]) -> dict[str, Any]:
    """Counts per suite and model, reasons of skips and failures, and how each preset stands beside stock LLaVA.

    Args:
        recorder: Of a finished run.
        names: Test class to what the report calls it.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {suite: {} for suite in SUITES}
    skips: dict[str, dict[str, dict[str, list[str]]]] = {suite: {} for suite in SUITES}
    failures: dict[str, dict[str, str]] = defaultdict(dict)
    only_ours: dict[str, list[str]] = defaultdict(list)
    for (suite, owner), tests in recorder.outcomes.items():
        found = Counter(outcome for outcome, _ in tests.values())
        counts[suite][names[owner]] = {outcome: found[outcome] for outcome in OUTCOMES}
        stock = recorder.outcomes[suite, PEER]
        for test, (outcome, reason) in sorted(tests.items()):
            if outcome == "failed":
                failures[names[owner]][test] = reason
            elif outcome == "skipped":
                skips[suite].setdefault(reason, {}).setdefault(test, []).append(names[owner])
                if stock[test][0] == "passed":
                    only_ours[names[owner]].append(test)
    passed = {
        name: sum(counts[suite][name]["passed"] for suite in SUITES if name in counts[suite])
        for name in names.values()
    }
    stock_passed = passed.pop(names[PEER])
    return {
        "counts": counts,
        "passed": {names[PEER]: stock_passed, **passed},
        "more_passed_than_stock": {name: count > stock_passed for name, count in passed.items()},
        "failures": failures,
        "failures_of_presets": sum(len(failures.get(name, ())) for name in passed),
        "skipped_where_stock_passes": only_ours,
        "skips": skips,
    }


def _write(folder: Path, command: list[str], result: dict[str, Any]) -> Path:
    path = folder / f"{NAME}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}
    origin = provenance("python -m tests.suites.run " + " ".join(command), device="cpu", threads=1)
    runs[transformers.__version__] = origin | result
    folder.mkdir(parents=True, exist_ok=True)
    content = {"suites": SUITES, "runs": dict(sorted(runs.items(), reverse=True))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _table(result: dict[str, Any]) -> str:
    rows = []
    for name, total in result["passed"].items():
        found = [result["counts"][suite].get(name) for suite in SUITES]
        cells = [" / ".join(str(count[outcome]) for outcome in OUTCOMES) if count else "-" for count in found]
        rows.append([name, *cells, total])
    failed = [f"{name}: {test}: {why}" for name, tests in result["failures"].items() for test, why in tests.items()]
    header = ["passed / skipped / failed", *SUITES, "passed"]
    return "\n".join([table(header, rows), "", *(f"failed: {line}" for line in failed)])


def _skip_reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    # a class in a reason would make a reason per preset
    return re.sub(r"<class '.*?'>|\b\w*Llava(Model|For\w+)\b", "the class", reason.removeprefix("Skipped: "))


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()[0]


if __name__ == "__main__":
    raise SystemExit(main())
