"""How far pixels and features agree on a count, and the measures that say so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adaptive_llava.training.classification_metrics import confusion
from adaptive_llava.training.pixel_agreement import cohens_kappa, main, rank_correlation
from adaptive_llava.training.routing_study import FITS, KINDS


def test_kappa_of_a_hand_computed_table():
    # 20 both yes, 15 both no, 5 and 10 apart: agreement 0.7, by chance 0.5
    first = np.array([0] * 20 + [0] * 5 + [1] * 10 + [1] * 15)
    second = np.array([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    assert confusion(first, second, 2) == [[20, 5], [10, 15]]
    assert cohens_kappa(first, second, 2) == pytest.approx(0.4)


def test_kappa_is_1_for_equal_choices_and_below_0_for_opposite_ones():
    choices = np.array([0, 1, 2, 2, 0])
    assert cohens_kappa(choices, choices, 3) == 1
    assert cohens_kappa(np.zeros(4, dtype=int), np.zeros(4, dtype=int), 3) == 1
    assert cohens_kappa(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]), 2) == -1


def test_rank_correlation_looks_at_order_alone_and_shares_ranks_of_equal_values():
    rising = np.array([1.0, 2.0, 5.0, 9.0])
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), rising) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(np.ones(4), rising) == 0


def test_the_command_reports_every_kind_and_copies_no_image(shared, tmp_path, capsys):
    weights = shared / "weights" / "mobilenet_v2_1.0_224_float.npz"
    arguments = ["--data-root", str(shared / "data"), "--weights", str(weights), "--output", str(tmp_path)]
    assert main([*arguments, "--limit", "6", "--image-size", "192", "--target-mean", "60"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pixel_agreement.json"]
    result = json.loads((tmp_path / "pixel_agreement.json").read_text())
    assert str(shared) not in json.dumps(result) and list(result["fits"]) == list(FITS)
    printed = capsys.readouterr().out
    for found in result["fits"].values():
        assert list(found["kinds"]) == list(KINDS) and found["all"]["num_images"] == 24
        for row in (found["all"], *found["kinds"].values()):
            table = np.array(row["images_by_rung"])
            assert table.sum() == row["num_images"]
            assert np.trace(table) / table.sum() == pytest.approx(row["agreement"], abs=1e-4)
            for name, margin in (("features", table.sum(axis=1)), ("pixels", table.sum(axis=0))):
                mean = margin @ np.array(result["counts"]) / table.sum()
                assert row["mean_tokens"][name] == pytest.approx(mean, abs=0.06)
        # one image moves the mean of 24 by at most (144 - 16) / 24 tokens
        for name in ("features", "pixels"):
            assert abs(found["all"]["mean_tokens"][name] - 60) < 6
        assert f"{found['all']['agreement']:.1%}" in printed
