"""What a serving engine does with processor and model: counts, spans, image features, rows, language model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from tests.conftest import IMAGE_TOKEN, tiny_model
from tests.fresh_process import run_without_package
from tests.test_convert import character_tokenizer


pytestmark = pytest.mark.compat

PROMPT = "Is <image> like <image>, or like <image>?"
COUNTS = (4, 9, 36)
# router, options of the call
KNOWN = {
    "fixed": ({"type": "fixed", "rung": 1}, {}),
    "pixel_std": ({"type": "pixel_std"}, {}),
    "pixel_std under a ceiling": ({"type": "pixel_std"}, {"visual_token_budget": {"ceiling": 9}}),
    "pixel_std under a total": ({"type": "pixel_std"}, {"visual_token_budget": {"total": 50}}),
    "feature_std with rungs": ({"type": "feature_std"}, {"visual_rungs": [2, 0, 1]}),
    "feature_std with a budget": ({"type": "feature_std"}, {"visual_token_budget": 20}),
}
without_hooks = not hasattr(ProcessorMixin, "get_text_with_replacements")


def images() -> list[Image.Image]:
    """Noisy, flat, and flat but for a border that only large windows hold."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    flat = Image.new("RGB", (24, 24), "teal")
    striped = flat.copy()
    striped.paste("orange", (0, 0, 8, 24))
    return [Image.fromarray(noise), flat, striped]


def build(router: dict) -> tuple[AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor]:
    model = tiny_model("dfmr", router=dict(router))
    return model, AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer(), layout="expanded")


def rows_of(model, **inputs) -> list[torch.Tensor]:
    """`get_image_features` as engines call it, on either release of transformers."""
    features = model.get_image_features(**inputs)
    return list(getattr(features, "pooler_output", features))


def engine_logits(model, input_ids, spans, rows) -> torch.Tensor:
    """Logits of one expanded prompt whose placeholder spans `(start, length)` take the rows of the images."""
    embeds = model.get_input_embeddings()(input_ids).clone()
    for (start, length), row in zip(spans, rows, strict=True):
        assert row.shape == (length, embeds.shape[-1])
        embeds[0, start : start + length] = row
    return model.lm_head(model.get_decoder()(inputs_embeds=embeds).last_hidden_state)


def assert_equals_the_compact_forward(model, processor, options, logits, spans):
    compact = processor(images=images(), text=PROMPT, layout="compact", return_tensors="pt", **options)
    expected = model(**compact).logits[0]
    # one row per compact position: text as it is, an image by its last token
    inside = {position for start, length in spans for position in range(start, start + length - 1)}
    aligned = logits[0, [position for position in range(logits.shape[1]) if position not in inside]]
    assert aligned.shape == expected.shape
    torch.testing.assert_close(aligned, expected, rtol=0, atol=1e-5)


def token_spans(offsets, entries) -> list[tuple[int, int]]:
    """First token and number of tokens of every replaced placeholder, from characters."""
    spans = []
    for entry in entries:
        first, last = entry["new_span"]
        inside = [index for index, (start, end) in enumerate(offsets) if first <= start < end <= last]
        spans.append((inside[0], len(inside)))
    return spans


