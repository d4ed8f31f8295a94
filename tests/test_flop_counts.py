"""FLOPs from a config equal what torch counts part by part on a small random model, and the papers' figures at 7B."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, OPTConfig

from adaptive_llava import PRESETS, AdaptiveLlavaConfig
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.training.flop_counts import count_flops, kv_cache_bytes
from tests.conftest import BOS, IMAGE_TOKEN, TINY_COMPRESSORS, TINY_ROUTERS, tiny_images, tiny_model


TEXT = [BOS, 5, 6, 7, 8, 9, 10]
# Parts by their place in the model.
PLACES = {
    "vision_tower": "model.vision_tower",
    "multi_block_fusion": "model.multi_block_fusion",
    "router": "model.router",
    "compressor": "model.compressor",
    "projector": "model.multi_modal_projector",
    "modality_prefusion": "model.modality_prefusion",
    "decoder": "model.language_model",
    "head": "lm_head",
}
TILE = {"type": "anyres", "pinpoints": [[24, 48], [48, 24], [48, 48]]}
OTHERS = {
    "siglip": ("dfmr", {"vision": "siglip"}),
    "llama": ("dfmr", {"text": "llama"}),
    "stf-paper": ("stf", {"compressor": {"type": "spatial_fusion", "variant": "paper", "fused_tokens": 2}}),
    "prefusion-paper": ("llava-mini", {"prefusion_variant": "paper"}),
    "mosaic": ("llava-mini", {"tiling": {"type": "mosaic", "n": 2}}),
    "router-of-blocks": ("dfmr", {"router": TINY_ROUTERS["classifier"]}),
}


def counted_by_torch(model, pixels, rungs, images=1, **inputs):
    """FLOPs of one real forward, by part."""
    ids = torch.tensor([[*TEXT[:2], *[IMAGE_TOKEN] * images, *TEXT[2:]]])
    model.requires_grad_(False)  # the counter follows gradients where there are any
    # the counter knows the matrix products of plain attention on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, visual_rungs=rungs, logits_to_keep=1, **inputs)
    name, counts = type(model).__name__, counter.get_flop_counts()
    parts = {part: sum(counts.get(f"{name}.{place}", {}).values()) for part, place in PLACES.items()}
    assert sum(parts.values()) == counter.get_total_flops(), "something between the parts multiplies matrices"
    return parts


def check(model, expected, counted):
    assert set(expected.parts) == set(counted)
    for part, flops in expected.parts.items():
        assert flops == pytest.approx(counted[part], rel=0.01), part
    assert expected.end_to_end == pytest.approx(sum(counted.values()), rel=0.01)
    assert expected.end_to_end == expected.encoding + expected.prefill


@pytest.mark.parametrize("preset", PRESETS)
def test_every_part_of_every_preset_is_counted_at_all_its_counts(preset):
    model = tiny_model(preset)
    for rung, count in enumerate(model.config.visual_token_counts):
        counted = counted_by_torch(model, tiny_images(1), [rung])
        check(model, count_flops(model.config, count, len(TEXT)), counted)


@pytest.mark.parametrize("name", TINY_COMPRESSORS)
def test_every_compressor_is_counted_for_two_images(name):
    model = tiny_model("llava", compressor=TINY_COMPRESSORS[name])
    count = model.config.visual_token_counts[-1]
    top = len(model.config.visual_token_counts) - 1
    counted = counted_by_torch(model, tiny_images(2), [top, top], images=2)
    check(model, count_flops(model.config, count, len(TEXT), images=2), counted)


@pytest.mark.parametrize("preset", ["dfmr", "llava-mini", "dynamic-resampler-multi"])
def test_images_of_one_prompt_may_have_counts_of_their_own(preset):
    model = tiny_model(preset, compressor={"type": "query_resampler", "counts": [1, 4, 9], "num_heads": 2})
    counted = counted_by_torch(model, tiny_images(3), [2, 0, 2], images=3)
    check(model, count_flops(model.config, [9, 1, 9], len(TEXT)), counted)


def test_tiled_images_of_one_prompt_may_differ_in_size():
    model = tiny_model("dfmr", tiling=TILE)
    sizes = [(48, 24), (24, 24), (48, 48)]
    views = [3, 3, 5]
    pixels = torch.zeros(3, 5, 3, 24, 24)
    for image, number in enumerate(views):
        pixels[image, :number] = tiny_images(number)
    rungs = [0] * 3 + [1] * 3 + [2] * 5
    counted = counted_by_torch(model, pixels, rungs, images=3, image_sizes=torch.tensor(sizes))
    tokens = [3 * 4 + 2, 3 * 9 + 1, 5 * 36 + 2]
    counts = count_flops(model.config, tokens, len(TEXT), image_size=sizes)
    check(model, counts, counted)
    with pytest.raises(ValueError, match="`image_size` has 3 entries for 2 images"):
        count_flops(model.config, tokens[:2], len(TEXT), image_size=sizes)


def test_views_of_one_image_may_have_rungs_of_their_own():
    model = tiny_model("dfmr", tiling=TILE)
    rungs, sizes = [2, 0, 1, 0, 0], torch.tensor([[48, 48]])
    counted = counted_by_torch(model, tiny_images(5).unsqueeze(0), rungs, image_sizes=sizes)
    tokens = 36 + 4 + 9 + 4 + 4 + 2  # with a newline for each row of tiles
    check(model, count_flops(model.config, tokens, len(TEXT), image_size=(48, 48), rungs=rungs), counted)
    for wrong, message in (([2], "`rungs` has 1 entries, and these images have 5 views"), ([3] * 5, "`rungs` has 3.")):
        with pytest.raises(ValueError, match=message):
            count_flops(model.config, tokens, len(TEXT), image_size=(48, 48), rungs=wrong)


def test_the_table_of_compressors_is_complete():
    assert {row["type"] for row in TINY_COMPRESSORS.values()} == set(COMPRESSORS)


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_options_and_tilings_are_counted(name):
    preset, fields = OTHERS[name]
    model = tiny_model(preset, **fields)
    pixels = tiny_images(5).unsqueeze(0) if name == "mosaic" else tiny_images(1)
    counted = counted_by_torch(model, pixels, [0])
    check(model, count_flops(model.config, model.config.visual_token_counts[0], len(TEXT)), counted)


@pytest.mark.parametrize(
    "preset, layout, tokens",
    [("avg-pool", "spatial_unpad", 9 + 6 * 7), ("dfmr", "sequence", 5 * 9 + 2), ("stf", "sequence", 5 * 9 + 2)],
)
def test_the_views_of_a_tiled_image_are_counted_each(preset, layout, tokens):
    model = tiny_model(preset, tiling=TILE | {"view_layout": layout})
    rung = min(1, len(model.config.visual_token_counts) - 1)
    sizes = torch.tensor([[48, 48]])
    counted = counted_by_torch(model, tiny_images(5).unsqueeze(0), [rung] * 5, image_sizes=sizes)
    check(model, count_flops(model.config, tokens, len(TEXT), image_size=(48, 48)), counted)


# ---- LLaVA-1.5-7B


@pytest.mark.parametrize(
    "preset, fields, tokens, teraflops",
    [
        ("llava", {}, 576, 7.634),
        ("stf", {"compressor": {"type": "spatial_fusion", "fused_tokens": 2}}, 288, 3.774),
        ("stf", {}, 144, 1.876),
    ],
)
def test_the_figures_of_llava_stf_count_visual_tokens_in_the_decoder_alone(preset, fields, tokens, teraflops):
    config = AdaptiveLlavaConfig.from_preset(preset, **fields)  # CLIP-L/336 and LLaMA-7B
    counts = count_flops(config, tokens, 40)
    assert counts.visual_only / 1e12 == pytest.approx(teraflops, abs=0.0005)
    layers, width, hidden = 32, 4096, 11008
    formula = 2 * layers * (4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * hidden)
    assert counts.visual_only == formula
    assert counts.end_to_end > counts.decoder > counts.visual_only


def test_llava_mini_saves_what_its_paper_says_end_to_end():
    llava = count_flops(AdaptiveLlavaConfig.from_preset("llava"), 576, 40)
    mini = count_flops(AdaptiveLlavaConfig.from_preset("llava-mini"), 1, 40)
    assert llava.end_to_end / 1e12 == pytest.approx(8.55, rel=0.01)
    assert mini.end_to_end / 1e12 == pytest.approx(1.96, rel=0.01)
    assert 1 - mini.end_to_end / llava.end_to_end == pytest.approx(0.77, abs=0.005)
    assert mini.compressor / 1e9 == pytest.approx(2.42, abs=0.01)


# ---- memory


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_the_cache_takes_the_bytes_of_the_formula(text):
    model = tiny_model("avg-pool", text=text)
    ids = torch.tensor([[*TEXT, IMAGE_TOKEN]])
    with torch.no_grad():
        cache = model(input_ids=ids, pixel_values=tiny_images(1), use_cache=True).past_key_values
    # (1, key heads, tokens, head dim)
    tensors = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    used = sum(state.numel() * state.element_size() for state in tensors)
    assert kv_cache_bytes(model.config.text_config, len(TEXT) + 9, bytes_per_value=4) == used


def test_an_image_of_llava_7b_takes_300_megabytes_of_cache_and_one_of_llava_mini_half_a_megabyte():
    text = AdaptiveLlavaConfig().text_config
    assert kv_cache_bytes(text, 576) / 1e6 == pytest.approx(302.0, abs=0.05)
    assert kv_cache_bytes(text, 1) / 1e6 == pytest.approx(0.524, abs=0.0005)


# ---- what cannot be counted


@pytest.mark.parametrize(
    "preset, arguments, fields, message",
    [
        ("dfmr", (10, 7), {}, "`visual_tokens=10` is no count that this model makes .* one of: 4, 9, 36"),
        ("dfmr", (9, 0), {}, "`text_tokens=0` must be a whole number >= 1"),
        ("dfmr", (9, 7), {"images": 0}, "`images=0` must be a whole number >= 1"),
        ("dfmr", (9, 7), {"image_size": (48, 48)}, "tiling 'none' makes the same views of every image"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(preset, arguments, fields, message):
    config = tiny_model(preset).config
    with pytest.raises(ValueError, match=message):
        count_flops(config, *arguments, **fields)


def test_anyres_asks_for_the_size_of_the_image():
    config = tiny_model("avg-pool", tiling=TILE).config
    with pytest.raises(ValueError, match="`image_size=None`: tiling 'anyres' needs it"):
        count_flops(config, 9, 7)


def test_backbones_whose_flops_are_not_known_are_named():
    other = AdaptiveLlavaConfig(vision_config=Dinov2Config(image_size=56))
    with pytest.raises(ValueError, match="'dinov2': its FLOPs are not known. Known: clip_vision_model"):
        count_flops(other, 16, 7)
    other = AdaptiveLlavaConfig(text_config=OPTConfig())
    with pytest.raises(ValueError, match="'opt': its FLOPs are not known. Known: gemma"):
        count_flops(other, 576, 7)
