"""Thresholds whose loss of score is bounded: placed, tested, refused, written, and asked for on the command line."""

from __future__ import annotations

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_llava.__main__ import main as command_line
from adaptive_llava.training.calibrate import HISTOGRAM, calibrate_thresholds, main
from adaptive_llava.training.calibrate_accuracy import NotCertified, certify, certify_thresholds
from adaptive_llava.training.calibration_record import calibration_text
from adaptive_llava.training.learn_then_test import images_needed
from adaptive_llava.training.question_samples import Sample, read_samples
from adaptive_llava.training.router_statistic import router_statistic
from adaptive_llava.training.sample_images import sample_images
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import load_shipped
from adaptive_llava.training.threshold_family import SpreadThresholds, threshold_family
from tests.conftest import tiny_images, tiny_model


TWO = {"type": "average_pool", "factors": [1, 3]}
ROUTED = {
    "feature_std": {"router": {"type": "feature_std"}},
    "pixel_std": {"router": {"type": "pixel_std"}},
    "classifier, three counts": {"router": {"type": "classifier"}},
    "classifier, two counts": {"router": {"type": "classifier"}, "compressor": TWO},
}
ASKED = {"metric": "anls", "max_drop": 0.3, "confidence": 0.9, "max_new_tokens": 2}


def scores_of(spread: np.ndarray, loss: np.ndarray, gain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores of 0 and 1 at the smallest and the largest count, `(n, 2)`: four in five images are right at most."""
    full, luck = rng.random(len(spread)) < 0.8, rng.random(len(spread))
    fewest = np.where(full, luck >= loss, luck >= 1 - gain)
    return np.stack([fewest, full], axis=1).astype(float)


def test_over_500_draws_new_images_lose_more_than_the_bound_in_at_most_5_percent():
    """The larger the statistic, the more is lost, so that the true drop at each threshold is known."""
    family, violated, certified = SpreadThresholds(None, (4, 36)), 0, 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        spread = rng.random((600, 1)).astype(np.float32)
        scores = scores_of(spread, 0.08 * spread[:, 0], 0.04 * spread[:, 0], rng)
        try:
            found = certify(family, spread, scores, metric="anls", max_drop=0.02, seed=seed)
        except NotCertified:
            continue
        certified += 1
        threshold = min(found.setting[0], 1.0)
        violated += (0.8 * 0.08 - 0.2 * 0.04) * threshold**2 / 2 > found.bound
    assert certified > 250  # so that there is something to violate
    assert violated / 500 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 500)


def test_a_harmless_router_is_certified_and_saves_tokens():
    """Only images of a large statistic need their tokens; three counts, of which the middle one never harms."""
    rng = np.random.default_rng(0)
    spread = rng.random((3000, 1)).astype(np.float32)
    needy = (spread[:, 0] > 0.6).astype(float)
    two = scores_of(spread, 0.9 * needy, 0 * needy, rng)
    scores = np.stack([two[:, 0], two[:, 1], two[:, 1]], axis=1)
    spread = np.concatenate([spread, spread / 2], axis=1)
    found = certify(SpreadThresholds(None, (1, 4, 36)), spread, scores, metric="anls", max_drop=0.01)
    assert found.mean_tokens[0] == 36 and 0.5 * 36 > found.mean_tokens[1] > 0.35 * 36
    assert found.drop <= 0.01 and found.bound <= 0.01
    assert found.scores[0] - found.scores[1] == pytest.approx(found.drop)
    assert (found.num_images, found.num_tested) == (3000, 2400)


def test_a_harmful_router_is_refused_with_what_could_be_certified():
    rng = np.random.default_rng(0)
    spread = rng.random((2000, 1)).astype(np.float32)
    scores = scores_of(spread, np.full(2000, 0.5), np.zeros(2000), rng)
    family = SpreadThresholds(None, (4, 36))
    with pytest.raises(
        NotCertified, match="`max_drop=0.01` is not certified, and the thresholds were left"
    ) as refused:
        certify(family, spread, scores, metric="anls", max_drop=0.01)
    possible = float(re.search(r"it loses at most (\d\.\d+)", str(refused.value))[1])
    assert 0.01 < possible < 0.1  # 5 % of the tokens spared, 40 % of these answers lost
    assert certify(family, spread, scores, metric="anls", max_drop=possible + 0.002).bound <= possible + 0.002


def test_the_number_that_is_needed_is_named_and_exact():
    needed = images_needed(0.05, 0.9, tested_share=0.8, at_least=10)
    family, spread = SpreadThresholds(None, (4, 36)), np.linspace(0, 1, 2000, dtype=np.float32)[:, None]
    options = {"metric": "anls", "max_drop": 0.05, "confidence": 0.9}
    with pytest.raises(
        ValueError, match=f"{needed - 1} images are too few for `max_drop=0.05`.*at least {needed} are"
    ):
        certify(family, spread[: needed - 1], np.ones((needed - 1, 2)), **options)
    found = certify(family, spread[:needed], np.ones((needed, 2)), **options)
    assert found.mean_tokens[1] == 4 and found.drop == 0


def test_tested_images_have_no_say_in_the_settings_nor_their_answers_in_the_number():
    rng = np.random.default_rng(0)
    spread = rng.random((400, 1)).astype(np.float32)
    options = {"metric": "anls", "max_drop": 0.05, "seed": 5}
    found = certify(SpreadThresholds(None, (4, 36)), spread, np.ones((400, 2)), **options)
    pilot = np.random.default_rng(5).permutation(400)[320:]
    other = rng.random((400, 1)).astype(np.float32)
    other[pilot] = spread[pilot]
    again = certify(SpreadThresholds(None, (4, 36)), other, np.ones((400, 2)), **options)
    assert found.setting == again.setting and found.num_settings == again.num_settings == 20


@pytest.mark.parametrize("kind", ROUTED)
def test_settings_run_from_all_tokens_to_the_fewest_and_the_model_obeys_them(kind):
    model, images = tiny_model("dfmr", **ROUTED[kind]), tiny_images(31)[1:]  # a flat image is always accepted
    inner = model.model
    family = threshold_family(inner.router, model.config.visual_token_counts)
    statistic, counts = router_statistic(inner, images.split(7), family.statistic)
    assert counts == model.config.visual_token_counts
    targets = np.linspace(counts[-1], counts[0], 6).tolist()
    chosen = [family.rungs(statistic, family.setting(statistic, target)) for target in targets]
    means = [float(np.asarray(counts)[rungs].mean()) for rungs in chosen]
    assert means == sorted(means, reverse=True) and (means[0], means[-1]) == (counts[-1], counts[0])
    assert means[2] == pytest.approx(targets[2], abs=2.0)
    untouched = {name: value.clone() for name, value in inner.router.state_dict().items()}
    family.put_into(inner.router, family.setting(statistic, targets[2]))
    assert list(model.encode_images(images).rungs) == chosen[2].tolist()
    changed = [name for name, value in inner.router.state_dict().items() if not torch.equal(value, untouched[name])]
    assert changed == (["linear_2.bias"] if family.in_weights else [])


@pytest.mark.parametrize("preset", ["llava", "random-pool", "avg-pool"])
def test_a_router_without_thresholds_is_refused_and_those_with_are_named(preset):
    with pytest.raises(
        ValueError, match="has no thresholds to set. Routers that have.*: classifier, feature_std, pixel_std"
    ):
        certify_thresholds(tiny_model(preset), None, [], "anls", max_drop=0.01)


def test_models_and_metrics_that_no_bound_fits_are_refused():
    with pytest.raises(ValueError, match="routes every tile of an image by itself"):
        certify_thresholds(tiny_model("dfmr", tiling={"type": "anyres"}), None, [], "anls", max_drop=0.01)
    with pytest.raises(ValueError, match="`metric='mme'` is no mean of scores"):
        certify_thresholds(tiny_model("dfmr"), None, [], "mme", max_drop=0.01)
    with pytest.raises(ValueError, match="`metric='bleu'` is unknown"):
        certify_thresholds(tiny_model("dfmr"), None, [], "bleu", max_drop=0.01)


def sample(image, question="which", answers=("a",), identifier="0") -> Sample:
    return Sample(identifier, question, tuple(answers), [image], {})


def test_questions_about_one_image_count_as_one_image_whatever_its_file_is_called(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    red, blue, again = (str(tmp_path / f"{name}.png") for name in "abc")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    samples = [sample(red), sample(blue), sample(again, "other"), sample(stored, "third")]
    found = sample_images(samples)
    assert sorted(found.first.tolist()) == [0, 1] and len(set(found.image[[0, 2, 3]])) == 1
    means = found.means(np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 1.0], [1.0, 1.0]]))
    assert means[found.image[:2]].tolist() == [[0.5, 1.0], [1.0, 0.0]]


def test_the_hash_of_the_data_knows_images_questions_and_answers_but_no_order():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    samples = [sample(red), sample(blue, answers=("a", "b"))]
    digest = sample_images(samples).sha256
    assert sample_images(samples[::-1]).sha256 == digest and len(digest) == 64
    others = [
        [sample(red), sample(red, answers=("a", "b"))],
        [sample(red, "what"), samples[1]],
        [sample(red, answers=("b",)), samples[1]],
        [sample(red), sample(blue, answers=("ab",))],
        [*samples, samples[0]],
    ]
    assert len({digest, *(sample_images(each).sha256 for each in others)}) == 6


def test_questions_about_several_images_are_refused():
    red = Image.new("RGB", (4, 4), "red")
    with pytest.raises(ValueError, match="Question 7 has 2 images"):
        sample_images([Sample("7", "which", ("a",), [red, red], {})])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model and its processor, saved, and a folder of pictures with two questions about each."""
    root = tmp_path_factory.mktemp("accuracy")
    model, processor = load_shipped()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "pictures").mkdir()
    rows = []
    for index, picture in enumerate(render(56, seed=3)):
        picture.image.save(root / "pictures" / f"{index}.png")
        asked = [{"question": question, "answer": answer} for question, answer in picture.questions[:2]]
        rows.append(json.dumps({"file": f"{index}.png", "qa": asked}))
    (root / "pictures" / "manifest.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def arguments(root, *more: str) -> list[str]:
    chosen = [text for name, value in ASKED.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--model", str(root / "model"), "--data", str(root / "pictures"), *chosen, *more]


def test_the_command_certifies_a_classifier_and_writes_the_certificate_into_the_checkpoint(shipped, tmp_path, capsys):
    output = tmp_path / "certified"
    assert command_line(["calibrate", *arguments(shipped, "--output", str(output))]) == 0
    printed = capsys.readouterr().out
    assert (
        "mean tokens saved" in printed
        and "bound on the drop     0.3" in printed
        and "n                     45" in printed
    )

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(output).eval(),
        AutoProcessor.from_pretrained(output),
    )
    record = model.config.calibration
    assert (record["kind"], record["metric"], record["data"]) == ("accuracy", "anls", "pictures")
    assert (record["max_drop"], record["confidence"]) == (0.3, 0.9) and record["bound"] <= 0.3
    assert (record["num_images"], record["num_tested"]) == (56, 45) and record["num_questions"] > 80
    assert record["mean_tokens"]["full"] == 36 > record["mean_tokens"]["chosen"]
    assert re.fullmatch("[0-9a-f]{64}", record["data_sha256"]) and str(shipped) not in json.dumps(record)
    assert processor.router == model.config.router
    assert calibration_text(record) in printed
    assert "at most 0.3 against always spending 36 tokens" in calibration_text(record)

    samples = read_samples(shipped / "pictures")
    tested = sample_images(samples).first[np.random.default_rng(0).permutation(56)[:45]]
    pixels = processor(images=[samples[index].images[0] for index in tested], return_tensors="pt")
    lengths = model.encode_images(pixels["pixel_values"]).lengths
    assert np.mean(lengths) == pytest.approx(record["mean_tokens"]["chosen"], abs=1e-3)
    before = AutoModelForImageTextToText.from_pretrained(shipped / "model").state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.router.linear_2.bias"]


def test_dfmrs_rule_is_certified_in_the_models_own_folder(shipped, tmp_path, capsys):
    model = AutoModelForImageTextToText.from_pretrained(shipped / "model", router={"type": "feature_std"})
    processor = AutoProcessor.from_pretrained(shipped / "model")
    processor.router = dict(model.config.router)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / HISTOGRAM).write_bytes(b"of an earlier calibration")
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    chosen = arguments(shipped)
    chosen[1] = str(folder)
    assert main(chosen) == 0
    after = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "processor_config.json"}
    assert set(before) - set(after) == {HISTOGRAM}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["calibration"]["setting"] == {"of": "thresholds", "values": config["router"]["thresholds"]}
    assert AutoModelForImageTextToText.from_pretrained(folder).config.calibration == config["calibration"]


