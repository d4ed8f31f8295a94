"""A classifier is trained on labelled images, measured on others, and written into a checkpoint that routes alike."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.modeling.compressor_average_pool import AveragePoolCompressor
from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.training.classification_metrics import area_under_curve, confusion, reliability
from adaptive_llava.training.rendered_images import render_images
from adaptive_llava.training.router_fit import TEMPERATURES, fit_router, route, split_images
from adaptive_llava.training.train_router import RESULTS, main, replace_router
from tests.conftest import tiny_model
from tests.fresh_process import run_without_package
from tests.test_convert import character_tokenizer


pytestmark = pytest.mark.compat

KINDS = ("scene", "collage", "document")


def save_model(folder, *, factors=(1, 2), vision="clip", dtype=torch.float32, **fields):
    model = tiny_model(vision=vision, compressor={"type": "average_pool", "factors": list(factors)}, **fields)
    tokenizer = character_tokenizer()
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = AdaptiveLlavaProcessor.from_config(model.config, tokenizer)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 60 images for each kind, and two folders with scenes and documents mixed."""
    root = tmp_path_factory.mktemp("labelled")
    for kind in KINDS:
        (root / kind).mkdir()
        for index, rendered in enumerate(render_images(60, seed=KINDS.index(kind), kinds=[kind])):
            rendered.image.save(root / kind / f"{index:02d}.png")
    for index, rendered in enumerate(render_images(240, seed=9, kinds=["scene", "document"])):
        folder = root / ("heads" if np.random.default_rng(index).random() < 0.5 else "tails")
        folder.mkdir(exist_ok=True)
        rendered.image.save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved models: two token counts under a fixed router, and three."""
    root = tmp_path_factory.mktemp("models")
    return {2: save_model(root / "two"), 3: save_model(root / "three", factors=(1, 2, 3))}


@pytest.fixture(scope="module")
def binary(models, data, tmp_path_factory):
    """A model routed between documents and scenes, what was printed, and the cache."""
    root = tmp_path_factory.mktemp("binary")
    return train(root / "routed", models[2], root / "cache", *two_classes(data)), root / "cache"


def train(output, model, cache, *arguments):
    code = main(["--model", str(model), "--output", str(output), "--cache", str(cache), *map(str, arguments)])
    assert code == 0
    return output


def two_classes(data):
    return ("--positive", data / "document", "--negative", data / "scene")


def result_of(folder):
    return json.loads((folder / RESULTS).read_text())


def auc_by_pairs(higher, lower):
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in higher for b in lower]))


def test_documents_and_scenes_are_told_apart(binary):
    held_out = result_of(binary[0])["held_out"]
    (separation,) = held_out["separation"].values()
    assert separation["auc"] > 0.95 and separation["images"] == [12, 12]
    assert held_out["sources"]["document"]["mean_tokens"] > held_out["sources"]["scene"]["mean_tokens"] + 15


def test_labels_that_mean_nothing_are_not_learned(models, data, tmp_path):
    arguments = (
        "--source",
        f"a={data / 'heads'}",
        "--source",
        f"b={data / 'tails'}",
        "--rung",
        "a=1",
        "--rung",
        "b=0",
    )
    result = result_of(train(tmp_path / "routed", models[2], tmp_path / "cache", *arguments, "--holdout", "0.4"))
    (separation,) = result["held_out"]["separation"].values()
    # some 48 against 48 images: a standard error of 0.06
    assert 0.3 < separation["auc"] < 0.7


def test_the_reported_figures_are_those_of_the_saved_model_on_the_images_it_names(binary, data):
    folder, _ = binary
    result = result_of(folder)
    held_out = result["held_out"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.open(data / choice["source"] / choice["image"]) for choice in held_out["choices"]]
    with torch.no_grad():
        encoded = model.encode_images(processor(images=images, return_tensors="pt")["pixel_values"])
    assert [choice["rung"] for choice in held_out["choices"]] == list(encoded.rungs)
    np.testing.assert_allclose([choice["score"] for choice in held_out["choices"]], encoded.scores, atol=1e-5)

    wanted = np.array([choice["source"] == "document" for choice in held_out["choices"]])
    scores, chosen = encoded.scores.double().numpy(), np.array(encoded.rungs)
    (separation,) = held_out["separation"].values()
    assert separation["auc"] == pytest.approx(auc_by_pairs(scores[wanted], scores[~wanted]), abs=1e-4)
    assert separation["brier"] == pytest.approx(np.mean((scores - wanted) ** 2), abs=1e-4)
    gaps = 0.0
    for low in range(10):
        inside = (scores >= low / 10) & ((scores < (low + 1) / 10) | (low == 9))
        gaps += abs(scores[inside].sum() - wanted[inside].sum()) / len(scores)
    assert separation["ece"] == pytest.approx(gaps, abs=1e-4)
    table = [[int((chosen[wanted == w] == c).sum()) for c in (0, 1)] for w in (False, True)]
    assert held_out["confusion"] == table
    for name, of_source in (("document", wanted), ("scene", ~wanted)):
        tokens = np.array(result["counts"])[chosen[of_source]]
        assert held_out["sources"][name]["mean_tokens"] == pytest.approx(tokens.mean(), abs=0.01)
        assert held_out["sources"][name]["images"] == of_source.sum() == 12


def test_no_image_is_both_trained_on_and_measured_and_the_record_names_the_data(binary):
    result, config = result_of(binary[0]), json.loads((binary[0] / "config.json").read_text())
    assert config["router"]["type"] == "classifier" and config["router"]["features"] == "cls"
    record = config["router_training"]
    assert record == {key: result[key] for key in record}
    assert record["images"] == {"train": 78, "validation": 18, "held_out": 24}
    assert [(source["name"], source["rung"], source["used"]) for source in record["sources"]] == [
        ("document", 1, 60),
        ("scene", 0, 60),
    ]
    processor = json.loads((binary[0] / "processor_config.json").read_text())
    assert processor["router"] == config["router"]


def test_nothing_but_the_router_changes(binary, models):
    before, after = (load_file(folder / "model.safetensors") for folder in (models[2], binary[0]))
    added = set(after) - set(before)
    assert set(before) <= set(after) and added and all(".router.linear_" in name for name in added)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_process_without_this_package_routes_alike(binary, data, tmp_path):
    code = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, data = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
choices = json.load(open(folder + "/router_training.json"))["held_out"]["choices"]
images = [Image.open(f"{data}/{choice['source']}/{choice['image']}") for choice in choices]
rungs = model.encode_images(processor(images=images, return_tensors="pt")["pixel_values"]).rungs
print(json.dumps([list(rungs), any(p.requires_grad for p in model.model.router.parameters())]))
"""
    said = run_without_package(code, binary[0], data, folder=tmp_path)
    choices = result_of(binary[0])["held_out"]["choices"]
    assert json.loads(said.splitlines()[-1]) == [[choice["rung"] for choice in choices], False]


