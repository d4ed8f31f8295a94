"""Videos through processor and model: every frame is routed, counted and answered for by itself."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from adaptive_llava import AdaptiveLlavaProcessor
from tests.conftest import IMAGE_TOKEN, tiny_model
from tests.test_loading_paths import picture, word_tokenizer


pytestmark = pytest.mark.compat


def processor_of(model, **options) -> AdaptiveLlavaProcessor:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # also told apart without spaces
    return AdaptiveLlavaProcessor.from_config(model.config, tokenizer, **options)


def clip(frames: int) -> list[Image.Image]:
    """From flat to noisy, so that a router has something to tell apart."""
    noisy = picture(7).resize((24, 24))
    flat = Image.new("RGB", (24, 24), (90, 120, 30))
    return [Image.blend(flat, noisy, frame / max(1, frames - 1)) for frame in range(frames)]


def test_a_video_is_one_placeholder_outside_and_one_image_per_frame_inside():
    processor = processor_of(tiny_model("dfmr"))
    still = picture(1)
    inputs = processor(
        images=still, videos=[clip(3), clip(2)], text="w5 <video> w6 <image> w7 <video>", return_tensors="pt"
    )
    plain = processor(
        images=[*clip(3), still, *clip(2)],
        text="w5 <image><image><image> w6 <image> w7 <image><image>",
        return_tensors="pt",
    )
    assert inputs.keys() == plain.keys()
    assert all(torch.equal(inputs[key], plain[key]) for key in plain)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 6


def test_every_frame_gets_its_own_count_and_a_total_is_shared_over_frames():
    model = tiny_model("dfmr")
    inputs = processor_of(model)(videos=[clip(8)], text="w5 <video> w6", return_tensors="pt")
    with torch.no_grad():
        routed = model(**inputs)
        shared = model(**inputs, visual_token_budget={"total": 100})
    assert len(set(routed.num_visual_tokens.tolist())) > 1
    assert shared.num_visual_tokens.sum() <= 100
    # 8 frames at 4 tokens leave 68, which is enough for two frames of 36
    raised = shared.num_visual_tokens == 36
    assert raised.sum() == 2 and set(raised.nonzero().flatten().tolist()) == set(
        shared.visual_router_scores.topk(2).indices.tolist()
    )


def test_256_frames_of_one_token_each_fit_in_one_prompt():
    model = tiny_model("llava-mini", prefusion_layers=0)
    inputs = processor_of(model)(videos=[clip(256)], text="w5 <video> w6", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert output.num_visual_tokens.tolist() == [1] * 256
    expanded = processor_of(model, layout="expanded")(videos=[clip(256)], text="w5 <video> w6", return_tensors="pt")
    assert torch.equal(expanded["input_ids"], inputs["input_ids"])


def test_frames_in_the_expanded_layout_cost_what_the_model_spends():
    model = tiny_model("dfmr", router={"type": "fixed", "rung": 1})
    processor = processor_of(model, layout="expanded")
    inputs = processor(
        videos=[clip(3)], text="w5 <video> w6", return_tensors="pt", return_text_replacement_offsets=True
    )
    ((offset,),) = inputs.pop("text_replacement_offsets")
    assert offset["type"] == "video" and offset["text"] == "<video>" and offset["span"] == (3, 10)
    assert offset["replacement"] == "<image>" * 27
    with torch.no_grad():
        assert model(**inputs).num_visual_tokens.tolist() == [9] * 3


def test_a_chat_shows_a_video_where_its_part_stands():
    model = tiny_model("dfmr")
    processor = processor_of(model, chat_template="chatml")
    chat = [
        {"role": "user", "content": [{"type": "video", "video": clip(3)}, {"type": "text", "text": "w5 <video> w6"}]},
        {"role": "assistant", "content": "w7 w8"},
    ]
    prompt = processor.apply_chat_template(chat)
    assert "user\n<video>\nw5" in prompt and prompt.count("<video>") == 1  # the written one is broken by a mark
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, num_frames=2
    )
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 2 and inputs["pixel_values"].shape[0] == 2
    said = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert 7 in said and IMAGE_TOKEN not in said and 5 not in said


def test_a_video_named_by_url_is_read_from_the_disk_and_not_fetched(tmp_path):
    processor = processor_of(tiny_model("dfmr"), chat_template="chatml")
    for number in range(2):
        clip(2)[number].save(tmp_path / f"{number}.png")
    for url, wanted in ((str(tmp_path), 2), ("https://host/film.mp4", None)):
        chat = [{"role": "user", "content": [{"type": "video", "url": url}]}]
        if wanted is None:
            with pytest.raises(ValueError, match="Video 0 is a URL .* and videos are not fetched"):
                processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        else:
            inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            assert inputs["pixel_values"].shape[0] == wanted


def test_options_of_a_call_may_be_nested_in_their_group():
    processor = processor_of(tiny_model("dfmr"))
    nested = processor(
        text="w5 <video>", videos=[clip(3)], videos_kwargs={"num_frames": 2},
        text_kwargs={"return_mm_token_type_ids": False}, return_tensors="pt",
    )  # fmt: skip
    flat = processor(
        text="w5 <video>", videos=[clip(3)], num_frames=2, return_mm_token_type_ids=False, return_tensors="pt"
    )
    assert sorted(nested) == sorted(flat) == ["attention_mask", "image_sizes", "input_ids", "pixel_values"]
    assert torch.equal(nested["pixel_values"], flat["pixel_values"]) and len(flat["pixel_values"]) == 2


def test_the_word_video_is_text_where_no_video_is_given():
    processor = processor_of(tiny_model("dfmr"))
    assert processor(text="w5 <video> w6")["input_ids"] == [processor.tokenizer("w5 <video> w6")["input_ids"]]


@pytest.mark.parametrize("layout", ["sequence", "spatial_unpad"])
def test_frames_are_not_tiled_beside_images_that_are(layout):
    model = tiny_model("dfmr", tiling={"type": "anyres", "view_layout": layout})
    processor = processor_of(model)
    inputs = processor(
        images=picture(1), videos=[clip(2)], text="w5 <image> w6 <video>", return_tensors="pt", padding=True
    )
    with torch.no_grad():
        outputs = model(**inputs)
    assert inputs["image_sizes"].tolist()[1:] == [[0, 0]] * 2
    assert model.encode_images(inputs["pixel_values"], inputs["image_sizes"]).views_per_image == (5, 1, 1)
    assert len(outputs.visual_rungs) == 7 and torch.isfinite(outputs.logits).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": [clip(2)], "text": "w5"}, r"Row 0 of `text` has 0 '<video>' placeholder\(s\), but 1 video\(s\)"),
        ({"videos": [clip(2)], "text": "<video> <video>"}, "has 2 '<video>' placeholder"),
        ({"videos": [[clip(2)], None], "text": ["<video>", "w5", "w6"]}, "`videos` has 2 rows for 3 prompts"),
        ({"videos": [clip(2)], "text": "<video>", "fps": 2, "num_frames": 1}, "both given"),
        ({"videos": [clip(2)], "text": "<video>", "fps": 2}, "does not tell its length in seconds"),
        ({"audio": [0.0], "text": "w5"}, "reads images and videos only"),
    ],
)
def test_videos_and_placeholders_that_disagree_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor_of(tiny_model("dfmr"))(**arguments)


ROUTERS = {
    "fixed": {"type": "fixed", "rung": 1},
    "pixel_std": {"type": "pixel_std", "thresholds": [0.3, 0.6]},
}


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("tiling", [None, {"type": "anyres"}, {"type": "anyres", "several_images": "whole"}])
def test_counting_a_prompt_with_videos_counts_every_frame_as_the_model_does(router, tiling):
    model = tiny_model("dfmr", router=ROUTERS[router], tiling=tiling)
    processor = processor_of(model)
    media = {"images": [picture(1)], "videos": [clip(5), clip(2)], "num_frames": 3}
    inputs = processor(text="w5 <image> w6 <video> w7 <video>", return_tensors="pt", **media)
    with torch.no_grad():
        spent = model(**inputs).num_visual_tokens.tolist()
    assert processor.count_tokens(**media) == spent and len(spent) == 6
    shared = processor.count_tokens(**media, visual_token_budget={"total": 120})
    with torch.no_grad():
        assert model(**inputs, visual_token_budget={"total": 120}).num_visual_tokens.tolist() == shared != spent


@pytest.mark.parametrize(
    "given",
    [
        {"videos": [[clip(2)], [clip(2)]]},
        {"videos": [clip(2)], "images": [[picture(1)], [picture(2)]]},
        {"videos": [clip(2)], "images": 2},
        {"videos": [clip(2)], "image_sizes": [(24, 24)]},
    ],
)
def test_videos_of_several_prompts_are_not_counted_at_once(given):
    with pytest.raises(ValueError, match="`videos` are counted for one prompt at a time. Pass its images"):
        processor_of(tiny_model("dfmr")).count_tokens(**given)
