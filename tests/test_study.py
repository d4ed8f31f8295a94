"""The study: its pictures, its policies on recorded answers, its statistics, and small runs of everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from adaptive_llava.training.study import __main__ as command
from adaptive_llava.training.study.appearance import probe, told_apart
from adaptive_llava.training.study.arms import arms_of, new_model, train_arm, train_base, window_sides
from adaptive_llava.training.study.drawing import CONTENTS, Layout, in_pieces
from adaptive_llava.training.study.families import (
    FAMILIES,
    LOOKS,
    PAIRS,
    SINGLE,
    TEST_FONTS,
    TEST_RULINGS,
    TRAINING_FONTS,
    TRAINING_RULINGS,
    render,
)
from adaptive_llava.training.study.policies import (
    area_under_curve,
    by_spread,
    by_value,
    family_values,
    mixed_with_shuffled,
    oracle,
)
from adaptive_llava.training.study.settings import read_settings
from adaptive_llava.training.study.small_model import OutOfTime
from adaptive_llava.training.study.statistics import SeedRecord, bootstrap, chord, hull, image_weights, measures
from adaptive_llava.training.tiny_model import pixels_of


ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "training" / "study" / "cpu.yaml"
COUNTS = [4, 9, 36]


# --- pictures


@pytest.mark.parametrize("layout", [Layout(), Layout(24, 14)], ids=["cpu", "accelerator"])
def test_every_family_asks_in_words_of_the_vocabulary_and_shows_what_it_answers(layout):
    words = set(layout.vocabulary())
    for picture in render(len(FAMILIES), seed=3, layout=layout):
        assert picture.pixels.shape == (layout.size, layout.size, 3) and picture.pixels.dtype == np.uint8
        assert picture.contents.shape == (layout.grid**2,)
        assert picture.questions
        for question, answer in picture.questions:
            assert set(question.split()) <= words and answer in words
            assert layout.size == 336 or len(answer.split()) == 1
        where = {question.split()[-1]: answer for question, answer in picture.questions}
        for cell, content in zip(layout.cells, picture.contents, strict=True):
            if cell in where:  # a digit that is asked for by its cell is what the cell shows
                assert CONTENTS[content] == where[cell]


def test_a_page_holds_as_many_digits_as_its_name_says():
    digits = {p.family: int((p.contents[6:] < 10).sum()) for p in render(len(FAMILIES), seed=5)}
    assert {name: digits[name] for name in ("page_1", "page_2", "page_4", "page_8", "table")} == {
        "page_1": 1, "page_2": 2, "page_4": 4, "page_8": 8, "table": 30,
    }  # fmt: skip


def test_pictures_depend_on_seed_and_index_alone_and_the_test_has_fonts_and_rulings_of_its_own():
    whole, part = render(30, seed=7), render(16, seed=7, start=14)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(whole[14:], part, strict=True))
    other, test = render(30, seed=8), render(30, seed=7, test=True)
    for drawn in (other, test):
        assert not any(np.array_equal(a.pixels, b.pixels) for a, b in zip(whole, drawn, strict=True))
    assert not set(TRAINING_FONTS) & set(TEST_FONTS) and not set(TRAINING_RULINGS) & set(TEST_RULINGS)


def test_what_is_in_pieces_has_the_pixels_of_what_is_whole():
    masks = np.random.default_rng(0).random((10, 14, 14)) < np.linspace(0, 1, 14)
    rng = np.random.default_rng(1)
    drawn = np.mean([in_pieces(rng, masks) for _ in range(4000)], axis=0)
    assert np.abs(drawn - masks.mean(0)).max() < 0.04
    block = in_pieces(rng, masks, block=7)[:7, :7]
    assert any(np.array_equal(block, mask[:7, :7]) for mask in masks)


def test_every_family_has_one_look():
    assert sorted(family for look in LOOKS for family in look) == sorted(FAMILIES)
    assert len(PAIRS) == 6 + 15


def test_an_untrained_tower_tells_looks_apart_and_not_what_a_picture_of_a_look_needs():
    settings = read_settings(CONFIG)
    model, processor = new_model(settings, 9, arms_of(settings)[0].fields)
    shown = ["scene", "mosaic", "header", "table"]
    read, names = [], []
    for test in (False, True):
        drawn = render(2000, seed=11, families=shown, test=test)
        names.append(np.array([picture.family for picture in drawn]))
        with torch.no_grad():
            features = [
                model.model.router.inputs(model.model.extract_features(batch))
                for batch in pixels_of(processor, [picture.pixels for picture in drawn]).split(200)
            ]
        read.append(torch.cat(features).numpy())

    def named(*pair: str) -> float:
        return told_apart(read[0], names[0], read[1], names[1], pair)

    assert named("scene", "table") > 0.98 and named("mosaic", "header") > 0.98
    assert named("scene", "mosaic") < 0.6 and named("header", "table") < 0.6


def test_a_probe_finds_what_is_linear():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 8)) * np.arange(1, 9) + 5
    positive = features[:, 2] + 0.1 * rng.normal(size=600) > 5.5
    scores = probe(features[:400], positive[:400], features[400:])
    assert area_under_curve(scores, positive[400:]) > 0.98


@pytest.mark.parametrize(
    "options, message", [({"families": ["poem"]}, "poem"), ({"count": -1}, "count=-1"), ({"families": []}, "families")]
)
def test_unknown_families_and_negative_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        render(**{"count": 1, "seed": 0, **options})


@pytest.mark.parametrize("layout, message", [((7, 8), "grid=7"), ((6, 4), "cell=4")])
def test_layouts_that_pooling_or_digits_do_not_fit_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        Layout(*layout)


# --- policies


def test_prices_and_thresholds_meet_the_target_on_the_calibration_images():
    rng = np.random.default_rng(0)
    values, spread = rng.normal(size=(2000, 3)), rng.uniform(size=(2000, 2))
    for target in (6.0, 12.0, 25.0):
        for choice in (by_value(values, values, COUNTS, target), by_spread(spread, spread, COUNTS, target)):
            assert np.asarray(COUNTS)[choice].mean() == pytest.approx(target, abs=0.2)


def test_a_price_moves_no_image_to_a_count_that_is_worth_less_than_a_cheaper_one():
    values = np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9], [0.1, 0.8, 0.81]])
    assert by_value(values, values, COUNTS, (4 + 36 + 9) / 3).tolist() == [0, 2, 1]


def test_the_oracle_takes_the_smallest_right_count_and_the_smallest_where_none_is():
    right = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=bool)
    assert oracle(right).tolist() == [1, 0, 0, 2]


def test_family_values_are_calibration_accuracies():
    right = np.array([[0, 1], [1, 1], [0, 0]], dtype=bool)
    found = family_values(right, np.array(["a", "a", "b"]), np.array(["b", "a"]))
    assert found.tolist() == [[0, 0], [0.5, 1]]


def test_shuffling_a_share_keeps_the_counts_and_moves_no_more_than_that_share():
    choice = np.arange(1000) % 3
    for share in (0.0, 0.4, 1.0):
        mixed = mixed_with_shuffled(choice, share, np.random.default_rng(1))
        assert np.array_equal(np.sort(mixed), np.sort(choice))
        assert (mixed != choice).mean() == pytest.approx(share * 2 / 3, abs=0.04)


def test_area_under_curve():
    assert area_under_curve(np.array([0, 1, 2, 3]), np.array([False, False, True, True])) == 1
    assert area_under_curve(np.array([1, 1, 1, 1]), np.array([False, False, True, True])) == 0.5
    assert np.isnan(area_under_curve(np.array([1, 2]), np.array([True, True])))


# --- statistics


def test_chord_and_hull():
    accuracy = np.array([[0.2, 0.3, 0.9]])
    tokens = np.array([[4, 6.5, 9, 22.5, 36]])
    assert chord(COUNTS, accuracy, tokens)[0] == pytest.approx([0.2, 0.25, 0.3, 0.6, 0.9])
    # 9 tokens are worth less than a mixture of 4 and 36
    mixtures = [0.2 + 0.7 * (mean - 4) / 32 for mean in tokens[0]]
    assert hull(COUNTS, accuracy, tokens)[0] == pytest.approx(mixtures)


def routable(seed: int, images: int = 4000, noise: float = 0.0) -> SeedRecord:
    """Half of two families needs 36 tokens, which is known to the policy `knows`, and dealt at random by `guesses`."""
    rng = np.random.default_rng(seed)
    families = np.repeat(["a", "b"], images // 2)
    needs = rng.random(images) < np.where(families == "a", 0.2, 0.8)
    right = np.stack([~needs, ~needs, np.ones(images, dtype=bool)], 1)
    right &= rng.random(right.shape) >= noise
    by_family = np.where(families == "b", 2, 0)
    return SeedRecord(
        families, right, {"knows": needs * 2, "guesses": rng.permutation(needs * 2), "families": by_family}
    )


def test_gains_are_what_they_are_by_construction():
    found = bootstrap([routable(seed) for seed in range(3)], COUNTS, draws=300)
    knows, guesses, families = (
        {name: value.summary() for name, value in found[policy].items()} for policy in ("knows", "guesses", "families")
    )
    assert knows["accuracy"]["mean"] == 1 and knows["tokens"]["mean"] == pytest.approx(20, abs=0.5)
    # half of the images at 4 tokens: the best mixture answers half plus half of the rest
    assert knows["over_hull"]["mean"] == pytest.approx(0.25, abs=0.02)
    assert knows["over_shuffled"]["mean"] == pytest.approx(0.25, abs=0.02)
    assert guesses["over_shuffled"]["low"] < 0 < guesses["over_shuffled"]["high"]
    # that choice knows kinds alone: within a kind, dealing changes nothing
    assert families["over_family_shuffled"]["mean"] == pytest.approx(0, abs=1e-6)
    assert families["over_shuffled"]["mean"] == pytest.approx(0.15, abs=0.02)
    assert knows["over_family_shuffled"]["mean"] == pytest.approx(0.16, abs=0.02)
    assert found["always 36"]["accuracy"].summary()["mean"] == 1


def test_differences_of_two_models_are_paired():
    """Both see the same draws of images: their difference has no spread where one is the other plus a constant."""
    records = [routable(seed) for seed in range(3)]
    worse = [SeedRecord(r.families, r.right, {"knows": np.full(len(r.right), 2)}) for r in records]
    first, second = bootstrap(records, COUNTS, draws=200), bootstrap(worse, COUNTS, draws=200)
    assert np.ptp((first["knows"]["accuracy"] - second["knows"]["accuracy"]).draws) < 1e-5
    assert np.ptp(first["knows"]["tokens"].draws) > 0.1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Of 60 repetitions with six seeds each, nearly all cover the true accuracy of 0.7."""
    hits = 0
    for repetition in range(60):
        records = [routable(100 * repetition + seed, images=200, noise=0.3) for seed in range(6)]
        accuracy = bootstrap(records, COUNTS, draws=200, seed=repetition)["always 36"]["accuracy"].summary()
        hits += accuracy["low"] <= 0.7 <= accuracy["high"]
    assert 50 <= hits <= 60


