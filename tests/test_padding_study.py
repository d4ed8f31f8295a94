"""The study of padding: its workload costs what it says, and a small run writes what the README reads."""

import json

import pytest

from adaptive_llava.training.padding_study import WAYS, build_study_model, main, mixed_rows, summarise


def test_a_third_of_the_images_gets_each_count():
    _, processor = build_study_model("small", "sdpa", "cpu")
    assert processor.count_tokens([row["images"] for row in mixed_rows(6)]) == [64, 144, 576] * 2


def test_speed_up_is_time_padded_over_time_spent_in_the_same_round():
    rounds = [
        {
            "padded": {"seconds": 8.0 * slow, "padding_share": 0.4},
            "packed": {"seconds": 2.0 * slow, "padding_share": 0.0},
        }
        for slow in (1.0, 2.0, 3.0)
    ]
    found = summarise(rounds, rows=12)
    assert found["packed"]["speed_up"] == pytest.approx({"ratio": 4, "low": 4, "high": 4})
    assert found["packed"]["samples_per_second"] == pytest.approx(3)
    assert found["padded"]["speed_up"]["ratio"] == 1 and found["padded"]["padding_share"] == pytest.approx(0.4)


def test_a_small_run_measures_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    output = tmp_path / "deep" / "padding.json"
    assert main(["--rows", "32", "--batch_size", "2", "--rounds", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert list(found["ways"]) == list(WAYS)
    padding = {way: row["padding_share"] for way, row in found["ways"].items()}
    assert padding["packed"] == 0 < padding["grouped by length"] < padding["padded"] < 1
    assert "packed" in capsys.readouterr().out