@torch.no_grad()
@pytest.mark.skipif(without_hooks, reason="transformers 4 has no replacement hooks")
@pytest.mark.parametrize("router", [{"type": "fixed", "rung": 1}, {"type": "pixel_std"}])
def test_the_hooks_of_transformers_5_give_spans_that_the_features_fill(router):
    model, processor = build(router)
    processed, replacements = processor._process_images(images(), return_tensors="pt")
    texts, offsets = processor.get_text_with_replacements([PROMPT], replacements)
    encoded = processor.tokenizer(texts, return_offsets_mapping=True, return_tensors="pt")
    spans = token_spans(encoded["offset_mapping"][0].tolist(), offsets[0])
    assert len({length for _, length in spans}) == (3 if router["type"] == "pixel_std" else 1)
    rows = rows_of(model, pixel_values=processed["pixel_values"])
    logits = engine_logits(model, encoded["input_ids"], spans, rows)
    assert_equals_the_compact_forward(model, processor, {}, logits, spans)
    # and a call of the processor is the same
    inputs = processor(images=images(), text=PROMPT, return_text_replacement_offsets=True, return_tensors="pt")
    assert inputs["text_replacement_offsets"] == offsets
    assert torch.equal(inputs["input_ids"], encoded["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_replacement_offsets_give_spans_that_the_features_fill(name, one_by_one):
    router, options = KNOWN[name]
    model, processor = build(router)
    inputs = processor(
        images=images(), text=PROMPT, return_text_replacement_offsets=True, return_tensors="pt", **options
    )
    entries, expanded = inputs["text_replacement_offsets"][0], PROMPT
    for entry in reversed(entries):
        first, last = entry["span"]
        expanded = expanded[:first] + entry["replacement"] + expanded[last:]
    encoded = processor.tokenizer(expanded, return_offsets_mapping=True)
    assert encoded["input_ids"] == inputs["input_ids"][0].tolist()
    spans = token_spans(encoded["offset_mapping"], entries)
    rungs = inputs.get("visual_rungs")
    if one_by_one:
        rows = [
            row
            for image in range(3)
            for row in rows_of(
                model,
                pixel_values=inputs["pixel_values"][image : image + 1],
                visual_rungs=None if rungs is None else rungs[image : image + 1],
            )
        ]
    else:
        rows = rows_of(model, pixel_values=inputs["pixel_values"], visual_rungs=rungs)
    logits = engine_logits(model, inputs["input_ids"], spans, rows)
    assert_equals_the_compact_forward(model, processor, options, logits, spans)
    # the model's own forward takes the same prompt
    passed = {
        key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values", "visual_rungs") if key in inputs
    }
    torch.testing.assert_close(model(**passed).logits, logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed", "feature_std with a budget", "feature_std with rungs"])
def test_counts_from_sizes_give_spans_where_sizes_tell(name):
    """As vLLM does: counts from sizes alone cut the positions of `mm_token_type_ids` into spans."""
    router, options = KNOWN[name]
    model, processor = build(router)
    inputs = processor(images=images(), text=PROMPT, return_tensors="pt", **options)
    sizes = inputs["image_sizes"].tolist()
    data = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
    positions = torch.where(inputs["mm_token_type_ids"][0] == 1)[0]
    chunks = positions.split(data["num_image_tokens"])
    spans = [(int(chunk[0]), len(chunk)) for chunk in chunks]
    assert all(int(chunk[-1]) - int(chunk[0]) + 1 == len(chunk) for chunk in chunks)
    assert sum(data["num_image_patches"]) == len(inputs["pixel_values"])
    rows = rows_of(model, pixel_values=inputs["pixel_values"], visual_rungs=inputs.get("visual_rungs"))
    logits = engine_logits(model, inputs["input_ids"], spans, rows)
    assert_equals_the_compact_forward(model, processor, options, logits, spans)


@pytest.mark.parametrize("kind", ["pixel_std", "feature_std"])
def test_where_sizes_do_not_tell_they_give_the_most_to_reserve(kind):
    _, processor = build({"type": kind})
    data = processor._get_num_multimodal_tokens(image_sizes=[(24, 24)] * 3)
    assert data["num_image_tokens"] == [COUNTS[-1]] * 3
    capped = processor._get_num_multimodal_tokens(image_sizes=[(24, 24)], visual_token_budget={"ceiling": 10})
    assert capped["num_image_tokens"] == [9]
    if kind == "pixel_std":
        inputs = processor(images=images(), text=PROMPT)
        assert (
            sum(inputs["mm_token_type_ids"][0])
            == sum(processor.count_tokens(images()))
            < sum(data["num_image_tokens"])
        )


@torch.no_grad()
def test_reserved_but_unknown_counts_end_in_a_clear_error():
    model, processor = build({"type": "feature_std"})
    with pytest.raises(
        ValueError, match="needs every image's token count before the model runs.*'feature_std' router"
    ):
        processor(images=images(), text=PROMPT)
    reserved = "".join(
        piece + (processor.replace_image_token({}, index) if index < 3 else "")
        for index, piece in enumerate(PROMPT.split("<image>"))
    )
    ids = processor.tokenizer(reserved, return_tensors="pt")["input_ids"]
    assert (ids == IMAGE_TOKEN).sum() == 3 * COUNTS[-1]
    pixel_values = processor(images=images(), return_tensors="pt")["pixel_values"]
    assert sum(map(len, rows_of(model, pixel_values=pixel_values))) < 3 * COUNTS[-1]
    with pytest.raises(ValueError, match=r"has 108 image placeholders.*3 images with \d+ visual tokens"):
        model(input_ids=ids, pixel_values=pixel_values)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_chooses_by_itself_what_the_processor_foresaw(dtype):
    model, processor = build({"type": "pixel_std"})
    inputs = processor(images=images(), text=PROMPT, return_tensors="pt")
    assert inputs["visual_rungs"].tolist() == [2, 0, 1]
    encoded = model.to(dtype).encode_images(inputs["pixel_values"])
    assert list(encoded.rungs) == inputs["visual_rungs"].tolist()
    assert list(encoded.lengths) == processor.count_tokens(images())
    if dtype != torch.float16:  # an engine may hand the pixels over in the model's precision
        again = model.encode_images(inputs["pixel_values"].to(dtype))
        assert torch.equal(again.scores, encoded.scores)


ELSEWHERE = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, prompt, *paths = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = [Image.open(path) for path in paths]
inputs = processor(images=images, text=prompt, return_tensors="pt")
chosen = model.encode_images(inputs["pixel_values"]).rungs
print(json.dumps([processor.count_tokens(images), inputs["visual_rungs"].tolist(), list(chosen)]))
"""


def test_pixels_decide_alike_where_the_package_is_absent(tmp_path):
    model, processor = build({"type": "pixel_std"})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for image, path in zip(images(), paths, strict=True):
        image.save(path)
    found = run_without_package(ELSEWHERE, tmp_path / "model", PROMPT, *paths, folder=tmp_path)
    assert json.loads(found.splitlines()[-1]) == [[36, 4, 9], [2, 0, 1], [2, 0, 1]]


def test_both_layouts_generate_the_same_under_pixel_routing():
    model, processor = build({"type": "pixel_std"})
    new = []
    for layout in ("compact", "expanded"):
        inputs = processor(images=images(), text=PROMPT, layout=layout, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    assert new[0] == new[1] and len(new[0]) == 8
