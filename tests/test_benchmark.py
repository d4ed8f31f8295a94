"""The benchmark's statistics, FLOP counts and table, on known numbers and one tiny real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_llava.training import benchmark
from adaptive_llava.training.benchmark import ROWS, Measurement
from adaptive_llava.training.benchmark_workload import SHAPES, Workload
from adaptive_llava.training.flop_counts import prefill_flops
from adaptive_llava.training.paired_timing import Ratio, ratio_of_medians, timed_pairs


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload("tiny", pairs=2)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("benchmark") / "deep" / "tiny.json"
    command = [sys.executable, "-m", "adaptive_llava.training.benchmark", "--shape", "tiny", "--pairs", "3"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(output)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()) | {"printed": done.stdout}


def test_ratio_is_of_medians_and_an_outlier_does_not_move_it():
    pairs = [(2.0, 1.0), (4.0, 2.0), (600.0, 3.0)]
    ratio = ratio_of_medians(pairs)
    assert (ratio.median, ratio.peer_median, ratio.ratio) == (4.0, 2.0, 2.0)


def test_interval_of_a_constant_ratio_has_no_width_when_pairs_are_kept_together():
    times = np.random.default_rng(0).lognormal(size=31)
    ratio = ratio_of_medians([(1.5 * t, t) for t in times])
    assert ratio.low == pytest.approx(1.5) and ratio.high == pytest.approx(1.5)


def test_interval_covers_the_true_ratio_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        pairs = np.stack([1.1 * generator.lognormal(sigma=0.1, size=30), generator.lognormal(sigma=0.1, size=30)], 1)
        ratio = ratio_of_medians(pairs, resamples=500, seed=trial)
        covered += ratio.low <= 1.1 <= ratio.high
    assert 180 <= covered <= 200


def test_the_same_pairs_give_the_same_interval():
    pairs = np.random.default_rng(1).uniform(1, 2, (10, 2))
    assert ratio_of_medians(pairs) == ratio_of_medians(pairs)


@pytest.mark.parametrize("pairs", [[], [1.0, 2.0]])
def test_no_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="pass at least one"):
        ratio_of_medians(pairs)


def test_sides_run_in_turn_after_warm_up_and_without_gradients():
    calls = []

    def side(name: str, seconds: float | None):
        calls.append((name, torch.is_grad_enabled()))
        return seconds

    progress = []
    pairs = timed_pairs(
        lambda: side("ours", 0.25), lambda: side("peer", None), pairs=3, warm_up=1, progress=progress.append
    )
    assert calls == [("ours", False), ("peer", False)] * 4
    assert [ours for ours, _ in pairs] == [0.25] * 3 and all(0 < peer < 0.25 for _, peer in pairs)
    assert progress == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ratio", "high", "bar", "interval_bar", "met"),
    [
        (1.0, 1.04, 1.02, 1.05, True),
        (1.0, 1.06, 1.02, 1.05, False),
        (1.03, 1.04, 1.02, 1.05, False),
        (1.01, 9.0, 1.02, None, True),
        (5.0, 9.0, None, None, None),
    ],
)
def test_a_bar_is_met_by_median_and_interval(ratio, high, bar, interval_bar, met):
    measured = Ratio(ratio, 0.9, high, ratio, 1.0)
    assert Measurement("", [], "s", 1.0, bar, interval_bar).met(measured) is met


def test_both_sides_of_the_identity_rows_score_the_same(work):
    compact, expanded, pixels = work.prompt(1), work.prompt(1, work.patches), work.pixels_of_one
    with torch.no_grad():
        ours = work.identity(**compact, pixel_values=pixels, logits_to_keep=1).logits
        peer = work.stock(**expanded, pixel_values=pixels, logits_to_keep=1).logits
    torch.testing.assert_close(ours, peer, atol=2e-5, rtol=0)


def test_the_run_reports_every_row_with_what_it_needs_to_be_repeated(report):
    assert [row["name"] for row in report["rows"]] == list(ROWS)
    assert report["command"].startswith("python -m adaptive_llava.training.benchmark --shape tiny --pairs 3")
    assert report["machine"]["cores"] == os.cpu_count() and report["machine"]["threads"] == 1
    assert report["versions"]["torch"] == torch.__version__
    assert {"transformers", "python"} <= set(report["versions"]) and report["date"]
    for row in report["rows"]:
        assert len(row["pairs"]) == 3 and row["unit"] in ("s", "MB")
        ratio = ratio_of_medians(row["pairs"])
        assert (row["ratio"], row["low"], row["high"]) == (ratio.ratio, ratio.low, ratio.high)
        assert row["met"] in (True, False) if row["bar"] is not None else row["met"] is None
        assert row["what"] in report["printed"]


def test_limits_of_fewer_tokens_are_the_flops_ratio(report):
    rows = {row["name"]: row for row in report["rows"]}
    text = SHAPES["tiny"].text()
    assert rows["prefill_fewer"]["limit"] == prefill_flops(text, 144 + 40) / prefill_flops(text, 576 + 40)
    assert rows["prefill_fewest"]["bar"] == pytest.approx(1.15 * rows["prefill_fewest"]["limit"])
    assert 0 < rows["end_to_end_factor_3"]["limit"] < rows["end_to_end_factor_2"]["limit"] < 1


def test_memory_of_the_two_sides_comes_from_processes_of_their_own(report):
    memory = next(row for row in report["rows"] if row["name"] == "identity_memory")
    assert len({value for pair in memory["pairs"] for value in pair}) > 1  # a shared high-water mark gives one value
    assert all(0 < value < 2000 for pair in memory["notes"]["above_loaded_model_mb"] for value in pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "identity_prefil"], "unknown rows identity_prefil; known"), (["--pairs", "0"], "at least 1")],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--shape", "tiny", *arguments])
    assert message in capsys.readouterr().err
