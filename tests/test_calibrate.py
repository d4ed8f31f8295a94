"""Thresholds from images: what is chosen, what is measured, where it is written."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.calibrate import HISTOGRAM, calibrate_thresholds, main
from adaptive_llava.training.rendered_images import render_images
from adaptive_llava.training.threshold_search import rungs_at, thresholds_for_mean, thresholds_for_shares
from tests.conftest import tiny_images, tiny_model, tiny_text_config, tiny_vision_config


pytestmark = pytest.mark.compat

COUNTS = (64, 144, 576)
WORDS = {"<unk>": 0, "</s>": 1, "<image>": 2, "what": 3}


def spread_of(number: int, seed: int = 0) -> np.ndarray:
    """Two statistics that agree only in part, as those of two window sizes do."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(4.0, size=(number, 1))
    return (base * rng.uniform(0.5, 1.5, size=(number, 2)) * [1.2, 1.0]).astype(np.float32)


def rungs_one_by_one(spread, thresholds) -> list[int]:
    """The router's rule, written for one image after the other."""
    chosen = []
    for row in spread:
        qualifying = [rung for rung, (value, limit) in enumerate(zip(row, thresholds, strict=True)) if value <= limit]
        chosen.append(qualifying[0] if qualifying else len(thresholds))
    return chosen


def test_the_rule_of_the_search_is_the_rule_of_the_router():
    spread, thresholds = spread_of(500), (3.5, 4.25)
    router = tiny_model("dfmr").model.router
    router.thresholds = thresholds
    expected = rungs_one_by_one(spread, thresholds)
    assert rungs_at(spread, thresholds).tolist() == expected
    assert router.rungs_of(torch.from_numpy(spread)).tolist() == expected
    assert set(expected) == {0, 1, 2}


@pytest.mark.parametrize("target", [64, 65, 150, 200, 400, 575, 576])
@pytest.mark.parametrize("number", [9, 1000])
def test_no_other_quantile_comes_nearer_to_the_target(target, number):
    spread = spread_of(number)
    thresholds, quantile = thresholds_for_mean(spread, COUNTS, target)
    mean = np.asarray(COUNTS)[rungs_at(spread, thresholds)].mean()
    ordered = np.sort(spread, axis=0)
    every_step = [np.asarray(COUNTS)[rungs_at(spread, limits)].mean() for limits in [[0, 0], *ordered.tolist()]]
    assert abs(mean - target) == pytest.approx(min(abs(step - target) for step in every_step))
    assert 0 <= quantile <= 1


def test_the_mean_never_grows_with_the_quantile_even_with_ties():
    spread = np.round(spread_of(300))
    means = [thresholds_for_mean(spread, COUNTS, target)[1] for target in range(64, 577, 16)]
    assert all(first >= second for first, second in pairwise(means))


def test_images_that_cannot_be_told_apart_all_get_one_count():
    thresholds, _ = thresholds_for_mean(np.full((20, 2), 1.5, dtype=np.float32), COUNTS, 200)
    assert set(rungs_at(np.full((20, 2), 1.5, dtype=np.float32), thresholds)) == {0}  # 64 is nearer to 200 than 576


def test_flat_images_do_not_break_the_search():
    spread = np.zeros((10, 2), dtype=np.float32)
    assert thresholds_for_mean(spread, COUNTS, 576)[0] == [0.0, 0.0]


@pytest.mark.parametrize(
    "shares", [(0.5, 0.3, 0.2), (0.2, 0.0, 0.8), (0.0, 0.5, 0.5), (1, 0, 0), (0, 0, 1), (0.5, 0.5, 0)]
)
def test_every_count_gets_its_share(shares):
    spread = spread_of(1000)
    rungs = rungs_at(spread, thresholds_for_shares(spread, shares))
    assert [float((rungs == rung).mean()) for rung in range(3)] == pytest.approx(list(shares), abs=1e-3)


@pytest.mark.parametrize(("wanted", "accepted"), [(0.3, 0.2), (0.4, 0.2), (0.6, 0.8), (0.7, 0.8)])
def test_equal_images_stay_together_on_the_side_nearer_to_the_wanted_share(wanted, accepted):
    spread = np.asarray([1, 1, 3, 3, 3, 3, 3, 3, 5, 5], dtype=np.float32)[:, None]
    rungs = rungs_at(spread, thresholds_for_shares(spread, [wanted, 1 - wanted]))
    assert float((rungs == 0).mean()) == accepted


def test_every_view_of_a_tiled_image_is_counted_like_an_image():
    model = tiny_model("dfmr", tiling={"type": "anyres"})
    views = tiny_images(12 * 3).unflatten(0, (12, 3))  # the whole image and two tiles
    sizes = torch.tensor([[24, 48]] * 12)
    calibration = calibrate_thresholds(model, [(views, sizes)], shares=[0.3, 0.3, 0.4])
    alone = calibrate_thresholds(model, [views.flatten(0, 1)], shares=[0.3, 0.3, 0.4])
    assert calibration.num_images == 36 and calibration.thresholds == alone.thresholds
    assert "of 36 views" in calibration.summary() and "tokens per view, the whole image" in calibration.summary()
    assert calibration.provenance()["counted"] == "views"
    assert "per view" not in calibrate_thresholds(tiny_model("dfmr"), [tiny_images(12)], target_mean=9).summary()