def test_three_counts_learn_three_labels(models, data, tmp_path, capsys):
    arguments = [item for kind in KINDS for item in ("--source", f"{kind}={data / kind}")]
    arguments += ["--rung", "scene=0", "--rung", "collage=1", "--rung", "document=top"]
    result = result_of(train(tmp_path / "routed", models[3], tmp_path / "cache", *arguments))
    assert list(result["held_out"]["separation"]) == ["at least 9 tokens", "at least 36 tokens"]
    assert result["held_out"]["accuracy"] > 0.6
    confused = np.array(result["held_out"]["confusion"])
    assert confused.sum(1).tolist() == [12, 12, 12] and confused[2, 2] >= 10
    assert "wanted (rows) and chosen (columns)" in capsys.readouterr().out


def test_a_count_that_no_image_wants_is_said(models, data, tmp_path, capsys):
    train(tmp_path / "routed", models[3], tmp_path / "cache", *two_classes(data), "--limit", "20")
    assert "No image wanted 9 tokens" in capsys.readouterr().out


def test_a_second_run_reads_the_cache_and_gives_the_same_weights(binary, models, data, tmp_path, capsys):
    folder, cache = binary
    again = train(tmp_path / "again", models[2], cache, *two_classes(data))
    assert "of which 0 were read by the tower now" in capsys.readouterr().out
    first, second = (load_file(where / "model.safetensors") for where in (folder, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result_of(again) == result_of(folder)
    other = train(tmp_path / "other", models[2], cache, *two_classes(data), "--seed", "1")
    assert result_of(other)["held_out"]["choices"] != result_of(folder)["held_out"]["choices"]


def test_a_changed_image_model_or_input_is_not_taken_from_the_cache(models, data, tmp_path, capsys):
    own = shutil.copytree(data / "document", tmp_path / "document")
    cache, arguments = tmp_path / "cache", ("--positive", own, "--negative", data / "scene", "--limit", "20")

    def computed(model, *more):
        output = tmp_path / f"routed{len(list(tmp_path.iterdir()))}"
        train(output, model, cache, *arguments, *more)
        return int(capsys.readouterr().out.split("of which ")[1].split()[0])

    assert computed(models[2]) == 40
    Image.new("RGB", (64, 64), (1, 2, 3)).save(own / "07.png")
    assert computed(models[2]) == 1
    assert computed(models[2], "--features", "mean") == 40
    other = save_model(tmp_path / "model", seed=1)
    assert computed(other) == 40
    assert computed(save_model(tmp_path / "tiled", tiling={"type": "mosaic"})) == 40
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut short by a full disk
    assert computed(models[2]) == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_without_class_token_is_read_by_its_mean_in_any_precision(dtype, data, tmp_path):
    model = save_model(tmp_path / "model", vision="siglip", dtype=dtype)
    folder = train(tmp_path / "routed", model, tmp_path / "cache", *two_classes(data), "--blocks", "1,2")
    config = json.loads((folder / "config.json").read_text())
    assert (config["router"]["features"], config["router"]["blocks"]) == ("mean", [1, 2])
    assert config["router"]["hidden_dim"] == 96
    assert result_of(folder)["held_out"]["separation"]["at least 36 tokens"]["auc"] > 0.9
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if ".router." in name} == {dtype}


@pytest.mark.parametrize("layout", ["sequence", "spatial_unpad"])
def test_a_tiled_model_learns_from_whole_images_and_judges_every_tile(layout, data, tmp_path):
    model = save_model(tmp_path / "model", tiling={"type": "anyres", "view_layout": layout})
    folder = train(tmp_path / "routed", model, tmp_path / "cache", *two_classes(data))
    choices = result_of(folder)["held_out"]["choices"]
    routed, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
    for choice in choices[:4]:
        inputs = processor(images=data / choice["source"] / choice["image"], return_tensors="pt")
        features = routed.model.extract_features(inputs["pixel_values"], inputs["image_sizes"])
        scores = routed.model.router(features).scores
        assert len(scores) == features.views_per_image[0] > 1
        assert scores[0].item() == pytest.approx(choice["score"], abs=1e-4)


def test_a_classifier_keeps_its_options_until_told_otherwise():
    model = tiny_model(
        compressor={"type": "average_pool", "factors": [1, 2]},
        router={"type": "classifier", "features": "mean", "hidden_dim": 7},
        router_training={"method": "test"},
    )
    assert replace_router(model).hidden_dim == 7
    assert model.config.router_training is None and model.model.has_untrained_router
    wider = replace_router(model, blocks=[1])
    assert (wider.features, wider.input_dim, wider.hidden_dim) == ("mean", 64, 64)
    assert model.model.router is wider and model.config.router["blocks"] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--positive", "{data}/document"], "All sources want rung 1, so there is nothing to tell apart"),
        (["--source", "a={data}/scene"], "The source 'a' has no label. Say which rung it wants: `--rung a=top`"),
        (["--source", "a={data}/scene", "--rung", "b=0"], "`--rung b=...` names no source. Sources: a"),
        (["--source", "a={data}/scene", "--rung", "a=many"], r"`--rung a=many` is unknown. This model has 2 token"),
        (["--source", "a={data}/scene", "--rung", "a=2"], "use 0 .fewest. to 1, or 'top'"),
        (["--source", "a"], "`--source a` must have the form NAME=VALUE"),
        (["--positive", "{data}/scene", "--negative", "{data}/scene"], "Two sources are called 'scene'"),
        ([], "There are no images. Pass `--positive` and `--negative`, or `--source` and `--rung`"),
        (
            ["--source", "a={data}/scene", "--rung", "a=top", "--negative", "{data}/scene"],
            r"The sources 'a' \(rung 1\) and 'scene' \(rung 0\) overlap: 00.png and 00.png are the same image",
        ),
        (
            ["--positive", "{data}/document", "--negative", "{data}/scene", "--limit", "9"],
            "Rung 0 has 9 different images, too few",
        ),
        (["--positive", "x", "--holdout", "0"], "`--holdout 0.0` must be a share above 0, up to 0.4"),
        (["--positive", "x", "--batch-size", "0"], "`--batch-size 0` must be at least 1"),
        (["--positive", "{data}/document", "--threshold", "2"], "`router.threshold=2.0` must be a probability"),
    ],
)
def test_what_cannot_be_learned_is_refused_and_nothing_is_written(arguments, message, models, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "routed", models[2], tmp_path / "cache", *(text.format(data=data) for text in arguments))
    assert not (tmp_path / "routed").exists()


