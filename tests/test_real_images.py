"""A pretrained tower on real images: DFMR's statistic, its calibration, and the study that reports both."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_llava.training.calibrate import calibrate_thresholds
from adaptive_llava.training.classifier_study import compare_scores, pooled_states, rendered_inputs
from adaptive_llava.training.image_source import open_images
from adaptive_llava.training.mobilenet_tower import load_mobilenet_tower, mobilenet_pixels
from adaptive_llava.training.routing_study import KINDS, conclusion, main, mobilenet_dfmr
from adaptive_llava.training.train_router import replace_router


@pytest.fixture(scope="module")
def weights(shared):
    return shared / "weights" / "mobilenet_v2_1.0_224_float.npz"


@pytest.fixture(scope="module")
def photos(shared):
    return [image for _, image in open_images(shared / "data" / "photos", limit=2)]


def reference_tower(weights):
    """The same network in plain PyTorch, as it lies beside the weights."""
    spec = importlib.util.spec_from_file_location("mobilenet_v2", weights.with_name("mobilenet_v2.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(weights)


@pytest.mark.compat
def test_the_mapped_tower_equals_the_reference_network(weights, photos):
    pixels = mobilenet_pixels(photos)
    tower, reference = load_mobilenet_tower(weights), reference_tower(weights)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        _, taps = reference.features(pixels, taps=True)
        for layer, tap in zip((4, 11, 15), taps, strict=True):
            torch.testing.assert_close(states[layer], tap, rtol=0, atol=1e-4)
        # what is left is rounding: in float64 both agree to what the batch norm's eps of 1e-12 adds
        final = tower.double()(pixels.double()).last_hidden_state
        torch.testing.assert_close(final, reference.double().features(pixels.double()), rtol=0, atol=1e-8)


def test_weights_of_another_network_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", **{"00.w": np.zeros((16, 3, 3, 3)), "00.b": np.zeros(16)})
    with pytest.raises(ValueError, match=r"other.npz has \(16, 3, 3, 3\) as '00.w', MobileNetV2 1.0 needs \(32, 3"):
        load_mobilenet_tower(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        load_mobilenet_tower(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match="`image_size=100` must be a multiple of 32"):
        load_mobilenet_tower(tmp_path / "other.npz", image_size=100)


def test_images_are_padded_in_the_middle_or_stretched():
    wide = Image.new("RGB", (400, 100), (255, 255, 255))
    padded, stretched = (mobilenet_pixels([wide], image_size=64, fit=fit)[0] for fit in ("pad", "stretch"))
    assert (padded[:, 24:40] == 1).all() and padded[:, :24].abs().max() < 0.01 and padded[:, 40:].abs().max() < 0.01
    assert (stretched == 1).all()
    with pytest.raises(ValueError, match="`fit='crop'` is unknown"):
        mobilenet_pixels([wide], fit="crop")


def dfmr_counts_by_loops(feature_map: np.ndarray, thresholds: dict[int, float]) -> int:
    """DFMR's rule for one `(dim, height, width)` map, window by window in float64: pool as much as is even enough."""
    height, width = feature_map.shape[1:]
    for window in sorted(thresholds, reverse=True):
        stds = [
            feature_map[:, top : top + window, left : left + window].astype(np.float64).std(axis=(1, 2)).mean()
            for top in range(0, height - window + 1, window)
            for left in range(0, width - window + 1, window)
        ]
        if np.mean(stds) <= thresholds[window]:
            return (height // window) * (width // window)
    return height * width


@pytest.fixture(scope="module")
def real(shared, weights):
    """A `dfmr` model at 384 pixels and 16 real images of each kind, as pixels."""
    images = {kind: [image for _, image in open_images(shared / "data" / kind, limit=16)] for kind in KINDS}
    return mobilenet_dfmr(weights), {kind: mobilenet_pixels(batch) for kind, batch in images.items()}


def test_calibrated_counts_of_real_images_equal_the_rule_written_in_numpy(real):
    model, pixels = real
    assert model.config.visual_token_counts == (64, 144, 576) and model.config.vision_grid == [24, 24]
    calibration = calibrate_thresholds(model, pixels.values(), shares=[0.4, 0.3, 0.3])
    calibration.apply(model)
    some = torch.cat([batch[:3] for batch in pixels.values()])
    with torch.no_grad():
        encoded = model.encode_images(some)
        maps = model.model.vision_tower(some, output_hidden_states=True).hidden_states[11].numpy()
    limits = dict(zip((3, 2), calibration.thresholds, strict=True))
    assert list(encoded.lengths) == [dfmr_counts_by_loops(feature_map, limits) for feature_map in maps]
    assert len(set(encoded.lengths)) > 1


def test_real_images_are_calibrated_to_200_of_576_tokens(real):
    model, pixels = real
    calibration = calibrate_thresholds(model, pixels.values(), target_mean=200, holdout=0.5)
    assert calibration.num_images == 64 and calibration.within_target, calibration.summary()


def test_the_study_reports_every_kind_and_copies_no_image(shared, weights, tmp_path, capsys):
    arguments = ["--data-root", str(shared / "data"), "--weights", str(weights), "--output", str(tmp_path)]
    assert main([*arguments, "--limit", "8", "--image-size", "192", "--target-mean", "60", "--rendered", "48"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routing_real_images.json", "routing_real_images.png"]
    result = json.loads((tmp_path / "routing_real_images.json").read_text())
    assert str(shared) not in json.dumps(result)
    printed = capsys.readouterr().out
    for found in result["fits"].values():
        assert list(found["kinds"]) == list(KINDS)
        assert all(row["num_images"] == 8 for row in found["kinds"].values())
        assert all(sum(row["shares"].values()) == pytest.approx(1, abs=1e-3) for row in found["kinds"].values())
        assert found["model_routes_as_calibrated"]
        assert found["conclusion"] in printed


def test_the_conclusion_follows_the_numbers():
    few, many = np.array([64, 64, 144, 64] * 10), np.array([576, 576, 144, 576] * 10)
    assert "documents get MORE tokens than photos (468 against 84" in conclusion(
        {"documents": many, "charts": few, "photos": few}
    )
    sentence = conclusion({"documents": few, "charts": many, "photos": many})
    assert "documents get FEWER tokens than photos" in sentence and "charts get about as many tokens as" in sentence


def test_the_study_reads_what_a_classifier_router_reads(real):
    model, pixels = real
    with torch.no_grad(), pooled_states(model.model.vision_tower) as seen:
        model.model.extract_features(pixels["charts"][:2])
    config = model.config
    before = (dict(config.router), config.calibration, model.model.router)
    try:
        router = replace_router(model, blocks=[9, 10])
        assert router.features == "mean"  # the tower has no [CLS]
        with torch.no_grad():
            read = router.inputs(model.model.extract_features(pixels["charts"][:2])).numpy()
    finally:
        config.router, config.calibration, model.model.router = before
    np.testing.assert_allclose(seen[0], read, rtol=0, atol=1e-5)


def test_rendered_pictures_teach_a_classifier_to_find_real_pages(real):
    model, pixels = real
    with torch.no_grad(), pooled_states(model.model.vision_tower) as seen:
        for batch in pixels.values():
            model.model.extract_features(batch[:8])
    values, kinds = np.concatenate(seen), np.repeat(list(pixels), 8)
    rendered = rendered_inputs(model, 36, image_size=384, fit="pad")
    assert rendered[0].shape == (36, 288) and rendered[1].tolist() == [1, 0] * 18
    compared = compare_scores(
        kinds,
        {"no idea": np.zeros(32)},
        values,
        rendered,
        pages=("documents", "charts"),
        counts=(64, 576),
        target_mean=192,
    )
    rows = compared["scores"]
    assert rows["no idea"]["auc"]["pages > others"]["auc"] == 0.5
    row = rows["classifier, mean, trained on rendered"]
    assert row["images"] == 32 and row["auc"]["pages > others"]["auc"] > 0.9
    assert rows["classifier, mean, trained on half of the real images"]["images"] == 16
    assert row["mean_tokens"]["all"] == 192  # a quarter of the images at 576
    assert row["mean_tokens"]["all"] == pytest.approx(np.mean([row["mean_tokens"][kind] for kind in pixels]))
