"""Any value of any field of a config, a processor or a request is taken, or refused with its name and the rule."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import strategies as st

from adaptive_llava import PRESETS, AdaptiveLlavaConfig, AdaptiveLlavaProcessor
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import option_names
from adaptive_llava.modeling.router_registry import ROUTERS
from tests.conftest import (
    IMAGE_TOKEN,
    TINY_COMPRESSORS,
    TINY_ROUTERS,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.hostile_cases import cases, junk, refused_well
from tests.test_processing_adaptive_llava import build


pytestmark = pytest.mark.compat

SMALL = {"vision_config": tiny_vision_config().to_dict(), "text_config": tiny_text_config().to_dict()}
FIELDS = (
    "compressor", "router", "image_token_id", "vision_feature_layer", "fusion_blocks", "fusion_variant",
    "prefusion_layers", "prefusion_variant", "prefusion_padding", "tiling", "projector_hidden_act",
    "multimodal_projector_bias", "vision_feature_dim", "vision_grid", "compressor_trained", "calibration",
    "router_training", "code_repository", "adaptive_llava_format",
)  # fmt: skip
whole = st.one_of(st.integers(-2, 8), st.integers(0, 40), st.sampled_from([2**31, 2**63, 10**30]))
values = st.one_of(whole, st.lists(whole, max_size=4), st.floats(), st.lists(st.floats(), max_size=3), st.booleans())
likely = st.sampled_from(
    "released paper linear own nested grid enlarged normal cls mean sequence whole spatial_unpad tile default gelu "
    "relu attention_mask user/name".split()
)
anything = st.one_of(values, likely, junk)


def parts(table):
    """Options of a real type, each with a value that may or may not be one of its own."""
    return st.sampled_from(sorted(table)).flatmap(
        lambda name: st.dictionaries(st.sampled_from([*option_names(table[name]), "typo"]), anything, max_size=3).map(
            lambda options: {"type": name} | options
        )
    )


tilings = st.fixed_dictionaries(
    {"type": st.sampled_from(["none", "anyres", "mosaic"])},
    optional={
        "n": anything,
        "pinpoints": st.one_of(
            st.lists(st.lists(st.sampled_from([24, 48, 30, 0, -24]), max_size=3), max_size=3), junk
        ),
        "view_layout": anything,
        "max_tiles": anything,
        "several_images": anything,
        "tile_size": anything,
    },
)
fields = st.fixed_dictionaries(
    {},
    optional={name: anything for name in FIELDS}
    | {"compressor": st.one_of(parts(COMPRESSORS), parts(COMPRESSORS), junk)}
    | {"router": st.one_of(parts(ROUTERS), parts(ROUTERS), junk)}
    | {"tiling": st.one_of(tilings, tilings, junk)},
)


# Fields as people write them: alone they are taken, together they may not fit each other.
usual = st.fixed_dictionaries(
    {},
    optional={
        "compressor": st.sampled_from(list(TINY_COMPRESSORS.values())),
        "router": st.sampled_from(list(TINY_ROUTERS.values())),
        "image_token_id": st.integers(0, 98),
        "vision_feature_layer": st.integers(-4, 3) | st.lists(st.integers(-4, 3), min_size=1, max_size=2),
        "fusion_blocks": st.sampled_from([None, "default", [2], [3, 1]]),
        "fusion_variant": st.sampled_from(["released", "paper"]),
        "prefusion_layers": st.integers(0, 2),
        "tiling": st.sampled_from([{"type": "anyres"}, {"type": "mosaic"}, {"type": "none"}, None]),
        "projector_hidden_act": st.sampled_from(["gelu", "relu", "silu"]),
        "multimodal_projector_bias": st.booleans(),
        "code_repository": st.sampled_from([None, "user/code"]),
    },
)


@st.composite
def some_fields(draw):
    """Usual fields, and in half of the cases one or two of any value."""
    found, spoilt = draw(usual), draw(fields) if draw(st.booleans()) else {}
    return found | {name: spoilt[name] for name in sorted(spoilt)[:2]}


def check(config: AdaptiveLlavaConfig) -> None:
    counts = config.visual_token_counts
    assert list(counts) == sorted(counts) and all(type(count) is int and count > 0 for count in counts)
    written = json.loads(json.dumps(config.to_dict()))
    again = AdaptiveLlavaConfig.from_dict(written)
    again.check_options()
    for name in ("compressor", "router", "tiling", "fusion_blocks", "vision_feature_layer"):
        assert getattr(again, name) == getattr(config, name), name
    assert again.visual_token_counts == counts


@cases(450, st.sampled_from(sorted(PRESETS)), some_fields())
def test_a_field_of_any_value_gives_a_config_that_survives_json_or_is_refused(preset, options):
    with refused_well():
        config = AdaptiveLlavaConfig.from_preset(preset, **({"image_token_id": IMAGE_TOKEN} | SMALL | options))
        check(config)


BACKBONE_FIELDS = {
    "vision_config": ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size"),
    "text_config": ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
}
places = st.sampled_from([(part, name) for part, names in BACKBONE_FIELDS.items() for name in names])


@cases(200, st.sampled_from(sorted(PRESETS)), places, anything)
def test_a_backbone_field_of_any_value_gives_a_config_or_is_refused(preset, place, value):
    part, name = place
    backbones = copy.deepcopy(SMALL)
    backbones[part][name] = value
    with refused_well():
        check(AdaptiveLlavaConfig.from_preset(preset, **backbones, image_token_id=IMAGE_TOKEN))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with the config.json of a small model with every optional part, and its text."""
    folder = tmp_path_factory.mktemp("config")
    model = tiny_model("dfmr", fusion_blocks="default", prefusion_layers=1, tiling={"type": "anyres"})
    model.config.save_pretrained(folder)
    return folder, (folder / "config.json").read_text()


