"""Many cases for every property of hostile input: how many there are, what a good refusal is, and the record of a run.

    python -m tests.hostile_cases --times 10

runs every property with ten times the cases of a test run, each case anew, and writes `results/hostile_cases.json`.
A test run takes the same cases every time (`derandomize`), so that it fails for a change of the code alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import PIL
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


TIMES = "ADAPTIVE_LLAVA_CASES"  # environment variable: how many times the cases of a test run
SECONDS = 30  # that a case may take on a busy machine, where the slowest take one: more is a hang
_RULE = re.compile(r"`[^`]*`|(Image|Video) \d+|Row \d+|The request|A message|/\S+|Role|The checkpoint")
WAY_OUT = re.compile(
    r"(?i)\b(must be|Build|Check|Choose|Convert|Download|Encode|Give|Install|Known (options|presets|types)|Leave|Name"
    r"|Pass|Raise|Read|Remove|Replace|Save|Scale|Send|Set|Supported formats|Take|Use|Write)\b"
)

_OF_THIS_FILE = Path(__file__).with_name("test_hostile_cases.py")

# What ran in this process: by property its cases, those that were refused, and the slowest in seconds.
RAN: dict[str, dict[str, Any]] = {}
_running: list[dict[str, Any]] = []

# Values that no option expects, as JSON could bring them, and some that it could not.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "auto", "default", "cls", "mean", "fixed", "none", "7", "a/b", "../x", "\x00", "\ud800"]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "n", "total", "ceiling", "x"]), inner, max_size=2),
    ),
    max_leaves=5,
)


def cases(number: int, *strategies: Any, **named: Any) -> Callable[[Callable], Callable]:
    """Run a property on so many cases, times the factor of the environment, and count them.

    Args:
        number: Cases of a test run.
        strategies: Of the property's arguments, as `hypothesis.given` takes them.
        named: The same by name.
    """
    times = float(os.environ.get(TIMES, "1"))

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def counted(*arguments: Any, **options: Any) -> None:
            _running.clear()
            _running.append(RAN.setdefault(test.__name__, {"cases": 0, "refused": 0, "slowest_s": 0.0}))
            start = time.perf_counter()
            _running[0]["passed"] = False  # until this case has
            test(*arguments, **options)
            seconds = time.perf_counter() - start
            _running[0]["passed"] = True
            _running[0]["cases"] += 1
            _running[0]["slowest_s"] = max(_running[0]["slowest_s"], round(seconds, 3))
            assert seconds < SECONDS, f"a case took {seconds:.0f} s"

        return settings(
            max_examples=max(1, int(number * times)),
            deadline=None,
            derandomize=times <= 1,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(*strategies, **named)(counted))

    return decorate


@contextmanager
def refused_well(*kinds: type[Exception], said: str = "") -> Iterator[None]:
    """What may happen to hostile input inside: nothing, or a `ValueError` that says what is wrong and what to do.

    Args:
        kinds: Other errors that are right too, such as `FileNotFoundError` for a path.
        said: What the message must hold, a regular expression.
    """
    try:
        yield
    except Exception as error:
        check_refusal(error, *kinds, said=said)
        for record in _running:
            record["refused"] += 1


def check_refusal(error: Exception, *kinds: type[Exception], said: str = "") -> None:
    """Assert that an error is a good refusal: of the right type, with the name of what is wrong and a way out."""
    own = type(error).__module__.startswith("adaptive_llava") and isinstance(error, ValueError)
    if not (own or type(error) in (ValueError, *kinds)):
        raise AssertionError(f"{type(error).__name__} instead of a ValueError: {error}") from error
    message = str(error)
    for rule, pattern in (
        ("the name of what is wrong", _RULE),
        ("what to do", WAY_OUT),
        (said, re.compile(said, re.S)),
    ):
        if not pattern.search(message):
            raise AssertionError(f"the message lacks {rule}: {message}") from error


def main(arguments: list[str] | None = None) -> int:
    """Run properties in this process and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="cases, times those of a test run (%(default)s)")
    parser.add_argument("--only", help="properties to run anew, as pytest's -k; the others stay as the file has them")
    parser.add_argument("--output", type=Path, default=Path("results") / "hostile_cases.json")
    options = parser.parse_args(arguments)
    os.environ[TIMES] = str(options.times)
    from tests import hostile_cases  # the module that the tests import: this one is `__main__`

    before = json.loads(options.output.read_text(encoding="utf-8"))["properties"] if options.only else {}

    class Recorder:
        """Writes the record after every test: a run takes long."""

        def pytest_runtest_logfinish(self) -> None:
            write_record(options.output, options.times, before | hostile_cases.RAN)

    files = sorted(map(str, {*Path(__file__).parent.glob("test_hostile_*.py")} - {_OF_THIS_FILE}))
    chosen = ["-k", options.only] if options.only else []
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--timeout", "7200", *chosen, *files], [Recorder()]))


def write_record(path: Path, times: int, properties: dict[str, dict[str, Any]]) -> None:
    """What ran, with which versions.

    Args:
        path: JSON file.
        times: Cases, times those of a test run.
        properties: Cases of each, as `RAN` has them.
    """
    told = {
        "command": f"python -m tests.hostile_cases --times {times}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one process",
        "versions": {
            "python": platform.python_version(),
            **{part.__name__: part.__version__ for part in (transformers, torch, PIL, numpy, hypothesis)},
        },
        "cases": sum(record["cases"] for record in properties.values()),
        "passed": all(record["passed"] for record in properties.values()),
        "properties": dict(sorted(properties.items())),
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