def test_a_model_with_one_count_and_a_folder_in_use_are_refused(models, data, tmp_path):
    single = save_model(tmp_path / "single", factors=(2,))
    with pytest.raises(ValueError, match="has one token count, so there is nothing to choose"):
        train(tmp_path / "routed", single, tmp_path / "cache", *two_classes(data))
    with pytest.raises(ValueError, match="is already there, and nothing is overwritten"):
        train(models[2], models[2], tmp_path / "cache", *two_classes(data))


def test_equal_images_of_one_class_are_used_once(models, data, tmp_path):
    own = shutil.copytree(data / "document", tmp_path / "document")
    for index in range(5):
        shutil.copy(own / f"0{index}.png", own / f"copy{index}.png")
    result = result_of(
        train(tmp_path / "routed", models[2], tmp_path / "cache", "--positive", own, "--negative", data / "scene")
    )
    assert (result["sources"][0]["images"], result["sources"][0]["used"]) == (65, 60)


def two_clouds(number=300, width=6, seed=0, counts=2):
    """Overlapping clouds of points along the first axis, one per rung."""
    rng = np.random.default_rng(seed)
    rungs = rng.integers(counts, size=number)
    values = rng.normal(size=(number, width))
    values[:, 0] += 1.5 * rungs
    return values.astype(np.float32), rungs


