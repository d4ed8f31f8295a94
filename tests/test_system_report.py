"""What the report of systems counts, against hand-computed figures."""

from __future__ import annotations

import json

import pytest

from adaptive_llava import PRESETS
from adaptive_llava.training.golden_parity import CASES
from adaptive_llava.training.system_report import describe_preset, main


def test_parameters_and_flops_of_spatial_fusion_are_those_of_its_matrices():
    part = describe_preset("stf")["parts"]["compressor"]
    matrices = 4096 * 16384 + 16384 * 4096
    assert part["parameters"] == matrices + 16384 + 4096
    assert part["gflops"] == [pytest.approx(2 * 144 * matrices / 1e9, abs=1e-3)]


def test_a_resampler_costs_more_with_more_queries_and_brings_no_projector_of_its_own():
    described = describe_preset("dynamic-resampler")
    assert described["token_counts"] == [1, 256]
    one, many = described["parts"]["compressor"]["gflops"]
    # keys and values of 576 patches cost the same; queries and outputs grow
    assert one == pytest.approx(2 * 2 * 576 * 1024 * 1024 / 1e9, rel=0.01) and many > 1.5 * one
    assert described["parts"]["projector"]["parameters"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def test_prefusion_at_7b_costs_two_to_three_times_the_tower():
    described = describe_preset("llava-mini")
    assert 2.5 < described["parts"]["modality_prefusion"]["gflops"][0] / 381.9 < 2.8
    # the projector sees all patches besides the one token
    assert described["parts"]["projector"]["gflops"][0] == pytest.approx(24.16 * 577 / 576, abs=0.01)


def test_the_report_has_every_preset_and_every_recorded_case(shared, tmp_path, capsys):
    assert main(["--golden", str(shared / "golden"), "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "systems.json").read_text())
    assert set(result["systems"]) == set(PRESETS)
    measured = {(preset, case) for preset, row in result["systems"].items() for case in row["parity"]}
    assert measured == {(preset, case) for preset, case, _ in CASES}
    assert max(error for row in result["systems"].values() for error in row["parity"].values()) <= 1e-5
    assert "llava-mini" in capsys.readouterr().out