def test_what_is_not_certified_is_not_written(shipped, tmp_path, capsys):
    """A router that gives the fewest tokens to the images that need most."""
    model, processor = load_shipped()
    with torch.no_grad():
        model.model.router.linear_2.weight.neg_()
    model.save_pretrained(tmp_path / "harmful")
    processor.save_pretrained(tmp_path / "harmful")
    output = tmp_path / "certified"
    chosen = arguments(shipped, "--output", str(output))
    chosen[1] = str(tmp_path / "harmful")
    chosen[chosen.index("0.3")] = "0.08"
    assert command_line(["calibrate", *chosen]) == 2
    assert "`max_drop=0.08` is not certified" in capsys.readouterr().err and not output.exists()
    chosen[chosen.index("0.08")] = "0.01"
    assert command_line(["calibrate", *chosen]) == 2
    assert "56 images are too few for `max_drop=0.01` at `confidence=0.9`: at least " in capsys.readouterr().err


def test_answers_do_not_depend_on_the_order_of_the_data(shipped):
    model, processor = load_shipped()
    options, samples = dict(ASKED), read_samples(shipped / "pictures")
    metric = options.pop("metric")
    found = certify_thresholds(model, processor, samples, metric, **options)
    assert model.config.calibration is None  # only `apply` changes the model
    assert certify_thresholds(model, processor, samples[::-1], metric, **options).provenance() == found.provenance()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (["--max-drop", "0.01"], "`--max-drop 0.01` says how much, and `--metric` is missing"),
        (["--target-mean", "9", "--metric", "anls"], "`--metric anls` belongs to a bound on a loss of score"),
        (["--shares", "1,0", "--confidence", "0.9"], "`--confidence 0.9` belongs to"),
        (["--target-mean", "9", "--question-field", "q"], "`--question-field q` belongs to"),
    ],
)
def test_half_of_a_goal_is_refused(goal, message):
    with pytest.raises(ValueError, match=message):
        main(["--model", "m", "--data", "d", "--output", "o", *goal])


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (["--max-drop", "0.01", "--metric", "anls", "--target-mean", "9"], "not allowed with argument"),
        (["--metric", "anls"], "one of the arguments --target-mean --shares --max-drop is required"),
    ],
)
def test_two_goals_or_none_are_refused(goal, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "m", "--data", "d", *goal])
    assert message in capsys.readouterr().err


def test_a_classifiers_weights_are_not_written_into_the_models_own_folder(shipped):
    with pytest.raises(ValueError, match="'classifier' router with 4 token counts are its weights.*`--output`"):
        main(arguments(shipped))


def test_a_calibration_to_tokens_has_its_sentence_too():
    record = calibrate_thresholds(tiny_model("dfmr"), [tiny_images(20)], target_mean=9, data_name="mine").provenance()
    assert record["kind"] == "tokens"
    assert "a mean of 9 tokens on 20 images of `mine`. Left out of the choice, 6 of them" in calibration_text(record)