def new_router(counts=2, width=6):
    return ClassifierRouter(width, AveragePoolCompressor(width, 8, factors=list(range(1, counts + 1))))


@pytest.mark.parametrize("counts", [2, 3])
def test_units_and_offsets_of_the_features_do_not_matter(counts):
    values, rungs = two_clouds(counts=counts)
    unseen, unseen_rungs = two_clouds(seed=1, counts=counts)
    found = []
    for scale, offset in ((1.0, 0.0), (32.0, -512.0), (0.125, 0.0)):
        router = new_router(counts)
        fit_router(router, values * scale + offset, rungs, unseen * scale + offset, unseen_rungs)
        found.append(route(router, unseen * scale + offset)[2])
    np.testing.assert_allclose(found[1], found[0], atol=0.01)
    np.testing.assert_allclose(found[2], found[0], atol=0.01)


def test_the_temperature_is_the_best_for_the_validation_images_and_part_of_the_weights():
    values, rungs = two_clouds(60)
    unseen, unseen_rungs = two_clouds(200, seed=1)
    router = new_router()
    fit = fit_router(router, values, rungs, unseen, unseen_rungs, balanced=False)
    probabilities = route(router, unseen)[2].astype(np.float64)
    z = np.log(probabilities[:, 1] / probabilities[:, 0])
    sign = np.where(unseen_rungs == 1, 1, -1)
    losses = {t: np.log1p(np.exp(-sign * z / t)).mean() for t in (0.9, 0.97, 1.0, 1.03, 1.1)}
    assert min(losses, key=losses.get) == 1.0 and losses[1.0] == pytest.approx(fit.loss, abs=1e-5)
    assert TEMPERATURES[0] < fit.temperature < TEMPERATURES[-1]