@pytest.mark.parametrize("router", ["feature_std", "pixel_std"])
def test_the_model_routes_new_images_as_measured(router):
    model = tiny_model("dfmr", router={"type": router})
    images = tiny_images(40)
    before = model.encode_images(images).rungs
    calibration = calibrate_thresholds(model, images.split(7), target_mean=14, holdout=0.25)
    assert model.encode_images(images).rungs == before  # only `apply` changes the model
    calibration.apply(model)
    rungs = model.encode_images(images).rungs
    assert list(rungs) == rungs_one_by_one(calibration.spread, calibration.thresholds)
    assert model.config.router["thresholds"] == list(calibration.thresholds) == list(model.model.router.thresholds)
    rebuilt = AdaptiveLlavaConfig.from_dict(model.config.to_dict())
    assert rebuilt.router == model.config.router and rebuilt.calibration == model.config.calibration


def test_the_result_does_not_depend_on_batches_and_follows_the_seed():
    model, images = tiny_model("dfmr"), tiny_images(40)
    first, second = (calibrate_thresholds(model, images.split(size), target_mean=14, seed=1) for size in (3, 40))
    assert first.thresholds == pytest.approx(second.thresholds, rel=1e-5)
    assert (first.num_held_out, first.mean) == (second.num_held_out, second.mean) and first.num_held_out == 12
    assert calibrate_thresholds(model, [images], target_mean=14, seed=2).thresholds != second.thresholds


def test_held_out_images_have_no_say():
    model, images = tiny_model("dfmr"), tiny_images(40)
    calibration = calibrate_thresholds(model, [images], target_mean=14, seed=3)
    order = np.random.default_rng(3).permutation(40)
    chosen_on = calibration.spread[order[calibration.num_held_out :]]
    assert list(calibration.thresholds) == thresholds_for_mean(chosen_on, calibration.counts, 14)[0]
    measured = rungs_one_by_one(calibration.spread[order[: calibration.num_held_out]], calibration.thresholds)
    tokens = np.asarray(calibration.counts)[measured]
    assert calibration.mean == pytest.approx(tokens.mean())
    assert calibration.standard_error == pytest.approx(tokens.std(ddof=1) / len(tokens) ** 0.5)


def test_no_part_of_the_model_changes_its_mode():
    model = tiny_model("dfmr").train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    calibrate_thresholds(model, [tiny_images(10)], target_mean=14)
    assert [module.training for module in model.modules()] == modes


def test_5000_held_out_rendered_images_get_the_wanted_mean_within_5_percent():
    torch.manual_seed(0)
    vision = tiny_vision_config("clip", 48)
    vision.patch_size, vision.num_hidden_layers = 8, 2
    config = AdaptiveLlavaConfig.from_preset(
        "dfmr", vision_config=vision, text_config=tiny_text_config(), image_token_id=99
    )
    model = AdaptiveLlavaForConditionalGeneration(config).eval()
    assert config.visual_token_counts == (4, 9, 36)

    def batches():
        for start in range(0, 7500, 250):
            images = [rendered.image.resize((48, 48)) for rendered in render_images(250, seed=start)]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

    calibration = calibrate_thresholds(model, batches(), target_mean=12.5, holdout=2 / 3)
    assert calibration.num_held_out == 5000
    assert abs(calibration.mean - 12.5) <= 0.05 * 12.5, calibration.summary()
    by_share = calibrate_thresholds(model, tiny_images(1000, image_size=48).split(250), shares=[0.5, 0.3, 0.2])
    assert by_share.within_target and by_share.target_mean == pytest.approx(0.5 * 4 + 0.3 * 9 + 0.2 * 36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_mean": 3}, "`target_mean=3` cannot be reached: this model spends 4 to 36 tokens"),
        ({"target_mean": 37}, "cannot be reached"),
        ({"target_mean": float("nan")}, "cannot be reached"),
        ({"shares": [0.5, 0.5]}, "must have 3 entries, one per token count \\[4, 9, 36\\]"),
        ({"shares": [0.5, 0.3, 0.3]}, "must be numbers >= 0 that add up to 1, not to 1.1"),
        ({"shares": [1.5, -0.5, 0]}, "must be numbers >= 0"),
        ({}, "Pass one of `target_mean` and `shares`"),
        ({"target_mean": 9, "shares": [1, 0, 0]}, "Pass one of"),
        ({"target_mean": 9, "holdout": 0.0}, "`holdout=0.0` must lie between 0 and 1"),
    ],
)
def test_goals_that_cannot_be_reached_are_refused_after_one_batch(options, message):
    def batches():
        yield tiny_images(4)
        raise AssertionError("the second batch was read")

    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(tiny_model("dfmr"), batches(), **options)