def test_weights_give_each_family_its_share():
    families = np.array(["a"] * 10 + ["b"] * 30)
    rng = np.random.default_rng(0)
    for shares in (None, {"a": 0.9, "b": 0.1}):
        weights = image_weights(families, 50, rng, shares)
        expected = 0.5 if shares is None else 0.9
        assert weights[:, :10].sum(1) == pytest.approx(np.full(50, expected), abs=1e-5)
    record = SeedRecord(families, np.ones((40, 3), dtype=bool), {"it": np.zeros(40, dtype=int)})
    assert measures(record, COUNTS, weights)["accuracy"] == pytest.approx(1, abs=1e-5)


# --- the run


@pytest.fixture(scope="module")
def small_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    text = CONFIG.read_text(encoding="utf-8")
    for before, after in (("seeds: [0, 1, 2, 3, 4]", "seeds: [0, 1]"), ("admitted_from: 0.8", "admitted_from: 0.0"),
                          ("draws: 2000", "draws: 100"), ("name: cpu", "name: small")):  # fmt: skip
        assert before in text
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_whole_study_runs_and_writes_results(small_config, tmp_path):
    output, real = tmp_path / "results", tmp_path / "real"
    for kind, picture in zip(("pages", "scenes"), render(2, seed=1, families=["table", "scene"]), strict=True):
        (real / kind).mkdir(parents=True)
        picture.image.resize((90, 60)).save(real / kind / "one.png")
    small_config.write_text(small_config.read_text(encoding="utf-8") + f"real_images: {real}\n", encoding="utf-8")
    arguments = ["--config", str(small_config), "--scale", "0.004", "--work", str(tmp_path / "work")]
    assert command.main([*arguments, "--workers", "1", "--output", str(output)]) == 0
    results = json.loads((output / "small.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(results["compressors"]) == {"pool", "resampler", "mini"}
    assert results["settings"]["seeds"] == [0, 1] and results["cpu_seconds"] > 0
    assert set(results["admission"]) == set(FAMILIES)
    pool = results["compressors"]["pool"]["policies"]
    assert pool["oracle"]["accuracy"]["mean"] >= max(pool[f"always {count}"]["accuracy"]["mean"] for count in COUNTS)
    assert len(pool["dfmr"]["over_chord"]["by_seed"]) == 2
    assert set(results["real_images"]["pool"]["dfmr"]) == {"pages", "scenes"}
    assert set(results["real_images"]["pool"]["dfmr"].values()) <= {4, 6.5, 9, 20, 22.5, 36}
    text = (output / "small.md").read_text()
    assert "over chord" in text and "nan" not in text
    for plot in ("frontier", "gain", "hard_share", "router_quality", "steps"):
        assert (output / f"small_{plot}.png").stat().st_size > 5000
    # nothing is trained twice
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npz")}
    assert len(made) == 2 * len(arms_of(read_settings(small_config)))
    assert command.main([*arguments, "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_run_that_is_killed_or_out_of_time_goes_on_to_the_same_weights(small_config, tmp_path):
    settings = read_settings(small_config).scaled(0.03)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    started = time.monotonic()
    train_base(settings, 0, whole, float("inf"))
    with pytest.raises(OutOfTime, match="steps"):
        train_base(settings, 0, broken, started + 1.3 * (time.monotonic() - started))
    assert not (broken / "base.pt").exists()
    train_base(settings, 0, broken, float("inf"))
    expected, found = (torch.load(folder / "base.pt", weights_only=True) for folder in (whole, broken))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_killed_command_leaves_no_half_piece_behind(small_config, tmp_path):
    work = tmp_path / "work"
    arguments = [
        sys.executable,
        "-m",
        "adaptive_llava.training.study",
        "--config",
        str(small_config),
        "--scale",
        "0.05",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*arguments, "--workers", "1", "--work", str(work)], env=environment)
    until = time.monotonic() + 120
    while not list(work.glob("seed_0/*.seconds")) and time.monotonic() < until:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=60)[1], "nothing goes on training for nobody"
    finished = list(work.rglob("*.pt"))
    assert finished
    for path in finished:
        assert torch.load(path, weights_only=True)


def test_time_that_is_up_is_told_and_the_exit_status_says_so(small_config, tmp_path, capsys):
    arguments = ["--config", str(small_config), "--scale", "0.01", "--work", str(tmp_path), "--minutes", "1e-9"]
    assert command.main(arguments) == command.OUT_OF_TIME
    assert "Time is up" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu", "accelerator"])
def test_the_configs_describe_models_that_can_be_built(name):
    settings = read_settings(CONFIG.with_name(f"{name}.yaml"))
    assert settings.layout.grid % 3 == settings.layout.grid % 2 == 0
    tokens = {(settings.grid // factor) ** 2 for factor in settings.factors}
    assert tokens <= set(settings.counts), "choices of the pooling arms can be carried out by the resampler"
    assert tokens == ({4, 9, 36} if name == "cpu" else {64, 144, 576})
    assert window_sides(settings, tuple(sorted(tokens))) == [3, 2]


def test_the_accelerator_config_trains_a_step(tmp_path):
    """Its sizes are those of the config, its steps are not."""
    import dataclasses

    settings = dataclasses.replace(
        read_settings(CONFIG.with_name("accelerator.yaml")), device="cpu", base_steps=1, arm_steps=1, separate_steps=1,
        marks=(1,), training_pictures=len(FAMILIES) + 2 * len(SINGLE), router_pictures=18,
        calibration_pictures=18, test_pictures=18, batch_size=2, vision_layers=2, text_layers=1,
    )  # fmt: skip
    train_base(settings, 0, tmp_path, float("inf"))
    arm = next(arm for arm in arms_of(settings) if arm.name == "pool fixed 64")
    train_arm(settings, 0, arm, tmp_path, float("inf"))
    evidence = np.load(tmp_path / "pool fixed 64.npz")
    assert evidence["right_test"].shape == (18, 3)


@pytest.mark.parametrize(
    "change, message", [("colour: red\n", "colour"), (None, "cannot|No such")], ids=["unknown field", "no file"]
)
def test_a_config_that_is_wrong_is_refused_in_one_line(tmp_path, capsys, change, message):
    path = tmp_path / "wrong.yaml"
    if change:
        path.write_text(CONFIG.read_text(encoding="utf-8") + change, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--config", str(path)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "study:" in told and any(part in told for part in message.split("|"))
