"""What a config accepts, refuses and writes out."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, CLIPVisionConfig, MobileNetV2Config

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.preset_table import PRESET_ALIASES, PRESETS
from tests.conftest import IMAGE_TOKEN, PRESETS_HERE, tiny_model, tiny_text_config, tiny_vision_config


pytestmark = pytest.mark.compat


CLASSIFIER = {"type": "classifier", "features": "cls", "blocks": [], "hidden_dim": 1024, "threshold": 0.5}


def tiny_config(preset: str = "llava", **fields) -> AdaptiveLlavaConfig:
    backbones = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config()}
    return AdaptiveLlavaConfig.from_preset(preset, **({"image_token_id": IMAGE_TOKEN} | backbones | fields))


def saved(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_default_config_is_llava_with_576_tokens():
    config = AdaptiveLlavaConfig()
    assert config.compressor == {"type": "identity"}
    assert config.router == {"type": "fixed", "rung": -1}
    assert config.visual_token_counts == (576,)
    assert (config.vision_config.model_type, config.text_config.model_type) == ("clip_vision_model", "llama")
    assert (config.vision_feature_dim, config.vision_grid, config.adaptive_llava_format) == (1024, [24, 24], 1)


def test_every_preset_of_the_design_is_here_and_tested():
    assert sorted(PRESETS) == sorted(PRESETS_HERE)
    assert set(PRESET_ALIASES.values()) <= set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "counts", "router"),
    [
        ("llava", (576,), {"type": "fixed", "rung": -1}),
        ("avg-pool", (144,), {"type": "fixed", "rung": -1}),
        ("random-pool", (64, 144, 576), {"type": "random"}),
        ("dfmr", (64, 144, 576), {"type": "feature_std", "windows": [3, 2], "thresholds": [0.05, 0.05]}),
        ("llava-zip", (64, 144, 576), {"type": "feature_std", "windows": [3, 2], "thresholds": [0.05, 0.05]}),
        ("token-concat", (144,), {"type": "fixed", "rung": -1}),
        ("stf", (144,), {"type": "fixed", "rung": -1}),
        ("mbtf", (576,), {"type": "fixed", "rung": -1}),
        ("stf-mbtf", (144,), {"type": "fixed", "rung": -1}),
        ("llava-stf", (144,), {"type": "fixed", "rung": -1}),
        ("llava-mini", (1,), {"type": "fixed", "rung": -1}),
        ("dynamic-resampler", (1, 256), CLASSIFIER),
        ("dynamic-resampler-multi", (1, 4, 16, 64, 256), CLASSIFIER),
    ],
)
def test_a_preset_has_the_counts_and_options_of_its_paper(preset, counts, router):
    config = AdaptiveLlavaConfig.from_preset(preset)
    assert config.visual_token_counts == counts
    assert config.router == router


@pytest.mark.parametrize("preset", ["LLaVA", ""])
def test_a_preset_that_is_not_there_is_refused_with_the_known_ones(preset):
    with pytest.raises(ValueError, match=rf"`preset='{preset}'` is unknown. Known presets: llava, avg-pool, .*dfmr"):
        AdaptiveLlavaConfig.from_preset(preset)


def test_changing_one_config_leaves_the_preset_alone():
    AdaptiveLlavaConfig.from_preset("dfmr").compressor["factors"].append(4)
    assert AdaptiveLlavaConfig.from_preset("dfmr").compressor["factors"] == [1, 2, 3]


def test_fields_override_a_preset():
    config = tiny_config("dfmr", router={"type": "fixed", "rung": 0})
    assert config.router == {"type": "fixed", "rung": 0} and config.visual_token_counts == (4, 9, 36)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor": {"type": "pool"}}, r"`compressor.type='pool'` is unknown. Known types: average_pool"),
        ({"compressor": {"type": "average_pool", "factor": 2}}, r"no option 'factor'. Known options: factors"),
        ({"compressor": "average_pool"}, r"`compressor='average_pool'` must be a dict with a 'type'"),
        ({"compressor": {"factors": [2]}}, r"must be a dict with a 'type'"),
        (
            {"router": {"type": "entropy"}},
            r"`router.type='entropy'` is unknown. Known types: classifier, feature_std, fixed",
        ),
        ({"router": {"type": "fixed", "rank": 1}}, r"`router` of type 'fixed' has no option 'rank'"),
        ({"router": ["fixed"]}, r"`router=\['fixed'\]` must be a dict"),
        ({"router": {"type": "fixed", "rung": 1}}, r"`router.rung=1` is no rung of a compressor with 1"),
        (
            {"router": {"type": "feature_std", "thresholds": [0.1, 0.2]}},
            r"`router.thresholds=\[0.1, 0.2\]` must be a list of 0",
        ),
        ({"compressor": {"type": "average_pool", "factors": [1, 7]}}, r"`factors=7` leaves nothing of a 6x6"),
        ({"compressor": {"type": "token_concat", "window": 7}}, r"`window=7` leaves nothing of a 6x6 patch grid"),
        (
            {"compressor": {"type": "average_pool", "factors": [4], "strict_tiling": True}},
            r"`factors=4` does not tile a 6x6",
        ),
        (
            {"adaptive_llava_format": 2},
            r"`adaptive_llava_format=2` is newer than this code understands \(1\). Install",
        ),
        ({"adaptive_llava_format": "1"}, r"`adaptive_llava_format='1'` is newer"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("windows", [[9, 2], [3, 7]])
def test_a_routers_window_that_the_grid_cannot_hold_is_refused_by_the_config(windows):
    with pytest.raises(ValueError, match=r"`router.windows=\d` leaves nothing of a 6x6 patch grid"):
        tiny_config("dfmr", router={"type": "feature_std", "windows": windows, "thresholds": [0.1, 0.1]})


def test_a_convolutional_tower_needs_its_width_and_grid():
    with pytest.raises(ValueError, match=r"'mobilenet_v2' does not tell.*`vision_feature_dim` and `vision_grid="):
        tiny_config(vision_config=MobileNetV2Config())
    config = tiny_config("avg-pool", vision_config=MobileNetV2Config(), vision_feature_dim=16, vision_grid=[5, 7])
    assert config.visual_token_counts == (6,) and config.feature_dim == 16


def test_several_feature_layers_are_joined_on_the_channels():
    assert tiny_config(vision_feature_layer=[-2, -1]).feature_dim == 64


@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_every_option_is_written_out_and_read_back(preset, tmp_path):
    config = tiny_config(preset)
    config.save_pretrained(tmp_path)
    written = saved(tmp_path)
    assert written["compressor"] == config.build_compressor().options
    assert written["router"] == config.build_router(config.build_compressor()).options
    assert written["adaptive_llava_format"] == 1
    assert written["model_type"] == "adaptive_llava"
    for reader in (AdaptiveLlavaConfig, AutoConfig):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is AdaptiveLlavaConfig
        assert again.compressor == config.compressor and again.router == config.router
        assert again.visual_token_counts == config.visual_token_counts
        assert again.vision_config.hidden_size == 32 and again.text_config.vocab_size == 100
        assert again.image_token_id == IMAGE_TOKEN
    again.save_pretrained(tmp_path / "again")
    differing = {key for key, value in saved(tmp_path / "again").items() if written.get(key) != value}
    assert differing <= {"_name_or_path", "transformers_version"}


def test_defaults_of_the_backbones_are_written_in_full(tmp_path):
    # a default may differ between transformers releases
    tiny_config().save_pretrained(tmp_path)
    written = saved(tmp_path)
    assert written["vision_config"]["num_channels"] == 3
    assert {"rms_norm_eps", "hidden_act", "initializer_range"} <= set(written["text_config"])


def test_rope_settings_are_written_for_both_transformers_releases(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    options = {"rope_theta": 5000.0, "rope_scaling": scaling}
    text = tiny_text_config("llama", **options)
    if hasattr(text, "rope_parameters"):  # transformers 5
        text = tiny_text_config("llama", rope_parameters={"rope_theta": 5000.0, **scaling})
    tiny_config(text_config=text).save_pretrained(tmp_path)
    written = saved(tmp_path)["text_config"]
    assert written["rope_theta"] == 5000.0
    assert {"rope_type": "linear", "factor": 2.0}.items() <= written["rope_scaling"].items()


def test_a_newer_checkpoint_is_refused_by_name_of_the_package(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(saved(tmp_path) | {"adaptive_llava_format": 7}))
    with pytest.raises(ValueError, match=r"Install a release of adaptive-llava that reads format 7"):
        AutoConfig.from_pretrained(tmp_path)


def test_an_override_at_loading_is_validated_by_the_model(tmp_path):
    tiny_config("dfmr").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, compressor={"type": "average_pool", "factors": [1, 2]})
    with pytest.raises(ValueError, match=r"must be a list of 1"):  # two thresholds are left from three counts
        AdaptiveLlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"must be a list of 1"):
        config.save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path, compressor={"type": "average_pool"}, router={"type": "fixed"})
    model = AdaptiveLlavaForConditionalGeneration(config)
    assert model.config.compressor == {"type": "average_pool", "factors": [1, 2, 3], "strict_tiling": False}
    assert model.config.router == {"type": "fixed", "rung": -1}


def test_an_attribute_set_later_is_validated_before_saving(tmp_path):
    config = tiny_config()
    config.compressor = {"type": "pool"}
    with pytest.raises(ValueError, match=r"`compressor.type='pool'` is unknown"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stand_at_both_levels(tied, tmp_path):
    for config in (
        tiny_config(text_config=tiny_text_config(tie_word_embeddings=tied)),
        tiny_config(tie_word_embeddings=tied),
    ):
        config.save_pretrained(tmp_path)
        written = saved(tmp_path)
        assert written["tie_word_embeddings"] is tied
        assert written["text_config"]["tie_word_embeddings"] is tied
        again = AdaptiveLlavaConfig.from_pretrained(tmp_path)
        assert again.tie_word_embeddings is tied and again.text_config.tie_word_embeddings is tied


def test_a_config_names_the_class_of_every_auto_class(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    auto_map = saved(tmp_path)["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForVision2Seq",
        "AutoProcessor",
    }
    for reference in auto_map.values():
        module, class_name = reference.split(".")
        assert f"class {class_name}" in (tmp_path / f"{module}.py").read_text()


def test_a_code_repository_is_named_in_place_of_copied_code(tmp_path):
    config = tiny_config(code_repository="someone/code")
    config.save_pretrained(tmp_path)
    written = saved(tmp_path)
    assert written["code_repository"] == "someone/code"
    assert all(reference.startswith("someone/code--") for reference in written["auto_map"].values())
    assert not list(tmp_path.glob("*.py"))


def test_the_config_survives_a_trip_through_a_dict_and_a_deep_copy():
    config = tiny_config("dfmr")
    again = AdaptiveLlavaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


def test_the_model_does_not_change_the_sub_configs_it_was_given():
    vision, text = CLIPVisionConfig(**tiny_vision_config().to_dict()), tiny_text_config()
    before = (vision.to_dict(), text.to_dict())
    config = AdaptiveLlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    assert (config.vision_config.to_dict(), config.text_config.to_dict()) == before


def test_calibrated_thresholds_travel_with_the_checkpoint(tmp_path):
    model = tiny_model("dfmr", calibration={"mean": 12.5})
    model.config.router["thresholds"] = [0.25, 0.75]
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.router.thresholds == (0.25, 0.75)
    assert again.config.calibration == {"mean": 12.5}


# ---- tiling


def test_tiling_is_written_out_with_every_option(tmp_path):
    config = tiny_config(compressor={"type": "average_pool"}, tiling={"type": "anyres"})
    assert config.tiling["view_layout"] == "sequence" and config.tiling["tile_size"] == 24
    config.save_pretrained(tmp_path)
    assert AdaptiveLlavaConfig.from_pretrained(tmp_path).tiling == config.tiling
    assert json.loads((tmp_path / "config.json").read_text())["tiling"] == config.tiling
    assert tiny_config().tiling == {"type": "none"}


def test_a_mosaic_multiplies_the_grid_that_is_compressed():
    config = tiny_config(compressor={"type": "average_pool"}, tiling={"type": "mosaic", "n": 3})
    assert config.view_grid == (18, 18) and config.visual_token_counts == (36, 81, 324)
    assert config.build_arrangement() is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiling": {"type": "anyres", "pinpoints": [[24, 30]]}}, r"`tiling.pinpoints=\[\[24, 30\]\]`"),
        ({"tiling": {"type": "squares"}}, "must be a dict with a 'type': one of none, anyres, mosaic"),
        (
            {"compressor": {"type": "average_pool", "factors": [1, 5], "strict_tiling": True},
             "tiling": {"type": "mosaic"}},
            "does not tile a 12x12 patch grid",
        ),
    ],
)  # fmt: skip
def test_tiling_that_cannot_work_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_a_tiling_set_after_construction_is_checked_when_saved(tmp_path):
    config = tiny_config()
    config.tiling = {"type": "mosaic", "n": 0}
    with pytest.raises(ValueError, match="`tiling.n=0` must be a whole number >= 2"):
        config.save_pretrained(tmp_path)