@pytest.mark.parametrize("preset", ["llava", "random-pool", "avg-pool"])
def test_a_router_without_thresholds_is_refused_and_those_with_are_named(preset):
    with pytest.raises(
        ValueError, match="has no thresholds to calibrate. Routers that have.*: feature_std, pixel_std"
    ):
        calibrate_thresholds(tiny_model(preset), [tiny_images(8)], target_mean=9)


def test_too_few_and_unusable_images_are_refused():
    model = tiny_model("dfmr")
    with pytest.raises(ValueError, match="7 images are too few"):
        calibrate_thresholds(model, [tiny_images(7)], target_mean=9)
    with pytest.raises(ValueError, match="no images to calibrate on"):
        calibrate_thresholds(model, [], target_mean=9)
    with pytest.raises(ValueError, match="not finite"):
        calibrate_thresholds(model, [tiny_images(8) * float("nan")], target_mean=9)
    with pytest.raises(ValueError, match="Linear, which has no router"):
        calibrate_thresholds(torch.nn.Linear(2, 2), [tiny_images(8)], target_mean=9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model with its processor, and a folder of images from flat to noisy."""
    root = tmp_path_factory.mktemp("calibrate")
    model = tiny_model("dfmr")
    model.config.image_token_id = WORDS["<image>"]
    model.save_pretrained(root / "model")
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    AdaptiveLlavaProcessor.from_config(model.config, tokenizer).save_pretrained(root / "model")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        values = 128 + rng.normal(0, 1 + 2 * index, size=(24, 24, 3))
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(root / "pictures" / f"{index:02d}.png")
    return root


def test_the_command_calibrates_a_model_in_its_own_folder(checkpoint, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(checkpoint / "model", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["--model", str(folder), "--data", str(checkpoint / "pictures"), "--target-mean", "14"]) == 0
    printed = capsys.readouterr().out
    assert "held-out mean" in printed and "of the target, 14.0" in printed

    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"config.json", "processor_config.json", HISTOGRAM}
    with Image.open(folder / HISTOGRAM) as histogram:
        assert histogram.width > 400
    config = json.loads(after["config.json"])
    record = config["calibration"]
    assert (record["data"], record["num_images"], record["target_mean"]) == ("pictures", 40, 14.0)
    assert str(tmp_path) not in json.dumps(config) and str(checkpoint) not in json.dumps(config)
    assert sum(record["held_out"]["shares"]) == pytest.approx(1, abs=1e-3)

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert list(model.model.router.thresholds) == config["router"]["thresholds"] != [0.05, 0.15]
    assert AutoProcessor.from_pretrained(folder).router == model.config.router


def test_the_processor_counts_by_the_calibrated_pixel_thresholds(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint / "model", router={"type": "pixel_std"})
    model.save_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(checkpoint / "model")
    processor.router, processor.layout = dict(model.config.router), "expanded"
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(checkpoint / "pictures")]
    assert main([*arguments, "--shares", "0.4,0.3,0.3"]) == 0

    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    paths = sorted((checkpoint / "pictures").iterdir())
    encoded = model.encode_images(processor(images=paths, return_tensors="pt")["pixel_values"])
    counts = processor.count_tokens(paths)
    assert counts == list(encoded.lengths)
    assert set(counts) == {4, 9, 36}


def test_the_command_writes_a_whole_checkpoint_elsewhere(checkpoint, tmp_path):
    output = tmp_path / "calibrated"
    before = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    arguments = ["--model", str(checkpoint / "model"), "--data", str(checkpoint / "pictures"), "--limit", "30"]
    assert main([*arguments, "--shares", "0.5,0.3,0.2", "--output", str(output), "--batch-size", "7"]) == 0
    assert {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()} == before
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert model.config.calibration["num_images"] == 30
    assert model.config.calibration["target_shares"] == [0.5, 0.3, 0.2]
    processor = AutoProcessor.from_pretrained(output)
    assert processor.router == model.config.router
    old = AutoModelForImageTextToText.from_pretrained(checkpoint / "model")
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), model.parameters(), strict=True))


def test_the_command_refuses_before_work_what_cannot_end_well(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="Say with `--output` where to write"):
        main(["--model", "some/model", "--data", str(tmp_path), "--target-mean", "14"])
    with pytest.raises(ValueError, match="holds no images"):
        main(["--model", str(checkpoint / "model"), "--data", str(tmp_path), "--target-mean", "14"])
    with pytest.raises(ValueError, match="`--batch-size 0` must be at least 1"):
        main(["--model", str(checkpoint / "model"), "--data", "x", "--target-mean", "14", "--batch-size", "0"])
    with pytest.raises(SystemExit):
        main(["--model", "m", "--data", "d", "--target-mean", "14", "--shares", "1,0,0"])