def test_balance_gives_a_rare_class_its_say():
    def mostly_pictures(number, seed):
        values, rungs = two_clouds(number, seed=seed)
        keep = (rungs == 0) | (np.arange(number) % 12 == 0)
        return values[keep], rungs[keep]

    chosen = []
    for balanced in (False, True):
        router = new_router()
        fit_router(router, *mostly_pictures(2000, 0), *mostly_pictures(2000, 1), balanced=balanced)
        chosen.append(route(router, two_clouds(1000, seed=2)[0])[0].mean())
    assert chosen[0] < 0.3 < chosen[1] < 0.6


def test_the_fit_follows_its_seed_alone():
    weights = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(noise)
        router = new_router()
        fit_router(router, *two_clouds(), *two_clouds(seed=1), seed=seed)
        weights.append(router.linear_1.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_every_rung_has_its_share_in_every_part():
    rungs = np.array([0] * 40 + [2] * 20)
    parts = split_images(rungs, validation=0.15, holdout=0.2, seed=0)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))
    shares = {name: dict(Counter(rungs[indices].tolist())) for name, indices in parts.items()}
    assert shares == {"train": {0: 26, 2: 13}, "validation": {0: 6, 2: 3}, "held_out": {0: 8, 2: 4}}


def test_the_area_counts_won_pairs_and_its_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(6, size=40) + 1, rng.integers(6, size=70)
    found = area_under_curve(higher, lower)
    assert found["auc"] == pytest.approx(auc_by_pairs(higher, lower), abs=1e-4)
    many = area_under_curve(np.tile(higher, 9), np.tile(lower, 9))
    (low, high), (narrow_low, narrow_high) = found["interval"], many["interval"]
    assert low < found["auc"] < high and 2 < (high - low) / (narrow_high - narrow_low) < 4.5
    with pytest.raises(ValueError, match="needs values on both sides; got 3 and 0"):
        area_under_curve(np.ones(3), np.ones(0))


def test_reliability_by_hand():
    found = reliability(np.array([0.25, 0.25, 0.95, 1.0]), np.array([0, 1, 1, 1]))
    # bins: two forecasts of 0.25, one of two came true; 0.95 and 1.0, both did
    assert found["ece"] == pytest.approx((2 * 0.25 + 2 * 0.025) / 4, abs=1e-4)
    assert found["brier"] == pytest.approx((0.0625 + 0.5625 + 0.0025 + 0) / 4, abs=1e-4)
    assert [(row["number"], row["forecast"], row["share"]) for row in found["bins"]] == [(2, 0.25, 0.5), (2, 0.975, 1)]
    weighted = reliability(np.array([0.5, 0.5]), np.array([0, 1]), np.array([1.0, 3.0]))
    assert weighted["bins"][0]["share"] == 0.75 and weighted["ece"] == 0.25
    assert confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2) == [[1, 1], [0, 1]]
