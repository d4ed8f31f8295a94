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
from PIL import Image

from adaptive_llava.training import benchmark, benchmark_plot, peak_memory
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_rows.table import ROWS
from adaptive_llava.training.benchmark_shapes import SHAPES
from adaptive_llava.training.benchmark_workload import Workload
from adaptive_llava.training.flop_counts import prefill_flops
from adaptive_llava.training.paired_timing import Ratio, ratio_of_medians, timed_pairs


ROOT = Path(__file__).resolve().parents[1]
IN_ONE_RUN = ["identity_prefill", "training_memory", "cache_bytes", "prefill_64", "end_to_end_factor_3"]


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload("tiny", pairs=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("benchmark") / "deep" / "tiny.json"
    command = [sys.executable, "-m", "adaptive_llava.training.benchmark", "--shape", "tiny", "--pairs", "3"]
    command += ["--rows", ",".join(IN_ONE_RUN)]
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


def test_no_pair_begins_after_the_seconds_but_two_are_measured():
    calls = []
    pairs = timed_pairs(lambda: calls.append("ours"), lambda: calls.append("peer"), pairs=9, warm_up=1, seconds=0)
    assert len(pairs) == 2 and calls == ["ours", "peer"] * 3


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


@pytest.mark.parametrize(("pairs", "met"), [([(3.0, 3.0), (5.0, 5.0)], True), ([(2.0, 3.0), (6.0, 5.0)], False)])
def test_an_exact_row_is_met_if_both_sides_of_each_pair_are_equal(pairs, met):
    assert Measurement("", pairs, "bytes", 1.0, 1.0, exact=True).met(ratio_of_medians(pairs)) is met


def test_both_sides_of_the_identity_rows_score_the_same(work):
    compact, expanded, pixels = work.prompt(1), work.prompt(1, work.patches), work.pixels(1)
    with torch.no_grad():
        ours = work.identity(**compact, pixel_values=pixels, logits_to_keep=1).logits
        peer = work.stock(**expanded, pixel_values=pixels, logits_to_keep=1).logits
    torch.testing.assert_close(ours, peer, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(IN_ONE_RUN) - {"identity_memory"}))
def test_every_row_measures_and_what_is_counted_meets_its_bar(name, work):
    measured = ROWS[name](work)
    assert measured.pairs and all(ours > 0 and peer > 0 for ours, peer in measured.pairs)
    assert measured.bar is None or measured.bar > 0
    if measured.unit not in ("s", "MB"):
        assert measured.met(ratio_of_medians(measured.pairs)) is not False, measured
    if name == "logits_memory":
        assert measured.pairs[0][1] / measured.pairs[0][0] == pytest.approx((576 + 40) / (1 + 40))


def test_the_run_reports_every_row_with_what_it_needs_to_be_repeated(report):
    assert [row["name"] for row in report["rows"]] == [name for name in ROWS if name in IN_ONE_RUN]
    assert report["command"].startswith("python -m adaptive_llava.training.benchmark --shape tiny --pairs 3")
    assert report["machine"]["cores"] == os.cpu_count() and report["machine"]["threads"] == 1
    assert report["versions"]["torch"] == torch.__version__
    assert {"transformers", "python"} <= set(report["versions"]) and report["date"]
    for row in report["rows"]:
        ratio = ratio_of_medians(row["pairs"])
        assert (row["ratio"], row["low"], row["high"]) == (ratio.ratio, ratio.low, ratio.high)
        assert row["met"] in (True, False) if row["bar"] is not None else row["met"] is None
        assert row["what"] in report["printed"]


def test_the_limit_of_fewer_tokens_is_the_flops_ratio_or_what_the_linear_layers_take(report):
    rows = {row["name"]: row for row in report["rows"]}
    text, fewer = SHAPES["tiny"].text(), rows["prefill_64"]
    assert fewer["notes"]["flops_ratio"] == prefill_flops(text, 64 + 40) / prefill_flops(text, 576 + 40)
    assert fewer["limit"] == max(fewer["notes"]["flops_ratio"], fewer["notes"]["linear_layers_ratio"])
    assert fewer["bar"] == pytest.approx(1.15 * fewer["limit"])
    assert 0 < rows["end_to_end_factor_3"]["limit"] < 1


def test_memory_of_the_two_sides_comes_from_processes_of_their_own(report):
    memory = next(row for row in report["rows"] if row["name"] == "training_memory")
    ((ours, peer),) = memory["notes"]["with_the_model_mb"]
    assert ours != peer  # a shared high-water mark gives one value
    assert all(0 < value < 2000 for pair in memory["pairs"] for value in pair)


def test_memory_of_generate_is_measured_from_the_loaded_model(capsys):
    assert peak_memory.main(["identity", "generate", "--shape", "tiny", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= found["above_model_mb"] < found["peak_mb"]


def test_a_row_that_breaks_leaves_the_others_and_is_measured_again_on_resume(tmp_path, monkeypatch, capsys):
    def counted(work: Workload) -> Measurement:
        measured.append(work.name)
        return Measurement("counted", [(1.0, 2.0)], "bytes")

    def broken(work: Workload) -> Measurement:
        raise RuntimeError("out of memory")

    measured: list[str] = []
    options = ["--shape", "tiny", "--rows", "cache_bytes,encode_once", "--output", str(tmp_path / "rows.json")]
    monkeypatch.setitem(ROWS, "cache_bytes", counted)
    monkeypatch.setitem(ROWS, "encode_once", broken)
    assert benchmark.main(options) == 1
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row.get("ratio", row.get("error")) for row in found] == [0.5, "RuntimeError: out of memory"]
    assert "broken: encode_once" in capsys.readouterr().out

    monkeypatch.setitem(ROWS, "encode_once", counted)
    assert benchmark.main([*options, "--resume"]) == 0
    assert len(measured) == 2  # once in each run
    with pytest.raises(SystemExit, match="leave out --resume"):
        benchmark.main([*options, "--resume", "--pairs", "3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "identity_prefil"], "unknown rows identity_prefil; known"), (["--pairs", "0"], "at least 1")],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--shape", "tiny", *arguments])
    assert message in capsys.readouterr().err


def test_a_report_is_drawn_beside_it_and_one_without_prefill_is_refused(report, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(report))
    assert benchmark_plot.main([str(tmp_path / "tiny.json")]) == 0
    assert Image.open(tmp_path / "tiny.png").width > 300
    with pytest.raises(ValueError, match="no rows `prefill_<tokens>`"):
        benchmark_plot.draw_prefill(report | {"rows": report["rows"][:1]}, tmp_path / "none.png")