@cases(200, st.data())
def test_a_config_file_with_any_change_loads_or_is_refused(saved, data):
    folder, text = saved
    stored = json.loads(text)
    node, keys = stored, sorted(stored)
    while True:
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
        keys = sorted(node)
    if data.draw(st.integers(0, 4)) == 0:
        del node[key]
    else:
        node[key] = data.draw(anything)
    (folder / "config.json").write_text(json.dumps(stored))
    with refused_well():
        config = AdaptiveLlavaConfig.from_pretrained(folder)
        config.check_options()


own_options = st.fixed_dictionaries(
    {},
    optional={
        "compressor": st.sampled_from(
            [tiny_model(compressor=value).config.compressor for value in TINY_COMPRESSORS.values()]
        ),
        "router": st.sampled_from(
            [{"type": "fixed", "rung": -1}, {"type": "fixed", "rung": 0}, {"type": "random"}, None]
        ),
        "grid": st.lists(st.integers(1, 12), min_size=2, max_size=2),
        "tiling": st.sampled_from([None, {"type": "none"}, {"type": "mosaic", "n": 2}]),
        "layout": st.sampled_from(["compact", "expanded"]),
    },
)
one_spoilt = st.sampled_from(["compressor", "router", "grid", "tiling", "layout", "image_token"]).flatmap(
    lambda name: st.fixed_dictionaries({name: anything})
)


@cases(150, own_options, st.just({}) | one_spoilt)
def test_processor_options_of_any_value_count_or_are_refused(options, spoilt):
    known = build()
    given = {name: getattr(known, name) for name in ("compressor", "router", "grid", "tiling")} | options | spoilt
    with refused_well():
        processor = AdaptiveLlavaProcessor(known.image_processor, known.tokenizer, **given)
        counts = processor.count_tokens(image_sizes=[(20, 30)])
        assert all(type(count) is int and count > 0 for count in counts)
