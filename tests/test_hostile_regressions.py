"""Every defect that the hostile cases have found, by its name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaProcessor
from adaptive_llava.chat_requests import read_messages
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.pixel_statistics import pixel_routing
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.modeling.visual_token_geometry import ImageCost
from adaptive_llava.modeling.visual_tokens import Routing, VisionFeatures, resolve_rungs
from adaptive_llava.processing.count_prediction import rungs_known_beforehand
from tests.conftest import IMAGE_TOKEN, TINY_COMPRESSORS, tiny_images, tiny_model, tiny_text_config, tiny_vision_config
from tests.hostile_cases import check_refusal
from tests.test_processing_adaptive_llava import build, sentence_piece_tokenizer


pytestmark = pytest.mark.compat

IMAGES = [ImageCost((4, 9, 36))] * 2
HUGE = 10**30


def decide(**decision) -> list[list[int] | None]:
    """The same decision by the model and by the processor."""
    routing = Routing(torch.tensor([0, 2]), torch.tensor([0.1, 0.9]))
    names = {"budget": None, "rungs": None, "images_per_prompt": None} | decision
    return [
        resolve_rungs(routing, IMAGES, **names),
        rungs_known_beforehand(([0, 2], [0.1, 0.9]), IMAGES, *names.values()),
    ]


@pytest.mark.parametrize("rungs", [1, [1, 1], (1, 1), torch.tensor([1, 1]), np.array([1, 1]), torch.tensor(1)])
def test_rungs_in_any_form_mean_the_same_to_processor_and_model(rungs):
    assert decide(rungs=rungs) == [[1, 1], [1, 1]]


@pytest.mark.parametrize("budget", [9, [9, 9], torch.tensor(9), torch.tensor([9, 9]), np.array([9, 9])])
def test_budgets_in_any_form_mean_the_same_to_processor_and_model(budget):
    assert decide(budget=budget) == [[1, 1], [1, 1]]


REFUSED_DECISIONS = {
    "rungs that are a number with a fraction": ({"rungs": 1.5}, "`visual_rungs=1.5` must be a list"),
    "rungs that are a word": ({"rungs": "auto"}, "`visual_rungs='auto'` must be a list"),
    "rungs that are a dict": ({"rungs": {}}, "`visual_rungs={}` must be a list"),
    "a rung that is a list": ({"rungs": [[0], 1]}, r"`visual_rungs` contains \[0\]"),
    "a budget with a fraction": ({"budget": 9.5}, "`visual_token_budget=9.5` is not known"),
    "a budget that is not a number": ({"budget": math.nan}, "`visual_token_budget=nan` is not known"),
    "fewer than no images in a prompt": (
        {"budget": {"total": 99}, "images_per_prompt": [-1, 3]},
        r"`images_per_prompt=\[-1, 3\]` must be whole numbers",
    ),
}


@pytest.mark.parametrize("what", REFUSED_DECISIONS)
def test_a_decision_that_is_none_is_refused_by_processor_and_model(what):
    decision, said = REFUSED_DECISIONS[what]
    names = {"budget": None, "rungs": None, "images_per_prompt": None} | decision
    with pytest.raises(ValueError) as refusal:
        resolve_rungs(Routing(torch.tensor([0, 2]), torch.tensor([0.1, 0.9])), IMAGES, **names)
    check_refusal(refusal.value, said=said)
    with pytest.raises(ValueError) as refusal:
        rungs_known_beforehand(([0, 2], [0.1, 0.9]), IMAGES, *names.values())
    check_refusal(refusal.value, said=said)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("kind", ["feature_std", "pixel_std"])
def test_features_that_are_no_numbers_get_the_most_tokens_and_a_score_that_sorts(kind, spoilt):
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS["average_pool"], 32, 32)
    router = build_part("router", ROUTERS, {"type": kind}, 32, compressor)
    patches, pixels = torch.zeros(2, 36, 32), torch.zeros(2, 3, 24, 24)
    patches[0, ::2], pixels[0, :, ::2] = spoilt, spoilt
    routing = router(VisionFeatures(patches, (6, 6), cls=None, pixels=pixels, views_per_image=(1, 1)))
    assert routing.rungs.tolist() == [2, 0]
    assert routing.scores.isfinite().all() and routing.scores[0] > 1e30 and routing.scores[1] == 0


def test_pixels_of_any_size_get_the_same_score_in_the_processor_as_in_the_model():
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS["average_pool"], 32, 32)
    router = build_part("router", ROUTERS, {"type": "pixel_std"}, 32, compressor)
    pixels = torch.zeros(1, 3, 24, 24)
    pixels[:, :, ::2], pixels[:, :, 1::2] = 3e38, -3e38
    routing = router(VisionFeatures(torch.zeros(1, 36, 32), (6, 6), None, pixels, (1,)))
    rungs, scores = pixel_routing(pixels, (6, 6), router.windows, router.thresholds)
    assert rungs == routing.rungs.tolist() and scores == routing.scores.tolist()


def anyres(**options) -> dict:
    return {"tiling": {"type": "anyres", **options}}


REFUSED_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a compressor of no type": ({"compressor": 0}, "`compressor=0` must be a dict"),
    "a router of no type": ({"router": ""}, "`router=''` must be a dict"),
    "a tiling of no type": ({"tiling": []}, r"`tiling=\[\]` must be a dict"),
    "a type that is a list": ({"compressor": {"type": ["identity"]}}, r"`compressor.type=\['identity'\]` is unknown"),
    "a tiling whose type is a dict": ({"tiling": {"type": {}}}, "`tiling={'type': {}}` must be a dict with a 'type'"),
    "an activation that is a list": ({"projector_hidden_act": ["gelu"]}, "`projector_hidden_act=.*is unknown"),
    "factors that are a number": ({"compressor": {"type": "average_pool", "factors": 2}}, "`compressor.factors=2`"),
    "a window beyond any tensor": (
        {"compressor": {"type": "spatial_fusion", "window": HUGE}},
        r"`compressor=.*cannot be built: .*Check the types and sizes",
    ),
    "queries beyond any tensor": (
        {"compressor": {"type": "query_resampler", "counts": [HUGE], "num_heads": 2}},
        "`compressor=.*cannot be built",
    ),
    "a hidden layer beyond any tensor": (
        {"compressor": {"type": "average_pool"}, "router": {"type": "classifier", "hidden_dim": HUGE}},
        "`router=.*cannot be built",
    ),
    "layers of pre-fusion without end": ({"prefusion_layers": 2**31}, "`prefusion_layers=2147483648` must be"),
    "a mosaic without end": (
        {"tiling": {"type": "mosaic", "n": 2**31}},
        "`tiling.n=2147483648` must be .* at most 64",
    ),
    "a resolution without end": (anyres(pinpoints=[[24, 24 * 10**9]]), "`tiling.pinpoints=.*up to 1536"),
    "a tower of no pixels": ({"vision_config": {"patch_size": 0}}, "`vision_config.patch_size=0` must be"),
    "a tower of three sides": ({"vision_config": {"image_size": [24, 24, 24]}}, "`vision_config"),
    "a tower that is a number": ({"vision_config": 7}, "`vision_config=7` must be a config of transformers"),
    "a tower of an unknown type": ({"vision_config": {"model_type": 0}}, "`vision_config` of type 0 cannot be read"),
    "a tower whose depth is a word": (
        {"vision_config": {"num_hidden_layers": {}}},
        "(`vision_config` of type 'clip_vision_model' cannot be read|`vision_config.num_hidden_layers={}` must be)",
    ),
    "a tower wider than any": ({"vision_config": {"hidden_size": 2**31}}, "`vision_feature_dim=2147483648` must be"),
    "a language model of no width": ({"text_config": {"hidden_size": -1}}, "`text_config`"),
    "a bias that is a word": ({"multimodal_projector_bias": "no"}, "`multimodal_projector_bias='no'` must be true"),
    "a calibration that is a number": ({"calibration": 3}, "`calibration=3` must be a dict"),
    "code that is a list": ({"code_repository": ["a"]}, "`code_repository=.* must be the Hub id"),
    "a format before the first": ({"adaptive_llava_format": 0}, "`adaptive_llava_format=0` must be"),
}


@pytest.mark.parametrize("what", REFUSED_FIELDS)
def test_a_config_that_describes_no_model_is_refused(what):
    fields, said = REFUSED_FIELDS[what]
    backbones = {"vision_config": tiny_vision_config().to_dict(), "text_config": tiny_text_config().to_dict()}
    for part, whole in backbones.items():
        given = fields.get(part, {})
        backbones[part] = {**whole, **given} if isinstance(given, dict) else given
    with pytest.raises(ValueError) as refusal:
        AdaptiveLlavaConfig(**({"image_token_id": IMAGE_TOKEN} | fields | backbones))
    check_refusal(refusal.value, said=said)


POOL = {"type": "average_pool", "factors": [1, 2], "strict_tiling": False}
REFUSED_OPTIONS = {
    "a compressor that is a word": (
        {"compressor": "average_pool"},
        "`compressor='average_pool'` must be the complete",
    ),
    "a compressor without its options": ({"compressor": {"type": "average_pool"}}, "gives no token counts.*'factors'"),
    "a router that is a number": ({"router": 4}, "`router=4` must be the complete options"),
    "a rung that is not there": ({"router": {"type": "fixed", "rung": 9}}, "`router=.*names no rung"),
    "a rung that is a word": ({"router": {"type": "fixed", "rung": "top"}}, "`router=.*names no rung"),
    "a grid that is a number": ({"grid": 6}, "`grid=6` must be patches per side"),
    "a tiling that is a list": ({"tiling": ["none"]}, r"`tiling=\['none'\]` must be the complete"),
    "a tiling of another type": ({"tiling": {"type": "squares"}}, "`tiling=.*must be a dict with a 'type'"),
    "a placeholder that is a number": ({"image_token": 5}, "`image_token=5` must be a token"),
    "no placeholder": ({"image_token": ""}, "`image_token=''` must be a token"),
}


@pytest.mark.parametrize("what", REFUSED_OPTIONS)
def test_processor_options_that_are_no_models_are_refused(what):
    options, said = REFUSED_OPTIONS[what]
    known = build()
    given = {"compressor": POOL, "router": {"type": "fixed", "rung": -1}, "grid": [6, 6]} | options
    with pytest.raises(ValueError) as refusal:
        AdaptiveLlavaProcessor(known.image_processor, known.tokenizer, **given).count_tokens(1)
    check_refusal(refusal.value, said=said)


@pytest.mark.parametrize("make", [None, sentence_piece_tokenizer])
def test_half_a_character_is_refused_before_the_tokenizer(make):
    processor = build(make() if make else None)
    with pytest.raises(ValueError) as refusal:
        processor(text=["fine", "half \ud83d"])
    check_refusal(refusal.value, said=r"Row 1 of `text` has half a character at position 5")
    for chat in (
        [{"role": "user", "content": "\ud83d"}],
        [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
    ):
        with pytest.raises(ValueError, match="Row 0 of `text` has half a character"):
            processor.apply_chat_template(chat, tokenize=True)
        with pytest.raises(ValueError, match="A message's text has half a character"):
            read_messages(chat)


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
@pytest.mark.parametrize(
    "pieces", [["<s", ">"], ["<", "s", ">"], ["<ima", "ge>"], ["<|im_", "end", "|>"], ["<<s", ">"]]
)
def test_a_control_token_written_in_pieces_stays_text(pieces, template):
    processor = build(chat_template=template)

    def ids(parts):
        chat = [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]
        return processor.apply_chat_template(chat, tokenize=True)[0]

    special = {*processor.tokenizer.all_special_ids, processor.image_token_id}
    special |= {processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert [token for token in ids(pieces) if token in special] == [token for token in ids(["a"]) if token in special]
    assert "".join(pieces) in processor.tokenizer.decode(ids(pieces))


REFUSED_CHATS = {
    "a number": (7, "`conversation=7` must be a non-empty list"),
    "nothing": (None, "`conversation=None` must be"),
    "a word": ("hello", "`conversation='hello'` must be"),
    "words": (["hello"], "A message is 'hello'. Write"),
    "a message without a role": ([{"content": "x"}], "A message is .*the role a string"),
    "a role that is a number": ([{"role": 3, "content": "x"}], "A message is .*the role a string"),
    "content that is a number": ([{"role": "user", "content": 3}], "A message has the content 3"),
    "a part that is a word": ([{"role": "user", "content": ["x"]}], r"A message has the content \['x'\]"),
    "a part with keys of two types": (
        [{"role": "user", "content": [{"type": "x", 3: 4}]}],
        r"A message has a part of type 'x' with keys \['type', 3\]",
    ),
    "base64 that is a number": (
        [{"role": "user", "content": [{"type": "image", "base64": 777}]}],
        "`base64` is not valid base64",
    ),
    "base64 beyond ASCII": (
        [{"role": "user", "content": [{"type": "image", "base64": "\u00e9\u00e9\u00e9\u00e9"}]}],
        "`base64` is not valid base64",
    ),
}


@pytest.mark.parametrize("what", REFUSED_CHATS)
def test_what_is_no_chat_is_refused(what):
    chat, said = REFUSED_CHATS[what]
    with pytest.raises(ValueError) as refusal:
        build().apply_chat_template(chat, tokenize=True)
    check_refusal(refusal.value, said=said)


def test_a_role_of_a_request_that_is_a_list_is_refused():
    with pytest.raises(ValueError, match=r"A message has the role \"\['user'\]\""):
        read_messages([{"role": ["user"], "content": "x"}])


@pytest.mark.parametrize("part", ["text", "image_url", None, 7, [], {"type": "text"}])
def test_a_part_of_a_message_that_is_none_is_refused(part):
    with pytest.raises(ValueError, match="A message has a part of type .* Send"):
        read_messages([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (2, 1)])
@pytest.mark.parametrize("images", [0, 1])
def test_a_mask_of_other_rows_or_fewer_slots_than_ids_is_refused(shape, images):
    rows = torch.tensor([[5, IMAGE_TOKEN if images else 8, 3], [6, 7, 9]])
    pixels = tiny_images(1)[:images]
    with pytest.raises(ValueError) as refusal:
        tiny_model("dfmr")(input_ids=rows, attention_mask=torch.ones(shape, dtype=torch.long), pixel_values=pixels)
    check_refusal(
        refusal.value, said=f"`attention_mask` covers {shape[0]} rows of {shape[1]} slots for 2 rows of 3 ids"
    )


@pytest.mark.parametrize("budget", [torch.tensor(9), np.array(9)])
@torch.no_grad()
def test_a_budget_that_is_a_tensor_of_one_number_means_nothing_to_text_alone(budget):
    logits = tiny_model("dfmr")(input_ids=torch.tensor([[5, 6]]), visual_token_budget=budget).logits
    assert logits.isfinite().all()


def test_labels_of_positions_that_are_not_scored_are_refused():
    rows = torch.tensor([[5, IMAGE_TOKEN, 3]])
    with pytest.raises(ValueError) as refusal:
        tiny_model("dfmr")(input_ids=rows, labels=rows, logits_to_keep=2, pixel_values=tiny_images(1))
    check_refusal(refusal.value, said=r"`labels` have shape \(1, 3\) for scores of shape \(1, 2\)")


def test_images_of_another_size_than_the_towers_are_refused_by_name():
    model = tiny_model("dfmr")
    with pytest.raises(ValueError) as refusal:
        model(input_ids=torch.tensor([[5, IMAGE_TOKEN]]), pixel_values=torch.zeros(1, 3, 5, 5))
    check_refusal(refusal.value, said="`pixel_values` of 5x5 pixels cannot be read by the vision tower")


def test_a_normalisation_by_zero_gives_no_pixels():
    processor = build()
    with np.errstate(all="ignore"), pytest.raises(ValueError) as refusal:
        processor(images=[Image.new("RGB", (8, 8), "red")], image_std=[0.0, 1.0, 1.0])
    check_refusal(refusal.value, said="gives pixels that are not finite")
